"""Sparse convolutions: submanifold, strided, and the inverse of a strided one.

    y_j = sum over kernel cells k of W_k x_(j * stride - padding + k * dilation)  (+ bias)

is a cross-correlation over the occupied cells (Graham, Engelcke, van der Maaten, arXiv 1711.10275).

| layer | output sites | equals |
| --- | --- | --- |
| `SubMConv3d` | the input sites | a dense convolution with zero padding, read there |
| `SparseConv3d` | cells whose window holds an occupied cell | the dense strided convolution |
| `SparseInverseConv3d` | the sites that its `SparseConv3d` left | the dense transposed one there |

Weights are (out, *kernel, in). Rulebooks are found by the sites and the window of a layer, never by
a name that could be mistyped. Cost for N sites, V kernel cells and P <= N V pairs of occupied
cells: time P i o + N V log N for a new rulebook, memory N (i + o) + N V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.dispatch import autocasting
from heed_core.sparse.backends import BackendName, ConvolutionFacts, select
from heed_core.sparse.rulebook import RulebookTable, Window, per_axis, submanifold_window
from heed_core.sparse.tensor import AnyRulebook, SparseTensor

Size = int | Sequence[int]
"""One number for all axes, or one per axis."""


def sparse_conv(
    features: Float[Tensor, "n i"],
    weight: Float[Tensor, "o *kernel i"],
    rulebook: AnyRulebook,
    *,
    backend: BackendName = "auto",
) -> Float[Tensor, "m o"]:
    """Convolve rows along a rulebook.

    Inside `torch.autocast` of the CPU it runs in float32, of CUDA in the type of autocast.

    Args:
        features: One row per input site.
        weight: Of the kernel.
        rulebook: Of the input and output sites.
        backend: "auto" picks by plain facts, a name never falls back to another.

    Raises:
        ValueError: Sizes that do not fit, or an unknown back-end.
        UnsupportedBackend: The named back-end cannot run this call.
    """
    flat = weight.flatten(1, -2)  # (o, volume, i)
    if (
        tuple(features.shape) != (rulebook.num_in, flat.shape[2])
        or flat.shape[1] != rulebook.volume
    ):
        raise ValueError(
            f"features {tuple(features.shape)} and weight {tuple(weight.shape)} do not fit a "
            f"rulebook of {rulebook.num_in} rows and {rulebook.volume} kernel cells"
        )
    kind = features.device.type
    if autocasting(kind) and features.dtype != torch.float64:
        dtype = torch.float32 if kind == "cpu" else torch.get_autocast_dtype(kind)
        features, flat = features.to(dtype), flat.to(dtype)
    facts = ConvolutionFacts(kind, features.dtype, isinstance(rulebook, RulebookTable))
    chosen = select(facts, backend)
    if not autocasting(kind):
        return chosen.run(features, flat, rulebook)
    with torch.autocast(kind, enabled=False):
        return chosen.run(features, flat, rulebook)


def sparse_conv_inverse(
    features: Float[Tensor, "m i"],
    weight: Float[Tensor, "o *kernel i"],
    rulebook: AnyRulebook,
    *,
    backend: BackendName = "auto",
) -> Float[Tensor, "n o"]:
    """Convolve rows against a rulebook: from its output sites to its input sites.

    Args:
        features: One row per output site of the rulebook.
        weight: Of the kernel.
        rulebook: Of the convolution to invert.
        backend: As for `sparse_conv`.
    """
    return sparse_conv(features, weight, rulebook.swapped(), backend=backend)


def use_backend(model: nn.Module, backend: BackendName) -> None:
    """Let all sparse convolutions of a model run on the same back-end.

    Raises:
        ValueError: `backend` is not the name of a back-end.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    for module in model.modules():
        if isinstance(module, _SparseConvolution):
            module.backend = backend


