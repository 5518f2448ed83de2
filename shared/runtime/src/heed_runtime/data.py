"""The one data module of all recipes: exact, stateless sampling and sharding over processes.

The order of an epoch and the random numbers of a sample's augmentation depend on (seed, epoch,
index) alone. So the batch of a step is the same set of samples whatever the number of processes and
workers, and training that is resumed in the middle of an epoch goes on as if it had not been
interrupted.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from heed_core.errors import InputError
from heed_runtime import distributed
from heed_runtime.draws import Batches, Draw, Draws, global_batch

if TYPE_CHECKING:
    from heed_runtime.recipe import Recipe, SizedData

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]


class Fault(NamedTuple):
    """A case or sample that could not be read."""

    item: int
    line: str


class Loaded(NamedTuple):
    """What a worker hands over: a batch, and what went wrong on the way."""

    batch: Any
    faults: tuple[Fault, ...]


@dataclass
class Skipped:
    """Collects the faults of one pass over the data, each once."""

    on_error: OnError
    faults: dict[int, str] = field(default_factory=dict)
    note: Callable[[Fault], None] | None = None
    """Called at once with each fault that is skipped."""

    @property
    def lines(self) -> list[str]:
        """What was skipped, in the order of the data."""
        return [self.faults[index] for index in sorted(self.faults)]

    def meet(self, faults: Sequence[Fault]) -> None:
        """Note the faults, or end with the first of them.

        Raises:
            InputError: `on_error` is "stop" and there is a fault.
        """
        for fault in faults:
            if self.on_error == "stop":
                raise InputError(fault.line)
            if fault.item not in self.faults:
                logger.warning("skipped: %s", fault.line)
                if self.note is not None:
                    self.note(fault)
            self.faults[fault.item] = fault.line

    def take_over(self, data: SizedData) -> None:
        """Note what a data set left out by itself when it was made."""
        lines: Sequence[str] = getattr(data, "skipped", ())
        self.meet([Fault(number - len(lines), line) for number, line in enumerate(lines)])


class _Samples(Dataset[Loaded]):
    """Training samples, augmented; one that cannot be read is replaced by the next that can."""

    def __init__(
        self,
        data: SizedData,
        augment: Callable[[Any, np.random.Generator], Any] | None,
        on_error: OnError,
    ) -> None:
        self.data, self.augment, self.on_error = data, augment, on_error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> Loaded:
        faults: list[Fault] = []
        for offset in range(len(self.data)):
            index = (draw.item + offset) % len(self.data)
            try:
                sample = self.data[index]
                if self.augment is not None:
                    sample = self.augment(sample, draw.generator())
            except InputError as error:
                faults.append(Fault(index, str(error)))
                if self.on_error == "stop":
                    break
            else:
                return Loaded(sample, tuple(faults))
        return Loaded(None, tuple(faults))


class _Collate:
    """The recipe's collation of the samples that could be read."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Loaded]) -> Loaded:
        faults = tuple(fault for sample in samples for fault in sample.faults)
        if any(sample.batch is None for sample in samples):
            return Loaded(None, faults)
        return Loaded(self.collate([sample.batch for sample in samples]), faults)


