"""cosFormer: linear attention with ReLU features and weights that fall with distance as a cosine.

    w_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / M),   M = max(n, m)
    o_i = sum_j w_ij v_j / max(sum_j w_ij, 1e-6)

By cos(a - b) = cos a cos b + sin a sin b the weights are products of features [relu(x) sin, relu(x)
cos]. Qin et al., "cosFormer: rethinking softmax in attention" (arXiv 2202.08791). With a padding
mask, places and lengths are those of the real tokens, so that padding changes nothing. There is no
causal form: M depends on the length, so that a longer sequence changes the outputs of its prefix.

Cost per head for n queries and m keys: time (n + m) 2 d^2, memory (n + m) 2 d.

There is no softmax. Observed, the site `probe` states the effective weights (b, h, n, m), whose
rows sum to one or, where nothing is alike, to 0. It cannot be steered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attention.projected import ProjectedAttention, rename_projections
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import check_recurrence
from heed_core.sites import Probe
from heed_core.tokens import Pattern, check_padding

LEAST = 1e-6
"""The least that sums are divided by."""


def cosformer_features(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    *,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    own: bool = False,
) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h m f"]]:
    """Features of queries and keys, f = 2 d, whose products are the weights before division.

    Args:
        query: One row per token that asks.
        key: One row per token that is attended to.
        padding_mask: True = real token, of the keys.
        own: Queries are of the same tokens as the keys.
    """
    query, key = F.relu(at_least_float32(query)), F.relu(at_least_float32(key))
    n, m = query.shape[2], key.shape[2]
    asking, asked = (torch.arange(1, k + 1, device=key.device)[None] for k in (n, m))
    # Counted, so that a graph is not bound to the lengths of its example.
    counts = [torch.ones_like(x).sum(-1) for x in (asking, asked)]
    length = torch.maximum(*counts)
    if padding_mask is not None:
        asked = padding_mask.cumsum(-1)
        real = padding_mask.sum(-1)
        asking, length = (asked, real) if own else (asking, torch.maximum(real, counts[0]))
        key = key.masked_fill(~padding_mask[:, None, :, None], 0.0)
    turn = (math.pi / 2) / length.clamp(min=1).to(key.dtype)[:, None]

    def placed(rows: Tensor, place: Tensor) -> Tensor:
        angle = (place * turn)[:, None, :, None]  # (b, 1, n, 1)
        return torch.cat([rows * angle.sin(), rows * angle.cos()], dim=-1)

    return placed(query, asking), placed(key, asked)


def cosformer_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    own: bool = False,
) -> Float[Tensor, "b h n e"]:
    """CosFormer attention.

    Args:
        query: One row per token that asks.
        key: One row per token that is attended to.
        value: What is averaged.
        padding_mask: True = real token, of the keys.
        own: Queries are of the same tokens as the keys.
    """
    check_recurrence(query, key, value, same_length=own)
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    dtype = query.dtype
    with without_autocast(query):
        asking, asked = cosformer_features(query, key, padding_mask=padding_mask, own=own)
        read = asking @ (asked.mT @ F.pad(at_least_float32(value), (0, 1), value=1.0))
        return (read[..., :-1] / read[..., -1:].clamp(min=LEAST)).to(dtype)


class CosformerAttention(ProjectedAttention):
    """cosFormer attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Not served: True raises `UnsupportedPattern`.

    Example:
        >>> attention = CosformerAttention(32, heads=4)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "cross"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
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
        self.probe = Probe()

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            padding_mask: True = real token, for the tokens that are attended to.
        """
        self.check_call(x, context, padding_mask)
        query, key, value = self.project(x, context)
        own = context is None
        mixed = cosformer_attention(query, key, value, padding_mask=padding_mask, own=own)

        def weights() -> Tensor:
            asking, asked = cosformer_features(query, key, padding_mask=padding_mask, own=own)
            products = asking @ asked.mT
            return products / products.sum(-1, keepdim=True).clamp(min=LEAST)

        self.probe(weights)
        return self.join(mixed, x)


def cosformer_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's cosFormer.

    Raises:
        ValueError: A name that it does not have.
    """
    return rename_projections(state, {}, "CAB's cosFormer")
