"""A point cloud, and the rules that make one of the columns of any file."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped

from heed_core.errors import InputError

logger = logging.getLogger(__name__)

INTENSITY_NAMES = ("intensity", "reflectivity", "remission", "reflectance", "i", "scalar_intensity")
RING_NAMES = ("ring", "channel", "laser_id", "line", "scalar_ring")
TIME_NAMES = ("time", "t", "timestamp", "gps_time", "scalar_time")

FAR_M = 10_000.0
"""Coordinates beyond this are a map's, not a sensor's: the origin is moved before they are used."""
ORIGIN_STEP_M = 100.0
NOWHERE_M = 1e9
"""No frame of coordinates reaches this far: drivers write such numbers where nothing returned."""
_SHOWN_COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class CloudOptions:
    """How the points of a file are read."""

    columns: tuple[str, ...] = ()
    """Names of the columns of files that do not name them (`.bin`, arrays, text without a header).
    Empty: x y z intensity, and for `.pcd.bin` x y z intensity ring."""
    intensity_scale: float | None = None
    """Intensities are divided by this. None: by 255 where the file holds values above 1, by 65535
    where it holds 16-bit numbers."""
    keep_zeros: bool = False
    """Keep points at exactly (0, 0, 0), which most files use for beams without a return."""
    origin: tuple[float, float, float] | None = None
    """Subtracted from the coordinates. None: nothing, or, where they are a map's (beyond 10 km),
    the first point rounded to 100 m."""
    topic: str | None = None
    """The topic of a recording. None: its only one with point clouds."""

    def __post_init__(self) -> None:
        if self.columns and not {"x", "y", "z"} <= set(self.columns):
            raise ValueError(f"columns must name x, y and z, got {' '.join(self.columns)}")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns must have different names, got {' '.join(self.columns)}")
        if self.intensity_scale is not None and not self.intensity_scale > 0:
            raise ValueError(f"intensity_scale must be positive, got {self.intensity_scale}")
        if self.origin is not None and not np.isfinite(self.origin).all():
            raise ValueError(f"origin must be finite, got {self.origin}")


@dataclass(frozen=True, kw_only=True)
class PointCloud:
    """The points of one scan in the frame of the sensor: x forward, y left, z up, in metres."""

    name: str
    """The file's name without its suffix."""
    xyz: Float64[np.ndarray, "n 3"]
    """Metres; all finite, `origin` subtracted."""
    intensity: Float32[np.ndarray, " n"] | None = None
    """In [0, 1]; None: the file holds none."""
    ring: Int64[np.ndarray, " n"] | None = None
    """Number of the laser that measured the point."""
    time: Float64[np.ndarray, " n"] | None = None
    """When the point was measured, as stored."""
    stamp: float | None = None
    """When the scan was taken, in seconds."""
    frame_id: str | None = None
    """The name of the file's frame of coordinates, of recordings alone."""
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """`xyz + origin` are the coordinates of the file."""
    rows: Int64[np.ndarray, " n"]
    """The row of each point in the file, ascending."""
    rows_in_file: int
    """Rows before any were removed."""
    not_finite: int = 0
    """Rows that were removed because x, y or z is NaN, infinite or at least `NOWHERE_M`."""
    zeros: int = 0
    """Rows that were removed because they lie at (0, 0, 0)."""

    def __post_init__(self) -> None:
        n = len(self.xyz)
        for name in ("intensity", "ring", "time", "rows"):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise ValueError(f"{name} must have the shape ({n},), got {values.shape}")
        if n > self.rows_in_file:
            raise ValueError(f"rows_in_file must be at least {n}, got {self.rows_in_file}")

    def __len__(self) -> int:
        return len(self.xyz)

    def select(self, keep: Bool[np.ndarray, " n"]) -> "PointCloud":
        """The points where `keep` is true; `rows` still count in the file."""
        return PointCloud(
            name=self.name,
            xyz=self.xyz[keep],
            intensity=None if self.intensity is None else self.intensity[keep],
            ring=None if self.ring is None else self.ring[keep],
            time=None if self.time is None else self.time[keep],
            stamp=self.stamp,
            frame_id=self.frame_id,
            origin=self.origin,
            rows=self.rows[keep],
            rows_in_file=self.rows_in_file,
            not_finite=self.not_finite,
            zeros=self.zeros,
        )


@dataclass(frozen=True, kw_only=True)
class FileColumns:
    """What a reader takes from a file: one array per column, not yet cleaned."""

    values: Mapping[str, Shaped[np.ndarray, " n"]]
    stamp: float | None = None
    frame_id: str | None = None
    name: str | None = None
    """Of the cloud; None: the file's."""
    intensity_type: Literal["unknown", "uint16"] = "unknown"
    """uint16: intensities use all of 0..65535, as the format's definition says."""


def cloud_stem(path: Path) -> str:
    """A file's name without its suffix; `.pcd.bin` is one suffix.

    Example:
        >>> cloud_stem(Path("scans/sweep.pcd.bin"))
        'sweep'
    """
    name = path.name
    return name[: -len(".pcd.bin")] if name.lower().endswith(".pcd.bin") else path.stem


