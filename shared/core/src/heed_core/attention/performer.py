"""Performer: softmax attention approximated by positive random features.

    phi(x)_r = m^-1/2 (exp(w_r . x' - |x'|^2 / 2 - top) + 1e-4),   x' = x d^-1/4,   w_r ~ N(0, I)
    o_i = phi(q_i)^T (sum_j phi(k_j) v_j^T) / max(phi(q_i) . sum_j phi(k_j), 1e-6)

`top` keeps exponentials in range: the largest w_r . x' of a query, and of all keys that are seen.
Without the 1e-4 nothing would depend on it. Choromanski et al., "Rethinking attention with
performers" (arXiv 2009.14794). Features are drawn anew in each training pass; in evaluation they
are those of the buffer `projection`, whose rows are orthogonal. Causal, sums are over the tokens so
far and so is `top`, so that nothing depends on what comes later.

Cost per head for n queries, m keys and r features: time (n + m) r d, memory (n + m) (r + d). Causal
in chunks of 64 tokens: time n (r d + 64 (r + d)).

There is no softmax. Observed, the site `probe` states the effective weights (b, h, n, m), which sum
to one. It cannot be steered. An output depends on its own query alone, so that the cross form
serves queries that are made one after the other, too. (Published results of arXiv 2210.07661 have
0.1 for the 1e-6: `least_normaliser`.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attention.linear import linear_attention
from heed_core.attention.projected import (
    ProjectedAttention,
    check_positive,
    rename_projections,
)
from heed_core.cache import StateCache, restores_cache
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import check_recurrence
from heed_core.sites import Probe
from heed_core.tokens import Pattern, check_padding, check_some

EPS = 1e-4
"""Added to every exponential."""

NOTHING_YET = -1e30
"""The largest exponent of no key: finite, so that differences of two are numbers."""


def orthogonal_features(
    heads: int, features: int, dim: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "h r d"]:
    """Random rows, orthogonal in groups of `dim`, as long as rows of independent normal numbers."""
    blocks = []
    for _ in range((features + dim - 1) // dim):
        square, _ = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))
        blocks.append(square.mT)
    lengths: Tensor = torch.linalg.vector_norm(
        torch.randn(heads, features, dim, generator=generator), dim=-1, keepdim=True
    )
    return torch.cat(blocks, dim=1)[:, :features] * lengths


def performer_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    projection: Float[Tensor, "h r d"],
    *,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    least_normaliser: float = 1e-6,
) -> Float[Tensor, "b h n e"]:
    """Attention by random features to all keys.

    Args:
        query: One row per token that asks.
        key: One row per token that is attended to.
        value: What is averaged.
        projection: w, for each head.
        padding_mask: True = real token.
        least_normaliser: The least that sums are divided by.
    """
    _check(query, key, value, projection, padding_mask)
    dtype = query.dtype
    with without_autocast(query):
        asked, written = _features(query, key, projection, padding_mask)
        read = asked @ (written.mT @ F.pad(at_least_float32(value), (0, 1), value=1.0))
        return (read[..., :-1] / read[..., -1:].clamp(min=least_normaliser)).to(dtype)


def performer_weights(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    projection: Float[Tensor, "h r d"],
    *,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    causal: bool = False,
    least_normaliser: float = 1e-6,
) -> Float[Tensor, "b h n m"]:
    """The N x M map with which values are mixed."""
    if not causal:
        asked, written = _features(query, key, projection, padding_mask)
        weights = asked @ written.mT
    else:
        asked = _asked(query, projection)
        exponents = _exponents(key, projection, padding_mask)
        top = _running_top(key, projection, padding_mask, None)
        away = exponents.unsqueeze(2) - top[..., None, None]  # (b, h, n, m, r)
        parts = away.exp() + _there(padding_mask, EPS, away[:, :, :1])
        weights = (
            torch.einsum("bhir,bhijr->bhij", asked, parts).tril() * projection.shape[1] ** -0.5
        )
    return weights / weights.sum(-1, keepdim=True).clamp(min=least_normaliser)


def causal_performer_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    projection: Float[Tensor, "h r d"],
    *,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    state: Mapping[str, Tensor] | StateCache | None = None,
    least_normaliser: float = 1e-6,
) -> tuple[Float[Tensor, "b h n e"], dict[str, Tensor]]:
    """Attention by random features to the keys so far.

    Args:
        query: One row per token that asks.
        key: One row per token that is attended to.
        value: What is averaged.
        projection: w, for each head.
        padding_mask: True = real token.
        state: What earlier tokens have left: "sums" (b, h, r, e + 1), "values" (b, h, 1, e + 1),
            "top" (b, h).
        least_normaliser: The least that sums are divided by.

    Returns:
        Output, in the type of `query`, and the state after the last token.
    """
    _check(query, key, value, projection, padding_mask)
    check_recurrence(query, key, value, same_length=True)
    dtype = query.dtype
    with without_autocast(query):
        value = F.pad(at_least_float32(value), (0, 1), value=1.0)
        if padding_mask is not None:
            value = value.masked_fill(~padding_mask[:, None, :, None], 0.0)
        asked = _asked(query, projection)
        exponents = _exponents(key, projection, padding_mask)
        top = _running_top(key, projection, padding_mask, None if state is None else state["top"])
        first = top.new_full(top[..., :1].shape, NOTHING_YET)
        before = first if state is None else state["top"][..., None]
        before = torch.cat([before, top], dim=-1)[..., :-1]
        # Where nothing was written there is nothing to decay.
        decay = (before - top).masked_fill(before < NOTHING_YET / 2, 0.0)
        read, sums = linear_attention(
            asked,
            (exponents - top[..., None]).exp() * projection.shape[1] ** -0.5,
            value,
            log_decay=decay,
            state=None if state is None else state["sums"],
            causal=True,
            scale=1.0,
        )
        values = value.cumsum(2)
        if state is not None:
            values = values + state["values"]
        plain = asked.sum(-1, keepdim=True) * (EPS * projection.shape[1] ** -0.5)
        read = read + plain * values
        output = read[..., :-1] / read[..., -1:].clamp(min=least_normaliser)
    return output.to(dtype), {"sums": sums, "values": values[:, :, -1:], "top": top[..., -1]}


def _scaled(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """W . x' and |x'|^2 / 2, in float32 at least."""
    x = at_least_float32(x) * x.shape[-1] ** -0.25
    return x @ at_least_float32(projection).mT.to(x.dtype), x.square().sum(-1, keepdim=True) / 2


def _asked(query: Tensor, projection: Tensor) -> Tensor:
    products, half = _scaled(query, projection)
    top = products.amax(-1, keepdim=True)
    return ((products - half - top).exp() + EPS) / math.sqrt(projection.shape[1])


def _exponents(key: Tensor, projection: Tensor, padding_mask: Tensor | None) -> Tensor:
    products, half = _scaled(key, projection)
    return _masked(products - half, padding_mask)


def _masked(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    return x if padding_mask is None else x.masked_fill(~padding_mask[:, None, :, None], -torch.inf)


def _there(padding_mask: Tensor | None, number: float, like: Tensor) -> Tensor:
    """The number for real keys, 0 for others, (b, 1, 1, m, 1)."""
    if padding_mask is None:
        return like.new_full((1, 1, 1, 1, 1), number)
    return padding_mask[:, None, None, :, None].to(like.dtype) * number


def _features(
    query: Tensor, key: Tensor, projection: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    products, half = _scaled(key, projection)
    top = _masked(products, padding_mask).amax((2, 3), keepdim=True).clamp(min=NOTHING_YET)
    exponents = _masked(products - half - top, padding_mask)  # before exp: it could overflow
    written = (exponents.exp() + EPS) * projection.shape[1] ** -0.5
    if padding_mask is not None:
        written = written.masked_fill(~padding_mask[:, None, :, None], 0.0)
    return _asked(query, projection), written


def _running_top(
    key: Tensor, projection: Tensor, padding_mask: Tensor | None, start: Tensor | None
) -> Tensor:
    """The largest w . k' of the keys so far, (b, h, n)."""
    products, _ = _scaled(key, projection)
    top = _masked(products, padding_mask).amax(-1).cummax(-1).values.clamp(min=NOTHING_YET)
    return top if start is None else torch.maximum(top, start[..., None])


