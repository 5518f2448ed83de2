"""Scores of segmented scans, per scan, and their summary over scans.

Classes: intersection over union `TP / (TP + FP + FN)`. Curbs: precision, recall and F1, micro
(counts summed over the scans) and macro (means of the scans' values); with a tolerance (CurbNet,
arXiv 2403.16794), where a predicted point counts if a true one is near and a true one if a
predicted one is near; and the offset of fitted curves from the true points.

What counts: points within the region whose true class is not ignored. A counted point that is
predicted as ignored is a miss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, Num
from numpy.typing import ArrayLike

from heed_lidar.curves import Curb, segment_distance
from heed_lidar.regions import parse_region

ScoreRow = Mapping[str, str | int | float]
"""Columns: scan; points; `TRUE > PREDICTED` for each pair of classes; `curb truth`, `curb
predicted`, `curb hit`; `curb hit T`, `curb found T` for each tolerance T in metres; with curves
`curve points`, `curve matched`, `curve covered`, `curve offset` (a sum in metres). All but the
first are counts or sums, so that rows can be added up."""

_Row = dict[str, str | int | float]
_SAMPLES = 2000
_LEVEL = 0.95
_MATCH_M = 1.0
_COVERED_M = 0.2
_ROUNDING_M = 1e-5
"""Files hold float32: two coordinates of 100 m may be 0.008 mm nearer or farther than measured."""


@dataclass(frozen=True, kw_only=True)
class CurbScoring:
    """What is scored."""

    region: str = "forward"
    """The points that count, as `parse_region` reads it. forward: x above 0, at most 50 m away,
    where curbs are annotated."""
    tolerances_m: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)
    """Distances at which a curb point still counts as found; 0 is the strict score."""
    distance: Literal["xy", "xyz"] = "xy"
    """Whether distances are measured in the plane or in space."""
    curb: str = "curb"
    """Name of the class whose precision and recall are reported; where no class has it, only the
    classes are scored."""

    def __post_init__(self) -> None:
        parse_region(self.region)
        if any(not 0 <= t < math.inf for t in self.tolerances_m):
            raise ValueError(f"tolerances_m must not be negative, got {self.tolerances_m}")


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """Scores over all scans."""

    metrics: Mapping[str, float]
    """miou (over the classes that occur in the truth or the prediction); curb_precision,
    curb_recall, curb_f1 (micro), the same with _macro, and with _T for each tolerance above 0;
    miou_low, miou_high, curb_f1_low, curb_f1_high: 95 % bootstrap intervals over scans;
    curve_offset_m (mean distance of the true curb points within 1 m of a curve), curve_coverage
    (share of all of them within 0.2 m); scans, points. NaN where there is nothing to score."""
    classes: Sequence[ScoreRow]
    """One per class: class, iou, precision, recall, f1, points, predicted."""
    tolerances: Sequence[ScoreRow]
    """One per tolerance: tolerance_m, precision, recall, f1."""
    confusion: Sequence[ScoreRow]
    """One per true class: class, then the points that each class was predicted for."""
    scans: Sequence[ScoreRow]
    """One per scan: scan, miou, curb_precision, curb_recall, curb_f1, curb_truth,
    curb_predicted."""


def confusion_matrix(
    truth: Int64[np.ndarray, " n"], prediction: Int64[np.ndarray, " n"], num_classes: int
) -> Int64[np.ndarray, "c c"]:
    """Numbers of points: rows are true classes, columns predicted ones.

    Args:
        truth: Classes of the points.
        prediction: Classes of the points.
        num_classes: All classes are below it.

    Raises:
        ValueError: Other shapes, or a class out of range.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has {truth.shape} points and prediction {prediction.shape}")
    for name, classes in (("truth", truth), ("prediction", prediction)):
        if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
            found = (int(classes.min()), int(classes.max()))
            raise ValueError(f"{name} must hold classes 0..{num_classes - 1}, got {found}")
    pairs = truth.astype(np.int64) * num_classes + prediction
    counts = np.bincount(pairs, minlength=num_classes**2).astype(np.int64)
    return np.asarray(counts.reshape(num_classes, num_classes))


