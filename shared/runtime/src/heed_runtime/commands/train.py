"""Train a system; without --data on its sample data set, with --resume on from where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heed_core.errors import InputError
from heed_core.impl import Impl
from heed_runtime.errors import UsageError
from heed_runtime.files import atomic_folder, refuse_existing, write_json, write_text
from heed_runtime.options import Flag, OptionalPath, SystemOptions
from heed_runtime.recipe import Table
from heed_runtime.run import Run, fingerprint, free_path, is_run, load_weights, training_in
from heed_runtime.settings import changed, to_yaml
from heed_runtime.terminal import Result, Terminal, rows_of
from heed_runtime.trained import SAMPLE, data_of, uses_sample

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.engine import Fitted
    from heed_runtime.recipe import Recipe

logger = logging.getLogger(__name__)

CHANGEABLE = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.checkpoint_every",
    "trainer.device",
    "trainer.devices",
    "trainer.nodes",
    "trainer.workers",
)
"""Settings that may be changed when a run is resumed: how long, and on what."""

MUCH_WAITING = 0.2
"""Share of the training's time, from which on more workers are proposed."""


@dataclass(frozen=True, kw_only=True)
class Options(SystemOptions):
    """The flags of `train`."""

    data: OptionalPath = None
    """The data set. None: the system's sample data set is written into the run and used."""
    out: OptionalPath = None
    """The run's folder. None: runs/SYSTEM-DATE-N."""
    resume: OptionalPath = None
    """Go on with this run, with its settings; how long and on what may be changed."""
    init: OptionalPath = None
    """Start from the weights of this run, model folder or safetensors file."""
    impl: Impl = "auto"
    """The back-end of the attention; `doctor` lists them."""
    overwrite: Flag = False
    """Replace the run that is in the folder."""

    def base(self, app: App, recipe: Recipe[Any, Any, Any]) -> Any:
        """The settings before flags: those of the resumed run, if there is one."""
        if self.resume is None:
            return super().base(app, recipe)
        for name in ("config", "preset", "out", "init", "overwrite"):
            if getattr(self, name):
                raise UsageError(
                    f"--{name} has no effect with --resume, which goes on with the run as it is",
                    remedy="leave it out",
                )
        run = Run.open(self.resume, app)
        if run.system != self.system:
            raise UsageError(f"{self.resume} is a run of {run.system!r}, not of {self.system!r}")
        if not run.config.exists():
            raise InputError(
                "is a model without its run, there is nothing to go on from",
                path=self.resume,
                remedy="start a new run with --init",
            )
        return run.settings


def run(app: App, options: Options, settings: Any) -> Result:
    """Make or reopen the run, train, and write what came out."""
    from heed_runtime import distributed, engine

    recipe = app.recipe(options.system)
    trainer = settings.trainer
    engine.check_trainer(trainer)
    distributed.join(cuda=engine.uses_cuda(trainer))
    terminal = engine.terminal_of_rank(options.terminal)
    with contextlib.ExitStack() as held:  # by the first process, for all
        if options.resume is None:
            path = distributed.settle_folder(lambda: _create(app, recipe, options, settings, held))
        else:
            path = distributed.settle_folder(lambda: _reopen(app, options, settings, held))
        return _train(app, recipe, options, path, terminal)


def _train(
    app: App, recipe: Recipe[Any, Any, Any], options: Options, path: Path, terminal: Terminal
) -> Result:
    from heed_runtime import distributed, engine

    run = Run.open(path, app)
    root = data_of(run, options.data)
    with run.logging():
        engine.give_notice(recipe)
        if distributed.rank() == 0:
            logger.info("%s: run folder %s, data %s", recipe.card.name, run.path, root)
            if uses_sample(run) and options.data is None:
                logger.info("no --data was given: this trains on the sample data set")
        fitted = engine.fit(recipe, run, root=root, terminal=terminal, impl=options.impl)
        if distributed.rank() > 0:
            raise SystemExit(0)
        return _finish(recipe, run, fitted)


def _create(
    app: App,
    recipe: Recipe[Any, Any, Any],
    options: Options,
    settings: Any,
    held: contextlib.ExitStack,
) -> Path:
    """Make the whole run folder, with sample and initial weights, at once."""
    if options.data is not None and not options.data.exists():
        raise InputError("no such file or folder", path=options.data, remedy="check --data")
    with contextlib.ExitStack() as making:
        out = options.out
        if out is None:
            out = making.enter_context(free_path(options.system))
        refuse_existing(out, overwrite=options.overwrite, used=[options.data])
        if out.is_dir() and any(out.iterdir()):
            if not is_run(out):
                raise InputError(
                    "holds files that are no run", path=out, remedy="choose another folder"
                )
            making.enter_context(training_in(out))
        _make(app, recipe, options, settings, out)
    held.enter_context(training_in(out))
    return out


