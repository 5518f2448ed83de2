"""Attention whose weights are any activation of the scores over its sum.

    O_i = sum_j f(s_ij) / (sum_k f(s_ik)) V_j,    s_ij = scale * Q_i . K_j

He et al. (arXiv 2503.12734, "normalised activations") with f(x) = 1 + C x, (1 + C x)^p and
1 + tanh x; to first order in s all act alike. f = exp is softmax attention, which `attend`
computes, and (1 + x / p)^p tends to it as p grows.

Where f takes negative values (1 + C x below -1 / C, odd powers) so do weights, and a sum near zero
makes them large: choose C so small that C |s| stays below one.

Cost per head for n queries and m keys of width d: time n m d, memory n m.

There is no softmax. Observed, the site `probe` states the weights: o = weights V, rows sum to one.
It cannot be steered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attend import check_arguments, default_scale
from heed_core.backends import reference
from heed_core.precision import without_autocast
from heed_core.sites import Probe

ActivationName = Literal["linear", "square", "power", "tanh"]
"""1 + C x, (1 + C x)^2, (1 + C x)^p, 1 + tanh(C x)."""


@dataclass(frozen=True, kw_only=True)
class ScoreActivation:
    """The function f of the scores.

    Example:
        >>> ScoreActivation(name="linear", slope=0.5)(torch.tensor([0.0, 2.0]))
        tensor([1., 2.])
    """

    name: ActivationName = "tanh"
    slope: float = 1.0
    """C."""
    power: int = 2
    """p; for "power" only."""

    def __post_init__(self) -> None:
        if self.name not in get_args(ActivationName):
            raise ValueError(f"name must be one of {get_args(ActivationName)}, got {self.name!r}")
        if not (math.isfinite(self.slope) and self.slope != 0):
            raise ValueError(f"slope must be finite and not 0, got {self.slope}")
        if self.power < 1:
            raise ValueError(f"power must be at least 1, got {self.power}")
        if self.power != 2 and self.name != "power":
            raise ValueError(f"power has no effect with name={self.name!r}")

    def __call__(self, scores: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """F of each score."""
        if self.name == "tanh":
            return 1.0 + torch.tanh(self.slope * scores)
        base = 1.0 + self.slope * scores
        if self.name == "linear":
            return base
        return base.square() if self.power == 2 else base**self.power


def norm_act_weights(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    activation: ScoreActivation,
    *,
    mask: Bool[Tensor, "*mask"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n m"]:
    """The weights f(s) / sum f(s), in float32 at least; a row that may attend to nothing is 0.

    Args:
        query: As for `heed_core.attend`.
        key: As for `heed_core.attend`; g divides h.
        activation: f.
        mask: True = may attend; broadcastable to (b, h, n, m).
        scale: Of the products; d ** -0.5 if not given.
    """
    scale = default_scale(query) if scale is None else scale
    shares = activation(reference.scores(query, key, scale=scale))
    if mask is None:
        return shares / shares.sum(-1, keepdim=True)
    shares = shares.masked_fill(~mask, 0.0)
    empty = ~mask.any(-1, keepdim=True)
    return shares / shares.sum(-1, keepdim=True).masked_fill(empty, 1.0)


def norm_act_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    activation: ScoreActivation,
    *,
    mask: Bool[Tensor, "*mask"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention with the weights f(s) / sum f(s).

    Args:
        query: As for `heed_core.attend`.
        key: As for `heed_core.attend`; g divides h.
        value: What is averaged.
        activation: f.
        mask: True = may attend; broadcastable to (b, h, n, m). A row that may attend to nothing
            gives zeros and zero gradients.
        scale: Of the products; d ** -0.5 if not given.

    Returns:
        The averaged values, in the type of `query`.

    Raises:
        ValueError: Shapes that do not fit, or a scale that is not finite.
        TypeError: A mask that is not boolean, or types that differ.
    """
    check_arguments(query, key, value, mask=mask, bias=None, scale=scale, dropout=0.0)
    with without_autocast(query):
        weights = norm_act_weights(query, key, activation, mask=mask, scale=scale)
        return reference.mix(weights, value).to(query.dtype)


class NormActAttend(nn.Module):
    """`norm_act_attention` as a parameterless sub-module, in the place of an `Attend`.

    Args:
        activation: f.
        scale: Of the products; d ** -0.5 if not given.

    Example:
        >>> site = NormActAttend(ScoreActivation(name="tanh"))
        >>> site(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 6)).shape
        torch.Size([1, 2, 3, 6])
    """

    def __init__(self, activation: ScoreActivation, *, scale: float | None = None) -> None:
        super().__init__()
        self.activation, self.scale = activation, scale
        self.probe = Probe()

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b g m d"],
        value: Float[Tensor, "b g m e"],
        *,
        mask: Bool[Tensor, "*mask"] | None = None,
    ) -> Float[Tensor, "b h n e"]:
        """Attend; arguments as of `norm_act_attention`."""
        self.probe(
            lambda: norm_act_weights(query, key, self.activation, mask=mask, scale=self.scale)
        )
        return norm_act_attention(query, key, value, self.activation, mask=mask, scale=self.scale)

    def extra_repr(self) -> str:
        """Show the activation."""
        return repr(self.activation)
