"""One scan with its classes, read when asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, Integer, UInt32
from torch.utils.data import Dataset

from heed_lidar.clouds.bags import Recordings
from heed_lidar.clouds.cloud import PointCloud
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.curb_labels import curb_labels_2d, read_curb_rows
from heed_lidar.labels import LabelMap, read_labels
from heed_lidar.layouts import ScanFile, find_split
from heed_lidar.poses import time_of
from heed_lidar.regions import parse_region
from heed_lidar.settings import LidarData, to_sensor_frame


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One scan, in the frame that the settings say, with its classes where there are labels."""

    name: str
    """Unique in its data set; may hold `/`."""
    cloud: PointCloud
    classes: Int64[np.ndarray, " n"] | None
    """Per point of `cloud`; 0 where points count for nothing."""
    file: ScanFile

    def __len__(self) -> int:
        return len(self.cloud)


def load_scan(
    file: ScanFile,
    data: LidarData,
    *,
    label: bool = True,
    allow_empty: bool = False,
    recordings: Recordings | None = None,
) -> Scan:
    """Read one scan.

    Args:
        file: Where it lies.
        data: How it is read.
        label: Whether labels are read where there are some.
        allow_empty: Return a scan without points, with a warning, where the file holds none.
        recordings: Keeps recordings of many scans open between calls.

    Raises:
        InputError: The cloud or its labels cannot be read or do not fit each other; there are no
            points and `allow_empty` is false.
    """
    cloud = read_cloud(
        file.cloud,
        data.options,
        frame=file.frame,
        allow_empty=allow_empty,
        recordings=recordings,
    )
    classes = None
    if label and file.labelled:
        raw = _raw_labels(file, cloud)
        where = file.labels or file.curbs_2d
        classes = data.labels_read.classes_of(raw, where=where)
    stamp = time_of(file.cloud) if cloud.stamp is None else cloud.stamp
    moved = replace(cloud, xyz=to_sensor_frame(cloud.xyz, data), stamp=stamp)
    return Scan(name=file.name, cloud=moved, classes=classes, file=file)


def _raw_labels(file: ScanFile, cloud: PointCloud) -> UInt32[np.ndarray, " n"]:
    raw: UInt32[np.ndarray, " n"] | None = None
    if file.labels is not None:
        raw = read_labels(file.labels, count=cloud.rows_in_file)[cloud.rows]
    if file.curbs_2d is not None:
        return curb_labels_2d(cloud.xyz, read_curb_rows(file.curbs_2d), raw=raw)
    assert raw is not None
    return raw


def crop_scan(scan: Scan, region: str) -> Scan:
    """The part of a scan in a region, written as `LidarData.crop`."""
    keep = parse_region(region).contains(scan.cloud.xyz)
    classes = None if scan.classes is None else scan.classes[keep]
    return replace(scan, cloud=scan.cloud.select(keep), classes=classes)


def raw_by_row(
    classes: Integer[np.ndarray, " n"], cloud: PointCloud, label_map: LabelMap
) -> UInt32[np.ndarray, " rows"]:
    """Raw labels for every row of the file of a cloud; 0 for the rows that were removed."""
    raw = np.zeros(cloud.rows_in_file, dtype=np.uint32)
    raw[cloud.rows] = label_map.raw_of(classes)
    return raw


DataT = TypeVar("DataT", bound="ScanData")


class ScanData(Dataset[Scan]):
    """Scans, read when asked for, each time anew: thousands need the memory of one.

    Args:
        files: The scans.
        data: How they are read.
        label: Whether labels are read where there are some.
        crop: Keep only the part that `data.crop` names, for training.
        allow_empty: Whether a file without points gives an empty scan and a warning, instead of an
            error. None: where there are several files.
        skipped: A line for each scan of the data set that is left out; see `of_split`.

    Raises:
        InputError: On access, a scan that cannot be read.
    """

    def __init__(
        self,
        files: Sequence[ScanFile],
        data: LidarData,
        *,
        label: bool = True,
        crop: bool = False,
        allow_empty: bool | None = None,
        skipped: Sequence[str] = (),
    ) -> None:
        self.files = tuple(files)
        self.skipped = tuple(skipped)
        self._data = data
        self._label = label
        self._crop = crop
        self._allow_empty = len(self.files) > 1 if allow_empty is None else allow_empty
        self._recordings = Recordings()

    @classmethod
    def of_split(
        cls: type[DataT], root: Path, data: LidarData, split: str, *, crop: bool = False
    ) -> DataT:
        """The labelled scans of one split of a data set; an empty one is a fault.

        Args:
            root: The data set.
            data: How it is read.
            split: train, val or test.
            crop: Keep only the part that `data.crop` names, for training.

        Raises:
            InputError: As `find_scans`.
        """
        files, skipped = find_split(root, data, split)
        return cls(files, data, crop=crop, allow_empty=False, skipped=skipped)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Scan:
        scan = load_scan(
            self.files[index],
            self._data,
            label=self._label,
            allow_empty=self._allow_empty,
            recordings=self._recordings,
        )
        return crop_scan(scan, self._data.crop) if self._crop else scan

    def path(self, index: int) -> Path:
        """The file of a scan."""
        return self.files[index].cloud
