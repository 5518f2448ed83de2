"""Which laser measured each point, where the file does not say.

A spinning scanner sees the road in rings. Its files store either the laser of each point, or the
points of one laser after those of another (KITTI), or neither.
"""

import numpy as np
from jaxtyping import Float64, Int64

_SHORTEST_RING = 10
_ORDERED = 0.9


def ring_numbers(
    xyz: Float64[np.ndarray, "n 3"],
    *,
    beams: int = 64,
    elevation_deg: tuple[float, float] = (-24.8, 2.0),
) -> Int64[np.ndarray, " n"]:
    """Rings by the order of the points if they are stored ring by ring, else by their elevation.

    Args:
        xyz: Points in metres, sensor frame, in the order of the file.
        beams: Lasers of the scanner.
        elevation_deg: Of the lowest and the highest laser.
    """
    rings = rings_by_order(xyz)
    if rings is not None and len(rings) and rings[-1] < 1.25 * beams:
        return rings
    return rings_by_elevation(xyz, beams=beams, elevation_deg=elevation_deg)


def rings_by_order(xyz: Float64[np.ndarray, "n 3"]) -> Int64[np.ndarray, " n"] | None:
    """Count the rounds of the azimuth from straight ahead; None if those are no rings.

    Rings have elevations that only grow or only fall from ring to ring.
    """
    if not len(xyz):
        return np.zeros(0, dtype=np.int64)
    azimuth = np.degrees(np.arctan2(xyz[:, 1], xyz[:, 0])) % 360.0
    change = np.diff(azimuth)
    if np.sign(change).sum() < 0:
        change = -change
    starts = np.concatenate([[0], np.flatnonzero(change < -180) + 1])
    # Noise straight ahead makes the azimuth jump there and back within one ring.
    starts = starts[np.diff(starts, prepend=-_SHORTEST_RING) >= _SHORTEST_RING]
    rings = np.zeros(len(xyz), dtype=np.int64)
    rings[starts[1:]] = 1
    rings = np.cumsum(rings)
    steps = np.diff([float(np.median(part)) for part in np.split(_elevation(xyz), starts[1:])])
    if len(steps) < 3 or max((steps > 0).mean(), (steps < 0).mean()) < _ORDERED:
        return None
    return rings


def rings_by_elevation(
    xyz: Float64[np.ndarray, "n 3"], *, beams: int, elevation_deg: tuple[float, float]
) -> Int64[np.ndarray, " n"]:
    """Equal bins of elevation, 0 for the lowest."""
    low, high = elevation_deg
    place = (_elevation(xyz) - low) / (high - low) * (beams - 1)
    return np.asarray(np.clip(np.round(place), 0, beams - 1).astype(np.int64))


def _elevation(xyz: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, " n"]:
    return np.asarray(np.degrees(np.arctan2(xyz[:, 2], np.hypot(xyz[:, 0], xyz[:, 1]))))
