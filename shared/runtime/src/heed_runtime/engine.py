"""The engine: Lightning's Trainer, set up the same for every system.

`fit` trains into a run folder and can go on from any kill; `predict` carries cases through a
trained module. Both work in one process or in several, which Lightning, torchrun or SLURM starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from heed_core.errors import InputError
from heed_core.impl import Impl
from heed_core.sites import use_impl
from heed_runtime import distributed
from heed_runtime.callbacks import (
    BEST,
    INITIAL,
    LAST,
    AtomicCheckpoints,
    Averaged,
    Bar,
    Interrupted,
    Keeper,
    Pace,
    Reseed,
    Signals,
    model_weights,
    seed_everything,
)
from heed_runtime.data import Data, Fault
from heed_runtime.errors import UsageError, nearest
from heed_runtime.terminal import NOTICE

if TYPE_CHECKING:
    from torch import nn

    from heed_runtime.recipe import Recipe, SizedData
    from heed_runtime.run import Run
    from heed_runtime.settings import TrainerSettings
    from heed_runtime.terminal import Progress, Terminal

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a training came to."""

    metrics: Mapping[str, float]
    """The row of the weights that were kept."""
    epochs: int
    steps: int
    seconds: float
    """That the steps of this call took in this process, with loading and without validation."""
    waiting: float | None
    """The share of it that was spent waiting for data; on a GPU, which works on meanwhile, the
    most that it can have cost. None: there was no step."""
    skipped: Mapping[str, Sequence[str]]
    """Part of the data -> what was skipped there."""


@dataclass(frozen=True, kw_only=True)
class Predicted(Generic[ResultT]):
    """What became of the cases, in their order."""

    results: Sequence[ResultT]
    skipped: Sequence[str]


def fit(
    recipe: Recipe[Any, Any, Any],
    run: Run,
    *,
    root: Path,
    terminal: Terminal,
    impl: Impl = "auto",
) -> Fitted:
    """Train to the end of the run's settings, from the run's last checkpoint if it has one.

    Args:
        recipe: What to train.
        run: Its settings, and where to write.
        root: The data set.
        terminal: Where to show the progress.
        impl: The back-end of all softmax sites.

    Raises:
        KeyboardInterrupt: The user stopped the training; a checkpoint was saved.
        InputError: The data or the checkpoint cannot be used.
    """
    settings = run.settings.trainer
    seed_everything(settings.seed)
    model = recipe.model(run.settings)
    if (initial := run.checkpoints / INITIAL).exists():
        model.load_state_dict(_checkpoint(initial)["model"])
    elif not (run.checkpoints / LAST).exists():
        recipe.start(run.settings, root, model)
    choose_impl(model, impl)
    module = recipe.module(run.settings, model)
    data = Data(recipe, run.settings, root=root)
    signals = Signals(at_once=False)
    averaged = None if settings.average is None else Averaged(settings.average)
    keeper, pace = Keeper(recipe, run, signals, averaged), Pace()
    callbacks = [Reseed(settings.seed), *([] if averaged is None else [averaged]), keeper, pace]
    resume = _resumable(keeper.last)
    with _silence(), signals.caught(), distributed.first_speaks():
        try:
            with terminal_of_rank(terminal).progress("train", None) as progress:
                trainer = build_trainer(
                    settings,
                    folder=run.path,
                    callbacks=[*callbacks, Bar(progress, settings)],
                )
                trainer.fit(module, datamodule=data, ckpt_path=keeper.last if resume else None)
                row = _close(trainer, module, data, keeper)
            _save_kept_model(recipe, run, trainer, keeper, row)
        except Interrupted:
            if distributed.rank() > 0:
                raise SystemExit(0) from None
            raise signals.stop(f"--resume {run.path} goes on from here") from None
    skipped = _gathered({name: part.faults for name, part in data.skipped.items() if part.faults})
    loader = data.pass_over_training
    return Fitted(
        metrics=row,
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        seconds=pace.seconds,
        waiting=loader.waited_s / pace.seconds if loader and pace.seconds else None,
        skipped=skipped,
    )


