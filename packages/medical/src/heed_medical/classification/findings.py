"""Scores of findings that a case may have several of, each with labels that may be unknown.

Per finding: area under the ROC curve and average precision, over the cases whose label is known.
Over all: their means over the findings that have positive and negative cases. Intervals come from
a bootstrap over patients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from heed_medical.classification.metrics import Ranked, ScoreRow, Summary, average_precision


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Probabilities and labels of many cases."""

    names: tuple[str, ...]
    probabilities: Float64[np.ndarray, "n k"]
    labels: Float[np.ndarray, "n k"]
    """1 present, 0 absent, NaN not known."""
    groups: Int64[np.ndarray, " n"]
    """Which patient a case belongs to."""

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.names))
        if self.probabilities.shape != shape or self.labels.shape != shape:
            raise ValueError(
                f"probabilities and labels must be {shape}, got {self.probabilities.shape} and "
                f"{self.labels.shape}"
            )


def summarise_findings(found: Findings, *, samples: int = 500, seed: int = 0) -> Summary:
    """The scores of each finding and their means, areas with a 95 % percentile interval.

    Args:
        found: The predictions.
        samples: Numbers of resamplings.
        seed: Of the resampling.
    """
    known = np.isfinite(found.labels)
    ranked = [_ranked(found, known[:, k], k) for k in range(len(found.names))]
    whole = _areas(ranked, known, None)
    drawn = _bootstrap(ranked, known, found.groups, samples=samples, seed=seed)
    rows: list[ScoreRow] = []
    precisions = []
    for k, name in enumerate(found.names):
        positive = found.labels[known[:, k], k] == 1
        precisions.append(average_precision(found.probabilities[known[:, k], k], positive))
        low, high = _interval(drawn[:, k])
        rows.append(
            {
                "finding": name,
                "cases": int(known[:, k].sum()),
                "positive": int(positive.sum()),
                "auc": float(whole[k]),
                "auc_low": low,
                "auc_high": high,
                "ap": precisions[-1],
            }
        )
    low, high = _interval(np.array([_mean(row) for row in drawn]))
    metrics = {
        "macro_auc": _mean(whole),
        "macro_auc_low": low,
        "macro_auc_high": high,
        "macro_ap": _mean(np.array(precisions)),
        "cases": float(len(found.labels)),
        "patients": float(len(np.unique(found.groups))),
    }
    return Summary(metrics=metrics, rows=rows)


def _ranked(found: Findings, known: Bool[np.ndarray, " n"], k: int) -> Ranked | None:
    """The known cases of a finding; None without any."""
    if not known.any():
        return None
    return Ranked(found.probabilities[known, k], found.labels[known, k] == 1)


def _areas(
    ranked: Sequence[Ranked | None],
    known: np.ndarray,
    weights: Float64[np.ndarray, " n"] | None,
) -> Float64[np.ndarray, " k"]:
    return np.array(
        [
            math.nan if r is None else r.auc(None if weights is None else weights[known[:, k]])
            for k, r in enumerate(ranked)
        ]
    )


def _bootstrap(
    ranked: Sequence[Ranked | None],
    known: np.ndarray,
    groups: Int64[np.ndarray, " n"],
    *,
    samples: int,
    seed: int,
) -> Float64[np.ndarray, "s k"]:
    rng = np.random.default_rng(seed)
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    drawn = []
    for _ in range(samples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        drawn.append(_areas(ranked, known, times[group].astype(np.float64)))
    return np.array(drawn)


def _interval(values: Float64[np.ndarray, " s"]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _mean(values: Float64[np.ndarray, " k"]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
