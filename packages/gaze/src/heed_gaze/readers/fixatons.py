"""FixaTons (Zanca et al., arXiv 1802.02534): a folder of text files per picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_gaze.readers.pictures import is_picture
from heed_gaze.readers.trials import Trials, build_trial

SCANPATHS = "SCANPATHS"


def read_fixatons(root: Path) -> Trials:
    """The scanpaths of one data set: `SCANPATHS/PICTURE/VIEWER`, rows of x, y, start and end in s.

    The picture is named as its file in `STIMULI`, with suffix, where there is one.

    Raises:
        InputError: The folder holds no scanpath.
    """
    names = {file.stem: file.name for file in root.glob("STIMULI/*") if is_picture(file)}
    files = sorted(file for file in (root / SCANPATHS).glob("*/*") if file.is_file())
    if not files:
        raise InputError("holds no scanpath", path=root / SCANPATHS)
    for file in files:
        folder = file.parent.name
        image = names.get(folder) or names.get(Path(folder).stem) or folder
        try:
            rows = _rows(file)
        except (ValueError, UnicodeDecodeError):
            yield InputError(
                "must hold rows of x, y, start and end in seconds",
                path=file,
                remedy="correct or remove the file",
            )
            continue
        x, y, start, end = rows.T
        yield build_trial(
            file,
            "scanpath",
            {"image": image, "subject": file.stem},
            x=x,
            y=y,
            onset=start,
            duration=end - start,
        )


def _rows(file: Path) -> Float64[np.ndarray, "n 4"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of numpy about a file without rows
        rows = np.loadtxt(file, ndmin=2, dtype=np.float64)
    if rows.size == 0:
        return np.zeros((0, 4))
    if rows.shape[1] != 4:
        raise ValueError(f"rows of {rows.shape[1]} numbers")
    return rows
