"""The neutral files: a CSV with a row per fixation, a JSON with an entry per scanpath.

Positions are pixels, times seconds. `heed_gaze.scanpaths.write_scanpaths` writes both.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from heed_core.errors import InputError
from heed_gaze.readers.trials import Trials, build_trial, size_of, text_of
from heed_gaze.scanpaths import CSV_COLUMNS, Scanpath

_NEEDED = ("image", "subject", "x", "y")
_WHOLE = ("image", "task", "condition", "subject")
"""Columns whose values tell one scanpath from another."""

_Row = tuple[int, Mapping[str, str]]


def read_neutral_csv(path: Path) -> Trials:
    """The scanpaths of a CSV, in the order of their first rows.

    Needed are the columns image, subject, x and y; index orders the rows of a scanpath (without it
    they are in order). Columns that are not known are passed over.

    Raises:
        InputError: The file is empty, no CSV, or lacks a column.
    """
    groups: dict[tuple[str, ...], list[_Row]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                key = tuple((row.get(name) or "").strip() for name in _WHOLE)
                groups.setdefault(key, []).append((reader.line_num, row))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is no CSV in UTF-8 ({error})", path=path) from None
    if not groups:
        raise InputError("has no row below its header", path=path, remedy="give a file with rows")
    for key, rows in groups.items():
        yield _from_rows(path, dict(zip(_WHOLE, key, strict=True)), rows)


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    missing = [name for name in _NEEDED if name not in set(columns)]
    if missing:
        raise InputError(
            f"has no column {missing[0]!r}"
            if len(missing) < len(_NEEDED)
            else "is empty, or has none of the columns of scanpaths",
            path=path,
            remedy=f"the columns are {', '.join(CSV_COLUMNS)} (duration in seconds)",
        )


def _from_rows(path: Path, whole: dict[str, str], rows: list[_Row]) -> Scanpath | InputError:
    line = f"line {rows[0][0]}"
    try:
        if "index" in rows[0][1]:
            rows = sorted(rows, key=lambda row: _number(row, "index"))
            _check_order(rows)
        known = {name: _column(rows, name) for name in ("duration", "onset", "object")}
        size = [_column(rows, name) for name in ("width", "height")]
        x, y = ([_number(row, name) for row in rows] for name in ("x", "y"))
    except ValueError as error:
        return InputError(str(error), path=path, remedy="correct the row")
    try:
        size_px = size_of(*(column and column[0] for column in size))
    except ValueError as error:
        return InputError(str(error), path=path, place=line, remedy="correct the row")
    return build_trial(
        path,
        line,
        x=x,
        y=y,
        duration=known["duration"],
        onset=known["onset"],
        objects=known["object"],
        facts={
            "size_px": size_px,
            "split": rows[0][1].get("split") or "",
            **whole,
        },
    )


def _check_order(rows: list[_Row]) -> None:
    for before, after in pairwise(rows):
        if _number(before, "index") == _number(after, "index"):
            raise ValueError(
                f"line {after[0]} has the index of line {before[0]} in the same scanpath "
                "(tell scanpaths apart by their subject)"
            )


def _number(row: _Row, name: str) -> float:
    line, values = row
    try:
        return float(values[name])
    except (TypeError, ValueError):
        raise ValueError(f"line {line}: {name} is {values[name]!r}, not a number") from None


def _column(rows: list[_Row], name: str) -> list[float] | None:
    """A column that a scanpath may lack; it counts where every row has it."""
    if not rows[0][1].get(name):
        return None
    return [_number(row, name) for row in rows]


def read_neutral_json(path: Path, document: Mapping[str, object]) -> Trials:
    """The scanpaths of `{"scanpaths": [{"image", "subject", "x", "y", ...}, ...]}`.

    Args:
        path: The file, for messages.
        document: What it holds.

    Raises:
        InputError: There is no list of scanpaths.
    """
    records = document.get("scanpaths")
    if not isinstance(records, list):
        raise InputError("has no list of scanpaths", path=path)
    for number, record in enumerate(records, start=1):
        yield _from_record(path, f"scanpath {number}", record)


def _from_record(path: Path, place: str, record: object) -> Scanpath | InputError:
    if not isinstance(record, Mapping) or any(name not in record for name in _NEEDED):
        return InputError(
            f"must have {', '.join(_NEEDED)}", path=path, place=place, remedy="correct the entry"
        )
    width, height, box = (record.get(name) for name in ("width", "height", "target_box"))
    try:
        size = size_of(width, height)
        target = tuple(float(edge) for edge in box) if box else None
    except (TypeError, ValueError) as error:
        return InputError(f"width, height or target_box: {error}", path=path, place=place)
    if target is not None and len(target) != 4:
        return InputError("target_box must be x0, y0, x1, y1", path=path, place=place)
    names = ("image", "subject", "task", "condition", "split")
    return build_trial(
        path,
        place,
        x=record["x"],
        y=record["y"],
        duration=record.get("duration"),
        onset=record.get("onset"),
        objects=record.get("objects"),
        facts={
            "size_px": size,
            "target_box": target,
            **{name: text_of(record.get(name)) for name in names},
        },
    )
