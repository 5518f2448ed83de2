"""Read a data set through, count what is there and list everything that is broken.

Exits with 1 if any case is unusable, so that a script can stop before hours of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from heed_core.errors import InputError
from heed_runtime.options import SystemOptions
from heed_runtime.recipe import Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App

SHOWN = 50


@dataclass(frozen=True, kw_only=True)
class Options(SystemOptions):
    """The data set to check, and how it would be read."""

    groups: ClassVar[tuple[str, ...]] = ("model", "data", "training")

    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")]
    """The data set: a folder in one of the layouts that `info` draws."""


def run(app: App, options: Options, settings: Any) -> Result:
    """Counts, then the problems: the first 50 on the terminal, all in the JSON document."""
    if not options.data.exists():
        raise InputError("no such file or folder", path=options.data, remedy="check the path")
    found = app.recipe(options.system).check(settings, options.data)
    ok = not found.problems
    verdict = "nothing is broken" if ok else f"{len(found.problems)} problems"
    if found.warnings:
        verdict += f", {len(found.warnings)} warnings"
    lines = _listed("problem", found.problems) + _listed("warning", found.warnings)
    return Result(
        title=f"{options.data}: {verdict}",
        text="\n".join(lines),
        tables=[Table(title="", rows=found.counts)] if found.counts else [],
        data={
            "system": options.system,
            "data": str(options.data),
            "ok": ok,
            "counts": found.counts,
            "problems": list(found.problems),
            "warnings": list(found.warnings),
        },
        exit_code=0 if ok else 1,
    )


def _listed(kind: str, lines: Sequence[str]) -> list[str]:
    shown = [f"{kind}: {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"... and {len(lines) - SHOWN} more {kind}s (--json lists all)")
    return shown
