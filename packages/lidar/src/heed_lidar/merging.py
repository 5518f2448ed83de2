"""Curbs of many scans in one frame: move, merge, smooth over time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from heed_lidar.curves import Curb, CurbFitting, Side, fit_curbs, length_of, resample

_MAX_DEPTH = 12  # a street of a kilometre is split into pieces of 6 m at most
_REACH_M = 1.5
"""Along a merged line, over which its distance from the curves that it is made of is averaged."""


def transform_curbs(curbs: Sequence[Curb], pose: Float64[np.ndarray, "4 4"]) -> list[Curb]:
    """Move curbs into another frame; the vertices keep their order.

    Args:
        curbs: In the frame of a sensor.
        pose: Takes homogeneous points of that frame to the new one; a rigid motion.

    Raises:
        ValueError: The pose is no rigid motion.
    """
    turn, shift = pose[:3, :3], pose[:3, 3]
    if pose.shape != (4, 4) or not np.allclose(turn @ turn.T, np.eye(3), atol=1e-3):
        raise ValueError(f"pose must be a rigid motion of shape (4, 4), got {pose.tolist()}")
    return [replace(curb, polyline=curb.polyline @ turn.T + shift) for curb in curbs]


def merge_curbs(
    curbs: Sequence[Curb],
    *,
    scans: Sequence[int] | None = None,
    eps_m: float = 1.0,
    settings: CurbFitting | None = None,
) -> list[Curb]:
    """Join curbs of several scans that lie over each other.

    The curves are sampled evenly, clustered again and fitted again; as one polynomial does not
    follow a long bend, the line is then drawn to the mean of the curves around each vertex. A
    merged curb runs as most of those that it was made of, in driving direction, and sums up their
    points; step height and score are their means and the side is the one of most, weighted by
    length.

    Args:
        curbs: In one frame, see `transform_curbs`.
        scans: Number of the scan of each curb; None: each is of another scan.
        eps_m: Radius of the clustering.
        settings: Degree, offset and spacing of the fit; the rest of it is made for whole curves.

    Raises:
        ValueError: Not one scan per curb.
    """
    of_scan = np.arange(len(curbs)) if scans is None else np.asarray(scans)
    if len(of_scan) != len(curbs):
        raise ValueError(f"scans must name one per curb, got {len(of_scan)} for {len(curbs)}")
    if not curbs:
        return []
    settings = replace(
        settings or CurbFitting(),
        eps_m=eps_m,
        max_depth=_MAX_DEPTH,
        min_points=2,
        min_score=0.0,
        trim=0.0,
    )
    samples = [resample(curb.polyline, min(settings.spacing_m, eps_m / 2)) for curb in curbs]
    source = np.repeat(np.arange(len(curbs)), [len(sample) for sample in samples])
    score = np.array([curb.score for curb in curbs])[source]
    points = np.concatenate(samples)
    fit = fit_curbs(points, score, settings)
    merged: list[Curb] = []
    for curb in fit.curbs:
        own = fit.cluster == curb.number
        seen = len(np.unique(of_scan[source[own]]))
        drawn = _drawn_to(replace(curb, scans=seen), points[own, :2], source[own])
        merged.append(_sum_up(drawn, curbs, source[own]))
    return merged


def seen_often(curbs: Sequence[Curb], least: int) -> list[Curb]:
    """Merged curbs that were seen in so many scans at least, numbered anew."""
    often = [curb for curb in curbs if curb.scans >= least]
    return [replace(curb, number=number) for number, curb in enumerate(often)]


def _drawn_to(curb: Curb, xy: Float64[np.ndarray, "n 2"], source: Int64[np.ndarray, " n"]) -> Curb:
    """Move each vertex across the line by the mean offset of the samples around it.

    The line then runs as most of its samples, which follow each other within each source.
    """
    from scipy.spatial import KDTree  # type: ignore[import-untyped]

    line = curb.polyline
    along = np.gradient(line[:, :2], axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    nearest = KDTree(line[:, :2]).query(xy)[1]
    offsets = ((xy - line[nearest, :2]) * across[nearest]).sum(axis=1)
    around = KDTree(xy).query_ball_point(line[:, :2], _REACH_M)
    shifts = np.array([offsets[rows].mean() if rows else 0.0 for rows in around])
    moved = np.column_stack([line[:, :2] + shifts[:, None] * across, line[:, 2]])
    rest = offsets - shifts[nearest]
    ahead = np.diff(nearest)[np.diff(source) == 0].sum() >= 0
    line = moved if ahead else moved[::-1]
    return replace(curb, polyline=line, rmse_m=float(np.sqrt(np.mean(rest**2))))


def _sum_up(merged: Curb, curbs: Sequence[Curb], parts: Int64[np.ndarray, " n"]) -> Curb:
    """Fill in what the curbs knew of their points; `parts` names the curb of each sample."""
    numbers, counts = np.unique(parts, return_counts=True)
    share = counts / counts.sum()
    made_of = [curbs[number] for number in numbers]
    left = sum(s for s, curb in zip(share, made_of, strict=True) if curb.side == "left")
    side: Side = "left" if left >= 0.5 else "right"
    return replace(
        merged,
        side=side,
        points=sum(curb.points for curb in made_of),
        step_height_m=float(share @ np.array([curb.step_height_m for curb in made_of])),
        score=float(share @ np.array([curb.score for curb in made_of])),
        length_m=length_of(merged.polyline),
    )


def smooth_curbs(
    frames: Sequence[Sequence[Curb]],
    poses: Sequence[Float64[np.ndarray, "4 4"]],
    *,
    eps_m: float = 1.0,
    min_frames: int = 2,
) -> list[Curb]:
    """The curbs of the last frame, averaged with those of the frames before it.

    Args:
        frames: Curbs of each frame in its sensor's frame, the newest last.
        poses: Take homogeneous sensor points to the map, one per frame.
        eps_m: Radius of the clustering.
        min_frames: Curbs that were seen in fewer frames are dropped.

    Raises:
        ValueError: Not one pose per frame.
    """
    if len(frames) != len(poses):
        raise ValueError(f"{len(frames)} frames need as many poses, got {len(poses)}")
    if not frames:
        return []
    home = np.linalg.inv(poses[-1])
    moved = [
        curb
        for curbs, pose in zip(frames, poses, strict=True)
        for curb in transform_curbs(curbs, home @ pose)
    ]
    scans = [number for number, curbs in enumerate(frames) for _ in curbs]
    return seen_often(merge_curbs(moved, scans=scans, eps_m=eps_m), min_frames)
