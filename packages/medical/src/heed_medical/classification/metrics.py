"""Scores of a classifier on cases with one label each, with bootstrap intervals over patients.

Per class: sensitivity TP / (TP + FN), specificity TN / (TN + FP), positive predictive value
TP / (TP + FP), area under the ROC curve of the class against all others. Over all: accuracy,
balanced accuracy (mean sensitivity), Brier score, expected calibration error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.special import expit, logit  # type: ignore[import-untyped]

LEAST_SCORE = 1e-7
"""Log-odds are those of scores at least so far from 0 and 1: what single precision tells apart."""

ScoreRow = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Labels and predictions of many cases."""

    names: tuple[str, ...]
    """The classes."""
    labels: Int64[np.ndarray, " n"]
    called: Int64[np.ndarray, " n"]
    """The predicted classes; not always the most probable ones."""
    probabilities: Float64[np.ndarray, "n k"]
    groups: Int64[np.ndarray, " n"]
    """Which patient a case belongs to: the bootstrap draws patients."""

    def __post_init__(self) -> None:
        n, k = self.probabilities.shape
        if k != len(self.names) or {len(self.labels), len(self.called), len(self.groups)} != {n}:
            raise ValueError(
                f"{n} x {k} probabilities do not fit {len(self.names)} classes, "
                f"{len(self.labels)} labels, {len(self.called)} calls, {len(self.groups)} groups"
            )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of a curve, and the threshold at each: called from this score on."""

    x: Float64[np.ndarray, " m"]
    y: Float64[np.ndarray, " m"]
    thresholds: Float64[np.ndarray, " m"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Scores over all cases."""

    metrics: Mapping[str, float]
    """accuracy, balanced_accuracy, auc (mean over classes; of the second of two), each with _low
    and _high of the 95 % interval; brier, ece, cases, patients."""
    rows: Sequence[ScoreRow]
    """One per class: cases, sensitivity, specificity, ppv, auc, ap, with intervals."""


def confusion(
    labels: Int64[np.ndarray, " n"],
    called: Int64[np.ndarray, " n"],
    *,
    classes: int,
    weights: Float64[np.ndarray, " n"] | None = None,
) -> Float64[np.ndarray, "k k"]:
    """How many cases of class i (row) were called j (column)."""
    cells = np.bincount(labels * classes + called, weights=weights, minlength=classes**2)
    return np.asarray(cells, dtype=np.float64).reshape(classes, classes)


