"""Draw scanpaths and heat maps over the pictures they are of.

DATA as in `compare`. A PNG per picture: one numbered scanpath, those of all viewers, and where
they looked for how long.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from heed_core.errors import InputError
from heed_gaze.comparison.matching import Case, match
from heed_gaze.metrics.saliency import fixation_density, map_shape
from heed_gaze.plots import (
    draw_heat_map,
    draw_picture,
    draw_scanpath,
    draw_target,
    scanpath_colours,
)
from heed_gaze.readers.pictures import read_picture
from heed_gaze_cli.scanpath_options import DataOptions, DataPath
from heed_runtime.options import Flag, OutPath
from heed_runtime.outputs import Outputs
from heed_runtime.recipe import Row, Table
from heed_runtime.report import new_figure, save_figure, style
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from heed_gaze.scanpaths import Scanpath
    from heed_runtime.app import App

_DEGREES_WIDE = 32


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """What is drawn."""

    data: DataPath
    """Scanpaths."""
    out: OutPath
    """The folder for the pictures."""
    subject: str = ""
    """Whose scanpath is numbered; without it, the first viewer's."""
    only: tuple[str, ...] = ()
    """Only these pictures, by name."""
    overwrite: Flag = False
    """Replace pictures that are there."""


def run(app: App, options: Options) -> Result:
    """Draw picture by picture."""
    data = options.read(options.data)
    cases = _chosen(match(data, split=options.split), options)
    rows: list[Row] = []
    written: list[Path] = []
    with (
        Outputs(options.out, overwrite=options.overwrite) as outputs,
        options.terminal.progress("view", len(cases)) as progress,
    ):
        for case in cases:
            written += outputs.put(
                case.name, functools.partial(_write, case, options, data.images.get(case.image))
            )
            fixations = sum(len(path) for path in case.human)
            rows.append({"picture": case.name, "viewers": len(case.human), "fixations": fixations})
            progress.advance()
    return Result(
        title=f"{len(rows)} pictures",
        tables=[Table(title="", rows=rows)],
        data={"n": len(rows), "pictures": rows, "skipped": list(data.skipped)},
        files=written,
    )


def _chosen(cases: Sequence[Case], options: Options) -> list[Case]:
    names = {name for case in cases for name in (case.image, Path(case.image).stem)}
    for name in options.only:
        if name not in names:
            raise InputError(f"holds no scanpath of {name}", path=options.data)
    wanted = set(options.only)
    kept = [
        case
        for case in cases
        if (not wanted or {case.image, Path(case.image).stem} & wanted)
        and (not options.subject or _of(case, options.subject) is not None)
    ]
    if not kept:
        raise InputError(f"holds no scanpath of subject {options.subject}", path=options.data)
    return kept


def _of(case: Case, subject: str) -> Scanpath | None:
    return next((path for path in case.human if path.subject == subject), None)


def _write(case: Case, options: Options, file: Path | None, folder: Path) -> list[Path]:
    file_of_case = folder / _name(case)
    file_of_case.parent.mkdir(parents=True, exist_ok=True)
    picture = None if file is None else read_picture(file)
    numbered = _of(case, options.subject) or case.human[0]
    with style():
        return [save_figure(_figure(case, numbered, picture), file_of_case)]


def _name(case: Case) -> Path:
    """The drawing's file: the picture's own folders and name, and the task."""
    image = PurePath(case.image)
    folders = [part for part in image.parts[:-1] if part not in ("..", image.anchor)]
    task = re.sub(r"[^\w.-]+", "-", f" {case.task}") if case.task else ""
    return Path(*folders, f"{image.stem}{task}.png")


def _figure(case: Case, numbered: Scanpath, picture: np.ndarray | None) -> Figure:
    panel = 4.6
    height = panel * case.size_px[1] / case.size_px[0]
    figure = new_figure(width_in=3 * panel, height_in=height + 0.4)
    first, second, third = (figure.add_subplot(1, 3, k) for k in (1, 2, 3))
    draw_scanpath(first, numbered, picture=picture)
    first.set_title(f"{case.name}: viewer {numbered.subject}")
    _draw_all(second, case, picture)
    second.set_title(f"{len(case.human)} viewers")
    density = fixation_density(
        case.human,
        case.size_px,
        sigma_px=case.size_px[0] / _DEGREES_WIDE,
        shape=map_shape(case.size_px, 400),
    )
    draw_heat_map(third, density, case.size_px, picture=picture)
    draw_target(third, case.human[0])
    third.set_title("fixation density")
    return figure


def _draw_all(axes: Axes, case: Case, picture: np.ndarray | None) -> None:
    draw_picture(axes, case.size_px, picture)
    draw_target(axes, case.human[0])
    for path, colour in zip(case.human, scanpath_colours(len(case.human)), strict=True):
        x, y = path.xy_px.T
        axes.plot(x, y, color=colour, linewidth=1.0, alpha=0.8)
        axes.scatter(x, y, s=9, color=colour, edgecolors="black", linewidths=0.3, zorder=3)
