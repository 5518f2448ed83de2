"""Attention laid out on the slide, and the picture of the slide under it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int64, UInt8

from heed_core.errors import InputError
from heed_medical.images import PICTURE_SUFFIXES, read_picture
from heed_medical.slides.reading import SLIDE_SUFFIXES, open_slide

MOST_CELLS = 2000
"""Cells along the longer side of a map."""
THUMBNAIL_SIDE = 1024


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """One value per cell of a grid over the slide; NaN where there is no patch."""

    values: Float32[np.ndarray, "rows columns"]
    extent: tuple[float, float, float, float]
    """Left, right, bottom, top in pixels of the full slide, as matplotlib takes them."""


def lay_out(
    coords: Int64[np.ndarray, "n 2"], values: Float[np.ndarray, " n"], *, patch_size: int
) -> Heatmap:
    """Put the values of patches where they lie; patches that fall into one cell are averaged."""
    low = coords.min(axis=0)
    span = coords.max(axis=0) - low + patch_size
    cell = max(float(patch_size), float(span.max()) / MOST_CELLS)
    columns, rows = np.ceil(span / cell).astype(int)
    place = np.floor((coords - low + 0.5) / cell).astype(int)
    flat = place[:, 1] * columns + place[:, 0]
    counts = np.bincount(flat, minlength=rows * columns)
    sums = np.bincount(flat, weights=values, minlength=rows * columns)
    with np.errstate(invalid="ignore"):
        grid = (sums / counts).reshape(rows, columns).astype(np.float32)
    left, top = (float(value) for value in low)
    return Heatmap(values=grid, extent=(left, left + columns * cell, top + rows * cell, top))


def find_thumbnail(
    name: str, features: Path | None, folder: Path | None, slide_size: tuple[int, int] | None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    """The picture of a slide and the size of the full slide; None where there is none.

    Args:
        name: Of the slide; folders before it, which tell slides of one name apart, do not count.
        features: The file of its features; the folder `thumbnails` is looked for beside it.
        folder: Where the pictures or slides are.
        slide_size: Of the full slide; a plain picture can be used only where it is known.

    Raises:
        InputError: `folder` does not exist, or the picture cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise InputError("no such folder", path=folder, remedy="correct --data.thumbnails")
    name = name.rpartition("/")[2]
    beside = [] if features is None else [features.parent, features.parent.parent]
    folders = [folder] if folder is not None else [near / "thumbnails" for near in beside]
    for place in folders:
        for suffix in SLIDE_SUFFIXES:
            if (place / f"{name}{suffix}").is_file():
                with open_slide(place / f"{name}{suffix}") as slide:
                    return slide.thumbnail(THUMBNAIL_SIDE), slide.size
        for suffix in PICTURE_SUFFIXES:
            if slide_size is not None and (place / f"{name}{suffix}").is_file():
                array = read_picture(place / f"{name}{suffix}", channels="rgb").array
                return np.moveaxis(array, 0, -1).astype(np.uint8), slide_size
    return None
