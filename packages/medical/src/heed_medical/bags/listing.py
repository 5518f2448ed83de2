"""Find the bags of a data folder and their labels, whatever its layout."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heed_core.errors import InputError, reason_of
from heed_core.folders import files_under
from heed_medical.bags.bag import BagFile
from heed_medical.bags.files import H5_SUFFIXES, SUFFIXES, read_table, slide_groups
from heed_medical.bags.settings import BagData
from heed_medical.bags.splits import assign_splits, few_shot, names_without_bag, strip_suffix
from heed_medical.files import unique_names
from heed_medical.pictures.records import read_rows
from heed_medical.splits import SPLITS, Split

SLIDE_COLUMNS = ("slide_id", "slide", "bag", "name", "image", "file", "path", "id")
PATIENT_COLUMNS = ("case_id", "patient", "patient_id")
NOT_FEATURES = ("patches", "thumbnails", "masks", "stitches", "contours", "visualization")
"""Folders that CLAM and TRIDENT lay beside the features."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The bags of a data folder before they are read."""

    files: Sequence[BagFile]
    """Those with a label; each has a split unless a split file leaves it out."""
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """What a table says of a slide."""

    name: str
    label: str
    place: str
    path: str | None = None
    patient: str | None = None
    split: Split | None = None


@dataclass
class _Found:
    files: list[BagFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def list_bags(root: Path, data: BagData) -> Listing:
    """All labelled bags of a data folder; what is wrong with the lists comes back as lines.

    Raises:
        InputError: There is no such folder, no feature or no label in it, or a table is broken.
    """
    if not root.exists():
        raise InputError("no such file or folder", path=root)
    found = _Found(files=find_features(root, data))
    table = _label_file(root, data)
    if table is not None:
        _join(root, table, found)
    labelled = [file for file in found.files if file.label is not None]
    if not labelled:
        raise _no_labels(root, table)
    if len(labelled) < len(found.files):
        names = [file.name for file in found.files if file.label is None]
        found.warnings.append(
            f"{root}: {len(names)} slides have no label and are left out ({', '.join(names[:5])})"
        )
    files = assign_splits(root, labelled, data)
    found.warnings += names_without_bag(root, found.files, data)
    left_out = [file.name for file in files if file.split is None]
    if left_out:
        found.warnings.append(
            f"{root}: {len(left_out)} slides are in no split ({', '.join(left_out[:5])})"
        )
    return Listing(files=files, problems=found.problems, warnings=found.warnings)


def known_bags(root: Path, data: BagData) -> list[BagFile]:
    """Every bag of a data folder, with label and split where they are known or can be drawn.

    Raises:
        InputError: There is no such folder, no feature in it, or a table is broken.
    """
    if not root.exists():
        raise InputError("no such file or folder", path=root)
    found = _Found(files=find_features(root, data))
    table = _label_file(root, data)
    if table is not None:
        _join(root, table, found)
    labelled = [file for file in found.files if file.label is not None]
    placed = assign_splits(root, labelled, data) if labelled else []
    settled = {file.name: file for file in placed}
    return [settled.get(file.name, file) for file in found.files]


def find_bags(root: Path, data: BagData, split: str) -> list[BagFile]:
    """The bags of a split, with labels of the classes.

    Raises:
        InputError: There are none, or a label is of no class.
    """
    listing = list_bags(root, data)
    if listing.problems and data.on_error == "stop":
        raise InputError(listing.problems[0])
    files = [file for file in listing.files if file.split == split]
    if split == "train":
        files = few_shot(files, data)
    if not files:
        raise InputError(f"has no bag of the split {split!r}", path=root)
    for file in files:
        class_of(file, data)
    return files


def find_inputs(paths: Sequence[Path], data: BagData) -> list[BagFile]:
    """The bags in files and folders, each once and under a name of its own, without labels.

    Raises:
        InputError: A path that does not exist or holds no features.
    """
    found: dict[tuple[Path, str | None, str], BagFile] = {}
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", path=path)
        found |= {(f.path, f.group, f.name): f for f in find_features(path, data)}
    files = list(found.values())
    names = unique_names([file.name for file in files], [file.path for file in files])
    return [
        replace(file, name=name, label=None, split=None)
        for file, name in zip(files, names, strict=True)
    ]


def broken_rows(root: Path, data: BagData) -> tuple[str, ...]:
    """What `find_bags` leaves out with `on_error="skip"`, a line each."""
    return tuple(list_bags(root, data).problems)


def class_of(file: BagFile, data: BagData) -> int | None:
    """The class number of a bag's label; None without one.

    Raises:
        InputError: The label is of no class.
    """
    if file.label is None:
        return None
    number = data.class_of_label.get(file.label)
    if number is None:
        raise InputError(
            f"slide {file.name!r} has the label {file.label!r}, "
            f"the classes are {', '.join(data.classes)}",
            path=file.path,
            place=file.place,
            remedy="correct the label or --data.classes",
        )
    return number


def find_features(root: Path, data: BagData) -> list[BagFile]:
    """Every bag in a folder or file, in the order of the names; labels where the file has them.

    Raises:
        InputError: There is none, or one slide lies there twice.
    """
    start = root / data.features if data.features is not None and root.is_dir() else root
    if not start.exists():
        raise InputError("no such file or folder", path=start, remedy="correct --data.features")
    if start.is_file():
        return _in_file(start)
    paths = [
        path
        for path in files_under(start)
        if path.suffix.lower() in SUFFIXES
        and not set(path.relative_to(start).parts[:-1]) & set(NOT_FEATURES)
    ]
    open_all = len(paths) < 3 or _holds_many(paths)
    files = [file for path in _preferred(paths) for file in _in_file(path, alone=open_all)]
    if not files:
        tables = [path for path in _visible(start, "*.csv*") if is_bag_table(path)]
        if len(tables) != 1:
            raise InputError(
                "holds no features",
                path=start,
                remedy=f"give files of {', '.join(SUFFIXES)} or one csv of bags",
            )
        return read_table(tables[0])
    _refuse_twins(start, files)
    return files


def is_bag_table(path: Path) -> bool:
    """Whether a csv file has a row per instance: wide, without a column of slides.

    Raises:
        InputError: It cannot be read.
    """
    if not path.name.endswith((".csv", ".csv.gz")):
        return False
    head = [name.lower() for name in _columns(_first_line(path))]
    return len(head) > 2 and ({"bag", "label"} <= set(head) or _numeric(head[2:]))


def _numeric(fields: Sequence[str]) -> bool:
    try:
        [float(name) for name in fields]
    except ValueError:
        return False
    return True


def _in_file(path: Path, *, alone: bool = True) -> list[BagFile]:
    """The bags of a file; `alone`: whether it is opened to see if it holds many."""
    if path.name.endswith((".csv", ".csv.gz")):
        return read_table(path)
    if alone and path.suffix.lower() in H5_SUFFIXES:
        groups = slide_groups(path)
        if groups:
            return [
                BagFile(name=name, path=path, group=name, label=label, place=name)
                for name, label in groups.items()
            ]
    return [BagFile(name=path.stem, path=path)]


def _holds_many(paths: Sequence[Path]) -> bool:
    """Whether the first h5 file that can be read holds many slides: the others are like it."""
    for path in paths:
        if path.suffix.lower() in H5_SUFFIXES:
            try:
                return bool(slide_groups(path))
            except InputError:
                continue
    return False


def _preferred(paths: Sequence[Path]) -> list[Path]:
    """Without the pt copies that CLAM writes beside its h5 files."""
    stems = {path.stem for path in paths if path.suffix.lower() in H5_SUFFIXES}
    return [path for path in paths if path.suffix.lower() != ".pt" or path.stem not in stems]


def _refuse_twins(root: Path, files: Sequence[BagFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(file.name, file.path)
        if other != file.path:
            raise InputError(
                f"holds slide {file.name!r} twice: {other.relative_to(root)} and "
                f"{file.path.relative_to(root)}",
                path=root,
                remedy="name one folder or file with --data.features",
            )


def _label_file(root: Path, data: BagData) -> Path | None:
    folder = root.parent if root.is_file() else root
    if data.labels is not None:
        return folder / data.labels
    found = [
        path
        for path in sorted([*_visible(folder, "*.csv"), *_visible(folder, "*.jsonl")])
        if _has_labels(path)
    ]
    if len(found) > 1:
        raise InputError(
            f"holds {len(found)} tables of labels: {', '.join(path.name for path in found)}",
            path=folder,
            remedy="name one with --data.labels",
        )
    return found[0] if found else None


def _visible(folder: Path, pattern: str) -> list[Path]:
    """The files of a pattern; those that a file system hides are left out."""
    found = (path for path in folder.glob(pattern) if not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _has_labels(path: Path) -> bool:
    line = _first_line(path)
    if path.suffix == ".jsonl":
        return '"label"' in line
    head = {name.lower() for name in _columns(line)}
    return "label" in head and bool(head & set(SLIDE_COLUMNS)) and not is_bag_table(path)


def _no_labels(root: Path, table: Path | None) -> InputError:
    """Why no slide has a label: there is no table of them, or none that can be used."""
    if table is not None:
        return InputError(
            f"lists none of the slides whose features {root} holds",
            path=table,
            remedy="name slides as the files of their features",
        )
    folder = root.parent if root.is_file() else root
    others = [
        f"{path.name} {_header_in_words(path)}"
        for path in _visible(folder, "*.csv")
        if not is_bag_table(path) and not set(SPLITS) & set(_columns(_first_line(path)))
    ]
    return InputError(
        "; ".join(["holds features and no labels", *others[:3]]),
        path=root,
        remedy="give labels.csv the columns slide_id and label"
        if others
        else "add labels.csv with the columns slide_id and label",
    )


def _first_line(path: Path) -> str:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace") as text:
            return str(text.readline()).strip()
    except (OSError, EOFError, zlib.error) as error:
        reason = reason_of(error, path)
        raise InputError(f"cannot be read ({reason})", path=path, remedy="copy it again") from None


def _columns(line: str) -> list[str]:
    return [name.strip().strip('"') for name in line.split(",")]


def _header_in_words(path: Path) -> str:
    """What the first line of a csv file says of its columns."""
    line = _first_line(path)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if sign in line and "," not in line:
            return f"seems to be separated by {name}, commas are needed ({line[:80]})"
    return f"has the columns {', '.join(_columns(line)[:12])}"


def read_labels(path: Path) -> list[LabelRow]:
    """Read a table of labels: csv, or jsonl with an object per line.

    Raises:
        InputError: It cannot be read, lacks a column, or lists a slide twice.
    """
    table = read_rows(path)
    rows = [
        (f"row {number}", {key.lower(): value for key, value in row.items()})
        for number, row in zip(table.numbers, table.rows, strict=True)
    ]
    if not rows:
        raise InputError("lists no slide", path=path, remedy="give a row for each")
    head = rows[0][1]
    slide = next((name for name in SLIDE_COLUMNS if name in head), None)
    if slide is None or "label" not in head:
        missing = "label" if slide else "slide_id"
        raise InputError(
            f"has no column {missing!r}; {table.header}",
            path=path,
            remedy="give the columns slide_id and label",
        )
    patient = next((name for name in PATIENT_COLUMNS if name in head), None)
    found: dict[str, LabelRow] = {}
    for place, row in rows:
        one = _label_row(path, place, row, slide, patient)
        if one.name in found:
            raise InputError(f"lists slide {one.name!r} twice", path=path, place=place)
        found[one.name] = one
    return list(found.values())


def _label_row(
    path: Path, place: str, row: Mapping[str, str], slide: str, patient: str | None
) -> LabelRow:
    entry, label, split = row.get(slide, ""), row.get("label", ""), row.get("split", "")
    if not entry or not label:
        raise InputError(
            f"has no {'label' if entry else slide}", path=path, place=place, remedy="fill it in"
        )
    known: dict[str, Split | None] = {"valid": "val", "validation": "val", "": None}
    known.update((name, name) for name in SPLITS)
    if split not in known:
        raise InputError(
            f"has the split {split!r}; train, val and test are known", path=path, place=place
        )
    return LabelRow(
        name=strip_suffix(Path(entry).name),
        label=label,
        place=place,
        path=entry if Path(entry).suffix.lower() in SUFFIXES else row.get("path") or None,
        patient=(row.get(patient) or None) if patient else None,
        split=known[split],
    )


def _join(root: Path, table: Path, found: _Found) -> None:
    """Give the files the labels of a table; listed slides without a file are problems."""
    files = {file.name: file for file in found.files}
    for row in read_labels(table):
        file = files.get(row.name)
        if file is None and row.path is not None and (table.parent / row.path).is_file():
            file = BagFile(name=row.name, path=table.parent / row.path)
        if file is None:
            found.problems.append(
                f"{table}, {row.place}: slide {row.name!r} has no features in {root}; "
                f"extract them or remove the row"
            )
            continue
        files[row.name] = replace(
            file,
            label=row.label,
            patient=row.patient or file.patient,
            split=row.split or file.split,
            place=f"{table.name} {row.place}",
        )
    found.files = [files[name] for name in files]