class Ranked:
    """Scores in falling order with ties joined, so that areas are one pass over weights.

    Args:
        scores: Of the cases.
        positive: Which cases are positive.
    """

    def __init__(self, scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> None:
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        self.thresholds = ranked[self.first]
        self.positive = positive[self.order]

    def totals(
        self, weights: Float64[np.ndarray, " n"] | None = None
    ) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
        """True and false positives when everything from each threshold on is called."""
        ones = np.ones(len(self.order)) if weights is None else weights[self.order]
        true = np.add.reduceat(ones * self.positive, self.first)
        false = np.add.reduceat(ones * ~self.positive, self.first)
        return np.cumsum(true), np.cumsum(false)

    def auc(self, weights: Float64[np.ndarray, " n"] | None = None) -> float:
        """Area under the ROC curve, ties counted half; NaN without positive or negative cases."""
        true, false = (np.r_[0.0, total] for total in self.totals(weights))
        if not true[-1] or not false[-1]:
            return math.nan
        return float(np.trapezoid(true, false) / (true[-1] * false[-1]))


def roc_curve(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Curve:
    """False-positive rate against sensitivity, from calling nothing to calling everything.

    Raises:
        ValueError: No positive or no negative case.
    """
    ranked = _ranked(scores, positive)
    true, false = ranked.totals()
    return Curve(
        x=np.r_[0.0, false / false[-1]],
        y=np.r_[0.0, true / true[-1]],
        thresholds=np.r_[np.inf, ranked.thresholds],
    )


def precision_recall(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Curve:
    """Sensitivity (recall) against positive predictive value (precision).

    Raises:
        ValueError: No positive or no negative case.
    """
    ranked = _ranked(scores, positive)
    true, false = ranked.totals()
    return Curve(x=true / true[-1], y=true / (true + false), thresholds=ranked.thresholds)


def _ranked(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Ranked:
    if positive.all() or not positive.any():
        raise ValueError("a curve needs positive and negative cases")
    return Ranked(scores, positive)


def roc_auc(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Area under the ROC curve, ties counted half; NaN without positive or negative cases."""
    return Ranked(scores, positive).auc() if len(scores) else math.nan


def average_precision(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Mean precision over the recalled cases; NaN without positive or negative cases."""
    if not len(scores) or positive.all() or not positive.any():
        return math.nan
    curve = precision_recall(scores, positive)
    return float(np.sum(np.diff(np.r_[0.0, curve.x]) * curve.y))


def best_threshold(scores: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """The score from which on to call a case positive, for the best mean of both sensitivities.

    It lies between two scores, in the middle of their log-odds: as far from the last negative case
    as from the first positive one on the scale that a classifier adds up on. Of equally good ones
    it is the one with the widest such gap. Where none is better than chance it is 0.5.
    """
    if not len(scores) or positive.all() or not positive.any():
        return 0.5
    curve = roc_curve(scores, positive)
    gain = (curve.y - curve.x)[1:-1]  # calling nothing and calling everything are no thresholds
    if not len(gain) or gain.max() <= 0:
        return 0.5
    high, low = curve.thresholds[1:-1], curve.thresholds[2:]
    odds = [logit(side.clip(LEAST_SCORE, 1 - LEAST_SCORE)) for side in (low, high)]
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    widest = best[np.argmax((odds[1] - odds[0])[best])]
    middle = float(expit((odds[0] + odds[1])[widest] / 2))
    if low[widest] < middle <= high[widest]:
        return middle
    return float((low[widest] + high[widest]) / 2)  # both at one end of the clipped log-odds


def calibration(
    probabilities: Float64[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], *, bins: int = 10
) -> list[ScoreRow]:
    """Mean probability and share of positive cases, by even bins of the probability.

    Bins without cases are left out.
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    rows: list[ScoreRow] = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            rows.append(
                {
                    "from": number / bins,
                    "to": (number + 1) / bins,
                    "cases": int(inside.sum()),
                    "probability": float(probabilities[inside].mean()),
                    "share": float(positive[inside].mean()),
                }
            )
    return rows


def calibration_error(
    probabilities: Float64[np.ndarray, "n k"], labels: Int64[np.ndarray, " n"], *, bins: int = 10
) -> float:
    """Expected calibration error of the most probable class."""
    best = probabilities.argmax(1)
    rows = calibration(probabilities.max(1), best == labels, bins=bins)
    gaps = [int(r["cases"] or 0) * abs(_value(r["probability"]) - _value(r["share"])) for r in rows]
    return float(sum(gaps) / len(labels))


def brier_score(
    probabilities: Float64[np.ndarray, "n k"], labels: Int64[np.ndarray, " n"]
) -> float:
    """Mean squared distance of the probabilities from the label: 0 is best, 2 is worst."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(np.square(probabilities - truth).sum(1).mean())


def summarise(found: Predictions, *, samples: int = 1000, seed: int = 0) -> Summary:
    """All scores with the 95 % percentile interval of a bootstrap over patients.

    Args:
        found: The predictions.
        samples: Numbers of resamplings.
        seed: Of the resampling.
    """
    ranked = [Ranked(found.probabilities[:, k], found.labels == k) for k in range(len(found.names))]
    whole = _scores(found, ranked, None)
    drawn = _bootstrap(found, ranked, samples=samples, seed=seed)
    with np.errstate(all="ignore"):
        low, high = (_quantile(drawn, q) for q in (0.025, 0.975))
    names = _score_names(len(found.names))
    place = {name: i for i, name in enumerate(names)}

    def three(name: str, shown: str) -> dict[str, float]:
        i = place[name]
        return {
            shown: float(whole[i]),
            f"{shown}_low": float(low[i]),
            f"{shown}_high": float(high[i]),
        }

    rows: list[ScoreRow] = []
    for k, name in enumerate(found.names):
        row: dict[str, str | int | float | None] = {"class": name}
        row["cases"] = int((found.labels == k).sum())
        for score in ("sensitivity", "specificity", "ppv", "auc"):
            row |= three(f"{score}{k}", score)
        row["ap"] = average_precision(found.probabilities[:, k], found.labels == k)
        rows.append(row)
    metrics = {
        **three("accuracy", "accuracy"),
        **three("balanced_accuracy", "balanced_accuracy"),
        **three("auc", "auc"),
        "brier": brier_score(found.probabilities, found.labels),
        "ece": calibration_error(found.probabilities, found.labels),
        "cases": float(len(found.labels)),
        "patients": float(len(np.unique(found.groups))),
    }
    return Summary(metrics=metrics, rows=rows)


def _score_names(classes: int) -> list[str]:
    per_class = ("sensitivity", "specificity", "ppv", "auc")
    return ["accuracy", "balanced_accuracy", "auc"] + [
        f"{score}{k}" for score in per_class for k in range(classes)
    ]


def _scores(
    found: Predictions, ranked: Sequence[Ranked], weights: Float64[np.ndarray, " n"] | None
) -> Float64[np.ndarray, " s"]:
    """The scores of `_score_names`, NaN where one is not defined."""
    classes = len(found.names)
    cells = confusion(found.labels, found.called, classes=classes, weights=weights)
    total, hits = cells.sum(), np.diag(cells)
    present, called = cells.sum(1), cells.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, ppv = hits / present, hits / called
        specificity = (total - present - called + hits) / (total - present)
    areas = np.array([r.auc(weights) for r in ranked])
    auc = areas[1] if classes == 2 else _mean(areas)
    overall = [hits.sum() / total, _mean(sensitivity), auc]
    return np.concatenate([overall, sensitivity, specificity, ppv, areas])


def _bootstrap(
    found: Predictions, ranked: Sequence[Ranked], *, samples: int, seed: int
) -> Float64[np.ndarray, "t s"]:
    rng = np.random.default_rng(seed)
    _, group = np.unique(found.groups, return_inverse=True)
    count = int(group.max()) + 1
    drawn = []
    for _ in range(samples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        drawn.append(_scores(found, ranked, times[group].astype(np.float64)))
    return np.array(drawn)


def _quantile(drawn: Float64[np.ndarray, "t s"], q: float) -> Float64[np.ndarray, " s"]:
    """Per score, over the samples in which it is defined."""
    columns = [column[np.isfinite(column)] for column in drawn.T]
    return np.array([np.quantile(c, q) if len(c) else math.nan for c in columns])


def _mean(values: Float64[np.ndarray, " k"]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _value(value: str | float | None) -> float:
    return math.nan if value is None else float(value)
