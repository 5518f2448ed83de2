"""Pooling whose window depends on the distance from a centre, as in the periphery of a retina.

    out[o] = mean (or maximum) of x over the cells of window(o) that exist
    window(o) = a square of side windows[i], i = the ring that output pixel o lies in

Ring i holds the output pixels whose squared distance from `centre` is at least radii[i - 1]^2 and
less than radii[i]^2; the last ring holds all others. A window is placed as by TensorFlow's padding
"same": for n inputs and m = ceil(n / stride) outputs along an axis, max((m - 1) stride + k - n, 0)
cells are missing, half of them (rounded down) before the first one. Missing cells are not counted.

Pooling the whole map with every window and masking costs the sum of all k^2 per output; here each
output sums the cells of its own window alone: a list of cells per output, made once per size, over
rows of channels (`embedding_bag`). Sums are short (k^2 terms) and in the type of `x`, so there is
no cancellation, which differences of an integral image over a large map have. Time c m k^2, memory
the list beside input and output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, Int64
from torch import Tensor

Mode = Literal["avg", "max"]


def ring_pool2d(
    x: Float[Tensor, "b c h w"],
    windows: Sequence[int],
    radii: Sequence[int],
    *,
    centre: tuple[int, int],
    stride: int = 2,
    mode: Mode = "avg",
) -> Float[Tensor, "b c oh ow"]:
    """Pool each output pixel over a window that its ring decides.

    Fastest for `x` in `torch.channels_last`, which the result then has too. Differentiable; it
    compiles and exports for fixed h and w.

    Args:
        x: The map.
        windows: Side of the window in each ring, from the centre outwards.
        radii: Outer radius of each ring but the last, increasing, in output pixels.
        centre: Row and column of the centre, in output pixels.
        stride: Input pixels per output pixel.
        mode: Mean or maximum.

    Raises:
        ValueError: Not one window more than radii, windows below 1, radii that do not increase.

    Example:
        >>> x = torch.ones(1, 3, 12, 10)
        >>> ring_pool2d(x, (2, 5), (2,), centre=(3, 2)).shape
        torch.Size([1, 3, 6, 5])
    """
    rings = check_rings(windows, radii, stride)
    batch, channels, height, width = x.shape
    if len(set(rings[0])) == 1 and _starts_inside((height, width), rings[0][0], stride):
        return _plain(x, rings[0][0], stride, mode)
    cells, starts = _lists((height, width), *rings, centre, stride)
    index = torch.from_numpy(cells).to(x.device)
    offset = torch.from_numpy(starts).to(x.device)
    if batch > 1:
        number = torch.arange(batch, dtype=index.dtype, device=x.device)[:, None]
        index = (index + number * (height * width)).flatten()
        offset = (offset + number * len(cells)).flatten()
    rows = x.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    pooled = F.embedding_bag(index, rows, offset, mode="mean" if mode == "avg" else "max")
    return pooled.view(batch, -(-height // stride), -(-width // stride), channels).permute(
        0, 3, 1, 2
    )


def ring_pool2d_reference(
    x: Float[Tensor, "b c h w"],
    windows: Sequence[int],
    radii: Sequence[int],
    *,
    centre: tuple[int, int],
    stride: int = 2,
    mode: Mode = "avg",
) -> Float[Tensor, "b c oh ow"]:
    """The definition: pool the whole map with each window, keep what lies in the window's ring.

    The arguments are those of `ring_pool2d`.
    """
    windows, radii = check_rings(windows, radii, stride)
    size = (x.shape[2], x.shape[3])
    ring = torch.from_numpy(ring_of((-(-size[0] // stride), -(-size[1] // stride)), radii, centre))
    out = x.new_zeros(*x.shape[:2], *ring.shape)
    for number, window in enumerate(windows):
        out = torch.where(ring.to(x.device) == number, _pool_same(x, window, stride, mode), out)
    return out


def ring_of(
    size: tuple[int, int], radii: Sequence[int], centre: tuple[int, int]
) -> Int64[np.ndarray, "h w"]:
    """The number of the ring that each output pixel lies in; inner radii are inclusive."""
    rows, columns = (np.arange(n, dtype=np.int64) - c for n, c in zip(size, centre, strict=True))
    squared = rows[:, None] ** 2 + columns[None, :] ** 2
    return np.searchsorted(np.array(radii, dtype=np.int64) ** 2, squared, side="right").astype(
        np.int64
    )


def check_rings(
    windows: Sequence[int], radii: Sequence[int], stride: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rings as tuples.

    Raises:
        ValueError: Not one window more than radii, windows below 1, radii that do not increase.
    """
    windows, radii = tuple(windows), tuple(radii)
    if len(windows) != len(radii) + 1:
        raise ValueError(
            f"windows must be one more than radii, got {len(windows)} and {len(radii)}"
        )
    if min(windows) < 1 or stride < 1:
        raise ValueError(f"windows and stride must be at least 1, got {windows} and {stride}")
    if any(outer <= inner for inner, outer in zip((0, *radii), radii, strict=False)):
        raise ValueError(f"radii must increase from above 0, got {radii}")
    return windows, radii


