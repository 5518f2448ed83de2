"""Arrays of numbers in `.npy` files, as the official program stores masks and results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from heed_core.arrays import load_array
from heed_core.errors import InputError


def read_numbers(path: Path, axes: Sequence[str], *, remedy: str | None = None) -> np.ndarray:
    """An array of numbers with the given axes; nothing in the file is ever run.

    Args:
        path: A file of `numpy.save`.
        axes: What each axis counts, for the message.
        remedy: What to do where the array is another.

    Raises:
        InputError: It cannot be read, has another number of axes, or holds no numbers.
    """
    array = load_array(path)
    if array.dtype.kind not in "biuf" or array.ndim != len(axes):
        raise InputError(
            f"has the shape {array.shape}, not ({', '.join(axes)}) of numbers",
            path=path,
            remedy=remedy,
        )
    return array
