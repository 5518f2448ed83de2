"""An app: a name and a table of recipes, imported lazily.

Nothing heavy is imported here: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from heed_runtime import __version__
from heed_runtime.errors import TERMINATED, Terminated, UsageError, guard, nearest

if TYPE_CHECKING:
    from heed_runtime.recipe import Recipe

VERBS: Mapping[str, str] = {
    "list": "",
    "info": "SYSTEM",
    "sample": "SYSTEM DIR",
    "check": "SYSTEM DATA",
    "train": "SYSTEM [--data DATA] [--out RUN]",
    "evaluate": "RUN [--data DATA] [--split SPLIT]",
    "predict": "RUN INPUT... --out DIR",
    "explain": "RUN INPUT... --out DIR",
    "export": "RUN --out FILE",
    "bench": "SYSTEM",
    "doctor": "",
}
"""Verb -> its arguments, as `--help` shows them. The code of a verb is `commands/<verb>.py`."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb that only one domain has, beside the verbs of every app.

    Example:
        >>> Verb(module="heed_x_cli.view", arguments="FILE").arguments
        'FILE'
    """

    module: str
    """Holds `Options`, `run` and a docstring, as the modules in `heed_runtime.commands` do; it is
    imported when the verb is used."""
    arguments: str = ""
    """What follows the verb, as `--help` shows it."""


_SWITCHES = ("--json", "--quiet", "--debug")


@dataclass(frozen=True, kw_only=True)
class App:
    """A command with the systems of one domain.

    Args:
        name: The command, such as `heed-medical`.
        about: One line: what it is for.
        systems: Name of a system -> `module:OBJECT`, where OBJECT is its recipe (the class, or an
            instance).
        verbs: Name of a verb that only this domain has -> what does it.
        libraries: Library that only a part of this domain needs -> which part; `doctor` shows it.
        diagnoses: Title of a table that `doctor` shows of this domain -> `module:FUNCTION`, which
            returns its rows.

    Raises:
        ValueError: A verb of the domain has the name of one that every app has.

    Example:
        >>> app = App(name="heed-x", about="Nothing yet.", systems={})
        >>> app.call(["--version"])  # doctest: +SKIP
    """

    name: str
    about: str
    systems: Mapping[str, str]
    verbs: Mapping[str, Verb] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    diagnoses: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for verb in self.verbs:
            if verb in VERBS:
                raise ValueError(f"verbs must not replace {verb!r}, which every app has")

    def main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the command line and leave the process with its exit code."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the caller has closed it
                setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        signal.signal(signal.SIGTERM, functools.partial(_terminate, os.getpid()))
        sys.exit(self.call(sys.argv[1:] if argv is None else argv))

    def call(self, argv: Sequence[str]) -> int:
        """Run a command line and return its exit code; see `heed_runtime.errors`."""
        return guard(self.name, lambda: self._run(list(argv)), debug="--debug" in argv)

    def recipe(self, name: str) -> Recipe[Any, Any, Any]:
        """Import the recipe of a system.

        Raises:
            UsageError: The app has no such system.
        """
        if name not in self.systems:
            raise UsageError(
                f"{self.name} has no system {name!r}", remedy=nearest(name, self.systems)
            )
        module, _, attribute = self.systems[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        recipe: Recipe[Any, Any, Any] = found() if isinstance(found, type) else found
        return recipe

    def _run(self, argv: list[str]) -> int:
        switches: list[str] = []
        while argv and argv[0] in _SWITCHES:
            switches.append(argv.pop(0))
        if argv[:1] == ["help"] and len(argv) > 1:
            argv = [*argv[1:], "--help"]
        if not argv or argv[0] in ("-h", "--help", "help"):
            sys.stdout.write(self._help())
            sys.stdout.flush()
            return 0
        if argv[0] == "--version":
            sys.stdout.write(f"{self.name} {__version__}\n")
            return 0
        verb = argv[0]
        known = self._verbs()
        if verb not in known:
            remedy = f"a verb comes first: {self.name} train {verb}"
            if verb not in self.systems:
                remedy = nearest(verb, known)
            raise UsageError(f"{self.name} has no verb {verb!r}", remedy=remedy)
        return self._run_verb(verb, [*argv[1:], *switches])

    def _run_verb(self, verb: str, words: list[str]) -> int:
        from heed_runtime.arguments import parse
        from heed_runtime.terminal import Terminal, logging_to

        words = [_at_home(word) for word in words]
        terminal = Terminal(quiet="--quiet" in words, json="--json" in words)
        with logging_to(terminal):
            module = importlib.import_module(self._verbs()[verb].module)
            try:
                parsed = parse(self, verb, module.Options, module.__doc__ or "", words)
            except SystemExit as stop:
                sys.stdout.flush()
                return int(stop.code or 0)
            settings = () if parsed.settings is None else (parsed.settings,)
            result = module.run(self, parsed.options, *settings)
        parsed.options.terminal.show(result)
        return int(result.exit_code)

    def _verbs(self) -> dict[str, Verb]:
        common = {
            name: Verb(module=f"heed_runtime.commands.{name}", arguments=arguments)
            for name, arguments in VERBS.items()
        }
        return common | dict(self.verbs)

    def _help(self) -> str:
        usages = {
            f"{name} {verb.arguments}": about(verb.module) for name, verb in self._verbs().items()
        }
        width = max(map(len, usages)) + 2
        lines = [f"{self.about}", "", f"usage: {self.name} VERB ...", ""]
        lines += [f"  {usage:<{width}}{line}" for usage, line in usages.items()]
        lines += [
            "",
            f"systems: {', '.join(self.systems)}",
            f"{self.name} VERB --help shows the flags of a verb,",
            f"{self.name} train SYSTEM --help also the settings of a system.",
        ]
        return "\n".join(lines) + "\n"


def _at_home(word: str) -> str:
    """A path under `~/`, which shells leave as it is in `--out=~/run`."""
    flag, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if not re.match("~(/|$)", path):
        return word
    return flag + equals + os.path.expanduser(path)  # noqa: PTH111  (a word is no path yet)


def _terminate(program: int, number: int, frame: object) -> NoReturn:
    if os.getpid() != program:  # a helper that the program has forked
        os._exit(TERMINATED)
    raise Terminated


def about(module: str) -> str:
    """The first line of the docstring of a verb's module, read without importing the module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
