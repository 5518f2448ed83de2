"""The pictures that scanpaths are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from heed_core.errors import InputError
from heed_gaze.scanpaths import Size

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
FOLDERS = ("", "images", "stimuli", "STIMULI")
"""Where pictures are looked for beside a file of scanpaths, also one folder below."""


def is_picture(path: Path) -> bool:
    """Whether the name is that of a picture."""
    return path.suffix.lower() in SUFFIXES


def find_pictures(root: Path) -> dict[str, Path]:
    """The pictures of a data set by file name; the first of a name counts.

    COCO-Search18 has a folder per category, with the same picture in several: they are alike.
    """
    found: dict[str, Path] = {}
    for folder in FOLDERS:
        levels = ("*",) if not folder else ("*", "*/*")
        for level in levels:
            for path in sorted((root / folder).glob(level)):
                if is_picture(path):
                    found.setdefault(path.name, path)
    return found


def picture_size(path: Path) -> Size:
    """Width and height of a picture file.

    Raises:
        InputError: It cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"is no picture that can be read ({error})", path=path) from None


def read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in RGB.

    Raises:
        InputError: It cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(
            f"is no picture that can be read ({error})", path=path, remedy="get the file again"
        ) from None
