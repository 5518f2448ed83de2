"""Codes of (row, column, is it the target): where an object stands on the grid of a layout.

OAT (arXiv 2407.13335) codes an index by a row of a frozen table whose cosine similarities fall as a
Gaussian with the distance of indices: near cells have similar codes. Two other codes serve as
ablations.

A coordinate of -1 says that it is not known: the table gives zeros for it, so does the sine code;
the Fourier features see -1.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed_core.positions import (
    FourierPositions,
    GaussianGramPositions,
    axis_width,
    sine_code,
)

PlaceCode = Literal["gaussian", "sinusoid", "fourier"]
"""Gaussian-Gram table (the paper's), sine code of each axis, learnable Fourier features."""
AXES = 3
ZERO_ROWS = 4
UNKNOWN = -1


class GridPlaces(nn.Module):
    """The code of a place of the grid.

    Args:
        dim: Channels of the code.
        code: Which one.
        rows: Indices in the table; rows and columns above get zeros.
        sigma: Width of the table's Gaussian, in cells.
        fit: How the table is made, as in `gaussian_gram_codes`.
        seed: Of the table.

    Example:
        >>> GridPlaces(256, code="gaussian", rows=14)(torch.tensor([[2, 5, 0]])).shape
        torch.Size([1, 256])
    """

    def __init__(
        self,
        dim: int,
        *,
        code: PlaceCode,
        rows: int,
        sigma: float = 2.0,
        fit: Literal["exact", "adam"] = "exact",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if code not in ("gaussian", "sinusoid", "fourier"):
            raise ValueError(f"code must be gaussian, sinusoid or fourier, got {code!r}")
        self.dim, self.code, self.rows = dim, code, rows
        self.table = (
            GaussianGramPositions(
                rows, dim, axes=AXES, sigma=sigma, seed=seed, fit=fit, zero_rows=ZERO_ROWS,
                norm=None if fit == "adam" else 8.0,
            )
            if code == "gaussian"
            else None
        )  # fmt: skip
        self.fourier = FourierPositions(dim, axes=AXES) if code == "fourier" else None

    def forward(self, places: Int[Tensor, "*batch 3"]) -> Float[Tensor, "*batch dim"]:
        """Code (row, column, flag)."""
        if self.table is not None:
            last = self.rows + ZERO_ROWS - 1
            known = (places >= 0) & (places < last)
            return cast(Tensor, self.table(torch.where(known, places, last)))
        if self.fourier is not None:
            return cast(Tensor, self.fourier(places.to(self.fourier.frequencies.dtype)))
        waves = sine_code(places, axis_width(self.dim, AXES))
        known = (places >= 0)[..., None]
        return torch.where(known, waves, 0.0).flatten(-2)[..., : self.dim]