class _SparseConvolution(nn.Module):
    """Weight, bias and back-end."""

    axes: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        *,
        bias: bool,
        backend: BackendName,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"in_channels and out_channels must be at least 1, got {in_channels} and "
                f"{out_channels}"
            )
        if backend not in get_args(BackendName):
            raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel = per_axis(kernel, self.axes, "kernel")
        self.backend: BackendName = backend
        self.weight = nn.Parameter(torch.empty(out_channels, *self.kernel, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch's convolutions do: uniform, bound fan_in ** -0.5."""
        bound = (self.in_channels * math.prod(self.kernel)) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """Show the sizes."""
        kernel = "x".join(map(str, self.kernel))
        return f"{self.in_channels} -> {self.out_channels}, {kernel}, bias={self.bias is not None}"

    def _check(self, x: SparseTensor) -> None:
        if x.features.shape[1] != self.in_channels or len(x.spatial_shape) != self.axes:
            raise ValueError(
                f"expected {self.in_channels} channels on {self.axes} spatial axes, got "
                f"{x.features.shape[1]} on {len(x.spatial_shape)}"
            )

    def _biased(self, features: Tensor) -> Tensor:
        return features if self.bias is None else features + self.bias.to(features.dtype)


class SubMConv3d(_SparseConvolution):
    """A convolution that keeps the sites: no stride, no padding to choose.

    A kernel of one cell is a linear map.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Cells per axis.
        dilation: Input cells between two kernel cells.
        bias: Whether a bias is added.
        backend: As for `sparse_conv`.

    Example:
        >>> x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 1, 0]]), (4, 4, 2), 1)
        >>> SubMConv3d(2, 5, (1, 3, 3))(x).features.shape
        torch.Size([1, 5])
    """

    axes = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        *,
        dilation: Size = 1,
        bias: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, bias=bias, backend=backend)
        self.window = submanifold_window(self.kernel, per_axis(dilation, self.axes, "dilation"))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve on the sites of `x`."""
        self._check(x)
        if self.window.volume == 1:
            return x.with_features(F.linear(x.features, self.weight.flatten(1), self.bias))
        rulebook = x.cache.submanifold(x.level, self.window)
        output = sparse_conv(x.features, self.weight, rulebook, backend=self.backend)
        return x.with_features(self._biased(output))


class SparseConv3d(_SparseConvolution):
    """A convolution that makes sites wherever its window holds an occupied cell.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel: Cells per axis.
        stride: Input cells between two output cells.
        padding: Empty cells around the grid. Without enough of it, cells at the border can be read
            by no window.
        dilation: Input cells between two kernel cells.
        bias: Whether a bias is added.
        backend: As for `sparse_conv`.
    """

    axes = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Size,
        *,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        bias: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, bias=bias, backend=backend)
        self.window = Window(
            kernel=self.kernel,
            stride=per_axis(stride, self.axes, "stride"),
            padding=per_axis(padding, self.axes, "padding"),
            dilation=per_axis(dilation, self.axes, "dilation"),
            submanifold=False,
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve onto the sites of a new level."""
        self._check(x)
        rulebook, level = x.cache.strided(x.level, self.window)
        output = sparse_conv(x.features, self.weight, rulebook, backend=self.backend)
        return x.on_level(level, self._biased(output))


class SparseInverseConv3d(_SparseConvolution):
    """A convolution back onto the sites that a strided convolution left.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        of: The strided convolution to invert; its kernel, stride and padding are used, not its
            weight.
        bias: Whether a bias is added.
        backend: As for `sparse_conv`.

    Example:
        >>> down = SparseConv3d(2, 4, 3, stride=2, padding=1)
        >>> up = SparseInverseConv3d(4, 2, of=down)
        >>> x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 1, 0]]), (4, 4, 2), 1)
        >>> up(down(x)).coords is x.coords
        True
    """

    axes = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        of: SparseConv3d,
        bias: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(in_channels, out_channels, of.kernel, bias=bias, backend=backend)
        self.window = of.window

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve onto the sites that were left.

        Raises:
            ValueError: The sites of `x` were not made by a convolution with this window.
        """
        self._check(x)
        rulebook, level = x.cache.back(x.level, self.window)
        output = sparse_conv_inverse(x.features, self.weight, rulebook, backend=self.backend)
        return x.on_level(level, self._biased(output))


class SubMConv2d(SubMConv3d):
    """`SubMConv3d` on two spatial axes."""

    axes = 2


class SparseConv2d(SparseConv3d):
    """`SparseConv3d` on two spatial axes."""

    axes = 2


class SparseInverseConv2d(SparseInverseConv3d):
    """`SparseInverseConv3d` on two spatial axes."""

    axes = 2
