"""Convolutional parts that attention networks of vision are built with, for maps (b, c, h, w).

* `SqueezeExcite`: channels are gated by the means of all channels (arXiv 1709.01507).
* `GlobalResponseNorm`: channels compete by their norms over the map (arXiv 2301.00808).
* `MapLayerNorm`, `MapLayerScale`: over channels at each place; a learned scale and shift.
* `DilatedReparamConv`: a large depth-wise kernel trained beside small dilated ones, merged into one
  convolution afterwards (UniRepLKNet, arXiv 2311.15599; OverLoCK, arXiv 2502.20087).
* `MBConv`: the inverted bottleneck before attention in MaxViT (arXiv 2204.01697, 1801.04381).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.tokens import check_real

Gate = Literal["silu", "gelu", "relu"]

BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
"""Side of the large kernel -> (side, dilation) of those beside it."""


class SqueezeExcite(nn.Module):
    """y = x * sigmoid(W_2 act(W_1 mean(x) + b_1) + b_2), the mean over all places.

    Args:
        dim: Channels.
        hidden: Channels between the layers.
        activation: Between them.

    Example:
        >>> SqueezeExcite(16, hidden=4)(torch.randn(2, 16, 5, 7)).shape
        torch.Size([2, 16, 5, 7])
    """

    def __init__(self, dim: int, *, hidden: int, activation: Gate = "silu") -> None:
        super().__init__()
        functions: dict[str, Callable[[Tensor], Tensor]]
        functions = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
        if activation not in functions:
            raise ValueError(f"activation must be one of {sorted(functions)}, got {activation!r}")
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        self.dim, self.activate = dim, functions[activation]
        self.squeeze = nn.Linear(dim, hidden)
        self.excite = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Gate the channels."""
        _check_map(x, self.dim)
        gate = self.excite(self.activate(self.squeeze(x.flatten(2).mean(2)))).sigmoid()
        return x * _as_map(gate, x)


class GlobalResponseNorm(nn.Module):
    """y = (gamma * n + 1) x + beta,  n_c = |x_c| / (mean over channels of |x_c| + eps).

    |x_c| is the Euclidean norm over all places. gamma and beta start at 0: the identity.

    Args:
        dim: Channels.
        eps: Added to the mean.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Normalise."""
        _check_map(x, self.dim)
        size = x.flatten(2).norm(dim=2)
        share = size / (size.mean(1, keepdim=True) + self.eps)
        gain = _as_map(self.gamma * share + 1, x)
        return gain * x + _as_map(self.beta[None], x)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.dim}, eps={self.eps}"


class MapLayerNorm(nn.LayerNorm):
    """`LayerNorm` over the channels at each place of a map (b, c, *spatial)."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Normalise."""
        _check_map(x, self.normalized_shape[0])
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MapLayerScale(nn.Module):
    """A learned scale and shift per channel.

    Args:
        dim: Channels.
        start: Of the scales; shifts start at 0.
    """

    def __init__(self, dim: int, *, start: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.full((dim,), start))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Scale and shift."""
        _check_map(x, self.dim)
        return x * _as_map(self.weight[None], x) + _as_map(self.bias[None], x)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"{self.dim}"


class DilatedReparamConv(nn.Module):
    """A large depth-wise convolution plus dilated small ones, each with its batch norm.

        y = BN(K * x) + sum over branches (k_i, r_i) of BN(K_i * x dilated by r_i)

    Args:
        dim: Channels.
        kernel: Odd side of the large kernel, 5 to 17: `BRANCHES` has the small ones.

    Example:
        >>> conv = DilatedReparamConv(6, kernel=9).eval()
        >>> x = torch.randn(1, 6, 12, 10)
        >>> torch.allclose(conv.merged()(x), conv(x), atol=1e-5)
        True
    """

    def __init__(self, dim: int, *, kernel: int) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            raise ValueError(f"kernel must be one of {sorted(BRANCHES)}, got {kernel}")
        self.dim, self.kernel, self.branches = dim, kernel, BRANCHES[kernel]
        self.large = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.large_norm = nn.BatchNorm2d(dim)
        self.small = nn.ModuleList(
            nn.Conv2d(
                dim, dim, side, padding=step * (side // 2), dilation=step, groups=dim, bias=False
            )
            for side, step in self.branches
        )
        self.small_norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in self.branches)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Convolve."""
        _check_map(x, self.dim, axes=2)
        y = self.large_norm(self.large(x))
        for conv, norm in zip(self.small, self.small_norms, strict=True):
            y = y + norm(conv(x))
        return cast(Tensor, y)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        """One convolution with a bias that computes the same in eval mode."""
        kernel, bias = _folded(self.large, self.large_norm)
        for small, norm, (_, step) in zip(self.small, self.small_norms, self.branches, strict=True):
            part, shift = _folded(cast(nn.Conv2d, small), cast(nn.BatchNorm2d, norm))
            kernel += _spread(part, step, self.kernel)
            bias += shift
        conv = nn.Conv2d(self.dim, self.dim, self.kernel, padding="same", groups=self.dim)
        conv.to(kernel)
        conv.weight.copy_(kernel)
        cast(Tensor, conv.bias).copy_(bias)
        return conv

    def extra_repr(self) -> str:
        """Show the branches."""
        return f"kernel={self.kernel}, branches={self.branches}"


