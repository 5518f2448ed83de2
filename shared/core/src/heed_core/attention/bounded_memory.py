"""Attention with bounded-memory control (ABC): queries attend to a few slots that tokens fill.

    C^K = softmax over tokens of (k_j . phi^K_s),   K~_s = sum_j C^K_sj k_j
    C^V = softmax over tokens of (v_j . phi^V_s),   V~_s = sum_j C^V_sj v_j
    o_i = softmax over slots of (scale * q_i . K~_s) V~

The tables phi are learned and shared by the heads. Causal, slots are those that the tokens so far
have filled: K~_t,s = sum_(j <= t) exp(a_js - lse_t,s) k_j with a_js = k_j . phi^K_s and lse over
the same tokens. Peng et al., "ABC: attention with bounded-memory control" (arXiv 2110.02488). (The
code published with arXiv 2210.07661 leaves the sum over earlier tokens out; this one does not.)

Cost per head for n queries, m keys and s slots: time (n + m) s d, memory (n + m) d + s d. Causal,
in chunks of 16 tokens: time n (s d + 16 (d + s)), memory n (d + 16 s).

Sites: `compress_keys` and `compress_values` (b, h, s, m) where not causal, and `attend`, the
weights of slots (b, h, n, s). An output depends on its own query alone, so that the cross form
serves queries that are made one after the other, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.projected import (
    ProjectedAttention,
    check_positive,
    rename_projections,
)
from heed_core.cache import StateCache, check_sequences, restores_cache
from heed_core.impl import Impl
from heed_core.kernels.state_scan import state_scan
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import join, split
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding

CHUNK = 16
"""Tokens of a chunk of the causal form."""

NOTHING_YET = -1e30
"""The largest logit of no token: finite, so that differences of two are numbers."""


class Slots(NamedTuple):
    """What tokens so far have written, as sums relative to the largest logit of each slot."""

    sums: Float[Tensor, "b h s e"]
    """Weighted sum of the rows; its last column is the sum of the weights."""
    top: Float[Tensor, "b h s"]
    """The largest logit."""


def empty_slots(like: Float[Tensor, "b h n d"], slots: int) -> Slots:
    """Slots before the first token, for rows like these."""
    batch, heads, _, width = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    return Slots(
        torch.zeros(batch, heads, slots, width + 1, dtype=dtype, device=like.device),
        torch.full((batch, heads, slots), NOTHING_YET, dtype=dtype, device=like.device),
    )


def abc_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    key_control: Float[Tensor, "d s"],
    value_control: Float[Tensor, "e s"],
    *,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    sites: tuple[Attend, Attend, Attend] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention to slots that all tokens fill.

    Args:
        query: One row per token that asks.
        key: One row per token that is written.
        value: What is written.
        key_control: phi^K, a column per slot.
        value_control: phi^V.
        padding_mask: True = real token; others are not written.
        sites: Where keys and values are compressed, with scale 1, and where slots are attended to.
    """
    _check(query, key, value, key_control, value_control, padding_mask)
    keys, values, slots = (Attend(scale=1.0), Attend(scale=1.0), Attend()) if sites is None else (
        sites
    )  # fmt: skip
    real = None if padding_mask is None else masks.keys(padding_mask)

    def compressed(site: Attend, rows: Tensor, control: Tensor) -> Tensor:
        asking = control.mT.to(rows.dtype).repeat(rows.shape[0], rows.shape[1], 1, 1)
        result: Tensor = site(asking, rows, rows, mask=real, causal=False)
        return result

    short_key = compressed(keys, key, key_control)
    mixed: Tensor = slots(query, short_key, compressed(values, value, value_control), causal=False)
    return mixed


