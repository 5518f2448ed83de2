"""The phenomena of conditioning: how each is shown, and what the rules make of it.

A phenomenon is an effect on the strength of a cue: a group of animals is compared with a control.

    effect = (strength in the control - strength in the group) / reference

An effect of at least `EMERGES` counts as shown. Spontaneous recovery and renewal are among them as
failures: no rule here predicts them, as nothing in the memory knows of time or of places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from heed_neuro.conditioning import theory
from heed_neuro.conditioning.conditioner import Conditioner, Simulation
from heed_neuro.conditioning.designs import Design, Expected
from heed_neuro.conditioning.rules import Rule

ETA, TRIALS = 0.1, 20
"""Of the table; every expectation below is a closed form in them."""

EMERGES = 0.1
"""The least effect that counts."""

Reading = tuple[str, str]
"""A group and the cue whose strength is read at its end."""


@dataclass(frozen=True, kw_only=True)
class Phenomenon:
    """One phenomenon.

    Example:
        >>> PHENOMENA["blocking"].effect(PHENOMENA["blocking"].simulate(Conditioner())) > 0.8
        True
    """

    name: str
    about: str
    groups: Mapping[str, str]
    """Group -> schedule."""
    shown: Reading | None = None
    control: Reading | None = None
    reference: Reading | None = None
    """What the effect is a share of; the control if not given."""
    expected: tuple[Expected, ...] = ()
    """Strengths by theory."""
    salience: Mapping[str, float] = field(default_factory=dict)
    decay: float | None = None
    """Of the rule trace, where the phenomenon is about it."""
    layers: int = 1

    @property
    def design(self) -> Design:
        """As a design that can be written to a file."""
        return Design(
            name=self.name,
            title=self.about,
            groups=self.groups,
            salience=self.salience,
            layers=self.layers,
            conditioner={} if self.decay is None else {"decay": self.decay},
            expected=self.expected,
        )

    def simulate(self, conditioner: Conditioner) -> dict[str, Simulation]:
        """Condition each group."""
        return self.design.run(conditioner)

    def effect(self, found: Mapping[str, Simulation]) -> float | None:
        """Of simulated groups; None where no effect is defined, or the reference is nil."""
        return self.effect_of(lambda group, cue: found[group].strength(cue))

    def effect_of(self, strength: Callable[[str, str], float]) -> float | None:
        """Of strengths, however they were found."""
        if self.shown is None or self.control is None:
            return None
        control = strength(*self.control)
        reference = abs(strength(*(self.reference or self.control)))
        return None if reference < 1e-6 else (control - strength(*self.shown)) / reference


def _both(delta: float, hebb: float, *, group: str, cue: str) -> tuple[Expected, ...]:
    return (
        Expected(rule="delta", group=group, cue=cue, value=delta),
        Expected(rule="hebb", group=group, cue=cue, value=hebb),
    )


ALONE = theory.acquired(ETA, TRIALS)
"""Strength of a cue that was trained alone, under delta."""

HEBB = theory.hebbian(ETA, TRIALS)
"""The same under hebb."""


def _one_cue() -> tuple[Phenomenon, ...]:
    """A cue comes to predict the US, and ceases to."""
    extinguished = theory.extinguished(ETA, TRIALS, ALONE)
    return (
        Phenomenon(
            name="acquisition",
            about="A cue that is followed by the US comes to predict it",
            groups={"paired": "20 A+ | A?", "alone": "20 A- | A?"},
            shown=("alone", "A"),
            control=("paired", "A"),
            expected=_both(ALONE, HEBB, group="paired", cue="A"),
        ),
        Phenomenon(
            name="extinction",
            about="Without the US the prediction fades",
            groups={"extinguished": "20 A+ | 20 A- | A?", "trained": "20 A+ | A?"},
            shown=("extinguished", "A"),
            control=("trained", "A"),
            expected=_both(extinguished, HEBB, group="extinguished", cue="A"),
        ),
    )


def _known_cue() -> tuple[Phenomenon, ...]:
    """What is known already takes the credit."""
    together = theory.acquired(ETA, TRIALS, cues=2)
    gained = theory.compound_gain(ETA, TRIALS, ALONE)
    return (
        Phenomenon(
            name="blocking",
            about="What A predicts already, B is not credited with (Kamin 1969)",
            groups={"blocking": "20 A+ | 20 AB+ | A?, B?", "control": "20 AB+ | A?, B?"},
            shown=("blocking", "B"),
            control=("control", "B"),
            expected=(
                *_both(gained, HEBB, group="blocking", cue="B"),
                *_both(ALONE + gained, 2 * HEBB, group="blocking", cue="A"),
                *_both(together, HEBB, group="control", cue="B"),
            ),
        ),
    )


def _shared_credit() -> tuple[Phenomenon, ...]:
    """Cues that are trained together share the credit."""
    together = theory.acquired(ETA, TRIALS, cues=2)
    strong, weak = theory.unequal(ETA, (1.5, 0.5), TRIALS)
    return (
        Phenomenon(
            name="overshadowing",
            about="Cues that are trained together share what one alone would get (Pavlov 1927)",
            groups={"compound": "20 AB+ | A?, B?", "alone": "20 A+ | A?"},
            shown=("compound", "A"),
            control=("alone", "A"),
            expected=(
                *_both(together, HEBB, group="compound", cue="A"),
                *_both(together, HEBB, group="compound", cue="B"),
                *_both(ALONE, HEBB, group="alone", cue="A"),
            ),
        ),
        Phenomenon(
            name="unequal-overshadowing",
            about="The more salient cue takes the larger share",
            groups={"compound": "20 AB+ | A?, B?"},
            shown=("compound", "B"),
            control=("compound", "A"),
            salience={"A": 1.5, "B": 0.5},
            expected=(
                *_both(strong, 1.5 * HEBB, group="compound", cue="A"),
                *_both(weak, 0.5 * HEBB, group="compound", cue="B"),
            ),
        ),
    )


def _absent_us() -> tuple[Phenomenon, ...]:
    """What was expected too much is unlearnt, below nil if need be."""
    excited, inhibited = theory.inhibition(ETA, 40)
    over = ALONE + theory.compound_gain(ETA, TRIALS, 2 * ALONE)
    return (
        Phenomenon(
            name="conditioned-inhibition",
            about="A cue that announces that the US stays away predicts less than nothing",
            groups={"inhibition": "40 A+ / 40 AX- | A?, X?", "apart": "40 A+ / 40 X- | A?, X?"},
            shown=("inhibition", "X"),
            control=("apart", "X"),
            reference=("inhibition", "A"),
            expected=(
                *_both(excited, 2 * HEBB, group="inhibition", cue="A"),
                *_both(inhibited, 0.0, group="inhibition", cue="X"),
            ),
        ),
        Phenomenon(
            name="overexpectation",
            about="Two cues that predict one US each lose strength when one US follows both",
            groups={
                "compound": "20 A+, 20 B+ | 20 AB+ | A?, B?",
                "rest": "20 A+, 20 B+ | A?, B?",
            },
            shown=("compound", "A"),
            control=("rest", "A"),
            expected=(
                *_both(over, 2 * HEBB, group="compound", cue="A"),
                *_both(over, 2 * HEBB, group="compound", cue="B"),
                *_both(ALONE, HEBB, group="rest", cue="A"),
            ),
        ),
    )


def _time() -> tuple[Phenomenon, ...]:
    """What happened before, and how long before, matters."""
    traced = theory.traced(ETA, 0.8, 3, TRIALS)
    return (
        Phenomenon(
            name="latent-inhibition",
            about="A cue that is known to mean nothing is learnt more slowly (Lubow 1959)",
            groups={"preexposed": "20 A- | 5 A+ | A?", "new": "5 A+ | A?"},
            shown=("preexposed", "A"),
            control=("new", "A"),
            expected=_both(
                theory.acquired(ETA, 5), theory.hebbian(ETA, 5), group="preexposed", cue="A"
            ),
        ),
        Phenomenon(
            name="trace-conditioning",
            about="The US comes 3 steps after the cue is gone",
            groups={"trace": "20 A>3+ | A?"},
            decay=0.8,
            expected=(
                *_both(0.0, 0.0, group="trace", cue="A"),
                Expected(rule="trace", group="trace", cue="A", value=traced),
            ),
        ),
    )


def _second_order() -> tuple[Phenomenon, ...]:
    """A cue of a cue, in one layer and in two."""
    return (
        Phenomenon(
            name="second-order-one-layer",
            about="A cue of a cue of the US predicts it too: not with one layer",
            groups={"second-order": "20 A+ | 20 B>A | A?, B?"},
            expected=_both(0.0, 0.0, group="second-order", cue="B"),
        ),
        Phenomenon(
            name="second-order-two-layers",
            about="A cue of a cue of the US predicts it too: with two layers",
            groups={"second-order": "20 A+ | 20 B>A | A?, B?"},
            layers=2,
            expected=(
                *_both(ALONE, HEBB, group="second-order", cue="A"),
                *_both(theory.second_order(ETA, TRIALS), HEBB**2, group="second-order", cue="B"),
            ),
        ),
    )


def _revaluation() -> tuple[Phenomenon, ...]:
    """The US becomes worth nothing, after the learning."""
    return (
        Phenomenon(
            name="revaluation-one-layer",
            about="The US loses its value: what one layer has learnt does not notice",
            groups={"revalued": "20 A+ | US=0 | A?", "kept": "20 A+ | A?"},
            shown=("revalued", "A"),
            control=("kept", "A"),
            expected=(
                *_both(ALONE, HEBB, group="revalued", cue="A"),
                Expected(rule="softmax", group="revalued", cue="A", value=0.0),
                Expected(rule="softmax", group="kept", cue="A", value=1.0),
            ),
        ),
        Phenomenon(
            name="revaluation-two-layers",
            about="The US loses its value: two layers follow",
            groups={"revalued": "20 A+ | US=0 | A?", "kept": "20 A+ | A?"},
            shown=("revalued", "A"),
            control=("kept", "A"),
            layers=2,
            expected=_both(0.0, 0.0, group="revalued", cue="A"),
        ),
    )


def _not_predicted() -> tuple[Phenomenon, ...]:
    """What animals show and no rule here does."""
    return (
        Phenomenon(
            name="spontaneous-recovery",
            about="Predicted by no rule: with time an extinguished response comes back",
            groups={"extinguished": "20 A+ | 20 A- | A?"},
        ),
        Phenomenon(
            name="renewal",
            about="Predicted by no rule without a context: outside the place of extinction the "
            "response comes back",
            groups={"extinguished": "20 A+ | 20 A- | A?"},
        ),
    )


_GROUPS = (
    _one_cue, _known_cue, _shared_credit, _absent_us, _time, _second_order, _revaluation,
    _not_predicted,
)  # fmt: skip

PHENOMENA: Mapping[str, Phenomenon] = {item.name: item for group in _GROUPS for item in group()}
"""All of them by name, in the order of the table."""

EXTRAS: tuple[Design, ...] = (
    Design(
        name="generalisation",
        title="A cue that resembles A (cosine 0.5) is answered half as strongly",
        groups={"trained": "20 A+ | A?, B?"},
        conditioner={"cues": "overlap:0.5"},
        expected=(
            *_both(
                0.5 * ALONE,
                0.5 * HEBB,
                group="trained",
                cue="B",
            ),
        ),
    ),
    Design(
        name="partial-reinforcement",
        title="The US follows half of the trials by chance",
        groups={"partial": "shuffled 100 A+, 100 A- | A?", "always": "200 A+ | A?"},
    ),
)
"""Designs beside the phenomena of the table."""

NOT_PREDICTED = ("spontaneous-recovery", "renewal")
"""Phenomena of animals that none of the rules can show."""


def conditioner_for(phenomenon: Phenomenon, rule: Rule, **options: Any) -> Conditioner:
    """The table's conditioner: eta 0.1, cues at right angles."""
    decay = {"trace": 0.95, "gated-delta": 0.97}.get(rule)
    own = {"trace": "cs"} if rule == "trace" else {}
    return Conditioner(
        rule=rule, eta=ETA, decay=decay, salience=phenomenon.salience, **(own | options)
    )


