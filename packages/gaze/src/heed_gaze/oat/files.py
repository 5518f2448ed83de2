"""The neutral file of layouts and trials, `shelves.json`, and what recognises other formats.

    {"layouts": [{"name", "image", "rows", "cols", "boxes": [[x0, y0, x1, y1], ...],
                  "cells"?: [[row, col], ...], "width"?, "height"?, "group"?}],
     "trials": [{"layout", "target": index or null, "subject", "objects": [...],
                 "x"?: [...], "y"?: [...], "target_name"?, "split"?}]}

Without `cells` the boxes are in reading order. A trial may give `x` and `y` (pixels) instead of
`objects`: each fixation goes to the box that holds it, else to the nearest; those off the picture
are treated as in all formats. Pictures are looked for beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from heed_core.errors import InputError
from heed_gaze.oat.importers import ImportOptions, import_scanpaths
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.shelves import Layout, Shelves, Trial, reading_order
from heed_gaze.oat.workbooks import read_workbooks
from heed_gaze.readers.json_files import json_layout, load_json
from heed_gaze.readers.pictures import picture_size
from heed_gaze.readers.trials import Policy, outside_notes, place_inside
from heed_gaze.scanpaths import Scanpath, Size

NEUTRAL = "shelves.json"


def read_shelves(path: Path, options: ImportOptions) -> Shelves:
    """Read layouts and trials; the format is recognised.

    Args:
        path: A file, or the folder of a data set.
        options: What is done with what is wrong, and the grid of data without objects.

    Raises:
        InputError: Nothing that is known, or it cannot be used.
    """
    if not path.exists():
        raise InputError("no such file or folder", path=path, remedy="check the path")
    neutral = _neutral_file(path)
    if neutral is not None:
        return read_neutral(neutral, options)
    books = [path] if path.suffix.lower() == ".xlsx" else sorted(path.glob("*.xlsx"))
    if books:
        return read_workbooks(books, options)
    return import_scanpaths(path, options)


def _neutral_file(path: Path) -> Path | None:
    if path.is_dir():
        return path / NEUTRAL if (path / NEUTRAL).is_file() else None
    if path.suffix.lower() == ".json" and json_layout(load_json(path)) == "objects":
        return path
    return None


@dataclass(frozen=True)
class _Entry:
    """One object of the document, with words for what is wrong in it."""

    path: Path
    place: str
    values: Mapping[str, object]

    def fault(self, problem: str, remedy: str | None = None) -> InputError:
        return InputError(problem, path=self.path, place=self.place, remedy=remedy)

    def text(self, name: str) -> str:
        value = self.values.get(name)
        return "" if value is None else str(value)

    def whole(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(f"{name} must be a whole number, got {value!r}", "correct it")
        return value

    def table(self, name: str, width: int | None, kind: type[np.generic]) -> np.ndarray:
        form = "a list of numbers" if width is None else f"a list of rows of {width} numbers"
        wrong = self.fault(f"{name} must be {form}", "correct or remove it")
        try:
            found = np.asarray(self.values[name], dtype=np.float64)
        except (TypeError, ValueError):
            raise wrong from None
        shape = found.shape[1:]
        if found.ndim == 0 or (found.size and shape != (() if width is None else (width,))):
            raise wrong
        if not np.isfinite(found).all():
            raise self.fault(f"{name} holds NaN or infinity", "correct or remove it")
        if kind is np.int64 and (found != np.floor(found)).any():
            raise self.fault(f"{name} must hold whole numbers", "correct or remove it")
        return found.astype(kind)


def read_neutral(path: Path, options: ImportOptions) -> Shelves:
    """Read the neutral JSON.

    Raises:
        InputError: Names the file, the layout or trial, what is wrong and what to do.
    """
    document = load_json(path)
    if not isinstance(document, Mapping):
        raise InputError("holds no layouts and trials", path=path, remedy="see the layout in info")
    layouts: dict[str, Layout] = {}
    for number, entry in enumerate(_list(document, "layouts", path), start=1):
        layout = _layout(_Entry(path, f"layout {number}", _mapping(entry, path)))
        if layout.name in layouts:
            raise InputError(f"has two layouts {layout.name!r}", path=path, remedy="rename one")
        layouts[layout.name] = layout
    trials, skipped, moved = [], [], 0
    for number, entry in enumerate(_list(document, "trials", path), start=1):
        try:
            one = _Entry(path, f"trial {number}", _mapping(entry, path))
            trial, outside = _trial(one, layouts, options.outside)
            trials.append(trial)
            moved += outside
        except InputError as error:
            if options.on_error == "stop":
                raise
            skipped.append(str(error))
    if not layouts:
        raise InputError("holds no layout", path=path)
    return Shelves(
        layouts=layouts,
        trials=tuple(trials),
        skipped=tuple(skipped),
        notes=outside_notes(moved, options.outside),
        kind="neutral JSON",
    )


def _list(document: Mapping[str, object], name: str, path: Path) -> Sequence[object]:
    found = document.get(name)
    if not isinstance(found, list):
        raise InputError(f"has no list {name!r}", path=path, remedy="see the layout in info")
    return found


def _mapping(entry: object, path: Path) -> Mapping[str, object]:
    if not isinstance(entry, Mapping):
        raise InputError(f"holds {entry!r} where an object is needed", path=path)
    return entry


def _layout(entry: _Entry) -> Layout:
    image = entry.path.parent / entry.text("image") if entry.text("image") else None
    name = entry.text("name") or entry.text("image")
    if not name:
        raise entry.fault("has neither name nor image")
    for needed in ("boxes", "rows", "cols"):
        if needed not in entry.values:
            raise entry.fault(f"has no {needed!r}")
    boxes = entry.table("boxes", 4, np.float64)
    rows, columns = entry.whole("rows"), entry.whole("cols")
    if min(rows, columns) < 1 or (len(boxes) > rows * columns and "cells" not in entry.values):
        raise entry.fault(
            f"{len(boxes)} boxes do not fit into {rows} rows and {columns} cols", "correct them"
        )
    given = "cells" in entry.values
    cells = entry.table("cells", 2, np.int64) if given else reading_order(rows, columns, len(boxes))
    try:
        return Layout(
            name=name,
            boxes=boxes.reshape(-1, 4),
            cells=cells,
            rows=rows,
            columns=columns,
            size_px=_size(entry, image),
            image=image,
            group=entry.text("group"),
        )
    except InputError as error:
        raise entry.fault(error.problem, error.remedy) from None


def _size(entry: _Entry, image: Path | None) -> Size:
    if "width" in entry.values and "height" in entry.values:
        return entry.whole("width"), entry.whole("height")
    if image is None:
        raise entry.fault("has neither an image nor width and height")
    if not image.is_file():
        raise entry.fault(f"its image {image} is not there", "add it, or give width and height")
    return picture_size(image)


def _trial(entry: _Entry, layouts: Mapping[str, Layout], outside: Policy) -> tuple[Trial, int]:
    """A trial, and how many of its positions are off the picture."""
    moved = 0
    layout = layouts.get(entry.text("layout"))
    if layout is None:
        raise entry.fault(
            f"layout {entry.text('layout')!r} is not among the layouts", "correct or add it"
        )
    if "objects" in entry.values:
        objects = entry.table("objects", None, np.int64)
        if {"x", "y"} <= set(entry.values):
            positions = [entry.table(axis, None, np.float64) for axis in ("x", "y")]
            if any(len(axis) != len(objects) for axis in positions):
                raise entry.fault("has different numbers of objects, x and y")
    elif {"x", "y"} <= set(entry.values):
        x, y = entry.table("x", None, np.float64), entry.table("y", None, np.float64)
        if len(x) != len(y):
            raise entry.fault("has different numbers of x and y")
        objects, moved = _objects_at(entry, layout, np.stack([x, y], axis=1), outside)
    else:
        raise entry.fault("has neither objects nor x and y")
    trial = Trial(
        layout=layout.name,
        target=NO_TARGET if entry.values.get("target") is None else entry.whole("target"),
        subject=entry.text("subject"),
        objects=objects,
        target_name=entry.text("target_name"),
        split=entry.text("split"),
    )
    if entry.values.get("target") == NO_TARGET:
        raise entry.fault("target -1 is no object", "write null for free viewing")
    trial.check(layout, path=entry.path, place=entry.place)
    return trial, moved


def _objects_at(
    entry: _Entry, layout: Layout, xy_px: Float64[np.ndarray, "t 2"], outside: Policy
) -> tuple[Int64[np.ndarray, " _"], int]:
    """The objects at positions, and how many of these are off the picture."""
    looked = Scanpath(
        image=layout.name, subject=entry.text("subject"), xy_px=xy_px, size_px=layout.size_px
    )
    found = place_inside(looked, outside, path=entry.path, place=entry.place)
    if isinstance(found, InputError):
        raise found
    return layout.objects_at(found.xy_px), int(looked.outside().sum())


def write_neutral(path: Path, shelves: Shelves) -> Path:
    """Write the neutral JSON; pictures are named as they lie from its folder."""
    layouts = [_layout_record(layout, path.parent) for layout in shelves.layouts.values()]
    trials = [_trial_record(trial) for trial in shelves.trials]
    lines = [
        '{"layouts": [\n' + ",\n".join(json.dumps(one) for one in layouts) + "\n],",
        '"trials": [\n' + ",\n".join(json.dumps(one) for one in trials) + "\n]}\n",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _layout_record(layout: Layout, folder: Path) -> dict[str, object]:
    image = layout.image
    if image is not None and image.is_relative_to(folder):
        image = image.relative_to(folder)
    return {
        "name": layout.name,
        "image": None if image is None else image.as_posix(),
        "width": layout.size_px[0],
        "height": layout.size_px[1],
        "rows": layout.rows,
        "cols": layout.columns,
        "boxes": layout.boxes.tolist(),
        "cells": layout.cells.tolist(),
        "group": layout.group,
    }


def _trial_record(trial: Trial) -> dict[str, object]:
    facts: dict[str, object] = {
        "layout": trial.layout,
        "target": None if trial.target == NO_TARGET else trial.target,
        "subject": trial.subject,
        "objects": trial.objects.tolist(),
        "target_name": trial.target_name or None,
        "split": trial.split or None,
    }
    return {k: v for k, v in facts.items() if v is not None or k == "target"}
