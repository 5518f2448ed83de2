"""Recurrence quantification of scanpaths.

One scanpath with itself: Anderson, Bischof, Laidlaw, Risko, Kingstone, Behavior Research Methods 45
(2013). Two scanpaths: Anderson, Anderson, Kingstone, Bischof, Behavior Research Methods 47 (2015).
Fixations recur where they are at most a radius apart. All measures are percentages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Shaped

from heed_gaze.scanpaths import Scanpath

SHORTEST_LINE = 2
"""Recurrences in a row that count as a line."""


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """What a recurrence plot shows; NaN where there is nothing to count."""

    recurrence: float
    """Pairs of fixations that recur (REC)."""
    determinism: float
    """Recurrences on diagonal lines: the same sequence of places again (DET)."""
    laminarity: float
    """Recurrences on horizontal or vertical lines: a place scanned in detail (LAM)."""
    centre: float
    """Centre of recurrent mass: how far apart in time recurrences are, in the direction of the
    second scanpath (CORM)."""


def recurrence(path: Scanpath, *, radius_px: float) -> Recurrence:
    """Where one scanpath returns to.

    Pairs of a fixation with a later one count. REC = 100 R / (n (n - 1) / 2), DET = 100 D / R,
    LAM = 100 (H + V) / (2 R), CORM = 100 sum((j - i) r_ij) / ((n - 1) R).
    """
    count = len(path)
    plot = np.triu(recurrence_plot(path, path, radius_px=radius_px), k=1)
    total = int(plot.sum())
    if count < 2 or not total:
        share = 0.0 if count > 1 else float("nan")
        return Recurrence(recurrence=share, determinism=np.nan, laminarity=np.nan, centre=np.nan)
    i, j = np.nonzero(plot)
    return Recurrence(
        recurrence=100 * total / (count * (count - 1) / 2),
        determinism=100 * on_lines(_diagonals(plot)) / total,
        laminarity=100 * (on_lines(plot) + on_lines(plot.T)) / (2 * total),
        centre=100 * float((j - i).sum()) / ((count - 1) * total),
    )


def cross_recurrence(first: Scanpath, second: Scanpath, *, radius_px: float) -> Recurrence:
    """Where two scanpaths meet, whenever.

    Both are cut to the shorter one's number of fixations n. REC = 100 C / n^2, DET and LAM as for
    one scanpath, over all pairs, CORM = 100 sum((j - i) c_ij) / ((n - 1) C): positive where the
    second follows.
    """
    count = min(len(first), len(second))
    plot = recurrence_plot(first, second, radius_px=radius_px)[:count, :count]
    total = int(plot.sum())
    if not count or not total:
        share = 0.0 if count else float("nan")
        return Recurrence(recurrence=share, determinism=np.nan, laminarity=np.nan, centre=np.nan)
    i, j = np.nonzero(plot)
    return Recurrence(
        recurrence=100 * total / count**2,
        determinism=100 * on_lines(_diagonals(plot)) / total,
        laminarity=100 * (on_lines(plot) + on_lines(plot.T)) / (2 * total),
        centre=100 * float((j - i).sum()) / ((count - 1) * total) if count > 1 else np.nan,
    )


def recurrence_plot(
    first: Scanpath, second: Scanpath, *, radius_px: float
) -> Bool[np.ndarray, "n m"]:
    """Which fixations of two scanpaths are at most a radius apart."""
    difference = first.xy_px[:, None] - second.xy_px[None]
    return np.asarray(np.hypot(difference[..., 0], difference[..., 1]) <= radius_px)


def on_lines(plot: Shaped[np.ndarray, "n m"], shortest: int = SHORTEST_LINE) -> int:
    """How many true values stand in rows with at least so many in a run.

    Example:
        >>> on_lines(np.array([[1, 1, 0, 1], [1, 0, 1, 0]], dtype=bool))
        2
    """
    framed = np.zeros((plot.shape[0], plot.shape[1] + 2), dtype=np.int8)
    framed[:, 1:-1] = plot
    edges = framed[:, 1:] - framed[:, :-1]
    starts, ends = np.nonzero(edges == 1)[1], np.nonzero(edges == -1)[1]
    lengths = ends - starts
    return int(lengths[lengths >= shortest].sum())


def _diagonals(plot: Bool[np.ndarray, "n m"]) -> Bool[np.ndarray, "d m"]:
    """The diagonals as rows, filled up with false."""
    n, m = plot.shape
    rows = np.zeros((n + m - 1, m), dtype=bool)
    i, j = np.indices((n, m))
    rows[i - j + m - 1, j] = plot
    return rows
