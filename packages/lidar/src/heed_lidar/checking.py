"""Read a whole data set and report everything that is broken; tell of one scan what is odd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from heed_core.errors import InputError
from heed_lidar.clouds.bags import Recordings
from heed_lidar.labels import IGNORE, LabelMap
from heed_lidar.layouts import Listing, ScanFile, list_scans
from heed_lidar.regions import parse_region
from heed_lidar.scans import Scan, load_scan
from heed_lidar.settings import SPLITS, LidarData, plan_data

CountRow = Mapping[str, str | int | float | None]
_FEW_POINTS = 1000
_DARK = 0.02
"""Of a scale of 0 to 1: numbers up to 255 on one that ends at 65535 are lower."""
_ROAD_Z_M = (-3.0, -0.5)
"""Where a sensor on a car sees the ground."""


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What a data set holds and what is wrong with it."""

    counts: Sequence[CountRow]
    """One row per split: scans, points, ranges, points per class."""
    problems: Sequence[str]
    """What makes a scan unusable, a line each."""
    warnings: Sequence[str]
    """What is odd and usable."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What is kept of a scan that could be read."""

    file: ScanFile
    points: int
    removed: int
    range_m: float
    """Largest horizontal distance."""
    ground_z_m: float
    """A low quantile of z: about the road's height."""
    intensity: bool
    dark: bool
    """Whether all intensities are below `_DARK`."""
    bright: bool
    """Whether most intensities are at the top of the scale."""
    per_class: tuple[int, ...]
    """Points of each class; empty: no labels."""
    outside: int
    """Points outside of the region that counts."""
    guessed: bool
    """Whether the sensor's place was taken from the coordinates; see `origin_guessed`."""


def check_data(data: LidarData, root: Path) -> DataCheck:
    """Read every scan of every split; whatever is wrong inside the data set becomes a line."""
    try:
        label_map = plan_data(data).label_map
        listing = list_scans(root, replace(data, on_error="skip"))
    except InputError as error:
        return DataCheck(counts=(), problems=(str(error),), warnings=())
    problems = list(listing.problems)
    readings: list[_Reading] = []
    recordings = Recordings()
    for file in listing.scans:
        if file.split is None:
            continue
        try:
            scan = load_scan(file, data, recordings=recordings)
        except InputError as error:
            problems.append(str(error))
            continue
        readings.append(_reading(file, scan, data, len(label_map)))
    counts = [_count_row(split, listing, readings, label_map) for split in SPLITS]
    return DataCheck(
        counts=[row for row in counts if row["scans"]],
        problems=problems,
        warnings=_warnings(root, listing, readings, label_map),
    )


def _reading(file: ScanFile, scan: Scan, data: LidarData, classes: int) -> _Reading:
    cloud = scan.cloud
    per_class: tuple[int, ...] = ()
    if scan.classes is not None:
        per_class = tuple(int(n) for n in np.bincount(scan.classes, minlength=classes))
    known = cloud.intensity if cloud.intensity is not None else np.empty(0, np.float32)
    return _Reading(
        file=file,
        points=len(cloud),
        removed=cloud.not_finite + cloud.zeros,
        range_m=float(np.hypot(cloud.xyz[:, 0], cloud.xyz[:, 1]).max(initial=0.0)),
        ground_z_m=_ground_z_m(scan),
        intensity=cloud.intensity is not None,
        dark=len(known) > 0 and bool(known.max() < _DARK),
        bright=2 * int((known == 1).sum()) > len(known),
        per_class=per_class,
        outside=int((~parse_region(data.roi).contains(cloud.xyz)).sum()),
        guessed=origin_guessed(scan, data),
    )


def _ground_z_m(scan: Scan) -> float:
    """About the height of the road."""
    return float(np.quantile(scan.cloud.xyz[:, 2], 0.1)) if len(scan) else float("nan")


def origin_guessed(scan: Scan, data: LidarData) -> bool:
    """Whether a scan has a map's coordinates and nobody said where its sensor stood."""
    return data.origin is None and any(scan.cloud.origin)


