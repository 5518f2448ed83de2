"""Attention as GeoJSON (RFC 7946) in pixels of the full slide, as QuPath imports it."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64

LEVELS = ("attention: low", "attention: medium", "attention: high")
COLOURS = ((59, 76, 192), (221, 170, 51), (180, 4, 38))
LOW, HIGH = 0.5, 2.0
"""Of even attention: patches with less are low, from the other on they are high."""


def patch_collection(
    coords: Int64[np.ndarray, "n 2"],
    attention: Float[np.ndarray, "t n"],
    *,
    patch_size: int,
    most: int,
) -> dict[str, Any]:
    """The most attended patches as squares.

    Each carries the measurements `attention` (the mean weight of the branches), `times even`
    (weight x number of patches), the same of each of several branches, and `rank`, and a class by
    how many times even attention it got.

    Args:
        coords: x, y of the upper left corners.
        attention: A row per branch, of weights that sum to one.
        patch_size: Side of a patch in the same pixels.
        most: At most so many patches.
    """
    mean = attention.mean(axis=0)
    count = len(mean)
    order = np.argsort(-mean, kind="stable")[:most]
    level = np.digitize(mean * count, (LOW, HIGH))
    features = []
    for rank, index in enumerate(order, start=1):
        branches = {
            f"branch {number}, times even": float(row[index]) * count
            for number, row in enumerate(attention, start=1)
            if len(attention) > 1
        }
        kind = level[index]
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [_square(coords[index], patch_size)],
                },
                "properties": {
                    "objectType": "tile",
                    "classification": {"name": LEVELS[kind], "color": list(COLOURS[kind])},
                    "measurements": {
                        "attention": float(mean[index]),
                        "times even": float(mean[index]) * count,
                        **branches,
                        "rank": rank,
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _square(corner: Int64[np.ndarray, " 2"], side: int) -> list[list[int]]:
    """A closed ring, exterior rings run counter-clockwise in a frame whose y points up."""
    x, y = (int(value) for value in corner)
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
