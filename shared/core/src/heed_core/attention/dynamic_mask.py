"""Dynamic mask attention: every query keeps the keys whose values score highest.

    u_j = W_u [v_j of all key/value heads] + b,    delta_gj = exp(A_g softplus(u_gj))
    keep(i) = the `keep` largest delta_gj among the keys that i may attend to
    o_i = softmax over keep(i) of (scale * q_i . k_j + delta_gj) v_j

Shi et al., "Trainable dynamic mask sparse attention" (arXiv 2508.02124). Selecting has no gradient;
scores learn as a bias of what was kept. `form="linear"` leaves the exponential out, as newer
published kernels do. Permission comes before selection, so that the future takes no place, and of
equal scores the latest key is kept, in a forward pass and in decoding alike.

Cost per head for n queries and m keys: time n keep d, plus n (keep + block) to select, and memory
n / block (keep + block) d: queries are taken in blocks, which attend to the keys that any of them
keeps. Not causal, all queries keep the same keys: time n keep d; so does the one query of a step of
decoding: time m + keep d. With a mask that differs between
queries, with blocks of keys, with `keep="positive"` and while observed or steered: time n m d,
memory n m; blocks of keys with `gather="flex"`: memory n m / block_size, and tiles of 128 x 128
pairs in which nothing is kept cost nothing.

The site is `attend`: weights (b, h, n, m), zero for keys that are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from heed_core.attention.multi_head import build_norm, check_heads
from heed_core.backends.reference import permission
from heed_core.cache import ScoredKVCache, restores_cache
from heed_core.impl import Impl
from heed_core.kernels.dynamic_blocks import LEAST_BLOCK as BLOCK
from heed_core.kernels.dynamic_blocks import blockwise_attention
from heed_core.kernels.gather_attention import gather_attention
from heed_core.kernels.running_top import running_top
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.key_selection import keep_blocks, keep_most, keep_positive, latest_largest
from heed_core.layers import matrix_and_bias, type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import join, split
from heed_core.relative import RotaryPositions
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_mask, check_padding, check_pattern, check_tokens

ScoreForm = Literal["exp", "linear"]
"""Whether scores are exponentials (at least 0), or A softplus(u) itself."""

Keep = int | Literal["positive"]
"""So many keys with the largest scores, or all keys whose score is above 0."""

KEEP = 2048
"""Keys that a query of the published models keeps."""

PAIRS = 2**21
"""Of queries and keys, computed at a time where nothing is learnt: few enough for a cache."""

Gather = Literal["auto", "torch", "triton", "flex"]
"""How kept keys are reached, see `dynamic_mask_attention`."""


def dynamic_scores(
    value: Float[Tensor, "b g m d"],
    weight: Float[Tensor, "g gd"],
    bias: Float[Tensor, " g"] | None,
    strength: Float[Tensor, " g"],
    *,
    form: ScoreForm = "exp",
) -> Float[Tensor, "b g m"]:
    """Scores of keys by their values, in float32 at least.

    Args:
        value: Of all key/value heads.
        weight: W_u: every head's score sees the values of all heads.
        bias: b.
        strength: A.
        form: As the paper, or without the exponential, which is held below what overflows.

    Raises:
        ValueError: Weights that do not fit the values, an unknown form.
    """
    groups, channels = value.shape[1], value.shape[1] * value.shape[-1]
    if tuple(weight.shape) != (groups, channels):
        raise ValueError(
            f"weight must be {(groups, channels)} (kv_heads, kv_heads * channels), got "
            f"{tuple(weight.shape)}"
        )
    if form not in get_args(ScoreForm):
        raise ValueError(f"form must be one of {get_args(ScoreForm)}, got {form!r}")
    with without_autocast(value):
        rows = at_least_float32(value).transpose(1, 2).flatten(2)
        bias = None if bias is None else at_least_float32(bias)
        # dense: torch compiles softplus wrongly where its gradient lies in another order
        raised = F.linear(rows, at_least_float32(weight), bias).transpose(1, 2).contiguous()
        scores = F.softplus(raised) * at_least_float32(strength)[:, None]
        if form == "linear":
            return scores
        most = math.log(torch.finfo(scores.dtype).max) - 1.0
        return scores.clamp(max=most).exp()


class DynamicMaskAttention(nn.Module):
    """Dynamic mask attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: Of queries.
        keep: Keys that a query keeps; as published if not given.
        kv_heads: Of keys, values and scores, dividing `heads`; all if not given.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys, values and scores have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        qk_norm: Whether the channels of each head's queries and keys are normalised (RMS).
        norm_eps: Of `qk_norm`.
        causal: A query sees keys at or before its own place, aligned bottom-right.
        rotary: Rotates queries and keys, after `qk_norm`.
        form: Of the scores.
        block_size: Keep whole blocks of so many keys (`keep_blocks`); single keys if not given.
        impl: Back-end of `attend`.
        gather: As in `dynamic_mask_attention`; with something attached to the site, `attend` runs.

    Example:
        >>> attention = DynamicMaskAttention(32, heads=4, kv_heads=2, keep=3)
        >>> attention(torch.randn(1, 5, 32)).shape
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
        keep: int = KEEP,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        causal: bool = True,
        rotary: RotaryPositions | None = None,
        form: ScoreForm = "exp",
        block_size: int | None = None,
        impl: Impl = "auto",
        gather: Gather = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(dim, heads, kv_heads, head_dim, context_dim)
        check_pattern(self, causal=causal, context=context_dim is not None)
        _check_options(keep, form, block_size)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.context_dim, self.causal, self.keep = context_dim, causal, keep
        self.form: ScoreForm = form
        self.block_size, self.rotary = block_size, rotary
        self.gather: Gather = gather
        source, width = dim if context_dim is None else context_dim, kv_heads * head_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(source, width, bias=qkv_bias)
        self.value = nn.Linear(source, width, bias=qkv_bias)
        self.query_norm = build_norm("rms" if qk_norm else None, head_dim, norm_eps)
        self.key_norm = build_norm("rms" if qk_norm else None, head_dim, norm_eps)
        self.score = nn.Linear(width, kv_heads, bias=qkv_bias)
        self.strength = nn.Parameter(torch.randn(kv_heads) * 0.02)
        self.attend = Attend(dropout=dropout, impl=impl)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: ScoredKVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            mask: True = may attend, broadcastable to (b, heads, n, m); where it differs between
                heads, each keeps keys of its own.
            padding_mask: True = real token, for the m tokens that are attended to; with a cache
                also those in it.
            positions: Of `x`, for `rotary` only; default 0, 1, ... after those in the cache.
            cache: Of a causal self-attention.
        """
        self._check_call(x, context, positions, cache)
        source = x if context is None else context
        offset = 0 if cache is None else cache.length
        query = self._heads(self.query(x), self.query_norm)
        query = self._rotated(query, positions, offset)
        places = positions if context is None else None
        key = self._rotated(self._heads(self.key(source), self.key_norm), places, offset)
        value = self._heads(self.value(source))
        scores = dynamic_scores(value, *matrix_and_bias(self.score), self.strength, form=self.form)
        if cache is not None:
            key, value, scores = cache.append_scored(key, value, scores)
        mixed = dynamic_mask_attention(
            query,
            key,
            value,
            scores,
            keep=self.keep,
            causal=self.causal,
            mask=mask,
            padding_mask=padding_mask,
            block_size=self.block_size,
            site=self.attend,
            gather=self.gather,
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> ScoredKVCache:
        """An empty cache for decoding.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        dtype = own if dtype is None else dtype
        return ScoredKVCache(
            batch, self.kv_heads, max_len, self.head_dim, dtype=dtype, device=device
        )

    def _heads(self, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
        batch, length, width = tokens.shape
        heads = tokens.view(batch, length, width // self.head_dim, self.head_dim)
        heads = heads if norm is None else norm(heads)  # here, where the channels are dense
        return heads.transpose(1, 2)

    def _rotated(self, heads: Tensor, positions: Tensor | None, offset: int) -> Tensor:
        if self.rotary is None:
            return heads
        offset = 0 if positions is not None else offset
        return cast(Tensor, self.rotary(heads, positions=positions, offset=offset))

    def _check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        positions: Tensor | None,
        cache: ScoredKVCache | None,
    ) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        if positions is not None and self.rotary is None:
            raise ValueError("positions have no effect: this attention was built without rotary")
        if context is None and self.context_dim is not None:
            raise ValueError(f"context must be given: keys are made of {self.context_dim} channels")
        if context is not None:
            check_pattern(self, causal=self.causal, context=True)
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        if cache is not None and not self.causal:
            raise ValueError("cache serves causal=True only")

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, kv_heads={self.kv_heads}, keep={self.keep}, "
            f"causal={self.causal}, form={self.form!r}"
        )