class MBConv(nn.Module):
    """MaxViT's inverted bottleneck.

        y = W_3 SE(gelu(BN(depth-wise 3 x 3 (gelu(BN(W_1 BN(x))))))) + shortcut(x)

    `expansion` times `out_dim` channels inside; GELU by tanh; a stride pads as TensorFlow's "SAME"
    (nothing before and one cell after an even size). The shortcut averages 2 x 2 cells where there
    is a stride, and maps channels where their number changes.

    Args:
        dim: Channels in.
        out_dim: Channels out.
        stride: 1 or 2.
        expansion: Of `out_dim`.

    Example:
        >>> MBConv(16, 24, stride=2)(torch.randn(1, 16, 12, 18)).shape
        torch.Size([1, 24, 6, 9])
    """

    def __init__(self, dim: int, out_dim: int, *, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        inner, eps = out_dim * expansion, 1e-3
        self.dim, self.stride = dim, stride
        self.norm = nn.BatchNorm2d(dim, eps=eps, momentum=0.01)
        self.expand = nn.Conv2d(dim, inner, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(inner, eps=eps, momentum=0.01)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride=stride, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, eps=eps, momentum=0.01)
        self.gate = SqueezeExcite(inner, hidden=max(1, out_dim // 4))
        self.contract = nn.Conv2d(inner, out_dim, 1)
        self.shortcut = None if dim == out_dim else nn.Conv2d(dim, out_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d p q"]:
        """Convolve; with stride 2 both sizes must be even.

        Raises:
            ValueError: Another number of channels, or an odd size with a stride.
        """
        _check_map(x, self.dim, axes=2)
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"x must have sizes that stride 2 divides, got {tuple(x.shape[2:])}")
        y = F.gelu(self.expand_norm(self.expand(self.norm(x))), approximate="tanh")
        before = 1 if self.stride == 1 else 0
        y = self.depthwise(F.pad(y, (before, 1, before, 1)))
        y = self.gate(F.gelu(self.depthwise_norm(y), approximate="tanh"))
        short = x if self.stride == 1 else F.avg_pool2d(x, 2)
        return cast(
            Tensor, self.contract(y) + (short if self.shortcut is None else self.shortcut(short))
        )


def dilated_reparam_from_overlock(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of OverLoCK's (and UniRepLKNet's) dilated block.

    Raises:
        ValueError: A name that it does not have, or no known large kernel.
    """
    side = state["lk_origin.weight"].shape[-1] if "lk_origin.weight" in state else 0
    names = {"lk_origin": "large", "origin_bn": "large_norm"}
    for index, (small, step) in enumerate(BRANCHES.get(side, ())):
        names[f"dil_conv_k{small}_{step}"] = f"small.{index}"
        names[f"dil_bn_k{small}_{step}"] = f"small_norms.{index}"
    return _renamed(state, names, "a dilated block of OverLoCK")


def mbconv_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of timm's `MbConvBlock` as in `maxvit_*_tf_*`.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {
        "pre_norm": "norm",
        "conv1_1x1": "expand",
        "norm1": "expand_norm",
        "conv2_kxk": "depthwise",
        "norm2": "depthwise_norm",
        "se.fc1": "gate.squeeze",
        "se.fc2": "gate.excite",
        "conv3_1x1": "contract",
        "shortcut.expand": "shortcut",
    }
    renamed = _renamed(state, names, "timm's MbConvBlock")
    for name in ("gate.squeeze.weight", "gate.excite.weight"):
        renamed[name] = renamed[name].flatten(1)
    return renamed


def _renamed(
    state: Mapping[str, Tensor], names: Mapping[str, str], whose: str
) -> dict[str, Tensor]:
    parts = {name: name.rpartition(".") for name in state}
    if unknown := sorted(name for name, part in parts.items() if part[0] not in names):
        raise ValueError(f"{unknown[0]!r} is no weight of {whose}")
    return {f"{names[parts[name][0]]}.{parts[name][2]}": tensor for name, tensor in state.items()}


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution without bias and the batch norm after it."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gain = norm.weight / (variance + norm.eps).sqrt()
    return conv.weight * gain[:, None, None, None], norm.bias - mean * gain


def _spread(kernel: Tensor, step: int, side: int) -> Tensor:
    """A dilated kernel as a dense one, in the middle of a larger."""
    small = kernel.shape[-1]
    dense = kernel.new_zeros(*kernel.shape[:2], side, side)
    first = side // 2 - step * (small // 2)
    places = slice(first, first + step * (small - 1) + 1, step)
    dense[:, :, places, places] = kernel
    return dense


def _as_map(rows: Tensor, x: Tensor) -> Tensor:
    """(b, c) beside a map (b, c, *spatial)."""
    return rows.reshape(*rows.shape, *[1] * (x.dim() - 2))


def _check_map(x: Tensor, dim: int, *, axes: int | None = None) -> None:
    if x.dim() < 3 or x.shape[1] != dim or (axes is not None and x.dim() != axes + 2):
        places = "*spatial" if axes is None else "height, width"
        raise ValueError(f"x must be (batch, {dim} channels, {places}), got {tuple(x.shape)}")
    check_real(x=x)
