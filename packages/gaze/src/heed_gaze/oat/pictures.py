"""The crops of a layout's objects, and batches of trials made of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from heed_gaze.oat.network import NO_TARGET, PAD, STOP, Scenes
from heed_gaze.oat.shelves import Layout, Trial
from heed_gaze.readers.pictures import read_picture

Pixels = Literal["unit", "bgr-255", "min-max"]
"""unit: RGB / 255; bgr-255: BGR, 0 to 255; min-max: RGB, each crop scaled to 0 ... 1. The last two
are what the paper's code did with the Amazon collages and with its own shelves."""
Crops = UInt8[np.ndarray, "_ _ _ 3"]


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """How crops are cut."""

    size: tuple[int, int] | None = (150, 93)
    """Height and width to which crops are resized; None: the median of the layout's boxes, which
    needs spatial pyramid pooling."""
    legacy_pixels: Pixels = "unit"
    cache_mb: int = 512
    """Memory for the crops of layouts that were read."""

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size}")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {self.cache_mb}")


def read_layout_picture(layout: Layout) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a layout.

    Raises:
        InputError: There is none, it cannot be read, or it is of another size than the layout says.
    """
    if layout.image is None or not layout.image.is_file():
        raise layout.fault("has no picture", "put it beside the trials")
    picture = read_picture(layout.image)
    if picture.shape[1::-1] != layout.size_px:
        width, height = picture.shape[1::-1]
        # Boxes of a screen apply to a smaller copy of the picture too, if its shape is the same.
        if abs(width / height - layout.size_px[0] / layout.size_px[1]) > 0.01:
            raise layout.fault(
                f"has boxes on {layout.size_px[0]} x {layout.size_px[1]} pixels, its picture has "
                f"{width} x {height}",
                "give the picture that the boxes belong to",
            )
    return picture


def cut_crops(
    picture: UInt8[np.ndarray, "h w 3"], layout: Layout, size: tuple[int, int] | None
) -> Crops:
    """The crop of every box, resized to one size (height, width)."""
    import cv2

    scale = np.array(picture.shape[1::-1]) / np.array(layout.size_px)
    corners = np.rint(layout.boxes * np.tile(scale, 2)).astype(int)
    limit = np.array([*picture.shape[1::-1]] * 2)
    corners = np.clip(corners, 0, limit - [1, 1, 0, 0])
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1)
    if size is None:
        sides = np.median(corners[:, 2:] - corners[:, :2], axis=0)
        size = (int(sides[1]), int(sides[0]))
    crops = []
    for x0, y0, x1, y1 in corners.tolist():
        crop = picture[y0:y1, x0:x1]
        shrinks = crop.shape[0] >= size[0] and crop.shape[1] >= size[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        crops.append(cv2.resize(crop, (size[1], size[0]), interpolation=how))
    return np.stack(crops).astype(np.uint8)


def as_input(crops: Crops, pixels: Pixels) -> Float[Tensor, "n 3 h w"]:
    """Crops as the network takes them."""
    x = torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float()
    if pixels == "bgr-255":
        return x.flip(1)
    if pixels == "min-max":
        low, high = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp(min=1)
    return x / 255


class CropStore:
    """Crops of layouts; those used last stay in memory.

    Args:
        options: How they are cut.
    """

    def __init__(self, options: CropOptions) -> None:
        self.options = options
        self._kept: OrderedDict[str, Crops] = OrderedDict()
        self._bytes = 0

    def crops(self, layout: Layout) -> Crops:
        """The crops of a layout.

        Raises:
            InputError: Its picture cannot be read.
        """
        if layout.name in self._kept:
            self._kept.move_to_end(layout.name)
            return self._kept[layout.name]
        crops = cut_crops(read_layout_picture(layout), layout, self.options.size)
        self._kept[layout.name] = crops
        self._bytes += crops.nbytes
        while self._bytes > self.options.cache_mb * 2**20 and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        if self._bytes > self.options.cache_mb * 2**20:
            self._bytes -= self._kept.pop(layout.name).nbytes
        return crops


@dataclass(frozen=True, eq=False)
class Sample:
    """One trial with the crops of its layout."""

    layout: Layout
    crops: Crops
    trial: Trial
    pixels: Pixels = "unit"


@dataclass(frozen=True, kw_only=True)
class TrialBatch:
    """Trials padded to the same number of objects and of fixations."""

    scenes: Scenes
    scene: Int64[Tensor, " b"]
    """Which of the scenes each trial saw."""
    target: Int64[Tensor, " b"]
    scanpath: Int64[Tensor, "b t"]
    """Objects; shorter ones end with STOP (N) and go on with PAD (N + 1)."""
    group: Int64[Tensor, " b"]
    """Which group of layouts each trial is of, counted within the batch."""

    def to(self, device: torch.device | str) -> TrialBatch:
        """The batch on another device."""
        return TrialBatch(
            scenes=self.scenes.to(device),
            scene=self.scene.to(device),
            target=self.target.to(device),
            scanpath=self.scanpath.to(device),
            group=self.group.to(device),
        )

    @property
    def wanted(self) -> Int64[Tensor, "b t1"]:
        """What follows each step: the scanpath, then STOP, then PAD."""
        objects = self.scenes.present.shape[1]
        last = torch.full_like(self.scanpath[:, :1], objects + PAD)
        ids = torch.cat([self.scanpath, last], dim=1)
        # A path that fills its row stops after it; shorter ones hold their STOP already.
        full = self.scanpath[:, -1] < objects
        ids[full, -1] = objects + STOP
        return ids


def make_scenes(samples: Sequence[tuple[Layout, Crops]], pixels: Pixels) -> Scenes:
    """The scenes of layouts, padded to the same number of objects."""
    most = max(len(layout) for layout, _ in samples)
    cells = torch.zeros(len(samples), most, 2, dtype=torch.long)
    present = torch.zeros(len(samples), most, dtype=torch.bool)
    for number, (layout, _) in enumerate(samples):
        cells[number, : len(layout)] = torch.from_numpy(layout.cells)
        present[number, : len(layout)] = True
    shape = torch.tensor([[layout.rows, layout.columns] for layout, _ in samples])
    crops = tuple(as_input(crops, pixels) for _, crops in samples)
    return Scenes(crops=crops, cells=cells, shape=shape, present=present)


def make_batch(samples: Sequence[Sample]) -> TrialBatch:
    """Join trials; a layout that several of them saw is there once."""
    names = list(dict.fromkeys(sample.layout.name for sample in samples))
    groups = list(dict.fromkeys(sample.layout.group for sample in samples))
    first = {sample.layout.name: (sample.layout, sample.crops) for sample in samples}
    scenes = make_scenes([first[name] for name in names], samples[0].pixels)
    return TrialBatch(
        scenes=scenes,
        scene=torch.tensor([names.index(sample.layout.name) for sample in samples]),
        target=torch.tensor([sample.trial.target for sample in samples]),
        scanpath=pad_paths([s.trial.objects for s in samples], scenes.present.shape[1]),
        group=torch.tensor([groups.index(sample.layout.group) for sample in samples]),
    )


def pad_paths(paths: Sequence[Int64[np.ndarray, " _"]], objects: int) -> Int64[Tensor, "b t"]:
    """Scanpaths in one table: the objects, then STOP, then PAD; the longest has no STOP."""
    longest = max(len(path) for path in paths)
    table = torch.full((len(paths), longest), objects + PAD)
    for row, path in zip(table, paths, strict=True):
        row[: len(path)] = torch.from_numpy(path)
        row[len(path) : len(path) + 1] = objects + STOP
    return table


def check_table_rows(trial: Trial, layout: Layout, table_rows: int) -> None:
    """Refuse a grid that the position table of a network is too short for.

    Raises:
        InputError: Names the trial.
    """
    needed = max(layout.rows + 1, layout.columns, 2)
    if needed > table_rows:
        raise layout.fault(
            f"({trial.name}) has {layout.rows} rows and {layout.columns} columns, which need "
            f"{needed} rows of the position table; the network has {table_rows}",
            f"train with --model.table-rows {needed}",
        )


def has_target(trial: Trial) -> bool:
    """Whether something was looked for."""
    return trial.target != NO_TARGET
