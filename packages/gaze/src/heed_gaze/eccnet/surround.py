"""Features of a scene around any fixation, computed only where the picture is.

The window around a fixation is mostly background: a search picture of 339 pixels lies in a window
of 806. Wherever nothing but background is within reach, features are those of an empty window,
which are the same for all fixations, since pools are centred on the window. So the features of the
empty window are computed once, and at a fixation convolutions run on what is drawn in the picture
with its margin. That is the same sum of the same terms; only the rounding may differ.

Up to block 3 windows are 2 everywhere, so what is computed there depends on how the window lies on
the picture modulo 4 pixels alone; as long as the picture stays as it is, it is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from heed_gaze.eccnet.network import CONVS, EccNet
from heed_gaze.eccnet.retina import plain_pool, rings_of

Span = tuple[int, int]
"""First and one past the last index along an axis."""
Rectangle = tuple[Span, Span]
"""Rows and columns."""
Edges = tuple[bool, bool, bool, bool]
"""Whether the left, right, upper and lower border of a part is that of the whole."""


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A picture with background around it, so wide that every window lies within."""

    pixels: UInt8[np.ndarray, "h w 3"]
    half: int
    """Half the side of the window, and the width of the background."""
    content: Rectangle
    """Rows and columns of the picture outside of which it is background too; may be empty."""

    @classmethod
    def around(cls, image: UInt8[np.ndarray, "h w 3"], *, half: int, background: int) -> Padded:
        """Put background around a picture."""
        pad = ((half, half), (half, half), (0, 0))
        drawn = (image != background).any(axis=2)
        return cls(
            pixels=np.pad(image, pad, constant_values=background),
            half=half,
            content=(_extent(drawn.any(axis=1)), _extent(drawn.any(axis=0))),
        )

    def crop(self, fixation: tuple[int, int], part: Rectangle) -> UInt8[np.ndarray, "h w 3"]:
        """A part of the window around a fixation, a row and column of the picture."""
        (top, bottom), (left, right) = part
        y, x = fixation
        return self.pixels[y + top : y + bottom, x + left : x + right]

    def content_in_window(self, fixation: tuple[int, int]) -> Rectangle | None:
        """Where the window around a fixation is not background; None: nowhere."""
        rows, columns = (
            (max(self.half - at + first, 0), min(self.half - at + last, 2 * self.half))
            for at, (first, last) in zip(fixation, self.content, strict=True)
        )
        return None if rows[0] >= rows[1] or columns[0] >= columns[1] else (rows, columns)


