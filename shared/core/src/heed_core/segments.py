"""Segments of a sequence: landmarks that stand for many tokens as the means of runs of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def segment_weights(
    length: int,
    segments: int,
    *,
    like: Float[Tensor, ...],
    padding_mask: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b s n"], Bool[Tensor, "b s"]]:
    """The matrix whose product with tokens gives the means of segments of real tokens.

    Of n real tokens, the first (floor(n / s) + 1) s - n segments take floor(n / s), the others one
    more. Fewer tokens than segments: the first segments are empty.

    Args:
        length: Tokens, padding included.
        segments: How many.
        like: Gives type and device.
        padding_mask: True = real token.

    Returns:
        Weights, and which segments hold a token; one row where there is no padding mask.
    """
    places = torch.arange(length, device=like.device)[None]
    if padding_mask is None:
        real, rank = torch.full_like(places[:, :1], length), places
        if torch.compiler.is_compiling():
            real = torch.ones_like(places).sum(-1, keepdim=True)
    else:
        rank = padding_mask.cumsum(-1) - 1
        real = padding_mask.sum(-1, keepdim=True)
    short = torch.div(real, segments, rounding_mode="floor")
    few = (short + 1) * segments - real  # segments that take `short` tokens
    within = torch.div(rank, short.clamp(min=1), rounding_mode="floor")
    beyond = few + torch.div(rank - few * short, short + 1, rounding_mode="floor")
    owner = torch.where(rank < few * short, within, beyond)  # (b, n)
    if padding_mask is not None:
        owner = owner.masked_fill(~padding_mask, -1)
    member = owner[:, None] == torch.arange(segments, device=like.device)[:, None]
    count = member.sum(-1, keepdim=True)
    return member.to(like.dtype) / count.clamp(min=1), count[..., 0] > 0