def frame_doubts(
    scan: Scan, data: LidarData, seen: Bool[np.ndarray, " n"], *, road: bool = True
) -> dict[str, str]:
    """Why a scan may lie elsewhere than where a detector looks for curbs; empty: it does not.

    Args:
        scan: As read.
        data: How it was read.
        seen: The points that lie where the detector looks.
        road: Whether the detector expects the road at the height that a car's sensor sees it at.

    Returns:
        Kind of doubt -> what is odd and what to do.
    """
    doubts: dict[str, str] = {}
    if not len(scan):
        return doubts
    if origin_guessed(scan, data):
        place = ", ".join(f"{value:.0f}" for value in scan.cloud.origin)
        doubts["origin"] = (
            f"has the coordinates of a map; its sensor is taken to have stood at ({place}), the "
            f"first point rounded to 100 m, which may be far from the truth: say where with "
            f"--data.origin X Y Z"
        )
    outside = len(scan) - int(seen.sum())
    ground = _ground_z_m(scan)
    if 2 * outside > len(scan):
        doubts["outside"] = (
            f"has {outside} of its {len(scan)} points where this system does not look for curbs; "
            f"its result tells little: bring the scan to the sensor's frame with --data.origin, "
            f"--data.xy-transform and --data.z-shift"
        )
    elif road and not _ROAD_Z_M[0] <= ground <= _ROAD_Z_M[1]:
        doubts["road"] = (
            f"has its low points at z = {ground:.1f} m; a road seen from a car is at "
            f"{_ROAD_Z_M[0]} to {_ROAD_Z_M[1]} m, which the network learnt: use --data.z-shift"
        )
    return doubts


def _count_row(
    split: str, listing: Listing, readings: Sequence[_Reading], label_map: LabelMap
) -> CountRow:
    files = [file for file in listing.scans if file.split == split]
    read = [r for r in readings if r.file.split == split]
    row: dict[str, str | int | float | None] = {
        "split": split,
        "sequences": len({file.sequence for file in files}),
        "scans": len(files),
        "broken": len(files) - len(read),
        "labelled": sum(bool(r.per_class) for r in read),
        "points": sum(r.points for r in read),
        "removed": sum(r.removed for r in read),
        "points per scan": _span([r.points for r in read]),
        "range_m": _span([r.range_m for r in read]),
        "ground z_m": _span([r.ground_z_m for r in read]),
    }
    derived = sum(file.derived for file in files)
    if derived:
        row["derived labels"] = derived
    labelled = [r for r in read if r.per_class]
    if labelled:
        for number, name in enumerate(label_map.names):
            row[f"{name} (points)"] = sum(r.per_class[number] for r in labelled)
        for number, name in enumerate(label_map.names[1:], start=1):
            row[f"{name} (scans)"] = sum(r.per_class[number] > 0 for r in labelled)
    return row


def _span(values: Sequence[int | float]) -> str:
    """Smallest to largest: `40.1-79.9`."""
    if not values:
        return ""
    low, high = f"{min(values):.6g}", f"{max(values):.6g}"
    return low if low == high else f"{low} to {high}"


def _warnings(
    root: Path, listing: Listing, readings: Sequence[_Reading], label_map: LabelMap
) -> list[str]:
    held = {r.file.split for r in readings if r.per_class}
    lines = [
        f"{root}: has no labelled scans in the split {split}; evaluation on it is not possible"
        for split in SPLITS
        if split not in held
    ]
    idle = sorted({file.sequence for file in listing.scans if file.split is None})
    if idle:
        lines.append(f"{root}: sequences in no split are not used: {', '.join(idle)}")
    train = [r for r in readings if r.file.split == "train" and r.per_class]
    for number, name in enumerate(label_map.names[1:], start=1):
        if train and not any(r.per_class[number] for r in train):
            lines.append(f"{root}: class {name} is in no training scan")
    derived = [file for file in listing.scans if file.derived]
    if derived:
        lines.append(
            f"{root}: {len(derived)} scans have derived labels, which nobody corrected; scores on "
            f"them cannot be compared with published ones"
        )
    return lines + _odd_scans(root, readings)


def _odd_scans(root: Path, readings: Sequence[_Reading]) -> list[str]:
    """Scans that are read and look as if they were of another kind."""
    findings = {
        f"have fewer than {_FEW_POINTS} points": [r for r in readings if r.points < _FEW_POINTS],
        "have a map's coordinates: their sensors are taken to have stood at the first point "
        "rounded to 100 m (--data.origin)": [r for r in readings if r.guessed],
        "have no intensity; it is taken as 0": [r for r in readings if not r.intensity],
        f"have intensities below {_DARK} alone (--data.intensity-scale)": [
            r for r in readings if r.dark
        ],
        "have most of their intensities at the top of the scale (--data.intensity-scale)": [
            r for r in readings if r.bright
        ],
        "hold ignored points alone": [
            r for r in readings if r.per_class and r.per_class[IGNORE] == r.points
        ],
        "have no point in the region that counts (--data.roi)": [
            r for r in readings if r.outside == r.points
        ],
        f"have their low points outside of z = {_ROAD_Z_M[0]} to {_ROAD_Z_M[1]} m, where a road "
        f"seen from a car is (--data.z-shift)": [
            r for r in readings if not _ROAD_Z_M[0] <= r.ground_z_m <= _ROAD_Z_M[1]
        ],
    }
    lines = []
    for what, odd in findings.items():
        if odd:
            shown = ", ".join(r.file.name for r in odd[:3]) + ", ..." * (len(odd) > 3)
            lines.append(f"{root}: {len(odd)} of {len(readings)} scans {what}: {shown}")
    return lines