def _make(
    app: App, recipe: Recipe[Any, Any, Any], options: Options, settings: Any, out: Path
) -> None:
    from heed_runtime import engine

    with atomic_folder(out, overwrite=options.overwrite) as folder:
        root = options.data
        if root is None:
            root = folder / "work" / SAMPLE
            root.mkdir(parents=True)
            recipe.sample(root, seed=settings.trainer.seed)
        settings = recipe.plan(settings, root)
        # Data, weights and flags that cannot be used are found before there is a run.
        recipe.train_data(settings, root)
        recipe.cases(settings, root, "val")
        model = recipe.model(settings)
        engine.choose_impl(model, options.impl)
        recipe.start(settings, root, model)
        facts = fingerprint(root)
        if options.data is None:
            facts |= {"sample": True, "path": SAMPLE}
        _fill(app, recipe, options, folder, settings, facts)


def _fill(
    app: App,
    recipe: Recipe[Any, Any, Any],
    options: Options,
    folder: Path,
    settings: Any,
    facts: Mapping[str, object],
) -> None:
    made = Run.create(folder / "run", system=options.system, settings=settings, command=sys.argv)
    made.update_environment({"data": facts})
    if options.init is not None:
        _save_initial(app, recipe, made, options.init)
    for path in [*made.path.iterdir(), *(folder / "work").glob("*")]:
        path.rename(folder / path.name)
    for empty in (made.path, folder / "work"):
        if empty.exists():
            empty.rmdir()


def _save_initial(app: App, recipe: Recipe[Any, Any, Any], run: Run, source: Path) -> None:
    from heed_runtime.callbacks import INITIAL, AtomicCheckpoints

    if source.is_dir():
        other = Run.open(source, app)
        weights = other.weights
    else:
        weights = source
    if not weights.exists():
        raise InputError("no such file", path=weights, remedy="check --init")
    model = recipe.model(run.settings)
    load_weights(model, weights)
    AtomicCheckpoints().save_checkpoint({"model": model.state_dict()}, run.checkpoints / INITIAL)


def _reopen(app: App, options: Options, settings: Any, held: contextlib.ExitStack) -> Path:
    """Check what the flags change, and write it to the run."""
    assert options.resume is not None
    run = Run.open(options.resume, app)
    names = changed(run.settings, settings)
    for name in names:
        if name not in CHANGEABLE:
            raise UsageError(
                f"{name} cannot be changed when a run is resumed",
                remedy="leave it out, or start a new run with --init",
            )
    old, new = run.settings.trainer, settings.trainer
    for name in ("max_epochs", "max_steps"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and after < before:
            raise UsageError(f"trainer.{name} can only be raised: it is {before}, got {after}")
    root = data_of(run, options.data)
    held.enter_context(training_in(run.path))
    if names:
        write_text(run.config, to_yaml(settings, system=run.system))
        run = dataclasses.replace(run, settings=settings)
    if options.data is not None:
        run.update_environment({"data": fingerprint(root)})
    return run.path


def _finish(recipe: Recipe[Any, Any, Any], run: Run, fitted: Fitted) -> Result:
    from heed_runtime.report import curves, save_figure

    skipped = {name: list(lines) for name, lines in fitted.skipped.items()}
    data = {
        "system": run.system,
        "run": run.path,
        "epochs": fitted.epochs,
        "steps": fitted.steps,
        "training_s": fitted.seconds,
        "waiting_for_data": fitted.waiting,
        "metrics": fitted.metrics,
        "monitor": recipe.monitor[0],
        "weights_sha256": run.weights_hash(),
        "skipped": skipped,
    }
    write_json(run.metrics_json, data)
    save_figure(curves(run.metrics(), monitor=recipe.monitor), run.curves)
    tables = [Table(title="", rows=rows_of(fitted.metrics, key="metric"))]
    if skipped:
        rows = [{"data": name, "skipped": line} for name in skipped for line in skipped[name]]
        tables.append(Table(title="skipped", rows=rows))
    if fitted.waiting is not None:
        logger.info(
            "%.1f s of training, %.1f %% of them waiting for data%s",
            fitted.seconds,
            100 * fitted.waiting,
            "; more --workers may help" if fitted.waiting > MUCH_WAITING else "",
        )
    title = f"{run.system}: {fitted.epochs} epochs, {fitted.steps} steps; the kept weights:"
    return Result(title=title, tables=tables, data=data, files=[run.path])