def intersection_over_union(
    confusion: Num[np.ndarray, "*s c c"],
) -> Float64[np.ndarray, "*s c"]:
    """Per class, NaN for one that is neither true nor predicted anywhere."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - hit
    return np.asarray(np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0))


def within(
    points: Float64[np.ndarray, "n d"], others: Float64[np.ndarray, "m d"], limit: float
) -> Float64[np.ndarray, " n"]:
    """Distance of each point to the nearest other one; infinite beyond the limit."""
    from scipy.spatial import KDTree  # type: ignore[import-untyped]

    if not len(points) or not len(others):
        return np.full(len(points), np.inf)
    # The tree leaves out neighbours at the limit itself.
    nearest = KDTree(others).query(points, distance_upper_bound=np.nextafter(limit, np.inf))
    return np.asarray(nearest[0], dtype=np.float64)


def score_scan(
    name: str,
    xyz: Float64[np.ndarray, "n 3"],
    truth: Int64[np.ndarray, " n"],
    prediction: Int64[np.ndarray, " n"],
    names: Sequence[str],
    *,
    settings: CurbScoring | None = None,
    curbs: Sequence[Curb] | None = None,
) -> list[ScoreRow]:
    """Compare a prediction with the truth; one row.

    Args:
        name: Of the scan.
        xyz: Points in metres, sensor frame.
        truth: Class of each point; 0 does not count.
        prediction: Class of each point.
        names: Of the classes; the first is the ignored one.
        settings: What is scored.
        curbs: Fitted curves, scored too where given.

    Raises:
        ValueError: Other shapes, or a class out of range.
    """
    settings = settings or CurbScoring()
    counted = parse_region(settings.region).contains(xyz) & (truth > 0)
    xyz, truth, prediction = xyz[counted], truth[counted], prediction[counted]
    confusion = confusion_matrix(truth, prediction, len(names))
    row: _Row = {"scan": name, "points": len(truth)}
    for true, counts in zip(names, confusion, strict=True):
        row.update({f"{true} > {other}": int(n) for other, n in zip(names, counts, strict=True)})
    if settings.curb not in names:
        return [row]
    curb = list(names).index(settings.curb)
    row["curb truth"] = int(confusion[curb].sum())
    row["curb predicted"] = int(confusion[:, curb].sum())
    row["curb hit"] = int(confusion[curb, curb])
    row.update(_tolerance_counts(xyz, truth == curb, prediction == curb, settings))
    if curbs is not None:
        row.update(_curve_counts(xyz[truth == curb, :2], curbs))
    return [row]


def _tolerance_counts(
    xyz: Float64[np.ndarray, "n 3"],
    true: Bool[np.ndarray, " n"],
    predicted: Bool[np.ndarray, " n"],
    settings: CurbScoring,
) -> _Row:
    """Predicted points near a true one, true points near a predicted one, the limit included."""
    if not settings.tolerances_m:
        return {}
    points = xyz if settings.distance == "xyz" else xyz[:, :2]
    limit = max(settings.tolerances_m) + _ROUNDING_M
    to_truth = within(points[predicted], points[true], limit)
    to_prediction = within(points[true], points[predicted], limit)
    row: _Row = {}
    hit = int((true & predicted).sum())
    for tolerance in settings.tolerances_m:
        # Other points at the very same place do not make a strict hit.
        reach = tolerance + _ROUNDING_M
        hits = int((to_truth <= reach).sum()) if tolerance else hit
        found = int((to_prediction <= reach).sum()) if tolerance else hit
        row[f"curb hit {tolerance:g}"] = hits
        row[f"curb found {tolerance:g}"] = found
    return row


def curve_distance(
    xy: Float64[np.ndarray, "n 2"], curbs: Sequence[Curb]
) -> Float64[np.ndarray, " n"]:
    """Horizontal distance of points from the nearest curve in metres; infinite without curves."""
    nearest = np.full(len(xy), np.inf)
    for curb in curbs:
        line = curb.polyline[:, :2]
        low, high = line.min(axis=0) - _MATCH_M, line.max(axis=0) + _MATCH_M
        rows = np.flatnonzero(((xy >= low) & (xy <= high)).all(axis=1))
        for start, end in pairwise(line):
            nearest[rows] = np.minimum(nearest[rows], segment_distance(xy[rows], start, end))
    return nearest


def _curve_counts(xy: Float64[np.ndarray, "n 2"], curbs: Sequence[Curb]) -> _Row:
    nearest = curve_distance(xy, curbs)
    matched = nearest <= _MATCH_M
    return {
        "curve points": len(xy),
        "curve matched": int(matched.sum()),
        "curve covered": int((nearest <= _COVERED_M + _ROUNDING_M).sum()),
        "curve offset": float(nearest[matched].sum()),
    }


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """The rows as arrays, one entry per scan."""

    names: tuple[str, ...]
    confusion: Float64[np.ndarray, "s c c"]
    curb: Float64[np.ndarray, "s 3"]
    """True, predicted, hit."""
    tolerances: tuple[str, ...]
    near: Float64[np.ndarray, "s t 2"]
    """Predicted points near a true one, true ones near a predicted one."""
    curve: Float64[np.ndarray, "s 4"]


def summarise(rows: Sequence[ScoreRow], *, seed: int = 0) -> ScoreSummary:
    """Sum the rows of all scans up.

    Args:
        rows: Of `score_scan`, all with the same classes and tolerances.
        seed: Of the bootstrap over scans.
    """
    if not rows:
        return ScoreSummary(
            metrics={"scans": 0.0}, classes=(), tolerances=(), confusion=(), scans=()
        )
    counts = _collect(rows)
    total = counts.confusion.sum(axis=0)
    metrics = {"miou": float(_mean_iou(total))}
    if "curb truth" in rows[0]:
        metrics.update(_curb_metrics(counts))
    metrics.update(_intervals(counts, seed))
    points, matched, covered, offset = counts.curve.sum(axis=0)
    if "curve points" in rows[0]:
        metrics["curve_offset_m"] = float(_ratio(offset, matched))
        metrics["curve_coverage"] = float(_ratio(covered, points))
    metrics.update(scans=float(len(rows)), points=float(total.sum()))
    return ScoreSummary(
        metrics=metrics,
        classes=_class_table(counts.names, total),
        tolerances=_tolerance_table(counts),
        confusion=[
            {"class": name, **{n: int(v) for n, v in zip(counts.names, line, strict=True)}}
            for name, line in zip(counts.names[1:], total[1:], strict=True)
        ],
        scans=_scan_table(rows, counts),
    )


def _collect(rows: Sequence[ScoreRow]) -> _Counts:
    pairs = [key.split(" > ") for key in rows[0] if " > " in key]
    names = tuple(dict.fromkeys(true for true, _ in pairs))
    tolerances = tuple(key.split()[2] for key in rows[0] if key.startswith("curb hit "))
    confusion = _table(rows, [f"{a} > {b}" for a in names for b in names])
    near = _table(rows, [f"curb {kind} {t}" for t in tolerances for kind in ("hit", "found")])
    curve = [f"curve {kind}" for kind in ("points", "matched", "covered", "offset")]
    return _Counts(
        names=names,
        confusion=confusion.reshape(len(rows), len(names), len(names)),
        curb=_table(rows, ["curb truth", "curb predicted", "curb hit"]),
        tolerances=tolerances,
        near=near.reshape(len(rows), len(tolerances), 2),
        curve=_table(rows, curve),
    )


def _table(rows: Sequence[ScoreRow], keys: Sequence[str]) -> Float64[np.ndarray, "s k"]:
    return np.array([[float(row.get(key, 0.0)) for key in keys] for row in rows], dtype=np.float64)


def _ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """NaN where there is nothing."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


