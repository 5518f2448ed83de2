"""Multi-axis gated MLP: places of blocks and of grids are mixed by learned matrices, as gates.

    gate along an axis of n places:  u * (W v + b + 1)            with v normalised, W n x n
    gMLP(x)  = x + W_out gate(GELU(W_in LN(x)))                   along blocks or along grids
    MAB(x)   = x + W_out [gMLP_grid(u), gMLP_block(v)]            [u, v] = GELU(W_in LN(x))
    G(z)     = W_out [W_g u + b_g, W_b v + b_b]                   [u, v] = GELU(W_in LN(z))
    cross:     y' = W_y (y * G(x)) + ys,   x' = W_x (x * G(y)) + y' + xs

Tu et al., "MAXIM: multi-axis MLP for image processing" (arXiv 2201.02973). Blocks and grids are
those of `heed_core.attention.multi_axis`; the matrices have the size of a block or a grid, not of
the image, so the same weights serve every image whose sides they divide. GELU is its tanh form,
layer norms have eps 1e-6.

Cost for N cells of width C, blocks of b and grids of g cells: time N C (b + g) + N C^2, memory N C.
The mixing matrices do not depend on the input and what they give multiplies other features: there
are no effective weights to observe, and nothing to steer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.attention.axial import check_grid
from heed_core.attention.multi_axis import Mode, partition, unpartition
from heed_core.tokens import check_real, check_type

_EPS = 1e-6


def axis_linear(
    x: Float[Tensor, "*batch n c"],
    weight: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, "*batch m c"]:
    """Mix the places of the last axis but one, for every channel alike.

    Args:
        x: Places and their channels.
        weight: Rows are the new places.
        bias: Of each new place.
    """
    if x.dim() < 2 or weight.dim() != 2 or weight.shape[1] != x.shape[-2]:
        raise ValueError(
            f"weight must be (places, {x.shape[-2] if x.dim() > 1 else 'n'}) for x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    return F.linear(x.mT, weight, bias).mT


def _along_places(mix: nn.Module, x: Tensor) -> Tensor:
    """`axis_linear` by a layer, which is called."""
    mixed: Tensor = mix(x.mT)
    return mixed.mT


def spatial_gate(u: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """U * (v + 1): the identity in u where v is zero."""
    return u * (v + 1)


class AxisGatedMlp(nn.Module):
    """Gated MLP along the places of blocks or of grids, with its residual.

    Args:
        dim: Channels of a cell, in and out.
        size: Cells of a block, or of a grid, along each axis.
        mode: "block" or "grid", as in `heed_core.attention.multi_axis.partition`.
        dropout: Of what is added to the residual.

    Example:
        >>> AxisGatedMlp(8, size=(2, 3), mode="grid")(torch.randn(1, 8, 9, 8)).shape
        torch.Size([1, 8, 9, 8])
    """

    def __init__(
        self, dim: int, *, size: Sequence[int], mode: Mode = "block", dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_sizes(dim, size)
        if mode not in ("block", "grid"):
            raise ValueError(f"mode must be 'block' or 'grid', got {mode!r}")
        self.dim, self.size = dim, tuple(size)
        self.mode: Mode = mode
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.expand = nn.Linear(dim, 2 * dim)
        self.gate_norm = nn.LayerNorm(dim, eps=_EPS)
        self.mix = nn.Linear(math.prod(size), math.prod(size))
        self.contract = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid."""
        check_grid(x, self.dim, axes=len(self.size), layer=self.expand)
        hidden = _gelu(self.expand(self.norm(x)))
        u, v = partition(hidden, self.size, mode=self.mode).chunk(2, dim=-1)
        v = _along_places(self.mix, self.gate_norm(v))
        gated = unpartition(spatial_gate(u, v), self.size, x.shape[1:-1], mode=self.mode)
        return x + cast(Tensor, self.dropout(self.contract(gated)))

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"size={self.size}, mode={self.mode!r}"


