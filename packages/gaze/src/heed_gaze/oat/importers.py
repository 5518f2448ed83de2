"""Scanpaths in pixels as trials over objects: STI (Amazon), OSIE, COCO-Search18 and others.

The objects of a picture are, in this order,

1. the cells of `binarymask/14x6-<picture>` (STI): white rectangles on black,
2. the labels of `objects/<picture>.png` (0 is background; a fixation goes to the label's box),
3. the boxes of `objects/boxes.csv` (image, x0, y0, x1, y1),
4. an even grid over the whole picture; the notes of the result say so.

A fixation goes to the box that holds it, else to the nearest. Where a target's box is known, the
target is the object that overlaps it most.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from jaxtyping import UInt8

from heed_core.errors import InputError
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.shelves import (
    Boxes,
    Layout,
    Shelves,
    Trial,
    even_boxes,
    nearest_cells,
    reading_order,
)
from heed_gaze.readers.pictures import opened
from heed_gaze.readers.reading import read_scanpaths
from heed_gaze.readers.trials import OnError, Policy, ReadOptions
from heed_gaze.scanpaths import Scanpath, ScanpathSet, Size

logger = logging.getLogger(__name__)

STI_GRID = (6, 14)
"""Rows and columns of the book covers of the Amazon collages."""
STI_MASKS = "binarymask"
LABELS = "objects"
BOXES = f"{LABELS}/boxes.csv"
_ROW_PX = 10  # contours whose tops differ by less stand in one row


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What is done with what is wrong, and how pictures without objects are divided."""

    grid: tuple[int, int] = (6, 8)
    """Rows and columns of an even grid over pictures whose objects are not known."""
    longest_sd: float | None = 3.0
    """Leave out imported scanpaths longer than mean + so many standard deviations; None: none."""
    outside: Policy = "keep"
    """Fixations off the picture: stop, drop, clip or keep (they go to the nearest object, as in the
    paper's code)."""
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"grid must be at least 1 x 1, got {self.grid}")
        if self.longest_sd is not None and self.longest_sd <= 0:
            raise ValueError(f"longest_sd must be above 0, got {self.longest_sd}")


def import_scanpaths(path: Path, options: ImportOptions) -> Shelves:
    """Read scanpaths of any known format and find the objects that they are on.

    Raises:
        InputError: Nothing that is known, or it cannot be used.
    """
    found = read_scanpaths(path, ReadOptions(on_error=options.on_error, outside=options.outside))
    root = path if path.is_dir() else path.parent
    finder = _Objects(root, options, found)
    layouts: dict[str, Layout] = {}
    trials = []
    for scanpath in found.scanpaths:
        if scanpath.image not in layouts:
            layouts[scanpath.image] = finder.layout(scanpath)
        trials.append(_trial(scanpath, layouts[scanpath.image]))
    kept, dropped = without_longest(trials, options.longest_sd)
    return Shelves(
        layouts=layouts,
        trials=kept,
        skipped=found.skipped,
        notes=(*finder.notes, *found.notes, *dropped),
        kind=found.layout,
    )


def _trial(scanpath: Scanpath, layout: Layout) -> Trial:
    box = scanpath.target_box
    return Trial(
        layout=layout.name,
        target=NO_TARGET if box is None else layout.best_overlap(box),
        subject=scanpath.subject,
        objects=layout.objects_at(scanpath.xy_px),
        target_name=scanpath.task,
        split={"valid": "val", "validation": "val"}.get(scanpath.split, scanpath.split),
    )


def without_longest(
    trials: Iterable[Trial], deviations: float | None
) -> tuple[tuple[Trial, ...], tuple[str, ...]]:
    """The trials no longer than mean + so many (population) standard deviations, and a note."""
    every = tuple(trials)
    if deviations is None or not every:
        return every, ()
    lengths = np.array([len(trial.objects) for trial in every])
    most = lengths.mean() + deviations * lengths.std()
    kept = tuple(trial for trial in every if len(trial.objects) <= most)
    if len(kept) == len(every):
        return every, ()
    return kept, (
        f"{len(every) - len(kept)} of {len(every)} scanpaths are longer than {most:.1f} fixations "
        f"(mean + {deviations:g} standard deviations) and were left out",
    )


