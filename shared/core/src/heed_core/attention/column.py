"""Column attention: every vertical column of a sparse grid weighs the channels of its cells.

    C = BN(LeakyReLU(conv_{1x1xD}(X)))           one row per occupied column, height by height
    S = W_dec LeakyReLU(W_enc C + b) + b'        scores of a column, through o / r channels
    w = softmax over channels of S               one weight per column and channel
    y_j = o * w_c(j) * (conv^-1_{1x1xD}(S))_j    c(j) the column of cell j; back onto the cells of X

Zhao et al., "CurbNet" (arXiv 2403.16794), equations (3) to (7): a height step of a few cells is
seen by an operator that looks at a whole column at once. The grid's last axis is the column.

Differs from the paper: the weights are multiplied by the number of channels o, so that they are 1
on average (`attn_norm="softmax"` leaves that out); the paper fixes neither the reduction r nor
activation and norm after the first convolution.

Cost for N occupied cells in M <= N columns, i input and o output channels: time N o (i + o) + M o^2
(no product over pairs of cells), memory (N + M)(i + o), whatever the height D of the grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from heed_core.sites import Probe
from heed_core.sparse.backends import BackendName
from heed_core.sparse.blocks import NEGATIVE_SLOPE, ConvActNorm
from heed_core.sparse.convolution import SparseConv3d, SparseInverseConv3d
from heed_core.sparse.rulebook import linear_keys
from heed_core.sparse.tensor import SparseTensor

AttentionNorm = Literal["unit_mean", "softmax"]
"""Weights of a column are 1 on average, or sum to 1."""


def column_attention(
    values: Float[Tensor, "n c"],
    scores: Float[Tensor, "m c"],
    column: Int64[Tensor, " n"],
    *,
    attn_norm: AttentionNorm = "unit_mean",
) -> Float[Tensor, "n c"]:
    """Weigh the channels of each cell by the softmax over the scores of its column.

    Args:
        values: One row per cell.
        scores: One row per column.
        column: Row of each cell's column in `scores`.
        attn_norm: Whether the weights of a column are 1 on average or sum to 1.

    Raises:
        ValueError: Sizes that do not fit, or an unknown `attn_norm`.
    """
    if values.shape[1:] != scores.shape[1:] or column.shape != values.shape[:1]:
        raise ValueError(
            "values must be (n, c), scores (m, c) and column (n,), got "
            f"{tuple(values.shape)}, {tuple(scores.shape)} and {tuple(column.shape)}"
        )
    if attn_norm not in ("unit_mean", "softmax"):
        raise ValueError(f"attn_norm must be 'unit_mean' or 'softmax', got {attn_norm!r}")
    weights = _channel_weights(scores)
    if attn_norm == "unit_mean":
        weights = weights * scores.shape[1]
    return weights.to(values.dtype).index_select(0, column) * values


def _channel_weights(scores: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    return torch.softmax(scores, dim=1, dtype=torch.promote_types(scores.dtype, torch.float32))


class ColumnAttention(nn.Module):
    """Column attention with its convolutions and its bottleneck.

    The site is `probe`: the softmax over channels, weights (1, 1, columns, channels), for the
    columns that `columns` names. It can be observed, not steered.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        column: Cells of a column: the size of the grid's last axis.
        reduction: Factor of the bottleneck.
        attn_norm: Whether the weights of a column are 1 on average or sum to 1.
        backend: As for `heed_core.sparse.sparse_conv`.

    Example:
        >>> x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 1, 3]]), (4, 4, 8), 1)
        >>> ColumnAttention(2, 8, column=8).eval()(x).features.shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        column: int,
        reduction: int = 4,
        attn_norm: AttentionNorm = "unit_mean",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        if reduction < 1 or out_channels % reduction:
            raise ValueError(
                f"out_channels must be a multiple of reduction, got {out_channels} and {reduction}"
            )
        self.column = column
        self.attn_norm: AttentionNorm = attn_norm
        whole = (1, 1, column)
        collapse = SparseConv3d(in_channels, out_channels, whole, stride=whole, backend=backend)
        self.squeeze = ConvActNorm(collapse)
        self.encode = nn.Linear(out_channels, out_channels // reduction)
        self.decode = nn.Linear(out_channels // reduction, out_channels)
        self.expand = SparseInverseConv3d(out_channels, out_channels, of=collapse, backend=backend)
        self.probe = Probe()

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Onto the cells of `x`.

        Raises:
            ValueError: The columns of the grid have another height.
        """
        if x.spatial_shape[-1] != self.column:
            raise ValueError(
                f"columns have {self.column} cells, but the grid is {x.spatial_shape}: build the "
                "attention for the last size of its level"
            )
        squeezed: SparseTensor = self.squeeze(x)
        hidden = F.leaky_relu_(self.encode(squeezed.features), NEGATIVE_SLOPE)
        scores: Tensor = self.decode(hidden)
        self.probe(lambda: _channel_weights(scores)[None, None])
        values = self.expand(squeezed.with_features(scores)).features
        column = _column_rows(x, squeezed)
        return x.with_features(column_attention(values, scores, column, attn_norm=self.attn_norm))

    def columns(self, x: SparseTensor) -> Int[Tensor, "m coordinates"]:
        """Coordinates (with a last index of 0) of the columns, in the order of the weights."""
        _, level = x.cache.strided(x.level, self.expand.window)
        return x.cache.sites(level).coords


def _column_rows(x: SparseTensor, columns: SparseTensor) -> Int64[Tensor, " n"]:
    """Row of each cell's column."""
    base = x.coords * x.coords.new_tensor([1] * (x.coords.shape[1] - 1) + [0])
    return columns.sites.find(linear_keys(base, columns.spatial_shape, x.batch_size))
