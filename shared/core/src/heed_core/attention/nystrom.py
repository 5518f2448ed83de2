"""Nystrom attention: the map of all pairs from its values at a few landmarks.

    q~, k~: means of s segments of the queries and keys
    F_1 = softmax(scale * q k~^T),   A = softmax(scale * q~ k~^T),   F_3 = softmax(scale * q~ k^T)
    o = F_1 A^+ (F_3 v) + conv(v)

Xiong et al., "Nystromformer" (arXiv 2102.03902). The inverse is iterated six times:

    Z_0 = A^T / (largest column sum * largest row sum),
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

with sums of each matrix alone, so that no sample depends on another. Up to s tokens, attention is
exact. Segments are of real tokens; padding takes part in nothing. `conv` is one depth-wise filter
over places per head, if asked for. (The code published with arXiv 2210.07661 divides queries and
keys by sqrt d each: `scale=1 / d`.)

Cost per head for n tokens and s landmarks: time 2 n s d + s^3, memory n d.

Sites: `attend` (b, h, n, s), F_1; `inner` (b, h, s, s), A; `summarise` (b, h, s, n), F_3. Up to s
tokens there is `attend` alone, (b, h, n, n).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.projected import (
    ProjectedAttention,
    check_positive,
    rename_projections,
)
from heed_core.impl import Impl
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import check_recurrence
from heed_core.segments import segment_weights
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_some

ITERATIONS = 6
"""Of the inverse."""


def iterated_inverse(
    matrix: Float[Tensor, "*batch s s"], *, iterations: int = ITERATIONS
) -> Float[Tensor, "*batch s s"]:
    """The Moore-Penrose inverse of each matrix of weights, by iteration of order three.

    Rows and columns of zeros stay zeros.
    """
    size = matrix.abs()
    most = size.sum(-2).amax(-1) * size.sum(-1).amax(-1)
    found = matrix.mT / most.clamp(min=torch.finfo(matrix.dtype).tiny)[..., None, None]
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ found
        found = 0.25 * found @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return found


def nystrom_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    *,
    landmarks: int,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    sites: tuple[Attend, Attend, Attend] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Nystrom attention.

    Args:
        query: One row per token.
        key: One row per token.
        value: What is averaged.
        landmarks: Segments of the sequence.
        padding_mask: True = real token.
        sites: Of F_1, A and F_3, all with the same scale.
    """
    check_recurrence(query, key, value, same_length=True)
    check_positive(landmarks=landmarks)
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    attend, inner, summarise = (Attend(), Attend(), Attend()) if sites is None else sites
    real = None if padding_mask is None else masks.keys(padding_mask)
    compiling = torch.compiler.is_compiling()  # then no branch may depend on the length
    if not compiling and query.shape[2] <= landmarks:
        exact: Tensor = attend(query, key, value, mask=real, causal=False)
        return exact
    dtype = query.dtype
    with without_autocast(query):
        weights, present = segment_weights(
            key.shape[2], landmarks, like=at_least_float32(key), padding_mask=padding_mask
        )
        rows = [at_least_float32(x) for x in (query, key, value)]
        if real is not None:
            rows = [x.masked_fill(~real.mT, 0.0) for x in rows]
        short_query, short_key = (weights[:, None] @ x for x in rows[:2])
    there = present[:, None, None]
    one = torch.eye(landmarks, dtype=short_query.dtype, device=query.device)
    one = one.expand(*query.shape[:2], -1, -1)
    both = there & there.mT
    matrix = inner(short_query, short_key, one, mask=both, causal=False)
    read = summarise(short_query.to(dtype), key, value, mask=real, causal=False)
    with without_autocast(query):
        inverse = iterated_inverse(at_least_float32(matrix))
        spread = (inverse @ at_least_float32(read)).to(dtype)
        if padding_mask is not None or compiling:
            # Few real tokens: each is a segment, and F_1 is exact.
            every = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
            few = (every if padding_mask is None else padding_mask).sum(1) <= landmarks
            short_value = (weights[:, None] @ rows[2]).to(dtype)
            spread = torch.where(few[:, None, None, None], short_value, spread)
    mixed: Tensor = attend(query, short_key.to(dtype), spread, mask=there, causal=False)
    return mixed


class NystromAttention(ProjectedAttention):
    """Nystrom attention with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        landmarks: Segments of the sequence.
        conv_width: Places of the filter of values, odd; no filter if not given.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Not served: a number raises `UnsupportedPattern`.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Not served: True raises `UnsupportedPattern`.
        dropout: Probability of dropping a weight of F_1 in training.
        scale: Of all products; head_dim ** -0.5 if not given.
        impl: Back-end of the sites.

    Example:
        >>> attention = NystromAttention(32, heads=4, landmarks=5)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        landmarks: int = 16,
        conv_width: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            context_dim=context_dim,
            causal=causal,
        )
        check_positive(landmarks=landmarks)
        if conv_width is not None and (conv_width < 1 or conv_width % 2 == 0):
            raise ValueError(f"conv_width must be odd and at least 1, got {conv_width}")
        self.landmarks, self.conv_width = landmarks, conv_width
        self.conv = None
        if conv_width is not None:
            self.conv = nn.Conv2d(
                heads,
                heads,
                (conv_width, 1),
                padding=(conv_width // 2, 0),
                groups=heads,
                bias=False,
            )
        self.inner = Attend(scale=scale, impl=impl)
        self.summarise = Attend(scale=scale, impl=impl)
        self.attend = Attend(scale=scale, dropout=dropout, impl=impl)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            padding_mask: True = real token.
        """
        self.check_call(x, None, padding_mask)
        check_some(x=x)
        query, key, value = self.project(x, None)
        mixed = nystrom_attention(
            query,
            key,
            value,
            landmarks=self.landmarks,
            padding_mask=padding_mask,
            sites=(self.attend, self.inner, self.summarise),
        )
        if self.conv is not None:
            if padding_mask is not None:
                value = value.masked_fill(~padding_mask[:, None, :, None], 0.0)
            mixed = mixed + self.conv(value)
        return self.join(mixed, x)


def nystrom_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's Nystrom attention.

    Raises:
        ValueError: A name that it does not have.
    """
    return rename_projections(state, {"conv.weight": "conv.weight"}, "CAB's Nystrom attention")