def refuse_twice(names: Iterable[str], *, path: Path, place: str | None = None) -> None:
    """Refuse columns of one name, of which only one could be meant; upper case is lower case.

    Raises:
        InputError: It names the column.
    """
    twice = [name for name, count in Counter(name.lower() for name in names).items() if count > 1]
    if twice:
        raise InputError(
            f"has more than one column {twice[0]}",
            path=path,
            place=place,
            remedy="give each column its own name",
        )


def make_cloud(
    found: FileColumns, options: CloudOptions, *, path: Path, allow_empty: bool = False
) -> PointCloud:
    """Clean the columns of a file and put them together.

    Rows with a coordinate that is NaN, infinite or at least `NOWHERE_M` are removed, and rows at
    (0, 0, 0) unless they are to be kept. An intensity that is not finite becomes 0.

    Raises:
        InputError: No column x, y or z; two columns of one name; no point that can be used and
            `allow_empty` is false.
    """
    refuse_twice(found.values, path=path)
    columns = {name.lower(): values for name, values in found.values.items()}
    missing = [axis for axis in "xyz" if axis not in columns]
    if missing:
        names = list(found.values)
        listed = ", ".join(names[:_SHOWN_COLUMNS]) + ", ..." * (len(names) > _SHOWN_COLUMNS)
        raise InputError(
            f"has no column {' and no column '.join(missing)} (it has: {listed})",
            path=path,
            remedy="points need x, y and z; --data.columns names the columns of text",
        )
    raw = np.stack([_doubles(columns[axis]) for axis in "xyz"], axis=1)
    finite = (np.abs(raw) < NOWHERE_M).all(axis=1)  # false of NaN too
    zero = np.zeros_like(finite) if options.keep_zeros else (raw == 0).all(axis=1)
    keep = finite & ~zero
    rows = np.flatnonzero(keep)
    if not len(rows):
        _refuse_empty(path, total=len(raw), allow_empty=allow_empty)
    xyz = raw[keep]
    origin = _origin(xyz, options)
    intensity = _first(columns, INTENSITY_NAMES)
    ring, time = _first(columns, RING_NAMES), _first(columns, TIME_NAMES)
    return PointCloud(
        name=found.name or cloud_stem(path),
        xyz=xyz - np.array(origin),
        intensity=None
        if intensity is None
        else scaled_intensity(intensity[keep], options.intensity_scale, found.intensity_type),
        ring=None if ring is None else _whole(ring[keep]),
        time=None if time is None else _doubles(time[keep]),
        stamp=found.stamp,
        frame_id=found.frame_id,
        origin=origin,
        rows=rows.astype(np.int64),
        rows_in_file=len(raw),
        not_finite=int((~finite).sum()),
        zeros=int(zero.sum()),
    )


def _refuse_empty(path: Path, *, total: int, allow_empty: bool) -> None:
    what = "holds no points" if not total else f"holds no usable point among {total} rows"
    if not allow_empty:
        raise InputError(what, path=path, remedy="give a scan with points")
    logger.warning("%s: %s; its result is empty", path, what)


def _first(
    columns: Mapping[str, Shaped[np.ndarray, " n"]], names: Iterable[str]
) -> Shaped[np.ndarray, " n"] | None:
    return next((columns[name] for name in names if name in columns), None)


def _doubles(values: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    with np.errstate(invalid="ignore"):  # signalling NaNs of damaged files
        return np.asarray(values, dtype=np.float64)


def _whole(values: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Numbers of lasers; what is no number becomes -1."""
    numbers = np.nan_to_num(_doubles(values), nan=-1.0, posinf=-1.0, neginf=-1.0)
    return np.asarray(numbers.clip(-(2**31), 2**31), dtype=np.int64)


def _origin(xyz: Float64[np.ndarray, "n 3"], options: CloudOptions) -> tuple[float, float, float]:
    if options.origin is not None:
        return options.origin
    if not len(xyz) or np.abs(xyz[0]).max() <= FAR_M:
        return (0.0, 0.0, 0.0)
    x, y, z = np.round(xyz[0] / ORIGIN_STEP_M) * ORIGIN_STEP_M
    return float(x), float(y), float(z)


def scaled_intensity(
    values: Shaped[np.ndarray, " n"],
    scale: float | None,
    kind: Literal["unknown", "uint16"] = "unknown",
) -> Float32[np.ndarray, " n"]:
    """Bring intensities into [0, 1].

    Args:
        values: As stored.
        scale: What they are divided by. None: 65535 for 16-bit numbers above 255 or where `kind`
            says so, else 255 where any is above 1, else 1.
        kind: What the file's format says of them.
    """
    numbers = np.nan_to_num(_doubles(values), nan=0.0, posinf=0.0, neginf=0.0)
    highest = numbers.max(initial=0.0)
    if scale is None and (kind == "uint16" or (values.dtype == np.uint16 and highest > 255)):
        scale = 65535.0
    elif scale is None:
        whole_byte = values.dtype == np.uint8
        scale = 255.0 if highest > 1 or whole_byte else 1.0
    return np.asarray(np.clip(numbers / scale, 0.0, 1.0), dtype=np.float32)
