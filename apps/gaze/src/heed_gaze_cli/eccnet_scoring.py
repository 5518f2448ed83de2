"""The tables of eccNET's evaluation: six experiments beside people, chance and each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from heed_gaze.eccnet.experiments import EXPERIMENTS, experiment_of
from heed_gaze.eccnet.results import TaskTrials
from heed_gaze.eccnet.scoring import (
    ExperimentScore,
    ReactionTime,
    TaskScore,
    human_mean,
    score_experiment,
    score_task,
    scored_saccades,
)
from heed_gaze.plots import draw_performance, draw_search_slopes
from heed_gaze_cli.eccnet_settings import PicturePrediction, SearchPrediction
from heed_gaze_cli.eccnet_viewers import (
    draw_beside_viewers,
    metrics_of,
    tables_of,
    viewer_columns,
)
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import new_figure, style

MEASURED = ReactionTime(ms_per_saccade=1.0, ms_at_rest=0.0)
"""For reaction times that are known."""


def search_row(prediction: SearchPrediction) -> Row:
    """One trial."""
    trial, found = prediction.trial, prediction.search
    cells = trial.scene.cells
    return {
        "case": prediction.name,
        "task": trial.task,
        "set_size": trial.set_size,
        "cells": None if cells is None else len(cells),
        "found_at": found.found_at,
        "fixations": len(found.fixations),
        "most": trial.rules.max_fixations - 1,
        **viewer_columns(prediction),
    }


def picture_row(prediction: PicturePrediction, names: Sequence[str]) -> Row:
    """One picture."""
    best = int(np.argmax(prediction.probabilities))
    return {
        "case": prediction.name,
        "label": names[prediction.label],
        "predicted": names[best],
        "probability": max(prediction.probabilities),
    }


def report_pictures(rows: Sequence[Row], names: Sequence[str]) -> Report:
    """Accuracy, in all and per class, beside chance."""
    hits = {name: [r["predicted"] == name for r in rows if r["label"] == name] for name in names}
    table: list[Row] = [
        {"class": name, "pictures": len(found), "accuracy": float(np.mean(found))}
        for name, found in hits.items()
        if found
    ]
    accuracy = float(np.mean([row["label"] == row["predicted"] for row in rows]))
    return Report(
        metrics={"accuracy": accuracy, "chance": 1 / max(len(names), 1)},
        tables=[Table(title="accuracy per class", rows=table)],
    )


def report_searches(rows: Sequence[Row]) -> Report:
    """The paper's table as far as there are its experiments; other searches beside viewers."""
    trials: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["set_size"] is not None:
            sizes, counts = trials.setdefault(str(row["task"]), ([], []))
            sizes.append(int(row["set_size"]))
            found = row["found_at"]
            counts.append(scored_saccades(None if found is None else int(found), sizes[-1]))
    found_share = float(np.mean([row["found_at"] is not None for row in rows]))
    metrics = {"found": found_share, "mean_saccades_when_found": _mean_found(rows)}
    tables: list[Table] = []
    plots = {"performance": _draw_performance(rows)}
    if trials:
        places = {row["task"]: row["cells"] for row in rows}
        cells = {str(name): None if n is None else int(n) for name, n in places.items()}
        scored = report_tasks(trials, model=ReactionTime(), cells=cells)
        metrics |= scored.metrics
        tables += scored.tables
        plots |= scored.plots
    if (beside := draw_beside_viewers(rows)) is not None:
        plots["viewers"] = beside
    metrics |= metrics_of(rows)
    tables += tables_of(rows)
    return Report(metrics=metrics, tables=tables, plots=plots)


def report_tasks(
    trials: TaskTrials,
    *,
    model: ReactionTime | None,
    cells: Mapping[str, int | None],
) -> Report:
    """Indices of the experiments both of whose tasks are there, slopes of all tasks.

    Args:
        trials: Set sizes, and saccades or reaction times, of each task.
        model: Saccades to reaction times. None: they are reaction times already.
        cells: How many places there are to look at, for chance.
    """
    line = MEASURED if model is None else model
    scores = {name: score_task(*values, line) for name, values in trials.items()}
    compared = _experiments(trials, line)
    known = [score.index for score in compared if np.isfinite(score.index)]
    metrics: dict[str, float] = {}
    tables = []
    if compared:
        metrics = {
            "asymmetry_index": float(np.mean(known)) if known else float("nan"),
            "asymmetry_index_human": human_mean(),
            "experiments": len(known),
        }
        tables.append(Table(title="asymmetry", rows=[_row_of(score) for score in compared]))
    rows = _task_rows(scores, trials, cells, measured=model is None)
    tables.append(Table(title="tasks", rows=rows))
    return Report(metrics=metrics, tables=tables, plots={"slopes": draw_slopes(scores)})


