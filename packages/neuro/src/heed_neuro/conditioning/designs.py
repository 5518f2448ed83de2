"""Designs of experiments as YAML files: groups of animals, each with a schedule.

    title: Blocking
    groups:
      blocking: 20 A+ | 20 AB+ | B?
      control: [20 AB+, B?]            # or phase by phase

Beside `groups` (or `schedule`, for one group) a file may have

    cues: [A, B, X]                    all cues there are
    salience: {A: 1.5}                 factors of the rate of learning
    us: {food: [1], shock: [-1]}       values of USs by name
    layers: 2                          see `two_layer`
    conditioner: {rule: trace, eta: 0.1, decay: 0.8}   how the animals learn, in any run; without
                                       a rule, an option is for the rules that have it
    expected: [{rule: delta, group: blocking, cue: B, value: 0.06}]   strengths at the end

An `expected` without a rule is compared with every rule. Readers run no code of a file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from heed_core.errors import InputError
from heed_neuro.conditioning.conditioner import OWNERS, Conditioner, Simulation, has_option
from heed_neuro.conditioning.rules import RULES, Rule
from heed_neuro.conditioning.schedules import (
    Schedule,
    check_cues,
    parse_phases,
    parse_schedule,
)
from heed_neuro.conditioning.two_layer import run_two_layers

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the strength of a cue should be at the end."""

    group: str
    cue: str
    value: float
    rule: Rule | None = None
    """None: whatever the rule."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """An experiment.

    Example:
        >>> design = Design(name="blocking", groups={"blocking": "20 A+ | 20 AB+ | B?"})
        >>> round(design.run(Conditioner())["blocking"].strength("B"), 4)
        0.0601
    """

    name: str
    title: str = ""
    groups: Mapping[str, str]
    """Group -> schedule."""
    cues: tuple[str, ...] = ()
    """All cues there are; those of the schedules if none are given."""
    salience: Mapping[str, float] = field(default_factory=dict)
    us: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    layers: int = 1
    conditioner: Mapping[str, Any] = field(default_factory=dict)
    """Options of `Conditioner` that hold in any run."""
    expected: tuple[Expected, ...] = ()
    path: Path | None = None
    """The file, for error messages."""

    def __post_init__(self) -> None:
        if not self.groups:
            raise InputError("has no groups", path=self.path, remedy="write groups or schedule")
        if self.layers not in (1, 2):
            raise InputError(f"layers must be 1 or 2, got {self.layers}", path=self.path)
        if self.cues:
            for group, schedule in self.schedules.items():
                check_cues(schedule, self.cues, path=self.path, group=f"group {group!r}")
        for one in self.expected:
            self._check_expected(one)

    def _check_expected(self, one: Expected) -> None:
        if one.group not in self.groups:
            raise InputError(
                f"unknown group {one.group!r}",
                path=self.path,
                place="expected",
                remedy=f"use one of {', '.join(self.groups)}",
            )
        if one.cue not in self.all_cues:
            raise InputError(
                f"unknown cue {one.cue!r}",
                path=self.path,
                place="expected",
                remedy=f"use one of {', '.join(self.all_cues)}",
            )

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the groups, read."""
        return {
            group: parse_schedule(text, path=self.path, group=f"group {group!r}")
            for group, text in self.groups.items()
        }

    @property
    def all_cues(self) -> tuple[str, ...]:
        """Cues of all groups, so that a cue has the same vector in each."""
        if self.cues:
            return self.cues
        found = {cue for schedule in self.schedules.values() for cue in schedule.cues}
        return tuple(sorted(found, key=lambda cue: (len(cue) > 1, cue)))

    def adapt(self, conditioner: Conditioner) -> Conditioner:
        """The conditioner with what the design says of it.

        Raises:
            InputError: The design has an option that the rule has not.
        """
        options = dict(self.conditioner)
        rule = options.get("rule", conditioner.rule)
        if rule != conditioner.rule:
            options = dict.fromkeys(("decay", *OWNERS)) | options
        elif "rule" not in options:
            options = {name: item for name, item in options.items() if has_option(rule, name)}
        try:
            salience = {**conditioner.salience, **self.salience}
            return replace(conditioner, **{**options, "salience": salience})
        except (TypeError, ValueError) as error:
            raise InputError(str(error), path=self.path, place="conditioner") from None

    def run(self, conditioner: Conditioner) -> dict[str, Simulation]:
        """Condition each group.

        Raises:
            InputError: See `Conditioner.run`; names the file and the group.
        """
        adapted = self.adapt(conditioner)
        found = {}
        for group, schedule in self.schedules.items():
            try:
                if self.layers == 2:
                    found[group] = run_two_layers(adapted, schedule, us=self.us, cues=self.all_cues)
                else:
                    found[group] = adapted.run(schedule, us=self.us, cues=self.all_cues)
            except InputError as error:
                raise InputError(
                    error.problem,
                    path=self.path,
                    place=", ".join(filter(None, (f"group {group!r}", error.place))),
                    remedy=error.remedy,
                ) from None
        return found


