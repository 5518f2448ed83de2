"""An app: a name and a table of recipes, imported lazily.

Nothing heavy is imported here: `--help` and `--version` answer at once.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from heed_runtime import __version__
from heed_runtime.errors import UsageError, guard, nearest

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

_SWITCHES = ("--json", "--quiet", "--debug")


@dataclass(frozen=True, kw_only=True)
class App:
    """A command with the systems of one domain.

    Args:
        name: The command, such as `heed-medical`.
        about: One line: what it is for.
        systems: Name of a system -> `module:OBJECT`, where OBJECT is its recipe (the class, or an
            instance).

    Example:
        >>> app = App(name="heed-x", about="Nothing yet.", systems={})
        >>> app.call(["--version"])  # doctest: +SKIP
    """

    name: str
    about: str
    systems: Mapping[str, str]

    def main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the command line and leave the process with its exit code."""
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
        if not argv or argv[0] in ("-h", "--help", "help"):
            sys.stdout.write(self._help())
            return 0
        if argv[0] == "--version":
            sys.stdout.write(f"{self.name} {__version__}\n")
            return 0
        verb = argv[0]
        if verb not in VERBS:
            raise UsageError(f"{self.name} has no verb {verb!r}", remedy=nearest(verb, VERBS))
        return self._run_verb(verb, [*argv[1:], *switches])

    def _run_verb(self, verb: str, words: list[str]) -> int:
        from heed_runtime.arguments import parse
        from heed_runtime.terminal import logging_to

        module = importlib.import_module(f"heed_runtime.commands.{verb}")
        try:
            parsed = parse(self, verb, module.Options, module.__doc__ or "", words)
        except SystemExit as stop:
            return int(stop.code or 0)
        terminal = parsed.options.terminal
        settings = () if parsed.settings is None else (parsed.settings,)
        with logging_to(terminal):
            result = module.run(self, parsed.options, *settings)
        terminal.show(result)
        return int(result.exit_code)

    def _help(self) -> str:
        width = max(len(f"{verb} {arguments}") for verb, arguments in VERBS.items()) + 2
        lines = [f"{self.about}", "", f"usage: {self.name} VERB ...", ""]
        lines += [
            f"  {f'{verb} {arguments}':<{width}}{about(verb)}" for verb, arguments in VERBS.items()
        ]
        lines += [
            "",
            f"systems: {', '.join(self.systems)}",
            f"{self.name} VERB --help shows the flags of a verb,",
            f"{self.name} train SYSTEM --help also the settings of a system.",
        ]
        return "\n".join(lines) + "\n"


def about(verb: str) -> str:
    """The first line of a verb's docstring, read without importing the verb."""
    source = pkgutil.get_data("heed_runtime.commands", f"{verb}.py") or b""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
