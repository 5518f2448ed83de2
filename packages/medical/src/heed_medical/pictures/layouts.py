"""The pictures of a data set with their splits settled, and the pictures in a user's folders."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_core.folders import files_under, unique_names
from heed_medical.manifests import folder_and_table
from heed_medical.other_layout import other_layout
from heed_medical.pictures.findings import findings_of
from heed_medical.pictures.listers import (
    LISTERS,
    RSNA_BOXES,
    RSNA_CLASS,
    TABLE_OPTION,
    covidx_lists,
    find_table,
    is_picture,
    list_folders,
    mimic_labels,
    other_table,
)
from heed_medical.pictures.records import PictureFile, first_line, plain_or_packed
from heed_medical.pictures.settings import Layout, PictureData
from heed_medical.splits import SPLITS

_KNOWN = (
    "labels.csv with file, label and split, COVIDx lists, RSNA, CheXpert or MIMIC-CXR tables, or "
    "{train,val,test}/CLASS/ folders are read"
)
_READABLE = "png, jpg, tif, bmp and DICOM are read"
_TEST_SHARE = 0.2
ONE_CLASS = ("covidx", "rsna", "folders")
"""Layouts without columns that could be findings."""
_ONE_LABEL = ("covidx", "folders")
"""Layouts without columns that could be labels."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a data set lists."""

    layout: Layout
    pictures: tuple[PictureFile, ...]
    problems: tuple[str, ...]
    """A line for each row or file that cannot be used; its picture is left out."""
    left_out: tuple[str, ...]
    """A line for each reason for which the settings leave pictures out."""
    drawn: tuple[str, ...]
    """The splits that were drawn by patient because the data do not give them."""


def list_pictures(root: Path, data: PictureData) -> Listing:
    """List a data set and settle its splits; the pictures themselves are not read.

    Args:
        root: The folder of the data set, or its table (csv, jsonl).
        data: The settings.

    Raises:
        InputError: No folder, no known layout, a list that cannot be read, no picture at all.
    """
    root, data = _opened(root, data)
    layout = layout_of(root, data)
    _refuse_unused(layout, data)
    elsewhere = partial(other_layout, root, data.layout, lambda: _seen(root, data))
    try:
        found = LISTERS[layout](root, data)
    except InputError as error:
        raise (elsewhere() or error) from None
    pictures, wrong = _existing(found.pictures)
    names = _names_apart([(picture.name, picture.path) for picture in pictures])
    pictures = [replace(p, name=name) for p, name in zip(pictures, names, strict=True)]
    problems = found.problems + wrong
    if not pictures:
        raise elsewhere() or InputError(
            f"holds no labelled picture in the layout {layout}"
            + (f" ({len(problems)} problems, the first: {problems[0]})" if problems else ""),
            path=root,
            remedy=None if problems else _KNOWN,
        )
    pictures, odd = _with_findings(pictures, data)
    problems += odd
    settled, drawn = _with_splits(pictures, data)
    return Listing(
        layout=layout,
        pictures=tuple(settled),
        problems=tuple(problems),
        left_out=tuple(found.left_out),
        drawn=tuple(drawn),
    )


def layout_of(root: Path, data: PictureData) -> Layout:
    """The layout of a folder: as the settings say, or by what lies in it.

    Raises:
        InputError: No folder, or none of the known layouts.
    """
    root, data = _opened(root, data)
    if not root.is_dir():
        raise InputError(
            "is not a folder", path=root, remedy="give the folder of a data set, or a csv or jsonl"
        )
    if data.layout != "auto":
        return data.layout
    if covidx_lists(root, data.table):
        return "covidx"
    if mimic_labels(root, data.table) is not None:
        return "mimic"
    if data.table:
        return "table"
    if (root / RSNA_BOXES).is_file():
        return "rsna"
    header = first_line(plain_or_packed(root / "train.csv"))
    if "Path" in header and "No Finding" in header:
        return "chexpert"
    if find_table(root) is not None:
        return "table"
    if len({picture.label for picture in list_folders(root, data).pictures}) > 1:
        return "folders"
    raise InputError(
        f"holds no data set in a known layout{other_table(root)}", path=root, remedy=_KNOWN
    )


def _opened(root: Path, data: PictureData) -> tuple[Path, PictureData]:
    """The folder of a data set, and the settings with the table that was given in its place."""
    folder, table = folder_and_table(root, data.table, option=TABLE_OPTION, layout=data.layout)
    return folder, data if folder == root else replace(data, table=table)


def _seen(root: Path, data: PictureData) -> Layout:
    """The layout by what lies in the folder alone."""
    return layout_of(root, replace(data, layout="auto", table=""))


def _refuse_unused(layout: str, data: PictureData) -> None:
    if data.only and layout != "table":
        raise InputError(f"--data.only has no effect in the layout {layout}", remedy="leave it out")
    if data.table and layout not in {"table", "covidx", "mimic"}:
        raise InputError(
            f"--data.table has no effect in the layout {layout}", remedy="leave it out"
        )
    if data.findings and layout in ONE_CLASS:
        raise InputError(
            f"--data.findings has no effect in the layout {layout}",
            remedy="pictures with several findings are read from a table, CheXpert or MIMIC",
        )
    if layout == "rsna" and data.label not in ("", "Target", RSNA_CLASS):
        raise InputError(
            f"--data.label {data.label} is no column of RSNA",
            remedy=f"use Target, or {RSNA_CLASS} for its three classes",
        )
    if data.label and layout in _ONE_LABEL:
        raise InputError(
            f"--data.label has no effect in the layout {layout}", remedy="leave it out"
        )


