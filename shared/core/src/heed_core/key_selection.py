"""Which keys the queries of `attention.dynamic_mask` keep, by the scores of the keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def keep_most(
    scores: Float[Tensor, "b g m"], allowed: Bool[Tensor, "*#mask"], keep: int
) -> Bool[Tensor, "b g n m"]:
    """The `keep` keys with the largest scores among those allowed, all if they are fewer.

    Args:
        scores: One per key.
        allowed: True = may attend, broadcastable to (b, g, n, m), with n rows.
        keep: Keys that a query keeps; of equal ones, the latest.

    Raises:
        ValueError: `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    rows = scores.detach()[:, :, None]
    masked = rows.masked_fill(~allowed, -torch.inf)
    order = masked.flip(-1).argsort(dim=-1, descending=True, stable=True)
    first = (torch.arange(masked.shape[-1], device=scores.device) < keep).expand(masked.shape)
    kept = torch.zeros_like(masked, dtype=torch.bool)
    return kept.scatter(-1, masked.shape[-1] - 1 - order, first) & allowed


def latest_largest(scores: Float[Tensor, "*batch m"], keep: int) -> Int[Tensor, "*batch k"]:
    """Places of the `keep` largest scores, in order; of equal ones, the latest.

    Float32 scores and their places make whole numbers no two of which are equal, so that none but
    the kept ones need to be sorted: time m for one query of a long cache, five times faster than
    sorting all on the CPU.

    Args:
        scores: Not NaN.
        keep: At most m.
    """
    length = scores.shape[-1]
    if scores.dtype == torch.float64:
        order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :keep]
        return (length - 1 - order).sort(-1).values
    bits = (scores.float() + 0.0).view(torch.int32)  # without a zero below zero
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    place = torch.arange(length, device=scores.device)
    return ((ordered << 32) + place).topk(keep, dim=-1, sorted=False).indices.sort(-1).values


def keep_positive(
    scores: Float[Tensor, "b g m"], allowed: Bool[Tensor, "*#mask"]
) -> Bool[Tensor, "b g n m"]:
    """The keys with a score above 0 among those allowed: the published kernels' other mask, "relu".

    For scores of one's own: A softplus(u) has the sign of A for all keys of a head, exp(...) is
    positive.

    Args:
        scores: One per key.
        allowed: True = may attend, broadcastable to (b, g, n, m), with n rows.
    """
    return (scores.detach()[:, :, None] > 0) & allowed


def keep_blocks(
    kept: Bool[Tensor, "*batch m"], size: int, seen: Int[Tensor, "*#batch"] | None = None
) -> Bool[Tensor, "*batch m"]:
    """Whole blocks of keys, of which more than half were kept.

    Args:
        kept: Single keys.
        size: Keys of a block; the last one may be shorter.
        seen: How many keys a row can see, counted from the first: its last block has those alone.
            Without, as in the published kernels, a causal row that sees less than half of its
            last block drops it, and decoding, where later keys are not there yet, keeps it.

    Raises:
        ValueError: A size below 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    keys = kept.shape[-1]
    padded = F.pad(kept, (0, -keys % size)).reshape(*kept.shape[:-1], -1, size)
    first = torch.arange(0, keys, size, device=kept.device)
    length = ((keys if seen is None else seen[..., None]) - first).clamp(min=0, max=size)
    most = padded.sum(-1) * 2 > length
    return most[..., None].expand(padded.shape).flatten(-2)[..., :keys]
