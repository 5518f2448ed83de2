"""Linear probe: what a logistic regression reads from frozen embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from heed_medical.classification.metrics import roc_auc


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """One logistic regression per finding."""

    weight: Float64[np.ndarray, "p k"]
    bias: Float64[np.ndarray, " k"]
    mean: Float64[np.ndarray, " p"]
    std: Float64[np.ndarray, " p"]
    """Of the embeddings that it was fitted to."""

    def probabilities(self, embeddings: Float[np.ndarray, "n p"]) -> Float64[np.ndarray, "n k"]:
        """Of each finding being present."""
        scaled = (embeddings - self.mean) / self.std
        return np.asarray(expit(scaled @ self.weight + self.bias))


def fit_probe(
    embeddings: Float[np.ndarray, "n p"],
    labels: Float[np.ndarray, "n k"],
    *,
    penalty: float = 1.0,
) -> LinearProbe:
    """Minimise the sum of log-losses + penalty / 2 times the squared weights, per finding.

    Args:
        embeddings: A row per study; standardised inside.
        labels: 1 present, 0 absent, NaN not known.
        penalty: Strength of the pull of weights to 0; biases are free.

    Raises:
        ValueError: Other numbers of rows, or a finding without a known label.
    """
    if len(embeddings) != len(labels) or embeddings.ndim != 2 or labels.ndim != 2:
        raise ValueError(f"rows must agree, got {embeddings.shape} and {labels.shape}")
    if penalty < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    if not np.isfinite(labels).any(axis=0).all():
        raise ValueError("every finding needs a known label")
    mean = embeddings.mean(axis=0, dtype=np.float64)
    std = embeddings.std(axis=0, dtype=np.float64)
    std[std == 0] = 1.0
    x = (embeddings - mean) / std
    fitted = [_fit(x, column, penalty) for column in labels.T]
    weight = np.stack([part[:-1] for part in fitted], axis=1)
    return LinearProbe(weight=weight, bias=np.array([p[-1] for p in fitted]), mean=mean, std=std)


Labelled = tuple[Float[np.ndarray, "n p"], Float[np.ndarray, "n k"]]
"""Embeddings, and labels: 1 present, 0 absent, NaN not known."""


def choose_probe(
    train: Labelled, val: Labelled, *, penalties: Sequence[float]
) -> tuple[LinearProbe, float]:
    """The probe, fitted to `train`, whose penalty has the highest mean area under the ROC on `val`.

    Of equal ones the strongest penalty is taken, and so it is where no finding has both kinds.
    """
    best: tuple[float, LinearProbe, float] | None = None
    for penalty in sorted(penalties, reverse=True):
        probe = fit_probe(*train, penalty=penalty)
        found = probe.probabilities(val[0])
        areas = []
        for column, truth in zip(found.T, val[1].T, strict=True):
            known = np.isfinite(truth)
            areas.append(roc_auc(column[known], truth[known] == 1))
        finite = [area for area in areas if np.isfinite(area)]
        score = float(np.mean(finite)) if finite else 0.0
        if best is None or score > best[0]:
            best = (score, probe, penalty)
    if best is None:
        raise ValueError("penalties must be one or more numbers, got none")
    return best[1], best[2]


def _fit(
    x: Float64[np.ndarray, "n p"], column: Float[np.ndarray, " n"], penalty: float
) -> Float64[np.ndarray, " q"]:
    """Weights and, last, the bias."""
    known = np.isfinite(column)
    rows, wanted = x[known], column[known].astype(np.float64)

    def loss(both: np.ndarray) -> tuple[float, np.ndarray]:
        scores = rows @ both[:-1] + both[-1]
        value = np.logaddexp(0, scores).sum() - scores @ wanted
        error = expit(scores) - wanted
        gradient = np.append(rows.T @ error + penalty * both[:-1], error.sum())
        return float(value + penalty / 2 * both[:-1] @ both[:-1]), gradient

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B")
    return np.asarray(found.x)
