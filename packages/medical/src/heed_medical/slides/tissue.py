"""Where a slide holds tissue: coloured pixels of its thumbnail, without specks and small holes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage  # type: ignore[import-untyped]


@dataclass(frozen=True, kw_only=True)
class TissueSearch:
    """How tissue is told from glass."""

    thumbnail_side: int = 1024
    """Longer side of the thumbnail in which tissue is looked for, in pixels."""
    saturation: float | None = None
    """Pixels of at least this saturation (0..1) are tissue. None: Otsu's threshold."""
    least_area: float = 0.0005
    """Smaller pieces and holes, as a share of the slide, are dropped and filled."""

    def __post_init__(self) -> None:
        if self.thumbnail_side < 16:
            raise ValueError(f"thumbnail_side must be at least 16, got {self.thumbnail_side}")
        if self.saturation is not None and not 0.0 <= self.saturation <= 1.0:
            raise ValueError(f"saturation must be within 0..1, got {self.saturation}")
        if not 0.0 <= self.least_area < 1.0:
            raise ValueError(f"least_area must be at least 0 and below 1, got {self.least_area}")


LEAST_SATURATION = 0.05
"""An automatic threshold is at least this: a slide without tissue stays empty."""
FULL_SATURATION = 0.35
"""A slide whose faintest pixels are as saturated as this is all tissue."""


def tissue_mask(
    thumbnail: UInt8[np.ndarray, "h w 3"], search: TissueSearch
) -> Bool[np.ndarray, "h w"]:
    """Which pixels show tissue."""
    saturation = ndimage.median_filter(_saturation(thumbnail), size=5)
    threshold = search.saturation
    if threshold is None:
        threshold = min(max(otsu(saturation), LEAST_SATURATION), FULL_SATURATION)
    mask = saturation >= threshold
    least = max(1, round(search.least_area * mask.size))
    mask = ~_without_specks(~_without_specks(mask, least), least)
    return np.asarray(mask)


def otsu(values: np.ndarray, *, bins: int = 256) -> float:
    """The threshold that divides values of 0..1 into two classes of least spread."""
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(float)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * gap**2)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))  # a plateau where a gap is empty
    return float(edges[1 + best].mean())


def _saturation(picture: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    high, low = picture.max(axis=2).astype(np.float32), picture.min(axis=2).astype(np.float32)
    return np.asarray(np.where(high > 0, (high - low) / np.maximum(high, 1), 0.0))


def _without_specks(mask: np.ndarray, least: int) -> np.ndarray:
    pieces, count = ndimage.label(mask)
    areas = np.bincount(pieces.ravel(), minlength=count + 1)
    kept = areas >= least
    kept[0] = False
    return np.asarray(kept[pieces])
