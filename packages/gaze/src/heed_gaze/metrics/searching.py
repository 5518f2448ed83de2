"""How soon a search finds its target: cumulative performance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer

from heed_gaze.scanpaths import Scanpath

NEVER = -1
"""Where the target is not found."""


def found_at(path: Scanpath, *, margin_px: float = 0.0) -> int:
    """Index of the first fixation on the target's box, from 0; `NEVER` where there is none.

    Args:
        path: With `target_box`.
        margin_px: How far off the box still counts, for the size of the fovea.

    Raises:
        ValueError: The target's box is not known.
    """
    if path.target_box is None:
        raise ValueError(f"{path.name} has no target_box")
    low, high = np.array(path.target_box[:2]), np.array(path.target_box[2:])
    inside = ((path.xy_px >= low - margin_px) & (path.xy_px <= high + margin_px)).all(axis=1)
    hits = np.flatnonzero(inside)
    return int(hits[0]) if len(hits) else NEVER


def found_all(paths: Sequence[Scanpath], *, margin_px: float = 0.0) -> Int64[np.ndarray, " p"]:
    """`found_at` of several scanpaths."""
    return np.array([found_at(path, margin_px=margin_px) for path in paths], dtype=np.int64)


def performance_curve(found: Integer[np.ndarray, " p"], most: int) -> Float64[np.ndarray, " n"]:
    """Share of trials whose target is found by fixation 0, 1, ..., `most`.

    Args:
        found: Index of the finding fixation of each trial, `NEVER` where there is none.
        most: The last fixation that counts.

    Example:
        >>> performance_curve(np.array([1, 0, 3, NEVER]), 2).tolist()
        [0.25, 0.5, 0.5]
    """
    if not len(found):
        return np.full(most + 1, np.nan)
    when = np.arange(most + 1)
    return np.asarray(((found[:, None] >= 0) & (found[:, None] <= when)).mean(axis=0))


def performance_area(curve: Float64[np.ndarray, " n"]) -> float:
    """Area under a performance curve over its width, in [0, 1], by the trapezium rule."""
    if len(curve) == 1:
        return float(curve[0])
    return float(np.trapezoid(curve) / (len(curve) - 1))


def probability_mismatch(
    first: Float64[np.ndarray, " n"], second: Float64[np.ndarray, " n"]
) -> float:
    """Sum of the absolute differences of two performance curves (Yang et al., CVPR 2020)."""
    return float(np.abs(first - second).sum())
