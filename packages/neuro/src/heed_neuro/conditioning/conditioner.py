"""An animal that is conditioned: a schedule in, learning curves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pandas as pd  # type: ignore[import-untyped]
import torch
from jaxtyping import Float64
from torch import Tensor

from heed_core.errors import InputError
from heed_neuro.conditioning.cues import check_kind, cue_vectors
from heed_neuro.conditioning.rules import FADING, Memory, Rule, TraceMode
from heed_neuro.conditioning.schedules import (
    DEFAULT_US,
    NewValue,
    Placed,
    Schedule,
    Trial,
    check_cues,
    check_us,
    parse_schedule,
)

Outcomes = Mapping[str, Sequence[float]]
"""Name of a US -> its value, d_v numbers."""

DEFAULTS = {"mixing": 0.3, "beta": 8.0, "trace": "cs", "reset_trace": True}
"""Of the options that only one rule has."""

OWNERS: Mapping[str, Rule] = {
    "mixing": "ph",
    "beta": "softmax",
    "trace": "trace",
    "reset_trace": "trace",
}
"""Option -> the rule that has it."""


def has_option(rule: Rule, name: str) -> bool:
    """Whether an option of `Conditioner` has an effect with a rule."""
    if name == "decay":
        return rule in FADING
    return OWNERS.get(name, rule) == rule


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """What an animal is like before it has learnt anything; `run` conditions it.

    Example:
        >>> found = Conditioner(rule="delta", eta=0.1).run("20 A+ | 20 AB+ | B?")
        >>> round(found.strength("B"), 4)
        0.0601
    """

    d_k: int = 8
    """Channels of cues."""
    d_v: int = 1
    """Channels of outcomes."""
    rule: Rule = "delta"
    """How it learns; see `rules`."""
    eta: float = 0.1
    """Rate of learning, above 0 and at most 1."""
    decay: float | None = None
    """What is left after a step, above 0 and at most 1; of the rules trace and gated-delta."""
    cues: str = "orthonormal"
    """Vectors of cues: orthonormal, random, or overlap:RHO with one cosine for all pairs."""
    seed: int = 0
    """Of random cues and of shuffled phases."""
    salience: Mapping[str, float] = field(default_factory=dict)
    """Factor of the rate for single cues, above 0; the others have 1."""
    trace: TraceMode | None = None
    """What fades with the rule trace: the trace of a cue (cs), or the memory. None: cs."""
    reset_trace: bool | None = None
    """With the rule trace: no trace of cues is left at the next trial. None: so it is."""
    mixing: float | None = None
    """With the rule ph: how fast associability follows the error. None: 0.3."""
    beta: float | None = None
    """With the rule softmax: how sharply cues are told apart. None: 8."""

    def __post_init__(self) -> None:
        check_kind(self.cues)
        for name in ("d_k", "d_v"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must be above 0 and at most 1, got {self.eta}")
        if self.rule in FADING and self.decay is None:
            raise ValueError(f"the rule {self.rule!r} needs a decay, such as decay 0.9")
        if self.rule not in FADING and self.decay is not None:
            raise ValueError(f"decay has no effect with the rule {self.rule!r}; leave it out")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        for cue, value in self.salience.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"salience of {cue} must be above 0, got {value}")
        self._check_owned()

    def _check_owned(self) -> None:
        for name, owner in OWNERS.items():
            if getattr(self, name) is not None and self.rule != owner:
                raise ValueError(f"{name} has no effect with the rule {self.rule!r}; leave it out")
        if self.reset_trace is not None and self.trace == "memory":
            raise ValueError("reset_trace has no effect with trace='memory'; leave it out")
        if self.mixing is not None and not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing must be from 0 to 1, got {self.mixing}")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be above 0, got {self.beta}")
        if self.trace is not None and self.trace not in get_args(TraceMode):
            raise ValueError(f"trace must be one of {get_args(TraceMode)}, got {self.trace!r}")

    def option(self, name: str) -> Any:
        """An option of one rule, with its default."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value

    def vectors(self, cues: Sequence[str]) -> Float64[Tensor, "c d_k"]:
        """A vector per cue."""
        return cue_vectors(self.cues, len(cues), self.d_k, seed=self.seed)

    def memory(self, cues: Sequence[str], *, d_v: int | None = None) -> Memory:
        """An empty memory for these cues."""
        salience = [self.salience.get(cue, 1.0) for cue in cues]
        return Memory(
            self.vectors(cues),
            self.d_v if d_v is None else d_v,
            rule=self.rule,
            eta=self.eta,
            decay=1.0 if self.decay is None else self.decay,
            mode=self.option("trace"),
            mixing=self.option("mixing"),
            beta=self.option("beta"),
            salience=torch.tensor(salience, dtype=torch.float64),
        )

    def run(
        self,
        schedule: Schedule | str,
        *,
        us: Outcomes | None = None,
        cues: Sequence[str] | None = None,
    ) -> Simulation:
        """Condition an animal.

        Args:
            schedule: What happens, parsed or as text.
            us: Values of the USs by name; `US` is 1 in all channels if not given.
            cues: All cues there are, which fixes their vectors; those of the schedule if not given.

        Raises:
            InputError: An unknown cue or US, a US of another size, cues that do not fit in d_k, or
                a trial at which the rule diverges.
        """
        schedule = parse_schedule(schedule) if isinstance(schedule, str) else schedule
        names = tuple(schedule.cues if cues is None else cues)
        check_cues(schedule, names)
        check_salience(self.salience, names)
        values = outcome_values(us, self.d_v)
        check_us(schedule, values)
        return _Run(self, names, values).follow(schedule)


