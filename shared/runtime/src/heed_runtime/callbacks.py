"""What happens between the steps of a training: reseeding, saving, stopping, progress."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.io import CheckpointIO

from heed_runtime import distributed
from heed_runtime.errors import Terminated
from heed_runtime.files import atomic_write

if TYPE_CHECKING:
    from heed_runtime.recipe import Recipe
    from heed_runtime.run import Run
    from heed_runtime.settings import TrainerSettings
    from heed_runtime.terminal import Progress

logger = logging.getLogger(__name__)

LAST, BEST, INITIAL = "last.ckpt", "best.ckpt", "initial.ckpt"


class Interrupted(BaseException):
    """The user asked to stop. Not a KeyboardInterrupt, with which Lightning exits by itself."""


class AtomicCheckpoints(CheckpointIO):
    """Checkpoints as whole files, read without running code from them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write the checkpoint; a kill leaves the old file or the new one."""
        with atomic_write(Path(path)) as temporary, _WholeFile(temporary) as file:
            torch.save(checkpoint, cast(IO[bytes], file))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read tensors and plain values, never anything else."""
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        assert isinstance(checkpoint, dict)
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file."""
        Path(path).unlink(missing_ok=True)


class _WholeFile:
    """A file whose failure to be written is told by the system's error, not by torch's."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._error: OSError | None = None

    def __enter__(self) -> _WholeFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError as closing:
            self._error = self._error or closing
        if self._error is not None:
            raise self._error

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        self._file.flush()


class Reseed(L.Callback):
    """Gives every step its own random numbers, made from (seed, epoch, batch, process).

    So dropout does not depend on where training was resumed, and no generator has to be saved.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed a training step."""
        seed_everything(self.seed, 1, trainer.current_epoch, batch_idx, distributed.rank())

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seed a validation step."""
        seed_everything(self.seed, 2, trainer.current_epoch, batch_idx, distributed.rank())


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch from a tuple of numbers."""
    words = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002  (libraries that draw from the global generator)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class Signals:
    """Turns Ctrl-C and SIGTERM into a wish to stop; a second Ctrl-C stops at once."""

    def __init__(self, *, at_once: bool) -> None:
        self.at_once, self.wished = at_once, False
        self.terminated = False
        """Whether the last signal was SIGTERM."""

    def stop(self, *how_to_go_on: str) -> KeyboardInterrupt:
        """What tells the program how it was stopped."""
        return (Terminated if self.terminated else KeyboardInterrupt)(*how_to_go_on)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note the wish."""
        self.terminated = number == signal.SIGTERM
        if self.at_once or self.wished:
            raise Interrupted
        self.wished = True
        if distributed.rank() == 0:
            logger.warning(
                "stopping after this step to save a checkpoint (again: at once, without)"
            )

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Listen to the signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class Averaged(WeightAveraging):
    """A running average of the weights: what is validated, kept, and resumed beside the weights.

    Args:
        decay: Share of the old average after a step; less at the start, (1 + n) / (10 + n) after n
            steps, so that the first weights are soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(avg_fn=partial(_average, decay))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in place.

        The module's own hook comes after this one, and may note in the model what belongs to the
        weights that were validated, such as a threshold.
        """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module its weights back."""
        super().on_validation_epoch_end(trainer, pl_module)

    @contextmanager
    def in_place(self, module: L.LightningModule) -> Iterator[None]:
        """Let the module have the average as its weights."""
        self._swap_models(module)
        try:
            yield
        finally:
            self._swap_models(module)


def _average(
    decay: float, average: torch.Tensor, weights: torch.Tensor, steps: torch.Tensor | int
) -> torch.Tensor:
    if not average.is_floating_point() and not average.is_complex():
        return weights  # a table of indices, a counter: their average would be rounded down
    kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
    return average.lerp(weights.to(average.dtype), 1.0 - kept)


