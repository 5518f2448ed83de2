"""The recipe of MEDUSA for pictures with several findings (CheXpert, MIMIC-CXR, tables)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_medical.medusa import Medusa, findings_loss
from heed_medical.medusa.finding_phantoms import write_findings as write_sample
from heed_medical.medusa.inputs import Lot, MedusaCase, MedusaData, to_batch, vary_sample
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.layouts import ONE_CLASS, layout_of, list_pictures
from heed_medical.pictures.listers import (
    CHEXPERT_FINDINGS,
    find_table,
    patients_in_several_splits,
)
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.settings import Layout
from heed_medical_cli.findings_recipe import FindingBatch, FindingsModule, FindingsRecipe
from heed_medical_cli.findings_report import FindingsPrediction
from heed_medical_cli.leaks import warn_of_leaks, warn_of_left_out
from heed_medical_cli.medusa_parts import (
    PictureModule,
    PictureRecipe,
    PictureSettings,
    PictureTraining,
    bench_inputs,
    small_model,
    warn_of_scale,
)
from heed_runtime.recipe import Card, Check, Contender, Explanation
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
chexpert  train.csv  valid.csv (the test split)  train/patientN/studyN/viewN_frontal.jpg
mimic     mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz  files/pNN/pN/sN/ID.jpg
table     labels.csv (or any csv, csv.gz, jsonl): file, a column per finding (1, 0, -1, blank);
          optionally split, patient

png, jpg, tif, bmp and DICOM. Splits that are missing are drawn by patient."""


@dataclass(frozen=True, kw_only=True)
class FindingsTraining(PictureTraining):
    """The loss and its minimisation."""

    learning_rate: float = 2e-4
    """Of Adam, at the start; falls to 0 on half a cosine."""


