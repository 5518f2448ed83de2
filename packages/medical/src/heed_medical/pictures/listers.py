"""One function per layout: the pictures that a data set lists, and what is wrong with its lists.

A function gives pictures and problems (a line each); a file that cannot be read at all raises
`InputError`. Splits that a layout does not have are None here.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.dicom import is_dicom
from heed_medical.images import PICTURE_SUFFIXES
from heed_medical.manifests import folder_and_table
from heed_medical.pictures.findings import finding_value
from heed_medical.pictures.records import PictureFile, Rows, plain_or_packed, read_rows
from heed_medical.pictures.settings import PictureData, parse_only
from heed_medical.splits import SPLIT_NAMES, in_several_splits


class Found(NamedTuple):
    """What a layout lists."""

    pictures: list[PictureFile]
    problems: list[str]
    left_out: Sequence[str] = ()
    """A line for each reason for which the settings leave pictures out."""


FILE_COLUMNS = ("file", "path", "image", "filename", "image_path", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "diagnosis")
PATIENT_COLUMNS = ("patient", "patient_id", "patientid", "subject", "subject_id")
CHEXPERT_FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""In CheXpert's order; MIMIC has them in the order of the alphabet: read them by name."""

_FIRST_TABLES = ("labels.csv", "manifest.csv", "manifest.jsonl", "cases.csv")
_CHEXPERT_SPLITS = (("train.csv", "train"), ("valid.csv", "test"))
RSNA_BOXES, _RSNA_CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
RSNA_CLASS = "class"
"""The label of RSNA by which its detailed classes are read."""
_MIMIC = "mimic-cxr-2.0.0-{}.csv"
_LABELLERS = ("chexpert", "negbio")
"""Of MIMIC-CXR-JPG; the first that is there is read where none is named."""
_FRONTAL = {"PA", "AP"}


TABLE_OPTION = "--data.table"


def is_picture(path: Path) -> bool:
    """Whether a file is a picture or DICOM by its name (and its mark, where it has no suffix)."""
    if path.name.startswith("."):
        return False
    return path.suffix.lower() in PICTURE_SUFFIXES or is_dicom(path)


def find_table(root: Path, name: str = "") -> Rows | None:
    """The table of a folder that names pictures: the one called `name`, or the first there is.

    Where `root` is a table itself, it is this one.
    """
    root, name = folder_and_table(root, name, option=TABLE_OPTION)
    if name:
        return read_rows(root / name, lenient=True)
    return next((rows for rows in _tables(root) if rows.column(FILE_COLUMNS)), None)


def _tables(root: Path) -> Iterator[Rows]:
    paths = [p for s in ("*.csv", "*.csv.gz", "*.jsonl") for p in sorted(root.glob(s))]
    paths.sort(key=lambda p: _FIRST_TABLES.index(p.name) if p.name in _FIRST_TABLES else 9)
    for path in paths:
        if not path.name.startswith("."):
            yield read_rows(path, lenient=True)


def other_table(root: Path) -> str:
    """Why the first table of a folder names no pictures, in brackets; empty: there is none."""
    rows = next(_tables(root), None)
    return "" if rows is None else f" ({rows.path.name} has no column of files; {rows.header})"


def list_table(root: Path, data: PictureData) -> Found:
    """A csv or jsonl: a column with files, one with labels, optionally split, patient, source."""
    table = find_table(root, data.table)
    if table is None:
        raise InputError(
            f"holds no csv or jsonl with a column of files{other_table(root)}",
            path=root,
            remedy=f"name the column one of {', '.join(FILE_COLUMNS)}",
        )
    file = table.need(*FILE_COLUMNS)
    label = None if data.findings else table.need(*_label_columns(data))
    findings = _finding_columns(table, data)
    patient, source = table.column(PATIENT_COLUMNS), table.column(("source",))
    split = table.column(("split",))
    wanted = _conditions(table, data)
    pictures, problems = [], list(table.problems)
    for place, row in table.numbered():
        if any(row[column] not in values for column, values in wanted.items()):
            continue
        if not row[file]:
            problems.append(f"{place}: names no file; add it or remove the row")
            continue
        if label is not None and not row[label]:
            problems.append(f"{place}: has no {label}; fill it in or remove the row")
            continue
        part = row[split].lower() if split else ""
        if split and part not in SPLIT_NAMES:
            problems.append(f"{place}: has split {row[split]!r}; use train, val or test")
            continue
        pictures.append(
            PictureFile(
                name=_stem(row[file]),
                path=root / row[file],
                label=None if label is None else row[label],
                split=SPLIT_NAMES.get(part),
                patient=row[patient] if patient else "",
                source=row[source] if source else "",
                place=place,
                columns=dict(row) | {name: row[column] for name, column in findings.items()},
            )
        )
    return Found(pictures, problems)


