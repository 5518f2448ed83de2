"""Features of a scene around any fixation, computed only where the picture is.

The window around a fixation is mostly background: a search picture of 339 pixels lies in a window
of 806. Wherever no pixel of the picture is within reach, features are those of an empty window,
which are the same for all fixations, since pools are centred on the window. So the features of the
empty window are computed once, and at a fixation convolutions run on the picture with its margin.
That is the same sum of the same terms; only the rounding may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from heed_gaze.eccnet.network import CONVS, EccNet
from heed_gaze.eccnet.retina import plain_pool, rings_of

Span = tuple[int, int]
"""First and one past the last index along an axis."""
Rectangle = tuple[Span, Span]
"""Rows and columns."""


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A picture with background around it, so wide that every window lies within."""

    pixels: UInt8[np.ndarray, "h w 3"]
    half: int
    """Half the side of the window, and the width of the background."""

    @classmethod
    def around(cls, image: UInt8[np.ndarray, "h w 3"], *, half: int, background: int) -> Padded:
        """Put background around a picture."""
        pad = ((half, half), (half, half), (0, 0))
        return cls(pixels=np.pad(image, pad, constant_values=background), half=half)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.pixels.shape[0] - 2 * self.half, self.pixels.shape[1] - 2 * self.half

    def crop(self, fixation: tuple[int, int], part: Rectangle) -> UInt8[np.ndarray, "h w 3"]:
        """A part of the window around a fixation, a row and column of the picture."""
        (top, bottom), (left, right) = part
        y, x = fixation
        return self.pixels[y + top : y + bottom, x + left : x + right]

    def picture_in_window(self, fixation: tuple[int, int]) -> Rectangle:
        """Where the picture lies in the window around a fixation."""
        rows, columns = (
            (max(self.half - at, 0), min(self.half - at + size, 2 * self.half))
            for at, size in zip(fixation, self.size, strict=True)
        )
        return rows, columns


