"""How a viewer goes over objects: search, refixation, revisits, and the difference to viewers.

Fang et al., "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64, Integer

BEHAVIOUR = ("correct", "length", "search", "refix", "revisit")
"""The columns of a table of behaviour."""


def behaviour(objects: Integer[np.ndarray, " n"], target: int) -> Float64[np.ndarray, " 5"]:
    """The behaviour of one scanpath, columns `BEHAVIOUR`.

    Fixations of one object in a row are a run. search is the share of fixations that begin a run on
    an object not seen before, revisit of those that begin one on an object seen before, refix of
    all others; the three sum to 1. correct is 1 where the last object is the target.

    Args:
        objects: Index of the fixated objects, in order.
        target: Index of the target.

    Raises:
        ValueError: There is no fixation.

    Example:
        >>> behaviour(np.array([3, 3, 5, 3]), target=3)[2:].tolist()
        [0.5, 0.25, 0.25]
    """
    length = len(objects)
    if not length:
        raise ValueError("a scanpath must have a fixation")
    begins = np.concatenate([[True], objects[1:] != objects[:-1]])
    runs = int(begins.sum())
    fresh = len(np.unique(objects))
    counts = np.array([fresh, length - runs, runs - fresh]) / length
    return np.array([float(objects[-1] == target), float(length), *counts])


def behaviours(
    scanpaths: Sequence[Int64[np.ndarray, " _"]], targets: Sequence[int]
) -> Float64[np.ndarray, "n 5"]:
    """The behaviour of several scanpaths."""
    rows = [behaviour(path, t) for path, t in zip(scanpaths, targets, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(-1, len(BEHAVIOUR))


def delta(model: Float64[np.ndarray, " 5"], human: Float64[np.ndarray, " 5"]) -> tuple[float, int]:
    """Mean relative difference of mean behaviour, lower is better, and of how many of its parts.

    A part that is 0 for viewers has no relative difference and is left out; NaN where all are.
    """
    used = np.isfinite(human) & (human != 0) & np.isfinite(model)
    if not used.any():
        return float("nan"), 0
    return float((np.abs(model - human)[used] / human[used]).mean()), int(used.sum())


def next_object_similarity(
    probabilities: Float64[np.ndarray, "t n"], objects: Integer[np.ndarray, " t"]
) -> float:
    """Mean probability that a model gave to the object that the viewer fixated next (SIM).

    Args:
        probabilities: Of every object (and of stopping) at each step, given the viewer's own past.
        objects: What the viewer did at each step.
    """
    return float(probabilities[np.arange(len(objects)), objects].mean())
