"""Read a whole data set of bags and report everything that is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.bags.bag import BagFile
from heed_medical.bags.data import BagSet
from heed_medical.bags.listing import list_bags
from heed_medical.bags.settings import BagData
from heed_medical.bags.splits import patients_in_several_splits
from heed_medical.classification.labels import refuse_look_alikes
from heed_medical.splits import SPLITS

CountRow = Mapping[str, str | int | float | None]


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    """A row per split: bags, patients, patches, bags per label."""
    problems: Sequence[str]
    warnings: Sequence[str]


def check_data(data: BagData, root: Path) -> DataCheck:
    """Read every bag of every split; whatever is wrong becomes a line."""
    try:
        listing = list_bags(root, data)
    except InputError as error:
        return DataCheck(counts=(), problems=(str(error),), warnings=())
    problems, warnings = list(listing.problems), list(listing.warnings)
    if not data.classes:
        problems += _label_problems(root, listing.files)
        data = replace(data, classes=tuple(sorted({str(f.label) for f in listing.files})))
    bags = BagSet(listing.files, replace(data, cache_mb=0))
    sizes: dict[str, int] = {}
    widths: dict[str, int] = {}
    no_coords = []
    for index, file in enumerate(listing.files):
        try:
            bag = bags[index]
        except InputError as error:
            problems.append(str(error))
            continue
        sizes[file.name], widths[file.name] = bag.features.shape
        if bag.coords is None:
            no_coords.append(file.name)
    problems += _other_widths(root, widths)
    for patient, splits in patients_in_several_splits(listing.files).items():
        warnings.append(f"{root}: patient {patient} is in the splits {' and '.join(splits)}")
    if no_coords:
        warnings.append(
            f"{root}: {len(no_coords)} bags have no coordinates, their attention cannot be drawn "
            f"({', '.join(no_coords[:5])})"
        )
    every = sorted({str(file.label) for file in listing.files})
    counts: list[CountRow] = []
    for split in SPLITS:
        files = [file for file in listing.files if file.split == split]
        if not files:
            warnings.append(f"{root}: has no bag of the split {split}")
            continue
        patches = [sizes[file.name] for file in files if file.name in sizes]
        labels = Counter(str(file.label) for file in files)
        warnings += [
            f"{root}: the split {split} has no bag with the label {label}"
            for label in every
            if not labels[label]
        ]
        counts.append(
            {
                "split": split,
                "bags": len(files),
                "broken": len(files) - len(patches),
                "patients": len({file.patient or file.name for file in files}),
                "patches": sum(patches),
                "per bag": _span(patches),
                **{f"label {name}": labels[name] for name in sorted(labels)},
            }
        )
    return DataCheck(counts=counts, problems=problems, warnings=warnings)


def _label_problems(root: Path, files: Sequence[BagFile]) -> list[str]:
    """Labels without a training bag, and labels that look like one class."""
    trained = {file.label for file in files if file.split == "train"}
    lines = [
        f"{root}: no bag with the label {label} is in the training split"
        for label in sorted({str(f.label) for f in files if f.label not in trained})
    ]
    try:
        refuse_look_alikes({str(file.label) for file in files}, root)
    except InputError as error:
        lines.append(str(error))
    return lines


def _other_widths(root: Path, widths: Mapping[str, int]) -> list[str]:
    if len(set(widths.values())) < 2:
        return []
    usual, _ = Counter(widths.values()).most_common(1)[0]
    return [
        f"{root}: bag {name} has features of {width} channels, most have {usual}; "
        f"extract it with the same encoder"
        for name, width in widths.items()
        if width != usual
    ]


def _span(sizes: Sequence[int]) -> str:
    if not sizes:
        return ""
    return f"{min(sizes)} to {max(sizes)}, median {int(np.median(sizes))}"
