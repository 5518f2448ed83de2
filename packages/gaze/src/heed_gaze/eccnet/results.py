"""Results of searches that any program or laboratory measured, to score as the paper does.

    *.csv      task, set_size, and one of found_at (index of the fixation that found the target, 0 =
               the initial one; empty = not found), saccades, rt_ms; a row per trial
    TASK.npy   or anything below TASK/: a row per trial, 1 at the index of the fixation that found
               the target, all 0 where it was not found; blocks of trials by set size

Other columns are passed over, so that the `cases.csv` of an evaluation can be scored again.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from heed_core.errors import InputError
from heed_gaze.eccnet.arrays import read_numbers
from heed_gaze.eccnet.experiments import EXPERIMENTS, Experiment, Task
from heed_gaze.eccnet.scoring import scored_saccades

Unit = Literal["saccades", "ms"]
COLUMNS: Mapping[str, Unit] = {"rt_ms": "ms", "saccades": "saccades", "found_at": "saccades"}
"""Column -> its unit; the first that is there counts."""
TaskTrials = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Name of a task -> set size and value of each trial."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Trials of several tasks."""

    trials: TaskTrials
    unit: Unit
    """Of the values: saccades until the target was found, or reaction times."""
    skipped: tuple[str, ...] = ()
    """What has no set size."""


def read_results(path: Path) -> Results:
    """Read a table, one array, or all arrays (else tables) below a folder.

    Raises:
        InputError: Nothing of the kind; names the file and the row.
    """
    if not path.exists():
        raise InputError("no such file or folder", path=path, remedy="check the path")
    if path.is_file():
        found = {path.suffix.lower(): [path]}
    else:
        found = {suffix: sorted(path.rglob(f"*{suffix}")) for suffix in (".npy", ".csv")}
    root = path if path.is_dir() else path.parent
    if arrays := found.get(".npy"):
        return _read_arrays(arrays, root)
    if tables := found.get(".csv"):
        return _joined([_read_table(table) for table in tables], path)
    raise InputError(
        "holds no results", path=path, remedy="give a csv with task and set_size, or TASK.npy"
    )


def _joined(parts: Sequence[Results], path: Path) -> Results:
    units = {part.unit for part in parts}
    if len(units) > 1:
        raise InputError(
            "holds saccades and reaction times", path=path, remedy="give one kind at a time"
        )
    trials: dict[str, tuple[list[int], list[float]]] = {}
    for part in parts:
        for name, (sizes, values) in part.trials.items():
            both = trials.setdefault(name, ([], []))
            both[0].extend(sizes)
            both[1].extend(values)
    if not trials:
        raise InputError("holds no trial with a set size", path=path, remedy="give set_size")
    skipped = tuple(line for part in parts for line in part.skipped)
    return Results(trials=trials, unit=units.pop(), skipped=skipped)


def _read_table(path: Path) -> Results:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            head, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is not a csv table ({error})", path=path) from None
    column = next((name for name in COLUMNS if name in head), None)
    missing = [name for name in ("task", "set_size") if name not in head]
    if column is None or missing:
        wanted = missing[0] if missing else " or ".join(COLUMNS)
        raise InputError(f"has no column {wanted}", path=path, remedy="add the column")
    trials: dict[str, tuple[list[int], list[float]]] = {}
    skipped = []
    for number, row in enumerate(rows, start=2):
        if not row["set_size"]:
            skipped.append(f"{path}, row {number}: has no set size")
            continue
        size, value = _numbers(path, number, row, column)
        sizes, values = trials.setdefault(str(row["task"]), ([], []))
        sizes.append(size)
        values.append(value)
    return Results(trials=trials, unit=COLUMNS[column], skipped=tuple(skipped))


def _numbers(
    path: Path, number: int, row: Mapping[str, str | None], column: str
) -> tuple[int, float]:
    """Set size and value of a row; a target that was not found counts as the set size."""
    fault = InputError(
        f"task, set_size and {column} must be a name, a number above 0 and one not below 0, got "
        f"{row['task']!r}, {row['set_size']!r} and {row[column]!r}",
        path=path,
        place=f"row {number}",
        remedy="correct or remove the row",
    )
    try:
        size = float(row["set_size"] or "nan")
        unfound = column == "found_at" and not row[column]
        value = scored_saccades(None, int(size)) if unfound else float(row[column] or "nan")
    except ValueError:
        raise fault from None
    if not row["task"] or not (size >= 1 and size.is_integer()):
        raise fault
    if not math.isfinite(value) or value < 0:
        raise fault
    return int(size), float(value)


def _read_arrays(paths: Sequence[Path], root: Path) -> Results:
    trials: dict[str, tuple[list[int], list[float]]] = {}
    for path in paths:
        experiment, task = _task_of(path, root)
        found = _read_array(path)
        blocks = len(experiment.set_sizes)
        if len(found) % blocks:
            raise InputError(
                f"has {len(found)} trials, which are not {blocks} equal blocks of set sizes "
                f"{', '.join(map(str, experiment.set_sizes))}",
                path=path,
                remedy="give all trials, or a csv with set_size",
            )
        if task.name in trials:
            raise InputError(
                f"is a second array of the task {task.name}", path=path, remedy="give one model"
            )
        sizes = np.repeat(experiment.set_sizes, len(found) // blocks).tolist()
        values = [
            float(scored_saccades(None if at < 0 else at, size))
            for at, size in zip(found, sizes, strict=True)
        ]
        trials[task.name] = (sizes, values)
    return Results(trials=trials, unit="saccades")


def _task_of(path: Path, root: Path) -> tuple[Experiment, Task]:
    name = f"/{path.relative_to(root.parent).with_suffix('').as_posix()}/"
    if len(path.relative_to(root).parts) == 1:  # a file given alone: its folders say the task
        name = f"/{path.absolute().with_suffix('').as_posix().lstrip('/')}/"
    for experiment in EXPERIMENTS:
        for task in experiment.tasks:
            if f"/{task.name}/" in name:
                return experiment, task
    raise InputError(
        "is named after no task of the six experiments",
        path=path,
        remedy="name it as the stimuli are, such as curvature/curve_in_lines.npy",
    )


def _read_array(path: Path) -> list[int]:
    """The index of the fixation that found the target in each trial; -1: not found."""
    remedy = "give a row per trial, 1 where the target was found"
    array = read_numbers(path, ("trials", "fixations"), remedy=remedy)
    hits = (array == 1).sum(axis=1)
    wrong = np.flatnonzero((hits > 1) | ((array != 0) & (array != 1)).any(axis=1))
    if len(array) == 0 or len(wrong):
        raise InputError(
            "has no trial" if len(array) == 0 else "is not one 1 among zeros",
            path=path,
            place=None if len(array) == 0 else f"row {wrong[0] + 1}",
            remedy="give a row per trial, 1 where the target was found",
        )
    return [int(row.argmax()) if row.any() else -1 for row in array]
