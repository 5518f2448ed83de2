"""Find the studies of a data set: pictures, report and split of each, in five layouts."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.dicom import is_dicom
from heed_medical.images import file_kind
from heed_medical.manifests import folder_and_table
from heed_medical.other_layout import other_layout
from heed_medical.pictures.records import read_rows
from heed_medical.reports.settings import Layout, ReportData
from heed_medical.splits import SPLIT_NAMES, SPLITS

_TEXTS = ("report", "text", "caption")
_PICTURES = ("image", "image_path", "file", "path", "filename")
_NAMES = ("id", "study", "study_id", "name")
_PATIENTS = ("patient", "subject_id")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Pictures of a patient and the report about them."""

    name: str
    """Unique; may hold `/`."""
    pictures: tuple[Path, ...]
    report: str | None
    """As written; None: to be written."""
    split: str | None = None
    """train, val or test; None: to be drawn."""
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The studies of a data set."""

    layout: Layout
    studies: tuple[Study, ...]
    problems: tuple[str, ...] = ()
    """Entries that are no studies, a line each."""
    left_out: int = 0
    """Reports without the wanted sections, or without a picture, as raw collections have some."""


def list_studies(root: Path, data: ReportData) -> Listing:
    """All studies of a data set, splits drawn by patient where there are none.

    Of studies with one name the first counts; the others are problems.

    Args:
        root: The folder of the data set, or its table (csv, jsonl).
        data: The settings.

    Raises:
        InputError: The folder or its lists are missing or broken, or hold no study.
    """
    given = root
    root, table = folder_and_table(
        root, data.annotation, option="--data.annotation", layout=data.layout
    )
    if root != given:
        data = replace(data, annotation=table)
    if not root.is_dir():
        raise InputError(
            "is not a folder" if root.exists() else "no such folder",
            path=root,
            remedy="give the folder of the data set, or a csv or jsonl",
        )
    layout = _detect(root, data) if data.layout == "auto" else data.layout
    elsewhere = partial(other_layout, root, data.layout, lambda: _detect(root, data))
    try:
        listing = _LISTERS[layout](root, data)
    except InputError as error:
        raise (elsewhere() or error) from None
    if not listing.studies:
        more = f" (and {len(listing.problems) - 1} more)" if len(listing.problems) > 1 else ""
        first = listing.problems[0] + more if listing.problems else f"{root}: holds no study"
        raise elsewhere() or InputError(first)
    studies, twice = _of_one_name(listing.studies, root)
    return replace(
        listing, studies=_with_splits(studies, data), problems=(*listing.problems, *twice)
    )


def _of_one_name(studies: Sequence[Study], root: Path) -> tuple[list[Study], list[str]]:
    """The first study of each name, and a line for each other one."""
    found: dict[str, Study] = {}
    problems = []
    for study in studies:
        if found.setdefault(study.name, study) is not study:
            fault = f"holds the study {study.name!r} twice"
            problems.append(str(InputError(fault, path=root, remedy="rename or remove one")))
    return list(found.values()), problems


def studies_of(root: Path, data: ReportData, split: str) -> tuple[Study, ...]:
    """The studies of a split.

    Raises:
        InputError: As `list_studies`; an entry is broken and `on_error` is "stop"; the split is
            empty.
    """
    listing = list_studies(root, data)
    if listing.problems and data.on_error == "stop":
        raise InputError(listing.problems[0], remedy="or --data.on-error skip")
    found = tuple(study for study in listing.studies if study.split == split)
    if not found:
        counts = {name: sum(s.split == name for s in listing.studies) for name in SPLITS}
        held = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"holds no study of the split {split} ({held})", path=root)
    return found


def find_inputs(paths: Sequence[Path], *, views: int) -> tuple[Study, ...]:
    """Studies of pictures alone: each file given, and in folders each folder of a few pictures.

    A folder that holds no more pictures than `views` is one study; of a larger one each picture is.

    Raises:
        InputError: A path does not exist, or a folder holds no picture.
    """
    found: list[Study] = []
    for path in paths:
        if not path.exists():
            raise InputError("does not exist", path=path)
        if path.is_dir():
            found += _studies_in(path, views)
        else:
            found.append(Study(name=path.stem, pictures=(path,), report=None))
    return tuple(found)


def _studies_in(root: Path, views: int) -> Iterator[Study]:
    folders: dict[Path, list[Path]] = {}
    for path in files_under(root):
        if file_kind(path) == "picture" or is_dicom(path):
            folders.setdefault(path.parent, []).append(path)
    if not folders:
        raise InputError("holds no picture", path=root, remedy="png, jpg, tif, bmp or DICOM")
    for folder, files in folders.items():
        if len(files) <= views:
            name = root.name if folder == root else folder.relative_to(root).as_posix()
            yield Study(name=name, pictures=tuple(files), report=None)
        else:
            for file in files:
                name = file.relative_to(root).with_suffix("").as_posix()
                yield Study(name=name, pictures=(file,), report=None)


def _detect(root: Path, data: ReportData) -> Layout:
    if data.annotation:
        return "r2gen" if data.annotation.endswith(".json") else "table"
    signs: dict[str, Layout] = {
        "annotation.json": "r2gen",
        "ecgen-radiology": "openi",
        "indiana_reports.csv": "kaggle",
        "mimic-cxr-2.0.0-split.csv*": "mimic",
        "*.csv": "table",
        "*.jsonl": "table",
    }
    for pattern, layout in signs.items():
        if any(root.glob(pattern)):
            return layout
    raise InputError(
        "is in no layout that is known: neither annotation.json, ecgen-radiology/, "
        "indiana_reports.csv, mimic-cxr-2.0.0-split.csv nor a csv or jsonl",
        path=root,
        remedy="see the layouts in `info ivgn`",
    )


def _with_splits(studies: Sequence[Study], data: ReportData) -> tuple[Study, ...]:
    """Draw the splits that are missing, by patient; what the data give stays.

    Patients of a given split are not drawn into another one.
    """
    given = {study.split for study in studies if study.split}
    openly = [study for study in studies if study.split is None]
    shares = {"test": data.test_share, "val": data.val_share}
    if openly:
        shares = {split: share for split, share in shares.items() if split not in given}
    elif "train" in given and "val" not in given:
        openly = [study for study in studies if study.split == "train"]
        shares.pop("test")
    else:
        return tuple(studies)
    chosen = {study.name for study in openly}
    taken = {_patient(study): study.split for study in studies if study.name not in chosen}
    patients = sorted({_patient(study) for study in openly} - set(taken))
    order = np.random.default_rng(data.split_seed).permutation(len(patients))
    drawn: dict[str, str] = {}
    start = 0
    for split, share in shares.items():
        count = max(1, round(share * len(patients))) if len(patients) > len(shares) else 0
        drawn |= {patients[number]: split for number in order[start : start + count]}
        start += count

    def split_of(study: Study) -> str:
        return taken.get(_patient(study)) or drawn.get(_patient(study), "train")

    return tuple(
        replace(study, split=split_of(study)) if study.name in chosen else study
        for study in studies
    )


def _patient(study: Study) -> str:
    return study.patient or study.name


def _folder(root: Path, data: ReportData, *usual: str) -> Path:
    """The folder of pictures: the one that is named, or the first of the usual ones."""
    if data.images:
        return root / data.images
    return next((root / name for name in usual if (root / name).is_dir()), root)


def _r2gen(root: Path, data: ReportData) -> Listing:
    """The annotation json of R2Gen: split -> list of id, report, image_path."""
    path = root / (data.annotation or "annotation.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="see --data.annotation") from None
    except (ValueError, OSError) as error:
        raise InputError(f"is not readable json ({error})", path=path) from None
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise InputError("is not a json of the lists train, val and test", path=path)
    if unknown := [key for key in content if key not in SPLITS]:
        raise InputError(
            f"has the unknown split {unknown[0]!r}; its keys are {', '.join(map(repr, content))}",
            path=path,
            remedy="rename it to train, val or test",
        )
    images = _folder(root, data, "images")
    studies, problems = [], []
    for split, entries in content.items():
        for number, entry in enumerate(entries):
            try:
                studies.append(_annotated(entry, split, images, path, f"{split}[{number}]"))
            except InputError as error:
                problems.append(str(error))
    return Listing(layout="r2gen", studies=tuple(studies), problems=tuple(problems))


def _annotated(entry: Any, split: str, images: Path, path: Path, place: str) -> Study:
    if not isinstance(entry, dict):
        raise InputError("is not an entry with id, report and image_path", path=path, place=place)
    for key, kinds in (("id", (str, int)), ("report", (str,)), ("image_path", (list, str))):
        if not isinstance(entry.get(key), kinds):
            raise InputError(f"has no {key}", path=path, place=place)
    names = entry["image_path"]
    names = [names] if isinstance(names, str) else names
    if not names:
        raise InputError(f"{entry['id']} has no picture", path=path, place=place)
    return Study(
        name=str(entry["id"]),
        pictures=tuple(images / str(name) for name in names),
        report=entry["report"],
        split=split,
        patient=str(entry.get("subject_id", "")),
    )


def _table(root: Path, data: ReportData) -> Listing:
    """A csv or jsonl with a row per picture; rows of one study share its id."""
    table = read_rows(_table_path(root, data), lenient=True)
    text, picture = table.need(*_TEXTS), table.need(*_PICTURES)
    name_of, split_of = table.column(_NAMES), table.column(("split",))
    patient_of = table.column(_PATIENTS)
    images = _folder(root, data)
    studies: dict[str, Study] = {}
    problems = list(table.problems)
    for place, row in table.numbered():
        file, report = row[picture], row[text]
        told = row[split_of] if split_of else ""
        split = SPLIT_NAMES.get(told.lower())
        if not file or (told and split is None):
            fault = f"has the unknown split {told!r}" if file else f"has no {picture}"
            problems.append(str(InputError(fault, place=place)))
            continue
        name = row[name_of] if name_of else Path(file).with_suffix("").as_posix()
        study = Study(
            name=name,
            pictures=(images / file,),
            report=report,
            split=split,
            patient=row[patient_of] if patient_of else "",
        )
        before = studies.get(name)
        if before is not None and (before.report, before.split) != (report, split):
            fault = f"the study {name!r} has another report or split in an earlier row"
            problems.append(str(InputError(fault, place=place)))
        elif before is not None:
            studies[name] = replace(before, pictures=(*before.pictures, *study.pictures))
        else:
            studies[name] = study
    return Listing(layout="table", studies=tuple(studies.values()), problems=tuple(problems))


def _table_path(root: Path, data: ReportData) -> Path:
    if data.annotation:
        return root / data.annotation
    found = sorted([*root.glob("*.csv"), *root.glob("*.jsonl")])
    if len(found) != 1:
        raise InputError(
            f"holds {len(found)} tables", path=root, remedy="name the table with --data.annotation"
        )
    return found[0]


def _join(sections: Mapping[Any, str], data: ReportData) -> str:
    return " ".join(sections[name] for name in data.sections if sections.get(name))


def _by_number(number: int) -> str:
    """The split of a raw report of Indiana: by the last digit of its number."""
    return {0: "test", 1: "val"}.get(number % 10, "train")


def _openi(root: Path, data: ReportData) -> Listing:
    """The XML files of Open-i, numbered; pictures are named by `parentImage`."""
    files = sorted((root / "ecgen-radiology").glob("*.xml"))
    images = _folder(root, data, "NLMCXR_png", "images")
    studies: list[Study] = []
    problems, left_out = [], 0
    for path in sorted(files, key=lambda p: (len(p.stem), p.stem)):
        try:
            tree = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError) as error:
            problems.append(str(InputError(f"is not readable XML ({error})", path=path)))
            continue
        texts = {
            str(node.get("Label", "")).lower(): (node.text or "").strip()
            for node in tree.iter("AbstractText")
        }
        report = _join(texts, data)
        names = tuple(str(node.get("id")) for node in tree.iter("parentImage"))
        if not report or (not names and data.pictures == "needed"):
            left_out += 1
            continue
        number = int(path.stem) if path.stem.isdigit() else len(studies)
        studies.append(
            Study(
                name=path.stem,
                pictures=tuple(images / f"{name}.png" for name in names),
                report=report,
                split=_by_number(number),
            )
        )
    return Listing(
        layout="openi", studies=tuple(studies), problems=tuple(problems), left_out=left_out
    )


def _kaggle(root: Path, data: ReportData) -> Listing:
    """The tables of Kaggle's copy of Open-i; frontal pictures come first."""
    images = _folder(root, data, "images/images_normalized", "images_normalized", "images")
    views = read_rows(root / "indiana_projections.csv", lenient=True)
    reports = read_rows(root / "indiana_reports.csv", lenient=True)
    problems = [*views.problems, *reports.problems]
    pictures: dict[str, list[tuple[bool, str]]] = {}
    for place, row in views.numbered():
        if not row.get("uid") or not row.get("filename"):
            problems.append(str(InputError("has no uid or filename", place=place)))
            continue
        lateral = row.get("projection", "").lower() != "frontal"
        pictures.setdefault(row["uid"], []).append((lateral, row["filename"]))
    studies, left_out = [], 0
    for place, row in reports.numbered():
        uid = row.get("uid", "")
        if not uid.isdigit():
            problems.append(str(InputError("has no uid that is a number", place=place)))
            continue
        report = _join({name: row.get(name, "") for name in data.sections}, data)
        files = tuple(images / name for _, name in sorted(pictures.get(uid, [])))
        if not report or not (files or data.pictures == "ignored"):
            left_out += 1
            continue
        split = _by_number(int(uid))
        studies.append(Study(name=uid, pictures=files, report=report, split=split))
    return Listing(
        layout="kaggle", studies=tuple(studies), problems=tuple(problems), left_out=left_out
    )