class WindowFeatures:
    """Features of windows of one size on one background, for `EccNet`.

    Args:
        network: In eval mode.
        side: Of the window, even.
        background: Its grey, 0 to 255.
    """

    def __init__(self, network: EccNet, side: int, background: int) -> None:
        self.network, self.side, self.background = network, side, background
        retina = network.config.retina
        self._can_reuse = not retina.eccentricity or not any(retina.slopes[:2])
        self._empty: tuple[Tensor, Tensor, Tensor] | None = None

    def whole(self, padded: Padded, fixation: tuple[int, int]) -> list[Tensor]:
        """The features, from all pixels of the window."""
        everything = (0, self.side), (0, self.side)
        return self.network.features(self._tensor(padded.crop(fixation, everything)))

    def at(self, padded: Padded, fixation: tuple[int, int]) -> list[Tensor]:
        """The features, from the pixels of the picture and what is around them.

        Where pools 1 and 2 have rings too (slopes that are not the paper's), from all pixels.
        """
        if not self._can_reuse:
            return self.whole(padded, fixation)
        network = self.network
        if self._empty is None:
            with torch.no_grad():
                self._empty = self._empty_blocks()
        sides = [self._empty[0].shape[2], self._empty[1].shape[2], self._empty[2].shape[2]]
        part = _reached(padded.picture_in_window(fixation), (1, 2, 3), network, self.side)
        margin = _grown(part, _MARGINS[0], sides[0])
        pixels = _scaled(margin, 4, self.side)
        x = network.normalise(self._tensor(padded.crop(fixation, pixels)))
        x = x.contiguous(memory_format=torch.channels_last)
        blocks = [_pasted(self._empty[0], _inner(self._plain_blocks(x), part, margin), part)]
        for number in (4, 5):
            pooled = network.pools[number - 2](blocks[-1])
            part = _pooled(part, network, number - 1, blocks[-1].shape[2])
            part = _grown(part, CONVS[number - 1], sides[number - 3])
            margin = _grown(part, _MARGINS[1], sides[number - 3])
            (top, bottom), (left, right) = margin
            found = network.run_blocks(pooled[..., top:bottom, left:right], number, number)
            blocks.append(_pasted(self._empty[number - 3], _inner(found, part, margin), part))
        return [network.to_sixteenth(blocks[k - 3], k) for k in network.config.layers]

    def _empty_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks 3, 4 and 5 of the empty window.

        Up to block 3 all windows are 2, so features depend on the distance to the border alone:
        they are those of a small window of the same remainder by 4, stretched in the middle.
        """
        network = self.network
        small = min(self.side, _SMALL + self.side % 8)
        picture = np.full((small, small, 3), self.background, dtype=np.uint8)
        x = network.normalise(self._tensor(picture)).contiguous(memory_format=torch.channels_last)
        third = self._plain_blocks(x)
        side = (((self.side + 1) // 2) + 1) // 2
        index = torch.arange(side, device=third.device)
        middle, end = third.shape[2] // 2, side - third.shape[2]
        near = torch.where(index < middle, index, (index - end).clamp(min=middle))
        third = third[:, :, near][:, :, :, near].contiguous(memory_format=torch.channels_last)
        fourth = network.run_blocks(network.pools[2](third), 4, 4)
        return third, fourth, network.run_blocks(network.pools[3](fourth), 5, 5)

    def _plain_blocks(self, x: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "1 c oh ow"]:
        """Blocks 1 to 3 of any part of the window: both pools between them are plain."""
        network = self.network
        for number in (1, 2, 3):
            x = network.run_blocks(x, number, number)
            if number < 3:
                x = plain_pool(x, network.config.retina.pooling)
        return x

    def _tensor(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 3 h w"]:
        device = self.network.mean.device
        return (
            torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(2, 0, 1)[None].float()
        )


_MARGINS = (5, 3)
"""How far the border of a crop is felt, in pixels of the result: after blocks 1 to 3 (2 pixels,
halved, 2 more, halved, 3 more), after one block of three convolutions."""
_SMALL = 96
"""More than twice as far as a border is felt after block 3 (20 pixels), a multiple of 8."""


def _reached(part: Rectangle, blocks: tuple[int, ...], network: EccNet, side: int) -> Rectangle:
    """What a part of the input can change at the end of the last block."""
    for number in blocks:
        if number > 1:
            part = _pooled(part, network, number - 1, side)
            side = (side + 1) // 2
        part = _grown(part, CONVS[number - 1], side)
    return part


def _pooled(part: Rectangle, network: EccNet, pool: int, side: int) -> Rectangle:
    """What a part of a pool's input can change in its output."""
    most = max(rings_of(network.config.retina, pool, side).windows)
    outputs = (side + 1) // 2
    reach = most - 2  # a window of 2 is [2 o, 2 o + 2)
    rows, columns = (
        (max((low - reach) // 2, 0), min((high + reach + 1) // 2, outputs)) for low, high in part
    )
    return rows, columns


def _grown(part: Rectangle, by: int, side: int) -> Rectangle:
    rows, columns = ((max(low - by, 0), min(high + by, side)) for low, high in part)
    return rows, columns


def _scaled(part: Rectangle, by: int, side: int) -> Rectangle:
    rows, columns = ((low * by, min(high * by, side)) for low, high in part)
    return rows, columns


def _inner(x: Tensor, part: Rectangle, around: Rectangle) -> Tensor:
    """The part of `x`, which is what lies in the rectangle around it."""
    (top, bottom), (left, right) = part
    y, z = around[0][0], around[1][0]
    return x[..., top - y : bottom - y, left - z : right - z]


def _pasted(whole: Tensor, found: Tensor, part: Rectangle) -> Tensor:
    (top, bottom), (left, right) = part
    result = whole.clone(memory_format=torch.channels_last)
    result[..., top:bottom, left:right] = found
    return result