def causal_abc_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    key_control: Float[Tensor, "d s"],
    value_control: Float[Tensor, "e s"],
    *,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    state: tuple[Slots, Slots] | None = None,
    site: Attend | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "b h n e"], tuple[Slots, Slots]]:
    """Attention to the slots that tokens up to the own one have filled.

    Args:
        query: One row per token that asks.
        key: One row per token that is written.
        value: What is written.
        key_control: phi^K, a column per slot.
        value_control: phi^V.
        padding_mask: True = real token; others are not written.
        state: Slots of keys and of values that earlier tokens have left.
        site: Where slots are attended to; a plain one if not given.
        chunk: Tokens of a chunk.

    Returns:
        Output, in the type of `query`, and the slots after the last token.
    """
    _check(query, key, value, key_control, value_control, padding_mask)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key must have the tokens of query ({query.shape[2]}) where causal, got {key.shape[2]}"
        )
    check_positive(chunk=chunk)
    site = Attend() if site is None else site
    slots = key_control.shape[1]
    if state is None:
        state = empty_slots(key, slots), empty_slots(value, slots)
    dtype, length = query.dtype, query.shape[2]
    if not torch.compiler.is_compiling():
        chunk = max(1, min(chunk, length))
    with without_autocast(query):
        key, value = at_least_float32(key), at_least_float32(value)
        asked = at_least_float32(query) * query.shape[3] ** -0.5
        written = _written(key, key_control, padding_mask, state[0], chunk)
        scores = join(_scores(split(asked, chunk), written), length)
    shares = _softmax_of(site, scores)
    with without_autocast(query):
        read = _written(value, value_control, padding_mask, state[1], chunk)
        mixed = join(_values(split(at_least_float32(shares), chunk), read), length)
    last = Slots(written.states[:, :, -1], written.top), Slots(read.states[:, :, -1], read.top)
    return mixed.to(dtype), last


def _softmax_of(site: Attend, scores: Tensor) -> Tensor:
    """Softmax of scores (b, h, n, s) at a site: what mixes the rows of an identity."""
    batch, heads, length, slots = scores.shape
    nothing = scores.new_zeros(batch, heads, slots, 1)
    one = torch.eye(slots, dtype=scores.dtype, device=scores.device).expand(batch, heads, -1, -1)
    shares: Tensor = site(
        scores.new_zeros(batch, heads, length, 1), nothing, one, bias=scores, causal=False
    )
    return shares


class _Written(NamedTuple):
    """Tokens in chunks, and how much of each is in the slots when a later one asks."""

    rows: Tensor  # (b, h, chunks, t, e), the last column is 1
    within: Tensor  # (b, h, chunks, t, j, s), of token j of the chunk when token t asks
    into: Tensor  # (b, h, chunks, t, s), of the state before the chunk
    states: Tensor  # (b, h, chunks + 1, s, e)
    top: Tensor  # (b, h, s), after the last token


def _written(
    rows: Tensor, control: Tensor, padding_mask: Tensor | None, start: Slots, size: int
) -> _Written:
    logits = rows @ control.to(rows.dtype)
    there = torch.ones_like(logits[..., :1])
    if padding_mask is not None:
        there = there * padding_mask[:, None, :, None]
        rows = rows.masked_fill(~padding_mask[:, None, :, None], 0.0)
    present = split(there, size) > 0
    logits = split(logits, size).masked_fill(~present, -torch.inf)
    # Nothing depends on the largest logit, but for rounding: it has no gradient.
    top = logits.detach().cummax(dim=3).values
    before = torch.cat([start.top.detach()[:, :, None], top[..., -1, :]], dim=2)
    before = before.cummax(dim=2).values  # (b, h, chunks + 1, s)
    top = torch.maximum(top, before[:, :, :-1, None])
    end = before[:, :, 1:]
    size = logits.shape[3]
    later = torch.ones(size, size, dtype=torch.bool, device=rows.device).triu(1)
    away = logits.unsqueeze(3) - top.unsqueeze(4)  # (b, h, chunks, t, j, s)
    within = away.masked_fill(later[..., None], -torch.inf).exp()
    rows = split(F.pad(rows, (0, 1), value=1.0), size)
    update = (logits - end.unsqueeze(3)).exp().mT @ rows
    carry = (before[:, :, :-1] - end).exp().unsqueeze(-1)
    states = state_scan(carry, update, start.sums.to(rows.dtype))
    into = (before[:, :, :-1, None] - top).exp()
    return _Written(rows, within, into, states, before[:, :, -1])


def _scores(query: Tensor, written: _Written) -> Tensor:
    """q_t . K~_t,s for all tokens, (b, h, chunks, t, s)."""
    products = query @ written.rows[..., :-1].mT  # (b, h, chunks, t, j)
    state = written.states[:, :, :-1]
    total = (products.unsqueeze(5) * written.within).sum(4)  # faster than matrices of one row
    total = total + written.into * (query @ state[..., :-1].mT)
    return total / _weight(written)


