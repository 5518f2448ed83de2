"""What the recipes that segment share: cases in, masks out, their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from heed_medical.segmentation.cases import SegmentationCase
from heed_medical.segmentation.checking import check_data
from heed_medical.segmentation.layouts import find_cases, find_inputs, left_out
from heed_medical.segmentation.metrics import score_case, summarise
from heed_medical.segmentation.prediction import SegmentationPrediction
from heed_medical.segmentation.slices import CaseData
from heed_medical.segmentation.writers import write_labels
from heed_medical_cli.pictures import draw_scores
from heed_runtime.recipe import Check, Recipe, Report, Row, Table

SettingsT = TypeVar("SettingsT", bound=Any)


class SegmentationRecipe(
    Recipe[SettingsT, SegmentationCase, SegmentationPrediction], Generic[SettingsT]
):
    """Reads, writes and scores masks; `settings.data` is a `SegmentationData`."""

    changeable: ClassVar[tuple[str, ...]] = ("data.on_error", "data.layout")

    def check(self, settings: SettingsT, root: Path) -> Check:
        """Read every case."""
        found = check_data(settings.data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def cases(self, settings: SettingsT, root: Path, split: str) -> CaseData:
        """Whole volumes or pictures with their masks."""
        files = find_cases(root, settings.data, split)
        return CaseData(files, settings.data, skipped=left_out(root, settings.data))

    def inputs(self, settings: SettingsT, paths: Sequence[Path]) -> CaseData:
        """Whole volumes or pictures."""
        return CaseData(find_inputs(paths, settings.data), settings.data, label=False)

    def write_prediction(
        self, settings: SettingsT, prediction: SegmentationPrediction, out: Path
    ) -> list[Path]:
        """NIfTI in the frame of the input, or a png mask."""
        return write_labels(prediction, out, settings.data.table)

    def score(self, settings: SettingsT, prediction: SegmentationPrediction) -> list[Row]:
        """Dice, volumetric similarity and surface distances per class and region."""
        data = settings.data
        return list(score_case(prediction, data.table.names, regions=data.classes_of_regions))

    def report(self, settings: SettingsT, rows: Sequence[Row]) -> Report:
        """Means over cases and classes, with what failed told apart."""
        regions = tuple(settings.data.classes_of_regions)
        summary = summarise(rows, regions=regions, seed=settings.trainer.seed)
        return Report(
            metrics=summary.metrics,
            tables=[Table(title="scores per class", rows=summary.rows)],
            plots={"dice": draw_scores(rows, "dice", "Dice")},
        )


def mean_dice(prediction: SegmentationPrediction, names: Sequence[str]) -> float:
    """The mean over the classes of one case."""
    rows = score_case(prediction, names, distances=False)
    return float(np.mean([row["dice"] for row in rows]))
