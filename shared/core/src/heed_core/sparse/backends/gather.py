"""The `torch` back-end: gather, multiply, add, with a backward that gathers again.

Autograd would keep a gathered copy of the features per kernel cell, `volume` times the memory of
the input; this keeps the input alone. The kernel cell under which every row meets itself needs no
gather. Half-precision rows are multiplied in their type and added up in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from heed_core.sparse.rulebook import Rulebook, RulebookTable


def run(
    features: Float[Tensor, "n i"],
    weight: Float[Tensor, "o volume i"],
    rulebook: Rulebook | RulebookTable,
) -> Float[Tensor, "m o"]:
    """Convolve rows along a rulebook."""
    if isinstance(rulebook, RulebookTable):
        return _by_table(features, weight, rulebook)
    output: Tensor = _Convolution.apply(features, weight, rulebook)  # type: ignore[no-untyped-call]
    return output


def _by_table(
    features: Float[Tensor, "n i"],
    weight: Float[Tensor, "o volume i"],
    rulebook: RulebookTable,
) -> Float[Tensor, "m o"]:
    """One gather with a row of zeros for empty cells, one product; all sizes known in advance."""
    padded = torch.cat([features, features.new_zeros(1, features.shape[1])])
    windows = padded.index_select(0, rulebook.window_rows)  # (m * volume, i)
    taps = weight.flatten(1)  # (o, volume * i)
    return F.linear(windows.view(rulebook.num_out, taps.shape[1]), taps)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
        return _multiply_add(features, weight.permute(1, 2, 0), rulebook)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Rulebook], output: Tensor) -> None:
        features, weight, ctx.rulebook = inputs
        ctx.save_for_backward(features, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        rulebook: Rulebook = ctx.rulebook
        gradient = gradient.contiguous()
        for_features = for_weight = None
        if ctx.needs_input_grad[0]:
            taps = weight.transpose(0, 1)
            for_features = _multiply_add(gradient, taps, rulebook.swapped())
        if ctx.needs_input_grad[1]:
            for_weight = _outer_products(gradient, features, rulebook, weight)
        return for_features, for_weight, None


def _multiply_add(
    rows: Float[Tensor, "n i"], taps: Float[Tensor, "volume i o"], rulebook: Rulebook
) -> Float[Tensor, "m o"]:
    wide = torch.promote_types(rows.dtype, torch.float32)
    centre = rulebook.centre
    if centre is None:
        output = rows.new_zeros(rulebook.num_out, taps.shape[2], dtype=wide)
    else:
        output = (rows @ taps[centre]).to(wide)
    for k, (sources, targets) in enumerate(zip(rulebook.sources, rulebook.targets, strict=True)):
        if k != centre and len(sources):
            output.index_add_(0, targets, (rows.index_select(0, sources) @ taps[k]).to(wide))
    return output.to(rows.dtype)


def _outer_products(
    gradient: Float[Tensor, "m o"],
    rows: Float[Tensor, "n i"],
    rulebook: Rulebook,
    like: Float[Tensor, "o volume i"],
) -> Float[Tensor, "o volume i"]:
    result = torch.empty_like(like)
    for k, (sources, targets) in enumerate(zip(rulebook.sources, rulebook.targets, strict=True)):
        if k == rulebook.centre:
            result[:, k] = gradient.T @ rows
        else:
            result[:, k] = gradient.index_select(0, targets).T @ rows.index_select(0, sources)
    return result
