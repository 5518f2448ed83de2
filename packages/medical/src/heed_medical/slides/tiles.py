"""Tiles that were cut already: each folder of pictures is a bag, places come from file names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.bags.bag import patch_side
from heed_medical.images import PICTURE_SUFFIXES, shape_text
from heed_medical.slides.reading import read_pixels

_PLACES = (
    re.compile(r"(?<![a-z])x[=_]?(?P<x>\d+)[,_\- ]+y[=_]?(?P<y>\d+)(?!\d)", re.IGNORECASE),
    re.compile(r"(?:^|_)(?P<x>\d+)_(?P<y>\d+)$"),
)
"""`slide_x1024_y2048`, `slide [x=1024,y=2048,w=512,h=512]`; `slide_1024_2048`, `1024_2048`."""


@dataclass(frozen=True, kw_only=True)
class TileFolder:
    """The tiles of one slide."""

    name: str
    files: tuple[Path, ...]


def find_tile_folders(paths: Sequence[Path]) -> list[TileFolder]:
    """Every folder that holds pictures, in and below some folders, as a bag of its name.

    Tiles are in the order of the numbers in their names.

    Raises:
        InputError: A path that is no folder or holds no picture, or two bags of one name.
    """
    found: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        if path.is_file():
            raise InputError("is a file, a folder of tiles is needed", path=path)
        if not path.is_dir():
            raise InputError("no such folder", path=path)
        inside = [p for p in files_under(path) if p.suffix.lower() in PICTURE_SUFFIXES]
        if not inside:
            raise InputError(f"holds no tile ({', '.join(PICTURE_SUFFIXES)})", path=path)
        for file in inside:
            found[file.parent].append(file)
    seen: dict[str, Path] = {}
    for folder in found:
        other = seen.setdefault(folder.resolve().name, folder)
        if other != folder:
            raise InputError(
                f"has the name of {other}; bags are named after folders",
                path=folder,
                remedy="rename one of them",
            )
    return [
        TileFolder(name=name, files=tuple(sorted(set(found[folder]), key=_numbers_in_order)))
        for name, folder in seen.items()
    ]


def _numbers_in_order(path: Path) -> list[tuple[str, int]]:
    """A key that puts t2 before t10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", path.name)]


def tile_places(files: Sequence[Path]) -> Int64[np.ndarray, "n 2"] | None:
    """x, y of the tiles from their names; None unless all names hold places, each another one.

    Example:
        >>> tile_places([Path("s_x0_y8.png"), Path("s_x8_y8.png")]).tolist()
        [[0, 8], [8, 8]]
    """
    for pattern in _PLACES:
        matches = [match for file in files if (match := pattern.search(file.stem))]
        places = np.array([[int(match["x"]), int(match["y"])] for match in matches], dtype=np.int64)
        if len(matches) == len(files) == len(np.unique(places, axis=0)):
            return places
    return None


def side_on_slide(places: Int64[np.ndarray, "n 2"], pixels: int) -> int:
    """The side of a tile in the units of the places.

    Tiles that lie further apart than they are wide were cut at a lower resolution; places that
    count columns and rows are 1 apart; in all other cases a pixel is a pixel of the slide.

    Args:
        places: x, y of the upper left corners.
        pixels: Side of a tile in its own pixels.
    """
    apart = patch_side(places) or pixels
    return apart if apart == 1 or apart > pixels else pixels


def read_tile_files(
    files: Sequence[Path], *, side: int, batch: int
) -> Iterator[UInt8[np.ndarray, "b side side 3"]]:
    """The pixels of some tiles at a time, scaled to `side`.

    Raises:
        InputError: A tile that cannot be read, is not square or of another size than the first.
    """
    first: tuple[int, int] | None = None
    for start in range(0, len(files), batch):
        part = []
        for file in files[start : start + batch]:
            pixels = read_pixels(file)
            size = pixels.shape[:2]
            first = first or size
            if size != first:
                raise InputError(
                    f"is {shape_text(size)} pixels, {files[0].name} is {shape_text(first)}",
                    path=file,
                    remedy="cut all tiles of a slide to one size",
                )
            if size[0] != size[1]:
                raise InputError(f"is {shape_text(size)} pixels, tiles are square", path=file)
            part.append(_scaled(pixels, side))
        yield np.stack(part)


def _scaled(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    if pixels.shape[:2] == (side, side):
        return pixels
    scaled = Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)
    return np.array(scaled, dtype=np.uint8)


class Mosaic:
    """A small picture of a slide that is put together from its tiles, white where there is none.

    Args:
        places: x, y of the upper left corners of all tiles.
        side: Of a tile, in the same units.
        longest: Pixels along the longer side of the picture.
    """

    def __init__(self, places: Int64[np.ndarray, "n 2"], *, side: int, longest: int) -> None:
        self.places, self.side = places, side
        width, height = (int(value) for value in places.max(axis=0) + side)
        self.size = (width, height)
        """Width and height that the tiles take up, in the units of the places."""
        self._scale = longest / max(self.size)
        shape = [max(1, round(value * self._scale)) for value in (height, width)]
        self.picture = np.full((*shape, 3), 255, dtype=np.uint8)

    def paste(self, first: int, tiles: UInt8[np.ndarray, "b s s 3"]) -> None:
        """Put tiles where they lie, the first of which has the number `first`."""
        for (x, y), pixels in zip(self.places[first : first + len(tiles)], tiles, strict=True):
            low = np.floor(np.array([y, x]) * self._scale).astype(int)
            high = np.ceil(np.array([y + self.side, x + self.side]) * self._scale).astype(int)
            window = self.picture[low[0] : high[0], low[1] : high[1]]
            rows, columns = (
                np.arange(count) * len(pixels) // max(count, 1) for count in window.shape[:2]
            )
            window[:] = pixels[np.ix_(rows, columns)]
