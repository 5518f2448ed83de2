"""The Triton kernels of `kernels.neighborhood`; imported only when they run."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor


@triton.jit
def _start(place, size, kernel):  # type: ignore[no-untyped-def]
    """First index of the window of a place, clamped into the axis."""
    return tl.minimum(tl.maximum(place - kernel // 2, 0), size - kernel)


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    weights,
    value,
    output,
    height,
    width,
    channels,
    kernel,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One row of one map, a block of its columns."""
    line = tl.program_id(0).to(tl.int64)  # offsets may pass 2^31
    row, whole = line % height, line // height * height * width
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, CHANNELS)
    inside, there = column < width, channel < channels
    top, left = _start(row, height, kernel), _start(column, width, kernel)
    asking = line * width + column
    total = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for i in range(kernel):
        for j in range(kernel):
            at = asking * kernel * kernel + i * kernel + j
            weight = tl.load(weights + at, mask=inside, other=0.0)
            seen = whole + (top + i) * width + left + j
            row_there = inside[:, None] & there[None, :]
            place = value + seen[:, None] * channels + channel[None, :]
            total += weight[:, None] * tl.load(place, mask=row_there, other=0.0)
    place = output + asking[:, None] * channels + channel[None, :]
    tl.store(place, total, mask=inside[:, None] & there[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    weights,
    value,
    to_weights,
    to_value,
    height,
    width,
    channels,
    kernel,
    PLACES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Both gradients of one row's block of columns; each number is written by one program."""
    line = tl.program_id(0).to(tl.int64)
    row, whole = line % height, line // height * height * width
    column = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.arange(0, CHANNELS)
    inside, there = column < width, channel < channels
    both = inside[:, None] & there[None, :]
    own = line * width + column
    square = kernel * kernel

    top, left = _start(row, height, kernel), _start(column, width, kernel)
    back = tl.load(grad + own[:, None] * channels + channel[None, :], mask=both, other=0.0)
    for i in range(kernel):
        for j in range(kernel):
            seen = whole + (top + i) * width + left + j
            there_value = value + seen[:, None] * channels + channel[None, :]
            product = tl.sum(back * tl.load(there_value, mask=both, other=0.0), axis=1)
            tl.store(to_weights + own * square + i * kernel + j, product, mask=inside)

    total = tl.zeros([PLACES, CHANNELS], dtype=tl.float32)
    for i in range(1 - kernel, kernel):  # of those that may see the place
        asking_row = row + i
        step_down = row - _start(asking_row, height, kernel)
        row_sees = (asking_row >= 0) & (asking_row < height)
        row_sees = row_sees & (step_down >= 0) & (step_down < kernel)
        for j in range(1 - kernel, kernel):
            asking_column = column + j
            step = column - _start(asking_column, width, kernel)
            sees = inside & row_sees & (asking_column >= 0) & (asking_column < width)
            sees = sees & (step >= 0) & (step < kernel)
            asking = whole + asking_row * width + asking_column
            at = weights + asking * square + step_down * kernel + step
            weight = tl.load(at, mask=sees, other=0.0)
            place = grad + asking[:, None] * channels + channel[None, :]
            wanted = sees[:, None] & there[None, :]
            total += weight[:, None] * tl.load(place, mask=wanted, other=0.0)
    tl.store(to_value + own[:, None] * channels + channel[None, :], total, mask=both)


def launch_sum(weights: Tensor, value: Tensor, kernel: int) -> Tensor:
    """Run the forward kernel on float32 tensors."""
    weights, value = weights.contiguous(), value.contiguous()
    output = torch.zeros_like(value)
    if output.numel():
        grid, sizes, blocks = _plan(value, kernel)
        sum_kernel[grid](weights, value, output, *sizes, **blocks)
    return output


def launch_backward(
    grad: Tensor, weights: Tensor, value: Tensor, kernel: int
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel on float32 tensors."""
    grad, weights, value = grad.contiguous(), weights.contiguous(), value.contiguous()
    found = torch.zeros_like(weights), torch.zeros_like(value)
    if value.numel():
        grid, sizes, blocks = _plan(value, kernel)
        backward_kernel[grid](grad, weights, value, *found, *sizes, **blocks)
    return found


def _plan(
    value: Tensor, kernel: int
) -> tuple[tuple[int, int], tuple[int, int, int, int], dict[str, int]]:
    batch, groups, height, width, channels = value.shape
    places = min(32, max(2, triton.next_power_of_2(width)))
    blocks = {"PLACES": places, "CHANNELS": max(2, triton.next_power_of_2(channels))}
    grid = batch * groups * height, triton.cdiv(width, places)
    return grid, (height, width, channels, kernel), blocks
