"""The crop encoder of OAT: a small CNN that turns the picture of an object into a vector.

    conv 3 -> 16, 5 x 5; ReLU; max pool 5; conv 16 -> 32, 3 x 3; ReLU; max pool 3; flatten; linear

Crops of 150 x 93 pixels become 9 x 5 cells of 32 channels, 1440 numbers. With `spp` (spatial
pyramid pooling, arXiv 1406.4729) the second pool is a pyramid of 1, 2, 4 and 8 cells per side, so
that crops may have any size.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Pyramid = Literal[0, 2, 3, 4]
"""Levels of the pyramid; 0: none, crops have one size."""
_CELLS_PER_SIDE = (1, 2, 4, 8)
_CHANNELS = (16, 32)
_KERNELS = (5, 3)
_POOLS = (5, 3)
SMALLEST_SIDE = 5 + 4 + 5 * 2  # of a crop in a pyramid: 3 cells are left for the second convolution


def pyramid_pool(x: Float[Tensor, "b c h w"], levels: int) -> Float[Tensor, "b f"]:
    """Maxima over 1, 2 x 2, 4 x 4, ... cells of a map of any size, level by level.

    A cell of a level with k cells per side is ceil(h / k) x ceil(w / k) large; the map is padded
    with zeros evenly on both sides, more at the end. Maps are not negative here.
    """
    height, width = x.shape[-2:]
    pooled = []
    for cells in _CELLS_PER_SIDE[:levels]:
        tall, wide = -(-height // cells), -(-width // cells)
        rows, columns = tall * cells - height, wide * cells - width
        around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        pooled.append(F.max_pool2d(F.pad(x, around), (tall, wide)).flatten(1))
    return torch.cat(pooled, dim=1)


def flat_width(crop: tuple[int, int], spp: Pyramid) -> int:
    """Numbers that the convolutions make of a crop (height, width).

    Raises:
        ValueError: The crop is too small.
    """
    if spp:
        return _CHANNELS[1] * sum(cells**2 for cells in _CELLS_PER_SIDE[:spp])
    height, width = crop
    for kernel, pool in zip(_KERNELS, _POOLS, strict=True):
        height, width = (height - kernel + 1) // pool, (width - kernel + 1) // pool
    if min(height, width) < 1:
        raise ValueError(f"crop must be at least 29 x 29 pixels without spp, got {crop}")
    return _CHANNELS[1] * height * width


class CropEncoder(nn.Module):
    """A vector for every crop.

    Args:
        dim: Channels of the vector.
        crop: Height and width of a crop, pixels; with `spp` any size is taken.
        spp: Levels of the pyramid.

    Example:
        >>> CropEncoder(256)(torch.rand(2, 3, 150, 93)).shape
        torch.Size([2, 256])
    """

    def __init__(self, dim: int, *, crop: tuple[int, int] = (150, 93), spp: Pyramid = 0) -> None:
        super().__init__()
        if spp not in (0, 2, 3, 4):
            raise ValueError(f"spp must be 0, 2, 3 or 4 levels, got {spp}")
        self.crop, self.spp = crop, spp
        first, second = _CHANNELS
        self.conv1 = nn.Conv2d(3, first, _KERNELS[0])
        self.conv2 = nn.Conv2d(first, second, _KERNELS[1])
        self.project = nn.Linear(flat_width(crop, spp), dim)

    def forward(self, crops: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Encode crops of one size."""
        size = (int(crops.shape[-2]), int(crops.shape[-1]))
        if self.spp and min(size) < SMALLEST_SIDE:
            raise ValueError(f"crops must be at least {SMALLEST_SIDE} pixels a side, got {size}")
        if not self.spp and size != self.crop:
            raise ValueError(f"crops must be {self.crop} pixels (height, width), got {size}")
        x = F.max_pool2d(F.relu(self.conv1(crops)), _POOLS[0])
        x = F.relu(self.conv2(x))
        x = pyramid_pool(x, self.spp) if self.spp else F.max_pool2d(x, _POOLS[1]).flatten(1)
        return cast(Tensor, self.project(x))
