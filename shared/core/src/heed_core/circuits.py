"""Circuits of attention heads: the products of weights through which a head acts.

    score of a token y with a token x = x^T KQ_h y,    KQ_h = scale K_h^T Q_h
    what a token x adds to the output = OV_h x,        OV_h = O_h V_h

Elhage et al., "A mathematical framework for transformer circuits" (2021); He et al. (arXiv
2503.12734) read in-context regression off them. Weights alone do not say what a head does, their
products do: Q_h and K_h may be multiplied by M and M^-T and nothing changes.

They are read from the layers whose scores are products of linear projections:
`FullWidthAttention`, `MultiHeadAttention` (also with the weights of torch's or timm's, see
`heed_core.weights`), `AxialAttention`, `PartitionAttention`, `BilevelAttention`, `MixtureOfHeads`,
`DynamicMaskAttention`, and `LinearAttention` without features. Biases of projections, biases of
scores and gates of heads are not in the products. Where something comes between the projections and
the products (a norm of queries and keys, rotary positions, a feature map) no matrix is the circuit,
and the functions refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from heed_core.layers import matrix_and_bias


@dataclass(frozen=True, kw_only=True)
class Circuits:
    """The circuits of the heads of one layer.

    Attributes:
        kq: x^T kq[h] y is the score of the query y with the key x.
        ov: ov[h] x is what a token x adds to the output, times its weight.
    """

    kq: Float[Tensor, "h k c"]
    ov: Float[Tensor, "h o k"]


def kq_ov_circuits(layer: nn.Module) -> Circuits:
    """Read the circuits of an attention layer; they keep the graph of its weights.

    Raises:
        TypeError: The layer has not the projections of an attention.
        ValueError: Something acts between its projections and its products.

    Example:
        >>> from heed_core.attention.multi_head import MultiHeadAttention
        >>> kq_ov_circuits(MultiHeadAttention(12, heads=3)).ov.shape
        torch.Size([3, 12, 12])
    """
    _check(layer)
    return Circuits(kq=key_query_circuits(layer), ov=output_value_circuits(layer))


def key_query_circuits(layer: nn.Module) -> Float[Tensor, "h k c"]:
    """KQ_h = scale K_h^T Q_h of the heads of a layer that `kq_ov_circuits` reads, unchecked."""
    query, key = _by_head(layer, "query"), _by_head(layer, "key")
    return (key.mT @ query) * _scale(layer, head_dim=query.shape[1])


def output_value_circuits(layer: nn.Module) -> Float[Tensor, "h o k"]:
    """OV_h = O_h V_h of the heads of a layer that `kq_ov_circuits` reads, unchecked."""
    out, _ = matrix_and_bias(cast(nn.Module, layer.out))
    columns = out.view(out.shape[0], _heads(layer), -1).transpose(0, 1)  # (h, o, d)
    return columns @ _by_head(layer, "value")


def _heads(layer: nn.Module) -> int:
    return cast(int, layer.heads)


def _by_head(layer: nn.Module, part: str) -> Tensor:
    """The rows of a projection for each head of queries: (h, d, c)."""
    weight, heads = matrix_and_bias(getattr(layer, part))[0], _heads(layer)
    groups = heads if part == "query" else getattr(layer, "kv_heads", heads)
    rows = weight.view(groups, -1, weight.shape[1])
    return rows if groups == heads else rows.repeat_interleave(heads // groups, 0)


def _scale(layer: nn.Module, *, head_dim: int) -> float:
    """The layer's own scale, or that of its site, or head_dim ** -0.5."""
    for holder in (layer, getattr(layer, "attend", None)):
        scale = getattr(holder, "scale", None)
        if scale is not None:
            return float(scale)
    return float(head_dim**-0.5)


def _check(layer: nn.Module) -> None:
    name = type(layer).__name__
    if not isinstance(layer, known := _layers()):
        raise TypeError(
            f"{name} has no circuits that can be read; layers that have: "
            + ", ".join(kind.__name__ for kind in known)
        )
    between = {
        "query_norm": "a norm of the queries",
        "key_norm": "a norm of the keys",
        "rotary": "a rotation by position",
    }
    for attribute, what in between.items():
        if not isinstance(getattr(layer, attribute, None), nn.Identity | None):
            raise ValueError(f"{name} has no KQ circuit: {what} comes before the products")
    if getattr(layer, "features", "identity") != "identity":
        raise ValueError(f"{name} has no KQ circuit: features of queries and keys come before it")


def _layers() -> tuple[type[nn.Module], ...]:
    # Imported here: some of these layers compute with the functions of this module.
    from heed_core.attention.axial import AxialAttention
    from heed_core.attention.bilevel import BilevelAttention
    from heed_core.attention.dynamic_mask import DynamicMaskAttention
    from heed_core.attention.full_width import FullWidthAttention
    from heed_core.attention.linear import LinearAttention
    from heed_core.attention.mixture_of_heads import MixtureOfHeads
    from heed_core.attention.multi_axis import PartitionAttention
    from heed_core.attention.multi_head import MultiHeadAttention

    return (
        FullWidthAttention,
        MultiHeadAttention,
        AxialAttention,
        PartitionAttention,
        BilevelAttention,
        MixtureOfHeads,
        DynamicMaskAttention,
        LinearAttention,
    )
