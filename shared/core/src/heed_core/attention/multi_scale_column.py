"""Multi-scale channel attention (MSCA): receptive fields of several sizes and column attention.

    X_s = sum over k of CAB_{k, s}(X)            s in {1, 3, 5}, k in {3x1x3, 1x3x3, 3x3x1}
    T_5 = X_5,  T_3 = X_3 + T_5,  T_1 = X_1 + T_3
    X_ms = BN(LeakyReLU(W_f [T_1; T_3; T_5]))
    y = X_ms + column_attention(X)

CAB is convolution, LeakyReLU, batch norm. Zhao et al., "CurbNet" (arXiv 2403.16794), equations (1)
to (8): points thin out with the range, which asks for several scales in the plane; the step of a
curb is small, which asks for a whole column in height.

Differs from the paper, which fixes neither how a scale is made nor the dense pyramid: a scale is by
default the dilation s of a submanifold convolution, which reaches as far as a grid of stride s and
keeps the sites, so that equation (8) is a plain sum. `scale_mode="stride"` takes the scale for a
stride: a strided convolution and its inverse; cells outside of every window get zeros there.

Cost for N occupied cells, P <= N * 81 pairs of neighbours under the nine kernels, i input and o
output channels: time P i o + N o^2 and column attention, memory N (i + 3 o): linear in the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from heed_core.attention.column import AttentionNorm, ColumnAttention
from heed_core.sparse.backends import BackendName
from heed_core.sparse.blocks import CAB, ConvActNorm, activate_norm_
from heed_core.sparse.convolution import SparseConv3d, SparseInverseConv3d
from heed_core.sparse.rulebook import Cell
from heed_core.sparse.tensor import SparseTensor

ScaleMode = Literal["dilation", "stride"]
"""What a scale is."""

PLANES: tuple[Cell, ...] = ((3, 1, 3), (1, 3, 3), (3, 3, 1))
"""Kernels in the planes xz, yz and xy."""


class StridedScale(nn.Module):
    """A convolution with a stride, and back onto the cells that it left.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Cells per axis; the stride holds on axes with more than one.
        stride: Of the convolution.
        backend: As for `heed_core.sparse.sparse_conv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Cell,
        *,
        stride: int,
        backend: BackendName,
    ) -> None:
        super().__init__()
        conv = SparseConv3d(
            in_channels,
            out_channels,
            kernel,
            stride=[stride if size > 1 else 1 for size in kernel],
            padding=[size // 2 for size in kernel],
            backend=backend,
        )
        self.down = ConvActNorm(conv)
        self.up = SparseInverseConv3d(out_channels, out_channels, of=conv, backend=backend)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Onto the cells of `x`."""
        y: SparseTensor = self.up(self.down(x))
        return y


class MSCA(nn.Module):
    """Multi-scale convolutions fused in a pyramid, plus column attention.

    The site is `attention.probe`, see `ColumnAttention`.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        column: Cells of a column: the size of the grid's last axis.
        scales: Receptive fields, small to large.
        reduction: Factor of the attention's bottleneck.
        scale_mode: Whether a scale is a dilation or a stride; at scale 1 both are the same.
        attn_norm: Whether the weights of a column are 1 on average or sum to 1.
        backend: As for `heed_core.sparse.sparse_conv`.

    Example:
        >>> sum(p.numel() for p in MSCA(32, 64, column=32).parameters())
        378320
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        column: int,
        scales: Sequence[int] = (1, 3, 5),
        reduction: int = 4,
        scale_mode: ScaleMode = "dilation",
        attn_norm: AttentionNorm = "unit_mean",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        if not scales or min(scales) < 1 or list(scales) != sorted(set(scales)):
            raise ValueError(f"scales must ascend from at least 1, got {tuple(scales)}")
        if scale_mode not in ("dilation", "stride"):
            raise ValueError(f"scale_mode must be 'dilation' or 'stride', got {scale_mode!r}")

        def plane(kernel: Cell, scale: int) -> nn.Module:
            if scale_mode == "stride" and scale > 1:
                return StridedScale(
                    in_channels, out_channels, kernel, stride=scale, backend=backend
                )
            return CAB(in_channels, out_channels, kernel, dilation=scale, backend=backend)

        self.scales = nn.ModuleList(
            nn.ModuleList(plane(kernel, scale) for kernel in PLANES) for scale in scales
        )
        self.fuse = nn.Linear(len(scales) * out_channels, out_channels, bias=False)
        self.fuse_norm = nn.BatchNorm1d(out_channels)
        self.attention = ColumnAttention(
            in_channels,
            out_channels,
            column=column,
            reduction=reduction,
            attn_norm=attn_norm,
            backend=backend,
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Onto the cells of `x`."""
        attended: SparseTensor = self.attention(x)
        return x.with_features(self.multi_scale(x) + attended.features)

    def multi_scale(self, x: SparseTensor) -> Tensor:
        """Fused features of all scales (n, out_channels)."""
        levels: list[Tensor] = []
        for planes in reversed(self.scales):
            assert isinstance(planes, nn.ModuleList)
            level: Tensor = planes[0](x).features
            for plane in planes[1:]:
                level += plane(x).features
            if levels:
                level += levels[0]
            levels.insert(0, level)
        return activate_norm_(self.fuse_norm, self.fuse(torch.cat(levels, dim=1)))