def predict(
    recipe: Recipe[Any, Any, Any],
    settings: Any,
    model: nn.Module,
    cases: SizedData,
    *,
    use: Callable[[Any], ResultT],
    terminal: Terminal,
    label: str,
    folder: Path,
    lost: Callable[[Fault], None] | None = None,
) -> Predicted[ResultT]:
    """Carry cases through the module, one at a time, and use each prediction at once.

    Args:
        recipe: Makes the module.
        settings: Of the run, with the trainer settings of this call.
        model: The trained network.
        cases: What to go through.
        use: Called with each prediction, in the process that made it; must return plain data.
        terminal: Where to show the progress.
        label: What the progress is called.
        folder: Where Lightning may write.
        lost: Called at once with each case that is skipped, in the process that met it.

    Raises:
        InputError: A case cannot be read, and `data.on_error` is "stop".
    """
    data = Data(recipe, settings, cases=cases)
    data.skipped["predict"].note = lost
    trainer_settings = settings.trainer
    signals = Signals(at_once=True)
    with (
        _silence(),
        signals.caught(),
        distributed.first_speaks(),
        terminal_of_rank(terminal).progress(label, len(cases)) as progress,
    ):
        writer = _Use(use, data, progress)
        trainer = build_trainer(trainer_settings, folder=folder, callbacks=[writer])
        try:
            module = recipe.module(settings, model)
            module.predict_step = data.careful(module.predict_step)  # type: ignore[method-assign]
            trainer.predict(module, datamodule=data, return_predictions=False)
        except Interrupted:
            raise signals.stop() from None
        loader = data.pass_over_cases
        for fault in distributed.gather(str(loader.fault) if loader and loader.fault else ""):
            if fault:
                raise InputError(fault)
    found = [item for part in distributed.gather(writer.results) for item in part]
    skipped = _gathered({"cases": data.skipped["predict"].faults}).get("cases", [])
    ordered = sorted(found, key=lambda item: item[0])
    return Predicted(results=[result for _, result in ordered], skipped=skipped)


def build_trainer(
    settings: TrainerSettings, *, folder: Path, callbacks: Sequence[L.Callback]
) -> L.Trainer:
    """Make Lightning's Trainer from our settings; raises as `check_trainer`."""
    check_trainer(settings)
    cuda = uses_cuda(settings)
    devices, nodes = distributed.shape(settings)
    several = devices * nodes > 1
    plugins: list[Any] = [AtomicCheckpoints()]
    if several and not cuda:
        plugins.append(distributed.CpuLayerSync())
    values: dict[str, Any] = {
        "accelerator": "gpu" if cuda else "cpu",
        "strategy": _strategy(settings, several=several, cuda=cuda),
        "devices": devices,
        "num_nodes": nodes,
        "precision": settings.precision,
        "logger": _logger(settings, folder),
        "callbacks": list(callbacks),
        "max_epochs": settings.max_epochs,
        "check_val_every_n_epoch": settings.validate_every,
        "accumulate_grad_batches": settings.accumulate,
        "gradient_clip_val": settings.clip,
        "num_sanity_val_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "sync_batchnorm": several and cuda,
        "default_root_dir": folder,
        "plugins": plugins,
    }
    return L.Trainer(**(values | dict(settings.extra)))


def check_trainer(settings: TrainerSettings) -> None:
    """Refuse settings that cannot work here, before anything is written.

    Raises:
        UsageError: No such device, an unknown name in `extra`, or processes that cannot share the
            batch.
    """
    allowed = inspect.signature(L.Trainer).parameters
    for name in settings.extra:
        if name not in allowed:
            raise UsageError(f"trainer.extra: unknown name {name!r}", remedy=nearest(name, allowed))
    cuda = uses_cuda(settings)
    if settings.strategy == "fsdp" and not cuda:
        raise UsageError("strategy=fsdp needs GPUs", remedy="use ddp on the CPU")
    if settings.strategy == "fsdp" and settings.average is not None:
        raise UsageError("strategy=fsdp cannot average weights", remedy="use ddp")
    devices, _ = distributed.shape(settings)
    if cuda and devices > torch.cuda.device_count():
        raise UsageError(f"devices={devices}, but there are {torch.cuda.device_count()} GPUs")


def choose_impl(model: nn.Module, impl: Impl) -> None:
    """Let the softmax sites of a model run on the back-end of `--impl`.

    Raises:
        UsageError: A back-end is named, and the model has no such site.
    """
    if impl == "auto":
        return
    try:
        use_impl(model, impl)
    except ValueError as error:
        raise UsageError(f"--impl {impl} has no effect: {error}", remedy="leave it out") from None


