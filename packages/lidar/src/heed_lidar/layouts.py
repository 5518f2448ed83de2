"""The scans in a data set, and in files that a user gives."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heed_core.errors import InputError
from heed_core.folders import files_under, refuse_broken_link
from heed_lidar.clouds.bags import count_frames, is_recording
from heed_lidar.clouds.cloud import cloud_stem
from heed_lidar.clouds.reading import CLOUD_SUFFIXES, TEXT_SUFFIXES, cloud_suffix
from heed_lidar.labels import sequence_name
from heed_lidar.settings import SPLITS, Layout, LidarData

logger = logging.getLogger(__name__)

SEQUENCES, CLOUDS, CURBS_2D = "sequences", "velodyne", "curb"
DERIVED = "DERIVED.md"
"""Marks a folder of labels that nobody made by hand, see `heed_lidar.curb_labels`."""
_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
_NOT_CLOUDS = frozenset({"poses", "calib", "times"})
_NOT_CLOUD_FOLDERS = frozenset({"labels", CURBS_2D, "curbs", "predictions"})
_KNOWN_LAYOUTS = (
    "a folder with sequences/SS/velodyne/*.bin and labels/*.label (or curb/*.txt), or with scans, "
    "is needed"
)
_READABLE = f"give {', '.join(CLOUD_SUFFIXES)}"


@dataclass(frozen=True, kw_only=True)
class ScanFile:
    """Where one scan lies on disk."""

    name: str
    """Unique in its data set; may hold `/`: `08/000123`."""
    cloud: Path
    labels: Path | None = None
    """The `.label` file; None: no labels."""
    curbs_2d: Path | None = None
    """Curb points as rows `x y curb_id`."""
    split: str | None = None
    sequence: str = ""
    frame: int | None = None
    """The number of the scan in a recording of many."""

    @property
    def labelled(self) -> bool:
        """Whether there are labels of any kind."""
        return self.labels is not None or self.curbs_2d is not None

    @property
    def derived(self) -> bool:
        """Whether the labels are marked as derived by a program."""
        return self.labels is not None and is_derived(self.labels)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a data set holds, all splits, before any scan is opened."""

    layout: Layout
    scans: tuple[ScanFile, ...]
    problems: tuple[str, ...] = ()
    """Scans without labels and labels without scans, a line each."""
    problem_splits: tuple[str, ...] = ()
    """The split of each problem."""

    def problems_of(self, split: str) -> tuple[str, ...]:
        """The problems of one split."""
        both = zip(self.problems, self.problem_splits, strict=True)
        return tuple(line for line, of in both if of == split)


def is_derived(labels: Path) -> bool:
    """Whether a `.label` file lies in a folder that is marked as `DERIVED`."""
    return (labels.parent / DERIVED).is_file()


def natural_key(path: Path | str) -> tuple[tuple[tuple[int, int, str], ...], ...]:
    """Sorts numbers in names by their value: scan2 before scan10."""
    return tuple(
        tuple(
            (0, int(piece), piece) if piece.isdecimal() else (1, 0, piece)
            for piece in re.split(r"(\d+)", part)
            if piece
        )
        for part in Path(path).parts
    )


def detect_layout(root: Path, data: LidarData) -> Layout:
    """The layout of a folder, by what lies in it.

    Raises:
        InputError: None of the known ones.
    """
    base = sequence_folder(root)
    if base is not None:
        if any(base.glob(f"*/{data.labels_folder}/")):
            return "semantic-kitti"
        return "curb-2d" if any(base.glob(f"*/{CURBS_2D}/")) else "semantic-kitti"
    if cloud_files(root):
        return "folder"
    raise InputError("holds no scans in a known layout", path=root, remedy=_KNOWN_LAYOUTS)


def sequence_folder(root: Path) -> Path | None:
    """The folder of the sequences in a data set: `sequences` or `dataset/sequences`."""
    for base in (root / SEQUENCES, root / "dataset" / SEQUENCES):
        if base.is_dir():
            return base
    return None


def list_scans(root: Path, data: LidarData) -> Listing:
    """All scans of a data set with their splits, and what is wrong with its files.

    Raises:
        InputError: The folder does not exist, holds no scan, or lies in no known layout.
    """
    if not root.is_dir():
        what = "is a file, a folder was expected" if root.exists() else "does not exist"
        raise InputError(what, path=root, remedy="give the folder of a data set")
    layout = detect_layout(root, data) if data.layout == "auto" else data.layout
    if layout == "folder":
        listing = Listing(layout=layout, scans=tuple(_list_folder(root, data)))
    else:
        listing = _list_sequences(root, data, layout)
    if not listing.scans:
        raise InputError(f"holds no scan in the layout {layout}", path=root, remedy=_KNOWN_LAYOUTS)
    return listing


