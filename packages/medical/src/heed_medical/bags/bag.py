"""One bag: the features of the patches of a slide, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from heed_medical.splits import Split


@dataclass(frozen=True, kw_only=True)
class Bag:
    """The features of one slide, in memory."""

    name: str
    features: Float[np.ndarray, "n d"]
    """float16 where the file has it, else float32."""
    coords: Int64[np.ndarray, "n 2"] | None = None
    """x, y of the upper left corner of each patch, in pixels of the full slide."""
    patch_size: int | None = None
    """Side of a patch in the same pixels."""
    slide_size: tuple[int, int] | None = None
    """Width and height of the slide in the same pixels, where the file tells."""
    label: int | None = None
    """Number of the class."""
    path: Path


@dataclass(frozen=True, kw_only=True)
class BagFile:
    """Where a bag lies and what is known of it before it is read."""

    name: str
    path: Path
    group: str | None = None
    """Of an h5 file that holds many slides."""
    features: Float[np.ndarray, "n d"] | None = None
    """Of a bag that came from a table, which is read as a whole."""
    label: str | None = None
    """As it stands in the file."""
    patient: str | None = None
    split: Split | None = None
    place: str | None = None
    """Where the label stands: a row of a csv file."""


def patch_side(coords: Int64[np.ndarray, "n 2"]) -> int | None:
    """The side of square patches: the smallest distance between two columns or rows of them."""
    steps = [np.diff(np.unique(axis)) for axis in coords.T]
    found = np.concatenate(steps)
    return int(found.min()) if len(found) else None
