"""Studies: what belongs together of X-ray, ECG and report, and how it is found and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from heed_core.errors import InputError
from heed_core.folders import files_under, unique_names
from heed_medical.ecg.ptbxl import DATABASE, SUPERCLASSES, list_ptbxl
from heed_medical.ecg.reading import read_ecg
from heed_medical.ecg.signals import prepare_ecg
from heed_medical.images import PICTURE_SUFFIXES
from heed_medical.more.network import MODALITIES, MoreConfig
from heed_medical.more.prompts import with_prompt_file
from heed_medical.more.settings import CHEXPERT, MoreData
from heed_medical.pictures.findings import finding_label
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical.pictures.records import Rows, read_rows
from heed_medical.splits import SPLIT_NAMES, SPLITS, in_several_splits

MANIFESTS = ("manifest.csv", "manifest.jsonl", "labels.csv")
TABLE_SUFFIXES = (".csv", ".gz", ".jsonl", ".ndjson")
_TEST_SHARE = 0.2
GREY_MEAN, GREY_STD = 0.499, 0.293
"""Of X-rays within 0..1, by which they are standardised."""

_COLUMNS = {
    "xray": ("xray_path", "xray", "image", "image_path", "file"),
    "ecg": ("ecg_path", "ecg", "record"),
    "xray_report": ("xray_report", "report", "text", "findings"),
    "ecg_report": ("ecg_report",),
    "subject": ("subject_id", "subject", "patient_id", "patient"),
    "split": ("split",),
    "name": ("name", "study_id", "id"),
}


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """One study as a table names it; what it does not have is None or empty."""

    name: str
    xray: Path | None = None
    ecg: Path | None = None
    report: tuple[str, str] = ("", "")
    """Of the X-ray and of the ECG."""
    subject: str = ""
    """Empty: not named."""
    split: str = ""
    labels: Mapping[str, int | None] = field(default_factory=dict)
    """Finding -> 1 present, 0 absent, None not known."""
    cells: Mapping[str, str] = field(default_factory=dict)
    """Finding -> what the table says: 1, 0, -1 (uncertain) or nothing."""
    place: str = ""
    """File and row, for messages."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it has."""
        has = {"xray": self.xray, "ecg": self.ecg, "text": any(self.report)}
        return tuple(name for name in MODALITIES if has[name])

    @property
    def uncertain(self) -> tuple[str, ...]:
        """Its findings that the table calls uncertain, whatever they count as."""
        return tuple(name for name, cell in self.cells.items() if cell and float(cell) == -1)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One study, read."""

    name: str
    xray: Float32[np.ndarray, "h w"] | None = None
    """Standardised."""
    ecg: Float32[np.ndarray, "12 n"] | None = None
    """100 Hz, each lead within -1..1."""
    text: tuple[str, str] | None = None
    """The reports of the X-ray and of the ECG, cleaned and introduced."""
    file: StudyFile

    def of(self, modality: str) -> object:
        """What it has of a modality."""
        return getattr(self, modality)


@dataclass(frozen=True, kw_only=True)
class StudyListing:
    """The studies of a data set, splits settled."""

    studies: tuple[StudyFile, ...]
    problems: tuple[str, ...] = ()
    """A line for each row that cannot be used; its study is left out."""
    drawn: tuple[str, ...] = ()
    """The splits that were drawn by subject because the data do not give them."""


def list_studies(root: Path, data: MoreData) -> StudyListing:
    """The studies of a folder (PTB-XL, or with a manifest) or of a manifest.

    Raises:
        InputError: There is no table, it cannot be read, or it has no study.
    """
    if not root.exists():
        raise InputError("does not exist", path=root)
    if (root / DATABASE).is_file() and data.manifest is None:
        found, problems = _ptbxl(root, data)
    else:
        found, problems = _of_manifest(manifest_of(root, data), data)
    wanted = [_wanted(study, data) for study in found]
    if not wanted:
        raise InputError(problems[0]) if problems else InputError("has no study", path=root)
    settled, drawn = _with_splits(wanted, data)
    return StudyListing(studies=tuple(settled), problems=tuple(problems), drawn=drawn)


def find_studies(root: Path, data: MoreData, split: str | None = None) -> list[StudyFile]:
    """The studies of one split or of all.

    Raises:
        InputError: As `list_studies`; none of the split; a row that cannot be used, unless
            `data.on_error` is "skip".
    """
    listing = list_studies(root, data)
    problems = list(listing.problems)
    if split is not None:
        problems += unknown_splits(listing.studies)
    if problems and data.on_error == "stop":
        more = len(problems) - 1
        raise InputError(problems[0] + (f" (and {more} more such rows)" if more else ""))
    wanted = [study for study in listing.studies if split is None or study.split == split]
    if not wanted:
        raise InputError(f"has no study of the split {split!r}", path=root)
    return wanted


def broken_rows(root: Path, data: MoreData) -> tuple[str, ...]:
    """What `find_studies` leaves out of the splits with `on_error="skip"`, a line each."""
    listing = list_studies(root, data)
    return (*listing.problems, *unknown_splits(listing.studies))


def unknown_splits(studies: Sequence[StudyFile]) -> list[str]:
    """A line for each study whose split is none."""
    return [
        f"{study.place}: split {study.split!r} is none of {', '.join(SPLITS)}"
        for study in studies
        if study.split not in SPLITS
    ]


def _with_splits(
    studies: Sequence[StudyFile], data: MoreData
) -> tuple[list[StudyFile], tuple[str, ...]]:
    """Draw the splits by subject where there are none, or the validation where it is missing."""
    given = {study.split for study in studies}
    if given == {""}:
        shares = {"test": _TEST_SHARE, "val": data.val_share}
        return draw_splits(studies, shares, data.split_seed), SPLITS
    if "train" not in given or "val" in given:
        return list(studies), ()
    train = [study for study in studies if study.split == "train"]
    elsewhere = {study.subject for study in studies if study.split != "train"} - {""}
    openly = [study for study in train if study.subject not in elsewhere]
    if len({study.subject or study.name for study in openly}) < 2:
        return list(studies), ()
    drawn = draw_splits(openly, {"val": data.val_share}, data.split_seed)
    split_of = {study.name: study.split for study in drawn}
    settled = [replace(study, split=split_of.get(study.name, study.split)) for study in studies]
    return settled, ("val",)


def draw_splits(
    studies: Sequence[StudyFile], shares: Mapping[str, float], seed: int
) -> list[StudyFile]:
    """Give each split its share of the subjects, at least one; the others are for training."""
    subjects = sorted({study.subject or study.name for study in studies})
    order = np.random.default_rng(seed).permutation(len(subjects))
    split_of: dict[str, str] = {}
    for split, share in shares.items():
        count = max(1, round(share * len(subjects)))
        start = len(split_of)
        split_of |= {subjects[number]: split for number in order[start : start + count]}
    return [
        replace(study, split=split_of.get(study.subject or study.name, "train"))
        for study in studies
    ]


def manifest_of(root: Path, data: MoreData) -> Path:
    """The table of a data set.

    Raises:
        InputError: There is none.
    """
    if data.manifest is not None:
        return data.manifest
    if root.is_file():
        return root
    for name in MANIFESTS:
        if (root / name).is_file():
            return root / name
    raise InputError(
        f"holds none of {', '.join(MANIFESTS)} and no {DATABASE}",
        path=root,
        remedy="give a manifest with --data.manifest",
    )


def find_inputs(paths: Sequence[Path], data: MoreData) -> list[StudyFile]:
    """The studies in files and folders; a picture, record or text file alone is one study.

    Raises:
        InputError: A path that is none of these, or a folder that holds none.
    """
    found: list[StudyFile] = []
    places: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError("does not exist", path=path)
        if _is_list(path):
            listed = find_studies(path, replace(data, manifest=None))
            found += listed
            places += [path] * len(listed)
        elif path.is_dir():
            inside = [p for p in files_under(path) if _kind(p)]
            if not inside:
                raise InputError("holds no pictures, ECG records or texts", path=path)
            found += [_alone(p, p.relative_to(path)) for p in inside]
            places += inside
        else:
            found.append(_alone(path, Path(path.name)))
            places.append(path)
    names = unique_names([study.name for study in found], places)
    return [replace(study, name=name) for study, name in zip(found, names, strict=True)]


def broken_inputs(paths: Sequence[Path], data: MoreData) -> tuple[str, ...]:
    """What `find_inputs` leaves out with `on_error="skip"`, a line each."""
    alone = replace(data, manifest=None)
    return tuple(
        line for path in paths if _is_list(path) for line in list_studies(path, alone).problems
    )


def _is_list(path: Path) -> bool:
    """Whether a path is a table of studies, or a folder with one."""
    if path.is_dir():
        return any((path / name).is_file() for name in (*MANIFESTS, DATABASE))
    return path.suffix.lower() in TABLE_SUFFIXES


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in (*PICTURE_SUFFIXES, ".dcm", ".dicom"):
        return "xray"
    return {".hea": "ecg", ".txt": "text"}.get(suffix)


def _alone(path: Path, name: Path) -> StudyFile:
    """One file as a study."""
    kind = "ecg" if path.suffix.lower() == ".dat" else _kind(path)
    stem = name.with_suffix("").as_posix()
    if kind == "text":
        try:
            report = path.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise InputError(f"cannot be read as text ({error})", path=path) from None
        if not clean_report(report):
            raise InputError("is an empty report", path=path)
        return StudyFile(name=stem, report=(report, ""), place=str(path))
    if kind == "xray":
        return StudyFile(name=stem, xray=path, place=str(path))
    if kind == "ecg":
        return StudyFile(name=stem, ecg=path, place=str(path))
    raise InputError("is no picture, ECG record (.hea), text or table", path=path)


def _ptbxl(root: Path, data: MoreData) -> tuple[list[StudyFile], list[str]]:
    listing = list_ptbxl(root, rate_hz=data.ptbxl_rate)
    found = [
        StudyFile(
            name=record.path.relative_to(root).as_posix(),
            ecg=record.path,
            report=("", record.report),
            subject=record.patient,
            split=record.split,
            labels={name: int(name in record.superclasses) for name in SUPERCLASSES},
            place=record.place,
        )
        for record in listing.records
    ]
    return found, list(listing.problems)


def _of_manifest(path: Path, data: MoreData) -> tuple[list[StudyFile], list[str]]:
    table = read_rows(path, lenient=True)
    columns = {key: table.column(names) for key, names in _COLUMNS.items()}
    if not any(columns[key] for key in ("xray", "ecg")):
        table.need(*_COLUMNS["xray"][:1], *_COLUMNS["ecg"][:1])
    labels = _label_columns(table, data)
    root = path.parent if data.root is None else data.root
    found, problems = [], list(table.problems)
    for number, (place, row) in enumerate(table.numbered(), start=1):
        cells = {key: row[name] if name else "" for key, name in columns.items()}
        values = {name: row[column] for name, column in labels.items()}
        try:
            known = {name: finding_label(x, name, data, place) for name, x in values.items()}
            study = _study(cells, root, f"row{number}", place)
            found.append(replace(study, labels=known, cells=values))
        except InputError as error:
            problems.append(str(error))
    return _unique(found), problems


def _study(cells: Mapping[str, str], root: Path, name: str, place: str) -> StudyFile:
    """One row of a manifest, without its findings."""
    split = cells["split"].lower()
    study = StudyFile(
        name=cells["name"] or _stem(cells["xray"] or cells["ecg"]) or name,
        xray=root / cells["xray"] if cells["xray"] else None,
        ecg=root / cells["ecg"] if cells["ecg"] else None,
        report=(cells["xray_report"], cells["ecg_report"]),
        subject=cells["subject"],
        split=SPLIT_NAMES.get(split, split),
        place=place,
    )
    if not study.modalities:
        raise InputError("has no X-ray, no ECG and no report", place=place)
    return study


def _label_columns(table: Rows, data: MoreData) -> dict[str, str]:
    if data.labels:
        return {name: table.need(name) for name in data.labels}
    known = {name: table.column([name]) for name in (*CHEXPERT, *SUPERCLASSES)}
    return {name: column for name, column in known.items() if column is not None}


def _wanted(study: StudyFile, data: MoreData) -> StudyFile:
    """The study with the findings that are asked for alone."""
    if lacking := [name for name in data.labels if name not in study.labels]:
        raise InputError(f"has no finding {lacking[0]!r}", place=study.place)
    names = data.labels or tuple(study.labels)
    return replace(study, labels={name: study.labels[name] for name in names})


def _stem(path: str) -> str:
    return Path(path).with_suffix("").as_posix() if path else ""


def _unique(studies: Sequence[StudyFile]) -> list[StudyFile]:
    """Number names that come again, as where one X-ray belongs to several ECGs."""
    taken = {study.name for study in studies}
    seen: set[str] = set()
    found = []
    for study in studies:
        name, again = study.name, 1
        while name in seen or (again > 1 and name in taken):
            again += 1
            name = f"{study.name}-{again}"
        seen.add(name)
        found.append(study if again == 1 else replace(study, name=name))
    return found


def subjects_in_several_splits(studies: Iterable[StudyFile]) -> dict[str, tuple[str, ...]]:
    """Subjects whose studies lie in more than one split -> these splits."""
    return in_several_splits((study.subject, study.split) for study in studies)


def subject_names(studies: Sequence[StudyFile]) -> list[str]:
    """A name for each study, the same for those of one subject; without a subject one of its own.

    Example:
        >>> subject_names([StudyFile(name="a"), StudyFile(name="b", subject="a")])
        ['study 0', 'subject a']
    """
    return [
        f"subject {study.subject}" if study.subject else f"study {number}"
        for number, study in enumerate(studies)
    ]


NO_STATEMENT = "ECG note not available."
"""What a report says of an ECG that has none."""
_CLOCK = re.compile(r"\b(?:[01]?\d|2[0-3]):[0-5]\d|\b\d{1,2} ?(?i:[ap]\.m\.|[ap]m\b)")
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9])|(?:(?<=[a-z]{3}[.!?])|(?<=\d\d[.!?]))\s+(?=[a-z])")
"""Between sentences; reports of ECGs have no capitals. Not behind `Dr.` or `p.m.`."""
_HEADER = re.compile(
    r"\b(?:FINAL REPORT|WET READ)\b:?|\b[A-Z]{4,}(?:,? [A-Z]+)*\s*:|\b(?i:findings|impression)\s*:"
)


def clean_report(text: str) -> str:
    """A report without section headers, underscores and sentences that name a time of day.

    Example:
        >>> clean_report("FINDINGS: Clear lungs. Seen at 10:45 by Dr. ___. No effusion.")
        'Clear lungs. No effusion.'
    """
    text = _HEADER.sub(" ", text).replace("_", "")
    kept = [s for s in _END.split(" ".join(text.split())) if not _CLOCK.search(s)]
    return " ".join(" ".join(kept).split()).strip()


def introduced(report: tuple[str, str], *, with_ecg: bool = False) -> tuple[str, str] | None:
    """Cleaned reports with the words that tell which is which; None where both are empty.

    Args:
        report: Of the X-ray and of the ECG.
        with_ecg: Whether there is an ECG: where a report of the X-ray alone is, it is then said
            that the ECG has none.
    """
    xray, ecg = (clean_report(part) for part in report)
    if not xray and not ecg:
        return None
    if with_ecg and not ecg:
        ecg = NO_STATEMENT
    return (
        f"The report from Xray is: {xray}" if xray else "",
        f"The report from ECG is: {ecg}" if ecg else "",
    )


def prepare_xray(
    grey: Float32[np.ndarray, "h w"], size: tuple[int, int], *, equalise: bool = True
) -> Float32[np.ndarray, "p q"]:
    """The input of the X-ray tower, of a picture within 0..1.

    Resized, its contrast made even and standardised.
    """
    small = np.clip(resize_grey(grey, size), 0.0, 1.0)
    if equalise:
        small = _even_contrast(small)
    return np.asarray((small - GREY_MEAN) / GREY_STD, dtype=np.float32)


def _even_contrast(grey: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """CLAHE in 8 x 8 tiles, near to what the released towers saw; full range in and out.

    They saw `equalize_adapthist` of scikit-image with its limit of 1 %. OpenCV's needs no further
    library and a tenth of the time, but gives what it cuts off to all levels alike: with the
    limit of 2 that comes nearest, pixels of chest X-rays of 224 x 224 are 0.018 away on average
    (0.16 at most), of 512 x 512 0.007.
    """
    import cv2

    levels = np.floor(_full_range(grey) * 252).astype(np.uint8)
    even = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(levels)
    return np.asarray(np.round(_full_range(even.astype(np.float32)) * 255) / 255, dtype=np.float32)


def _full_range(grey: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w"]:
    """From the darkest (0) to the brightest (1); a picture of one grey is 0."""
    low, high = float(grey.min()), float(grey.max())
    return (grey - low) / max(high - low, 1e-6)


@dataclass
class StudySet:
    """Studies that are read when they are asked for; what was prepared stays in memory."""

    files: Sequence[StudyFile]
    data: MoreData
    config: MoreConfig
    apart: Sequence[str] = ()
    """A name for each study; those of the same name must not meet in a batch. Empty: all may."""
    skipped: Sequence[str] = ()
    """What the list left out, a line each."""
    _kept: dict[tuple[str, Path], np.ndarray] = field(default_factory=dict, repr=False)
    _used: int = field(default=0, repr=False)

    @property
    def names(self) -> list[str]:
        """The names of the studies, known before they are read."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Study:
        """Read a study.

        Raises:
            InputError: One of its files cannot be read, or it has nothing that the model takes.
        """
        file = self.files[index]
        wanted = self.config.modalities
        with_ecg = "ecg" in wanted and file.ecg is not None
        study = Study(
            name=file.name,
            xray=self._xray(file.xray) if "xray" in wanted and file.xray else None,
            ecg=self._ecg(file.ecg) if file.ecg and with_ecg else None,
            text=introduced(file.report, with_ecg=with_ecg) if "text" in wanted else None,
            file=file,
        )
        if all(study.of(modality) is None for modality in wanted):
            raise InputError(
                f"has nothing of what the model takes ({', '.join(wanted)})", place=file.place
            )
        return study

    def _xray(self, path: Path) -> np.ndarray:
        key = ("xray", path)
        if key in self._kept:
            return self._kept[key]
        size, equalise = self.config.image_size, self.data.equalise
        return self._keep(key, prepare_xray(read_grey(path), size, equalise=equalise))

    def _ecg(self, path: Path) -> np.ndarray:
        key = ("ecg", path)
        if key in self._kept:
            return self._kept[key]
        ecg = read_ecg(path, missing_leads=self.data.missing_leads)
        samples, part = self.config.ecg_samples, self.data.ecg_part
        return self._keep(key, prepare_ecg(ecg, samples=samples, part=part))

    def _keep(self, key: tuple[str, Path], array: np.ndarray) -> np.ndarray:
        if self._used + array.nbytes <= self.data.cache_mb * 2**20:
            self._used += array.nbytes
            self._kept[key] = array
        return array


def plan_studies(data: MoreData, root: Path) -> MoreData:
    """Settle findings and modalities from the training studies.

    Raises:
        InputError: They have fewer than two modalities, or the wanted ones are not there.
    """
    train = find_studies(root, data, "train")
    there = {name for study in train for name in study.modalities}
    wanted = data.modalities or tuple(name for name in MODALITIES if name in there)
    if absent := [name for name in wanted if name not in there]:
        raise InputError(f"has no training study with {' or '.join(absent)}", path=root)
    if sum(len(set(study.modalities) & set(wanted)) > 1 for study in train) < 2:
        raise InputError(
            f"has no training studies with two modalities (there is: {', '.join(sorted(there))})",
            path=root,
            remedy="pairs of X-ray, ECG and report are needed",
        )
    labels = data.labels or tuple(train[0].labels)
    if absent := sorted(data.asked - set(labels)):
        raise InputError(
            f"has no finding {absent[0]!r}, which --data.prompts names",
            path=root,
            remedy=f"its findings are {', '.join(labels) or 'none'}",
        )
    return with_prompt_file(replace(data, modalities=wanted, labels=labels))
