"""Training samples and batches in which the classes are even."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, Int64
from torch.utils.data import Sampler

from heed_core.errors import InputError


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches of which half are positive, as the released recipe of COVID-Net draws them.

    An epoch has `ceil(negatives / batch)` steps. Each takes the next negatives of a random order,
    then puts positives, drawn without replacement, in the place of `batch // 2` of them.

    Args:
        positive: Of each sample, whether it is positive.
        batch: Samples per step.
        seed: With the epoch, gives the order.

    Raises:
        InputError: Fewer positives than a batch needs, or no negatives.
    """

    def __init__(self, positive: Sequence[bool], *, batch: int, seed: int = 0) -> None:
        if batch < 2:
            raise ValueError(f"batch must be at least 2, got {batch}")
        flags = np.asarray(positive, dtype=bool)
        self.negatives, self.positives = np.flatnonzero(~flags), np.flatnonzero(flags)
        self.batch, self.seed, self.epoch = batch, seed, 0
        if len(self.positives) < batch // 2 or not len(self.negatives):
            raise InputError(
                f"a batch of {batch} needs {batch // 2} positive samples and a negative one, there "
                f"are {len(self.positives)} and {len(self.negatives)}",
                remedy="use a smaller batch",
            )

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.negatives) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        key = np.random.SeedSequence(self.seed, spawn_key=(self.epoch,))
        rng = np.random.default_rng(key)
        order = rng.permutation(self.negatives)
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch].copy()
            half = max(len(chosen) // 2, 1)
            places = rng.choice(len(chosen), half, replace=False)
            chosen[places] = rng.choice(self.positives, half, replace=False)
            yield [int(index) for index in chosen]


def even_groups(
    labels: Sequence[int], *, classes: int, positive_only: bool = False, seed: int = 0
) -> list[list[Int64[np.ndarray, " _"]]]:
    """Groups to draw one sample of each class from.

    There are as many groups as the rarest class has samples; the samples of the others are dealt
    out. So a batch of different groups, one sample per class and group, is even and holds no
    sample twice.

    With `positive_only` there is a group for every two negatives, so that an epoch has the steps of
    the released recipe (`BalancedBatchSampler`), which shows half of the negatives. Where there are
    more groups than positives, each of these is in several groups: see `groups_apart`.

    Args:
        labels: Class numbers.
        classes: How many classes there are.
        positive_only: Two pools, the last class and all others, instead of one per class.
        seed: Of the dealing.

    Returns:
        Per group, per pool: the indices to draw one from.

    Raises:
        InputError: A pool is empty.
    """
    numbers: Int[np.ndarray, " n"] = np.asarray(labels)
    if positive_only:
        pools = [np.flatnonzero(numbers != classes - 1), np.flatnonzero(numbers == classes - 1)]
    else:
        pools = [np.flatnonzero(numbers == k) for k in range(classes)]
    count = -(-len(pools[0]) // 2) if positive_only else min(len(pool) for pool in pools)
    if not all(len(pool) for pool in pools):
        raise InputError("a class has no training picture", remedy="set --data.balance none")
    rng = np.random.default_rng(seed)
    dealt = [rng.permutation(pool) for pool in pools]
    return [[pool[group % len(pool) :: count] for pool in dealt] for group in range(count)]


def groups_apart(groups: Sequence[Sequence[Int64[np.ndarray, " _"]]]) -> list[str]:
    """A name for each group, the same for those that hold the same positives.

    Example:
        >>> groups_apart([[np.array([0]), np.array([8])], [np.array([1]), np.array([8])]])
        ['8', '8']
    """
    return [str(group[-1][0]) for group in groups]
