"""Read-out of a token map by learned queries: what does each query find, wherever it lies?

    q_r = LN(s_r) + e_r,   k_i = x_i + p_i,   v_i = x_i
    t_r = s_r + MHA(q_r, k, v);   t_r = LN(t_r + W2 relu(W1 LN(t_r)))

with a learned code e_r per query, a start s_r that is 0 unless given, tokens x_i and their position
codes p_i. Queries do not see each other, so each one's result depends on its own code alone. One
pre-norm decoder layer of DETR (arXiv 2005.12872) without self-attention, as in Adeli et al.,
"Transformer brain encoders" (arXiv 2505.17329).

`factorised_pool` is the same with maps that do not depend on the content: a fixed receptive field.

Cost for q queries and n tokens of width d: time (q + n) d^2 + q n d, memory (q + n) d.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.blocks import FeedForward
from heed_core.impl import Impl
from heed_core.tokens import Pattern, check_real, check_tokens, check_type


def factorised_pool(
    features: Float[Tensor, "b n c"], maps: Float[Tensor, "q n"]
) -> Float[Tensor, "b q c"]:
    """Weighted sums of tokens, z_q = sum_i maps_qi x_i, with the same weights for every input.

    Args:
        features: Tokens.
        maps: Weights of the tokens, a row per result; rows that sum to 1 give means.
    """
    if features.dim() != 3 or maps.dim() != 2 or features.shape[1] != maps.shape[1]:
        raise ValueError(
            f"maps must be (results, tokens) for features (batch, tokens, channels), got "
            f"{tuple(maps.shape)} for {tuple(features.shape)}"
        )
    return torch.einsum("qn,bnc->bqc", maps, features)


class CrossAttentionReadout(nn.Module):
    """Learned queries attend to tokens; each gives one vector.

    Args:
        queries: How many.
        dim: Channels of tokens and results.
        heads: Of the attention.
        ffn: Channels inside the feed-forward.
        value_pos: Whether values carry the position code too; keys always do.
        dropout: Of weights and of what is added to the residual, in training.
        impl: Back-end of `attend`.

    Example:
        >>> readout = CrossAttentionReadout(5, 32, heads=4, ffn=64)
        >>> readout(torch.randn(2, 35, 32), positions=torch.randn(35, 32)).shape
        torch.Size([2, 5, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"cross"})

    def __init__(
        self,
        queries: int,
        dim: int,
        *,
        heads: int,
        ffn: int,
        value_pos: bool = False,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if queries < 1 or ffn < 1:
            raise ValueError(f"queries and ffn must be at least 1, got {queries} and {ffn}")
        self.dim, self.value_pos = dim, value_pos
        self.codes = nn.Parameter(torch.empty(queries, dim))
        self.query_norm = nn.LayerNorm(dim)
        self.attention = MultiHeadAttention(
            dim, heads=heads, context_dim=dim, dropout=dropout, impl=impl
        )
        self.feed_norm = nn.LayerNorm(dim)
        self.feed = FeedForward(dim, hidden=ffn, activation="relu", dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.final_norm = nn.LayerNorm(dim)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.codes)
        for parameter in (*self.attention.parameters(), *self.feed.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        tokens: Float[Tensor, "b n c"],
        *,
        positions: Float[Tensor, "*#b n c"] | None = None,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        start: Float[Tensor, "q c"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """A vector per query.

        Args:
            tokens: What is attended to.
            positions: Their codes, the same for all samples or not; none by default.
            padding_mask: True = real token.
            start: What each query holds before it attends; 0 by default, so that the weight (not
                the shift) of `query_norm` has no effect.
        """
        check_tokens("tokens", tokens, self.dim, layer=self.attention.query)
        check_real(positions=positions, start=start)
        check_type(self.attention.query, positions=positions, start=start)
        if positions is not None and positions.shape[-2:] != tokens.shape[1:]:
            raise ValueError(
                f"positions must be (tokens, channels) {tuple(tokens.shape[1:])}, with or without "
                f"a batch, got {tuple(positions.shape)}"
            )
        first = torch.zeros_like(self.codes) if start is None else start
        if first.shape != self.codes.shape:
            raise ValueError(
                f"start must be (queries, channels) {tuple(self.codes.shape)}, got "
                f"{tuple(first.shape)}"
            )
        placed = tokens if positions is None else tokens + positions
        mixed = self.attention(
            (self.query_norm(first) + self.codes).expand(tokens.shape[0], -1, -1),
            placed,
            value=placed if self.value_pos else tokens,
            padding_mask=padding_mask,
        )
        state = first + self.dropout(mixed)
        state = state + self.dropout(self.feed(self.feed_norm(state)))
        return cast(Tensor, self.final_norm(state))

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"queries={self.codes.shape[0]}, value_pos={self.value_pos}"
