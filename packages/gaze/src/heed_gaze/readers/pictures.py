"""The pictures that scanpaths are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from heed_core.errors import InputError, reason_of
from heed_gaze.scanpaths import Size

if TYPE_CHECKING:
    from PIL.Image import Image

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


@contextmanager
def opened(path: Path) -> Iterator[Image]:
    """A picture file, to be decoded while it is open.

    Raises:
        InputError: It is not there, damaged, or larger than pictures are.
    """
    from PIL.Image import open as open_picture

    try:
        with open_picture(path) as picture:
            yield picture
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="check the path") from None
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise InputError(
            f"cannot be read as a picture ({reason_of(error, path)})",
            path=path,
            remedy="get the file again",
        ) from None


def picture_size(path: Path) -> Size:
    """Width and height of a picture file; raises as `opened`."""
    with opened(path) as picture:
        return picture.size


def read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in RGB, greys as three equal channels; raises as `opened`."""
    with opened(path) as picture:
        return np.array(picture.convert("RGB"))
