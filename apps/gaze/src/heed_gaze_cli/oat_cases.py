"""What OAT's recipe reads: training trials, and scenes with their viewers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from heed_core.errors import InputError
from heed_gaze.oat.baselines import Reference, learn_reference
from heed_gaze.oat.files import read_shelves
from heed_gaze.oat.importers import ImportOptions
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.pictures import (
    CropOptions,
    Crops,
    CropStore,
    Pixels,
    Sample,
    check_table_rows,
)
from heed_gaze.oat.shelves import Layout, Shelves, Trial, even_boxes, reading_order
from heed_gaze.oat.splits import SplitOptions, split_trials
from heed_gaze.readers.pictures import is_picture, picture_size
from heed_gaze.readers.trials import Policy
from heed_gaze_cli.names import number_repeated


@dataclass(frozen=True, kw_only=True)
class OatData:
    """How files become trials, and trials become scanpaths again."""

    grid: tuple[int, int] = (6, 8)
    """Rows and columns into which pictures without objects are divided."""
    target: int | None = None
    """The object to look for in pictures that come without trials; None: free viewing."""
    outside: Policy = "keep"
    """Fixations off the picture: stop, drop, clip or keep (they go to the nearest object)."""
    longest_sd: float | None = 3.0
    """Leave out imported scanpaths longer than mean + so many standard deviations; None: none."""
    split: SplitOptions = field(default_factory=SplitOptions)
    legacy_pixels: Pixels = "unit"
    """unit: RGB / 255; bgr-255 and min-max: as the paper's code on Amazon and on its shelves."""
    natural_size: bool = False
    """Crops in the size of their boxes instead of `model.crop`; needs `model.spp`."""
    cache_mb: int = 512
    """Memory for the crops of layouts that were read."""
    decode: Literal["greedy", "sample", "beam"] = "greedy"
    """What `predict` and `explain` decode."""
    samples: int = 100
    """Paths drawn per scene: by `evaluate`, and by `predict` with `decode=sample`."""
    temperature: float = 1.0
    """Of the draws."""
    beam_width: int = 5
    """Paths of a beam search."""
    max_len: int | None = None
    """Most objects of a decoded path. None: the longest training scanpath."""
    baselines: bool = True
    """Whether `evaluate` scores searchers without a network too."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a trial or picture that cannot be used."""

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"grid must be at least 1 x 1, got {self.grid}")
        if self.target is not None and self.target < 0:
            raise ValueError(f"target must not be negative, got {self.target}")
        for name in ("samples", "beam_width", "max_len"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {self.cache_mb}")

    @property
    def reading(self) -> ImportOptions:
        """How files are read."""
        return ImportOptions(
            grid=self.grid,
            outside=self.outside,
            longest_sd=self.longest_sd,
            on_error=self.on_error,
        )

    def cropping(self, crop: tuple[int, int]) -> CropOptions:
        """How crops are cut for a network that takes them in one size."""
        return CropOptions(
            size=None if self.natural_size else crop,
            legacy_pixels=self.legacy_pixels,
            cache_mb=self.cache_mb,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One layout with one target, and whoever looked at it."""

    name: str
    layout: Layout
    crops: Crops
    target: int
    target_name: str
    viewers: tuple[Trial, ...]
    """Their trials; none where the scene comes without labels."""
    reference: Reference | None
    """What searchers without a network know; None: they are not asked for."""

    @property
    def paths(self) -> list[np.ndarray]:
        """What the viewers fixated."""
        return [trial.objects for trial in self.viewers]


class SceneSet:
    """Scenes, each read when it is asked for.

    Args:
        groups: The trials of each scene, which agree in layout and target.
        shelves: Where they are from.
        crops: How crops are cut.
        table_rows: Of the network's position table.
        reference: For the searchers without a network.
        labelled: Whether the viewers' trials are given on.
    """

    read_ahead = 2

    def __init__(
        self,
        groups: Sequence[Sequence[Trial]],
        shelves: Shelves,
        *,
        crops: CropOptions,
        table_rows: int,
        reference: Reference | None = None,
        labelled: bool = True,
    ) -> None:
        self.groups, self.shelves, self.store = groups, shelves, CropStore(crops)
        self.table_rows, self.reference, self.labelled = table_rows, reference, labelled
        self.skipped = shelves.skipped
        self.names = number_repeated([scene_name(group[0]) for group in groups])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Scene:
        """Read a scene.

        Raises:
            InputError: Its picture cannot be read, or its grid is larger than the network's table.
        """
        group = self.groups[index]
        layout = self.shelves.layout_of(group[0])
        check_table_rows(group[0], layout, self.table_rows)
        return Scene(
            name=self.names[index],
            layout=layout,
            crops=self.store.crops(layout),
            target=group[0].target,
            target_name=group[0].target_name,
            viewers=tuple(group) if self.labelled else (),
            reference=self.reference,
        )


class TrainingTrials:
    """Training trials; of several groups of layouts one of each at a time, as the paper mixes them.

    Args:
        trials: Of the training split.
        shelves: Where they are from.
        crops: How crops are cut.
        table_rows: Of the network's position table.
    """

    def __init__(
        self, trials: Sequence[Trial], shelves: Shelves, *, crops: CropOptions, table_rows: int
    ) -> None:
        self.shelves, self.store, self.table_rows = shelves, CropStore(crops), table_rows
        self.skipped = shelves.skipped
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(shelves.layout_of(trial).group, []).append(trial)
        self.groups = list(groups.values())

    def __len__(self) -> int:
        return max((len(group) for group in self.groups), default=0)

    def __getitem__(self, index: int) -> tuple[Sample, ...]:
        """One trial of each group; a smaller group begins again.

        Raises:
            InputError: A picture cannot be read, or a grid is larger than the network's table.
        """
        return tuple(self._sample(group[index % len(group)]) for group in self.groups)

    def _sample(self, trial: Trial) -> Sample:
        layout = self.shelves.layout_of(trial)
        check_table_rows(trial, layout, self.table_rows)
        return Sample(layout, self.store.crops(layout), trial, self.store.options.legacy_pixels)


def scene_name(trial: Trial) -> str:
    """A file name for a scene."""
    parts = [Path(trial.layout).stem]
    if trial.target_name:
        parts.append(Path(trial.target_name).stem)
    if trial.target != NO_TARGET:
        parts.append(f"target-{trial.target}")
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts))


def group_scenes(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials of each layout and target together."""
    groups: dict[tuple[str, int, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.layout, trial.target, trial.target_name), []).append(trial)
    return list(groups.values())


def read_split(root: Path, data: OatData, split: str) -> tuple[Shelves, Mapping[str, list[Trial]]]:
    """A data set and its splits, of which one must not be empty.

    Raises:
        InputError: There is no such split, or it has no trials.
    """
    shelves = read_shelves(root, data.reading)
    parts = split_trials(shelves, data.split)
    if split not in parts:
        raise InputError(f"there is no split {split!r}", path=root, remedy="use train, val or test")
    if not parts[split]:
        raise InputError(
            f"no trial of the split {split!r}", path=root, remedy="use another --data.split.rule"
        )
    return shelves, parts


def labelled_scenes(
    root: Path, data: OatData, split: str, *, crop: tuple[int, int], table_rows: int
) -> SceneSet:
    """The scenes of a split with their viewers."""
    shelves, parts = read_split(root, data, split)
    reference = None
    if data.baselines and parts["train"]:
        reference = learn_reference(parts["train"], shelves.layouts)
    return SceneSet(
        group_scenes(parts[split]),
        shelves,
        crops=data.cropping(crop),
        table_rows=table_rows,
        reference=reference,
    )


def given_scenes(
    paths: Sequence[Path], data: OatData, *, crop: tuple[int, int], table_rows: int
) -> SceneSet:
    """The scenes in files and folders, without viewers; a picture alone is divided evenly.

    Raises:
        InputError: A path holds nothing that is known.
    """
    layouts: dict[str, Layout] = {}
    groups: list[list[Trial]] = []
    skipped: list[str] = []
    for path in paths:
        if path.is_file() and is_picture(path):
            layout = _picture_layout(path, data.grid)
            layouts[layout.name] = layout
            groups.append([_unlabelled(layout, data.target)])
            continue
        shelves = read_shelves(path, data.reading)
        layouts.update(shelves.layouts)
        skipped += shelves.skipped
        seen = {trial.layout for trial in shelves.trials}
        groups += group_scenes(shelves.trials)
        rest = [layout for name, layout in shelves.layouts.items() if name not in seen]
        groups += [[_unlabelled(layout, data.target)] for layout in rest]
    return SceneSet(
        groups,
        Shelves(layouts=layouts, trials=(), skipped=tuple(skipped)),
        crops=data.cropping(crop),
        table_rows=table_rows,
        labelled=False,
    )


def _picture_layout(path: Path, grid: tuple[int, int]) -> Layout:
    size = picture_size(path)
    rows, columns = grid
    boxes = even_boxes(size, rows, columns)
    return Layout(
        name=path.name,
        boxes=boxes,
        cells=reading_order(rows, columns, len(boxes)),
        rows=rows,
        columns=columns,
        size_px=size,
        image=path,
    )


def _unlabelled(layout: Layout, target: int | None) -> Trial:
    """A scene without a viewer."""
    trial = Trial(
        layout=layout.name,
        target=NO_TARGET if target is None else target,
        subject="",
        objects=np.zeros(1, dtype=np.int64),
    )
    trial.check(layout, path=layout.image)
    return trial