def _values(shares: Tensor, written: _Written) -> Tensor:
    """sum_s p_t,s V~_t,s, (b, h, chunks, t, e)."""
    shares = shares / _weight(written)
    direct = (written.within * shares.unsqueeze(4)).sum(5)  # (b, h, chunks, t, j)
    state = written.states[:, :, :-1]
    return direct @ written.rows[..., :-1] + (shares * written.into) @ state[..., :-1]


def _weight(written: _Written) -> Tensor:
    """The sum of the weights of each slot when each token asks; 1 where nothing is written."""
    total = written.within.sum(4) + written.into * written.states[:, :, :-1, None, :, -1]
    return total.masked_fill(total == 0, 1.0)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_control: Tensor,
    value_control: Tensor,
    padding_mask: Tensor | None,
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels), got {tuple(x.shape)}"
            )
    for name, control, width in (
        ("key_control", key_control, key.shape[3]),
        ("value_control", value_control, value.shape[3]),
    ):
        if control.dim() != 2 or control.shape != (width, key_control.shape[-1]):
            raise ValueError(
                f"{name} must be (channels {width}, slots {key_control.shape[-1]}), got "
                f"{tuple(control.shape)}"
            )
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])


class BoundedMemoryAttention(ProjectedAttention):
    """Attention to slots that tokens fill, with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        slots: Of keys and values.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight of a slot in training.
        causal: Slots are those that tokens up to the own one have filled.
        impl: Back-end of the sites.

    Example:
        >>> attention = BoundedMemoryAttention(32, heads=4, slots=5, causal=True)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(
        {"self", "causal self", "cross", "causal cross"}
    )

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        slots: int = 16,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        impl: Impl = "auto",
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
        check_positive(slots=slots)
        self.slots = slots
        self.key_control = nn.Parameter(torch.empty(self.head_dim, slots))
        self.value_control = nn.Parameter(torch.empty(self.head_dim, slots))
        for control in (self.key_control, self.value_control):
            nn.init.xavier_uniform_(control, gain=2**-0.5)
        if not causal:
            self.compress_keys = Attend(scale=1.0, impl=impl)
            self.compress_values = Attend(scale=1.0, impl=impl)
        self.attend = Attend(dropout=dropout, impl=impl)

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
            context: Tokens that are written; `x` itself if not given.
            padding_mask: True = real token, for the tokens that are written (now).
            cache: From `new_cache`, for decoding; `causal` only.
        """
        self.check_call(x, context, padding_mask, cached=cache is not None)
        query, key, value = self.project(x, context)
        controls = self.key_control, self.value_control
        if not self.causal:
            sites = self.compress_keys, self.compress_values, self.attend
            mixed = abc_attention(
                query, key, value, *controls, padding_mask=padding_mask, sites=sites
            )
            return self.join(mixed, x)
        state = None
        if cache is not None:
            check_sequences(cache, x.shape[0])
            state = tuple(Slots(cache[f"{n}_sums"], cache[f"{n}_top"]) for n in ("key", "value"))
        mixed, last = causal_abc_attention(
            query,
            key,
            value,
            *controls,
            padding_mask=padding_mask,
            state=None if state is None else (state[0], state[1]),
            site=self.attend,
        )
        if cache is not None:
            cache.update(_named(last), tokens=x.shape[1])
        return self.join(mixed, x)

    def new_cache(self, batch: int) -> StateCache:
        """An empty cache for decoding: the slots, however many tokens come."""
        dtype, device = type_and_place(self.key)
        like = torch.zeros(batch, self.heads, 0, self.head_dim, dtype=dtype, device=device)
        return StateCache(_named((empty_slots(like, self.slots), empty_slots(like, self.slots))))

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"{super().extra_repr()}, slots={self.slots}"


def _named(state: tuple[Slots, Slots]) -> dict[str, Tensor]:
    return {
        f"{name}_{part}": tensor
        for name, slots in zip(("key", "value"), state, strict=True)
        for part, tensor in slots._asdict().items()
    }


def abc_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's ABC.

    Raises:
        ValueError: A name that it does not have.
    """
    extra = {"compress_k": "key_control", "compress_v": "value_control"}
    return rename_projections(state, extra, "CAB's ABC")
