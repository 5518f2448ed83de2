"""PLY files: ascii, binary little and big endian."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Num, UInt8

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, refuse_twice
from heed_lidar.clouds.text import parse_rows

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_NAMES = {"i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint",
          "f4": "float", "f8": "double"}  # fmt: skip
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_HEADER_BYTES = 1 << 20
_PRECISE_M = 1000.0
"""Coordinates beyond this lose more than a tenth of a millimetre as float32."""


@dataclass
class _Element:
    name: str
    count: int
    properties: list[tuple[str, str]] = field(default_factory=list)
    """Name and numpy type; the type of a list is `list`."""

    @property
    def has_list(self) -> bool:
        return any(kind == "list" for _, kind in self.properties)


@dataclass(frozen=True, kw_only=True)
class _Header:
    order: str
    """Byte order; empty for ascii."""
    before: tuple[_Element, ...]
    vertex: _Element
    size: int


def read_ply(path: Path, options: CloudOptions) -> FileColumns:
    """Read the vertices of a PLY file.

    Raises:
        InputError: The header or the data is damaged or truncated, or names a property twice.
    """
    content = path.read_bytes()
    header = _read_header(content, path)
    refuse_twice((name for name, _ in header.vertex.properties), path=path)
    body = content[header.size :]
    if header.order:
        return FileColumns(values=_read_binary(body, header, path))
    return FileColumns(values=_read_ascii(body, header, path))


def _broken(path: Path, what: str) -> InputError:
    return InputError(what, path=path, remedy="give a PLY file of vertices")


def _read_header(content: bytes, path: Path) -> _Header:
    if not content.startswith(b"ply"):
        raise _broken(path, "does not begin with 'ply'")
    order, size = None, 0
    elements: list[_Element] = []
    for raw in content[:_HEADER_BYTES].splitlines(keepends=True):
        size += len(raw)
        words = raw.decode("ascii", errors="replace").split()
        if not words or words[0] in {"ply", "comment", "obj_info"}:
            continue
        if words[0] == "end_header":
            break
        try:
            order = _read_line(words, elements, order)
        except (KeyError, IndexError, ValueError):
            raise _broken(path, f"has the line {' '.join(words)[:60]!r} in its header") from None
    else:
        raise _broken(path, "has a header without an end")
    names = [element.name for element in elements]
    if order is None or "vertex" not in names:
        raise _broken(path, f"has no {'format' if order is None else 'vertices'} in its header")
    at = names.index("vertex")
    vertex, before = elements[at], tuple(elements[:at])
    if vertex.has_list or (order and any(element.has_list for element in before)):
        raise _broken(path, "has lists in its vertices or, in binary, before them")
    return _Header(order=order, before=before, vertex=vertex, size=size)


def _read_line(words: list[str], elements: list[_Element], order: str | None) -> str | None:
    """Take over one line of the header; the byte order comes back."""
    if words[0] == "format":
        return _ORDERS[words[1]]
    if words[0] == "element":
        element = _Element(words[1], int(words[2]))
        if element.count < 0:
            raise ValueError(words[2])
        elements.append(element)
    elif words[0] == "property":
        kind = "list" if words[1] == "list" else _TYPES[words[1]]
        elements[-1].properties.append((words[-1], kind))
    else:
        raise ValueError(words[0])
    return order


def _row(element: _Element, order: str) -> np.dtype[np.void]:
    return np.dtype([(name, order + kind) for name, kind in element.properties])


def _read_binary(body: bytes, header: _Header, path: Path) -> dict[str, Num[np.ndarray, " n"]]:
    try:
        skip = sum(e.count * _row(e, header.order).itemsize for e in header.before)
        row = _row(header.vertex, header.order)
    except ValueError as error:
        raise _broken(path, f"has a header that cannot be used ({error})") from None
    need = header.vertex.count * row.itemsize
    if len(body) - skip < need:
        raise _short(path, header, f"{max(0, len(body) - skip)} bytes of vertices, {need} were")
    vertices = np.frombuffer(body, dtype=row, count=header.vertex.count, offset=skip)
    return {
        name: vertices[name].astype(vertices.dtype[name].newbyteorder("="))
        for name, _ in header.vertex.properties
    }


def _short(path: Path, header: _Header, what: str) -> InputError:
    return InputError(
        f"has {what} expected for the {header.vertex.count} vertices of its header",
        path=path,
        remedy="the file is truncated: copy it again",
    )


def _read_ascii(body: bytes, header: _Header, path: Path) -> dict[str, Num[np.ndarray, " n"]]:
    lines = [line for line in body.decode("ascii", errors="replace").splitlines() if line.strip()]
    skip = sum(element.count for element in header.before)
    count, width = header.vertex.count, len(header.vertex.properties)
    lines = lines[skip : skip + count]
    if len(lines) < count:
        raise _short(path, header, f"{len(lines)} rows of vertices, {count} were")
    table = parse_rows(lines, width, None) if lines else np.empty((0, width))
    if table is None:
        number = next(
            (n for n, line in enumerate(lines, start=1) if parse_rows([line], width, None) is None)
        )
        raise InputError(f"has no {width} numbers", path=path, place=f"vertex {number}")
    return {name: table[:, k] for k, (name, _) in enumerate(header.vertex.properties)}


def write_ply(
    path: Path,
    xyz: Float[np.ndarray, "n 3"],
    *,
    colours: UInt8[np.ndarray, "n 3"] | None = None,
    attributes: Mapping[str, Num[np.ndarray, " n"]] | None = None,
) -> None:
    """Write points as a binary little-endian PLY file.

    Coordinates are written as float32, and as float64 where any is beyond 1 km.

    Args:
        path: The file.
        xyz: Metres.
        colours: Red, green, blue.
        attributes: More columns, each in the type that it has (64-bit whole numbers and booleans
            become smaller ones).

    Raises:
        ValueError: An attribute of another length, or with a blank or a taken name.
    """
    far = len(xyz) > 0 and np.abs(xyz).max() > _PRECISE_M
    columns: dict[str, Num[np.ndarray, " n"]] = {
        axis: xyz[:, k].astype("<f8" if far else "<f4") for k, axis in enumerate("xyz")
    }
    if colours is not None:
        columns |= {name: colours[:, k] for k, name in enumerate(("red", "green", "blue"))}
    for name, values in (attributes or {}).items():
        if values.shape != (len(xyz),) or not name.isidentifier() or name in columns:
            raise ValueError(
                f"attributes must be new words with {len(xyz)} values, got {name!r} {values.shape}"
            )
        columns[name] = _storable(values)
    row = np.dtype([(name, values.dtype) for name, values in columns.items()])
    table = np.empty(len(xyz), dtype=row)
    for name, values in columns.items():
        table[name] = values
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(xyz)}"]
    lines += [f"property {_NAMES[values.dtype.str[1:]]} {n}" for n, values in columns.items()]
    path.write_bytes("\n".join((*lines, "end_header", "")).encode("ascii") + table.tobytes())


def _storable(values: Num[np.ndarray, " n"]) -> Num[np.ndarray, " n"]:
    """The same numbers in a little-endian type that PLY knows."""
    kind = values.dtype.kind + str(values.dtype.itemsize)
    kind = {"i8": "i4", "u8": "u4", "b1": "u1", "f2": "f4"}.get(kind, kind)
    if kind in {"i4", "u4"} and len(values):
        limits = np.iinfo(kind)
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"numbers must fit into 32 bits, got up to {values.max()}")
    return values.astype(f"<{kind}")
