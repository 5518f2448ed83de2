"""Points as text: `.csv`, `.txt`, `.xyz`, with or without a header line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Num

from heed_core.errors import InputError
from heed_lidar.clouds.arrays import KITTI
from heed_lidar.clouds.cloud import (
    INTENSITY_NAMES,
    RING_NAMES,
    CloudOptions,
    FileColumns,
    refuse_twice,
)

_DELIMITERS = (";", ",", "\t")
"""The first that a line holds separates its fields: with `;` a comma is a decimal point."""
_NUMBERS = frozenset({*"xyz", *INTENSITY_NAMES, *RING_NAMES})
"""Columns that may not be words."""
_COMMENT = ("#", "//")


def read_text(path: Path, options: CloudOptions) -> FileColumns:
    """Read rows of numbers, separated by commas, semicolons, tabs or blanks.

    A first line that is not of numbers names the columns; `#` and `//` start comments, and one
    before the first row that names x, y and z is a header too. With semicolons, numbers may have
    decimal commas. An empty field is NaN, and columns of words that points do not need are left
    out.

    Raises:
        InputError: The file is no text, a row has another number of columns or has words where a
            number is needed, or the columns have no names or one name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError("is not a text file", path=path, remedy="save it as UTF-8") from None
    header, first = _header(lines)
    rows = [(number, line) for number, line in enumerate(lines[first:], start=first + 1)]
    rows = [(n, line) for n, line in rows if line.strip() and not line.lstrip().startswith("#")]
    if not rows:
        return FileColumns(values=dict.fromkeys(header or KITTI[:3], np.empty(0)))
    delimiter = _delimiter(rows[0][1])
    if delimiter == ";":
        rows = [(number, line.replace(",", ".")) for number, line in rows]
    names = options.columns or header or KITTI
    refuse_twice(names, path=path)
    width = len(_split(rows[0][1], delimiter))
    if not (options.columns or header) and width == 3:
        names = KITTI[:3]
    if len(names) != width:
        said = "its header names" if header and not options.columns else "there are names for"
        raise InputError(
            f"has {width} columns and {said} {len(names)} ({' '.join(names)})",
            path=path,
            place=f"row {rows[0][0]}",
            remedy="name them all with --data.columns x y z ...",
        )
    table = parse_rows([line for _, line in rows], width, delimiter)
    if table is None:
        return FileColumns(values=_numbers_among_words(rows, names, delimiter, path))
    return FileColumns(values={name: table[:, k] for k, name in enumerate(names)})


def _header(lines: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Names of the columns where a line gives them, and the index of the line after it."""
    for index, line in enumerate(lines):
        text = line.strip()
        commented = text.startswith(_COMMENT)
        text = text.lstrip("#/ ") if commented else text
        if not text:
            continue
        names = tuple(part.strip().strip('"') for part in _split(text, _delimiter(text)))
        if commented and {"x", "y", "z"} <= {name.lower() for name in names}:
            return names, index + 1
        if not commented:
            return (names, index + 1) if not any(map(_is_number, names)) else ((), 0)
    return (), 0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _delimiter(line: str) -> str | None:
    return next((mark for mark in _DELIMITERS if mark in line), None)


def _split(line: str, delimiter: str | None) -> list[str]:
    return line.strip(" \r\n").split(delimiter)


def parse_rows(
    lines: Sequence[str], width: int, delimiter: str | None
) -> Float64[np.ndarray, "n c"] | None:
    """Rows of `width` numbers; None where any line is something else."""
    try:
        table = np.loadtxt(lines, dtype=np.float64, delimiter=delimiter, ndmin=2, comments=None)
    except ValueError:
        return None
    return table if table.shape == (len(lines), width) else None


def _numbers_among_words(
    rows: Sequence[tuple[int, str]], names: Sequence[str], delimiter: str | None, path: Path
) -> dict[str, Float64[np.ndarray, " n"]]:
    """The columns of rows that are not numbers alone; an empty field is NaN."""
    cells = [[part.strip() or "nan" for part in _split(line, delimiter)] for _, line in rows]
    for (number, _), parts in zip(rows, cells, strict=True):
        if len(parts) != len(names):
            raise InputError(
                f"has {len(parts)} columns, the first row has {len(names)}",
                path=path,
                place=f"row {number}",
            )
    values = {}
    for name, column in zip(names, zip(*cells, strict=True), strict=True):
        word = next((k for k, text in enumerate(column) if not _is_number(text)), None)
        if word is None:
            values[name] = np.array([float(text) for text in column])
        elif name.lower() in _NUMBERS:
            raise InputError(
                f"has {column[word]!r}, not a number", path=path, place=f"row {rows[word][0]}"
            )
    return values


def write_csv(
    path: Path,
    xyz: Float64[np.ndarray, "n 3"],
    *,
    attributes: Mapping[str, Num[np.ndarray, " n"]] | None = None,
) -> None:
    """Write points as comma-separated text with a header; metres to a tenth of a millimetre.

    Raises:
        ValueError: An attribute of another length, or with a name that is no plain word.
    """
    attributes = attributes or {}
    for name, values in attributes.items():
        if values.shape != (len(xyz),) or not re.fullmatch(r"\w+", name):
            raise ValueError(
                f"attributes must be words with {len(xyz)} values, got {name!r} {values.shape}"
            )
    columns = [*xyz.T, *attributes.values()]
    formats = ["%.4f"] * 3
    formats += ["%d" if v.dtype.kind in "iub" else "%.9g" for v in attributes.values()]
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(",".join(("x", "y", "z", *attributes)) + "\n")
        np.savetxt(stream, np.stack(columns, axis=1), fmt=formats, delimiter=",")
