"""Tell how well a subject's test responses could be predicted: noise ceilings from repeats.

DATA is a subject's folder, or a .npy of repeated trials (images, repeats, vertices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from heed_core.errors import InputError
from heed_neuro.brain_encoder.arrays import read_array, refuse_gaps
from heed_neuro.brain_encoder.regions import Regions, reported
from heed_neuro.brain_encoder.subject import read_subject
from heed_neuro.noise_ceiling import (
    Estimator,
    noise_ceiling,
    signal_to_noise,
    spearman_brown,
    split_half,
)
from heed_neuro_cli.features import DataPath
from heed_runtime.files import atomic_folder, write_csv
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The repeats, and how they are used."""

    data: DataPath
    """A subject's folder, or a .npy (images, repeats, vertices)."""
    estimator: Estimator = "unbiased"
    """Of the signal variance; "total" is lower by about 1 / images."""
    trials: int | None = None
    """Trials that a response is averaged over. None: all repeats."""
    out: OptionalPath = None
    """Also write <group>_noise_ceiling.npy and a table of vertices into this folder."""
    overwrite: Flag = False
    """Replace the folder."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")


def run(app: App, options: Options) -> Result:
    """Compute group by group."""
    repeats, regions = _repeats(options.data)
    rows: list[Row] = []
    vertices: list[Row] = []
    ceilings: dict[str, np.ndarray] = {}
    for group, values in repeats.items():
        snr = signal_to_noise(values, estimator=options.estimator).ncsnr
        ceiling = noise_ceiling(snr, options.trials or values.shape[1])
        halves = spearman_brown(split_half(values))
        ceilings[group] = ceiling
        everything = {"all vertices": np.ones(len(snr), dtype=bool)}
        named = reported(regions[group]) if group in regions else {}
        for region, own in {**everything, **named}.items():
            rows.append(_row(group, region, snr[own], ceiling[own], halves[own]))
        vertices += [
            {
                "group": group,
                "vertex": k,
                "ncsnr": float(a),
                "ceiling": float(b),
                "split_half": float(c),
            }
            for k, (a, b, c) in enumerate(zip(snr, ceiling, halves, strict=True))
        ]
    files = []
    if options.out is not None:
        with atomic_folder(options.out, overwrite=options.overwrite, used=[options.data]) as folder:
            write_csv(folder / "vertices.csv", vertices)
            for group, ceiling in ceilings.items():
                np.save(folder / f"{group}_noise_ceiling.npy", ceiling.astype(np.float32))
        files = sorted(options.out.iterdir())
    return Result(
        title=f"noise ceilings ({options.estimator} estimate of the signal)",
        tables=[Table(title="", rows=rows)],
        data={"regions": rows},
        files=files,
    )


def _row(group: str, region: str, snr: np.ndarray, ceiling: np.ndarray, halves: np.ndarray) -> Row:
    fine = halves[np.isfinite(halves)]
    return {
        "group": group,
        "region": region,
        "vertices": len(snr),
        "ncsnr": float(np.mean(snr)),
        "ceiling": float(np.mean(ceiling)),
        "ceiling_median": float(np.median(ceiling)),
        "split_half": float(fine.mean()) if len(fine) else None,
        "no_signal": int((ceiling <= 0).sum()),
    }


def _repeats(path: Path) -> tuple[dict[str, np.ndarray], Mapping[str, Regions]]:
    if path.is_file():
        found = read_array(path, axes=("images", "repeats", "vertices"))
        refuse_gaps(path, found)
        repeats, regions = {"all": found}, {}
    else:
        subject = read_subject(path)
        own = subject.responses.get("test", {})
        repeats = {g: r.values for g, r in own.items() if r.values.ndim == 3}
        regions = dict(subject.regions)
        for r in own.values():
            refuse_gaps(r.path, r.values)
    if not repeats:
        raise InputError(
            "has no repeated trials of its test images",
            path=path,
            remedy="add responses_test_repeats.npy (images, repeats, vertices)",
        )
    for values in repeats.values():
        if min(values.shape[:2]) < 2:
            raise InputError(
                f"has repeats of shape {values.shape}; at least two images and repeats are needed",
                path=path,
                remedy="add trials",
            )
    return {g: np.asarray(v, dtype=np.float64) for g, v in repeats.items()}, regions
