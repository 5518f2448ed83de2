"""Amplitudes and directions of saccades, and how unlike two distributions of them are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from heed_gaze.scanpaths import Scanpath


def saccade_vectors(paths: Sequence[Scanpath]) -> Float64[np.ndarray, "n 2"]:
    """All saccades of all scanpaths, in pixels, y downwards."""
    return np.concatenate([np.zeros((0, 2)), *(np.diff(path.xy_px, axis=0) for path in paths)])


def amplitudes_px(paths: Sequence[Scanpath]) -> Float64[np.ndarray, " n"]:
    """Lengths of all saccades."""
    return np.asarray(np.hypot(*saccade_vectors(paths).T))


def directions_rad(paths: Sequence[Scanpath]) -> Float64[np.ndarray, " n"]:
    """Directions of all saccades that go anywhere, counter-clockwise from "to the right"."""
    x, y = saccade_vectors(paths).T
    moved = (x != 0) | (y != 0)
    return np.asarray(np.arctan2(-y[moved], x[moved]))


def amplitude_histogram(
    paths: Sequence[Scanpath], edges_px: Float64[np.ndarray, " e"]
) -> Float64[np.ndarray, " b"]:
    """Share of the saccades in each range of amplitudes; longer ones count for the last."""
    values = np.minimum(amplitudes_px(paths), edges_px[-1])
    return _shares(np.histogram(values, edges_px)[0])


def direction_histogram(paths: Sequence[Scanpath], bins: int = 24) -> Float64[np.ndarray, " b"]:
    """Share of the saccades in each sector; the first is centred on "to the right"."""
    width = 2 * np.pi / bins
    sectors = np.floor(np.mod(directions_rad(paths) + width / 2, 2 * np.pi) / width).astype(int)
    return _shares(np.bincount(sectors % bins, minlength=bins))


def _shares(counts: np.ndarray) -> Float64[np.ndarray, " b"]:
    total = counts.sum()
    return np.asarray(counts / total if total else np.full(counts.shape, np.nan))


def histogram_distance(
    first: Float64[np.ndarray, " b"], second: Float64[np.ndarray, " b"]
) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 the same, 1 nothing in common.

    Example:
        >>> histogram_distance(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
        1.0
    """
    middle = (first + second) / 2
    return float((_kl_bits(first, middle) + _kl_bits(second, middle)) / 2)


def _kl_bits(p: Float64[np.ndarray, " b"], q: Float64[np.ndarray, " b"]) -> float:
    if np.isnan(p).any():
        return float("nan")
    used = p > 0
    return float((p[used] * np.log2(p[used] / q[used])).sum())