def _extent(drawn: Bool[np.ndarray, " n"]) -> Span:
    found = np.flatnonzero(drawn)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


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
        self._picture: np.ndarray | None = None
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def forget(self) -> None:
        """Drop what was kept of the last picture."""
        self._picture = None
        self._kept.clear()

    def whole(self, padded: Padded, fixation: tuple[int, int]) -> list[Tensor]:
        """The features, from all pixels of the window."""
        everything = (0, self.side), (0, self.side)
        return self.network.features(self._tensor(padded.crop(fixation, everything)))

    def at(self, padded: Padded, fixation: tuple[int, int]) -> list[Tensor]:
        """The features, from the pixels that are not background and what is around them.

        Where pools 1 and 2 have rings too (slopes that are not the paper's), from all pixels.
        """
        if not self._can_reuse:
            return self.whole(padded, fixation)
        network = self.network
        if self._empty is None:
            with torch.no_grad():
                self._empty = self._empty_blocks()
        content = padded.content_in_window(fixation)
        if content is None:
            return [network.to_sixteenth(self._empty[k - 3], k) for k in network.config.layers]
        sides = [self._empty[0].shape[2], self._empty[1].shape[2], self._empty[2].shape[2]]
        part = _reached(content, (1, 2, 3), network, self.side)
        margin = _grown(part, _MARGINS[0], sides[0])
        third = self._third_block(padded, fixation, _scaled(margin, 4, self.side))
        inside = _shrunk(margin, _MARGINS[0], sides[0])
        blocks = [_pasted(self._empty[0], _inner(third, part, inside), part)]
        for number in (4, 5):
            side = sides[number - 3]
            pooled = network.pools[number - 2](blocks[-1])
            part = _pooled(part, network, number - 1, blocks[-1].shape[2])
            part = _grown(part, CONVS[number - 1], side)
            margin = _grown(part, _MARGINS[1], side)
            (top, bottom), (left, right) = margin
            found = _run_block(
                network, pooled[..., top:bottom, left:right], number, _edges(margin, side)
            )
            inside = _shrunk(margin, _MARGINS[1], side)
            blocks.append(_pasted(self._empty[number - 3], _inner(found, part, inside), part))
        return [network.to_sixteenth(blocks[k - 3], k) for k in network.config.layers]

    def _third_block(
        self, padded: Padded, fixation: tuple[int, int], part: Rectangle
    ) -> Float[Tensor, "1 c oh ow"]:
        """Block 3 of a part of the window; kept until the picture changes.

        Two windows that are a multiple of 4 pixels apart take the same pixels of the picture into
        the same pools, so that block 3 is bit for bit the same.
        """
        if self._picture is None or not np.array_equal(self._picture, padded.pixels):
            self.forget()
            self._picture = padded.pixels
        (top, bottom), (left, right) = part
        place = (fixation[0] + top, fixation[0] + bottom, fixation[1] + left, fixation[1] + right)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        x = self.network.normalise(self._tensor(padded.crop(fixation, part)))
        x = x.contiguous(memory_format=torch.channels_last)
        third = self._plain_blocks(x, _edges(part, self.side))
        if not torch.is_grad_enabled():
            self._kept[place] = third
            while sum(one.nbytes for one in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return third

    def _empty_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks 3, 4 and 5 of the empty window.

        Up to block 3 all windows are 2, so features depend on the distance to the border alone:
        they are those of a small window of the same remainder by 4, stretched in the middle.
        """
        network = self.network
        small = min(self.side, _SMALL + self.side % 8)
        picture = np.full((small, small, 3), self.background, dtype=np.uint8)
        x = network.normalise(self._tensor(picture)).contiguous(memory_format=torch.channels_last)
        third = self._plain_blocks(x, _EVERY_EDGE)
        side = (((self.side + 1) // 2) + 1) // 2
        index = torch.arange(side, device=third.device)
        middle, end = third.shape[2] // 2, side - third.shape[2]
        near = torch.where(index < middle, index, (index - end).clamp(min=middle))
        third = third[:, :, near][:, :, :, near].contiguous(memory_format=torch.channels_last)
        fourth = network.run_blocks(network.pools[2](third), 4, 4)
        return third, fourth, network.run_blocks(network.pools[3](fourth), 5, 5)

    def _plain_blocks(
        self, x: Float[Tensor, "1 3 h w"], edges: Edges
    ) -> Float[Tensor, "1 c oh ow"]:
        """Blocks 1 to 3 of any part of the window: both pools between them are plain.

        Of what the part's border changes nothing is given back, see `_run_block`.
        """
        network = self.network
        for number in (1, 2, 3):
            x = _run_block(network, x, number, edges)
            if number == 2:  # 3 pixels are gone where the next pool begins: it takes pairs
                x = _padded(x, edges, inner=-1, outer=0)
            if number < 3:
                x = plain_pool(x, network.config.retina.pooling)
        return x

    def _tensor(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 3 h w"]:
        device = self.network.mean.device
        return (
            torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(2, 0, 1)[None].float()
        )


_EVERY_EDGE = (True, True, True, True)
_MARGINS = (5, 3)
"""How far the border of a crop is felt, in pixels of the result: after blocks 1 to 3 (2 pixels,
halved, 2 more, halved, 3 more), after one block of three convolutions."""
_KEPT_BYTES = 512 * 2**20
"""Of block 3 of one picture. There are 16 ways in which a window may lie on it."""
_SMALL = 96
"""More than twice as far as a border is felt after block 3 (20 pixels), a multiple of 8."""


def _edges(part: Rectangle, side: int) -> Edges:
    (top, bottom), (left, right) = part
    return left == 0, right == side, top == 0, bottom == side


def _padded(x: Tensor, edges: Edges, *, inner: int, outer: int) -> Tensor:
    """Zeros at the borders of the whole and elsewhere; cut off where the number is negative."""
    pad = [outer if edge else inner for edge in edges]
    return F.pad(x, pad) if any(pad) else x


def _run_block(
    network: EccNet, x: Float[Tensor, "1 c h w"], number: int, edges: Edges
) -> Float[Tensor, "1 d oh ow"]:
    """The convolutions of a block on a part of their input.

    Zeros lie around the whole alone: at other borders of the part each convolution gives a pixel
    less, which would need what is beyond them.
    """
    for layer in network.blocks[number - 1].children():
        if isinstance(layer, nn.Conv2d):
            x = _padded(x, edges, inner=0, outer=1)
            x = F.conv2d(x, layer.weight, layer.bias)
        else:
            x = layer(x)
    return x


def _shrunk(part: Rectangle, by: int, side: int) -> Rectangle:
    """What is left of a part where its borders are not those of the whole."""
    rows, columns = (
        (low + by if low > 0 else 0, high - by if high < side else side) for low, high in part
    )
    return rows, columns


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
