"""The Triton kernels of `kernels.pair_softmax`; imported only when they run."""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

TILE = 32
"""First and second keys of a tile."""

STAGES = 1
"""Tiles that are loaded at a time: with more, 128 channels would not fit on every chip."""


@triton.jit  # type: ignore[untyped-decorator]
def _rows(source, first, row, width, stop, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some rows of a matrix, zeros beyond it."""
    channel = tl.arange(0, CHANNELS)
    there = (row < stop)[:, None] & (channel < width)[None, :]
    return tl.load(
        source + (first + row)[:, None] * width + channel[None, :], mask=there, other=0.0
    )


@triton.jit  # type: ignore[untyped-decorator]
def _one(source, row, width, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, CHANNELS)
    return tl.load(source + row * width + channel, mask=channel < width, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _allowed(  # type: ignore[no-untyped-def]
    mask, base, i, row, length, stop, stride, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Which keys of a tile a query may attend to."""
    may = row < stop
    if CAUSAL:
        may = may & (row <= i + stop - length)
    if HAS_MASK:
        may = may & tl.load(mask + base + row * stride, mask=may, other=0)
    return may


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]
    query,
    key1,
    key2,
    value1,
    value2,
    mask1,
    mask2,
    output,
    sums,
    scale,
    heads,
    length,
    count1,
    count2,
    width,
    value_width,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    CAUSAL: tl.constexpr,
    DISTINCT: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    HAS_MASK2: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One query of one head."""
    i = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)  # (b, h); offsets may pass 2^31
    batch, head = line // heads, line % heads
    base1, base2 = batch * a0 + head * a1 + i * a2, batch * b0 + head * b1 + i * b2
    asked = _one(query, line * length + i, width, WIDTH)
    top = float("-inf")
    total = 0.0
    mixed = tl.zeros([VALUES], dtype=tl.float32)
    for start1 in range(0, count1, TILE):
        j = start1 + tl.arange(0, TILE)
        may1 = _allowed(mask1, base1, i, j, length, count1, a3, CAUSAL, HAS_MASK1)
        first = asked[None, :] * _rows(key1, line * count1, j, width, count1, WIDTH)
        read1 = _rows(value1, line * count1, j, value_width, count1, VALUES)
        for start2 in range(0, count2, TILE):
            k = start2 + tl.arange(0, TILE)
            may2 = _allowed(mask2, base2, i, k, length, count2, b3, CAUSAL, HAS_MASK2)
            second = _rows(key2, line * count2, k, width, count2, WIDTH)
            scores = scale * tl.dot(first, tl.trans(second), input_precision="ieee")
            may = may1[:, None] & may2[None, :]
            if DISTINCT:
                may = may & (j[:, None] != k[None, :])
            scores = tl.where(may, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            shares = tl.exp(scores - shift)
            keep = tl.exp(top - shift)
            read2 = _rows(value2, line * count2, k, value_width, count2, VALUES)
            part = read1 * tl.dot(shares, read2, input_precision="ieee")
            mixed = mixed * keep + tl.sum(part, axis=0)
            total = total * keep + tl.sum(shares)
            top = higher
    safe = tl.where(total == 0.0, 1.0, total)
    other = tl.arange(0, VALUES)
    at = (line * length + i) * value_width + other
    tl.store(output + at, mixed / safe, mask=other < value_width)
    level = tl.where(total == 0.0, float("-inf"), top + tl.log(safe))
    tl.store(sums + line * length + i, level)


@triton.jit  # type: ignore[untyped-decorator]
def query_kernel(  # type: ignore[no-untyped-def]
    query,
    key1,
    key2,
    value1,
    value2,
    mask1,
    mask2,
    grad,
    inner,
    sums,
    to_query,
    scale,
    heads,
    length,
    count1,
    count2,
    width,
    value_width,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    CAUSAL: tl.constexpr,
    DISTINCT: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    HAS_MASK2: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradient of one query."""
    i = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    base1, base2 = batch * a0 + head * a1 + i * a2, batch * b0 + head * b1 + i * b2
    at = line * length + i
    asked, back = _one(query, at, width, WIDTH), _one(grad, at, value_width, VALUES)
    level, part = tl.load(sums + at), tl.load(inner + at)
    level = tl.where(level == float("-inf"), 0.0, level)
    found = tl.zeros([WIDTH], dtype=tl.float32)
    for start1 in range(0, count1, TILE):
        j = start1 + tl.arange(0, TILE)
        may1 = _allowed(mask1, base1, i, j, length, count1, a3, CAUSAL, HAS_MASK1)
        keys1 = _rows(key1, line * count1, j, width, count1, WIDTH)
        weighed = back[None, :] * _rows(value1, line * count1, j, value_width, count1, VALUES)
        for start2 in range(0, count2, TILE):
            k = start2 + tl.arange(0, TILE)
            may2 = _allowed(mask2, base2, i, k, length, count2, b3, CAUSAL, HAS_MASK2)
            keys2 = _rows(key2, line * count2, k, width, count2, WIDTH)
            read2 = _rows(value2, line * count2, k, value_width, count2, VALUES)
            scores = tl.dot(asked[None, :] * keys1, tl.trans(keys2), input_precision="ieee")
            may = may1[:, None] & may2[None, :]
            if DISTINCT:
                may = may & (j[:, None] != k[None, :])
            shares = tl.where(may, tl.exp(scale * scores - level), 0.0)
            product = tl.dot(weighed, tl.trans(read2), input_precision="ieee")
            to_scores = scale * shares * (product - part)
            found += tl.sum(keys1 * tl.dot(to_scores, keys2, input_precision="ieee"), axis=0)
    channel = tl.arange(0, WIDTH)
    tl.store(to_query + at * width + channel, found, mask=channel < width)


