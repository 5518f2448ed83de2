"""Attention as GeoJSON (RFC 7946) in pixels of the full slide, as QuPath imports it."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64

LEVELS = ("attention: low", "attention: medium", "attention: high")
COLOURS = ((59, 76, 192), (221, 170, 51), (180, 4, 38))
HIGH, MEDIUM = 0.5, 0.8
"""Patches that hold the first half of the attention are high, up to 80 % medium."""


def patch_collection(
    coords: Int64[np.ndarray, "n 2"],
    attention: Float[np.ndarray, " n"],
    *,
    patch_size: int,
    most: int,
) -> dict[str, Any]:
    """The most attended patches as squares.

    Each carries the measurements `attention` (the weight), `times even` (weight x number of
    patches) and `rank`, and a class by how much attention is held by the patches up to it.

    Args:
        coords: x, y of the upper left corners.
        attention: Weights that sum to one.
        patch_size: Side of a patch in the same pixels.
        most: At most so many patches.
    """
    order = np.argsort(-attention, kind="stable")[:most]
    held = np.cumsum(attention[order]) - attention[order]  # by the patches before
    level = np.where(held < HIGH, 2, np.where(held < MEDIUM, 1, 0))
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_square(coords[index], patch_size)]},
            "properties": {
                "objectType": "tile",
                "classification": {"name": LEVELS[kind], "color": list(COLOURS[kind])},
                "measurements": {
                    "attention": float(attention[index]),
                    "times even": float(attention[index]) * len(attention),
                    "rank": rank,
                },
            },
        }
        for rank, (index, kind) in enumerate(zip(order, level, strict=True), start=1)
    ]
    return {"type": "FeatureCollection", "features": features}


def _square(corner: Int64[np.ndarray, " 2"], side: int) -> list[list[int]]:
    """A closed ring, exterior rings run counter-clockwise in a frame whose y points up."""
    x, y = (int(value) for value in corner)
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
