"""The recipe of MEDUSA: multi-scale encoder-decoder self-attention (arXiv 2110.06063)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_medical.classification.metrics import (
    Predictions,
    best_threshold,
    confusion,
    roc_auc,
    summarise,
)
from heed_medical.medusa import Medusa, MedusaConfig, class_loss
from heed_medical.medusa.inputs import (
    Lot,
    MedusaBatch,
    MedusaCase,
    MedusaData,
    to_batch,
    vary_case,
    vary_sample,
)
from heed_medical.medusa.phantoms import write_chests
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.layouts import list_pictures
from heed_medical.pictures.listers import patients_in_several_splits
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical_cli.classification_plots import draw_plots
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
from heed_runtime import distributed
from heed_runtime.recipe import Card, Check, Contender, Explanation, Report, Row, Table
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
table     labels.csv (or any csv, jsonl): file, label; optionally split, patient, source
covidx    train/*.png  test/*.png  train_COVIDx9B.txt  test_COVIDx9B.txt
rsna      stage_2_train_images/ID.dcm  stage_2_train_labels.csv
chexpert  train.csv  valid.csv (the test split)  train/patientN/studyN/viewN_frontal.jpg
mimic     mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz  files/pNN/pN/sN/ID.jpg
folders   {train,val,test}/CLASS/*.png, or CLASS/*.png

png, jpg, tif, bmp and DICOM. Splits that are missing are drawn by patient."""


@dataclass(frozen=True, kw_only=True)
class MedusaTraining(PictureTraining):
    """The loss and its minimisation."""

    schedule: Literal["none", "cosine"] = "none"
    """none: a constant learning rate (the published recipe); cosine: it falls to zero."""
    class_weights: tuple[float, ...] = ()
    """Weight of the loss per class, in the order of the classes. Empty: 1 for all."""
    alternate: int = 0
    """Epochs in turn: so many with the backbone at rest, so many with body and heads at rest.
    0: all learn together."""
    augment_body: Literal["shared", "none"] = "shared"
    """shared: the body's picture moves with the main one; none: it stays, as in the released
    pipeline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not weight > 0 for weight in self.class_weights):
            raise ValueError(f"class_weights must be above 0, got {self.class_weights}")
        if self.alternate < 0:
            raise ValueError(f"alternate must not be negative, got {self.alternate}")


@dataclass(frozen=True, kw_only=True)
class MedusaSettings(PictureSettings):
    """All settings of MEDUSA."""

    training: MedusaTraining = field(default_factory=MedusaTraining)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training.alternate:
            self.need_body("alternate")


def small() -> MedusaSettings:
    """A network and schedule for a laptop: ResNet-18, a third of the body's width, 96 pixels."""
    return MedusaSettings(
        model=small_model(),
        data=MedusaData(size=(96, 96), body_size=(96, 96)),
        training=MedusaTraining(learning_rate=1e-3, schedule="cosine"),
        trainer=TrainerSettings(max_epochs=15, batch=8),
    )


def paper() -> MedusaSettings:
    """ResNet-50 at 480, the body at 256, batches of 4 + 4, Adam 2e-4, 100 epochs."""
    return MedusaSettings(
        data=MedusaData(balance="positive"), trainer=TrainerSettings(max_epochs=100, batch=4)
    )


@dataclass(frozen=True, kw_only=True)
class MedusaPrediction:
    """The class probabilities of one picture."""

    name: str
    probabilities: tuple[float, ...]
    called: int
    threshold: float | None
    """From which probability on the second class was called; None: the most probable class was."""
    label: int | None
    patient: str
    source: str


