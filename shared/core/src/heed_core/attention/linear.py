"""Linear attention: a sum of outer products of keys and values, which queries read.

    S_t = diag(a_t) S_(t-1) + k_t v_t^T,    o_t = scale * S_t^T q_t          (causal)
    o_i = scale * (sum_j k_j v_j^T)^T q_i                                    (not causal)

With `normalise` the output is divided by scale * q_t . z_t + 1e-10, where z sums the keys as S sums
the outer products. Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236): features
elu + 1 of queries and keys, normalised, no decay a. Sun et al., "Retentive network" (arXiv
2307.08621): a = 1 - 2^(-5-h) for head h. Yang et al., "Gated linear attention" (arXiv 2312.06635):
a per channel and token. As a memory of pairs it is Hebb's rule.

Cost per head for n tokens: time n d e (recurrent and not causal), n (d e + chunk (d + e)) (chunked;
with a decay per channel the chunk's products cost n chunk d element by element), n^2 (d + e)
(parallel). Memory n (d + e) plus a state d e per chunk for the backward pass.

There is no softmax. Observed, the site `probe` states the effective weights: o = weights V holds
for a call that starts from no state; rows sum to one with `normalise` only. It cannot be steered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.cache import StateCache, restores_cache
from heed_core.constants import WithConstants
from heed_core.kernels.chunk_scan import chunk_scan
from heed_core.kernels.state_scan import state_scan
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import (
    Form,
    check_impl,
    check_recurrence,
    chunk_size,
    decayed_products,
    expand_decay,
    join,
    scan_impl,
    split,
    start_state,
    steps,
)
from heed_core.sites import Probe
from heed_core.tokens import Pattern, check_padding, check_pattern, check_tokens

EPS = 1e-10
"""Added to the normaliser."""

Decay = Literal["retention", "gated"]
"""A fixed decay per head, or one that each token sets for each channel."""

Features = Literal["elu", "identity"]
"""What queries and keys pass: elu + 1, which is positive, or nothing."""


def linear_attention(
    query: Float[Tensor, "b g n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b h m e"],
    *,
    log_decay: Float[Tensor, "*decay"] | None = None,
    state: Float[Tensor, "b h d s"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
    form: Form = "chunked",
    chunk: int | None = None,
    impl: KernelImpl = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d s"]]:
    """Linear attention of queries and keys that have passed their features.

    Args:
        query: One row per token that asks; scaled on reading only, not in the state.
        key: One row per token that is written.
        value: What is written. Its h heads are a multiple of the g heads of keys; key head i serves
            value heads i h / g ... (i + 1) h / g - 1.
        log_decay: Logarithm of what is left of the state at each token before it writes, finite and
            at most 0: (b, h, n) or, per key channel, (b, h, n, d), up to broadcasting.
        state: What earlier tokens have left, s = e, or e + 1 with `normalise`: the last column is
            the sum of the keys.
        padding_mask: True = real token; others write nothing, let nothing fade, wherever they
            stand, and read what is unspecified.
        causal: A token reads what tokens up to itself have written; n = m. Otherwise all.
        normalise: Divide by the sum of the effective weights.
        scale: Of what is read; default d ** -0.5.
        form: How the same numbers are computed.
        chunk: Tokens of a chunk; default 64, or 16 with a decay per channel.
        impl: Who computes the chunked form; "triton" never falls back, see `kernels.chunk_scan`.

    Returns:
        Output, in the type of `query`, and the state after the last token, in float32 at least.

    Raises:
        ValueError: Shapes that do not fit, or options that have no effect together.
    """
    check_recurrence(query, key, value, same_length=causal)
    if log_decay is not None and not causal:
        raise ValueError("log_decay has no effect without causal=True: nothing comes first")
    dtype = query.dtype
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(query):
        query, key, value = _prepared(query, key, value, padding_mask)
        total = _decay(log_decay, key, padding_mask)
        if normalise:
            value = F.pad(value, (0, 1), value=1.0)
        start = start_state(state, key, value)
        size = chunk_size(form, chunk, query.shape[2], by_channel=_by_channel(total))
        triton = scan_impl(impl, form if causal else "parallel", query, size)
        if not causal:
            read = query @ (last := start + key.mT @ value)
        elif form == "recurrent":
            read, last = _recurrent(query, key, value, total, start)
        else:
            read, last = _chunked(query, key, value, total, start, size, triton)
        read = read * scale
        if normalise:
            read = read[..., :-1] / (read[..., -1:] + EPS)
    return read.to(dtype), last


def linear_attention_weights(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    *,
    log_decay: Float[Tensor, "*decay"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    causal: bool = False,
    normalise: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h n m"]:
    """The N x M map with which `linear_attention` mixes the values, from no state."""
    query, key, _ = _prepared(query, key, key, padding_mask)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    total = _decay(log_decay, key, padding_mask)
    total = None if total is None else total.cumsum(2)
    weights = scale * (decayed_products(query, key, total) if causal else query @ key.mT)
    return weights / (weights.sum(-1, keepdim=True) + EPS) if normalise else weights


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 at least, as many heads of all, without what is padding."""
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
        key = key.masked_fill(~padding_mask[:, None, :, None], 0.0)
    serves = value.shape[1] // key.shape[1]
    if serves > 1:
        query, key = (x.repeat_interleave(serves, dim=1) for x in (query, key))
    return at_least_float32(query), at_least_float32(key), at_least_float32(value)


