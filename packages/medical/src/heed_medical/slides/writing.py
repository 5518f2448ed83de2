"""Write the features of slides in h5 files as TRIDENT and CLAM lay them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64

from heed_core.errors import MissingExtra


def write_features(
    path: Path,
    features: Float[np.ndarray, "n d"],
    coords: Int64[np.ndarray, "n 2"] | None,
    *,
    patch_size: int | None,
    slide_size: tuple[int, int] | None = None,
) -> None:
    """Write `features` and `coords` of one slide; the file appears when it is complete.

    Args:
        path: The h5 file.
        features: Of the patches.
        coords: x, y of their upper left corners in pixels of the full slide; None: not known.
        patch_size: Their side in the same pixels; None: not known.
        slide_size: Width and height of the full slide.

    Raises:
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("h5py", "heed-medical[slides]") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with h5py.File(unfinished, "w") as file:
        file.create_dataset("features", data=features)
        if coords is not None:
            placed = file.create_dataset("coords", data=coords.astype(np.int32))
            if patch_size is not None:
                placed.attrs["patch_size_level0"] = patch_size
            if slide_size is not None:
                placed.attrs["level0_width"], placed.attrs["level0_height"] = slide_size
    unfinished.replace(path)
