"""Position codes that are added to, or joined with, the input tokens.

| code | names here |
| --- | --- |
| sine, any number of axes (arXiv 1706.03762) | `sine_code`, `sine_grid`, `SinePositions` |
| sine, of padded pictures (arXiv 2005.12872) | `masked_sine_grid` |
| learned table | `LearnedPositions` |
| Gaussian-Gram table | `gaussian_gram_codes`, `GaussianGramPositions` |
| learnable Fourier features (arXiv 2106.02795) | `FourierPositions` |

Grids may have any number of axes of unequal sizes. Codes of queries, keys and scores (rotary,
relative bias, ALiBi) are in `heed_core.relative`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from heed_core.precision import without_autocast
from heed_core.tokens import check_indices

Layout = Literal["interleaved", "half"]
"""How pairs of channels lie: (0, 1), (2, 3), ... or (0, d/2), (1, d/2 + 1), ..."""


def grid_positions(
    shape: Sequence[int], *, device: torch.device | str | None = None
) -> Int[Tensor, "n axes"]:
    """Coordinates of all cells of a grid, in the order in which `x.flatten` lists them."""
    axes = [torch.arange(size, device=device) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def axis_width(dim: int, axes: int) -> int:
    """Channels of one axis where `axes` of them share `dim`: even, rounded up."""
    return 2 * math.ceil(dim / (2 * axes))


def inverse_frequencies(count: int, base: float, device: torch.device) -> Float[Tensor, " count"]:
    """base^(-i / count) for i = 0 ... count - 1."""
    # float64: single precision is off by 1e-2 rad at position 1e5.
    exponent = torch.arange(count, device=device, dtype=torch.float64) / count
    return torch.pow(torch.tensor(base, device=device, dtype=torch.float64), -exponent)


def pairs(
    first: Float[Tensor, "*batch half"], second: Float[Tensor, "*batch half"], layout: Layout
) -> Float[Tensor, "*batch dim"]:
    """Lay the first and second channels of all pairs out in one vector."""
    if layout == "interleaved":
        return torch.stack([first, second], dim=-1).flatten(-2)
    return torch.cat([first, second], dim=-1)


def sine_code(
    positions: Real[Tensor, "*batch"],
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "interleaved",
) -> Float[Tensor, "*batch dim"]:
    """Sine and cosine of a position at `dim / 2` wavelengths from 2 pi to 2 pi `base`.

    Channel pair i holds sin(p / base^(2i / dim)) and cos of the same (arXiv 1706.03762, 3.5).

    Args:
        positions: In any unit, e.g. token index or pixels.
        dim: Channels of the code, even.
        base: Longest wavelength over 2 pi.
        layout: "interleaved" puts sine and cosine of a frequency side by side, "half" all sines
            first.

    Returns:
        float32, or float64 for float64 positions.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    check_layout(layout)
    angles = positions.double()[..., None] * inverse_frequencies(dim // 2, base, positions.device)
    code = pairs(angles.sin(), angles.cos(), layout)
    return code if positions.dtype == torch.float64 else code.float()


def sine_grid(
    shape: Sequence[int],
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "interleaved",
    normalise: bool = False,
    device: torch.device | str | None = None,
) -> Float[Tensor, "*shape dim"]:
    """Sine code of every cell of a grid with one or more axes.

    Each axis has `axis_width(dim, axes)` channels, in the order of the axes (rows, then columns);
    what exceeds `dim` is cut off at the end.

    Args:
        shape: Cells along each axis.
        dim: Channels of the code.
        base: Longest wavelength over 2 pi.
        layout: As in `sine_code`, within each axis.
        normalise: Positions run over (0, 2 pi] whatever the size (arXiv 2005.12872), instead of 0,
            1, 2, ...
        device: Where the code is made.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must name at least one size, all at least 1, got {tuple(shape)}")
    width = axis_width(dim, len(shape))
    codes = []
    for axis, size in enumerate(shape):
        positions = torch.arange(size, device=device, dtype=torch.float64)
        if normalise:
            positions = (positions + 1) / size * (2 * math.pi)
        code = sine_code(positions, width, base=base, layout=layout).float()
        place = [1] * len(shape) + [width]
        place[axis] = size
        codes.append(code.view(place).expand(*shape, width))
    return torch.cat(codes, dim=-1)[..., :dim]


def masked_sine_grid(
    mask: Bool[Tensor, "b h w"], dim: int, *, base: float = 10000.0
) -> Float[Tensor, "b h w dim"]:
    """Sine code of the cells of padded pictures: only real cells count (arXiv 2005.12872).

    A cell's place along an axis is the number of real cells up to it, over their number in its row
    or column, times 2 pi. Where all cells are real it is `sine_grid` with `normalise`.

    Args:
        mask: True = real cell.
        dim: Channels of the code, a multiple of 4: rows first, then columns.
        base: As in `sine_grid`.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True = real cell, got {mask.dtype}")
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    codes = []
    for axis in (1, 2):
        places = mask.cumsum(axis).double()
        total = places.narrow(axis, mask.shape[axis] - 1, 1).clamp(min=1)
        codes.append(sine_code(places / total * (2 * math.pi), dim // 2, base=base).float())
    return torch.cat(codes, dim=-1)


class SinePositions(nn.Module):
    """Add the sine code of each token's place to it; nothing is learned.

    Args:
        dim: Channels of a token.
        base: As in `sine_grid`.
        layout: As in `sine_grid`.
        normalise: As in `sine_grid`.

    Example:
        >>> SinePositions(32)(torch.zeros(1, 5, 7, 32)).shape
        torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        normalise: bool = False,
    ) -> None:
        super().__init__()
        check_layout(layout)
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.base, self.normalise = dim, base, normalise
        self.layout: Layout = layout

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, offset: int = 0
    ) -> Float[Tensor, "b *spatial c"]:
        """Add the code.

        Args:
            x: Tokens in a row, or on a grid.
            offset: Position of the first token of a row, e.g. the length of a cache.
        """
        spatial = _spatial(x, self.dim)
        if offset == 0:
            code = sine_grid(
                spatial, self.dim, base=self.base, layout=self.layout, normalise=self.normalise,
                device=x.device,
            )  # fmt: skip
            return x + code.to(x.dtype)
        _check_offset(offset, spatial, normalise=self.normalise)
        positions = torch.arange(offset, offset + spatial[0], device=x.device)
        width = axis_width(self.dim, 1)
        code = sine_code(positions, width, base=self.base, layout=self.layout)
        return x + code[:, : self.dim].to(x.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, base={self.base}, layout={self.layout!r}"


class LearnedPositions(nn.Module):
    """Add a learned vector of each token's place to it.

    Args:
        dim: Channels of a token.
        size: Places along each axis; one number for tokens in a row.
        interpolate: Resize the table (linearly) to inputs of other sizes; otherwise a smaller
            input uses the first places and a larger one raises `ValueError`.
        std: Standard deviation of the initial table.
    """

    def __init__(
        self,
        dim: int,
        *,
        size: int | Sequence[int],
        interpolate: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if interpolate and len(self.size) > 3:
            raise ValueError(f"interpolate serves up to 3 axes, got size {self.size}")
        self.interpolate = interpolate
        self.table = nn.Parameter(torch.empty(*self.size, dim))
        nn.init.trunc_normal_(self.table, std=std)

    def forward(
        self, x: Float[Tensor, "b *spatial c"], *, offset: int = 0
    ) -> Float[Tensor, "b *spatial c"]:
        """Add the code.

        Args:
            x: Tokens in a row, or on a grid with as many axes as `size`.
            offset: Position of the first token of a row, e.g. the length of a cache.
        """
        spatial = _spatial(x, self.table.shape[-1], axes=len(self.size))
        _check_offset(offset, spatial, normalise=self.interpolate)
        if self.interpolate:
            return x + self._resized(spatial).to(x.dtype)
        code: Tensor = self.table
        for axis, (length, places) in enumerate(zip(spatial, self.size, strict=True)):
            if offset + length > places:
                raise ValueError(
                    f"x has places up to {offset + length} on axis {axis}, the table {places}; "
                    "build it with a larger size or interpolate=True"
                )
            code = code.narrow(axis, offset, length)
        return x + code.to(x.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.table.shape[-1]}, size={self.size}, interpolate={self.interpolate}"

    def _resized(self, spatial: tuple[int, ...]) -> Tensor:
        if spatial == self.size:
            return self.table
        mode = ("linear", "bilinear", "trilinear")[len(self.size) - 1]
        planes = self.table.movedim(-1, 0)[None]
        return F.interpolate(planes, size=spatial, mode=mode, align_corners=False)[0].movedim(0, -1)


def gaussian_gram_codes(
    n: int,
    dim: int,
    *,
    sigma: float = 2.0,
    seed: int = 0,
    norm: float | None = 8.0,
    fit: Literal["exact", "adam"] = "exact",
    steps: int = 10_000,
) -> Float[Tensor, "n dim"]:
    r"""Rows whose cosine similarity is a Gaussian of the distance of their indices.

        cos(P_i, P_j) = exp(-(i - j)^2 / (2 sigma^2)),    |P_i| = norm

    "exact" factorises the Gaussian Gram matrix, P = norm * U sqrt(Lambda) padded with zeros to
    `dim`, times a random
    rotation: the equation holds to rounding. "adam" fits random rows by Adam (lr 0.01) to
    [sum_ij (cos - g_ij)^2 + mean_i (\|P_i\| - mean \|P\|)^2] / (n (n - 1)): it holds to about
    1e-3, and the rows have the norm that the fit leaves them with.

    Args:
        n: Rows.
        dim: Channels.
        sigma: Width of the Gaussian, in index steps.
        seed: Of the rotation, or of the fit's start.
        norm: Of every row (of their mean, for "adam"). None keeps the norms of a fit.
        fit: How the rows are found.
        steps: Of Adam.

    Raises:
        ValueError: `dim` channels cannot hold the Gram matrix to 1e-6.
    """
    if n < 1 or dim < 1 or sigma <= 0:
        raise ValueError(f"n, dim and sigma must be positive, got {n}, {dim} and {sigma}")
    if fit not in ("exact", "adam"):
        raise ValueError(f"fit must be 'exact' or 'adam', got {fit!r}")
    if fit == "exact" and norm is None:
        raise ValueError("norm=None keeps the norms of a fit; fit='exact' needs a number")
    with torch.device("cpu"):  # computed even where modules are built on no device at all
        index = torch.arange(n, dtype=torch.float64)
        gram = torch.exp(-((index[:, None] - index) ** 2) / (2 * sigma**2))
        generator = torch.Generator().manual_seed(seed)
        if norm is None or fit == "adam":
            return _fitted_codes(gram, dim, norm, steps, generator)
        return _exact_codes(gram, dim, norm, sigma, generator)


def _exact_codes(
    gram: Tensor, dim: int, norm: float, sigma: float, generator: torch.Generator
) -> Tensor:
    n = len(gram)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = min(n, dim)
    lost = eigenvalues[: n - kept].sum().item()
    if lost > 1e-6:
        raise ValueError(
            f"dim={dim} channels cannot hold {n} Gaussian codes of sigma={sigma} (lost trace "
            f"{lost:.1e}); use more channels or a larger sigma"
        )
    rows = torch.zeros(n, dim, dtype=torch.float64)
    rows[:, :kept] = (vectors * eigenvalues.clamp(min=0).sqrt())[:, n - kept :]
    noise = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(noise)
    return (F.normalize(rows @ rotation, dim=-1) * norm).float()


def _fitted_codes(
    gram: Tensor, dim: int, norm: float | None, steps: int, generator: torch.Generator
) -> Tensor:
    n = gram.shape[0]
    if n < 2:
        raise ValueError(f"fit='adam' needs n of at least 2, got {n}")
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([rows], lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            norms = rows.norm(dim=-1)
            cosine = (rows @ rows.T) / torch.outer(norms, norms)
            loss = (cosine - gram).square().sum() + (norms - norms.mean()).square().mean()
            optimiser.zero_grad()
            (loss / (n * (n - 1))).backward()
            optimiser.step()
    codes = rows.detach()
    if norm is not None:
        codes = codes * (norm / codes.norm(dim=-1).mean())
    return codes.float()


class GaussianGramPositions(nn.Module):
    """Look up Gaussian-Gram codes of coordinates; the table is frozen and saved with the model.

    The codes of all axes are concatenated, `axis_width(dim, axes)` channels each, and cut to `dim`.

    Args:
        n: Indices that have a code, the same table for every axis.
        dim: Channels of the result.
        axes: Coordinates per token.
        sigma: As in `gaussian_gram_codes`.
        seed: As in `gaussian_gram_codes`.
        norm: As in `gaussian_gram_codes`.
        fit: As in `gaussian_gram_codes`.
        zero_rows: All-zero rows after the n codes, for padding and for "place unknown".

    Example:
        >>> code = GaussianGramPositions(14, 256, axes=3)
        >>> code(torch.tensor([[2, 5, 0]])).shape
        torch.Size([1, 256])
    """

    table: Tensor

    def __init__(
        self,
        n: int,
        dim: int,
        *,
        axes: int = 1,
        sigma: float = 2.0,
        seed: int = 0,
        norm: float | None = 8.0,
        fit: Literal["exact", "adam"] = "exact",
        zero_rows: int = 4,
    ) -> None:
        super().__init__()
        width = axis_width(dim, axes)
        codes = gaussian_gram_codes(n, width, sigma=sigma, seed=seed, norm=norm, fit=fit)
        self.dim, self.axes = dim, axes
        self.register_buffer("table", F.pad(codes, (0, 0, 0, zero_rows)))

    def forward(self, coordinates: Int[Tensor, "*batch axes"]) -> Float[Tensor, "*batch dim"]:
        """Codes of coordinates in [0, n + zero_rows).

        Raises:
            ValueError: Another number of coordinates, or some outside.
            TypeError: Coordinates that are no whole numbers.
        """
        if coordinates.shape[-1] != self.axes:
            raise ValueError(
                f"coordinates must end with {self.axes} numbers per token, got shape "
                f"{tuple(coordinates.shape)}"
            )
        check_indices("coordinates", coordinates, len(self.table), of="codes and zero rows")
        return F.embedding(coordinates, self.table).flatten(-2)[..., : self.dim]

    def extra_repr(self) -> str:
        """Show the options."""
        return f"rows={len(self.table)}, dim={self.dim}, axes={self.axes}"


class FourierPositions(nn.Module):
    """Codes of real coordinates by learnable Fourier features and a two-layer perceptron.

        r = [cos(x W^T), sin(x W^T)] / sqrt(features),    code = GELU(r W1 + b1) W2 + b2

    Li et al., "Learnable Fourier features for multi-dimensional spatial positional encoding"
    (arXiv 2106.02795).

    Args:
        dim: Channels of the code.
        axes: Coordinates per token.
        features: Width of r, even; `dim` rounded up if not given.
        hidden: Width between the two layers; `dim` if not given.
        gamma: Standard deviation of the initial W: the reciprocal of the distance over which codes
            decorrelate.
        learnable: Whether W is trained too.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        *,
        axes: int = 1,
        features: int | None = None,
        hidden: int | None = None,
        gamma: float = 1.0,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        features = axis_width(dim, 1) if features is None else features
        if features < 2 or features % 2:
            raise ValueError(f"features must be even and at least 2, got {features}")
        hidden = dim if hidden is None else hidden
        frequencies = torch.randn(features // 2, axes) * gamma
        if learnable:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)
        self.perceptron = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, coordinates: Float[Tensor, "*batch axes"]) -> Float[Tensor, "*batch dim"]:
        """Codes of coordinates."""
        half, axes = self.frequencies.shape
        if coordinates.shape[-1] != axes:
            raise ValueError(
                f"coordinates must end with {axes} numbers per token, got shape "
                f"{tuple(coordinates.shape)}"
            )
        exact = torch.promote_types(coordinates.dtype, self.frequencies.dtype)
        exact = torch.promote_types(exact, torch.float32)
        with without_autocast(coordinates):  # half precision would move the coordinates
            angles = F.linear(coordinates.to(exact), self.frequencies.to(exact))
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1) / math.sqrt(2 * half)
        return cast(Tensor, self.perceptron(waves.to(self.frequencies.dtype)))

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"axes={self.frequencies.shape[1]}, features={2 * self.frequencies.shape[0]}"


def _spatial(x: Tensor, dim: int, axes: int | None = None) -> tuple[int, ...]:
    spatial = tuple(x.shape[1:-1])
    if x.shape[-1] != dim or not spatial or (axes is not None and len(spatial) != axes):
        want = "*spatial" if axes is None else f"{axes} axes"
        raise ValueError(f"x must be (batch, {want}, {dim} channels), got {tuple(x.shape)}")
    return spatial


def _check_offset(offset: int, spatial: tuple[int, ...], *, normalise: bool) -> None:
    if offset and (offset < 0 or len(spatial) != 1 or normalise):
        raise ValueError(
            f"offset={offset} needs tokens in a row and a code that does not depend on their number"
        )


def check_layout(layout: str) -> None:
    """Raise a ValueError for a layout that does not exist."""
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout must be 'interleaved' or 'half', got {layout!r}")
