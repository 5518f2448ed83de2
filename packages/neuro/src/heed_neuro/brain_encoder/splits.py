"""Which training images are held out for validation: a random share, or one of k folds.

The authors average ten encoders, each with another random tenth held out. `folds` holds every
image out exactly once instead.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

SplitMode = Literal["random", "folds"]


def split_rows(
    rows: int, *, mode: SplitMode, number: int, folds: int = 10, share: float = 0.1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those to validate on, both sorted.

    Args:
        rows: How many there are.
        mode: "random" draws anew for each `number`; "folds" cuts one random order in `folds` parts.
        number: Which repetition or fold, from 0.
        folds: How many folds.
        share: Of the rows, that a random split holds out.
        seed: Of the random order.

    Raises:
        ValueError: A fold that does not exist, or a part that would be empty.
    """
    if mode == "folds":
        if not 0 <= number < folds or folds > rows:
            raise ValueError(
                f"number must be a fold from 0 to {folds - 1} of {rows} rows, got {number}"
            )
        parts = np.array_split(np.random.default_rng(seed).permutation(rows), folds)
        held = np.sort(parts[number])
    else:
        count = max(1, round(share * rows))
        held = np.sort(np.random.default_rng([seed, number]).permutation(rows)[:count])
    train = np.setdiff1d(np.arange(rows), held)
    if not len(train):
        raise ValueError(f"share must leave rows to train on, got {share} of {rows} rows")
    return train, held
