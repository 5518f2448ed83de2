"""The spreadsheets of the shelf experiments of OAT: wine, shampoo and yogurt.

A row is a fixation: `ID` (the trial), `Target`, `Question` (name of the layout; begins with Q1, Q2
or Q3), `Choice` (fixated object, from 1), `X`, `Y`, `T_Package` (target, from 1), `Sub_ID`. The
picture is `Question/<name>.png`, 1680 x 1050 pixels, with the shelf at its bottom.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_gaze.oat.importers import ImportOptions, without_longest
from heed_gaze.oat.shelves import Layout, Shelves, Trial, reading_order
from heed_gaze.scanpaths import Size

SCREEN: Size = (1680, 1050)
COLUMNS = ("ID", "Target", "Question", "Choice", "X", "Y", "T_Package", "Sub_ID")


@dataclass(frozen=True)
class Shelf:
    """The grid of one of the shelves, at the bottom of the screen."""

    group: str
    rows: int
    columns: int
    cell_height_px: int
    cell_width_px: int

    def boxes(self) -> Float64[np.ndarray, "n 4"]:
        """Of the objects, in reading order, from the left border."""
        row, column = reading_order(self.rows, self.columns, self.rows * self.columns).T
        top = SCREEN[1] - self.rows * self.cell_height_px + row * self.cell_height_px
        left = column * self.cell_width_px
        found = [left, top, left + self.cell_width_px, top + self.cell_height_px]
        return np.stack(found, axis=1).astype(np.float64)


SHELVES: Mapping[str, Shelf] = {
    "Q1": Shelf("wine", 2, 11, 449, 152),
    "Q2": Shelf("shampoo", 3, 9, 305, 186),
    "Q3": Shelf("yogurt", 3, 9, 305, 186),
}
"""Prefix of a question's name -> its shelf."""


def read_workbooks(paths: Sequence[Path], options: ImportOptions) -> Shelves:
    """Read spreadsheets; trials are numbered within each.

    Raises:
        InputError: A file that is none, without a column, or with a row that cannot be used.
    """
    layouts: dict[str, Layout] = {}
    trials: list[Trial] = []
    skipped: list[str] = []
    for path in paths:
        for rows in _trials_of(path):
            try:
                trials.append(_trial(path, rows, layouts))
            except InputError as error:
                if options.on_error == "stop":
                    raise
                skipped.append(str(error))
    if not trials:
        raise InputError("holds no trial that can be used", path=paths[0])
    kept, notes = without_longest(trials, options.longest_sd)
    return Shelves(
        layouts=layouts, trials=kept, skipped=tuple(skipped), notes=notes, kind="OAT spreadsheets"
    )


Row = dict[str, object]


def _trials_of(path: Path) -> list[list[Row]]:
    """The rows of each trial, in the order of the file, with their row numbers."""
    import openpyxl  # type: ignore[import-untyped]

    if not path.is_file():
        raise InputError("no such file", path=path, remedy="check the path")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        raise InputError(
            f"is no spreadsheet that can be read ({error})", path=path, remedy="get it again"
        ) from None
    sheet = book.worksheets[0]
    rows = sheet.iter_rows(values_only=True)
    head = [str(cell).strip() for cell in next(rows, ())]
    for column in COLUMNS:
        if column not in head:
            raise InputError(f"has no column {column!r}", path=path, remedy="add the column")
    groups: dict[object, list[Row]] = {}
    for number, values in enumerate(rows, start=2):
        row: Row = {"row": number, **dict(zip(head, values, strict=False))}
        if row.get("ID") is not None:
            groups.setdefault(row["ID"], []).append(row)
    book.close()
    return list(groups.values())


def _trial(path: Path, rows: list[Row], layouts: dict[str, Layout]) -> Trial:
    first = rows[0]
    question = str(first["Question"])
    shelf = SHELVES.get(question[:2].upper())
    if shelf is None:
        raise _fault(path, first, f"Question {question!r} begins with none of {[*SHELVES]}")
    if question not in layouts:
        layouts[question] = _layout(question, shelf, path.parent)
    for row in rows:
        for axis in ("X", "Y"):
            value = row[axis]
            if not isinstance(value, int | float) or not np.isfinite(value):
                raise _fault(path, row, f"{axis} is {value!r}, not a position")
    objects = np.array([_number(path, row, "Choice") - 1 for row in rows], dtype=np.int64)
    trial = Trial(
        layout=question,
        target=_number(path, first, "T_Package") - 1,
        subject=str(first["Sub_ID"]),
        objects=objects,
        target_name="" if first["Target"] is None else str(first["Target"]),
    )
    if trial.target < 0:
        raise _fault(path, first, "T_Package counts from 1")
    trial.check(layouts[question], path=path, place=f"trial {first['ID']}")
    return trial


def _number(path: Path, row: Row, column: str) -> int:
    value = row[column]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise _fault(path, row, f"{column} is {value!r}, not a whole number")
    return int(value)


def _fault(path: Path, row: Row, problem: str) -> InputError:
    place = f"row {row['row']} (trial {row['ID']})"
    return InputError(problem, path=path, place=place, remedy="correct or remove the trial")


def _layout(question: str, shelf: Shelf, folder: Path) -> Layout:
    image = folder / "Question" / f"{question}.png"
    boxes = shelf.boxes()
    return Layout(
        name=question,
        boxes=boxes,
        cells=reading_order(shelf.rows, shelf.columns, len(boxes)),
        rows=shelf.rows,
        columns=shelf.columns,
        size_px=SCREEN,
        image=image if image.is_file() else None,
        group=shelf.group,
    )
