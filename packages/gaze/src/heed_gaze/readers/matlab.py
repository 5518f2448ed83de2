"""OSIE's `fixations.mat` (Xu et al., Journal of Vision 2014)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_gaze.readers.trials import Trials, build_trial
from heed_gaze.scanpaths import Size

OSIE_SIZE: Size = (800, 600)
"""Of OSIE's pictures."""


def read_osie_mat(path: Path) -> Trials:
    """The cells of `fixations`: `img`, and `subjects` with fix_x, fix_y and fix_duration (ms).

    Viewers have no names; they are numbered from 1, as they are in every picture.

    Raises:
        InputError: The file is no MATLAB file up to version 7, is truncated, or holds no
            `fixations`.
    """
    fixations = _variable(path)
    for number, picture in enumerate(fixations, start=1):
        if not hasattr(picture, "img") or not hasattr(picture, "subjects"):
            yield InputError("has no img and subjects", path=path, place=f"fixations {number}")
            continue
        image = str(picture.img)
        for viewer, trial in enumerate(np.atleast_1d(picture.subjects), start=1):
            place = f"image {image}, subject {viewer}"
            names = ("fix_x", "fix_y", "fix_duration")
            missing = [name for name in names if not hasattr(trial, name)]
            if missing:
                yield InputError(f"has no {missing[0]}", path=path, place=place)
                continue
            x, y, duration = (np.atleast_1d(getattr(trial, name)) for name in names)
            yield build_trial(
                path,
                place,
                {"image": image, "subject": str(viewer)},
                x=x,
                y=y,
                duration=duration,
                seconds=1e-3,
            )


_TRY = """
import sys
from scipy.io import loadmat
loadmat(sys.argv[1], struct_as_record=False, squeeze_me=True, variable_names="fixations")
"""
"""Ends with 0 or with a Python error, 1, unless the reader takes the process down."""


def _variable(path: Path) -> np.ndarray:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    # On some damaged files scipy's reader ends the whole process: another one goes first.
    tried = subprocess.run(
        [sys.executable, "-c", _TRY, str(path)], capture_output=True, check=False
    )
    if tried.returncode not in (0, 1):
        raise InputError("is no whole MATLAB file", path=path, remedy="get the file again")
    try:
        found = loadmat(path, struct_as_record=False, squeeze_me=True, variable_names="fixations")
    except NotImplementedError:
        raise InputError(
            "is a MATLAB file of version 7.3", path=path, remedy="save it with -v7"
        ) from None
    except Exception as error:  # a damaged file fails anywhere inside scipy
        raise InputError(
            f"is no whole MATLAB file ({type(error).__name__}: {error})",
            path=path,
            remedy="get the file again",
        ) from None
    if "fixations" not in found:
        raise InputError("holds no variable 'fixations'", path=path, remedy="give OSIE's file")
    return np.atleast_1d(found["fixations"])
