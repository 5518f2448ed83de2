"""Make the stimuli of the six search-asymmetry experiments in the official folders, as PNG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heed_gaze.eccnet.experiments import EXPERIMENTS, Experiment
from heed_gaze.eccnet.layouts import find_trials, write_stimuli
from heed_runtime.files import atomic_folder
from heed_runtime.options import CommonOptions, Flag, OutPath
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What to make."""

    out: OutPath
    """The folder for the stimuli."""
    trials: int | None = None
    """Per set size. None: as many as in the paper (30 or 36)."""
    experiments: tuple[int, ...] = ()
    """Numbers 1 to 6. None given: all."""
    seed: int = 0
    """Of the places of the items."""
    legacy: Flag = False
    """In experiment 2 mark the target's place as the paper's code does: a box as large as a cell
    that begins at the item's corner, not at the cell's."""
    overwrite: Flag = False
    """Replace the folder that is there."""

    def __post_init__(self) -> None:
        numbers = [experiment.number for experiment in EXPERIMENTS]
        if any(number not in numbers for number in self.experiments):
            raise ValueError(f"experiments must be some of {numbers}, got {self.experiments}")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if self.legacy and not any(experiment.legacy_truth for experiment in self.chosen):
            raise ValueError("--legacy has an effect on experiment 2 alone")

    @property
    def chosen(self) -> list[Experiment]:
        """The experiments."""
        return [e for e in EXPERIMENTS if not self.experiments or e.number in self.experiments]


def run(app: App, options: Options) -> Result:
    """Write the folder whole or not at all."""
    chosen = options.chosen
    with atomic_folder(options.out, overwrite=options.overwrite) as folder:
        write_stimuli(
            folder, seed=options.seed, trials=options.trials, experiments=chosen,
            legacy=options.legacy,
        )  # fmt: skip
    trials = find_trials(options.out)
    rows: list[Row] = [
        {
            "experiment": f"{experiment.number} {experiment.name}",
            "task": task.name,
            "set sizes": ", ".join(map(str, experiment.set_sizes)),
            "trials": sum(trial.task == task.name for trial in trials),
            "pixels": experiment.side,
        }
        for experiment in chosen
        for task in experiment.tasks
    ]
    return Result(
        title=f"{len(trials)} trials",
        tables=[Table(title="", rows=rows)],
        data={"n": len(trials), "tasks": rows},
        files=[options.out],
    )