class MultiAxisMlp(nn.Module):
    """Half of the channels through a grid's gated MLP, half through a block's, with a residual.

    Args:
        dim: Channels of a cell, in and out.
        block: Cells of a block along each axis.
        grid: Cells of a grid along each axis; those of a block if not given.
        dropout: Of what is added to the residuals.

    Example:
        >>> MultiAxisMlp(8, block=(4, 4), grid=(2, 2))(torch.randn(1, 8, 12, 8)).shape
        torch.Size([1, 8, 12, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        block: Sequence[int],
        grid: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        grid = block if grid is None else grid
        self.dim, self.spatial_axes = dim, len(block)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.expand = nn.Linear(dim, 2 * dim)
        self.grid = AxisGatedMlp(dim, size=grid, mode="grid", dropout=dropout)
        self.block = AxisGatedMlp(dim, size=block, mode="block", dropout=dropout)
        self.contract = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid."""
        check_grid(x, self.dim, axes=self.spatial_axes, layer=self.expand)
        u, v = _gelu(self.expand(self.norm(x))).chunk(2, dim=-1)
        joined = torch.cat([self.grid(u), self.block(v)], dim=-1)
        return x + cast(Tensor, self.dropout(self.contract(joined)))


class MultiAxisGate(nn.Module):
    """Gating weights from a grid: half of the channels mixed along grids, half along blocks.

    Biases of the mixing matrices begin at one.

    Args:
        dim: Channels of a cell, in and out.
        block: Cells of a block along each axis.
        grid: Cells of a grid along each axis; those of a block if not given.
        dropout: Of the weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        block: Sequence[int],
        grid: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        grid = block if grid is None else grid
        _check_sizes(dim, block)
        _check_sizes(dim, grid)
        self.dim, self.block_size, self.grid_size = dim, tuple(block), tuple(grid)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.expand = nn.Linear(dim, 2 * dim)
        self.grid_mix = nn.Linear(math.prod(grid), math.prod(grid))
        self.block_mix = nn.Linear(math.prod(block), math.prod(block))
        self.contract = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        for mix in (self.grid_mix, self.block_mix):
            nn.init.ones_(mix.bias)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Weights for every cell and channel."""
        check_grid(x, self.dim, axes=len(self.block_size), layer=self.expand)
        u, v = _gelu(self.expand(self.norm(x))).chunk(2, dim=-1)
        u = self._mixed(u, self.grid_mix, self.grid_size, "grid")
        v = self._mixed(v, self.block_mix, self.block_size, "block")
        return cast(Tensor, self.dropout(self.contract(torch.cat([u, v], dim=-1))))

    def _mixed(self, x: Tensor, mix: nn.Module, size: tuple[int, ...], mode: Mode) -> Tensor:
        groups = _along_places(mix, partition(x, size, mode=mode))
        return unpartition(groups, size, x.shape[1:-1], mode=mode)


class CrossGating(nn.Module):
    """Two feature grids gate each other.

    Args:
        dim: Channels of both results.
        x_dim: Channels of x; `dim` if not given.
        y_dim: Channels of y; `dim` if not given.
        block: Cells of a block along each axis.
        grid: Cells of a grid along each axis; those of a block if not given.
        upsample: Double the sides of y first, by a transposed convolution (two axes).
        dropout: Of what is added to the residuals, and of the gates.

    Example:
        >>> gating = CrossGating(6, x_dim=9, y_dim=10, block=(4, 4), grid=(2, 2), upsample=True)
        >>> x, y = gating(torch.randn(1, 8, 12, 9), torch.randn(1, 4, 6, 10))
        >>> x.shape, y.shape
        (torch.Size([1, 8, 12, 6]), torch.Size([1, 8, 12, 6]))
    """

    def __init__(
        self,
        dim: int,
        *,
        x_dim: int | None = None,
        y_dim: int | None = None,
        block: Sequence[int],
        grid: Sequence[int] | None = None,
        upsample: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.x_dim = dim if x_dim is None else x_dim
        self.y_dim = dim if y_dim is None else y_dim
        if upsample and len(block) != 2:
            raise ValueError(f"upsample needs grids of two axes, block has {len(block)}")
        self.spatial_axes = len(block)
        self.up = nn.ConvTranspose2d(self.y_dim, dim, 2, stride=2) if upsample else None
        self.x_in = nn.Linear(self.x_dim, dim)
        self.y_in = nn.Linear(dim if upsample else self.y_dim, dim)
        self.x_norm = nn.LayerNorm(dim, eps=_EPS)
        self.y_norm = nn.LayerNorm(dim, eps=_EPS)
        self.x_expand = nn.Linear(dim, dim)
        self.y_expand = nn.Linear(dim, dim)
        self.x_gate = MultiAxisGate(dim, block=block, grid=grid, dropout=dropout)
        self.y_gate = MultiAxisGate(dim, block=block, grid=grid, dropout=dropout)
        self.x_out = nn.Linear(dim, dim)
        self.y_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b *spatial k"], y: Float[Tensor, "b *other m"]
    ) -> tuple[Float[Tensor, "b *spatial c"], Float[Tensor, "b *spatial c"]]:
        """Gate x by y and y by x.

        Args:
            x: One grid.
            y: The other, of the same size; with `upsample` of half the size.
        """
        check_grid(x, self.x_dim, axes=self.spatial_axes, layer=self.x_in)
        if y.dim() != x.dim() or y.shape[-1] != self.y_dim or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"y must be (batch {x.shape[0]}, {self.spatial_axes} spatial axes, {self.y_dim}), "
                f"got {tuple(y.shape)}"
            )
        check_real(y=y)
        check_type(self.y_in, y=y)
        if self.up is not None:
            y = self.up(y.movedim(-1, 1)).movedim(1, -1)
        if y.shape[1:-1] != x.shape[1:-1]:
            raise ValueError(
                f"y must cover {tuple(x.shape[1:-1])} cells as x, it covers {tuple(y.shape[1:-1])}"
            )
        x_skip, y_skip = self.x_in(x), self.y_in(y)
        x, y = _gelu(self.x_expand(self.x_norm(x_skip))), _gelu(self.y_expand(self.y_norm(y_skip)))
        by_x, by_y = self.x_gate(x), self.y_gate(y)
        y = self.dropout(self.y_out(y * by_x)) + y_skip
        x = self.dropout(self.x_out(x * by_y)) + y + x_skip
        return x, y


