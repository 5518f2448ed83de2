"""Which samples a training draws at which step: exact, stateless, shared by processes.

The order of an epoch and the random numbers of a sample's augmentation depend on (seed, epoch,
index) alone. Samples that a data set wants apart never meet in a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from torch.utils.data import Sampler

from heed_core.errors import InputError
from heed_runtime import distributed
from heed_runtime.errors import UsageError

logger = logging.getLogger(__name__)

_ORDER, _SAMPLE = 0, 1  # spawn keys: order and augmentation draw from unrelated streams


class Draw(NamedTuple):
    """One training sample to be made: which, and the stream of its random numbers."""

    item: int
    seed: int
    epoch: int

    def generator(self) -> np.random.Generator:
        """The random numbers of this sample in this epoch."""
        key = (_SAMPLE, self.epoch, self.item)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class Draws(Sampler[Draw]):
    """The draws of one process in one epoch; at a step all processes together draw one batch.

    Args:
        size: Samples in the data set.
        batch: Samples per step over all processes.
        seed: With the epoch, gives the order.
        rank: This process.
        world: Processes.
        apart: A name per sample: no batch holds a name twice. Empty: any samples may meet.

    Raises:
        ValueError: `apart` has another length, or fewer names than a batch has samples.
    """

    def __init__(
        self,
        size: int,
        *,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        apart: Sequence[str] = (),
    ) -> None:
        self.size, self.batch, self.seed, self.rank, self.world = size, batch, seed, rank, world
        self.epoch, self.first_step = 0, 0
        self.steps = size // batch
        """Whole batches in an epoch; the samples left over differ from epoch to epoch."""
        self._names: Int64[np.ndarray, " n"] | None = None
        if not apart:
            return
        if len(apart) != size:
            raise ValueError(f"apart must be a name for each of {size} samples, got {len(apart)}")
        _, names, counts = np.unique(np.array(apart), return_inverse=True, return_counts=True)
        if len(counts) < batch:
            raise ValueError(f"apart must have {batch} names for a batch, got {len(counts)}")
        if len(counts) < size:
            self._names, self.steps = names.astype(np.int64), most_batches(counts, batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * (self.batch // self.world)

    def __iter__(self) -> Iterator[Draw]:
        key = (_ORDER, self.epoch)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        if self._names is None:
            order = rng.permutation(self.size)
        else:
            order = order_apart(self._names, steps=self.steps, batch=self.batch, rng=rng)
        share = self.batch // self.world
        for step in range(self.first_step, self.steps):
            start = step * self.batch + self.rank * share
            for index in order[start : start + share]:
                yield Draw(int(index), self.seed, self.epoch)


class Batches(Sampler[list[Draw]]):
    """Groups draws into the batches of one process."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return self.draws.steps - self.draws.first_step

    def __iter__(self) -> Iterator[list[Draw]]:
        share, batch = self.draws.batch // self.draws.world, []
        for draw in self.draws:
            batch.append(draw)
            if len(batch) == share:
                yield batch
                batch = []


def most_batches(counts: Int64[np.ndarray, " k"], batch: int) -> int:
    """How many batches can be filled when no name comes twice in one.

    T batches can when each name gives at most T samples and these suffice:
    sum_k min(count_k, T) >= T * batch; if T can, T - 1 can.

    Example:
        >>> most_batches(np.array([5, 1, 1, 1]), 2)
        3
    """
    low, high = 0, int(counts.sum()) // batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * batch:
            low = middle
        else:
            high = middle - 1
    return low


def order_apart(
    names: Int64[np.ndarray, " n"], *, steps: int, batch: int, rng: np.random.Generator
) -> Int64[np.ndarray, " m"]:
    """A random order of `steps` batches without a name twice; the m = steps * batch that fit.

    Samples lie name beside name and are dealt out to the batches in turn, at most `steps` of a
    name, so that none comes round to a batch that it is in.
    """
    order = rng.permutation(len(names))
    place = rng.permutation(int(names.max()) + 1)[names[order]]
    dealt, place = order[np.argsort(place, kind="stable")], np.sort(place)
    dealt = dealt[np.arange(len(names)) - np.searchsorted(place, place) < steps]
    surplus = rng.choice(len(dealt), len(dealt) - steps * batch, replace=False)
    batches = np.delete(dealt, surplus).reshape(batch, steps).T
    mixed: Int64[np.ndarray, " m"] = rng.permuted(batches, axis=1)[rng.permutation(steps)].ravel()
    return mixed


def global_batch(size: int, *, batch: int, world: int, what: str = "training samples") -> int:
    """The batch that `size` samples can fill, shared evenly by the processes.

    Args:
        size: Samples that can be in one batch.
        batch: Samples that are wanted.
        world: Processes.
        what: What `size` counts, in words.

    Raises:
        InputError: There are fewer samples than processes.
        UsageError: The processes cannot share the batch evenly.
    """
    if batch % world:
        raise UsageError(f"batch must be a multiple of the {world} processes, got {batch}")
    if size >= batch:
        return batch
    if size < world:
        raise InputError(
            f"{size} {what} cannot be shared by {world} processes",
            remedy="add data or use fewer processes",
        )
    smaller = size // world * world
    if distributed.rank() == 0:
        logger.warning(
            "the data set has %d %s, fewer than batch=%d: the batch is %d",
            size,
            what,
            batch,
            smaller,
        )
    return smaller
