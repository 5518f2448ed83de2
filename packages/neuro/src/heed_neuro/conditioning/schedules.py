"""Schedules of conditioning, written as psychologists write them: `20 A+ | 20 AB+ | B?`.

    schedule   phases, one after the other, between `|`
    phase      trials between `,` (one kind after the other) or `/` (alternating); the words
               `alternating` and `shuffled` before them also say the order
    trial      how often, the cues, and what follows: `20 A+`, `AB-`, `40 (tone)(light):0.5`
    cue        a capital letter, or a name in brackets
    outcome    `+` the US, `-` no US, `:0.5` a weaker US, `?` a test, in which nothing is learnt
    named US   `A+food`, `A:0.5shock`; without a name it is the US called `US`
    delay      `A>3+`: the US comes 3 steps after the cue
    sequence   `B>A`: cue B is followed by cue A, with no US (second-order conditioning)
    new value  `US=0`, `food=-1`: from here on the US is worth this (revaluation)

Trials are counted from 1 within their phase.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args

from heed_core.errors import InputError

Order = Literal["fixed", "alternating", "shuffled"]
"""How the kinds of trials of a phase follow each other."""

DEFAULT_US = "US"
"""The name of the US where a trial names none."""

MOST_TRIALS = 1_000_000
"""Trials of a schedule."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_US_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_CUE = re.compile(r"[A-Z]|\(([^()|,/]*)\)")
_AMOUNT = re.compile(_NUMBER)
_NEW_VALUE = re.compile(rf"([A-Za-z][A-Za-z0-9_]*)\s*=\s*({_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What happens in one trial."""

    cues: tuple[str, ...]
    """Presented together; their vectors are added."""
    amount: float | None = None
    """Strength of the US: 1 for `+`, 0 for `-`. None: a test, in which nothing is learnt."""
    us: str = DEFAULT_US
    delay: int = 0
    """Steps from the cues to the US."""
    then: tuple[str, ...] = ()
    """Cues that follow, instead of a US."""

    @property
    def is_test(self) -> bool:
        """Whether nothing is learnt."""
        return self.amount is None

    def __str__(self) -> str:
        shown = "".join(map(_shown, self.cues))
        if self.then:
            return f"{shown}>{''.join(map(_shown, self.then))}"
        if self.amount is None:
            return f"{shown}?"
        delay = f">{self.delay}" if self.delay else ""
        name = "" if self.us == DEFAULT_US else self.us
        outcome = {0.0: "-", 1.0: f"+{name}"}.get(self.amount, f":{self.amount:g}{name}")
        return f"{shown}{delay}{outcome}"


@dataclass(frozen=True, kw_only=True)
class NewValue:
    """From here on a US is worth something else."""

    us: str
    value: float

    def __str__(self) -> str:
        return f"{self.us}={self.value:g}"


Event = Trial | NewValue


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Kinds of trials, how often each, and in which order."""

    events: tuple[tuple[int, Event], ...]
    order: Order = "fixed"

    def __str__(self) -> str:
        between = " / " if self.order == "alternating" else ", "
        parts = [f"{n} {event}" if n > 1 else str(event) for n, event in self.events]
        return ("shuffled " if self.order == "shuffled" else "") + between.join(parts)

    def __len__(self) -> int:
        return sum(count for count, _ in self.events)

    def ordered(self, rng: random.Random) -> Iterator[Event]:
        """The events one by one; only a shuffled phase draws from `rng`."""
        if self.order == "alternating":
            most = max(count for count, _ in self.events)
            for turn in range(most):
                yield from (event for count, event in self.events if turn < count)
            return
        listed = [event for count, event in self.events for _ in range(count)]
        if self.order == "shuffled":
            rng.shuffle(listed)
        yield from listed


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An event with its place in the schedule."""

    phase: int
    """From 1."""
    trial: int
    """Within the phase, from 1."""
    event: Event

    @property
    def place(self) -> str:
        """For an error message."""
        return f"phase {self.phase}, trial {self.trial} ({self.event})"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Phases, one after the other.

    Example:
        >>> schedule = parse_schedule("20 A+ | 20 AB+ | B?")
        >>> schedule.cues, len(schedule)
        (('A', 'B'), 41)
    """

    phases: tuple[Phase, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.phases))

    def __len__(self) -> int:
        return sum(map(len, self.phases))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The kinds of trials, in order of appearance."""
        events = [event for phase in self.phases for _, event in phase.events]
        return tuple(event for event in events if isinstance(event, Trial))

    @property
    def cues(self) -> tuple[str, ...]:
        """All cues, sorted: letters first, then names."""
        found = {cue for trial in self.trials for cue in (*trial.cues, *trial.then)}
        return tuple(sorted(found, key=lambda cue: (len(cue) > 1, cue)))

    @property
    def us_names(self) -> tuple[str, ...]:
        """Every US that occurs or is given a new value, in order of appearance."""
        events = [event for phase in self.phases for _, event in phase.events]
        names = [
            event.us
            for event in events
            if isinstance(event, NewValue) or (event.amount and not event.then)
        ]
        return tuple(dict.fromkeys(names))

    def placed(self, *, seed: int = 0) -> Iterator[Placed]:
        """Every event in the order in which it happens."""
        rng = random.Random(seed)
        for number, phase in enumerate(self.phases, start=1):
            for index, event in enumerate(phase.ordered(rng), start=1):
                yield Placed(phase=number, trial=index, event=event)


def parse_schedule(text: str, *, path: Path | None = None, group: str | None = None) -> Schedule:
    """Read a schedule.

    Args:
        text: See the module.
        path: The file that it stands in, for error messages.
        group: The group of animals that it is for, for error messages.

    Raises:
        InputError: It cannot be read; names the phase and the position in the text, from 1.

    Example:
        >>> str(parse_schedule("40 A+ / 40 AX- | X?"))
        '40 A+ / 40 AX- | X?'
    """
    phases, start = [], 0
    for number, part in enumerate(text.split("|"), start=1):
        phases.append(_Reader(text, start, start + len(part), number, path, group).phase())
        start += len(part) + 1
    schedule = Schedule(phases=tuple(phases))
    if len(schedule) > MOST_TRIALS:
        raise InputError(
            f"the schedule has {len(schedule)} trials, more than {MOST_TRIALS}",
            path=path,
            place=group,
            remedy="ask for fewer",
        )
    return schedule


def parse_phases(
    phases: Sequence[str], *, path: Path | None = None, group: str | None = None
) -> Schedule:
    """Read a schedule that is given phase by phase."""
    for number, phase in enumerate(phases, start=1):
        if "|" in phase:
            raise InputError(
                "a phase of a list holds a '|'",
                path=path,
                place=", ".join(filter(None, (group, f"phase {number}"))),
                remedy="make it two phases",
            )
    return parse_schedule("|".join(phases), path=path, group=group)


def check_cues(
    schedule: Schedule, known: Sequence[str], *, path: Path | None = None, group: str | None = None
) -> None:
    """Refuse a cue that is not among the known ones.

    Raises:
        InputError: Names it.
    """
    for cue in schedule.cues:
        if cue not in known:
            raise InputError(
                f"unknown cue {cue!r}",
                path=path,
                place=group,
                remedy=f"use one of {', '.join(known)}, or name it under cues",
            )


def check_us(schedule: Schedule, values: Mapping[str, object]) -> None:
    """Refuse a US that has no value.

    Raises:
        InputError: Names it.
    """
    for name in schedule.us_names:
        if name not in values:
            raise InputError(
                f"unknown US {name!r}",
                remedy=f"use one of {', '.join(values)}, or name it under us",
            )


class _Reader:
    """Reads one phase of the text, from `position` to `stop`."""

    def __init__(
        self,
        text: str,
        start: int,
        stop: int,
        number: int,
        path: Path | None,
        group: str | None,
    ) -> None:
        self.text, self.position, self.stop = text, start, stop
        self.number, self.path, self.group = number, path, group

    def phase(self) -> Phase:
        self._blank()
        if self._over:
            self._refuse("the phase is empty", "write trials such as 20 A+, or remove the '|'")
        named = self._order()
        events, separators = [self._counted()], set()
        while not self._over:
            sign = self.text[self.position]
            if sign not in ",/":
                self._refuse(f"unexpected {sign!r} after a trial", "separate trials by ',' or '/'")
            separators.add(sign)
            self.position += 1
            events.append(self._counted())
        if len(separators) > 1:
            self._refuse("the phase mixes ',' and '/'", "use one of them in a phase")
        order: Order = named or ("alternating" if "/" in separators else "fixed")
        return Phase(events=tuple(events), order=order)

    @property
    def _over(self) -> bool:
        return self.position >= self.stop

    def _refuse(self, problem: str, remedy: str) -> NoReturn:
        place = f"phase {self.number}, position {min(self.position, self.stop) + 1}"
        raise InputError(
            f"{problem} in {self.text.strip()!r}",
            path=self.path,
            place=f"{self.group}, {place}" if self.group else place,
            remedy=remedy,
        )

    def _blank(self) -> None:
        while not self._over and self.text[self.position].isspace():
            self.position += 1

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.position, self.stop)
        if found:
            self.position = found.end()
        return found

    def _order(self) -> Order | None:
        for order in get_args(Order):
            if self.text.startswith(order, self.position, self.stop):
                self.position += len(order)
                self._blank()
                if not self._over and self.text[self.position] == ":":
                    self.position += 1
                return order  # type: ignore[no-any-return]
        return None

    def _counted(self) -> tuple[int, Event]:
        self._blank()
        start = self.position
        number = self._match(re.compile(r"(\d+)\s*[x*]?\s*"))
        count = int(number[1]) if number else 1
        if count < 1:
            self.position = start
            self._refuse("a trial is repeated 0 times", "write how often, at least 1")
        if count > MOST_TRIALS:
            self.position = start
            self._refuse(f"a trial is repeated {count} times", f"ask for at most {MOST_TRIALS}")
        new = self._match(_NEW_VALUE)
        event: Event = NewValue(us=new[1], value=float(new[2])) if new else self._trial()
        self._blank()
        return count, event

    def _cues(self) -> tuple[str, ...]:
        cues: list[str] = []
        while True:
            start = self.position
            found = self._match(_CUE)
            if found is None:
                return tuple(cues)
            cue = found[0] if found[1] is None else found[1].strip()
            self.position = start
            if not cue:
                self._refuse("a cue in brackets has no name", "write a name, such as (tone)")
            if cue in cues:
                self._refuse(f"the cue {cue!r} is presented twice in one trial", "name it once")
            cues.append(cue)
            self.position = found.end()

    def _trial(self) -> Trial:
        cues = self._cues()
        if not cues:
            what = "nothing" if self._over else repr(self.text[self.position])
            self._refuse(
                f"expected a cue, found {what}", "cues are capital letters or names as (tone)"
            )
        delay = 0
        then: tuple[str, ...] = ()
        if self._sign(">"):
            self._blank()
            if steps := self._match(re.compile(r"\d+")):
                delay = int(steps[0])
            elif not (then := self._cues()):
                self._refuse(
                    "expected what follows after '>'",
                    "write a delay and an outcome as A>3+, or a cue as B>A",
                )
        self._blank()
        if then:
            self._sign("-")
            return Trial(cues=cues, amount=0.0, then=then)
        return self._outcome(cues, delay)

    def _outcome(self, cues: tuple[str, ...], delay: int) -> Trial:
        if self._sign("?"):
            if delay:
                self._refuse("a test has no delay", "write it as A?")
            return Trial(cues=cues)
        if self._sign("-"):
            return Trial(cues=cues, amount=0.0, delay=delay)
        if self._sign("+"):
            amount = 1.0
        elif self._sign(":"):
            self._blank()
            found = self._match(_AMOUNT)
            if found is None:
                self._refuse("expected a number after ':'", "write the US as A:0.5")
            amount = float(found[0])
        else:
            what = "nothing" if self._over else repr(self.text[self.position])
            self._refuse(
                f"expected an outcome after {''.join(map(_shown, cues))!r}, found {what}",
                "write + (US), - (no US), :0.5 (a weaker US) or ? (a test)",
            )
        name = self._match(_US_NAME)
        return Trial(cues=cues, amount=amount, us=name[0] if name else DEFAULT_US, delay=delay)

    def _sign(self, sign: str) -> bool:
        if self.text.startswith(sign, self.position, self.stop):
            self.position += 1
            return True
        return False


def _shown(cue: str) -> str:
    return cue if re.fullmatch("[A-Z]", cue) else f"({cue})"
