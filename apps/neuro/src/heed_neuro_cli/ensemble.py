"""Combine trained brain encoders: average runs, weigh backbone layers vertex by vertex, evaluate.

RUN... are trainings of one subject. Runs of one layer are averaged; the weight of a layer at a
vertex is a softmax of 40 times its validation r, averaged over its runs. The selection sees the
validation images of each run alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from heed_core.errors import InputError
from heed_neuro.brain_encoder.ensemble import (
    SHARPNESS,
    average_runs,
    combine_layers,
    layer_weights,
)
from heed_neuro.brain_encoder.scores import pearson_of_known
from heed_neuro_cli.brain_cases import ImageSet, OneSplit
from heed_neuro_cli.brain_module import predict_images
from heed_neuro_cli.brain_scoring import report_rows, score_rows
from heed_runtime.files import atomic_folder, write_csv, write_json
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Table
from heed_runtime.report import save_figure, save_table
from heed_runtime.terminal import Result, rows_of
from heed_runtime.trained import data_of, open_trained

if TYPE_CHECKING:
    from heed_runtime.app import App

RunPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The runs, and what they are judged on."""

    runs: RunPaths
    """Folders that train wrote."""
    data: OptionalPath = None
    """The subject. None: that of the first run."""
    sharpness: float = SHARPNESS
    """Factor of r in the softmax over layers."""
    out: OptionalPath = None
    """Also write scores, pictures and the predictions into this folder."""
    overwrite: Flag = False
    """Replace the folder."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    layer: str
    predicted: dict[str, np.ndarray]
    validation_r: dict[str, np.ndarray]
    case: ImageSet


def run(app: App, options: Options) -> Result:
    """Predict with every run, combine, score."""
    if not options.runs:
        raise InputError("ensemble needs at least one RUN", remedy="name trained runs")
    members = [_member(app, options, path) for path in options.runs]
    case = members[0].case
    predicted = {g: _combined(members, g, options.sharpness) for g in case.measured}
    rows = score_rows(
        "ensemble", predicted, case.measured, case.regions, case.ceilings, case.surface
    )
    report = report_rows(rows)
    layers = sorted({member.layer for member in members})
    files = []
    if options.out is not None:
        with atomic_folder(
            options.out, overwrite=options.overwrite, used=[*options.runs, options.data]
        ) as folder:
            write_json(folder / "metrics.json", {"metrics": report.metrics, "layers": layers})
            write_csv(folder / "cases.csv", rows)
            for table in report.tables:
                save_table(table, folder)
            for stem, figure in report.plots.items():
                save_figure(figure, folder / f"{stem}.png")
            for group, own in predicted.items():
                np.save(folder / f"{group}_pred.npy", own.astype(np.float32))
        files = sorted(options.out.iterdir())
    return Result(
        title=f"{len(members)} runs of {len(layers)} layers",
        tables=[Table(title="", rows=rows_of(report.metrics, key="metric")), *report.tables],
        data={"metrics": report.metrics, "layers": layers},
        files=files,
    )


def _member(app: App, options: Options, path: Path) -> _Member:
    trained = open_trained(app, path, device="cpu")
    if trained.run.system != "brain-encoder":
        raise InputError(
            f"is a run of {trained.run.system}", path=path, remedy="give runs of brain-encoder"
        )
    root = data_of(trained.run, options.data)
    model: Any = trained.model.eval()
    batch = trained.settings.trainer.batch
    held = OneSplit(trained.settings, root, "val")[0]
    guess = predict_images(model, held, batch=batch)
    test = OneSplit(trained.settings, root, "test")[0]
    return _Member(
        layer=trained.settings.data.made_with,
        predicted=predict_images(model, test, batch=batch),
        validation_r={g: pearson_of_known(guess[g], own) for g, own in held.measured.items()},
        case=test,
    )


def _combined(members: list[_Member], group: str, sharpness: float) -> np.ndarray:
    layers = sorted({member.layer for member in members})
    predictions, scores = [], []
    for layer in layers:
        own = [member for member in members if member.layer == layer]
        predictions.append(average_runs([member.predicted[group] for member in own]))
        scores.append(
            np.mean([np.nan_to_num(member.validation_r[group]) for member in own], axis=0)
        )
    weights = layer_weights(np.stack(scores), sharpness=sharpness)
    return combine_layers(predictions, weights)