def read_design(path: Path) -> Design:
    """Read a design from a YAML file.

    Raises:
        InputError: The file cannot be read or holds something else; names the key or the position.
    """
    data = _mapping(_load(path), path, "the file")
    known = ("title", "groups", "schedule", "cues", "salience", "us", "layers", "conditioner",
             "expected")  # fmt: skip
    _refuse_unknown(data, known, path, "")
    if ("groups" in data) == ("schedule" in data):
        raise InputError(
            "must have groups, or schedule for one group", path=path, remedy="write one of them"
        )
    groups = _groups(data, path)
    try:
        return Design(
            name=path.stem,
            title=_text(data.get("title", path.stem), path, "title"),
            groups=groups,
            cues=tuple(
                _text(cue, path, "cues") for cue in _list(data.get("cues", []), path, "cues")
            ),
            salience=_numbers(data.get("salience", {}), path, "salience"),
            us=_us(data.get("us", {}), path),
            layers=_whole(data.get("layers", 1), path, "layers"),
            conditioner=_options(data.get("conditioner", {}), path),
            expected=_expected(data.get("expected", []), path),
            path=path,
        )
    except RecursionError:
        raise InputError("refers to itself", path=path, remedy="correct the file") from None


def write_design(design: Design, path: Path) -> Path:
    """Write a design as a YAML file that `read_design` reads back."""
    data: dict[str, Any] = {"title": design.title or design.name, "groups": dict(design.groups)}
    if design.cues:
        data["cues"] = list(design.cues)
    for name in ("salience", "conditioner"):
        if getattr(design, name):
            data[name] = dict(getattr(design, name))
    if design.us:
        data["us"] = {name: list(value) for name, value in design.us.items()}
    if design.layers != 1:
        data["layers"] = design.layers
    if design.expected:
        data["expected"] = [
            {
                **({"rule": one.rule} if one.rule else {}),
                "group": one.group,
                "cue": one.cue,
                "value": one.value,
            }
            for one in design.expected
        ]
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=100), encoding="utf-8")
    return path


