"""Read a whole set of pictures and report everything that is broken or treacherous."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.pictures.findings import findings_of, unsure
from heed_medical.pictures.layouts import Listing, list_pictures, unknown_labels
from heed_medical.pictures.listers import finding_of, patients_in_several_splits
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.reading import read_grey
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData
from heed_medical.splits import SPLITS

CountRow = Mapping[str, str | int | float | None]
_ONE_SOURCE = 0.9
Counts = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a release of COVIDx holds, as its authors' lists count it."""

    train: Counts
    """Pictures per class."""
    test: Counts
    patients: tuple[int, int] | None = None
    """In train and test; None: not known."""
    spaced: Counts
    """Training pictures per class of patients whose id holds a space: such a row has five fields,
    and whoever takes the third for the label loses it."""


COVIDX: Mapping[str, Release] = {
    "9B": Release(
        train={"negative": 13992, "positive": 16490},
        test={"negative": 200, "positive": 200},
        patients=(16648, 378),
        spaced={},
    ),
    "9A": Release(
        train={"normal": 8085, "pneumonia": 5555, "COVID-19": 16490},
        test={"normal": 100, "pneumonia": 100, "COVID-19": 200},
        spaced={},
    ),
    "8B": Release(
        train={"negative": 13794, "positive": 2158},
        test={"negative": 200, "positive": 200},
        spaced={"positive": 943},
    ),
    "8A": Release(
        train={"normal": 7966, "pneumonia": 5475, "COVID-19": 2158},
        test={"normal": 100, "pneumonia": 100, "COVID-19": 200},
        spaced={"COVID-19": 943},
    ),
}


@dataclass(frozen=True, kw_only=True)
class PictureCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    """One row per split and source: pictures, patients, sizes, pictures per class."""
    problems: Sequence[str]
    """What makes a picture unusable, a line each."""
    warnings: Sequence[str]
    """What is odd and usable."""


def check_pictures(data: PictureData, root: Path) -> PictureCheck:
    """Read every picture of every split; whatever is wrong becomes a line."""
    try:
        listing = list_pictures(root, data)
    except InputError as error:
        return PictureCheck(counts=(), problems=(str(error),), warnings=())
    problems = list(listing.problems)
    try:
        data = plan_pictures(replace(data, on_error="skip"), root)
    except InputError as error:
        problems.append(str(error))
    problems += unknown_labels(listing.pictures, data)
    problems += [
        f"{root}: patient {patient} is in the splits {' and '.join(splits)}; "
        f"keep all pictures of a patient in one split"
        for patient, splits in patients_in_several_splits(listing.pictures).items()
    ]
    sizes: dict[str, tuple[int, int]] = {}
    constant = []
    for picture in listing.pictures:
        try:
            grey = read_grey(picture.path, window=data.window, voi=data.voi)
        except InputError as error:
            problems.append(str(error))
            continue
        sizes[picture.name] = (grey.shape[0], grey.shape[1])
        if grey.max() == grey.min():
            constant.append(picture)
    warnings = [f"{p.path}: the picture is constant" for p in constant]
    return PictureCheck(
        counts=_counts(listing, data, sizes),
        problems=problems,
        warnings=warnings + _warnings(root, listing, data),
    )


def _counts(
    listing: Listing, data: PictureData, sizes: Mapping[str, tuple[int, int]]
) -> list[CountRow]:
    groups: dict[tuple[str, str], list[PictureFile]] = defaultdict(list)
    for picture in listing.pictures:
        groups[picture.split or "", picture.source].append(picture)
    rows: list[CountRow] = []
    for split in SPLITS:
        for (part, source), pictures in sorted(groups.items()):
            if part != split:
                continue
            labels = Counter(p.label for p in pictures)
            read = [sizes[p.name] for p in pictures if p.name in sizes]
            row: dict[str, str | int | float | None] = {
                "split": split,
                "source": source or "-",
                "pictures": len(pictures),
                "broken": len(pictures) - len(read),
                "patients": len({p.patient for p in pictures if p.patient}),
                "size": _span(read),
            }
            row |= {name: labels[name] for name in data.classes}
            if data.findings:
                present = np.array([findings_of(p, data) for p in pictures]) == 1
                row |= dict(zip(data.findings, present.sum(0).tolist(), strict=True))
            rows.append(row)
    return rows


