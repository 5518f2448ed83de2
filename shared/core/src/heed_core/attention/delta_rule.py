"""The delta rule: a token writes what the memory gets wrong, not its whole value.

    P_t = diag(a_t) S_(t-1)                          decay, 1 without a gate
    S_t = P_t + beta_t k_t (v_t - P_t^T k_t)^T       write the error of the prediction
    o_t = scale * S_t^T q_t                          read, its own writing included

Schlag et al., "Linear transformers are secretly fast weight programmers" (arXiv 2102.11174); Yang
et al., "Parallelizing linear transformers with the delta rule" (arXiv 2406.06484), whose chunked
form this is; "Gated delta networks" (arXiv 2412.06464) for one decay per head, "Kimi linear" (arXiv
2510.26692) for one per channel. As a rule of learning it is Rescorla and Wagner's, or least mean
squares. It is causal by nature.

Chunked: within a chunk the errors U solve a unit lower triangular system, (I + L) U = beta (V -
decay K S_0) with L_ij = beta_i (k_i . k_j, decayed from j to i) for j < i; between chunks the state
is carried by a matrix.

Cost per head for n tokens: time n d e (recurrent), n (chunk (d + e) + d^2 + d^2 e / chunk)
(chunked), n^2 (d + n) (parallel). Memory n (d + e) plus a state d e and a matrix d^2 per chunk.

There is no softmax. Observed, the site `probe` states the effective weights: o = weights V holds
for a call that starts from no state; rows do not sum to one. It cannot be steered.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.cache import StateCache, restores_cache
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
from heed_core.tokens import Pattern, check_padding, check_tokens


def delta_rule(
    query: Float[Tensor, "b g n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    *,
    state: Float[Tensor, "b h d e"] | None = None,
    scale: float | None = None,
    form: Form = "chunked",
    chunk: int | None = None,
    impl: KernelImpl = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """Write errors, read with queries; nothing decays.

    Args:
        query: Scaled on reading only.
        key: Of length 1, or at least beta |k|^2 <= 2, or the memory diverges.
        value: What a key should give. Its h heads are a multiple of the g heads of keys.
        beta: How much of the error is written, from 0 to 1 (up to 2 with keys of length 1).
        state: What earlier tokens have left; nothing if not given.
        scale: Of what is read; default d ** -0.5.
        form: How the same numbers are computed.
        chunk: Tokens of a chunk; default 64.
        impl: Who computes the chunked form; "triton" never falls back, see `kernels.chunk_scan`.

    Returns:
        Output, in the type of `query`, and the state after the last token, in float32 at least.

    Raises:
        ValueError: Shapes that do not fit, or an unknown form.
    """
    return _delta(query, key, value, beta, None, state, scale, form, chunk, impl)


def gated_delta_rule(
    query: Float[Tensor, "b g n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b h n e"],
    beta: Float[Tensor, "b h n"],
    log_decay: Float[Tensor, "*decay"],
    *,
    state: Float[Tensor, "b h d e"] | None = None,
    scale: float | None = None,
    form: Form = "chunked",
    chunk: int | None = None,
    impl: KernelImpl = "auto",
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h d e"]]:
    """The delta rule in a memory that fades before each writing.

    Args:
        query: As for `delta_rule`.
        key: As for `delta_rule`.
        value: As for `delta_rule`.
        beta: As for `delta_rule`.
        log_decay: Logarithm of what is left at each token, finite and at most 0: (b, h, n) or, per
            key channel, (b, h, n, d), up to broadcasting.
        state: What earlier tokens have left; nothing if not given.
        scale: Of what is read; default d ** -0.5.
        form: How the same numbers are computed.
        chunk: Tokens of a chunk; default 64, or 16 with a decay per channel.
        impl: Who computes the chunked form; "triton" never falls back, see `kernels.chunk_scan`.

    Returns:
        Output, in the type of `query`, and the state after the last token, in float32 at least.

    Raises:
        ValueError: Shapes that do not fit, or an unknown form.
    """
    return _delta(query, key, value, beta, log_decay, state, scale, form, chunk, impl)


def delta_rule_weights(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    beta: Float[Tensor, "b h n"],
    *,
    log_decay: Float[Tensor, "*decay"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n n"]:
    """The N x N map with which the rule mixes the values, from no state."""
    query, key, beta = at_least_float32(query), at_least_float32(key), at_least_float32(beta)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    total = expand_decay(None if log_decay is None else at_least_float32(log_decay), key)
    total = None if total is None else total.cumsum(2)
    system = beta[..., None] * decayed_products(key, key, total, strict=True)
    writes = _solved(system, torch.diag_embed(beta))
    return scale * decayed_products(query, key, total) @ writes


def _delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float | None,
    form: Form,
    chunk: int | None,
    impl: KernelImpl = "auto",
) -> tuple[Tensor, Tensor]:
    check_recurrence(query, key, value, same_length=True)
    if tuple(beta.shape) != tuple(value.shape[:3]):
        raise ValueError(
            f"beta must be (batch, heads, tokens) = {tuple(value.shape[:3])}, got "
            f"{tuple(beta.shape)}"
        )
    dtype = query.dtype
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(query):
        serves = value.shape[1] // key.shape[1]
        if serves > 1:
            query, key = (x.repeat_interleave(serves, dim=1) for x in (query, key))
        query, key, value, beta = (at_least_float32(x) for x in (query, key, value, beta))
        decay = expand_decay(None if log_decay is None else at_least_float32(log_decay), key)
        start = start_state(state, key, value)
        by_channel = decay is not None and decay.shape[-1] > 1
        size = chunk_size(form, chunk, query.shape[2], by_channel=by_channel)
        triton = scan_impl(impl, form, query, size)
        beta = beta[..., None]
        if form == "recurrent":
            read, last = _recurrent(query, key, value, beta, decay, start)
        else:
            read, last = _chunked(query, key, value, beta, decay, start, size, triton)
    return (read * scale).to(dtype), last


def _recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    decay = [None] * query.shape[2] if log_decay is None else steps(log_decay.exp())
    rows = [value.new_zeros(*value.shape[:2], 0, value.shape[3])]
    for q, k, v, rate, left in zip(*map(steps, (query, key, value, beta)), decay, strict=True):
        if left is not None:
            state = left.mT * state
        state = state + k.mT * (rate * (v - k @ state))
        rows.append(q @ state)
    return torch.cat(rows, dim=2), state


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    size: int,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    length, width = query.shape[2], value.shape[3]
    query, key, value, beta = (split(x, size) for x in (query, key, value, beta))
    total = None if log_decay is None else split(log_decay, size).cumsum(-2)
    system = beta * decayed_products(key, key, total, strict=True)
    within = decayed_products(query, key, total)
    seen, left = key, key  # keys as the chunk's first state meets them, and as its end finds them
    fade = key.new_ones(*key.shape[:3], 1)
    if total is not None:
        end = total[..., -1:, :]
        fade = end.squeeze(-2).exp()
        query, seen, left = query * total.exp(), key * total.exp(), key * (end - total).exp()
    solved = _solved(system, beta * torch.cat([value, seen], dim=-1))
    errors, reads = solved[..., :width], solved[..., width:]
    if triton:
        read, states = chunk_scan(query, left, within, errors, reads, fade, state)
        return join(read, length), states[:, :, -1]
    kept = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device) * fade[..., None, :]
    states = state_scan(kept - left.mT @ reads, left.mT @ errors, state)
    before = states[:, :, :-1]
    read = within @ (errors - reads @ before) + query @ before
    return join(read, length), states[:, :, -1]


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """(I + system)^-1 right, for a strictly lower triangular system."""
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved


class DeltaRuleAttention(nn.Module):
    """The delta rule with its projections: keys and queries of length 1, beta = sigmoid(W x).

    With `gated`, the decay is exp(-exp(A_h) softplus(W_a x + b_a)), one per head and token. The
    short convolutions before and the gated norm after it in the published networks belong to their
    blocks.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of queries and keys; dim / heads if not given.
        value_dim: Channels of values of a head; `head_dim` if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        gated: Whether the memory fades.
        form: As in `delta_rule`.
        chunk: As in `delta_rule`.
        impl: As in `delta_rule`.

    Example:
        >>> attention = DeltaRuleAttention(32, heads=4, gated=True)
        >>> attention(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        gated: bool = False,
        form: Form = "chunked",
        chunk: int | None = None,
        impl: KernelImpl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        chunk_size(form, chunk, 1, by_channel=False)
        check_impl(impl, form)
        head_dim = dim // heads if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        if value_dim < 1:
            raise ValueError(f"value_dim must be at least 1, got {value_dim}")
        self.dim, self.heads, self.head_dim, self.value_dim = dim, heads, head_dim, value_dim
        self.form: Form = form
        self.chunk = chunk
        self.impl: KernelImpl = impl
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(dim, heads * value_dim, bias=qkv_bias)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.gate = nn.Linear(dim, heads) if gated else None
        self.log_rate = nn.Parameter(torch.zeros(heads)) if gated else None
        self.probe = Probe()
        self.out = nn.Linear(heads * value_dim, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        cache: StateCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Write and read token by token.

        Args:
            x: Tokens.
            padding_mask: True = real token; others write nothing and let nothing fade, wherever
                they stand.
            cache: From `new_cache`, for decoding.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        if padding_mask is not None:
            check_padding(padding_mask, *x.shape[:2])
            x = x.masked_fill(~padding_mask[..., None], 0.0)  # whatever they hold, also NaN
        query, key = self._direction(self.query(x)), self._direction(self.key(x))
        value = self._heads(self.value(x))
        beta = at_least_float32(self.beta(x)).sigmoid().transpose(1, 2)
        log_decay = self._log_decay(x)
        if padding_mask is not None:
            beta = beta.masked_fill(~padding_mask[:, None], 0.0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(~padding_mask[:, None], 0.0)
        state = None if cache is None else cache["state"]
        mixed, state = _delta(
            query, key, value, beta, log_decay, state, None, self.form, self.chunk, self.impl
        )
        if cache is not None:
            cache.update({"state": state}, tokens=x.shape[1])
        self.probe(lambda: delta_rule_weights(query, key, beta, log_decay=log_decay))
        return cast(Tensor, self.out(mixed.to(x.dtype).transpose(1, 2).flatten(2)))

    def new_cache(self, batch: int) -> StateCache:
        """An empty cache for decoding: one state, however many tokens come."""
        own, device = type_and_place(self.key)
        state = torch.zeros(
            batch,
            self.heads,
            self.head_dim,
            self.value_dim,
            dtype=torch.promote_types(own, torch.float32),
            device=device,
        )
        return StateCache({"state": state})

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def _direction(self, tokens: Tensor) -> Tensor:
        heads = at_least_float32(self._heads(tokens))
        length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
        # nothing has no direction: divided by a small number its gradient would burst
        direction: Tensor = heads / length.masked_fill(length == 0, 1.0).clamp(min=1e-12)
        return direction

    def _log_decay(self, x: Tensor) -> Tensor | None:
        if self.gate is None or self.log_rate is None:
            return None
        # dense: torch compiles softplus wrongly where its gradient lies in another order
        gate = at_least_float32(self.gate(x)).transpose(1, 2).contiguous()
        return -at_least_float32(self.log_rate).exp()[:, None] * F.softplus(gate)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}, value_dim={self.value_dim}"
