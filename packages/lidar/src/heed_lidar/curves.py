"""From curb points to curb curves: cluster, fit a robust polynomial, drop what is off the curve.

Follows the post-processing of CurbNet (arXiv 2403.16794): DBSCAN with a radius of 1 m and 5 points,
then per cluster a polynomial, then removal of the points that are far from it.

Differs from the paper, which gives neither the frame nor the degree: each cluster is fitted in the
frame of its own principal axis, so that curbs across the road and corners are functions too;
corners are split and parallel curbs in one cluster are taken apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.polynomial.legendre import legval, legvander

Side = Literal["left", "right"]

_TUKEY = 4.685  # 95 % efficiency under normal noise
_MAD_FLOOR_M = 0.02  # range noise of the sensors
_RIDGE = 1e-6
_ROUNDS = 5
_CELLS_PER_RADIUS = 20
_COVERAGE = 0.95  # all but the ragged ends
_TRIALS = 200


@dataclass(frozen=True, kw_only=True)
class CurbFitting:
    """How curb points become curves."""

    eps_m: float = 1.0
    """Radius of the clustering; larger values join separate curbs."""
    min_points: int = 5
    """Points within the radius that make a cluster; larger values lose far curbs."""
    max_offset_m: float = 0.2
    """Points further from their curve than this are dropped."""
    min_score: float = 0.0
    """Points with a lower curb probability are dropped first."""
    degree: int = 3
    """Highest degree of the curves: at most 2 below 8 m, 1 below 3 m."""
    corner_rmse_m: float = 0.3
    """A cluster that its curve fits worse than this holds a corner or several curbs."""
    corner_length_m: float = 6.0
    """Shorter clusters are not split at corners."""
    max_depth: int = 4
    """How often a cluster may be split."""
    min_length_m: float = 0.5
    """Clusters of fewer than 8 points and shorter than this are dropped."""
    spacing_m: float = 0.5
    """Distance of the vertices along a curve."""
    trim: float = 0.01
    """Share of its points that a curve leaves out at each end."""

    def __post_init__(self) -> None:
        for name in ("eps_m", "max_offset_m", "corner_rmse_m", "corner_length_m", "spacing_m"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.min_points < 2:
            raise ValueError(f"min_points must be at least 2, got {self.min_points}")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score must be within 0..1, got {self.min_score}")
        if not 1 <= self.degree <= 5:
            raise ValueError(f"degree must be within 1..5, got {self.degree}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim must be at least 0 and below 0.5, got {self.trim}")
        if self.max_depth < 0 or self.min_length_m < 0:
            raise ValueError(
                "max_depth and min_length_m must not be negative, "
                f"got {self.max_depth} and {self.min_length_m}"
            )


@dataclass(frozen=True, kw_only=True)
class Curb:
    """One curb."""

    number: int
    """Its index in the result."""
    polyline: Float64[np.ndarray, "m 3"]
    """At least two vertices in metres, in driving direction (x grows from first to last)."""
    side: Side
    """Of the sensor; left is positive y."""
    length_m: float
    """Of the polyline."""
    rmse_m: float
    """Root mean square of the points' horizontal offsets from the curve."""
    points: int
    """Points that it was fitted to."""
    step_height_m: float
    """90th minus 10th percentile of the heights within 0.15 m of the curve, slope removed."""
    score: float
    """Mean curb probability of its points."""
    scans: int = 1
    """Scans that it was seen in."""


@dataclass(frozen=True, kw_only=True)
class CurbFit:
    """What became of the curb points."""

    kept: Bool[np.ndarray, " n"]
    """Points that lie on a curve."""
    cluster: Int64[np.ndarray, " n"]
    """Number of each point's curb; -1 for dropped points."""
    curbs: tuple[Curb, ...]
    """Sorted by their first vertex."""


