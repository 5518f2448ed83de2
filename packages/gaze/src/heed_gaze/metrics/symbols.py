"""Scanpaths as strings: a symbol for where, repeated for how long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer

from heed_gaze.scanpaths import Scanpath, Size

Symbols = Int64[np.ndarray, " _"]


def grid_symbols(path: Scanpath, size_px: Size, bins: tuple[int, int]) -> Symbols:
    """The cell of each fixation on a grid over the screen, row by row from the top left.

    Args:
        path: A scanpath; what is off the screen counts for the nearest cell.
        size_px: Of the screen.
        bins: Numbers of columns and rows.
    """
    columns, rows = bins
    cells = np.floor(path.xy_px * np.array(bins) / np.array(size_px)).astype(np.int64)
    cells = np.clip(cells, 0, [columns - 1, rows - 1])
    return np.asarray(cells[:, 0] + columns * cells[:, 1])


def nearest_symbols(path: Scanpath, centres_xy: Float64[np.ndarray, "k 2"]) -> Symbols:
    """Index of the centre nearest to each fixation."""
    difference = path.xy_px[:, None] - centres_xy[None]
    return np.asarray(np.hypot(difference[..., 0], difference[..., 1]).argmin(axis=1))


def label_symbols(
    path: Scanpath, labels: Integer[np.ndarray, "h w"], size_px: Size | None = None
) -> Symbols:
    """The label under each fixation, of a map of what is where (semantic segmentation).

    Args:
        path: A scanpath; what is off the map counts for its border.
        labels: Class of each pixel.
        size_px: Width and height that the map covers; None: its own.
    """
    height, width = labels.shape
    scale = np.array([width, height]) / np.array(size_px or (width, height))
    cells = np.floor(path.xy_px * scale).astype(np.int64)
    x, y = np.clip(cells, 0, [width - 1, height - 1]).T
    return np.asarray(labels[y, x].astype(np.int64))


def repeat_nearest(
    symbols: Symbols, duration_s: Float64[np.ndarray, " n"], bin_s: float
) -> Symbols:
    """Each symbol as often as its duration holds bins, rounded half to even; some may vanish."""
    return np.repeat(symbols, np.round(duration_s / bin_s).astype(np.int64))


def repeat_whole(symbols: Symbols, duration_s: Float64[np.ndarray, " n"], bin_s: float) -> Symbols:
    """Each symbol as often as its duration holds whole bins; some may vanish."""
    bins = duration_s / bin_s + 1e-9  # 0.3 s hold six bins of 0.05 s, whatever binary fractions say
    return np.repeat(symbols, np.floor(bins).astype(np.int64))


def cluster_centres(
    paths: Sequence[Scanpath], bandwidth_px: float, *, rounds: int = 100
) -> Float64[np.ndarray, "k 2"]:
    """Where fixations gather: the modes that mean shift finds with a flat window.

    Comaniciu and Meer, IEEE PAMI 2002. Modes nearer than the bandwidth are one, that with the most
    fixations around it; they come in the order of these numbers. Time O(fixations^2) per round.

    Args:
        paths: Scanpaths of one picture.
        bandwidth_px: Radius of the window.
        rounds: At most so many shifts; each moves uphill.
    """
    points = np.concatenate([path.xy_px for path in paths])
    modes = points.copy()
    near = np.zeros((0, 0), dtype=bool)
    for _ in range(rounds):
        difference = modes[:, None] - points[None]
        near = np.hypot(difference[..., 0], difference[..., 1]) <= bandwidth_px
        weights = near / near.sum(axis=1, keepdims=True)
        moved = weights @ points
        if np.abs(moved - modes).max() < 1e-3 * bandwidth_px:
            break
        modes = moved
    kept: list[int] = []
    for k in np.argsort(-near.sum(axis=1), kind="stable"):
        gaps = np.hypot(*(modes[kept] - modes[k]).T)
        if not (gaps < bandwidth_px).any():
            kept.append(int(k))
    return modes[kept]
