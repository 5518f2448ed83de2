"""Relative convolutional attention: short convolutions along time, learned relative positions.

    q, k, v = conv(W_q x), conv(W_k x), conv(W_v x)         per channel of a head, shared by heads
    score_ij = d^-1/2 ((q_i + u) . k_j + q_i . E_(j-i) + beta_(j-i))

E, beta and u are learned per head, E and beta for every offset of the key from the query up to
`max_distance`. Sugiharto et al., "RCMHA" (arXiv 2308.03429); the convolution of heads is Primer's
(arXiv 2109.08668), the terms are those of Transformer-XL (arXiv 1901.02860) with learned vectors
for its sinusoids. The memory of earlier segments is its too: keys and values are made of memory
and segment, queries of the segment.

Cost per head for n queries and m keys: time n m d + n (n + m) d, memory n (n + m): every query
scores every offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed_core.attend import default_scale
from heed_core.attention.multi_head import check_heads
from heed_core.cache import KVCache, check_sequences, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.recurrence import check_recurrence
from heed_core.relative import distances
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_shape, check_tokens, with_padding

ConvContext = Literal["memory", "segment"]
"""What a query's convolution sees before its segment: the memory, or zeros as in the published code
(where keys and values see the memory all the same)."""

Taps = tuple[Float[Tensor, "d k"], Float[Tensor, " d"] | None]
"""Weight and bias of a `depthwise_conv`."""


def depthwise_conv(
    x: Float[Tensor, "b h n d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    *,
    before: Float[Tensor, "b h s d"] | None = None,
    causal: bool = True,
) -> Float[Tensor, "b h n d"]:
    """Convolve every channel along tokens: y_t = b + sum_s w_s x_(t - k + 1 + s).

    Args:
        x: Tokens.
        weight: Per channel, the same for all heads; the last entry meets the token itself.
        bias: Per channel.
        before: The k - 1 tokens before; zeros if not given.
        causal: Otherwise the kernel, of odd length, is centred, with zeros on both sides.

    Raises:
        ValueError: A centred kernel of even length, other tokens before than the kernel reaches.
    """
    width, length = weight.shape[1], x.shape[2]
    if not causal and (width % 2 == 0 or before is not None):
        raise ValueError(
            f"causal=False needs an odd number of taps and nothing before, got weight "
            f"{tuple(weight.shape)}{'' if before is None else ' and before'}"
        )
    if before is not None and before.shape != (*x.shape[:2], width - 1, x.shape[3]):
        raise ValueError(
            f"before must be {(*x.shape[:2], width - 1, x.shape[3])}, got {tuple(before.shape)}"
        )
    if causal:
        padded = F.pad(x, (0, 0, width - 1, 0)) if before is None else torch.cat([before, x], dim=2)
    else:
        padded = F.pad(x, (0, 0, width // 2, width // 2))
    total = padded[:, :, :length] * weight[:, 0]
    for tap in range(1, width):
        total = total + padded[:, :, tap : tap + length] * weight[:, tap]
    return total if bias is None else total + bias


def relative_scores(
    query: Float[Tensor, "b h n d"],
    embedding: Float[Tensor, "rows h d"],
    bias: Float[Tensor, "rows h"],
    keys: int,
) -> Float[Tensor, "b h n m"]:
    """q_i . E_(j-i) + beta_(j-i) for queries at the last n of m places.

    Args:
        query: Of the last n tokens.
        embedding: E, row rows / 2 + j - i.
        bias: beta, likewise.
        keys: m.
    """
    queries, centre = query.shape[2], embedding.shape[0] // 2
    rows = slice(centre - keys + 1, centre + queries)  # offsets 1 - m ... n - 1
    terms = query @ embedding[rows].permute(1, 2, 0) + bias[rows].T[:, None]
    index = distances(queries, keys, device=query.device) + keys - 1
    return terms.gather(-1, index.expand(*query.shape[:2], -1, -1))


ROLLBACK = 16
"""Tokens that a cache can take back unless told otherwise."""


class ConvKVCache(KVCache):
    """Keys and values of all tokens, and the last tokens before their convolution.

    Args:
        batch: Sequences decoded together.
        heads: Of keys and values.
        max_len: Tokens that fit.
        head_dim: Channels of a head.
        tail: Tokens that a convolution looks back.
        rollback: Tokens that `crop` can take back, besides all of them.
        dtype: Of keys and values.
        device: Where the memory is.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        max_len: int,
        head_dim: int,
        *,
        tail: int,
        rollback: int = ROLLBACK,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(batch, heads, max_len, head_dim, dtype=dtype, device=device)
        if rollback < 0:
            raise ValueError(f"rollback must be at least 0, got {rollback}")
        self.tail, self.rollback, self._known = tail, rollback, rollback
        self.tails: Float[Tensor, "b 3 h s d"] = torch.zeros(
            batch, 3, heads, rollback + tail, head_dim, dtype=dtype, device=device
        )

    def shift(self, rows: Float[Tensor, "b 3 h n d"]) -> Float[Tensor, "b 3 h s d"]:
        """The tail of queries, keys and values before these tokens, which it then ends with."""
        size = self.tails.shape[3]
        before = self.tails[:, :, :, size - self.tail :]
        joined = torch.cat([self.tails, rows], dim=3)
        self.tails = joined[:, :, :, joined.shape[3] - size :].clone()
        self._known = min(self.rollback, self._known + rows.shape[3])
        return before

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens only.

        Raises:
            ValueError: More are taken back than `rollback`, and not all.
        """
        before, taken = self.length, self.length - length
        if length > 0 and taken > self._known:
            raise ValueError(
                f"cannot crop {before} tokens to {length}: {self._known} can be taken back, or "
                "all; make the cache with a larger rollback, or clone it before"
            )
        super().crop(length)
        size = self.tails.shape[3]
        self.tails = F.pad(self.tails[:, :, :, : max(0, size - taken)], (0, 0, min(taken, size), 0))
        if before > self._known + self.tail:  # else what came in is what was before the first token
            self._known -= taken
        if length == 0:
            self._known = self.rollback

    def reorder(self, index: Int[Tensor, " rows"]) -> None:
        """Put row `index[i]` at row i; another number of rows changes the batch."""
        super().reorder(index)
        self.tails = self.tails.index_select(0, index)

    def clone(self) -> ConvKVCache:
        """A copy that shares no memory."""
        twin = cast(ConvKVCache, super().clone())
        twin.tails = self.tails.clone()
        return twin


@restores_cache
def relative_conv_attention(
    query: Float[Tensor, "b h t d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m d"],
    taps: tuple[Taps, Taps, Taps],
    query_bias: Float[Tensor, "h d"],
    embedding: Float[Tensor, "rows h d"],
    offset_bias: Float[Tensor, "rows h"],
    *,
    context: int = 0,
    causal: bool = True,
    mask: Bool[Tensor, "*#mask"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    cache: ConvKVCache | None = None,
    site: Attend | None = None,
) -> Float[Tensor, "b h n d"]:
    """Convolve queries, keys and values along tokens, then attend with relative positions.

    Args:
        query: Of the last n tokens, after `context` ones, before their convolution as the others.
        key: Of all tokens, memory first; with a cache of those after it.
        value: As `key`.
        taps: Of the convolutions of queries, keys and values.
        query_bias: u.
        embedding: E, row rows / 2 + j - i.
        offset_bias: beta, likewise.
        context: First rows of `query`, which its convolution sees and which do not ask.
        causal: A query sees keys at or before its own place, and convolutions look back only;
            otherwise they are centred.
        mask: True = may attend, broadcastable to (b, h, n, m).
        padding_mask: True = real token, for all m tokens, with a cache also those in it;
            convolutions take others for zeros.
        cache: For decoding: tokens before these, which are added to it.
        site: Where attention is computed, and may be watched; a plain one if not given.

    Raises:
        ValueError: Shapes that do not fit, more tokens than half the rows of `embedding`, a cache
            that is not causal.
        TypeError: A mask that is not boolean.
    """
    site = Attend() if site is None else site
    keys = key.shape[2] + (0 if cache is None else cache.length)
    _check_rows(query, key, value, taps, context)
    _check_tables(query, query_bias, embedding, offset_bias, keys)
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], keys, of="memory and segment")
    if cache is not None and not causal:
        raise ValueError("cache serves causal=True only")
    rows = [_cleared(x, padding_mask) for x in (query, key, value)]
    before: tuple[Tensor | None, ...] = (None, None, None)
    if cache is not None:
        check_sequences(cache, key.shape[0])
        before = cache.shift(torch.stack(rows, dim=1)).unbind(1)
    query, key, value = (
        depthwise_conv(row, *pair, before=seen, causal=causal)
        for row, pair, seen in zip(rows, taps, before, strict=True)
    )
    query = query[:, :, context:]
    if cache is not None:
        key, value = cache.append(key, value)
    mask = with_padding(mask, padding_mask, key, heads=key.shape[1], queries=query.shape[2])
    relative = relative_scores(query, embedding, offset_bias, key.shape[2])
    scale = default_scale(query) if site.scale is None else site.scale
    mixed: Tensor = site(
        query + query_bias[:, None], key, value, mask=mask, bias=relative * scale, causal=causal
    )
    return mixed


class DepthwiseConv(nn.Module):
    """`depthwise_conv` with its weights; begins as the identity with a little noise.

    Args:
        width: Channels of a head.
        kernel: Tokens that it sees.
        causal: Whether it looks back only.
    """

    def __init__(self, width: int, *, kernel: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.weight = nn.Parameter(torch.randn(width, kernel) * 0.02)
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.weight[:, -1 if causal else kernel // 2] += 1.0

    @property
    def taps(self) -> Taps:
        """Weight and bias."""
        return self.weight, self.bias

    def forward(
        self, x: Float[Tensor, "b h n d"], before: Float[Tensor, "b h s d"] | None = None
    ) -> Float[Tensor, "b h n d"]:
        """Convolve tokens after those `before`."""
        return depthwise_conv(x, *self.taps, before=before, causal=self.causal)

    def extra_repr(self) -> str:
        """Show the options."""
        width, kernel = self.weight.shape
        return f"width={width}, kernel={kernel}, causal={self.causal}"


class RelativeConvAttention(nn.Module):
    """Relative convolutional attention of a segment to itself and to a memory before it.

    The site is `attend`: weights (b, h, n, m), memory first.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head; dim / heads if not given.
        kernel: Tokens that a convolution sees; odd if not `causal`.
        max_distance: Largest distance between tokens, memory included, plus 1.
        value_bias: Whether values have a bias. Queries and keys have none: u and beta stand for it.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        causal: A query sees keys at or before its own place, and convolutions look back only;
            otherwise they are centred.
        conv_context: What a query's convolution sees before its segment.
        impl: Back-end of `attend`.

    Example:
        >>> attention = RelativeConvAttention(32, heads=4)
        >>> attention(torch.randn(1, 5, 32), torch.randn(1, 7, 32)).shape
        torch.Size([1, 5, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        kernel: int = 3,
        max_distance: int = 4096,
        value_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = True,
        conv_context: ConvContext = "memory",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        _check_options(kernel, max_distance, causal, conv_context)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim, self.kernel = dim, heads, head_dim, kernel
        self.max_distance, self.causal, self.conv_context = max_distance, causal, conv_context
        width = heads * head_dim
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(dim, width, bias=False)
        self.value = nn.Linear(dim, width, bias=value_bias)
        self.query_conv = DepthwiseConv(head_dim, kernel=kernel, causal=causal)
        self.key_conv = DepthwiseConv(head_dim, kernel=kernel, causal=causal)
        self.value_conv = DepthwiseConv(head_dim, kernel=kernel, causal=causal)
        self.query_bias = nn.Parameter(torch.zeros(heads, head_dim))
        self.offset_embedding = nn.Parameter(torch.zeros(2 * max_distance, heads, head_dim))
        self.offset_bias = nn.Parameter(torch.zeros(2 * max_distance, heads))
        self.attend = Attend(causal=causal, dropout=dropout, impl=impl)
        self.out = nn.Linear(width, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b s c"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: ConvKVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: The segment.
            memory: Tokens before it, as this layer saw them; causal only.
            mask: True = may attend, broadcastable to (b, heads, n, m), m = s + n.
            padding_mask: True = real token, for memory and segment; convolutions take others for
                zeros. With a cache, for all tokens so far.
            cache: For decoding, instead of a memory: one forward and many steps then agree.
        """
        self._check_call(x, memory, cache)
        source = x if memory is None else torch.cat([memory, x], dim=1)
        asks = x
        if memory is not None and self.conv_context == "memory":
            asks = source[:, max(0, memory.shape[1] - self.kernel + 1) :]
        mixed = relative_conv_attention(
            self._heads(self.query(asks)),
            self._heads(self.key(source)),
            self._heads(self.value(source)),
            (self.query_conv.taps, self.key_conv.taps, self.value_conv.taps),
            self.query_bias,
            self.offset_embedding,
            self.offset_bias,
            context=asks.shape[1] - x.shape[1],
            causal=self.causal,
            mask=mask,
            padding_mask=padding_mask,
            cache=cache,
            site=self.attend,
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def new_cache(
        self,
        batch: int,
        max_len: int,
        *,
        rollback: int = ROLLBACK,
        dtype: torch.dtype | None = None,
    ) -> ConvKVCache:
        """An empty cache for decoding.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            rollback: Tokens that `crop` can take back, besides all of them.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        return ConvKVCache(
            batch,
            self.heads,
            max_len,
            self.head_dim,
            tail=self.kernel - 1,
            rollback=rollback,
            dtype=own if dtype is None else dtype,
            device=device,
        )

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

    def _check_call(self, x: Tensor, memory: Tensor | None, cache: ConvKVCache | None) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        if memory is not None:
            check_tokens("memory", memory, self.dim, batch=x.shape[0], layer=self.key)
        if (memory is not None or cache is not None) and not self.causal:
            raise ValueError("memory and cache serve causal=True only")
        if memory is not None and cache is not None:
            raise ValueError("a cache holds what is before x: memory must not be given beside it")

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, head_dim={self.head_dim}, kernel={self.kernel}, "
            f"max_distance={self.max_distance}, conv_context={self.conv_context!r}"
        )


def relative_conv_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights.

    Raises:
        ValueError: A name that the published module does not have.
    """
    names = {
        "output.weight": "out.weight",
        "output.bias": "out.bias",
        "key_pos_embeddings": "offset_embedding",
        "key_pos_bias": "offset_bias",
        "query_pos_bias": "query_bias",
    }
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            names[f"{part}.0.linear.{kind}"] = f"{part}.{kind}"
            names[f"{part}.1.conv.{kind}"] = f"{part}_conv.{kind}"
    if unknown := sorted(set(state) - set(names)):
        raise ValueError(f"{unknown[0]!r} is no weight of the published relative attention")
    return {
        names[name]: tensor.squeeze(1) if name.endswith("conv.weight") else tensor
        for name, tensor in state.items()
    }


def _cleared(heads: Tensor, real: Tensor | None) -> Tensor:
    """Zeros for padding, of the last tokens that `real` tells about."""
    if real is None:
        return heads
    last = real[:, real.shape[1] - heads.shape[2] :]
    return heads.masked_fill(~last[:, None, :, None], 0.0)


def _check_rows(
    query: Tensor, key: Tensor, value: Tensor, taps: tuple[Taps, Taps, Taps], context: int
) -> None:
    check_recurrence(query, key, value, same_length=False)
    if value.shape != key.shape:
        raise ValueError(f"value must be {tuple(key.shape)} as key, got {tuple(value.shape)}")
    width, length = key.shape[3], taps[0][0].shape[-1]
    for weight, bias in taps:
        check_shape("weights of taps", weight, (width, length), "channels, kernel")
        if bias is not None:
            check_shape("biases of taps", bias, (width,), "channels")
    if not 0 <= context <= query.shape[2]:
        raise ValueError(
            f"context must be from 0 to {query.shape[2]}, the rows of query, got {context}"
        )


def _check_tables(
    query: Tensor, query_bias: Tensor, embedding: Tensor, offset_bias: Tensor, keys: int
) -> None:
    heads, width = query.shape[1], query.shape[3]
    check_shape("query_bias", query_bias, (heads, width), "heads, channels")
    check_shape("embedding", embedding, (None, heads, width), "rows, heads, channels")
    check_shape("offset_bias", offset_bias, (embedding.shape[0], heads), "rows, heads")
    if keys > embedding.shape[0] // 2:
        raise ValueError(
            f"key, with what precedes it, must be at most max_distance={embedding.shape[0] // 2} "
            f"tokens, got {keys}: embedding has {embedding.shape[0]} rows"
        )


def _check_options(kernel: int, max_distance: int, causal: bool, conv_context: ConvContext) -> None:
    if kernel < 1 or (not causal and kernel % 2 == 0):
        raise ValueError(f"kernel must be at least 1, and odd if not causal, got {kernel}")
    if max_distance < 1:
        raise ValueError(f"max_distance must be at least 1, got {max_distance}")
    if conv_context not in get_args(ConvContext):
        raise ValueError(
            f"conv_context must be one of {get_args(ConvContext)}, got {conv_context!r}"
        )
