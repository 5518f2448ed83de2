"""Points as text: `.csv`, `.txt`, `.xyz`, with or without a header line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Num

from heed_core.errors import InputError
from heed_lidar.clouds.arrays import KITTI
from heed_lidar.clouds.cloud import CloudOptions, FileColumns, refuse_twice

_DELIMITERS = (",", ";", "\t")
_COMMENT = ("#", "//")


def read_text(path: Path, options: CloudOptions) -> FileColumns:
    """Read rows of numbers, separated by commas, semicolons, tabs or blanks.

    A first line that is not of numbers names the columns; `#` and `//` start comments, and one
    before the first row that names x, y and z is a header too.

    Raises:
        InputError: The file is no text, a row has another number of columns or is not of numbers,
            or the columns have no names or one name twice.
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
        raise _first_fault(rows, width, delimiter, path)
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
    return line.strip().split(delimiter)


def parse_rows(
    lines: Sequence[str], width: int, delimiter: str | None
) -> Float64[np.ndarray, "n c"] | None:
    """Rows of `width` numbers; None where any line is something else."""
    try:
        table = np.loadtxt(lines, dtype=np.float64, delimiter=delimiter, ndmin=2, comments=None)
    except ValueError:
        return None
    return table if table.shape == (len(lines), width) else None


def _first_fault(
    rows: Sequence[tuple[int, str]], width: int, delimiter: str | None, path: Path
) -> InputError:
    for number, line in rows:
        parts = _split(line, delimiter)
        place = f"row {number}"
        if len(parts) != width:
            return InputError(
                f"has {len(parts)} columns, the first row has {width}", path=path, place=place
            )
        wrong = next((part for part in parts if not _is_number(part)), None)
        if wrong is not None:
            return InputError(f"has {wrong.strip()!r}, not a number", path=path, place=place)
    return InputError("cannot be read as rows of numbers", path=path)


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
