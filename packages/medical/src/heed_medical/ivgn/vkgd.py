"""Visual knowledge-guided decoder: each word weighs what it sees against what was written.

    t  = SelfAttention(LN1 x)           from the words before
    x1 = x + t
    v  = CrossAttention(LN2 x1, image)  from the image
    b  = sigmoid(W_g [LN2 x1; v] + b_g) within (0, 1), per channel
    x2 = x1 + b v + (1 - b) t
    x3 = x2 + FFN(LN3 x2)

Zheng et al. (arXiv 2402.03754) say that the decoder weighs vision against the text before; the
formulas are a reconstruction. With b = 1 this is a pre-norm Transformer decoder (arXiv 1706.03762),
with b = 0 the image has no influence. The mean of b is the visual reliance of a word. b_g starts at
2, so that b is about 0.88: mostly visual. Cost per word: linear in the words before and in the
tokens of the image.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.blocks import BlockConfig, FeedForward
from heed_core.cache import CrossCache, KVCache, LayerCache, StackCache

GATE_START = 2.0


class GuidedDecoderBlock(nn.Module):
    """One block of the decoder.

    Args:
        config: dim, heads, hidden, activation, dropout, attention_dropout and impl are used.
        gate: False leaves b out: x2 = x1 + v, the plain Transformer decoder.
    """

    def __init__(self, config: BlockConfig, *, gate: bool = True) -> None:
        super().__init__()
        dim = config.dim
        heads, dropout, impl = config.heads, config.attention_dropout, config.impl
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = MultiHeadAttention(
            dim, heads=heads, dropout=dropout, causal=True, impl=impl
        )
        self.image_norm = nn.LayerNorm(dim)
        self.image_attention = MultiHeadAttention(
            dim, heads=heads, dropout=dropout, context_dim=dim, impl=impl
        )
        self.gate = nn.Linear(2 * dim, dim) if gate else None
        self.feed_norm = nn.LayerNorm(dim)
        self.feed = FeedForward(
            dim, hidden=config.hidden, activation=config.activation, dropout=config.dropout
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        image: Float[Tensor, "b m c"] | None,
        *,
        image_mask: Bool[Tensor, "b m"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Transform words.

        Args:
            x: Words.
            image: Tokens of the image; not needed once the cache holds them.
            image_mask: True = a token of a view that is there.
            cache: Of this block.

        Returns:
            The words, and how much each relied on the image (1 without a gate).
        """
        own, other = (None, None) if cache is None else (cache.own, cache.context)
        text = self.self_attention(self.self_norm(x), cache=own)
        x = x + self.dropout(text)
        query = self.image_norm(x)
        seen = self.image_attention(query, image, padding_mask=image_mask, cache=other)
        if self.gate is None:
            x, reliance = x + self.dropout(seen), torch.ones_like(x[..., 0])
        else:
            share = torch.sigmoid(self.gate(torch.cat([query, seen], dim=-1)))
            x = x + self.dropout(share * seen + (1 - share) * text)
            reliance = share.mean(-1)
        return x + self.dropout(self.feed(self.feed_norm(x))), reliance


class GuidedDecoder(nn.Module):
    """A stack of guided blocks and a final norm.

    Args:
        config: As of `GuidedDecoderBlock`.
        depth: Number of blocks.
        gate: As of `GuidedDecoderBlock`.
    """

    def __init__(self, config: BlockConfig, *, depth: int, gate: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GuidedDecoderBlock(config, gate=gate) for _ in range(depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        image: Float[Tensor, "b m c"] | None,
        *,
        image_mask: Bool[Tensor, "b m"] | None = None,
        cache: StackCache | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n"]]:
        """Transform words; the reliance is the mean over the blocks."""
        reliance = []
        for index, layer in enumerate(self.layers):
            x, share = layer(
                x, image, image_mask=image_mask, cache=None if cache is None else cache[index]
            )
            reliance.append(share)
        return cast(Tensor, self.norm(x)), torch.stack(reliance).mean(0)

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> StackCache:
        """An empty cache for `batch` reports of at most `max_len` words."""
        layers = []
        for layer in self.layers:
            assert isinstance(layer, GuidedDecoderBlock)
            own = layer.self_attention.new_cache(batch, max_len, dtype=dtype)
            assert isinstance(own, KVCache)
            layers.append(LayerCache(own, CrossCache()))
        return StackCache(layers)
