"""Softmax attention of queries to pairs of keys, in tiles: the n x n x n scores are never held.

    S_ijk = scale sum_c q_ic k1_jc k2_kc,    p = softmax over the allowed pairs (j, k) of S
    o_ic = sum_jk p_ijk v1_jc v2_kc

Tiles of queries and of both keys pass with a running maximum and sum, as in flash attention; the
backward pass computes tiles again from the logarithm of the sum. Time n n1 n2 (d + e), memory one
tile beside inputs and outputs. Tensors are float32 or float64.

The Triton kernels take a query at a time, and backwards also a tile of first keys, so that every
number is written by one program. They were compared with the torch form in Triton's interpreter
only, never compiled or timed on a GPU, so that they run only when asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heed_core.kernels.triton_calls import KernelImpl, takes_triton, why_not_triton

TILE = 32
"""Queries, first keys and second keys of a tile."""


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
    if triton:
        from heed_core.kernels.pair_softmax_triton import launch_forward

        given = query, key1, key2, value1, value2, mask1, mask2
        return launch_forward(*given, causal, distinct, scale)
    outputs, sums = [query.new_zeros(*query.shape[:2], 0, value1.shape[3])], [query[:, :, :0, 0]]
    for rows in _runs(query.shape[2]):
        asked = query[:, :, rows]
        top = asked.new_full(asked.shape[:3], -torch.inf)
        total = asked.new_zeros(asked.shape[:3])
        mixed = asked.new_zeros(*asked.shape[:3], value1.shape[3])
        for first, second in _tiles(rows, query, key1, key2, causal):
            scores, _ = _scores(asked, key1[:, :, first], key2[:, :, second], scale)
            hidden = _hidden(query, key1, key2, rows, first, second, mask1, mask2, causal, distinct)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            higher = torch.maximum(top, scores.amax((-1, -2)))
            shift = higher.masked_fill(higher == -torch.inf, 0.0)
            shares = (scores - shift[..., None, None]).exp()
            keep = (top - shift).exp()
            part = ((shares @ value1[:, :, None, first]) * value2[:, :, None, second]).sum(-2)
            mixed = mixed * keep[..., None] + part
            total = total * keep + shares.sum((-1, -2))
            top = higher
        empty = total == 0
        outputs.append(mixed / total.masked_fill(empty, 1.0)[..., None])
        sums.append(top + total.log())
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


@pair_softmax.register_fake
def _(
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
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, heads, length, value1.shape[3]), query.new_empty(
        batch, heads, length
    )


@torch.library.custom_op(
    "heed::pair_softmax_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor output, Tensor sums, {_GIVEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def pair_softmax_backward(
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from that of the output."""
    if triton:
        from heed_core.kernels.pair_softmax_triton import launch_backward

        given = query, key1, key2, value1, value2, mask1, mask2
        return launch_backward(grad, output, sums, *given, causal, distinct, scale)
    found = tuple(torch.zeros_like(x) for x in (query, key1, key2, value1, value2))
    d_query, d_key1, d_key2, d_value1, d_value2 = found
    inner = (grad * output).sum(-1)
    for rows in _runs(query.shape[2]):
        asked, back = query[:, :, rows], grad[:, :, rows]
        level = sums[:, :, rows]
        level = level.masked_fill(level == -torch.inf, 0.0)
        for first, second in _tiles(rows, query, key1, key2, causal):
            scores, pairs = _scores(asked, key1[:, :, first], key2[:, :, second], scale)
            hidden = _hidden(query, key1, key2, rows, first, second, mask1, mask2, causal, distinct)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
            shares = (scores - level[..., None, None]).exp()  # (b, h, i, k, j)
            weighed = back[:, :, :, None] * value2[:, :, None, second]  # (b, h, i, k, e)
            to_shares = weighed @ value1[:, :, None, first].mT
            to_scores = scale * shares * (to_shares - inner[:, :, rows, None, None])
            to_pairs = to_scores @ key1[:, :, None, first]
            d_query[:, :, rows] += (to_pairs * key2[:, :, None, second]).sum(-2)
            d_key2[:, :, second] += (to_pairs * asked[:, :, :, None]).sum(2)
            d_key1[:, :, first] += to_scores.flatten(2, 3).mT @ pairs.flatten(2, 3)
            read = shares @ value1[:, :, None, first]
            d_value2[:, :, second] += (read * back[:, :, :, None]).sum(2)
            d_value1[:, :, first] += shares.flatten(2, 3).mT @ weighed.flatten(2, 3)
    return d_query, d_key1, d_key2, d_value1, d_value2


@pair_softmax_backward.register_fake
def _(
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key1, key2, value1, value2 = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (query, key1, key2, value1, value2)
    )
    return query, key1, key2, value1, value2


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


def _runs(length: int, stop: int | None = None) -> Iterator[slice]:
    stop = length if stop is None else max(0, min(stop, length))
    for start in range(0, stop, TILE):
        yield slice(start, min(start + TILE, stop))


def _tiles(
    rows: slice, query: Tensor, key1: Tensor, key2: Tensor, causal: bool
) -> Iterator[tuple[slice, slice]]:
    """Runs of first and second keys; those that only come later are left out."""
    lengths = [key.shape[2] for key in (key1, key2)]
    stops = [rows.stop + length - query.shape[2] if causal else None for length in lengths]
    for first in _runs(lengths[0], stops[0]):
        for second in _runs(lengths[1], stops[1]):
            yield first, second


def _scores(query: Tensor, key1: Tensor, key2: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(b, h, i, k, j), and the products of queries and second keys."""
    pairs = query[:, :, :, None] * key2[:, :, None]
    return (pairs @ key1[:, :, None].mT).mul_(scale), pairs


def _hidden(
    query: Tensor,
    key1: Tensor,
    key2: Tensor,
    rows: slice,
    first: slice,
    second: slice,
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    distinct: bool,
) -> Tensor | None:
    """Pairs of a tile that may not be attended to, broadcastable to (b, h, i, k, j)."""
    parts = []
    for mask, keys, axis in ((mask1, first, -2), (mask2, second, -1)):
        if mask is not None:
            mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
            mask = mask if mask.shape[3] == 1 else mask[..., keys]
            parts.append(~mask.unsqueeze(axis))
    device, length = query.device, query.shape[2]
    j = torch.arange(first.start, first.stop, device=device)
    k = torch.arange(second.start, second.stop, device=device)[:, None]
    if causal:
        i = torch.arange(rows.start, rows.stop, device=device)[:, None, None]
        later = (j > i + key1.shape[2] - length) | (k > i + key2.shape[2] - length)
        parts.append(later)
    if distinct:
        parts.append(j == k)
    hidden: Tensor | None = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden
