"""Arrays in users' .npy files: memory-mapped, checked, never unpickled.

The only pickles of the field, `mapping_<family>.npy` of the Algonauts 2023 challenge (a dict of id
-> name), are read by an unpickler that builds plain numbers, strings, dicts and numpy arrays of
them and refuses everything else, so that no code of a file runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heed_core.arrays import load_array
from heed_core.errors import InputError

_PLAIN = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("_codecs", "encode"),
    }
)


def read_array(
    path: Path, *, axes: Sequence[str], kinds: str = "fiu", lengths: Mapping[str, int] | None = None
) -> np.ndarray:
    """Open a .npy file without reading its values.

    Args:
        path: The file.
        axes: Names of its axes, for messages.
        kinds: numpy's letters of the types that are allowed.
        lengths: Lengths that axes must have.

    Raises:
        InputError: No such file, damaged, or another type or shape.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="see the layout in info")
    array = load_array(path, mapped=True)
    if array.dtype.kind not in kinds:
        raise InputError(
            f"holds {array.dtype}, not numbers", path=path, remedy="save it as numbers"
        )
    if array.ndim != len(axes):
        raise InputError(
            f"has the shape {array.shape}, not ({', '.join(axes)})",
            path=path,
            remedy="save it with these axes",
        )
    for axis, length in (lengths or {}).items():
        found = array.shape[list(axes).index(axis)]
        if found != length:
            raise InputError(
                f"has {found} {axis} where there are {length}",
                path=path,
                remedy="use files of one subject and one set of images",
            )
    return array


def refuse_gaps(path: Path, array: np.ndarray, *, rows: int = 1024) -> None:
    """Raise an InputError that names the first row with a value that is not finite."""
    for start in range(0, len(array), rows):
        fine = np.isfinite(array[start : start + rows])
        if not fine.all():
            row = start + int(np.argwhere(~fine)[0][0])
            raise InputError(
                "holds NaN or infinite values",
                path=path,
                place=f"row {row}",
                remedy="leave those images out, or set data.gaps to 'skip' to ignore the values",
            )


def read_mapping(path: Path) -> dict[int, str]:
    """Read an id -> name table that numpy has pickled into a .npy file.

    Raises:
        InputError: No such file, damaged, or more than numbers and names.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="see the layout in info")
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            read(file)
            loaded = _PlainUnpickler(file).load()
        table = loaded.item() if isinstance(loaded, np.ndarray) else loaded
        return {int(key): str(name) for key, name in table.items()}
    except _NotPlainError as error:
        raise InputError(str(error), path=path, remedy="use the file of the challenge") from None
    except Exception as error:  # of pickle, of numpy, of the parser of its headers
        raise InputError(
            f"is no table of id -> name ({type(error).__name__})",
            path=path,
            remedy="use the file of the challenge",
        ) from None


class _NotPlainError(pickle.UnpicklingError):
    """A pickle that would build more than numbers and names."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds arrays and plain values only."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of a name, if it is harmless."""
        if (module, name) not in _PLAIN:
            raise _NotPlainError(f"holds {module}.{name}, which is no table of id -> name")
        return super().find_class(module, name)
