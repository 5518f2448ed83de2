"""Mixture of heads: every token uses all shared heads and the few routed heads that it chooses.

    p = softmax(W_r x) over the E routed heads,   T = the K most likely of them
    r_e = K p_e / sum_T p   for e in T, else 0            gates of routed heads
    s = S softmax(W_s x),   a = 2 softmax(W_h x)          shared heads, and both kinds
    o = W_out concat_h gate_h head_h,   gate = (a_1 s, a_2 r)

Jin et al., "MoH: multi-head attention as mixture-of-head attention" (arXiv 2410.11842). The factors
K, S and 2 and the division by the sum over T are those of the published code (`gating="code"`); the
paper's equations have none of them (`gating="paper"`). With `router="norm"` nothing is learned: the
heads with the longest queries are chosen, and all gates are 0 or 1 (the paper's language model).
The balance loss E sum_e mean(p_e) mean(e in T) is K where all heads are used alike.

Cost for n queries and m keys, with the share a = (S + K) / (S + E) of heads in use: time a n m d
per head plus the projections, of which only keys and values are made for every head. To skip,
tokens are gathered for each routed head, which needs their number: compiled, exported, observed
and steered calls compute every head and multiply by the gates, with the same result up to rounding.
With a `capacity`, graphs that need no gradient gather so many times n K / E tokens for each routed
head (and up to two more), and compute every head only in calls where some head is asked by more: no
token is dropped.

The site is `attend`: weights of all heads (b, h, n, m), before the gates. Gates are returned.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.attend import attend, check_arguments
from heed_core.attention.multi_head import MultiHeadAttention, Norm, build_norm, check_heads
from heed_core.cache import KVCache, restores_cache
from heed_core.head_routing import (
    Gating,
    Router,
    Routing,
    balance_loss,
    check_capacity,
    check_routing,
    mixture_gates,
    norm_gates,
    without_padding,
)
from heed_core.head_skipping import by_tokens, gate_heads, gather_tokens
from heed_core.impl import Impl
from heed_core.layers import held_matrix_and_bias, matrix_and_bias, type_and_place
from heed_core.relative import RotaryPositions
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_bias, check_tokens, with_padding

Linear = tuple[Tensor, Tensor | None]
"""Matrix and bias."""

SKIP_FROM, SKIP_CAUSAL_FROM = 512, 4096
"""Tokens from which heads are skipped unless told otherwise: below, gathering costs more."""


def moh_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    gates: Float[Tensor, "b n h"],
    *,
    mask: Bool[Tensor, "*#mask"] | None = None,
    bias: Float[Tensor, "*#bias"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    skip: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n e"]:
    """Softmax attention of every head times its gate, which is 0 where a token does not use it.

    Args:
        query: Of all heads.
        key: Its g heads divide h, as those of `attend`.
        value: What is averaged.
        gates: As of `head_routing.mixture_gates` or `norm_gates`.
        mask: True = may attend, broadcastable to (b, h, n, m).
        bias: Added to the scores, broadcastable to (b, h, n, m).
        causal: A query sees keys at or before its own place, aligned bottom-right.
        scale: Of the products; d ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        skip: Compute a head for the tokens with a gate only. This reads the gates, which no graph
            can: compiled calls compute all.
        impl: Back-end of `attend`.

    Raises:
        ValueError: Gates of another size; what `attend` refuses.
    """
    wanted = (query.shape[0], query.shape[2], query.shape[1])
    if tuple(gates.shape) != wanted:
        raise ValueError(f"gates must be (batch, tokens, heads) {wanted}, got {tuple(gates.shape)}")
    check_arguments(query, key, value, mask=mask, bias=bias, scale=scale, dropout=dropout)
    run = partial(attend, scale=scale, dropout=dropout, impl=impl)
    if not skip or torch.compiler.is_compiling():
        mixed = run(query, key, value, mask=mask, bias=bias, causal=causal)
        return gate_heads(mixed, gates.transpose(1, 2))
    output = query.new_zeros(*query.shape[:3], value.shape[3])

    def ask(head: int, index: Tensor) -> Tensor:
        return gather_tokens(query[:, head], index)

    def put(heads: list[int], index: Tensor, mixed: Tensor) -> None:
        for at, head in enumerate(heads):
            row = index[:, at, :, None].expand(-1, -1, value.shape[3])
            output[:, head].scatter_add_(1, row, mixed[:, at].to(output.dtype))

    by_tokens(run, ask, put, key, value, gates, mask, bias=bias, shared=0, causal=causal)
    return output


class Mixture(NamedTuple):
    """What a mixture of heads returns."""

    output: Float[Tensor, "b *n c"]
    balance_loss: Float[Tensor, ""]
    """To be added to the loss; the paper weighs it by 0.01. 0 without routed heads."""
    gates: Float[Tensor, "b *n h"]


class _Call(NamedTuple):
    """What the ways to compute a call have in common."""

    x: Tensor
    query: Tensor | None  # of all heads, if they are made already
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    positions: Tensor | None  # None: `query` is normed and rotated
    gates: Tensor


class MixtureOfHeads(nn.Module):
    """Multi-head attention whose heads are gated, and partly skipped, token by token.

    Args:
        dim: Channels of a token, in and out.
        heads: All of them, the `shared` ones first.
        shared: Heads that every token uses.
        active: Routed heads that a token uses; 0 if all heads are shared.
        kv_heads: Of keys and values, dividing `heads`; all if not given.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        qk_norm: Normalise the channels of each head's queries and keys: "layer" or "rms". The norm
            router compares queries before it, where their lengths still differ.
        norm_eps: Of `qk_norm`.
        causal: A query sees keys at or before its own place, aligned bottom-right; with a context
            too, whose last tokens then stand at the places of those that ask. Without, a context is
            seen whole, as decoders see their source.
        scale: Of the products; head_dim ** -0.5 if not given.
        rotary: Rotates queries and keys (after `qk_norm`).
        router: What chooses heads.
        gating: Of the learned router.
        straight_through: Of the norm router, see `norm_gates`.
        skip: Compute chosen heads only; True or False, or from 512 tokens on (4096 if causal) if
            not given. Where a graph or a record needs all heads, all are computed all the same.
        capacity: Let compiled and exported graphs without gradients skip too: tokens of a routed
            head over those that it has where heads are used alike, at least 1; 1.25 leaves room for
            chance. Graphs compute all heads if not given.
        sync_balance: Take the balance loss over all processes, see `head_routing.balance_loss`.
        impl: Back-end of `attend`.

    Example:
        >>> attention = MixtureOfHeads(32, heads=4, shared=2, active=1)
        >>> result = attention(torch.randn(1, 5, 32))
        >>> result.output.shape, result.gates.shape
        (torch.Size([1, 5, 32]), torch.Size([1, 5, 4]))
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset(
        {"self", "causal self", "cross", "causal cross"}
    )

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        shared: int,
        active: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        qk_norm: Norm | None = None,
        norm_eps: float = 1e-5,
        causal: bool = False,
        scale: float | None = None,
        rotary: RotaryPositions | None = None,
        router: Router = "learned",
        gating: Gating = "code",
        straight_through: bool = False,
        skip: bool | None = None,
        capacity: float | None = None,
        sync_balance: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(dim, heads, kv_heads, head_dim, context_dim)
        check_routing(heads, shared, active, router, gating, straight_through)
        check_capacity(capacity, active, skip)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.shared, self.active = shared, active
        self.context_dim, self.causal = context_dim, causal
        self.router, self.straight_through, self.skip = router, straight_through, skip
        self.capacity, self.sync_balance = capacity, sync_balance
        self.gating: Gating = gating
        self.rotary = rotary
        source = dim if context_dim is None else context_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        learned = router == "learned"
        self.route = nn.Linear(dim, heads - shared, bias=False) if learned and active else None
        self.share = nn.Linear(dim, shared, bias=False) if learned and shared > 1 else None
        both = learned and active > 0 and shared > 0
        self.kind = nn.Linear(dim, 2, bias=False) if both else None
        self.query_norm = build_norm(qk_norm, head_dim, norm_eps)
        self.key_norm = build_norm(qk_norm, head_dim, norm_eps)
        self.attend = Attend(causal=causal, scale=scale, dropout=dropout, impl=impl)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    @classmethod
    def from_attention(
        cls,
        attention: MultiHeadAttention,
        *,
        shared: int,
        active: int,
        router: Router = "norm",
        straight_through: bool = False,
        skip: bool | None = None,
    ) -> MixtureOfHeads:
        """A mixture with the weights of a trained attention, to be trained on.

        Learned routers begin at zero, where every chosen head has the same gate.

        Raises:
            ValueError: The attention has options that a mixture has not, or layers that are not
                plain, such as adapters.
        """
        for name in ("window", "relative_bias"):
            if (given := getattr(attention, name)) is not None:
                raise ValueError(f"attention must have no {name}, which a mixture has not: {given}")
        held = {
            name: held_matrix_and_bias(name, attention.get_submodule(name))
            for name in ("query", "key", "value", "out")
        }
        mixture = cls(
            attention.dim,
            heads=attention.heads,
            shared=shared,
            active=active,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            context_dim=attention.context_dim,
            qkv_bias=held["query"][1] is not None,
            out_bias=held["out"][1] is not None,
            dropout=attention.attend.dropout,
            causal=attention.causal,
            scale=attention.attend.scale,
            rotary=attention.rotary,
            router=router,
            straight_through=straight_through,
            skip=skip,
            impl=attention.attend.impl,
        )
        with torch.no_grad():
            for name, (weight, bias) in held.items():
                mixture.to(weight)
                own = cast(nn.Linear, mixture.get_submodule(name))
                own.weight.copy_(weight)
                if bias is not None:
                    own.bias.copy_(bias)
        mixture.query_norm = copy.deepcopy(attention.query_norm)
        mixture.key_norm = copy.deepcopy(attention.key_norm)
        for layer in (mixture.route, mixture.share, mixture.kind):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        return mixture

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: KVCache | None = None,
    ) -> Mixture:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            mask: True = may attend, broadcastable to (b, heads, n, m).
            padding_mask: True = real token, for the m tokens that are attended to; with a cache
                also those in it. In self-attention, padding chooses no routed head.
            bias: Added to the scores, broadcastable to (b, heads, n, m).
            positions: Of `x`, for `rotary` only; default 0, 1, ... after those in the cache.
            cache: Of a causal self-attention.
        """
        self._check_call(x, context, positions, cache)
        offset = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(offset, offset + x.shape[1], device=x.device)
        key, value = self._keys(x, context, positions, cache)
        mask = with_padding(mask, padding_mask, key, heads=self.heads, queries=x.shape[1])
        if bias is not None:
            check_bias(bias, (x.shape[0], self.heads, x.shape[1], key.shape[2]))
        skips, room = self._skips(x), self._room(x)
        later = (skips or room is not None) and self.router == "learned"
        query = None if later else self._heads(self.query(x))
        routing = self._routed(x, query)
        real = None
        if context is None and padding_mask is not None:
            real = padding_mask[:, -x.shape[1] :]
            routing = without_padding(routing, real, self.shared)
        loss = balance_loss(routing.probabilities, routing.chosen, real, sync=self.sync_balance)
        turned: Tensor | None = positions
        if room is not None and self._changes_queries:  # by what no branch can hold
            query = self._ready(self._heads(self.query(x)) if query is None else query, positions)
            turned = None
        call = _Call(x, query, key, value, mask, bias, turned, routing.gates)
        if not skips and room is None:
            return Mixture(self._computing_all(call), loss, routing.gates)
        into = None if query is not None else matrix_and_bias(self.query)
        maps = into, matrix_and_bias(self.out)  # what is put around them no branch can hold
        if room is None:
            output = self._skipping(call, *maps)
        else:
            fits = (routing.chosen.sum(1) <= room).all()
            output = torch.cond(
                fits,
                lambda: self._skipping(call, *maps, room),
                lambda: self._computing_all(call),
            )
        return Mixture(output, loss, routing.gates)

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for decoding.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        dtype = own if dtype is None else dtype
        return KVCache(batch, self.kv_heads, max_len, self.head_dim, dtype=dtype, device=device)

    def _room(self, x: Tensor) -> int | None:
        """Tokens that a graph gathers for each routed head; None if it computes all heads."""
        plain = not torch.compiler.is_compiling() or self.attend.attachments is not None
        if self.capacity is None or plain:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())):
            return None  # torch.cond wants gradients of both branches laid out alike
        share = Fraction(self.capacity).limit_denominator(1000) * self.active
        share /= self.heads - self.shared
        if share >= 1:  # room for every token
            return None
        return 2 + (x.shape[1] * share.numerator) // share.denominator

    def _skips(self, x: Tensor) -> bool:
        if x.is_meta or torch.compiler.is_compiling() or self.attend.attachments is not None:
            return False
        least = SKIP_CAUSAL_FROM if self.causal else SKIP_FROM
        return self.active > 0 and (x.shape[1] >= least if self.skip is None else self.skip)

    def _routed(self, x: Tensor, query: Tensor | None) -> Routing:
        if self.router == "norm":
            assert query is not None
            return norm_gates(
                query,
                shared=self.shared,
                active=self.active,
                straight_through=self.straight_through,
            )
        route, share, kind = (
            None if layer is None else matrix_and_bias(layer)[0]
            for layer in (self.route, self.share, self.kind)
        )
        return mixture_gates(
            x, route, share, kind, shared=self.shared, active=self.active, gating=self.gating
        )

    def _keys(
        self, x: Tensor, context: Tensor | None, positions: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        source = x if context is None else context
        if context is not None:
            positions = torch.arange(context.shape[1], device=x.device)
        key = self._rotated(self.key_norm(self._heads(self.key(source))), positions)
        value = self._heads(self.value(source))
        return (key, value) if cache is None else cache.append(key, value)

    def _computing_all(self, call: _Call) -> Tensor:
        """Every head for every token, times its gate."""
        query = self._heads(self.query(call.x)) if call.query is None else call.query
        query = self._ready(query, call.positions)
        mixed: Tensor = self.attend(query, call.key, call.value, mask=call.mask, bias=call.bias)
        gated = gate_heads(mixed, call.gates.transpose(1, 2))
        return cast(Tensor, self.out(gated.transpose(1, 2).flatten(2)))

    def _skipping(
        self, call: _Call, into: Linear | None, out: Linear, room: int | None = None
    ) -> Tensor:
        """Shared heads for all tokens, each routed head for those that chose it, `room` at most."""
        x = call.x
        output = self._shared_heads(call, into, out)
        first = x.shape[1] * torch.arange(x.shape[0], device=x.device)[:, None]  # of each sample

        def ask(head: int, index: Tensor) -> Tensor:
            return self._queries(call, into, head, index)

        def put(heads: list[int], index: Tensor, mixed: Tensor) -> None:
            for at, head in enumerate(heads):
                back = F.linear(mixed[:, at], out[0][:, self._channels(head)])
                output.view(-1, self.dim).index_add_(
                    0, (index[:, at] + first).flatten(), back.flatten(0, 1)
                )

        by_tokens(
            self.attend, ask, put, call.key, call.value, call.gates, call.mask,
            bias=call.bias, shared=self.shared, causal=self.causal, room=room,
        )  # fmt: skip
        return output

    def _queries(self, call: _Call, into: Linear | None, head: int, index: Tensor) -> Tensor:
        """Those of one head for chosen tokens (b, rows, d), ready."""
        x, positions = call.x, call.positions
        if call.query is None:
            one = _some_rows(into, gather_tokens(x, index), self._channels(head))
        else:
            one = gather_tokens(call.query[:, head], index)
        places = None if positions is None else positions.expand(x.shape[0], -1).gather(1, index)
        return self._ready(one[:, None], places)[:, 0]

    def _channels(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def _shared_heads(self, call: _Call, into: Linear | None, out: Linear) -> Tensor:
        """What the shared heads give, and the bias of the output."""
        outwards, shift = out
        x, key, value = call.x, call.key, call.value
        if not self.shared:
            none = x.new_zeros(x.shape[0], x.shape[1], 0).to(key.dtype)
            return F.linear(none, outwards[:, :0], shift)
        width = self.shared * self.head_dim
        if call.query is None:
            some = self._heads(_some_rows(into, x, slice(width)))
        else:
            some = call.query[:, : self.shared]
        serves = self.heads // self.kv_heads
        if self.shared % serves:
            group = torch.arange(self.shared, device=x.device) // serves
            key, value = key[:, group], value[:, group]
        else:
            key, value = key[:, : self.shared // serves], value[:, : self.shared // serves]
        mask, bias = (
            table[..., : self.shared, :, :]
            if table is not None and table.dim() > 2 and table.shape[-3] > 1
            else table
            for table in (call.mask, call.bias)
        )
        ready = self._ready(some, call.positions)
        mixed: Tensor = self.attend(ready, key, value, mask=mask, bias=bias)
        gated = gate_heads(mixed, call.gates[..., : self.shared].transpose(1, 2))
        return F.linear(gated.transpose(1, 2).flatten(2), outwards[:, :width], shift)

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.view(batch, length, width // self.head_dim, self.head_dim).transpose(1, 2)

    @property
    def _changes_queries(self) -> bool:
        return self.rotary is not None or not isinstance(self.query_norm, nn.Identity)

    def _ready(self, query: Tensor, positions: Tensor | None) -> Tensor:
        """Normed and rotated; without positions it is already."""
        if positions is None:
            return query
        return self._rotated(self.query_norm(query), positions)

    def _rotated(self, heads: Tensor, positions: Tensor | None) -> Tensor:
        if self.rotary is None or positions is None:
            return heads
        return cast(Tensor, self.rotary(heads, positions=positions))

    def _check_call(
        self, x: Tensor, context: Tensor | None, positions: Tensor | None, cache: KVCache | None
    ) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        if positions is not None and self.rotary is None:
            raise ValueError("positions have no effect: this attention was built without rotary")
        if context is None and self.context_dim is not None:
            raise ValueError(f"context must be given: keys are made of {self.context_dim} channels")
        if context is not None:
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        if cache is not None and (context is not None or not self.causal):
            raise ValueError("a KVCache serves causal self-attention only")

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, shared={self.shared}, active={self.active}, "
            f"router={self.router!r}, gating={self.gating!r}"
        )


def mixture_from_dit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published diffusion model: `qkv`, `proj`, `wg`, `wg_0`, `wg_1`.

    The vision model has scores of another kind: `cosine_mixture.cosine_mixture_from_official`.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"proj": "out", "wg": "route", "wg_1": "share", "wg_0": "kind"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "qkv":
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            result |= {f"{part}.{kind}": rows for part, rows in parts}
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of the published mixture of heads")
    return result


def mixture_from_llama(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of Llama's attention, which the published language model keeps.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module not in names:
            raise ValueError(f"{name!r} is no weight of Llama's attention")
        result[f"{names[module]}.{kind}"] = tensor
    return result


def _some_rows(layer: Linear | None, tokens: Tensor, rows: slice) -> Tensor:
    """Some channels of what a linear layer gives."""
    assert layer is not None
    weight, bias = layer
    return F.linear(tokens, weight[rows], None if bias is None else bias[rows])