def _missing(size: int, window: int, stride: int) -> int:
    return max((-(-size // stride) - 1) * stride + window - size, 0)


def _starts_inside(size: tuple[int, int], window: int, stride: int) -> bool:
    """Whether torch's own pooling fits.

    It does where nothing is missing before the first cell, and less than a step behind the last.
    """
    return window >= stride and all(_missing(n, window, stride) < min(2, stride) for n in size)


def _plain(x: Tensor, window: int, stride: int, mode: Mode) -> Tensor:
    if mode == "max":
        return F.max_pool2d(x, window, stride, ceil_mode=True)
    return F.avg_pool2d(x, window, stride, ceil_mode=True, count_include_pad=False)


def _pool_same(x: Tensor, window: int, stride: int, mode: Mode) -> Tensor:
    missing = [_missing(n, window, stride) for n in (x.shape[3], x.shape[2])]
    pad = [part for n in missing for part in (n // 2, n - n // 2)]
    if mode == "max":
        return F.max_pool2d(F.pad(x, pad, value=-torch.inf), window, stride)
    counted = F.avg_pool2d(F.pad(torch.ones_like(x[:1, :1]), pad), window, stride)
    return F.avg_pool2d(F.pad(x, pad), window, stride) / counted


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lists(
    size: tuple[int, int],
    windows: tuple[int, ...],
    radii: tuple[int, ...],
    centre: tuple[int, int],
    stride: int,
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " m"]]:
    """Which cells each output takes, one list after the other, and where each list starts."""
    return _made_lists(size, windows, radii, centre, stride)


@lru_cache(maxsize=32)
def _made_lists(
    size: tuple[int, int],
    windows: tuple[int, ...],
    radii: tuple[int, ...],
    centre: tuple[int, int],
    stride: int,
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " m"]]:
    outputs = (-(-size[0] // stride), -(-size[1] // stride))
    window = np.array(windows, dtype=np.int64)[ring_of(outputs, radii, centre)]
    places = np.indices(outputs)
    first, last = [], []
    for axis in range(2):
        missing = (outputs[axis] - 1) * stride + window - size[axis]
        start = places[axis] * stride - np.maximum(missing, 0) // 2
        first.append(np.maximum(start, 0).ravel())
        last.append(np.minimum(start + window, size[axis]).ravel())
    across = last[1] - first[1]
    counts = (last[0] - first[0]) * across
    starts = np.cumsum(counts) - counts
    output = np.repeat(np.arange(len(counts)), counts)
    row, column = np.divmod(np.arange(int(counts.sum())) - starts[output], across[output])
    cells = (first[0][output] + row) * size[1] + first[1][output] + column
    return cells.astype(np.int32), starts.astype(np.int32)
