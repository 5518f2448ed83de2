"""Score a folder of .label files against the labels of a data set; no run is needed.

PREDICTIONS may come from any program: `00/000123.label` and `sequences/00/predictions/000123.label`
are both the scan 000123 of the sequence 00. Where LABELS is a data set with its scans, only the
region of interest counts and scores with a tolerance are given; a folder of .label files alone is
compared point by point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from heed_core.errors import InputError
from heed_core.folders import files_under
from heed_lidar.labels import read_labels
from heed_lidar.layouts import is_derived, list_scans
from heed_lidar.scans import load_scan
from heed_lidar.settings import ReadingOptions
from heed_lidar_cli.doubts import Doubts
from heed_lidar_cli.scoring import DERIVED_LABELS, FINAL, report, row_of
from heed_lidar_cli.settings import StreetData, ToleranceOptions, own_flags
from heed_runtime.files import atomic_folder, refuse_existing, write_csv, write_json
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import save_figure, save_table
from heed_runtime.terminal import Result, rows_of

if TYPE_CHECKING:
    from heed_runtime.app import App

PASSED_OVER = frozenset({"sequences", "dataset", "labels", "predictions", "velodyne"})
"""Folders that do not tell one scan from another."""

NEED_POINTS = ("roi", "tolerances_m", "distance")
"""Options that have no effect where only labels are compared."""

Key = tuple[str, ...]
Positional = tyro.conf.Positional[Path]


@dataclass(frozen=True, kw_only=True)
class Options(ToleranceOptions, CommonOptions):
    """The two folders, and how they are read."""

    predictions: Annotated[Positional, tyro.conf.arg(metavar="PREDICTIONS")]
    """A folder of .label files."""
    labels: Annotated[Positional, tyro.conf.arg(metavar="LABELS")]
    """A data set with scans and labels, or a folder of .label files."""
    map: str = "curb"
    """The classes of both: curb, curb-only, nrs, semantic-kitti, or a file like
    semantic-kitti.yaml."""
    labels_folder: str = "labels"
    """The folder of a sequence of the data set that holds its labels."""
    roi: str = "forward"
    """The part that counts: all, forward, forward:RANGE or x0:x1,y0:y1; of a data set only."""
    data: ReadingOptions = field(default_factory=ReadingOptions)
    """How the points of a data set are read; in which frame the region of interest lies."""
    out: OptionalPath = None
    """Also write the tables and plots into this folder."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.settings

    @property
    def settings(self) -> StreetData:
        """The same as the settings of a system."""
        return StreetData(
            labels=self.map,
            labels_folder=self.labels_folder,
            roi=self.roi,
            tolerances_m=self.tolerances_m,
            distance=self.distance,
            **vars(self.data),
        )


@own_flags({"--data.labels": "--map", "--data.roi": "--roi"})
def run(app: App, options: Options) -> Result:
    """Score scan by scan."""
    data = options.settings
    predicted = label_files(options.predictions)
    scored, unseen = _score(options, data, predicted)
    found = report(scored, seed=0)
    facts = {"n": len(scored), "without prediction": unseen, "metrics": found.metrics}
    files: list[Path] = []
    if options.out is not None:
        files = _write(options, facts, scored, found)
    tables = [Table(title="", rows=rows_of(found.metrics, key="metric")), *found.tables]
    title = f"{len(scored)} scans compared"
    if "scans_with_derived_labels" in found.metrics:
        title += f" ({DERIVED_LABELS})"
    if unseen:
        title += f", {unseen} labelled scans without a prediction are left out"
    shown = {table.title: table.rows for table in found.tables}
    return Result(title=title, tables=tables, data={**facts, "tables": shown}, files=files)


def label_files(root: Path) -> dict[Key, Path]:
    """The .label files under a folder by what names their scan.

    Raises:
        InputError: There is no such folder, it holds none, or two that are of one scan.
    """
    if not root.is_dir():
        raise InputError("no such folder", path=root, remedy="check the path")
    found: dict[Key, Path] = {}
    for path in files_under(root):
        if path.suffix != ".label":
            continue
        key = key_of(path.relative_to(root).with_suffix(""))
        if key in found:
            raise InputError(
                f"is of the same scan as {found[key]}", path=path, remedy="name one folder of them"
            )
        found[key] = path
    if not found:
        raise InputError("holds no .label file", path=root, remedy="give the folder of predictions")
    return found


