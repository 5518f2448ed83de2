"""Relative positions: rotary codes of queries and keys, biases of scores.

| code | acts on | names here |
| --- | --- | --- |
| rotary, also axial (arXiv 2104.09864) | query, key | `rotate`, `RotaryPositions` |
| relative bias by distance (arXiv 1910.10683) | scores | `distance_bucket`, `RelativeBias` |
| relative bias on a grid (arXiv 2103.14030) | scores | `grid_offset_index`, `GridRelativeBias` |
| ALiBi (arXiv 2108.12409) | scores | `alibi_slopes`, `AlibiBias` |

Codes that are added to the input are in `heed_core.positions`. Biases are aligned bottom-right:
query i of n has the position i + m - n among m keys, so that the same module serves a full forward
and decoding with a cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from heed_core.constants import WithConstants
from heed_core.positions import Layout, check_layout, grid_positions, inverse_frequencies, pairs


def rotary_table(
    positions: Real[Tensor, "*batch"],
    dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "*batch pairs"], Float[Tensor, "*batch pairs"]]:
    """Cosine and sine of the angles p * base^(-2i / dim), i = 0 ... dim / 2 - 1.

    The angles are float64 whatever the model's dtype, so that a position has one code in every
    call and a half-precision model does not confuse positions above 256.

    Args:
        positions: Of the tokens.
        dim: Channels that are rotated, even.
        base: Longest wavelength over 2 pi.
        dtype: Of the result.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    frequencies = inverse_frequencies(dim // 2, base, positions.device)
    angles = positions.double()[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "*batch d"],
    cosine: Float[Tensor, "*#batch pairs"],
    sine: Float[Tensor, "*#batch pairs"],
    *,
    layout: Layout = "half",
) -> Float[Tensor, "*batch d"]:
    """Rotate pairs of the first `2 * pairs` channels; the others pass.

    (a, b) -> (a cos - b sin, b cos + a sin), computed in float32 at least.

    Args:
        x: Queries or keys.
        cosine: Of the angle of each pair, broadcastable.
        sine: Of the same.
        layout: Which channels are a pair: "half" (i, i + pairs) as in Llama, "interleaved" (2i, 2i
            + 1) as in the paper.
    """
    check_layout(layout)
    width = 2 * cosine.shape[-1]
    if width > x.shape[-1]:
        raise ValueError(f"cannot rotate {width} channels of x with {x.shape[-1]}")
    exact = torch.promote_types(x.dtype, torch.float32)
    turned, rest = x[..., :width].to(exact), x[..., width:]
    if layout == "interleaved":
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    turned = pairs(first * cosine - second * sine, second * cosine + first * sine, layout)
    turned = turned.to(x.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class RotaryPositions(nn.Module):
    """Rotate queries and keys by their positions; their products then depend on differences only.

    Su et al., "RoFormer" (arXiv 2104.09864). With `axes` > 1 (axial) each axis has its own share
    of the rotated channels, and the products depend on the differences along every axis.

    Args:
        head_dim: Channels of a query.
        axes: Coordinates per token.
        rotated: Channels that are rotated, a multiple of `2 * axes`; all if not given, the others
            pass.
        base: As in `rotary_table`.
        layout: As in `rotate`.

    Example:
        >>> rotary = RotaryPositions(16)
        >>> rotary(torch.randn(1, 2, 3, 16), offset=7).shape
        torch.Size([1, 2, 3, 16])
    """

    def __init__(
        self,
        head_dim: int,
        *,
        axes: int = 1,
        rotated: int | None = None,
        base: float = 10000.0,
        layout: Layout = "half",
    ) -> None:
        super().__init__()
        check_layout(layout)
        rotated = head_dim if rotated is None else rotated
        if axes < 1 or not 0 < rotated <= head_dim or rotated % (2 * axes):
            raise ValueError(
                f"rotated must be a multiple of 2 * axes = {2 * axes} up to head_dim={head_dim}, "
                f"got {rotated}"
            )
        self.axes, self.rotated, self.base = axes, rotated, base
        self.layout: Layout = layout

    def forward(
        self,
        x: Float[Tensor, "b h n d"],
        *,
        positions: Real[Tensor, "*tokens"] | None = None,
        offset: int = 0,
    ) -> Float[Tensor, "b h n d"]:
        """Rotate queries or keys.

        Args:
            x: Queries or keys.
            positions: (n,) or (b, n) of the tokens; (n, axes) or (b, n, axes) if there are several
                axes, see `heed_core.positions.grid_positions`. Default: offset, offset + 1, ...
                (one axis only).
            offset: Position of the first token, e.g. the length of a cache; not together with
                `positions`.
        """
        coordinates = self._coordinates(x, positions, offset)
        exact = torch.promote_types(x.dtype, torch.float32)
        cosine, sine = rotary_table(
            coordinates, self.rotated // self.axes, base=self.base, dtype=exact
        )
        cosine, sine = cosine.flatten(-2), sine.flatten(-2)  # (n, pairs) or (b, n, pairs)
        if cosine.dim() == 3:
            cosine, sine = cosine[:, None], sine[:, None]
        return rotate(x, cosine, sine, layout=self.layout)

    def _coordinates(self, x: Tensor, positions: Tensor | None, offset: int) -> Tensor:
        batch, tokens = x.shape[0], x.shape[-2]
        if positions is None:
            if self.axes > 1:
                raise ValueError(f"positions must be given for axes={self.axes}")
            return torch.arange(offset, offset + tokens, device=x.device)[:, None]
        if offset:
            raise ValueError(f"offset={offset} has no effect beside positions; add it to them")
        coordinates = positions[..., None] if self.axes == 1 else positions
        if tuple(coordinates.shape) not in ((tokens, self.axes), (batch, tokens, self.axes)):
            tail = "" if self.axes == 1 else f", {self.axes}"
            raise ValueError(
                f"positions must be ({tokens}{tail}) or ({batch}, {tokens}{tail}), got "
                f"{tuple(positions.shape)}"
            )
        return coordinates

    def extra_repr(self) -> str:
        """Show the options."""
        return f"rotated={self.rotated}, axes={self.axes}, base={self.base}, layout={self.layout!r}"


def distances(
    queries: int, keys: int, *, device: torch.device | str | None = None
) -> Int[Tensor, "n m"]:
    """Position of each key minus position of each query, aligned bottom-right."""
    row = torch.arange(keys, device=device)
    column = torch.arange(queries, device=device)[:, None]
    return row - column - (keys - queries)


def distance_bucket(
    distance: Int[Tensor, "*shape"],
    *,
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Int[Tensor, "*shape"]:
    """Bucket of a distance (key minus query): one each for short ones, then logarithmically wider.

    Raffel et al., T5 (arXiv 1910.10683), section 2.1. Distances of `max_distance` and more share
    the last bucket; without `bidirectional` keys to come are put into bucket 0.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    # float32: published tables were trained with its rounding at the borders of buckets.
    ratio = (distance.clamp(min=exact).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned bias of the scores per head and distance.

    Args:
        heads: Of queries.
        kind: "bucketed" as T5 (`distance_bucket`), "clipped" one value per distance up to
            `max_distance` (Shaw et al., arXiv 1803.02155).
        buckets: Number of values of a head ("bucketed" only), 4 at least.
        max_distance: Distances beyond share one value.
        bidirectional: Whether keys to come have values of their own; False for causal attention.
        std: Standard deviation of the initial values.
    """

    def __init__(
        self,
        heads: int,
        *,
        kind: Literal["bucketed", "clipped"] = "bucketed",
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if kind not in ("bucketed", "clipped"):
            raise ValueError(f"kind must be 'bucketed' or 'clipped', got {kind!r}")
        exact = buckets // 4 if bidirectional else buckets // 2
        if kind == "bucketed" and not 1 <= exact < max_distance:
            raise ValueError(
                f"buckets must be at least 4 and leave distances below max_distance={max_distance} "
                f"that are not exact, got {buckets}"
            )
        self.kind, self.buckets, self.max_distance = kind, buckets, max_distance
        self.bidirectional = bidirectional
        clipped = max_distance * (2 if bidirectional else 1) + 1
        rows = buckets if kind == "bucketed" else clipped
        self.table = nn.Parameter(torch.empty(rows, heads))
        nn.init.trunc_normal_(self.table, std=std)

    def forward(self, queries: int, keys: int) -> Float[Tensor, "h n m"]:
        """The bias of `queries` last tokens on `keys` tokens."""
        away = distances(queries, keys, device=self.table.device)
        if self.kind == "bucketed":
            index = distance_bucket(
                away,
                buckets=self.buckets,
                max_distance=self.max_distance,
                bidirectional=self.bidirectional,
            )
        else:
            most = self.max_distance if self.bidirectional else 0
            index = away.clamp(-self.max_distance, most) + self.max_distance
        return self.table[index].movedim(-1, 0)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"heads={self.table.shape[1]}, kind={self.kind!r}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


def grid_offset_index(shape: Sequence[int]) -> Int[Tensor, "n n"]:
    """For each pair of cells of a grid, the row of their offset in a table of all offsets.

    The table has prod(2 s - 1) rows, offsets (query minus key) in row-major order from -(s - 1).
    """
    cells = grid_positions(shape)
    offset = cells[:, None] - cells[None]  # (n, n, axes)
    index = torch.zeros_like(offset[..., 0])
    for axis, size in enumerate(shape):
        index = index * (2 * size - 1) + offset[..., axis] + size - 1
    return index


class GridRelativeBias(WithConstants):
    """A learned bias of the scores per head and offset on a grid (Swin, MaxViT), sizes may differ.

    Liu et al., "Swin Transformer" (arXiv 2103.14030), section 3.2: bias B[h, i, j] = table[offset
    of i from j, h].

    Args:
        heads: Of queries.
        shape: Cells along each axis of the window or grid, whose cells in row-major order are the
            tokens.
        std: Standard deviation of the initial values.
    """

    index: Tensor

    def __init__(self, heads: int, *, shape: Sequence[int], std: float = 0.02) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must name at least one size, all at least 1, got {shape}")
        self.shape = tuple(shape)
        self.table = nn.Parameter(torch.empty(math.prod(2 * size - 1 for size in shape), heads))
        nn.init.trunc_normal_(self.table, std=std)
        self.make_constants()

    def constants(self) -> Mapping[str, Tensor]:
        """Rows of the table, for each pair of cells."""
        return {"index": grid_offset_index(self.shape)}

    def forward(self, queries: int, keys: int) -> Float[Tensor, "h n n"]:
        """The bias; both numbers must be the number of cells."""
        cells = self.index.shape[0]
        if queries != cells or keys != cells:
            raise ValueError(
                f"a grid of {self.shape} has {cells} tokens, got {queries} queries and {keys} keys"
            )
        return self.table[self.index].movedim(-1, 0)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"heads={self.table.shape[1]}, shape={self.shape}"


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """Slopes of ALiBi: 2^(-8 i / heads) for a power of two.

    For other numbers those of the power of two below, then every second one of the power of two
    above (Press et al., arXiv 2108.12409).
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return torch.tensor(slopes)


class AlibiBias(WithConstants):
    """Scores fall with distance, with a fixed slope per head: B[h, i, j] = -slope_h |i - j|.

    Press et al., "Train short, test long" (arXiv 2108.12409). Nothing is learned.
    """

    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.make_constants()

    def constants(self) -> Mapping[str, Tensor]:
        """The slopes."""
        return {"slopes": alibi_slopes(self.heads)}

    def forward(self, queries: int, keys: int) -> Float[Tensor, "h n m"]:
        """The bias of `queries` last tokens on `keys` tokens."""
        away = distances(queries, keys, device=self.slopes.device).abs()
        return -self.slopes[:, None, None] * away

    def extra_repr(self) -> str:
        """Show the options."""
        return f"heads={self.heads}"
