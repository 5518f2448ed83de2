"""What the published Cylinder3D checkpoints computed: convolutions with borrowed neighbours.

The released code names one table of neighbours for all submanifold convolutions of a block. Version
1.x of its sparse convolution library made the table for the first kernel and used it for the others
without a word; later versions refuse. A convolution with k cells whose block begins with a kernel
of m <= k cells so applied its first m weights to the neighbours of that first kernel: in the
decoder a 3x3x3 convolution used 9 of its 27 weights, and every convolution of the stem ran as
1x3x3. Weights that were trained so do not fit the kernels that the paper means.
"""

import math

from torch import nn

from heed_core.sparse import SparseTensor, SubMConv3d, sparse_conv
from heed_core.sparse.rulebook import Window


class BorrowedNeighbours(SubMConv3d):
    """A submanifold convolution that reads where another kernel of as many cells, or fewer, does.

    Args:
        conv: The convolution, whose weights are taken over.
        window: Where it reads.
    """

    def __init__(self, conv: SubMConv3d, window: Window) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel, backend=conv.backend)
        if window.volume > math.prod(conv.kernel):
            raise ValueError(f"a kernel {conv.kernel} has no weights for {window.volume} cells")
        self.weight, self.bias, self.window = conv.weight, conv.bias, window

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve on the sites of `x`."""
        self._check(x)
        used = self.weight.flatten(1, 3)[:, : self.window.volume]
        weight = used.reshape(self.out_channels, *self.window.kernel, self.in_channels)
        rulebook = x.cache.submanifold(x.level, self.window)
        output = sparse_conv(x.features, weight, rulebook, backend=self.backend)
        return x.with_features(self._biased(output))


def share_neighbours(block: nn.Module) -> None:
    """Let all submanifold convolutions of a block read where the first of them does."""
    names = [name for name, part in block.named_modules() if isinstance(part, SubMConv3d)]
    convs = {name: block.get_submodule(name) for name in names}
    first = convs[names[0]]
    assert isinstance(first, SubMConv3d)
    for name, conv in convs.items():
        assert isinstance(conv, SubMConv3d)
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, BorrowedNeighbours(conv, first.window))
