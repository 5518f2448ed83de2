"""Values of vertices on a flat map of the cortex, drawn by nilearn (the extra `brains`).

The challenge's vertices are some of the 163842 of fsaverage. The first 10242 of these are the
vertices of fsaverage5 (both are subdivisions of one icosahedron), whose meshes nilearn ships: no
download.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float, Int

from heed_core.errors import MissingExtra
from heed_neuro.brain_encoder.subject import SURFACE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COARSE = 10242
Mesh = Literal["flat", "inflated"]


def on_surface(
    values: Float[np.ndarray, " v"], index: Int[np.ndarray, " v"]
) -> Float[np.ndarray, " surface"]:
    """Values of all vertices of fsaverage; NaN where nothing is known.

    Args:
        values: One per vertex of the challenge.
        index: Where these lie on fsaverage.

    Raises:
        ValueError: Not a place on fsaverage for each value.
    """
    if values.shape != index.shape:
        raise ValueError(f"index must be of {values.shape} vertices, got {index.shape}")
    if len(index) and not (index.min() >= 0 and index.max() < SURFACE):
        raise ValueError(f"index must be from 0 to {SURFACE - 1}")
    whole = np.full(SURFACE, np.nan)
    whole[index] = values
    return whole


def draw_surface(
    values: Float[np.ndarray, " v"],
    index: Int[np.ndarray, " v"],
    *,
    hemisphere: Literal["lh", "rh"],
    mesh: Mesh = "flat",
    title: str = "",
    low: float = 0.0,
    high: float | None = None,
) -> Figure:
    """Draw the values of one hemisphere.

    Args:
        values: One per vertex of the challenge; NaN where it is undefined.
        index: Where these lie on fsaverage.
        hemisphere: Left or right.
        mesh: The cortex cut and laid flat, or blown up.
        title: Above the map.
        low: Where the colours begin.
        high: Where they end. None: the 99th percentile.

    Raises:
        MissingExtra: nilearn is not installed.
        ValueError: No vertex of the mesh has a value.
    """
    coarse = on_surface(values, index)[:COARSE]
    if not np.isfinite(coarse).any():
        raise ValueError(f"index must name a vertex of fsaverage5 (below {COARSE}) with a value")
    try:
        from nilearn import datasets, plotting  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("nilearn", "heed-neuro[brains]") from None
    import matplotlib.pyplot as plt

    meshes = datasets.fetch_surf_fsaverage("fsaverage5")
    side = "left" if hemisphere == "lh" else "right"
    shape = "flat" if mesh == "flat" else "infl"
    top = float(np.nanquantile(coarse, 0.99)) if high is None else high
    figure = plotting.plot_surf(
        meshes[f"{shape}_{side}"],
        surf_map=coarse,
        bg_map=meshes[f"sulc_{side}"],
        hemi=side,
        view="dorsal" if mesh == "flat" else "ventral",
        cmap="inferno",
        vmin=low,
        vmax=max(top, low + 1e-6),
        colorbar=True,
        title=title or None,
        engine="matplotlib",
    )
    plt.close(figure)  # pyplot keeps a figure alive until it is closed
    return figure  # type: ignore[no-any-return]
