"""What the recipes that look for several findings share: loss, validation, prediction, report."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lightning as L
import numpy as np
import torch
from torch import Tensor

from heed_medical.medusa import findings_loss
from heed_medical_cli.findings_report import (
    FindingsPrediction,
    findings_report,
    findings_row,
    macro_auc,
    write_findings,
)
from heed_runtime import distributed
from heed_runtime.recipe import Named, Recipe, Report, Row

FindingBatch = dict[str, Tensor]
"""The inputs by name, and findings (b, k): 1 present, 0 absent, NaN not known."""

SettingsT = TypeVar("SettingsT", bound=Any)
CaseT = TypeVar("CaseT", bound=Named)


class FindingsModule(L.LightningModule, Generic[CaseT]):
    """Loss and validation of a network with a score per finding."""

    without_area: ClassVar[float | None] = None
    """What is logged as the area of a validation in which no finding has both kinds of cases; None:
    nothing is."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[tuple[float, ...], tuple[float, ...]]] = []

    @abstractmethod
    def batch_logits(self, batch: FindingBatch) -> Tensor:
        """Scores (b, k) of a training batch."""

    @abstractmethod
    def case_logits(self, cases: Sequence[CaseT]) -> Tensor:
        """Scores (b, k) of cases."""

    @abstractmethod
    def labels_of(self, case: CaseT) -> tuple[float, ...] | None:
        """1 present, 0 absent, NaN not known; None: the case has no labels."""

    @abstractmethod
    def patient_of(self, case: CaseT) -> str:
        """Whose case it is."""

    def training_step(self, batch: FindingBatch, _: int) -> Tensor:
        """The loss of a batch."""
        logits = self.batch_logits(batch)
        loss = findings_loss(logits, batch["findings"])
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, sync_dist=True,
            batch_size=len(logits),
        )  # fmt: skip
        return loss

    def validation_step(self, cases: list[CaseT], _: int) -> None:
        """The loss; probabilities and labels are kept."""
        logits = self.case_logits(cases).float()
        labels = torch.tensor([self.labels_of(case) for case in cases], device=self.device)
        self.log("val/loss", findings_loss(logits, labels), batch_size=len(cases), sync_dist=True)
        pairs = zip(logits.sigmoid().tolist(), labels.tolist(), strict=True)
        self._seen += [(tuple(row), tuple(truth)) for row, truth in pairs]

    def on_validation_epoch_end(self) -> None:
        """The mean area under the ROC over all validation cases."""
        seen = [pair for part in distributed.gather(self._seen) for pair in part]
        self._seen = []
        area = macro_auc(seen) if seen else None
        if area is not None and not np.isfinite(area):
            area = self.without_area
        if area is not None:
            self.log("val/macro_auc", area, rank_zero_only=False)

    def predict_step(self, cases: list[CaseT], _: int) -> list[FindingsPrediction]:
        """The probability of each finding."""
        rows = self.case_logits(cases).double().sigmoid().tolist()
        return [
            FindingsPrediction(
                name=case.name,
                probabilities=tuple(row),
                labels=self.labels_of(case),
                patient=self.patient_of(case),
            )
            for row, case in zip(rows, cases, strict=True)
        ]


class FindingsRecipe(Recipe[SettingsT, CaseT, FindingsPrediction], Generic[SettingsT, CaseT]):
    """What is written, scored and reported of several findings."""

    @abstractmethod
    def findings(self, settings: SettingsT) -> tuple[str, ...]:
        """Their names, in the order of the scores."""

    def write_prediction(
        self, settings: SettingsT, prediction: FindingsPrediction, out: Path
    ) -> list[Path]:
        """Write `<name>.json`."""
        return write_findings(prediction, self.findings(settings), out)

    def score(self, settings: SettingsT, prediction: FindingsPrediction) -> list[Row]:
        """Labels and probabilities."""
        return [findings_row(prediction, self.findings(settings))]

    def report(self, settings: SettingsT, rows: Sequence[Row]) -> Report:
        """Areas of each finding and their mean, with intervals over patients."""
        return findings_report(rows, self.findings(settings), seed=settings.trainer.seed)