def _decay(log_decay: Tensor | None, key: Tensor, padding_mask: Tensor | None) -> Tensor | None:
    """Of every token, (b, h, n, 1 or d); 0 where it is padding, or what it holds would be felt."""
    if log_decay is None:
        return None
    total = expand_decay(at_least_float32(log_decay), key)
    if total is None or padding_mask is None:
        return total
    return total.masked_fill(~padding_mask[:, None, :, None], 0.0)


def _by_channel(log_decay: Tensor | None) -> bool:
    return log_decay is not None and log_decay.shape[-1] > 1


def _recurrent(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = [None] * query.shape[2] if log_decay is None else steps(log_decay.exp())
    rows = [value.new_zeros(*value.shape[:2], 0, value.shape[3])]
    for q, k, v, left in zip(*map(steps, (query, key, value)), decay, strict=True):
        if left is not None:
            state = left.mT * state
        state = state + k.mT * v
        rows.append(q @ state)
    return torch.cat(rows, dim=2), state


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    size: int,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    length = query.shape[2]
    query, key, value = split(query, size), split(key, size), split(value, size)
    if triton:
        return _scanned(query, key, value, log_decay, state, length)
    if log_decay is None:
        within = decayed_products(query, key, None)
        written = torch.cat([state.unsqueeze(2), key.mT @ value], dim=2)
        states = written.cumsum(2)
    else:
        total = split(log_decay, size).cumsum(-2)
        within = decayed_products(query, key, total)
        end = total[..., -1:, :]
        carry = end.exp().mT.expand(*key.shape[:3], key.shape[-1], 1)
        states = state_scan(carry, (key * (end - total).exp()).mT @ value, state)
        query = query * total.exp()
    read = within @ value + query @ states[:, :, :-1]
    return join(read, length), states[:, :, -1]


def _scanned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    length: int,
) -> tuple[Tensor, Tensor]:
    """The chunks on the Triton kernel."""
    total = None if log_decay is None else split(log_decay, query.shape[-2]).cumsum(-2)
    within, end = decayed_products(query, key, total), key.new_ones(*key.shape[:3], 1)
    if total is not None:
        last = total[..., -1:, :]
        query, key, end = query * total.exp(), key * (last - total).exp(), last.squeeze(-2).exp()
    read, states = chunk_scan(query, key, within, value, None, end, state)
    return join(read, length), states[:, :, -1]


def retention_decay(heads: int) -> Float[Tensor, " heads"]:
    """log(1 - 2^(-5-h)) for head h."""
    return torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads))))