def multi_axis_mlp_from_maxim(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of MAXIM's `ResidualSplitHeadMultiAxisGmlpLayer`, by flax path, for ours.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"LayerNorm_in": "norm", "in_project": "expand", "out_project": "contract"}
    for ours, theirs in (("grid", "Grid"), ("block", "Block")):
        layer = f"{theirs}GmlpLayer"
        names |= {
            f"{layer}/LayerNorm": f"{ours}.norm",
            f"{layer}/in_project": f"{ours}.expand",
            f"{layer}/{theirs}GatingUnit/intermediate_layernorm": f"{ours}.gate_norm",
            f"{layer}/{theirs}GatingUnit/Dense_0": f"{ours}.mix",
            f"{layer}/out_project": f"{ours}.contract",
        }
    return _from_flax(state, names)


def cross_gating_from_maxim(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of MAXIM's `CrossGatingBlock`, by flax path, for ours.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {"ConvTranspose_0": "up", "Conv_0": "x_in", "Conv_1": "y_in"}
    for side in ("x", "y"):
        gate = f"SplitHeadMultiAxisGating_{side}"
        names |= {
            f"LayerNorm_{side}": f"{side}_norm",
            f"in_project_{side}": f"{side}_expand",
            f"out_project_{side}": f"{side}_out",
            f"{gate}/LayerNorm_in": f"{side}_gate.norm",
            f"{gate}/in_project": f"{side}_gate.expand",
            f"{gate}/Dense_0": f"{side}_gate.grid_mix",
            f"{gate}/Dense_1": f"{side}_gate.block_mix",
            f"{gate}/out_project": f"{side}_gate.contract",
        }
    return _from_flax(state, names)


def _from_flax(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, kind = name.rpartition("/")
        if path not in names or kind not in ("kernel", "bias", "scale"):
            raise ValueError(f"{name!r} is no weight of this layer of MAXIM")
        if kind == "kernel":
            tensor = _kernel(path, tensor)
        result[f"{names[path]}.{'bias' if kind == 'bias' else 'weight'}"] = tensor
    return result


def _kernel(path: str, kernel: Tensor) -> Tensor:
    """Dense (in, out), Conv (1, 1, in, out) and ConvTranspose (h, w, in, out) in torch's order."""
    if path.startswith("ConvTranspose"):
        return kernel.permute(2, 3, 0, 1).flip(2, 3).contiguous()
    return kernel.reshape(kernel.shape[-2:]).T.contiguous()


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _check_sizes(dim: int, size: Sequence[int]) -> None:
    if dim < 1 or not size or min(size) < 1:
        raise ValueError(f"dim and all sizes must be at least 1, got {dim} and {tuple(size)}")
