"""The settings of in-context linear regression: model, task, training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from heed_core.errors import InputError
from heed_neuro.icl.files import TASK, read_task
from heed_neuro.icl.regressor import RegressorConfig, Signs
from heed_neuro.icl.tasks import LinearTask
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class IclData:
    """The task; what is None is as the data set's task.yaml says, and settled by the training."""

    dim: int | None = None
    """d, coordinates of x."""
    length: int | None = None
    """L, examples in a context."""
    noise_variance: float | None = None
    """sigma^2, the VARIANCE of the noise of y."""
    rho: float | None = None
    """Sigma_ij = rho^|i-j|; 0 is isotropic."""
    covariance: str | None = None
    """Sigma itself: rows separated by ; and numbers by , ("" for none)."""
    supports: str | None = None
    """Coordinates that each output sees, from 1: "1,2,3,4;3,4,5,6" ("" for one output)."""
    scaling: Literal["paper", "released"] | None = None
    """Of several outputs: one beta and equal noise, or a beta per output and none in the answer."""
    described: str = ""
    """What task.yaml said at the training; settled, leave it."""
    epoch_sequences: int = 64_000
    """Fresh sequences between two validations."""
    val_sequences: int = 8_000
    """For each validation; always the same ones."""
    test_sequences: int = 20_000
    """For each length in evaluate; error bars shrink with its root."""
    lengths: tuple[int, ...] = (10, 20, 40, 80, 160)
    """Contexts at which evaluate compares, besides that of the training."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file that cannot be read."""

    def __post_init__(self) -> None:
        for name in ("epoch_sequences", "val_sequences", "test_sequences"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if any(length < 2 for length in self.lengths):
            raise ValueError(f"lengths must be at least 2, got {self.lengths}")
        self.over(LinearTask(dim=self.dim or 10**6) if self.dim != 0 else LinearTask())

    def over(self, task: LinearTask) -> LinearTask:
        """A task with what these settings say.

        Raises:
            ValueError: They do not make a task.
        """
        values: dict[str, object] = {
            name: value
            for name in ("dim", "length", "noise_variance", "rho", "scaling")
            if (value := getattr(self, name)) is not None
        }
        if self.covariance is not None:
            values["covariance"] = _rows(self.covariance, float, "covariance")
        if self.supports is not None:
            values["supports"] = _rows(self.supports, int, "supports")
        if values.get("rho") and task.covariance and self.covariance is None:
            values["covariance"] = ()
        return replace(task, **values)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class IclTraining:
    """The minimisation; the defaults are the paper's."""

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    signs: Signs = "any"
    """Of omega and mu at the start: "any" as the initialisation flips them, "opposite" or "equal".
    Heads that start with equal signs end as one head."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class IclSettings:
    """All settings of in-context linear regression."""

    model: RegressorConfig = field(default_factory=RegressorConfig)
    data: IclData = field(default_factory=IclData)
    training: IclTraining = field(default_factory=lambda: IclTraining(signs="opposite"))
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(max_epochs=12, batch=256, device="cpu")
    )


def paper() -> IclSettings:
    """The paper's training: 5e5 steps of 256 fresh sequences, signs left to chance."""
    return IclSettings(
        training=IclTraining(),
        data=IclData(epoch_sequences=256 * 5000),
        trainer=TrainerSettings(max_epochs=100, batch=256),
    )


def one_head() -> IclSettings:
    """One head, which cannot subtract the mean of the context."""
    return replace(IclSettings(), model=RegressorConfig(heads=1))


def non_isotropic() -> IclSettings:
    """Correlated coordinates: the heads learn a matrix near the inverse covariance."""
    return replace(
        IclSettings(),
        data=IclData(rho=0.5),
        trainer=TrainerSettings(max_epochs=40, batch=256, device="cpu"),
    )


def multi_task() -> IclSettings:
    """Two outputs that see four of six coordinates each, scaled as the released code does."""
    return replace(
        IclSettings(),
        model=RegressorConfig(dim=6, outputs=2, heads=4),
        data=IclData(dim=6, supports="1,2,3,4;3,4,5,6", scaling="released"),
        trainer=TrainerSettings(max_epochs=40, batch=256, device="cpu"),
    )


def settle(settings: IclSettings, root: Path) -> IclSettings:
    """Take the task from task.yaml and the settings, and the model's sizes from the task."""
    described = read_task(root / TASK)
    task = _over(settings.data, described, root)
    data = replace(
        settings.data,
        dim=task.dim,
        length=task.length,
        noise_variance=task.noise_variance,
        rho=task.rho,
        covariance=_text(task.covariance),
        supports=_text(task.supports),
        scaling=task.scaling,
        described=json.dumps(asdict(described)),
    )
    model = replace(settings.model, dim=task.dim, outputs=task.outputs, fixed_length=task.length)
    return replace(settings, model=model, data=data)


def task_of(settings: IclSettings, root: Path | None = None) -> LinearTask:
    """The task of a run, or that of another data set.

    Raises:
        InputError: The data set's task has other sizes than the model.
    """
    task = settings.data.over(LinearTask(dim=settings.model.dim))
    if root is None:
        return task
    described = read_task(root / TASK)
    if settings.data.described and json.dumps(asdict(described)) != settings.data.described:
        task = described
    if (task.dim, task.outputs) != (settings.model.dim, settings.model.outputs):
        raise InputError(
            f"is a task of {task.dim} coordinates and {task.outputs} outputs, the model's has "
            f"{settings.model.dim} and {settings.model.outputs}",
            path=root / TASK,
            remedy="train a model for it",
        )
    return task


def _over(data: IclData, described: LinearTask, root: Path) -> LinearTask:
    try:
        return data.over(described)
    except ValueError as error:
        raise InputError(
            f"{error} (together with the flags)", path=root / TASK, remedy="change one of them"
        ) from None


def _rows(text: str, kind: type, name: str) -> tuple[tuple[float, ...], ...]:
    try:
        return tuple(
            tuple(kind(item) for item in row.split(",")) for row in text.split(";") if row.strip()
        )
    except ValueError:
        raise ValueError(f"{name} must be like 1,2;3,4, got {text!r}") from None


def _text(rows: tuple[tuple[float, ...], ...]) -> str:
    return ";".join(",".join(repr(item) for item in row) for row in rows)
