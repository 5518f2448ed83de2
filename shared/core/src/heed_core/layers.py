"""The matrix of a linear layer, also where something was put around the layer or in its place.

A module that calls its layers gets for nothing what others do to them: low-rank adapters, pruning,
quantisation, hooks. Where a mechanism needs the matrix itself (the product of two, some of its
rows), it asks here, so that these count there too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def matrix_and_bias(
    layer: nn.Module,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """W and b of what a layer computes: W x + b.

    A plain `nn.Linear`, also with parametrizations, holds them. Any other layer, and one with
    hooks, is called with the rows of the identity, which costs as much as so many tokens. What it
    does at random, such as the dropout of an adapter, is then the same for all tokens.

    Args:
        layer: `nn.Linear`, or what stands in its place: linear too, with `in_features`.

    Raises:
        TypeError: It does not say how many channels it takes.
    """
    if isinstance(layer, nn.Linear) and _plain(layer):
        return layer.weight, layer.bias
    width = getattr(layer, "in_features", None)
    if not isinstance(width, int):
        raise TypeError(
            f"{type(layer).__name__} stands in the place of nn.Linear and must have its "
            "in_features, the number of channels that it takes"
        )
    dtype, device = type_and_place(layer)
    found: Tensor = layer(torch.eye(width + 1, width, dtype=dtype, device=device))
    bias = found[width]  # of a row of zeros
    return (found[:width] - bias).mT, bias


def held_matrix_and_bias(
    name: str, layer: nn.Module
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
    """The same for who copies them into another module, where nothing else would be kept.

    Args:
        name: Of the layer, for the message.
        layer: Plain, also with parametrizations.

    Raises:
        ValueError: It is another layer, or has hooks.
    """
    if isinstance(layer, nn.Linear) and _plain(layer):
        return layer.weight, layer.bias
    what = "one with hooks" if isinstance(layer, nn.Linear) else type(layer).__name__
    raise ValueError(
        f"{name} must be a plain nn.Linear, whose weights can be copied, got {what}: merge it into "
        "its weights or remove it first"
    )


def type_and_place(layer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The type of the tokens that a layer takes, and the device where it is.

    A layer whose weights are packed away, as those of torch's quantised layers, takes torch's
    default type on the CPU.
    """
    own = getattr(layer, "weight", None)
    tensors = [own] if isinstance(own, Tensor) else []
    for tensor in (*tensors, *layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def _plain(layer: nn.Linear) -> bool:
    """Whether nothing but the weights decides what a call gives."""
    hooked = len(layer._forward_hooks) > 0 or len(layer._forward_pre_hooks) > 0
    replaced = "forward" in vars(layer) or type(layer).forward is not nn.Linear.forward
    return not hooked and not replaced
