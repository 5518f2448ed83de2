"""Saliency maps in users' files, at the size of the token map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float

from heed_core.errors import InputError
from heed_neuro.brain_encoder.arrays import read_array
from heed_neuro.brain_encoder.backbones import read_image


def read_saliency(folder: Path, image: Path, grid: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """The saliency of an image, averaged to the token map; sums to 1.

    Args:
        folder: Holds `<stem of the image>.npy` (h, w), or a grey picture of that stem.
        image: Whose saliency it is.
        grid: Rows and columns of tokens.

    Raises:
        InputError: There is none, it is damaged, negative or zero everywhere.
    """
    path = folder / f"{image.stem}.npy"
    if path.is_file():
        values = np.asarray(read_array(path, axes=("rows", "columns")), dtype=np.float32)
    else:
        path = folder / f"{image.stem}.png"
        values = np.asarray(read_image(path).convert("L"), dtype=np.float32)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise InputError(
            "is no saliency: it has negative values or is zero everywhere",
            path=path,
            remedy="correct it",
        )
    small = F.adaptive_avg_pool2d(torch.from_numpy(values.copy())[None], grid)[0].numpy()
    return np.asarray(small / small.sum())


def read_saliencies(
    folder: Path, images: Sequence[Path], grid: tuple[int, int]
) -> Float[np.ndarray, "n h w"]:
    """The saliency of each image."""
    return np.stack([read_saliency(folder, image, grid) for image in images])
