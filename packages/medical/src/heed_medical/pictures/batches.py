"""Training samples in which the classes are even."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from heed_core.errors import InputError


def even_groups(
    labels: Sequence[int], *, classes: int, positive_only: bool = False, seed: int = 0
) -> list[list[Int64[np.ndarray, " _"]]]:
    """Groups to draw one sample of each class from.

    There are as many groups as the rarest class has samples; the samples of the others are dealt
    out. So a batch of different groups, one sample per class and group, is even and holds no
    sample twice.

    With `positive_only` there is a group for every two negatives, so that an epoch has the steps of
    the released recipe of COVID-Net, one for every batch of negatives, half of which then give way
    to positives. Where there are more groups than positives, each of these is in several groups:
    see `groups_apart`.

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

    No batch holds two groups of one name. Where there are fewer names than a batch has groups, the
    training makes smaller batches and says so, instead of the error that the released recipe ends
    with: they are half positive all the same.

    Example:
        >>> groups_apart([[np.array([0]), np.array([8])], [np.array([1]), np.array([8])]])
        ['8', '8']
    """
    return [str(group[-1][0]) for group in groups]
