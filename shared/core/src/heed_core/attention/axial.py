"""Axial attention: each cell of a grid attends to the cells of its own row, column or other line.

    O[.., i, ..] = sum_j softmax_j(scale * Q[.., i, ..] . K[.., j, ..]) V[.., j, ..]

with i and j running along one axis and all other indices equal. Ho et al., "Axial attention in
multidimensional transformers" (arXiv 1912.12180). `RowColumnDecoder` is the paper's semi-parallel
autoregression in raster order: an outer decoder (rows unmasked, columns causal, then shifted down)
sees all rows above, an inner decoder (shifted right, rows causal) the cells to the left.

Cost for N cells of width C on lines of n cells: time N n C per axis, memory N C with fused kernels.
With caches a new row costs the outer decoder its own length and the rows above, not all of them
anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.multi_head import check_heads
from heed_core.cache import KVCache, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.sites import Attend
from heed_core.tokens import check_real, check_shape, check_type

RESIDUAL_SCALE = 1e-10
"""Of the variance of weights that new blocks add to the residual with: their share is about 0."""


Combine = Literal["sum", "sequence"]
"""How the axes of `MultiAxisAxialAttention` come together."""


def axial_attention(
    query: Float[Tensor, "b h *spatial d"],
    key: Float[Tensor, "b h *cells d"],
    value: Float[Tensor, "b h *cells e"],
    *,
    axis: int,
    mask: Bool[Tensor, " b *cells"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b h *spatial e"]:
    """Softmax attention along one axis of a grid.

    Args:
        query: Of every cell; along `axis` there may be fewer than keys, they are then the last.
        key: Of every cell.
        value: Of every cell.
        axis: Spatial axis, 0 for the first: with (H, W), 0 is along columns, 1 along rows.
        mask: True = the cell may be attended to.
        causal: A cell sees those at or before its own place on the line.
        scale: Of the products; d ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        impl: Back-end of `attend`.
    """
    if query.dim() < 4 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query, key and value must be (batch, heads, *spatial, channels), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    axis = checked_axis(axis, query.dim() - 3)
    lines = [_lines(x.movedim(1, -2), axis) for x in (query, key, value)]
    allowed = None if mask is None else _line_mask(mask, axis)
    mixed = attend(*lines, mask=allowed, causal=causal, scale=scale, dropout=dropout, impl=impl)
    spatial = query.shape[2:-1]
    return _grid(mixed, query.shape[0], spatial, axis).movedim(-2, 1)


def shift(
    x: Float[Tensor, "b *spatial c"], *, axis: int, steps: int = 1
) -> Float[Tensor, "b *spatial c"]:
    """Move cells along a spatial axis; zeros come in, what moves out is lost.

    Args:
        x: Grid.
        axis: Spatial axis, 0 for the first.
        steps: Positive towards higher indices (down, right).
    """
    axis = checked_axis(axis, x.dim() - 2) + 1
    ends = (max(steps, 0), max(-steps, 0))
    padded = F.pad(x, [*[0, 0] * (x.dim() - 1 - axis), *ends])
    return padded.narrow(axis, ends[1], x.shape[axis])


class AxialAttention(nn.Module):
    """Multi-head attention along one axis of a grid.

    The site is `attend`: weights (b * other cells, heads, n, n), one map per line; lines are in
    row-major order of the other axes.

    Args:
        dim: Channels of a cell, in and out.
        heads: Heads.
        axis: Spatial axis along which cells attend, 0 for the first.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        causal: A cell sees those at or before its own place on the line.
        impl: Back-end of `attend`.

    Example:
        >>> rows = AxialAttention(16, heads=2, axis=1, causal=True)
        >>> rows(torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        axis: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.axis, self.causal = axis, causal
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.attend = Attend(causal=causal, dropout=dropout, impl=impl)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b *spatial c"],
        *,
        mask: Bool[Tensor, " b *spatial"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b *spatial c"]:
        """Attend along the axis.

        Args:
            x: Grid of cells.
            mask: True = the cell may be attended to.
            cache: Of a causal attention, from `new_cache`: `x` holds the next cells of each line.
        """
        check_grid(x, self.dim, layer=self.query)
        axis = checked_axis(self.axis, x.dim() - 2)
        if mask is not None:
            check_cell_mask(mask, x)
        query, key, value = (
            _lines(layer(x).unflatten(-1, (self.heads, self.head_dim)), axis)
            for layer in (self.query, self.key, self.value)
        )
        if cache is not None:
            if not self.causal or mask is not None:
                raise ValueError("a cache serves causal attention without a mask only")
            key, value = cache.append(key, value)
        allowed = None if mask is None else _line_mask(mask, axis)
        mixed: Tensor = self.attend(query, key, value, mask=allowed)
        joined = _grid(mixed, x.shape[0], x.shape[1:-1], axis).flatten(-2)
        return cast(Tensor, self.out(joined))

    def new_cache(
        self, batch: int, spatial: Sequence[int], *, dtype: torch.dtype | None = None
    ) -> KVCache:
        """An empty cache for decoding along the axis.

        Args:
            batch: Grids decoded together.
            spatial: Sizes of the whole grid.
            dtype: Of keys and values; that of the weights if not given.
        """
        axis = checked_axis(self.axis, len(spatial))
        lines = batch
        for other, size in enumerate(spatial):
            lines *= 1 if other == axis else size
        own, device = type_and_place(self.key)
        return KVCache(
            lines,
            self.heads,
            spatial[axis],
            self.head_dim,
            dtype=own if dtype is None else dtype,
            device=device,
        )

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}, axis={self.axis}"


class MultiAxisAxialAttention(nn.Module):
    """Axial attention along every axis of a grid, summed or one after the other.

    The sites are `axes.0.attend`, `axes.1.attend`, ...

    Args:
        dim: Channels of a cell, in and out.
        axes: Number of spatial axes.
        heads: Heads of each axis.
        combine: "sum" adds what the axes attend to, "sequence" lets each axis read what the one
            before wrote.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Probability of dropping a weight in training.
        impl: Back-end of `attend`.

    Example:
        >>> MultiAxisAxialAttention(16, axes=3, heads=2)(torch.randn(1, 3, 4, 5, 16)).shape
        torch.Size([1, 3, 4, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        axes: int = 2,
        heads: int,
        combine: Combine = "sum",
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if axes < 1:
            raise ValueError(f"axes must be at least 1, got {axes}")
        if combine not in ("sum", "sequence"):
            raise ValueError(f"combine must be 'sum' or 'sequence', got {combine!r}")
        self.dim, self.combine = dim, combine
        self.axes = nn.ModuleList(
            AxialAttention(
                dim,
                heads=heads,
                axis=axis,
                head_dim=head_dim,
                qkv_bias=qkv_bias,
                dropout=dropout,
                impl=impl,
            )
            for axis in range(axes)
        )

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, mask: Bool[Tensor, " b *spatial"] | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Attend along every axis; `mask` is True where a cell may be attended to."""
        check_grid(x, self.dim, axes=len(self.axes))
        if self.combine == "sequence":
            for axis in self.axes:
                x = axis(x, mask=mask)
            return x
        total: Tensor = self.axes[0](x, mask=mask)
        for axis in list(self.axes)[1:]:
            total = total + axis(x, mask=mask)
        return total


def _scale_variance(layer: nn.Linear, scale: float) -> None:
    """Truncated normal weights with a variance of scale / fan-in, no bias."""
    cut = 0.8796256610342398  # standard deviation of a normal variable that is cut at two
    std = (scale / layer.in_features) ** 0.5 / cut
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


class AxialBlock(nn.Module):
    """Pre-norm block of the Axial Transformer: attention along an axis, then a feed-forward.

    The activation is z sigmoid(1.702 z); the feed-forward keeps the width unless `hidden` is given.
    A new block is almost the identity: weights are drawn by their fan-in, those of what is added to
    the residual with the variance `RESIDUAL_SCALE`, as published.

    Args:
        dim: Channels of a cell.
        heads: Heads.
        axis: Spatial axis, 0 for the first.
        hidden: Channels inside the feed-forward; `dim` if not given.
        dropout: Of attention weights and of what is added to the residual.
        causal: As in `AxialAttention`.
        impl: Back-end of `attend`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        axis: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        causal: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = AxialAttention(
            dim, heads=heads, axis=axis, dropout=dropout, causal=causal, impl=impl
        )
        self.feed_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()

    def _init_weights(self) -> None:
        attention = self.attention
        for layer in (attention.query, attention.key, attention.value, self.expand):
            _scale_variance(layer, 1.0)
        for layer in (attention.out, self.contract):
            _scale_variance(layer, RESIDUAL_SCALE)

    @restores_cache
    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, cache: KVCache | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid; `cache` as in `AxialAttention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache=cache))
        hidden = self.expand(self.feed_norm(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        return x + cast(Tensor, self.dropout(self.contract(hidden)))


@dataclass(kw_only=True)
class RowColumnState:
    """What `RowColumnDecoder` remembers between the cells that it decodes."""

    columns: list[KVCache]
    """Of the outer decoder's column attentions."""
    rows: list[KVCache]
    """Of the inner decoder, emptied at each new row."""
    above: Tensor
    """(b, W, c): what the current row gets from the rows above it and from its context."""
    context: Tensor
    """(b, W, c): of the current row."""


class RowColumnDecoder(nn.Module):
    """Autoregression over a grid in raster order, all cells at once or cell by cell.

        u = shift_down(outer(x + context)) + context        outer: rows unmasked, columns causal
        y = inner(shift_right(x) + u)                       inner: rows causal

    so that y[i, j] depends on x[i', j'] only for i' < i, or i' = i and j' < j, and on the whole
    context of its row and of the rows above. `context` also carries position codes.

    Args:
        dim: Channels of a cell.
        heads: Heads of each block.
        outer_depth: Blocks of the outer decoder, even: row, column, row, ...
        inner_depth: Blocks of the inner decoder.
        hidden: Channels inside the feed-forwards; `dim` if not given.
        dropout: As in `AxialBlock`.
        impl: Back-end of `attend`.

    Example:
        >>> decoder = RowColumnDecoder(16, heads=2, outer_depth=2, inner_depth=1)
        >>> decoder(torch.randn(1, 5, 7, 16), torch.randn(1, 5, 7, 16)).shape
        torch.Size([1, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        outer_depth: int,
        inner_depth: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if outer_depth < 2 or outer_depth % 2:
            raise ValueError(f"outer_depth must be even and at least 2, got {outer_depth}")
        if inner_depth < 1:
            raise ValueError(f"inner_depth must be at least 1, got {inner_depth}")

        def block(axis: int, *, causal: bool) -> AxialBlock:
            return AxialBlock(
                dim,
                heads=heads,
                axis=axis,
                hidden=hidden,
                dropout=dropout,
                causal=causal,
                impl=impl,
            )

        self.dim = dim
        self.outer = nn.ModuleList(
            block(0, causal=True) if place % 2 else block(1, causal=False)
            for place in range(outer_depth)
        )
        self.inner = nn.ModuleList(block(1, causal=True) for _ in range(inner_depth))

    def forward(
        self, x: Float[Tensor, "b h w c"], context: Float[Tensor, "b h w c"]
    ) -> Float[Tensor, "b h w c"]:
        """Predict every cell from those before it.

        Args:
            x: Embedded cells.
            context: What all cells may know: conditioning and position codes.
        """
        check_grid(x, self.dim, axes=2)
        if context.shape != x.shape:
            raise ValueError(
                f"context must have the shape {tuple(x.shape)} of x, got {tuple(context.shape)}"
            )
        check_real(context=context)
        check_type(cast(AxialBlock, self.inner[0]).expand, x=x, context=context)
        above = x + context
        for block in self.outer:
            above = block(above)
        y = shift(x, axis=1) + shift(above, axis=0) + context
        for block in self.inner:
            y = block(y)
        return y

    def new_state(
        self, batch: int, spatial: Sequence[int], *, dtype: torch.dtype | None = None
    ) -> RowColumnState:
        """An empty state for decoding grids of (H, W) = `spatial`."""

        def caches(blocks: nn.ModuleList, causal_axis: int, size: Sequence[int]) -> list[KVCache]:
            attentions = [cast(AxialBlock, block).attention for block in blocks]
            return [
                attention.new_cache(batch, size, dtype=dtype)
                for attention in attentions
                if attention.axis == causal_axis
            ]

        own, device = type_and_place(cast(AxialBlock, self.inner[0]).expand)
        empty = torch.zeros(batch, spatial[1], self.dim, dtype=dtype or own, device=device)
        return RowColumnState(
            columns=caches(self.outer, 0, spatial),
            rows=caches(self.inner, 1, (1, spatial[1])),
            above=empty,
            context=empty,
        )

    def begin_row(
        self,
        previous: Float[Tensor, "b w c"] | None,
        context: Float[Tensor, "b w c"],
        state: RowColumnState,
    ) -> None:
        """Go to the next row.

        Args:
            previous: The embedded cells of the row above; None for the first row.
            context: Of the new row.
            state: Changed in place.

        Raises:
            ValueError: Another shape than that of the state, which stays as it is.
        """
        for name, row in (("context", context), ("previous", previous)):
            if row is not None:
                check_shape(name, row, tuple(state.context.shape), "batch, columns, channels")
        above = torch.zeros_like(context)
        if previous is not None:
            above = (previous + state.context)[:, None]
            columns = iter(state.columns)
            for block in self.outer:
                causal = cast(AxialBlock, block).attention.causal
                above = block(above, cache=next(columns) if causal else None)
            above = above[:, 0]
        state.above, state.context = above + context, context
        for cache in state.rows:
            cache.crop(0)

    def step(
        self, left: Float[Tensor, "b c"] | None, state: RowColumnState
    ) -> Float[Tensor, "b c"]:
        """Predict the next cell of the row.

        Args:
            left: The embedded cell to its left; None for the first of the row.
            state: Changed in place.
        """
        column = state.rows[0].length
        y = state.above[:, column]
        if left is not None:
            y = y + left
        y = y[:, None, None]
        for block, cache in zip(self.inner, state.rows, strict=True):
            y = block(y, cache=cache)
        return y[:, 0, 0]


def axial_attention_from_lucidrains(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of lucidrains' `AxialAttention` for `MultiAxisAxialAttention`.

    Ours needs `qkv_bias=False`; `heads`, `axes` and `combine` are not part of the weights.

    Raises:
        ValueError: A name that it does not have.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) != 5 or parts[0] != "axial_attentions" or parts[2] != "fn":
            raise ValueError(f"{name!r} is no weight of lucidrains' AxialAttention")
        axis, layer, kind = parts[1], parts[3], parts[4]
        if layer == "to_kv":
            key, value = tensor.chunk(2)
            result |= {f"axes.{axis}.key.{kind}": key, f"axes.{axis}.value.{kind}": value}
        elif layer in ("to_q", "to_out"):
            ours = "query" if layer == "to_q" else "out"
            result[f"axes.{axis}.{ours}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of lucidrains' AxialAttention")
    return result


def checked_axis(axis: int, axes: int) -> int:
    """The axis counted from the front.

    Raises:
        ValueError: The grid has no such axis.
    """
    if not -axes <= axis < axes:
        raise ValueError(f"axis must be below {axes} (the grid has {axes} axes), got {axis}")
    return axis % axes


def check_grid(
    x: Tensor, dim: int, *, axes: int | None = None, layer: nn.Module | None = None
) -> None:
    """Raise unless x is floating-point (batch, *spatial, dim), with a number of axes if given.

    Args:
        x: What was given.
        dim: Channels.
        axes: How many spatial ones; any number if not given.
        layer: Whose type x must have, see `check_type`.
    """
    wanted = 3 if axes is None else axes + 2
    wrong_rank = x.dim() < wanted if axes is None else x.dim() != wanted
    if wrong_rank or x.shape[-1] != dim:
        spatial = "*spatial" if axes is None else f"{axes} spatial axes"
        raise ValueError(f"x must be (batch, {spatial}, {dim}), got {tuple(x.shape)}")
    check_real(x=x)
    if layer is not None:
        check_type(layer, x=x)


def check_cell_mask(mask: Tensor, x: Tensor) -> None:
    """Raise unless a mask is boolean with one value per cell of x."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True = may be attended to), got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask must be {tuple(x.shape[:-1])} (batch, *spatial), got {tuple(mask.shape)}"
        )


def _lines(cells: Tensor, axis: int) -> Tensor:
    """(b, *spatial, h, d) -> (b * other cells, h, n, d)."""
    moved = cells.movedim(axis + 1, -2)
    return moved.flatten(0, -4)


def _grid(lines: Tensor, batch: int, spatial: Sequence[int], axis: int) -> Tensor:
    """(b * other cells, h, n, d) -> (b, *spatial, h, d)."""
    others = [size for place, size in enumerate(spatial) if place != axis]
    return lines.reshape(batch, *others, *lines.shape[1:]).movedim(-2, axis + 1)


def _line_mask(mask: Tensor, axis: int) -> Tensor:
    """(b, *spatial) -> (b * other cells, 1, 1, n)."""
    moved = mask.movedim(axis + 1, -1)
    return moved.flatten(0, -2)[:, None, None]