def key_of(path: Path) -> Key:
    """What tells one scan from another in a path without its suffix.

    Example:
        >>> key_of(Path("sequences/08/predictions/000123"))
        ('08', '000123')
    """
    return tuple(part for part in path.parts if part not in PASSED_OVER)


def _score(options: Options, data: StreetData, predicted: dict[Key, Path]) -> tuple[list[Row], int]:
    """The rows of all scans with a prediction, and the number of those without."""
    try:
        scans = [scan for scan in list_scans(options.labels, data).scans if scan.labelled]
    except InputError:
        return _score_files(options, data, predicted)
    used = [path for scan in scans for path in (scan.cloud, scan.labels, scan.curbs_2d) if path]
    _refuse_existing(options, [*predicted.values(), *used])
    rows: list[Row] = []
    matched = [(scan, predicted.get(key_of(Path(scan.name)))) for scan in scans]
    _refuse_strangers(options, predicted, [key_of(Path(scan.name)) for scan in scans])
    doubts = Doubts(data, road=False)
    with options.terminal.progress("compare", len(matched)) as progress:
        for file, path in matched:
            progress.advance()
            if path is None:
                continue
            scan = load_scan(file, data)
            doubts.tell(scan, np.ones(len(scan), dtype=bool))
            raw = read_labels(path, count=scan.cloud.rows_in_file)[scan.cloud.rows]
            classes = data.label_map.classes_of(raw, where=path)
            assert scan.classes is not None
            inside = data.region.contains(scan.cloud.xyz)
            rows += row_of(
                FINAL,
                scan.name,
                scan.cloud.xyz[inside],
                scan.classes[inside],
                classes[inside],
                data,
                derived=file.derived,
            )
    return rows, len(matched) - len(rows)


def _score_files(
    options: Options, data: StreetData, predicted: dict[Key, Path]
) -> tuple[list[Row], int]:
    labels = label_files(options.labels)
    for name in NEED_POINTS:
        if getattr(options, name) != getattr(Options, name):
            raise InputError(
                f"--{name.replace('_', '-')} has no effect on a folder of .label files without "
                f"scans",
                path=options.labels,
                remedy="give the data set, or leave the option out",
            )
    _refuse_existing(options, [*predicted.values(), *labels.values()])
    _refuse_strangers(options, predicted, list(labels))
    rows: list[Row] = []
    for key, path in labels.items():
        if key not in predicted:
            continue
        raw = read_labels(path)
        truth = data.label_map.classes_of(raw, where=path)
        other = read_labels(predicted[key], count=len(raw))
        classes = data.label_map.classes_of(other, where=predicted[key])
        nowhere = np.zeros((len(raw), 3))
        rows += row_of(
            *(FINAL, "/".join(key), nowhere, truth, classes, data),
            tolerances=(),
            derived=is_derived(path),
        )
    return rows, len(labels) - len(rows)


def _refuse_existing(options: Options, used: Sequence[Path]) -> None:
    if options.out is not None:
        refuse_existing(options.out, overwrite=options.overwrite, used=used)


def _refuse_strangers(options: Options, predicted: dict[Key, Path], known: Sequence[Key]) -> None:
    strangers = [path for key, path in predicted.items() if key not in set(known)]
    if strangers:
        raise InputError(
            f"is of a scan that {options.labels} has no labels for "
            f"({len(strangers)} of {len(predicted)} predictions)",
            path=strangers[0],
            remedy="give the data set that was predicted",
        )


def _write(
    options: Options, facts: dict[str, object], rows: Sequence[Row], found: Report
) -> list[Path]:
    assert options.out is not None
    with atomic_folder(options.out, overwrite=options.overwrite) as folder:
        write_json(folder / "metrics.json", facts)
        write_csv(folder / "cases.csv", rows)
        for table in found.tables:
            save_table(table, folder)
        for stem, figure in found.plots.items():
            save_figure(figure, folder / f"{stem}.png")
    return sorted(options.out.iterdir())
