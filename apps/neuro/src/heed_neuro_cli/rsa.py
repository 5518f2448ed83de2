"""Compare a network's dissimilarities of images with brains': representational similarity.

IMAGES is a folder of images in the order of the matrices; `--rdms` a .npz of square matrices of
these images: names of arrays, (n, n) each, or (subjects, ..., n, n), whose mean over all is taken
and which give a noise ceiling. `--runs` adds what the queries of trained encoders found.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro

from heed_core.arrays import load_arrays
from heed_core.errors import InputError
from heed_core.folders import unique_names
from heed_neuro.brain_encoder.backbones import BackboneConfig
from heed_neuro.brain_encoder.routing import routed_representation
from heed_neuro.brain_encoder.source import FeatureSource
from heed_neuro.brain_encoder.subject import find_images
from heed_neuro.rsa import Comparison, compare_with_interval, dissimilarities, noise_ceiling
from heed_neuro_cli.brain_explaining import query_names, used_queries
from heed_neuro_cli.brain_settings import checked_source, labelled
from heed_runtime.files import atomic_folder, write_csv
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Row, Table
from heed_runtime.report import save_figure, slug
from heed_runtime.terminal import Result
from heed_runtime.trained import open_trained

if TYPE_CHECKING:
    from heed_runtime.app import App

ImagesPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Images, brains, networks."""

    images: ImagesPath
    """A folder of images."""
    rdms: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """A .npz of dissimilarity matrices of these images."""
    arrays: tuple[str, ...] = ()
    """Which arrays of the file. Empty: all square ones."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen network."""
    runs: tuple[Path, ...] = ()
    """Trained encoders, each with the network that it was trained on."""
    how: Comparison = "spearman"
    """Of the matrices' upper triangles."""
    draws: int = 200
    """Of images, for the intervals."""
    out: OptionalPath = None
    """Also write the table, matrices and pictures into this folder."""
    overwrite: Flag = False
    """Replace the folder."""


def run(app: App, options: Options) -> Result:
    """Compare every representation with every brain."""
    images = find_images(options.images)
    brains = read_matrices(options.rdms, len(images), options.arrays)
    models = _representations(app, options, images)
    rows: list[Row] = []
    for brain, found in brains.items():
        mean = found.reshape(-1, *found.shape[-2:]).mean(axis=0)
        for model, patterns in models.items():
            own = compare_with_interval(
                dissimilarities(patterns), mean, how=options.how, draws=options.draws
            )
            row: dict[str, str | int | float | None] = {
                "representation": model,
                "brain": brain,
                options.how: own.value,
                "low": own.low,
                "high": own.high,
            }
            if found.ndim > 2:
                subjects = found.reshape(len(found), -1, *found.shape[-2:]).mean(axis=1)
                ceiling = noise_ceiling(subjects, how=options.how)
                row |= {"ceiling_low": ceiling.lower, "ceiling_high": ceiling.upper}
            else:
                row |= {"ceiling_low": None, "ceiling_high": None}
            rows.append(row)
    files = [] if options.out is None else _write(options, rows, models, brains)
    return Result(
        title=f"{len(images)} images, {options.how}",
        tables=[Table(title="", rows=rows)],
        data={"similarities": rows},
        files=files,
    )


def read_matrices(path: Path, images: int, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The dissimilarity matrices of a .npz.

    Raises:
        InputError: No such file, damaged, or no matrix of these images.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give a .npz of matrices")
    tables = {name: array for name, array in load_arrays(path).items() if array.dtype.kind in "fiu"}
    square = {n: a for n, a in tables.items() if a.ndim > 1 and a.shape[-1] == a.shape[-2]}
    if missing := [name for name in names if name not in square]:
        raise InputError(
            f"has no square array {missing[0]!r} (it has {', '.join(square) or 'none'})",
            path=path,
            remedy="correct --arrays",
        )
    chosen = {name: square[name] for name in names or square}
    for name, own in chosen.items():
        if own.shape[-1] != images:
            raise InputError(
                f"{name} is of {own.shape[-1]} images where there are {images}",
                path=path,
                remedy="give the images of the matrices",
            )
        if not np.isfinite(own).all():
            raise InputError(f"{name} holds NaN", path=path, remedy="name others by --arrays")
    if not chosen:
        raise InputError("holds no square matrix", path=path, remedy="give dissimilarities")
    return {name: own.astype(np.float64) for name, own in chosen.items()}


def _representations(app: App, options: Options, images: tuple[Path, ...]) -> dict[str, np.ndarray]:
    source = FeatureSource(config=options.backbone)
    features = source.compute(images)
    found = {
        f"{options.backbone.name}, all tokens": features.reshape(len(images), -1),
        f"{options.backbone.name}, mean token": features.mean(axis=(1, 2)),
    }
    for label, path in labelled(options.runs).items():
        trained = open_trained(app, path, device="cpu")
        model: Any = trained.model.eval()
        own = torch.from_numpy(checked_source(trained.settings).compute(images))
        if tuple(own.shape[1:3]) != model.config.grid:
            raise InputError(
                f"was trained on {model.config.grid} tokens; these images have "
                f"{tuple(own.shape[1:3])}",
                path=path,
                remedy="bring the images to the size of the training's",
            )
        routed = torch.cat(
            [routed_representation(model, part) for part in torch.split(own, 16)]
        ).numpy()
        names = query_names(model)
        for query in used_queries(model):
            found[f"{label}: {names[query]}"] = routed[:, query]
        found[f"{label}: all queries"] = routed.reshape(len(images), -1)
    return found


def _stems(names: Collection[str]) -> dict[str, str]:
    """A stem of files for each name; those that come again are numbered."""
    stems = unique_names([slug(name) for name in names], [Path()] * len(names))
    return dict(zip(names, stems, strict=True))


def _write(
    options: Options,
    rows: list[Row],
    models: Mapping[str, np.ndarray],
    brains: Mapping[str, np.ndarray],
) -> list[Path]:
    from heed_neuro_cli.brain_pictures import draw_bars

    assert options.out is not None
    with atomic_folder(
        options.out, overwrite=options.overwrite, used=[options.images, options.rdms, *options.runs]
    ) as folder:
        write_csv(folder / "rsa.csv", rows)
        stems = _stems(models)
        matrices = {stems[name]: dissimilarities(own) for name, own in models.items()}
        np.savez_compressed(folder / "rdms.npz", **matrices)  # type: ignore[arg-type]
        for brain, stem in _stems(brains).items():
            own = [row for row in rows if row["brain"] == brain]
            values = {str(r["representation"]): float(r[options.how] or 0.0) for r in own}
            spans = {
                str(r["representation"]): (float(r["low"] or 0.0), float(r["high"] or 0.0))
                for r in own
            }
            low, high = own[0]["ceiling_low"], own[0]["ceiling_high"]
            band = None if low is None or high is None else (float(low), float(high))
            figure = draw_bars(values, label=f"{options.how}, {brain}", spans=spans, band=band)
            save_figure(figure, folder / f"rsa-{stem}.png")
    return sorted(options.out.iterdir())