def find_designs(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name and file of each design in files and folders.

    Raises:
        InputError: A path does not exist, is no YAML file, or a folder holds none.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not files:
                raise InputError("holds no YAML file of a design", path=path)
            found += [(str(file.relative_to(path).with_suffix("")), file) for file in files]
        elif path.suffix not in SUFFIXES:
            raise InputError(
                "is no YAML file", path=path, remedy="give files that end in .yaml, or a folder"
            )
        else:
            found.append((path.stem, path))
    return found


class _Loader(yaml.SafeLoader):
    """Safe, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _load(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="check the path") from None
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"is not valid YAML: {getattr(error, 'problem', None) or 'not a text file'}",
            path=path,
            place=f"line {mark.line + 1}" if mark else None,
            remedy="correct the file",
        ) from None


def _refuse_unknown(
    data: Mapping[str, object], known: Sequence[str], path: Path, where: str
) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                "unknown key",
                path=path,
                place=f"{where}{key}",
                remedy=f"did you mean {near[0]}?" if near else f"use {', '.join(known)}",
            )


def _mapping(value: object, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise InputError(
            f"{what} must hold keys with values, found {kind}", path=path, remedy="correct it"
        )
    return {str(key): item for key, item in value.items()}


def _list(value: object, path: Path, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"must be a list, got {value!r}", path=path, place=what)
    return value


def _text(value: object, path: Path, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"must be a text, got {value!r}", path=path, place=what)
    return value


def _number(value: object, path: Path, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"must be a number, got {value!r}", path=path, place=what)
    return float(value)


def _whole(value: object, path: Path, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"must be a whole number, got {value!r}", path=path, place=what)
    return value


def _numbers(value: object, path: Path, what: str) -> dict[str, float]:
    items = _mapping(value, path, what).items()
    return {name: _number(item, path, f"{what}.{name}") for name, item in items}


def _us(value: object, path: Path) -> dict[str, tuple[float, ...]]:
    found = {}
    for name, item in _mapping(value, path, "us").items():
        numbers = item if isinstance(item, list) else [item]
        found[name] = tuple(_number(number, path, f"us.{name}") for number in numbers)
    return found


def _groups(data: Mapping[str, Any], path: Path) -> dict[str, str]:
    given = {"all": data["schedule"]} if "schedule" in data else data["groups"]
    groups = {}
    for name, value in _mapping(given, path, "groups").items():
        where = f"group {name!r}"
        if isinstance(value, list):
            phases = [_text(phase, path, where) for phase in value]
            parse_phases(phases, path=path, group=where)
            groups[name] = " | ".join(phases)
        else:
            groups[name] = _text(value, path, where)
            parse_schedule(groups[name], path=path, group=where)
    return groups


def _options(value: object, path: Path) -> dict[str, Any]:
    options = _mapping(value, path, "conditioner")
    known = [item.name for item in fields(Conditioner) if item.name != "salience"]
    _refuse_unknown(options, known, path, "conditioner.")
    for name, item in options.items():
        where = f"conditioner.{name}"
        if name == "rule" and item not in RULES:
            near = difflib.get_close_matches(str(item), RULES, n=1)
            raise InputError(
                f"unknown rule {item!r}",
                path=path,
                place=where,
                remedy=f"did you mean {near[0]}?" if near else f"use one of {', '.join(RULES)}",
            )
        if name in ("eta", "decay", "mixing", "beta"):
            _number(item, path, where)
        elif name in ("d_k", "d_v", "seed"):
            _whole(item, path, where)
        elif name == "reset_trace" and not isinstance(item, bool):
            raise InputError(f"must be true or false, got {item!r}", path=path, place=where)
        elif name in ("cues", "trace"):
            _text(item, path, where)
    return options


def _expected(value: object, path: Path) -> tuple[Expected, ...]:
    found = []
    for index, item in enumerate(_list(value, path, "expected"), start=1):
        where = f"expected, entry {index}"
        entry = _mapping(item, path, where)
        _refuse_unknown(entry, ("rule", "group", "cue", "value"), path, f"{where}, ")
        for name in ("group", "cue", "value"):
            if name not in entry:
                raise InputError(f"has no {name!r}", path=path, place=where, remedy="add it")
        rule = entry.get("rule")
        if rule is not None and rule not in get_args(Rule):
            raise InputError(
                f"unknown rule {rule!r}",
                path=path,
                place=where,
                remedy=f"use one of {', '.join(RULES)}",
            )
        found.append(
            Expected(
                rule=rule,
                group=_text(entry["group"], path, where),
                cue=_text(entry["cue"], path, where),
                value=_number(entry["value"], path, where),
            )
        )
    return tuple(found)
