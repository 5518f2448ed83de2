"""Recordings of many scans: ROS 1 and ROS 2 bags and MCAP, with the optional library rosbags."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Num, UInt8

from heed_core.errors import InputError, MissingExtra, reason_of
from heed_core.folders import files_under
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, refuse_twice

CLOUD_TYPE = "sensor_msgs/msg/PointCloud2"
_SUFFIXES = frozenset({".bag", ".mcap", ".db3"})
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}


@runtime_checkable
class PointField(Protocol):
    """One column of a `sensor_msgs/PointCloud2`."""

    name: str
    offset: int
    datatype: int
    count: int


@runtime_checkable
class PointCloud2(Protocol):
    """The parts of a `sensor_msgs/PointCloud2` that hold its points."""

    height: int
    width: int
    fields: list[PointField]
    is_bigendian: bool
    point_step: int
    row_step: int
    data: UInt8[np.ndarray, " bytes"]


def is_recording(path: Path) -> bool:
    """Whether a path is a recording of many scans: a bag, an MCAP file or a ROS 2 folder."""
    if path.is_dir():
        return (path / "metadata.yaml").is_file()
    return path.suffix.lower() in _SUFFIXES and path.is_file()


def count_frames(path: Path, options: CloudOptions) -> int:
    """How many scans a recording holds.

    Raises:
        InputError: The recording is damaged, or the topic is not clear.
        MissingExtra: rosbags is not installed.
    """
    with contextlib.closing(_Recording(path, options)) as recording:
        return recording.count


def _bytes_of(path: Path) -> int:
    files = files_under(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


class Recordings:
    """Recordings that stay open between calls, so that going through one reads it once.

    Reading back in time starts from the beginning. A copy in another process opens its own.
    """

    def __init__(self) -> None:
        self._open: dict[tuple[Path, CloudOptions], _Recording] = {}

    def read(self, path: Path, frame: int, options: CloudOptions) -> FileColumns:
        """The points of one scan of a recording.

        Raises:
            InputError: The recording is damaged, the topic is not clear, there is no such scan.
            MissingExtra: rosbags is not installed.
        """
        key = (path, options)
        if key not in self._open:
            self.close()
            self._open[key] = _Recording(path, options)
        return self._open[key].read(frame)

    def close(self) -> None:
        """Close what is open."""
        for recording in self._open.values():
            recording.close()
        self._open.clear()

    def __getstate__(self) -> dict[str, object]:
        return {"_open": {}}


class _Recording:
    """One open recording and the position in it."""

    def __init__(self, path: Path, options: CloudOptions) -> None:
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError:
            raise MissingExtra("rosbags", "heed-lidar[bags]") from None
        self._path, self._options = path, options
        try:
            self._reader: Any = AnyReader([path], default_typestore=get_typestore(Stores.LATEST))
            self._reader.open()
        except Exception as error:  # the library raises its own, struct's, sqlite's and others
            raise self._damaged(error) from None
        self._finish = weakref.finalize(self, self._reader.close)
        self._connections = self._choose()
        self.count: int = sum(connection.msgcount for connection in self._connections)
        if self.count > _bytes_of(path):
            self.close()
            raise InputError(
                f"counts {self.count} scans, more than it has bytes",
                path=path,
                remedy="the file is damaged: copy it again",
            )
        self._messages: Iterator[tuple[Any, int, bytes]] = iter(())
        self._next = self.count

    def close(self) -> None:
        """Close the file."""
        self._messages = iter(())
        self._finish()

    def _damaged(self, error: Exception) -> InputError:
        first = reason_of(error)
        return InputError(
            f"is not a readable recording ({first})",
            path=self._path,
            remedy="the file is truncated or of another format: copy it again",
        )

    def _choose(self) -> list[Any]:
        """The connections of the topic that is read."""
        clouds = [c for c in self._reader.connections if c.msgtype == CLOUD_TYPE]
        topics = sorted({c.topic for c in clouds})
        wanted = self._options.topic
        listed = ", ".join(topics) or "none"
        try:
            if not topics:
                other = ", ".join(sorted({c.topic for c in self._reader.connections})[:8])
                raise InputError(
                    f"holds no topic with point clouds (topics: {other or 'none'})",
                    path=self._path,
                    remedy=f"record a topic of type {CLOUD_TYPE}",
                )
            if wanted is not None and wanted not in topics:
                raise InputError(
                    f"has no topic {wanted!r} with point clouds",
                    path=self._path,
                    remedy=f"choose one of: {listed}",
                )
            if wanted is None and len(topics) > 1:
                raise InputError(
                    f"holds {len(topics)} topics with point clouds: {listed}",
                    path=self._path,
                    remedy="choose one with --data.topic",
                )
        except InputError:
            self.close()
            raise
        return [c for c in clouds if c.topic == (wanted or topics[0])]

    def read(self, frame: int) -> FileColumns:
        """The points of one scan."""
        if not 0 <= frame < self.count:
            raise InputError(f"has {self.count} scans, no scan {frame}", path=self._path)
        try:
            message = self._message(frame)
        except InputError:
            raise
        except Exception as error:  # as above
            self._next = self.count
            raise self._damaged(error) from None
        values = decode_points(message, path=self._path, place=f"scan {frame}")
        time = message.header.stamp
        return FileColumns(
            values=values,
            stamp=time.sec + time.nanosec * 1e-9,
            frame_id=message.header.frame_id or None,
            name=f"{self._path.stem}_{frame:06d}",
        )

    def _message(self, frame: int) -> Any:
        if frame < self._next:
            self._messages = self._reader.messages(connections=self._connections)
            self._next = 0
        for connection, _, data in self._messages:
            self._next += 1
            if self._next == frame + 1:
                return self._reader.deserialize(data, connection.msgtype)
        raise InputError(
            f"ends before scan {frame} of the {self.count} of its index",
            path=self._path,
            remedy="the file is truncated: copy it again",
        )


def decode_points(
    message: PointCloud2, *, path: Path, place: str
) -> dict[str, Num[np.ndarray, " n"]]:
    """Columns of a `sensor_msgs/PointCloud2`; fields of several values per point are left out.

    Raises:
        InputError: The fields do not fit into a point, or the points not into the data.
    """
    fields = [f for f in message.fields if f.count == 1 and f.datatype in _TYPES]
    refuse_twice((f.name for f in fields), path=path, place=place)
    order = ">" if message.is_bigendian else "<"
    height, width, step = message.height, message.width, message.point_step
    for field in fields:
        if field.offset + np.dtype(_TYPES[field.datatype]).itemsize > step:
            raise InputError(
                f"has a field {field.name} beyond the {step} bytes of a point",
                path=path,
                place=place,
            )
    point = np.dtype(
        {
            "names": [f.name for f in fields],
            "formats": [order + _TYPES[f.datatype] for f in fields],
            "offsets": [f.offset for f in fields],
            "itemsize": step,
        }
    )
    row_step = message.row_step or width * step
    needed = (height - 1) * row_step + width * step if height and width else 0
    data = np.ascontiguousarray(message.data).view(np.uint8)
    if row_step < width * step or needed > len(data):
        raise InputError(
            f"has {len(data)} bytes for {height} x {width} points of {step} bytes",
            path=path,
            place=place,
        )
    if not needed:
        return {f.name: np.empty(0) for f in fields}
    points = np.ndarray((height, width), dtype=point, buffer=data, strides=(row_step, step))
    return {
        f.name: points[f.name].ravel().astype(points[f.name].dtype.newbyteorder("="))
        for f in fields
    }
