"""Representational similarity: do two systems tell the same images apart?

A dissimilarity matrix holds 1 - Pearson correlation of the responses to each pair of images
(Kriegeskorte et al., Neuron 60, 2008). Two matrices are compared by the rank correlation of their
upper triangles. The noise ceiling is how well the mean of all subjects (upper bound), or of all
others (lower bound), agrees with each subject (Nili et al., PLoS Computational Biology 10, 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats  # type: ignore[import-untyped]

Comparison = Literal["spearman", "pearson", "kendall"]
"""`kendall` is tau-a, for models with ties."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """How alike two matrices are, with a 95 % interval over images."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class RsaCeiling:
    """How alike a perfect model could be to the subjects."""

    lower: float
    upper: float


def dissimilarities(patterns: Float[np.ndarray, "images c"]) -> Float[np.ndarray, "images images"]:
    """1 - Pearson correlation of each pair of rows; NaN for rows that do not vary."""
    rows = patterns.astype(np.float64)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = rows / norms
    matrix = 1.0 - unit @ unit.T
    np.fill_diagonal(matrix, 0.0)
    return np.asarray((matrix + matrix.T) / 2)


def upper_triangle(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " pairs"]:
    """The entries above the diagonal, row by row."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, got {matrix.shape}")
    return np.asarray(matrix[np.triu_indices(len(matrix), k=1)])


def compare(
    first: Float[np.ndarray, "n n"],
    second: Float[np.ndarray, "n n"],
    *,
    how: Comparison = "spearman",
) -> float:
    """How alike two dissimilarity matrices are, from -1 to 1."""
    if first.shape != second.shape:
        raise ValueError(f"the matrices must have one shape, got {first.shape}, {second.shape}")
    x, y = upper_triangle(first), upper_triangle(second)
    if how == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    if how in ("spearman", "pearson"):
        return float(np.corrcoef(x, y)[0, 1])
    if how != "kendall":
        raise ValueError(f"how must be 'spearman', 'pearson' or 'kendall', got {how!r}")
    return _kendall_tau_a(x, y)


def compare_with_interval(
    first: Float[np.ndarray, "n n"],
    second: Float[np.ndarray, "n n"],
    *,
    how: Comparison = "spearman",
    draws: int = 500,
    seed: int = 0,
) -> Similarity:
    """`compare`, and the central 95 % of it over images drawn with replacement.

    Pairs of one image with itself, which a draw repeats, are left out.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(len(first), size=len(first))
        rows, columns = np.triu_indices(len(chosen), k=1)
        rows, columns = chosen[rows], chosen[columns]
        kept = rows != columns
        x, y = first[rows[kept], columns[kept]], second[rows[kept], columns[kept]]
        if how == "spearman":
            x, y = stats.rankdata(x), stats.rankdata(y)
        found.append(_kendall_tau_a(x, y) if how == "kendall" else np.corrcoef(x, y)[0, 1])
    low, high = np.quantile(found, [0.025, 0.975])
    return Similarity(value=compare(first, second, how=how), low=float(low), high=float(high))


def noise_ceiling(
    subjects: Float[np.ndarray, "s n n"], *, how: Comparison = "spearman"
) -> RsaCeiling:
    """Mean similarity of each subject with the mean of the others, and with the mean of all."""
    if len(subjects) < 2:
        raise ValueError(f"subjects must be at least two matrices, got {len(subjects)}")
    ready = np.stack([_standard(matrix, how) for matrix in subjects])
    whole = ready.mean(axis=0)
    lower, upper = [], []
    for index, own in enumerate(ready):
        others = np.delete(ready, index, axis=0).mean(axis=0)
        lower.append(compare(own, others, how=how))
        upper.append(compare(own, whole, how=how))
    return RsaCeiling(lower=float(np.mean(lower)), upper=float(np.mean(upper)))


def _standard(matrix: np.ndarray, how: Comparison) -> np.ndarray:
    """The matrix as ranks or z-scores, so that subjects weigh the same in a mean."""
    rows, columns = np.triu_indices(len(matrix), k=1)
    values = matrix[rows, columns]
    values = stats.zscore(values) if how == "pearson" else stats.rankdata(values)
    result = np.zeros(matrix.shape, dtype=np.float64)
    result[rows, columns] = result[columns, rows] = values
    return result


def _kendall_tau_a(x: np.ndarray, y: np.ndarray) -> float:
    """Concordant minus discordant pairs over all pairs."""
    pairs = len(x) * (len(x) - 1) / 2
    tau_b = stats.kendalltau(x, y).statistic
    ties_x = sum(n * (n - 1) / 2 for n in np.unique(x, return_counts=True)[1])
    ties_y = sum(n * (n - 1) / 2 for n in np.unique(y, return_counts=True)[1])
    return float(tau_b * np.sqrt((pairs - ties_x) * (pairs - ties_y)) / pairs)
