"""LAS and LAZ files, with the optional library laspy."""

import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32, Float64, Integer, UInt8

from heed_core.errors import InputError, MissingExtra, reason_of
from heed_lidar.clouds.cloud import CloudOptions, FileColumns

SCALE_M = 0.001
"""Coordinates are written as whole millimetres from an offset."""
_HEADER_BYTES = 375
_RECORD_COUNTS = (100, 243)
"""Where the header counts the variable length records, and in LAS 1.4 the extended ones."""
_RECORD_BYTES = 54
_LAYERED = 3
"""The compressor of LAS 1.4's points, which puts each kind of value in a layer of its own."""
_LAYERS = {10: 9, 11: 1, 12: 2, 13: 1}
"""Of the compressed items point, colours, with infrared, wave packet; extra bytes: one each."""
_COMPRESSION = 1000
"""No LAZ file is smaller than its points by more than this."""

_PANIC = "PanicException"
"""What a library written in Rust raises where it gives up, no `Exception`; no module has it."""


def _laspy() -> ModuleType:
    try:
        import laspy  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("laspy", "heed-lidar[las]") from None
    module: ModuleType = laspy
    return module


def read_las(path: Path, options: CloudOptions) -> FileColumns:
    """Read a LAS or LAZ file; coordinates in float64. Intensities that are all 0 are none.

    Raises:
        InputError: The file is damaged or truncated.
        MissingExtra: laspy is not installed.
    """
    laspy = _laspy()
    size = path.stat().st_size
    _check_tables(path, size)
    try:
        # The parallel decompressor ends the whole process on some damaged files.
        with laspy.open(path, laz_backend=laspy.LazBackend.Lazrs) as reader:
            header = reader.header
            packed = header.are_points_compressed
            needed = header.point_count * header.point_format.size
            if needed > (size * _COMPRESSION if packed else size - header.offset_to_point_data):
                raise InputError(
                    f"is too short for the {header.point_count} points of its header",
                    path=path,
                    remedy="the file is truncated: copy it again",
                )
            if packed and not _layers_fit(path, header, size):
                raise _too_many(path)
            points = reader.read()
    except InputError:
        raise
    except BaseException as error:  # laspy and its decompressor raise their own and bare ones
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        first = reason_of(error)
        raise InputError(f"is not a readable LAS file ({first})", path=path) from None
    if len(points.points) != header.point_count:
        raise InputError(
            f"holds {len(points.points)} of the {header.point_count} points of its header",
            path=path,
            remedy="the file is truncated: copy it again",
        )
    values = {axis: np.asarray(points[axis], dtype=np.float64) for axis in "xyz"}
    intensity = np.asarray(points.intensity)
    if intensity.any():
        values["intensity"] = intensity
    if "gps_time" in points.point_format.dimension_names:
        values["time"] = np.asarray(points.gps_time)
    return FileColumns(values=values, intensity_type="uint16")


def _check_tables(path: Path, size: int) -> None:
    """Refuse a file that counts more records than it can hold: all would be read or allocated."""
    with path.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
        places = _RECORD_COUNTS if start[25:26] >= b"\x04" else _RECORD_COUNTS[:1]
        records = [struct.unpack_from("<I", start, at)[0] for at in places if at + 4 <= len(start)]
        chunks = _count_chunks(stream, start, size) if start[104:105] >= b"\x80" else 0
    if chunks > size or any(count * _RECORD_BYTES > size for count in records):
        raise _too_many(path)


def _too_many(path: Path) -> InputError:
    return InputError(
        "has a header that counts more records than the file holds",
        path=path,
        remedy="the file is damaged: copy it again",
    )


def _layers_fit(path: Path, header: Any, size: int) -> bool:
    """Whether the layers of all chunks lie in the file: the decompressor allocates what they claim.

    A chunk is its first point, the number of points, the bytes of each layer, and the layers.
    """
    coding: bytes = header.vlrs.get("LasZipVlr")[0].record_data
    if int.from_bytes(coding[:2], "little") != _LAYERED:
        return True
    items = struct.iter_unpack("<3H", coding[34:])
    sizes = struct.Struct(f"<{sum(_LAYERS.get(kind, width) for kind, width, _ in items)}I")
    with path.open("rb") as stream:
        stream.seek(header.offset_to_point_data)
        end = struct.unpack("<q", stream.read(8))[0]
        while stream.tell() < min(end, size):
            stream.seek(header.point_format.size + 4, os.SEEK_CUR)
            stream.seek(sum(sizes.unpack(stream.read(sizes.size))), os.SEEK_CUR)
        return stream.tell() <= size


def _count_chunks(stream: BinaryIO, start: bytes, size: int) -> int:
    """The number of chunks that the table of a compressed file claims; 0 where there is none."""
    stream.seek(struct.unpack_from("<I", start, 96)[0])
    place = stream.read(8)
    if len(place) < 8 or not 0 <= (offset := struct.unpack("<q", place)[0]) < size:
        return 0
    stream.seek(offset)
    table = stream.read(8)
    return int(struct.unpack("<II", table)[1]) if len(table) == 8 else 0


def write_las(
    path: Path,
    xyz: Float64[np.ndarray, "n 3"],
    *,
    intensity: Float32[np.ndarray, " n"] | None = None,
    classes: Integer[np.ndarray, " n"] | None = None,
    colours: UInt8[np.ndarray, "n 3"] | None = None,
) -> None:
    """Write a LAS file of whole millimetres, also for coordinates of a map.

    Args:
        path: The file; LAZ where it ends so.
        xyz: In the coordinates that shall stand in the file.
        intensity: In [0, 1].
        classes: Numbers up to 255, as the point's classification.
        colours: Red, green, blue.

    Raises:
        ValueError: A class above 255.
        MissingExtra: laspy is not installed.
    """
    laspy = _laspy()
    if classes is not None and len(classes) and not 0 <= classes.min() <= classes.max() <= 255:
        raise ValueError(f"classes must be within 0..255, got {classes.min()}..{classes.max()}")
    header = laspy.LasHeader(point_format=7, version="1.4")
    header.scales = np.full(3, SCALE_M)
    header.offsets = np.floor(xyz.min(axis=0)) if len(xyz) else np.zeros(3)
    las = laspy.LasData(header)
    las.xyz = xyz
    if intensity is not None:
        las.intensity = np.round(intensity * 65535).astype(np.uint16)
    if classes is not None:
        las.classification = classes.astype(np.uint8)
    if colours is not None:
        wide = colours.astype(np.uint16) * 257
        las.red, las.green, las.blue = wide.T
    las.write(path, do_compress=path.suffix.lower() == ".laz")
