"""The settings that the systems of this app share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from heed_core.errors import InputError
from heed_lidar.augmentation import Augmentation, Crop
from heed_lidar.curves import CurbFitting
from heed_lidar.geodesy import Origin
from heed_lidar.losses import RegionLoss, VoxelLoss
from heed_lidar.regions import Region, parse_region
from heed_lidar.settings import LidarData, plan_data

Output = Literal["label", "ply", "csv", "geojson", "osm", "birds-eye", "view"]
OUTPUTS: tuple[Output, ...] = ("label", "ply", "csv", "geojson", "birds-eye", "view")

CHANGEABLE = tuple(
    f"data.{name}"
    for name in (
        *("layout", "on_error", "labels_folder", "train", "val", "test"),
        *("roi", "tolerances_m", "distance"),
        *("columns", "intensity_scale", "keep_zeros", "origin", "topic", "xy_transform", "z_shift"),
        *("write", "map_origin"),
    )
)
"""What a use of a trained run may set otherwise: how files are read, what counts, what is written;
not the classes."""


@dataclass(frozen=True, kw_only=True)
class ToleranceOptions:
    """How near to a true curb point a curb point has to be, wherever curbs are scored."""

    tolerances_m: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)
    """Distances at which a curb point still counts as found; 0 is the strict score."""
    distance: Literal["xy", "xyz"] = "xy"
    """Whether these distances are measured in the plane or in space."""

    def __post_init__(self) -> None:
        if any(not 0 <= tolerance < math.inf for tolerance in self.tolerances_m):
            raise ValueError(f"tolerances_m must not be negative, got {self.tolerances_m}")


@dataclass(frozen=True, kw_only=True)
class StreetData(ToleranceOptions, LidarData):
    """How files become scans and classes, and results become files."""

    write: tuple[Output, ...] = OUTPUTS
    """What predict writes of each scan. label: a class per row of the file; ply: coloured points;
    csv, geojson, osm: curbs as lines; birds-eye, view: pictures from above and in perspective."""
    map_origin: str | None = None
    """Where the origin of the files' coordinates lies on the earth: LATITUDE,LONGITUDE (degrees),
    then optionally ,HEIGHT (metres) and ,YAW (degrees from east to x, anticlockwise). None: geojson
    is in metres."""

    def __post_init__(self) -> None:
        ToleranceOptions.__post_init__(self)
        LidarData.__post_init__(self)
        if not self.write or len(set(self.write)) < len(self.write):
            raise ValueError(f"write must name different kinds of files, got {self.write}")
        if self.map_origin is not None:
            Origin.parse(self.map_origin)
        elif "osm" in self.write:
            raise ValueError("write osm needs map_origin: its nodes are longitude and latitude")

    @property
    def region(self) -> Region:
        """The part that counts in the scores."""
        return parse_region(self.roi)

    @property
    def earth(self) -> Origin | None:
        """The origin of maps."""
        return None if self.map_origin is None else Origin.parse(self.map_origin)


@dataclass(frozen=True, kw_only=True)
class NetworkData(StreetData):
    """The same, and how the curb points of a network become curbs."""

    curves: CurbFitting = field(default_factory=CurbFitting)
    clean: bool = True
    """Give another class to curb points that lie on no curve."""
    revert: Literal["second", "others"] = "second"
    """Which one. second: their second most probable class; others: the class of that name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.revert != "second" and not self.clean:
            raise ValueError("revert has no effect without clean")


@dataclass(frozen=True, kw_only=True)
class NetworkTraining:
    """The loss and its minimisation."""

    voxel_loss: VoxelLoss = "ace"
    """Of each voxel: ace is cross-entropy that weighs rare classes and unsure voxels more."""
    region_loss: RegionLoss = "lovasz"
    """Of each class: lovasz is a convex form of 1 - IoU."""
    loss_over: Literal["scan", "batch"] = "scan"
    """scan: the mean of the losses of the scans, so that a scan with few voxels counts as much as
    any other and several processes add up to one. batch: one loss of all voxels of a process, as
    published; classes of the region loss are then those of the whole batch."""
    gamma: float = 2.0
    """Of ace: how much unsure voxels count more, for a class that is everywhere."""
    gamma_slope: float = 1.0
    """Of ace: how much more so for a rare class."""
    delta: float = 1.02
    """Of ace: a class of share eta weighs 1 / log(delta + eta); above 1."""
    class_counts: tuple[int, ...] = ()
    """Of ace: points of each class in the training labels; training counts them if empty."""
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-3
    """At the start, for the batch that rate_batch names."""
    rate_batch: int | None = None
    """Scans per step (batch times accumulate) that learning_rate is meant for; another number of
    scans multiplies it by the square root of the ratio. None: it holds for every batch."""
    weight_decay: float = 0.0
    """Of adamw."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls to a hundredth over the training."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    cut: Crop = field(default_factory=lambda: Crop(range_m=math.inf, sector_deg=360.0))
    """A part of each training scan, after data.crop and before the augmentation: all of it. With
    facing random a sector of it, another one in each epoch, for machines that cannot hold more."""

    def __post_init__(self) -> None:
        if self.cut.facing == "random" and self.cut.sector_deg == 360:
            raise ValueError("cut.facing=random has no effect with cut.sector_deg=360")
        if self.voxel_loss == self.region_loss == "none":
            raise ValueError("voxel_loss and region_loss are both none: nothing would be learnt")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.rate_batch is not None and self.rate_batch < 1:
            raise ValueError(f"rate_batch must be at least 1, got {self.rate_batch}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("weight_decay has no effect with optimizer=adam; use adamw")
        if not self.delta > 1:
            raise ValueError(f"delta must be above 1, got {self.delta}")
        if min(self.gamma, self.gamma_slope) < 0:
            raise ValueError("gamma and gamma_slope must not be negative")
        if any(count < 0 for count in self.class_counts):
            raise ValueError(f"class_counts must not be negative, got {self.class_counts}")


DataT = TypeVar("DataT", bound=LidarData)


@contextlib.contextmanager
def own_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Let the faults of a verb without the settings of a system name the flags that it has.

    Args:
        flags: Flag of a system -> flag of the verb.
    """
    try:
        yield
    except InputError as error:
        remedy = error.remedy or ""
        for theirs, own in flags.items():
            remedy = remedy.replace(theirs, own)
        raise InputError(
            error.problem, path=error.path, place=error.place, remedy=remedy or None
        ) from error


def settle(data: DataT) -> DataT:
    """Settle what the label map's file says; see `plan_data`."""
    settled = plan_data(data)
    assert isinstance(settled, type(data))
    return settled
