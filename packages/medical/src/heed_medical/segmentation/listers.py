"""One function per data layout: the cases in a folder, and what is wrong with its files."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.dicom import list_series
from heed_medical.images import file_kind, file_stem
from heed_medical.segmentation.cases import CaseFiles
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.splits import read_tables
from heed_medical.splits import SPLITS

SLICE_NAME = re.compile(r"(?P<subject>Subj_(?P<id>.+?))slice_(?P<slice>\d+)")
MODALITY_NAME = re.compile(r"(?P<case>.+)_(?P<modality>\d{4})")
BRATS_NAME = re.compile(r"(?P<case>.+)[_-](?P<modality>flair|t1|t1ce|t1gd|t2|t1c|t1n|t2f|t2w)")
"""`<case>_t1ce` until 2021, `<case>-t1c` later."""
BRATS_MASKS = ("_seg", "-seg")
MASK_SUFFIXES = ("-label", "_label", "_mask", "_seg", "-seg", "_segmentation")
MASK_FOLDERS = {"labels", "masks", "GT", "Ground", "labelsTr", "labelsTs"}

_CHAOS_SERIES = {
    "t1-in": ("T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground"),
    "t1-out": ("T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground"),
    "t2": ("T2SPIR/DICOM_anon", "T2SPIR/Ground"),
    "ct": ("DICOM_anon", "Ground"),
}

Found = tuple[list[CaseFiles], list[str]]
"""Cases, and what is wrong: a line each."""


def image_files(folder: Path) -> list[Path]:
    """Pictures and NIfTI files in a folder, hidden ones left out, in the order of their names."""
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in found if file_kind(p) != "other")


def _list_png(root: Path, settings: SegmentationData) -> Found:
    cases: list[CaseFiles] = []
    problems: list[str] = []
    for split in SPLITS:
        images = {file_stem(p): p for p in image_files(root / split / "Img")}
        masks = {file_stem(p): p for p in image_files(root / split / "GT")}
        problems += _unpaired(images, masks)
        paired = sorted(set(images) & set(masks), key=_slice_key)
        stacks: dict[str, list[str]] = defaultdict(list)
        for stem in paired:
            match = SLICE_NAME.fullmatch(stem)
            stacks[match["subject"] if match else stem].append(stem)
        for name, stems in stacks.items():
            match = SLICE_NAME.fullmatch(stems[0])
            cases.append(
                CaseFiles(
                    name=name,
                    kind="stack" if match else "picture",
                    images=tuple(images[s] for s in stems),
                    masks=tuple(masks[s] for s in stems),
                    split=split,
                    patient=match["id"] if match else "",
                )
            )
    return cases, problems


def _slice_key(stem: str) -> tuple[str, int]:
    match = SLICE_NAME.fullmatch(stem)
    return (match["subject"], int(match["slice"])) if match else (stem, 0)


def _list_pairs(root: Path, settings: SegmentationData) -> Found:
    for table in read_tables(root):
        file_column = table.column(("file", "image"))
        mask_column = table.column(("mask", "label", "labels", "segmentation"))
        if file_column and mask_column:
            rows = [(row[file_column], row[mask_column]) for row in table.rows]
            return _from_table(root, table.path, rows)
    return _from_folders(root)


def _from_table(root: Path, table: Path, rows: list[tuple[str, str]]) -> Found:
    cases, problems = [], []
    for number, (image, mask) in enumerate(rows, start=2):
        missing = [name for name in (image, mask) if not name or not (root / name).is_file()]
        if missing:
            what = f"names {missing[0]}, which does not exist" if missing[0] else "has no file"
            problems.append(f"{table}, row {number}: {what}; add the file or remove the row")
            continue
        cases.append(_pair(file_stem(Path(image)), root / image, root / mask))
    listed = {case.images[0] for case in cases}
    folders = {path.parent for path in listed if path.parent != root}
    extra = [p for f in sorted(folders) for p in image_files(f) if p not in listed]
    named = {(root / image) for image, _ in rows}
    problems += [
        f"{p}: has no row in {table.name}; add one or remove it" for p in extra if p not in named
    ]
    return cases, problems


def _from_folders(root: Path) -> Found:
    images = {file_stem(p): p for p in image_files(root / "images")}
    masks: dict[str, Path] = {}
    for folder in ("labels", "masks"):
        for path in image_files(root / folder):
            stem = file_stem(path)
            masks[stem if stem in images else mask_stem(path) or stem] = path
    cases = [_pair(name, images[name], masks[name]) for name in sorted(set(images) & set(masks))]
    return cases, _unpaired(images, masks)


def _list_nifti(root: Path, settings: SegmentationData) -> Found:
    if (root / "images").is_dir():
        return _from_folders(root)
    files = image_files(root)
    masks = {stem: p for p in files if (stem := mask_stem(p))}
    images = {file_stem(p): p for p in files if mask_stem(p) is None}
    cases = [_pair(name, images[name], masks[name]) for name in sorted(set(images) & set(masks))]
    return cases, _unpaired(images, masks)


def _pair(name: str, image: Path, mask: Path) -> CaseFiles:
    kind = file_kind(image)
    return CaseFiles(
        name=name, kind="nifti" if kind == "nifti" else "picture", images=(image,), masks=(mask,)
    )


def mask_stem(path: Path) -> str | None:
    """The case that a mask file belongs to, where its name ends like a mask's."""
    stem = file_stem(path)
    return next((stem[: -len(s)] for s in MASK_SUFFIXES if stem.endswith(s)), None)


