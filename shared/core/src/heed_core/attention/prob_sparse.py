"""ProbSparse attention: only the queries whose weights are far from uniform attend.

    M_i = max over sampled keys of q_i . k_j - (sum over sampled keys of q_i . k_j) / m
    o_i = softmax over j of (scale * q_i . k_j) v_j   for the u queries with the largest M_i
    o_i = mean of v                                   for the others

u = min(factor ceil(ln n), n) queries; min(factor ceil(ln m), m) keys are sampled for each query,
the same for all heads. Zhou et al., "Informer" (arXiv 2012.07436), without its causal form, which
puts running sums of values for means. n and m count real tokens; padding is neither sampled nor
chosen nor averaged. Samples are numbers of a counter hashed with a seed: in evaluation the seed is
a buffer, so that outputs are the same each time; in training a new one is drawn.

Cost per head for n tokens: time factor n d ln n, memory n d + factor n ln n. In graphs, whose
length may change, 24 stands for ln n, and one that is not compiled (exported, run as it is) holds
the 24 factor n d numbers of the sampled keys. Observed and steered, the whole map is made (a lazy
query is one whose scores are all 0): time n^2 d.

The site is `attend`: weights (b, h, n, n). Selecting has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed_core import masks
from heed_core.attention.projected import ProjectedAttention, check_positive
from heed_core.impl import Impl
from heed_core.precision import at_least_float32
from heed_core.recurrence import check_recurrence
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_some

MOST_SAMPLED = 1 << 20
"""Numbers of sampled keys that are gathered at a time."""

SHORT = 32
"""Up to so many tokens the whole map costs no more."""

POWERS_OF_E = tuple(math.floor(math.e**k) for k in range(24))
"""Up to 10^10, which no length reaches."""


def sample_keys(
    seed: Int[Tensor, ""],
    length: int,
    factor: int,
    *,
    padding_mask: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b n u"]:
    """Keys drawn with replacement for each query, by hashing (seed, query, draw).

    Args:
        seed: Any integer.
        length: Tokens, padding included.
        factor: Of the number of draws.
        padding_mask: True = real token.

    Returns:
        Places of real tokens; -1 where a sample, of fewer tokens, has fewer draws. One row where
        there is no padding mask.
    """
    device = seed.device
    graph = torch.compiler.is_compiling()  # whose length may change: too many draws, not all used
    count = factor * len(POWERS_OF_E) if graph else _several(factor, length)
    draw = torch.arange(count, device=device)
    counter = torch.arange(length, device=device)[:, None] * 0x9E3779B1
    number = _hashed(counter + draw * 0x85EBCA77 + seed * 0xC2B2AE3D)  # (n, u)
    if padding_mask is None and not graph:
        return torch.div(number * length, 1 << 32, rounding_mode="floor")[None]
    if padding_mask is None:
        padding_mask = torch.ones(1, length, dtype=torch.bool, device=device)
    real = padding_mask.sum(-1)
    rank = torch.div(number * real[:, None, None], 1 << 32, rounding_mode="floor")
    first = padding_mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    place = first.gather(1, rank.flatten(1)).view_as(rank)
    return place.masked_fill(draw >= _several_of(factor, real)[:, None, None], -1)


def _hashed(x: Tensor) -> Tensor:
    """32 well mixed bits of each integer (the finaliser of MurmurHash3), as int64."""
    low = (1 << 32) - 1
    x = x & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = x ^ (x >> shift)
        # In halves: a product of two 32-bit numbers does not fit.
        x = ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & low
    return x ^ (x >> 16)


def _several(factor: int, length: int) -> int:
    """min(factor ceil(ln n), n), and 1 for n = 1."""
    return min(max(1, factor * sum(length > power for power in POWERS_OF_E)), length)


def _several_of(factor: int, length: Tensor) -> Tensor:
    """The same for each sample; 0 of 0."""
    powers = torch.tensor(POWERS_OF_E, device=length.device)
    several = (factor * (length[:, None] > powers).sum(-1)).clamp(min=1)
    return torch.minimum(several, length)


def prob_sparse_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    sampled: Int[Tensor, "#b n u"],
    *,
    factor: int,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    site: Attend | None = None,
) -> Float[Tensor, "b h n e"]:
    """ProbSparse attention.

    Args:
        query: One row per token.
        key: One row per token.
        value: What is averaged.
        sampled: Places of the keys that each query is measured by; -1 for none.
        factor: Of the number of queries that attend.
        padding_mask: True = real token.
        site: Where chosen queries attend; a plain one if not given.
    """
    check_recurrence(query, key, value, same_length=True)
    check_positive(factor=factor)
    batch, n = query.shape[0], query.shape[2]
    if sampled.dim() != 3 or sampled.shape[0] not in (1, batch) or sampled.shape[1] != n:
        raise ValueError(
            f"sampled must be (batch {batch} or 1, tokens {n}, draws), got {tuple(sampled.shape)}"
        )
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    site = Attend() if site is None else site
    graph = torch.compiler.is_compiling()
    spread = _spread(query.detach(), key.detach(), sampled, padding_mask)
    if graph:
        most = torch.sym_min(factor * len(POWERS_OF_E), n)  # type: ignore[no-untyped-call]
        first = torch.arange(most, device=query.device)
        index = spread.argsort(dim=-1, descending=True)[..., first]
    else:
        index = spread.topk(_several(factor, n), dim=-1).indices  # (b, h, u)
    chosen = torch.ones_like(index, dtype=torch.bool)
    if padding_mask is not None or graph:
        every = torch.ones(1, n, dtype=torch.bool, device=query.device)
        length = (every if padding_mask is None else padding_mask).sum(-1)
        rank = torch.arange(index.shape[2], device=query.device)
        fits = rank < _several_of(factor, length)[:, None]
        chosen = chosen & fits[:, None]
    real = None if padding_mask is None else masks.keys(padding_mask)
    short = not graph and n <= SHORT
    if short or site.attachments is not None:
        asking = torch.zeros_like(spread, dtype=torch.bool).scatter(-1, index, chosen)
        whole: Tensor = site(query * asking[..., None], key, value, mask=real, causal=False)
        return whole
    rows = index[..., None].expand(-1, -1, -1, query.shape[3])
    mixed = site(query.gather(2, rows), key, value, mask=real, causal=False)
    lazy = _mean(value, padding_mask)
    mixed = torch.where(chosen[..., None], mixed, lazy)
    rows = index[..., None].expand(-1, -1, -1, value.shape[3])
    return lazy.expand(-1, -1, n, -1).scatter(2, rows, mixed)


def _spread(query: Tensor, key: Tensor, sampled: Tensor, padding_mask: Tensor | None) -> Tensor:
    """M of every query, (b, h, n), -inf for padding."""
    n = query.shape[2]
    there = sampled >= 0
    products = _sampled_products(query, key, sampled.clamp(min=0))  # (b, n, h, u)
    absent = ~there[:, :, None]
    most = products.masked_fill(absent, -torch.inf).amax(-1)
    total = products.masked_fill(absent, 0.0).sum(-1)
    if padding_mask is None:
        return (most - total / n).transpose(1, 2)
    real = padding_mask.sum(-1).clamp(min=1)[:, None, None]
    return (most - total / real).masked_fill(~padding_mask[..., None], -torch.inf).transpose(1, 2)


def _sampled_products(query: Tensor, key: Tensor, sampled: Tensor) -> Tensor:
    """q_i . k_j of the sampled keys, (b, n, h, u), in float32 at least."""
    batch, heads, n, width = query.shape
    asking, asked = (at_least_float32(x).transpose(1, 2) for x in (query, key))
    if torch.compiler.is_compiling():  # the number of pieces would depend on the length
        sample = torch.arange(batch, device=query.device)[:, None, None]
        products: Tensor = (asked[sample, sampled] * asking[:, :, None]).sum(-1)  # (b, n, u, h)
        return products.transpose(2, 3)
    first = n * torch.arange(batch, device=query.device)[:, None, None]
    place = (sampled + first).transpose(0, 1)  # (n, b, u)
    flat = asked.reshape(batch * n, heads * width)
    piece = max(1, MOST_SAMPLED // max(1, batch * sampled.shape[2] * heads * width))
    parts = [query.new_zeros(0, batch, heads, sampled.shape[2], dtype=asking.dtype)]
    for start in range(0, n, piece):
        some = place[start : start + piece]
        rows = flat.index_select(0, some.flatten()).view(*some.shape, heads, width)
        asks = asking[:, start : start + piece].transpose(0, 1)[..., None]  # (piece, b, h, d, 1)
        parts.append((rows.transpose(2, 3) @ asks).squeeze(-1))
    return torch.cat(parts).transpose(0, 1)


def _mean(value: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The mean of the real rows, (b, h, 1, e)."""
    if padding_mask is None:
        return value.mean(2, keepdim=True)
    share = padding_mask.to(value.dtype) / padding_mask.sum(-1, keepdim=True).clamp(min=1)
    value = value.masked_fill(~padding_mask[:, None, :, None], 0.0)
    return share[:, None, None] @ value


