"""Conditional cross-attention: a condition asks, the tokens of an image answer.

    q_c = W_q e_c + b_q        y_c = concat_h softmax(scale * q_c K_h^T) V_h W_out        c = 1..K

Between its projections it is `attend(q, k, v, mask=masks.keys(padding_mask))`, one query per
condition.

Song, Hwang, Yoon, Choi and Gu, "Conditional cross attention network for multi-space embedding
without entanglement in only a single network" (ICCV 2023, arXiv 2307.13254): the last block of a
vision transformer takes its queries from a condition (an attribute such as colour or shape), so
that one network has an embedding space per condition. The embedding of a condition is
`onehot`: e_c = Linear(one-hot of c), or `mask`: e_c = Linear(relu(M_c)) with a learned row M_c.

The paper repeats the query of the condition at every place; all its outputs are then equal, so that
one query is exact and costs n times less. The residual adds to the class token, which the paper
does not say. No official code was found: built from the paper's description.

Cost for n tokens of width C: time K n C + n C^2, memory n C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.multi_head import check_heads
from heed_core.impl import Impl
from heed_core.layers import matrix_and_bias
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_tokens

ConditionCode = Literal["onehot", "mask"]


class ConditionEmbedding(nn.Module):
    """A vector per condition.

    Args:
        conditions: How many there are.
        dim: Channels.
        code: onehot, or mask: rows that start at N(0.9, 0.7^2), as those of conditional similarity
            networks (arXiv 1603.07810).
    """

    def __init__(self, conditions: int, dim: int, *, code: ConditionCode = "onehot") -> None:
        super().__init__()
        if code not in get_args(ConditionCode):
            raise ValueError(f"code must be onehot or mask, got {code!r}")
        if conditions < 1:
            raise ValueError(f"conditions must be at least 1, got {conditions}")
        self.conditions = conditions
        self.mask = None
        if code == "mask":
            self.mask = nn.Parameter(torch.empty(conditions, dim).normal_(0.9, 0.7))
        self.linear = nn.Linear(conditions if self.mask is None else dim, dim)

    def forward(self, condition: Int64[Tensor, "*asked"]) -> Float[Tensor, "*asked c"]:
        """The vectors of conditions 0 .. conditions - 1."""
        if self.mask is not None:
            return cast(Tensor, self.linear(self.mask[condition].relu()))
        weight, bias = matrix_and_bias(self.linear)
        columns = weight.T[condition]
        return columns if bias is None else columns + bias


class ConditionalCrossAttention(nn.Module):
    """Attention of conditions to tokens.

    Args:
        dim: Channels of a token.
        heads: Attention heads.
        conditions: How many conditions there are.
        code: How a condition becomes a vector; see `ConditionEmbedding`.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Probability of dropping a weight in training.
        impl: Back-end of `attend`.

    Example:
        >>> attention = ConditionalCrossAttention(16, heads=2, conditions=3)
        >>> attention(torch.randn(2, 5, 16), torch.tensor([0, 2])).shape
        torch.Size([2, 1, 16])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"cross"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        conditions: int,
        code: ConditionCode = "onehot",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, None)
        self.dim, self.heads = dim, heads
        self.condition = ConditionEmbedding(conditions, dim, code=code)
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.attend = Attend(dropout=dropout, impl=impl)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        condition: Int64[Tensor, "*asked"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b k c"]:
        """Attend.

        Args:
            x: Tokens.
            condition: One or several per sample, from 0; all of them if not given.
            padding_mask: True = real token.

        Returns:
            A row per condition asked for.
        """
        asked = self._conditions(x, condition)
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, tokens in (
                (self.query, self.condition(asked)),
                (self.key, x),
                (self.value, x),
            )
        )
        if padding_mask is not None:
            check_padding(padding_mask, *x.shape[:2])
        allowed = None if padding_mask is None else masks.keys(padding_mask)
        mixed: Tensor = self.attend(query, key, value, mask=allowed)
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def _conditions(self, x: Tensor, condition: Tensor | None) -> Tensor:
        check_tokens("x", x, self.dim, layer=self.query)
        count = self.condition.conditions
        if condition is None:
            return torch.arange(count, device=x.device).expand(x.shape[0], -1)
        if condition.dtype != torch.int64:
            raise TypeError(f"condition must hold int64 numbers, got {condition.dtype}")
        if condition.dim() not in (1, 2) or condition.shape[0] != x.shape[0]:
            raise ValueError(
                f"condition must be (batch {x.shape[0]},) or (batch, conditions), got "
                f"{tuple(condition.shape)}"
            )
        if not torch.compiler.is_compiling() and condition.device.type == "cpu":
            low, high = torch.aminmax(condition) if condition.numel() else (0, 0)
            if int(low) < 0 or int(high) >= count:
                raise ValueError(
                    f"condition must be within 0..{count - 1}, got {int(low)}..{int(high)}"
                )
        return condition if condition.dim() == 2 else condition[:, None]


class ConditionalCrossBlock(nn.Module):
    """The last, conditional block of a vision transformer (pre-norm).

        y_c = x_0 + CCA(LN(x))_c        y_c <- y_c + MLP(LN(y_c))

    Args:
        dim: Channels of a token; token 0 is the class token.
        heads: Attention heads.
        conditions: How many conditions there are.
        ffn_dim: Hidden channels of the MLP; 4 * dim if not given.
        code: How a condition becomes a vector.
        dropout: Of weights, in training.
        norm_eps: Of both norms.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        conditions: int,
        ffn_dim: int | None = None,
        code: ConditionCode = "onehot",
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if ffn_dim is None else ffn_dim
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = ConditionalCrossAttention(
            dim, heads=heads, conditions=conditions, code=code, dropout=dropout
        )
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self, x: Float[Tensor, "b n c"], condition: Int64[Tensor, "*asked"] | None = None
    ) -> Float[Tensor, "b k c"]:
        """A row per condition; see `ConditionalCrossAttention`."""
        y = x[:, :1] + self.attention(self.norm(x), condition)
        return cast(Tensor, y + self.ffn(self.ffn_norm(y)))


def conditional_block_from_timm(
    block: Mapping[str, Tensor], condition: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename a timm `Block` so that a pre-trained last block becomes conditional.

    The first third of its `attn.qkv` acts on the condition, the rest on the tokens.

    Args:
        block: State of the block: `norm1.*`, `attn.qkv.*`, `attn.proj.*`, `norm2.*`, `mlp.fc*.*`.
        condition: `weight` and `bias` of the linear map of one-hot conditions.

    Raises:
        ValueError: A name is missing or too many.
    """
    names = {
        "norm1": "norm",
        "attn.proj": "attention.out",
        "norm2": "ffn_norm",
        "mlp.fc1": "ffn.0",
        "mlp.fc2": "ffn.2",
    }
    wanted = {f"{name}.{part}" for name in (*names, "attn.qkv") for part in ("weight", "bias")}
    if set(block) != wanted:
        raise ValueError(f"names that differ: {sorted(set(block) ^ wanted)}")
    if set(condition) != {"weight", "bias"}:
        raise ValueError(f"condition must have weight and bias, got {sorted(condition)}")
    renamed: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        renamed |= {f"{new}.{part}": block[f"{old}.{part}"] for old, new in names.items()}
        renamed[f"attention.condition.linear.{part}"] = condition[part]
        thirds = block[f"attn.qkv.{part}"].chunk(3)
        for name, third in zip(("query", "key", "value"), thirds, strict=True):
            renamed[f"attention.{name}.{part}"] = third
    return renamed
