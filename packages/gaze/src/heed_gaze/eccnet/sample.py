"""A made natural set with viewers: six textures around the middle, one of them is looked for.

Its folder is laid out and named as the paper's object arrays, so that it is searched by their
rules. The viewers are made too: each goes from texture to texture, the more willingly the more it
is like the target, until the target is found.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float64, Int64, UInt8
from PIL import Image

from heed_gaze.eccnet.layouts import NATURAL, SCENES, TARGETS, TRUTHS
from heed_gaze.eccnet.viewers import VIEWERS
from heed_gaze.scanpaths import Scanpath, write_scanpaths

NAME = "objectarray"
PLACES, GREY = 6, 128
RADIUS = 0.33
"""Of the circle of places, as a share of the picture's side."""
GUIDANCE = 3.0
"""Of the made viewers, per unit of correlation with the target."""
JITTER_PX = 6.0


def write_sample_array(root: Path, *, seed: int, trials: int = 4, viewers: int = 5) -> Path:
    """Write the pictures, targets, masks and viewers of a few trials.

    Args:
        root: The data set.
        seed: Of textures, places and viewers.
        trials: How many pictures.
        viewers: How many people.

    Returns:
        The task folder.
    """
    rng = np.random.default_rng(seed)
    folder = root / NAME
    for part in (SCENES, TARGETS, TRUTHS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    paths: list[Scanpath] = []
    for number in range(1, trials + 1):
        textures = [_texture(rng) for _ in range(PLACES)]
        wanted, places = int(rng.integers(PLACES)), _places(rng)
        scene, truth = _draw(textures, places, wanted)
        pictures = {SCENES: scene, TARGETS: textures[wanted], TRUTHS: truth}
        for part, picture in pictures.items():
            Image.fromarray(picture).save(folder / part / f"{number}.png")
        for viewer in range(1, viewers + 1):
            order = _order(textures, wanted, rng)
            paths.append(_scanpath(f"{number}.png", f"viewer-{viewer}", places[order], rng))
    write_scanpaths(folder / f"{VIEWERS}.csv", paths)
    return folder


def _side() -> int:
    return NATURAL[NAME].size[0]


def _texture(rng: np.random.Generator) -> UInt8[np.ndarray, "h w"]:
    """Smooth blotches, of another fineness and contrast each time."""
    side = NATURAL[NAME].target
    coarse = rng.normal(0, rng.uniform(30, 90), (int(rng.integers(3, 17)),) * 2) + GREY
    fine = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(fine, 0, 255).round().astype(np.uint8))


def _places(rng: np.random.Generator) -> Int64[np.ndarray, "p 2"]:
    """Centres (x, y) on a circle, turned at random."""
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(PLACES) / PLACES
    xy = (0.5 + RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)) * _side()
    return np.asarray(xy.round().astype(np.int64))


def _draw(
    textures: list[UInt8[np.ndarray, "h w"]], places: Int64[np.ndarray, "p 2"], wanted: int
) -> tuple[UInt8[np.ndarray, "s s"], UInt8[np.ndarray, "s s"]]:
    scene = np.full((_side(),) * 2, GREY, dtype=np.uint8)
    truth = np.zeros_like(scene)
    for number, (texture, (x, y)) in enumerate(zip(textures, places.tolist(), strict=True)):
        half = len(texture) // 2
        box = np.s_[y - half : y + half, x - half : x + half]
        scene[box] = texture
        if number == wanted:
            truth[box] = 255
    return scene, truth


def _order(
    textures: list[UInt8[np.ndarray, "h w"]], wanted: int, rng: np.random.Generator
) -> Int64[np.ndarray, " n"]:
    """The places that are visited, the target's last: the largest of guidance and Gumbel noise."""
    likeness = np.corrcoef(np.stack([one.ravel() for one in textures]).astype(float))[wanted]
    order = np.argsort(-(GUIDANCE * likeness + rng.gumbel(size=PLACES)))
    return np.asarray(order[: int(np.flatnonzero(order == wanted)[0]) + 1])


def _scanpath(
    picture: str, viewer: str, visited: Int64[np.ndarray, "n 2"], rng: np.random.Generator
) -> Scanpath:
    """From the middle to the places, not quite into their centres."""
    middle = np.full((1, 2), _side() / 2)
    xy: Float64[np.ndarray, "n 2"] = np.concatenate([middle, visited])
    xy = xy + rng.normal(0, JITTER_PX, xy.shape)
    return Scanpath(image=picture, subject=viewer, xy_px=xy.round(1), size_px=(_side(), _side()))
