"""How many associations a Hebbian memory holds: simulated curves beside theory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heed_neuro.conditioning.capacity import LOADS, capacity_rows, guarantee_rows
from heed_runtime.files import write_csv
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.outputs import Outputs
from heed_runtime.recipe import Table
from heed_runtime.report import save_figure
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What is simulated."""

    d_k: tuple[int, ...] = (64, 256)
    """Channels of keys; several make a curve each."""
    loads: tuple[float, ...] = LOADS
    """Pairs per channel, N / d_k."""
    d_v: int = 64
    """Channels of values."""
    repeats: int = 20
    """Draws per point."""
    seed: int = 0
    """Of the draws."""
    out: OptionalPath = None
    """The folder for tables (csv) and pictures."""
    overwrite: Flag = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        if not self.d_k or min(*self.d_k, self.d_v, self.repeats) < 1:
            raise ValueError("d_k, d_v and repeats must be at least 1")
        if not self.loads or not min(self.loads) > 0 or max(self.loads) > 64:
            raise ValueError(f"loads must be above 0 and at most 64, got {self.loads}")


def run(app: App, options: Options) -> Result:
    """Simulate, compare, write."""
    rows = capacity_rows(
        options.d_k,
        loads=options.loads,
        d_v=options.d_v,
        repeats=options.repeats,
        seed=options.seed,
    )
    widths = sorted({*options.d_k, 16, 64, 256, 1024, 4096})
    sure = guarantee_rows(widths)
    files: list[Path] = []
    if options.out is not None:
        from heed_neuro_cli.conditioning_pictures import draw_capacity, draw_guarantee

        def write(out: Path) -> list[Path]:
            return [
                write_csv(out / "capacity.csv", rows),
                save_figure(draw_capacity(rows), out / "capacity.png"),
                write_csv(out / "capacity_by_width.csv", sure),
                save_figure(draw_guarantee(sure), out / "capacity_by_width.png"),
            ]

        with Outputs(options.out, overwrite=options.overwrite) as outputs:
            files = outputs.put("capacity", write)
    return Result(
        title="capacity of a Hebbian memory",
        tables=[
            Table(title="recall against load", rows=rows),
            Table(title="pairs that a width holds, by theory", rows=sure),
        ],
        data={"capacity": rows, "by_width": sure},
        files=files,
    )