def fit_curbs(
    xyz: Float64[np.ndarray, "n 3"],
    score: Float[np.ndarray, " n"],
    settings: CurbFitting | None = None,
) -> CurbFit:
    """Fit curves to the points of one scan that are said to be curb.

    The order of the points does not matter; no points give an empty result.

    Args:
        xyz: Curb points in metres, x forward, y left, z up.
        score: Curb probability of each point.
        settings: Default: those of the paper.

    Raises:
        ValueError: Shapes that do not fit, or a coordinate or score that is not finite.
    """
    settings = settings or CurbFitting()
    _check_points(xyz, score)
    order = np.lexsort((score, xyz[:, 2], xyz[:, 1], xyz[:, 0]))
    order = order[score[order] >= settings.min_score]
    points, scores = xyz[order], score[order]
    found = []
    for rows in cluster_rows(points[:, :2], eps_m=settings.eps_m, min_points=settings.min_points):
        for curve, members in _curves_of(points, rows, settings, settings.max_depth):
            polyline = _sample(curve, points[members], settings)
            found.append((polyline, curve, members))
    found.sort(key=lambda item: tuple(item[0][0]))
    cluster = np.full(len(xyz), -1, dtype=np.int64)
    curbs = []
    for number, (polyline, curve, members) in enumerate(found):
        cluster[order[members]] = number
        curbs.append(_describe(number, polyline, curve, points[members], scores[members]))
    return CurbFit(kept=cluster >= 0, cluster=cluster, curbs=tuple(curbs))


def _check_points(xyz: Float64[np.ndarray, "n 3"], score: Float[np.ndarray, " n"]) -> None:
    if xyz.ndim != 2 or xyz.shape[1] != 3 or score.shape != (len(xyz),):
        raise ValueError(f"xyz must be (n, 3) and score (n,), got {xyz.shape} and {score.shape}")
    broken = ~(np.isfinite(xyz).all(axis=1) & np.isfinite(score))
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise ValueError(f"point {row} is not finite: {xyz[row].tolist()}, score {score[row]}")


def revert_dropped(
    classes: Int64[np.ndarray, " n"],
    dropped: Int64[np.ndarray, " m"],
    *,
    scores: Float[np.ndarray, "n c"] | None = None,
    others: int = 4,
    curb: int = 1,
    ignore: int = 0,
) -> Int64[np.ndarray, " n"]:
    """Give the curb points that no curve holds another class.

    Args:
        classes: Of all points of a scan.
        dropped: Rows of the points that `fit_curbs` did not keep.
        scores: Logits or probabilities; the best class besides curb and ignore is taken. None:
            they become `others`.
        others: The class without scores.
        curb: The class of curbs.
        ignore: The class that is never given.
    """
    reverted = classes.copy()
    if scores is None or not len(dropped):
        reverted[dropped] = others
        return reverted
    rest = scores[dropped].copy()
    rest[:, [curb, ignore]] = -np.inf
    reverted[dropped] = rest.argmax(axis=1)
    return reverted


