"""Scores of strings of symbols: sequence score, its semantic form, edit distances.

Symbols are clusters, objects, grid cells or semantic classes; see `symbols`. All are computed for
many pairs at once. Time O(n m) per pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from heed_gaze.metrics.alignment import in_batches, needleman_wunsch, pad
from heed_gaze.metrics.symbols import Symbols
from heed_gaze.scanpaths import Scanpath, Size


def sequence_score(
    first: Sequence[Symbols], second: Sequence[Symbols]
) -> Float64[np.ndarray, " p"]:
    """Sequence score (SS; Borji et al., ICCV 2013; Yang et al., CVPR 2020): higher is more alike.

    Needleman and Wunsch's alignment with match 1, mismatch 0 and gap 0 - the length of the longest
    common subsequence - divided by the length of the longer string. Over semantic labels it is
    SemSS. NaN where a string is empty.

    Example:
        >>> float(sequence_score([np.array([1, 2, 3])], [np.array([1, 3])])[0]).__round__(6)
        0.666667
    """

    def score(a: list[np.ndarray], b: list[np.ndarray]) -> Float64[np.ndarray, " b"]:
        x, n = pad(a)
        y, m = pad(b)
        same = (x[:, :, None] == y[:, None, :]).astype(np.float64)
        return np.asarray(needleman_wunsch(same, n, m) / np.maximum(n, m))

    return in_batches(score, first, second, defined=_both_filled(first, second))


def levenshtein(first: Sequence[Symbols], second: Sequence[Symbols]) -> Float64[np.ndarray, " p"]:
    """Fewest insertions, deletions and exchanges that make one string of the other.

    Example:
        >>> levenshtein([np.array([3, 3, 5, 3, 7])], [np.array([5, 3, 7])]).tolist()
        [2.0]
    """

    def score(a: list[np.ndarray], b: list[np.ndarray]) -> Float64[np.ndarray, " b"]:
        x, n = pad(a)
        y, m = pad(b)
        unlike = (x[:, :, None] != y[:, None, :]).astype(np.float64)
        return -needleman_wunsch(-unlike, n, m, gap=-1.0)

    lengths = [float(max(len(a), len(b))) for a, b in zip(first, second, strict=True)]
    filled = _both_filled(first, second)
    return np.where(filled, in_batches(score, first, second, defined=filled), lengths)


def string_edit_distance(
    first: Sequence[Scanpath], second: Sequence[Scanpath], *, size_px: Size, cells: int = 5
) -> Float64[np.ndarray, " p"]:
    """Levenshtein distance of the letters on a square grid (Brandt and Stark, 1997).

    As in the field's code a cell measures floor(side / cells) pixels, so that a fixation in the
    strip that remains at the right or lower border takes the letter of the next row or a new one.

    Args:
        first: Scanpaths.
        second: Scanpaths, one for each.
        size_px: Of the screen.
        cells: Columns and rows of the grid.
    """
    step = np.array(size_px) // cells
    if (step < 1).any():
        raise ValueError(f"{cells} cells do not fit into {size_px}")
    letters = {
        id(path): np.floor(path.xy_px / step).astype(np.int64) @ np.array([1, cells])
        for path in {*first, *second}
    }
    return levenshtein([letters[id(p)] for p in first], [letters[id(p)] for p in second])


def _both_filled(first: Sequence[Symbols], second: Sequence[Symbols]) -> Bool[np.ndarray, " p"]:
    pairs = zip(first, second, strict=True)
    return np.array([len(a) > 0 and len(b) > 0 for a, b in pairs], dtype=bool)
