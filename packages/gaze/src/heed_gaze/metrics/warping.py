"""Distances of positions along two scanpaths: dynamic time warping and time-delay embedding."""

from __future__ import annotations

from collections.abc import Sequence
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
    first: Scanpath, second: Scanpath, *, window: int, how: Literal["mean", "hausdorff"] = "mean"
) -> float:
    """How far the windows of the second scanpath are from the nearest ones of the first.

    Wang et al., "Simulating human saccadic scanpaths on natural images", CVPR 2011. The distance of
    two windows is the mean distance of their fixations. It is directed.

    Args:
        first: A scanpath.
        second: A scanpath.
        window: Fixations per window.
        how: Mean or largest over the windows of the second.

    Returns:
        Pixels; NaN where a scanpath is shorter than the window.
    """
    if min(len(first), len(second)) < window:
        return float("nan")
    a, b = (
        np.lib.stride_tricks.sliding_window_view(path.xy_px, window, axis=0)
        for path in (first, second)
    )  # (windows, 2, window)
    difference = b[:, None] - a[None]
    apart = np.hypot(difference[:, :, 0], difference[:, :, 1]).mean(axis=2)
    nearest = apart.min(axis=1)
    return float(nearest.mean() if how == "mean" else nearest.max())


def scaled_time_delay_embedding(
    first: Scanpath, second: Scanpath, *, size_px: Size
) -> tuple[float, float]:
    """Similarity and distance over all window lengths, in units of the picture's larger side.

    Returns:
        The mean of exp(-d) and the mean of d over windows of 1, 2, ... fixations, with d of
        `time_delay_embedding`.
    """
    longest = min(len(first), len(second))
    distances = np.array(
        [time_delay_embedding(first, second, window=k) for k in range(1, longest + 1)]
    ) / max(size_px)
    if not longest:
        return float("nan"), float("nan")
    return float(np.exp(-distances).mean()), float(distances.mean())
