"""LARA: linear-complexity randomized attention, by landmarks that propose random features.

    mu_l = mean of q + mean of k over segment l,   omega_l = mu_l + N(0, I) in training, else mu_l
    psi(x, w) = c w . x - c |x|^2 / 2,   c = d^-1/2
    r_l = softmax over tokens j of (psi(k_j, omega_l)) v
    o_i = softmax over l of (c mu_l . q_i + psi(q_i, omega_l) + lse_j psi(k_j, omega_l)
                             - psi(mu_l, omega_l)) r

Zheng, Wang, Kong, "Linear complexity randomized self-attention mechanism" (arXiv 2204.04667). Both
are softmax attentions with a bias, since |q_i|^2 is the same for all landmarks. Segments are of
real tokens; padding takes part in nothing.

Cost per head for n tokens and s landmarks: time 3 n s d, memory n (d + s).

Sites: `summarise` (b, h, s, n), what each landmark reads, and `attend` (b, h, n, s).
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
from heed_core.impl import Impl
from heed_core.precision import at_least_float32, without_autocast
from heed_core.recurrence import check_recurrence
from heed_core.segments import segment_weights
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding


def randomized_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    *,
    landmarks: int,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    noise: Float[Tensor, "b h s d"] | None = None,
    sites: tuple[Attend, Attend] | None = None,
) -> Float[Tensor, "b h n e"]:
    """LARA.

    Args:
        query: One row per token.
        key: One row per token.
        value: What is averaged.
        landmarks: Segments of the sequence.
        padding_mask: True = real token.
        noise: Normal numbers, what omega differs from mu; none if not given.
        sites: Where landmarks read, and where queries attend to them.
    """
    check_recurrence(query, key, value, same_length=True)
    check_positive(landmarks=landmarks)
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    summarise, attend = (Attend(), Attend()) if sites is None else sites
    dtype, scale = query.dtype, query.shape[3] ** -0.5
    real = None if padding_mask is None else masks.keys(padding_mask)
    with without_autocast(query):
        exact = at_least_float32(key)
        weights, present = segment_weights(
            key.shape[2], landmarks, like=exact, padding_mask=padding_mask
        )
        both = exact + at_least_float32(query)
        if real is not None:
            both = both.masked_fill(~real.mT, 0.0)
        centre = weights[:, None] @ both  # (b, h, s, d)
        drawn = centre if noise is None else centre + noise
        length = exact.square().sum(-1)[:, :, None] * (-scale / 2)  # (b, h, 1, n)
        scores = scale * drawn @ exact.mT + length
        if real is not None:
            scores = scores.masked_fill(~real, -torch.inf)
        own = scale * ((drawn - centre / 2) * centre).sum(-1)  # psi(mu, omega)
        known = (scores.logsumexp(-1) - own)[:, :, None]  # (b, h, 1, s)
        known = known.masked_fill(known.isneginf(), 0.0)
    read = summarise(drawn.to(dtype), key, value, bias=length, mask=real, causal=False)
    mixed: Tensor = attend(
        query,
        (centre + drawn).to(dtype),
        read,
        bias=known,
        mask=present[:, None, None],
        causal=False,
    )
    return mixed


class RandomizedAttention(ProjectedAttention):
    """LARA with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        landmarks: Segments of the sequence.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Not served: a number raises `UnsupportedPattern`.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Not served: True raises `UnsupportedPattern`.
        dropout: Probability of dropping the weight of a landmark in training.
        noisy: Whether training draws omega around mu, from torch's generator.
        impl: Back-end of the sites.

    Example:
        >>> attention = RandomizedAttention(32, heads=4, landmarks=5)
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
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        noisy: bool = True,
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
        self.landmarks, self.noisy = landmarks, noisy
        self.summarise = Attend(impl=impl)
        self.attend = Attend(dropout=dropout, impl=impl)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        noise: Float[Tensor, "b h s d"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            padding_mask: True = real token.
            noise: Normal numbers instead of those that training draws.
        """
        self.check_call(x, None, padding_mask)
        query, key, value = self.project(x, None)
        shape = (x.shape[0], self.heads, self.landmarks, self.head_dim)
        if noise is None and self.training and self.noisy:
            noise = torch.randn(shape, dtype=at_least_float32(query).dtype, device=x.device)
        if noise is not None and tuple(noise.shape) != shape:
            raise ValueError(
                f"noise must be (batch, heads, landmarks, channels) = {shape}, got "
                f"{tuple(noise.shape)}"
            )
        mixed = randomized_attention(
            query,
            key,
            value,
            landmarks=self.landmarks,
            padding_mask=padding_mask,
            noise=noise,
            sites=(self.summarise, self.attend),
        )
        return self.join(mixed, x)


def randomized_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's LARA.

    Raises:
        ValueError: A name that it does not have.
    """
    return rename_projections(state, {}, "CAB's LARA")
