"""Write made scans as a data set: SemanticKITTI's layout with the class ids of 3D-Curb.

A sequence is a folder `sequences/00` with `velodyne/000000.bin` (x, y, z, remission as float32),
`labels/000000.label` (raw ids as uint32: 3 curb, 40 road, 48 sidewalk, ...), `curbs/000000.json`
(the true curbs as polylines in the sensor frame), `poses.txt`, `calib.txt` and `times.txt`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_lidar.scenes.curb_lines import TrueCurb, true_curbs
from heed_lidar.scenes.plans import KINDS, draw_scene
from heed_lidar.scenes.sensor import Scene, Sensor, sweep

CURB_REACH_M = 50.0
"""True curbs are listed as far as this from the sensor."""
STREET_GAP_M = 1000.0
"""The streets of a sequence lie this far apart in its poses."""

MOST_SCANS = 1_000_000
"""Of a sequence: names have six digits."""

LIDAR_TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
"""Axes of KITTI's camera: x right, y down, z forward."""


@dataclass(frozen=True, kw_only=True)
class SceneSet:
    """A data set of made scans."""

    sequences: Mapping[str, int] = field(default_factory=lambda: {"00": 8, "02": 4, "11": 4})
    """Scans per sequence; 3D-Curb trains on 00, validates on 02, and 11 is among the test ones."""
    frames_per_street: int = 1
    """Consecutive scans of one street."""
    frame_step_m: float = 2.0
    """Way between two of them."""
    sensor: Sensor = field(default_factory=Sensor)
    curb_height_m: float | None = None
    """Height of every curb face; None: 0.06 to 0.18 at random. 0 removes the step and nothing
    else: the same streets, labels and polylines."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = self.sequences.values()
        if not counts or min(counts) < 1 or max(counts) > MOST_SCANS:
            raise ValueError(
                f"sequences must have 1 to {MOST_SCANS} scans each, got {dict(self.sequences)}"
            )
        if self.frames_per_street < 1:
            raise ValueError(f"frames_per_street must be at least 1, got {self.frames_per_street}")
        if not 0 < self.frame_step_m < STREET_GAP_M:
            raise ValueError(
                f"frame_step_m must be above 0 and below {STREET_GAP_M}, got {self.frame_step_m}"
            )
        if self.curb_height_m is not None and not 0 <= self.curb_height_m <= 1:
            raise ValueError(f"curb_height_m must be in 0..1, got {self.curb_height_m}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def write_scenes(
    out: Path, scenes: SceneSet, *, on_scan: Callable[[Path], object] = lambda _: None
) -> list[Path]:
    """Write a data set; the paths of its scans come back.

    Every scan has a seed of its own, made of the set's seed, its sequence and its number: the same
    settings give the same bytes, and a longer set begins with the scans of a shorter one.

    Args:
        out: The root, made where it does not exist.
        scenes: What is written.
        on_scan: Told of each scan when it is written.

    Raises:
        InputError: A file cannot be written.
    """
    written = []
    for sequence, count in scenes.sequences.items():
        folder = out / "sequences" / sequence
        try:
            for name in ("velodyne", "labels", "curbs"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            poses = []
            for number in range(count):
                path, pose = _write_scan(folder, scenes, sequence, number)
                written.append(path)
                on_scan(path)
                poses.append(pose)
            _write_trajectory(folder, np.stack(poses))
        except OSError as error:
            raise InputError(
                f"cannot be written ({error.strerror or error})",
                path=folder,
                remedy="choose a folder that is writable and has space",
            ) from error
    return written


def scene_of(scenes: SceneSet, sequence: str, number: int) -> Scene:
    """The scene of one scan of a set."""
    street, frame = divmod(number, scenes.frames_per_street)
    rng = np.random.default_rng([scenes.seed, *sequence.encode(), street])
    kind = KINDS[street % len(KINDS)]
    return draw_scene(
        rng,
        kind=kind,
        curb_height_m=scenes.curb_height_m,
        driven_m=frame * scenes.frame_step_m,
    )


def _write_scan(
    folder: Path, scenes: SceneSet, sequence: str, number: int
) -> tuple[Path, Float64[np.ndarray, "4 4"]]:
    scene = scene_of(scenes, sequence, number)
    noise = np.random.default_rng([scenes.seed, *sequence.encode(), number, 1])
    scan = sweep(scene, scenes.sensor, noise)
    pose = scene.pose(scenes.sensor.height_m)
    stem = f"{number:06d}"
    path = folder / "velodyne" / f"{stem}.bin"
    points = np.concatenate([scan.xyz.astype("<f4"), scan.remission[:, None]], axis=1)
    path.write_bytes(points.astype("<f4").tobytes())
    (folder / "labels" / f"{stem}.label").write_bytes(scan.raw.astype("<u4").tobytes())
    curbs = true_curbs(scene.street, around=scene.sensor_xy, reach_m=CURB_REACH_M)
    record = {
        "frame": "sensor",
        "street": scene.name,
        "curb_height_m": round(scene.street.curb_height_m, 4),
        "curbs": [_curb_record(curb, pose) for curb in curbs],
    }
    (folder / "curbs" / f"{stem}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    pose[0, 3] += STREET_GAP_M * (number // scenes.frames_per_street)
    return path, pose


def _curb_record(curb: TrueCurb, pose: Float64[np.ndarray, "4 4"]) -> dict[str, object]:
    local = (curb.polyline - pose[:3, 3]) @ pose[:3, :3]
    return {"side": curb.side, "polyline": local.round(4).tolist()}


def _write_trajectory(folder: Path, poses: Float64[np.ndarray, "n 4 4"]) -> None:
    """Poses of the camera against its first one, as KITTI gives them, and what they need."""
    back = np.linalg.inv(LIDAR_TO_CAMERA)
    relative = LIDAR_TO_CAMERA @ np.linalg.inv(poses[0]) @ poses @ back
    (folder / "poses.txt").write_text(
        "".join(_numbers(pose) + "\n" for pose in relative), encoding="utf-8"
    )
    camera = np.array([[718.856, 0, 607.1928, 0], [0, 718.856, 185.2157, 0], [0, 0, 1, 0]])
    lines = [f"P{k}: {_numbers(camera)}" for k in range(4)]
    lines.append(f"Tr: {_numbers(LIDAR_TO_CAMERA)}")
    (folder / "calib.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    times = "".join(f"{0.1 * k:.6e}\n" for k in range(len(poses)))
    (folder / "times.txt").write_text(times, encoding="utf-8")


def _numbers(matrix: Float64[np.ndarray, "r 4"]) -> str:
    return " ".join(f"{value + 0.0:.12e}" for value in matrix[:3].ravel())
