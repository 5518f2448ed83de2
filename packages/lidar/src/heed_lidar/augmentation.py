"""Random changes of a scan for training: turn, flip, scale, shift; and cut-outs of it.

The changes are those of Cylinder3D's published training (arXiv 2011.10033), in its order. Every
function is pure: the generator that it is given decides.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64

Facing = Literal["forward", "random"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far a training scan is changed; 0 leaves a change out."""

    rotate_deg: float = 45.0
    """A scan is turned about the vertical axis by at most this angle, to either side."""
    flip: bool = True
    """Mirror x, y, both or none, each as often."""
    scale: float = 0.05
    """x and y are multiplied by one factor between 1 - scale and 1 + scale."""
    shift_m: float = 0.1
    """Standard deviation of the shift along each of x, y and z."""

    def __post_init__(self) -> None:
        """Refuse what is no amount, naming the setting."""
        if not 0.0 <= self.rotate_deg <= 180.0:
            raise ValueError(f"rotate_deg must be within 0..180, got {self.rotate_deg}")
        if not 0.0 <= self.scale < 1.0:
            raise ValueError(f"scale must be at least 0 and below 1, got {self.scale}")
        if self.shift_m < 0.0:
            raise ValueError(f"shift_m must not be negative, got {self.shift_m}")


def augment(
    xyz: Float64[np.ndarray, "n 3"], rng: np.random.Generator, settings: Augmentation
) -> Float64[np.ndarray, "n 3"]:
    """Turn, flip, scale and shift a scan.

    Every change draws from the generator even where its amount is 0, so that leaving one out does
    not change the others.

    Args:
        xyz: Points in metres, in the sensor's frame.
        rng: Decides.
        settings: How far.
    """
    angle = math.radians(rng.uniform(-1.0, 1.0) * settings.rotate_deg)
    flips = int(rng.integers(4)) * settings.flip
    factor = 1.0 + rng.uniform(-1.0, 1.0) * settings.scale
    shift = rng.normal(size=3) * settings.shift_m
    cos, sin = math.cos(angle), math.sin(angle)
    changed = np.empty_like(xyz)
    changed[:, 0] = (cos * xyz[:, 0] - sin * xyz[:, 1]) * (-1.0 if flips & 1 else 1.0) * factor
    changed[:, 1] = (sin * xyz[:, 0] + cos * xyz[:, 1]) * (-1.0 if flips & 2 else 1.0) * factor
    changed[:, 2] = xyz[:, 2]
    return changed + shift


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The part of a scan that training sees, for machines that cannot hold a whole one."""

    range_m: float = 25.0
    """Points at most this far from the sensor, measured on the ground."""
    sector_deg: float = 180.0
    """Angle of the sector of points, 360 for all around."""
    facing: Facing = "forward"
    """Where the sector opens: along x, or towards a random point within range."""

    def __post_init__(self) -> None:
        """Refuse what is no part of a scan, naming the setting."""
        if self.range_m <= 0.0:
            raise ValueError(f"range_m must be positive, got {self.range_m}")
        if not 0.0 < self.sector_deg <= 360.0:
            raise ValueError(f"sector_deg must be above 0 and at most 360, got {self.sector_deg}")
        if self.facing not in get_args(Facing):
            raise ValueError(f"facing must be forward or random, got {self.facing!r}")


def crop(
    xyz: Float64[np.ndarray, "n 3"], rng: np.random.Generator, settings: Crop
) -> Bool[np.ndarray, " n"]:
    """Which points of a scan are kept.

    Args:
        xyz: Points in metres, in the sensor's frame.
        rng: Decides where a random sector opens.
        settings: The part that is kept.
    """
    azimuth = np.arctan2(xyz[:, 1], xyz[:, 0])
    near: Bool[np.ndarray, " n"] = np.hypot(xyz[:, 0], xyz[:, 1]) <= settings.range_m
    middle = 0.0
    if settings.facing == "random" and near.any():
        middle = float(rng.choice(azimuth[near]))
    # The difference of two angles, brought to -pi..pi: the sector may span the seam behind.
    apart = np.abs(np.remainder(azimuth - middle + math.pi, 2.0 * math.pi) - math.pi)
    kept: Bool[np.ndarray, " n"] = near & (apart <= math.radians(settings.sector_deg) / 2.0)
    return kept
