"""The cases in a data set, and in files that a user gives."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from heed_core.errors import InputError
from heed_core.folders import files_under, unique_names
from heed_medical.dicom import is_dicom, list_series
from heed_medical.images import file_kind, file_stem
from heed_medical.other_layout import other_layout
from heed_medical.segmentation.cases import CaseFiles
from heed_medical.segmentation.listers import (
    BRATS_MASKS,
    BRATS_NAME,
    LISTERS,
    MASK_FOLDERS,
    MASK_SUFFIXES,
    MODALITY_NAME,
    SLICE_NAME,
    group_modalities,
    image_files,
    mask_stem,
)
from heed_medical.segmentation.settings import Layout, SegmentationData
from heed_medical.segmentation.splits import assign_splits, read_json, read_tables
from heed_medical.splits import SPLITS

_KNOWN_LAYOUTS = (
    "a folder with {train,val,test}/{Img,GT}, images/ and labels/ (or masks/), imagesTr/ and "
    "labelsTr/, <case>.nii.gz and <case>-label.nii.gz, <case>/<case>_seg.nii.gz, CHAOS patients, "
    "or a csv with the columns file and label is needed"
)
_READABLE = "give NIfTI (.nii, .nii.gz), DICOM, png, jpg, tif or bmp"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a data set holds, all splits, before any image is opened."""

    layout: Layout
    cases: tuple[CaseFiles, ...]
    problems: tuple[str, ...] = ()
    """Files without their partner, rows without a file: a line each."""
    label_names: tuple[str, ...] = ()
    """From dataset.json: classes as in `SegmentationData.labels`."""
    ignore: tuple[int, ...] = ()
    """From dataset.json: label values that count for nothing."""


def list_cases(root: Path, settings: SegmentationData) -> Listing:
    """All labelled cases of a data set with their splits, and what is wrong with its files.

    Raises:
        InputError: The folder does not exist, holds no case, or lies in no known layout.
    """
    if not root.is_dir():
        what = "is a file, a folder was expected" if root.exists() else "does not exist"
        raise InputError(what, path=root, remedy="give the folder of a data set")
    layout = detect_layout(root) if settings.layout == "auto" else settings.layout
    elsewhere = partial(other_layout, root, settings.layout, lambda: _seen(root, settings))
    try:
        cases, problems = LISTERS[layout](root, settings)
    except InputError as error:
        raise (elsewhere() or error) from None
    if not cases:
        raise elsewhere() or InputError(
            f"holds no labelled case in the layout {layout}"
            + (f" ({len(problems)} problems, the first: {problems[0]})" if problems else ""),
            path=root,
            remedy=None if problems else _KNOWN_LAYOUTS,
        )
    settled, wrong = assign_splits(root, cases, seed=settings.split_seed)
    names, ignore = _dataset_labels(root / "dataset.json")
    return Listing(
        layout=layout,
        cases=tuple(settled),
        problems=(*problems, *wrong),
        label_names=names,
        ignore=ignore,
    )


def _seen(root: Path, settings: SegmentationData) -> Layout:
    """The layout by what lies in the folder, if it holds a case in it."""
    layout = detect_layout(root)
    return layout if LISTERS[layout](root, settings)[0] else settings.layout


def find_cases(root: Path, settings: SegmentationData, split: str) -> list[CaseFiles]:
    """The labelled cases of one split, in the order of their names.

    Args:
        root: The data set.
        settings: `on_error="skip"` leaves files without partners out; `stop` raises for them.
        split: train, val or test.

    Raises:
        InputError: As `list_cases`; a file without its partner; no case in this split.
    """
    if split not in SPLITS:
        raise InputError(f"has no split {split!r}", path=root, remedy=f"use {', '.join(SPLITS)}")
    listing = list_cases(root, settings)
    if listing.problems and settings.on_error == "stop":
        more = len(listing.problems) - 1
        tail = f" (and {more} more such problem{'s' * (more > 1)})" if more else ""
        raise InputError(listing.problems[0] + tail)
    cases = [case for case in listing.cases if case.split == split]
    if not cases:
        have = {s: sum(c.split == s for c in listing.cases) for s in SPLITS}
        counts = ", ".join(f"{name} {n}" for name, n in have.items())
        raise InputError(
            f"has no cases in the split {split} ({counts})",
            path=root,
            remedy="choose another split or add cases to it",
        )
    return cases


def left_out(root: Path, settings: SegmentationData) -> tuple[str, ...]:
    """What `find_cases` leaves out with `on_error="skip"`, a line each."""
    return list_cases(root, settings).problems if settings.on_error == "skip" else ()


def detect_layout(root: Path) -> Layout:
    """The layout of a folder, by what lies in it.

    Raises:
        InputError: None of the known ones.
    """
    if any((root / split / "Img").is_dir() for split in SPLITS):
        return "png"
    if (root / "imagesTr").is_dir():
        files = image_files(root / "imagesTr")
        by_modality = files and all(MODALITY_NAME.fullmatch(file_stem(p)) for p in files)
        return "nnunet" if by_modality and any(p.name.find("_0000.") > 0 for p in files) else "msd"
    if (root / "images").is_dir():
        kinds = {file_kind(path) for path in image_files(root / "images")}
        return "nifti" if kinds == {"nifti"} else "pairs"
    if any(table.column(("file", "image")) for table in read_tables(root)):
        return "pairs"
    if any(mask_stem(path) for path in image_files(root) if file_kind(path) == "nifti"):
        return "nifti"
    if any(True for end in BRATS_MASKS for _ in root.glob(f"*/*{end}.nii*")):
        return "brats"
    if any("DICOM_anon" in path.relative_to(root).parts for path in files_under(root)):
        return "chaos"
    raise InputError("holds no data set in a known layout", path=root, remedy=_KNOWN_LAYOUTS)


