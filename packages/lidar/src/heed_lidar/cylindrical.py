"""Cylindrical voxels (Zhu et al., CVPR 2021, arXiv 2011.10033): points to cells of (rho, phi, z).

A point (x, y, z) has the cylindrical coordinates

    p = (rho, phi, z) = (sqrt(x^2 + y^2), atan2(y, x), z)
    cell = (high - low) / (shape - 1)
    index = floor((clip(p, low, high) - low) / cell)
    centre = low + (index + 0.5) * cell

and the nine features [p - centre, p, x, y, remission]. The cell follows the published code: it
divides by `shape - 1`, so that only a point on the upper bound reaches the last index. The order of
the features is that of published weights.

Polar coordinates are computed in the precision of `xyz` (published arrays are float32, which moves
two of 100,000 points to the next cell), everything behind them in float64, and the features are
rounded to float32 at the end. phi = -pi and phi = pi are not neighbours, as published, unless the
grid is told to wrap: then `shape` cells fill the circle and convolutions go round it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64, Integer
from torch import Tensor

OutOfRange = Literal["clip", "drop"]
POINT_FEATURES = 9
_FURTHEST_M = 1e6  # what lies beyond is no measurement, and would not be finite in float32


@dataclass(frozen=True, kw_only=True)
class CylindricalGrid:
    """The cells around the sensor, in the order rho, phi, z."""

    shape: tuple[int, int, int] = (480, 360, 32)
    """Cells along rho, phi and z."""
    low: tuple[float, float, float] = (0.0, -math.pi, -4.0)
    """Lowest rho (metres), phi (radians) and z (metres, from the sensor)."""
    high: tuple[float, float, float] = (50.0, math.pi, 2.0)
    """Highest rho (metres), phi (radians) and z (metres, from the sensor)."""
    out_of_range: OutOfRange = "clip"
    """What happens to points outside: clip moves them to the nearest border cell, as published;
    drop leaves them without a class."""
    wrap_phi: bool = False
    """Let the last cells along phi be neighbours of the first. Published weights know no such
    neighbours."""

    def __post_init__(self) -> None:
        """Refuse what has no cells, naming the setting."""
        if min(self.shape) < 2:
            raise ValueError(f"shape must be at least 2 cells per axis, got {self.shape}")
        if not all(low < high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low must be below high on every axis, got {self.low}, {self.high}")
        if self.out_of_range not in get_args(OutOfRange):
            allowed = " or ".join(get_args(OutOfRange))
            raise ValueError(f"out_of_range must be {allowed}, got {self.out_of_range!r}")
        turn = self.high[1] - self.low[1]
        if self.wrap_phi and not math.isclose(turn, 2 * math.pi, abs_tol=1e-6):
            raise ValueError(f"wrap_phi needs phi to span 2 pi, got {turn:.6g}")

    @property
    def cell(self) -> Float64[np.ndarray, "3"]:
        """Size of a cell in metres, radians and metres."""
        rho, phi, z = self.shape
        steps = (rho - 1, phi if self.wrap_phi else phi - 1, z - 1)
        size: np.ndarray = np.subtract(self.high, self.low) / steps
        return size

    @property
    def circular(self) -> tuple[int, ...]:
        """The axes of the cells that are circles, as `SparseTensor` takes them."""
        return (1,) if self.wrap_phi else ()

    def inside(self, xyz: Float[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        """Which points lie within the bounds, bounds included."""
        polar = to_polar(xyz)
        within: Bool[np.ndarray, " n"] = np.all(
            (polar >= np.asarray(self.low)) & (polar <= np.asarray(self.high)), axis=1
        )
        return within


def to_polar(xyz: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Rows of rho (metres), phi (radians, -pi to pi) and z (metres), in the precision of `xyz`."""
    x, y, z = xyz[:, 0], xyz[:, 1], xyz[:, 2]
    return np.stack([np.sqrt(x**2 + y**2), np.arctan2(y, x), z], axis=1)


