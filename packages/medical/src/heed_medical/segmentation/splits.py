"""Which case belongs to which split: from a table, from splits.json, or by a seed."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.images import file_kind, file_stem
from heed_medical.segmentation.cases import CaseFiles
from heed_medical.splits import SPLIT_NAMES, SPLITS, in_several_splits

_CASE_COLUMNS = ("case", "file", "image", "name", "id")
_PATIENT_COLUMNS = ("patient", "patient_id", "subject", "subject_id")
_FIRST_TABLES = ("labels.csv", "cases.csv", "splits.csv")
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Shares of the patients in a split that is drawn by a seed."""


@dataclass(frozen=True, kw_only=True)
class CaseTable:
    """A csv file with one row per case."""

    path: Path
    rows: Sequence[Mapping[str, str]]

    def column(self, names: Iterable[str]) -> str | None:
        """The first of `names` that is a column."""
        return next((n for n in names if self.rows and n in self.rows[0]), None)


def read_tables(root: Path) -> list[CaseTable]:
    """All csv files in a folder that list cases, the usual names first.

    Raises:
        InputError: A file that is not text, or a row of another length than the header.
    """
    found = [p for p in sorted(root.glob("*.csv")) if not p.name.startswith(".")]
    found.sort(key=lambda p: _FIRST_TABLES.index(p.name) if p.name in _FIRST_TABLES else 9)
    tables = [CaseTable(path=path, rows=_read_rows(path)) for path in found]
    return [table for table in tables if table.column(_CASE_COLUMNS)]


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"is not a csv file ({error})", path=path, remedy="save as UTF-8"
        ) from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(
                "has another number of fields than the header", path=path, place=f"row {number}"
            )
    return rows


def assign_splits(
    root: Path, cases: Sequence[CaseFiles], *, seed: int
) -> tuple[list[CaseFiles], list[str]]:
    """Give every case a split and a patient; what is wrong with the lists comes back as lines.

    A case keeps the split that its folder says. Others take it from the column `split` of a csv
    file or from splits.json; where there is neither, patients are drawn by the seed.
    """
    listed, patients, problems = _listed_splits(root)
    settled = []
    for case in cases:
        patient = patients.get(case.name, case.patient)
        settled.append(replace(case, patient=patient, split=case.split or listed.get(case.name)))
    if listed:
        known = {case.name for case in cases}
        problems += [
            f"{root}: case {name} has a split and no image; remove its row or add the file"
            for name in sorted(set(listed) - known)
        ]
        problems += [
            f"{case.images[0]}: is in no split; add it to the list of splits"
            for case in settled
            if case.split is None
        ]
        return settled, problems
    return _drawn_splits(settled, seed=seed), problems


def _listed_splits(root: Path) -> tuple[dict[str, str], dict[str, str], list[str]]:
    listed: dict[str, str] = {}
    patients: dict[str, str] = {}
    problems: list[str] = []
    for table in read_tables(root):
        case_column = table.column(_CASE_COLUMNS)
        split_column, patient_column = table.column(("split",)), table.column(_PATIENT_COLUMNS)
        for number, row in enumerate(table.rows, start=2):
            name = case_name(row[case_column]) if case_column else ""
            if patient_column and row[patient_column]:
                patients.setdefault(name, row[patient_column])
            if split_column is None or name in listed:
                continue
            split = SPLIT_NAMES.get(row[split_column].strip().lower())
            if split is None:
                problems.append(
                    f"{table.path}, row {number}: has split {row[split_column]!r}; "
                    f"use train, val or test"
                )
            else:
                listed[name] = split
    for path in (root / "splits.json", root / "splits_final.json"):
        if not listed and path.is_file():
            listed = _read_splits_json(path)
    return listed, patients, problems


def case_name(text: str) -> str:
    """The case that a table's entry names: a file's stem, or the text itself."""
    path = Path(text.strip())
    return file_stem(path) if file_kind(path) != "other" else path.name


def _read_splits_json(path: Path) -> dict[str, str]:
    content = read_json(path)
    if isinstance(content, list) and content:
        content = content[0]
    if not isinstance(content, dict) or not set(content) & set(SPLIT_NAMES):
        raise InputError(
            "has no lists of cases by split",
            path=path,
            remedy='write {"train": [names], "val": [names], "test": [names]}',
        )
    listed: dict[str, str] = {}
    for key, names in content.items():
        if key not in SPLIT_NAMES or not isinstance(names, list):
            raise InputError(
                f"has the entry {key!r}, a list under train, val or test was expected", path=path
            )
        listed.update({case_name(str(name)): SPLIT_NAMES[key] for name in names})
    return listed


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        InputError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"is not JSON ({error})", path=path) from None


def _drawn_splits(cases: Sequence[CaseFiles], *, seed: int) -> list[CaseFiles]:
    """Draw the missing splits by patient; splits that folders give keep their share."""
    open_patients = sorted({patient_of(c) for c in cases if c.split is None})
    given = {c.split for c in cases if c.split is not None}
    missing = [s for s in SPLITS if s not in given]
    if not open_patients or not missing:
        return [replace(c, split=c.split or "train") for c in cases]
    rng = np.random.default_rng(seed)
    shuffled = [open_patients[i] for i in rng.permutation(len(open_patients))]
    counts = _split_counts(len(shuffled), missing)
    drawn = dict(zip(shuffled, np.repeat(missing, counts), strict=True))
    return [replace(c, split=c.split or str(drawn[patient_of(c)])) for c in cases]


def _split_counts(total: int, splits: Sequence[str]) -> list[int]:
    """Patients per split by `SHARES`, at least one in each where there are enough."""
    whole = sum(SHARES[s] for s in splits)
    counts = [round(total * SHARES[s] / whole) for s in splits[1:]]
    if total >= len(splits):
        counts = [max(1, n) for n in counts]
    while sum(counts) > max(0, total - 1):
        counts[int(np.argmax(counts))] -= 1
    return [total - sum(counts), *counts]


def patient_of(case: CaseFiles) -> str:
    """The patient of a case; the case itself where none is named."""
    return case.patient or case.name


def patients_in_several_splits(cases: Iterable[CaseFiles]) -> dict[str, tuple[str, ...]]:
    """Patients whose cases lie in more than one split -> these splits."""
    return in_several_splits((patient_of(case), case.split) for case in cases)
