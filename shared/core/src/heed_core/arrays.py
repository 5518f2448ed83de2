"""Arrays in users' `.npy` and `.npz` files; nothing in a file is ever run."""

import math
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from heed_core.errors import InputError, reason_of


def load_array(path: Path, *, mapped: bool = False) -> Shaped[np.ndarray, "..."]:
    """Read a `.npy` file.

    Args:
        path: The file.
        mapped: Leave the values on disk until they are used; the array cannot be written to.

    Raises:
        InputError: It is missing, damaged or shorter than its header says, or holds objects.
    """
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        return array if mapped else np.array(array)
    except Exception as error:  # of numpy, of the parser of its headers, of the memory
        raise InputError(
            f"is not a numpy array ({reason_of(error, path)})",
            path=path,
            remedy="copy it again, or write it with numpy.save",
        ) from None


def load_arrays(path: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Read all arrays of a `.npz` file.

    Raises:
        InputError: It is missing, damaged or shorter than its headers say, or holds objects.
    """
    try:
        with path.open("rb") as file:
            _check_lengths(path)
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except Exception as error:  # as above, and of zipfile and zlib
        raise InputError(
            f"is not an archive of arrays ({reason_of(error, path)})",
            path=path,
            remedy="copy it again, or write it with numpy.savez",
        ) from None


def _check_lengths(path: Path) -> None:
    """Refuse arrays whose headers promise more than their part of the archive holds."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }.get(version)
                if read is None:
                    raise ValueError(f"{info.filename} has the unknown version {version}")
                shape, _, dtype = read(stream)
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} is shorter than its header says")