def find_pictures(root: Path, data: PictureData, split: str) -> list[PictureFile]:
    """The labelled pictures of one split, in the order of the list.

    Args:
        root: The data set.
        data: `on_error="skip"` leaves broken rows out; `stop` raises for them.
        split: train, val or test.

    Raises:
        InputError: As `list_pictures`; a broken row; an unknown label; no picture in this split.
    """
    if split not in SPLITS:
        raise InputError(f"has no split {split!r}", path=root, remedy=f"use {', '.join(SPLITS)}")
    listing = list_pictures(root, data)
    problems = [*listing.problems, *unknown_labels(listing.pictures, data)]
    if problems and data.on_error == "stop":
        more = len(problems) - 1
        tail = f" (and {more} more such problem{'s' * (more > 1)})" if more else ""
        raise InputError(problems[0] + tail)
    known = set(data.classes)
    pictures = [p for p in listing.pictures if p.split == split and (not known or p.label in known)]
    if not pictures:
        counts = ", ".join(f"{s} {sum(p.split == s for p in listing.pictures)}" for s in SPLITS)
        raise InputError(
            f"has no pictures in the split {split} ({counts})",
            path=root,
            remedy="choose another split or add pictures to it",
        )
    return pictures


def broken_rows(root: Path, data: PictureData) -> tuple[str, ...]:
    """What `find_pictures` leaves out with `on_error="skip"`, a line each."""
    listing = list_pictures(root, data)
    return (*listing.problems, *unknown_labels(listing.pictures, data))


def unknown_labels(pictures: Sequence[PictureFile], data: PictureData) -> list[str]:
    """A line for each picture whose label is not one of the classes; none if none are settled."""
    if not data.classes:
        return []
    return [
        f"{p.place or p.path}: has the label {p.label!r}, which is not one of the classes "
        f"{', '.join(data.classes)}; correct it, or train with it in --data.classes"
        for p in pictures
        if p.label not in data.classes
    ]


def _existing(pictures: Sequence[PictureFile]) -> tuple[list[PictureFile], list[str]]:
    problems, found = [], []
    first: dict[Path, PictureFile] = {}
    for picture in pictures:
        place = picture.place or str(picture.path)
        if not picture.path.is_file():
            problems.append(
                f"{place}: names {picture.path}, which does not exist; add it or remove the row"
            )
            continue
        earlier = first.setdefault(picture.path, picture)
        if earlier is not picture:
            problems.append(
                f"{place}: names {picture.path.name} again (as {earlier.place}); remove a row"
            )
            continue
        found.append(picture)
    return found, problems


def _with_findings(
    pictures: Sequence[PictureFile], data: PictureData
) -> tuple[list[PictureFile], list[str]]:
    """The pictures whose findings can be read; a line for each of the others."""
    problems, found = [], []
    for picture in pictures:
        try:
            findings_of(picture, data)
        except InputError as error:
            problems.append(str(error))
            continue
        found.append(picture)
    return found, problems


def _with_splits(
    pictures: Sequence[PictureFile], data: PictureData
) -> tuple[list[PictureFile], list[str]]:
    """Draw the splits that are missing, by patient; what the data give stays."""
    given = Counter(p.split for p in pictures)
    openly = [p for p in pictures if p.split is None]
    if openly:
        shares = {s: share for s, share in _shares(data).items() if not given[s]}
    elif given["train"] and not given["val"]:
        openly = [p for p in pictures if p.split == "train"]
        shares = {"val": data.val_share}
    else:
        return list(pictures), []
    taken = {p.group for p in pictures if p.split and p not in openly}
    groups = sorted({p.group for p in openly} - taken)
    split_of = _draw(groups, shares, data.split_seed)
    changed = {id(p): split_of.get(p.group, "train") for p in openly}
    settled = [replace(p, split=changed.get(id(p), p.split)) for p in pictures]
    return settled, sorted(shares)


def _shares(data: PictureData) -> dict[str, float]:
    return {"val": data.val_share, "test": _TEST_SHARE}


def _draw(groups: Sequence[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    order = np.random.default_rng(seed).permutation(len(groups))
    drawn: dict[str, str] = {}
    start = 0
    for split, share in shares.items():
        count = max(1, round(share * len(groups))) if len(groups) > len(shares) else 0
        drawn |= {groups[i]: split for i in order[start : start + count]}
        start += count
    return drawn


def find_inputs(paths: Sequence[Path]) -> list[PictureFile]:
    """The pictures in files and folders; folders are searched through.

    Raises:
        InputError: A path that does not exist or is no picture; nothing found.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if path.is_file():
            if not is_picture(path):
                raise InputError("is not a picture that can be read", path=path, remedy=_READABLE)
            found.setdefault(path, path.stem)
        elif path.is_dir():
            for file in files_under(path):
                if is_picture(file):
                    found.setdefault(file, str(file.relative_to(path).with_suffix("")))
        else:
            raise InputError("does not exist", path=path, remedy="give a file or a folder")
    if not found:
        listed = ", ".join(str(p) for p in paths[:3])
        raise InputError("holds no picture that can be read", path=listed, remedy=_READABLE)
    names = _names_apart([(name, path) for path, name in found.items()])
    return [PictureFile(name=name, path=path) for path, name in zip(found, names, strict=True)]


def _names_apart(pictures: Sequence[tuple[str, Path]]) -> list[str]:
    """Different names for different files; those that differ in their suffix alone hold it."""
    counts = Counter((name, path.parent) for name, path in pictures)
    names = [
        f"{name}_{path.suffix.lower().removeprefix('.')}" if counts[name, path.parent] > 1 else name
        for name, path in pictures
    ]
    return unique_names(names, [path for _, path in pictures])
