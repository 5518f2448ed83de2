"""From a command line to a verb's options and a system's settings; a mistake is one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from heed_core.errors import InputError
from heed_runtime.errors import UsageError
from heed_runtime.options import CommonOptions, RunOptions, SystemOptions
from heed_runtime.settings import (
    PLAIN_NAMES,
    changed,
    dataclasses_in,
    default_settings,
    from_dict,
    to_dict,
)

if TYPE_CHECKING:
    from heed_runtime.app import App

OptionsT = TypeVar("OptionsT", bound=CommonOptions)
_CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff)
_RULE = re.compile("^[\u2500-]+$")


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A command line that was understood."""

    options: CommonOptions
    settings: Any | None
    """All four groups, for a verb that takes SYSTEM, or RUN and flags of its settings."""


def parse(
    app: App, verb: str, options: type[CommonOptions], about: str, words: Sequence[str]
) -> Parsed:
    """Understand the words after the verb.

    Args:
        app: The program, which knows the systems.
        verb: The verb's name.
        options: The verb's dataclass of flags. A sub-class of `SystemOptions` brings the system's
            settings along, one of `RunOptions` with `groups` those of the run.
        about: What the verb does, for its help.
        words: The command line after the verb.

    Raises:
        UsageError: A flag or a value that cannot be used; one line.
        SystemExit: With code 0, after `--help`.
    """
    prog, about = f"{app.name} {verb}", about.strip()
    if issubclass(options, RunOptions) and options.groups:
        return _parse_with_run(app, options, words, prog=prog, about=about)
    if not issubclass(options, SystemOptions):
        return Parsed(options=_cli(options, words, prog=prog, about=about), settings=None)
    words = _system_first(app, words)
    if not words or words[0].startswith("-"):
        if _wants_help(words):
            hint = f"{about}\n\n`{prog} SYSTEM --help` also shows the settings of a system."
            _cli(options, ["--help"], prog=prog, about=hint)
        raise UsageError(f"{verb} needs a SYSTEM", remedy="one of: " + ", ".join(app.systems))
    return _parse_with_settings(app, options, words, prog=prog, about=about)


def _parse_with_settings(
    app: App, options: type[SystemOptions], words: Sequence[str], *, prog: str, about: str
) -> Parsed:
    recipe = app.recipe(words[0])
    if _wants_help(words):
        card = recipe.card
        about = f"{about}\n\n{card.title}; {card.verified}\n\n{card.notice}".strip()
        base, words = default_settings(recipe), ["--help"]  # else only the flags to come are shown
    else:
        base = _first_pass(options, words, prog=prog).base(app, recipe)
    return _parse_over(base, options, words, prog=prog, about=about)


def _parse_with_run(
    app: App, options: type[RunOptions], words: Sequence[str], *, prog: str, about: str
) -> Parsed:
    """Read the run's settings, and over them the flags that its recipe lets a use change."""
    from heed_runtime.run import Run

    words = _run_first(words)
    if _wants_help(words) and not _is_run(words[0]):
        hint = f"{about}\n\nWith RUN before it, this also shows the settings that can be changed."
        _cli(options, ["--help"], prog=prog, about=hint)
    path = Path(words[0]) if _wants_help(words) else _first_pass(options, words, prog=prog).run
    run = Run.open(path, app)
    words = ["--help"] if _wants_help(words) else words
    parsed = _parse_over(run.settings, options, words, prog=prog, about=about)
    allowed = app.recipe(run.system).changeable
    for name in changed(run.settings, parsed.settings):
        if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} is settled by the training of {path}",
                remedy="leave it out, or train again",
            )
    return parsed


