"""Softmax attention of queries to pairs of keys, in tiles: the n x n x n scores are never held.

    S_ijk = scale sum_c q_ic k1_jc k2_kc,    p = softmax over the allowed pairs (j, k) of S
    o_ic = sum_jk p_ijk v1_jc v2_kc

Tiles of queries and of both keys pass with a running maximum and sum, as in flash attention; the
backward pass computes tiles again from the logarithm of the sum. Time n n1 n2 (d + e), memory one
tile beside inputs and outputs. Tensors are float32 or float64.

The Triton kernels take a query at a time, and backwards also a tile of first keys, so that every
number is written by one program. They were compared with the torch form in Triton's interpreter
and compiled for a GPU, but never run on one, so that they run only when asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heed_core.kernels.triton_calls import KernelImpl, takes_triton, why_not_triton

TILE = 32
"""Queries, first keys and second keys of a tile."""

LONG_TILE = 128
"""First keys of a tile of the forward pass, whose products are faster when they are larger; the
gradients of a tile need several of its size."""

MOST_CHANNELS = 128
"""Of keys and of values, on the kernel."""

_GIVEN = (
    "Tensor query, Tensor key1, Tensor key2, Tensor value1, Tensor value2, Tensor? mask1, "
    "Tensor? mask2, bool causal, bool distinct, float scale, bool triton"
)


def why_not(device: str, dtype: torch.dtype, *, key_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot run a call; None if it can."""
    if (reason := why_not_triton(device, dtype)) is not None:
        return reason
    for name, width in (("keys", key_dim), ("values", value_dim)):
        if width > MOST_CHANNELS:
            return f"{name} have {width} channels, more than {MOST_CHANNELS}"
    return None


def wants_triton(impl: KernelImpl, query: Tensor, value: Tensor) -> bool:
    """Whether a call runs on the kernel.

    Raises:
        ValueError: `impl` is no name.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    return takes_triton(
        impl,
        lambda: why_not(
            query.device.type, query.dtype, key_dim=query.shape[-1], value_dim=value.shape[-1]
        ),
    )


class _Pairs(NamedTuple):
    """The arguments of the operator, in its order."""

    query: Tensor
    key1: Tensor
    key2: Tensor
    value1: Tensor
    value2: Tensor
    mask1: Tensor | None
    mask2: Tensor | None
    causal: bool
    distinct: bool
    scale: float


@torch.library.custom_op(
    "heed::pair_softmax", mutates_args=(), schema=f"({_GIVEN}) -> (Tensor, Tensor)"
)
def pair_softmax(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    value1: Tensor,
    value2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    distinct: bool,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (b, h, n, e) and the logarithm of the sum of exponentials (b, h, n).

    Args:
        query: (b, h, n, d).
        key1: (b, h, n1, d).
        key2: (b, h, n2, d).
        value1: (b, h, n1, e).
        value2: (b, h, n2, e).
        mask1: True = may attend, rank 4, broadcastable to (b, h, n, n1).
        mask2: The same for (b, h, n, n2).
        causal: j <= i + n1 - n and k <= i + n2 - n.
        distinct: j != k.
        scale: Of the products.
        triton: Whether the kernels run.
    """
    given = _Pairs(query, key1, key2, value1, value2, mask1, mask2, causal, distinct, scale)
    if triton:
        from heed_core.kernels.pair_softmax_triton import launch_forward

        return launch_forward(*given)
    output = query.new_zeros(*query.shape[:3], value1.shape[3])
    sums = query.new_zeros(query.shape[:3])
    for rows in _runs(query.shape[2], None, TILE):
        output[:, :, rows], sums[:, :, rows] = _of_queries(given, rows)
    return output, sums


@pair_softmax.register_fake
def _(query: Tensor, key1: Tensor, key2: Tensor, value1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:3], value1.shape[3])
    return output, query.new_empty(query.shape[:3])


