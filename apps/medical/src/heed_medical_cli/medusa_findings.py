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
from heed_medical.medusa import Medusa, MedusaConfig, findings_loss, load_backbone, load_body
from heed_medical.medusa.finding_phantoms import write_findings as write_sample
from heed_medical.medusa.inputs import (
    CaseData,
    Lot,
    MedusaCase,
    MedusaData,
    TrainData,
    to_batch,
    vary_sample,
)
from heed_medical.medusa.maps import picture_maps
from heed_medical.pictures.augmentation import PictureAugmentation
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.layouts import broken_rows, find_inputs, find_pictures, list_pictures
from heed_medical.pictures.listers import CHEXPERT_FINDINGS
from heed_medical.pictures.planning import plan_pictures
from heed_medical_cli.classification_plots import draw_maps
from heed_medical_cli.findings_report import (
    FindingsPrediction,
    findings_report,
    findings_row,
    macro_auc,
    write_findings,
)
from heed_runtime import distributed
from heed_runtime.recipe import (
    Card,
    Check,
    Contender,
    Explanation,
    Exportable,
    Recipe,
    Report,
    Row,
)
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
chexpert  train.csv  valid.csv (the test split)  train/patientN/studyN/viewN_frontal.jpg
mimic     mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz  files/pNN/pN/sN/ID.jpg
table     labels.csv (or any csv, csv.gz, jsonl): file, a column per finding (1, 0, -1, blank);
          optionally split, patient