def _mean_iou(confusion: Float64[np.ndarray, "*s c c"]) -> Float64[np.ndarray, "*s"]:
    """Over the classes that occur, the ignored one left out."""
    iou = intersection_over_union(confusion)[..., 1:]
    return _ratio(np.nansum(iou, axis=-1), np.isfinite(iou).sum(axis=-1))


def _scores(
    truth: ArrayLike, predicted: ArrayLike, hit: ArrayLike, found: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1; 0 where only one side has points, NaN where neither has."""
    found = hit if found is None else found
    exists = np.add(truth, predicted) > 0
    precision = np.where(exists, np.nan_to_num(_ratio(hit, predicted)), np.nan)
    recall = np.where(exists, np.nan_to_num(_ratio(found, truth)), np.nan)
    f1 = np.where(exists, np.nan_to_num(_ratio(2 * precision * recall, precision + recall)), np.nan)
    return precision, recall, f1


def _curb_metrics(counts: _Counts) -> dict[str, float]:
    names = ("curb_precision", "curb_recall", "curb_f1")
    micro = _scores(*counts.curb.sum(axis=0))
    macro = _scores(*counts.curb.T)
    metrics = {name: float(value) for name, value in zip(names, micro, strict=True)}
    for name, values in zip(names, macro, strict=True):
        metrics[f"{name}_macro"] = float(_ratio(np.nansum(values), np.isfinite(values).sum()))
    for row in _tolerance_table(counts):
        if float(row["tolerance_m"]) > 0:
            label = f"{float(row['tolerance_m']):g}"
            metrics.update({f"{name}_{label}": float(row[name[5:]]) for name in names})
    return metrics


def _tolerance_table(counts: _Counts) -> list[ScoreRow]:
    truth, predicted, _ = counts.curb.sum(axis=0)
    table: list[ScoreRow] = []
    for tolerance, (hit, found) in zip(counts.tolerances, counts.near.sum(axis=0), strict=True):
        precision, recall, f1 = (float(v) for v in _scores(truth, predicted, hit, found))
        values = {"precision": precision, "recall": recall, "f1": f1}
        table.append({"tolerance_m": float(tolerance), **values})
    return table


def _class_table(names: Sequence[str], total: Float64[np.ndarray, "c c"]) -> list[ScoreRow]:
    iou = intersection_over_union(total)
    truth, predicted = total.sum(axis=1), total.sum(axis=0)
    precision, recall, f1 = _scores(truth, predicted, np.diagonal(total))
    return [
        {
            "class": name,
            "iou": float(iou[i]),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "points": int(truth[i]),
            "predicted": int(predicted[i]),
        }
        for i, name in enumerate(names)
        if i > 0
    ]


def _scan_table(rows: Sequence[ScoreRow], counts: _Counts) -> list[ScoreRow]:
    precision, recall, f1 = _scores(*counts.curb.T)
    miou = _mean_iou(counts.confusion)
    return [
        {
            "scan": row["scan"],
            "miou": float(miou[i]),
            "curb_precision": float(precision[i]),
            "curb_recall": float(recall[i]),
            "curb_f1": float(f1[i]),
            "curb_truth": int(counts.curb[i, 0]),
            "curb_predicted": int(counts.curb[i, 1]),
        }
        for i, row in enumerate(rows)
    ]


def _intervals(counts: _Counts, seed: int) -> dict[str, float]:
    """Percentile bootstrap: the scans are drawn with replacement, their counts summed."""
    rng = np.random.default_rng(seed)
    scans, classes = counts.confusion.shape[:2]
    table = np.concatenate([counts.confusion.reshape(scans, -1), counts.curb], axis=1)
    chances = np.full(scans, 1 / scans)
    sums = np.stack([rng.multinomial(scans, chances) @ table for _ in range(_SAMPLES)])
    miou = _mean_iou(sums[:, :-3].reshape(-1, classes, classes))
    f1 = _scores(*sums[:, -3:].T)[2]
    names = ("miou_low", "miou_high", "curb_f1_low", "curb_f1_high")
    return dict(zip(names, (*_interval(miou), *_interval(f1)), strict=True))


def _interval(values: Float64[np.ndarray, " b"]) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return float(low), float(high)
