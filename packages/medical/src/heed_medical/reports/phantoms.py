"""Small studies made by a formula: chests in two views and the reports about them.

A shadow lies in one of four quarters of the lungs, or there is none; the heart is of normal size or
large; behind the heart, seen in the lateral view only, there is fluid or not. So position, extent
and both views matter, and a model that does not see writes one report for all. Each of the twenty
combinations has one report, so that a perfect reader scores 1.
"""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image

_QUARTERS = ("right upper", "right lower", "left upper", "left lower")
"""Of the patient, who faces the viewer: his right is on the picture's left."""
_SHADOW = "There is an opacity in the {} lobe."
_CLEAR = "The lungs are clear."
_HEART = {True: "The heart is enlarged.", False: "The heart size is normal."}
_FLUID = {True: "There is a pleural effusion.", False: "No pleural effusion."}


def make_study(
    rng: np.random.Generator, *, side: int = 80
) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"], str]:
    """A frontal picture, a lateral one, both within 0..1, and the report.

    Args:
        rng: Source of every choice.
        side: Height and width in pixels.
    """
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    place = int(rng.integers(5))  # 4: no shadow
    large, fluid = bool(rng.random() < 0.4), bool(rng.random() < 0.4)
    y, x = y + rng.uniform(-0.05, 0.05), x + rng.uniform(-0.05, 0.05)
    lungs = (np.hypot((np.abs(x) - 0.45) / 0.32, y / 0.72) < 1).astype(float)
    heart = np.hypot((x - 0.12) / (0.42 if large else 0.26), (y - 0.35) / 0.3) < 1
    frontal = 0.55 - 0.35 * lungs + 0.3 * heart
    if place < 4:
        where = (-0.45 if place < 2 else 0.45, -0.35 if place % 2 == 0 else 0.4)
        frontal += 0.35 * np.exp(-(((x - where[0]) ** 2 + (y - where[1]) ** 2) / 0.03))
    lateral = 0.55 - 0.3 * (np.hypot(x / 0.6, y / 0.75) < 1)
    if fluid:
        lateral += 0.3 * ((y > 0.45) & (x > 0.1) & (np.hypot(x / 0.6, y / 0.75) < 1))
    pictures = []
    for picture in (frontal, lateral):
        noisy = picture * rng.uniform(0.85, 1.1) + rng.normal(scale=0.04, size=picture.shape)
        pictures.append(np.asarray(np.clip(noisy, 0, 1), dtype=np.float32))
    shadow = _SHADOW.format(_QUARTERS[place]) if place < 4 else _CLEAR
    return pictures[0], pictures[1], " ".join((_HEART[large], shadow, _FLUID[fluid]))


def write_studies(
    out: Path, *, train: int = 240, val: int = 24, test: int = 40, side: int = 48, seed: int = 0
) -> None:
    """Write studies in the layout of R2Gen: annotation.json and images/ID/{0,1}.png.

    Args:
        out: Made where it does not exist.
        train: Studies of the split.
        val: Studies of the split.
        test: Studies of the split.
        side: Of the pictures, in pixels.
        seed: Equal seeds give equal files.
    """
    content: dict[str, list[dict[str, object]]] = {}
    for key, (split, count) in enumerate((("train", train), ("val", val), ("test", test))):
        content[split] = []
        for number in range(count):
            *pictures, report = make_study(np.random.default_rng((seed, key, number)), side=side)
            name = f"{split}{number:04d}"
            folder = out / "images" / name
            folder.mkdir(parents=True)
            for view, picture in enumerate(pictures):
                grey = np.rint(255 * np.asarray(picture)).astype(np.uint8)
                Image.fromarray(grey).save(folder / f"{view}.png")
            paths = [f"{name}/{view}.png" for view in range(len(pictures))]
            entry: dict[str, object] = {
                "id": name,
                "report": report,
                "image_path": paths,
                "split": split,
            }
            content[split].append(entry)
    text = json.dumps(content, indent=1) + "\n"
    (out / "annotation.json").write_text(text, encoding="utf-8")
