"""Read a whole data set and report everything that is broken."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.images import is_colour
from heed_medical.segmentation.cases import CaseFiles, SegmentationCase, read_case
from heed_medical.segmentation.layouts import Listing, list_cases
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.splits import patient_of, patients_in_several_splits
from heed_medical.splits import SPLITS

CountRow = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    """One row per split: cases, patients, slices, sizes, spacings, voxels per class."""
    problems: Sequence[str]
    """What makes a case unusable, a line each."""
    warnings: Sequence[str]
    """What is odd and usable."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What is kept of a case that could be read."""

    split: str
    name: str
    slices: int
    size: tuple[int, int]
    spacing_mm: tuple[float, ...] | None
    voxels: tuple[int, ...]
    """Per class, the last for voxels that count for nothing."""
    constant: bool


def check_data(settings: SegmentationData, root: Path) -> DataCheck:
    """Read every case of every split; whatever is wrong inside the data set becomes a line."""
    problems: list[str] = []
    try:
        listing = list_cases(root, settings)
        problems += listing.problems
        planned = plan_data(replace(settings, on_error="skip"), root)
    except InputError as error:
        return DataCheck(counts=(), problems=(*problems, str(error)), warnings=())
    for patient, splits in patients_in_several_splits(listing.cases).items():
        problems.append(
            f"{root}: patient {patient} is in the splits {' and '.join(splits)}; "
            f"keep all cases of a patient in one split"
        )
    readings: list[_Reading] = []
    for files in listing.cases:
        try:
            readings.append(_reading(files, read_case(files, planned), len(planned.labels)))
        except InputError as error:
            problems.append(str(error))
    names = planned.table.names
    counts = [_count_row(s, listing, readings, names) for s in SPLITS]
    return DataCheck(
        counts=[row for row in counts if row["cases"]],
        problems=problems,
        warnings=_warnings(root, listing, readings, planned),
    )


def _reading(files: CaseFiles, case: SegmentationCase, classes: int) -> _Reading:
    slices = case.slices
    labels = case.label
    assert labels is not None
    voxels = np.bincount(np.where(labels < 0, classes, labels).ravel(), minlength=classes + 1)
    return _Reading(
        split=files.split or "",
        name=files.name,
        slices=len(slices),
        size=(slices.shape[2], slices.shape[3]),
        spacing_mm=case.spacing_mm,
        voxels=tuple(int(n) for n in voxels),
        constant=bool(case.image.max() == case.image.min()),
    )


def _count_row(
    split: str, listing: Listing, readings: Sequence[_Reading], names: Sequence[str]
) -> CountRow:
    cases = [c for c in listing.cases if c.split == split]
    read = [r for r in readings if r.split == split]
    row: dict[str, str | int | float | None] = {
        "split": split,
        "cases": len(cases),
        "broken": len(cases) - len(read),
        "patients": len({patient_of(c) for c in cases}),
        "slices": sum(r.slices for r in read),
        "size": _span([r.size for r in read]),
        "spacing_mm": _span([r.spacing_mm for r in read if r.spacing_mm is not None]),
    }
    for number, name in enumerate((*names[1:], "ignored"), start=1):
        total = sum(r.voxels[number] for r in read)
        if total or name != "ignored":
            row[f"{name} (voxels)"] = total
            row[f"{name} (cases)"] = sum(r.voxels[number] > 0 for r in read)
    return row


def _span(values: Sequence[tuple[int, ...]] | Sequence[tuple[float, ...]]) -> str:
    """Smallest to largest of each axis: `26-58 x 40-55`."""
    if not values:
        return ""
    low, high = np.min(values, axis=0), np.max(values, axis=0)
    return " x ".join(
        f"{a:.4g}" if f"{a:.4g}" == f"{b:.4g}" else f"{a:.4g}-{b:.4g}"
        for a, b in zip(low, high, strict=True)
    )


def _warnings(
    root: Path, listing: Listing, readings: Sequence[_Reading], settings: SegmentationData
) -> list[str]:
    lines = [
        f"{root}: has no {split} split; evaluation on it is not possible"
        for split in SPLITS
        if not any(c.split == split for c in listing.cases)
    ]
    lines += [f"{r.name}: the image is constant" for r in readings if r.constant]
    names = settings.table.names
    present = Counter(k for r in readings for k, n in enumerate(r.voxels[:-1]) if n)
    train = [r for r in readings if r.split == "train"]
    for number, name in enumerate(names[1:], start=1):
        held = [r for r in train if r.voxels[number]]
        if not held:
            lines.append(f"{root}: class {name} is in no training case ({present[number]} in all)")
        elif len(held) == 1 and len(train) >= 5:
            lines.append(
                f"{held[0].name}: is the only training case with class {name} "
                f"({held[0].voxels[number]} voxels); if the value is a slip, name the classes "
                f"with --data.labels"
            )
    empty = [r.name for r in readings if not any(r.voxels[1:-1])]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        lines.append(f"{root}: {len(empty)} masks hold background alone ({shown})")
    return lines + _colour_warning(root, listing, settings)


def _colour_warning(root: Path, listing: Listing, settings: SegmentationData) -> list[str]:
    if settings.channels != "rgb":
        return []
    pictures = [c for c in listing.cases if c.kind == "picture"]
    coloured = 0
    for case in pictures:
        try:
            coloured += is_colour(case.images[0])
        except InputError:
            continue
    if not 0 < coloured < len(pictures):
        return []
    return [
        f"{root}: {coloured} of {len(pictures)} pictures are in colour, all are read as rgb "
        f"(--data.colour grey makes them grey)"
    ]