def _unpaired(images: Mapping[str, Path], masks: Mapping[str, Path]) -> list[str]:
    lonely = [
        f"{images[n]}: has no mask of the same name; add it or remove the image"
        for n in sorted(set(images) - set(masks))
    ]
    return lonely + [
        f"{masks[n]}: has no image of the same name; add it or remove the mask"
        for n in sorted(set(masks) - set(images))
    ]


def _list_nnunet(root: Path, settings: SegmentationData) -> Found:
    cases: list[CaseFiles] = []
    problems: list[str] = []
    for part, split in (("Tr", None), ("Ts", "test")):
        masks = {file_stem(p): p for p in image_files(root / f"labels{part}")}
        if part == "Ts" and not masks:
            continue
        grouped, wrong = group_modalities(image_files(root / f"images{part}"), MODALITY_NAME)
        problems += wrong + _unpaired({n: paths[0] for n, paths in grouped.items()}, masks)
        usual = max(map(len, grouped.values()), default=0)
        for name in sorted(set(grouped) & set(masks)):
            if len(grouped[name]) < usual:
                problems.append(
                    f"{grouped[name][0]}: case {name} has {len(grouped[name])} of {usual} "
                    f"modalities; add the missing files or remove the case"
                )
                continue
            cases.append(replace(_many(name, grouped[name], masks[name]), split=split))
    return cases, problems


def group_modalities(
    files: list[Path], pattern: re.Pattern[str]
) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """Group files `<case>_<modality>` by case, modalities in the order of their names.

    The second result lists files of another name.
    """
    grouped: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    problems = []
    for path in files:
        match = pattern.fullmatch(file_stem(path))
        if match is None:
            problems.append(f"{path}: is not named <case>_<modality>; rename or remove it")
        else:
            grouped[match["case"]].append((match["modality"], path))
    return {n: tuple(p for _, p in sorted(found)) for n, found in grouped.items()}, problems


def _many(name: str, images: tuple[Path, ...], mask: Path) -> CaseFiles:
    return replace(_pair(name, images[0], mask), images=images)


def _list_msd(root: Path, settings: SegmentationData) -> Found:
    cases: list[CaseFiles] = []
    problems: list[str] = []
    for part, split in (("Tr", None), ("Ts", "test")):
        images = {file_stem(p): p for p in image_files(root / f"images{part}")}
        masks = {file_stem(p): p for p in image_files(root / f"labels{part}")}
        if part == "Ts" and not masks:
            continue
        problems += _unpaired(images, masks)
        paired = sorted(set(images) & set(masks))
        cases += [replace(_pair(n, images[n], masks[n]), split=split) for n in paired]
    return cases, problems


