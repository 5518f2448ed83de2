"""Curbs of many scans in one frame: move, merge, smooth over time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from heed_lidar.curves import Curb, CurbFitting, Side, fit_curbs, length_of, resample

_MAX_DEPTH = 12  # a street of a kilometre is split into pieces of 6 m at most


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
    eps_m: float = 1.0,
    min_curbs: int = 1,
    settings: CurbFitting | None = None,
) -> list[Curb]:
    """Join curbs of several scans that lie over each other.

    The curves are sampled evenly, clustered again and fitted again. A merged curb sums up the
    points of those that it was made of; step height and score are their means and the side is the
    one of most, weighted by length.

    Args:
        curbs: In one frame, see `transform_curbs`.
        eps_m: Radius of the clustering.
        min_curbs: Merged curbs made of fewer are dropped.
        settings: Degree, offset and spacing of the fit; the rest of it is made for whole curves.
    """
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
    fit = fit_curbs(np.concatenate(samples), score, settings)
    merged: list[Curb] = []
    for curb in fit.curbs:
        parts = source[fit.cluster == curb.number]
        if len(np.unique(parts)) >= min_curbs:
            merged.append(_sum_up(replace(curb, number=len(merged)), curbs, parts))
    return merged


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
        min_frames: Curbs that are made of fewer curves are dropped.

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
    return merge_curbs(moved, eps_m=eps_m, min_curbs=min_frames)
