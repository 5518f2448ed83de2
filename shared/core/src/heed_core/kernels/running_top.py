"""The keys with the largest scores among those so far, for every query of a causal attention.

Query i may keep the `keep` largest scores of keys 0 ... i + m - n; of equal ones the latest. From
one query to the next one key comes and at most one goes, so that a block of queries keeps no other
keys than the `keep` of its start and those that come within the block: these are its candidates.

Selecting has no gradient. An operator of its own keeps the loop over blocks out of compiled and
exported graphs. Time n (keep + block), memory n (keep + block) bits and n / block (keep + block)
indices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    order = torch.arange(block, device=scores.device)
    candidates, kept = [], []
    for first in range(0, blocks * block, block):
        new, new_at = came[..., first : first + block], came_at[..., first : first + block]
        candidates.append(torch.cat([where, new_at], dim=-1))
        kept.append(_kept(best, new, order, keep))
        best, where = _largest(
            torch.cat([new.flip(-1), best], dim=-1), torch.cat([new_at.flip(-1), where], -1), keep
        )
    if not kept:
        width = keep + block
        return (
            place.new_zeros(batch, groups, 0, width),
            real.new_zeros(batch, groups, 0, block, width),
        )
    return torch.stack(candidates, dim=2), torch.stack(kept, dim=2)


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


def _kept(best: Tensor, new: Tensor, order: Tensor, keep: int) -> Tensor:
    """(b, g, block, keep + block): a key stays until `keep` others come before it."""
    ahead = torch.arange(keep, device=best.device).expand(best.shape)
    larger = torch.searchsorted(-best, (-new).contiguous())  # equal ones are older than new ones
    stays = keep - torch.cat([ahead, larger], dim=-1).int()
    empty = torch.cat([best, new], dim=-1) == -torch.inf
    stays.masked_fill_(empty, 0)
    comes, mine = new[..., :, None], new[..., None, :]
    later = order[:, None] > order
    beats_new = (comes > mine) | ((comes == mine) & later)
    beats = torch.cat([comes >= best[..., None, :], beats_new], dim=-1)
    kept = beats.cumsum(-2, dtype=torch.int32) < stays[..., None, :]
    kept[..., keep:] &= order[:, None] >= order
    return kept
