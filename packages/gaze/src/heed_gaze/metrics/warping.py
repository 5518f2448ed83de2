"""Distances of positions along two scanpaths: dynamic time warping and time-delay embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from heed_gaze.metrics.alignment import in_batches, pad, warp, warp_cost
from heed_gaze.scanpaths import Scanpath, Size


def dtw(first: Sequence[Scanpath], second: Sequence[Scanpath]) -> Float64[np.ndarray, " p"]:
    """Dynamic time warping (Sakoe and Chiba, 1978): pixels summed along the cheapest alignment.

    Every fixation is beside at least one of the other scanpath, in order. It grows with the number
    of fixations. Time O(n m) per pair.
    """

    def score(a: list[np.ndarray], b: list[np.ndarray]) -> Float64[np.ndarray, " b"]:
        x, n = pad(a)
        y, m = pad(b)
        difference = x[:, :, None] - y[:, None, :]
        return warp_cost(warp(np.hypot(difference[..., 0], difference[..., 1])), n, m)

    filled = [len(a) > 0 and len(b) > 0 for a, b in zip(first, second, strict=True)]
    return in_batches(
        score,
        [path.xy_px for path in first],
        [path.xy_px for path in second],
        defined=np.array(filled, dtype=bool),
    )


def time_delay_embedding(
    first: Sequence[Scanpath],
    second: Sequence[Scanpath],
    *,
    window: int,
    how: Literal["mean", "hausdorff"] = "mean",
) -> Float64[np.ndarray, " p"]:
    """How far the windows of the second scanpaths are from the nearest ones of the first.

    Wang et al., "Simulating human saccadic scanpaths on natural images", CVPR 2011. The distance of
    two windows is the mean distance of their fixations. It is directed. Time O(n m window).

    Args:
        first: Scanpaths.
        second: Scanpaths, one for each.
        window: Fixations per window.
        how: Mean or largest over the windows of the second.

    Returns:
        Pixels; NaN where a scanpath is shorter than the window.
    """
    defined = [min(len(a), len(b)) >= window for a, b in zip(first, second, strict=True)]

    def score(a: list[np.ndarray], b: list[np.ndarray]) -> Float64[np.ndarray, " b"]:
        found = _embeddings(a, b, range(window, window + 1))
        return (found.mean if how == "mean" else found.largest)[:, 0]

    return in_batches(
        score,
        [path.xy_px for path in first],
        [path.xy_px for path in second],
        defined=np.array(defined, dtype=bool),
    )


def scaled_time_delay_embedding(
    first: Sequence[Scanpath], second: Sequence[Scanpath], *, size_px: Size
) -> Float64[np.ndarray, "p 2"]:
    """Similarity and distance over all window lengths, in units of the picture's larger side.

    Returns:
        The mean of exp(-d) and the mean of d over windows of 1, 2, ... fixations, as many as the
        shorter scanpath has, with d of `time_delay_embedding`.
    """
    defined = [min(len(a), len(b)) >= 1 for a, b in zip(first, second, strict=True)]

    def score(a: list[np.ndarray], b: list[np.ndarray]) -> Float64[np.ndarray, "b 2"]:
        longest = max(min(len(x), len(y)) for x, y in zip(a, b, strict=True))
        distance = _embeddings(a, b, range(1, longest + 1)).mean / max(size_px)
        return np.stack(
            [np.nanmean(np.exp(-distance), axis=1), np.nanmean(distance, axis=1)], axis=1
        )

    return in_batches(
        score,
        [path.xy_px for path in first],
        [path.xy_px for path in second],
        defined=np.array(defined, dtype=bool),
        columns=2,
    )


@dataclass(frozen=True, kw_only=True)
class _Embeddings:
    """Distances of pairs (rows) for windows (columns); NaN where a window does not fit."""

    mean: Float64[np.ndarray, "b w"]
    largest: Float64[np.ndarray, "b w"]


def _embeddings(a: list[np.ndarray], b: list[np.ndarray], windows: range) -> _Embeddings:
    x, n = pad(a)
    y, m = pad(b)
    difference = x[:, :, None] - y[:, None, :]
    apart = np.hypot(difference[..., 0], difference[..., 1])  # (b, n, m)
    total = np.zeros_like(apart)
    means, largest = [], []
    for window in range(1, windows.stop):
        # Sums over one more step along the diagonals of the table.
        total = total[:, : apart.shape[1] - window + 1, : apart.shape[2] - window + 1]
        total = total + apart[:, window - 1 :, window - 1 :]
        if window not in windows:
            continue
        rows, columns = (np.arange(k) for k in total.shape[1:])
        real = rows[None, :, None] <= (n - window)[:, None, None]
        nearest = np.where(real, total / window, np.inf).min(axis=1)  # (b, windows of second)
        counted = columns[None] <= (m - window)[:, None]
        fits = (n >= window) & (m >= window)
        count = np.maximum(counted.sum(axis=1), 1)
        means.append(np.where(fits, np.where(counted, nearest, 0.0).sum(axis=1) / count, np.nan))
        top = np.where(counted, nearest, -np.inf).max(axis=1)
        largest.append(np.where(fits, top, np.nan))
    return _Embeddings(mean=np.stack(means, axis=1), largest=np.stack(largest, axis=1))
