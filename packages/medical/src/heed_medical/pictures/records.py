"""One picture of a list, and the tables that name pictures."""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heed_core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """One picture as a list names it."""

    name: str
    """Unique in its list."""
    path: Path
    label: str | None = None
    split: str | None = None
    patient: str = ""
    """Empty: not named."""
    source: str = ""
    """Where the picture comes from; empty: not named."""
    place: str = ""
    """File and row of the list, for messages."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What else the list says about it."""

    @property
    def group(self) -> str:
        """What must not be in two splits: the patient, or the picture where none is named."""
        return self.patient or self.name


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a table, with their numbers in the file."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    numbers: Sequence[int]
    """Of each row in the file, from 1 on; the header and blank lines count."""
    problems: Sequence[str] = ()
    """A line for each row of the file that cannot be read and is not among the rows."""

    def numbered(self) -> Iterator[tuple[str, Mapping[str, str]]]:
        """The place of each row, for messages, and the row."""
        for number, row in zip(self.numbers, self.rows, strict=True):
            yield f"{self.path}, row {number}", row

    def column(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is a column, whatever its case."""
        lower = {column.lower(): column for column in reversed(self.columns)}
        return next((lower[name.lower()] for name in names if name.lower() in lower), None)

    def need(self, *names: str) -> str:
        """As `column`.

        Raises:
            InputError: None of them is a column.
        """
        found = self.column(names)
        if found is None:
            raise InputError(
                f"has no column {' or '.join(repr(n) for n in names)}",
                path=self.path,
                remedy=self.header,
            )
        return found

    @property
    def header(self) -> str:
        """Its columns, for messages."""
        return _no_commas(self.columns) or f"its columns are {', '.join(self.columns)}"


JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of tables with an object per line."""


def _no_commas(columns: Sequence[str]) -> str | None:
    """What to do with a header whose only column holds another separator."""
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and sign in columns[0]:
            return f"it seems to be separated by {name} ({columns[0]}): save it with commas"
    return None


def plain_or_packed(path: Path) -> Path:
    """A table as it lies there: by its name, or with .gz behind it."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def first_line(path: Path) -> str:
    """The header of a csv or csv.gz; empty where the file cannot be read."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as stream:
            return str(stream.readline())
    except (OSError, EOFError, zlib.error):
        return ""


def read_rows(path: Path, *, lenient: bool = False) -> Rows:
    """Read a csv, csv.gz or jsonl file as text.

    Args:
        path: The file.
        lenient: Leave out each row that cannot be read, with a line in `problems`; else the first
            of them raises. Where no row can be read, it raises in either case.

    Raises:
        InputError: Missing, damaged, empty, not such a file, or a row of another length.
    """
    if not path.is_file():
        raise InputError("does not exist", path=path)
    try:
        text = _text(path)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot be read as text ({str(error) or type(error).__name__})",
            path=path,
            remedy="save it as UTF-8, or copy it again",
        ) from None
    rows = (_json_rows if path.suffix.lower() in JSON_LINES else _csv_rows)(path, text)
    if rows.problems and not (lenient and rows.rows):
        raise InputError(rows.problems[0])
    return rows


def _csv_rows(path: Path, text: str) -> Rows:
    try:
        found = list(enumerate(csv.reader(io.StringIO(text, newline="")), start=1))
    except csv.Error as error:
        raise InputError(f"is not a csv file ({error})", path=path) from None
    lines = [(number, [field.strip() for field in fields]) for number, fields in found if fields]
    columns = lines[0][1] if lines else []
    if not columns:
        raise InputError("is empty", path=path, remedy="a header and a row per picture are needed")
    if twice := [name for name, count in Counter(columns).items() if name and count > 1]:
        raise InputError(f"has the column {twice[0]!r} twice", path=path, remedy="rename one")
    remedy = _no_commas(columns) or "put a field that holds commas in quotes"
    ragged = [
        f"{path}, row {number}: has another number of fields than the header; {remedy}"
        for number, fields in lines[1:]
        if len(fields) != len(columns)
    ]
    sound = [(number, fields) for number, fields in lines[1:] if len(fields) == len(columns)]
    return Rows(
        path=path,
        columns=columns,
        rows=[dict(zip(columns, fields, strict=True)) for _, fields in sound],
        numbers=[number for number, _ in sound],
        problems=ragged,
    )


def _text(path: Path) -> str:
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return stream.read()
    return path.read_text(encoding="utf-8-sig")


def _json_rows(path: Path, text: str) -> Rows:
    rows: list[Mapping[str, str]] = []
    numbers: list[int] = []
    problems: list[str] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # texts may hold other line breaks
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}, row {number}: is not JSON ({error.msg})")
            continue
        if not isinstance(entry, dict):
            problems.append(f"{path}, row {number}: is not a JSON object")
            continue
        rows.append({str(k): "" if v is None else str(v).strip() for k, v in entry.items()})
        numbers.append(number)
        columns |= dict.fromkeys(rows[-1])
    if not rows and not problems:
        raise InputError("is empty", path=path, remedy="a JSON object per picture is needed")
    complete = [{name: row.get(name, "") for name in columns} for row in rows]
    return Rows(
        path=path, columns=tuple(columns), rows=complete, numbers=numbers, problems=problems
    )
