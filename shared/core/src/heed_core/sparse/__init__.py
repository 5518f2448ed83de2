"""Sparse tensors on grids of any number of spatial axes, their convolutions and reductions.

    x = SparseTensor(features, coords, spatial_shape, batch_size)
    down = SparseConv3d(16, 32, 3, stride=2, padding=1)
    up = SparseInverseConv3d(32, 16, of=down)
    y = x + up(down(SubMConv3d(16, 16, (1, 3, 3))(x)))

An axis may be a circle: `SparseTensor(..., circular=(1,))`. `sparse.rulebook` tells how sites are
looked up, `sparse.backends` what computes.
"""

from heed_core.sparse.backends import BackendName, explain_backends
from heed_core.sparse.blocks import CAB, ConvActNorm
from heed_core.sparse.convolution import (
    SparseConv2d,
    SparseConv3d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SubMConv2d,
    SubMConv3d,
    sparse_conv,
    sparse_conv_inverse,
    use_backend,
)
from heed_core.sparse.scatter import scatter_reduce_rows, unique_voxels
from heed_core.sparse.tensor import RulebookCache, SparseTensor

__all__ = [
    "CAB",
    "BackendName",
    "ConvActNorm",
    "RulebookCache",
    "SparseConv2d",
    "SparseConv3d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseTensor",
    "SubMConv2d",
    "SubMConv3d",
    "explain_backends",
    "scatter_reduce_rows",
    "sparse_conv",
    "sparse_conv_inverse",
    "unique_voxels",
    "use_backend",
]
