"""Clinical efficacy: do generated and reference reports state the same findings?

Both are labelled by a labeller outside (CheXpert-labeler, CheXbert), which writes a csv with the
14 CheXpert findings: 1 stated, 0 denied, -1 uncertain, blank not mentioned. As in R2Gen, only 1
counts as positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64

from heed_core.errors import InputError
from heed_medical.pictures.records import read_rows

Counts = np.ndarray | np.integer
"""Cases that were counted: per finding, or of all together."""
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""The columns, in the order of CheXpert; MIMIC-CXR's files have another order: read by name."""

_NAMES = ("id", "study_id", "image_id", "case")
"""Columns that may name a report, the first that a file has. Its text, which labellers repeat, does
not: that of a reference and of what was generated differ."""


@dataclass(frozen=True, kw_only=True)
class Efficacy:
    """Scores over all findings, and of each finding in the order of `FINDINGS`."""

    macro: tuple[float, float, float]
    """Precision, recall and F1, averaged over the findings."""
    micro: tuple[float, float, float]
    """Precision, recall and F1 of all findings together."""
    findings: Float64[np.ndarray, "14 4"]
    """Precision, recall, F1 and area under the ROC curve (of hard labels) of each."""

    @property
    def auroc(self) -> float:
        """Mean area over the findings that have both kinds of reports; NaN without any."""
        areas = self.findings[:, 3]
        known = areas[np.isfinite(areas)]
        return float(known.mean()) if len(known) else float("nan")


def clinical_efficacy(
    truth: Float64[np.ndarray, "n 14"], predicted: Float64[np.ndarray, "n 14"]
) -> Efficacy:
    """Compare labels, 1 positive, everything else (0, -1, NaN) negative.

    A finding that is never predicted has precision 0, one that is never true recall 0. Areas are
    NaN where all reports are alike.

    Raises:
        ValueError: The shapes differ or are not (n, 14).
    """
    if truth.shape != predicted.shape or truth.ndim != 2 or truth.shape[1] != len(FINDINGS):
        raise ValueError(
            f"truth and predicted must both be (n, 14), got {truth.shape} and {predicted.shape}"
        )
    true: Bool[np.ndarray, "n 14"] = truth == 1
    called: Bool[np.ndarray, "n 14"] = predicted == 1
    hits, false, missed = (true & called), (~true & called), (true & ~called)
    single = np.stack(_scores(hits.sum(0), false.sum(0), missed.sum(0)), axis=1)  # (14, 3)
    micro = _scores(hits.sum(), false.sum(), missed.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        found = hits.sum(0) / true.sum(0)
        denied = (~true & ~called).sum(0) / (~true).sum(0)
    areas = (found + denied) / 2
    precision, recall, f1 = (float(x) for x in single.mean(0))
    return Efficacy(
        macro=(precision, recall, f1),
        micro=(float(micro[0]), float(micro[1]), float(micro[2])),
        findings=np.concatenate([single, areas[:, None]], axis=1),
    )


def _scores(hits: Counts, false: Counts, missed: Counts) -> tuple[np.ndarray, ...]:
    def share(part: Counts, whole: Counts) -> np.ndarray:
        return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)

    return (
        share(hits, hits + false),
        share(hits, hits + missed),
        share(2 * hits, 2 * hits + false + missed),
    )


def read_findings(path: Path) -> tuple[list[str] | None, Float64[np.ndarray, "n 14"]]:
    """Read a labeller's csv: the names of its reports, and their labels (NaN = blank).

    Columns are found by name, whatever their order and case. Without one that names reports there
    are no names.

    Raises:
        InputError: The file is missing or no csv, a finding has no column, a name comes twice, or a
            label is not 1, 0, -1 or blank.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give the csv of a labeller")
    table = read_rows(path)
    columns = {name: table.column([name]) for name in FINDINGS}
    if lacking := [name for name, column in columns.items() if column is None]:
        raise InputError(
            f"has no column {', '.join(map(repr, lacking))}",
            path=path,
            remedy="give the csv of a labeller with all 14 CheXpert findings",
        )
    naming = table.column(_NAMES)
    places: dict[str, str] = {}
    rows = []
    for place, row in table.numbered():
        if naming is not None:
            first = places.setdefault(row[naming], place)
            if first != place:
                before = first.rpartition(", ")[2]
                raise InputError(f"names {row[naming]!r}, as {before} does", place=place)
        rows.append([_label(row[c], f"{place}, {n}") for n, c in columns.items() if c is not None])
    if not rows:
        raise InputError("holds no row", path=path)
    return None if naming is None else list(places), np.array(rows)


def _label(text: str, place: str) -> float:
    if not text:
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        value = float("inf")
    if value not in (1.0, 0.0, -1.0):
        raise InputError(f"is {text!r}, not 1, 0, -1 or blank", place=place)
    return value


def match_findings(truth: Path, predicted: Path) -> tuple[np.ndarray, np.ndarray]:
    """The labels of two files, row by row of the same report: by name, or in their order.

    Raises:
        InputError: A file cannot be read, one alone names its reports, or the reports differ.
    """
    names, first = read_findings(truth)
    others, second = read_findings(predicted)
    if (names is None) != (others is None):
        named, unnamed = (predicted, truth) if names is None else (truth, predicted)
        raise InputError(
            f"has no column that names its reports, {named} has",
            path=unnamed,
            remedy=f"give both {', '.join(_NAMES[:-1])} or {_NAMES[-1]}, or neither",
        )
    if names is None or others is None:
        if len(first) != len(second):
            raise InputError(f"has {len(second)} rows, {truth} has {len(first)}", path=predicted)
        return first, second
    rows = {name: row for row, name in enumerate(others)}
    if lacking := [name for name in names if name not in rows]:
        raise InputError(f"has no row of {_few(lacking)}, which {truth} has", path=predicted)
    if surplus := sorted(set(others) - set(names)):
        raise InputError(
            f"has a row of {_few(surplus)}, which {truth} does not have", path=predicted
        )
    return first, second[[rows[name] for name in names]]


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