class _Objects:
    """Finds the objects of pictures."""

    def __init__(self, root: Path, options: ImportOptions, found: ScanpathSet) -> None:
        self.root, self.options, self.images = root, options, found.images
        self.sti = found.layout == "STI"
        self.kind = found.layout
        self.grid = STI_GRID if self.sti else options.grid
        self.boxes = _read_boxes(root / BOXES)
        self.notes: list[str] = []

    def layout(self, scanpath: Scanpath) -> Layout:
        """The layout of a scanpath's picture."""
        size = scanpath.size_px
        if size is None:
            raise InputError(
                "the size of the picture is not known",
                path=self.root,
                place=scanpath.name,
                remedy="put the pictures beside the scanpaths",
            )
        boxes, ordered = self._find(scanpath.image, size)
        rows, columns = self.grid
        return Layout(
            name=scanpath.image,
            boxes=boxes,
            cells=reading_order(rows, columns, len(boxes))
            if ordered
            else nearest_cells(boxes, size, rows, columns),
            rows=rows,
            columns=columns,
            size_px=size,
            image=self.images.get(scanpath.image),
            group=self.kind,
        )

    def _find(self, image: str, size: Size) -> tuple[Boxes, bool]:
        """Boxes, and whether they fill the grid in reading order."""
        rows, columns = self.grid
        mask = self.root / STI_MASKS / f"{columns}x{rows}-{image}"
        if self.sti and mask.is_file():
            return mask_cells(mask, rows * columns), True
        labels = self.root / LABELS / f"{Path(image).stem}.png"
        if labels.is_file():
            return label_boxes(labels, size), False
        if image in self.boxes:
            return self.boxes[image], False
        note = f"pictures without objects are divided into {rows} x {columns} even cells"
        if note not in self.notes:
            logger.info("%s", note)
            self.notes.append(note)
        return even_boxes(size, rows, columns), True


def read_mask(path: Path) -> UInt8[np.ndarray, "h w"]:
    """A grey picture of labels or of black and white.

    Raises:
        InputError: It cannot be read.
    """
    with opened(path) as picture:
        grey = picture if picture.mode in ("L", "P", "I", "I;16") else picture.convert("L")
        return np.asarray(grey).astype(np.uint8)


def mask_cells(path: Path, count: int) -> Boxes:
    """The bounding boxes of the white rectangles of a mask, in reading order.

    Raises:
        InputError: There are not so many.
    """
    import cv2

    white = (read_mask(path) > 127).astype(np.uint8)
    contours, _ = cv2.findContours(white, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = [cv2.boundingRect(contour) for contour in contours]
    if len(found) != count:
        raise InputError(f"has {len(found)} white cells, not {count}", path=path)
    ordered = sorted(found, key=lambda box: (box[1] // _ROW_PX * _ROW_PX, box[0]))
    x, y, w, h = np.array(ordered, dtype=np.float64).T
    return np.stack([x, y, x + w, y + h], axis=1)


def label_boxes(path: Path, size: Size) -> Boxes:
    """The bounding box of each label of a mask, scaled to the size of the picture.

    Raises:
        InputError: There are fewer than two labels.
    """
    labels = read_mask(path)
    found = []
    for label in np.unique(labels[labels > 0]):
        y, x = np.nonzero(labels == label)
        found.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
    if len(found) < 2:
        raise InputError(f"has {len(found)} labels, an object each; two are needed", path=path)
    scale = np.array(size) / np.array(labels.shape[::-1])
    return np.asarray(np.array(found, dtype=np.float64) * np.tile(scale, 2))


def _read_boxes(path: Path) -> Mapping[str, Boxes]:
    """The boxes of each picture in a csv."""
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path)
    except (ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"is no csv that can be read ({error})", path=path) from None
    columns = ["x0", "y0", "x1", "y1"]
    for column in ["image", *columns]:
        if column not in table:
            raise InputError(f"has no column {column!r}", path=path, remedy="add it")
    values = table[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0]) + 2
        raise InputError("holds something that is not a number", path=path, place=f"row {row}")
    names = table["image"].astype(str).to_numpy()
    return {str(name): values[names == name] for name in np.unique(names)}
