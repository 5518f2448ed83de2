"""Two layers: what one layer cannot learn.

Layer 1 learns which US follows a cue, a memory M (USs, d_k); the USs' present values w turn it into
a response r1 = w M q. Layer 2 learns from trials `B>A`, in which a cue is followed by another one:
its outcome is what layer 1 answers to that one. The response is the sum of both.

* Second-order conditioning: A+ and then B>A gives B a response, though it never met a US.
* Revaluation: `US=0` after A+ takes the response to A away at once, as what is remembered is the US
  itself. What layer 2 has learnt keeps its value, as Rescorla found in second-order conditioning.

Cues that follow another one learn nothing in that trial: their missing US is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor

from heed_core.errors import InputError
from heed_neuro.conditioning.conditioner import (
    Conditioner,
    Outcomes,
    Simulation,
    check_salience,
    curve_row,
    outcome_values,
    trial_steps,
)
from heed_neuro.conditioning.schedules import (
    NewValue,
    Schedule,
    Trial,
    check_cues,
    check_us,
    parse_schedule,
)


def run_two_layers(
    conditioner: Conditioner,
    schedule: Schedule | str,
    *,
    us: Outcomes | None = None,
    cues: Sequence[str] | None = None,
) -> Simulation:
    """Condition an animal of two layers, both of the conditioner's rule.

    Args:
        conditioner: What a layer is like; not of the rule softmax.
        schedule: As for `Conditioner.run`.
        us: As for `Conditioner.run`.
        cues: As for `Conditioner.run`.

    Returns:
        Strengths and responses are those of both layers together; `memory` is layer 2.

    Raises:
        InputError: As `Conditioner.run`, or the rule is softmax.
    """
    if conditioner.rule == "softmax":
        raise InputError(
            "the rule softmax has no second layer", remedy="choose another rule, such as delta"
        )
    schedule = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    names = tuple(schedule.cues if cues is None else cues)
    check_cues(schedule, names)
    check_salience(conditioner.salience, names)
    values = outcome_values(us, conditioner.d_v)
    check_us(schedule, values)
    return _TwoLayers(conditioner, names, values).follow(schedule)


class _TwoLayers:
    """One animal on its way through a schedule."""

    def __init__(
        self, conditioner: Conditioner, cues: tuple[str, ...], values: dict[str, Tensor]
    ) -> None:
        self.conditioner, self.cues, self.values = conditioner, cues, values
        self.first = replace(conditioner, d_v=len(values)).memory(cues)
        self.second = conditioner.memory(cues)

    def respond(self, query: Tensor) -> Tensor:
        """Of both layers."""
        return self._first(query) + self.second.answer(query)

    def follow(self, schedule: Schedule) -> Simulation:
        rows, strengths = [], []
        for placed in schedule.placed(seed=self.conditioner.seed):
            event, response, us = placed.event, None, None
            if isinstance(event, NewValue):
                self.values[event.us] = torch.full_like(self.values[event.us], event.value)
            else:
                response, us = self.respond(self._key(event.cues)), event.amount
                if not event.is_test:
                    self._learn(event, placed.place)
            strengths.append(self.respond(self.first.cues))
            rows.append(curve_row(placed, response, us, self.cues, strengths[-1]))
        return Simulation(
            cues=self.cues,
            vectors=self.first.cues,
            curves=pd.DataFrame(rows),
            associations=torch.stack(strengths),
            memory=self.second,
        )

    def _first(self, query: Tensor) -> Tensor:
        return self.first.answer(query) @ torch.stack(list(self.values.values()))

    def _intensities(self, cues: Sequence[str]) -> Tensor:
        return torch.tensor([float(cue in cues) for cue in self.cues], dtype=torch.float64)

    def _key(self, cues: Sequence[str]) -> Tensor:
        return self._intensities(cues) @ self.first.cues

    def _learn(self, trial: Trial, place: str) -> None:
        layer = self.second if trial.then else self.first
        if self.conditioner.option("reset_trace"):
            layer.forget_trace()
        if trial.then:
            outcome = self._first(self._key(trial.then))
            self.second.step(self._intensities(trial.cues), outcome, place=place)
            return
        which = [float(name == trial.us) for name in self.values]
        identity = torch.tensor(which, dtype=torch.float64)
        for cues, amount in trial_steps(trial):
            self.first.step(self._intensities(cues), amount * identity, place=place)
