"""The `spconv` back-end: spconv's native algorithm on our rulebooks.

spconv's layers are not used, only its functions below them, which take pairs of rows: the layers
build a rulebook for each parallel branch, accept coordinates that are outside of the grid or
twice, refuse empty tensors, drop or refuse a bias in eval mode on the CPU, and number the rows of a
strided convolution in an order of their own.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed_core.sparse.rulebook import Rulebook


@cache
def installed() -> bool:
    """Whether spconv can be found; it is imported only when it runs."""
    return importlib.util.find_spec("spconv") is not None


@cache
def _library() -> tuple[ModuleType, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and pccm, about names that spconv imports
        from spconv.core import ConvAlgo  # type: ignore[import-untyped]
        from spconv.pytorch import functional  # type: ignore[import-untyped]

    return functional, ConvAlgo.Native


def run(
    features: Float[Tensor, "n i"],
    weight: Float[Tensor, "o volume i"],
    rulebook: Rulebook,
) -> Float[Tensor, "m o"]:
    """Convolve rows along a rulebook."""
    functional, native = _library()
    if rulebook.num_pairs == 0:
        nothing = features.sum() + weight.sum()  # keeps both in the graph, with zero gradients
        return features.new_zeros(rulebook.num_out, weight.shape[0]) + 0.0 * nothing
    mirrored = rulebook.centre is not None and rulebook.volume % 2 == 1
    convolve = functional.indice_subm_conv if mirrored else functional.indice_conv
    pairs, counts = _padded_pairs(rulebook)
    kernel = weight.contiguous()[:, :, None, None]  # (o, volume, 1, 1, i): three spatial axes
    output: Tensor = convolve(
        features.contiguous(), kernel, pairs, counts, rulebook.num_out, native
    )
    return output


def _padded_pairs(
    rulebook: Rulebook,
) -> tuple[Int[Tensor, "2 volume longest"], Int[Tensor, " volume"]]:
    """Pairs in spconv's layout: int32, filled up with -1."""
    lengths = [len(rows) for rows in rulebook.sources]
    device = rulebook.sources[0].device
    padded = torch.full((2, len(lengths), max(lengths)), -1, dtype=torch.int32, device=device)
    for k, length in enumerate(lengths):
        padded[0, k, :length] = rulebook.sources[k]
        padded[1, k, :length] = rulebook.targets[k]
    return padded, torch.tensor(lengths, dtype=torch.int32, device=device)
