"""How errors of recall grow with depth, and what width and redundant heads do against them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heed_neuro.conditioning.capacity import expected_bit_error
from heed_neuro.conditioning.depth import depth_rows, head_rows, heads_needed, width_rows
from heed_runtime.files import write_csv
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.outputs import Outputs
from heed_runtime.recipe import Row, Table
from heed_runtime.report import save_figure
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What is simulated."""

    d_k: int = 64
    """Channels of keys."""
    pairs: int = 16
    """Associations that each memory holds."""
    layers: int = 12
    """Depth of the stack."""
    gain: float = 1.0
    """Gain of a layer: how much larger an error leaves it than it came in."""
    heads: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Redundant heads."""
    target: float = 0.01
    """How often the whole stack may decide wrong, for the number of heads that this takes."""
    repeats: int = 200
    """Draws per point."""
    seed: int = 0
    """Of the draws."""
    out: OptionalPath = None
    """The folder for tables (csv) and the picture."""
    overwrite: Flag = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        if min(self.d_k, self.layers, self.repeats) < 1 or self.pairs < 2:
            raise ValueError("d_k, layers and repeats must be at least 1, pairs at least 2")
        if not self.heads or min(self.heads) < 1:
            raise ValueError(f"heads must be at least 1, got {self.heads}")
        if not 0 < self.gain < float("inf"):
            raise ValueError(f"gain must be above 0, got {self.gain}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must be between 0 and 1, got {self.target}")


def run(app: App, options: Options) -> Result:
    """Simulate, compare, write."""
    common = {"repeats": options.repeats, "seed": options.seed}
    by_depth = depth_rows(
        options.d_k, options.pairs, layers=options.layers, gain=options.gain, **common
    )
    widths = [options.d_k * 2**k for k in range(-2, 5) if options.d_k * 2**k >= 1]
    by_width = width_rows(
        [int(width) for width in widths], options.pairs, layers=options.layers, gain=options.gain
    )
    by_heads = head_rows(options.d_k, options.pairs, options.heads, **common)
    wrong = expected_bit_error(options.pairs, options.d_k)
    needed: Row = {
        "wrong signs of one head": wrong,
        "layers": options.layers,
        "target": options.target,
        "heads needed": heads_needed(wrong, options.layers, options.target),
    }
    named = {"depth": by_depth, "width": by_width, "heads": by_heads}
    files: list[Path] = []
    if options.out is not None:
        from heed_neuro_cli.conditioning_pictures import draw_depth

        def write(out: Path) -> list[Path]:
            tables = [write_csv(out / f"{name}.csv", rows) for name, rows in named.items()]
            figure = draw_depth(by_depth, by_width, by_heads)
            return [*tables, save_figure(figure, out / "depth.png")]

        with Outputs(options.out, overwrite=options.overwrite) as outputs:
            files = outputs.put("depth", write)
    return Result(
        title=f"errors of memories of {options.pairs} pairs in {options.d_k} channels",
        tables=[
            *(Table(title=f"by {name}", rows=rows) for name, rows in named.items()),
            Table(title="heads for sure decisions (a bound)", rows=[needed]),
        ],
        data={**named, "needed": needed},
        files=files,
    )
