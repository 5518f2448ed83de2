"""How well a map predicts fixations, and how alike two maps are.

Definitions as in Bylinskii et al., "What do different evaluation metrics tell us about saliency
models?", IEEE PAMI 2019. Maps are (rows, columns) of any scale; fixations are cells (x, y) of the
map, see `cells_of`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from heed_gaze.scanpaths import Scanpath, Size

Map = Float64[np.ndarray, "h w"]
Cells = Int64[np.ndarray, "_ 2"]
EPSILON = float(np.finfo(np.float64).eps)


def cells_of(path: Scanpath, shape: tuple[int, int], size_px: Size | None = None) -> Cells:
    """The cells (x, y) of a map of so many rows and columns that the fixations are in.

    Args:
        path: A scanpath; what is off the picture counts for its border.
        shape: Rows and columns of the map.
        size_px: Width and height that the map covers; None: the scanpath's own.

    Raises:
        ValueError: No size is known.
    """
    size = size_px or path.size_px
    if size is None:
        raise ValueError(f"{path.name} has no size")
    across = np.array(shape[::-1])
    cells = np.floor(path.xy_px * across / np.array(size)).astype(np.int64)
    return np.asarray(np.clip(cells, 0, across - 1))


def map_shape(size_px: Size, longest: int) -> tuple[int, int]:
    """Rows and columns of a map over a picture, square cells, the longer side of `longest` cells.

    Example:
        >>> map_shape((400, 300), 200)
        (150, 200)
    """
    scale = min(longest / max(size_px), 1.0)
    return max(round(size_px[1] * scale), 1), max(round(size_px[0] * scale), 1)


def fixation_density(
    paths: Sequence[Scanpath],
    size_px: Size,
    *,
    sigma_px: float,
    shape: tuple[int, int] | None = None,
    uniform: float = 0.0,
) -> Map:
    """Fixations blurred by a Gaussian, as a density that sums to 1.

    Args:
        paths: Scanpaths; every fixation counts once.
        size_px: Width and height of the picture.
        sigma_px: Standard deviation of the Gaussian; one degree of visual angle is usual.
        shape: Rows and columns of the map; None: one cell per pixel.
        uniform: Weight of an even density that is mixed in.
    """
    from scipy.ndimage import gaussian_filter  # type: ignore[import-untyped]

    shape = shape or (size_px[1], size_px[0])
    counts = np.zeros(shape)
    for path in paths:
        x, y = cells_of(path, shape, size_px).T
        np.add.at(counts, (y, x), 1.0)
    sigma = [sigma_px * shape[0] / size_px[1], sigma_px * shape[1] / size_px[0]]
    density = as_density(gaussian_filter(counts, sigma, mode="constant"))
    return np.asarray((1 - uniform) * density + uniform / density.size)


def as_density(values: Map) -> Map:
    """Scaled to sum 1; an even density where it is 0 everywhere.

    Raises:
        ValueError: There is a negative or no number.
    """
    if not (values >= 0).all():
        raise ValueError("a density must not be negative or NaN")
    total = values.sum()
    return np.asarray(values / total if total > 0 else np.full(values.shape, 1 / values.size))


def nss(values: Map, fixations: Cells) -> float:
    """Normalised scanpath saliency: mean of the standardised map at the fixations.

    0 is chance. A map without contrast scores 0.
    """
    spread = float(values.std())
    if spread == 0:
        return 0.0
    x, y = fixations.T
    return float(((values[y, x] - values.mean()) / spread).mean())


def auc(positives: Float64[np.ndarray, " n"], negatives: Float64[np.ndarray, " m"]) -> float:
    """Share of (positive, negative) pairs in which the positive is higher; ties count half.

    Example:
        >>> auc(np.array([3.0, 1.0]), np.array([2.0, 1.0]))
        0.625
    """
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    upto = np.searchsorted(ordered, positives, side="right")
    return float((below + upto).mean() / (2 * len(ordered)))


def auc_judd(values: Map, fixations: Cells, *, break_ties: int | None = None) -> float:
    """Area under the ROC curve with the fixated cells' values as thresholds (Judd et al., 2012).

    At the i-th highest of n thresholds the hit rate is i / n and the false alarm rate that of the
    cells at or above it, less i, among all cells less n.

    Args:
        values: The map. Cells of one value all lie above a threshold of that value, which lowers
            the area of maps with flat parts below chance.
        fixations: Cells of the map; each counts once.
        break_ties: Seed of a random order among cells of one value, which the original makes by
            noise; None: leave ties as they are.
    """
    if break_ties is not None:
        shuffled = np.random.default_rng(break_ties).permutation(values.size)
        order = shuffled[np.argsort(values.ravel()[shuffled], kind="stable")]
        ranks = np.empty(values.size)
        ranks[order] = np.arange(values.size)
        values = ranks.reshape(values.shape)
    x, y = np.unique(fixations, axis=0).T
    thresholds = np.sort(values[y, x])[::-1]
    count = len(thresholds)
    above = values.size - np.searchsorted(np.sort(values, axis=None), thresholds, side="left")
    rank = np.arange(1, count + 1)
    hits = np.concatenate([[0.0], rank / count, [1.0]])
    others = max(values.size - count, 1)
    alarms = np.concatenate([[0.0], (above - rank) / others, [1.0]])
    return float(np.trapezoid(hits, alarms))


def auc_borji(values: Map, fixations: Cells, *, seed: int, splits: int = 100) -> float:
    """AUC against random cells, as many as there are fixations, mean over draws (Borji, 2013).

    Thresholds are exact, where the original takes steps of a tenth. All draws are of one size, so
    that the mean of their areas is the area against all that were drawn.
    """
    rng = np.random.default_rng(seed)
    x, y = fixations.T
    drawn = values.ravel()[rng.integers(values.size, size=splits * len(fixations))]
    return auc(values[y, x], drawn)


def auc_shuffled(values: Map, fixations: Cells, elsewhere: Cells) -> float:
    """AUC against the cells fixated in other pictures (sAUC; Zhang et al., 2008).

    A map that knows only that viewers look to the centre scores 0.5.
    """
    (x, y), (u, v) = fixations.T, elsewhere.T
    return auc(values[y, x], values[v, u])


def correlation(first: Map, second: Map) -> float:
    """Pearson's correlation of two maps (CC); 0 where one has no contrast."""
    a, b = first - first.mean(), second - second.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def similarity(first: Map, second: Map) -> float:
    """Histogram intersection of two maps, each scaled to sum 1 (SIM); 1 is the same."""
    return float(np.minimum(as_density(first), as_density(second)).sum())


def kl_divergence(truth: Map, prediction: Map) -> float:
    """Kullback-Leibler divergence of a predicted density from the true one, in nats; 0 is best."""
    p, q = as_density(truth), as_density(prediction)
    return float((p * np.log(EPSILON + p / (q + EPSILON))).sum())


def information_gain(prediction: Map, baseline: Map, fixations: Cells) -> float:
    """Bits per fixation by which a density is better than a baseline (Kuemmerer et al., 2015)."""
    x, y = fixations.T
    p, q = as_density(prediction)[y, x], as_density(baseline)[y, x]
    return float((np.log2(p + EPSILON) - np.log2(q + EPSILON)).mean())