def cluster_rows(
    xy: Float64[np.ndarray, "n 2"], *, eps_m: float, min_points: int
) -> list[Int64[np.ndarray, " k"]]:
    """DBSCAN (Ester et al., KDD 1996): the rows of each cluster, in order of their first rows.

    Points are gathered in cells of a twentieth of the radius first, weighted by their number:
    memory grows with the area that they cover and not with the square of their density.

    Args:
        xy: Points in metres.
        eps_m: Radius of the neighbourhood.
        min_points: Points in the neighbourhood, itself included, that make a core point.
    """
    if not len(xy):
        return []
    from sklearn.cluster import DBSCAN  # type: ignore[import-untyped]

    cell = np.floor(xy / (eps_m / _CELLS_PER_RADIUS)).astype(np.int64)
    _, inverse, counts = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    centres = [np.bincount(inverse, weights=xy[:, axis]) / counts for axis in (0, 1)]
    scan = DBSCAN(eps=eps_m, min_samples=min_points)
    labels = scan.fit(np.stack(centres, axis=1), sample_weight=counts).labels_[inverse]
    order = np.argsort(labels, kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    clusters = [rows.astype(np.int64) for rows in pieces if labels[rows[0]] >= 0]
    return sorted(clusters, key=lambda rows: int(rows[0]))


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """The graph of a polynomial over an axis in the plane."""

    centre: Float64[np.ndarray, " 2"]
    axes: Float64[np.ndarray, "2 2"]
    middle: float
    half: float
    coefficients: Float64[np.ndarray, " k"]
    """Of the Legendre polynomials over (u - middle) / half."""

    def across(self, u: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Height of the curve over its axis, in metres."""
        return np.asarray(legval((u - self.middle) / self.half, self.coefficients))

    def offsets(self, xy: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, " n"]:
        """Distance of points from the curve, across the axis, signed."""
        u, v = self.coordinates(xy)
        return np.asarray(v - self.across(u))

    def coordinates(
        self, xy: Float64[np.ndarray, "n 2"]
    ) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Along and across the axis."""
        local = (xy - self.centre) @ self.axes.T
        return local[:, 0], local[:, 1]

    def plane(self, u: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, "n 2"]:
        """Points of the curve."""
        along = np.stack([u, self.across(u)], axis=1)
        return np.asarray(self.centre + along @ self.axes)


_Found = tuple[_Curve, Int64[np.ndarray, " k"]]


def _curves_of(
    points: Float64[np.ndarray, "n 3"],
    rows: Int64[np.ndarray, " k"],
    settings: CurbFitting,
    depth: int,
) -> Iterator[_Found]:
    """The curves of one cluster, each with the rows that it keeps."""
    if len(rows) < settings.min_points:
        return
    xy = points[rows, :2]
    cluster = _Cluster.of(xy, settings.degree)
    curve = _robust_curve(cluster)
    offsets = np.abs(curve.offsets(xy))
    if depth > 0 and _misfit(curve, xy, offsets, settings):
        dominant = _dominant_curve(cluster, settings)
        near = np.abs(dominant.offsets(xy))
        if _coverage(dominant, xy, near <= settings.max_offset_m) >= _COVERAGE:
            yield from _keep(dominant, points, rows[near <= settings.max_offset_m], settings)
            rest = rows[near > 2 * settings.max_offset_m]
            for part in _parts(points, rest, settings):
                yield from _curves_of(points, part, settings, depth - 1)
            return
        if _extent(curve.coordinates(xy)[0]) > settings.corner_length_m:
            first = _before_corner(curve, xy)
            for part in (rows[first], rows[~first]):
                yield from _curves_of(points, part, settings, depth - 1)
            return
        if (near <= settings.max_offset_m).sum() > (offsets <= settings.max_offset_m).sum():
            curve, offsets = dominant, near
    yield from _keep(curve, points, rows[offsets <= settings.max_offset_m], settings)


def _misfit(
    curve: _Curve,
    xy: Float64[np.ndarray, "n 2"],
    offsets: Float64[np.ndarray, " n"],
    settings: CurbFitting,
) -> bool:
    """Whether the cluster is more than one curve: far from it, or not held along its length."""
    if np.sqrt(np.mean(offsets**2)) > settings.corner_rmse_m:
        return True
    return _coverage(curve, xy, offsets <= settings.max_offset_m) < _COVERAGE


def _keep(
    curve: _Curve,
    points: Float64[np.ndarray, "n 3"],
    kept: Int64[np.ndarray, " k"],
    settings: CurbFitting,
) -> Iterator[_Found]:
    """The curve over each stretch that its points hold: it is no line across a gap."""
    if len(kept) < 3 or 2 * curve.half <= 1e-3:
        return
    along = curve.coordinates(points[kept, :2])[0]
    order = np.argsort(along, kind="stable")
    feet = curve.plane(along[order])
    steps = np.linalg.norm(np.diff(feet, axis=0), axis=1)
    for run in np.split(order, np.flatnonzero(steps > 2 * settings.eps_m) + 1):
        enough = len(run) >= 8 or (len(run) >= 3 and _extent(along[run]) >= settings.min_length_m)
        if enough and _extent(along[run]) > 1e-3:
            yield curve, np.sort(kept[run])


def _parts(
    points: Float64[np.ndarray, "n 3"], rows: Int64[np.ndarray, " k"], settings: CurbFitting
) -> Iterator[Int64[np.ndarray, " j"]]:
    clusters = cluster_rows(points[rows, :2], eps_m=settings.eps_m, min_points=settings.min_points)
    for part in clusters:
        yield rows[part]


def _extent(values: Float64[np.ndarray, " n"]) -> float:
    return float(values.max() - values.min())


def _principal_axes(xy: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "2 2"]:
    """Rows: the unit vectors along and across; turning the points turns them alike."""
    centred = xy - xy.mean(axis=0)
    along = np.linalg.eigh(centred.T @ centred)[1][:, 1]
    if ((centred @ along) ** 3).sum() < 0:
        along = -along
    return np.array([along, [-along[1], along[0]]])


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """Points in the frame of their principal axis, ready for weighted fits."""

    centre: Float64[np.ndarray, "2"]
    axes: Float64[np.ndarray, "2 2"]
    middle: float
    half: float
    u: Float64[np.ndarray, " n"]
    v: Float64[np.ndarray, " n"]
    design: Float64[np.ndarray, "n k"]

    @classmethod
    def of(cls, xy: Float64[np.ndarray, "n 2"], degree: int) -> "_Cluster":
        """Points of the plane; short clusters get a lower degree."""
        axes, centre = _principal_axes(xy), xy.mean(axis=0)
        u, v = ((xy - centre) @ axes.T).T
        length = _extent(u)
        middle, half = float(u.max() + u.min()) / 2, max(length / 2, 1e-6)
        degree = min(degree, 1 if length < 3 else 2 if length < 8 else degree)
        design = legvander((u - middle) / half, degree)
        return cls(centre=centre, axes=axes, middle=middle, half=half, u=u, v=v, design=design)

    def fit(self, weight: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
        """Coefficients of the weighted ridge regression."""
        weighted = self.design * (weight / weight.sum())[:, None]
        normal = weighted.T @ self.design + _RIDGE * np.eye(self.design.shape[1])
        return np.asarray(np.linalg.solve(normal, weighted.T @ self.v))

    def offsets(self, coefficients: Float64[np.ndarray, " k"]) -> Float64[np.ndarray, " n"]:
        """Distances of the points from a curve, across the axis."""
        return np.asarray(np.abs(self.v - self.design @ coefficients))

    def curve(self, coefficients: Float64[np.ndarray, " k"]) -> _Curve:
        """The curve in the frame of the points."""
        return _Curve(
            centre=self.centre,
            axes=self.axes,
            middle=self.middle,
            half=self.half,
            coefficients=coefficients,
        )


def _robust_curve(cluster: _Cluster) -> _Curve:
    """Iteratively reweighted least squares with Tukey's weights."""
    coefficients = cluster.fit(np.ones(len(cluster.u)))
    for _ in range(_ROUNDS):
        offsets = cluster.offsets(coefficients)
        cut = _TUKEY * max(float(np.median(offsets)), _MAD_FLOOR_M)
        coefficients = cluster.fit(_tukey(offsets, cut))
    return cluster.curve(coefficients)


def _tukey(offsets: Float64[np.ndarray, " n"], cut: float) -> Float64[np.ndarray, " n"]:
    inside = np.clip(1 - (offsets / cut) ** 2, 0, None)
    return np.asarray(inside**2)


def _dominant_curve(cluster: _Cluster, settings: CurbFitting) -> _Curve:
    """The curve that most points agree on: parabolas through three points, then refinement.

    The trials are drawn from points in the order of the cluster's own axis, hence the same ones
    for the same cluster, wherever it lies.
    """
    t, v = (cluster.u - cluster.middle) / cluster.half, cluster.v
    order = np.lexsort((v, t))
    order = order[:: max(1, len(order) // 1000)]
    powers = np.stack([np.ones(len(order)), t[order], t[order] ** 2], axis=1)
    rng = np.random.default_rng(0)
    thirds = np.array_split(np.arange(len(order)), 3)
    picks = np.stack([rng.choice(third, _TRIALS) for third in thirds], axis=1)
    systems = powers[picks] + _RIDGE * np.eye(3)  # (trials, 3, 3)
    trials = np.linalg.solve(systems, v[order][picks][..., None])[..., 0]
    away = np.abs(v[order] - trials @ powers.T)
    best = trials[np.argmax((away <= settings.max_offset_m).sum(axis=1))]
    offsets = np.abs(v - (best[0] + best[1] * t + best[2] * t**2))
    for _ in range(_ROUNDS):
        coefficients = cluster.fit(_tukey(offsets, 2 * settings.max_offset_m) + 1e-12)
        offsets = cluster.offsets(coefficients)
    return cluster.curve(coefficients)


def _coverage(curve: _Curve, xy: Float64[np.ndarray, "n 2"], near: Bool[np.ndarray, " n"]) -> float:
    """Share of the cluster's metres along the axis that hold a point of the curve."""
    metre = np.floor(curve.coordinates(xy)[0]).astype(np.int64)
    return len(np.unique(metre[near])) / len(np.unique(metre))


def _before_corner(curve: _Curve, xy: Float64[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """The points before the place where the curve fits worst, which is not near an end."""
    u, v = curve.coordinates(xy)
    offsets = np.minimum(np.abs(v - curve.across(u)), 1.0)
    bins = max(5, round(2 * curve.half))
    place = (u - u.min()) / _extent(u)
    which = np.minimum((place * bins).astype(np.int64), bins - 1)
    mean = np.bincount(which, offsets, bins) / np.maximum(np.bincount(which, minlength=bins), 1)
    margin = max(1, bins // 5)
    worst = margin + int(np.argmax(mean[margin : bins - margin]))
    return np.asarray(place <= (worst + 0.5) / bins)


def _sample(
    curve: _Curve, points: Float64[np.ndarray, "n 3"], settings: CurbFitting
) -> Float64[np.ndarray, "m 3"]:
    """The curve along its points, in driving direction."""
    from scipy.spatial import KDTree  # type: ignore[import-untyped]

    along = curve.coordinates(points[:, :2])[0]
    low, high = np.quantile(along, (settings.trim, 1 - settings.trim))
    segments = max(1, round((high - low) / settings.spacing_m))
    xy = curve.plane(np.linspace(low, high, segments + 1))
    if tuple(xy[-1]) < tuple(xy[0]):
        xy = xy[::-1]
    nearest = KDTree(points[:, :2]).query(xy, k=min(10, len(points)))[1]
    z = np.median(points[nearest.reshape(len(xy), -1), 2], axis=1)
    return np.column_stack([xy, z])


def _describe(
    number: int,
    polyline: Float64[np.ndarray, "m 3"],
    curve: _Curve,
    points: Float64[np.ndarray, "n 3"],
    score: Float[np.ndarray, " n"],
) -> Curb:
    offsets = curve.offsets(points[:, :2])
    return Curb(
        number=number,
        polyline=polyline,
        side="left" if points[:, 1].mean() >= 0 else "right",
        length_m=length_of(polyline),
        rmse_m=float(np.sqrt(np.mean(offsets**2))),
        points=len(points),
        step_height_m=_step_height(curve, polyline, points, np.abs(offsets) <= 0.15),
        score=float(score.mean()),
    )


def _step_height(
    curve: _Curve,
    polyline: Float64[np.ndarray, "m 3"],
    points: Float64[np.ndarray, "n 3"],
    strip: Bool[np.ndarray, " n"],
) -> float:
    """Spread of the heights near the curve, after the slope along it."""
    if not strip.any():
        return 0.0
    at = curve.coordinates(points[strip, :2])[0]
    along = curve.coordinates(polyline[:, :2])[0]
    slope = np.polynomial.Polynomial.fit(along, polyline[:, 2], min(2, len(along) - 1))
    low, high = np.quantile(points[strip, 2] - slope(at), (0.1, 0.9))
    return float(high - low)


def length_of(polyline: Float64[np.ndarray, "m d"]) -> float:
    """Sum of the lengths of the segments, in metres."""
    return float(np.linalg.norm(np.diff(polyline, axis=0), axis=1).sum())


def resample(polyline: Float64[np.ndarray, "m d"], spacing_m: float) -> Float64[np.ndarray, "k d"]:
    """Vertices at equal distances along a polyline, both ends included.

    Args:
        polyline: Vertices in metres.
        spacing_m: Largest distance of two neighbours along the line.
    """
    steps = np.linalg.norm(np.diff(polyline, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    at = np.linspace(0.0, along[-1], int(np.ceil(along[-1] / spacing_m)) + 1)
    columns = [np.interp(at, along, column) for column in polyline.T]
    return np.stack(columns, axis=1)


def simplify(
    polyline: Float64[np.ndarray, "m d"], tolerance_m: float = 0.05
) -> Float64[np.ndarray, "k d"]:
    """Leave out vertices that lie within a tolerance of the rest (Douglas and Peucker, 1973).

    Args:
        polyline: Vertices in metres, in any number of dimensions.
        tolerance_m: Largest distance of a vertex from the simplified line.

    Raises:
        ValueError: A negative tolerance.
    """
    if not tolerance_m >= 0:
        raise ValueError(f"tolerance_m must not be negative, got {tolerance_m}")
    keep = np.zeros(len(polyline), dtype=bool)
    keep[[0, -1]] = True
    pending = [(0, len(polyline) - 1)]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        inner = polyline[first + 1 : last]
        away = segment_distance(inner, polyline[first], polyline[last])
        worst = int(np.argmax(away))
        if away[worst] > tolerance_m:
            middle = first + 1 + worst
            keep[middle] = True
            pending += [(first, middle), (middle, last)]
    return polyline[keep]


def segment_distance(
    points: Float64[np.ndarray, "*#n d"],
    start: Float64[np.ndarray, "*#n d"],
    end: Float64[np.ndarray, "*#n d"],
) -> Float64[np.ndarray, "*#n"]:
    """Distance of points from the segment between `start` and `end`, which broadcast."""
    direction = end - start
    square = np.maximum((direction**2).sum(axis=-1), 1e-300)
    share = ((points - start) * direction).sum(axis=-1) / square
    foot = start + np.clip(share, 0, 1)[..., None] * direction
    return np.asarray(np.linalg.norm(points - foot, axis=-1))