def dynamic_mask_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    scores: Float[Tensor, "b g m"],
    *,
    keep: Keep,
    causal: bool = False,
    mask: Bool[Tensor, "*#mask"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    block_size: int | None = None,
    site: Attend | None = None,
    gather: Gather = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attention of every query to the keys that it keeps, with their scores as a bias.

    Args:
        query: One row per token that asks.
        key: One row per token that may be attended to; its g heads divide h.
        value: What is averaged.
        scores: Of the keys, one per key/value head; finite.
        keep: Keys that a query keeps: a number, or "positive" (`keep_positive`).
        causal: Query i may see key j only if j <= i + m - n.
        mask: True = may attend, broadcastable to (b, h, n, m); where it differs between heads,
            each keeps keys of its own.
        padding_mask: True = real token.
        block_size: Keep whole blocks of keys.
        site: Where attention is computed, and may be watched; a plain one if not given.
        gather: Who runs a long causal call: "auto" gathers keys for the site; "torch" and "triton"
            run `kernels.gather_attention`, which holds less where gradients are needed. "flex" runs
            blocks of keys by torch's FlexAttention and `kernels.dynamic_blocks`.

    Raises:
        ValueError: Scores or masks of another shape, `keep` below 1, options that do not go with
            `gather`.
        TypeError: A mask that is not boolean.
        UnsupportedBackend: `gather` cannot run here (FlexAttention: no float64, no gradient on the
            CPU).
    """
    site = Attend() if site is None else site
    _check_gather(gather, site, causal, mask, block_size, keep)
    _check_selection(query, key, value, scores, keep, mask, padding_mask)
    queries, keys = query.shape[2], key.shape[2]
    watched = site.attachments is not None
    most = None if isinstance(keep, str) else keep
    if gather == "flex" and not (watched or block_size is None or most is None):
        return blockwise_attention(
            query,
            key,
            value,
            scores,
            keep=most,
            block_size=block_size,
            causal=causal,
            padding_mask=padding_mask,
            scale=site.scale,
        )
    dense = mask is not None or block_size is not None or watched
    compiling = torch.compiler.is_compiling()  # then no branch may depend on a length
    if not dense and most is not None:
        assert gather != "flex"
        block = max(BLOCK, most // 4)
        one = not causal or (queries == 1 and gather == "auto")
        if one and not compiling and keys > most:
            return _same_for_all(site, query, key, value, scores, padding_mask, most)
        if causal and (compiling or (queries <= keys and keys > most + block)):
            return _in_blocks(site, query, key, value, scores, padding_mask, most, block, gather)
    serves = query.shape[1] // key.shape[1]
    allowed = _allowed(query, key, mask, padding_mask, causal)
    if allowed.shape[1] > 1:  # heads that may attend to other keys keep other keys
        key, value, scores = (x.repeat_interleave(serves, dim=1) for x in (key, value, scores))
        serves = 1
    kept = keep_positive(scores, allowed) if most is None else keep_most(scores, allowed, most)
    if block_size is not None:
        seen = None
        if causal:
            seen = torch.arange(keys - queries + 1, keys + 1, device=query.device).clamp(min=0)
        kept = keep_blocks(kept, block_size, seen) & allowed
    kept, bias = (
        x.repeat_interleave(serves, dim=1) if serves > 1 else x for x in (kept, scores[:, :, None])
    )
    mixed: Tensor = site(query, key, value, mask=kept, bias=bias)
    return mixed


def _allowed(
    query: Tensor, key: Tensor, mask: Tensor | None, padding_mask: Tensor | None, causal: bool
) -> Tensor:
    """Who may attend to whom, with n rows and m columns."""
    queries, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
    if padding_mask is not None:
        allowed = allowed & padding_mask[:, None, None]
    if mask is not None:
        allowed = allowed & mask
    found = permission(allowed, causal=causal, queries=queries, keys=keys, device=query.device)
    return cast(Tensor, found)


def _same_for_all(
    site: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    padding_mask: Tensor | None,
    keep: int,
) -> Tensor:
    """Nothing tells queries apart: one set of keys serves all."""
    real = None if padding_mask is None else padding_mask[:, None]
    masked = scores.detach() if real is None else scores.detach().masked_fill(~real, -torch.inf)
    index = latest_largest(masked, keep)
    serves = query.shape[1] // key.shape[1]
    bias = scores.gather(-1, index)[:, :, None].repeat_interleave(serves, dim=1)
    mask = None
    if real is not None:
        mask = real.expand(scores.shape).gather(-1, index)[:, :, None]
        mask = mask.repeat_interleave(serves, dim=1)
    mixed: Tensor = site(query, _picked(key, index), _picked(value, index), mask=mask, bias=bias)
    return mixed


def _in_blocks(
    site: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    padding_mask: Tensor | None,
    keep: int,
    block: int,
    gather: KernelImpl,
) -> Tensor:
    """Blocks of queries as samples of a batch, each with the keys that any of its queries keeps."""
    batch, heads, queries, _ = query.shape
    compiling = torch.compiler.is_compiling()
    block = block if compiling else min(block, queries)
    real = padding_mask
    if real is None:
        real = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    index, kept = running_top(scores, real, queries, keep, block, 1 if compiling else 0)
    if gather != "auto":
        rows = split(query, block)  # (b, h, blocks, block, d), a spare one where compiled
        mixed = gather_attention(
            rows, key, value, index, kept=kept, bias=scores, scale=site.scale, impl=gather
        )
        return join(mixed, queries)
    pairs = batch * key.shape[1] * block * index.shape[3]
    if compiling or torch.is_grad_enabled() or 2 * pairs * index.shape[2] <= 3 * PAIRS:
        rows = split(query, block)
        return join(_of_blocks(site, rows, key, value, scores, index, kept), queries)
    whole, step = None, max(1, PAIRS // pairs)
    for first in range(0, index.shape[2], step):
        some = slice(first, first + step)
        tokens = slice(first * block, (first + step) * block)
        rows = split(query[:, :, tokens], block)
        part = _of_blocks(site, rows, key, value, scores, index[:, :, some], kept[:, :, some])
        if whole is None:  # tokens before heads, as what follows wants them
            whole = part.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
        whole[:, :, tokens] = join(part, whole[:, :, tokens].shape[2])
    assert whole is not None
    return whole


def _of_blocks(
    site: Attend,
    rows: Float[Tensor, "b h blocks t d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    scores: Float[Tensor, "b g m"],
    index: Int[Tensor, "b g blocks s"],
    kept: Bool[Tensor, "b g blocks t s"],
) -> Float[Tensor, "b h blocks t e"]:
    """What some blocks of queries get from the keys that `index` names."""
    batch, heads, blocks = rows.shape[:3]
    groups = index.shape[1]
    rows = rows.view(batch, groups, heads // groups, *rows.shape[2:]).transpose(2, 3)
    keys, values = (_picked(x, index).flatten(0, 2).unsqueeze(1) for x in (key, value))
    mixed = site(
        rows.flatten(0, 2),
        keys,
        values,
        mask=kept.flatten(0, 2).unsqueeze(1),
        bias=_picked(scores[..., None], index).flatten(0, 2).mT.unsqueeze(1),
        causal=False,
    )
    if torch.compiler.is_compiling():  # to split and join axes would guard the number of blocks
        head = torch.arange(heads, device=mixed.device)[:, None]
        first = torch.arange(batch, device=mixed.device)[:, None, None] * groups
        sample = (first + head // (heads // groups)) * blocks
        sample = sample + torch.arange(blocks, device=mixed.device)
        return cast(Tensor, mixed[sample, head % (heads // groups)])
    mixed = mixed.unflatten(0, (batch, groups, blocks))
    return cast(Tensor, mixed.transpose(2, 3).flatten(1, 2))


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Rows of every head, (b, g, m, d) and (b, g, *k) -> (b, g, *k, d)."""
    batch, groups, length, width = x.shape
    first = torch.arange(batch * groups, device=x.device)
    first = first.reshape(batch, groups, *[1] * (index.dim() - 2))
    if x.transpose(1, 2).is_contiguous():  # as projections make them: no need to copy them
        batches = length * (first // groups)
        first = first % groups
        rows, place = x.transpose(1, 2).reshape(-1, width), (index + batches) * groups + first
    else:
        rows, place = x.reshape(-1, width), index + length * first
    if torch.compiler.is_compiling():  # cutting what was picked into rows would guard its length
        return rows[place]
    return rows.index_select(0, place.flatten()).reshape(*index.shape, width)


def dynamic_mask_from_doge(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the attention of the published language model (Doge).

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    names |= {"q_norm": "query_norm", "k_norm": "key_norm", "dt_proj": "score"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name == "A":
            result["strength"] = tensor
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of Doge's attention")
    return result


def _check_gather(
    gather: Gather,
    site: Attend,
    causal: bool,
    mask: Tensor | None,
    block_size: int | None,
    keep: Keep,
) -> None:
    if gather not in get_args(Gather):
        raise ValueError(f"gather must be one of {get_args(Gather)}, got {gather!r}")
    if gather == "auto":
        return
    if isinstance(keep, str):
        raise ValueError(f"gather={gather!r} serves a number of kept keys, got keep={keep!r}")
    if gather == "flex":
        if block_size is None or mask is not None:
            raise ValueError("gather='flex' serves calls with block_size and without mask")
    elif not causal or mask is not None or block_size is not None:
        raise ValueError(
            f"gather={gather!r} serves causal=True without mask and block_size: "
            "other calls share their keys or need the whole map"
        )
    if site.impl != "auto" or (site.dropout and site.training):
        raise ValueError(
            f"gather={gather!r} does not run the site: its impl must be 'auto' and its dropout 0"
        )


def _check_options(keep: int, form: ScoreForm, block_size: int | None) -> None:
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be at least 1 and whole, got {keep!r}")
    if form not in get_args(ScoreForm):
        raise ValueError(f"form must be one of {get_args(ScoreForm)}, got {form!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")


def _check_selection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    keep: Keep,
    mask: Tensor | None,
    padding_mask: Tensor | None,
) -> None:
    if keep != "positive" and (not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep must be at least 1, or 'positive', got {keep!r}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels), got {tuple(x.shape)}"
            )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have the batch, heads and tokens of key {tuple(key.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if scores.shape != key.shape[:3]:
        raise ValueError(
            f"scores must be (batch, kv_heads, keys) = {tuple(key.shape[:3])}, got "
            f"{tuple(scores.shape)}"
        )
    if mask is not None:
        check_mask(mask, (*query.shape[:3], key.shape[2]))
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
