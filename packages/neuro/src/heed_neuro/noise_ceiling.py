"""How well responses can be predicted at all: noise ceilings from repeated trials.

    ncsnr = sqrt(signal variance / noise variance)
    NC(n) = ncsnr^2 / (ncsnr^2 + 1 / n)        for responses averaged over n trials

after Allen et al., "A massive 7T fMRI dataset" (Nature Neuroscience 25, 2022). The noise variance
is the mean over images of the variance within an image. Two estimates of the signal variance:

* "unbiased": variance of the image means - noise variance / repeats,
* "total": variance of all single trials - noise variance, lower by about 1 / images.

Negative estimates are set to 0. Split-half correlation with the Spearman-Brown step is another way
to the same number: it estimates NC of all repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Estimator = Literal["unbiased", "total"]


@dataclass(frozen=True, kw_only=True)
class SignalToNoise:
    """What repeats say about each vertex."""

    noise_variance: Float[np.ndarray, " v"]
    signal_variance: Float[np.ndarray, " v"]

    @property
    def ncsnr(self) -> Float[np.ndarray, " v"]:
        """Signal over noise, as standard deviations; 0 where nothing varies."""
        varies = self.noise_variance > 0
        ratio = np.divide(
            self.signal_variance,
            self.noise_variance,
            out=np.where(self.signal_variance > 0, np.inf, 0.0),
            where=varies,
        )
        return np.asarray(np.sqrt(ratio))


def signal_to_noise(
    repeats: Float[np.ndarray, "images repeats v"], *, estimator: Estimator = "unbiased"
) -> SignalToNoise:
    """Noise and signal variance of each vertex.

    Raises:
        ValueError: Fewer than two images or repeats, another estimator.
    """
    if repeats.ndim != 3 or repeats.shape[0] < 2 or repeats.shape[1] < 2:
        raise ValueError(
            "repeats must be (images, repeats, vertices) with at least two of the first and second,"
            f" got {repeats.shape}"
        )
    values = repeats.astype(np.float64)
    noise = values.var(axis=1, ddof=1).mean(axis=0)
    if estimator == "unbiased":
        signal = values.mean(axis=1).var(axis=0, ddof=1) - noise / repeats.shape[1]
    elif estimator == "total":
        signal = values.reshape(-1, repeats.shape[2]).var(axis=0, ddof=1) - noise
    else:
        raise ValueError(f"estimator must be 'unbiased' or 'total', got {estimator!r}")
    return SignalToNoise(noise_variance=noise, signal_variance=signal.clip(min=0))


def noise_ceiling(ncsnr: Float[np.ndarray, " v"], trials: float) -> Float[np.ndarray, " v"]:
    """The share of the variance of an average over `trials` trials that is signal, in [0, 1]."""
    if not trials > 0:
        raise ValueError(f"trials must be above 0, got {trials}")
    return _share(np.square(ncsnr), 1.0 / trials)


def mixed_noise_ceiling(
    ncsnr: Float[np.ndarray, " v"], images_by_trials: Mapping[int, int]
) -> Float[np.ndarray, " v"]:
    """As `noise_ceiling` where images were shown unequally often.

    Args:
        ncsnr: Of each vertex.
        images_by_trials: Number of trials -> how many images were shown so often; the noise is
            (A / 3 + B / 2 + C) / (A + B + C) for A, B and C images with 3, 2 and 1 trials.
    """
    images = sum(images_by_trials.values())
    if images < 1 or min(images_by_trials) < 1 or min(images_by_trials.values()) < 0:
        raise ValueError(f"images_by_trials must count trials of images, got {images_by_trials}")
    noise = sum(count / trials for trials, count in images_by_trials.items()) / images
    return _share(np.square(ncsnr), noise)


def split_half(repeats: Float[np.ndarray, "images repeats v"]) -> Float[np.ndarray, " v"]:
    """Correlation over images of the means of even and of odd repeats; NaN where one is constant.

    Raises:
        ValueError: Fewer than two repeats.
    """
    if repeats.ndim != 3 or repeats.shape[1] < 2:
        raise ValueError(f"repeats must be (images, 2 or more, vertices), got {repeats.shape}")
    return pearson(repeats[:, 0::2].mean(axis=1), repeats[:, 1::2].mean(axis=1))


def spearman_brown(r: Float[np.ndarray, " v"]) -> Float[np.ndarray, " v"]:
    """The reliability of twice as many trials, 2 r / (1 + r)."""
    return np.asarray(2 * r / (1 + r))


def pearson(
    first: Float[np.ndarray, "n v"], second: Float[np.ndarray, "n v"]
) -> Float[np.ndarray, " v"]:
    """Pearson correlation of the columns of two tables, in float64; NaN where one is constant."""
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"the tables must have one shape, got {first.shape} and {second.shape}")
    left, right = _unit(first), _unit(second)
    return np.asarray(np.einsum("nv,nv->v", left, right))


def encoding_accuracy(
    r: Float[np.ndarray, " v"], ceiling: Float[np.ndarray, " v"]
) -> Float[np.ndarray, " v"]:
    """Explained share of what can be explained, min(r^2 / NC, 1).

    Negative correlations count as 0; NaN where r is undefined or the ceiling is 0.
    """
    if r.shape != ceiling.shape:
        raise ValueError(f"ceiling must have the shape of r, {r.shape}, got {ceiling.shape}")
    usable = (ceiling > 0) & np.isfinite(r)
    squared = np.square(np.clip(np.nan_to_num(r), 0, None))
    return np.where(usable, np.minimum(squared / np.where(usable, ceiling, 1.0), 1.0), np.nan)


def _share(signal: np.ndarray, noise: float) -> np.ndarray:
    return np.where(
        np.isinf(signal), 1.0, signal / (np.where(np.isinf(signal), 1.0, signal) + noise)
    )


def _unit(table: np.ndarray) -> np.ndarray:
    centred = table.astype(np.float64)
    scale = np.abs(centred).max(axis=0, initial=0.0)
    centred = centred - centred.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    # A constant column leaves rounding alone, which must not become a correlation.
    constant = norm <= 1e-12 * np.maximum(scale, 1e-300) * np.sqrt(len(table))
    return np.where(constant, np.nan, centred) / np.where(constant, 1.0, norm)
