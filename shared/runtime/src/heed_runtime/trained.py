"""A trained run, opened for use: what `evaluate`, `predict`, `explain`, `export` start from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from heed_core.errors import InputError
from heed_core.impl import Impl
from heed_runtime.options import RunOptions
from heed_runtime.run import Run

if TYPE_CHECKING:
    from torch import nn

    from heed_runtime.app import App
    from heed_runtime.recipe import Recipe

SAMPLE = "sample"
"""The folder within a run with the sample data set, where `train` was given no data."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run with its recipe and its model."""

    recipe: Recipe[Any, Any, Any]
    run: Run
    settings: Any
    """The run's settings, with the trainer settings of this call."""
    model: nn.Module


@dataclass(frozen=True, kw_only=True)
class UseOptions(RunOptions):
    """The flags of a verb that computes with a trained model."""

    groups: ClassVar[tuple[str, ...]] = ("data",)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    """Arithmetic of the forward pass. None: as in the training."""
    impl: Impl = "auto"
    """The back-end of the attention; `doctor` lists them."""

    def open(self, app: App, settings: Any, **trainer: Any) -> Trained:
        """Open the run and load its model.

        Args:
            app: Knows the systems.
            settings: The run's, with what this call changes.
            trainer: Further trainer settings of this call.
        """
        return open_trained(
            app,
            self.run,
            settings=settings,
            impl=self.impl,
            precision=self.precision,
            **{"device": self.device, **trainer},
        )


@dataclass(frozen=True, kw_only=True)
class SharedOptions(UseOptions):
    """The flags of a verb that shares its cases between processes."""

    workers: int = 0
    """Processes that load data, per computing process."""
    devices: int = 1
    """Computing processes (GPUs) on this host; they share the cases."""

    def open(self, app: App, settings: Any, **trainer: Any) -> Trained:
        """Open the run, for several processes."""
        values = {"workers": self.workers, "devices": self.devices}
        return super().open(app, settings, **(values | trainer))


def open_trained(
    app: App,
    path: Path,
    *,
    settings: Any = None,
    impl: Impl = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None,
    **trainer: Any,
) -> Trained:
    """Open a run and load its model.

    Args:
        app: Knows the systems.
        path: The run.
        settings: The run's, with what this call changes. None: as they are.
        impl: The back-end of all softmax sites.
        precision: None is that of the training.
        trainer: Further trainer settings of this call.
    """
    from heed_runtime import engine

    run = Run.open(path, app)
    recipe = app.recipe(run.system)
    old = run.settings.trainer
    values: dict[str, Any] = {
        "precision": precision or old.precision,
        "devices": 1,
        "nodes": 1,
        "strategy": "auto",
        "logger": "none",
    }
    settings = dataclasses.replace(
        run.settings if settings is None else settings,
        trainer=dataclasses.replace(old, **(values | trainer)),
    )
    model = run.load_model(recipe)
    engine.choose_impl(model, impl)
    return Trained(recipe=recipe, run=run, settings=settings, model=model)


def data_of(run: Run, given: Path | None) -> Path:
    """The data set to use: the given one, or the one that the run was trained on.

    Raises:
        InputError: It is not there.
    """
    path = given
    if path is None:
        facts = _data_facts(run)
        path = run.path / SAMPLE if facts.get("sample") else _path(facts.get("path"))
    if path is None:
        raise InputError("does not say what it was trained on", path=run.path, remedy="add --data")
    if not path.exists():
        remedy = "check the path" if given else "add --data"
        raise InputError("no such file or folder", path=path, remedy=remedy)
    return path


def uses_sample(run: Run) -> bool:
    """Whether the run was trained on its own sample data set."""
    return bool(_data_facts(run).get("sample"))


def _data_facts(run: Run) -> dict[str, Any]:
    facts = run.facts().get("data")
    return facts if isinstance(facts, dict) else {}


def _path(text: object) -> Path | None:
    return Path(text) if isinstance(text, str) else None
