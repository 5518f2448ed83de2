"""Score predicted scanpaths of any program against viewers, with their ceiling and chance.

PREDICTIONS is a CSV (image, subject, index, x, y, duration), a JSON, or any layout that DATA may
have; DATA are viewers' scanpaths: COCO-Search18, OSIE, FixaTons, STI, ViSioNS, or such a CSV or
JSON. Of every score the table gives the predictions, the viewers among themselves, random
scanpaths, and scanpaths of other pictures, with 95 % bootstrap intervals over pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from heed_gaze.comparison.matching import match
from heed_gaze_cli.scanpath_options import DataPath, ScoreOptions
from heed_gaze_cli.scanpath_report import score

if TYPE_CHECKING:
    from heed_runtime.app import App
    from heed_runtime.terminal import Result


@dataclass(frozen=True, kw_only=True)
class Options(ScoreOptions):
    """What is compared with what."""

    predictions: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PREDICTIONS")]
    """Predicted scanpaths."""
    data: DataPath
    """Viewers' scanpaths."""


def run(app: App, options: Options) -> Result:
    """Match pictures and score."""
    predicted = options.read(options.predictions)
    data = options.read(options.data)
    cases = match(data, predicted, split=options.split)
    skipped = [*predicted.skipped, *data.skipped]
    return score(options, cases, data, skipped=skipped, used=[options.predictions, options.data])
