"""Blocks of sparse networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as registry

from heed_core.sparse.backends import BackendName
from heed_core.sparse.convolution import Size, SparseConv3d, SubMConv3d
from heed_core.sparse.tensor import SparseTensor

NEGATIVE_SLOPE = 0.01


def norm_rows(norm: nn.Module, rows: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Batch normalisation; fewer than two rows, which have no variance, are not learnt from.

    In training too they are normalised by the running statistics, which stay as they are: the
    coarsest level of a small scan may be one cell. A norm that several processes share, which is no
    `BatchNorm1d`, is always called: the others wait for it.
    """
    if isinstance(norm, nn.BatchNorm1d) and not torch.compiler.is_compiling() and rows.shape[0] < 2:
        return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    normed: Tensor = norm(rows)
    return normed


def activate_norm_(norm: nn.Module, rows: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """LeakyReLU(0.01), then batch normalisation; `rows` are overwritten.

    Where nothing is to be learnt from them no new rows are made: for large clouds the system takes
    longer to hand out memory than the norm takes to compute. A norm with hooks, its own or those of
    all modules, is called.
    """
    rows = F.leaky_relu_(rows, NEGATIVE_SLOPE)
    if not isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm):  # another put in its place
        return norm_rows(norm, rows)
    learning = norm.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
    mean, variance = norm.running_mean, norm.running_var
    if learning or _hooked(norm) or not norm.affine or mean is None or variance is None:
        return norm_rows(norm, rows)
    scale = norm.weight * (variance + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    if rows.dtype != scale.dtype:
        return norm_rows(norm, rows)
    return torch.addcmul(shift, rows, scale, out=rows)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody is told when the module is called."""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or registry._global_forward_hooks or registry._global_forward_pre_hooks)


class ConvActNorm(nn.Module):
    """Convolution, then LeakyReLU(0.01), then batch normalisation of the rows.

    The activation comes before the norm, as in Cylinder3D (Zhu et al., arXiv 2011.10033).

    Args:
        conv: A sparse convolution without bias.
    """

    def __init__(self, conv: SubMConv3d | SparseConv3d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm1d(conv.out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Onto the sites of the convolution."""
        y: SparseTensor = self.conv(x)
        return y.with_features(activate_norm_(self.norm, y.features))


class CAB(ConvActNorm):
    """`ConvActNorm` of a submanifold convolution.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Cells per axis.
        dilation: Input cells between two kernel cells.
        backend: As for `sparse_conv`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        *,
        dilation: Size = 1,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            SubMConv3d(in_channels, out_channels, kernel, dilation=dilation, backend=backend)
        )
