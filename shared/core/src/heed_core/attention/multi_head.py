"""Multi-head attention, to itself or to a context.

    O = concat_h softmax(scale * Q_h K_g(h)^T + bias) V_g(h) W_out

Vaswani et al., "Attention is all you need" (arXiv 1706.03762), with grouped key/value heads (arXiv
2305.13245), normalised queries and keys (arXiv 2010.04245), rotary codes, biases by distance,
sliding windows and caches as options.

Cost per head for n queries and m keys of width d: time n m d, memory n d with fused kernels.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.cache import CrossCache, KVCache, WindowCache, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.relative import RotaryPositions, distances
from heed_core.sites import Attend
from heed_core.tokens import (
    Pattern,
    check_bias,
    check_mask,
    check_padding,
    check_real,
    check_tokens,
    check_type,
)

Norm = Literal["layer", "rms"]
"""LayerNorm, or RMSNorm (no mean, no shift)."""


@runtime_checkable
class ScoreBias(Protocol):
    """A bias of scores by place: `RelativeBias`, `GridRelativeBias`, `AlibiBias`."""

    def __call__(self, queries: int, keys: int) -> Float[Tensor, "h n m"]:
        """The bias of `queries` last tokens on `keys` tokens."""


class MultiHeadAttention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context.

    Args:
        dim: Channels of a token, in and out.
        heads: Of queries.
        kv_heads: Of keys and values, dividing `heads`: each serves `heads / kv_heads` query heads.
            All if not given; 1 is multi-query attention.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        qk_norm: Normalise the channels of each head's queries and keys: "layer" or "rms".
        norm_eps: Of `qk_norm`.
        causal: A query sees keys at or before its own place, aligned bottom-right; with a context
            too, whose last tokens then stand at the places of those that ask. Without, a context is
            seen whole, as decoders see their source.
        window: A query sees itself and the `window - 1` tokens before it; needs `causal`.
        scale: Of the products; head_dim ** -0.5 if not given.
        rotary: Rotates queries and keys (after `qk_norm`); caches keep rotated keys.
        relative_bias: Called with the numbers of queries and keys, adds to the scores.
        impl: Back-end of `attend`.

    Example:
        >>> attention = MultiHeadAttention(32, heads=4, kv_heads=2, causal=True)
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
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        qk_norm: Norm | None = None,
        norm_eps: float = 1e-5,
        causal: bool = False,
        window: int | None = None,
        scale: float | None = None,
        rotary: RotaryPositions | None = None,
        relative_bias: ScoreBias | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(dim, heads, kv_heads, head_dim, context_dim)
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"window must be at least 1 and needs causal=True, got {window}")
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.context_dim, self.causal, self.window = context_dim, causal, window
        source = dim if context_dim is None else context_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(source, kv_heads * head_dim, bias=qkv_bias)
        self.query_norm = build_norm(qk_norm, head_dim, norm_eps)
        self.key_norm = build_norm(qk_norm, head_dim, norm_eps)
        self.rotary = rotary
        self.relative_bias = relative_bias
        self.attend = Attend(causal=causal, scale=scale, dropout=dropout, impl=impl)
        self.out = nn.Linear(heads * head_dim, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        value: Float[Tensor, "b m k"] | None = None,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "#b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        context_positions: Real[Tensor, "*m"] | None = None,
        cache: KVCache | WindowCache | CrossCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            value: What values are made of, where it is not what keys are made of (keys with a
                position code, values without).
            mask: True = may attend, broadcastable to (b, heads, n, m).
            padding_mask: True = real token, for the m tokens that are attended to; with a cache
                also those in it.
            bias: Added to the scores, broadcastable to (b, heads, n, m).
            positions: Of `x`, for `rotary` only; default 0, 1, ... after those in the cache.
            context_positions: Of the context, for `rotary` only; default 0, 1, ...
            cache: `KVCache` or `WindowCache` of a causal self-attention: m counts its tokens too;
                `CrossCache` of a cross-attention: the context is read at the first call only. Where
                it holds one row, later calls may have any number of rows: all see that context
                (many samples of one scene), and `padding_mask` has that one row.
        """
        self._check_call(x, context, value, cache)
        if self.rotary is None and not (positions is None and context_positions is None):
            raise ValueError("positions have no effect: this attention was built without rotary")
        offset = cache.length if isinstance(cache, KVCache | WindowCache) else 0
        query = self._heads(self.query(x), self.query_norm)
        query = self._rotated(query, positions, offset)
        if isinstance(cache, CrossCache) and cache.filled:
            key, values = cache.get()
        else:
            if context is not None:
                positions, offset = context_positions, 0
            source = x if context is None else context
            key = self._heads(self.key(source), self.key_norm)
            key = self._rotated(key, positions, offset)
            values = self._heads(self.value(source if value is None else value))
            if isinstance(cache, CrossCache):
                cache.store(key, values)
            elif cache is not None:
                key, values = cache.append(key, values)
        rows = query.shape[0]
        shared = isinstance(cache, CrossCache) and key.shape[0] == 1 < rows
        if shared:
            if mask is not None or bias is not None:
                raise ValueError("mask and bias have no effect on rows that share a cached context")
            query = query.transpose(0, 1).flatten(1, 2)[None]  # (1, h, b n, d)
        if padding_mask is not None and isinstance(cache, WindowCache):
            padding_mask = _within(padding_mask, cache, key)
        mask = self._permission(mask, padding_mask, query, key)
        if self.relative_bias is not None:
            relative = self.relative_bias(query.shape[2], key.shape[2])
            if bias is not None:
                check_bias(bias, (*query.shape[:3], key.shape[2]))
            bias = relative if bias is None else relative + bias
        mixed: Tensor = self.attend(query, key, values, mask=mask, bias=bias)
        if shared:
            mixed = mixed.view(self.heads, rows, -1, mixed.shape[-1]).transpose(0, 1)
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> KVCache | WindowCache:
        """An empty cache for decoding.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold; a window needs no more than itself.
            dtype: Of keys and values; that of the weights if not given (under autocast, give
                autocast's).
        """
        own, device = type_and_place(self.key)
        make = KVCache if self.window is None else WindowCache
        size = max_len if self.window is None else self.window
        return make(
            batch,
            self.kv_heads,
            size,
            self.head_dim,
            dtype=own if dtype is None else dtype,
            device=device,
        )

    def _heads(self, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
        batch, length, width = tokens.shape
        heads = tokens.view(batch, length, width // self.head_dim, self.head_dim)
        heads = heads if norm is None else norm(heads)  # here, where the channels are dense
        return heads.transpose(1, 2)

    def _rotated(self, heads: Tensor, positions: Tensor | None, offset: int) -> Tensor:
        if self.rotary is None:
            return heads
        if positions is not None:
            offset = 0
        return cast(Tensor, self.rotary(heads, positions=positions, offset=offset))

    def _permission(
        self, mask: Tensor | None, padding_mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        if mask is not None:
            check_mask(mask, (*query.shape[:3], key.shape[2]))
        parts = [] if mask is None else [mask]
        if padding_mask is not None:
            check_padding(padding_mask, key.shape[0], key.shape[2])
            parts.append(padding_mask[:, None, None])
        if self.window is not None:
            away = distances(query.shape[2], key.shape[2], device=query.device)
            parts.append(away > -self.window)
        if not parts:
            return None
        total = parts[0]
        for part in parts[1:]:
            total = total & part
        return total

    def _check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        value: Tensor | None,
        cache: KVCache | WindowCache | CrossCache | None,
    ) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        stored = isinstance(cache, CrossCache) and cache.filled
        if context is None and self.context_dim is not None and not stored:
            raise ValueError(f"context must be given: keys are made of {self.context_dim} channels")
        if context is not None:
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        source = x if context is None else context
        if value is not None and value.shape != source.shape:
            raise ValueError(
                f"value must have the shape {tuple(source.shape)} of what is attended to, got "
                f"{tuple(value.shape)}"
            )
        check_real(value=value)
        check_type(self.value, value=value)
        if isinstance(cache, CrossCache):
            if context is None and not stored:
                raise ValueError("a CrossCache needs a context at the first call")
        elif cache is not None and (context is not None or not self.causal):
            raise ValueError(
                f"a {type(cache).__name__} serves causal self-attention only; a context has a "
                "CrossCache"
            )

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def _within(padding_mask: Tensor, cache: WindowCache, key: Tensor) -> Tensor:
    """Of a mask of all tokens so far, those that are still there."""
    told = padding_mask.dim() == 2 and padding_mask.shape[1] == cache.length
    return padding_mask[:, cache.length - key.shape[2] :] if told else padding_mask


def check_heads(
    dim: int, heads: int, kv_heads: int, head_dim: int | None, context_dim: int | None = None
) -> None:
    """Raise a ValueError for widths and numbers of heads that do not fit."""
    if context_dim is not None and context_dim < 1:
        raise ValueError(f"context_dim must be at least 1, got {context_dim}")
    if dim < 1 or heads < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"dim, heads and head_dim must be at least 1, got {dim, heads, head_dim}")
    if head_dim is None and dim % heads:
        raise ValueError(f"heads must divide dim={dim} unless head_dim is given, got {heads}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")


def build_norm(kind: Norm | None, width: int, eps: float) -> nn.Module:
    """A norm over the last axis, or the identity."""
    if kind is None:
        return nn.Identity()
    if kind not in ("layer", "rms"):
        raise ValueError(f"a norm must be 'layer' or 'rms', got {kind!r}")
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else LeanRMSNorm(width, eps=eps)


class LeanRMSNorm(nn.RMSNorm):
    """torch's norm, which on the CPU makes three tensors as large as its input; here it makes one.

    Where gradients are needed, in half precision and in graphs it is torch's.
    """

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Divide each row by the root of its mean square."""
        exact = x.dtype in (torch.float32, torch.float64) and x.dtype == self.weight.dtype
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.is_cpu and exact):
            normed: Tensor = super().forward(x)
            return normed
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        assert self.eps is not None
        scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        scaled: Tensor = (x * scale).mul_(self.weight)
        return scaled