def voxelise(
    xyz: Float[np.ndarray, "n 3"],
    intensity: Float[np.ndarray, " n"] | None,
    grid: CylindricalGrid,
) -> tuple[Float32[np.ndarray, "k 9"], Int32[np.ndarray, "k 3"]]:
    """The features of points and the cells that they lie in.

    Args:
        xyz: Finite points in metres, in the sensor's frame.
        intensity: Remission in [0, 1]; None stands for 0.
        grid: The cells.

    Returns:
        Features (p - centre, p, x, y, remission) and index (rho, phi, z), one row per point. A
        grid that drops points leaves out the rows that `grid.inside(xyz)` denies.
    """
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"xyz must be (points, 3), got {xyz.shape}")
    if intensity is not None and intensity.shape != xyz.shape[:1]:
        raise ValueError(f"intensity must be ({xyz.shape[0]},), got {intensity.shape}")
    if grid.out_of_range == "drop":
        inside = grid.inside(xyz)
        xyz = xyz[inside]
        intensity = None if intensity is None else intensity[inside]
    low, high, cell = np.asarray(grid.low), np.asarray(grid.high), grid.cell
    xyz = np.clip(xyz, -_FURTHEST_M, _FURTHEST_M)
    polar = to_polar(xyz).astype(np.float64, copy=False)
    index = np.floor((np.clip(polar, low, high) - low) / cell)
    if grid.wrap_phi:  # phi = pi is the end of the last cell
        index[:, 1] = np.minimum(index[:, 1], grid.shape[1] - 1)
    features = np.zeros((len(xyz), POINT_FEATURES), np.float32)
    features[:, :3] = polar - ((index + 0.5) * cell + low)
    features[:, 3:6] = polar
    features[:, 6:8] = xyz[:, :2]
    if intensity is not None:
        features[:, 8] = intensity
    return features, index.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class PointBatch:
    """The points of several scans, one after the other, as the networks take them."""

    points: Float[Tensor, "p 9"]
    """Features of `voxelise`."""
    index: Integer[Tensor, "p 4"]
    """Cell of every point: number of the scan in the batch, rho, phi, z."""
    counts: tuple[int, ...]
    """Points of each scan."""
    classes: Int64[Tensor, " p"] | None = None
    """Class of every point, 0 where it counts for nothing."""

    @property
    def size(self) -> int:
        """Scans in the batch."""
        return len(self.counts)

    def to(self, device: torch.device | str) -> "PointBatch":
        """The batch on a device."""
        classes = None if self.classes is None else self.classes.to(device)
        return PointBatch(
            points=self.points.to(device),
            index=self.index.to(device),
            counts=self.counts,
            classes=classes,
        )


def collate(
    scans: Sequence[tuple[Float32[np.ndarray, "_ 9"], Int32[np.ndarray, "_ 3"]]],
    classes: Sequence[Int64[np.ndarray, " _"]] | None = None,
) -> PointBatch:
    """One batch of several voxelised scans; a scan may be empty.

    Args:
        scans: What `voxelise` gave for each.
        classes: Class of the points of each scan.

    Raises:
        ValueError: There is no scan, or classes and points differ in number.
    """
    if not scans:
        raise ValueError("a batch needs at least one scan, got none")
    counts = tuple(len(features) for features, _ in scans)
    if classes is not None and tuple(len(of_scan) for of_scan in classes) != counts:
        found = [len(of_scan) for of_scan in classes]
        raise ValueError(f"classes must have one entry per point: {list(counts)}, got {found}")
    number = np.repeat(np.arange(len(scans), dtype=np.int32), counts)
    cells = np.concatenate([index for _, index in scans])
    return PointBatch(
        points=torch.from_numpy(np.concatenate([features for features, _ in scans])),
        index=torch.from_numpy(np.column_stack([number, cells])),
        counts=counts,
        classes=None if classes is None else torch.from_numpy(np.concatenate(classes)),
    )


def voxel_labels(
    classes: Int64[Tensor, " p"],
    voxel_of_point: Int64[Tensor, " p"],
    *,
    num_voxels: int,
    num_classes: int,
) -> Int64[Tensor, " v"]:
    """The class of most points of each voxel; of equally many the smallest.

    Class 0 votes as every other. A voxel without points gets 0.

    Args:
        classes: Class of every point, 0 to num_classes - 1.
        voxel_of_point: Voxel of every point.
        num_voxels: How many voxels there are.
        num_classes: How many classes there are.
    """
    pairs = voxel_of_point * num_classes + classes
    votes = torch.bincount(pairs, minlength=num_voxels * num_classes)
    # The second term makes every entry of a row differ, so that the maximum is one.
    rank = torch.arange(num_classes - 1, -1, -1, device=votes.device)
    return (votes.reshape(num_voxels, num_classes) * num_classes + rank).argmax(dim=1)
