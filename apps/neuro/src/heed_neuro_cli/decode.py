"""Decode and encode object categories in block-design fMRI, leaving one run out.

FILE is a .npz with bold (volumes, voxels), label and run of each volume; `rest` between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from heed_neuro.haxby import decode, decode_by_delay, encode, read_blocks
from heed_runtime.options import CommonOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result, rows_of

if TYPE_CHECKING:
    from heed_runtime.app import App


DELAYS = (0, 1, 2, 3, 4)
"""Whose accuracies are shown beside that of the delay asked for."""


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The volumes, and their delay."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .npz with bold, label, run."""
    delay: int = 2
    """Volumes between a label and the blood response to it; 0 where labels follow the response."""

    def __post_init__(self) -> None:
        if self.delay < 0:
            raise ValueError(f"delay must not be negative, got {self.delay}")


def run(app: App, options: Options) -> Result:
    """Decode blocks, encode voxels."""
    design = read_blocks(options.file)
    decoded = decode(design, delay=options.delay)
    r = encode(design, delay=options.delay)
    fine = r[np.isfinite(r)]
    metrics = {
        "decoding accuracy": decoded.accuracy,
        "chance": 1 / len(decoded.categories),
        "encoding r, mean": float(fine.mean()),
        "encoding r, best tenth": float(np.sort(fine)[-max(1, len(fine) // 10) :].mean()),
        "voxels": len(r),
        "undefined": int((~np.isfinite(r)).sum()),
    }
    others = [delay for delay in DELAYS if delay != options.delay]
    accuracies = {**decode_by_delay(design, others), options.delay: decoded.accuracy}
    delays: list[Row] = [
        {"delay": delay, "decoding accuracy": accuracies[delay]} for delay in sorted(accuracies)
    ]
    rows: list[Row] = []
    for category in decoded.categories:
        own = decoded.true == category
        row: dict[str, str | int | float | None] = {"shown": category}
        row |= {other: int((decoded.predicted[own] == other).sum()) for other in decoded.categories}
        rows.append(row)
    return Result(
        title=f"{len(np.unique(design.runs))} runs, {len(decoded.true)} blocks",
        tables=[
            Table(title="", rows=rows_of(metrics, key="metric")),
            Table(title="decoded as", rows=rows),
            Table(title="by delay: where labels fit the blood response", rows=delays),
        ],
        data={"metrics": metrics, "confusion": rows, "delays": delays},
    )