def _parse_over(
    base: Any,
    options: type[SystemOptions] | type[RunOptions],
    words: Sequence[str],
    *,
    prog: str,
    about: str,
) -> Parsed:
    """Parse all flags; those of the settings stand over `base`."""
    full = dataclasses.make_dataclass(
        "Arguments",
        [
            ("options", Annotated[options, tyro.conf.arg(name="", prefix_name=False)]),
            *(
                (name, type(getattr(base, name)), _default(getattr(base, name)))
                for name in options.groups
            ),
        ],
        frozen=True,
        kw_only=True,
    )
    arguments = _cli(full, words, prog=prog, about=about)
    groups = {name: getattr(arguments, name) for name in options.groups}
    try:
        settings = dataclasses.replace(base, **groups)
        settings = from_dict(type(settings), to_dict(settings))
    except InputError as error:
        raise UsageError(f"--{error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Parsed(options=arguments.options, settings=settings)


def _first_pass(options: type[OptionsT], words: Sequence[str], *, prog: str) -> OptionsT:
    """Read the flags that say where the settings start from, ignoring all others."""
    with _one_line_errors():
        found, _ = tyro.cli(
            options,
            args=list(words),
            prog=prog,
            config=_CONFIG,
            return_unknown_args=True,
            add_help=False,
        )
    return found


def _wants_help(words: Sequence[str]) -> bool:
    return "-h" in words or "--help" in words


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _cli(kind: type[Any], words: Sequence[str], *, prog: str, about: str) -> Any:
    if _wants_help(words):
        _give_help(kind)
    with _one_line_errors():
        return tyro.cli(kind, args=list(words), prog=prog, description=about, config=_CONFIG)


def _give_help(kind: type[Any]) -> None:
    """Put the docstrings of fields where tyro takes them as they are.

    It would find them by itself, but break the lines where the source does.
    """
    for cls in filter(dataclasses.is_dataclass, kind.__mro__):
        texts = _field_docstrings(cls)
        for item in dataclasses.fields(cls):
            if item.name in texts:
                item.metadata = MappingProxyType({**item.metadata, "help": texts[item.name]})
    for hint in typing.get_type_hints(kind, include_extras=True).values():
        for nested in dataclasses_in(hint):
            _give_help(nested)


def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    try:
        (source,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError):  # made while the program runs
        return {}
    assert isinstance(source, ast.ClassDef)
    found: dict[str, str] = {}
    for node, after in itertools.pairwise(source.body):
        match node, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))
    return found


def _system_first(app: App, words: Sequence[str]) -> list[str]:
    """Move the system's name to the front where flags stand before it."""
    words = list(words)
    if words and words[0].startswith("-"):
        for index, word in enumerate(words):
            if word in app.systems:
                return [word, *words[:index], *words[index + 1 :]]
    return words


def _run_first(words: Sequence[str]) -> list[str]:
    """Move the run's folder to the front where flags, which may have values, stand before it."""
    words = list(words)
    if words and words[0].startswith("-"):
        for index, word in enumerate(words):
            if _is_run(word):
                return [word, *words[:index], *words[index + 1 :]]
    return words


def _is_run(word: str) -> bool:
    names = ("config.yaml", "config.json", "model/config.json")
    return any((Path(word) / name).is_file() for name in names)


@contextlib.contextmanager
def _one_line_errors() -> Any:
    """Turn the box that tyro draws around a mistake into a `UsageError`."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _usage_error(stderr.getvalue()) from None


def _usage_error(box: str) -> UsageError:
    drawn = "\u256d" in box  # with lines where the terminal can, else with dashes and spaces
    indent = 1 if drawn else 2
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        if line.startswith(("\u256d", "\u2570")):
            continue
        text = line.strip("\u2502")[indent:].rstrip()
        if _RULE.match(text.strip()):
            sections.append([])
        elif text.strip():
            sections[-1].append(text)
    if not drawn:
        del sections[0]  # the title, which stands in the line itself otherwise
    message = " ".join(line.strip() for line in sections[0] if not line.startswith(" " * 8))
    message = re.sub(r"^Error parsing ", "", message)
    message = re.sub(r"^Unrecognized options: (--[^ ,]+).*", r"unknown flag \1", message)
    message = re.sub(r"^Unrecognized options: ", "unexpected: ", message)
    message = re.sub(r"^Missing from .*?: ", "missing: ", message)
    message = re.sub(
        r"no type matching (.*) could be instantiated from \[(.*?)\].*",
        r"expected \1, got \2",
        message,
    )
    remedy = None
    for section in sections[1:]:
        if section[0].startswith("Perhaps you meant"):
            remedy = f"did you mean {section[1].split()[0].rstrip(',')}?"
    if (found := re.match(r"unknown flag --trainer\.([\w-]+)", message)) and found[
        1
    ] in PLAIN_NAMES:
        remedy = f"did you mean --{found[1]}?"
    return UsageError(message, remedy=remedy)
