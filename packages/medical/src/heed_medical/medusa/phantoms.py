"""Small chest pictures made by a formula, written in the layout of COVIDx or with lung masks.

Each shows a chest of its own shape, place and exposure, and some round shadows. In a positive
picture one of them lies in a lung; in a negative one all lie elsewhere (shoulder, belly, middle).
Number, size and strength of the shadows are the same for both, so neither brightness nor a shadow
as such says the class: where it lies against the lungs does.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

CLASSES = ("negative", "positive")
_SOURCES = ("clinic-a", "clinic-b")


@dataclass(frozen=True, kw_only=True)
class ChestPhantom:
    """One picture, its lungs and its class."""

    picture: Float32[np.ndarray, "h w"]
    """Values within 0..1."""
    lungs: Bool[np.ndarray, "h w"]
    positive: bool


def make_chest(
    rng: np.random.Generator, *, positive: bool, shadows: int = 2, side: int = 96
) -> ChestPhantom:
    """Draw one chest.

    Args:
        rng: Source of every choice.
        positive: Whether the first shadow lies in a lung.
        shadows: How many there are, wherever they lie.
        side: Height and width in pixels, at least 32.
    """
    if side < 32:
        raise ValueError(f"side must be at least 32, got {side}")
    y, x = _coordinates(rng, side)
    trunk = _ellipse(x, y, (0.0, 0.35), (0.85, 1.25))
    lungs = np.zeros((side, side), dtype=bool)
    for where in (-1.0, 1.0):
        centre = (where * rng.uniform(0.36, 0.42), rng.uniform(-0.1, 0.0))
        radii = (rng.uniform(0.22, 0.28), rng.uniform(0.48, 0.6))
        lungs |= _ellipse(x, y, centre, radii, tilt=where * rng.uniform(0.0, 0.2))
    heart = _ellipse(x, y, (0.12, 0.25), (0.26, 0.28), tilt=0.4)
    lungs &= ~heart
    picture = 0.05 + 0.45 * trunk + 0.1 * heart
    ribs = np.sin(2 * np.pi * (3.2 * y + 0.8 * np.square(x) + rng.uniform()))
    picture = np.where(lungs, 0.2 + 0.05 * np.clip(ribs, 0, 1), picture)
    picture[np.abs(x) < 0.07] += 0.12  # spine
    picture = ndimage.gaussian_filter(picture, side / 128)
    picture += _shadows(rng, lungs, trunk, shadows, positive=positive)
    return ChestPhantom(picture=_expose(rng, picture), lungs=lungs, positive=positive)


def _coordinates(
    rng: np.random.Generator, side: int
) -> tuple[Float64[np.ndarray, "h w"], Float64[np.ndarray, "h w"]]:
    """Places within the chest, about -1 to 1, of a chest that is moved, scaled and tilted."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    angle, scale = rng.uniform(-0.1, 0.1), rng.uniform(0.95, 1.2)
    x, y = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
    return (
        scale * (np.cos(angle) * y + np.sin(angle) * x),
        scale * (np.cos(angle) * x - np.sin(angle) * y),
    )


def _ellipse(
    x: Float64[np.ndarray, "h w"],
    y: Float64[np.ndarray, "h w"],
    centre: tuple[float, float],
    radii: tuple[float, float],
    *,
    tilt: float = 0.0,
) -> Bool[np.ndarray, "h w"]:
    x, y = x - centre[0], y - centre[1]
    along, across = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    return np.asarray(np.square(along / radii[0]) + np.square(across / radii[1]) <= 1)


def _shadows(
    rng: np.random.Generator,
    lungs: Bool[np.ndarray, "h w"],
    trunk: Bool[np.ndarray, "h w"],
    count: int,
    *,
    positive: bool,
) -> Float64[np.ndarray, "h w"]:
    """Soft round spots of equal number and strength, in a lung or clear of both."""
    side = len(lungs)
    depth = ndimage.distance_transform_edt(lungs)
    clear = ndimage.distance_transform_edt(~lungs)
    added = np.zeros((side, side))
    y, x = np.mgrid[:side, :side]
    for number in range(count):
        radius = side * rng.uniform(0.05, 0.08)
        inside = positive and number == 0
        in_lung, elsewhere = depth >= min(radius, 0.8 * depth.max()), (clear >= radius) & trunk
        places = np.argwhere(in_lung if inside else elsewhere)
        row, column = places[rng.integers(len(places))]
        distance = np.hypot(y - row, x - column) / radius
        added += rng.uniform(0.2, 0.28) * np.exp(-np.power(distance, 4))
    return added


def _expose(
    rng: np.random.Generator, picture: Float64[np.ndarray, "h w"]
) -> Float32[np.ndarray, "h w"]:
    gain, offset = rng.uniform(0.8, 1.2), rng.uniform(-0.03, 0.06)
    noisy = gain * picture + offset + rng.normal(scale=0.025, size=picture.shape)
    return np.asarray(np.clip(noisy, 0, 1), dtype=np.float32)


def write_chests(
    out: Path, *, train: int = 160, test: int = 40, side: int = 96, seed: int = 0
) -> None:
    """Write pictures in the layout of COVIDx into the folder `out`; half are positive.

    Args:
        out: Made where it does not exist.
        train: Pictures of train_COVIDx_phantom.txt, two per patient; validation is drawn of them.
        test: Pictures of test_COVIDx_phantom.txt.
        side: Of the pictures, in pixels.
        seed: Equal seeds give equal files.
    """
    for split, count in (("train", train), ("test", test)):
        (out / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            rng = np.random.default_rng((seed, split == "test", number))
            positive = bool(number % 2)
            phantom = make_chest(rng, positive=positive, side=side)
            name = f"chest_{number:04d}.png"
            _save(phantom.picture, out / split / name)
            patient = f"{split} {number // 2:03d}" if number % 10 < 2 else f"{split}{number // 2}"
            source = _SOURCES[number // 2 % 2]
            lines.append(f"{patient} {name} {CLASSES[positive]} {source}")
        (out / f"{split}_COVIDx_phantom.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_lungs(out: Path, *, pictures: int = 48, side: int = 64, seed: int = 0) -> None:
    """Write pictures with masks of their lungs: images/, masks/ and labels.csv.

    Args:
        out: Made where it does not exist.
        pictures: How many; a quarter is for the test, an eighth for validation.
        side: Of the pictures, in pixels.
        seed: Equal seeds give equal files.
    """
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True)
    test, val = pictures // 4, pictures // 8
    splits = ["train"] * (pictures - test - val) + ["val"] * val + ["test"] * test
    lines = ["file,mask,patient,split"]
    for number, split in enumerate(splits):
        rng = np.random.default_rng((seed, 2, number))
        phantom = make_chest(rng, positive=bool(number % 2), side=side)
        name = f"chest_{number:03d}.png"
        _save(phantom.picture, out / "images" / name)
        _save(phantom.lungs.astype(np.float32), out / "masks" / name)
        lines.append(f"images/{name},masks/{name},p{number},{split}")
    (out / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _save(picture: Float32[np.ndarray, "h w"], path: Path) -> None:
    Image.fromarray(np.rint(255 * picture).astype(np.uint8)).save(path)
