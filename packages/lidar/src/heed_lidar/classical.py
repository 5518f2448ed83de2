"""Curbs without a network: steps in the rings of a scan, nearest to the path on each side.

Features and thresholds follow LidarRoadBoundaryDetection (Wang et al.): a ground plane, then along
each ring the height range, the smoothness and the gaps of a window of points. Of the points that
look like a step, each ring keeps the one nearest to the path on each side, and curves are fitted
through those. The optional Gaussian process is the one of Chen et al. (IV 2015): it grows from the
car along the curb and refuses points that it does not expect.

Differs from them: a ring keeps the whole step beside its nearest candidate, so that points can be
compared with labels; the side away from the path has to be the higher one, and a curb has to be
seen by several rings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

from heed_lidar.clouds.cloud import PointCloud
from heed_lidar.curves import CurbFit, CurbFitting, fit_curbs
from heed_lidar.rings import ring_numbers

TESTS = ("height range", "height deviation", "rise", "smoothness", "gap", "window")
"""What the points of a ring are put to."""

_TRIALS = 300
_PLANE_POINTS = 4000
_STEEPEST_DEG = 15.0


@dataclass(frozen=True, kw_only=True)
class ClassicalConfig:
    """Thresholds of the search for curbs."""

    beams: int = 64
    """Lasers of the scanner, for files that do not store rings."""
    elevation_deg: tuple[float, float] = (-24.8, 2.0)
    """Of its lowest and highest laser, for files that store points in any order."""
    azimuth_step_deg: float = 0.16
    """Angle between neighbours in a ring."""
    range_m: tuple[float, float] = (2.0, 50.0)
    """Nearest and furthest points that are looked at."""
    ground_m: float = 0.35
    """Points further above or below the ground plane are left out."""
    window: int = 5
    """Neighbours on each side of a point, in its ring, that its features are taken from."""
    height_range_m: tuple[float, float] = (0.02, 0.5)
    """A step's window has a height range within these."""
    height_std_m: float = 0.01
    """Its heights have a standard deviation above this."""
    smoothness: float = 0.001
    """It also has |sum(p_j - p_i)| / (n |p_i|) above this, or a gap."""
    gap: float = 2.0
    """A gap: neighbours further apart, in the plane, than this many times the expected distance."""
    rise_m: float = 0.01
    """The half of its window that is away from the path is higher than the other half by this, on
    average; a large negative value switches the test off."""
    step_m: float = 0.3
    """Candidates of the same ring within this distance of the nearest one are the same step."""
    min_rings: int = 5
    """Curbs that fewer rings see are dropped."""
    process: Literal["none", "gaussian"] = "none"
    """gaussian: a Gaussian process along the road refuses candidates before the fit."""
    process_variance: float = 2.5
    """Candidates where the process has a larger variance (square metres) wait for nearer ones."""
    process_offset_m: float = 1.5
    """Candidates further from the mean of the process are refused."""
    process_length_m: float = 10.0
    """Distance along the road over which the process forgets."""
    fitting: CurbFitting = field(default_factory=lambda: CurbFitting(eps_m=2.0))
    """Of the curves; the radius spans the distance of rings 20 m ahead."""

    def __post_init__(self) -> None:
        pairs = ("elevation_deg", "range_m", "height_range_m")
        for name in pairs:
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} must be (low, high) with low < high, got {(low, high)}")
        for name in ("beams", "window", "min_rings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        positive = ("azimuth_step_deg", "ground_m", "gap", "step_m", "process_length_m")
        for name in (*positive, "process_variance", "process_offset_m"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Points with `normal @ point + offset == 0`; the normal has length 1 and points up."""

    normal: Float64[np.ndarray, "3"]
    offset: float

    def height(self, xyz: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, " n"]:
        """Of points above the plane, in metres."""
        return np.asarray(xyz @ self.normal + self.offset)


@dataclass(frozen=True, kw_only=True)
class ClassicalCurbs:
    """What was found in one scan."""

    ground: Plane | None
    """None: no plane is level enough."""
    score: Float64[np.ndarray, " n"]
    """Of every point: 0.5 to 1 for points of steps, growing with the height; else 0."""
    rows: Int64[np.ndarray, " m"]
    """Points of steps, which the fit was given."""
    fit: CurbFit
    """Of those points."""

    @property
    def curb(self) -> Bool[np.ndarray, " n"]:
        """The points that lie on a curve."""
        mask = np.zeros(len(self.score), dtype=bool)
        mask[self.rows[self.fit.kept]] = True
        return mask

    def classes(self, *, curb: int = 1, others: int = 4) -> Int64[np.ndarray, " n"]:
        """A class for every point."""
        return np.where(self.curb, curb, others).astype(np.int64)


def detect_curbs(cloud: PointCloud, config: ClassicalConfig | None = None) -> ClassicalCurbs:
    """Find the curbs of one scan; a scan without ground or steps has none.

    Args:
        cloud: Sensor frame, the car's path along x. Rings are taken from it, else from the order
            of its points, else from their elevation.
        config: Default: a 64-beam scanner on a car.
    """
    config = config or ClassicalConfig()
    score = np.zeros(len(cloud), dtype=np.float64)
    ground = fit_ground(cloud.xyz)
    rows = np.zeros(0, dtype=np.int64)
    ring = np.zeros(0, dtype=np.int64)
    if ground is not None:
        steps = _steps(cloud, ground, config)
        nearest = _nearest(steps)
        if config.process == "gaussian":
            nearest = nearest[_expected(steps.xyz[nearest], config)]
        chosen = _whole_steps(steps, nearest, config.step_m)
        rows, ring = steps.rows[chosen], steps.ring[chosen]
        score[rows] = 0.5 + 0.5 * np.clip(steps.height_range[chosen] / 0.1, 0, 1)
    fit = fit_curbs(cloud.xyz[rows], score[rows], config.fitting)
    return ClassicalCurbs(
        ground=ground, score=score, rows=rows, fit=_seen_by(fit, ring, config.min_rings)
    )


def fit_ground(xyz: Float64[np.ndarray, "n 3"], *, seed: int = 0) -> Plane | None:
    """The most level plane that most points within 30 m agree on (RANSAC, then least squares).

    Args:
        xyz: In metres.
        seed: Of the trials.
    """
    points = xyz[np.hypot(xyz[:, 0], xyz[:, 1]) < 30.0]
    points = points[:: max(1, len(points) // _PLANE_POINTS)]
    if len(points) < 3:
        return None
    corners = points[np.random.default_rng(seed).integers(len(points), size=(_TRIALS, 3))]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1)
    level = np.abs(normals[:, 2]) > np.cos(np.radians(_STEEPEST_DEG)) * lengths
    if not level.any():
        return None
    normals = normals[level] / (lengths * np.sign(normals[:, 2]))[level, None]
    offsets = -(normals * corners[level, 0]).sum(axis=1)
    near = (np.abs(points @ normals.T + offsets) < 0.1).sum(axis=0)
    best = int(near.argmax())
    plane = Plane(normal=normals[best], offset=float(offsets[best]))
    for _ in range(3):
        plane = _refined(plane, points)
    return plane


def _refined(plane: Plane, points: Float64[np.ndarray, "n 3"]) -> Plane:
    """Least squares over the points near the plane."""
    near = points[np.abs(plane.height(points)) < 0.15]
    if len(near) < 3:
        return plane
    design = np.column_stack([near[:, :2], np.ones(len(near))])
    slope_x, slope_y, level = np.linalg.lstsq(design, near[:, 2], rcond=None)[0]
    normal = np.array([-slope_x, -slope_y, 1.0])
    length = float(np.linalg.norm(normal))
    return Plane(normal=normal / length, offset=-float(level) / length)


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Points that look like a step, ring by ring in the order of their azimuth."""

    rows: Int64[np.ndarray, " n"]
    xyz: Float64[np.ndarray, "n 3"]
    ring: Int64[np.ndarray, " n"]
    height_range: Float64[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class RingPoints:
    """The points near the ground, ring by ring in the order of their azimuth, and their tests."""

    rows: Int64[np.ndarray, " n"]
    """In the cloud."""
    ring: Int64[np.ndarray, " n"]
    height_range_m: Float64[np.ndarray, " n"]
    """Of the window of each point."""
    passed: Mapping[str, Bool[np.ndarray, " n"]]
    """One entry per test of `TESTS`; window: the neighbours lie in the same ring. Outside of such
    windows the other tests mean nothing."""

    @property
    def step(self) -> Bool[np.ndarray, " n"]:
        """Points that look like a step: all tests, of smoothness and gap one."""
        step = self.passed["smoothness"] | self.passed["gap"]
        for name in ("height range", "height deviation", "rise", "window"):
            step = step & self.passed[name]
        return np.asarray(step)


def examine(cloud: PointCloud, ground: Plane, config: ClassicalConfig) -> RingPoints:
    """Put the points near the ground to the tests of a step.

    Args:
        cloud: As for `detect_curbs`.
        ground: Of the cloud.
        config: The thresholds.
    """
    from scipy.ndimage import (  # type: ignore[import-untyped]
        maximum_filter1d,
        minimum_filter1d,
        uniform_filter1d,
    )

    rows, ring = _ground_rings(cloud, ground, config)
    width = 2 * config.window + 1
    if len(rows) < width:
        none = np.zeros(0, dtype=np.int64)
        passed = {name: np.zeros(0, dtype=bool) for name in TESTS}
        return RingPoints(rows=none, ring=none, height_range_m=np.zeros(0), passed=passed)
    xyz = cloud.xyz[rows]
    height = ground.height(xyz)
    spread = maximum_filter1d(height, width) - minimum_filter1d(height, width)
    variance = uniform_filter1d(height**2, width) - uniform_filter1d(height, width) ** 2
    bend = width * (uniform_filter1d(xyz, width, axis=0) - xyz)
    bend = np.linalg.norm(bend, axis=1) / ((width - 1) * np.linalg.norm(xyz, axis=1))
    apart = np.linalg.norm(np.diff(xyz[:, :2], axis=0), axis=1)
    apart = np.maximum(np.append(apart, 0), np.insert(apart, 0, 0))
    expected = np.hypot(xyz[:, 0], xyz[:, 1]) * np.radians(config.azimuth_step_deg)
    low, high = config.height_range_m
    found = (
        (spread > low) & (spread < high),
        variance > config.height_std_m**2,
        _rise(xyz[:, 1], height, config.window) > config.rise_m,
        bend > config.smoothness,
        apart > config.gap * expected,
        _whole_windows(ring, config.window),
    )
    return RingPoints(
        rows=rows, ring=ring, height_range_m=spread, passed=dict(zip(TESTS, found, strict=True))
    )


def _steps(cloud: PointCloud, ground: Plane, config: ClassicalConfig) -> _Steps:
    points = examine(cloud, ground, config)
    step = points.step
    rows = points.rows[step]
    return _Steps(
        rows=rows,
        xyz=cloud.xyz[rows],
        ring=points.ring[step],
        height_range=points.height_range_m[step],
    )


def _ground_rings(
    cloud: PointCloud, ground: Plane, config: ClassicalConfig
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Points near the ground, sorted by ring and azimuth, and their rings."""
    ring = cloud.ring
    if ring is None:
        ring = ring_numbers(cloud.xyz, beams=config.beams, elevation_deg=config.elevation_deg)
    distance = np.hypot(cloud.xyz[:, 0], cloud.xyz[:, 1])
    near = (distance >= config.range_m[0]) & (distance <= config.range_m[1])
    rows = np.flatnonzero(near & (np.abs(ground.height(cloud.xyz)) < config.ground_m))
    x, y, z = cloud.xyz[rows].T
    # From behind the car, so that no ring is cut where a curb may be.
    rows = rows[np.lexsort((z, distance[rows], np.arctan2(y, x), ring[rows]))]
    return rows, ring[rows]


def _rise(
    y: Float64[np.ndarray, " n"], height: Float64[np.ndarray, " n"], window: int
) -> Float64[np.ndarray, " n"]:
    """How much higher the outer half of each window is than the inner one; the ends are 0."""
    sums = np.concatenate([[0.0], np.cumsum(height)])
    half = (sums[window:] - sums[:-window]) / window
    rise = np.zeros(len(y))
    outward = np.sign(np.abs(y[2 * window :]) - np.abs(y[: -2 * window]))
    rise[window:-window] = (half[window + 1 :] - half[: -window - 1]) * outward
    return rise


def _whole_windows(ring: Int64[np.ndarray, " n"], window: int) -> Bool[np.ndarray, " n"]:
    """Points whose window lies within their ring."""
    whole = np.zeros(len(ring), dtype=bool)
    whole[window:-window] = ring[2 * window :] == ring[: -2 * window]
    return whole


def _nearest(steps: _Steps) -> Int64[np.ndarray, " k"]:
    """The step points nearest to the path: one per ring, side, and direction of the car."""
    left, ahead = steps.xyz[:, 1] >= 0, steps.xyz[:, 0] >= 0
    group = steps.ring * 4 + left * 2 + ahead
    order = np.lexsort((steps.xyz[:, 0], np.abs(steps.xyz[:, 1]), group))
    first = np.unique(group[order], return_index=True)[1]
    return np.asarray(order[first], dtype=np.int64)


def _whole_steps(
    steps: _Steps, nearest: Int64[np.ndarray, " k"], reach_m: float
) -> Bool[np.ndarray, " n"]:
    """The points of each ring that lie beside one of its nearest points."""
    from scipy.spatial import KDTree  # type: ignore[import-untyped]

    if not len(nearest):
        return np.zeros(len(steps.rows), dtype=bool)
    # Rings are kept apart by an axis of their own.
    place = np.column_stack([steps.xyz[:, :2], steps.ring * 1000.0])
    distance = KDTree(place[nearest]).query(place, distance_upper_bound=reach_m)[0]
    return np.asarray(np.isfinite(distance))


def _expected(xyz: Float64[np.ndarray, "n 3"], config: ClassicalConfig) -> Bool[np.ndarray, " n"]:
    """The points that a Gaussian process y = f(x) accepts, side by side."""
    accepted = np.zeros(len(xyz), dtype=bool)
    for left in (True, False):
        rows = np.flatnonzero((xyz[:, 1] >= 0) == left)
        accepted[rows] = _grown(xyz[rows, 0], xyz[rows, 1], config)
    return accepted


def _grown(
    x: Float64[np.ndarray, " n"], y: Float64[np.ndarray, " n"], config: ClassicalConfig
) -> Bool[np.ndarray, " n"]:
    """Start from the points nearest to the car, accept what they predict, and so on."""
    accepted = np.zeros(len(x), dtype=bool)
    if not len(x):
        return accepted
    seeds = np.argsort(np.abs(x), kind="stable")[: max(5, len(x) // 5)]
    level = float(np.median(y[seeds]))
    accepted[seeds[np.abs(y[seeds] - level) < 0.5]] = True
    for _ in range(len(x)):
        mean, variance = _process(x[accepted], y[accepted], x, config.process_length_m)
        fits = (variance < config.process_variance) & (np.abs(y - mean) < config.process_offset_m)
        if (fits | accepted == accepted).all():
            break
        accepted |= fits
    return accepted


def _process(
    x: Float64[np.ndarray, " n"],
    y: Float64[np.ndarray, " n"],
    at: Float64[np.ndarray, " m"],
    length_m: float,
    signal_m: float = 2.0,
    noise_m: float = 0.2,
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Mean and variance of a Gaussian process with a squared-exponential kernel."""
    from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]

    def kernel(
        a: Float64[np.ndarray, " a"], b: Float64[np.ndarray, " b"]
    ) -> Float64[np.ndarray, "a b"]:
        return np.asarray(signal_m**2 * np.exp(-0.5 * ((a[:, None] - b) / length_m) ** 2))

    level = y.mean()
    factor = cho_factor(kernel(x, x) + noise_m**2 * np.eye(len(x)))
    cross = kernel(x, at)
    mean = level + cross.T @ cho_solve(factor, y - level)
    variance = signal_m**2 - (cross * cho_solve(factor, cross)).sum(axis=0)
    return np.asarray(mean), np.asarray(variance)


def _seen_by(fit: CurbFit, ring: Int64[np.ndarray, " n"], min_rings: int) -> CurbFit:
    """Without the curbs that too few rings see."""
    seen = [c for c in fit.curbs if len(np.unique(ring[fit.cluster == c.number])) >= min_rings]
    number = np.full(len(fit.curbs) + 1, -1, dtype=np.int64)
    number[[curb.number for curb in seen]] = np.arange(len(seen))
    cluster = number[fit.cluster]  # the last entry stands for the cluster -1
    curbs = tuple(replace(curb, number=i) for i, curb in enumerate(seen))
    return CurbFit(kept=cluster >= 0, cluster=cluster, curbs=curbs)