def _check(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, padding_mask: Tensor | None
) -> None:
    check_recurrence(query, key, value, same_length=False)
    if projection.dim() != 3 or projection.shape[::2] != (query.shape[1], query.shape[3]):
        raise ValueError(
            f"projection must be (heads {query.shape[1]}, features, channels {query.shape[3]}), "
            f"got {tuple(projection.shape)}"
        )
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])


class PerformerAttention(ProjectedAttention):
    """Attention by random features, with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        features: Random features of a head.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: A token sees tokens up to itself.
        least_normaliser: The least that sums are divided by.
        redraw: Whether each training pass draws features anew, from torch's generator.

    Example:
        >>> attention = PerformerAttention(32, heads=4, features=6)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(
        {"self", "causal self", "cross", "causal cross"}
    )
    projection: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        features: int = 16,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        least_normaliser: float = 1e-6,
        redraw: bool = True,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            context_dim=context_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            causal=causal,
        )
        check_positive(features=features)
        if not least_normaliser > 0:
            raise ValueError(f"least_normaliser must be above 0, got {least_normaliser}")
        self.features, self.least_normaliser, self.redraw = features, least_normaliser, redraw
        self.register_buffer("projection", orthogonal_features(heads, features, self.head_dim))
        self.probe = Probe()

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: StateCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            padding_mask: True = real token, for the tokens that are attended to (now).
            cache: From `new_cache`, for decoding; `causal` only.
        """
        self.check_call(x, context, padding_mask, cached=cache is not None)
        check_some(x=x, context=context)
        query, key, value = self.project(x, context)
        fresh = self.training and self.redraw
        projection = torch.randn_like(self.projection) if fresh else self.projection
        least = self.least_normaliser
        if self.causal:
            mixed, state = causal_performer_attention(
                query,
                key,
                value,
                projection,
                padding_mask=padding_mask,
                state=cache,
                least_normaliser=least,
            )
            if cache is not None:
                cache.update(state, tokens=x.shape[1])
        else:
            mixed = performer_attention(
                query, key, value, projection, padding_mask=padding_mask, least_normaliser=least
            )
        self.probe(
            lambda: performer_weights(
                query,
                key,
                projection,
                padding_mask=padding_mask,
                causal=self.causal,
                least_normaliser=least,
            )
        )
        return self.join(mixed, x)

    def new_cache(self, batch: int) -> StateCache:
        """An empty cache for decoding: sums of fixed size, however many tokens come."""
        dtype = torch.promote_types(type_and_place(self.key)[0], torch.float32)
        zeros = self.projection.new_zeros(batch, self.heads, 1, self.head_dim + 1, dtype=dtype)
        return StateCache(
            {
                "sums": zeros.repeat(1, 1, self.features, 1),
                "values": zeros,
                "top": torch.full_like(zeros[:, :, 0, 0], NOTHING_YET),
            }
        )

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"{super().extra_repr()}, features={self.features}"


def performer_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's Performer, `eval_proj` among them.

    Raises:
        ValueError: A name that it does not have.
    """
    return rename_projections(state, {"eval_proj": "projection"}, "CAB's Performer")
