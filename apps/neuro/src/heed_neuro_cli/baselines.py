"""Score the encoders that are solved, not trained: ridge and PCA regression on frozen features.

DATA is a subject's folder. Penalties are chosen per vertex by cross-validation within the training
images; the test images are predicted once. Trained runs may be named to stand in the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from heed_neuro.brain_encoder.backbones import BackboneConfig
from heed_neuro.brain_encoder.solved import (
    Flat,
    gather_targets,
    pca_regression,
    ridge_all_tokens,
    ridge_mean_token,
)
from heed_neuro.ridge import ALPHAS, RidgeOptions
from heed_neuro_cli.brain_cases import ImageSet, OneSplit
from heed_neuro_cli.brain_module import predict_images
from heed_neuro_cli.brain_scoring import REGION, score_rows
from heed_neuro_cli.brain_settings import BrainData, BrainSettings, labelled, planned
from heed_neuro_cli.features import DataPath
from heed_runtime.files import atomic_folder, write_csv
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Row, Table
from heed_runtime.report import save_figure
from heed_runtime.terminal import Result
from heed_runtime.trained import open_trained

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The subject, the features, the solver."""

    data: DataPath
    """A subject's folder."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen network."""
    cache: OptionalPath = None
    """Features on disk, made or continued. None: in memory."""
    split: Literal["val", "test"] = "test"
    """What is predicted."""
    runs: tuple[Path, ...] = ()
    """Trained runs to score beside."""
    components: int = 100
    """Of the PCA."""
    folds: int = 5
    """Of the choice of the penalty."""
    targets_batch: int = 4096
    """Vertices that are solved together."""
    out: OptionalPath = None
    """Also write the table and a picture into this folder."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        RidgeOptions(folds=self.folds, targets_batch=self.targets_batch)
        if self.components < 1:
            raise ValueError(f"components must be at least 1, got {self.components}")


def run(app: App, options: Options) -> Result:
    """Solve each encoder, score all on the same images."""
    data = BrainData(backbone=options.backbone, cache=options.cache)
    settings = planned(replace(BrainSettings(), data=data), options.data)
    case = OneSplit(settings, options.data, options.split)[0]
    train = OneSplit(settings, options.data, "train")[0]
    predictions = _solve(train, case, options)
    for label, path in labelled(options.runs).items():
        trained = open_trained(app, path, device="cpu")
        own = OneSplit(trained.settings, options.data, options.split)[0]
        model: Any = trained.model
        predictions[f"{trained.settings.model.kind} ({label})"] = predict_images(
            model.eval(), own, batch=16
        )
    rows: list[Row] = []
    for name, predicted in predictions.items():
        for row in _regions(name, predicted, case):
            rows.append(row)
    return _result(rows, options)


def _solve(
    train: ImageSet, case: ImageSet, options: Options
) -> dict[str, Mapping[str, np.ndarray]]:
    targets = gather_targets(list(train.measured.values()))
    solver = RidgeOptions(alphas=ALPHAS, folds=options.folds, targets_batch=options.targets_batch)
    own, new = Flat(train.features, train.rows), Flat(case.features, case.rows)
    scaled = replace(solver, alphas=tuple(10.0**power for power in range(-6, 5)))
    found = {
        "ridge, all tokens": ridge_all_tokens(own, targets, new, scaled),
        "ridge, mean token": ridge_mean_token(
            train.features[train.rows], targets, case.features[case.rows], solver
        ),
        f"PCA ({options.components}) + regression": pca_regression(
            own, targets, new, components=options.components, options=solver
        ),
    }
    return {name: _by_group(values.numpy(), train) for name, values in found.items()}


def _by_group(values: np.ndarray, case: ImageSet) -> dict[str, np.ndarray]:
    sizes = [own.shape[1] for own in case.measured.values()]
    parts = np.split(values, np.cumsum(sizes)[:-1], axis=1)
    return dict(zip(case.measured, parts, strict=True))


def _regions(name: str, predicted: Mapping[str, np.ndarray], case: ImageSet) -> list[Row]:
    found = score_rows(
        case.name, predicted, case.measured, case.regions, case.ceilings, case.surface
    )
    kept = ("group", "region", "vertices", "r", "r_low", "r_high", "accuracy")
    return [
        {"encoder": name, **{key: row[key] for key in kept}}
        for row in found
        if row["level"] == REGION
    ]


def _result(rows: list[Row], options: Options) -> Result:
    heads = [
        row
        for row in rows
        if row["group"] == rows[0]["group"] and row["region"] == rows[0]["region"]
    ]
    files: list[Path] = []
    if options.out is not None:
        from heed_neuro_cli.brain_pictures import draw_bars

        values = {str(row["encoder"]): float(row["r"] or 0.0) for row in heads}
        spans = {
            str(row["encoder"]): (float(row["r_low"] or 0.0), float(row["r_high"] or 0.0))
            for row in heads
        }
        with atomic_folder(
            options.out,
            overwrite=options.overwrite,
            used=[options.data, options.cache, *options.runs],
        ) as folder:
            write_csv(folder / "baselines.csv", rows)
            save_figure(draw_bars(values, label="r", spans=spans), folder / "baselines.png")
        files = sorted(options.out.iterdir())
    return Result(
        title=f"encoders on the split {options.split!r}",
        tables=[Table(title="", rows=heads), Table(title="regions", rows=rows)],
        data={"encoders": rows},
        files=files,
    )
