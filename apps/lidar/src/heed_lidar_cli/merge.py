"""Join the curbs of a drive into one map: predictions of many scans and the poses of the sensor.

PREDICTIONS is what `predict` wrote of one sequence (without --data.map-origin: curbs in metres).
The scan 000123 has row 123 of the poses (from 0), as in KITTI's odometry layout. With a calibration
(calib.txt beside the poses, or in sequences/SS where they are poses/SS.txt) the poses are those of
the camera and are turned into the sensor's frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_lidar.curves import Curb
from heed_lidar.geodesy import Origin
from heed_lidar.map_files import read_geojson, write_csv, write_dxf, write_geojson, write_osm
from heed_lidar.merging import merge_curbs, seen_often, smooth_curbs, transform_curbs
from heed_lidar.poses import find_poses, moves_along_z, read_calib, read_poses
from heed_runtime.files import atomic_folder, refuse_existing
from heed_runtime.options import CommonOptions, Flag, OptionalPath, OptionalText, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.report import COLOURS, new_figure, save_figure, style
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from heed_runtime.app import App

ENDING = "_curbs.local.geojson"
Kind = Literal["geojson", "csv", "osm", "dxf"]
Poses = Float64[np.ndarray, "frames 4 4"]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The predictions, the poses, and what is written."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """A folder with the *_curbs.local.geojson of one sequence."""
    poses: Path
    """poses.txt: 12 numbers a row, the pose of a scan in the frame of the first. Or the folder of
    the sequence, for its poses.txt or KITTI's ../../poses/SS.txt."""
    calib: OptionalPath = None
    """calib.txt with the matrix Tr from the LiDAR to the camera. None: the one in KITTI's place;
    where there is none, the poses are those of the LiDAR."""
    out: OutPath
    """The folder for the map."""
    map_origin: OptionalText = None
    """Where the first scan stood: LATITUDE,LONGITUDE (degrees), then optionally ,HEIGHT (metres)
    and ,YAW (degrees from east to x, anticlockwise). None: the map is in metres."""
    write: tuple[Kind, ...] = ("geojson", "csv")
    """The kinds of files; osm needs map_origin."""
    eps_m: float = 1.0
    """Curbs of two scans that lie closer are one."""
    min_scans: int = 2
    """Curbs that were seen in fewer scans are left out."""
    smooth: int = 0
    """Also write the curbs of every scan, averaged with those of the smooth - 1 scans before it."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        if not self.eps_m > 0 or self.min_scans < 1:
            raise ValueError("eps_m must be above 0 and min_scans at least 1")
        if self.smooth < 0 or self.smooth == 1:
            raise ValueError(f"smooth must be 0 or at least 2 scans, got {self.smooth}")
        if not self.write or ("osm" in self.write and self.map_origin is None):
            raise ValueError("write must name a kind of file, and osm needs map_origin")
        if self.map_origin is not None:
            Origin.parse(self.map_origin)


def run(app: App, options: Options) -> Result:
    """Read, move into the frame of the first scan, join, write."""
    frames, poses = _read(options)
    with options.terminal.progress("merge", len(frames)) as progress:
        moved: list[Curb] = []
        scans: list[int] = []
        for number, ((_, curbs), pose) in enumerate(zip(frames, poses, strict=True)):
            moved += transform_curbs(curbs, pose)
            scans += [number] * len(curbs)
            progress.advance()
    every = merge_curbs(moved, scans=scans, eps_m=options.eps_m)
    joined = seen_often(every, options.min_scans)
    origin = None if options.map_origin is None else Origin.parse(options.map_origin)
    with atomic_folder(options.out, overwrite=options.overwrite) as folder:
        _write(folder, joined, options.write, origin)
        save_figure(draw(joined, poses), folder / "map.png")
        if options.smooth:
            _write_smoothed(folder, frames, poses, options)
    rows: list[Row] = [
        {
            "curb": curb.number,
            "side": curb.side,
            "scans": curb.scans,
            "length_m": round(curb.length_m, 1),
            "step_m": round(curb.step_height_m, 2),
            "score": round(curb.score, 2),
        }
        for curb in joined
    ]
    total = round(sum(curb.length_m for curb in joined), 1)
    title = f"{len(joined)} curbs, {total} m, out of {len(moved)} in {len(frames)} scans"
    lost = len(every) - len(joined)
    if lost:
        title += f"; {lost} seen in fewer than {options.min_scans} scans are left out (--min-scans)"
    return Result(
        title=title,
        tables=[Table(title="", rows=rows)],
        data={"n": len(frames), "curbs": rows, "length_m": total, "left_out": lost},
        files=sorted(path for path in options.out.iterdir() if path.is_file()),
    )


def draw(curbs: Sequence[Curb], poses: Poses) -> Figure:
    """The map from above: left and right curbs, and the way of the sensor."""
    with style():
        figure = new_figure(width_in=8.0, height_in=6.0)
        axes = figure.add_subplot()
        axes.plot(poses[:, 0, 3], poses[:, 1, 3], color="0.6", marker=".", label="sensor")
        named = set()
        for curb in curbs:
            label = None if curb.side in named else f"{curb.side} curb"
            named.add(curb.side)
            colour = COLOURS[0] if curb.side == "left" else COLOURS[1]
            axes.plot(curb.polyline[:, 0], curb.polyline[:, 1], color=colour, label=label)
        axes.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")
        axes.set_adjustable("datalim")  # a long straight drive would leave a strip as its picture
        axes.legend()
    return figure


def _read(options: Options) -> tuple[list[tuple[str, list[Curb]]], Poses]:
    """The curbs of every scan by name in the order of the poses, and its pose."""
    if not options.predictions.is_dir():
        raise InputError("no such folder", path=options.predictions, remedy="check the path")
    paths: dict[int, Path] = {}
    for path in files_under(options.predictions):
        if not path.name.endswith(ENDING):
            continue
        name = path.name.removesuffix(ENDING)
        number = re.search(r"(\d+)$", name)
        if number is None:
            raise InputError(
                "its name does not end with the number of a scan, which says the row of the poses",
                path=path,
            )
        if int(number[1]) in paths:
            raise InputError(
                f"is scan {number[1]} as {paths[int(number[1])]} is",
                path=path,
                remedy="give the predictions of one sequence",
            )
        paths[int(number[1])] = path
    if not paths:
        raise InputError(
            f"holds no *{ENDING}", path=options.predictions, remedy="predict with --data.write"
        )
    poses = _read_poses(options, paths)
    order = sorted(paths)
    frames = [(paths[n].name.removesuffix(ENDING), _curbs_at(paths[n], poses[n])) for n in order]
    return frames, poses[order]


def _curbs_at(path: Path, pose: Float64[np.ndarray, "4 4"]) -> list[Curb]:
    """The curbs of a scan; those in a map's coordinates are not to be moved again."""
    if np.array_equal(pose, np.eye(4)):
        return read_geojson(path)
    try:
        return read_geojson(path, crs="sensor")
    except InputError as error:
        remedy = error.remedy or (
            "a pose must not move them again: give poses with the row 1 0 0 0 0 1 0 0 0 0 1 0 for "
            "each scan"
        )
        raise InputError(error.problem, path=error.path, remedy=remedy) from error