@triton.jit  # type: ignore[untyped-decorator]
def key_kernel(  # type: ignore[no-untyped-def]
    query,
    key1,
    key2,
    value1,
    value2,
    mask1,
    mask2,
    grad,
    inner,
    sums,
    to_key1,
    to_value1,
    scale,
    heads,
    length,
    count1,
    count2,
    width,
    value_width,
    a0,
    a1,
    a2,
    a3,
    b0,
    b1,
    b2,
    b3,
    CAUSAL: tl.constexpr,
    DISTINCT: tl.constexpr,
    HAS_MASK1: tl.constexpr,
    HAS_MASK2: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The gradients of a tile of first keys and their values; swapped, of the second."""
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    j = tl.program_id(0) * TILE + tl.arange(0, TILE)
    keys1 = _rows(key1, line * count1, j, width, count1, WIDTH)
    read1 = _rows(value1, line * count1, j, value_width, count1, VALUES)
    for_key = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for_value = tl.zeros([TILE, VALUES], dtype=tl.float32)
    for i in range(length):
        at = line * length + i
        base1, base2 = batch * a0 + head * a1 + i * a2, batch * b0 + head * b1 + i * b2
        may1 = _allowed(mask1, base1, i, j, length, count1, a3, CAUSAL, HAS_MASK1)
        asked, back = _one(query, at, width, WIDTH), _one(grad, at, value_width, VALUES)
        level, part = tl.load(sums + at), tl.load(inner + at)
        level = tl.where(level == float("-inf"), 0.0, level)
        first, weighed = asked[None, :] * keys1, back[None, :] * read1
        for start2 in range(0, count2, TILE):
            k = start2 + tl.arange(0, TILE)
            may2 = _allowed(mask2, base2, i, k, length, count2, b3, CAUSAL, HAS_MASK2)
            keys2 = _rows(key2, line * count2, k, width, count2, WIDTH)
            read2 = _rows(value2, line * count2, k, value_width, count2, VALUES)
            scores = scale * tl.dot(first, tl.trans(keys2), input_precision="ieee")
            may = may1[:, None] & may2[None, :]
            if DISTINCT:
                may = may & (j[:, None] != k[None, :])
            shares = tl.where(may, tl.exp(scores - level), 0.0)
            product = tl.dot(weighed, tl.trans(read2), input_precision="ieee")
            to_scores = scale * shares * (product - part)
            for_key += asked[None, :] * tl.dot(to_scores, keys2, input_precision="ieee")
            for_value += back[None, :] * tl.dot(shares, read2, input_precision="ieee")
    channel, other = tl.arange(0, WIDTH), tl.arange(0, VALUES)
    there = j < count1
    row = (line * count1 + j)[:, None]
    tl.store(
        to_key1 + row * width + channel[None, :],
        for_key,
        mask=there[:, None] & (channel < width)[None, :],
    )
    tl.store(
        to_value1 + row * value_width + other[None, :],
        for_value,
        mask=there[:, None] & (other < value_width)[None, :],
    )


def launch_forward(
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
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on float32 tensors."""
    output = query.new_zeros(*query.shape[:3], value1.shape[3])
    sums = query.new_full(query.shape[:3], -torch.inf)
    if output.numel():
        rows = [x.contiguous() for x in (query, key1, key2, value1, value2)]
        masks, facts, constants = _plan(rows, mask1, mask2, causal, distinct)
        grid = query.shape[2], query.shape[0] * query.shape[1]
        forward_kernel[grid](*rows, *masks, output, sums, scale, *facts, **constants)
    return output, sums


def launch_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels on float32 tensors."""
    to_query, to_key1, to_key2, to_value1, to_value2 = (
        x.new_zeros(x.shape) for x in (query, key1, key2, value1, value2)
    )
    lines = query.shape[0] * query.shape[1]
    back = [grad.contiguous(), (grad * output).sum(-1).contiguous(), sums.contiguous()]
    rows = [x.contiguous() for x in (query, key1, key2, value1, value2)]
    if output.numel():
        masks, facts, constants = _plan(rows, mask1, mask2, causal, distinct)
        query_kernel[query.shape[2], lines](
            *rows, *masks, *back, to_query, scale, *facts, **constants
        )
    swapped = [rows[0], rows[2], rows[1], rows[4], rows[3]]
    for given, found, first, second in (
        (rows, (to_key1, to_value1), mask1, mask2),
        (swapped, (to_key2, to_value2), mask2, mask1),
    ):
        if output.numel() and given[1].shape[2]:
            masks, facts, constants = _plan(given, first, second, causal, distinct)
            grid = triton.cdiv(given[1].shape[2], TILE), lines
            key_kernel[grid](*given, *masks, *back, *found, scale, *facts, **constants)
    return to_query, to_key1, to_key2, to_value1, to_value2


def _plan(
    rows: list[Tensor],
    mask1: Tensor | None,
    mask2: Tensor | None,
    causal: bool,
    distinct: bool,
) -> tuple[list[Tensor], tuple[int, ...], dict[str, Any]]:
    """Masks, sizes with the masks' strides, and constants that all kernels take."""
    query, key1, key2, value1, _ = rows
    masks, strides = [], []
    for mask, key in ((mask1, key1), (mask2, key2)):
        shape = (*query.shape[:3], key.shape[2])
        whole = query if mask is None else mask.expand(shape)
        masks.append(whole)
        strides += list(whole.stride())
    constants = {
        "CAUSAL": causal,
        "DISTINCT": distinct,
        "HAS_MASK1": mask1 is not None,
        "HAS_MASK2": mask2 is not None,
        "TILE": TILE,
        "num_stages": STAGES,
        "WIDTH": max(16, triton.next_power_of_2(query.shape[3])),
        "VALUES": max(16, triton.next_power_of_2(value1.shape[3])),
    }
    sizes = query.shape[1], query.shape[2], key1.shape[2], key2.shape[2], query.shape[3]
    return masks, (*sizes, value1.shape[3], *strides), constants
