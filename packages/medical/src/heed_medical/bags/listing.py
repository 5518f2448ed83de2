"""Find the bags of a data folder and their labels, whatever its layout."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heed_core.errors import InputError, reason_of
from heed_core.folders import files_under, unique_names
from heed_medical.bags.bag import BagFile
from heed_medical.bags.files import H5_SUFFIXES, SUFFIXES, read_table, slide_groups
from heed_medical.bags.settings import BagData
from heed_medical.bags.splits import assign_splits, few_shot, names_without_bag, strip_suffix
from heed_medical.manifests import folder_and_table, is_table
from heed_medical.pictures.records import JSON_LINES, read_rows
from heed_medical.splits import SPLIT_NAMES, SPLITS, Split

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
    faults: list[str] = field(default_factory=list)
    """Rows of the table that cannot be used, a line each."""
    problems: list[str] = field(default_factory=list)
    """These, and rows without features."""
    warnings: list[str] = field(default_factory=list)
    table: Path | None = None
    """Of the labels."""
    by_rows: bool = False
    """Whether the user gave the table as the data, so that it has the last word on splits."""


def list_bags(root: Path, data: BagData) -> Listing:
    """All labelled bags of a data set; what is wrong with the lists comes back as lines.

    Args:
        root: The folder, a file of features, or a table (csv, jsonl) of slides and labels, whose
            paths are relative to it. Such a table's own splits count before any split file that
            lies beside it.
        data: The settings.

    Raises:
        InputError: There is no such folder, no feature or no label in it, or a table is broken.
    """
    found = _find(root, data)
    labelled = [file for file in found.files if file.label is not None]
    if not labelled:
        raise InputError(_first_of(found.faults)) if found.faults else _no_labels(root, found.table)
    if len(labelled) < len(found.files):
        names = [file.name for file in found.files if file.label is None]
        found.warnings.append(
            f"{root}: {len(names)} slides have no label and are left out ({', '.join(names[:5])})"
        )
    files = assign_splits(root, labelled, data, by_rows=found.by_rows)
    found.warnings += names_without_bag(root, found.files, data, by_rows=found.by_rows)
    left_out = [file.name for file in files if file.split is None]
    if left_out:
        found.warnings.append(
            f"{root}: {len(left_out)} slides are in no split ({', '.join(left_out[:5])})"
        )
    return Listing(files=files, problems=found.problems, warnings=found.warnings)


def known_bags(root: Path, data: BagData) -> list[BagFile]:
    """Every bag of a data set, with label and split where they are known or can be drawn.

    Args:
        root: As of `list_bags`.
        data: The settings; rows that cannot be used raise whatever `on_error` says.

    Raises:
        InputError: There is no such folder, no feature in it, or a table is broken.
    """
    found = _find(root, data)
    if found.faults:
        raise InputError(_first_of(found.faults))
    labelled = [file for file in found.files if file.label is not None]
    placed = assign_splits(root, labelled, data, by_rows=found.by_rows) if labelled else []
    settled = {file.name: file for file in placed}
    return [settled.get(file.name, file) for file in found.files]


def _find(root: Path, data: BagData) -> _Found:
    """The bags of a data set with what its table says of them."""
    if not root.exists():
        raise InputError("no such file or folder", path=root)
    by_rows = is_manifest(root)
    folder = root
    if by_rows:
        folder, name = folder_and_table(root, data.labels or "", option="--data.labels")
        data = replace(data, labels=name)
    table = _label_file(folder, data)
    rows, faults = ([], []) if table is None else read_labels(table)
    found = _Found(faults=faults, problems=list(faults), table=table, by_rows=by_rows)
    if not by_rows or any(row.path is None for row in rows):
        found.files = _features_in(folder, data)
    if table is not None:
        _join(folder, table, rows, found)
    if not found.files:
        listed = by_rows or any(row.path is not None for row in rows)
        raise InputError(_first_of(found.problems)) if listed else _no_features(folder, data)
    return found


def _first_of(problems: Sequence[str]) -> str:
    """The first, and how many there are."""
    more = len(problems) - 1
    return problems[0] + (f" (and {more} more such rows)" if more else "")


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
        found |= {(f.path, f.group, f.name): f for f in _inputs_of(path, data)}
    files = list(found.values())
    names = unique_names([file.name for file in files], [file.path for file in files])
    return [
        replace(file, name=name, label=None, split=None)
        for file, name in zip(files, names, strict=True)
    ]


def _inputs_of(path: Path, data: BagData) -> list[BagFile]:
    """The bags of a file or folder, or of the rows of a table of slides."""
    if not is_manifest(path):
        return find_features(path, data)
    found = _find(path, replace(data, labels=None))
    if found.problems:
        raise InputError(_first_of(found.problems))
    return found.files


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
    files = _features_in(root, data)
    if not files:
        raise _no_features(root, data)
    return files


def _features_in(root: Path, data: BagData) -> list[BagFile]:
    """As `find_features`; nothing where there is none."""
    start = _start(root, data)
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
        return read_table(tables[0]) if len(tables) == 1 else []
    _refuse_twins(start, files)
    return files


def _start(root: Path, data: BagData) -> Path:
    """The folder or file that holds the features of a data folder."""
    return root / data.features if data.features is not None and root.is_dir() else root


def _no_features(root: Path, data: BagData) -> InputError:
    return InputError(
        "holds no features",
        path=_start(root, data),
        remedy=f"give files of {', '.join(SUFFIXES)}, one csv of bags, or paths in a table",
    )


def is_manifest(path: Path) -> bool:
    """Whether a file is a table with a row per slide: jsonl, or a csv with a column of slides.

    Raises:
        InputError: It cannot be read.
    """
    if not (path.is_file() and is_table(path)):
        return False
    if path.suffix.lower() in JSON_LINES:
        return True
    head = {name.lower() for name in _columns(_first_line(path))}
    return bool(head & set(SLIDE_COLUMNS)) and not is_bag_table(path)


def is_bag_table(path: Path) -> bool:
    """Whether a csv file has a row per instance: wide, without a column of slides.

    Raises:
        InputError: It cannot be read.
    """
    if not path.name.endswith((".csv", ".csv.gz")):
        return False
    head = [name.lower() for name in _columns(_first_line(path))]
    named = {"bag", "label"} <= set(head) and bool(set(head) - _NO_FEATURE)
    return len(head) > 2 and (named or _numeric(head[2:]))


_NO_FEATURE = {*SLIDE_COLUMNS, *PATIENT_COLUMNS, "label", "split"}
"""Columns that are no feature of an instance."""


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
    if path.suffix.lower() in JSON_LINES:
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


def read_labels(path: Path) -> tuple[list[LabelRow], list[str]]:
    """Read a table of labels: csv, or jsonl with an object per line.

    Returns:
        The rows, each slide once, and a line for each row that cannot be used. Of a slide that is
        listed again alike the first row counts; where its rows contradict each other none does.

    Raises:
        InputError: It cannot be read, or lacks a column.
    """
    table = read_rows(path, lenient=True)
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
    problems = list(table.problems)
    unlike: set[str] = set()
    for place, row in rows:
        try:
            one = _label_row(path, place, row, slide, patient)
        except InputError as error:
            problems.append(str(error))
            continue
        first = found.setdefault(one.name, one)
        if first is not one:
            alike = replace(one, place=first.place) == first
            problems.append(_twice(path, first, one, alike=alike))
            unlike |= set() if alike else {one.name}
    return [row for row in found.values() if row.name not in unlike], problems


def _twice(path: Path, first: LabelRow, again: LabelRow, *, alike: bool) -> str:
    """The line for a slide that is listed again."""
    how = "as" if alike else "with other values than"
    return str(
        InputError(
            f"lists slide {again.name!r} twice, {how} in {first.place}",
            path=path,
            place=again.place,
            remedy="remove a row, or tell slides apart in the column slide_id",
        )
    )


def _label_row(
    path: Path, place: str, row: Mapping[str, str], slide: str, patient: str | None
) -> LabelRow:
    entry, label, split = row.get(slide, ""), row.get("label", ""), row.get("split", "")
    if not entry or not label:
        raise InputError(
            f"has no {'label' if entry else slide}", path=path, place=place, remedy="fill it in"
        )
    if split and split.lower() not in SPLIT_NAMES:
        raise InputError(
            f"has the split {split!r}; train, val and test are known", path=path, place=place
        )
    paths = (text for text in (entry, row.get("path", ""), row.get("file", "")) if text)
    return LabelRow(
        name=strip_suffix(Path(entry).name),
        label=label,
        place=place,
        path=next((text for text in paths if Path(text).suffix.lower() in SUFFIXES), None),
        patient=(row.get(patient) or None) if patient else None,
        split=SPLIT_NAMES.get(split.lower()),
    )


def _join(root: Path, table: Path, rows: Sequence[LabelRow], found: _Found) -> None:
    """Give the files the labels of a table; listed slides without a file are problems."""
    files = {file.name: file for file in found.files}
    several = Counter(row.path for row in rows)
    for row in rows:
        file = files.get(row.name)
        path = None if row.path is None else table.parent / row.path
        if path is not None and path.is_file() and not _is_of(file, path):
            many = several[row.path] > 1 and path.suffix.lower() in H5_SUFFIXES
            file = BagFile(name=row.name, path=path, group=row.name if many else None)
        if file is None:
            found.problems.append(
                f"{table}, {row.place}: slide {row.name!r} has no features in {root}; "
                f"extract them or remove the row"
                if path is None
                else f"{table}, {row.place}: names {path}, which does not exist; "
                f"add it or remove the row"
            )
            continue
        files[row.name] = replace(
            file,
            label=row.label,
            patient=row.patient or file.patient,
            split=row.split or file.split,
            place=f"{table.name} {row.place}",
        )
    names = {row.name for row in rows} if found.by_rows else set(files)
    found.files = [file for name, file in files.items() if name in names]


def _is_of(file: BagFile | None, path: Path) -> bool:
    return file is not None and file.path.resolve() == path.resolve()
