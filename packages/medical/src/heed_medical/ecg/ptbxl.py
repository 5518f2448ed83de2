"""PTB-XL: `ptbxl_database.csv` beside `records100/` and `records500/`."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heed_core.errors import InputError

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


def ptbxl_records(root: Path, *, rate_hz: Literal[100, 500] = 100) -> Iterator[PtbxlRecord]:
    """The records of a PTB-XL folder, in the order of its table.

    Raises:
        InputError: A table is missing, has no such column or a value that cannot be read.
    """
    classes = _diagnostic_classes(root / STATEMENTS)
    column = "filename_lr" if rate_hz == 100 else "filename_hr"
    path = root / DATABASE
    needed = ("ecg_id", "patient_id", "report", "scp_codes", "strat_fold", column)
    for number, row in _rows(path, needed):
        place = f"row {number}"
        codes = _codes(row["scp_codes"], path, place)
        yield PtbxlRecord(
            number=row["ecg_id"],
            path=root / row[column],
            patient=row["patient_id"].removesuffix(".0"),
            report=row["report"].strip(),
            superclasses=frozenset(classes[code] for code in codes if code in classes),
            split=_split(row["strat_fold"], path, place),
            place=f"{path}, {place}",
        )


def _diagnostic_classes(path: Path) -> dict[str, str]:
    """Statement -> superclass, of the diagnostic statements."""
    found = {}
    for _, row in _rows(path, ("diagnostic", "diagnostic_class")):
        if row["diagnostic"].strip() in {"1", "1.0"}:
            code = next(iter(row.values()))
            found[code] = row["diagnostic_class"]
    return found


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give the folder of PTB-XL")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            for column in needed:
                if column not in (reader.fieldnames or ()):
                    raise InputError(f"has no column {column!r}", path=path)
            for number, row in enumerate(reader, start=2):
                if None in row.values():
                    raise InputError("is cut off", path=path, place=f"row {number}")
                yield number, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is not a csv file ({error})", path=path) from None


def _codes(text: str, path: Path, place: str) -> Mapping[str, float]:
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        codes = None
    if not isinstance(codes, dict):
        raise InputError(f"has scp_codes {text[:40]!r}, no dictionary", path=path, place=place)
    return codes


def _split(fold: str, path: Path, place: str) -> str:
    number = fold.strip().removesuffix(".0")
    if not number.isdigit() or not 1 <= int(number) <= _TEST:
        raise InputError(f"has strat_fold {fold!r}, 1 to 10 was expected", path=path, place=place)
    return {_VALIDATION: "val", _TEST: "test"}.get(int(number), "train")