class Keeper(L.Callback):
    """Writes what a kill must not lose, chooses the best weights and decides when to stop.

    `checkpoints/last.ckpt` is written at the end of every epoch (and every `checkpoint_every`
    steps, and when the user stops); `checkpoints/best.ckpt` and `model/` when the monitored metric
    improves. Best comes before last, so that a kill between them repeats the epoch that improved.

    Args:
        recipe: Names the metric that selects.
        run: Where to write.
        signals: Whether the user wants to stop.
        averaged: The average of the weights, if that is to be kept in their place.
    """

    def __init__(
        self,
        recipe: Recipe[Any, Any, Any],
        run: Run,
        signals: Signals,
        averaged: Averaged | None = None,
    ) -> None:
        self.averaged = averaged
        self.run, self.signals, self.settings = run, signals, run.settings.trainer
        self.monitor, self.mode = recipe.monitor
        self.best: float | None = None
        self.best_row: dict[str, float] = {}
        self.waited = 0
        self.within_epoch = False
        self.last_row: dict[str, float] = {}
        self.final_weights: dict[str, torch.Tensor] | None = None
        self._watched: set[str] = set()
        self._validation: dict[str, float] | None = None
        self._sums: list[dict[str, list[float]]] | None = None
        self._trainer: L.Trainer | None = None
        self._plateaus: list[Any] = []

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.run.checkpoints / LAST

    @property
    def out_of_patience(self) -> bool:
        """Whether early stopping ends the training."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def state_dict(self) -> dict[str, Any]:
        """What the next process has to know."""
        sums = None
        if self.within_epoch and self._trainer is not None:
            sums = distributed.gather(_sums(self._trainer))
        return {
            "best": self.best,
            "best_row": self.best_row,
            "waited": self.waited,
            "within_epoch": self.within_epoch,
            "sums": sums,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of another process."""
        self.best, self.best_row = state_dict["best"], state_dict["best_row"]
        self.waited, self.within_epoch = state_dict["waited"], state_dict["within_epoch"]
        self._sums = state_dict["sums"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the schedulers that watch a metric over, and stop if there is nothing to do."""
        self._trainer = trainer
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and config.interval == "epoch":
                # Lightning would step them after the checkpoint of the epoch is written.
                config.interval = "after validation"
                self._plateaus.append(config)
        if self.enough(trainer) or self.out_of_patience:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last epoch."""
        self._validation = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save within an epoch when it is time, and stop at the last step."""
        if self._sums is not None:
            _add_sums(trainer, self._sums)
            self._sums = None
        self.within_epoch = False
        done = batch_idx + 1
        if done % self.settings.accumulate or done >= trainer.num_training_batches:
            return  # gradients are being summed, or the epoch's end will save
        interrupted = distributed.any_of(self.signals.wished)
        every = self.settings.checkpoint_every
        due = every is not None and trainer.global_step % every == 0
        enough = self.enough(trainer)
        if interrupted or enough or due:
            self.within_epoch = True
            trainer.save_checkpoint(self.last)
            self.within_epoch = enough
        if interrupted:
            raise Interrupted
        if enough:
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Make the mean over processes exact where they saw different numbers of cases."""
        for metric in _results(trainer).values():
            count = getattr(metric, "cumulated_batch_size", None)
            if count is not None:  # as an integer, the mean count would be rounded down
                metric.cumulated_batch_size = count.to(torch.float32)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the metrics of this validation."""
        if trainer.sanity_checking:
            return
        names = {metric.meta.name for metric in _results(trainer).values()}
        self._watched |= names
        self._validation = {
            key: float(value) for key, value in trainer.callback_metrics.items() if key in names
        }
        if self.monitor not in self._validation:
            raise RuntimeError(f"the validation logged no {self.monitor!r}, which selects the best")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the row of the epoch, the best weights and the checkpoint."""
        row = self.last_row = self._row(trainer)
        if distributed.rank() == 0:
            self.run.log_epoch(row)
            logger.info("epoch %d: %s", row["epoch"], _shown(row))
        if self.within_epoch:
            return  # the checkpoint within the epoch is the one to resume from
        if self._validation is not None:
            self._choose(trainer, pl_module, row)
            for config in self._plateaus:
                if (trainer.current_epoch + 1) % config.frequency == 0:
                    config.scheduler.step(row[config.monitor])
        trainer.save_checkpoint(self.last)
        if distributed.any_of(self.signals.wished):
            raise Interrupted
        if self.enough(trainer) or distributed.any_of(self.out_of_patience):
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Collect a sharded model while the processes still hold it."""
        if self.settings.strategy == "fsdp":
            self.final_weights = model_weights(trainer)

    def better(self, score: float) -> bool:
        """Whether a score beats the best so far; NaN never does."""
        if math.isnan(score):
            return False
        if self.best is None:
            return True
        return score > self.best if self.mode == "max" else score < self.best

    def enough(self, trainer: L.Trainer) -> bool:
        """Whether the last step is done."""
        limit = self.settings.max_steps
        return limit is not None and trainer.global_step >= limit

    def _row(self, trainer: L.Trainer) -> dict[str, float]:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        row |= {k: value for k, value in sorted(metrics.items()) if k not in self._watched}
        return row | (self._validation or {})

    def _choose(
        self, trainer: L.Trainer, module: L.LightningModule, row: Mapping[str, float]
    ) -> None:
        if not self.better(row[self.monitor]):
            self.waited += 1
            return
        self.best, self.best_row, self.waited = row[self.monitor], dict(row), 0
        with nullcontext() if self.averaged is None else self.averaged.in_place(module):
            weights = model_weights(trainer)
            if trainer.is_global_zero:
                AtomicCheckpoints().save_checkpoint({"model": weights}, self.run.checkpoints / BEST)
                if self.settings.strategy != "fsdp":  # there, one process holds no whole model
                    self.run.save_model(module.model)  # type: ignore[arg-type]


class Pace(L.Callback):
    """How long the training steps took, with the loading and saving between them.

    Validation does not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, also where a resumed training goes on within an epoch."""
        self._since = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew behind the validation of the epoch before."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a step and the loading of its batch."""
        now = time.monotonic()
        self.seconds += now - self._since
        self._since = now

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew behind a validation within an epoch."""
        self._since = time.monotonic()


class Bar(L.Callback):
    """Tells the terminal how far the training is."""

    def __init__(self, progress: Progress, settings: TrainerSettings) -> None:
        self.settings = settings
        self.progress, self._shown = progress, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps that are left."""
        assert trainer.max_epochs is not None
        epochs = trainer.max_epochs - trainer.current_epoch
        left = int(trainer.num_training_batches) * epochs
        limit = self.settings.max_steps
        if limit is not None:
            left = min(left, (limit - trainer.global_step) * self.settings.accumulate)
        self.progress.restart("train", max(0, left))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a step."""
        note = ""
        if time.monotonic() - self._shown > 0.5:  # reading the loss waits for the GPU
            self._shown = time.monotonic()
            note = f"epoch {trainer.current_epoch + 1}, loss {float(outputs['loss']):.4g}"
        self.progress.advance(note=note)


def model_weights(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """The weights of the module's `model`, whole, also where several processes share them."""
    weights = trainer.strategy.lightning_module_state_dict()
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _results(trainer: L.Trainer) -> Mapping[str, Any]:
    """Lightning's running sums of what the module logged in this epoch."""
    results = trainer._results
    return {} if results is None else results


def _sums(trainer: L.Trainer) -> dict[str, list[float]]:
    """The running sums as numbers: key -> [value, weight]."""
    return {
        key: [float(metric.value), float(getattr(metric, "cumulated_batch_size", 0))]
        for key, metric in _results(trainer).items()
        if metric.is_tensor
    }


def _add_sums(trainer: L.Trainer, saved: list[dict[str, list[float]]]) -> None:
    """Go on with the running sums of an epoch that was interrupted."""
    same = len(saved) == distributed.world()
    own = saved[distributed.rank() if same else 0]
    for key, metric in _results(trainer).items():
        if key not in own or not metric.is_tensor:
            continue
        value, weight = own[key]
        if metric.meta.is_mean_reduction:
            metric.value = metric.value + value
            metric.cumulated_batch_size = metric.cumulated_batch_size + int(weight)
        elif metric.meta.is_sum_reduction:
            metric.value = metric.value + value
        else:
            before = torch.as_tensor(value).to(metric.value)
            metric.value = metric.meta.reduce_fx(metric.value, before)


def _shown(row: Mapping[str, float]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" for key, value in row.items() if key not in ("epoch", "lr")
    )
