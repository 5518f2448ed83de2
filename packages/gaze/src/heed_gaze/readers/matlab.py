"""OSIE's `fixations.mat` (Xu et al., Journal of Vision 2014)."""

from __future__ import annotations

import subprocess
import sys
import warnings
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


_MEMORY_BYTES = 1 << 30
"""For reading a file, beside 64 times its size."""

_TRY = f"""
import sys
from pathlib import Path
from scipy.io import loadmat
path = Path(sys.argv[1])
try:
    import resource
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + {_MEMORY_BYTES} + 64 * path.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
except (ImportError, OSError):
    pass  # not Linux: without a limit
try:
    loadmat(path, struct_as_record=False, squeeze_me=True, variable_names="fixations")
except Exception as error:
    sys.exit(" ".join(f"{{type(error).__name__}}: {{error}}".split())[:200])
"""
"""Reads the file within bounds and writes what is wrong with it to standard error."""


def _variable(path: Path) -> np.ndarray:
    from scipy.io import loadmat  # type: ignore[import-untyped]

    # Damaged files end scipy's reader with its process or take all memory: another one goes first.
    tried = subprocess.run(
        [sys.executable, "-c", _TRY, str(path)], capture_output=True, text=True, check=False
    )
    told = next(reversed(tried.stderr.splitlines()), "")
    if told.startswith("NotImplementedError"):
        raise InputError("is a MATLAB file of version 7.3", path=path, remedy="save it with -v7")
    if tried.returncode:
        why = f" ({told})" if tried.returncode == 1 else ""
        raise InputError(f"is no whole MATLAB file{why}", path=path, remedy="get the file again")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on odd variables, which name no file
        found = loadmat(path, struct_as_record=False, squeeze_me=True, variable_names="fixations")
    if "fixations" not in found:
        raise InputError("holds no variable 'fixations'", path=path, remedy="give OSIE's file")
    return np.atleast_1d(found["fixations"])
