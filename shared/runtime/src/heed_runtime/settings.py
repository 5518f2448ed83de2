"""Settings: frozen dataclasses are the one source of files, flags and help.

Precedence: default < preset < file < flags. A file and a flag pass the same strict validation; no
file names code.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from heed_core.errors import InputError
from heed_runtime.errors import UsageError, nearest

if TYPE_CHECKING:
    from heed_runtime.recipe import Recipe

PLAIN_NAMES = ("precision", "device", "seed", "workers")
"""The engine's settings whose flag has no prefix: `--seed`, not `--trainer.seed`."""

GROUPS = ("model", "data", "training", "trainer")
Scalar = bool | int | float | str | None
SettingsT = TypeVar("SettingsT")


def _parse_extra(words: list[str]) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    for word in words:
        key, equals, text = word.partition("=")
        value = yaml.load(text, Loader=_Loader)
        if not key or not equals or not isinstance(value, Scalar):
            raise ValueError(f"expected NAME=VALUE, got {word!r}")
        values[key] = value
    return values


Extra = Annotated[
    Mapping[str, Scalar],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=_parse_extra,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [
            f"{key}={json.dumps(item)}" for key, item in value.items()
        ],
    ),
]
"""A mapping that is written `NAME=VALUE ...` on the command line."""

_plain_name = tyro.conf.arg(prefix_name=False)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The engine's settings, the same for every system."""

    max_epochs: int = 100
    """Passes over the training data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, even within an epoch. None: no limit."""
    batch: int = 8
    """Samples per step over all processes together."""
    accumulate: int = 1
    """Batches whose gradients are summed before one optimiser step."""
    clip: float | None = None
    """Largest norm of the gradient. None: not clipped."""
    average: float | None = None
    """Validate and keep a running average of the weights, with this decay per step (0.99 to
    0.9999). None: the weights themselves."""
    precision: Annotated[Literal["32-true", "bf16-mixed", "16-mixed"], _plain_name] = "32-true"
    """Arithmetic of the forward and backward passes."""
    device: Annotated[Literal["auto", "cpu", "cuda"], _plain_name] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    devices: int = 1
    """Processes (GPUs) per host; 0 takes all GPUs."""
    nodes: int = 1
    """Hosts."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work; auto is ddp."""
    seed: Annotated[int, _plain_name] = 0
    """Seed of initialisation, order, augmentation and dropout."""
    workers: Annotated[int, _plain_name] = 0
    """Processes that load data, per training process."""
    patience: int | None = None
    """Stop after this many validations without improvement. None: never."""
    validate_every: int = 1
    """Epochs between two validations."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints for resuming. None: at each end of an epoch only."""
    logger: Literal["none", "tensorboard"] = "none"
    """A further log beside metrics.csv; tensorboard needs the library tensorboard."""
    extra: Extra = field(default_factory=dict)
    """Anything else that Lightning's Trainer takes, by its own names."""

    def __post_init__(self) -> None:
        at_least_one = (
            "max_epochs", "max_steps", "batch", "accumulate", "nodes", "patience",
            "validate_every", "checkpoint_every",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("devices", "seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"average must be between 0 and 1, got {self.average}")
        for name in self.extra:
            if name in ENGINE_OWNED:
                raise ValueError(f"extra must not set {name!r}: {ENGINE_OWNED[name]}")


ENGINE_OWNED: Mapping[str, str] = {
    "accelerator": "use device",
    "accumulate_grad_batches": "use accumulate",
    "callbacks": "the program sets them",
    "check_val_every_n_epoch": "use validate_every",
    "default_root_dir": "use --out",
    "devices": "use devices",
    "enable_checkpointing": "the program writes the checkpoints",
    "enable_progress_bar": "use --quiet",
    "gradient_clip_val": "use clip",
    "logger": "use logger",
    "max_epochs": "use max_epochs",
    "max_steps": "use max_steps",
    "num_nodes": "use nodes",
    "precision": "use precision",
    "strategy": "use strategy",
    "val_check_interval": "weights are chosen at the end of an epoch; use validate_every",
    "use_distributed_sampler": "the program shards the data",
}
"""Arguments of Lightning's Trainer that have a setting of their own, and which one."""


def default_settings(recipe: Recipe[Any, Any, Any], preset: str | None = None) -> Any:
    """The settings of a preset; the recipe's first preset if none is named.

    Raises:
        UsageError: The recipe has no such preset.
    """
    name = preset if preset is not None else next(iter(recipe.presets))
    if name not in recipe.presets:
        raise UsageError(
            f"{recipe.card.name} has no preset {name!r}", remedy=nearest(name, recipe.presets)
        )
    return recipe.presets[name]()


def load_settings(
    recipe: Recipe[Any, Any, Any], *, preset: str | None = None, file: Path | None = None
) -> Any:
    """The settings of a system: the preset's values, and over them what a file says.

    Args:
        recipe: The system.
        preset: A name in `recipe.presets`; None is the first.
        file: A YAML file with any of the groups `model`, `data`, `training`, `trainer`, and
            optionally the name of the `system`.

    Raises:
        InputError: The file cannot be read, is of another system, or holds an unknown key or a
            wrong value.
    """
    settings = default_settings(recipe, preset)
    if file is None:
        return settings
    values = read_yaml(file)
    system = values.pop("system", recipe.card.name)
    if system != recipe.card.name:
        raise InputError(
            f"is a configuration of {system!r}, not of {recipe.card.name!r}",
            path=file,
            remedy="give the system's own file",
        )
    return merge(settings, values, path=file)


def merge(settings: SettingsT, values: Mapping[str, Any], *, path: Path | None = None) -> SettingsT:
    """Replace the settings that `values` names, a nested mapping, and validate the whole.

    Args:
        settings: The dataclass that gives the values not named.
        values: What to replace; an unknown key is an error.
        path: The file at fault in error messages.
    """
    _refuse_unknown(type(settings), values, path=path)
    return from_dict(type(settings), _merged(settings, values), path=path)


def to_dict(settings: object) -> dict[str, Any]:
    """The settings as plain data for YAML and JSON; `from_dict` gives equal settings back."""
    data = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    assert isinstance(data, dict)
    return data


def from_dict(
    cls: type[SettingsT], data: Mapping[str, Any], *, path: Path | None = None
) -> SettingsT:
    """Build settings from plain data, strictly.

    Raises:
        InputError: An unknown key, a missing one, or a value of the wrong type or range; names the
            key's path.
    """
    _refuse_unknown(cls, data, path=path)
    try:
        # The JSON mode is strict, yet knows that tuples and paths are written as lists and texts.
        return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise _input_error(error, path=path) from None


def to_yaml(settings: object, *, system: str) -> str:
    """The text of a `config.yaml`: the system and every setting; `load_settings` reads it back."""
    data = {"system": system, **to_dict(settings)}
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping. No tag makes it run code.

    Raises:
        InputError: The file is missing, not YAML, not a mapping, or names a key twice.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="check the path") from None
    except IsADirectoryError:
        raise InputError("is a folder, a YAML file is needed", path=path) from None
    except RecursionError:
        raise InputError("is nested too deeply", path=path, remedy="correct the file") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        textual = isinstance(error, yaml.YAMLError | UnicodeDecodeError)
        other = "not a text file" if textual else "a value is not what its tag says"
        raise InputError(
            f"is not valid YAML: {getattr(error, 'problem', None) or other}",
            path=path,
            place=f"line {mark.line + 1}" if mark else None,
            remedy="correct the file",
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"holds a {type(data).__name__}, expected keys such as 'model:' and 'trainer:'",
            path=path,
            remedy="see the config.yaml of a run",
        )
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2: 1e-3 is a number, `no` and 2020-01-01 are texts; a key stands once.

    It gives what JSON knows and nothing else: no bytes, sets or dates.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the parts of an object before it, which refuses one that holds itself."""
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that appears twice."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


def _read_plain_words_as_yaml_1_2() -> None:
    number = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    words = r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    rules = {
        "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        "int": (r"[-+]?[0-9]+", list("-+0123456789")),
        "float": (f"{number}|{words}", list("-+.0123456789")),
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    }
    kinds = ("null", "bool", "int", "float", "str", "seq", "map")
    tags = [None, *(f"tag:yaml.org,2002:{name}" for name in kinds)]
    _Loader.yaml_constructors = {tag: _Loader.yaml_constructors[tag] for tag in tags}
    _Loader.yaml_implicit_resolvers = {}
    for name, (pattern, first) in rules.items():
        for kind in (_Loader, _Dumper):
            kind.add_implicit_resolver(
                f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), first
            )


_read_plain_words_as_yaml_1_2()


def _merged(settings: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    data = to_dict(settings)
    for key, value in values.items():
        old = getattr(settings, key)
        nested = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
        data[key] = _merged(old, value) if nested else value
    return data


def _refuse_unknown(cls: type, data: object, *, path: Path | None, prefix: str = "") -> None:
    if not isinstance(data, Mapping):
        return
    hints = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls) if item.init]
    for key, value in data.items():
        if key not in names:
            raise InputError(
                "unknown key", path=path, place=f"{prefix}{key}", remedy=nearest(str(key), names)
            )
        kinds = list(dataclasses_in(hints[key]))
        if len(kinds) != 1:
            continue
        items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, item in items:
            place = f"{prefix}{key}." if index is None else f"{prefix}{key}.{index}."
            _refuse_unknown(kinds[0], item, path=path, prefix=place)


def dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses in a type such as `Optional[Window]` or `tuple[Stage, ...]`."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    elif typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from dataclasses_in(part)


def _input_error(error: ValidationError, *, path: Path | None) -> InputError:
    faults = error.errors(include_url=False)
    fault = faults[0]
    more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
    place = ".".join(str(part) for part in fault["loc"]) or None
    if fault["type"] == "value_error":
        reason = fault.get("ctx", {}).get("error", fault["msg"])
        return InputError(f"{reason}{more}", path=path, place=place)
    if fault["type"] == "missing":
        return InputError(f"is missing{more}", path=path, place=place, remedy="add the key")
    rule = fault["msg"][0].lower() + fault["msg"][1:]
    return InputError(f"got {_shown(fault['input'])}, {rule}{more}", path=path, place=place)


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def changed(old: object, new: object, *, prefix: str = "") -> Sequence[str]:
    """The dotted names of the settings in which `new` differs from `old`.

    Example:
        >>> changed(TrainerSettings(), TrainerSettings(seed=1))
        ['seed']
    """
    names: list[str] = []
    for item in dataclasses.fields(old):  # type: ignore[arg-type]
        before, after = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(before) and type(before) is type(after):
            names += changed(before, after, prefix=f"{prefix}{item.name}.")
        elif before != after:
            names.append(f"{prefix}{item.name}")
    return names
