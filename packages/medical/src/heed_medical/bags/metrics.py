"""Scores of slide classification, and how concentrated attention is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int64
from scipy.stats import rankdata  # type: ignore[import-untyped]


def roc_auc(scores: Float[np.ndarray, " n"], positive: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores higher; ties count half.

    NaN where one of the two is missing.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / positives / negatives)


def classification_scores(
    probabilities: Float[np.ndarray, "n k"], labels: Int64[np.ndarray, " n"]
) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1 and macro AUC (one against the rest).

    Classes without a case are left out of the means; F1 of a class that is neither there nor
    predicted does not count. With two classes the AUC is that of the second.
    """
    predicted = probabilities.argmax(axis=1)
    recalls, f1s, aucs = [], [], []
    for number in range(probabilities.shape[1]):
        true, said = labels == number, predicted == number
        hits = float((true & said).sum())
        if true.any():
            recalls.append(hits / true.sum())
        if true.any() or said.any():
            f1s.append(2 * hits / (true.sum() + said.sum()))
        aucs.append(roc_auc(probabilities[:, number], true))
    # Of two classes the first ties where its scores round to 1, the second still tells cases apart.
    counted = aucs[1:] if len(aucs) == 2 else aucs
    known = [auc for auc in counted if not np.isnan(auc)]
    return {
        "accuracy": float((predicted == labels).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "f1": float(np.mean(f1s)),
        "auc": float(np.mean(known)) if known else float("nan"),
    }


def bootstrap_intervals(
    probabilities: Float[np.ndarray, "n k"],
    labels: Int64[np.ndarray, " n"],
    *,
    draws: int = 500,
    seed: int = 0,
) -> Mapping[str, tuple[float, float]]:
    """95 % intervals of the scores over bags drawn with replacement; NaN where none is defined."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(draws):
        chosen = rng.integers(len(labels), size=len(labels))
        for name, value in classification_scores(probabilities[chosen], labels[chosen]).items():
            drawn.setdefault(name, []).append(value)
    return {name: _interval(np.array(values)) for name, values in drawn.items()}


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def confusion(
    predicted: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"], classes: int
) -> Int64[np.ndarray, "k k"]:
    """Counts: row = label, column = prediction."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def concentration(weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Share of the attention that the k most attended patches hold, k = 1, 2, ..., n."""
    ordered = np.sort(weights.astype(np.float64))[::-1]
    return np.cumsum(ordered) / max(float(ordered.sum()), np.finfo(np.float64).tiny)


def top_mass(weights: Float[np.ndarray, " n"], count: int) -> float:
    """Share of the attention that the `count` most attended patches hold."""
    return float(concentration(weights)[min(count, len(weights)) - 1])