def _read_poses(options: Options, predictions: Mapping[int, Path]) -> Poses:
    """The poses of the LiDAR, at least as many as the scans need."""
    path, beside = find_poses(options.poses)
    calib = options.calib or beside
    used = [*predictions.values(), path, *([calib] if calib else [])]
    refuse_existing(options.out, overwrite=options.overwrite, used=used)
    poses = read_poses(path, None if calib is None else read_calib(calib))
    last = max(predictions)
    if last >= len(poses):
        raise InputError(
            f"has {len(poses)} rows, but there is a prediction of scan {last}",
            path=path,
            remedy="give the poses of the sequence that was predicted",
        )
    if calib is None and moves_along_z(poses):
        raise InputError(
            "moves along z, as a camera does, and there is no calibration",
            path=path,
            remedy="give the sequence's calib.txt with --calib",
        )
    return poses


def _write(
    folder: Path, curbs: Sequence[Curb], kinds: Sequence[Kind], origin: Origin | None
) -> None:
    def osm() -> None:
        assert origin is not None
        write_osm(curbs, folder / "map.osm", origin=origin)

    writers: dict[Kind, Callable[[], object]] = {
        "geojson": lambda: write_geojson(curbs, folder / "map.geojson", origin=origin, crs="map"),
        "csv": lambda: write_csv(curbs, folder / "map.csv"),
        "osm": osm,
        "dxf": lambda: write_dxf(curbs, folder / "map.dxf"),
    }
    for kind in kinds:
        writers[kind]()


def _write_smoothed(
    folder: Path, frames: Sequence[tuple[str, list[Curb]]], poses: Poses, options: Options
) -> None:
    (folder / "smoothed").mkdir()
    for last, (name, _) in enumerate(frames):
        first = max(0, last + 1 - options.smooth)
        seen = [curbs for _, curbs in frames[first : last + 1]]
        needed = min(options.min_scans, len(seen))
        curbs = smooth_curbs(
            seen, list(poses[first : last + 1]), eps_m=options.eps_m, min_frames=needed
        )
        write_geojson(curbs, folder / "smoothed" / f"{name}_curbs.geojson", frame=name)
        write_csv(curbs, folder / "smoothed" / f"{name}_curbs.csv", frame=name)
