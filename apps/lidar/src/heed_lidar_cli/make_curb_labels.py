"""Derive curb labels where a data set has labels of road and sidewalk and none of curbs.

The border of the road where the ground makes a step becomes curb. Nobody corrected these labels:
scores on them cannot be compared with those of labels made by hand. The file DERIVED.md beside the
labels lets evaluate, compare and check say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from heed_core.errors import InputError
from heed_lidar.curb_labels import CurbLabelling, write_curb_labels
from heed_lidar.settings import LidarData, ReadingOptions
from heed_runtime.options import CommonOptions, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The data set, where the labels go, and what counts as a border."""

    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """A data set in SemanticKITTI's layout with labels of road (40) and sidewalk (48)."""
    out: OutPath
    """Where sequences/SS/FOLDER/*.label are written; another folder than DATA becomes a data set of
    its own, whose scans are links. Labels that are there are never replaced."""
    folder: str = "labels"
    """Name of the new folders; --data.labels-folder reads others than labels."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a scan that cannot be read."""
    data: ReadingOptions = field(default_factory=ReadingOptions)
    """How the points are read; what lies ahead is what has x > 0 in this frame."""
    border: CurbLabelling = field(default_factory=CurbLabelling)


def run(app: App, options: Options) -> Result:
    """Write the labels scan by scan; each file is whole or not there."""
    data = LidarData(labels="semantic-kitti", on_error=options.on_error, **vars(options.data))
    rows: list[Row] = []
    skipped: list[str] = []
    written: set[Path] = set()
    with options.terminal.progress("label", None) as progress:
        for found in write_curb_labels(
            options.root, options.out, data, options.border, folder=options.folder
        ):
            progress.advance(note=found.name)
            if found.path is None:
                skipped.append(found.problem)
                continue
            rows.append({"scan": found.name, "points": found.points, "curb": found.curb})
            written.add(found.path.parent)
    if not rows:
        raise InputError("no scan can be read", path=options.root, remedy=skipped[0])
    total = sum(int(row["curb"] or 0) for row in rows)
    tables = [Table(title="", rows=rows)]
    if skipped:
        tables.append(Table(title="skipped", rows=[{"scan": line} for line in skipped]))
    return Result(
        title=f"{total} curb points in {len(rows)} scans (derived, not made by hand)",
        tables=tables,
        data={"n": len(rows), "curb": total, "scans": rows, "skipped": skipped},
        files=sorted(written),
    )
