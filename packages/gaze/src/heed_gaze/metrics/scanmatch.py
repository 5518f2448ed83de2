"""ScanMatch: alignment of grid cells, weighted by how far cells are apart.

Cristino, Mathot, Theeuwes, Gilchrist, "ScanMatch: A novel method for comparing fixation sequences",
Behavior Research Methods 42 (2010). Time O(n m) per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_gaze.metrics.alignment import in_batches, needleman_wunsch, pad
from heed_gaze.metrics.symbols import Symbols, grid_symbols, repeat_nearest
from heed_gaze.scanpaths import Scanpath, Size


@dataclass(frozen=True, kw_only=True)
class ScanMatch:
    """Settings; the defaults are those of the published toolbox."""

    bins: tuple[int, int] = (12, 8)
    """Columns and rows of the grid over the screen."""
    threshold: float = 3.5
    """Distance in cells at which a substitution scores 0; nearer ones score above. It should be
    about twice the standard deviation of the saccades' lengths."""
    gap: float = 0.0
    """Score of a cell that is beside nothing."""
    duration_bin_s: float | None = None
    """Repeat each cell once for so many seconds of its fixation, rounded; None: once. 0.05 is
    usual."""

    def __post_init__(self) -> None:
        if min(self.bins) < 1 or self.threshold <= 0 or self.gap > 0:
            raise ValueError(f"bins and threshold must be positive and the gap not, got {self}")
        if self.duration_bin_s is not None and self.duration_bin_s <= 0:
            raise ValueError(f"duration_bin_s must be positive, got {self.duration_bin_s}")


def scanmatch(
    first: Sequence[Scanpath],
    second: Sequence[Scanpath],
    *,
    size_px: Size,
    settings: ScanMatch | None = None,
) -> Float64[np.ndarray, " p"]:
    """Similarity of each pair, 1 for the same strings; NaN where a string has no symbol.

    The table of the alignment starts at gap (i + 1), in the corner too, and the score is its
    largest value, over `threshold` times the longer string: the toolbox's port computes it so. It
    differs from the textbook only where the gap is not 0.

    Args:
        first: Scanpaths.
        second: Scanpaths, one for each.
        size_px: Of the screen.
        settings: Grid, threshold, gap, duration bins.

    Raises:
        InputError: Duration bins are asked for and a scanpath has no durations.
    """
    settings = settings or ScanMatch()
    strings = {id(path): string(path, size_px, settings) for path in {*first, *second}}
    a, b = ([strings[id(path)] for path in side] for side in (first, second))
    filled = [len(x) > 0 and len(y) > 0 for x, y in zip(a, b, strict=True)]
    return in_batches(
        lambda x, y: _scores(x, y, settings), a, b, defined=np.array(filled, dtype=bool)
    )


def string(path: Scanpath, size_px: Size, settings: ScanMatch) -> Symbols:
    """The cells of a scanpath, repeated where duration bins are asked for."""
    cells = grid_symbols(path, size_px, settings.bins)
    if settings.duration_bin_s is None:
        return cells
    if path.duration_s is None:
        raise InputError(
            f"{path.name} has no durations", remedy="give them, or score without duration bins"
        )
    return repeat_nearest(cells, path.duration_s, settings.duration_bin_s)


def _scores(
    first: list[np.ndarray], second: list[np.ndarray], settings: ScanMatch
) -> Float64[np.ndarray, " p"]:
    columns = settings.bins[0]
    x, n = pad(first)
    y, m = pad(second)
    apart = np.hypot(
        x[:, :, None] % columns - y[:, None, :] % columns,
        x[:, :, None] // columns - y[:, None, :] // columns,
    )
    best = needleman_wunsch(
        settings.threshold - apart, n, m, gap=settings.gap, corner=settings.gap, best_anywhere=True
    )
    return np.asarray(best / (settings.threshold * np.maximum(n, m)))