def _mean_found(rows: Sequence[Row]) -> float:
    found = [float(row["found_at"]) for row in rows if row["found_at"] is not None]
    return float(np.mean(found)) if found else float("nan")


def _experiments(trials: TaskTrials, model: ReactionTime) -> list[ExperimentScore]:
    """Of the experiments both of whose tasks were searched."""
    scores = []
    for experiment in EXPERIMENTS:
        both = {
            task.name: next(
                (v for k, v in trials.items() if f"/{k}".endswith(f"/{task.name}")), None
            )
            for task in experiment.tasks
        }
        present = {name: values for name, values in both.items() if values is not None}
        if len(present) == len(both):
            scores.append(score_experiment(experiment, present, model))
    return scores


def _row_of(score: ExperimentScore) -> Row:
    easy, hard = score.experiment.tasks
    slopes = [score.tasks[task.name].slope_ms for task in (easy, hard)]
    return {
        "experiment": f"{score.experiment.number} {score.experiment.name}",
        "easy for people": easy.name.split("/", 1)[1],
        "ms/item": slopes[0],
        "human": easy.human_slope_ms,
        "hard for people": hard.name.split("/", 1)[1],
        "ms/item (hard)": slopes[1],
        "human (hard)": hard.human_slope_ms,
        "index": score.index,
        "human index": score.human_index,
        "F": score.f_value,
        "p": score.p_value,
    }


def _task_rows(
    scores: Mapping[str, TaskScore],
    trials: TaskTrials,
    cells: Mapping[str, int | None],
    *,
    measured: bool,
) -> list[Row]:
    """A row per task and set size; by chance one finds one of m cells in (m + 1) / 2 saccades."""
    table: list[Row] = []
    for name, score in sorted(scores.items()):
        count = cells.get(name)
        for index, size in enumerate(score.set_sizes):
            row: dict[str, str | int | float | None] = {
                "task": name,
                "set_size": size,
                "trials": sum(one == size for one in trials[name][0]),
            }
            if not measured:
                row["mean_saccades"] = score.mean_saccades[index]
                row["chance"] = None if count is None else (float(count) + 1) / 2
            row["mean_rt_ms"] = score.mean_rt_ms[index]
            row["se_ms"] = score.standard_error_ms[index]
            table.append(row)
    return table


def _draw_performance(rows: Sequence[Row]) -> Figure:
    names = dict.fromkeys(str(row["task"]).split("/")[0] for row in rows)
    curves = {}
    for name in names:
        group = [row for row in rows if str(row["task"]).split("/")[0] == name]
        most = int(max(float(row["most"] or 0) for row in group))
        found = [np.inf if r["found_at"] is None else float(r["found_at"]) for r in group]
        curves[name or "pictures"] = np.array(
            [np.mean([at <= count for at in found]) for count in range(most + 1)]
        )
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        draw_performance(axes, curves)
        axes.set(xlabel="saccade")
    return figure


def draw_slopes(scores: Mapping[str, TaskScore]) -> Figure:
    """Reaction times against set sizes with fitted lines, a panel per experiment."""
    panels: dict[str, dict[str, TaskScore]] = {}
    for name, score in scores.items():
        experiment = experiment_of(name)
        title = f"{experiment.number} {experiment.name}" if experiment else name
        panels.setdefault(title, {})[name.split("/", 1)[-1]] = score
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with style():
        figure = new_figure(width_in=4.6 * columns, height_in=3.4 * lines)
        for number, (title, tasks) in enumerate(sorted(panels.items()), start=1):
            axes = figure.add_subplot(lines, columns, number)
            sizes = sorted({size for score in tasks.values() for size in score.set_sizes})
            times = {n: _aligned(score.mean_rt_ms, score, sizes) for n, score in tasks.items()}
            errors = {
                n: _aligned(score.standard_error_ms, score, sizes) for n, score in tasks.items()
            }
            draw_search_slopes(axes, np.array(sizes), times, errors=errors)
            axes.set_title(title)
    return figure


def _aligned(values: Sequence[float], score: TaskScore, sizes: Sequence[int]) -> np.ndarray:
    known = dict(zip(score.set_sizes, values, strict=True))
    return np.array([known.get(size, np.nan) for size in sizes])