@torch.library.custom_op(
    "heed::pair_softmax_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor output, Tensor sums, {_GIVEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def pair_softmax_backward(
    grad: Tensor, output: Tensor, sums: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from that of the output.

    Args:
        grad: Of the outputs.
        output: What `pair_softmax` gave.
        sums: The logarithms that it gave.
        arguments: What it was given.
    """
    *plain, triton = arguments
    given = _Pairs(*plain)
    if triton:
        from heed_core.kernels.pair_softmax_triton import launch_backward

        return launch_backward(grad, output, sums, *given)
    d_query, d_key1, d_key2, d_value1, d_value2 = (x.new_zeros(x.shape) for x in given[:5])
    found = d_query, d_key1, d_key2, d_value1, d_value2
    inner = (grad * output).sum(-1)
    level = sums.masked_fill(sums == -torch.inf, 0.0)
    for rows in _runs(given.query.shape[2], None, TILE):
        back = grad[:, :, rows], level[:, :, rows, None, None], inner[:, :, rows, None, None]
        for first, second in _tiles(rows, given, TILE):
            _give_back(found, given, back, rows, first, second)
    return found


@pair_softmax_backward.register_fake
def _(
    grad: Tensor, output: Tensor, sums: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key1, key2, value1, value2 = (x.new_empty(x.shape) for x in arguments[:5])
    return query, key1, key2, value1, value2


def _of_queries(given: _Pairs, rows: slice) -> tuple[Tensor, Tensor]:
    """Outputs and the logarithm of the sum for a run of queries, tile by tile."""
    asked = given.query[:, :, rows]
    top = asked.new_full(asked.shape[:3], -torch.inf)
    total = asked.new_zeros(asked.shape[:3])
    mixed = asked.new_zeros(*asked.shape[:3], given.value1.shape[3])
    for first, second in _tiles(rows, given, LONG_TILE):
        scores, _ = _scores(given, rows, first, second)
        higher = torch.maximum(top, scores.amax((-1, -2)))
        shift = higher.masked_fill(higher == -torch.inf, 0.0)
        shares = scores.sub_(shift[..., None, None]).exp_()
        keep = (top - shift).exp()
        read = shares @ given.value1[:, :, None, first]
        part = (read * given.value2[:, :, None, second]).sum(-2)
        mixed = mixed * keep[..., None] + part
        total = total * keep + shares.sum((-1, -2))
        top = higher
    return mixed / total.masked_fill(total == 0, 1.0)[..., None], top + total.log()


def _give_back(
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    given: _Pairs,
    back: tuple[Tensor, Tensor, Tensor],
    rows: slice,
    first: slice,
    second: slice,
) -> None:
    """Add what a tile gives to the gradients, in place.

    `back` holds, of the run of queries, the gradient of outputs (b, h, i, e), and as (b, h, i, 1,
    1) the logarithm of the sum and the product of outputs with their gradient.
    """
    to_query, to_key1, to_key2, to_value1, to_value2 = found
    grad, level, inner = back
    asked = given.query[:, :, rows, None]
    key1, value1 = given.key1[:, :, None, first], given.value1[:, :, None, first]
    key2, value2 = given.key2[:, :, None, second], given.value2[:, :, None, second]
    scores, pairs = _scores(given, rows, first, second)
    shares = (scores - level).exp()  # (b, h, i, k, j)
    weighed = grad[:, :, :, None] * value2  # (b, h, i, k, e)
    to_scores = given.scale * shares * (weighed @ value1.mT - inner)
    to_pairs = to_scores @ key1
    to_query[:, :, rows] += (to_pairs * key2).sum(-2)
    to_key2[:, :, second] += (to_pairs * asked).sum(2)
    to_key1[:, :, first] += to_scores.flatten(2, 3).mT @ pairs.flatten(2, 3)
    read = shares @ value1
    to_value2[:, :, second] += (read * grad[:, :, :, None]).sum(2)
    to_value1[:, :, first] += shares.flatten(2, 3).mT @ weighed.flatten(2, 3)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *given, output, sums = ctx.saved_tensors
    found = pair_softmax_backward(grad, output, sums, *given, *ctx.options)
    return (*found, None, None, None, None, None, None)


pair_softmax.register_autograd(_backward, setup_context=_remember)


@register_flop_formula([torch.ops.heed.pair_softmax])
def _flops(query: Any, key1: Any, key2: Any, value1: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key1[2] * key2[2] * (width + value1[3]))


def _runs(length: int, stop: int | None, step: int) -> Iterator[slice]:
    stop = length if stop is None else max(0, min(stop, length))
    for start in range(0, stop, step):
        yield slice(start, min(start + step, stop))


def _tiles(rows: slice, given: _Pairs, step: int) -> Iterator[tuple[slice, slice]]:
    """Runs of `step` first and of second keys; those that only come later are left out."""
    lengths = [key.shape[2] for key in (given.key1, given.key2)]
    later = [length - given.query.shape[2] for length in lengths]
    stops = [rows.stop + more if given.causal else None for more in later]
    for first in _runs(lengths[0], stops[0], step):
        for second in _runs(lengths[1], stops[1], TILE):
            yield first, second


def _scores(given: _Pairs, rows: slice, first: slice, second: slice) -> tuple[Tensor, Tensor]:
    """(b, h, i, k, j), -inf where not allowed, and the products of queries and second keys."""
    pairs = given.query[:, :, rows, None] * given.key2[:, :, None, second]
    scores = (pairs @ given.key1[:, :, None, first].mT).mul_(given.scale)
    if hidden := list(_hidden(given, rows, first, second)):
        scores.masked_fill_(reduce(or_, hidden), -torch.inf)
    return scores, pairs


def _hidden(given: _Pairs, rows: slice, first: slice, second: slice) -> Iterator[Tensor]:
    """Pairs of a tile that may not be attended to, broadcastable to (b, h, i, k, j)."""
    masks = (given.mask1, first, -2), (given.mask2, second, -1)
    for mask, keys, axis in masks:
        if mask is not None:
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
            mask = mask if mask.shape[3] == 1 else mask[..., keys]
            yield ~mask.unsqueeze(axis)
    device, length = given.query.device, given.query.shape[2]
    j = torch.arange(first.start, first.stop, device=device)
    k = torch.arange(second.start, second.stop, device=device)[:, None]
    if given.causal:
        i = torch.arange(rows.start, rows.stop, device=device)[:, None, None]
        yield j > i + given.key1.shape[2] - length
        yield k > i + given.key2.shape[2] - length
    if given.distinct:
        yield j == k
