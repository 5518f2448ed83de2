"""Searches beside the people who searched the same pictures, and beside chance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure

from heed_gaze.comparison.scoring import (
    LOWER_IS_BETTER,
    CompareSettings,
    Interval,
    Kind,
    attainment,
    bootstrap,
)
from heed_gaze.eccnet.layouts import natural_set
from heed_gaze.eccnet.viewers import (
    Performance,
    chance_curve,
    chance_of,
    consistency,
    found_by,
    likeness,
    performance,
)
from heed_gaze.metrics.searching import performance_area, probability_mismatch
from heed_gaze.plots import draw_performance
from heed_gaze_cli.eccnet_settings import SearchPrediction
from heed_gaze_cli.names import number_repeated
from heed_runtime.recipe import Row, Table
from heed_runtime.report import new_figure, style

SHOWN: tuple[Kind, ...] = ("predicted", "human", "random")
MODEL, VIEWERS, CHANCE = "model", "viewers", "chance"
_SCORE = "like viewers: "
"""Before the names of the columns that compare a search with viewers."""


def viewer_columns(prediction: SearchPrediction) -> Row:
    """Of one search: what chance and viewers do in its picture, and how alike the paths are."""
    trial = prediction.trial
    row: dict[str, str | int | float | None] = {}
    if trial.scene.cells is None and trial.scene.truth is not None:
        row["chance"] = chance_of(trial.scene, trial.rules)
    if not trial.viewers:
        return row
    when = found_by(trial.scene, trial.viewers, trial.rules)
    # a viewer who saw the picture again is another one
    names = number_repeated([one.subject for one in trial.viewers])
    row["found_by_viewers"] = json.dumps(dict(zip(names, when, strict=True)), ensure_ascii=False)
    for name, kinds in likeness(trial.scene, prediction.search, trial.viewers).items():
        for kind in SHOWN:
            value = kinds.get(kind, math.nan)
            row[f"{_SCORE}{name}, {kind}"] = value if math.isfinite(value) else None
    return row


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """How soon targets are found, and how alike paths are, per task; rows of all searches."""
    groups = _groups([row for row in rows if row["set_size"] is None or _found(row)])
    found = [row for name, group in groups.items() for row in _performance_rows(name, group)]
    alike = [row for name, group in groups.items() for row in _likeness_rows(name, group)]
    tables = [Table(title="searches", rows=found)] if found else []
    return [*tables, Table(title="likeness to viewers", rows=alike)] if alike else tables


def metrics_of(rows: Sequence[Row]) -> dict[str, float]:
    """ScanMatch of the searches, of viewers and of random paths, over all pictures with viewers."""
    column = f"{_SCORE}scanmatch, "
    known = [row for row in rows if _found(row)]
    if not known:
        return {}
    names: Mapping[Kind, str] = {
        "predicted": "scanmatch", "human": "scanmatch_human", "random": "scanmatch_random"
    }  # fmt: skip
    return {
        name: bootstrap(_column(known, f"{column}{kind}"), CompareSettings(resamples=1)).mean
        for kind, name in names.items()
    }


def draw_beside_viewers(rows: Sequence[Row]) -> Figure | None:
    """Targets found by each fixation: the model, the viewers, chance; a panel per task."""
    groups = _groups([row for row in rows if _found(row)])
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    with style():
        figure = new_figure(width_in=4.6 * columns, height_in=3.6 * lines)
        for number, (name, group) in enumerate(groups.items(), start=1):
            axes = figure.add_subplot(lines, columns, number)
            people = _viewers(group)
            curves = {MODEL: _model(group).curve, VIEWERS: people.curve}
            gap = probability_mismatch(curves[MODEL], curves[VIEWERS])
            draw_performance(axes, curves | _chance(group), human=VIEWERS, chance=CHANCE)
            axes.set_title(f"{name}: probability mismatch {gap:.2f}", fontsize=9)
    return figure


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row["task"]) or "pictures", []).append(row)
    return groups


def _performance_rows(task: str, rows: Sequence[Row]) -> list[Row]:
    """A row per searcher; the last two columns say how near it is to the viewers."""
    known = [row for row in rows if _found(row)]
    model = _performance_row(task, MODEL, len(rows), _model(rows))
    table = [model]
    if known:
        people = _viewers(known)
        when = [_found(row) for row in known]
        own, others = consistency([_when(row) for row in known], when, most=_most(known))
        model["mismatch"] = probability_mismatch(_model(known).curve, people.curve)
        model["consistency"] = own
        trials = sum(len(one) for one in when)
        table.append({
            **_performance_row(task, VIEWERS, trials, people),
            "mismatch": 0.0,
            "consistency": others,
        })  # fmt: skip
    for curve in _chance(rows).values():
        row = _performance_row(task, CHANCE, len(rows), _of_curve(curve))
        if known:
            row["mismatch"] = probability_mismatch(_chance(known)[CHANCE], _viewers(known).curve)
        table.append(row)
    return [dict(row) for row in table]


def _performance_row(
    task: str, searcher: str, trials: int, found: Performance
) -> dict[str, str | int | float | None]:
    return {
        "task": task,
        "searcher": searcher,
        "trials": trials,
        "found": found.found,
        "mean_saccades_when_found": found.mean,
        "median": found.median,
        "deviation": found.deviation,
        "area": performance_area(found.curve),
    }


def _of_curve(curve: Float64[np.ndarray, " n"]) -> Performance:
    """The statistics of a searcher whose curve is known."""
    share = np.diff(curve, prepend=0.0)
    found = float(curve[-1])
    if not found:
        nothing = float("nan")
        return Performance(curve=curve, found=0.0, mean=nothing, median=nothing, deviation=nothing)
    when = np.arange(len(curve))
    mean = float((share * when).sum() / found)
    return Performance(
        curve=curve,
        found=found,
        mean=mean,
        median=float(np.searchsorted(curve, found / 2)),
        deviation=float(np.sqrt((share * (when - mean) ** 2).sum() / found)),
    )


def _likeness_rows(task: str, rows: Sequence[Row]) -> list[Row]:
    """A row per score: the search and its interval over pictures, viewers, random paths."""
    known = [row for row in rows if _found(row)]
    names = [key[len(_SCORE) : -len(", predicted")] for row in known for key in row
             if key.startswith(_SCORE) and key.endswith(", predicted")]  # fmt: skip
    table: list[Row] = []
    for name in dict.fromkeys(names):
        values: dict[Kind, Interval] = {
            kind: bootstrap(_column(known, f"{_SCORE}{name}, {kind}"), CompareSettings())
            for kind in SHOWN
        }
        predicted, human = values["predicted"], values["human"]
        row: dict[str, str | int | float | None] = {
            "task": task,
            "score": name,
            "better": "lower" if name in LOWER_IS_BETTER else "higher",
            "model": predicted.mean,
            "low": predicted.low,
            "high": predicted.high,
            "viewers": human.mean,
            "random": values["random"].mean,
            "attained": attainment(name, values),
        }
        natural = natural_set(task)
        if natural is not None and name == "scanmatch":
            row["viewers (paper)"], row["eccNET (paper)"], row["IVSN (paper)"] = natural.scanmatch
        table.append(row)
    return table


def _found(row: Row) -> dict[str, int | None]:
    """Viewer -> finding fixation in the picture of a row; empty where nobody saw it."""
    text = row.get("found_by_viewers")
    return {} if text is None else dict(json.loads(str(text)))


def _when(row: Row) -> int | None:
    at = row["found_at"]
    return None if at is None else int(at)


def _most(rows: Sequence[Row]) -> int:
    return max(int(row["most"] or 0) for row in rows)


def _model(rows: Sequence[Row]) -> Performance:
    return performance([_when(row) for row in rows], _most(rows))


def _viewers(rows: Sequence[Row]) -> Performance:
    when = [at for row in rows for at in _found(row).values()]
    return performance(when, _most(rows))


def _chance(rows: Sequence[Row]) -> dict[str, Float64[np.ndarray, " n"]]:
    """The curve of chance, where it is known."""
    if any(row.get("chance") is None for row in rows):
        return {}
    chances = [float(row["chance"] or 0) for row in rows]
    return {CHANCE: chance_curve(chances, [row["found_at"] == 0 for row in rows], _most(rows))}


def _column(rows: Sequence[Row], name: str) -> Float64[np.ndarray, " n"]:
    values = [row.get(name) for row in rows]
    return np.array([np.nan if value is None else float(value) for value in values])
