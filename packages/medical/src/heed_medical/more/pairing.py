"""Pair the X-rays of MIMIC-CXR-JPG with the ECGs of MIMIC-IV-ECG of the same patient.

A pair is a frontal X-ray and an ECG of one subject, at most 60 days apart (Thapa et al., arXiv
2410.16239). The official split of MIMIC-CXR decides; a share of the training subjects becomes
validation too. Tables may be csv or csv.gz. The rows are those of a manifest.
"""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.more.settings import CHEXPERT
from heed_medical.more.studies import clean_report
from heed_medical.reports.layouts import report_sections

ManifestRow = Mapping[str, str]

_CXR = "mimic-cxr-2.0.0-{}.csv"
_FRONTAL = {"PA", "AP"}
_SPLITS = {"train": "train", "validate": "val", "test": "test"}
STATEMENTS = 7
"""Of the machine (report_0 to report_6) that are the report of an ECG, as in the released code."""
MOST_STATEMENTS = 18
"""Columns of MIMIC-IV-ECG's machine_measurements.csv."""
COLUMNS = (
    "name", "subject_id", "xray_study_id", "ecg_study_id", "xray_path", "ecg_path",
    "xray_report", "ecg_report", "days", "split", *CHEXPERT,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What was paired."""

    rows: Sequence[ManifestRow]
    without_report: int
    """X-rays whose report was missing or empty, so that their findings were written out."""


@dataclass(frozen=True)
class _Xray:
    picture: str
    study: str
    when: date


@dataclass(frozen=True)
class _Ecg:
    study: str
    path: Path
    when: date
    report: str


def pair_mimic(
    cxr: Path,
    ecg: Path,
    *,
    out: Path,
    reports: Path | None = None,
    days: int = 60,
    val_share: float = 0.02,
    seed: int = 42,
    statements: int = STATEMENTS,
) -> Pairing:
    """The rows of a manifest of all pairs, in the order of subjects, X-rays and ECGs.

    Args:
        cxr: The folder of MIMIC-CXR-JPG.
        ecg: The folder of MIMIC-IV-ECG.
        out: The folder of the manifest, to which paths are relative.
        reports: The folder with `files/` of the reports. None: `cxr`.
        days: The most days between the two.
        val_share: Share of the training subjects that becomes validation.
        seed: Of their choice.
        statements: How many of the machine's statements are the report of an ECG.

    Raises:
        InputError: A table is missing, damaged, has no such column or a date that is none; no pair.
    """
    xrays = _frontal_xrays(_table(cxr, "metadata"))
    splits = {
        row["dicom_id"]: (_split(row["split"], place), row["subject_id"])
        for place, row in _stream(_table(cxr, "split"), ("dicom_id", "subject_id", "split"))
    }
    ecgs = _ecgs(ecg, set(xrays), statements)
    findings = {
        row["study_id"]: {name: _plain(row[name]) for name in CHEXPERT}
        for _, row in _stream(_table(cxr, "chexpert"), ("study_id", *CHEXPERT))
    }
    moved = _validation({s for split, s in splits.values() if split == "train"}, val_share, seed)
    rows: list[ManifestRow] = []
    empty = 0
    for subject in sorted(set(xrays) & set(ecgs)):
        for xray in xrays[subject]:
            near = [e for e in ecgs[subject] if abs((e.when - xray.when).days) <= days]
            if not near or xray.picture not in splits:
                continue
            labels = findings.get(xray.study, dict.fromkeys(CHEXPERT, ""))
            text = _report(cxr if reports is None else reports, subject, xray.study)
            empty += not text
            split = splits[xray.picture][0]
            shared = {
                "subject_id": subject,
                "xray_study_id": xray.study,
                "xray_path": _relative(_place(cxr, subject, xray.study, xray.picture), out),
                "xray_report": text or report_of_findings(labels),
                "split": "val" if split == "train" and subject in moved else split,
                **labels,
            }
            rows += [{**_pair(subject, xray, one, out), **shared} for one in near]
    if not rows:
        raise InputError(f"has no frontal X-ray within {days} days of an ECG in {ecg}", path=cxr)
    return Pairing(rows=rows, without_report=empty)


def _pair(subject: str, xray: _Xray, ecg: _Ecg, out: Path) -> dict[str, str]:
    """What the ECG gives to a row."""
    return {
        "name": f"p{subject}/{xray.picture}/{ecg.study}",
        "ecg_study_id": ecg.study,
        "ecg_path": _relative(ecg.path, out),
        "ecg_report": ecg.report,
        "days": str((ecg.when - xray.when).days),
    }


def report_of_findings(labels: Mapping[str, str]) -> str:
    """The findings in words, in the place of a report that is empty.

    Example:
        >>> report_of_findings({"Edema": "1", "Fracture": "0", "Pneumonia": "-1"})
        'Edema is present. uncertain finding of Pneumonia'
    """
    present = [name for name, value in labels.items() if value == "1"]
    uncertain = [name for name, value in labels.items() if value == "-1"]
    parts = [f"{', '.join(present)} is present."] if present else []
    parts += [f"uncertain finding of {', '.join(uncertain)}"] if uncertain else []
    return " ".join(parts)


def write_manifest(rows: Sequence[ManifestRow], path: Path) -> None:
    """Write the rows as csv."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _table(root: Path, part: str) -> Path:
    plain = root / _CXR.format(part)
    return plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")


def _frontal_xrays(path: Path) -> dict[str, list[_Xray]]:
    needed = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate")
    found: dict[str, list[_Xray]] = defaultdict(list)
    for place, row in _stream(path, needed):
        if row["ViewPosition"] in _FRONTAL:
            when = _date(row["StudyDate"].removesuffix(".0"), place)
            found[row["subject_id"]].append(_Xray(row["dicom_id"], row["study_id"], when))
    return found


def _ecgs(root: Path, subjects: set[str], statements: int) -> dict[str, list[_Ecg]]:
    columns = [f"report_{number}" for number in range(statements)]
    said = {
        row["study_id"]: " ".join(filter(None, (row.get(n, "").strip() for n in columns)))
        for _, row in _stream(
            _either(root / "machine_measurements.csv"), ("subject_id", "study_id")
        )
        if row["subject_id"] in subjects
    }
    found: dict[str, list[_Ecg]] = defaultdict(list)
    path = _either(root / "record_list.csv")
    for place, row in _stream(path, ("subject_id", "study_id", "ecg_time", "path")):
        if row["subject_id"] in subjects:
            study = row["study_id"]
            when = _date(row["ecg_time"], place)
            file = root / f"{row['path']}.hea"
            found[row["subject_id"]].append(_Ecg(study, file, when, said.get(study, "")))
    return found


def _either(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _stream(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The rows of a csv or csv.gz, one at a time: the tables have up to a million."""
    if not path.is_file():
        raise InputError(
            "does not exist", path=path.with_suffix("") if path.suffix == ".gz" else path
        )
    try:
        with (
            gzip.open(path, "rt", newline="", encoding="utf-8-sig")
            if path.suffix == ".gz"
            else path.open(newline="", encoding="utf-8-sig")
        ) as stream:
            reader = csv.DictReader(stream)
            for column in needed:
                if column not in (reader.fieldnames or ()):
                    raise InputError(f"has no column {column!r}", path=path)
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    raise InputError(
                        "has another number of fields than the header",
                        path=path,
                        place=f"row {number}",
                    )
                yield f"{path}, row {number}", row
    except (UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot be read as csv ({error})", path=path) from None


def _split(text: str, place: str) -> str:
    if text not in _SPLITS:
        raise InputError(f"has the split {text!r}, not {', '.join(_SPLITS)}", place=place)
    return _SPLITS[text]


def _date(text: str, place: str) -> date:
    try:
        return date.fromisoformat(text.strip().split(" ")[0])
    except ValueError:
        raise InputError(f"has the date {text!r}, which is none", place=place) from None


def _plain(value: str) -> str:
    """`1.0` -> `1`; blank stays."""
    return value.strip().removesuffix(".0")


def _place(root: Path, subject: str, study: str, picture: str) -> Path:
    return root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}" / f"{picture}.jpg"


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _report(root: Path, subject: str, study: str) -> str:
    """Findings and impression of a report; empty where nothing of them is left when cleaned."""
    path = root / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
    if not path.is_file():
        return ""
    sections = report_sections(path.read_text(encoding="utf-8", errors="replace"))
    parts = (sections.get("findings", ""), sections.get("impression", ""))
    text = " ".join(" ".join(part.split()) for part in parts if part.strip())
    return text if clean_report(text) else ""


def _validation(subjects: set[str], share: float, seed: int) -> set[str]:
    ordered = sorted(subjects)
    count = round(share * len(ordered))
    chosen = np.random.default_rng(seed).permutation(len(ordered))[:count]
    return {ordered[place] for place in chosen}
