"""The flags of the verbs that take scanpaths of any program, and how the files are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from heed_core.arrays import load_array
from heed_core.errors import InputError
from heed_gaze.comparison.pairs import Labels, PairSettings
from heed_gaze.comparison.scoring import CompareSettings
from heed_gaze.metrics.scanmatch import ScanMatch
from heed_gaze.metrics.simplification import Simplification
from heed_gaze.readers.pictures import is_picture, opened
from heed_gaze.readers.reading import read_scanpaths
from heed_gaze.readers.trials import OnError, Policy, ReadOptions
from heed_runtime.options import CommonOptions, Flag, OptionalPath

if TYPE_CHECKING:
    from heed_gaze.scanpaths import ScanpathSet

DataPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]


@dataclass(frozen=True, kw_only=True)
class DataOptions(CommonOptions):
    """How scanpaths are read."""

    images: OptionalPath = None
    """The folder of the pictures; without it, beside the data."""
    size: tuple[int, int] | None = None
    """Width and height in pixels that positions refer to; without it, what the files say, else
    the size of the pictures."""
    split: str = ""
    """Only this part of the data: train, val, test."""
    outside: Policy = "stop"
    """What to do with a fixation off the picture: stop, drop it, clip it to the border, keep it."""
    on_error: OnError = "stop"
    """What to do with a scanpath that cannot be used."""

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"--size must be positive, got {self.size}")

    def read(self, path: Path) -> ScanpathSet:
        """The scanpaths of a file or folder."""
        options = ReadOptions(
            on_error=self.on_error, outside=self.outside, size_px=self.size, images=self.images
        )
        return read_scanpaths(path, options)


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DataOptions):
    """How scanpaths are scored."""

    px_per_degree: float | None = None
    """Pixels of one degree of visual angle; without it a picture counts as 32 degrees wide."""
    scanmatch: ScanMatch = field(default_factory=ScanMatch)
    simplify: Flag = False
    """Merge small saccades and straight runs before MultiMatch."""
    labels: OptionalPath = None
    """A folder of PNG or .npy files, named as the pictures, with the class of every pixel, for the
    semantic sequence score."""
    no_maps: Flag = False
    """Leave out the scores of scanpaths as maps (NSS, AUC, ...)."""
    seed: int = 0
    """Of chance and of the bootstrap."""
    resamples: int = 2000
    """Bootstrap samples of the intervals."""
    out: OptionalPath = None
    """Also write tables, JSON and plots into this folder."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.px_per_degree is not None and self.px_per_degree <= 0:
            raise ValueError(f"--px-per-degree must be positive, got {self.px_per_degree}")
        if self.resamples < 1:
            raise ValueError(f"--resamples must be positive, got {self.resamples}")

    def settings(self, width_px: int) -> CompareSettings:
        """The settings for pictures of a width."""
        pairs = PairSettings(
            scanmatch=self.scanmatch, simplification=Simplification() if self.simplify else None
        )
        if self.px_per_degree is not None:
            pairs = PairSettings(
                scanmatch=pairs.scanmatch,
                simplification=pairs.simplification,
                degree=self.px_per_degree / width_px,
            )
        return CompareSettings(
            pairs=pairs, maps=not self.no_maps, seed=self.seed, resamples=self.resamples
        )


def read_labels(folder: Path | None) -> dict[str, Labels]:
    """Maps of classes by the stem of their picture.

    Raises:
        InputError: There are none, or one is no map of whole numbers.
    """
    if folder is None:
        return {}
    if not folder.is_dir():
        raise InputError("no such folder", path=folder, remedy="check the path")
    files = [p for p in sorted(folder.iterdir()) if p.suffix == ".npy" or is_picture(p)]
    if not files:
        raise InputError("holds no PNG or .npy", path=folder, remedy="give a folder of class maps")
    return {path.stem: _label_map(path) for path in files}


def _label_map(path: Path) -> Labels:
    if path.suffix != ".npy":
        with opened(path) as picture:
            values = np.asarray(picture)
    else:
        values = load_array(path)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise InputError(
            f"must be (rows, columns) of whole numbers, it is {values.shape} of {values.dtype}",
            path=path,
            remedy="write one class per pixel, not colours",
        )
    return np.asarray(values)
