"""PCD files (Point Cloud Library, version 0.7): ascii, binary and binary_compressed."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Num

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, refuse_twice
from heed_lidar.clouds.text import parse_rows

_KINDS = {
    (kind, size): np.dtype(f"<{letter}{size}")
    for kind, letter, sizes in (
        ("F", "f", (4, 8)),
        ("I", "i", (1, 2, 4, 8)),
        ("U", "u", (1, 2, 4, 8)),
    )
    for size in sizes
}
_KEYS = frozenset(
    {"VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA"}
)
_HEADER_BYTES = 65536
_LZF_RATIO = 90
"""Three bytes of LZF stand for at most 264."""

_MOST_VALUES = 2**16
"""Of one point: descriptors of points have some hundreds."""


@dataclass(frozen=True, kw_only=True)
class _Header:
    fields: tuple[str, ...]
    types: tuple[np.dtype[np.generic], ...]
    counts: tuple[int, ...]
    points: int
    data: str
    size: int
    """Bytes before the points."""

    @property
    def point(self) -> np.dtype[np.void]:
        """One point in binary data."""
        return np.dtype(
            [
                (f"{k}", kind, (count,)) if count > 1 else (f"{k}", kind)
                for k, (kind, count) in enumerate(zip(self.types, self.counts, strict=True))
            ]
        )

    @property
    def single(self) -> list[tuple[int, str]]:
        """Index and name of the fields of one value per point that are no padding."""
        return [
            (k, name)
            for k, (name, count) in enumerate(zip(self.fields, self.counts, strict=True))
            if count == 1 and name != "_"
        ]


def read_pcd(path: Path, options: CloudOptions) -> FileColumns:
    """Read a PCD file; fields of several values per point are left out.

    Raises:
        InputError: The header or the data is damaged or truncated, or names a field twice.
    """
    content = path.read_bytes()
    header = _read_header(content, path)
    refuse_twice((name for _, name in header.single), path=path)
    body = content[header.size :]
    if header.data == "ascii":
        values = _read_ascii(body, header, path)
    else:
        values = _read_binary(body, header, path)
    return FileColumns(values=values)


def _read_header(content: bytes, path: Path) -> _Header:
    entries: dict[str, list[str]] = {}
    size = 0
    for raw in content[:_HEADER_BYTES].splitlines(keepends=True):
        size += len(raw)
        line = raw.decode("ascii", errors="replace").partition("#")[0].split()
        if not line:
            continue
        key = "FIELDS" if line[0] == "COLUMNS" else line[0]
        if key not in _KEYS:
            raise _broken(path, f"has the line {' '.join(line)[:40]!r} in its header")
        entries[key] = line[1:]
        if key == "DATA":
            break
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "DATA") if not entries.get(key)]
    if missing or ("POINTS" not in entries and "WIDTH" not in entries):
        raise _broken(path, f"has no {', '.join(missing) or 'POINTS'} in its header")
    try:
        return _parse_header(entries, size)
    except (KeyError, ValueError, IndexError) as error:
        raise _broken(path, f"has a header that cannot be used ({error})") from None


def _parse_header(entries: dict[str, list[str]], size: int) -> _Header:
    fields = tuple(entries["FIELDS"])
    sizes = [int(text) for text in entries["SIZE"]]
    counts = tuple(int(text) for text in entries.get("COUNT", ["1"] * len(fields)))
    if not len(fields) == len(sizes) == len(entries["TYPE"]) == len(counts):
        raise ValueError("FIELDS, SIZE, TYPE and COUNT have different lengths")
    if "POINTS" in entries:
        points = int(entries["POINTS"][0])
    else:
        points = int(entries["WIDTH"][0]) * int(entries.get("HEIGHT", ["1"])[0])
    if points < 0 or min(counts) < 1 or sum(counts) > _MOST_VALUES:
        raise ValueError(f"{points} points, counts {counts}")
    data = entries["DATA"][0].lower()
    if data not in {"ascii", "binary", "binary_compressed"}:
        raise ValueError(f"DATA {data}")
    types = []
    for kind, width in zip(entries["TYPE"], sizes, strict=True):
        if (kind.upper(), width) not in _KINDS:
            raise ValueError(f"TYPE {kind} of SIZE {width}")
        types.append(_KINDS[kind.upper(), width])
    return _Header(
        fields=fields, types=tuple(types), counts=counts, points=points, data=data, size=size
    )


def _broken(path: Path, what: str) -> InputError:
    return InputError(what, path=path, remedy="give a PCD file of version 0.7")


def _short(path: Path, header: _Header, have: int, need: int) -> InputError:
    return InputError(
        f"has {have} bytes of data, {need} were expected for the {header.points} points of its "
        f"header",
        path=path,
        remedy="the file is truncated: copy it again",
    )


def _read_ascii(body: bytes, header: _Header, path: Path) -> dict[str, Num[np.ndarray, " n"]]:
    lines = [line for line in body.decode("ascii", errors="replace").splitlines() if line.strip()]
    if len(lines) != header.points:
        raise InputError(
            f"has {len(lines)} rows, its header says {header.points} points",
            path=path,
            remedy="the file is truncated: copy it again",
        )
    width = sum(header.counts)
    table = parse_rows(lines, width, None) if lines else np.empty((0, width))
    if table is None:
        number = next(
            (n for n, line in enumerate(lines, start=1) if parse_rows([line], width, None) is None)
        )
        raise InputError(f"has no {width} numbers", path=path, place=f"point {number}")
    starts = np.cumsum((0, *header.counts))
    return {name: table[:, starts[k]] for k, name in header.single}


def _read_binary(body: bytes, header: _Header, path: Path) -> dict[str, Num[np.ndarray, " n"]]:
    need = header.points * header.point.itemsize
    if header.data == "binary":
        if len(body) < need:
            raise _short(path, header, len(body), need)
        points = np.frombuffer(body, dtype=header.point, count=header.points)
        return {name: points[f"{k}"] for k, name in header.single}
    data = _decompress(body, header, path, need=need)
    widths = [t.itemsize * c for t, c in zip(header.types, header.counts, strict=True)]
    starts = [header.points * start for start in np.cumsum((0, *widths)).tolist()]
    return {
        name: np.frombuffer(data, dtype=header.types[k], count=header.points, offset=starts[k])
        for k, name in header.single
    }


def _decompress(body: bytes, header: _Header, path: Path, *, need: int) -> bytes:
    """The columns of a compressed body, one after the other."""
    if len(body) < 8:
        raise _short(path, header, len(body), 8)
    packed, size = (int(n) for n in np.frombuffer(body, dtype="<u4", count=2))
    if len(body) - 8 < packed:
        raise _short(path, header, len(body) - 8, packed)
    if size != need or size > packed * _LZF_RATIO:
        raise InputError(
            f"holds {packed} bytes for {size}, its header says {header.points} points of "
            f"{header.point.itemsize} bytes",
            path=path,
            remedy="the file is damaged: copy it again",
        )
    try:
        return lzf_decompress(body[8 : 8 + packed], size)
    except (ValueError, IndexError):
        raise InputError(
            "holds compressed data that cannot be read",
            path=path,
            remedy="the file is damaged: copy it again",
        ) from None


def lzf_decompress(data: bytes, size: int) -> bytes:
    """Undo LZF compression.

    A control byte below 32 is followed by that many and one literal bytes; any other stands for a
    copy of earlier output, its length in the upper 3 bits (7: more in the next byte) and its
    distance in the lower 5 and the following byte.

    Raises:
        ValueError: The data do not give `size` bytes.
        IndexError: The data end too early.
    """
    out = bytearray()
    at, end = 0, len(data)
    while at < end:
        control = data[at]
        at += 1
        if control < 32:
            out += data[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[at]
            at += 1
        start = len(out) - ((control & 31) << 8) - data[at] - 1
        at += 1
        length += 2
        if start < 0 or len(out) + length > size:
            raise ValueError("a copy reaches outside the data")
        distance = len(out) - start
        if distance >= length:
            out += out[start : start + length]
        else:
            out += (out[start:] * math.ceil(length / distance))[:length]
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes instead of {size}")
    return bytes(out)
