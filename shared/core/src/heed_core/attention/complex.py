"""Complex multi-head attention: channels are complex numbers, whose phases the heads adapt.

    q_c = rho e^(i phi), and so k, for c = 0 ... d/2 - 1        real parts first, then imaginary
    score_ij = scale * sum_c rho_ic rho_jc cos(delta_c (phi_ic - phi_jc) + b_c + (i - j) f_c)

with delta and b learned per head and channel, f_c = base^(-2c/d) and scale = 1. Shao et al.,
"ComplexFormer" (arXiv 2505.10222; withdrawn by its authors, so take it as an experiment).

The cosine of a difference is a product: with q~ = rho e^(i (delta phi + b + i f)) and k~ = rho
e^(i (delta phi + j f)) the score is the plain dot product of q~ and k~ as real vectors. So this is
softmax attention after a transform of queries and of keys, of n d operations, and rotary
attention where delta = 1 and b = 0. For delta that is no integer it jumps where a phase passes pi.

Cost per head for n queries and m keys: time n m d, memory n d with fused kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.cache import KVCache, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import check_recurrence
from heed_core.relative import RotaryPositions
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_pattern, check_shape, check_tokens, with_padding

logger = logging.getLogger(__name__)

EPS = 1e-9
"""Added to squared magnitudes."""

WIDE = 64
"""Channels of a head from which a scale of 1 is worth a warning."""


def polar(
    x: Float[Tensor, "*batch d"],
) -> tuple[Float[Tensor, "*batch pairs"], Float[Tensor, "*batch pairs"]]:
    """Magnitude and phase of complex channels, real parts first.

    The magnitude is sqrt(re^2 + im^2 + 1e-9), the phase in (-pi, pi], 0 and without gradient at 0.
    """
    real, imaginary = x.chunk(2, dim=-1)
    magnitude = (real.square() + imaginary.square() + EPS).sqrt()
    nothing = (real == 0) & (imaginary == 0)
    phase = torch.atan2(imaginary.masked_fill(nothing, 0.0), real.masked_fill(nothing, 1.0))
    return magnitude, phase


def adapt_phase(
    x: Float[Tensor, "b h n d"],
    delta: Float[Tensor, "h pairs"],
    bias: Float[Tensor, "h pairs"] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Multiply phases by delta and add the bias; magnitudes stay.

    Computed in float32 at least; the result has the type of `x`.

    Raises:
        ValueError: An odd number of channels, or a `delta` or bias that does not fit them.
    """
    heads, width = x.shape[1], x.shape[3]
    if width % 2 or tuple(delta.shape) != (heads, width // 2):
        raise ValueError(
            f"x must have an even number of channels and delta be (heads, channels / 2), got "
            f"{tuple(x.shape)} and {tuple(delta.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, tuple(delta.shape), "heads, pairs")
    with without_autocast(x):
        magnitude, phase = polar(at_least_float32(x))
        angle = at_least_float32(delta)[:, None] * phase
        if bias is not None:
            angle = angle + at_least_float32(bias)[:, None]
        adapted = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1)
    return adapted.to(x.dtype)


@restores_cache
def complex_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    delta: Float[Tensor, "h pairs"],
    bias: Float[Tensor, "h pairs"] | None = None,
    *,
    rotary: RotaryPositions | None = None,
    positions: Real[Tensor, "*n"] | None = None,
    causal: bool = False,
    mask: Bool[Tensor, "*#mask"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    cache: KVCache | None = None,
    site: Attend | None = None,
) -> Float[Tensor, "b h n e"]:
    """Softmax attention of queries and keys whose phases are adapted.

    Args:
        query: One row per token that asks.
        key: One row per token that may be attended to; with a cache of those after it.
        value: What is averaged.
        delta: Factor of the phases.
        bias: Of the phases of queries.
        rotary: Adds i f to the phases; queries are the last n of the tokens of keys.
        positions: Of both queries and keys, which are as many; default 0, 1, ... after those in
            the cache.
        causal: A query sees keys at or before its own place, aligned bottom-right.
        mask: True = may attend, broadcastable to (b, h, n, m).
        padding_mask: True = real token, with a cache also for those in it.
        cache: For decoding: transformed keys, and values, of tokens before these, which are added.
        site: Where attention is computed, and may be watched; a plain one with scale 1 if not
            given.

    Raises:
        ValueError: Shapes that do not fit, positions without `rotary`, a cache that is not causal.
        TypeError: A mask that is not boolean.
    """
    site = Attend(scale=1.0) if site is None else site
    check_recurrence(query, key, value, same_length=False)
    if cache is not None and not causal:
        raise ValueError("cache serves causal=True only")
    later = key.shape[2] - query.shape[2]
    if positions is not None and (rotary is None or later):
        raise ValueError(
            "positions have no effect without rotary, and need as many queries as keys"
        )
    query, key = adapt_phase(query, delta, bias), adapt_phase(key, delta)
    if rotary is not None:
        offset = 0 if cache is None or positions is not None else cache.length
        query = rotary(query, positions=positions, offset=offset + later)
        key = rotary(key, positions=positions, offset=offset)
    if cache is not None:
        key, value = cache.append(key, value)
    mask = with_padding(mask, padding_mask, key, heads=query.shape[1], queries=query.shape[2])
    mixed: Tensor = site(query, key, value, mask=mask, causal=causal)
    return mixed


class ComplexAttention(nn.Module):
    """Complex attention of tokens to themselves or to a context.

    The site is `attend`: weights (b, h, n, m). A cache keeps transformed keys. The four matrices
    begin uniform in +-sqrt(6 / (in + out)) (Xavier), as published.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head, even; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        causal: A query sees keys at or before its own place, aligned bottom-right.
        scale: Of the products. The published 1 makes sharp weights in wide heads, where
            head_dim ** -0.5 is usual; a warning is logged from 64 channels.
        base: Of the frequencies; None = no positions, as a context needs.
        impl: Back-end of `attend`.

    Example:
        >>> ComplexAttention(32, heads=4, causal=True)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(
        {"self", "causal self", "cross", "causal cross"}
    )

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        scale: float = 1.0,
        base: float | None = 10000.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim % 2:
            raise ValueError(
                f"head_dim must be even, pairs of channels are numbers, got {head_dim}"
            )
        check_pattern(self, causal=causal, context=context_dim is not None)
        if context_dim is not None and base is not None:
            raise ValueError("a context has no order with the tokens that ask: give base=None")
        if scale == 1.0 and head_dim >= WIDE:
            logger.warning(
                "scale=1 with heads of %d channels: weights begin sharp; head_dim ** -0.5 is usual",
                head_dim,
            )
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.context_dim, self.causal = context_dim, causal
        source, width = dim if context_dim is None else context_dim, heads * head_dim
        self.query = nn.Linear(dim, width, bias=qkv_bias)
        self.key = nn.Linear(source, width, bias=qkv_bias)
        self.value = nn.Linear(source, width, bias=qkv_bias)
        self.delta = nn.Parameter(torch.randn(heads, head_dim // 2) * (head_dim // 2) ** -0.5)
        self.phase_bias = nn.Parameter(torch.zeros(heads, head_dim // 2))
        self.rotary = None if base is None else RotaryPositions(head_dim, base=base)
        self.attend = Attend(causal=causal, scale=scale, dropout=dropout, impl=impl)
        self.out = nn.Linear(width, dim, bias=out_bias)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            mask: True = may attend, broadcastable to (b, heads, n, m).
            padding_mask: True = real token, for the m tokens that are attended to; with a cache
                also those in it.
            positions: Of `x`; default 0, 1, ... after those in the cache.
            cache: Of a causal self-attention.
        """
        self._check_call(x, context, positions, cache)
        source = x if context is None else context
        mixed = complex_attention(
            self._heads(self.query(x)),
            self._heads(self.key(source)),
            self._heads(self.value(source)),
            self.delta,
            self.phase_bias,
            rotary=self.rotary,
            positions=positions,
            causal=self.causal,
            mask=mask,
            padding_mask=padding_mask,
            cache=cache,
            site=self.attend,
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for decoding.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        dtype = own if dtype is None else dtype
        return KVCache(batch, self.heads, max_len, self.head_dim, dtype=dtype, device=device)

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

    def _check_call(
        self, x: Tensor, context: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        if positions is not None and self.rotary is None:
            raise ValueError("positions have no effect: this attention was built with base=None")
        if (context is None) != (self.context_dim is None):
            raise ValueError(
                f"context must be given if and only if context_dim is, which is {self.context_dim}"
            )
        if context is not None:
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        if cache is not None and not self.causal:
            raise ValueError("cache serves causal=True only")

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}"


def complex_attention_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights; its frequencies `g` follow from `base` and are left out.

    Raises:
        ValueError: A name that the published module does not have.
    """
    names = {
        "W_q.weight": "query.weight",
        "W_k.weight": "key.weight",
        "W_v.weight": "value.weight",
        "W_o.weight": "out.weight",
        "delta_params": "delta",
        "bias_params": "phase_bias",
    }
    known = {*names, "g", "relative_pos_encoding.g"}
    if unknown := sorted(set(state) - known):
        raise ValueError(f"{unknown[0]!r} is no weight of the published complex attention")
    return {names[name]: tensor for name, tensor in state.items() if name in names}
