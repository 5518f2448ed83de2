"""PTB-XL: `ptbxl_database.csv` beside `records100/` and `records500/`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from heed_core.errors import InputError
from heed_medical.pictures.records import Rows, read_rows

SUPERCLASSES = ("NORM", "STTC", "MI", "HYP", "CD")
DATABASE, STATEMENTS = "ptbxl_database.csv", "scp_statements.csv"
_VALIDATION, _TEST = 9, 10


@dataclass(frozen=True, kw_only=True)
class PtbxlRecord:
    """One row of the database."""

    number: str
    path: Path
    """Of the record, without suffix."""
    patient: str
    report: str
    superclasses: frozenset[str]
    """Of all its statements, whatever their likelihood; may be empty."""
    split: str
    """Folds 1 to 8 train, 9 val, 10 test, as its authors recommend."""
    place: str


class PtbxlListing(NamedTuple):
    """What a PTB-XL folder lists."""

    records: list[PtbxlRecord]
    problems: list[str]
    """A line for each row of a table that cannot be used; it is left out."""


def list_ptbxl(root: Path, *, rate_hz: Literal[100, 500] = 100) -> PtbxlListing:
    """The records of a PTB-XL folder, in the order of its table, and what is wrong with it.

    Raises:
        InputError: A table is missing, cannot be read or has no such column.
    """
    statements = _rows(root / STATEMENTS, ("diagnostic", "diagnostic_class"))
    classes = _diagnostic_classes(statements)
    column = "filename_lr" if rate_hz == 100 else "filename_hr"
    needed = ("ecg_id", "patient_id", "report", "scp_codes", "strat_fold", column)
    table = _rows(root / DATABASE, needed)
    records, problems = [], [*statements.problems, *table.problems]
    for place, row in table.numbered():
        try:
            records.append(_record(root, row, column, classes, place))
        except InputError as error:
            problems.append(str(error))
    return PtbxlListing(records, problems)


def ptbxl_records(root: Path, *, rate_hz: Literal[100, 500] = 100) -> Iterator[PtbxlRecord]:
    """The records of a PTB-XL folder, in the order of its table.

    Raises:
        InputError: As `list_ptbxl`; a row that cannot be used.
    """
    listing = list_ptbxl(root, rate_hz=rate_hz)
    if listing.problems:
        raise InputError(listing.problems[0])
    return iter(listing.records)


def _record(
    root: Path, row: Mapping[str, str], column: str, classes: Mapping[str, str], place: str
) -> PtbxlRecord:
    codes = _codes(row["scp_codes"], place)
    if not row[column]:
        raise InputError(f"has no {column}", place=place)
    return PtbxlRecord(
        number=row["ecg_id"],
        path=root / row[column],
        patient=row["patient_id"].removesuffix(".0"),
        report=row["report"],
        superclasses=frozenset(classes[code] for code in codes if code in classes),
        split=_split(row["strat_fold"], place),
        place=place,
    )


def _diagnostic_classes(table: Rows) -> dict[str, str]:
    """Statement -> superclass, of the diagnostic statements."""
    code = table.columns[0]
    return {
        row[code]: row["diagnostic_class"]
        for row in table.rows
        if row["diagnostic"] in {"1", "1.0"}
    }


def _rows(path: Path, needed: tuple[str, ...]) -> Rows:
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give the folder of PTB-XL")
    table = read_rows(path, lenient=True)
    for column in needed:
        if column not in table.columns:
            raise InputError(f"has no column {column!r}", path=path)
    return table


def _codes(text: str, place: str) -> Mapping[str, float]:
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        codes = None
    if not isinstance(codes, dict):
        raise InputError(f"has scp_codes {text[:40]!r}, no dictionary", place=place)
    return codes


def _split(fold: str, place: str) -> str:
    number = fold.removesuffix(".0")
    if not number.isdigit() or not 1 <= int(number) <= _TEST:
        raise InputError(f"has strat_fold {fold!r}, 1 to 10 was expected", place=place)
    return {_VALIDATION: "val", _TEST: "test"}.get(int(number), "train")
