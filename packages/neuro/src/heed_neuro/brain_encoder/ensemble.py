"""Several encoders of one brain as one: runs are averaged, layers weighed by vertex.

A run is a training with another held-out part; a layer is another block of the frozen network. The
weight of a layer at a vertex is a softmax over layers of 40 times its validation r, averaged over
runs. (The authors' code sums over runs without dividing, which changes the scale alone.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

SHARPNESS = 40.0


def layer_weights(
    validation_r: Float[np.ndarray, "layers v"], *, sharpness: float = SHARPNESS
) -> Float[np.ndarray, "layers v"]:
    """How much each layer counts at each vertex; sums to 1 over layers.

    Args:
        validation_r: Averaged over runs; undefined (NaN) counts as 0.
        sharpness: Factor of r in the softmax; 0 weighs all layers the same.
    """
    scores = sharpness * np.nan_to_num(validation_r.astype(np.float64))
    scores = np.exp(scores - scores.max(axis=0))
    return np.asarray(scores / scores.sum(axis=0))


def average_runs(predictions: Sequence[Float[np.ndarray, "n v"]]) -> Float[np.ndarray, "n v"]:
    """The mean prediction."""
    if not predictions:
        raise ValueError("predictions must hold at least one")
    stacked = np.stack([np.asarray(own, dtype=np.float64) for own in predictions])
    return np.asarray(stacked.mean(axis=0))


def combine_layers(
    predictions: Sequence[Float[np.ndarray, "n v"]], weights: Float[np.ndarray, "layers v"]
) -> Float[np.ndarray, "n v"]:
    """The weighted mean of the layers' predictions, vertex by vertex."""
    if len(predictions) != len(weights):
        raise ValueError(f"weights must be of {len(predictions)} layers, got {len(weights)}")
    total = np.zeros(predictions[0].shape, dtype=np.float64)
    for own, weight in zip(predictions, weights, strict=True):
        total += own * weight
    return total