def _list_brats(root: Path, settings: SegmentationData) -> Found:
    problems: list[str] = []
    found: dict[Path, tuple[dict[str, Path], Path]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = image_files(folder)
        masks = [p for p in files if file_stem(p).endswith(BRATS_MASKS)]
        images, wrong = _brats_modalities(folder, [p for p in files if p not in masks])
        if not images and not masks:
            continue
        problems += wrong
        if not images or not masks:
            lacking = "modalities" if masks else "mask <case>_seg.nii.gz"
            problems.append(f"{folder}: has no {lacking}; add it or remove the folder")
            continue
        found[folder] = images, masks[0]
    usual = sorted({modality for images, _ in found.values() for modality in images})
    cases = []
    for folder, (images, mask) in found.items():
        if missing := [modality for modality in usual if modality not in images]:
            problems.append(
                f"{folder}: case {folder.name} has no {' and no '.join(missing)}; "
                f"add it or remove the case"
            )
            continue
        cases.append(_many(folder.name, tuple(images[m] for m in usual), mask))
    return cases, problems


def _brats_modalities(folder: Path, files: list[Path]) -> tuple[dict[str, Path], list[str]]:
    """Modality -> file of the case that the folder is named after; a line for each other file."""
    images: dict[str, Path] = {}
    problems = []
    for path in files:
        match = BRATS_NAME.fullmatch(file_stem(path))
        if match is None or match["case"] != folder.name:
            problems.append(f"{path}: is not named <case>_<modality>; rename or remove it")
        else:
            images[match["modality"]] = path
    return images, problems


def _list_chaos(root: Path, settings: SegmentationData) -> Found:
    series, ground = _CHAOS_SERIES[settings.sequence]
    cases: list[CaseFiles] = []
    problems: list[str] = []
    for patient in _patients(root, (series, ground)):
        if settings.sequence == "ct" and patient.name in {"T1DUAL", "T2SPIR"}:
            continue
        path, masks = patient / series, image_files(patient / ground)
        if not masks:
            problems.append(f"{patient / ground}: has no masks; add them or remove the patient")
            continue
        try:
            found = list_series(path) if path.is_dir() else {}
        except InputError as error:
            problems.append(str(error))
            continue
        if len(found) != 1:
            problems.append(f"{path}: holds {len(found)} DICOM series; keep one")
            continue
        (files,) = found.values()
        if len(files) != len(masks):
            problems.append(
                f"{patient / ground}: has {len(masks)} masks for {len(files)} slices; "
                f"give one mask per slice"
            )
            continue
        name = f"{patient.name}_{settings.sequence}"
        ordered = _masks_in_order(files, masks)
        cases.append(
            CaseFiles(name=name, kind="dicom", images=files, masks=ordered, patient=patient.name)
        )
    return cases, problems


def _patients(root: Path, inside: Sequence[str]) -> list[Path]:
    """The folders under `root`, also behind links, below which files lie in one of some folders."""
    found = set()
    for folder in {file.parent for file in files_under(root)}:
        for wanted in map(Path, inside):
            depth = len(wanted.parts)
            if folder.parts[-depth:] == wanted.parts:
                found.add(folder.parents[depth - 1])
    return sorted(found)


def _masks_in_order(files: tuple[Path, ...], masks: list[Path]) -> tuple[Path, ...]:
    """Put masks into the order of the slices: by equal names, else both in the order of names."""
    by_stem = {file_stem(mask): mask for mask in masks}
    if all(path.stem in by_stem for path in files):
        return tuple(by_stem[path.stem] for path in files)
    by_rank = dict(zip(sorted(files), masks, strict=True))
    return tuple(by_rank[path] for path in files)


LISTERS: Mapping[str, Callable[[Path, SegmentationData], Found]] = {
    "png": _list_png,
    "pairs": _list_pairs,
    "nifti": _list_nifti,
    "nnunet": _list_nnunet,
    "msd": _list_msd,
    "brats": _list_brats,
    "chaos": _list_chaos,
}
