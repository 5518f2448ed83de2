"""A small data set of synthetic slide features, in the layout of CLAM.

A slide is an irregular piece of tissue on a grid of patches. A tumour has two of four strong
signs, each in a cluster of a few patches. All slides hold patches with the same signs in weak, in
different numbers, so that the mean patch says little about the slide.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from heed_medical.slides.writing import write_features
from heed_medical.splits import SPLITS

CHANNELS = 64
GRID = (24, 18)
PATCH = 256
SLIDES = {"train": 40, "val": 12, "test": 20}
LABELS = ("normal", "tumor")
PIXELS_PER_PATCH = 8


def write_sample(root: Path, *, seed: int = 0) -> None:
    """Write `h5_files/`, `thumbnails/`, `labels.csv` and `splits.csv`."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(CHANNELS, 8)))[0].T  # 8 unit vectors, orthogonal
    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    rows = []
    number = 0
    for split, count in SLIDES.items():
        for index in range(count):
            label = index % 2
            name = f"slide_{number:03d}"
            number += 1
            _write_slide(root, name, label, directions, rng)
            names[split].append(name)
            rows.append([f"patient_{number:03d}", name, LABELS[label]])
    _write_csv(root / "labels.csv", ["case_id", "slide_id", "label"], rows)
    longest = max(SLIDES.values())
    columns = [values + [""] * (longest - len(values)) for values in names.values()]
    _write_csv(root / "splits.csv", list(names), [list(row) for row in zip(*columns, strict=True)])


def _write_slide(
    root: Path, name: str, label: int, directions: np.ndarray, rng: np.random.Generator
) -> None:
    places = _tissue(rng)
    features = rng.normal(size=(len(places), CHANNELS)) * 0.6
    kinds = rng.integers(4, size=len(places))
    features += 1.0 * directions[kinds]
    clusters = _clusters(places, rng, count=2, size=6) if label else np.zeros((0, 6), dtype=int)
    for sign in directions[4:8]:
        weak = rng.choice(len(places), int(rng.integers(5, 40)), replace=False)
        features[np.setdiff1d(weak, clusters)] += 1.5 * sign
    for cluster, sign in zip(clusters, rng.choice(4, 2, replace=False), strict=False):
        features[cluster] += 6.0 * directions[4 + sign]
    write_features(
        root / "h5_files" / f"{name}.h5",
        features.astype(np.float16),
        places * PATCH,
        patch_size=PATCH,
        slide_size=(GRID[0] * PATCH, GRID[1] * PATCH),
    )
    _write_thumbnail(root / "thumbnails" / f"{name}.png", places, clusters.ravel(), rng)


def _tissue(rng: np.random.Generator) -> np.ndarray:
    """Columns and rows of the patches: the highest of a smooth random field."""
    field = ndimage.gaussian_filter(rng.normal(size=GRID), 3.0, mode="constant")
    share = rng.uniform(0.35, 0.65)
    return np.argwhere(field > np.quantile(field, 1 - share))


def _clusters(places: np.ndarray, rng: np.random.Generator, *, count: int, size: int) -> np.ndarray:
    """The `size` patches around each of `count` random ones (count, size)."""
    centres = places[rng.choice(len(places), count, replace=False)]
    distances = np.abs(places[:, None] - centres[None]).sum(axis=2)
    return np.argsort(distances, axis=0, kind="stable")[:size].T


def _write_thumbnail(
    path: Path, places: np.ndarray, witnesses: np.ndarray, rng: np.random.Generator
) -> None:
    tint = np.full((GRID[1], GRID[0], 3), 244.0)
    tint[places[:, 1], places[:, 0]] = (222, 160, 196)
    tint[places[witnesses, 1], places[witnesses, 0]] = (166, 108, 176)
    picture = np.kron(tint, np.ones((PIXELS_PER_PATCH, PIXELS_PER_PATCH, 1)))
    picture = ndimage.gaussian_filter(picture, (2.5, 2.5, 0))
    picture += rng.normal(size=picture.shape[:2])[..., None] * 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path)


def _write_csv(path: Path, head: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)
