"""Multi-axis attention: within blocks of a grid, and within sparse grids that span all of it.

    block: the P_1 x P_2 neighbouring cells of a window attend to each other
    grid:  G_1 x G_2 cells, spaced H / G_1 and W / G_2 apart, attend to each other
    O_i = sum_j softmax_j(scale * Q_i . K_j + T[offset of i from j]) V_j        within a group

Tu et al., "MaxViT: multi-axis vision transformer" (arXiv 2204.01697). One after the other they
connect every two cells. `partition` is the only thing that differs between the two; window
attention (arXiv 2103.14030, without its shift) is the first of them.

Cost for N cells of width C in groups of n: time N n C, memory N C with fused kernels (on the CPU a
relative bias that needs gradients keeps the N n maps of all heads).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.axial import check_cell_mask, check_grid
from heed_core.attention.multi_head import check_heads
from heed_core.impl import Impl
from heed_core.relative import GridRelativeBias
from heed_core.sites import Attend

Mode = Literal["block", "grid"]
"""Groups of neighbours, or of cells spread evenly over everything."""


def partition(
    x: Shaped[Tensor, "b *spatial c"], size: Sequence[int], *, mode: Mode = "block"
) -> Shaped[Tensor, "b groups n c"]:
    """Split a grid into groups of `prod(size)` cells.

    Tokens of a group are in row-major order, and so are the groups: of windows for "block", of the
    offset of their first cell for "grid".

    Args:
        x: Grid with any number of spatial axes.
        size: Cells of a group along each axis; must divide the grid.
        mode: Neighbours ("block"), or cells that are spread evenly ("grid").

    Raises:
        ValueError: A size that does not divide the axis, named with both numbers.
    """
    axes = _check_partition(x.shape[1:-1], size, mode)
    split: list[int] = []
    for length, cells in zip(x.shape[1:-1], size, strict=True):
        split += [length // cells, cells] if mode == "block" else [cells, length // cells]
    inner = [2 + 2 * axis if mode == "block" else 1 + 2 * axis for axis in range(axes)]
    outer = [1 + 2 * axis if mode == "block" else 2 + 2 * axis for axis in range(axes)]
    parts = x.reshape(x.shape[0], *split, x.shape[-1])
    parts = parts.permute(0, *outer, *inner, 2 * axes + 1)
    groups = parts.flatten(axes + 1, 2 * axes).flatten(1, axes)
    return groups.narrow(2, 0, math.prod(size))  # a plain number also where others are symbolic


def unpartition(
    groups: Shaped[Tensor, "b groups n c"],
    size: Sequence[int],
    spatial: Sequence[int],
    *,
    mode: Mode = "block",
) -> Shaped[Tensor, "b *spatial c"]:
    """Put the groups of `partition` back.

    Args:
        groups: What `partition` gave.
        size: As given to it.
        spatial: Sizes of the grid.
        mode: As given to it.
    """
    axes = _check_partition(spatial, size, mode)
    counts = [length // cells for length, cells in zip(spatial, size, strict=True)]
    parts = groups.reshape(groups.shape[0], *counts, *size, groups.shape[-1])
    order: list[int] = []
    for axis in range(axes):
        outer, inner = 1 + axis, 1 + axes + axis
        order += [outer, inner] if mode == "block" else [inner, outer]
    parts = parts.permute(0, *order, 2 * axes + 1)
    return parts.reshape(groups.shape[0], *spatial, groups.shape[-1])


def partition_attention(
    query: Float[Tensor, "b h *spatial d"],
    key: Float[Tensor, "b h *spatial d"],
    value: Float[Tensor, "b h *spatial e"],
    *,
    size: Sequence[int],
    mode: Mode = "block",
    mask: Bool[Tensor, " b *spatial"] | None = None,
    bias: Float[Tensor, "#h n n"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b h *spatial e"]:
    """Softmax attention within the groups of a partition.

    Args:
        query: Of every cell.
        key: Of every cell.
        value: Of every cell.
        size: Cells of a group along each axis.
        mode: As in `partition`.
        mask: True = the cell may be attended to.
        bias: Added to the scores of every group.
        scale: Of the products; d ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        impl: Back-end of `attend`.
    """
    if query.dim() < 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "query, key and value must be (batch, heads, *spatial, channels) of one size, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, heads, *spatial = query.shape[:-1]
    tokens = []
    for x in (query, key, value):
        groups = partition(x.movedim(1, -2).flatten(-2), size, mode=mode).flatten(0, 1)
        tokens.append(_heads(groups, heads))
    mixed = attend(
        *tokens,
        mask=None if mask is None else _group_mask(mask, size, mode),
        bias=bias,
        scale=scale,
        dropout=dropout,
        impl=impl,
    )
    joined = mixed.transpose(1, 2).flatten(2)
    groups = joined.reshape(batch, -1, *joined.shape[1:])
    grid = unpartition(groups, size, spatial, mode=mode)
    return grid.reshape(batch, *spatial, heads, value.shape[-1]).movedim(-2, 1)


class PartitionAttention(nn.Module):
    """Multi-head attention within blocks or grids, with a bias by relative position.

    The site is `attend`: weights (b * groups, heads, n, n), groups in the order of `partition`.

    Args:
        dim: Channels of a cell, in and out.
        heads: Heads.
        size: Cells of a group along each axis of the grid.
        mode: As in `partition`.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Probability of dropping a weight in training.
        relative_bias: Whether scores have a learned bias by offset, `relative_bias.table`.
        impl: Back-end of `attend`.

    Example:
        >>> attention = PartitionAttention(32, heads=4, size=(2, 3), mode="grid")
        >>> attention(torch.randn(1, 8, 9, 32)).shape
        torch.Size([1, 8, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        size: Sequence[int],
        mode: Mode = "block",
        head_dim: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        relative_bias: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        _check_partition(size, size, mode)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.size = dim, heads, tuple(size)
        self.mode: Mode = mode
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.relative_bias = GridRelativeBias(heads, shape=size) if relative_bias else None
        self.attend = Attend(dropout=dropout, impl=impl)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, mask: Bool[Tensor, " b *spatial"] | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Attend within each group; `mask` is True where a cell may be attended to."""
        check_grid(x, self.dim, axes=len(self.size), layer=self.query)
        groups = partition(x, self.size, mode=self.mode)
        tokens = groups.flatten(0, 1)
        allowed = None
        if mask is not None:
            check_cell_mask(mask, x)
            allowed = _group_mask(mask, self.size, self.mode)
        bias = None
        if self.relative_bias is not None:
            bias = self.relative_bias(tokens.shape[1], tokens.shape[1])
        query, key, value = (
            _heads(layer(tokens), self.heads) for layer in (self.query, self.key, self.value)
        )
        mixed: Tensor = self.attend(query, key, value, mask=allowed, bias=bias)
        joined: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return unpartition(joined.view_as(groups), self.size, x.shape[1:-1], mode=self.mode)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, size={self.size}, mode={self.mode!r}"


class PartitionBlock(nn.Module):
    """Pre-norm block: attention within blocks or grids, then a feed-forward (tanh GELU).

    Args:
        dim: Channels of a cell.
        heads: Heads.
        size: Cells of a group along each axis.
        mode: As in `partition`.
        hidden: Channels inside the feed-forward; 4 dim if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Of attention weights and of what is added to the residual.
        impl: Back-end of `attend`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        size: Sequence[int],
        mode: Mode = "block",
        hidden: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = PartitionAttention(
            dim, heads=heads, size=size, mode=mode, qkv_bias=qkv_bias, dropout=dropout, impl=impl
        )
        self.feed_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, mask: Bool[Tensor, " b *spatial"] | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid; `mask` as in `PartitionAttention`."""
        check_grid(x, self.attention.dim, axes=len(self.attention.size), layer=self.expand)
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
        hidden = F.gelu(self.expand(self.feed_norm(x)), approximate="tanh")
        return x + cast(Tensor, self.dropout(self.contract(hidden)))


class MultiAxisAttention(nn.Module):
    """A block-attention block, then a grid-attention block: every cell reaches every other.

    The sites are `block.attention.attend` and `grid.attention.attend`.

    Args:
        dim: Channels of a cell.
        heads: Heads.
        size: Cells of a window, and of a grid, along each axis.
        hidden: Channels inside the feed-forwards; 4 dim if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: As in `PartitionBlock`.
        impl: Back-end of `attend`.

    Example:
        >>> MultiAxisAttention(32, heads=2, size=(2, 3))(torch.randn(1, 8, 9, 32)).shape
        torch.Size([1, 8, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        size: Sequence[int],
        hidden: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()

        def block(mode: Mode) -> PartitionBlock:
            return PartitionBlock(
                dim,
                heads=heads,
                size=size,
                mode=mode,
                hidden=hidden,
                qkv_bias=qkv_bias,
                dropout=dropout,
                impl=impl,
            )

        self.block = block("block")
        self.grid = block("grid")

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, mask: Bool[Tensor, " b *spatial"] | None = None
    ) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid; `mask` as in `PartitionAttention`."""
        return cast(Tensor, self.grid(self.block(x, mask=mask), mask=mask))


def resized_bias_table(
    table: Float[Tensor, "old h"], shape: Sequence[int], new_shape: Sequence[int]
) -> Float[Tensor, "new h"]:
    """The table of `GridRelativeBias` for another window, bilinear (two axes).

    Args:
        table: Of a window of `shape`.
        shape: Its cells along each axis.
        new_shape: Those of the new window.
    """
    old = [2 * size - 1 for size in shape]
    if len(shape) != 2 or len(new_shape) != 2 or table.shape[0] != math.prod(old):
        raise ValueError(
            f"table must have {math.prod(old)} rows for a window of {tuple(shape)} and both shapes "
            f"two axes, got {tuple(table.shape)} and {tuple(new_shape)}"
        )
    maps = table.T.reshape(1, -1, *old)
    new = [2 * size - 1 for size in new_shape]
    resized = F.interpolate(maps, size=new, mode="bilinear", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()


def partition_block_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of timm's `PartitionAttentionCl` (`attn_block`, `attn_grid` of MaxViT).

    Its tables (heads, 2 P_1 - 1, 2 P_2 - 1), of TensorFlow's models, hold offsets of the key from
    the query, ours the opposite. Those of its own models and of Swin, (offsets, heads), are ours.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {
        "norm1": "attention_norm",
        "norm2": "feed_norm",
        "mlp.fc1": "expand",
        "mlp.fc2": "contract",
        "attn.proj": "attention.out",
    }
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"attention.{part}.{kind}"] = rows
        elif name == "attn.rel_pos.relative_position_bias_table":
            if tensor.dim() == 3:
                tensor = tensor.flip(1, 2).flatten(1).T.contiguous()
            result["attention.relative_bias.table"] = tensor
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of timm's PartitionAttentionCl")
    return result


def _check_partition(spatial: Sequence[int], size: Sequence[int], mode: str) -> int:
    if mode not in ("block", "grid"):
        raise ValueError(f"mode must be 'block' or 'grid', got {mode!r}")
    if not size or len(size) != len(spatial) or min(size) < 1:
        raise ValueError(
            f"size must have one positive number for each of {len(spatial)} spatial axes, got "
            f"{tuple(size)}"
        )
    for axis, (length, cells) in enumerate(zip(spatial, size, strict=True)):
        if length % cells:
            raise ValueError(
                f"spatial axis {axis} must be a multiple of {cells}, got {length} of "
                f"{tuple(spatial)}; pad the input"
            )
    return len(size)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """(g, n, h * d) -> (g, h, n, d)."""
    groups, count, width = tokens.shape
    return tokens.reshape(groups, count, heads, width // heads).transpose(1, 2)


def _group_mask(mask: Tensor, size: Sequence[int], mode: Mode) -> Tensor:
    """(b, *spatial) -> (b * groups, 1, 1, n)."""
    groups = partition(mask[..., None], size, mode=mode)
    return groups.flatten(0, 1)[:, None, None, :, 0]