def outcome_values(us: Outcomes | None, d_v: int) -> dict[str, Float64[Tensor, " d_v"]]:
    """The value of each US as a tensor; `US` is 1 in all channels if it is not among them.

    Raises:
        InputError: A value of another size, or that is no number.
    """
    values = {DEFAULT_US: torch.ones(d_v, dtype=torch.float64)}
    for name, numbers in (us or {}).items():
        value = torch.tensor(list(numbers), dtype=torch.float64)
        if len(value) != d_v:
            raise InputError(
                f"the US {name!r} has {len(value)} values, not d_v = {d_v}",
                remedy="give as many values as there are channels",
            )
        if not bool(value.isfinite().all()):
            raise InputError(f"the US {name!r} has a value that is no finite number")
        values[name] = value
    return values


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What was learnt."""

    cues: tuple[str, ...]
    vectors: Float64[Tensor, "c d_k"]
    curves: pd.DataFrame
    """A row per trial: phase, trial, type, response (before the trial is learnt), us, and the
    strength of each cue afterwards, in a column of its name. With several channels of outcomes the
    columns are `response.1`, `A.1`, ..."""
    associations: Float64[Tensor, "t c d_v"]
    """Strength of each cue after each trial."""
    memory: Memory
    """As it is at the end."""

    def strength(self, cue: str, *, channel: int = 0) -> float:
        """What a cue calls up at the end.

        Raises:
            InputError: There is no such cue.
        """
        if cue not in self.cues:
            raise InputError(f"unknown cue {cue!r}", remedy=f"use one of {', '.join(self.cues)}")
        return float(self.associations[-1, self.cues.index(cue), channel])


def trial_steps(trial: Trial) -> Iterator[tuple[tuple[str, ...], float]]:
    """The steps of a trial that is learnt: which cues are there, and how much of the US."""
    assert trial.amount is not None
    if trial.then:
        yield trial.cues, 0.0
        yield trial.then, 0.0
        return
    for step in range(trial.delay + 1):
        yield (trial.cues if step == 0 else ()), (trial.amount if step == trial.delay else 0.0)


class _Run:
    """One animal on its way through a schedule."""

    def __init__(
        self, conditioner: Conditioner, cues: tuple[str, ...], values: dict[str, Tensor]
    ) -> None:
        self.conditioner, self.cues, self.values = conditioner, cues, values
        self.memory = conditioner.memory(cues)
        self.exemplars: list[tuple[str, float]] = []  # US and amount of each stored step

    def follow(self, schedule: Schedule) -> Simulation:
        rows, strengths = [], []
        for placed in schedule.placed(seed=self.conditioner.seed):
            event = placed.event
            if isinstance(event, NewValue):
                self._revalue(event)
                response, us = None, None
            else:
                response = self.memory.answer(self.intensities(event.cues) @ self.memory.cues)
                us = event.amount
                if not event.is_test:
                    self._learn(event, placed.place)
            strengths.append(self.memory.answer(self.memory.cues))
            rows.append(curve_row(placed, response, us, self.cues, strengths[-1]))
        return Simulation(
            cues=self.cues,
            vectors=self.memory.cues,
            curves=pd.DataFrame(rows),
            associations=torch.stack(strengths),
            memory=self.memory,
        )

    def intensities(self, cues: Sequence[str]) -> Tensor:
        return torch.tensor([float(cue in cues) for cue in self.cues], dtype=torch.float64)

    def _learn(self, trial: Trial, place: str) -> None:
        if self.conditioner.option("reset_trace"):
            self.memory.forget_trace()
        for cues, amount in trial_steps(trial):
            outcome = amount * self.values[trial.us]
            if self.memory.rule == "softmax" and not cues:
                # an exemplar is the whole trial: its cues with what came of them
                key, _ = self.memory.stored.pop()
                self.memory.stored.append((key, outcome))
                self.exemplars[-1] = (trial.us, amount)
                continue
            self.memory.step(self.intensities(cues), outcome, place=place)
            self.exemplars.append((trial.us, amount))

    def _revalue(self, event: NewValue) -> None:
        """A US is worth something else: only exemplars, which keep the US itself, notice."""
        self.values[event.us] = torch.full_like(self.values[event.us], event.value)
        if self.memory.rule == "softmax":
            self.memory.stored = [
                (key, amount * self.values[us])
                for (key, _), (us, amount) in zip(self.memory.stored, self.exemplars, strict=True)
            ]


def curve_row(
    placed: Placed,
    response: Tensor | None,
    us: float | None,
    cues: Sequence[str],
    strengths: Tensor,
) -> dict[str, Any]:
    """The row of one event in the table of learning curves."""
    row: dict[str, Any] = {
        "phase": placed.phase,
        "trial": placed.trial,
        "type": str(placed.event),
    }
    missing = [float("nan")] * strengths.shape[1]
    row |= _channels("response", missing if response is None else response.tolist())
    row["us"] = float("nan") if us is None else us
    for cue, values in zip(cues, strengths.tolist(), strict=True):
        row |= _channels(cue, values)
    return row


def _channels(name: str, values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return {name: values[0]}
    return {f"{name}.{index}": value for index, value in enumerate(values, start=1)}


def check_salience(salience: Mapping[str, float], cues: Sequence[str]) -> None:
    """Refuse the salience of a cue that there is not.

    Raises:
        InputError: Names it.
    """
    for cue in salience:
        if cue not in cues:
            raise InputError(
                f"unknown cue {cue!r} in salience", remedy=f"use one of {', '.join(cues)}"
            )