def _list_sequences(root: Path, data: LidarData, layout: Layout) -> Listing:
    base = sequence_folder(root)
    if base is None:
        raise InputError("has no folder sequences/", path=root, remedy=_KNOWN_LAYOUTS)
    splits: dict[str, str] = {
        sequence: split for split in SPLITS for sequence in data.sequences(split)
    }
    scans: list[ScanFile] = []
    problems: list[tuple[str, str]] = []
    for folder in sorted(base.iterdir(), key=natural_key):
        refuse_broken_link(folder)
        if not folder.is_dir():
            continue
        split = splits.get(sequence_name(folder.name), _SPLIT_FOLDERS.get(folder.name))
        found, wrong = _list_sequence(folder, data, layout)
        scans += [replace(scan, split=split) for scan in found]
        problems += [(line, split) for line in wrong if split is not None]
    return Listing(
        layout=layout,
        scans=tuple(scans),
        problems=tuple(line for line, _ in problems),
        problem_splits=tuple(split for _, split in problems),
    )


def _list_sequence(
    folder: Path, data: LidarData, layout: Layout
) -> tuple[list[ScanFile], list[str]]:
    """The scans of one sequence; a sequence without a folder of labels is unlabelled."""
    for part in (CLOUDS, data.labels_folder, CURBS_2D):
        refuse_broken_link(folder / part)
    clouds = [p for p in (folder / CLOUDS).glob("*") if cloud_suffix(p) and not is_recording(p)]
    labels = {p.stem: p for p in (folder / data.labels_folder).glob("*.label")}
    rows = {p.stem: p for p in (folder / CURBS_2D).glob("*.txt")} if layout == "curb-2d" else {}
    partners = rows if layout == "curb-2d" else labels
    scans, problems = [], []
    for path in sorted(clouds, key=natural_key):
        stem = cloud_stem(path)
        if partners and stem not in partners:
            problems.append(f"{path}: has no labels; add them or remove the scan")
            continue
        scans.append(
            ScanFile(
                name=f"{folder.name}/{stem}",
                cloud=path,
                labels=labels.get(stem),
                curbs_2d=rows.get(stem),
                sequence=folder.name,
            )
        )
    stems = {cloud_stem(path) for path in clouds}
    problems += [
        f"{path}: has no scan in {CLOUDS}/; add it or remove the labels"
        for stem, path in sorted(partners.items())
        if stem not in stems
    ]
    return scans, problems


def _list_folder(root: Path, data: LidarData) -> list[ScanFile]:
    scans = []
    files, left_out = _sorted_out(root)
    _warn(root, left_out)
    for path in files:
        stem = cloud_stem(path)
        beside = path.with_name(f"{stem}.label")
        places = (
            beside,
            path.parent / data.labels_folder / beside.name,
            path.parent.parent / data.labels_folder / beside.name,
        )
        labels = next((place for place in places if place.is_file()), None)
        name = path.relative_to(root).with_name(stem).as_posix()
        scans.append(ScanFile(name=name, cloud=path, labels=labels, split="test"))
    return _with_unique_names(scans)


def find_scans(root: Path, data: LidarData, split: str) -> list[ScanFile]:
    """The labelled scans of one split, in natural order of their names.

    Sequences of the split that are not there are passed over.

    Args:
        root: The data set.
        data: `on_error="skip"` leaves scans without labels out; `stop` raises for them.
        split: train, val or test.

    Raises:
        InputError: As `list_scans`; another name of a split; a scan without its labels; no labelled
            scan in this split.
    """
    return find_split(root, data, split)[0]


def find_split(root: Path, data: LidarData, split: str) -> tuple[list[ScanFile], tuple[str, ...]]:
    """As `find_scans`, and a line for each scan that was left out because it has no labels."""
    if split not in SPLITS:
        raise InputError(f"has no split {split!r}", path=root, remedy=f"use {', '.join(SPLITS)}")
    listing = list_scans(root, data)
    problems = listing.problems_of(split)
    if problems and data.on_error == "stop":
        more = len(problems) - 1
        tail = f" (and {more} more such problem{'s' * (more > 1)})" if more else ""
        raise InputError(problems[0] + tail)
    scans = [scan for scan in listing.scans if scan.split == split]
    labelled = [scan for scan in scans if scan.labelled]
    if not labelled:
        raise InputError(_no_scans(listing, scans, split), path=root)
    return labelled, problems


def _no_scans(listing: Listing, scans: Sequence[ScanFile], split: str) -> str:
    have = Counter(scan.split for scan in listing.scans if scan.labelled)
    counts = ", ".join(f"{name} {have[name]}" for name in SPLITS)
    if scans:
        return (
            f"has {len(scans)} scans in the split {split} and no labels for them "
            f"(labelled scans: {counts}); add labels or choose another split"
        )
    if listing.layout == "folder":
        return f"is a plain folder of scans, all in the split test, none in {split}"
    present = sorted({scan.sequence for scan in listing.scans}, key=natural_key)
    return (
        f"has no labelled scans in the split {split} (labelled scans: {counts}; sequences: "
        f"{', '.join(present)}); choose another split or name sequences with --data.{split}"
    )


def cloud_files(root: Path) -> list[Path]:
    """The files of points under a folder, in natural order; folders of labels are left out.

    Text files and arrays count only where the folder holds nothing else.

    Raises:
        InputError: As `files_under`.
    """
    return _sorted_out(root)[0]