@dataclass(frozen=True, kw_only=True)
class FindingsSettings(PictureSettings):
    """All settings."""

    training: FindingsTraining = field(default_factory=FindingsTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.decision != "argmax" or self.data.threshold is not None:
            raise ValueError("data.decision and data.threshold have no effect on findings")


def small() -> FindingsSettings:
    """A network and schedule for a laptop: ResNet-18, a third of the body's width, 96 pixels."""
    return FindingsSettings(
        model=small_model(),
        data=MedusaData(size=(96, 96), body_size=(96, 96)),
        training=FindingsTraining(learning_rate=1e-3),
        trainer=TrainerSettings(max_epochs=15, batch=8),
    )


def paper() -> FindingsSettings:
    """The published sizes: ResNet-50 at 480, the body at 256."""
    return FindingsSettings(trainer=TrainerSettings(max_epochs=10, batch=8))


class MedusaFindingsModule(FindingsModule[MedusaCase], PictureModule):
    """Loss, optimiser and validation."""

    def __init__(self, model: Medusa, settings: FindingsSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def batch_logits(self, batch: FindingBatch) -> Tensor:
        """The scores of a batch of pictures."""
        logits: Tensor = self.model(batch["main"], batch["body"])
        return logits

    def case_logits(self, cases: Sequence[MedusaCase]) -> Tensor:
        """The scores of pictures."""
        batch = self.batch(cases)
        logits: Tensor = self.model(batch["main"], batch["body"])
        return logits

    def labels_of(self, case: MedusaCase) -> tuple[float, ...] | None:
        """What is known of a picture."""
        return None if case.findings is None else tuple(case.findings.tolist())

    def patient_of(self, case: MedusaCase) -> str:
        """Whose picture it is."""
        return case.patient

    def configure_optimizers(self) -> Any:
        """Adam, half a cosine per step."""
        adam = torch.optim.Adam(self.parameters(), lr=self.settings.training.learning_rate)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class MedusaFindingsRecipe(
    FindingsRecipe[FindingsSettings, MedusaCase],
    PictureRecipe[FindingsSettings, FindingsPrediction],
):
    """Tell which findings chest X-rays show."""

    card: ClassVar[Card] = Card(
        name="medusa-findings",
        title="MEDUSA for several findings at once",
        task="multi-label classification of chest X-rays",
        reads=("CheXpert", "MIMIC-CXR", "csv or jsonl"),
        writes="json of the probability of each finding",
        paper="Aboutalebi et al., Frontiers in Medicine 2022, arXiv 2110.06063",
        layout=LAYOUT,
        verified="the network of medusa, with a sigmoid per finding",
        trained="its sample, 15 epochs: AUC 1.00 for a wide heart and for a device, 0.67 for a "
        "shadow; CheXpert and MIMIC-CXR are not at hand",
        reproduced="none: the paper tells two or three classes apart",
        notice="research use only: not a medical device; MEDUSA is a reconstruction",
    )
    settings: ClassVar[type[FindingsSettings]] = FindingsSettings
    presets: ClassVar[Mapping[str, Callable[[], FindingsSettings]]] = {
        "small": small,
        "paper": paper,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/loss", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error", "data.layout", "data.table", "data.only", "data.views",
        "data.uncertain", "data.blank",
    )  # fmt: skip

    def sample(self, out: Path, *, seed: int) -> None:
        """Chests with three findings, in the layout of CheXpert."""
        write_sample(out, seed=seed)

    def check(self, settings: FindingsSettings, root: Path) -> Check:
        """Read every picture."""
        try:
            data = _with_findings(settings.data, root)
        except InputError as error:
            return Check(counts=(), problems=(str(error),))
        found = check_pictures(data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: FindingsSettings, root: Path) -> FindingsSettings:
        """Take layout and findings from the data: all of CheXpert's that training pictures have."""
        data = plan_pictures(_with_findings(settings.data, root), root)
        if len(data.findings) < 2:
            raise InputError(
                f"has one finding alone ({', '.join(data.findings)})",
                path=root,
                remedy="train medusa on it, or name more with --data.findings",
            )
        listing = list_pictures(root, data)
        warn_of_left_out(listing.left_out)
        warn_of_scale(settings)
        warn_of_leaks(root, patients_in_several_splits(listing.pictures))
        model = replace(settings.model, classes=len(data.findings))
        return replace(settings, model=model, data=data)

    def augment(
        self, settings: FindingsSettings
    ) -> Callable[[tuple[MedusaCase | Lot, ...], np.random.Generator], tuple[MedusaCase, ...]]:
        """Move, zoom, mirror and brighten pictures."""
        training = settings.training
        return partial(vary_sample, options=training.augmentation if training.augment else None)

    def collate(self, samples: list[tuple[MedusaCase, ...]]) -> FindingBatch:
        """The pictures of all samples."""
        cases = [case for sample in samples for case in sample]
        batch = to_batch(cases)
        return {"main": batch["main"], "body": batch["body"], "findings": _labels(cases)}

    def module(self, settings: FindingsSettings, model: nn.Module) -> MedusaFindingsModule:
        """The network with its loss."""
        assert isinstance(model, Medusa)
        return MedusaFindingsModule(model, settings)

    def findings(self, settings: FindingsSettings) -> tuple[str, ...]:
        """Their names."""
        return settings.data.findings

    def explain(
        self, settings: FindingsSettings, module: L.LightningModule, case: MedusaCase
    ) -> Explanation:
        """Attention of every scale, and what spoke for the most probable finding."""
        assert isinstance(module, MedusaFindingsModule)
        prediction = module.predict_step([case], 0)[0]
        target = int(np.argmax(prediction.probabilities))
        chance = prediction.probabilities[target]
        found = module.explain(case, target, f"{settings.data.findings[target]} ({chance:.2f})")
        arrays = {**found.arrays, "probabilities": np.array(prediction.probabilities)}
        return replace(found, arrays=arrays)

    def contenders(self, settings: FindingsSettings) -> list[Contender]:
        """MEDUSA beside its backbone alone; `bench medusa` has more."""
        count = min(settings.trainer.batch, 4)
        networks = {"MEDUSA": "medusa", "its backbone alone": "none"}
        return [
            Contender(
                name=name,
                build=partial(Medusa, replace(settings.model, attention=kind)),  # type: ignore[arg-type]
                inputs=partial(bench_inputs, settings.data, count),
                loss=partial(_bench_loss, torch.zeros(count, settings.model.classes)),
                items=count,
            )
            for name, kind in networks.items()
        ]


def _with_findings(data: MedusaData, root: Path) -> MedusaData:
    """The findings that are asked for, or those of CheXpert that training pictures have."""
    if data.findings:
        return data
    layout = layout_of(root, data)
    if layout in ONE_CLASS:
        raise InputError(
            f"has pictures of one class each, in the layout {layout}",
            path=root,
            remedy="train medusa on them",
        )
    data = replace(data, findings=_named(data, root, layout))
    listing = list_pictures(root, replace(data, on_error="skip"))
    train = np.array(
        [[p.columns[n] for n in data.findings] for p in listing.pictures if p.split == "train"]
    )
    if not len(train):
        raise InputError("has no training pictures", path=root, remedy="add some to the split")
    present = [bool(np.isin(column, ("1", "1.0")).any()) for column in train.T]
    found = tuple(name for name, some in zip(data.findings, present, strict=True) if some)
    if not found:
        raise InputError(
            "has no training picture with a finding of CheXpert",
            path=root,
            remedy="name the columns with --data.findings",
        )
    return replace(data, findings=found)


def _named(data: MedusaData, root: Path, layout: Layout) -> tuple[str, ...]:
    """The findings of CheXpert that are columns."""
    if layout == "table":
        table = find_table(root, data.table)
        columns = set() if table is None else set(table.columns)
        if table is not None and not columns & set(CHEXPERT_FINDINGS):
            raise InputError(
                f"has no column of a finding of CheXpert; {table.header}",
                path=table.path,
                remedy="name the columns of findings with --data.findings",
            )
    else:
        every = replace(data, findings=CHEXPERT_FINDINGS[:1], on_error="skip")
        columns = set(list_pictures(root, every).pictures[0].columns)
    return tuple(name for name in CHEXPERT_FINDINGS if name in columns)


def _labels(cases: Sequence[MedusaCase]) -> Tensor:
    rows = [case.findings for case in cases]
    assert all(row is not None for row in rows)
    return torch.from_numpy(np.stack(rows))  # type: ignore[arg-type]


def _bench_loss(labels: Tensor, logits: Tensor) -> Tensor:
    return findings_loss(logits, labels.to(logits.device))


RECIPE = MedusaFindingsRecipe()
