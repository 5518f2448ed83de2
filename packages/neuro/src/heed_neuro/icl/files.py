"""Files: the description of a task (YAML), and a user's own sequences (csv, npz).

csv: one row per token, columns x1 ... xd and y (or y1 ... yn). A row whose y is empty is a query;
the others are the context. A column `sequence` tells several sequences in one file apart.

npz: arrays x (b, l, d), y (b, l) or (b, l, n), query (b, d) or (b, q, d), and, where known, answer
(b,), (b, n) or (b, q, n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
import yaml

from heed_core.arrays import load_arrays
from heed_core.errors import InputError, reason_of
from heed_neuro.icl.tasks import LinearTask, Sequences

TASK = "task.yaml"


@dataclass(frozen=True, kw_only=True)
class NamedSequences:
    """The sequences of one file, in groups of equal length."""

    name: str
    groups: tuple[Sequences, ...]
    labels: tuple[str, ...]
    """One per sequence, in order."""


def write_task(task: LinearTask, path: Path) -> None:
    """Write the description of a task."""
    values = {key: value for key, value in asdict(task).items() if value not in ((), "paper")}
    plain = {key: _plain(value) for key, value in values.items()}
    head = (
        "# An in-context regression task: y = beta.x + noise. The noise of y has this VARIANCE.\n"
        f"# {task.noise}\n"
    )
    path.write_text(head + yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def read_task(path: Path) -> LinearTask:
    """Read the description of a task; what it does not name has its default.

    Raises:
        InputError: The file is missing, is no YAML mapping, or names something that cannot be.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="see the layout in info") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else None
        raise InputError("is not valid YAML", path=path, place=place, remedy="correct it") from None
    if not isinstance(data, Mapping):
        raise InputError("holds no mapping such as 'dim: 5'", path=path, remedy="correct it")
    known = {field.name for field in fields(LinearTask)}
    for key in data:
        if key not in known:
            raise InputError(
                f"unknown key {key!r}", path=path, remedy=f"one of {', '.join(sorted(known))}"
            )
    try:
        return LinearTask(**{key: _typed(str(key), value) for key, value in data.items()})
    except (ValueError, TypeError) as error:
        raise InputError(str(error), path=path, remedy="correct it") from None


def read_sequences(path: Path, *, name: str | None = None) -> NamedSequences:
    """Read a user's sequences from a csv or npz file.

    Raises:
        InputError: The file cannot be read, lacks a column or array, or holds what is no number.
    """
    name = path.stem if name is None else name
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="check the path")
    if path.suffix == ".npz":
        return _read_npz(path, name)
    if path.suffix == ".csv":
        return _read_csv(path, name)
    raise InputError(f"is a {path.suffix or 'nameless'} file", path=path, remedy="give csv or npz")


def write_sequences_csv(sequences: Sequences, path: Path) -> None:
    """Write sequences, each with its queries (without their answers), as one csv."""
    frames = []
    for b in range(len(sequences.x)):
        x = torch.cat([sequences.x[b], sequences.query[b]]).numpy()
        y = torch.nn.functional.pad(
            sequences.y[b], (0, 0, 0, sequences.query.shape[1]), value=float("nan")
        ).numpy()
        frame = pd.DataFrame(x, columns=[f"x{k + 1}" for k in range(x.shape[1])])
        names = ["y"] if y.shape[1] == 1 else [f"y{k + 1}" for k in range(y.shape[1])]
        frame[names] = y
        frame.insert(0, "sequence", b)
        frames.append(frame)
    pd.concat(frames).to_csv(path, index=False, float_format="%.6g")


def _read_csv(path: Path, name: str) -> NamedSequences:
    try:
        table = pd.read_csv(path, dtype={"sequence": str})
    except (ValueError, OSError, UnicodeDecodeError) as error:
        reason = reason_of(error)
        raise InputError(f"is no table: {reason}", path=path, remedy="correct it") from None
    x_names, y_names = _columns(table, path)
    for column in (*x_names, *y_names):
        _check_numbers(table, column, path, may_be_empty=column in y_names)
    keys = table["sequence"] if "sequence" in table else pd.Series("0", index=table.index)
    groups, labels = [], []
    for label, rows in table.groupby(keys, sort=False):
        groups.append(_one_sequence(rows, x_names, y_names, path, str(label)))
        labels.append(str(label))
    if not groups:
        raise InputError("holds no rows", path=path, remedy="add a context and a query")
    return NamedSequences(name=name, groups=tuple(groups), labels=tuple(labels))


def _columns(table: pd.DataFrame, path: Path) -> tuple[list[str], list[str]]:
    names = [str(column) for column in table.columns]
    x_names = [f"x{k}" for k in range(1, len(names) + 1) if f"x{k}" in names]
    y_names = ["y"] if "y" in names else [f"y{k}" for k in range(1, len(names)) if f"y{k}" in names]
    if not x_names or not y_names:
        missing = "x1" if not x_names else "y"
        raise InputError(
            f"has no column {missing!r}, but {', '.join(names[:8])}",
            path=path,
            remedy="name the columns x1 ... xd and y (or y1 ... yn)",
        )
    if x_names != [f"x{k}" for k in range(1, len(x_names) + 1)]:
        raise InputError(
            f"has the columns {', '.join(x_names)}: one is missing", path=path, remedy="add it"
        )
    return x_names, y_names