def _span(sizes: Sequence[tuple[int, int]]) -> str:
    """Smallest to largest of each side: `256-512 x 256`."""
    if not sizes:
        return ""
    low, high = np.min(sizes, axis=0), np.max(sizes, axis=0)
    return " x ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True))


def _warnings(root: Path, listing: Listing, data: PictureData) -> list[str]:
    lines = list(listing.left_out)
    if listing.drawn:
        lines.append(
            f"{root}: gives no {' and no '.join(listing.drawn)} split; it is drawn by patient "
            f"(seed {data.split_seed})"
        )
    for split in SPLITS:
        labels = Counter(p.label for p in listing.pictures if p.split == split)
        lines += [
            f"{root}: the split {split} has no picture of the class {name}"
            for name in data.classes
            if labels and not labels[name]
        ]
    if not any(p.patient for p in listing.pictures):
        lines.append(f"{root}: names no patients; one may be in several splits unnoticed")
    lines += [f"{root}: {line}" for line in _unsure(root, listing, data)]
    return lines + _source_warnings(root, listing, data) + _release(root, listing)


def _unsure(root: Path, listing: Listing, data: PictureData) -> list[str]:
    """What findings are uncertain or not mentioned, also where one finding is the class."""
    if data.findings or listing.layout not in ("chexpert", "mimic"):
        return unsure(listing.pictures, data)
    single = replace(
        data, findings=(finding_of(data),), label="", classes=(), balance="none", on_error="skip"
    )
    return unsure(list_pictures(root, single).pictures, single)


def _source_warnings(root: Path, listing: Listing, data: PictureData) -> list[str]:
    """Classes that one source gives nearly alone, while it gives few of the others."""
    train = [p for p in listing.pictures if p.split == "train" and p.source]
    lines = []
    for name in data.classes:
        sources = Counter(p.source for p in train if p.label == name)
        if not sources:
            continue
        source, count = sources.most_common(1)[0]
        others = [p for p in train if p.label != name]
        shared = sum(p.source == source for p in others)
        share = count / sources.total()
        if share >= _ONE_SOURCE and others and shared / len(others) <= 1 - _ONE_SOURCE:
            lines.append(
                f"{root}: {share:.0%} of the class {name} are of the source {source}, which gives "
                f"{shared / len(others):.0%} of the others: a model may learn the source"
            )
    return lines


def _release(root: Path, listing: Listing) -> list[str]:
    """Whether the lists are those of the release they are called after; nothing elsewhere."""
    if listing.layout != "covidx":
        return []
    lists = {p.place.partition(",")[0] for p in listing.pictures}
    lines = []
    for name, release in COVIDX.items():
        if any(f"COVIDx{name}" in path for path in lists):
            lines += compare_release(root, name, release, listing.pictures)
    return lines


def compare_release(
    root: Path, name: str, release: Release, pictures: Sequence[PictureFile]
) -> list[str]:
    """A line for each count that is another than a release's; one line where all are the same.

    Args:
        root: The data set, for the lines.
        name: Of the release.
        release: Its counts.
        pictures: Those of its lists that are there, each with the place in its list.
    """
    train, test = (
        [p for p in pictures if Path(p.place).name.startswith(part)] for part in ("train", "test")
    )
    pairs = {
        "in train": (_by_label(train), release.train),
        "in test": (_by_label(test), release.test),
        "in train of patients with a space in the id (rows of five fields)": (
            _by_label([p for p in train if " " in p.patient]),
            release.spaced,
        ),
    }
    if release.patients is not None:
        for part, found, count in zip(
            ("train", "test"), (train, test), release.patients, strict=True
        ):
            patients = {"patients": len({p.patient for p in found})}
            pairs[f"in {part}, counted by id"] = (patients, {"patients": count})
    lines = [
        f"{root}: the lists are called {name}, which has {_text(expected)} {where}; here are "
        f"{_text(found)}"
        for where, (found, expected) in pairs.items()
        if found != expected
    ]
    if lines:
        return lines
    counted = f"{len(train)} and {len(test)} pictures"
    if release.patients is not None:
        counted += " of {} and {} patients".format(*release.patients)
    return [f"{root}: these are the lists of COVIDx {name}: {counted} in train and test"]


def _by_label(pictures: Sequence[PictureFile]) -> Counts:
    return dict(Counter(str(p.label) for p in pictures))


def _text(counts: Counts) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
