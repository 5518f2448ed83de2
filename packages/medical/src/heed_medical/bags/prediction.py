"""What is predicted of a slide, and the files in which it is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from heed_medical.slides.geojson import patch_collection

DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class BagPrediction:
    """The class probabilities of a slide, and the attention that each patch got."""

    name: str
    probabilities: tuple[float, ...]
    attention: Float32[np.ndarray, "t n"]
    """A row per branch, averaged over heads; rows sum to one."""
    coords: Int64[np.ndarray, "n 2"] | None = None
    patch_size: int | None = None
    slide_size: tuple[int, int] | None = None
    label: int | None = None
    path: Path | None = None
    """The file of the features."""

    @property
    def mean_attention(self) -> Float32[np.ndarray, " n"]:
        """The mean over the branches, with which the slide is classified."""
        return np.asarray(self.attention.mean(axis=0))


def write_prediction(
    prediction: BagPrediction, out: Path, classes: Sequence[str], *, geojson_patches: int
) -> list[Path]:
    """Write `<name>.json` (class probabilities), `.csv` (attention per patch) and `.geojson`.

    The GeoJSON holds the most attended patches as tiles with measurements, as QuPath opens them;
    it needs coordinates and the size of a patch.
    """
    stem = out / prediction.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".csv", ".geojson")]
    document = {
        "slide": prediction.name,
        "class": classes[int(np.argmax(prediction.probabilities))],
        "probabilities": {
            name: round(value, DECIMALS)
            for name, value in zip(classes, prediction.probabilities, strict=True)
        },
        "patches": prediction.attention.shape[1],
    }
    paths[0].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _write_attention(prediction, paths[1])
    drawable = prediction.coords is not None and prediction.patch_size is not None
    if not drawable or geojson_patches == 0:
        return paths[:2]
    assert prediction.coords is not None
    assert prediction.patch_size is not None
    collection = patch_collection(
        prediction.coords,
        prediction.attention,
        patch_size=prediction.patch_size,
        most=geojson_patches,
    )
    paths[2].write_text(json.dumps(collection, separators=(",", ":")) + "\n", encoding="utf-8")
    return paths


def _write_attention(prediction: BagPrediction, path: Path) -> None:
    branches = len(prediction.attention)
    head = ["patch", "attention", *(f"branch_{t + 1}" for t in range(branches) if branches > 1)]
    columns = [prediction.mean_attention, *(prediction.attention if branches > 1 else ())]
    coords = prediction.coords
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*head[:1], *(("x", "y") if coords is not None else ()), *head[1:]])
        for index, values in enumerate(zip(*columns, strict=True)):
            place = [] if coords is None else coords[index].tolist()
            writer.writerow([index, *place, *(f"{value:.6g}" for value in values)])