class LinearAttention(WithConstants):
    """Linear attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: A token reads tokens up to itself.
        features: What queries and keys pass.
        normalise: Divide by the sum of the effective weights; needs features="elu", for others it
            may vanish.
        decay: What earlier tokens have left, needs `causal`: "retention", fixed per head, or
            "gated", sigmoid(W x)^(1/16) per token and channel. Nothing decays if not given.
        form: As in `linear_attention`.
        chunk: As in `linear_attention`.
        impl: As in `linear_attention`; "triton" needs `causal`.

    Example:
        >>> attention = LinearAttention(32, heads=4, causal=True)
        >>> attention(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    fixed_decay: Tensor

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
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        features: Features = "elu",
        normalise: bool = True,
        decay: Decay | None = None,
        form: Form = "chunked",
        chunk: int | None = None,
        impl: KernelImpl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim, context_dim)
        check_pattern(self, causal=causal, context=context_dim is not None)
        _check_options(features, normalise, decay, causal)
        chunk_size(form, chunk, 1, by_channel=False)
        check_impl(impl, form, causal=causal)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.context_dim, self.causal = context_dim, causal
        self.features, self.normalise, self.decay = features, normalise, decay
        self.form: Form = form
        self.chunk = chunk
        self.impl: KernelImpl = impl
        source = dim if context_dim is None else context_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(source, heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(source, heads * head_dim, bias=qkv_bias)
        self.gate = nn.Linear(dim, heads * head_dim) if decay == "gated" else None
        self.make_constants()
        self.probe = Probe()
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    def constants(self) -> Mapping[str, Tensor]:
        """The fixed decay, if there is one."""
        if self.decay != "retention":
            return {}
        return {"fixed_decay": retention_decay(self.heads)[:, None]}

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
            padding_mask: True = real token, for the tokens that are attended to.
            cache: From `new_cache`, for decoding; `causal` only.
        """
        self._check_call(x, context, padding_mask, cache)
        source = x if context is None else context
        query, key = self._mapped(self.query(x)), self._mapped(self.key(source))
        value, log_decay = self._heads(self.value(source)), self._log_decay(x)
        mixed, state = linear_attention(
            query,
            key,
            value,
            log_decay=log_decay,
            state=None if cache is None else cache["state"],
            padding_mask=padding_mask,
            causal=self.causal,
            normalise=self.normalise,
            form=self.form,
            chunk=self.chunk,
            impl=self.impl,
        )
        if cache is not None:
            cache.update({"state": state}, tokens=x.shape[1])
        self.probe(
            lambda: linear_attention_weights(
                query,
                key,
                log_decay=log_decay,
                padding_mask=padding_mask,
                causal=self.causal,
                normalise=self.normalise,
            )
        )
        return cast(Tensor, self.out(mixed.to(x.dtype).transpose(1, 2).flatten(2)))

    def new_cache(self, batch: int) -> StateCache:
        """An empty cache for decoding: one state, however many tokens come."""
        own, device = type_and_place(self.key)
        width = self.head_dim + (1 if self.normalise else 0)
        state = torch.zeros(
            batch,
            self.heads,
            self.head_dim,
            width,
            dtype=torch.promote_types(own, torch.float32),
            device=device,
        )
        return StateCache({"state": state})

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

    def _mapped(self, tokens: Tensor) -> Tensor:
        heads = at_least_float32(self._heads(tokens))
        if self.features == "identity":
            return heads
        return F.relu(heads) + heads.clamp(max=0.0).exp()  # elu + 1

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.gate is not None:
            # dense: torch compiles it wrongly where its gradient lies in another order
            gate = at_least_float32(self._heads(self.gate(x))).contiguous()
            return F.logsigmoid(gate) / 16.0
        return self.fixed_decay[None] if self.decay == "retention" else None

    def _check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        padding_mask: Tensor | None,
        cache: StateCache | None,
    ) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        if context is None and self.context_dim is not None:
            raise ValueError(f"context must be given: keys are made of {self.context_dim} channels")
        if context is not None:
            check_pattern(self, causal=self.causal, context=True)
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        if padding_mask is not None:
            check_padding(padding_mask, *(x if context is None else context).shape[:2])
        if cache is not None and not self.causal:
            raise ValueError("cache serves causal=True only")

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"features={self.features!r}, normalise={self.normalise}, decay={self.decay!r}"
        )


def _check_options(features: Features, normalise: bool, decay: Decay | None, causal: bool) -> None:
    if features not in get_args(Features):
        raise ValueError(f"features must be one of {get_args(Features)}, got {features!r}")
    if normalise and features != "elu":
        raise ValueError(f"normalise=True needs features='elu', got {features!r}")
    if decay is not None and decay not in get_args(Decay):
        raise ValueError(f"decay must be one of {get_args(Decay)} or None, got {decay!r}")
    if decay is not None and not causal:
        raise ValueError(f"decay={decay!r} needs causal=True")
