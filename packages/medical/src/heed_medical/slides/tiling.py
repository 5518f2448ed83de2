"""Cut a slide into square tiles that show tissue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from heed_core.errors import InputError
from heed_medical.slides.reading import Slide
from heed_medical.slides.tissue import TissueSearch, tissue_mask


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Which tiles are cut."""

    tile: int = 224
    """Side of a tile in pixels, as the encoder gets it."""
    mpp: float | None = None
    """Micrometres per pixel of a tile (0.5 is 20x). None: the full resolution of the slide."""
    overlap: float = 0.0
    """Share of a tile that overlaps the next."""
    least_tissue: float = 0.5
    """Tiles with a smaller share of tissue are left out."""

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, got {self.tile}")
        if self.mpp is not None and not self.mpp > 0:
            raise ValueError(f"mpp must be above 0, got {self.mpp}")
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not 0.0 <= self.least_tissue <= 1.0:
            raise ValueError(f"least_tissue must be within 0..1, got {self.least_tissue}")

    def side_in(self, slide: Slide, *, name: str) -> int:
        """Side of a tile in pixels of the full slide.

        Raises:
            InputError: `mpp` is asked for and the slide does not tell its own.
        """
        if self.mpp is None:
            return self.tile
        if slide.mpp is None:
            raise InputError(
                "does not tell its micrometres per pixel",
                path=name,
                remedy="leave --tiling.mpp out to cut at full resolution",
            )
        return max(1, round(self.tile * self.mpp / slide.mpp))


def tile_corners(
    mask: Bool[np.ndarray, "h w"], size: tuple[int, int], side: int, tiling: Tiling
) -> Int64[np.ndarray, "n 2"]:
    """x, y of the tiles with enough tissue, row by row, in pixels of the full slide.

    Tiles lie inside the slide; a slide that is smaller than a tile has one at its corner.

    Args:
        mask: Tissue, at any scale of the whole slide.
        size: Width and height of the full slide.
        side: Of a tile, in pixels of the full slide.
        tiling: Overlap and least share of tissue.
    """
    step = max(1, round(side * (1 - tiling.overlap)))
    xs, ys = (np.arange(0, max(length - side, 0) + 1, step) for length in size)
    heights, widths = mask.shape
    summed = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def edges(starts: np.ndarray, length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
        low = np.floor(starts * cells / length).astype(int).clip(0, cells - 1)
        high = np.ceil((starts + side) * cells / length).astype(int).clip(1, cells)
        return low, np.maximum(high, low + 1)

    left, right = edges(xs, size[0], widths)
    top, bottom = edges(ys, size[1], heights)
    tissue = (
        summed[np.ix_(bottom, right)]
        - summed[np.ix_(top, right)]
        - summed[np.ix_(bottom, left)]
        + summed[np.ix_(top, left)]
    )
    share = tissue / ((bottom - top)[:, None] * (right - left)[None])
    rows, columns = np.nonzero(share >= max(tiling.least_tissue, np.finfo(float).tiny))
    return np.stack([xs[columns], ys[rows]], axis=1)


def find_tiles(
    slide: Slide, search: TissueSearch, tiling: Tiling, *, name: str
) -> tuple[Int64[np.ndarray, "n 2"], int]:
    """The corners of the tiles with tissue, and their side, in pixels of the full slide.

    Raises:
        InputError: There is no tissue, or the resolution is not known.
    """
    side = tiling.side_in(slide, name=name)
    mask = tissue_mask(slide.thumbnail(search.thumbnail_side), search)
    corners = tile_corners(mask, slide.size, side, tiling)
    if not len(corners):
        raise InputError(
            "shows no tissue",
            path=name,
            remedy="lower --tissue.saturation or --tiling.least-tissue, or leave the slide out",
        )
    return corners, side


def read_tiles(
    slide: Slide, corners: Int64[np.ndarray, "n 2"], *, side: int, tile: int, batch: int
) -> Iterator[UInt8[np.ndarray, "b tile tile 3"]]:
    """The pixels of the tiles, some at a time."""
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        yield np.stack([slide.region(int(x), int(y), side, tile) for x, y in part])