def table_rows(rules: tuple[Rule, ...] = ("delta", "hebb")) -> list[dict[str, Any]]:
    """Every expectation of these rules beside what is simulated."""
    rows: list[dict[str, Any]] = []
    for item in PHENOMENA.values():
        wanted = {one.rule for one in item.expected if one.rule in rules}
        for rule in (rule for rule in rules if rule in wanted):
            found = item.simulate(conditioner_for(item, rule))
            for one in (one for one in item.expected if one.rule == rule):
                value = found[one.group].strength(one.cue)
                rows.append(
                    {
                        "phenomenon": item.name,
                        "group": one.group,
                        "cue": one.cue,
                        "rule": rule,
                        "ours": value,
                        "theory": one.value,
                        "difference": value - one.value,
                    }
                )
    return rows


def effect_rows(rules: tuple[Rule, ...]) -> list[dict[str, Any]]:
    """The effect of every phenomenon under every rule; None where it is not defined."""
    rows = []
    for item in PHENOMENA.values():
        if item.shown is None:
            continue
        row: dict[str, Any] = {"phenomenon": item.name}
        for rule in rules:
            if item.layers == 2 and rule == "softmax":
                row[rule] = None
                continue
            row[rule] = item.effect(item.simulate(conditioner_for(item, rule)))
        rows.append(row)
    return rows
