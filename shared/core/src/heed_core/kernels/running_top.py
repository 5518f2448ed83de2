"""The keys with the largest scores among those so far, for every query of a causal attention.

Query i may keep the `keep` largest scores of keys 0 ... i + m - n; of equal ones the latest. From
one query to the next one key comes and at most one goes, so that a block of queries keeps no other
keys than the `keep` of its start and those that come within the block: these are its candidates.
Scores are ranked once, of equal ones the latest highest; all else compares whole numbers, no two of
which are equal.

Selecting has no gradient. An operator of its own keeps the loop over blocks out of compiled and
exported graphs. Time n (keep + block), memory n (keep + block) booleans and n / block (keep +
block) indices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -1
"""The rank of what may not be kept."""

TOGETHER = 16
"""Blocks whose queries are decided at a time: few enough for a cache."""


@torch.library.custom_op(
    "heed::running_top",
    mutates_args=(),
    schema="(Tensor scores, Tensor real, SymInt queries, SymInt keep, SymInt block, SymInt spare)"
    " -> (Tensor, Tensor)",
)
def running_top(
    scores: Tensor, real: Tensor, queries: int, keep: int, block: int, spare: int
) -> tuple[Tensor, Tensor]:
    """Candidates of each block of queries, and which of them each query keeps.

    Args:
        scores: One per key, finite, (b, g, m).
        real: Keys that may be kept, (b, m).
        queries: n <= m; they stand at the last n places.
        keep: Keys that a query keeps, at least 1.
        block: Queries of a block, at least 1.
        spare: Empty blocks at the end.

    Returns:
        Indices of keys (b, g, blocks, keep + block), and (b, g, blocks, block, keep + block): a
        candidate that is none is kept by nobody.
    """
    batch, groups, keys = scores.shape
    blocks = (queries + block - 1) // block + spare
    by_rank = scores.detach().argsort(dim=-1, stable=True)
    place = torch.arange(keys, device=scores.device, dtype=torch.int32)
    rank = torch.empty_like(by_rank, dtype=torch.int32)
    rank.scatter_(-1, by_rank, place.expand(by_rank.shape))
    rank.masked_fill_(~real[:, None], NONE)
    start, missing = keys - queries, blocks * block - queries
    best = _largest(rank[..., :start], keep)
    new = F.pad(rank[..., start:], (0, missing), value=NONE).reshape(batch, groups, blocks, block)
    before = rank.new_empty(batch, groups, blocks, keep)  # what was best at the start of a block
    for at in range(blocks):
        before[:, :, at] = best
        best = _largest(torch.cat([best, new[:, :, at]], dim=-1), keep)
    index = by_rank.new_empty(batch, groups, blocks, keep + block)
    found = by_rank.gather(-1, before.clamp(min=0).flatten(2).long())
    index[..., :keep] = found.view(before.shape).masked_fill_(before == NONE, 0)
    came_at = F.pad(torch.arange(start, keys, device=scores.device), (0, missing))
    index[..., keep:] = came_at.view(blocks, block)
    kept = real.new_empty(batch, groups, blocks, block, keep + block)
    for at in range(0, blocks, TOGETHER):
        some = (slice(None), slice(None), slice(at, at + TOGETHER))
        _keep(before[some], new[some], kept[some])
    return index, kept


@running_top.register_fake
def _(
    scores: Tensor, real: Tensor, queries: int, keep: int, block: int, spare: int
) -> tuple[Tensor, Tensor]:
    batch, groups, _ = scores.shape
    blocks, width = (queries + block - 1) // block + spare, keep + block
    return (
        scores.new_empty(batch, groups, blocks, width, dtype=torch.int64),
        scores.new_empty(batch, groups, blocks, block, width, dtype=torch.bool),
    )


def _largest(rank: Tensor, keep: int) -> Tensor:
    """The `keep` largest, sorted, filled up with `NONE`."""
    found = rank.sort(dim=-1, descending=True).values[..., :keep]
    return F.pad(found, (0, keep - found.shape[-1]), value=NONE)


def _keep(best: Tensor, new: Tensor, kept: Tensor) -> None:
    """Fill (b, g, blocks, block, keep + block): of the sorted best and what came, one by one.

    A new key is kept while those before it in the order, old ones and those that came so far, are
    fewer than `keep`; each that is kept takes the place of the last old one.
    """
    keep, block = best.shape[-1], new.shape[-1]
    order = torch.arange(block, device=best.device)
    larger = torch.searchsorted(-best, (-new).contiguous(), out_int32=True)  # of old ones
    stays = (keep - larger).masked_fill_(new == NONE, 0)
    beats = new[..., :, None] > new[..., None, :]
    stays_new = beats.cumsum(-2, dtype=torch.int32) < stays[..., None, :]
    kept[..., keep:] = stays_new & (order[:, None] >= order)
    places = keep - kept[..., keep:].sum(-1, dtype=torch.int32)
    places = places.minimum((best != NONE).sum(-1, keepdim=True, dtype=torch.int32))
    ahead = torch.arange(keep, device=best.device, dtype=torch.int32)
    torch.lt(ahead, places[..., None], out=kept[..., :keep])
