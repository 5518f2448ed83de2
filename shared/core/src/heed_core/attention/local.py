"""Local attention: a token attends to the tokens near it.

    o_i = softmax over j of (scale * q_i . k_j) v_j,   |i - j| <= window          (not causal)
                                                       i - window < j <= i        (causal)

Exact softmax attention within the window: Zhang et al., "CAB: comprehensive attention benchmarking
on long sequence modeling" (arXiv 2210.07661), whose definitions of the window these are. Places
before the first and after the last token and padding are never attended to.

Cost per head for n tokens, window w and blocks of B = max(16, w) tokens: time n (B + 2 w) d, memory
n (1 + 2 w / B) d: blocks of queries are samples of a batch with the keys that any of them sees.
Observed or steered, the whole map is made: time n^2 d.

The site is `attend`: weights (b, h, n, m), zero outside the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core import masks
from heed_core.attention.projected import (
    ProjectedAttention,
    check_positive,
    rename_projections,
)
from heed_core.cache import WindowCache, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.recurrence import join, split
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_mask, check_padding

BLOCK = 16
"""Least queries of a block."""


def local_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    window: int,
    causal: bool = False,
    mask: Bool[Tensor, "*#mask"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    site: Attend | None = None,
) -> Float[Tensor, "b h n e"]:
    """Softmax attention within a window.

    Args:
        query: One row per token that asks.
        key: One row per token that may be attended to. Query i stands at place i + m - n.
        value: What is averaged.
        window: Tokens seen on either side; causal, tokens seen in all, the own one included.
        causal: Nothing after the own place is seen.
        mask: True = may attend, broadcastable to (b, h, n, m).
        padding_mask: True = real token.
        site: Where attention is computed, and may be watched; a plain one if not given.

    Raises:
        ValueError: A window below 1, or shapes that do not fit.
        TypeError: A mask that is not boolean.
    """
    check_positive(window=window)
    if value.dim() == key.dim() == 4 and value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have the batch, heads and tokens of key {tuple(key.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    if mask is not None:
        check_mask(mask, (*query.shape[:3], key.shape[2]))
    site = Attend() if site is None else site
    left, right = (window - 1, 0) if causal else (window, window)
    n, m = query.shape[2], key.shape[2]
    # Fewer queries than keys is decoding; where compiled, no branch may depend on a length.
    long = torch.compiler.is_compiling() or n > max(BLOCK, left)
    if site.attachments is None and query.dim() == key.dim() == 4 and n == m and long:
        return _in_blocks(site, query, key, value, left, right, mask, padding_mask)
    near = masks.window(n, m, left=left, right=right, device=query.device)
    real = None if padding_mask is None else masks.keys(padding_mask)
    mixed: Tensor = site(query, key, value, mask=masks.combine(near, mask, real), causal=False)
    return mixed


def _in_blocks(
    site: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    left: int,
    right: int,
    mask: Tensor | None,
    padding_mask: Tensor | None,
) -> Tensor:
    batch, _, length, _ = query.shape
    size = max(BLOCK, left)
    rows = split(query, size)  # (b, h, blocks, size, d)
    blocks = rows.shape[2]
    own = torch.arange(size, device=query.device)
    near = torch.arange(-left, size + right, device=query.device)
    place = size * torch.arange(blocks, device=query.device)[:, None] + near  # (blocks, keys)
    inside = (place >= 0) & (place < length)
    place = place.clamp(0, max(length - 1, 0))
    away = near - own[:, None]
    allowed = ((away >= -left) & (away <= right)) & inside[:, None]  # (blocks, size, keys)
    if padding_mask is not None:
        allowed = allowed & padding_mask[:, place][:, :, None]  # (b, blocks, size, keys)
    allowed = allowed.expand(batch, blocks, size, near.shape[0])[:, :, None]
    if mask is not None:
        asking = size * torch.arange(blocks, device=query.device)[:, None] + own
        whole = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape).expand(-1, -1, length, length)
        asking = asking.clamp(0, max(length - 1, 0))
        allowed = allowed & whole[:, :, asking[:, :, None], place[:, None]].transpose(1, 2)
    mixed: Tensor = site(
        rows.transpose(1, 2).flatten(0, 1),
        *(x.transpose(1, 2)[:, place].flatten(0, 1).transpose(1, 2) for x in (key, value)),
        mask=allowed.flatten(0, 1),
        causal=False,
    )
    return join(mixed.reshape(batch, blocks, *mixed.shape[1:]).transpose(1, 2), length)


class LocalAttention(ProjectedAttention):
    """Local attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        window: Tokens seen on either side; causal, tokens seen in all, the own one included.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Not served: a number raises `UnsupportedPattern`.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        causal: Nothing after the own place is seen.
        impl: Back-end of `attend`.

    Example:
        >>> attention = LocalAttention(32, heads=4, window=2)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: int = 15,
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
        check_positive(window=window)
        self.window = window
        self.attend = Attend(dropout=dropout, impl=impl)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: WindowCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            mask: True = may attend, broadcastable to (b, heads, n, m), m = n; with a cache m counts
                all tokens before, too.
            padding_mask: True = real token, for all tokens so far: with a cache also those before.
            cache: From `new_cache`, for decoding; `causal` only.
        """
        past = 0 if cache is None else cache.length
        self.check_call(x, None, padding_mask, cached=cache is not None, past=past)
        if mask is not None:
            check_mask(mask, (x.shape[0], self.heads, x.shape[1], past + x.shape[1]))
        query, key, value = self.project(x, None)
        if cache is not None:
            key, value = cache.append(key, value)
            gone = past + x.shape[1] - key.shape[2]
            if padding_mask is not None:
                padding_mask = padding_mask[:, gone:]
            if mask is not None and mask.dim() and mask.shape[-1] > 1:
                mask = mask[..., gone:]
        mixed = local_attention(
            query,
            key,
            value,
            window=self.window,
            causal=self.causal,
            mask=mask,
            padding_mask=padding_mask,
            site=self.attend,
        )
        return self.join(mixed, x)

    def new_cache(self, batch: int, *, dtype: torch.dtype | None = None) -> WindowCache:
        """An empty cache for decoding: the last `window` tokens.

        Args:
            batch: Sequences decoded together.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        dtype = own if dtype is None else dtype
        return WindowCache(
            batch, self.heads, self.window, self.head_dim, dtype=dtype, device=device
        )


def local_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's local attention.

    Raises:
        ValueError: A name that it does not have.
    """
    return rename_projections(state, {}, "CAB's local attention")