def _finding_columns(table: Rows, data: PictureData) -> dict[str, str]:
    """The wanted findings, and the columns that hold them."""
    return {name: table.need(name) for name in data.findings}


def _label_columns(data: PictureData) -> tuple[str, ...]:
    return (data.label,) if data.label else LABEL_COLUMNS


def _conditions(table: Rows, data: PictureData) -> Mapping[str, set[str]]:
    wanted = {}
    for column, values in parse_only(data.only).items():
        name = table.need(column)
        present = {row[name] for row in table.rows}
        if not values & present:
            raise InputError(
                f"no row has {column} = {' or '.join(sorted(values))}",
                path=table.path,
                remedy=f"its values are {', '.join(sorted(present)[:12])}",
            )
        wanted[name] = values
    return wanted


def _stem(text: str) -> str:
    """The name of a picture: its file as a list names it, without suffix, inside a folder."""
    path = Path(text)
    stem = path.with_suffix("") if path.suffix.lower() in (*PICTURE_SUFFIXES, ".dcm") else path
    return "/".join(part for part in stem.parts if part not in ("/", ".."))


def list_covidx(root: Path, data: PictureData) -> Found:
    """COVIDx: `<split>_COVIDx*.txt` with `patient file label source`, read from the right.

    A patient's id may hold spaces, as those of the source `sirm` do.
    """
    pictures, problems = [], []
    for path in _chosen_lists(root, data.table):
        split = SPLIT_NAMES.get(path.name.split("_")[0].lower())
        if split is None:
            problems.append(f"{path}: has no split in its name; call it train_... or test_...")
            continue
        lines = _lines(path)
        if not any(line.strip() for line in lines):
            problems.append(f"{path}: lists no picture")
        for number, line in enumerate(lines, start=1):
            place = f"{path}, row {number}"
            fields = line.split()
            if not fields:
                continue
            if len(fields) < 4:
                problems.append(
                    f"{place}: has {len(fields)} fields; patient, file, label and source are needed"
                )
                continue
            *patient, file, label, source = fields
            folder = path.name.split("_")[0]
            pictures.append(
                PictureFile(
                    name=f"{folder}/{_stem(file)}",
                    path=root / folder / file,
                    label=label,
                    split=split,
                    patient=" ".join(patient),
                    source=source,
                    place=place,
                )
            )
    return Found(pictures, problems)


def covidx_lists(root: Path, table: str = "") -> list[Path]:
    """The lists of COVIDx in a folder; with `table` those that end as it does, as in 9B."""
    lists = sorted(root.glob("*_COVIDx*.txt"))
    return [path for path in lists if not table or _ending(path.name) == _ending(table)]


def _ending(name: str) -> str:
    return name.removesuffix(".txt").rpartition("COVIDx")[2].lstrip("_")


def _chosen_lists(root: Path, table: str) -> Sequence[Path]:
    lists = covidx_lists(root)
    names = ", ".join(path.name for path in lists)
    if table:
        if not (chosen := covidx_lists(root, table)):
            raise InputError(
                f"has no lists {table!r}",
                path=root,
                remedy=f"its lists are {names}" if lists else "see --data.layout",
            )
        return chosen
    most = Counter(path.name.split("_")[0].lower() for path in lists)
    if max(most.values(), default=0) > 1:
        raise InputError(
            f"has several lists of a split ({names})",
            path=root,
            remedy=f"choose with --data.table, as in --data.table {_ending(lists[-1].name)}",
        )
    return lists


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot be read as text ({error})", path=path) from None


def list_rsna(root: Path, data: PictureData) -> Found:
    """RSNA Pneumonia: a picture is positive if any of its rows has the target 1.

    With the label `class` it is of one of the three classes of stage_2_detailed_class_info.csv.
    """
    detailed = data.label == RSNA_CLASS
    labels, problems = (_rsna_classes if detailed else _rsna_targets)(root)
    pictures = [
        PictureFile(
            name=name,
            path=root / "stage_2_train_images" / f"{name}.dcm",
            label=label,
            patient=name,
            place=place,
        )
        for name, (label, place) in labels.items()
    ]
    return Found(pictures, problems)


