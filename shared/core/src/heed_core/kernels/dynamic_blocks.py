"""Which blocks of keys every query keeps, and FlexAttention's mask of them.

A query keeps the `keep` keys with the largest scores among those that it may attend to, then whole
blocks of keys of which more than half were kept (Shi et al., arXiv 2508.02124, whose kernels round
so). No map of all pairs is made: time n (keep + b) for blocks of b >= 96 queries, memory n m / size
numbers for m keys in blocks of `size`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attend import autocast_together, default_scale
from heed_core.backends import flex
from heed_core.kernels.running_top import running_top

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Queries and keys of a tile, which FlexAttention computes or leaves out."""

LEAST_BLOCK = 96
"""Least queries of a block; a quarter of `keep` if that is more."""


def kept_blocks(
    scores: Float[Tensor, "b g m"],
    real: Bool[Tensor, "b m"],
    *,
    queries: int,
    keep: int,
    block_size: int,
    causal: bool,
) -> Bool[Tensor, "b g n blocks"]:
    """Whether a query keeps more than half of those keys of a block that it can see.

    Args:
        scores: Of the keys.
        real: Keys that may be kept.
        queries: Causal, they stand at the last places of the keys. Else all keep the same: n is 1.
        keep: Keys that a query keeps before rounding; of equal ones the latest.
        block_size: Keys of a block.
        causal: Query i may keep key j only if j <= i + m - n.
    """
    keys = scores.shape[2]
    rows = min(max(LEAST_BLOCK, keep // 4), max(queries, 1)) if causal else 1
    last = queries if causal else 1  # which stands at the end: it sees all keys
    index, kept = running_top(scores, real, last, keep, rows, 0)
    starts = torch.arange(0, keys, block_size, device=scores.device)
    which = (index // block_size)[:, :, :, None].expand(kept.shape)
    counts = torch.zeros(*kept.shape[:-1], len(starts), dtype=torch.int32, device=scores.device)
    counts.scatter_add_(-1, which, kept.int())
    ends = torch.arange(keys - last, keys, device=scores.device)[:, None] + 1
    length = (ends - starts).clamp(min=0, max=block_size)
    return counts.flatten(2, 3)[:, :, :last] * 2 > length


def dynamic_block_mask(
    scores: Float[Tensor, "b g m"],
    *,
    queries: int,
    heads: int,
    keep: int,
    block_size: int,
    causal: bool = False,
    padding_mask: Bool[Tensor, "b m"] | None = None,
) -> BlockMask:
    """The blocks that queries keep as FlexAttention takes them, made of counts of kept keys.

    Tiles in which no query keeps a key are left out; tiles of which all queries may attend to all
    keys are computed without a mask.

    Args:
        scores: Of the keys, one per key/value head.
        queries: n.
        heads: Of queries, which g divides.
        keep: Keys that a query keeps before rounding.
        block_size: Keys of a block: divides 128, or is a multiple of it.
        causal: Query i may see key j only if j <= i + m - n; then n <= m.
        padding_mask: True = real token.

    Raises:
        ValueError: Sizes that do not fit.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, groups, keys = scores.shape
    _check(queries, keys, heads, groups, block_size, causal)
    real = padding_mask
    if real is None:
        real = torch.ones(batch, keys, dtype=torch.bool, device=scores.device)
    kept = kept_blocks(
        scores, real, queries=queries, keep=keep, block_size=block_size, causal=causal
    )
    serves, offset = heads // groups, keys - queries if causal else None

    some, every = _tiles(kept, block_size, queries)
    inside = F.pad(real, (0, -keys % TILE)).reshape(batch, -1, TILE).all(-1)
    every = every & inside[:, None, None]
    if offset is not None:
        first = torch.arange(0, queries, TILE, device=scores.device)[:, None]
        start = torch.arange(0, keys, TILE, device=scores.device)
        some = some & (start <= first + TILE - 1 + offset)
        every = every & (start + TILE - 1 <= first + offset)
    partly, wholly = (
        _listed(tiles.repeat_interleave(serves, dim=1)) for tiles in (some & ~every, every)
    )
    return BlockMask.from_kv_blocks(
        partly[0],
        partly[1],
        wholly[0],
        wholly[1],
        BLOCK_SIZE=TILE,
        mask_mod=lambda b, h, i, j: _permitted(
            kept, real, block_size, offset, b, h // serves, i, j
        ),
        seq_lengths=(queries, keys),
    )


def blockwise_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    scores: Float[Tensor, "b g m"],
    *,
    keep: int,
    block_size: int,
    causal: bool = False,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention to the blocks that queries keep, scores as a bias, by FlexAttention.

    Args:
        query: One row per token that asks.
        key: One row per token that may be attended to; its g heads divide h.
        value: What is averaged.
        scores: Of the keys, one per key/value head.
        keep: As in `dynamic_block_mask`.
        block_size: As there.
        causal: As there.
        padding_mask: True = real token.
        scale: Of the products; default d ** -0.5.

    Raises:
        UnsupportedBackend: FlexAttention cannot run the call (float64, a gradient on the CPU).
        ValueError: Sizes that do not fit.
    """
    query, key, value = autocast_together(query, key, value)
    heads, groups = query.shape[1], key.shape[1]
    block_mask = dynamic_block_mask(
        scores,
        queries=query.shape[2],
        heads=heads,
        keep=keep,
        block_size=block_size,
        causal=causal,
        padding_mask=padding_mask,
    )
    return flex.run_blocks(
        query,
        key,
        value,
        block_mask=block_mask,
        scale=default_scale(query) if scale is None else scale,
        bias=scores.repeat_interleave(heads // groups, dim=1)[:, :, None],
    )


def _permitted(
    kept: Tensor,
    real: Tensor,
    size: int,
    offset: int | None,
    b: Tensor,
    g: Tensor,
    i: Tensor,
    j: Tensor,
) -> Tensor:
    if offset is None:  # one row serves all queries
        return kept[b, g, 0 * i, j // size] & real[b, j]
    return kept[b, g, i, j // size] & real[b, j] & (j <= i + offset)


def _tiles(kept: Tensor, size: int, queries: int) -> tuple[Tensor, Tensor]:
    """Of each tile, (b, g, q, k): some query keeps some block of it; every query all of it."""
    if size <= TILE:
        each = TILE // size
        blocks = F.pad(kept, (0, -kept.shape[-1] % each)).reshape(*kept.shape[:3], -1, each)
        some, every = blocks.any(-1), blocks.all(-1)
    else:
        some = every = kept.repeat_interleave(size // TILE, dim=-1)
    tiles = -(-queries // TILE)
    if kept.shape[2] == 1:
        some, every = (x.expand(-1, -1, tiles, -1) for x in (some, every))
    else:
        missing = (0, 0, 0, -queries % TILE)
        shape = (*kept.shape[:2], tiles, TILE, some.shape[-1])
        some = F.pad(some, missing).reshape(shape).any(3)
        every = F.pad(every, missing, value=True).reshape(shape).all(3)
    return some, every


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile has, and their numbers in front."""
    order = (~tiles).to(torch.uint8).argsort(dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()


def _check(queries: int, keys: int, heads: int, groups: int, block_size: int, causal: bool) -> None:
    if block_size < 1 or (TILE % block_size and block_size % TILE):
        raise ValueError(f"block_size must divide {TILE} or be a multiple of it, got {block_size}")
    if heads % groups:
        raise ValueError(f"scores have {groups} key/value heads, which do not divide heads={heads}")
    if causal and queries > keys:
        raise ValueError(f"causal=True needs a key per query, got {queries} queries, {keys} keys")
