"""The keys with the largest scores among those so far, for every query of a causal attention.

Query i may keep the `keep` largest scores of keys 0 ... i + m - n; of equal ones the latest. From
one query to the next one key comes and at most one goes, so that a block of queries keeps no other
keys than the `keep` of its start and those that come within the block: these are its candidates.

Selecting has no gradient. An operator of its own keeps the loop over blocks out of compiled and
exported graphs. Time n (keep + block), memory n (keep + block) booleans and n / block (keep +
block) indices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    scores = scores.detach().masked_fill(~real[:, None], -torch.inf)
    place = torch.arange(keys, device=scores.device).expand(batch, groups, keys)
    start, missing = keys - queries, blocks * block - queries
    best, where = _largest(scores[..., :start].flip(-1), place[..., :start].flip(-1), keep)
    came = F.pad(scores[..., start:], (0, missing), value=-torch.inf)
    came_at = F.pad(place[..., start:], (0, missing))
    new, new_at = (x.reshape(batch, groups, blocks, block) for x in (came, came_at))
    latest, latest_at = new.flip(-1), new_at.flip(-1)
    before = best.new_empty(batch, groups, blocks, keep)  # what was best at the start of a block
    index = new_at.new_empty(batch, groups, blocks, keep + block)
    index[..., keep:] = new_at
    for at in range(blocks):
        before[:, :, at], index[:, :, at, :keep] = best, where
        best, where = _largest(
            torch.cat([latest[:, :, at], best], dim=-1),
            torch.cat([latest_at[:, :, at], where], dim=-1),
            keep,
        )
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


def _largest(scores: Tensor, place: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` largest, sorted, filled up with -inf; of equal ones those that come first."""
    if scores.shape[-1] < keep:
        missing = keep - scores.shape[-1]
        scores = F.pad(scores, (0, missing), value=-torch.inf)
        place = F.pad(place, (0, missing))
    found, order = scores.sort(dim=-1, descending=True, stable=True)
    return found[..., :keep].contiguous(), place.gather(-1, order[..., :keep])


def _keep(best: Tensor, new: Tensor, kept: Tensor) -> None:
    """Fill (b, g, blocks, block, keep + block): of the sorted best and what came, one by one.

    A new key is kept while those before it in the order, old ones and those that came so far, are
    fewer than `keep`; each that is kept takes the place of the last old one.
    """
    keep, block = best.shape[-1], new.shape[-1]
    order = torch.arange(block, device=best.device)
    larger = torch.searchsorted(-best, (-new).contiguous())  # equal ones are older than new ones
    stays = (keep - larger).int().masked_fill_(new == -torch.inf, 0)
    comes, mine = new[..., :, None], new[..., None, :]
    beats = (comes > mine) | ((comes == mine) & (order[:, None] > order))
    stays_new = beats.cumsum(-2, dtype=torch.int32) < stays[..., None, :]
    kept[..., keep:] = stays_new & (order[:, None] >= order)
    places = keep - kept[..., keep:].sum(-1, dtype=torch.int32)
    places = places.minimum((best > -torch.inf).sum(-1, keepdim=True, dtype=torch.int32))
    ahead = torch.arange(keep, device=best.device, dtype=torch.int32)
    torch.lt(ahead, places[..., None], out=kept[..., :keep])