def _rsna_targets(root: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Patient -> positive or negative, and the place of the first row; what is wrong, a line each.

    A patient has a row per box.
    """
    table = read_rows(root / RSNA_BOXES, lenient=True)
    patient, target = table.need("patientId"), table.need("Target")
    found: dict[str, tuple[str, str]] = {}
    problems = list(table.problems)
    for place, row in table.numbered():
        name = row[patient]
        if not name or row[target] not in {"0", "1"}:
            wrong = f"the target {row[target]!r}, 0 or 1 was expected" if name else "no patientId"
            problems.append(f"{place}: has {wrong}")
            continue
        label, first = found.get(name, ("negative", place))
        found[name] = ("positive" if row[target] == "1" else label, first)
    return found, problems


def _rsna_classes(root: Path) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """As `_rsna_targets`, with the class; a patient whose rows disagree is left out."""
    table = read_rows(root / _RSNA_CLASSES, lenient=True)
    patient, column = table.need("patientId"), table.need(RSNA_CLASS)
    found: dict[str, tuple[str, str]] = {}
    problems = list(table.problems)
    unlike: set[str] = set()
    for place, row in table.numbered():
        name, label = row[patient], row[column]
        if not name or not label:
            problems.append(f"{place}: has no {column if name else patient}; fill it in")
            continue
        before, _ = found.setdefault(name, (label, place))
        if before != label:
            unlike.add(name)
            problems.append(
                f"{place}: has the class {label!r} of {name}, in an earlier row it is {before!r}"
            )
    return {name: value for name, value in found.items() if name not in unlike}, problems


def list_chexpert(root: Path, data: PictureData) -> Found:
    """CheXpert: train.csv, and valid.csv as the test (both also .gz); the finding is the label."""
    pictures: list[PictureFile] = []
    problems: list[str] = []
    lost: dict[str, list[str]] = defaultdict(list)
    for name, split in _CHEXPERT_SPLITS:
        file = plain_or_packed(root / name)
        if name == "valid.csv" and not file.is_file():
            continue
        table = read_rows(file, lenient=True)
        problems += table.problems
        path, finding = table.need("Path"), table.need(finding_of(data))
        findings = _finding_columns(table, data)
        view = table.column(("Frontal/Lateral",))
        for place, row in table.numbered():
            picture = _chexpert_file(root, row[path])
            stem = _stem(str(picture.relative_to(root)))
            if data.views == "frontal" and view and row[view] != "Frontal":
                lost[_NOT_FRONTAL].append(stem)
                continue
            label = _finding_label(row[finding], data)
            if label is None:
                lost[_unsure(row[finding], data)].append(stem)
                continue
            if label == "":
                problems.append(f"{place}: has {finding} = {row[finding]!r}, use 1, 0, -1 or blank")
                continue
            patient = next((p for p in Path(row[path]).parts if p.startswith("patient")), "")
            pictures.append(
                PictureFile(
                    name=stem,
                    path=picture,
                    label=None if data.findings else label,
                    split=None if split == "train" else split,
                    patient=patient,
                    place=place,
                    columns=dict(row) | {name: row[column] for name, column in findings.items()},
                )
            )
    return Found(pictures, problems, _lines_of(root, lost))


def _chexpert_file(root: Path, text: str) -> Path:
    """Paths start with the name of the release's folder, whatever it is called here."""
    parts = Path(text).parts
    return root / Path(*parts[1:]) if parts and parts[0].startswith("CheXpert") else root / text


def finding_of(data: PictureData) -> str:
    """The finding of CheXpert or MIMIC that decides the class; the first of several."""
    return data.findings[0] if data.findings else data.label or "Pneumonia"


def _finding_label(value: str, data: PictureData) -> str | None:
    """The class of a finding's value; None: to be left out; empty: not a value.

    Of several findings none leaves a picture out: their values are looked at one by one later.
    """
    if data.findings:
        return "several"
    try:
        return finding_value(value, finding_of(data), data)
    except ValueError:
        return ""


def mimic_labels(root: Path, table: str = "") -> Path | None:
    """The labels of MIMIC-CXR-JPG in a folder: of the labeller that `table` names, or the first.

    Args:
        root: The folder.
        table: chexpert or negbio, or the name of a file of theirs; empty: chexpert where it is
            there.

    Returns:
        The file; None where there is none.
    """
    for labeller in _LABELLERS:
        path = plain_or_packed(root / _MIMIC.format(labeller))
        named = table in ("", labeller, path.name, _MIMIC.format(labeller))
        if named and path.is_file():
            return path
    return None


def list_mimic(root: Path, data: PictureData) -> Found:
    """MIMIC-CXR-JPG: labels of studies, split and view of pictures, joined by their ids."""
    path = mimic_labels(root, data.table)
    if path is None:
        names = ", ".join(_MIMIC.format(name) for name in _LABELLERS)
        raise InputError(
            f"has no labels of {data.table}" if data.table else "has no labels",
            path=root,
            remedy=f"add one of {names} (or .gz)",
        )
    labels = read_rows(path, lenient=True)
    split_rows, views = _mimic_table(root, "split"), _mimic_table(root, "metadata")
    finding, study = labels.need(finding_of(data)), labels.need("study_id")
    view_of = {row[views.need("dicom_id")]: row for row in views.rows}
    view = views.need("ViewPosition")
    findings = _finding_columns(labels, data)
    by_study = {row[study]: (place, row) for place, row in labels.numbered()}
    columns = [split_rows.need(n) for n in ("dicom_id", "study_id", "subject_id", "split")]
    pictures = []
    problems = [*labels.problems, *split_rows.problems, *views.problems]
    lost: dict[str, list[str]] = defaultdict(list)
    for place, row in split_rows.numbered():
        dicom, number, subject, split = (row[c] for c in columns)
        if data.views == "frontal" and view_of.get(dicom, {}).get(view) not in _FRONTAL:
            lost[_NOT_FRONTAL].append(dicom)
            continue
        if number not in by_study:  # a report in which the labeller found nothing
            lost["{their} study has no row of labels"].append(dicom)
            continue
        label_place, labelled = by_study[number]
        value = labelled[finding]
        label = _finding_label(value, data)
        if label is None:
            lost[_unsure(value, data)].append(dicom)
            continue
        if label == "" or split.lower() not in SPLIT_NAMES:
            wrong = f"split {split!r}" if label else f"{finding} = {value!r}"
            problems.append(f"{place if label else label_place}: has {wrong}; correct it")
            continue
        folder = Path("files", f"p{subject[:2]}", f"p{subject}", f"s{number}")
        pictures.append(
            PictureFile(
                name=str(folder / dicom),
                path=root / folder / f"{dicom}.jpg",
                label=None if data.findings else label,
                split=SPLIT_NAMES[split.lower()],
                patient=subject,
                place=label_place if data.findings else place,
                columns=dict(row) | {name: labelled[column] for name, column in findings.items()},
            )
        )
    return Found(pictures, problems, _lines_of(root, lost))


_NOT_FRONTAL = "{their} view is not frontal (--data.views frontal)"


def _unsure(value: str, data: PictureData) -> str:
    """Why a finding of this value leaves a picture out."""
    if value == "":
        return f"{finding_of(data)} is not mentioned (--data.blank {data.blank})"
    return f"{finding_of(data)} is uncertain (--data.uncertain {data.uncertain})"


def _lines_of(root: Path, lost: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each reason, with the number of pictures and the first of them."""
    lines = []
    for reason, names in lost.items():
        one = len(names) == 1
        shown = ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])
        lines.append(
            f"{root}: {len(names)} picture{'s' * (not one)} {'is' if one else 'are'} left out "
            f"because {reason.format(their='its' if one else 'their')}: {shown}"
        )
    return lines


_NAMED = 3


def _mimic_table(root: Path, part: str) -> Rows:
    return read_rows(plain_or_packed(root / _MIMIC.format(part)), lenient=True)


def list_folders(root: Path, data: PictureData) -> Found:
    """A folder per class, under a folder per split or on its own."""
    parts: dict[str, str | None] = {
        p.name: SPLIT_NAMES[p.name.lower()] for p in _folders(root) if _is_split(p)
    }
    pictures = []
    for above, split in (parts or {"": None}).items():
        for folder in _folders(root / above):
            pictures += [
                PictureFile(
                    name=str(path.relative_to(root).with_suffix("")),
                    path=path,
                    label=folder.name,
                    split=split,
                )
                for path in files_under(folder)
                if is_picture(path)
            ]
    return Found(pictures, [])


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_split(path: Path) -> bool:
    return path.name.lower() in SPLIT_NAMES


LISTERS: Mapping[str, Callable[[Path, PictureData], Found]] = {
    "table": list_table,
    "covidx": list_covidx,
    "rsna": list_rsna,
    "chexpert": list_chexpert,
    "mimic": list_mimic,
    "folders": list_folders,
}


def patients_in_several_splits(pictures: Iterable[PictureFile]) -> dict[str, tuple[str, ...]]:
    """Patients whose pictures lie in more than one split -> these splits."""
    return in_several_splits((picture.patient, picture.split) for picture in pictures)
