"""Attention of heads as wide as the tokens, computed in the tokens themselves.

    O = sum_h A_h X OV_h^T,    A_h = softmax(Y KQ_h^T X^T),
    KQ_h = K_h^T Q_h / sqrt(head_dim),    OV_h = O_h V_h

Queries come from the tokens Y, keys and values from the context X, which Y is not part of. It is
the multi-head attention of Vaswani et al. (arXiv 1706.03762) without biases, with the projections
of keys and values moved to the side of the queries and of the output, where they act on n rows
instead of m (the "absorbed" form of multi-head latent attention, arXiv 2405.04434). So all heads
read one key and one value, the context as it is: it is a multi-query attention (arXiv 1911.02150)
of the context's width. It pays where a head is as wide as the tokens, or where few tokens ask.

Its weights are those of `MultiHeadAttention` without biases; `heed_core.circuits` reads KQ and OV.

Cost per head for n queries and m context tokens of width c: time n m c, memory n m; nothing of
size m c is made.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.circuits import key_query_circuits, output_value_circuits
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_tokens

__all__ = ["FullWidthAttention"]


class FullWidthAttention(nn.Module):
    """Multi-head attention of tokens to a context, in the absorbed form.

    Args:
        dim: Channels of a token that asks.
        heads: How many.
        head_dim: Channels of the projections of a head; `dim` if not given.
        context_dim: Channels of a context token; `dim` if not given.
        out_dim: Channels of the output; `dim` if not given.
        attend: What mixes the context, called with query (b, h, n, c), key and value (b, 1, m, c)
            and `mask`; softmax attention if not given. It must not scale: KQ has the scale.

    Example:
        >>> import torch
        >>> attention = FullWidthAttention(6, heads=2, out_dim=1)
        >>> attention(torch.randn(3, 1, 6), torch.randn(3, 40, 6)).shape
        torch.Size([3, 1, 1])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"cross", "causal cross"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        out_dim: int | None = None,
        attend: nn.Module | None = None,
    ) -> None:
        super().__init__()
        head_dim = dim if head_dim is None else head_dim
        context_dim = dim if context_dim is None else context_dim
        out_dim = dim if out_dim is None else out_dim
        check_heads(dim, heads, heads, head_dim)
        if context_dim < 1 or out_dim < 1:
            raise ValueError(
                f"context_dim and out_dim must be at least 1, got {context_dim, out_dim}"
            )
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.context_dim, self.out_dim = context_dim, out_dim
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.value = nn.Linear(context_dim, heads * head_dim, bias=False)
        # Few rows that ask, one head of keys: plain products beat the fused kernels.
        self.attend = Attend(scale=1.0, impl="reference") if attend is None else attend
        self.out = nn.Linear(heads * head_dim, out_dim, bias=False)

    @property
    def scale(self) -> float:
        """Of the products of queries and keys."""
        return float(self.head_dim**-0.5)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"],
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
    ) -> Float[Tensor, "b n o"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to.
            mask: True = may attend, broadcastable to (b, heads, n, m).
        """
        self._check_call(x, context)
        batch, n = x.shape[:2]
        towards = key_query_circuits(self).flatten(0, 1)  # (h k, c)
        queries = F.linear(x, towards).view(batch, n, self.heads, self.context_dim)
        tokens = context.unsqueeze(1)
        mixed: Tensor = self.attend(queries.transpose(1, 2), tokens, tokens, mask=mask)
        outwards = output_value_circuits(self).transpose(0, 1).flatten(1)  # (o, h k)
        return F.linear(mixed.transpose(1, 2).flatten(2), outwards)

    def _check_call(self, x: Tensor, context: Tensor) -> None:
        check_tokens("x", x, self.dim, layer=self.query)
        check_tokens("context", context, self.context_dim, batch=x.shape[0], layer=self.key)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}"
