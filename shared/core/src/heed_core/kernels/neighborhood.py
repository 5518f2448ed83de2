"""Sums of each place's clamped window with weights of its own, without gathering the windows.

    y_i = sum over the k x k places j of the window of i of  w_ij v_j

The window of a place is centred on it and moves inwards at borders. On the CPU a row of the window
at a time is a product with a band matrix, in blocks of columns: time at most 2 N k^2 C, memory N C
and one band. The gradient is the same read backwards; windows are never held, so that training
needs no k^2 copies of the values. Sums run in float32 at least.

The Triton kernels read weights and values once for each tile of places and channels. They were
compared with the torch form in Triton's interpreter and compiled for a GPU, but never run on one,
so that they run only when asked for by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heed_core.kernels.triton_calls import KernelImpl, takes_triton, why_not_triton
from heed_core.precision import at_least_float32

COLUMNS = 16
"""Columns of a block, if the window is not wider."""

MOST_CHANNELS = 256
"""Of a group, on the kernel."""


def window_starts(
    size: int, kernel: int, *, device: torch.device | None = None
) -> Int[Tensor, " n"]:
    """First index of the window of each place of an axis, clamped into the axis."""
    return (torch.arange(size, device=device) - kernel // 2).clamp(0, size - kernel)


def why_not(device: str, dtype: torch.dtype, *, channels: int) -> str | None:
    """Why the kernel cannot run a call; None if it can."""
    if (reason := why_not_triton(device, dtype)) is not None:
        return reason
    if channels > MOST_CHANNELS:
        return f"groups have {channels} channels, more than {MOST_CHANNELS}"
    return None


def wants_triton(impl: KernelImpl, value: Tensor) -> bool:
    """Whether a call runs on the kernel.

    Raises:
        ValueError: `impl` is no name.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    return takes_triton(
        impl, lambda: why_not(value.device.type, value.dtype, channels=value.shape[-1])
    )


@torch.library.custom_op(
    "heed::window_sum",
    mutates_args=(),
    schema="(Tensor weights, Tensor value, int kernel, bool triton) -> Tensor",
)
def window_sum(weights: Tensor, value: Tensor, kernel: int, triton: bool) -> Tensor:
    """(b, g, h, w, c), in the type of the values.

    Args:
        weights: (b, g, h, w, k * k), of the window's places in row-major order.
        value: (b, g, h, w, c).
        kernel: Odd side k of the window, at most the sides of the map.
        triton: Whether the kernel runs.
    """
    weights, rows = at_least_float32(weights), at_least_float32(value)
    if triton:
        from heed_core.kernels.neighborhood_triton import launch_sum

        return launch_sum(weights, rows, kernel).to(value.dtype)
    total = rows.new_zeros(rows.shape)
    for band in _bands(value, kernel):
        total[:, :, :, band.columns] += band.matrix(weights) @ band.rows(rows)
    return total.to(value.dtype)


@window_sum.register_fake
def _(weights: Tensor, value: Tensor, kernel: int, triton: bool) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op(
    "heed::window_sum_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor weights, Tensor value, int kernel, bool triton)"
    " -> (Tensor, Tensor)",
)
def window_sum_backward(
    grad: Tensor, weights: Tensor, value: Tensor, kernel: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the weights and of the values, each in its type."""
    spread, rows = at_least_float32(grad), at_least_float32(value)
    wide = at_least_float32(weights)
    if triton:
        from heed_core.kernels.neighborhood_triton import launch_backward

        found = launch_backward(spread, wide, rows, kernel)
        return found[0].to(weights.dtype), found[1].to(value.dtype)
    to_weights, to_value = wide.new_empty(wide.shape), rows.new_zeros(rows.shape)
    for band in _bands(value, kernel):
        part = spread[:, :, :, band.columns]
        to_weights[:, :, :, band.columns, band.places] = band.picked(part @ band.rows(rows).mT)
        given = band.matrix(wide).mT @ part
        to_value[:, :, :, band.seen].index_add_(2, band.row, given)
    return to_weights.to(weights.dtype), to_value.to(value.dtype)


@window_sum_backward.register_fake
def _(
    grad: Tensor, weights: Tensor, value: Tensor, kernel: int, triton: bool
) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), value.new_empty(value.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*window_sum_backward(grad, *ctx.saved_tensors, *ctx.options), None, None)


window_sum.register_autograd(_backward, setup_context=_remember)


@register_flop_formula([torch.ops.heed.window_sum])
def _flops(weights: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(weights) * value[-1])


class _Band(NamedTuple):
    """A row of the windows of some columns, as a matrix of these and the columns that they see."""

    columns: slice
    seen: slice
    places: slice  # of the window
    row: Tensor  # of the map, for each row that asks
    window: Tensor  # (columns, k), places among those seen

    def rows(self, value: Tensor) -> Tensor:
        """(b, g, h, seen, c)."""
        return value[:, :, :, self.seen].index_select(2, self.row)

    def matrix(self, weights: Tensor) -> Tensor:
        """(b, g, h, columns, seen)."""
        part = weights[:, :, :, self.columns, self.places]
        width = self.seen.stop - self.seen.start
        empty = part.new_zeros(*part.shape[:-1], width)
        return empty.scatter_(-1, self.window.expand(part.shape), part)

    def picked(self, products: Tensor) -> Tensor:
        """(b, g, h, columns, seen) -> (b, g, h, columns, k)."""
        return products.gather(-1, self.window.expand(*products.shape[:-1], -1))


def _bands(value: Tensor, kernel: int) -> Iterator[_Band]:
    height, width = value.shape[2:4]
    down = window_starts(height, kernel, device=value.device)
    across = window_starts(width, kernel, device=value.device)
    steps = torch.arange(kernel, device=value.device)
    block = max(COLUMNS, kernel)
    for first in range(0, width, block):
        stop = min(first + block, width)
        # the same as in `window_starts`, in plain numbers
        start, end = (min(max(x - kernel // 2, 0), width - kernel) for x in (first, stop - 1))
        window = across[first:stop, None] - start + steps
        for step in range(kernel):
            yield _Band(
                columns=slice(first, stop),
                seen=slice(start, end + kernel),
                places=slice(step * kernel, (step + 1) * kernel),
                row=down + step,
                window=window,
            )
