"""Which trials are for training, validation and testing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from heed_core.errors import InputError
from heed_gaze.oat.shelves import Shelves, Trial

Rule = Literal["given", "random", "layout", "target", "combination"]
SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.9)
"""Where training ends and where testing begins, as shares of each group's trials."""


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How trials are divided."""

    rule: Rule | None = None
    """given: as the file says; random: 80/10/10 of the trials of each group, the paper's; layout,
    target: test on layouts or targets that training does not see; combination: test on one pair of
    target and layout. None: given where the file says it of every trial, else random."""
    seed: int = 0
    """Of the random order."""
    combination: str | None = None
    """The pair to test on, `TARGET@LAYOUT`; None: one that the seed picks."""

    def __post_init__(self) -> None:
        if self.combination is not None and self.rule != "combination":
            raise ValueError("combination has an effect with rule='combination' alone")


def split_trials(shelves: Shelves, options: SplitOptions) -> dict[str, list[Trial]]:
    """The trials of train, val and test.

    Raises:
        InputError: The file names no or unknown splits, or there is no such combination.
    """
    trials = shelves.trials
    rule = options.rule or ("given" if all(trial.split for trial in trials) else "random")
    if rule == "given":
        return _given(trials)
    rng = np.random.default_rng(options.seed)
    order = [trials[index] for index in rng.permutation(len(trials))]
    if rule == "combination":
        return _combination(order, options.combination, rng)
    # The same permutation serves all groups, as in the paper's code; each group is cut on its own.
    keys: dict[str, Callable[[Trial], str]] = {
        "layout": lambda trial: trial.layout,
        "target": lambda trial: trial.wanted,
    }
    found: dict[str, list[Trial]] = {name: [] for name in SPLITS}
    groups: dict[str, list[Trial]] = {}
    for trial in order:
        groups.setdefault(shelves.layout_of(trial).group, []).append(trial)
    for members in groups.values():
        parts = _cut(members) if rule == "random" else _cut_units(members, keys[rule], rng)
        for name, part in zip(SPLITS, parts, strict=True):
            found[name] += part
    return found


def _given(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    for trial in trials:
        if trial.split not in SPLITS:
            raise InputError(
                f"{trial.name} has the split {trial.split!r}, not one of {', '.join(SPLITS)}",
                remedy="correct the file or choose another split rule",
            )
    return {name: [trial for trial in trials if trial.split == name] for name in SPLITS}


def _cut(members: Sequence[Trial]) -> tuple[Sequence[Trial], ...]:
    low, high = (round(share * len(members)) for share in SHARES)
    return members[:low], members[low:high], members[high:]


def _cut_units(
    members: Sequence[Trial], key: Callable[[Trial], str], rng: np.random.Generator
) -> tuple[Sequence[Trial], ...]:
    """Cut so that all trials of a unit (a layout, a target) stay together."""
    units = sorted({key(trial) for trial in members})
    if len(units) < len(SPLITS):
        raise InputError(
            f"{len(units)} of what is held out cannot be shared by train, val and test",
            remedy="choose another split rule",
        )
    units = [units[index] for index in rng.permutation(len(units))]
    held = max(1, round((1 - SHARES[1]) * len(units)))
    parts = (units[: -2 * held], units[-2 * held : -held], units[-held:])
    return tuple([t for t in members if key(t) in set(part)] for part in parts)


def _combination(
    order: list[Trial], wanted: str | None, rng: np.random.Generator
) -> dict[str, list[Trial]]:
    def name(trial: Trial) -> str:
        return f"{trial.wanted}@{trial.layout}"

    pairs = sorted({name(trial) for trial in order})
    if wanted is None:
        wanted = pairs[int(rng.integers(len(pairs)))]
    if wanted not in pairs:
        raise InputError(
            f"no trial has the combination {wanted!r}",
            remedy=f"choose one of {len(pairs)}, such as {pairs[0]!r}",
        )
    rest = [trial for trial in order if name(trial) != wanted]
    cut = round(SHARES[0] / SHARES[1] * len(rest))
    return {
        "train": rest[:cut],
        "val": rest[cut:],
        "test": [trial for trial in order if name(trial) == wanted],
    }
