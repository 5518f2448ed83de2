"""Train and evaluate with several seeds: mean and deviation of what the test says.

Each seed is a run of its own, OUT/seed_N; the first seed is --seed. With --data.folds each seed is
a cross-validation over folds of its own, OUT/seed_N/fold_K, whose test cases are scored together
as one test. What is there already is kept, so that the verb goes on where it was stopped, and so
that seeds can be added. metrics.json holds mean, standard deviation (of the sample, n - 1) and the
numbers of each seed; runs.csv the latter as a table.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heed_core.errors import InputError
from heed_core.impl import Impl
from heed_runtime.commands import evaluate, train
from heed_runtime.errors import UsageError
from heed_runtime.files import atomic_folder, write_csv, write_json, write_yaml
from heed_runtime.options import OptionalPath, OutPath, SystemOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.run import Run, is_run
from heed_runtime.settings import read_yaml, to_dict
from heed_runtime.terminal import Result
from heed_runtime.trained import SAMPLE

if TYPE_CHECKING:
    from heed_runtime.app import App

PLAN = "repeat.yaml"


@dataclass(frozen=True, kw_only=True)
class Options(SystemOptions):
    """The flags."""

    out: OutPath
    """The folder of the runs and of their summary."""
    data: OptionalPath = None
    """The data set. None: the system's sample data set, which is written into the folder."""
    seeds: int = 5
    """How many seeds, counted up from --seed."""
    split: Literal["val", "test"] = "test"
    """Which cases are scored."""
    impl: Impl = "auto"
    """The back-end of the attention; `doctor` lists them."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}")


def run(app: App, options: Options, settings: Any) -> Result:
    """Train and evaluate what is not there yet, and sum up.

    Raises:
        InputError: The data cannot be used, or the folder holds something else.
        UsageError: Settings that one process cannot repeat.
    """
    trainer = settings.trainer
    if trainer.devices != 1 or trainer.nodes != 1:
        raise UsageError(
            "repeat trains in one process",
            remedy="leave --trainer.devices and --trainer.nodes out, or use train",
        )
    folds = int(getattr(settings.data, "folds", 0))
    if folds and settings.data.fold:
        raise UsageError("--data.fold has no effect: all folds are tested", remedy="leave it out")
    if options.data is not None and not options.data.exists():
        raise InputError("no such file or folder", path=options.data, remedy="check --data")
    begins = not any(options.out.glob("seed_*"))
    _keep_plan(options, settings, begins=begins)
    data = options.data or _sample(app, options, settings, begins=begins)
    rows: list[Row] = []
    for number in range(options.seeds):
        found = []
        for path, changed in _runs(options.out, settings, number, folds):
            options.terminal.say(f"{path} ({number + 1} of {options.seeds} seeds)")
            _complete(app, options, path, changed, data)
            found.append(Run.open(path, app))
        rows.append({"seed": trainer.seed + number, **_scores(app, found, options.split)})
    return _result(options, folds, rows)


def _keep_plan(options: Options, settings: Any, *, begins: bool) -> None:
    """Write down what is repeated, or refuse a folder in which something else is."""
    path = options.out / PLAN
    used = {
        "system": options.system,
        "data": SAMPLE if options.data is None else str(options.data.resolve()),
        **_flat(to_dict(settings)),
    }
    if begins:
        ours = {PLAN, SAMPLE}
        if options.out.is_file() or (
            options.out.is_dir() and {item.name for item in options.out.iterdir()} - ours
        ):
            raise InputError(
                "holds files that are no runs of repeat",
                path=options.out,
                remedy="choose another folder",
            )
        write_yaml(path, used, comment="What is repeated in this folder.")
        return
    before = read_yaml(path)
    for name in before | used:
        if before.get(name) != used.get(name):
            raise InputError(
                f"the runs there were made with {name} {before.get(name)}, not {used.get(name)}",
                path=path,
                remedy="give another --out or the same settings",
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, those of where it runs left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        elif name not in ("trainer.device", "trainer.workers"):
            flat[name] = value
    return flat


def _sample(app: App, options: Options, settings: Any, *, begins: bool) -> Path:
    """The sample data set, which all seeds share."""
    path = options.out / SAMPLE
    if begins:
        with atomic_folder(path, overwrite=True) as folder:
            app.recipe(options.system).sample(folder, seed=settings.trainer.seed)
    return path


def _runs(out: Path, settings: Any, number: int, folds: int) -> list[tuple[Path, Any]]:
    """The folders and settings of the runs of one seed."""
    seed = settings.trainer.seed + number
    trainer = dataclasses.replace(settings.trainer, seed=seed)
    folder = out / f"seed_{seed}"
    if not folds:
        return [(folder, dataclasses.replace(settings, trainer=trainer))]
    return [
        (
            folder / f"fold_{fold}",
            dataclasses.replace(
                settings,
                trainer=trainer,
                data=dataclasses.replace(
                    settings.data, fold=fold, split_seed=settings.data.split_seed + number
                ),
            ),
        )
        for fold in range(folds)
    ]


def _complete(app: App, options: Options, path: Path, settings: Any, data: Path) -> None:
    """Train and evaluate a run as far as that was not done."""
    shown: dict[str, Any] = {"json": options.json, "quiet": options.quiet, "debug": options.debug}
    device = settings.trainer.device
    if not is_run(path):
        made = train.Options(system=options.system, data=data, out=path, impl=options.impl, **shown)
        train.run(app, made, settings)
    elif not Run.open(path, app).metrics_json.exists():
        going_on = train.Options(system=options.system, resume=path, impl=options.impl, **shown)
        train.run(app, going_on, Run.open(path, app).settings)
    run = Run.open(path, app)
    if not (run.evaluation(options.split) / "metrics.json").exists():
        use = evaluate.Options(
            run=path, data=data, split=options.split, device=device, impl=options.impl, **shown
        )
        evaluate.run(app, use, run.settings)


def _scores(app: App, runs: Sequence[Run], split: str) -> dict[str, Any]:
    """Number of cases and metrics of one seed; folds are scored as one test."""
    folders = [run.evaluation(split) for run in runs]
    facts = [
        json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders
    ]
    count = sum(one["n"] for one in facts)
    if len(runs) == 1:
        return {"n": count, **facts[0]["metrics"]}
    rows: list[Row] = []
    for folder in folders:
        with (folder / "cases.csv").open(newline="", encoding="utf-8") as stream:
            rows += [dict(row) for row in csv.DictReader(stream)]
    settings = runs[0].settings
    return {"n": count, **app.recipe(runs[0].system).report(settings, rows).metrics}


def _result(options: Options, folds: int, rows: Sequence[Row]) -> Result:
    names = [name for name in rows[0] if name not in ("seed", "n")]
    metrics = {name: _summary([row[name] for row in rows]) for name in names}
    facts = {
        "system": options.system,
        "split": options.split,
        "seeds": options.seeds,
        "folds": folds,
        "metrics": metrics,
        "runs": rows,
    }
    files = [
        write_json(options.out / "metrics.json", facts),
        write_csv(options.out / "runs.csv", rows),
    ]
    summary: list[Row] = [{"metric": name, **values} for name, values in metrics.items()]
    tests = f"{folds} folds each, scored together" if folds else f"the split {options.split!r}"
    return Result(
        title=f"{options.system} with {options.seeds} seeds, {tests}",
        tables=[Table(title="", rows=summary), Table(title="seeds", rows=rows)],
        data=facts,
        files=files,
    )


def _summary(values: Sequence[Any]) -> dict[str, float | None]:
    """Mean, standard deviation and range; None where a seed has no such number."""
    if any(value is None or value != value for value in values):
        return dict.fromkeys(("mean", "std", "lowest", "highest"))
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values),
        "lowest": min(values),
        "highest": max(values),
    }