def _check_numbers(table: pd.DataFrame, column: str, path: Path, *, may_be_empty: bool) -> None:
    values = pd.to_numeric(table[column], errors="coerce").astype(float)
    bad = ~np.isfinite(values) & ~(table[column].isna() if may_be_empty else False)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        found = table[column].iloc[row]
        what = "is empty" if pd.isna(found) else f"holds {str(found)[:20]!r}"
        raise InputError(
            f"the column {column!r} {what}, not a number",
            path=path,
            place=f"row {row + 2}",
            remedy="correct it",
        )


def _one_sequence(
    rows: pd.DataFrame, x_names: Sequence[str], y_names: Sequence[str], path: Path, label: str
) -> Sequences:
    x = rows[list(x_names)].to_numpy(dtype=np.float32)
    y = rows[list(y_names)].to_numpy(dtype=np.float32)
    asks = np.isnan(y).all(axis=1)
    partly = np.isnan(y).any(axis=1) & ~asks
    where = f"sequence {label}"
    if partly.any():
        raise InputError(
            "a row has some outputs and not others", path=path, place=where, remedy="correct it"
        )
    if not asks.any():
        raise InputError(
            "has no query: a row with an empty y", path=path, place=where, remedy="add one"
        )
    if (~asks).sum() < 2:
        raise InputError(
            f"has a context of {(~asks).sum()} rows, at least 2 are needed",
            path=path,
            place=where,
            remedy="add examples",
        )
    context, answers, query = (
        torch.from_numpy(part)[None] for part in (x[~asks], y[~asks], x[asks])
    )
    return Sequences(x=context, y=answers, query=query)


def _read_npz(path: Path, name: str) -> NamedSequences:
    arrays = load_arrays(path)
    for key in ("x", "y", "query"):
        if key not in arrays:
            raise InputError(f"has no array {key!r}", path=path, remedy="add it")
    for key in ("x", "y", "query", "answer"):
        if key in arrays:
            arrays[key] = _numbers(arrays[key], key, path)
    x, query = arrays["x"], arrays["query"]
    y = arrays["y"][..., None] if arrays["y"].ndim == 2 else arrays["y"]
    query = query[:, None] if query.ndim == 2 else query
    fits = (
        x.ndim == 3
        and y.ndim == 3
        and query.ndim == 3
        and y.shape[:2] == x.shape[:2]
        and (query.shape[0], query.shape[2]) == (x.shape[0], x.shape[2])
        and min(query.shape) > 0
    )
    if not fits or x.shape[1] < 2:
        raise InputError(
            f"x {arrays['x'].shape}, y {arrays['y'].shape}, query {arrays['query'].shape} do not "
            "fit (b, l >= 2, d), (b, l[, n]), (b[, q], d)",
            path=path,
            remedy="correct the shapes",
        )
    answer = None
    if "answer" in arrays:
        wanted = (len(x), query.shape[1], y.shape[2])
        if arrays["answer"].size != np.prod(wanted):
            raise InputError(
                f"answer {arrays['answer'].shape} does not fit {wanted}",
                path=path,
                remedy="correct it",
            )
        answer = torch.from_numpy(arrays["answer"].reshape(wanted))
    parts = (torch.from_numpy(np.ascontiguousarray(part)) for part in (x, y, query))
    context, outputs, asks = parts
    group = Sequences(x=context, y=outputs, query=asks, answer=answer)
    return NamedSequences(name=name, groups=(group,), labels=tuple(str(k) for k in range(len(x))))


def _numbers(array: np.ndarray, key: str, path: Path) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise InputError(f"the array {key!r} holds no numbers", path=path, remedy="correct it")
    if not np.isfinite(array).all():
        first = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"the array {key!r} is not finite at {first}",
            path=path,
            remedy="remove NaN and infinity",
        )
    return np.asarray(array, dtype=np.float32)


def _typed(key: str, value: Any) -> Any:
    """A value of the YAML file in the type of its field."""
    if key in ("dim", "length"):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{key} must be a whole number, got {value!r}")
        return value
    if key in ("noise_variance", "rho"):
        return _number(key, value)
    if key == "scaling":
        return value
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise TypeError(f"{key} must be a list of lists, got {value!r}")
    if key == "covariance":
        return tuple(tuple(_number(key, item) for item in row) for row in value)
    if not all(
        isinstance(item, int) and not isinstance(item, bool) for row in value for item in row
    ):
        raise TypeError(f"{key} must hold whole numbers")
    return tuple(tuple(row) for row in value)


def _number(key: str, value: Any) -> float:
    try:  # YAML 1.1 reads 1e-1 as a text
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{key} must be a number, got {value!r}") from None


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