class _Cases(Dataset[Loaded]):
    """Cases one at a time, with what went wrong instead of an exception."""

    def __init__(self, data: SizedData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Loaded:
        try:
            return Loaded([self.data[index]], ())
        except InputError as error:
            return Loaded(None, (Fault(index, str(error)),))


class TrainLoader:
    """The batches of one process; Lightning tells it the epoch and stores where it stands."""

    def __init__(self, loader: DataLoader[Loaded], draws: Draws, skipped: Skipped) -> None:
        self.sampler, self.skipped = draws, skipped
        self.waited_s = 0.0
        """How long the training has waited for batches."""
        self._loader, self._start, self._given = loader, 0, 0

    def __len__(self) -> int:
        return self.sampler.steps

    def __iter__(self) -> Iterator[Any]:
        # A generator: the epoch is set after `iter` and before the first batch is asked for.
        start, self._start = self._start, 0
        self.sampler.first_step, self._given = start, start
        batches = iter(self._loader)
        while True:
            asked = time.monotonic()
            loaded = next(batches, None)
            self.waited_s += time.monotonic() - asked
            if loaded is None:
                return
            batch, faults = loaded
            self._agree(faults)
            if batch is None:
                raise InputError(
                    "no training sample can be read", remedy="run check on the data set"
                )
            self._given += 1
            yield batch

    def _agree(self, faults: tuple[Fault, ...]) -> None:
        stop = self.skipped.on_error == "stop"
        if stop and distributed.any_of(bool(faults)):
            # All processes end with the same fault, none waits for the others.
            faults = tuple(fault for part in distributed.gather(faults) for fault in part)
        self.skipped.meet(faults)

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were given out."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip what was given out before."""
        self._start = state["given"]


class ReadAhead:
    """Gives what `source` gives, read by a thread that is at most `depth` items ahead.

    The thread ends with the pass, also where the pass is left early.
    """

    def __init__(self, source: Iterable[Loaded], depth: int) -> None:
        self.source, self.depth = source, depth

    def __iter__(self) -> Iterator[Loaded]:
        ready: queue.Queue[tuple[Loaded | None, BaseException | None]] = queue.Queue()
        free = threading.Semaphore(self.depth)
        left = threading.Event()

        items = iter(self.source)

        def read() -> None:
            while True:
                free.acquire()
                if left.is_set():
                    return
                try:
                    ready.put((next(items), None))
                except StopIteration:
                    ready.put((None, None))
                    return
                except BaseException as error:
                    ready.put((None, error))
                    return

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                item, error = ready.get()
                if error is not None:
                    raise error
                if item is None:
                    return
                free.release()
                yield item
                del item  # else it would stay while the next is waited for
        finally:
            left.set()
            free.release()


class CaseLoader:
    """The cases of one process, each as a list of one; a fault is skipped or ends the pass.

    Args:
        loader: Gives `Loaded` cases in the order of `indices`.
        indices: Which cases of the data set these are.
        skipped: Collects the faults.
        hold: Keep the fault that ends the pass in `fault` instead of raising it here, so that all
            processes can end together.
    """

    def __init__(
        self,
        loader: Iterable[Loaded],
        indices: Sequence[int],
        skipped: Skipped,
        *,
        hold: bool = False,
    ) -> None:
        self.indices, self.skipped, self.hold = indices, skipped, hold
        self.fault: InputError | None = None
        self.current = -1
        self._loader = loader

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[list[Any]]:
        for item, (cases, faults) in zip(self.indices, self._loader, strict=True):
            self.current = item
            try:
                self.skipped.meet(faults)
            except InputError as error:
                if not self.hold:
                    raise
                self.fault = error
                return
            if cases is not None:
                yield cases
            if self.fault is not None:  # met while the case was predicted or written
                return


def shard(size: int, *, rank: int, world: int) -> range:
    """The indices of one process: every one is in exactly one shard."""
    return range(rank, size, world)


class Data(L.LightningDataModule):
    """The training samples and validation cases of a recipe, or the cases of a prediction.

    Cases reach the module as they were read, on the CPU: the module moves what it needs.

    Args:
        recipe: Says what the data are.
        settings: Of the run.
        root: The data set; None if there are only `cases`.
        cases: What `Trainer.predict` goes through.
    """

    def __init__(
        self,
        recipe: Recipe[Any, Any, Any],
        settings: Any,
        *,
        root: Path | None = None,
        cases: SizedData | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.config, self.root, self.cases = recipe, settings, root, cases
        self.allow_zero_length_dataloader_with_multiple_devices = True
        on_error: OnError = settings.data.on_error
        self.skipped = {name: Skipped(on_error) for name in ("train", "val", "predict")}
        self.pass_over_training: TrainLoader | None = None
        self.pass_over_cases: CaseLoader | None = None

    def train_dataloader(self) -> TrainLoader:
        """Whole global batches in an order that depends on the epoch."""
        assert self.root is not None
        trainer = self.config.trainer
        data = self.recipe.train_data(self.config, self.root)
        world = distributed.world()
        if len(data) == 0:
            raise InputError("holds no training samples", path=self.root)
        apart: Sequence[str] = getattr(data, "apart", ())
        if apart:
            most, what = len(set(apart)), "groups of training samples that share no batch"
        else:
            most, what = len(data), "training samples"
        draws = Draws(
            len(data),
            batch=global_batch(most, batch=trainer.batch, world=world, what=what),
            seed=trainer.seed,
            rank=distributed.rank() if world > 1 else 0,
            world=world,
            apart=apart,
        )
        skipped = self.skipped["train"]
        skipped.take_over(data)
        samples = _Samples(data, self.recipe.augment(self.config), skipped.on_error)
        loader = DataLoader(
            samples,
            batch_sampler=Batches(draws),
            collate_fn=_Collate(self.recipe.collate),
            **self._loading(),
        )
        self.pass_over_training = TrainLoader(loader, draws, skipped)
        return self.pass_over_training

    def val_dataloader(self) -> CaseLoader:
        """Each validation case once, shared by the processes."""
        assert self.root is not None
        data = self.recipe.cases(self.config, self.root, "val")
        # With too few cases a process would have none and miss the others' exchange of metrics;
        # where all see all cases, the mean over the processes is the same number.
        alone = len(data) < distributed.world()
        return self._case_loader(data, self.skipped["val"], shared=not alone)

    def predict_dataloader(self) -> CaseLoader:
        """Each given case once, shared by the processes."""
        assert self.cases is not None
        loader = self._case_loader(self.cases, self.skipped["predict"], shared=True)
        loader.hold = True
        self.pass_over_cases = loader
        return loader

    def careful(self, step: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """A `predict_step` whose faults of the user's input count as faults of reading the case."""

        @functools.wraps(step)
        def wrapped(*args: Any, **kwargs: Any) -> list[Any]:
            loader = self.pass_over_cases
            assert loader is not None
            try:
                return step(*args, **kwargs)
            except InputError as error:
                fault = Fault(loader.current, str(error))
            try:
                loader.skipped.meet([fault])
            except InputError as error:
                loader.fault = error
            return []

        return wrapped

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move training batches; leave cases as they are."""
        assert self.trainer is not None
        if self.trainer.training:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch

    def _case_loader(self, data: SizedData, skipped: Skipped, *, shared: bool) -> CaseLoader:
        rank, world = (distributed.rank(), distributed.world()) if shared else (0, 1)
        indices = shard(len(data), rank=rank if world > 1 else 0, world=world)
        loader: Iterable[Loaded] = DataLoader(
            _Cases(data),
            batch_size=None,
            sampler=indices,
            collate_fn=_as_it_is,
            **self._loading(),
        )
        depth: int = getattr(data, "read_ahead", 0)
        if depth and not self.config.trainer.workers:
            loader = ReadAhead(loader, depth)
        return CaseLoader(loader, indices, skipped)

    def _loading(self) -> dict[str, Any]:
        workers = self.config.trainer.workers
        return {"num_workers": workers, "persistent_workers": workers > 0}


def _as_it_is(loaded: Any) -> Any:
    return loaded