def _sorted_out(
    root: Path, passed_over: Callable[[Path], bool] = lambda _: False
) -> tuple[list[Path], Counter[str]]:
    """As `cloud_files`, and how many files that may hold points are left out, by what they are.

    Args:
        root: The folder.
        passed_over: Files that count as if they were not there.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in files_under(root):
        suffix = cloud_suffix(path)
        if not suffix or cloud_stem(path) in _NOT_CLOUDS or passed_over(path):
            continue
        inside = next((p for p in path.relative_to(root).parts[:-1] if p in _NOT_CLOUD_FOLDERS), "")
        if not inside:
            found.append(path)
        elif suffix not in TEXT_SUFFIXES:
            left_out[f"in {inside}/"] += 1
    better = [path for path in found if cloud_suffix(path) not in TEXT_SUFFIXES]
    if better:
        left_out.update(s for path in found if (s := cloud_suffix(path)) in TEXT_SUFFIXES)
    return sorted(better or found, key=natural_key), left_out


def _warn(root: Path, left_out: Counter[str]) -> None:
    """Say what a folder holds that is not read."""
    if left_out:
        listed = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        logger.warning(
            "%s: files that may be scans are left out (%s); name files to read them", root, listed
        )


def find_inputs(
    paths: Iterable[Path],
    data: LidarData,
    *,
    passed_over: Callable[[Path], bool] = lambda _: False,
) -> list[ScanFile]:
    """The scans in files, folders and recordings, in natural order within each.

    A scan is named as its file, with the folders below the one that is given. Where several would
    have one name, all are named with folders above as well: `00/000000`, `08/000000`.

    Args:
        paths: What is given.
        data: How files are read.
        passed_over: Files in these folders that count as if they were not there.

    Raises:
        InputError: A path that does not exist or is no file of points; nothing found.
    """
    given = list(paths)
    scans: list[ScanFile] = []
    for path in given:
        scans += _scans_under(path, data, passed_over)
    if not scans:
        listed = ", ".join(str(path) for path in given[:3])
        raise InputError("holds no scan that can be read", path=listed, remedy=_READABLE)
    return _with_unique_names(list(dict.fromkeys(scans)))


def _scans_under(
    path: Path, data: LidarData, passed_over: Callable[[Path], bool]
) -> list[ScanFile]:
    if is_recording(path):
        return _frames(path, path.stem, data)
    if path.is_file():
        if not cloud_suffix(path):
            raise InputError("is not a file of points", path=path, remedy=_READABLE)
        return [ScanFile(name=cloud_stem(path), cloud=path)]
    if not path.is_dir():
        refuse_broken_link(path)
        raise InputError("does not exist", path=path, remedy="give a file or a folder")
    scans = []
    files, left_out = _sorted_out(path, passed_over)
    _warn(path, left_out)
    for file in files:
        inner = file.relative_to(path)
        parts = tuple(part for part in inner.parts[:-1] if part != CLOUDS)
        name = "/".join((*parts, cloud_stem(file)))
        if is_recording(file):
            scans += _frames(file, name, data)
        else:
            scans.append(ScanFile(name=name, cloud=file))
    return scans


def _frames(path: Path, name: str, data: LidarData) -> list[ScanFile]:
    count = count_frames(path, data.options)
    return [ScanFile(name=f"{name}/{frame:06d}", cloud=path, frame=frame) for frame in range(count)]


def _named_by_folders(scans: Sequence[ScanFile]) -> list[ScanFile]:
    """Where scans share a name, all get as many of the folders above as tell most of them apart."""
    if len({scan.name for scan in scans}) == len(scans):
        return list(scans)
    above = [_folders_above(scan) for scan in scans]
    longer = [
        [
            "/".join((*folders[len(folders) - depth :], scan.name))
            for scan, folders in zip(scans, above, strict=True)
        ]
        for depth in range(min(map(len, above)) + 1)
    ]
    best = max(longer, key=lambda names: len(set(names)))  # the first of equals
    return [replace(scan, name=name) for scan, name in zip(scans, best, strict=True)]


def _folders_above(scan: ScanFile) -> tuple[str, ...]:
    """The folders that a scan lies in and that are not in its name; the last is the nearest."""
    whole = Path(os.path.abspath(scan.cloud))  # noqa: PTH100 - without "..", links not followed
    folders = tuple(part for part in whole.parent.parts[1:] if part != CLOUDS)
    inner = scan.name.count("/") - (scan.frame is not None)
    return folders[: len(folders) - inner]


def _with_unique_names(scans: Sequence[ScanFile]) -> list[ScanFile]:
    """Scans of one name get the folders above them, then their file's suffix, then a number."""
    scans = _named_by_folders(scans)
    names = Counter(scan.name for scan in scans)
    settled: list[ScanFile] = []
    used: set[str] = set()
    for scan in scans:
        name = scan.name
        if names[name] > 1:
            name = f"{name}_{cloud_suffix(scan.cloud).lstrip('.').replace('.', '_')}"
        base, number = name, 2
        while name in used or (name != scan.name and name in names):
            name, number = f"{base}_{number}", number + 1
        used.add(name)
        settled.append(replace(scan, name=name))
    return settled
