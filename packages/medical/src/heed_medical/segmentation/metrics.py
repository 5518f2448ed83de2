"""Scores of whole volumes, per class, and their summary over subjects.

Dice `2 TP / (2 TP + FP + FN)`, volumetric similarity `1 - |FN - FP| / (2 TP + FP + FN)`, mean
symmetric surface distance and the 95th percentile of the surface distance (MONAI), in mm where the
files store a spacing.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool

from heed_medical.segmentation.prediction import SegmentationPrediction

ScoreRow = Mapping[str, str | int | float | None]
"""Columns: case, class, state, dice, vs, msd, hd95, unit, voxels, voxels_predicted.

State is `both` where reference and prediction hold the class, `empty` where neither does (Dice 1,
no distances), `missed` or `invented` where only one does (Dice 0, infinite distances).
"""

_SCORES = ("dice", "vs", "msd", "hd95")


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """Scores over all cases."""

    metrics: Mapping[str, float]
    """dice, vs, msd, hd95: means over classes of the means over cases; dice_std: over all cases and
    classes; dice_low, dice_high: 95 % bootstrap interval over cases; missed, invented: counts of
    one-sided classes, which msd and hd95 leave out; cases."""
    rows: Sequence[ScoreRow]
    """One per class: mean and standard deviation of each score, interval of Dice, counts."""


def score_case(
    prediction: SegmentationPrediction,
    names: Sequence[str],
    *,
    regions: Mapping[str, Sequence[int]] = MappingProxyType({}),
    distances: bool = True,
) -> list[ScoreRow]:
    """Compare a prediction with its reference, one row per foreground class and region.

    Args:
        prediction: Of a labelled case; voxels with a negative reference are left out.
        names: All classes, background first.
        regions: Region -> the numbers of the classes that it is made of.
        distances: Whether surface distances are computed; without, msd and hd95 are None.

    Raises:
        ValueError: The prediction has no reference.
    """
    if prediction.reference is None:
        raise ValueError(f"prediction {prediction.name!r} has no reference to compare with")
    counted = prediction.reference >= 0
    rows: list[ScoreRow] = []
    structures = {name: (number,) for number, name in enumerate(names[1:], start=1)}
    for name, numbers in {**structures, **regions}.items():
        truth = np.isin(prediction.reference, numbers) & counted
        guess = np.isin(prediction.labels, numbers) & counted
        scores = compare_masks(guess, truth, spacing_mm=prediction.spacing_mm, distances=distances)
        unit = "voxel" if prediction.spacing_mm is None else "mm"
        rows.append({"case": prediction.name, "class": name, "unit": unit, **scores})
    return rows


def compare_masks(
    prediction: Bool[np.ndarray, "*spatial"],
    reference: Bool[np.ndarray, "*spatial"],
    *,
    spacing_mm: Sequence[float] | None = None,
    distances: bool = True,
) -> dict[str, str | int | float | None]:
    """Scores of one structure: state, dice, vs, msd, hd95, voxels, voxels_predicted.

    Args:
        prediction: Where the structure is said to be.
        reference: Where it is.
        spacing_mm: Per axis; None measures distances in voxels.
        distances: Whether surface distances are computed; without, msd and hd95 are None.
    """
    predicted, present = int(prediction.sum()), int(reference.sum())
    overlap = int((prediction & reference).sum())
    msd: float | None
    hd95: float | None
    sizes: dict[str, str | int | float | None] = {
        "voxels": present,
        "voxels_predicted": predicted,
    }
    if not predicted and not present:
        return {"state": "empty", "dice": 1.0, "vs": 1.0, "msd": None, "hd95": None, **sizes}
    dice = 2 * overlap / (predicted + present)
    similarity = 1 - abs(present - predicted) / (predicted + present)
    if not predicted or not present:
        state, msd, hd95 = ("invented" if predicted else "missed"), math.inf, math.inf
    else:
        state = "both"
        msd, hd95 = (
            _surface_distances(prediction, reference, spacing_mm) if distances else (None, None)
        )
    return {"state": state, "dice": dice, "vs": similarity, "msd": msd, "hd95": hd95, **sizes}


def _surface_distances(
    prediction: Bool[np.ndarray, "*spatial"],
    reference: Bool[np.ndarray, "*spatial"],
    spacing_mm: Sequence[float] | None,
) -> tuple[float, float]:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_distance import compute_average_surface_distance

    guess, truth = (torch.from_numpy(m)[None, None] for m in (prediction, reference))
    spacing = None if spacing_mm is None else list(spacing_mm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI calls a deprecated option of its own
        mean = compute_average_surface_distance(
            guess, truth, include_background=True, symmetric=True, spacing=spacing
        )
        largest = compute_hausdorff_distance(
            guess, truth, include_background=True, percentile=95, spacing=spacing
        )
    return float(mean.item()), float(largest.item())


def summarise(
    rows: Sequence[ScoreRow], *, regions: Sequence[str] = (), seed: int = 0
) -> ScoreSummary:
    """Sum the rows of all cases up, classes in their order of appearance.

    Args:
        rows: Of `score_case`.
        regions: Those that are regions: each has metrics of its own (dice_NAME, hd95_NAME) and
            does not count in the means over classes.
        seed: Of the bootstrap.
    """
    if not rows:
        return ScoreSummary(metrics={"cases": 0.0}, rows=())
    names = list(dict.fromkeys(str(row["class"]) for row in rows))
    whole = [_class_row(name, [r for r in rows if r["class"] == name], seed) for name in names]
    rows = [row for row in rows if row["class"] not in regions]
    table = [row for row in whole if row["class"] not in regions]
    dice = np.array([_number(row["dice"]) for row in rows])
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    by_case = [
        float(np.mean([_number(r["dice"]) for r in rows if r["case"] == case])) for case in cases
    ]
    low, high = bootstrap_interval(by_case, seed=seed)
    means = {score: _mean([_number(row[score]) for row in table]) for score in _SCORES}
    metrics = {
        **means,
        "dice_std": float(dice.std()),
        "dice_low": low,
        "dice_high": high,
        "missed": float(sum(row["state"] == "missed" for row in rows)),
        "invented": float(sum(row["state"] == "invented" for row in rows)),
        "cases": float(len(cases)),
    }
    for row in whole:
        if row["class"] in regions:
            metrics |= {
                f"{score}_{row['class']}": _number(row[score]) for score in ("dice", "hd95")
            }
    return ScoreSummary(metrics=metrics, rows=whole)


def _class_row(name: str, rows: Sequence[ScoreRow], seed: int) -> ScoreRow:
    values: dict[str, str | int | float | None] = {"class": name, "cases": len(rows)}
    for score in _SCORES:
        finite = [v for v in (_number(row[score]) for row in rows) if math.isfinite(v)]
        values[score] = _mean(finite)
        values[f"{score}_std"] = float(np.std(finite)) if finite else math.nan
    low, high = bootstrap_interval([_number(row["dice"]) for row in rows], seed=seed)
    values.update(dice_low=low, dice_high=high, unit=rows[0]["unit"])
    for state in ("empty", "missed", "invented"):
        values[state] = sum(row["state"] == state for row in rows)
    return values


def _number(value: str | int | float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: One per subject.
        level: Share of the distribution within the interval.
        samples: Numbers of resamplings.
        seed: Of the resampling.
    """
    if not values:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(samples, len(values)))
    means = np.asarray(values, dtype=np.float64)[drawn].mean(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