def uses_cuda(settings: TrainerSettings) -> bool:
    """Whether these settings compute on a GPU.

    Raises:
        UsageError: A GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if settings.device == "cuda" and not available:
        raise UsageError("device=cuda was asked for, but torch sees no GPU", remedy="use cpu")
    return available and settings.device != "cpu"


def device_of(settings: TrainerSettings) -> torch.device:
    """The device of work that is done in this process alone."""
    return torch.device("cuda" if uses_cuda(settings) else "cpu")


def autocast(settings: TrainerSettings) -> contextlib.AbstractContextManager[object]:
    """The precision of work that is done without the Trainer."""
    if settings.precision == "32-true":
        return contextlib.nullcontext()
    kind = torch.bfloat16 if settings.precision == "bf16-mixed" else torch.float16
    return torch.autocast(device_of(settings).type, dtype=kind)


def give_notice(recipe: Recipe[Any, Any, Any]) -> None:
    """Show the caution of a system, once for a command and all its processes."""
    if recipe.card.notice and distributed.rank() == 0:
        logger.log(NOTICE, recipe.card.notice)


def terminal_of_rank(terminal: Terminal) -> Terminal:
    """The terminal itself in the first process, a silent one in the others."""
    return terminal if distributed.rank() == 0 else dataclasses.replace(terminal, quiet=True)


class _Use(BasePredictionWriter):
    """Hands each prediction on at once, so that memory does not grow with the number of cases."""

    def __init__(self, use: Callable[[Any], Any], data: Data, progress: Progress) -> None:
        super().__init__("batch")
        self.use, self.data, self.progress = use, data, progress
        self.results: list[tuple[int, Any]] = []

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Use the predictions of one batch."""
        loader = self.data.pass_over_cases
        assert loader is not None
        try:
            self.results += [(loader.current, self.use(item)) for item in prediction]
        except InputError as error:
            loader.fault = error
        self.progress.advance(trainer.world_size)


def _resumable(path: Path) -> bool:
    """Whether a checkpoint was written; raises `InputError` if it cannot be read."""
    return path.exists() and bool(_checkpoint(path))


def _checkpoint(path: Path) -> dict[str, Any]:
    try:
        return AtomicCheckpoints().load_checkpoint(path)
    except Exception as error:
        raise InputError(
            f"is not a checkpoint that can be resumed ({type(error).__name__})",
            path=path,
            remedy="remove the file to train from the beginning",
        ) from error


def _close(
    trainer: L.Trainer, module: L.LightningModule, data: Data, keeper: Keeper
) -> dict[str, float]:
    """The row of the weights at the end; they are validated now if they were not yet."""
    row = dict(keeper.last_row)
    finished_before = not row and not keeper.within_epoch
    if finished_before or keeper.monitor in row:
        return row or dict(keeper.best_row)
    step, epoch = trainer.global_step, trainer.current_epoch
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"epoch": epoch, "step": step, **row, **metrics}


def _save_kept_model(
    recipe: Recipe[Any, Any, Any],
    run: Run,
    trainer: L.Trainer,
    keeper: Keeper,
    row: dict[str, float],
) -> None:
    """Write `model/` from the best weights, which may be those at the end."""
    at_end = row.get(keeper.monitor, float("nan"))
    weights = keeper.final_weights or model_weights(trainer)
    if distributed.rank() > 0:
        return
    best = run.checkpoints / BEST
    if best.exists() and not keeper.better(at_end):
        weights = _checkpoint(best)["model"]
        row.clear()
        row.update(keeper.best_row)
    model = recipe.model(run.settings)
    model.load_state_dict(weights)
    run.save_model(model)


def _gathered(faults: Mapping[str, Mapping[int, str]]) -> dict[str, list[str]]:
    """The skipped cases of all processes, each once, in the order of the data."""
    merged: dict[str, dict[int, str]] = {}
    for part in distributed.gather(dict(faults)):
        for name, lines in part.items():
            merged.setdefault(name, {}).update(lines)
    return {name: [lines[i] for i in sorted(lines)] for name, lines in merged.items() if lines}


def _strategy(settings: TrainerSettings, *, several: bool, cuda: bool) -> str | Strategy:
    if settings.strategy == "fsdp":
        return FSDPStrategy(state_dict_type="full")
    if settings.strategy == "ddp" or several:
        # Buffers are equal in all processes (batch normalisation is synchronised); broadcasting
        # them at each forward would hang where processes validate different numbers of cases.
        return DDPStrategy(
            process_group_backend="nccl" if cuda else "gloo", broadcast_buffers=False
        )
    return "auto"


def _logger(settings: TrainerSettings, folder: Path) -> Any:
    if settings.logger == "none":
        return False
    from lightning.pytorch.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError:
        raise InputError(
            "logger=tensorboard needs the library tensorboard", remedy="pip install tensorboard"
        ) from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep Lightning's advice, which is about its own options, from the user."""
    names = ("lightning", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)
