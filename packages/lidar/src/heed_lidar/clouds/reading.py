"""Read the points of one scan from a file of any known format."""

import contextlib
import importlib
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from heed_core.errors import InputError
from heed_core.folders import refuse_broken_link
from heed_lidar.clouds.bags import Recordings, is_recording
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, PointCloud, make_cloud


@runtime_checkable
class _Reader(Protocol):
    def __call__(self, path: Path, options: CloudOptions) -> FileColumns: ...


_READERS = {
    ".pcd.bin": "heed_lidar.clouds.arrays:read_bin",
    ".bin": "heed_lidar.clouds.arrays:read_bin",
    ".pcd": "heed_lidar.clouds.pcd:read_pcd",
    ".ply": "heed_lidar.clouds.ply:read_ply",
    ".las": "heed_lidar.clouds.las:read_las",
    ".laz": "heed_lidar.clouds.las:read_las",
    ".npy": "heed_lidar.clouds.arrays:read_npy",
    ".npz": "heed_lidar.clouds.arrays:read_npz",
    ".csv": "heed_lidar.clouds.text:read_text",
    ".txt": "heed_lidar.clouds.text:read_text",
    ".xyz": "heed_lidar.clouds.text:read_text",
}
TEXT_SUFFIXES = frozenset({".csv", ".txt", ".npy", ".npz"})
"""Formats that hold many other things than points."""
RECORDING_SUFFIXES = (".bag", ".mcap", ".db3")
CLOUD_SUFFIXES = (*_READERS, *RECORDING_SUFFIXES)


def cloud_suffix(path: Path) -> str:
    """The suffix by which a file is a file of points, in lower case; empty if it is none.

    Example:
        >>> cloud_suffix(Path("sweep.PCD.bin")), cloud_suffix(Path("notes.md"))
        ('.pcd.bin', '')
    """
    name = path.name.lower()
    return next((suffix for suffix in CLOUD_SUFFIXES if name.endswith(suffix)), "")


def read_cloud(
    path: Path,
    options: CloudOptions | None = None,
    *,
    frame: int | None = None,
    allow_empty: bool = False,
    recordings: Recordings | None = None,
) -> PointCloud:
    """Read one scan.

    Args:
        path: The file; its format is that of its suffix.
        options: How it is read.
        frame: Which scan of a recording; None: its first.
        allow_empty: Return a cloud without points, with a warning, where there are none.
        recordings: Keeps recordings open between calls.

    Raises:
        InputError: The file does not exist, is of no known format, is damaged, or holds no points.
        MissingExtra: The format needs an optional library.
    """
    options = options or CloudOptions()
    if is_recording(path):
        with contextlib.closing(Recordings()) as own:
            found = (recordings or own).read(path, frame or 0, options)
        return make_cloud(found, options, path=path, allow_empty=allow_empty)
    refuse_broken_link(path)
    if not path.is_file():
        what = "is a folder, a file was expected" if path.exists() else "does not exist"
        raise InputError(what, path=path, remedy="give a file of points")
    suffix = cloud_suffix(path)
    if suffix not in _READERS:
        raise InputError(
            "is not a file of points", path=path, remedy=f"give {', '.join(CLOUD_SUFFIXES)}"
        )
    module, name = _READERS[suffix].split(":")
    reader = cast(_Reader, getattr(importlib.import_module(module), name))
    return make_cloud(reader(path, options), options, path=path, allow_empty=allow_empty)