class ProbSparseAttention(ProjectedAttention):
    """ProbSparse attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        factor: Of the numbers of queries that attend and of sampled keys.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Not served: a number raises `UnsupportedPattern`.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Not served: True raises `UnsupportedPattern`.
        dropout: Probability of dropping a weight in training.
        seed: Of the keys that are sampled in evaluation. It is saved with the weights, and kept
            where weights of others, which have none, are loaded.
        impl: Back-end of the site.

    Example:
        >>> attention = ProbSparseAttention(32, heads=4, factor=1)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})
    seed: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        factor: int = 5,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            context_dim=context_dim,
            causal=causal,
        )
        check_positive(factor=factor)
        self.factor = factor
        self.first_seed = seed
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self.attend = Attend(dropout=dropout, impl=impl)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **options: Any
    ) -> None:
        device = self.seed.device
        if device.type == "meta":  # then weights may be assigned
            device = next((x.device for x in state_dict.values()), device)
        own = torch.tensor(self.first_seed, dtype=torch.int64, device=device)
        state = {f"{prefix}seed": own} | state_dict
        super()._load_from_state_dict(state, prefix, *args, **options)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        sampled: Int[Tensor, "#b n u"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            padding_mask: True = real token.
            sampled: Keys that queries are measured by, instead of those that are drawn.
        """
        self.check_call(x, None, padding_mask)
        check_some(x=x)
        query, key, value = self.project(x, None)
        if sampled is None:
            seed = self.seed
            if self.training:
                seed = torch.randint(1 << 31, (), device=x.device)
            sampled = sample_keys(seed, x.shape[1], self.factor, padding_mask=padding_mask)
        mixed = prob_sparse_attention(
            query,
            key,
            value,
            sampled,
            factor=self.factor,
            padding_mask=padding_mask,
            site=self.attend,
        )
        return self.join(mixed, x)


def prob_sparse_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's (and Informer's) ProbSparse attention.

    Raises:
        ValueError: A name that it does not have.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, kind = name.rpartition("_projection.")
        if part not in ("query", "key", "value", "out") or kind not in ("weight", "bias"):
            raise ValueError(f"{name!r} is no weight of CAB's ProbSparse attention")
        result[f"{part}.{kind}"] = tensor
    return result
