"""Layouts of objects, and the trials of viewers who looked at them.

A layout is a picture with boxes, one per object, on a grid of rows and columns; a trial is what one
viewer fixated there, as indices of objects. Boxes are pixels x0, y0, x1, y1 of the picture, indices
count from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from heed_core.errors import InputError
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.scanpaths import Scanpath, Size

Boxes = Float64[np.ndarray, "_ 4"]
_SLACK_PX = 1.0  # of a box at the border: pictures are cut to whole pixels


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The objects of one picture.

    Raises:
        InputError: Boxes that are no boxes, lie outside the picture, or cells outside the grid.
    """

    name: str
    boxes: Boxes
    cells: Int64[np.ndarray, "n 2"]
    """Row and column of each object."""
    rows: int
    columns: int
    size_px: Size
    image: Path | None = None
    """The picture; None: there is none at hand."""
    group: str = ""
    """Layouts of one kind (one shelf, one data set): losses and splits go by group."""

    def __post_init__(self) -> None:
        count = len(self.boxes)
        if count < 2:
            raise self.fault(f"has {count} objects", "a layout needs at least two boxes")
        if self.boxes.shape != (count, 4) or self.cells.shape != (count, 2):
            raise self.fault(
                f"has boxes of shape {self.boxes.shape} and cells of {self.cells.shape}",
                "give four numbers a box and two a cell",
            )
        x0, y0, x1, y1 = self.boxes.T
        width, height = self.size_px
        good = (x1 > x0) & (y1 > y0)  # False for NaN too
        inside = (x0 >= -_SLACK_PX) & (y0 >= -_SLACK_PX)
        inside &= (x1 <= width + _SLACK_PX) & (y1 <= height + _SLACK_PX)
        seen = (x1 - x0 >= 1) & (y1 - y0 >= 1)
        for flags, what in (
            (good, "is no box"),
            (inside, f"is outside {width} x {height}"),
            (seen, f"of {width} x {height} pixels is smaller than a pixel"),
        ):
            if not flags.all():
                index = int(np.flatnonzero(~flags)[0])
                raise self.fault(f"box {index} {self.boxes[index].tolist()} {what}", "correct it")
        if (self.cells < 0).any() or (self.cells >= (self.rows, self.columns)).any():
            raise self.fault(
                f"has cells outside the grid of {self.rows} x {self.columns}", "correct rows, cols"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def centres_px(self) -> Float64[np.ndarray, "n 2"]:
        """Centre (x, y) of each box."""
        return np.asarray((self.boxes[:, :2] + self.boxes[:, 2:]) / 2)

    def fault(self, problem: str, remedy: str) -> InputError:
        """An error about this layout."""
        return InputError(f"layout {self.name!r} {problem}", path=self.image, remedy=remedy)

    def objects_at(self, xy_px: Float64[np.ndarray, "t 2"]) -> Int64[np.ndarray, " t"]:
        """The object at each position: whose box holds it, else whose centre is nearest."""
        x, y = xy_px[:, :1], xy_px[:, 1:]
        x0, y0, x1, y1 = self.boxes.T
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)  # (t, n)
        # Of several boxes one within the other, the smallest is meant.
        area = np.where(inside, (x1 - x0) * (y1 - y0), np.inf)
        distance = np.hypot(*(xy_px[:, None] - self.centres_px).transpose(2, 0, 1))
        nearest = distance.argmin(axis=1)
        return np.asarray(np.where(inside.any(axis=1), area.argmin(axis=1), nearest))

    def best_overlap(self, box: tuple[float, float, float, float]) -> int:
        """The object whose box has the largest intersection over union with a given one."""
        x0, y0, x1, y1 = box
        low = np.maximum(self.boxes[:, :2], (x0, y0))
        high = np.minimum(self.boxes[:, 2:], (x1, y1))
        common = np.clip(high - low, 0, None).prod(axis=1)
        own = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)
        return int((common / (own + (x1 - x0) * (y1 - y0) - common)).argmax())

    def scanpath(self, objects: Sequence[int], *, subject: str, target: int) -> Scanpath:
        """Fixated objects as a scanpath over the centres of their boxes."""
        chosen = np.asarray(objects, dtype=np.int64)
        x0, y0, x1, y1 = self.boxes[max(target, 0)].tolist()
        return Scanpath(
            image=self.name if self.image is None else self.image.name,
            subject=subject,
            xy_px=self.centres_px[chosen],
            size_px=self.size_px,
            objects=chosen,
            task="" if target == NO_TARGET else str(target),
            target_box=None if target == NO_TARGET else (x0, y0, x1, y1),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What one viewer fixated on one layout."""

    layout: str
    target: int
    """Index of the object that was looked for; -1: none, free viewing."""
    subject: str
    objects: Int64[np.ndarray, " t"]
    target_name: str = ""
    """What was looked for, where the same thing stands at other places on other layouts."""
    split: str = ""

    @property
    def name(self) -> str:
        """The trial in words, for messages."""
        target = "" if self.target == NO_TARGET else f", target {self.target}"
        return f"layout {self.layout!r}{target}, subject {self.subject!r}"

    @property
    def wanted(self) -> str:
        """What was looked for: its name, else its index."""
        return self.target_name or str(self.target)

    def check(self, layout: Layout, *, path: Path | None = None, place: str | None = None) -> None:
        """Refuse a trial that does not fit its layout.

        Raises:
            InputError: Names the trial, what is wrong and what to do.
        """
        count = len(layout)
        problem = None
        if not NO_TARGET <= self.target < count:
            problem = f"target {self.target} is none of the objects 0 to {count - 1}"
        elif not len(self.objects):
            problem = "has no fixation"
        elif (self.objects < 0).any() or (self.objects >= count).any():
            wrong = self.objects[(self.objects < 0) | (self.objects >= count)][0]
            problem = f"object {wrong} is none of the objects 0 to {count - 1}"
        if problem is not None:
            where = f"{place} ({self.name})" if place else self.name
            raise InputError(problem, path=path, place=where, remedy="correct or remove the trial")


@dataclass(frozen=True, kw_only=True)
class Shelves:
    """The layouts and trials of a data set."""

    layouts: Mapping[str, Layout]
    trials: tuple[Trial, ...]
    skipped: tuple[str, ...] = field(default=())
    """What was left out, a line each."""
    notes: tuple[str, ...] = field(default=())
    """What was assumed while reading, a line each."""
    kind: str = ""
    """The file format."""

    def layout_of(self, trial: Trial) -> Layout:
        """Where a trial took place."""
        return self.layouts[trial.layout]


def reading_order(rows: int, columns: int, count: int) -> Int64[np.ndarray, "n 2"]:
    """Row and column of the first `count` objects of a grid, in reading order."""
    index = np.arange(count)
    return np.stack([index // columns, index % columns], axis=1)


def even_boxes(size_px: Size, rows: int, columns: int) -> Boxes:
    """A grid of equal cells over a whole picture, in reading order."""
    width, height = size_px
    x, y = np.linspace(0, width, columns + 1), np.linspace(0, height, rows + 1)
    cells = reading_order(rows, columns, rows * columns)
    row, column = cells.T
    return np.stack([x[column], y[row], x[column + 1], y[row + 1]], axis=1)


def nearest_cells(boxes: Boxes, size_px: Size, rows: int, columns: int) -> Int64[np.ndarray, "n 2"]:
    """The cell of an even grid that holds the centre of each box; several may share one."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    share = centres / np.array(size_px, dtype=np.float64)
    cells = np.floor(share[:, ::-1] * (rows, columns)).astype(np.int64)
    return np.asarray(np.clip(cells, 0, (rows - 1, columns - 1)))