class MedusaModule(PictureModule):
    """Loss, optimiser and validation of MEDUSA."""

    def __init__(self, model: Medusa, settings: MedusaSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self._seen: list[tuple[tuple[float, ...], int]] = []

    def training_step(self, batch: MedusaBatch, _: int) -> Tensor:
        """The loss of a batch of pictures."""
        logits = self.model(batch["main"], batch["body"])
        loss = class_loss(logits, batch["label"], self.settings.training.class_weights or None)
        log = partial(self.log, on_step=False, on_epoch=True, sync_dist=True)
        log("train/loss", loss, batch_size=len(logits))
        hits = (logits.argmax(1) == batch["label"]).float().mean()
        log("train/accuracy", hits, batch_size=len(logits))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the part at rest as it is."""
        turn = self.settings.training.alternate
        if not turn:
            return
        resting = self.model.backbone.parameters()
        if self.current_epoch // turn % 2:
            resting = iter(self.model.parameters_of_attention())
        for parameter in resting:
            parameter.grad = None

    def validation_step(self, cases: list[MedusaCase], _: int) -> None:
        """The loss; what is needed for the scores of all cases is kept."""
        batch = self.batch(cases)
        logits = self.model(batch["main"], batch["body"]).float()
        weights = self.settings.training.class_weights or None
        loss = class_loss(logits, batch["label"], weights)
        self.log("val/loss", loss, batch_size=len(cases), sync_dist=True)
        for row, case in zip(logits.softmax(1).tolist(), cases, strict=True):
            self._seen.append((tuple(row), -1 if case.label is None else case.label))

    def on_validation_epoch_end(self) -> None:
        """Scores of all validation cases, and the threshold that is best on them."""
        seen = [pair for part in distributed.gather(self._seen) for pair in part]
        self._seen = []
        if not seen:
            return
        probabilities = np.array([row for row, _ in seen])
        labels = np.array([label for _, label in seen])
        classes = probabilities.shape[1]
        cells = confusion(labels, probabilities.argmax(1), classes=classes)
        present = cells.sum(1) > 0
        sensitivity = np.diag(cells)[present] / cells.sum(1)[present]
        self.log("val/balanced_accuracy", float(sensitivity.mean()), rank_zero_only=False)
        numbers = [1] if classes == 2 else range(classes)
        areas = [roc_auc(probabilities[:, k], labels == k) for k in numbers]
        if np.isfinite(areas).all():
            self.log("val/auc", float(np.mean(areas)), rank_zero_only=False)
        if classes == 2:
            self.model.threshold.fill_(best_threshold(probabilities[:, 1], labels == 1))

    def predict_step(self, cases: list[MedusaCase], _: int) -> list[MedusaPrediction]:
        """Class probabilities, and the class that they are called."""
        batch = self.batch(cases)
        rows = self.model(batch["main"], batch["body"]).double().softmax(1).tolist()
        data = self.settings.data
        threshold = data.threshold
        if data.decision == "calibrated":
            threshold = float(self.model.threshold)
        return [
            MedusaPrediction(
                name=case.name,
                probabilities=tuple(row),
                called=int(np.argmax(row)) if threshold is None else int(row[1] >= threshold),
                threshold=threshold,
                label=case.label,
                patient=case.patient,
                source=case.source,
            )
            for row, case in zip(rows, cases, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """Adam with the schedule of the settings."""
        adam = torch.optim.Adam(self.model.parameters(), lr=self.settings.training.learning_rate)
        if self.settings.training.schedule == "none":
            return adam
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class MedusaRecipe(PictureRecipe[MedusaSettings, MedusaPrediction]):
    """Classify chest X-rays, and other pictures in grey."""

    card: ClassVar[Card] = Card(
        name="medusa",
        title="MEDUSA: multi-scale encoder-decoder self-attention",
        task="classification of chest X-rays",
        reads=("COVIDx", "RSNA", "CheXpert", "MIMIC-CXR", "csv or jsonl", "folders per class"),
        writes="json of class probabilities",
        paper="Aboutalebi et al., Frontiers in Medicine 2022, arXiv 2110.06063",
        layout=LAYOUT,
        verified="reconstructed: the paper gives no layers; 28,479,539 parameters (paper: 29.2 M)",
        trained="Kermany X-rays, preset small: normal or pneumonia accuracy 0.973 (0.956 to 0.989) "
        "and AUC 0.998 on 90 in the mean of five seeds (30 epochs, calibrated threshold; HOG and "
        "logistic regression: 0.967), bacterial or viral AUC 0.90 on 60 (15 epochs; 0.89)",
        reproduced="none: no layers and no training loop were released, COVIDx is not at hand",
        notice="research use only: not a medical device; MEDUSA is a reconstruction",
    )
    settings: ClassVar[type[MedusaSettings]] = MedusaSettings
    presets: ClassVar[Mapping[str, Callable[[], MedusaSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/loss", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error", "data.layout", "data.table", "data.label", "data.only", "data.views",
        "data.decision", "data.threshold",
    )  # fmt: skip

    def sample(self, out: Path, *, seed: int) -> None:
        """Chests in which a shadow lies in a lung or elsewhere, in the layout of COVIDx."""
        write_chests(out, seed=seed)

    def check(self, settings: MedusaSettings, root: Path) -> Check:
        """Read every picture."""
        found = check_pictures(settings.data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: MedusaSettings, root: Path) -> MedusaSettings:
        """Take the layout and the classes from the data."""
        data = plan_pictures(settings.data, root)
        listing = list_pictures(root, data)
        warn_of_left_out(listing.left_out)
        warn_of_scale(settings)
        warn_of_leaks(root, patients_in_several_splits(listing.pictures))
        weights = settings.training.class_weights
        if weights and len(weights) != len(data.classes):
            raise InputError(
                f"--training.class-weights has {len(weights)} values for the {len(data.classes)} "
                f"classes {', '.join(data.classes)}",
                remedy="give one per class",
            )
        model = replace(settings.model, classes=len(data.classes))
        return replace(settings, model=model, data=data)

    def augment(
        self, settings: MedusaSettings
    ) -> Callable[[tuple[MedusaCase | Lot, ...], np.random.Generator], tuple[MedusaCase, ...]]:
        """Draw the pictures of a balanced sample; move, zoom, mirror and brighten them."""
        training = settings.training
        options = training.augmentation if training.augment else None
        return partial(vary_sample, options=options, body=training.augment_body)

    def collate(self, samples: list[tuple[MedusaCase, ...]]) -> MedusaBatch:
        """The pictures of all samples."""
        return to_batch([case for sample in samples for case in sample])

    def module(self, settings: MedusaSettings, model: nn.Module) -> MedusaModule:
        """The network with its loss."""
        assert isinstance(model, Medusa)
        return MedusaModule(model, settings)

    def write_prediction(
        self, settings: MedusaSettings, prediction: MedusaPrediction, out: Path
    ) -> list[Path]:
        """Write `<name>.json`: the class, and the probability of each."""
        names = settings.data.classes
        path = out / f"{prediction.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "case": prediction.name,
            "class": names[prediction.called],
            "probabilities": dict(zip(names, prediction.probabilities, strict=True)),
            "threshold": prediction.threshold,
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return [path]

    def score(self, settings: MedusaSettings, prediction: MedusaPrediction) -> list[Row]:
        """Label, called class and probabilities."""
        names = settings.data.classes
        assert prediction.label is not None
        row: dict[str, str | int | float | None] = {
            "case": prediction.name,
            "patient": prediction.patient,
            "source": prediction.source,
            "label": names[prediction.label],
            "called": names[prediction.called],
            "correct": int(prediction.label == prediction.called),
            "threshold": prediction.threshold,
        }
        chances = zip(names, prediction.probabilities, strict=True)
        return [row | {f"p {name}": value for name, value in chances}]

    def report(self, settings: MedusaSettings, rows: Sequence[Row]) -> Report:
        """Sensitivity, predictive values, areas and calibration, with intervals."""
        names = settings.data.classes
        found = predictions_of(rows, names)
        summary = summarise(found, seed=settings.trainer.seed)
        cells = confusion(found.labels, found.called, classes=len(names))
        table: list[Row] = [
            {"label": name, **{f"called {n}": int(c) for n, c in zip(names, line, strict=True)}}
            for name, line in zip(names, cells, strict=True)
        ]
        metrics = dict(summary.metrics)
        if (threshold := rows[0]["threshold"]) is not None:
            metrics["threshold"] = float(threshold)
        return Report(
            metrics=metrics,
            tables=[
                Table(title="scores per class", rows=summary.rows),
                Table(title="confusion", rows=table),
                *_source_tables(rows),
            ],
            plots=draw_plots(found),
        )

    def explain(
        self, settings: MedusaSettings, module: L.LightningModule, case: MedusaCase
    ) -> Explanation:
        """Attention of every scale over the picture, and what spoke for the called class."""
        assert isinstance(module, MedusaModule)
        prediction = module.predict_step([case], 0)[0]
        name = settings.data.classes[prediction.called]
        title = f"{name} ({prediction.probabilities[prediction.called]:.2f})"
        return module.explain(case, prediction.called, title)

    def contenders(self, settings: MedusaSettings) -> list[Contender]:
        """MEDUSA beside its backbone alone, other attentions and timm, on a batch of pictures."""
        count = min(settings.trainer.batch, 4)
        labels = torch.arange(count) % settings.model.classes

        def loss(output: Tensor) -> Tensor:
            return class_loss(output, labels.to(output.device))

        def contender(name: str, build: Callable[[], nn.Module], missing: str | None) -> Contender:
            inputs = partial(bench_inputs, settings.data, count)
            return Contender(
                name=name, build=build, inputs=inputs, loss=loss, items=count, missing=missing
            )

        plain = replace(settings.model, gate="2sigmoid", head="channel", local=True)
        kinds: tuple[Literal["none", "se", "cbam"], ...] = ("none", "se", "cbam")
        peers = {kind: replace(plain, attention=kind) for kind in kinds}
        backbone = settings.model.backbone
        return [
            contender(f"MEDUSA ({backbone})", partial(Medusa, settings.model), None),
            contender(f"torchvision {backbone}", partial(Medusa, peers["none"]), None),
            contender(f"{backbone} + SE", partial(Medusa, peers["se"]), None),
            contender(f"{backbone} + CBAM", partial(Medusa, peers["cbam"]), None),
            contender(f"timm {backbone}", partial(_TimmPeer, settings.model), _missing_timm()),
        ]

    def stages(self, settings: MedusaSettings) -> Mapping[str, Callable[[], object]]:
        """From a png of 1024 x 1024 pixels to class scores."""
        grey = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
        file = BytesIO()
        Image.fromarray(np.rint(255 * grey).astype(np.uint8)).save(file, format="png")
        data, options = settings.data, settings.training.augmentation
        case = MedusaCase(
            name="picture",
            main=resize_grey(grey, data.size),
            body=resize_grey(grey, data.body_size),
        )
        batch = to_batch([case])
        model = self.model(settings).eval()

        def read() -> object:
            with TemporaryDirectory() as folder:  # writing takes a small part of the time
                path = Path(folder) / "picture.png"
                path.write_bytes(file.getvalue())
                return read_grey(path)

        def run() -> object:
            with torch.inference_mode():
                return model(batch["main"], batch["body"])

        return {
            "read": read,
            "resize": lambda: [resize_grey(grey, size) for size in (data.size, data.body_size)],
            "augment": lambda: vary_case(case, np.random.default_rng(0), options),
            "network": run,
        }


def predictions_of(rows: Sequence[Row], names: Sequence[str]) -> Predictions:
    """The rows of `score` as arrays."""
    groups = {str(r["patient"] or r["case"]): 0 for r in rows}
    numbers = {group: number for number, group in enumerate(groups)}
    return Predictions(
        names=tuple(names),
        labels=np.array([names.index(str(r["label"])) for r in rows]),
        called=np.array([names.index(str(r["called"])) for r in rows]),
        probabilities=np.array([[float(r[f"p {name}"] or 0.0) for name in names] for r in rows]),
        groups=np.array([numbers[str(r["patient"] or r["case"])] for r in rows]),
    )


def _source_tables(rows: Sequence[Row]) -> list[Table]:
    """The accuracy per source, where the data name sources."""
    sources = sorted({str(row["source"]) for row in rows if row["source"]})
    if not sources:
        return []
    table: list[Row] = []
    for source in sources:
        hits = [int(row["correct"] or 0) for row in rows if row["source"] == source]
        table.append({"source": source, "cases": len(hits), "accuracy": float(np.mean(hits))})
    return [Table(title="accuracy per source", rows=table)]


class _TimmPeer(nn.Module):
    """A network of timm on the main picture alone."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        import timm

        self.net = timm.create_model(config.backbone, num_classes=config.classes)

    def forward(self, main: Tensor, body: Tensor) -> Tensor:
        logits: Tensor = self.net(main)
        return logits


def _missing_timm() -> str | None:
    from importlib.util import find_spec

    return None if find_spec("timm") else "timm is not installed (heed-medical[encoders])"


RECIPE = MedusaRecipe()
