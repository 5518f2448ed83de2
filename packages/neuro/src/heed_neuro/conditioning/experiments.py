"""A design under several rules: learning curves and strengths as tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from heed_neuro.conditioning.conditioner import Conditioner, Simulation
from heed_neuro.conditioning.designs import Design
from heed_neuro.conditioning.rules import FADING, Rule


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What the animals of a design have learnt."""

    design: Design
    found: Mapping[str, Mapping[str, Simulation]]
    """Rule -> group -> simulation."""

    @property
    def curves(self) -> pd.DataFrame:
        """Learning curves: the columns of `Simulation.curves` behind `group` and `rule`."""
        frames = []
        for rule, groups in self.found.items():
            for group, simulation in groups.items():
                frame = simulation.curves.copy()
                frame.insert(0, "rule", rule)
                frame.insert(0, "group", group)
                frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def strengths(self) -> list[dict[str, Any]]:
        """Strength of each cue at the end, per group and rule, beside what is expected."""
        rows = []
        for rule, groups in self.found.items():
            for group, simulation in groups.items():
                for cue in simulation.cues:
                    value = simulation.strength(cue)
                    wanted = expected_value(self.design, rule, group, cue)
                    rows.append(
                        {
                            "group": group,
                            "cue": cue,
                            "rule": rule,
                            "strength": value,
                            "expected": wanted,
                            "difference": None if wanted is None else value - wanted,
                        }
                    )
        return rows

    def phases(self) -> list[dict[str, Any]]:
        """Strength of each cue at the end of each phase."""
        rows = []
        for rule, groups in self.found.items():
            for group, simulation in groups.items():
                schedule = self.design.schedules[group]
                last = simulation.curves.groupby("phase").tail(1)
                for _, row in last.iterrows():
                    phase = int(row["phase"])
                    columns = {
                        f"V({column})": float(row[column])
                        for column in simulation.curves.columns
                        if re.sub(r"\.\d+$", "", column) in simulation.cues
                    }
                    text = str(schedule.phases[phase - 1])
                    rows.append(
                        {"group": group, "rule": rule, "phase": phase, "trials": text, **columns}
                    )
        return rows

    def tests(self) -> list[dict[str, Any]]:
        """Responses in test trials."""
        curves = self.curves
        response = [name for name in curves.columns if name.startswith("response")]
        found = curves[curves["type"].str.endswith("?")]
        columns = ["group", "rule", "phase", "type", *response]
        return [
            {str(key): value for key, value in row.items()}
            for row in found[columns].to_dict("records")
        ]


def expected_value(design: Design, rule: str, group: str, cue: str) -> float | None:
    """What a design expects of a cue under a rule; None if it says nothing."""
    for one in design.expected:
        if (one.group, one.cue) == (group, cue) and one.rule in (rule, None):
            return one.value
    return None


def run_experiment(design: Design, conditioners: Sequence[Conditioner]) -> Experiment:
    """Run a design under several rules, or only under the one that the design names.

    A design of two layers leaves the rule softmax out, which has no second one.
    """
    named = design.conditioner.get("rule")
    found: dict[str, Mapping[str, Simulation]] = {}
    for conditioner in conditioners:
        rule = named or conditioner.rule
        if rule in found or (design.layers == 2 and rule == "softmax"):
            continue
        found[rule] = design.run(conditioner)
    return Experiment(design=design, found=found)


def conditioner_of(rule: Rule, *, decay: float, **options: Any) -> Conditioner:
    """A conditioner that has the decay only where its rule has one."""
    return Conditioner(rule=rule, decay=decay if rule in FADING else None, **options)
