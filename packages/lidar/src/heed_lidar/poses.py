"""Where the sensor was: `calib.txt`, `poses.txt` and `times.txt` of the KITTI odometry layout.

Geiger et al., "Are we ready for autonomous driving? The KITTI vision benchmark suite", CVPR 2012.
"""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_lidar.layouts import CLOUDS

logger = logging.getLogger(__name__)

LIDAR_TO_CAMERA = "Tr"
_POSES, _CALIB, _TIMES = "poses.txt", "calib.txt", "times.txt"
_RIGID = 1e-3
"""How far a turn's rows may be from orthonormal: files have six digits or so."""


_TELLING_WAY_M = 10.0


def find_poses(given: Path) -> tuple[Path, Path | None]:
    """The file of poses that a path names, and the calibration that belongs to it.

    SemanticKITTI has `poses.txt` and `calib.txt` in the sequence, KITTI's odometry data has
    `poses/SS.txt` beside `sequences/SS/calib.txt`.

    Args:
        given: The file, or the folder of a sequence.

    Returns:
        The file of poses, and the calibration; None where there is none in these places.

    Raises:
        InputError: A folder of a sequence without poses.
    """
    if given.is_dir():
        sequence = given.resolve()
        places = (given / _POSES, sequence.parent.parent / "poses" / f"{sequence.name}.txt")
        poses = next((place for place in places if place.is_file()), None)
        if poses is None:
            raise InputError(
                f"holds no {_POSES}, and there is no {places[1]}",
                path=given,
                remedy="give the file of the poses",
            )
        return poses, _there(given / _CALIB)
    beside = _there(given.with_name(_CALIB))
    apart = given.parent.resolve().parent / "sequences" / given.stem / _CALIB
    return given, beside or _there(apart)


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def moves_along_z(poses: Float64[np.ndarray, "frames 4 4"]) -> bool:
    """Whether the way between frames is along the own z more than along x, as of a camera's axes.

    A way below 10 m tells nothing: the poses of a car that stands still are noise.

    Args:
        poses: Take points of each frame to the frame of the first; in m.
    """
    shifts = np.diff(poses[:, :3, 3], axis=0)
    own = np.einsum("fji,fj->fi", poses[:-1, :3, :3], shifts)
    x, _, z = np.abs(own).sum(axis=0)
    return bool(z > max(x, _TELLING_WAY_M))


def read_calib(path: Path) -> dict[str, Float64[np.ndarray, "4 4"]]:
    """Read `NAME: 12 numbers` per line: 3 x 4 matrices, completed to 4 x 4.

    Raises:
        InputError: The file does not exist, a line is something else, or `Tr` is no rigid motion.
    """
    matrices = {}
    for number, line in _lines(path):
        name, colon, rest = line.partition(":")
        values = _numbers(rest, path, number) if colon else []
        if len(values) != 12:
            raise InputError(
                "is not a name and 12 numbers (NAME: ...)", path=path, place=f"row {number}"
            )
        matrices[name.strip()] = _square(values)
        if name.strip() == LIDAR_TO_CAMERA:
            _refuse_bent(matrices[LIDAR_TO_CAMERA], path, number)
    return matrices


def read_poses(
    path: Path, calib: Mapping[str, Float64[np.ndarray, "4 4"]] | None = None
) -> Float64[np.ndarray, "frames 4 4"]:
    """Read one pose per line: 12 numbers, the rows of a 3 x 4 matrix.

    The file's poses take coordinates of the camera at a frame to those of the camera at the first.
    With a calibration they are turned into the frame of the LiDAR: `Tr^-1 P Tr`.

    Args:
        path: The file.
        calib: As `read_calib`, with the key `Tr`; None: the poses stay as they are.

    Returns:
        Matrices that take points of each frame to the frame of the first.

    Raises:
        InputError: The file does not exist, a line is something else or no rigid motion, or the
            calibration has no `Tr`.
    """
    poses = []
    for number, line in _lines(path):
        values = _numbers(line, path, number)
        if len(values) != 12:
            raise InputError(
                f"has {len(values)} numbers, 12 were expected", path=path, place=f"row {number}"
            )
        poses.append(_square(values))
        _refuse_bent(poses[-1], path, number)
    stacked = np.stack(poses) if poses else np.empty((0, 4, 4))
    if calib is None:
        return stacked
    if LIDAR_TO_CAMERA not in calib:
        raise InputError(
            f"needs the matrix {LIDAR_TO_CAMERA} of its calibration",
            path=path,
            remedy="add the line 'Tr: ...' to calib.txt",
        )
    transform = calib[LIDAR_TO_CAMERA]
    return np.asarray(np.linalg.inv(transform) @ stacked @ transform)


def read_times(path: Path) -> Float64[np.ndarray, " frames"]:
    """Read one time in seconds per line.

    Raises:
        InputError: The file does not exist, or a line is something else.
    """
    times = []
    for number, line in _lines(path):
        values = _numbers(line, path, number)
        if len(values) != 1:
            raise InputError(
                f"has {len(values)} numbers, one was expected", path=path, place=f"row {number}"
            )
        times.append(values[0])
    return np.array(times, dtype=np.float64)


def time_of(cloud: Path) -> float | None:
    """When a scan of KITTI's layout was taken: the row of `times.txt` that its name counts from 0.

    Args:
        cloud: `sequences/SS/velodyne/NNNNNN.bin`.

    Returns:
        Seconds. None: the file is no such scan, or there is no such row; a `times.txt` that cannot
        be read is warned of, once, because scans are of use without their times.
    """
    folder = cloud.absolute().parent  # as the user typed it, it may be no more than a name
    path = folder.parent / _TIMES
    if folder.name != CLOUDS or not cloud.stem.isdecimal() or not path.is_file():
        return None
    times, number = _known_times(path, path.stat().st_mtime_ns), int(cloud.stem)
    return float(times[number]) if number < len(times) else None


@functools.lru_cache(maxsize=64)
def _known_times(path: Path, _: int) -> Float64[np.ndarray, " frames"]:
    """The times of a file of a certain age, read once; none where it is broken."""
    try:
        return read_times(path)
    except InputError as error:
        logger.warning("%s; its scans have no times", error)
        return np.empty(0)


def _lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise InputError("does not exist", path=path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("is not a text file", path=path) from None
    return [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _numbers(text: str, path: Path, number: int) -> list[float]:
    try:
        values = [float(part) for part in text.split()]
    except ValueError as error:
        raise InputError(str(error), path=path, place=f"row {number}") from None
    if not np.isfinite(values).all():
        raise InputError("has a number that is not finite", path=path, place=f"row {number}")
    return values


def _refuse_bent(matrix: Float64[np.ndarray, "4 4"], path: Path, number: int) -> None:
    turn = matrix[:3, :3]
    if not np.allclose(turn @ turn.T, np.eye(3), atol=_RIGID) or np.linalg.det(turn) < 0:
        raise InputError(
            "is not a turn and a shift (the rows of a 3 x 4 matrix were expected)",
            path=path,
            place=f"row {number}",
        )


def _square(values: list[float]) -> Float64[np.ndarray, "4 4"]:
    return np.vstack([np.reshape(values, (3, 4)), [0.0, 0.0, 0.0, 1.0]])