png, jpg, tif, bmp and DICOM. Splits that are missing are drawn by patient."""

FindingBatch = dict[str, Tensor]
"""main (b, 3, h, w), body (b, 1, p, q), findings (b, k)."""


@dataclass(frozen=True, kw_only=True)
class FindingsTraining:
    """The loss and its minimisation."""

    learning_rate: float = 2e-4
    """Of Adam, at the start; falls to 0 on half a cosine."""
    augment: bool = True
    """Whether training pictures are varied."""
    augmentation: PictureAugmentation = field(default_factory=PictureAugmentation)
    backbone_weights: Path | None = None
    """Weights of the torchvision network to start the backbone from."""
    body_weights: Path | None = None
    """Weights of a body to start from: of a run of medusa-body, or of another MEDUSA."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class FindingsSettings:
    """All settings."""

    model: MedusaConfig = field(default_factory=MedusaConfig)
    data: MedusaData = field(default_factory=MedusaData)
    training: FindingsTraining = field(default_factory=FindingsTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        multiple = self.model.body_multiple
        if any(side % multiple for side in self.data.body_size):
            raise ValueError(
                f"data.body_size must be multiples of {multiple} for "
                f"{len(self.model.body_widths)} body_widths, got {self.data.body_size}"
            )
        if self.training.body_weights is not None and self.model.attention != "medusa":
            raise ValueError(
                f"training.body_weights has no effect with attention={self.model.attention}"
            )
        if self.data.decision != "argmax" or self.data.threshold is not None:
            raise ValueError("data.decision and data.threshold have no effect on findings")


def small() -> FindingsSettings:
    """A network and schedule for a laptop: ResNet-18, a third of the body's width, 96 pixels."""
    return FindingsSettings(
        model=MedusaConfig(backbone="resnet18", body_widths=(8, 16, 32, 64, 128)),
        data=MedusaData(size=(96, 96), body_size=(96, 96)),
        training=FindingsTraining(learning_rate=1e-3),
        trainer=TrainerSettings(max_epochs=15, batch=8),
    )


def paper() -> FindingsSettings:
    """The published sizes: ResNet-50 at 480, the body at 256."""
    return FindingsSettings(trainer=TrainerSettings(max_epochs=10, batch=8))


class FindingsModule(L.LightningModule):
    """Loss, optimiser and validation."""

    def __init__(self, model: Medusa, settings: FindingsSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self._seen: list[tuple[tuple[float, ...], tuple[float, ...]]] = []

    def training_step(self, batch: FindingBatch, _: int) -> Tensor:
        """The loss of a batch of pictures."""
        logits = self.model(batch["main"], batch["body"])
        loss = findings_loss(logits, batch["findings"])
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, sync_dist=True,
            batch_size=len(logits),
        )  # fmt: skip
        return loss

    def validation_step(self, cases: list[MedusaCase], _: int) -> None:
        """The loss; probabilities and labels are kept."""
        logits = self._logits(cases)
        labels = _labels(cases).to(self.device)
        self.log("val/loss", findings_loss(logits, labels), batch_size=len(cases), sync_dist=True)
        pairs = zip(logits.sigmoid().tolist(), labels.tolist(), strict=True)
        self._seen += [(tuple(row), tuple(truth)) for row, truth in pairs]

    def on_validation_epoch_end(self) -> None:
        """The mean area under the ROC over all validation cases."""
        seen = [pair for part in distributed.gather(self._seen) for pair in part]
        self._seen = []
        if seen and np.isfinite(area := macro_auc(seen)):
            self.log("val/macro_auc", area, rank_zero_only=False)

    def predict_step(self, cases: list[MedusaCase], _: int) -> list[FindingsPrediction]:
        """The probability of each finding."""
        rows = self._logits(cases).double().sigmoid().tolist()
        return [
            FindingsPrediction(
                name=case.name,
                probabilities=tuple(row),
                labels=None if case.findings is None else tuple(case.findings.tolist()),
                patient=case.patient,
            )
            for row, case in zip(rows, cases, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """Adam, half a cosine per step."""
        adam = torch.optim.Adam(self.parameters(), lr=self.settings.training.learning_rate)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _logits(self, cases: list[MedusaCase]) -> Tensor:
        batch = to_batch(cases)
        logits: Tensor = self.model(batch["main"].to(self.device), batch["body"].to(self.device))
        return logits.float()


class MedusaFindingsRecipe(Recipe[FindingsSettings, MedusaCase, FindingsPrediction]):
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
        trained="not yet beyond a few steps; CheXpert and MIMIC-CXR are not at hand",
        reproduced="none: the paper tells two or three classes apart",
        notice="research use only: not a medical device",
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
        model = replace(settings.model, classes=len(data.findings))
        return replace(settings, model=model, data=data)

    def train_data(self, settings: FindingsSettings, root: Path) -> TrainData:
        """The training pictures."""
        files = find_pictures(root, settings.data, "train")
        return TrainData(files, settings.data, skipped=_skipped(settings, root))

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

    def cases(self, settings: FindingsSettings, root: Path, split: str) -> CaseData:
        """The labelled pictures of a split."""
        files = find_pictures(root, settings.data, split)
        return CaseData(files, settings.data, skipped=_skipped(settings, root))

    def inputs(self, settings: FindingsSettings, paths: Sequence[Path]) -> CaseData:
        """Pictures, without labels."""
        return CaseData(find_inputs(paths), settings.data)

    def model(self, settings: FindingsSettings) -> Medusa:
        """The network: body and backbone start at random, every gate at 1."""
        return Medusa(settings.model)

    def start(self, settings: FindingsSettings, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, Medusa)
        if settings.training.backbone_weights is not None:
            load_backbone(model, settings.training.backbone_weights)
        if settings.training.body_weights is not None:
            load_body(model, settings.training.body_weights)

    def module(self, settings: FindingsSettings, model: nn.Module) -> FindingsModule:
        """The network with its loss."""
        assert isinstance(model, Medusa)
        return FindingsModule(model, settings)

    def write_prediction(
        self, settings: FindingsSettings, prediction: FindingsPrediction, out: Path
    ) -> list[Path]:
        """Write `<name>.json`."""
        return write_findings(prediction, settings.data.findings, out)

    def score(self, settings: FindingsSettings, prediction: FindingsPrediction) -> list[Row]:
        """Labels and probabilities."""
        return [findings_row(prediction, settings.data.findings)]

    def report(self, settings: FindingsSettings, rows: Sequence[Row]) -> Report:
        """Areas of each finding and their mean, with intervals."""
        return findings_report(rows, settings.data.findings, seed=settings.trainer.seed)

    def explain(
        self, settings: FindingsSettings, module: L.LightningModule, case: MedusaCase
    ) -> Explanation:
        """Attention of every scale, and what spoke for the most probable finding."""
        assert isinstance(module, FindingsModule)
        prediction = module.predict_step([case], 0)[0]
        batch = to_batch([case])
        batch["main"], batch["body"] = (batch[k].to(module.device) for k in ("main", "body"))
        target = int(np.argmax(prediction.probabilities))
        maps = picture_maps(module.model, batch, target=target)
        chance = prediction.probabilities[target]
        title = f"{settings.data.findings[target]} ({chance:.2f})"
        neutral = 0.5 if settings.model.gate == "sigmoid" else 1.0
        arrays = maps.arrays() | {"probabilities": np.array(prediction.probabilities)}
        return Explanation(
            name=case.name,
            arrays=arrays,
            figures={"attention": draw_maps(case.main, maps, title=title, neutral=neutral)},
        )

    def exportable(self, settings: FindingsSettings, model: nn.Module) -> Exportable:
        """Any number of pictures of the trained sizes to logits."""
        main, body = settings.data.size, settings.data.body_size
        free = {0: torch.export.Dim.AUTO}
        return Exportable(
            model=model.eval(),
            examples=[(torch.rand(n, 3, *main), torch.randn(n, 1, *body)) for n in (2, 3)],
            dynamic_shapes=(free, free),
            input_names=("main", "body"),
            output_names=("logits",),
        )

    def contenders(self, settings: FindingsSettings) -> list[Contender]:
        """MEDUSA beside its backbone alone; `bench medusa` has more."""
        count = min(settings.trainer.batch, 4)
        networks = {"MEDUSA": "medusa", "its backbone alone": "none"}
        return [
            Contender(
                name=name,
                build=partial(Medusa, replace(settings.model, attention=kind)),  # type: ignore[arg-type]
                inputs=partial(_bench_inputs, settings, count),
                loss=partial(_bench_loss, torch.zeros(count, settings.model.classes)),
                items=count,
            )
            for name, kind in networks.items()
        ]


def _with_findings(data: MedusaData, root: Path) -> MedusaData:
    """The findings that are asked for, or those of CheXpert that training pictures have."""
    if data.findings:
        return data
    every = replace(data, findings=CHEXPERT_FINDINGS[:1], on_error="skip")
    columns = set(list_pictures(root, every).pictures[0].columns)
    named = tuple(name for name in CHEXPERT_FINDINGS if name in columns)
    data = replace(data, findings=named)
    listing = list_pictures(root, replace(data, on_error="skip"))
    train = np.array(
        [[p.columns[name] for name in named] for p in listing.pictures if p.split == "train"]
    )
    if not len(train):
        raise InputError("has no training pictures", path=root, remedy="add some to the split")
    present = [bool(np.isin(column, ("1", "1.0")).any()) for column in train.T]
    found = tuple(name for name, some in zip(named, present, strict=True) if some)
    if not found:
        raise InputError(
            "has no training picture with a finding of CheXpert",
            path=root,
            remedy="name the columns with --data.findings",
        )
    return replace(data, findings=found)


def _labels(cases: Sequence[MedusaCase]) -> Tensor:
    rows = [case.findings for case in cases]
    assert all(row is not None for row in rows)
    return torch.from_numpy(np.stack(rows))  # type: ignore[arg-type]


def _skipped(settings: FindingsSettings, root: Path) -> tuple[str, ...]:
    return broken_rows(root, settings.data) if settings.data.on_error == "skip" else ()


def _bench_inputs(settings: FindingsSettings, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    main = torch.rand((count, 3, *settings.data.size), generator=generator)
    return main, torch.randn((count, 1, *settings.data.body_size), generator=generator)


def _bench_loss(labels: Tensor, logits: Tensor) -> Tensor:
    return findings_loss(logits, labels.to(logits.device))


RECIPE = MedusaFindingsRecipe()
