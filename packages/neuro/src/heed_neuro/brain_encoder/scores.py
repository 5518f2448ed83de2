"""How well responses are predicted: correlation and encoding accuracy, by vertex and region.

Accuracy is the explained share of the variance that can be explained, min(r^2 / NC, 1), with
negative r as 0 (arXiv 2301.03198); vertices with NC = 0 or an undefined r (a constant response or
prediction) are left out and counted. Intervals are the central 95 % over images drawn with
replacement. Measurements that are missing (NaN) are left out vertex by vertex.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from heed_neuro.noise_ceiling import encoding_accuracy, pearson

DRAWS = 200


@dataclass(frozen=True, kw_only=True)
class VertexScores:
    """Of every vertex of a group."""

    r: Float[np.ndarray, " v"]
    """NaN where the measured or the predicted response is constant."""
    ceiling: Float[np.ndarray, " v"] | None
    accuracy: Float[np.ndarray, " v"] | None
    """NaN where the ceiling is 0 or r undefined; None without a ceiling."""


@dataclass(frozen=True, kw_only=True)
class RegionScores:
    """Of a set of vertices."""

    vertices: int
    r: float
    r_low: float
    r_high: float
    r_median: float
    accuracy: float | None
    accuracy_median: float | None
    undefined: int
    """Vertices whose r is undefined."""
    without_ceiling: int
    """Vertices whose noise ceiling is 0."""
    negative: float
    """Share of the vertices with r < 0."""


def score_vertices(
    predicted: Float[np.ndarray, "n v"],
    measured: Float[np.ndarray, "n v"],
    ceiling: Float[np.ndarray, " v"] | None = None,
) -> VertexScores:
    """Correlation of each vertex, and its accuracy where the ceiling is known."""
    r = pearson_of_known(predicted, measured)
    accuracy = None if ceiling is None else encoding_accuracy(r, ceiling)
    return VertexScores(r=r, ceiling=ceiling, accuracy=accuracy)


def score_region(
    scores: VertexScores, members: Bool[np.ndarray, " v"], drawn: Float[np.ndarray, "d v"]
) -> RegionScores:
    """Sum the vertices of a region up.

    Args:
        scores: Of all vertices.
        members: Those of the region.
        drawn: The correlations of all vertices for images drawn with replacement.
    """
    r = scores.r[members]
    fine = np.isfinite(r)
    low = high = float("nan")
    if fine.any() and len(drawn):
        means = _mean(drawn[:, members])
        if np.isfinite(means).any():
            low, high = (float(x) for x in np.nanquantile(means, [0.025, 0.975]))
    own = None if scores.accuracy is None else scores.accuracy[members]
    known = own is not None and np.isfinite(own).any()
    return RegionScores(
        vertices=int(members.sum()),
        r=float(r[fine].mean()) if fine.any() else float("nan"),
        r_low=low,
        r_high=high,
        r_median=float(np.median(r[fine])) if fine.any() else float("nan"),
        accuracy=float(np.nanmean(own)) if own is not None and known else None,
        accuracy_median=float(np.nanmedian(own)) if own is not None and known else None,
        undefined=int((~fine).sum()),
        without_ceiling=0 if scores.ceiling is None else int((scores.ceiling[members] <= 0).sum()),
        negative=float((r[fine] < 0).mean()) if fine.any() else 0.0,
    )


def pearson_of_known(
    predicted: Float[np.ndarray, "n v"], measured: Float[np.ndarray, "n v"]
) -> Float[np.ndarray, " v"]:
    """Correlation of each vertex over the images at which it was measured (not NaN)."""
    known = np.isfinite(measured)
    r = pearson(predicted, np.where(known, measured, np.nan))
    for vertex in np.flatnonzero(~known.all(axis=0)):
        rows = known[:, vertex]
        if rows.any():
            r[vertex] = pearson(predicted[rows][:, [vertex]], measured[rows][:, [vertex]])[0]
    return r


def bootstrap_r(
    predicted: Float[np.ndarray, "n v"],
    measured: Float[np.ndarray, "n v"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    vertices: int = 4096,
) -> Float[np.ndarray, "d v"]:
    """Correlations for images drawn with replacement, as weighted sums over all images.

    Args:
        predicted: Of each image and vertex.
        measured: The same.
        draws: How many.
        seed: Of the draws.
        vertices: How many are computed at once.
    """
    images = len(predicted)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws) / images
    result = np.empty((draws, predicted.shape[1]), dtype=np.float32)
    for start in range(0, predicted.shape[1], vertices):
        part = slice(start, start + vertices)
        known = np.isfinite(measured[:, part])
        x, y = _centred(predicted[:, part], known), _centred(measured[:, part], known)
        share = weights @ known.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_x, mean_y, mean_xy = (weights @ z / share for z in (x, y, x * y))
            spread = (weights @ x**2 / share - mean_x**2) * (weights @ y**2 / share - mean_y**2)
            r = (mean_xy - mean_x * mean_y) / np.sqrt(np.where(spread > 1e-12, spread, np.nan))
        result[:, part] = r
    return result


def mean_r(
    predicted: Mapping[str, Float[np.ndarray, "n v"]],
    measured: Mapping[str, Float[np.ndarray, "n v"]],
) -> float:
    """Mean correlation over the vertices of all groups: what selects the best epoch."""
    found = np.concatenate([pearson_of_known(predicted[g], measured[g]) for g in measured])
    fine = found[np.isfinite(found)]
    return float(fine.mean()) if len(fine) else float("nan")


def _centred(table: np.ndarray, known: np.ndarray) -> np.ndarray:
    """As z-scores, so that products neither overflow nor cancel; 0 where nothing is known."""
    count = np.maximum(known.sum(axis=0), 1)
    values = np.where(known, table.astype(np.float64), 0.0)
    values = np.where(known, values - values.sum(axis=0) / count, 0.0)
    std = np.sqrt((values**2).sum(axis=0) / count)
    return np.asarray(values / np.where(std > 0, std, 1.0))


def _mean(table: np.ndarray) -> np.ndarray:
    """Mean over columns of what is finite; NaN for rows without any."""
    fine = np.isfinite(table)
    count = fine.sum(axis=1)
    total = np.where(fine, table, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
