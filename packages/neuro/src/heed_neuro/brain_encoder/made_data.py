"""Made brains whose responses are known: they tell attention from a fixed receptive field.

Each image has 8 x 8 patches. A patch carries a value (its green) and no mark, except one with the
mark of a face (red) and one with that of a place (blue), somewhere. In the routing task the region
`faces` answers to the value of the face and `places` to that of the place, wherever they are: what
counts is where to look, which depends on the image. No linear read-out of pooled tokens can know.
In the control task, each region answers to the value at one fixed place, marks or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Task = Literal["routing", "control"]
SIDE, PATCH, VERTICES = 8, 4, 6
"""Patches along a side, pixels along a patch, vertices of each region."""
FIXED = {"faces": (2, 5), "places": (6, 1)}
"""Where the regions of the control task look."""
RED, GREEN, BLUE = 0, 1, 2


def draw_images(
    count: int, rng: np.random.Generator, *, task: Task = "routing"
) -> tuple[UInt8[np.ndarray, "n h w 3"], Float[np.ndarray, "n regions"]]:
    """Images, and what drives the regions `faces` and `places`: the values, about -1.7 to 1.7."""
    patches = np.zeros((count, SIDE, SIDE, 3))
    patches[..., GREEN] = rng.uniform(0, 1, (count, SIDE, SIDE))
    index = np.arange(count)
    marked = np.stack([rng.permutation(SIDE * SIDE)[:2] for _ in range(count)])
    rows, columns = np.divmod(marked, SIDE)
    patches[index, rows[:, 0], columns[:, 0], RED] = 1.0
    patches[index, rows[:, 1], columns[:, 1], BLUE] = 1.0
    if task == "routing":
        values = patches[index[:, None], rows, columns, GREEN]
    else:
        values = np.stack([patches[:, r, c, GREEN] for r, c in FIXED.values()], axis=1)
    pixels = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    quantised = np.round(pixels * 255).astype(np.uint8)
    return quantised, (np.round(values * 255) / 255 - 0.5) * np.sqrt(12)


def respond(
    drive: Float[np.ndarray, "n regions"], rng: np.random.Generator, *, noise: float, repeats: int
) -> Float[np.ndarray, "n repeats v"]:
    """Responses of all vertices: each region's drive with a gain per vertex, and noise."""
    gains = np.linspace(0.5, 1.5, VERTICES)
    clean = np.concatenate([drive[:, [k]] * gains for k in range(drive.shape[1])], axis=1)
    shape = (len(drive), repeats, clean.shape[1])
    return (clean[:, None] + rng.normal(scale=noise, size=shape)).astype(np.float32)


def write_made_subject(
    root: Path,
    *,
    seed: int,
    task: Task = "routing",
    train: int = 600,
    test: int = 60,
    repeats: int = 3,
    noise: float = 0.3,
) -> None:
    """Write a subject in the neutral layout, with repeats in the test and two regions.

    Args:
        root: An existing folder.
        seed: The same seed writes the same bytes.
        task: Which rule the regions follow.
        train: Images to train on.
        test: Images with repeats.
        repeats: Trials of a test image; training responses are averages over as many.
        noise: Standard deviation of one trial's noise; the responses' is about 0.5 to 1.5.
    """
    rng = np.random.default_rng(seed)
    for folder, count, name in (("images", train, ""), ("test_images", test, "_test_repeats")):
        (root / folder).mkdir()
        images, drive = draw_images(count, rng, task=task)
        for index, image in enumerate(images):
            Image.fromarray(image).save(root / folder / f"{index:05d}.png")
        responses = respond(drive, rng, noise=noise, repeats=repeats)
        np.save(root / f"responses{name}.npy", responses if name else responses.mean(axis=1))
    regions = {name: list(range(k * VERTICES, (k + 1) * VERTICES)) for k, name in enumerate(FIXED)}
    (root / "rois.json").write_text(json.dumps(regions), encoding="utf-8")
