"""What the systems that look for several findings share: rows of cases, files, report, plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from heed_medical.classification.findings import Findings, summarise_findings
from heed_medical.classification.metrics import roc_auc, roc_curve
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import new_figure, style


@dataclass(frozen=True, kw_only=True)
class FindingsPrediction:
    """The probability of each finding of one case."""

    name: str
    probabilities: tuple[float, ...]
    labels: tuple[float, ...] | None
    """1 present, 0 absent, NaN not known; None: the case has no labels."""
    patient: str = ""


def write_findings(prediction: FindingsPrediction, names: Sequence[str], out: Path) -> list[Path]:
    """Write `<name>.json`: the probability of each finding."""
    path = out / f"{prediction.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "case": prediction.name,
        "probabilities": dict(zip(names, prediction.probabilities, strict=True)),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [path]


def findings_row(prediction: FindingsPrediction, names: Sequence[str]) -> Row:
    """Labels and probabilities of one case."""
    assert prediction.labels is not None
    row: dict[str, str | int | float | None] = {
        "case": prediction.name,
        "patient": prediction.patient,
    }
    for name, chance, label in zip(names, prediction.probabilities, prediction.labels, strict=True):
        row |= {f"label {name}": None if np.isnan(label) else int(label), f"p {name}": chance}
    return row


def findings_of_rows(rows: Sequence[Row], names: Sequence[str]) -> Findings:
    """The rows of `findings_row` as arrays."""
    patients: dict[str, int] = {}

    def label(row: Row, name: str) -> float:
        value = row[f"label {name}"]
        return float("nan") if value is None else float(value)

    return Findings(
        names=tuple(names),
        probabilities=np.array([[float(row[f"p {n}"] or 0.0) for n in names] for row in rows]),
        labels=np.array([[label(row, n) for n in names] for row in rows]),
        groups=np.array(
            [patients.setdefault(str(r["patient"] or r["case"]), len(patients)) for r in rows]
        ),
    )


def findings_report(rows: Sequence[Row], names: Sequence[str], *, seed: int) -> Report:
    """Areas per finding with intervals over patients, their mean, and the ROC curves."""
    found = findings_of_rows(rows, names)
    summary = summarise_findings(found, seed=seed)
    return Report(
        metrics=summary.metrics,
        tables=[Table(title="findings", rows=summary.rows)],
        plots={"roc": draw_findings(found)},
    )


def macro_auc(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Mean area under the ROC over findings with both kinds; NaN without any.

    Args:
        pairs: Of each case, probabilities and labels (NaN: not known).
    """
    chances, labels = (np.array(part) for part in zip(*pairs, strict=True))
    areas = []
    for column, truth in zip(chances.T, labels.T, strict=True):
        known = np.isfinite(truth)
        areas.append(roc_auc(column[known], truth[known] == 1))
    finite = [area for area in areas if np.isfinite(area)]
    return float(np.mean(finite)) if finite else float("nan")


def named(values: Mapping[str, int | None], names: Sequence[str]) -> tuple[float, ...]:
    """Labels in the order of names, NaN where not known."""
    found = [values.get(name) for name in names]
    return tuple(float("nan") if value is None else float(value) for value in found)


def draw_findings(found: Findings) -> Figure:
    """A ROC curve per finding that has positive and negative cases."""
    with style():
        figure = new_figure(width_in=5.2, height_in=4.8)
        axes = figure.add_subplot()
        for k, name in enumerate(found.names):
            known = np.isfinite(found.labels[:, k])
            scores, positive = found.probabilities[known, k], found.labels[known, k] == 1
            if 0 < positive.sum() < len(positive):
                curve = roc_curve(scores, positive)
                axes.plot(curve.x, curve.y, label=f"{name}: {roc_auc(scores, positive):.3f}")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (area)")
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
    return figure
