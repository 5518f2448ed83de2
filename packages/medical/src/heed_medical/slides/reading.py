"""Open whole slides (through tiffslide) and plain pictures in one way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from heed_core.errors import InputError, MissingExtra, reason_of
from heed_medical.images import PICTURE_SUFFIXES

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif")
"""What tiffslide opens."""
PLAIN_SUFFIXES = tuple(suffix for suffix in PICTURE_SUFFIXES if suffix not in SLIDE_SUFFIXES)


@runtime_checkable
class Slide(Protocol):
    """A slide that is open."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the full slide in pixels."""

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel of the full slide, where the file tells."""

    def region(self, x: int, y: int, side: int, out: int) -> UInt8[np.ndarray, "out out 3"]:
        """A square of the full slide, scaled to `out` pixels; white beyond the border."""

    def thumbnail(self, side: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole slide, its longer side at most `side` pixels."""


@contextmanager
def open_slide(path: Path) -> Iterator[Slide]:
    """Open a slide or a picture.

    Raises:
        InputError: The file is missing, of another format or damaged.
        MissingExtra: A slide without tiffslide.
    """
    if not path.is_file():
        raise InputError("no such file", path=path)
    if path.suffix.lower() in PLAIN_SUFFIXES:
        yield _Picture(path)
        return
    try:
        import tiffslide
    except ImportError:
        raise MissingExtra("tiffslide", "heed-medical[slides]") from None
    try:
        slide = tiffslide.TiffSlide(path)
    except Exception as error:  # tifffile lets anything escape from a damaged file
        raise InputError(
            f"is not a slide that can be read ({reason_of(error)})",
            path=path,
            remedy=f"give one of {', '.join((*SLIDE_SUFFIXES, *PLAIN_SUFFIXES))}",
        ) from None
    with slide:
        yield _Pyramid(path, slide)


class _Pyramid:
    """A slide of several levels."""

    def __init__(self, path: Path, slide: object) -> None:
        self._path = path
        self._slide: _TiffSlide = slide  # type: ignore[assignment]

    @property
    def size(self) -> tuple[int, int]:
        width, height = self._slide.dimensions
        return int(width), int(height)

    @property
    def mpp(self) -> float | None:
        value = self._slide.properties.get("tiffslide.mpp-x")
        return float(value) if isinstance(value, int | float | str) and float(value) > 0 else None

    def region(self, x: int, y: int, side: int, out: int) -> UInt8[np.ndarray, "out out 3"]:
        level = self._slide.get_best_level_for_downsample(side / out)
        scale = float(self._slide.level_downsamples[level])
        pixels = max(1, round(side / scale))
        try:
            picture = self._slide.read_region((x, y), level, (pixels, pixels))
        except Exception as error:  # a damaged tile, a missing decoder
            raise InputError(
                f"the square at x={x}, y={y} cannot be read ({reason_of(error)})", path=self._path
            ) from None
        return self._white_beyond(_pixels(picture, (out, out)), x, y, side)

    def thumbnail(self, side: int) -> UInt8[np.ndarray, "h w 3"]:
        try:
            picture = self._slide.get_thumbnail((side, side))
        except Exception as error:
            raise InputError(f"cannot be read ({reason_of(error)})", path=self._path) from None
        return _pixels(picture)

    def _white_beyond(self, square: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
        width, height = self.size
        rows = round(max(0, min(1, (height - y) / side)) * len(square))
        columns = round(max(0, min(1, (width - x) / side)) * len(square))
        square[rows:], square[:, columns:] = 255, 255
        return square


class _TiffSlide(Protocol):
    """What is used of tiffslide."""

    dimensions: tuple[int, int]
    level_downsamples: tuple[float, ...]
    properties: dict[str, object]

    def get_best_level_for_downsample(self, downsample: float) -> int: ...

    def read_region(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image: ...

    def get_thumbnail(self, size: tuple[int, int]) -> Image.Image: ...


class _Picture:
    """A plain picture, decoded as a whole."""

    mpp = None

    def __init__(self, path: Path) -> None:
        self._picture = _open_picture(path)

    @property
    def size(self) -> tuple[int, int]:
        return self._picture.size

    def region(self, x: int, y: int, side: int, out: int) -> UInt8[np.ndarray, "out out 3"]:
        canvas = Image.new("RGB", (side, side), (255, 255, 255))
        box = (x, y, min(x + side, self.size[0]), min(y + side, self.size[1]))
        canvas.paste(self._picture.crop(box))
        return _pixels(canvas, (out, out))

    def thumbnail(self, side: int) -> UInt8[np.ndarray, "h w 3"]:
        small = self._picture.copy()
        small.thumbnail((side, side))
        return _pixels(small)


def read_pixels(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a plain picture.

    Raises:
        InputError: It is missing, of another format or damaged.
    """
    return _pixels(_open_picture(path))


def _open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's readers raise several kinds
        raise InputError(f"cannot be read as a picture ({reason_of(error)})", path=path) from None


def _pixels(picture: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    picture = picture.convert("RGB")
    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return np.array(picture, dtype=np.uint8)