_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z ]{3,}):", re.MULTILINE)


def report_sections(text: str) -> dict[str, str]:
    r"""The parts of a MIMIC-CXR report by their headings in lower case.

    Example:
        >>> report_sections("EXAM: x\n FINDINGS:  Clear lungs.\n\n IMPRESSION: Normal.")
        {'exam': 'x', 'findings': 'Clear lungs.', 'impression': 'Normal.'}
    """
    marks = list(_HEADING.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return {
        mark.group(1).lower(): text[mark.end() : end].strip()
        for mark, end in zip(marks, ends, strict=False)
    }


def _mimic(root: Path, data: ReportData) -> Listing:
    """MIMIC-CXR-JPG: a study per picture, as R2Gen has it, with the official split."""
    tables = sorted(root.glob("mimic-cxr-2.0.0-split.csv*"))
    if not tables:
        raise InputError("has no mimic-cxr-2.0.0-split.csv", path=root)
    files = _folder(root, data, "files")
    table = read_rows(tables[0], lenient=True)
    columns = [table.need(name) for name in ("subject_id", "study_id", "dicom_id", "split")]
    texts: dict[Path, str] = {}
    studies, problems, left_out = [], list(table.problems), 0
    for place, row in table.numbered():
        patient, exam, picture, told = (row[column] for column in columns)
        split = SPLIT_NAMES.get(told.lower())
        if not (patient and exam and picture) or split is None:
            fault = f"has the unknown split {told!r}" if split is None else "lacks one of its ids"
            problems.append(str(InputError(fault, place=place)))
            continue
        folder = files / f"p{patient[:2]}" / f"p{patient}"
        note = folder / f"s{exam}.txt"
        if note not in texts:
            try:
                text = note.read_text(encoding="utf-8", errors="replace")
            except OSError:
                problems.append(str(InputError("the report is missing", path=note)))
                text = ""
            texts[note] = _join(report_sections(text), data)
        left_out += not texts[note]
        if texts[note]:
            studies.append(
                Study(
                    name=f"p{patient}/s{exam}/{picture}",
                    pictures=(folder / f"s{exam}" / f"{picture}.jpg",),
                    report=texts[note],
                    split=split,
                    patient=patient,
                )
            )
    return Listing(
        layout="mimic", studies=tuple(studies), problems=tuple(problems), left_out=left_out
    )


_LISTERS: Mapping[str, Callable[[Path, ReportData], Listing]] = {
    "r2gen": _r2gen,
    "table": _table,
    "openi": _openi,
    "kaggle": _kaggle,
    "mimic": _mimic,
}