def _dataset_labels(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Classes and ignored values of a dataset.json, of nnU-Net's or of the Decathlon's form."""
    if not path.is_file():
        return (), ()
    content = read_json(path)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, dict) or not labels:
        raise InputError(
            "has no labels", path=path, remedy='add {"labels": {"background": 0, ...}}'
        )
    pairs = []
    for key, value in labels.items():
        name, number = (value, key) if str(key).isdigit() else (key, value)
        if isinstance(number, list) or not str(number).isdigit():
            raise InputError(
                f"has a label {name!r} with the value {number!r}",
                path=path,
                remedy="give every class one whole number (regions of several are not supported)",
            )
        pairs.append((int(number), str(name).replace("=", "-")))
    ignore = tuple(number for number, name in pairs if name.lower() == "ignore")
    classes = sorted(pair for pair in pairs if pair[0] not in ignore)
    return tuple(f"{name}={number}" for number, name in classes), ignore


def find_inputs(paths: Sequence[Path], settings: SegmentationData) -> list[CaseFiles]:
    """The cases in files and folders; folders are searched through, masks in them left out.

    Files of one DICOM series, slices `Subj_<s>slice_<k>`, and modalities in the layout that the
    settings name (`<case>_0000.nii.gz`, `<case>_flair.nii.gz`) make one case.

    Raises:
        InputError: A path that does not exist or is no image; nothing found.
    """
    files: list[Path] = []
    for path in paths:
        files += _files_under(path)
    unique = list(dict.fromkeys(files))
    volumes = [p for p in unique if file_kind(p) == "nifti"]
    pictures = [p for p in unique if file_kind(p) == "picture"]
    scans = [p for p in unique if file_kind(p) == "other"]
    cases = _pictures(pictures) + _volumes(volumes, settings) + _series(scans)
    if not cases:
        listed = ", ".join(str(p) for p in paths[:3])
        raise InputError("holds no image that can be read", path=listed, remedy=_READABLE)
    return _with_unique_names(cases)


def _files_under(path: Path) -> list[Path]:
    if path.is_file():
        if file_kind(path) == "other" and not is_dicom(path):
            raise InputError("is not an image that can be read", path=path, remedy=_READABLE)
        return [path]
    if not path.is_dir():
        raise InputError("does not exist", path=path, remedy="give a file or a folder")
    found = []
    for file in files_under(path):
        if MASK_FOLDERS & set(file.relative_to(path).parts[:-1]):
            continue
        if file_stem(file).endswith(MASK_SUFFIXES):
            continue
        if file_kind(file) != "other" or is_dicom(file):
            found.append(file)
    return found


def _pictures(files: Sequence[Path]) -> list[CaseFiles]:
    stacks: dict[tuple[Path, str], list[tuple[int, Path]]] = defaultdict(list)
    cases = []
    for path in files:
        match = SLICE_NAME.fullmatch(file_stem(path))
        if match is None:
            cases.append(CaseFiles(name=file_stem(path), kind="picture", images=(path,)))
        else:
            stacks[path.parent, match["subject"]].append((int(match["slice"]), path))
    for (_, name), found in stacks.items():
        ordered = tuple(path for _, path in sorted(found))
        cases.append(CaseFiles(name=name, kind="stack", images=ordered))
    return cases


def _volumes(files: Sequence[Path], settings: SegmentationData) -> list[CaseFiles]:
    pattern = {"nnunet": MODALITY_NAME, "brats": BRATS_NAME}.get(settings.layout)
    cases = []
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if pattern is not None and pattern.fullmatch(file_stem(path)):
            folders[path.parent].append(path)
        else:
            cases.append(CaseFiles(name=file_stem(path), kind="nifti", images=(path,)))
    for found in folders.values():
        assert pattern is not None
        grouped, _ = group_modalities(found, pattern)
        cases += [CaseFiles(name=n, kind="nifti", images=p) for n, p in grouped.items()]
    return cases


def _series(files: Sequence[Path]) -> list[CaseFiles]:
    wanted = set(files)
    cases = []
    for folder in dict.fromkeys(path.parent for path in files):
        series = {
            uid: kept
            for uid, found in list_series(folder).items()
            if (kept := tuple(p for p in found if p in wanted))
        }
        for number, found in enumerate(series.values(), start=1):
            name = found[0].stem if len(found) == 1 else folder.resolve().name
            if len(series) > 1 and len(found) > 1:
                name = f"{name}_series{number}"
            cases.append(CaseFiles(name=name, kind="dicom", images=found))
    return cases


def _with_unique_names(cases: Sequence[CaseFiles]) -> list[CaseFiles]:
    names = unique_names([case.name for case in cases], [case.images[0] for case in cases])
    return [replace(case, name=name) for case, name in zip(cases, names, strict=True)]
