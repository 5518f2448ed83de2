"""The Triton kernels of `kernels.gather_attention`; imported only when they run."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

SLOTS = 16
"""Gathered keys of a tile."""

STAGES = 1
"""Tiles that are loaded at a time: with more, 128 channels would not fit on every chip."""


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    index,
    kept,
    bias,
    output,
    sums,
    scale,
    heads,
    groups,
    blocks,
    size,
    keys,
    slots,
    width,
    value_width,
    index_batch,
    index_group,
    kept_batch,
    kept_group,
    HAS_KEPT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Some queries of one block of one head."""
    line = tl.program_id(0).to(tl.int64)  # (b, h, block); offsets may pass 2^31
    block = line % blocks
    head, batch = line // blocks % heads, line // blocks // heads
    group = head // (heads // groups)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, other = tl.arange(0, WIDTH), tl.arange(0, VALUES)
    rows_there, channels_there, others_there = row < size, channel < width, other < value_width
    first = (batch * groups + group) * keys
    names = index + batch * index_batch + group * index_group + block * slots
    flags = kept + batch * kept_batch + group * kept_group + block * size * slots

    at = (line * size + row)[:, None] * width + channel[None, :]
    asked = tl.load(query + at, mask=rows_there[:, None] & channels_there[None, :], other=0.0)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    mixed = tl.zeros([ROWS, VALUES], dtype=tl.float32)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = slot < slots
        place = first + tl.load(names + slot, mask=there, other=0)
        wanted = channels_there[:, None] & there[None, :]
        seen = tl.load(key + place[None, :] * width + channel[:, None], mask=wanted, other=0.0)
        scores = scale * tl.dot(asked, seen, input_precision="ieee")
        if HAS_BIAS:
            scores += tl.load(bias + place, mask=there, other=0.0)[None, :]
        may = rows_there[:, None] & there[None, :]
        if HAS_KEPT:
            may = may & tl.load(flags + row[:, None] * slots + slot[None, :], mask=may, other=0)
        scores = tl.where(may, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp(scores - shift[:, None])
        keep = tl.exp(top - shift)
        wanted = there[:, None] & others_there[None, :]
        read = tl.load(
            value + place[:, None] * value_width + other[None, :], mask=wanted, other=0.0
        )
        mixed = mixed * keep[:, None] + tl.dot(shares, read, input_precision="ieee")
        total = total * keep + tl.sum(shares, axis=1)
        top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    at = (line * size + row)[:, None] * value_width + other[None, :]
    mask = rows_there[:, None] & others_there[None, :]
    tl.store(output + at, mixed / safe[:, None], mask=mask)
    level = tl.where(total == 0.0, float("-inf"), top + tl.log(safe))
    tl.store(sums + line * size + row, level, mask=rows_there)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    index,
    kept,
    bias,
    grad,
    inner,
    sums,
    to_query,
    to_key,
    to_value,
    to_bias,
    scale,
    heads,
    groups,
    blocks,
    size,
    keys,
    slots,
    width,
    value_width,
    index_batch,
    index_group,
    kept_batch,
    kept_group,
    HAS_KEPT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients that some queries of one block of one head give."""
    line = tl.program_id(0).to(tl.int64)
    block = line % blocks
    head, batch = line // blocks % heads, line // blocks // heads
    group = head // (heads // groups)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel, other = tl.arange(0, WIDTH), tl.arange(0, VALUES)
    rows_there, channels_there, others_there = row < size, channel < width, other < value_width
    first = (batch * groups + group) * keys
    names = index + batch * index_batch + group * index_group + block * slots
    flags = kept + batch * kept_batch + group * kept_group + block * size * slots

    at = (line * size + row)[:, None] * width + channel[None, :]
    own = rows_there[:, None] & channels_there[None, :]
    asked = tl.load(query + at, mask=own, other=0.0)
    spread = (line * size + row)[:, None] * value_width + other[None, :]
    back = tl.load(grad + spread, mask=rows_there[:, None] & others_there[None, :], other=0.0)
    part = tl.load(inner + line * size + row, mask=rows_there, other=0.0)
    level = tl.load(sums + line * size + row, mask=rows_there, other=0.0)
    level = tl.where(level == float("-inf"), 0.0, level)
    found = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        there = slot < slots
        place = first + tl.load(names + slot, mask=there, other=0)
        key_at = place[:, None] * width + channel[None, :]
        key_there = there[:, None] & channels_there[None, :]
        value_at = place[:, None] * value_width + other[None, :]
        value_there = there[:, None] & others_there[None, :]
        seen = tl.load(key + key_at, mask=key_there, other=0.0)
        read = tl.load(value + value_at, mask=value_there, other=0.0)
        scores = scale * tl.dot(asked, tl.trans(seen), input_precision="ieee")
        if HAS_BIAS:
            scores += tl.load(bias + place, mask=there, other=0.0)[None, :]
        may = rows_there[:, None] & there[None, :]
        if HAS_KEPT:
            may = may & tl.load(flags + row[:, None] * slots + slot[None, :], mask=may, other=0)
        shares = tl.where(may, tl.exp(scores - level[:, None]), 0.0)
        product = tl.dot(back, tl.trans(read), input_precision="ieee")
        to_scores = shares * (product - part[:, None])
        found += scale * tl.dot(to_scores, seen, input_precision="ieee")
        given = scale * tl.dot(tl.trans(to_scores), asked, input_precision="ieee")
        tl.atomic_add(to_key + key_at, given, mask=key_there)
        given = tl.dot(tl.trans(shares), back, input_precision="ieee")
        tl.atomic_add(to_value + value_at, given, mask=value_there)
        tl.atomic_add(to_bias + place, tl.sum(to_scores, axis=0), mask=there)
    tl.store(to_query + at, found, mask=own)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on float32 tensors."""
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    sums = query.new_full(query.shape[:-1], -torch.inf)
    if query.numel() and index.numel() and value.shape[-1]:
        given, grid, facts, blocks = _plan(query, key, value, index, kept, bias)
        forward_kernel[grid](*given, output, sums, scale, *facts, **blocks)
    return output, sums


def launch_backward(
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel on float32 tensors."""
    found = (
        query.new_zeros(query.shape),
        key.new_zeros(key.shape),
        value.new_zeros(value.shape),
        key.new_zeros(key.shape[:3]),
    )
    if query.numel() and index.numel() and value.shape[-1]:
        given, grid, facts, blocks = _plan(query, key, value, index, kept, bias)
        rows = grad.contiguous(), (grad * output).sum(-1), sums.contiguous()
        backward_kernel[grid](*given, *rows, *found, scale, *facts, **blocks)
    return found


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
) -> tuple[list[Tensor], tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Tensors, grid, sizes and constants that both kernels take."""
    batch, heads, blocks, size, width = query.shape
    groups, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    slots = index.shape[3]
    index = index.contiguous()
    flags = index if kept is None else kept.contiguous()
    given = [
        *(x.contiguous() for x in (query, key, value)),
        index,
        flags,
        key if bias is None else bias.contiguous(),
    ]
    rows = min(64, max(16, triton.next_power_of_2(size)))
    constants = {
        "HAS_KEPT": kept is not None,
        "HAS_BIAS": bias is not None,
        "ROWS": rows,
        "SLOTS": SLOTS,
        "num_stages": STAGES,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "VALUES": max(16, triton.next_power_of_2(value_width)),
    }
    strides = []
    for x in (index, flags):
        strides += [x.stride(0), x.stride(1) if x.shape[1] > 1 else 0]
    facts = (heads, groups, blocks, size, keys, slots, width, value_width, *strides)
    return given, (batch * heads * blocks, triton.cdiv(size, rows)), facts, constants
