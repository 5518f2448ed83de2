"""Curb labels for data that have none: derived from the border of the road, or from 2-D lists.

Derived labels follow the automatic stage of 3D-Curb (Zhao et al., "CurbNet", arXiv 2403.16794): the
border of the road label, where the ground makes a step. Nobody corrected them: scores on them
cannot be compared with those of hand-made labels.

The lists are those of Bai et al., "Build a curb dataset with LiDAR data", arXiv 2110.03968.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer, UInt32
from scipy.spatial import cKDTree  # type: ignore[import-untyped]

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import cloud_stem
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.clouds.text import parse_rows
from heed_lidar.labels import (
    CURB_RAW,
    ID_MASK,
    OTHERS_RAW,
    read_labels,
    with_instances,
    write_labels,
)
from heed_lidar.layouts import CLOUDS, DERIVED, SEQUENCES, ScanFile, list_scans, sequence_folder
from heed_lidar.settings import LidarData, to_sensor_frame

MARK = """\
These curb labels are derived from labels of road and sidewalk by `make-curb-labels`; nobody
corrected them. Scores on them are marked as derived while this file is here.
"""
_CELL_M = 0.5
_CHUNK = 4096
ROWS_REACH_M = 0.10
ROWS_HEIGHT_M = 0.3


@dataclass(frozen=True, kw_only=True)
class CurbLabelling:
    """How curb labels are derived from labels of the road and of what lies beside it."""

    road: tuple[int, ...] = (40, 44, 60)
    """Raw ids of the carriageway: road, parking, lane marking."""
    beside: tuple[int, ...] = (48, 49, 72)
    """Raw ids of the ground beside it: sidewalk, other ground, terrain."""
    range_m: float = 40.0
    """Largest horizontal distance to the sensor."""
    ahead: bool = True
    """Only points with x > 0, as in 3D-Curb."""
    border_m: float = 0.30
    """Points of one side this near to the other side, in the plane, are candidates."""
    step_reach_m: float = 0.40
    """The height of each side is the median of its points within this distance."""
    step_m: tuple[float, float] = (0.03, 0.30)
    """Lowest and highest step from the road up to the other side."""
    cluster_m: float = 1.0
    """Candidates this near to each other belong together."""
    cluster_points: int = 5
    """A candidate with fewer neighbours, itself included, founds no group."""
    length_m: float = 2.0
    """Shorter groups are dropped."""

    def __post_init__(self) -> None:
        if set(self.road) & set(self.beside) or not self.road or not self.beside:
            raise ValueError(f"road and beside must be different ids: {self.road}, {self.beside}")
        for name in ("range_m", "border_m", "step_reach_m", "cluster_m"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.step_m[0] < self.step_m[1]:
            raise ValueError(f"step_m must be (low, high) with low < high, got {self.step_m}")
        if self.cluster_points < 1:
            raise ValueError(f"cluster_points must be at least 1, got {self.cluster_points}")
        if self.length_m < 0:
            raise ValueError(f"length_m must not be negative, got {self.length_m}")


def make_curb_labels(
    xyz: Float64[np.ndarray, "n 3"],
    raw: Integer[np.ndarray, " n"],
    options: CurbLabelling | None = None,
) -> UInt32[np.ndarray, " n"]:
    """Give points at the stepped border of the road the curb's id; instance bits stay.

    Args:
        xyz: The points, metres, sensor frame.
        raw: Their labels with road and sidewalk.
        options: What counts as a border.
    """
    options = options or CurbLabelling()
    ids = np.asarray(raw).astype(np.int64) & ID_MASK
    near = np.hypot(xyz[:, 0], xyz[:, 1]) <= options.range_m
    if options.ahead:
        near &= xyz[:, 0] > 0
    road = np.flatnonzero(near & np.isin(ids, options.road))
    beside = np.flatnonzero(near & np.isin(ids, options.beside))
    new = ids.copy()
    if len(road) and len(beside):
        new[_border_points(xyz, road, beside, options)] = CURB_RAW
    return with_instances(new, np.asarray(raw))


def _border_points(
    xyz: Float64[np.ndarray, "n 3"],
    road: Int64[np.ndarray, " r"],
    beside: Int64[np.ndarray, " b"],
    options: CurbLabelling,
) -> Int64[np.ndarray, " c"]:
    """Indices of the points of both sides that lie at a step between them, in long groups."""
    trees = [cKDTree(xyz[side, :2]) for side in (road, beside)]
    candidates = np.concatenate(
        [
            side[trees[1 - k].query(xyz[side, :2], distance_upper_bound=options.border_m)[1]
                 < trees[1 - k].n]
            for k, side in enumerate((road, beside))
        ]
    )  # fmt: skip
    if not len(candidates):
        return candidates
    low, high = (
        _local_medians(tree, xyz[side, 2], xyz[candidates, :2], options.step_reach_m)
        for tree, side in zip(trees, (road, beside), strict=True)
    )
    step = high - low
    candidates = candidates[(step >= options.step_m[0]) & (step <= options.step_m[1])]
    kept: Int64[np.ndarray, " c"] = candidates[long_groups(xyz[candidates, :2], options)]
    return kept


def _local_medians(
    tree: cKDTree,
    values: Float64[np.ndarray, " m"],
    centres: Float64[np.ndarray, "c 2"],
    reach_m: float,
) -> Float64[np.ndarray, " c"]:
    """The median value of the points within reach of each centre; NaN where there is none."""
    medians = np.full(len(centres), np.nan)
    for start in range(0, len(centres), _CHUNK):
        found = tree.query_ball_point(centres[start : start + _CHUNK], reach_m)
        counts = np.array([len(f) for f in found])
        flat = values[np.fromiter(itertools.chain.from_iterable(found), np.int64, counts.sum())]
        owner = np.repeat(np.arange(len(found)), counts)
        ordered = flat[np.lexsort((flat, owner))]
        ends = np.cumsum(counts)
        first, some = ends - counts, counts > 0
        middle = ordered[(first + (counts - 1) // 2)[some]] + ordered[(first + counts // 2)[some]]
        medians[start : start + len(found)][some] = middle / 2
    return medians


def long_groups(xy: Float64[np.ndarray, "c 2"], options: CurbLabelling) -> Bool[np.ndarray, " c"]:
    """Which points belong to a group of at least `options.length_m`, end to end.

    Groups are those of DBSCAN (Ester et al., KDD 1996); a group's length is its extent along its
    first principal axis.
    """
    from sklearn.cluster import DBSCAN  # type: ignore[import-untyped]

    keep = np.zeros(len(xy), dtype=bool)
    if not len(xy):
        return keep
    # A border point between two groups goes to the first: the order of points must not matter.
    order = np.lexsort((xy[:, 1], xy[:, 0]))
    clusters = DBSCAN(eps=options.cluster_m, min_samples=options.cluster_points)
    group = np.empty(len(xy), dtype=np.int64)
    group[order] = clusters.fit_predict(xy[order])
    for number in range(group.max() + 1):
        members = group == number
        centred = xy[members] - xy[members].mean(axis=0)
        along = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
        keep[members] = np.ptp(along) >= options.length_m
    return keep


def read_curb_rows(path: Path) -> Float64[np.ndarray, "m 3"]:
    """Read a list of curb points in the plane: rows `x y curb_id`.

    Raises:
        InputError: The file does not exist or a row is something else.
    """
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give the curb points of this scan")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError("is not a text file", path=path) from None
    rows = [line for line in lines if line.strip()]
    if not rows:
        return np.empty((0, 3))
    table = parse_rows(rows, 3, None)
    if table is None or not np.isfinite(table).all():
        number = next(
            n
            for n, line in enumerate(lines, start=1)
            if line.strip()
            and ((row := parse_rows([line], 3, None)) is None or not np.isfinite(row).all())
        )
        raise InputError(
            f"is not three numbers x y curb_id: {lines[number - 1][:40]!r}",
            path=path,
            place=f"row {number}",
        )
    return table


def curb_labels_2d(
    xyz: Float64[np.ndarray, "n 3"],
    rows: Float64[np.ndarray, "m 3"],
    *,
    raw: Integer[np.ndarray, " n"] | None = None,
) -> UInt32[np.ndarray, " n"]:
    """Raw labels from a list of curb points in the plane.

    A point is curb if it lies within 0.10 m of a listed point and its height differs by less than
    0.3 m from that of the ground around it.

    Args:
        xyz: The points, metres, sensor frame.
        rows: `x y curb_id`.
        raw: Labels of the other points with instance bits. None: they are others, and the curb's
            instance is its `curb_id`.
    """
    others = np.full(len(xyz), OTHERS_RAW, dtype=np.uint32)
    base = others if raw is None else np.asarray(raw, dtype=np.uint32)
    if not len(rows) or not len(xyz):
        return base.copy()
    nearest = cKDTree(rows[:, :2]).query(xyz[:, :2], distance_upper_bound=ROWS_REACH_M)[1]
    curb = nearest < len(rows)
    curb[curb] = np.abs(xyz[curb, 2] - ground_heights(xyz, xyz[curb])) < ROWS_HEIGHT_M
    ids = base & np.uint32(ID_MASK)
    ids[curb] = CURB_RAW
    instances = base.copy()
    if raw is None:
        numbers = rows[nearest[curb], 2].astype(np.int64) & ID_MASK
        instances[curb] = numbers.astype(np.uint32) << np.uint32(16)
    return with_instances(ids, instances)


def ground_heights(
    xyz: Float64[np.ndarray, "n 3"], at: Float64[np.ndarray, "m 3"]
) -> Float64[np.ndarray, " m"]:
    """The height of the ground around places: the lowest point of their 1.5 m x 1.5 m.

    The lowest is taken over 3 x 3 cells of 0.5 m, whose own value is their 5 % quantile, so that a
    stray point far below the ground does not count where others are there.
    """
    shift = np.floor(xyz[:, :2].min(axis=0) / _CELL_M).astype(np.int64) - 1
    cells = np.floor(xyz[:, :2] / _CELL_M).astype(np.int64) - shift
    width = int(cells[:, 1].max()) + 2
    key = cells[:, 0] * width + cells[:, 1]
    order = np.lexsort((xyz[:, 2], key))
    keys, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    lows = xyz[order, 2][first + (counts * 0.05).astype(np.int64)]
    places = np.floor(at[:, :2] / _CELL_M).astype(np.int64) - shift
    ground = np.full(len(at), np.inf)
    for dx, dy in itertools.product((-1, 0, 1), repeat=2):
        wanted = (places[:, 0] + dx) * width + places[:, 1] + dy
        found = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        ground = np.where(keys[found] == wanted, np.minimum(ground, lows[found]), ground)
    return ground


@dataclass(frozen=True, kw_only=True)
class CurbLabelCount:
    """What was derived for one scan."""

    name: str
    path: Path | None
    """The new labels; None: the scan could not be read."""
    points: int = 0
    curb: int = 0
    problem: str = ""


def write_curb_labels(
    root: Path,
    out: Path,
    data: LidarData,
    options: CurbLabelling | None = None,
    *,
    folder: str = "labels",
) -> Iterator[CurbLabelCount]:
    """Write derived labels for every labelled scan of a data set, one scan per step.

    They go to `out/sequences/SS/<folder>/`. Where `out` is another folder than `root`, it becomes
    a data set of its own: its scans are links to those of `root`. The file DERIVED.md beside the
    labels marks them.

    Args:
        root: A data set in the SemanticKITTI layout.
        out: Where it is written; may be `root`.
        data: How `root` is read; a scan that cannot be read ends the pass or, with
            `on_error="skip"`, comes back with its problem.
        options: What counts as a border.
        folder: The name of the new folders of labels.

    Raises:
        InputError: `root` holds no labelled scans in sequences, there are labels at the new place
            already, or a scan cannot be read.
    """
    options = options or CurbLabelling()
    base = sequence_folder(root)
    scans = [s for s in list_scans(root, data).scans if s.labels is not None and s.sequence]
    if base is None or not scans:
        raise InputError("holds no sequences with labels", path=root)
    for sequence in dict.fromkeys(scan.sequence for scan in scans):
        target = out / SEQUENCES / sequence / folder
        if target.exists():
            raise InputError(
                "exists already", path=target, remedy="choose another folder for the new labels"
            )
    for scan in scans:
        place = out / SEQUENCES / scan.sequence
        target = place / folder / f"{cloud_stem(scan.cloud)}.label"
        try:
            yield _label_one(scan, target, data, options)
        except InputError as error:
            if data.on_error == "stop":
                raise
            yield CurbLabelCount(name=scan.name, path=None, problem=str(error))
            continue
        clouds = place / CLOUDS
        if not clouds.exists():
            clouds.symlink_to((base / scan.sequence / CLOUDS).resolve())


def _label_one(
    scan: ScanFile, target: Path, data: LidarData, options: CurbLabelling
) -> CurbLabelCount:
    assert scan.labels is not None
    cloud = read_cloud(scan.cloud, data.options, allow_empty=True)
    labels = read_labels(scan.labels, count=cloud.rows_in_file)
    xyz = to_sensor_frame(cloud.xyz, data)
    labels[cloud.rows] = make_curb_labels(xyz, labels[cloud.rows], options)
    target.parent.mkdir(parents=True, exist_ok=True)
    (target.parent / DERIVED).write_text(MARK, encoding="utf-8")
    part = target.with_suffix(".part")
    write_labels(part, labels)
    part.rename(target)
    curb = int(((labels & ID_MASK) == CURB_RAW).sum())
    return CurbLabelCount(name=scan.name, path=target, points=len(labels), curb=curb)
