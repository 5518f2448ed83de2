"""Read scanpaths from whatever file or folder they are in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from heed_core.errors import InputError
from heed_gaze.readers.fixatons import SCANPATHS, read_fixatons
from heed_gaze.readers.json_files import COCO_SEARCH_SIZE, JSON_READERS, json_layout, load_json
from heed_gaze.readers.matlab import OSIE_SIZE, read_osie_mat
from heed_gaze.readers.neutral import read_neutral_csv
from heed_gaze.readers.pictures import find_pictures
from heed_gaze.readers.trials import ReadOptions, Trials, collect
from heed_gaze.scanpaths import ScanpathSet, Size

_SIZES: dict[str, Size] = {"COCO-Search18": COCO_SEARCH_SIZE, "OSIE": OSIE_SIZE}
"""Of layouts whose files do not say it."""
_KNOWN = (
    "known are CSV (image, subject, index, x, y, duration), the JSON of COCO-Search18, STI, "
    "ViSioNS and this program, OSIE's fixations.mat, and FixaTons folders"
)


def read_scanpaths(path: Path, options: ReadOptions | None = None) -> ScanpathSet:
    """Read a data set or a prediction; its layout is recognised.

    Args:
        path: A file, or a folder with such files.
        options: What is done with what is wrong, and where the pictures are.

    Raises:
        InputError: Nothing that is known, or it cannot be used.

    Example:
        >>> read_scanpaths(Path("COCO-Search18"))  # doctest: +SKIP
    """
    options = options or ReadOptions()
    if not path.exists():
        raise InputError("no such file or folder", path=path, remedy="check the path")
    layout, trials = _open_folder(path) if path.is_dir() else _open_file(path)
    root = options.images or (path if path.is_dir() else path.parent)
    return collect(
        trials,
        options,
        path=path,
        layout=layout,
        images=find_pictures(root),
        usual_size=_SIZES.get(layout),
    )


def _open_file(path: Path) -> tuple[str, Trials]:
    """The layout of a file, and its trials."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return "neutral CSV", read_neutral_csv(path)
    if suffix == ".mat":
        return "OSIE", read_osie_mat(path)
    if suffix != ".json":
        raise InputError("is no file of scanpaths that is known", path=path, remedy=_KNOWN)
    document = load_json(path)
    layout = json_layout(document)
    if layout is None:
        raise InputError("holds no scanpaths that are known", path=path, remedy=_KNOWN)
    return layout, JSON_READERS[layout](path, document)


def _open_folder(root: Path) -> tuple[str, Trials]:
    """The layout of a folder, and the trials of all of its files."""
    parts = [root, *(child for child in sorted(root.iterdir()) if child.is_dir())]
    fixatons = [part for part in parts if (part / SCANPATHS).is_dir()]
    if fixatons:
        return "FixaTons", _chain(read_fixatons(part) for part in fixatons)
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in (".csv", ".json"))
    files += [file for part in parts for file in sorted(part.glob("*.mat"))]
    opened = [pair for file in files if (pair := _open_if_known(file)) is not None]
    if not opened:
        raise InputError("holds no file of scanpaths that is known", path=root, remedy=_KNOWN)
    layouts = sorted({layout for layout, _ in opened})
    if len(layouts) > 1:
        raise InputError(
            f"holds files of different layouts ({', '.join(layouts)})",
            path=root,
            remedy="give one file",
        )
    return layouts[0], _chain(trials for _, trials in opened)


def _open_if_known(file: Path) -> tuple[str, Trials] | None:
    """What a file of a folder holds; settings and the like beside the data are passed over."""
    if file.suffix.lower() == ".json" and json_layout(load_json(file)) is None:
        return None
    if file.suffix.lower() == ".mat" and file.name != "fixations.mat":
        return None
    return _open_file(file)


def _chain(parts: Iterator[Trials]) -> Trials:
    for part in parts:
        yield from part
