"""The flags that mean the same in every verb. A verb's `Options` starts from one of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from heed_runtime.settings import GROUPS, load_settings
from heed_runtime.terminal import Terminal

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.recipe import Recipe

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A switch that is off by default: `--json`, with no `--no-json`."""

SystemName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SYSTEM")]
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
InputPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="INPUT")]
OutPath = Annotated[Path, tyro.conf.arg(metavar="PATH")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
OptionalText = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The flags of every verb."""

    json: Flag = False
    """Write one JSON document to standard output instead of tables."""
    quiet: Flag = False
    """No progress, only warnings and errors on standard error."""
    debug: Flag = False
    """Show the traceback of an error."""

    @property
    def terminal(self) -> Terminal:
        """Where the verb shows its progress."""
        return Terminal(quiet=self.quiet, json=self.json)


@dataclass(frozen=True, kw_only=True)
class SystemOptions(CommonOptions):
    """The flags of a verb that takes SYSTEM and its settings."""

    groups: ClassVar[tuple[str, ...]] = GROUPS
    """The groups of settings that have an effect in this verb and are shown as flags."""

    system: SystemName
    """The system; `list` names them."""
    config: OptionalPath = None
    """Take the settings from this YAML file (such as a run's config.yaml); flags win over it."""
    preset: OptionalText = None
    """Start from these settings of the system; `info` names them."""

    def base(self, app: App, recipe: Recipe[Any, Any, Any]) -> Any:
        """The settings before flags: the preset's, and over them the file's."""
        return load_settings(recipe, preset=self.preset, file=self.config)


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommonOptions):
    """The flags of a verb that takes RUN, whose settings are the run's."""

    groups: ClassVar[tuple[str, ...]] = ()
    """The groups of settings that are shown as flags; the recipe says what may be changed."""

    run: RunPath
    """The folder that `train` wrote."""
