"""Adapters around linear layers, to check that they count wherever a layer does."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """What adapters put in the place of a linear layer: it, and a product of two small matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.in_features = base, base.in_features
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Both for the same tokens."""
        found: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return found


def adapt(module: nn.Module, name: str) -> nn.Module:
    """Put an adapter around a linear layer.

    Args:
        module: Is changed.
        name: Of the layer in it.

    Returns:
        What the module was, with the adapter added to the weights of the layer.
    """
    merged = copy.deepcopy(module)
    parent, _, last = name.rpartition(".")
    adapter = LowRank(cast(nn.Linear, module.get_submodule(name)))
    setattr(module.get_submodule(parent), last, adapter)
    with torch.no_grad():
        cast(nn.Linear, merged.get_submodule(name)).weight.add_(adapter.up @ adapter.down)
    return merged
