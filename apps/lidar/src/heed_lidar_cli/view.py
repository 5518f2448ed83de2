"""Draw scans from above and in perspective, with their labels where there are some; no display."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import cloud_stem
from heed_lidar.drawing import write_png
from heed_lidar.drawing3d import show, why_not_open3d
from heed_lidar.layouts import ScanFile, find_inputs
from heed_lidar.pictures import (
    Renderer,
    class_colours,
    draw_scan,
    draw_values,
    heat_colours,
    value_limits,
)
from heed_lidar.scans import Scan, ScanData
from heed_lidar.settings import LidarData, ReadingOptions
from heed_lidar_cli.settings import own_flags
from heed_runtime.options import CommonOptions, Flag, InputPaths, OptionalPath
from heed_runtime.outputs import Outputs, expand
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App

TALL_M = 3.0
"""Heights above the road are told apart up to this one."""


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What to draw."""

    inputs: InputPaths
    """Scans, folders, recordings or quoted patterns."""
    out: OptionalPath = None
    """The folder for the pictures."""
    labels: str = "curb"
    """The classes of `.label` files beside the scans: curb, curb-only, nrs, semantic-kitti, or a
    file like semantic-kitti.yaml."""
    data: ReadingOptions = field(default_factory=ReadingOptions)
    """How the points are read."""
    renderer: Renderer = "own"
    """What draws the view in perspective. own needs neither a display nor OpenGL; open3d has the
    colours without haze, where the library can draw (doctor says whether)."""
    overwrite: Flag = False
    """Replace pictures that are there."""
    window: Flag = False
    """Open a window to turn the first scan in, instead of writing pictures; needs open3d."""

    def __post_init__(self) -> None:
        if (self.out is None) == (not self.window):
            raise ValueError("give either --out DIR or --window")
        if self.window and self.renderer != "own":
            raise ValueError("renderer has no effect with window")


@own_flags({"--data.labels": "--labels"})
def run(app: App, options: Options) -> Result:
    """Draw scan by scan."""
    data = LidarData(labels=options.labels, **vars(options.data))
    files = [with_labels(file) for file in find_inputs(expand(options.inputs), data)]
    scans = ScanData(files, data)
    if options.window:
        return _window(scans[0], data)
    assert options.out is not None
    if options.renderer == "open3d" and (why := why_not_open3d()) is not None:
        raise InputError(f"open3d cannot draw here: {why}", remedy="use --renderer own")
    rows: list[Row] = []
    written: list[Path] = []
    with (
        Outputs(options.out, overwrite=options.overwrite) as outputs,
        options.terminal.progress("view", len(scans)) as progress,
    ):
        for index in range(len(scans)):
            scan = scans[index]
            written += outputs.put(
                scan.name, functools.partial(_write, scan, data, options.renderer)
            )
            rows.append({"scan": scan.name, "points": len(scan), "colours": _meaning(scan)})
            progress.advance()
    return Result(
        title=f"{len(rows)} scans",
        tables=[Table(title="", rows=rows)],
        data={"n": len(rows), "scans": rows},
        files=written,
    )


def with_labels(file: ScanFile) -> ScanFile:
    """The same scan with the `.label` file beside it, or in SemanticKITTI's place."""
    name = f"{cloud_stem(file.cloud)}.label"
    places = (file.cloud.with_name(name), file.cloud.parent.parent / "labels" / name)
    found = next((place for place in places if place.is_file()), None)
    return replace(file, labels=found)


def _meaning(scan: Scan) -> str:
    if scan.classes is not None:
        return "classes"
    return "height" if scan.cloud.intensity is None else "intensity"


def _values(scan: Scan) -> Float64[np.ndarray, " n"]:
    """Intensity; without it, height above the lowest points."""
    if scan.cloud.intensity is not None:
        return scan.cloud.intensity.astype(np.float64)
    height = scan.cloud.xyz[:, 2]
    ground = float(np.quantile(height, 0.02)) if len(height) else 0.0
    return np.asarray(np.clip(height - ground, 0.0, TALL_M))


def _write(scan: Scan, data: LidarData, renderer: Renderer, out: Path) -> list[Path]:
    xyz, label_map = scan.cloud.xyz, data.label_map
    if scan.classes is not None:
        pictures = draw_scan(
            xyz,
            scan.classes,
            names=label_map.names,
            colours=label_map.colours,
            title=scan.name,
            renderer=renderer,
        )
    else:
        pictures = draw_values(
            xyz, _values(scan), name=_meaning(scan), title=scan.name, renderer=renderer
        )
    files = []
    for kind, picture in pictures.items():
        path = out / f"{scan.name}_{'view' if kind == 'perspective' else kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture)
        files.append(path)
    return files


def _window(scan: Scan, data: LidarData) -> Result:
    if scan.classes is not None:
        names, table = data.label_map.names, data.label_map.colours
        colours = class_colours(names, table)[scan.classes]
    else:
        values = _values(scan)
        colours = heat_colours(values, limits=value_limits(values))
    show(scan.cloud.xyz, colours, title=scan.name)
    return Result(title=scan.name, data={"scan": scan.name, "points": len(scan)})
