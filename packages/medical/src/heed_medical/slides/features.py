"""From slides to bags: find tissue, cut tiles, encode them, write features and a thumbnail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, UInt8
from PIL import Image

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_medical.slides.reading import PLAIN_SUFFIXES, SLIDE_SUFFIXES, open_slide
from heed_medical.slides.tiling import Tiling, find_tiles, read_tiles
from heed_medical.slides.tissue import TissueSearch
from heed_medical.slides.writing import write_features

FOLDER = "h5_files"
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
                remedy="rename one of them",
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
    picture = out / "thumbnails" / f"{path.stem}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(thumbnail).save(picture)
    target = out / FOLDER / f"{path.stem}.h5"
    write_features(target, features, corners, patch_size=side, slide_size=size)
    return Extracted(slide=path.stem, patches=len(corners), dim=features.shape[1], path=target)
