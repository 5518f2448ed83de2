"""From features to the map of attention at one fixation (Gupta et al., section 3.2).

    A_i = F_i * T_i (cross-correlation),    w_i = max A_i
    A = sum_i w_i / sum(w) scaled(A_i),     A <- A + G_small(A) - G_large(A), three times

The map is then enlarged to the picture as OpenCV's INTER_AREA does, which repeats blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64
from scipy.ndimage import correlate1d  # type: ignore[import-untyped]
from torch import Tensor

from heed_core.kernels.xcorr import xcorr2d

Gaussian = tuple[int, float | None]
"""Side of the window and sigma in pixels of the map; None: OpenCV's fixed window of that side."""


@dataclass(frozen=True, kw_only=True)
class MapConfig:
    """How correlations become a map."""

    layer_weights: Literal["maximum", "equal"] = "maximum"
    """What a layer weighs: its highest correlation, or the same for all."""
    gaussians: tuple[Gaussian, Gaussian] = ((3, 1.0), (5, 3.0))
    """The small and the large Gaussian of the difference that sharpens."""
    sharpenings: int = 3


@dataclass(frozen=True, kw_only=True)
class AttentionMap:
    """The steps of one map; all have the size of the features."""

    correlations: tuple[Float64[np.ndarray, "h w"], ...]
    """Of each layer, as they come."""
    layer_weights: tuple[float, ...]
    """Shares of the layers; their sum is 1."""
    combined: Float64[np.ndarray, "h w"]
    sharpened: Float64[np.ndarray, "h w"]


def attention_map(
    features: Sequence[Float[Tensor, "1 _ h w"]],
    targets: Sequence[Float[Tensor, "1 _ kh kw"]],
    config: MapConfig,
) -> AttentionMap:
    """Correlate, weigh and sharpen; one entry of `features` and `targets` per layer."""
    correlations = tuple(
        xcorr2d(feature, target)[0].double().cpu().numpy()
        for feature, target in zip(features, targets, strict=True)
    )
    maxima = [
        float(one.max()) if config.layer_weights == "maximum" else 1.0 for one in correlations
    ]
    weights = tuple(one / (sum(maxima) or 1.0) for one in maxima)
    return AttentionMap(
        correlations=correlations,
        layer_weights=weights,
        combined=(mixed := combine(correlations, weights)),
        sharpened=sharpen(mixed, config),
    )


def combine(
    correlations: Sequence[Float64[np.ndarray, "h w"]], weights: Sequence[float]
) -> Float64[np.ndarray, "h w"]:
    """The weighted sum of maps, each scaled to 0 ... 1; a map without contrast is 0."""
    mixed = np.zeros_like(correlations[0])
    for one, weight in zip(correlations, weights, strict=True):
        span = float(np.ptp(one))
        if span > 0:
            mixed += weight * (one - one.min()) / span
    return mixed


def sharpen(values: Float64[np.ndarray, "h w"], config: MapConfig) -> Float64[np.ndarray, "h w"]:
    """Add the difference of two Gaussians, again and again."""
    small, large = (gaussian_window(*one) for one in config.gaussians)
    for _ in range(config.sharpenings):
        values = values + (_blur(values, small) - _blur(values, large))
    return values


def gaussian_window(size: int, sigma: float | None) -> Float64[np.ndarray, " n"]:
    """A normalised Gaussian of odd size, as OpenCV's; without a sigma of size 3 it is (1, 2, 1)/4.

    Raises:
        ValueError: An even size, or no sigma for another size than 3.

    Example:
        >>> gaussian_window(3, None).tolist()
        [0.25, 0.5, 0.25]
    """
    if size % 2 == 0 or size < 1:
        raise ValueError(f"size must be odd, got {size}")
    if sigma is None:
        if size != 3:
            raise ValueError(f"sigma must be given for size {size}")
        return np.array([0.25, 0.5, 0.25])
    place = np.arange(size) - size // 2
    values = np.exp(-(place**2) / (2 * sigma**2))
    return np.asarray(values / values.sum(), dtype=np.float64)


def enlarge(
    values: Float64[np.ndarray, "h w"],
    size: tuple[int, int],
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Float64[np.ndarray, "rows columns"]:
    """Enlarge as OpenCV's INTER_AREA: blocks, and one mixed pixel where an edge falls within one.

    Args:
        values: The map.
        size: Height and width to enlarge to.
        rows: The rows of the result that are wanted.
        columns: The columns that are wanted.
    """
    for axis, (length, part) in enumerate(zip(size, (rows, columns), strict=True)):
        source, share = _area_weights(values.shape[axis], length)
        source, share = source[part], share[part]
        after = np.minimum(source + 1, values.shape[axis] - 1)
        share = share.reshape((-1, 1) if axis == 0 else (1, -1))
        values = (1 - share) * values.take(source, axis) + share * values.take(after, axis)
    return values


def _area_weights(count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each output pixel: the cell where it begins, and its share of the next cell."""
    ratio = length / count
    place = np.arange(length)
    source = np.minimum(np.floor(place / ratio).astype(np.int64), count - 1)
    share = np.maximum((place + 1) - (source + 1) * ratio, 0.0)
    share[share < 1e-6] = 0.0  # an edge between two pixels, but for rounding
    return source, share


def _blur(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Mirrored at the borders, without repeating the border itself."""
    once = correlate1d(values, window, axis=1, mode="mirror")
    return np.asarray(correlate1d(once, window, axis=0, mode="mirror"))
