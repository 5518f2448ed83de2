"""From slides, or tiles of slides, to bags: encode tiles, write features and a thumbnail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, UInt8
from PIL import Image

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.slides.reading import PLAIN_SUFFIXES, SLIDE_SUFFIXES, open_slide, read_pixels
from heed_medical.slides.tiles import (
    Mosaic,
    TileFolder,
    read_tile_files,
    side_on_slide,
    tile_places,
)
from heed_medical.slides.tiling import Tiling, find_tiles, read_tiles
from heed_medical.slides.tissue import TissueSearch
from heed_medical.slides.writing import write_features

FOLDER = "h5_files"
THUMBNAIL_SIDE = 1024
"""Pixels along the longer side of a picture that is made of tiles."""
Encode = Callable[[UInt8[np.ndarray, "b h w 3"]], Float16[np.ndarray, "b d"]]


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """What came of one slide."""

    slide: str
    patches: int
    dim: int
    path: Path


def find_slides(paths: Sequence[Path]) -> list[Path]:
    """The slides and pictures in files and folders, each name once.

    Raises:
        InputError: A path that does not exist, holds none, or two slides of one name.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError("no such file or folder", path=path)
        if path.is_file():
            found.append(path)
            continue
        known = (*SLIDE_SUFFIXES, *PLAIN_SUFFIXES)
        inside = [p for p in files_under(path) if p.suffix.lower() in known]
        if not inside:
            raise InputError(f"holds no slide ({', '.join(known)})", path=path)
        found += inside
    seen: dict[str, Path] = {}
    for path in found:
        other = seen.setdefault(path.stem, path)
        if other != path:
            raise InputError(
                f"has the name of {other}; features are named after slides",
                path=path,
                remedy="rename one of them, or add --tiles where they are tiles of slides",
            )
    return list(seen.values())


def extract(
    path: Path,
    out: Path,
    encode: Encode,
    *,
    tiling: Tiling,
    tissue: TissueSearch,
    batch: int = 64,
) -> Extracted:
    """Write `h5_files/<slide>.h5` and `thumbnails/<slide>.png` of one slide into `out`.

    Pixels of at most `batch` tiles are in memory.

    Raises:
        InputError: The slide cannot be read or shows no tissue.
    """
    with open_slide(path) as slide:
        corners, side = find_tiles(slide, tissue, tiling, name=str(path))
        tiles = read_tiles(slide, corners, side=side, tile=tiling.tile, batch=batch)
        features = np.concatenate([encode(some) for some in tiles])
        thumbnail = slide.thumbnail(tissue.thumbnail_side)
        size = slide.size
    _write_thumbnail(out, path.stem, thumbnail)
    target = out / FOLDER / f"{path.stem}.h5"
    write_features(target, features, corners, patch_size=side, slide_size=size)
    return Extracted(slide=path.stem, patches=len(corners), dim=features.shape[1], path=target)


def extract_tiles(
    bag: TileFolder, out: Path, encode: Encode, *, side: int, batch: int = 64
) -> Extracted:
    """Write `h5_files/<bag>.h5` of tiles that were cut already, as `extract` does of a slide.

    Where the names of the tiles tell their places there is a thumbnail too, made of the tiles.

    Args:
        bag: The tiles.
        out: Where to write.
        encode: Makes a feature vector of each tile.
        side: Pixels to which a tile is scaled for the encoder.
        batch: Tiles whose pixels are in memory.

    Raises:
        InputError: A tile cannot be read, is not square or of another size.
    """
    places = tile_places(bag.files)
    mosaic = None
    if places is not None:
        own = len(read_pixels(bag.files[0]))
        mosaic = Mosaic(places, side=side_on_slide(places, own), longest=THUMBNAIL_SIDE)
    found = []
    for number, tiles in enumerate(read_tile_files(bag.files, side=side, batch=batch)):
        found.append(encode(tiles))
        if mosaic is not None:
            mosaic.paste(number * batch, tiles)
    features = np.concatenate(found)
    if mosaic is not None:
        _write_thumbnail(out, bag.name, mosaic.picture)
    target = out / FOLDER / f"{bag.name}.h5"
    write_features(
        target,
        features,
        places,
        patch_size=None if mosaic is None else mosaic.side,
        slide_size=None if mosaic is None else mosaic.size,
    )
    return Extracted(slide=bag.name, patches=len(features), dim=features.shape[1], path=target)


def _write_thumbnail(out: Path, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    path = out / "thumbnails" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
