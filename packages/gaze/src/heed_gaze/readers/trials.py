"""One trial of any file: checked, in pixels and seconds.

A reader yields its trials; one that cannot be used is yielded as the `InputError` that says why,
so that whoever collects them may stop or go on. What spoils the whole file is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_gaze.readers.pictures import picture_size
from heed_gaze.scanpaths import Scanpath, ScanpathSet, Size

Trials = Iterator[Scanpath | InputError]
Policy = Literal["stop", "drop", "clip", "keep"]
OnError = Literal["stop", "skip"]
Facts = Mapping[str, object]
LARGEST_SIDE = 1_000_000
"""Of a picture, in pixels."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What is done with what is wrong.

    Example:
        >>> ReadOptions(outside="drop").on_error
        'stop'
    """

    on_error: OnError = "stop"
    """A trial that cannot be used: stop raises, skip leaves it out and lists it."""
    outside: Policy = "stop"
    """A fixation off the picture: stop makes its trial unusable, drop removes the fixation, clip
    moves it to the border, keep leaves it where it is."""
    size_px: Size | None = None
    """Width and height that all positions refer to; None: what the file says, else what is usual
    for its layout, else of the picture files."""
    images: Path | None = None
    """The folder of the pictures; None: beside the file."""

    def __post_init__(self) -> None:
        if self.size_px is not None and min(self.size_px) < 1:
            raise ValueError(f"size_px must be positive, got {self.size_px}")


def build_trial(
    path: Path,
    place: str,
    facts: Facts,
    *,
    x: object,
    y: object,
    duration: object = None,
    onset: object = None,
    objects: object = None,
    seconds: float = 1.0,
) -> Scanpath | InputError:
    """Make a scanpath of what a file says, or the error that says why not.

    Args:
        path: The file, for messages.
        place: The trial in the file, for messages.
        facts: The other fields of `Scanpath`.
        x: Pixels, one per fixation.
        y: Pixels.
        duration: One per fixation; None: the file has none.
        onset: One per fixation; None: the file has none.
        objects: Index of the fixated objects; None: the file has none.
        seconds: Length of the file's unit of time.
    """
    try:
        columns = {"x": _numbers(x, "x"), "y": _numbers(y, "y")}
        if duration is not None:
            columns["duration"] = _numbers(duration, "duration")
        if onset is not None:
            columns["onset"] = _numbers(onset, "onset")
        if objects is not None:
            columns["objects"] = _numbers(objects, "objects")
        _check(columns)
    except ValueError as error:
        return InputError(str(error), path=path, place=place, remedy="correct or remove the trial")
    times = {name: columns[name] * seconds for name in ("duration", "onset") if name in columns}
    return Scanpath(
        xy_px=np.stack([columns["x"], columns["y"]], axis=1),
        duration_s=times.get("duration"),
        onset_s=times.get("onset"),
        objects=columns["objects"].astype(np.int64) if objects is not None else None,
        **facts,  # type: ignore[arg-type]
    )


def size_of(width: object, height: object) -> Size | None:
    """Width and height of a picture in whole pixels; None where one of them is not given.

    Raises:
        ValueError: They are no numbers of pixels.
    """
    if not width or not height:
        return None
    try:
        size = [float(side) for side in (width, height)]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        size = [math.nan]
    if not all(1 <= side <= LARGEST_SIDE for side in size):
        raise ValueError(
            f"width and height must be from 1 to {LARGEST_SIDE} pixels, got {width!r} and "
            f"{height!r}"
        )
    return round(size[0]), round(size[1])


def _numbers(values: object, name: str) -> Float64[np.ndarray, " n"]:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} holds something that is not a number") from None
    if found.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, its shape is {found.shape}")
    return found


def _check(columns: Mapping[str, Float64[np.ndarray, " _"]]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{n} of {name}" for name, n in lengths.items())
        raise ValueError(f"has different numbers of values: {counts}")
    if not lengths["x"]:
        raise ValueError("has no fixation")
    for name, values in columns.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise ValueError(f"fixation {wrong[0] + 1}: {name} is {values[wrong[0]]}")
    for name in {"duration", "objects"} & set(columns):
        negative = np.flatnonzero(columns[name] < 0)
        if len(negative):
            index = int(negative[0])
            raise ValueError(f"fixation {index + 1}: {name} is {columns[name][index]:g}, below 0")


def collect(
    trials: Iterable[Scanpath | InputError],
    options: ReadOptions,
    *,
    path: Path,
    layout: str,
    images: Mapping[str, Path],
    usual_size: Size | None = None,
) -> ScanpathSet:
    """The usable trials of a file or folder.

    Args:
        trials: What a reader yields.
        options: What is done with what is wrong.
        path: The file or folder, for messages.
        layout: Its layout.
        images: Name of a picture -> its file.
        usual_size: Of the pictures, where the file does not say it.

    Raises:
        InputError: A trial that cannot be used under `on_error="stop"`; or nothing is left.
    """

    @cache
    def seen(image: str) -> Size | None:
        file = _file_of(image, images)
        return None if file is None else picture_size(file)

    kept: list[Scanpath] = []
    skipped: list[str] = []
    moved = 0
    for trial in trials:
        found, outside = trial, 0
        if isinstance(found, Scanpath):
            size = options.size_px or found.size_px or usual_size or seen(found.image)
            sized = replace(found, size_px=size)
            outside = 0 if size is None else int(sized.outside().sum())
            found = place_inside(sized, options.outside, path=path)
        if isinstance(found, Scanpath):
            kept.append(found)
            moved += outside
        elif options.on_error == "stop":
            raise found
        else:
            skipped.append(str(found))
    if not kept:
        reason = f" (of {len(skipped)} skipped the first: {skipped[0]})" if skipped else ""
        raise InputError(f"holds no scanpath that can be used{reason}", path=path)
    files = {image: _file_of(image, images) for image in {found.image for found in kept}}
    return ScanpathSet(
        scanpaths=tuple(kept),
        skipped=tuple(skipped),
        layout=layout,
        images={image: file for image, file in files.items() if file is not None},
        notes=outside_notes(moved, options.outside),
    )


def _file_of(image: str, images: Mapping[str, Path]) -> Path | None:
    """The file of a picture that may be named with its folder."""
    return images.get(image) or images.get(Path(image).name)


def place_inside(
    trial: Scanpath, policy: Policy, *, path: Path, place: str | None = None
) -> Scanpath | InputError:
    """A trial of a known size after what `policy` says of fixations off the picture.

    Args:
        trial: Pixels.
        policy: As in `ReadOptions.outside`; all fixations cannot be dropped.
        path: Of the file, for messages.
        place: Of the trial in the file, for messages. None: its name.
    """
    if policy == "keep" or trial.size_px is None or not (outside := trial.outside()).any():
        return trial
    if policy == "clip":
        return replace(trial, xy_px=np.clip(trial.xy_px, 0.0, np.array(trial.size_px, dtype=float)))
    if policy == "drop" and not outside.all():
        return trial.keep(~outside)
    first = int(np.flatnonzero(outside)[0])
    x, y = trial.xy_px[first]
    every = " and so are all others" if policy == "drop" and len(outside) > 1 else ""
    return InputError(
        f"fixation {first + 1} at ({x:g}, {y:g}) is off the picture of "
        f"{trial.size_px[0]} x {trial.size_px[1]} pixels{every}",
        path=path,
        place=trial.name if place is None else place,
        remedy="correct or remove the trial, or move such fixations in with outside=clip"
        if policy == "drop"
        else "leave such fixations out or move them in with outside=drop or clip",
    )


def outside_notes(count: int, policy: Policy) -> tuple[str, ...]:
    """What was done with so many fixations off their picture, in words."""
    done = {"drop": "left out", "clip": "moved to the border", "keep": "kept", "stop": "refused"}
    return (f"{count} fixations off their picture were {done[policy]}",) if count else ()


def text_of(value: object) -> str:
    """A name as text: 3.0 and 3 are both "3", nothing is empty.

    Example:
        >>> text_of(3.0), text_of("dog"), text_of(None)
        ('3', 'dog', '')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
