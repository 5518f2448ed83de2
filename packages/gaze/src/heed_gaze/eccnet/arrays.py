"""Arrays of numbers in `.npy` files, as the official program stores masks and results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from heed_core.errors import InputError, reason_of


def read_numbers(path: Path, axes: Sequence[str], *, remedy: str | None = None) -> np.ndarray:
    """An array of numbers with the given axes; nothing in the file is ever run.

    Args:
        path: A file of `numpy.save`.
        axes: What each axis counts, for the message.
        remedy: What to do where the array is another.

    Raises:
        InputError: It cannot be read, has another number of axes, or holds no numbers.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"cannot be read as an array ({reason_of(error)})",
            path=path,
            remedy="write it with numpy.save",
        ) from None
    numbers = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
    if not numbers or array.ndim != len(axes):
        raise InputError(
            f"has the shape {getattr(array, 'shape', '?')}, not ({', '.join(axes)}) of numbers",
            path=path,
            remedy=remedy,
        )
    return np.asarray(array)
