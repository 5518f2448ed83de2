"""Scanpaths: what one viewer fixated in one picture, in which order and for how long.

Positions are pixels of the picture (or screen) with x to the right and y downwards, from its
top-left corner; times are seconds. Every reader converts to these units, every metric and plot
takes them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64

from heed_core.errors import InputError

Size = tuple[int, int]
"""Width and height in pixels."""

CSV_COLUMNS = ("image", "subject", "index", "x", "y", "duration")
"""Columns of the neutral CSV: a row per fixation, `index` from 0, `duration` in seconds (empty:
unknown). `OPTIONAL_COLUMNS` may follow."""
OPTIONAL_COLUMNS = ("task", "condition", "onset", "object", "width", "height", "split")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanpath:
    """The fixations of one trial.

    Raises:
        ValueError: The arrays are of different lengths.

    Example:
        >>> path = Scanpath(
        ...     image="a.jpg", subject="1", xy_px=np.array([[10.0, 5.0], [4.0, 5.0]])
        ... )
        >>> len(path), path.key
        (2, ('a.jpg', ''))
    """

    image: str
    """File name of the picture, or name of the layout."""
    subject: str
    """Who looked: a viewer, or the name of the program that predicted."""
    xy_px: Float64[np.ndarray, "n 2"]
    """Fixated positions in pixels of the picture."""
    size_px: Size | None = None
    """Width and height of the picture or screen; None: not known."""
    task: str = ""
    """What was looked for (a target, a task's name); empty: free viewing."""
    condition: str = ""
    """What kind of trial it is: present or absent, of a target; empty: one kind only."""
    onset_s: Float64[np.ndarray, " n"] | None = None
    """When each fixation began, from the start of the trial."""
    duration_s: Float64[np.ndarray, " n"] | None = None
    """How long each fixation lasted."""
    objects: Int64[np.ndarray, " n"] | None = None
    """Index of the object that each fixation is on."""
    split: str = ""
    """Part of the data set: train, val, test or nothing."""
    target_box: tuple[float, float, float, float] | None = None
    """Where the target is: x0, y0, x1, y1 in pixels; None: unknown or absent."""

    def __post_init__(self) -> None:
        if self.xy_px.ndim != 2 or self.xy_px.shape[1] != 2:
            raise ValueError(f"xy_px must be (fixations, 2), got {self.xy_px.shape}")
        for name in ("onset_s", "duration_s", "objects"):
            values = getattr(self, name)
            if values is not None and values.shape != (len(self.xy_px),):
                raise ValueError(f"{name} is {values.shape} for {len(self.xy_px)} fixations")

    def __len__(self) -> int:
        return len(self.xy_px)

    @property
    def key(self) -> tuple[str, str]:
        """Picture and task: scanpaths of the same key can be compared."""
        return self.image, self.task

    @property
    def name(self) -> str:
        """The trial in words, for messages."""
        task = f", task {self.task}" if self.task else ""
        return f"image {self.image}{task}, subject {self.subject}"

    def keep(self, which: Bool[np.ndarray, " n"] | slice) -> Scanpath:
        """Some of the fixations."""
        return replace(
            self,
            xy_px=self.xy_px[which],
            onset_s=None if self.onset_s is None else self.onset_s[which],
            duration_s=None if self.duration_s is None else self.duration_s[which],
            objects=None if self.objects is None else self.objects[which],
        )

    def resized(self, size_px: Size) -> Scanpath:
        """The same fixations on a picture of another size.

        Raises:
            ValueError: The size of this one is not known.
        """
        if self.size_px is None:
            raise ValueError(f"{self.name} has no size to scale from")
        factor = np.array(size_px, dtype=np.float64) / np.array(self.size_px)
        box = self.target_box
        if box is not None:
            x0, y0, x1, y1 = np.array(box) * np.tile(factor, 2)
            box = (float(x0), float(y0), float(x1), float(y1))
        return replace(self, xy_px=self.xy_px * factor, size_px=size_px, target_box=box)

    def outside(self) -> Bool[np.ndarray, " n"]:
        """Which fixations lie off the picture; none where its size is not known.

        The right and the lower border belong to the picture.
        """
        if self.size_px is None:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(((self.xy_px < 0) | (self.xy_px > np.array(self.size_px))).any(axis=1))


@dataclass(frozen=True, kw_only=True)
class ScanpathSet:
    """The scanpaths of a file or folder."""

    scanpaths: tuple[Scanpath, ...]
    images: Mapping[str, Path] = field(default_factory=dict)
    """Name of a picture -> its file, of those that were found."""
    skipped: tuple[str, ...] = ()
    """What was left out, and why: one line each."""
    layout: str = ""
    """In which layout the files were."""
    notes: tuple[str, ...] = ()
    """What was changed on the way."""

    def __len__(self) -> int:
        return len(self.scanpaths)

    def by_key(self) -> dict[tuple[str, str], list[Scanpath]]:
        """The scanpaths of each picture and task, in the order of the files."""
        groups: dict[tuple[str, str], list[Scanpath]] = {}
        for path in self.scanpaths:
            groups.setdefault(path.key, []).append(path)
        return groups


def write_scanpaths(path: Path, scanpaths: Iterable[Scanpath]) -> Path:
    """Write the neutral CSV (`.csv`) or JSON (`.json`) that `heed_gaze.readers` reads back.

    Raises:
        InputError: Another suffix.
    """
    writers = {".csv": _write_csv, ".json": _write_json}
    if path.suffix not in writers:
        raise InputError(
            f"cannot write scanpaths as {path.suffix or 'a file without suffix'}",
            path=path,
            remedy="name it .csv or .json",
        )
    writers[path.suffix](path, list(scanpaths))
    return path


def scanpath_record(path: Scanpath) -> dict[str, object]:
    """A scanpath as the neutral JSON holds it; what is not known is left out."""
    facts: dict[str, object] = {
        "image": path.image,
        "subject": path.subject,
        "x": path.xy_px[:, 0].tolist(),
        "y": path.xy_px[:, 1].tolist(),
    }
    optional: dict[str, object] = {
        "task": path.task or None,
        "condition": path.condition or None,
        "split": path.split or None,
        "width": path.size_px and path.size_px[0],
        "height": path.size_px and path.size_px[1],
        "duration": _listed(path.duration_s),
        "onset": _listed(path.onset_s),
        "objects": _listed(path.objects),
        "target_box": path.target_box and list(path.target_box),
    }
    return facts | {name: value for name, value in optional.items() if value is not None}


def _listed(values: np.ndarray | None) -> list[int] | list[float] | None:
    return None if values is None else values.tolist()


def _write_json(path: Path, scanpaths: Sequence[Scanpath]) -> None:
    records = ",\n".join(json.dumps(scanpath_record(one)) for one in scanpaths)
    text = f'{{"units": {{"position": "px", "time": "s"}}, "scanpaths": [\n{records}\n]}}\n'
    path.write_text(text, encoding="utf-8")


def _write_csv(path: Path, scanpaths: Sequence[Scanpath]) -> None:
    rows = [row for one in scanpaths for row in scanpath_rows(one)]
    used = [name for name in OPTIONAL_COLUMNS if any(row[name] != "" for row in rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*CSV_COLUMNS, *used], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def scanpath_rows(path: Scanpath) -> list[dict[str, str | int | float]]:
    """A scanpath as the rows of the neutral CSV, with every column; unknown values are empty."""
    width, height = path.size_px or ("", "")
    whole = {
        "task": path.task,
        "condition": path.condition,
        "width": width,
        "height": height,
        "split": path.split,
    }
    columns = {"duration": path.duration_s, "onset": path.onset_s, "object": path.objects}
    return [
        {
            "image": path.image,
            "subject": path.subject,
            "index": index,
            "x": float(x),
            "y": float(y),
            **{name: "" if v is None else v[index].item() for name, v in columns.items()},
            **whole,
        }
        for index, (x, y) in enumerate(path.xy_px)
    ]
