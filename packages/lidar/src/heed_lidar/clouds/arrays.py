"""Files that are plain arrays: `.bin` (KITTI, nuScenes), `.npy` and `.npz`."""

from pathlib import Path

import numpy as np
from jaxtyping import Num, Shaped

from heed_core.arrays import load_array, load_arrays
from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, refuse_twice

KITTI = ("x", "y", "z", "intensity")
NUSCENES = ("x", "y", "z", "intensity", "ring")
_POINT_ARRAYS = ("xyz", "points", "data", "arr_0")

_MOST_COLUMNS = 20


def read_bin(path: Path, options: CloudOptions) -> FileColumns:
    """Read rows of little-endian float32.

    The number of columns is that of `options.columns`, else of the name: 5 for `.pcd.bin`
    (nuScenes), 4 for other `.bin` (KITTI). It is never guessed from the contents.

    Raises:
        InputError: The bytes are no whole number of rows, or rows that nobody named have negative
            intensities, as those of another number of columns do.
    """
    nuscenes = path.name.lower().endswith(".pcd.bin")
    columns = options.columns or (NUSCENES if nuscenes else KITTI)
    size = path.stat().st_size
    if size % (4 * len(columns)):
        raise InputError(
            f"has {size} bytes, not a multiple of {4 * len(columns)} ({len(columns)} float32 "
            f"columns: {' '.join(columns)})",
            path=path,
            remedy=_other_columns(size, len(columns)),
        )
    rows = np.fromfile(path, dtype="<f4").reshape(-1, len(columns))
    if not options.columns and (rows[:, KITTI.index("intensity")] < 0).any():
        raise InputError(
            f"has negative intensities as rows of {len(columns)} float32 columns "
            f"({' '.join(columns)})",
            path=path,
            remedy="name the columns that it has with --data.columns x y z ...",
        )
    return FileColumns(values={name: rows[:, k] for k, name in enumerate(columns)})


def _other_columns(size: int, count: int) -> str:
    """What to do with a file that has no whole number of rows of `count` columns."""
    fitting = [c for c in (KITTI, NUSCENES) if len(c) != count and size % (4 * len(c)) == 0]
    if fitting:
        names = " ".join(fitting[0])
        return f"{len(fitting[0])} columns would fit: --data.columns {names}"
    tried = " nor ".join(f"{len(c)}" for c in (KITTI, NUSCENES))
    return f"neither {tried} columns fit: the file is truncated, or name its --data.columns"


def read_npy(path: Path, options: CloudOptions) -> FileColumns:
    """Read an array of N rows, or a structured array with named fields.

    Raises:
        InputError: The file is no array of numbers, is truncated, or its columns have no names.
    """
    if path.stat().st_size == 0:
        raise InputError("is empty, an array was expected", path=path)
    array = np.asarray(load_array(path, mapped=True))
    return FileColumns(values=_columns_of(array, options.columns, path=path))


def read_npz(path: Path, options: CloudOptions) -> FileColumns:
    """Read the arrays `x`, `y`, `z`, or `xyz` or one of points, and columns beside them.

    Raises:
        InputError: The file is no archive of arrays, is damaged, or its arrays do not fit.
    """
    arrays = load_arrays(path)
    points = next((name for name in _POINT_ARRAYS if name in arrays), None)
    values: dict[str, Num[np.ndarray, " n"]] = {}
    if points == "xyz" or (points is not None and not set("xyz") <= set(arrays)):
        names = KITTI[:3] if points == "xyz" else options.columns
        values = _columns_of(arrays.pop(points), names, path=path)
        refuse_twice([*values, *(n for n, a in arrays.items() if a.ndim == 1)], path=path)
    count = len(next(iter(values.values()), next(iter(arrays.values()), np.empty(0))))
    values |= {name: a for name, a in arrays.items() if a.ndim == 1 and len(a) == count}
    for axis in "xyz":
        if axis in arrays and axis not in values:
            raise InputError(
                f"has arrays of different lengths: {axis} {arrays[axis].shape}, others ({count},)",
                path=path,
            )
    return FileColumns(values=_numbers(values, path=path))


def _columns_of(
    array: Shaped[np.ndarray, "..."], names: tuple[str, ...], *, path: Path
) -> dict[str, Num[np.ndarray, " n"]]:
    if array.dtype.names:
        return _numbers({name: array[name] for name in array.dtype.names}, path=path)
    if array.ndim != 2:
        raise InputError(
            f"has an array of shape {array.shape}, rows of points were expected", path=path
        )
    names = names or (KITTI[: array.shape[1]] if array.shape[1] in (3, 4) else ())
    if len(names) != array.shape[1]:
        what = f"{len(names)} are named" if names else "they have no names"
        turned = len(array) < _MOST_COLUMNS < array.shape[1]
        raise InputError(
            f"has {array.shape[1]} columns and {what}",
            path=path,
            remedy="transpose it: a row is a point"
            if turned
            else "name them all with --data.columns x y z ...",
        )
    return _numbers({name: array[:, k] for k, name in enumerate(names)}, path=path)


def _numbers(
    values: dict[str, Shaped[np.ndarray, "..."]], *, path: Path
) -> dict[str, Num[np.ndarray, " n"]]:
    for name, array in values.items():
        if array.dtype.kind not in "fiub" or array.ndim != 1:
            raise InputError(
                f"has a column {name} of type {array.dtype} and shape {array.shape}, "
                f"one number per point was expected",
                path=path,
            )
    return values
