"""Attention poolings of a bag of instances: gated attention, and learned queries with heads.

Both are softmax attention over the instances and own an `Attend`, so that their weights can be
observed and steered. They return the pooled vectors together with the scores before the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import Attend
from heed_medical.acmil.masking import stochastic_top_mask


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How the poolings of one training step hide top instances."""

    top: int
    share: float
    uniform: Float[Tensor, "b h t k"] | None = None
    """Random numbers that decide; None draws them."""

    def keep(
        self, scores: Float[Tensor, "b h t n"], key_mask: Bool[Tensor, "b n"] | None, branch: int
    ) -> Bool[Tensor, "b h t n"]:
        """Which instances stay, for rows that begin at `branch`."""
        rows = slice(branch, branch + scores.shape[2])
        uniform = None if self.uniform is None else self.uniform[:, :, rows]
        return stochastic_top_mask(
            scores, top=self.top, share=self.share, key_mask=key_mask, uniform=uniform
        )


class Pooled(NamedTuple):
    """What a pooling gives; its rows are branches or queries."""

    vectors: Float[Tensor, "b t d"]
    scores: Float[Tensor, "b h t n"]
    """Before the softmax, also of instances that did not enter it."""
    allowed: Bool[Tensor, "*allowed"] | None
    """Which instances entered the softmax; None = all."""


class GatedAttentionPool(nn.Module):
    """Attention over instances by a small gated network (Ilse et al., arXiv 1802.04712).

        a_n = W (tanh(V h_n + b_V) * sigmoid(U h_n + b_U)) + b_W,   z_t = sum_n softmax_n(a_t) h_n

    The branches t share V and U and differ by a row of W: the rows are the queries of an attention
    whose keys are the gated instances. Time O(n d hidden), memory O(n (d + hidden + branches)).

    Args:
        dim: Channels of an instance.
        hidden: Rows of V and U.
        branches: Rows of W, one pooled vector each.
        gated: Whether the factor with U is there.
    """

    def __init__(
        self, dim: int, *, hidden: int = 128, branches: int = 1, gated: bool = True
    ) -> None:
        super().__init__()
        self.tanh = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden) if gated else None
        self.score = nn.Linear(hidden, branches)
        # A few queries over very many keys: the weights are small, and a fused kernel on the CPU
        # would pad keys to the width of the values.
        self.attend = Attend(scale=1.0, impl="reference")

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        masking: Masking | None = None,
    ) -> Pooled:
        """Pool each bag; `key_mask` is True at instances and False at padding."""
        keys = torch.tanh(self.tanh(h))
        if self.gate is not None:
            keys = keys * torch.sigmoid(self.gate(h))
        scores = self.score(keys).transpose(1, 2).unsqueeze(1)  # (b, 1, t, n)
        allowed = permitted(scores, key_mask, masking)
        query = self.score.weight.to(keys.dtype).expand(len(h), 1, -1, -1)
        vectors = self.attend(
            query,
            keys.unsqueeze(1),
            h.unsqueeze(1),
            mask=allowed,
            bias=self.score.bias.unsqueeze(1),
        )
        return Pooled(vectors.squeeze(1), scores, allowed)


class QueryAttentionPool(nn.Module):
    """Multi-head attention of one learned query over the instances, then a projection and a norm.

    There is no residual connection. Time O(n d^2), memory O(n d).

    Args:
        dim: Channels of an instance.
        heads: Attention heads; divides `dim`.
        dropout: Of the projected vector, while training.
    """

    def __init__(self, dim: int, *, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.attend = Attend(impl="reference")  # one query, as above
        self.read_out = ReadOut(dim, dropout=dropout)

    def forward(
        self,
        query: Float[Tensor, "1 1 d"],
        h: Float[Tensor, "b n d"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        masking: Masking | None = None,
        branch: int = 0,
        shared_value: Float[Tensor, "b h n e"] | None = None,
    ) -> tuple[Pooled, Float[Tensor, "b h 1 e"] | None]:
        """Pool each bag with the one query.

        Args:
            query: Learned.
            h: The instances.
            key_mask: True = an instance, False = padding.
            masking: Hides top instances.
            branch: The row of the masking's random numbers.
            shared_value: Further values that are averaged by the same weights.

        Returns:
            The pooled vector, and the average of `shared_value` where it is given.
        """
        query = split_heads(self.query(query), self.heads).expand(len(h), -1, -1, -1)
        key = split_heads(self.key(h), self.heads)
        value = split_heads(self.value(h), self.heads)
        scores = query @ key.transpose(-2, -1) * key.shape[-1] ** -0.5  # (b, h, 1, n)
        allowed = permitted(scores, key_mask, masking, branch=branch)
        width = value.shape[-1]
        if shared_value is not None:
            value = torch.cat([value, shared_value.to(value.dtype)], dim=-1)
        mixed = self.attend(query, key, value, mask=allowed)
        shared = None if shared_value is None else mixed[..., width:]
        return Pooled(self.read_out(mixed[..., :width]), scores, allowed), shared


class ReadOut(nn.Module):
    """Joins heads: projection, dropout, layer normalisation."""

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, mixed: Float[Tensor, "b h t e"]) -> Float[Tensor, "b t d"]:
        """The vectors of the joined heads."""
        joined = mixed.transpose(1, 2).flatten(2)
        vectors: Tensor = self.norm(self.dropout(self.project(joined)))
        return vectors


def permitted(
    scores: Float[Tensor, "b h t n"],
    key_mask: Bool[Tensor, "b n"] | None,
    masking: Masking | None,
    *,
    branch: int = 0,
) -> Bool[Tensor, "*allowed"] | None:
    """Which instances enter the softmax: those of the bag that the masking keeps. None = all."""
    real = None if key_mask is None else key_mask[:, None, None]
    if masking is None:
        return real
    keep = masking.keep(scores, key_mask, branch)
    return keep if real is None else keep & real


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b h n e"]:
    """Cut the channels into heads."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def softmax_weights(
    scores: Float[Tensor, "b h t n"], allowed: Bool[Tensor, "*allowed"] | None
) -> Float[Tensor, "b h t n"]:
    """The weights that the poolings give their instances."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return F.softmax(scores.float() if scores.dtype != torch.float64 else scores, dim=-1)
