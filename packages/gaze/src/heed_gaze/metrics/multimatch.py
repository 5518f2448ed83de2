"""MultiMatch: five similarities of aligned saccades.

Jarodzka, Holmqvist, Nystroem, "A vector-based, multidimensional scanpath similarity measure",
ETRA 2010; Dewhurst et al., Behavior Research Methods 2012. Saccades are vectors; two scanpaths are
aligned by the cheapest way through the table of their vectors' differences; the medians over the
aligned pairs, scaled to [0, 1], are the similarities. Time O(n m) per pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from heed_gaze.metrics.alignment import in_batches, pad, warp, warp_path
from heed_gaze.metrics.simplification import Simplification, simplify
from heed_gaze.scanpaths import Scanpath, Size

MULTIMATCH = ("shape", "direction", "length", "position", "duration")
"""The five similarities, in their usual order; 1 is the same."""
FEWEST = 3
"""A scanpath of fewer fixations has fewer than two saccades, and nothing is defined."""


def multimatch(
    first: Sequence[Scanpath],
    second: Sequence[Scanpath],
    *,
    size_px: Size,
    simplification: Simplification | None = None,
) -> Float64[np.ndarray, "p 5"]:
    """The five similarities of each pair.

    Args:
        first: Scanpaths.
        second: Scanpaths to compare them with, one for each.
        size_px: Of the screen; its diagonal is the unit of lengths.
        simplification: Merge saccades first; None compares what was given.

    Returns:
        Columns `MULTIMATCH`. A row is NaN where a scanpath has fewer than three fixations, the last
        column also where durations are not known.

    Example:
        >>> path = Scanpath(
        ...     image="a", subject="1", xy_px=np.array([[0.0, 0.0], [9.0, 0.0], [9.0, 9.0]])
        ... )
        >>> multimatch([path], [path], size_px=(10, 10))[0, :4].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    diagonal = float(np.hypot(*size_px))
    saccades = {id(path): _saccades(path, simplification, diagonal) for path in {*first, *second}}
    left, right = ([saccades[id(path)] for path in side] for side in (first, second))
    defined = [min(len(a), len(b)) >= FEWEST for a, b in zip(first, second, strict=True)]
    return in_batches(
        lambda a, b: _similarities(a, b, diagonal),
        left,
        right,
        defined=np.array(defined, dtype=bool),
        columns=5,
    )


def _saccades(
    path: Scanpath, simplification: Simplification | None, diagonal: float
) -> Float64[np.ndarray, "n 5"]:
    """Start x and y, dx, dy, and the duration of the fixation before the saccade."""
    duration = path.duration_s if path.duration_s is not None else np.full(len(path), np.nan)
    start, vector = path.xy_px[:-1], np.diff(path.xy_px, axis=0)
    rows = np.column_stack([start, vector, duration[:-1]])
    if simplification is None or len(path) < FEWEST:
        return rows
    return simplify(rows, simplification, diagonal_px=diagonal, last_s=float(duration[-1]))


def _similarities(
    first: list[np.ndarray], second: list[np.ndarray], diagonal: float
) -> Float64[np.ndarray, "p 5"]:
    a, first_lengths = pad(first)
    b, second_lengths = pad(second)
    difference = np.hypot(
        a[:, :, None, 2] - b[:, None, :, 2], a[:, :, None, 3] - b[:, None, :, 3]
    )  # (p, n, m)
    i, j, real = warp_path(warp(difference), first_lengths, second_lengths)
    u, v = (np.take_along_axis(x, k[..., None], axis=1) for x, k in ((a, i), (b, j)))
    angle = np.abs(np.arctan2(u[..., 3], u[..., 2]) - np.arctan2(v[..., 3], v[..., 2]))
    longer = np.maximum(u[..., 4], v[..., 4])
    unlike = [
        np.hypot(*np.moveaxis(u[..., 2:4] - v[..., 2:4], -1, 0)) / (2 * diagonal),
        np.minimum(angle, 2 * np.pi - angle) / np.pi,
        np.abs(np.hypot(u[..., 2], u[..., 3]) - np.hypot(v[..., 2], v[..., 3])) / diagonal,
        np.hypot(*np.moveaxis(u[..., 0:2] - v[..., 0:2], -1, 0)) / diagonal,
        np.abs(u[..., 4] - v[..., 4]) / np.where(longer > 0, longer, 1.0),
    ]
    return 1.0 - np.stack([masked_median(values, real) for values in unlike], axis=1)


def masked_median(
    values: Float64[np.ndarray, "p s"], real: Bool[np.ndarray, "p s"]
) -> Float64[np.ndarray, " p"]:
    """Median of the real values of each row, of which there must be one; NaN spreads."""
    ordered = np.sort(np.where(real, values, np.inf), axis=1)
    count = real.sum(axis=1)
    rows = np.arange(len(values))
    middle = (ordered[rows, (count - 1) // 2] + ordered[rows, count // 2]) / 2
    return np.asarray(np.where((np.isnan(values) & real).any(axis=1), np.nan, middle))
