"""The model: one layer of attention from a query to its context, and its two-number-a-head form.

    yhat = sum_h O_h V_h Z softmax(Z' K_h' Q_h z_q / sqrt(c))

He et al. (arXiv 2503.12734), equation of the one-layer transformer. Z are the tokens (x; y) of the
context, z_q = (x_q; 0) is no part of them. There is no residual, no mask, no code of positions, no
bias. A head is as wide as a token, c = d + n; parameters: H (3 c^2 + n c).

KQ as the paper writes it has no 1 / sqrt(c); ours includes it, as does omega.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.full_width import FullWidthAttention
from heed_core.attention.linear import linear_attention, linear_attention_weights
from heed_core.attention.normalised_activation import NormActAttend, ScoreActivation
from heed_core.circuits import kq_ov_circuits
from heed_core.sites import Attend, Probe

Activation = Literal["softmax", "linear", "square", "tanh", "none"]
"""What scores pass before they are normalised: exp, 1 + C s, (1 + C s)^2, 1 + tanh(C s); "none" is
linear attention, the scores themselves over a fixed length."""

Signs = Literal["any", "opposite", "equal"]
"""Of the heads at the start: as the default initialisation makes them, or forced."""


@dataclass(frozen=True, kw_only=True)
class RegressorConfig:
    """All that is needed to rebuild the network."""

    dim: int = 5
    """d, coordinates of x."""
    outputs: int = 1
    """n, numbers that are predicted."""
    heads: int = 2
    activation: Activation = "softmax"
    """"linear" divides by a sum that may come near zero: train it with a clipped gradient."""
    slope: float = 1.0
    """C of the activation; for "linear", "square" and "tanh"."""
    fixed_length: int = 40
    """By what linear attention divides, whatever the context's length; for "none"."""

    def __post_init__(self) -> None:
        for name in ("dim", "outputs", "heads", "fixed_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def width(self) -> int:
        """C, channels of a token."""
        return self.dim + self.outputs


class _LinearAttend(nn.Module):
    """Scores over a fixed length as weights; the site `probe` states them."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.probe = Probe()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Bool[Tensor, "*mask"] | None
    ) -> Tensor:
        if mask is not None:
            raise ValueError("mask is not for linear attention over a fixed length")
        key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
        scale = 1.0 / self.length
        self.probe(lambda: linear_attention_weights(query, key, scale=scale))
        return linear_attention(query, key, value, scale=scale)[0]


class InContextRegressor(nn.Module):
    """Predict a query's outputs from the examples in its context.

    Example:
        >>> model = InContextRegressor(RegressorConfig())
        >>> model(torch.randn(3, 40, 6), torch.randn(3, 1, 6)).shape
        torch.Size([3, 1, 1])
    """

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = FullWidthAttention(
            config.width, heads=config.heads, out_dim=config.outputs, attend=_attend(config)
        )

    def forward(
        self, context: Float[Tensor, "b l c"], query: Float[Tensor, "b q c"]
    ) -> Float[Tensor, "b q n"]:
        """Predict.

        Args:
            context: Tokens (x; y).
            query: Tokens (x; 0), each answered alone.
        """
        return cast(Tensor, self.attention(query, context))


def _attend(config: RegressorConfig) -> nn.Module | None:
    if config.activation == "softmax":
        return None
    if config.activation == "none":
        return _LinearAttend(config.fixed_length)
    activation = ScoreActivation(name=config.activation, slope=config.slope)
    return NormActAttend(activation, scale=1.0)


def set_signs(model: InContextRegressor, signs: Signs) -> None:
    """Force the signs of omega and mu at the start, by turning queries and outputs of heads around.

    Under the default initialisation the signs of a head's omega = tr KQ / d and of its mu are coin
    flips. In stage I of the training they come to agree, to the one or the other, and heads that
    then have the same sign keep it: two such heads end as one head (3 of 6 seeds; 2^(1-H) for H
    heads). "opposite" makes the signs of heads alternate, "equal" all positive, with mu as omega,
    so that stage I has nothing to decide; an omega or mu that starts near zero may still drift
    across it. Both keep the size of every weight; "any" changes nothing.
    """
    if signs == "any":
        return
    layer, dim = model.attention, model.config.dim
    with torch.no_grad():
        circuits = kq_ov_circuits(layer)
        omega = circuits.kq[:, :dim, :dim].diagonal(dim1=1, dim2=2).sum(-1)
        mu = circuits.ov[:, :, dim:].diagonal(dim1=1, dim2=2).sum(-1)
        wanted = torch.ones_like(omega)
        if signs == "opposite":
            wanted[1::2] = -1.0
        queries = layer.query.weight.view(layer.heads, -1, layer.dim)
        outputs = layer.out.weight.view(model.config.outputs, layer.heads, -1)
        queries[omega * wanted < 0] *= -1.0
        outputs[:, mu * wanted < 0] *= -1.0


class ReparametrisedRegressor(nn.Module):
    """The paper's pattern: yhat = sum_h mu_h sum_l y_l softmax_l(omega_h x_l.x_q).

    Example:
        >>> model = ReparametrisedRegressor(torch.tensor([.13, -.13]), torch.tensor([3.4, -3.4]))
        >>> model(torch.randn(3, 40, 6), torch.randn(3, 1, 6)).shape
        torch.Size([3, 1, 1])
    """

    def __init__(self, omega: Float[Tensor, " h"], mu: Float[Tensor, " h"]) -> None:
        super().__init__()
        self.omega, self.mu = nn.Parameter(omega.clone()), nn.Parameter(mu.clone())
        self.attend = Attend(scale=1.0, impl="reference")

    def forward(
        self, context: Float[Tensor, "b l c"], query: Float[Tensor, "b q c"]
    ) -> Float[Tensor, "b q 1"]:
        """Predict; tokens as of `InContextRegressor`, of one output."""
        x, y = context[:, None, :, :-1], context[:, None, :, -1:]
        queries = self.omega[:, None, None] * query[:, None, :, :-1]
        answers: Tensor = self.attend(queries, x, y)  # (b, h, q, 1)
        return torch.einsum("h,bhqn->bqn", self.mu, answers)

    def expand(self, dim: int) -> InContextRegressor:
        """The full attention that has these circuits."""
        heads, width = len(self.omega), dim + 1
        model = InContextRegressor(RegressorConfig(dim=dim, heads=heads)).to(self.omega)
        layer, eye = model.attention, torch.eye(width).to(self.omega)
        inner = eye.clone()
        inner[-1, -1] = 0.0
        with torch.no_grad():
            layer.key.weight.copy_(inner.repeat(heads, 1))
            layer.query.weight.copy_(
                torch.cat([omega / layer.scale * inner for omega in self.omega])
            )
            layer.value.weight.copy_(eye.repeat(heads, 1))
            layer.out.weight.copy_(torch.cat([mu * eye[-1:] for mu in self.mu], dim=1))
        return model


def weights_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the code released with the paper.

    Its rows (columns of `o_proj`) are ordered by head, as ours.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, kind = name.rpartition(".")
        if part not in names or kind != "weight":
            raise ValueError(f"{name!r} is no weight of the released attention")
        result[f"attention.{names[part]}.weight"] = tensor
    return result
