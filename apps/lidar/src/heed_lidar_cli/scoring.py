"""What `evaluate` and `compare` say of predictions: rows per scan, tables, plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from heed_core.errors import InputError
from heed_lidar.curves import Curb
from heed_lidar.labels import CURB
from heed_lidar.metrics import (
    CurbScoring,
    ScoreRow,
    ScoreSummary,
    confusion_matrix,
    intersection_over_union,
    score_scan,
    summarise,
)
from heed_lidar.scans import Scan
from heed_lidar_cli.prediction import StreetPrediction, curb_class
from heed_lidar_cli.settings import StreetData
from heed_runtime import distributed
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import new_figure, style

DERIVED_LABELS = "derived labels"
"""What rows and titles say of scores on labels that nobody corrected."""
FIRST, FINAL = "points", "with curves"
"""The classes of single points, and those after the curves were fitted."""


class Counts:
    """How the points of scans are classified, over all processes: what a validation logs.

    Args:
        data: The classes, and which points count.
    """

    def __init__(self, data: StreetData) -> None:
        self.data = data
        self.clear()

    def clear(self) -> None:
        """Begin again."""
        classes = len(self.data.label_map)
        self.confusion = np.zeros((classes, classes), dtype=np.int64)

    def add(self, scan: Scan, found: Int64[np.ndarray, " n"]) -> None:
        """Count a labelled scan."""
        assert scan.classes is not None, f"{scan.name} has no labels"
        counted = self.data.region.contains(scan.cloud.xyz) & (scan.classes > 0)
        self.confusion += confusion_matrix(
            scan.classes[counted], found[counted], len(self.confusion)
        )

    def scores(self) -> dict[str, float]:
        """val/miou, and of curbs val/curb_f1, val/curb_precision, val/curb_recall."""
        confusion = np.sum(distributed.gather(self.confusion), axis=0)
        iou = intersection_over_union(confusion)[1:]
        scores = {"val/miou": float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0}
        curb = curb_class(self.data.label_map)
        if curb is not None:
            hit = float(confusion[curb, curb])
            predicted, true = float(confusion[:, curb].sum()), float(confusion[curb].sum())
            scores["val/curb_f1"] = 2 * hit / max(predicted + true, 1.0)
            scores["val/curb_precision"] = hit / max(predicted, 1.0)
            scores["val/curb_recall"] = hit / max(true, 1.0)
        return scores


def score(prediction: StreetPrediction, data: StreetData) -> list[Row]:
    """A row for the classes of single points, one for those that are written."""
    rows = _of_scan(FINAL, prediction, prediction.classes, data, prediction.curbs)
    if np.array_equal(prediction.first, prediction.classes):
        return [*({**row, "output": FIRST} for row in rows), *rows]
    return [*_of_scan(FIRST, prediction, prediction.first, data), *rows]


def _of_scan(
    output: str,
    prediction: StreetPrediction,
    classes: Int64[np.ndarray, " n"],
    data: StreetData,
    curbs: Sequence[Curb] | None = None,
) -> list[Row]:
    scan = prediction.scan
    assert scan.classes is not None, f"{scan.name} has no labels"
    inside = data.region.contains(scan.cloud.xyz)
    xyz, truth, found = scan.cloud.xyz[inside], scan.classes[inside], classes[inside]
    derived = scan.file.derived
    return row_of(output, scan.name, xyz, truth, found, data, curbs=curbs, derived=derived)


def row_of(
    output: str,
    name: str,
    xyz: Float64[np.ndarray, "n 3"],
    truth: Int64[np.ndarray, " n"],
    found: Int64[np.ndarray, " n"],
    data: StreetData,
    *,
    curbs: Sequence[Curb] | None = None,
    tolerances: tuple[float, ...] | None = None,
    derived: bool = False,
) -> list[Row]:
    """The counts of one scan.

    Args:
        output: Whose classes these are.
        name: Of the scan.
        xyz: The points that count, metres.
        truth: Their classes.
        found: The classes that are scored.
        data: Names of the classes, and tolerances.
        curbs: Fitted curves, scored too where given.
        tolerances: None: those of the settings.
        derived: Whether the labels are marked as derived, which the row says then.
    """
    reach = data.tolerances_m if tolerances is None else tolerances
    settings = CurbScoring(region="all", tolerances_m=reach, distance=data.distance)
    rows = score_scan(name, xyz, truth, found, data.label_map.names, settings=settings, curbs=curbs)
    mark = {"labels": DERIVED_LABELS} if derived else {}
    return [{"output": output, **mark, **row} for row in rows]


def report(rows: Sequence[Row], *, seed: int) -> Report:
    """Scores over all scans: the headline is of what is written.

    Where labels are derived the titles of the tables say so, and a metric counts these scans.

    Raises:
        InputError: No point counts.
    """
    if not any(row["points"] for row in rows):
        raise InputError(
            f"no point of {len({row['scan'] for row in rows})} scans is in the region that counts "
            f"and has a class",
            remedy="choose another --data.roi or check the labels",
        )
    summaries = {
        output: summarise(
            [cast(ScoreRow, row) for row in rows if row["output"] == output], seed=seed
        )
        for output in dict.fromkeys(str(row["output"]) for row in rows)
    }
    final = summaries[FINAL]
    tables = [
        Table(title="curbs", rows=_curb_rows(summaries)),
        Table(title="curbs with a tolerance", rows=_tolerance_rows(summaries)),
        Table(title="classes", rows=_shown(final.classes)),
        Table(title="points of each class as predicted", rows=_shown(final.confusion)),
        Table(title="scans", rows=_shown(final.scans)),
    ]
    metrics = dict(final.metrics)
    derived = {row["scan"] for row in rows if row.get("labels") == DERIVED_LABELS}
    if derived:
        metrics["scans_with_derived_labels"] = float(len(derived))
        tables = [replace(table, title=f"{table.title} ({DERIVED_LABELS})") for table in tables]
    return Report(
        metrics=metrics,
        tables=[table for table in tables if table.rows],
        plots={"curbs": _plot(summaries)},
    )


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [dict(row) for row in rows]


def _curb_rows(summaries: dict[str, ScoreSummary]) -> list[Row]:
    """Micro: of all points together; macro: the mean over scans."""
    scores = (f"{CURB}_precision", f"{CURB}_recall", f"{CURB}_f1")
    return [
        {
            "output": output,
            "mean": mean,
            **{name.removeprefix(f"{CURB}_"): found.metrics[name + ending] for name in scores},
        }
        for output, found in summaries.items()
        for mean, ending in (("micro", ""), ("macro", "_macro"))
        if scores[-1] in found.metrics
    ]


def _tolerance_rows(summaries: dict[str, ScoreSummary]) -> list[Row]:
    return [
        {"output": output, **row}
        for output, found in summaries.items()
        for row in _shown(found.tolerances)
    ]


def _plot(summaries: dict[str, ScoreSummary]) -> Figure:
    """Curb scores against the tolerance, and every scan's F1."""
    with style():
        figure = new_figure(width_in=9.0, height_in=3.6)
        left, right = figure.subplots(1, 2)
        for output, found in summaries.items():
            rows = found.tolerances
            reach = [100 * float(row["tolerance_m"]) for row in rows]
            lines = "-" if output == FINAL else "--"
            for place, name in enumerate(("precision", "recall", "f1")):
                values = [float(row[name]) for row in rows]
                label = f"{name}, {output}"
                left.plot(reach, values, lines, marker="o", ms=3, color=f"C{place}", label=label)
        left.set(xlabel="tolerance (cm)", ylabel="score", ylim=(0, 1), title="curb points")
        left.legend(fontsize=7, loc="best", handlelength=4)  # a dash is longer than its marker
        final = summaries[FINAL]
        column, label = ("miou", "mean IoU")
        if "curb_f1" in final.metrics:
            column, label = ("curb_f1", "F1 of curb points")
        values = [float(row[column]) for row in final.scans]
        right.bar(range(len(values)), np.nan_to_num(values))
        right.set(xlabel="scan", ylabel=label, ylim=(0, 1), title="scans")
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure
