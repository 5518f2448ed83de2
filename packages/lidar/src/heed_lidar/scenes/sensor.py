"""A spinning multi-beam LiDAR and the scan that it takes of a scene, by analytic ray casting."""

import math
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, UInt32

from heed_lidar.scenes.objects import Thing
from heed_lidar.scenes.street import CURB, OTHER_GROUND, ROAD, SIDEWALK, TERRAIN, Street

MARCH_STEPS = 40
BISECTIONS = 9
MOST_SHOTS = 1_000_000
"""Of one scan: twice those of the densest sensors."""


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A sensor like the 64-beam one of KITTI: half of the beams above -8.3 degrees, half below."""

    beams: int = 64
    """Number of beams, even, from +2 to -24.8 degrees."""
    azimuth_step_deg: float = 0.35
    """Angle between two shots of one beam: 0.16 to 0.35 for the sensor of KITTI."""
    field_of_view_deg: float = 360.0
    """Width of the scanned sector, centred on the driving direction."""
    height_m: float = 1.73
    """Height above the ground."""
    range_m: float = 80.0
    """Nothing farther away is seen."""
    range_noise_m: float = 0.02
    """Standard deviation of the measured range."""
    dropout: float = 0.05
    """Share of the echoes that are lost."""

    def __post_init__(self) -> None:
        if self.beams < 2 or self.beams % 2:
            raise ValueError(f"beams must be even and at least 2, got {self.beams}")
        if not 0.05 <= self.azimuth_step_deg <= 5:
            raise ValueError(f"azimuth_step_deg must be in 0.05..5, got {self.azimuth_step_deg}")
        if not 1 <= self.field_of_view_deg <= 360:
            raise ValueError(f"field_of_view_deg must be in 1..360, got {self.field_of_view_deg}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        shots = self.beams * len(self.azimuths_deg)
        if shots > MOST_SHOTS:
            raise ValueError(
                f"beams times azimuths must be at most {MOST_SHOTS}, got {shots} shots"
            )
        for name, highest in (("height_m", 10), ("range_m", 300)):
            if not 0 < getattr(self, name) <= highest:
                raise ValueError(
                    f"{name} must be above 0 and at most {highest}, got {getattr(self, name)}"
                )
        if not 0 <= self.range_noise_m <= 1:
            raise ValueError(f"range_noise_m must be in 0..1, got {self.range_noise_m}")

    @property
    def elevations_deg(self) -> Float64[np.ndarray, " beams"]:
        """Elevation of each beam, from the highest down."""
        half = self.beams // 2
        upper = np.linspace(2.0, -8.33, half) if half > 1 else np.array([2.0])
        lower = np.linspace(-8.83, -24.8, half) if half > 1 else np.array([-24.8])
        return np.concatenate([upper, lower])

    @property
    def azimuths_deg(self) -> Float64[np.ndarray, " columns"]:
        """Azimuth of each shot, leftwards, from the driving direction on as in KITTI's files."""
        columns = round(self.field_of_view_deg / self.azimuth_step_deg)
        if self.field_of_view_deg == 360:
            return np.arange(columns) * (360.0 / columns)
        return (np.arange(columns) + 0.5) / columns * self.field_of_view_deg - (
            0.5 * self.field_of_view_deg
        )


@dataclass(frozen=True, kw_only=True)
class Surfaces:
    """Mean remission of the ground's materials."""

    road: float = 0.2
    curb: float = 0.3
    sidewalk: float = 0.3
    terrain: float = 0.34
    other_ground: float = 0.2
    spread: float = 0.06
    """Standard deviation of every material from point to point."""
    grain_m: float = 0.005
    """Standard deviation of the ground's height from point to point; of terrain three times it."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A street, what stands on it, and where the sensor is."""

    name: str = "straight"
    street: Street = field(default_factory=Street)
    things: tuple[Thing, ...] = ()
    surfaces: Surfaces = field(default_factory=Surfaces)
    sensor_xy: tuple[float, float] = (0.0, -2.0)
    """Metres, in the frame of the street."""
    yaw: float = 0.0
    """Driving direction in the frame of the street, radians to the left."""
    pitch: float = 0.0
    """Nose down against the ground, radians."""
    roll: float = 0.0
    """Right side down against the ground, radians."""

    def pose(self, height_m: float) -> Float64[np.ndarray, "4 4"]:
        """Sensor frame (x forward, y left, z up) to the frame of the street.

        Args:
            height_m: Of the sensor above the ground.
        """
        x, y = np.array([self.sensor_xy[0]]), np.array([self.sensor_xy[1]])
        ground = self.street.height
        step = 2.0
        slope_x = ((ground(x + step, y) - ground(x - step, y)) / (2 * step))[0]
        slope_y = ((ground(x, y + step) - ground(x, y - step)) / (2 * step))[0]
        up = np.array([-slope_x, -slope_y, 1.0]) / math.sqrt(1 + slope_x**2 + slope_y**2)
        forward = np.array([math.cos(self.yaw), math.sin(self.yaw), 0.0])
        forward -= up * (up @ forward)
        forward /= np.linalg.norm(forward)
        level = np.stack([forward, np.cross(up, forward), up], axis=1)
        pose = np.eye(4)
        pose[:3, :3] = level @ _tilt(self.pitch, self.roll)
        pose[:3, 3] = np.array([x[0], y[0], ground(x, y)[0]]) + height_m * up
        return pose


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One scan, ring after ring from the highest beam down, each ring turning leftwards."""

    xyz: Float64[np.ndarray, "n 3"]
    """Metres, sensor frame."""
    remission: Float32[np.ndarray, " n"]
    """In [0, 1]."""
    ring: Int64[np.ndarray, " n"]
    """Beam of each point, 0 is the highest."""
    raw: UInt32[np.ndarray, " n"]
    """Raw id in the low 16 bits, instance in the high ones."""


def sweep(scene: Scene, sensor: Sensor, rng: np.random.Generator) -> Sweep:
    """Scan a scene.

    Every ray ends at the nearest of the ground and the things; noise moves the point along the ray
    after its label is settled.

    Args:
        scene: What is scanned, and from where.
        sensor: The sensor.
        rng: Source of noise and losses.
    """
    rays, ring = _rays(sensor)
    pose = scene.pose(sensor.height_m)
    origin, directions = pose[:3, 3], rays @ pose[:3, :3].T
    distance = ground_distance(scene.street, origin, directions, limit_m=sensor.range_m)
    raw, mean = np.zeros(len(rays), np.uint32), np.zeros(len(rays))
    cosine, rough, grain = np.ones(len(rays)), np.zeros(len(rays)), np.zeros(len(rays))
    ground = np.isfinite(distance)
    end = origin + distance[ground, None] * directions[ground]
    raw[ground], mean[ground] = _ground(scene, end[:, 0], end[:, 1])
    cosine[ground] = np.abs(directions[ground, 2])
    grain[ground] = np.where(raw[ground] == TERRAIN, 3, 1) * scene.surfaces.grain_m
    columns = len(sensor.azimuths_deg)
    for thing in scene.things:
        rows = _rows_towards(thing, origin, pose, sensor, columns)
        near, angle = thing.hit(origin, directions[rows])
        seen = (near < distance[rows]) & (near <= sensor.range_m)
        if thing.porosity:
            seen &= rng.random(len(rows)) >= thing.porosity
        hit = rows[seen]
        distance[hit], cosine[hit] = near[seen], angle[seen]
        raw[hit] = thing.raw | (thing.instance << 16)
        mean[hit], rough[hit], grain[hit] = thing.remission, thing.roughness_m, 0.0
    keep = np.isfinite(distance) & (rng.random(len(rays)) >= sensor.dropout)
    noise = rng.standard_normal((2, int(keep.sum())))
    measured = distance[keep] + np.hypot(sensor.range_noise_m, rough[keep]) * noise[0]
    xyz = measured[:, None] * rays[keep]
    xyz[:, 2] += grain[keep] * noise[1]
    remission = mean[keep] * (0.75 + 0.25 * np.sqrt(cosine[keep]))
    remission += scene.surfaces.spread * rng.standard_normal(len(remission))
    return Sweep(
        xyz=xyz,
        remission=np.clip(remission, 0, 0.99).round(2).astype(np.float32),
        ring=ring[keep],
        raw=raw[keep],
    )


def ground_distance(
    street: Street,
    origin: Float[np.ndarray, " 3"],
    directions: Float[np.ndarray, "n 3"],
    *,
    limit_m: float,
) -> Float64[np.ndarray, " n"]:
    """Distance along unit rays to the ground, inf where it is not met within `limit_m`.

    The ground lies in a thin layer on the relief; a ray is searched where it crosses the layer,
    first in steps, then by bisection and one secant.
    """
    lowest, highest = street.relief_range_m
    start = _relief_distance(street, origin, directions, highest)
    result = np.full(len(directions), np.inf)
    rows = np.flatnonzero(start < limit_m)
    end = np.minimum(_relief_distance(street, origin, directions[rows], lowest), limit_m)
    near = start[rows]
    step = (end - near) / MARCH_STEPS
    far = near.copy()
    open_ = np.arange(len(rows))
    for _ in range(MARCH_STEPS):
        far[open_] = near[open_] + step[open_]
        under = _clearance(street, origin, directions[rows[open_]], far[open_]) <= 0
        near[open_[~under]] = far[open_[~under]]
        open_ = open_[~under]
    met = np.setdiff1d(np.arange(len(rows)), open_, assume_unique=True)
    result[rows[met]] = _refine(street, origin, directions[rows[met]], near[met], far[met])
    return result


def _refine(
    street: Street,
    origin: Float[np.ndarray, " 3"],
    directions: Float[np.ndarray, "n 3"],
    near: Float[np.ndarray, " n"],
    far: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    for _ in range(BISECTIONS):
        middle = 0.5 * (near + far)
        under = _clearance(street, origin, directions, middle) <= 0
        near, far = np.where(under, near, middle), np.where(under, middle, far)
    above = _clearance(street, origin, directions, near)
    below = _clearance(street, origin, directions, far)
    share = above / np.maximum(above - below, 1e-12)
    met: Float[np.ndarray, " n"] = near + np.clip(share, 0, 1) * (far - near)
    return met


def _clearance(
    street: Street,
    origin: Float[np.ndarray, " 3"],
    directions: Float[np.ndarray, "n 3"],
    distance: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Height of points on rays above the ground."""
    x = origin[0] + distance * directions[:, 0]
    y = origin[1] + distance * directions[:, 1]
    z = origin[2] + distance * directions[:, 2]
    clearance: Float[np.ndarray, " n"] = z - street.height(x, y)
    return clearance


def _relief_distance(
    street: Street,
    origin: Float[np.ndarray, " 3"],
    directions: Float[np.ndarray, "n 3"],
    above: float,
) -> Float[np.ndarray, " n"]:
    """Distance to the relief raised by `above`, below the origin; inf where a ray misses."""
    relief = street.relief
    at = relief.height(origin[:1], origin[1:2])[0]
    c = origin[2] - at - above
    slope = relief.grade + relief.bend_per_m * origin[0]
    b = directions[:, 2] - slope * directions[:, 0] - relief.cross * directions[:, 1]
    a = -0.5 * relief.bend_per_m * directions[:, 0] ** 2
    root = b * b - 4 * a * c
    lower = -b + np.sqrt(np.maximum(root, 0))
    hit = (root >= 0) & (lower > 1e-12)
    return np.where(hit, 2 * c / np.where(hit, lower, 1), np.inf)


def _ground(
    scene: Scene, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Raw id and mean remission of the ground at points."""
    raw = scene.street.labels(x, y)
    surfaces = scene.surfaces
    table = np.zeros(256)
    table[ROAD], table[CURB], table[SIDEWALK] = surfaces.road, surfaces.curb, surfaces.sidewalk
    table[TERRAIN], table[OTHER_GROUND] = surfaces.terrain, surfaces.other_ground
    return raw, table[raw] + np.where(raw == ROAD, scene.street.changes(x, y), 0.0)


def _rays(sensor: Sensor) -> tuple[Float64[np.ndarray, "n 3"], Int64[np.ndarray, " n"]]:
    """Unit directions in the sensor frame, ring after ring, and their beams."""
    elevation = np.radians(sensor.elevations_deg)[:, None]
    azimuth = np.radians(sensor.azimuths_deg)[None]
    level = np.cos(elevation)
    rays = np.stack(
        np.broadcast_arrays(level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)),
        axis=-1,
    )
    return rays.reshape(-1, 3), np.repeat(np.arange(sensor.beams), azimuth.shape[1])


def _rows_towards(
    thing: Thing,
    origin: Float[np.ndarray, " 3"],
    pose: Float[np.ndarray, "4 4"],
    sensor: Sensor,
    columns: int,
) -> Int64[np.ndarray, " m"]:
    """Rows of the rays whose azimuth can meet a thing, with a margin for the sensor's tilt."""
    away = np.array([thing.x, thing.y, 0.5 * (thing.low + thing.high)]) - origin
    seen = pose[:3, :3].T @ away
    distance = math.hypot(seen[0], seen[1])
    wanted: Bool[np.ndarray, " columns"] = np.ones(columns, bool)
    if distance > 1.2 * thing.reach_m:
        width = math.degrees(math.asin(thing.reach_m / distance)) + 2.0
        bearing = math.degrees(math.atan2(seen[1], seen[0]))
        off = (sensor.azimuths_deg - bearing + 180) % 360 - 180
        wanted = np.abs(off) <= width
    rows = np.arange(sensor.beams)[:, None] * columns + np.flatnonzero(wanted)
    return rows.reshape(-1)


def _tilt(pitch: float, roll: float) -> Float64[np.ndarray, "3 3"]:
    """Turn about the forward axis by `roll`, then about the left one by `pitch`."""
    (cp, sp), (cr, sr) = ((math.cos(angle), math.sin(angle)) for angle in (pitch, roll))
    return np.array([[cp, sp * sr, sp * cr], [0, cr, -sr], [-sp, cp * sr, cp * cr]])
