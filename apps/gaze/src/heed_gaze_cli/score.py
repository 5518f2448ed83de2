"""Score results of the six search-asymmetry experiments, of any model or of people.

RESULTS is a csv with the columns task, set_size and one of found_at, saccades, rt_ms (such as the
cases.csv of an evaluation), or a folder of TASK.npy with a 1 at the fixation that found the target.
The table gives slopes and the asymmetry index of each experiment beside people's, whose mean over
all six is .564; chance is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_core.errors import InputError
from heed_gaze.eccnet.experiments import experiment_of
from heed_gaze.eccnet.results import read_results
from heed_gaze.eccnet.scoring import ReactionTime
from heed_gaze_cli.eccnet_scoring import report_tasks
from heed_runtime.files import atomic_folder, write_json
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.recipe import Table
from heed_runtime.report import save_figure, save_table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What is scored, and how saccades become reaction times."""

    results: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RESULTS")]
    """A csv, or a folder of arrays."""
    ms_per_saccade: float | None = None
    """Of the reaction time. None: the paper's 252.359."""
    ms_at_rest: float | None = None
    """Reaction time without a saccade. None: the paper's 376.271."""
    out: OptionalPath = None
    """Also write tables, JSON and a plot into this folder."""
    overwrite: Flag = False
    """Replace the folder."""

    @property
    def model(self) -> ReactionTime:
        """The line from saccades to reaction times."""
        given = {"ms_per_saccade": self.ms_per_saccade, "ms_at_rest": self.ms_at_rest}
        return ReactionTime(**{name: value for name, value in given.items() if value is not None})


def run(app: App, options: Options) -> Result:
    """Read, score, show, and write what is asked for."""
    found = read_results(options.results)
    if found.unit == "ms" and options.model != ReactionTime():
        raise InputError(
            "holds reaction times, on which --ms-per-saccade and --ms-at-rest have no effect",
            path=options.results,
            remedy="leave the flags away",
        )
    cells = {
        name: None if (known := experiment_of(name)) is None else known.grid**2
        for name in found.trials
    }
    model = None if found.unit == "ms" else options.model
    report = report_tasks(found.trials, model=model, cells=cells)
    tables = list(report.tables)
    if found.skipped:
        tables.append(Table(title="skipped", rows=[{"trial": line} for line in found.skipped]))
    count = sum(len(sizes) for sizes, _ in found.trials.values())
    facts = {
        "n": count,
        "unit": found.unit,
        "metrics": dict(report.metrics),
        "tables": {table.title: list(table.rows) for table in report.tables},
        "skipped": list(found.skipped),
    }
    files: list[Path] = []
    if options.out is not None:
        with atomic_folder(
            options.out, overwrite=options.overwrite, used=[options.results]
        ) as folder:
            write_json(folder / "metrics.json", facts)
            for table in tables:
                save_table(table, folder)
            for stem, figure in report.plots.items():
                save_figure(figure, folder / f"{stem}.png")
        files = sorted(options.out.iterdir())
    title = f"{count} trials of {len(found.trials)} tasks"
    if report.metrics:
        title += (
            f": mean asymmetry index {report.metrics['asymmetry_index']:.3f} over "
            f"{report.metrics['experiments']:.0f} experiments (people, all six: "
            f"{report.metrics['asymmetry_index_human']:.3f})"
        )
    return Result(title=title, tables=tables, data=facts, files=files)
