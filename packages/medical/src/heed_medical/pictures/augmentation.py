"""Vary training pictures: one change of place for all sizes of a picture, and its brightness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64


@dataclass(frozen=True, kw_only=True)
class PictureAugmentation:
    """How training pictures are varied; the defaults are those of the COVID-Net recipe."""

    flip_probability: float = 0.5
    """Of mirroring left and right."""
    rotation_deg: float = 10.0
    """Angles are drawn evenly from minus to plus this."""
    shift: float = 0.1
    """Shifts are drawn evenly from minus to plus this share of the sides."""
    zoom: float = 0.15
    """Factors are drawn evenly from 1 minus to 1 plus this."""
    aspect_probability: float = 0.3
    """Of making the picture wider or taller."""
    aspect: float = 0.1
    """By at most this share."""
    brightness: float = 0.1
    """Factors of the values are drawn evenly from 1 minus to 1 plus this."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "aspect_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be within 0..1, got {getattr(self, name)}")
        for name in ("shift", "zoom", "aspect", "brightness"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0, below 1, got {getattr(self, name)}")
        if not 0.0 <= self.rotation_deg <= 180.0:
            raise ValueError(f"rotation_deg must be within 0..180, got {self.rotation_deg}")


def draw_change(
    rng: np.random.Generator, options: PictureAugmentation
) -> tuple[Float64[np.ndarray, "3 3"], float]:
    """A change of place and a factor of the brightness.

    Returns:
        A matrix from places (x, y, 1) of the new picture to places of the old one, both from -1 to
        1 between the picture's borders, for a square picture; and the factor.
    """
    angle = math.radians(rng.uniform(-options.rotation_deg, options.rotation_deg))
    shift_x, shift_y = 2 * rng.uniform(-options.shift, options.shift, size=2)
    scale = 1 / rng.uniform(1 - options.zoom, 1 + options.zoom)
    wide = 1.0
    if rng.random() < options.aspect_probability:
        wide = 1 + rng.uniform(-options.aspect, options.aspect)
    mirror = -1.0 if rng.random() < options.flip_probability else 1.0
    factor = rng.uniform(1 - options.brightness, 1 + options.brightness)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, shift_x], [sin, cos, shift_y], [0, 0, 1]])
    stretch = np.diag([mirror * scale / wide, scale * wide, 1.0])
    return turn @ stretch, float(factor)


def apply_change(
    picture: Float32[np.ndarray, "h w"],
    change: Float64[np.ndarray, "3 3"],
    *,
    factor: float = 1.0,
    height_to_width: float = 1.0,
) -> Float32[np.ndarray, "h w"]:
    """Move the content of a picture, linearly interpolated; what comes in from outside is 0.

    Args:
        picture: Values within 0..1.
        change: Of `draw_change`.
        factor: Of the values, which stay within 0..1.
        height_to_width: Of the picture as it is seen, so that turning does not shear one that was
            resized to other proportions.
    """
    import cv2

    cv2.setNumThreads(1)  # threads of loader workers fight for cores
    height, width = picture.shape
    # pixel centre i lies at (2 i + 1) / n - 1 between the borders -1 and 1
    pixels = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])
    seen = np.diag([1.0, height_to_width, 1.0])
    matrix = np.linalg.inv(seen @ pixels) @ change @ seen @ pixels
    moved = cv2.warpAffine(
        picture,
        matrix[:2],
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return np.asarray(np.clip(moved * factor, 0.0, 1.0), dtype=np.float32)


def augment_pictures(
    pictures: Sequence[Float32[np.ndarray, "_ _"]],
    rng: np.random.Generator,
    options: PictureAugmentation,
    *,
    changed: Sequence[bool] | None = None,
) -> list[Float32[np.ndarray, "_ _"]]:
    """Change several sizes of one picture in the same way; a pure function of its arguments.

    Args:
        pictures: The same picture in several sizes; the proportions of the first are kept.
        rng: Where the change is drawn from.
        options: What is varied.
        changed: Which of them are changed; None: all.
    """
    change, factor = draw_change(rng, options)
    height, width = pictures[0].shape
    flags = [True] * len(pictures) if changed is None else changed
    return [
        apply_change(picture, change, factor=factor, height_to_width=height / width)
        if flag
        else picture
        for picture, flag in zip(pictures, flags, strict=True)
    ]
