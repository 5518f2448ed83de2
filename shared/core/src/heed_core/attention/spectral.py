"""Spectral gating: a learned complex weight for every spatial frequency of a grid.

    Y = irfft( W * rfft(X) )        over the spatial axes, both ways orthonormal, per channel

Patro, Namboodiri and Agneeswaran, "SpectFormer: frequency and attention is what you need in a
vision transformer" (arXiv 2304.06446); the layer is that of GFNet (arXiv 2107.00645). It equals a
depth-wise *circular* convolution with the real kernel `spectral_kernel(W)`, as large as the grid.
Imaginary parts that break Hermitian symmetry (in the columns of frequency zero and, for even sizes,
Nyquist) change nothing and get no gradient; they are kept for the weights' sake.

Cost for N cells of width C: time N log N C, memory N C; parameters about N C. Transforms run in
float32 at least. `SpectralGate` states its effective weights to `observe`: per channel the N x N
circulant of the kernel (only while observed; rows do not sum to one); there is no softmax to steer.

Differs from the published code, which returns float32 for half-precision input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Probe
from heed_core.tokens import check_real


def spectral_gate(
    x: Float[Tensor, "b *spatial c"], weight: Float[Tensor, "*frequencies c 2"]
) -> Float[Tensor, "b *spatial c"]:
    """Multiply every frequency by its weight.

    Args:
        x: Grid.
        weight: Real and imaginary parts; frequencies as of `torch.fft.rfftn` over the spatial axes,
            so n // 2 + 1 of the last axis.
    """
    _check(x, weight)
    if x.shape[0] == 0:  # torch's transforms refuse it on the CPU
        return x * weight.sum().to(x.dtype)
    axes = tuple(range(1, x.dim() - 1))
    with without_autocast(x):
        frequencies = torch.fft.rfftn(at_least_float32(x), dim=axes, norm="ortho")
        gate = torch.view_as_complex(at_least_float32(weight).contiguous())
        y: Tensor = torch.fft.irfftn(frequencies * gate, s=x.shape[1:-1], dim=axes, norm="ortho")
    return y.to(x.dtype)


def spectral_kernel(
    weight: Float[Tensor, "*frequencies c 2"], grid: Sequence[int]
) -> Float[Tensor, "*spatial c"]:
    """The real kernel whose circular convolution is the gate.

    Args:
        weight: As in `spectral_gate`.
        grid: Sizes of the spatial axes.
    """
    gate = torch.view_as_complex(at_least_float32(weight).contiguous())
    axes = tuple(range(len(grid)))
    kernel: Tensor = torch.fft.irfftn(gate, s=tuple(grid), dim=axes, norm="backward")
    return kernel


def resized_spectral_weight(
    weight: Float[Tensor, "a f c 2"], new_grid: Sequence[int]
) -> Float[Tensor, "g k c 2"]:
    """The weight for another grid: bilinear, frequencies of the first axis in rising order.

    Args:
        weight: Of a grid with two axes.
        new_grid: Sizes of the new grid.
    """
    if weight.dim() != 4 or weight.shape[-1] != 2 or len(new_grid) != 2 or min(new_grid) < 1:
        raise ValueError(
            "weight must be (a, b // 2 + 1, channels, 2) and new_grid two sizes, got "
            f"{tuple(weight.shape)} and {tuple(new_grid)}"
        )
    size = (new_grid[0], new_grid[1] // 2 + 1)
    maps = torch.fft.fftshift(weight, dim=0).flatten(2).movedim(-1, 0)[None]
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
    resized = maps[0].movedim(0, -1).reshape(*size, *weight.shape[2:])
    unshifted: Tensor = torch.fft.ifftshift(resized, dim=0)
    return unshifted


class SpectralGate(nn.Module):
    """Spectral gating of a grid of fixed size.

    The site is `probe`: effective weights (b, channels, N, N), to observe only.

    Args:
        dim: Channels of a cell.
        grid: Sizes of the spatial axes.
        std: Standard deviation of the initial weights.

    Example:
        >>> SpectralGate(12, grid=(6, 8))(torch.randn(1, 6, 8, 12)).shape
        torch.Size([1, 6, 8, 12])
    """

    def __init__(self, dim: int, *, grid: Sequence[int], std: float = 0.02) -> None:
        super().__init__()
        if dim < 1 or not grid or min(grid) < 1:
            raise ValueError(f"dim and all sizes of grid must be at least 1, got {dim}, {grid}")
        self.dim, self.grid = dim, tuple(grid)
        frequencies = (*self.grid[:-1], self.grid[-1] // 2 + 1)
        self.weight = nn.Parameter(std * torch.randn(*frequencies, dim, 2))
        self.probe = Probe()

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Gate every frequency."""
        if tuple(x.shape[1:]) != (*self.grid, self.dim):
            raise ValueError(
                f"x must be (batch, {', '.join(map(str, self.grid))}, {self.dim}), got "
                f"{tuple(x.shape)}; see resized_spectral_weight for other grids"
            )
        self.probe(lambda: self._circulant(x.shape[0]))
        return spectral_gate(x, self.weight)

    def _circulant(self, batch: int) -> Tensor:
        """(b, c, N, N): the kernel at the difference of the places, cyclic along each axis."""
        kernel = spectral_kernel(self.weight, self.grid)
        index = torch.zeros(1, 1, dtype=torch.long, device=kernel.device)
        for size in self.grid:
            place = torch.arange(size, device=kernel.device)
            away = (place[:, None] - place) % size
            index = (index[:, None, :, None] * size + away[None, :, None]).flatten(2).flatten(0, 1)
        rows = kernel.flatten(0, -2)[index]  # (N, N, c)
        return rows.movedim(-1, 0).expand(batch, -1, -1, -1)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, grid={self.grid}"


def spectral_gate_from_spectformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weight of SpectFormer's (and GFNet's) filter: `complex_weight`.

    Raises:
        ValueError: A name that it does not have.
    """
    if set(state) != {"complex_weight"}:
        raise ValueError(f"SpectFormer's filter has 'complex_weight' alone, got {sorted(state)}")
    return {"weight": state["complex_weight"]}


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 3:
        raise ValueError(f"x must be (batch, *spatial, channels), got {tuple(x.shape)}")
    check_real(x=x)
    wanted = (*x.shape[1:-2], x.shape[-2] // 2 + 1, x.shape[-1], 2)
    if tuple(weight.shape) != wanted:
        raise ValueError(
            f"weight must be {wanted} for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
