"""Condition animals by schedules, typed such as "20 A+ | 20 AB+ | B?" or in YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_core.errors import InputError
from heed_neuro.conditioning.designs import SUFFIXES, Design, find_designs, read_design
from heed_neuro.conditioning.experiments import Experiment, conditioner_of, run_experiment
from heed_neuro.conditioning.rules import Rule
from heed_runtime.errors import UsageError
from heed_runtime.options import CommonOptions, Flag, OptionalPath
from heed_runtime.outputs import Outputs
from heed_runtime.recipe import Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App

Schedules = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SCHEDULE")]


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """What is simulated, and how animals learn."""

    schedules: Schedules
    """A schedule per group, in quotes: "20 A+ | 20 AB+ | B?". A name may stand before it, as in
    "control: 20 AB+ | B?". Or YAML files and folders of experiments."""
    rule: tuple[Rule, ...] = ("delta",)
    """How animals learn; several are shown beside each other."""
    eta: float = 0.1
    """Rate of learning, above 0 and at most 1."""
    decay: float = 0.95
    """What is left after a step, with the rules trace and gated-delta."""
    cues: str = "orthonormal"
    """Vectors of cues: orthonormal, random, or overlap:RHO with one cosine for all pairs."""
    d_k: int = 8
    """Channels of the cues."""
    salience: tuple[str, ...] = ()
    """Factors of the rate of single cues, such as A=1.5 B=0.5."""
    layers: int = 1
    """2: a second layer learns from cues that follow cues (second-order conditioning)."""
    seed: int = 0
    """Of random cues and of shuffled phases."""
    out: OptionalPath = None
    """The folder for learning curves (csv) and pictures; without it they are only summed up."""
    overwrite: Flag = False
    """Replace files that are there."""

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError('give a schedule, such as "20 A+ | 20 AB+ | B?"')
        if not self.rule or len(set(self.rule)) < len(self.rule):
            raise ValueError(f"rule must be different rules, at least one, got {self.rule}")
        if self.layers not in (1, 2):
            raise ValueError(f"layers must be 1 or 2, got {self.layers}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")


def run(app: App, options: Options) -> Result:
    """Simulate, sum up, write."""
    from heed_neuro_cli.conditioning import write_experiment

    try:
        experiments = _experiments(options)
    except InputError:
        raise
    except ValueError as error:  # an option that the rules or the cues cannot have
        raise UsageError(str(error)) from None
    files: list[Path] = []
    if options.out is not None:
        with Outputs(options.out, overwrite=options.overwrite) as outputs:
            for experiment in experiments:
                files += outputs.put(
                    experiment.design.name,
                    lambda out, one=experiment: write_experiment(  # type: ignore[misc]
                        one, one.strengths(), out / one.design.name
                    ),
                )
    return _result(experiments, files)


def _experiments(options: Options) -> list[Experiment]:
    names = ("decay", "eta", "cues", "d_k", "seed")
    own = {name: getattr(options, name) for name in names}
    conditioners = [conditioner_of(rule, **own) for rule in options.rule]
    salience = _salience(options.salience)
    return [
        run_experiment(replace(design, salience={**salience, **design.salience}), conditioners)
        for design in designs_of(options.schedules, layers=options.layers)
    ]


def designs_of(words: Sequence[str], *, layers: int = 1) -> list[Design]:
    """Experiments in files and folders, and one of the schedules that are typed.

    Raises:
        InputError: A schedule or a file cannot be read.
    """
    paths = [Path(word) for word in words if _is_path(word)]
    typed = [word for word in words if not _is_path(word)]
    designs = [replace(read_design(path), name=path.stem) for _, path in find_designs(paths)]
    if typed:
        groups: dict[str, str] = {}
        for number, word in enumerate(typed, start=1):
            name, schedule = _named(word)
            name = name or ("all" if len(typed) == 1 else f"group {number}")
            if name in groups:
                raise InputError(f"two groups have the name {name!r}", remedy="rename one")
            groups[name] = schedule
        typed_design = Design(name="simulation", title="", groups=groups, layers=layers)
        _ = typed_design.schedules  # a fault in a schedule comes before one in a setting
        designs.append(typed_design)
    return designs


def _is_path(word: str) -> bool:
    return word.endswith(SUFFIXES) or (bool(word.strip()) and Path(word).is_dir())


def _named(word: str) -> tuple[str | None, str]:
    """A group's name before the schedule: letters that begin small, then a colon and a space."""
    name, colon, rest = word.partition(": ")
    if colon and name.strip() and name.strip()[0].islower() and "|" not in name:
        words = ("fixed", "alternating", "shuffled")
        if name.strip() not in words:
            return name.strip(), rest
    return None, word


def _salience(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        cue, equals, number = word.partition("=")
        try:
            found[cue.strip("() ")] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--salience: expected CUE=FACTOR such as A=1.5, got {word!r}")
    return found


def _result(experiments: Sequence[Experiment], files: Sequence[Path]) -> Result:
    tables, data = [], []
    for experiment in experiments:
        title = experiment.design.title or experiment.design.name
        several = f"{title}: " if len(experiments) > 1 else ""
        tables.append(Table(title=f"{several}strength after each phase", rows=experiment.phases()))
        if tests := experiment.tests():
            tables.append(Table(title=f"{several}responses in tests", rows=tests))
        data.append(
            {
                "name": experiment.design.name,
                "groups": dict(experiment.design.groups),
                "strengths": experiment.strengths(),
                "curves": experiment.curves.to_dict("records"),
            }
        )
    names = ", ".join(one.design.title or one.design.name for one in experiments)
    return Result(
        title=names if len(experiments) < 4 else f"{len(experiments)} experiments",
        tables=tables,
        data={"n": len(experiments), "experiments": data},
        files=files,
    )
