"""Show the systems: task, data that they read, paper."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heed_runtime.options import CommonOptions
from heed_runtime.recipe import Row, Table
from heed_runtime.terminal import Result

if TYPE_CHECKING:
    from heed_runtime.app import App


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """No flags but the common ones."""


def run(app: App, options: Options) -> Result:
    """A row per system."""
    cards = [app.recipe(name).card for name in app.systems]
    rows: list[Row] = [
        {
            "system": card.name,
            "task": card.task,
            "reads": ", ".join(card.reads),
            "trained": card.trained,
            "paper": card.paper,
        }
        for card in cards
    ]
    return Result(
        title=f"{app.name}: {app.about}",
        tables=[Table(title="", rows=rows)],
        data={"systems": [{"system": card.name, **dataclasses.asdict(card)} for card in cards]},
    )
