"""The settings of LiDAR data: which files, which frame, which classes, which part counts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions
from heed_lidar.labels import (
    BUILTIN,
    LabelMap,
    class_texts,
    curb_and_others,
    label_map,
    parse_classes,
    sequence_name,
)
from heed_lidar.regions import parse_region

Layout = Literal["auto", "semantic-kitti", "nrs", "curb-2d", "folder"]
XyTransform = Literal["none", "swap", "rot90", "rot-90", "flip-x", "flip-y"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_TRANSFORMS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "none": ((1, 0), (0, 1)),
    "swap": ((0, 1), (1, 0)),
    "rot90": ((0, -1), (1, 0)),
    "rot-90": ((0, 1), (-1, 0)),
    "flip-x": ((-1, 0), (0, 1)),
    "flip-y": ((1, 0), (0, -1)),
}


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How the frame of another sensor is brought to that of the data that a network learnt."""

    xy_transform: XyTransform = "none"
    """Turns or mirrors the horizontal axes of another sensor's frame to x forward, y left."""
    z_shift: float = 0.0
    """Metres added to z, to bring the road to where training had it (KITTI: about -1.73)."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.z_shift):
            raise ValueError(f"z_shift must be finite, got {self.z_shift}")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(FrameOptions, CloudOptions):
    """How the points of a file are read and brought to x forward, y left, z up.

    The fields of `LidarData` of these names, for what has no classes of its own.
    """

    def __post_init__(self) -> None:
        FrameOptions.__post_init__(self)
        CloudOptions.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class LidarData(FrameOptions):
    """How files become scans and classes."""

    layout: Layout = "auto"
    """How the folder is laid out. semantic-kitti: sequences/SS/velodyne/*.bin and labels/*.label;
    nrs: the same tree from another sensor, without an official split, whose labels tell curb (3)
    from everything else unless `labels` is a file; curb-2d: sequences/SS/curb/*.txt with rows
    x y curb_id beside velodyne; folder: scans of any format, and beside them or in labels/ their
    .label files where there are some."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken scan does: stop, or be skipped, counted and listed."""
    labels: str = "curb"
    """The classes: curb (curb, road, sidewalk, others), curb-only (curb, others), nrs,
    semantic-kitti (19 classes), or a file like semantic-kitti.yaml."""
    classes: tuple[str, ...] = ()
    """The label map itself, each class name=written:read,read#rrggbb, ignore first; training fills
    it in from the file that `labels` names. Empty: as `labels` says."""
    labels_folder: str = "labels"
    """The folder of a sequence that holds its labels; another name uses derived labels."""
    train: tuple[str, ...] = ()
    """Names of the sequences for training. Empty: the official split of the label map."""
    val: tuple[str, ...] = ()
    """Names of the sequences for validation. Empty: the official split of the label map."""
    test: tuple[str, ...] = ()
    """Names of the sequences for testing. Empty: the official split of the label map."""
    columns: tuple[str, ...] = ()
    """Columns of files that do not name them. Empty: x y z intensity, for .pcd.bin also ring."""
    intensity_scale: float | None = None
    """Intensities are divided by this. None: by 255 where the file holds values above 1, by 65535
    where it holds 16-bit numbers."""
    keep_zeros: bool = False
    """Keep points at exactly (0, 0, 0), which most files use for beams without a return."""
    origin: tuple[float, float, float] | None = None
    """Where the sensor stood in the file's coordinates. None: at 0, or, where they are a map's
    (beyond 10 km), at the first point rounded to 100 m."""
    topic: str | None = None
    """The topic of a recording. None: its only one with point clouds."""
    crop: str = "all"
    """The part of a training scan that is used: all, forward, forward:RANGE or x0:x1,y0:y1."""
    roi: str = "forward"
    """The part that counts in the scores, written as crop; forward: x > 0, up to 50 m."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels_folder or Path(self.labels_folder).name != self.labels_folder:
            raise ValueError(f"labels_folder must be a folder's name, got {self.labels_folder!r}")
        for name in ("crop", "roi"):
            try:
                parse_region(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        self._check_splits()
        if self.classes:
            parse_classes(self.classes)
        _ = self.options

    def _check_splits(self) -> None:
        seen: dict[str, str] = {}
        for split in SPLITS:
            for sequence in map(sequence_name, getattr(self, split)):
                if seen.setdefault(sequence, split) != split:
                    raise ValueError(
                        f"{split} must not share sequences with {seen[sequence]}, got {sequence}"
                    )

    @property
    def options(self) -> CloudOptions:
        """How files of points are read."""
        return CloudOptions(
            columns=self.columns,
            intensity_scale=self.intensity_scale,
            keep_zeros=self.keep_zeros,
            origin=self.origin,
            topic=self.topic,
        )

    @property
    def label_map(self) -> LabelMap:
        """The classes; reads the file where `labels` names one and `classes` is empty.

        Raises:
            InputError: The file is no label map.
        """
        return parse_classes(self.classes) if self.classes else label_map(self.labels)

    @property
    def labels_read(self) -> LabelMap:
        """How labels on disk become these classes: those of NRS in its own way.

        Raises:
            InputError: As `label_map`; the layout is nrs and there is no class curb or others.
        """
        nrs = self.layout == "nrs" and self.labels in BUILTIN
        return curb_and_others(self.label_map) if nrs else self.label_map

    def sequences(self, split: str) -> tuple[str, ...]:
        """The sequences of a split: those of the settings, else the official ones.

        Once a split is given in the settings, the others no longer take its sequences.
        """
        given: dict[str, tuple[str, ...]] = {
            name: tuple(map(sequence_name, getattr(self, name))) for name in SPLITS
        }
        if given[split]:
            return given[split]
        taken = {sequence for names in given.values() for sequence in names}
        if self.layout == "nrs":
            return ()
        return tuple(s for s in self.label_map.split.get(split, ()) if s not in taken)


def plan_data(data: LidarData) -> LidarData:
    """Settle what a label map's file says, so that a trained model needs the file no more.

    Raises:
        InputError: The label map cannot be read, or has classes that labels of NRS do not tell.
    """
    read = set(data.labels_read.to_class.values())
    if data.layout == "nrs" and not read.issuperset(range(1, len(data.label_map))):
        raise InputError(
            f"the layout nrs has labels of curb and others alone, the classes {data.labels!r} more",
            remedy="use --data.labels nrs",
        )
    if data.classes or data.labels in BUILTIN:
        return data
    settled = data.label_map
    splits = {name: data.sequences(name) for name in SPLITS}
    return replace(
        data,
        classes=class_texts(settled),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
    )


def to_sensor_frame(
    xyz: Float64[np.ndarray, "n 3"], data: FrameOptions
) -> Float64[np.ndarray, "n 3"]:
    """Turn and shift a cloud as `xy_transform` and `z_shift` say."""
    matrix = np.eye(3)
    matrix[:2, :2] = _TRANSFORMS[data.xy_transform]
    moved = xyz @ matrix.T
    moved[:, 2] += data.z_shift
    return np.asarray(moved)


def to_file_frame(
    xyz: Float64[np.ndarray, "n 3"],
    data: FrameOptions,
    *,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Float64[np.ndarray, "n 3"]:
    """Undo `to_sensor_frame` and the shift of the origin: the coordinates of the file."""
    matrix = np.eye(3)
    matrix[:2, :2] = _TRANSFORMS[data.xy_transform]
    moved = (xyz - np.array([0.0, 0.0, data.z_shift])) @ matrix
    return np.asarray(moved + np.array(origin))
