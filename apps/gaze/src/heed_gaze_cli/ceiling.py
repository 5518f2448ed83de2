"""Score viewers against each other: the ceiling of a data set, and its chance levels.

DATA as in `compare`. A prediction that scores as viewers do among themselves cannot be told from a
viewer by that score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heed_core.errors import InputError
from heed_gaze.comparison.matching import match
from heed_gaze_cli.scanpath_options import DataPath, ScoreOptions
from heed_gaze_cli.scanpath_report import score

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.terminal import Result


@dataclass(frozen=True, kw_only=True)
class Options(ScoreOptions):
    """The data set."""

    data: DataPath
    """Viewers' scanpaths."""


def run(app: App, options: Options) -> Result:
    """Score every picture that at least two viewers saw."""
    data = options.read(options.data)
    cases = [case for case in match(data, split=options.split) if len(case.human) > 1]
    if not cases:
        raise InputError(
            "has no picture that two viewers saw", path=options.data, remedy="give more viewers"
        )
    return score(options, cases, data, skipped=data.skipped, used=[options.data])
