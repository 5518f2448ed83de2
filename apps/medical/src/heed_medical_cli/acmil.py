"""The recipe of ACMIL: multiple instance learning on patch features (arXiv 2311.07125)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_medical.acmil import AcmilConfig, BagClassifier, BagOutput, acmil_loss, load_official
from heed_medical.acmil.network import MULTI_BRANCH
from heed_medical.acmil.weights import NAMED
from heed_medical.bags.bag import Bag, BagFile
from heed_medical.bags.checking import check_data
from heed_medical.bags.data import BagBatch, BagSet, pad_bags, plan_data, thin_out
from heed_medical.bags.files import read_bag
from heed_medical.bags.heatmap import find_thumbnail
from heed_medical.bags.listing import broken_rows, find_bags, find_inputs, list_bags
from heed_medical.bags.metrics import (
    bootstrap_intervals,
    classification_scores,
    concentration,
    confusion,
    roc_auc,
    top_mass,
)
from heed_medical.bags.prediction import BagPrediction, write_prediction
from heed_medical.bags.sample import write_sample
from heed_medical.bags.settings import BagData
from heed_medical.bags.splits import patients_in_several_splits
from heed_medical.slides.writing import write_features
from heed_medical_cli.bag_pictures import (
    draw_concentration,
    draw_confusion,
    draw_heatmaps,
    draw_mean_concentration,
    draw_roc,
)
from heed_medical_cli.leaks import warn_of_leaks, warn_of_left_out
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
    Table,
)
from heed_runtime.settings import TrainerSettings

BENCH_PATCHES = 50_000
TOP = 10
"""Patches whose share of the attention is the headline."""
TOPS = (1, 2, 5, TOP, 20, 50, 100, 200, 500, 1000)
"""Patches whose share of the attention is in the curve over a data set."""

LAYOUT = """\
CLAM      h5_files/SLIDE.h5 or pt_files/SLIDE.pt   features, coords; patches/SLIDE.h5 for sizes
TRIDENT   features_ENCODER/SLIDE.h5                features (n, d) or (1, n, d), coords
ACMIL     patch_feats_pretrain_ENCODER.h5          a group per slide: feat, coords, label
plain     SLIDE.npy, SLIDE.npz, SLIDE.pt           (n, d)
table     one csv or csv.gz                        a row per patch: label, bag, features

Labels: a csv or jsonl with slide_id (or path), label; case_id, split where known.
Splits: a column `split`, split*.json (train_names ...), split*.csv (train, val, test),
        --data.folds, or else 70/10/20 by patient."""


@dataclass(frozen=True, kw_only=True)
class AcmilTraining:
    """The loss and its minimisation; the defaults are the paper's."""

    learning_rate: float = 1e-4
    """Of AdamW, at the start; falls to 0 on half a cosine."""
    weight_decay: float = 1e-5
    branch_weight: float = 1.0
    """Weight of the branches' own classification."""
    diversity_weight: float = 1.0
    """Weight of the similarity between the attention of branches, which is minimised."""
    max_patches: int | None = None
    """Draw at most so many patches of a bag in each epoch. None: all."""
    weights: Path | None = None
    """An official checkpoint to start from (acmil-ga, acmil-mha, gated, mha)."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("weight_decay", "branch_weight", "diversity_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"max_patches must be at least 1, got {self.max_patches}")


@dataclass(frozen=True, kw_only=True)
class AcmilSettings:
    """All settings of ACMIL."""

    model: AcmilConfig = field(default_factory=AcmilConfig)
    data: BagData = field(default_factory=BagData)
    training: AcmilTraining = field(default_factory=AcmilTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        weights = (self.training.branch_weight, self.training.diversity_weight)
        if self.model.kind not in MULTI_BRANCH and weights != (1.0, 1.0):
            raise ValueError(
                f"branch_weight and diversity_weight have no effect with kind={self.model.kind!r}"
            )
        if self.training.weights is not None and self.model.kind not in NAMED:
            raise ValueError(f"training.weights needs a kind of {NAMED}, got {self.model.kind!r}")


def small() -> AcmilSettings:
    """ACMIL-GA for a laptop: the paper's network, a higher learning rate, 40 epochs, 4 bags."""
    return AcmilSettings(
        training=AcmilTraining(learning_rate=1e-3), trainer=TrainerSettings(max_epochs=40, batch=4)
    )


def paper() -> AcmilSettings:
    """ACMIL-GA as published: one bag per step, 50 epochs."""
    return AcmilSettings(trainer=TrainerSettings(max_epochs=50, batch=1))


def paper_mha() -> AcmilSettings:
    """ACMIL-MHA as published."""
    return replace(paper(), model=AcmilConfig(kind="acmil-mha"))


class AcmilModule(L.LightningModule):
    """Loss, optimiser and validation of ACMIL and its baselines."""

    def __init__(self, model: BagClassifier, settings: AcmilSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self._validated: list[tuple[tuple[float, ...], int]] = []

    def training_step(self, batch: BagBatch, _: int) -> Tensor:
        """The loss of a batch of bags."""
        loss = acmil_loss(
            self.model.outputs(batch.features, batch.key_mask),
            batch.labels,
            branch_weight=self.settings.training.branch_weight,
            diversity_weight=self.settings.training.diversity_weight,
        )
        values = {"train/loss": loss.total, "train/bag_loss": loss.bag}
        if self.model.branch_heads:
            values |= {"train/branch_loss": loss.branch, "train/diversity": loss.diversity}
        count = len(batch.labels)
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss.total

    def validation_step(self, cases: list[Bag], _: int) -> None:
        """Collect the probabilities of labelled bags, and log their loss."""
        for case in cases:
            assert case.label is not None
            logits = self._outputs(case).logits.float()
            label = torch.tensor([case.label], device=logits.device)
            loss = F.cross_entropy(logits, label)
            self.log("val/loss", loss, on_epoch=True, batch_size=1, sync_dist=True)
            self._validated.append((tuple(logits.double().softmax(1)[0].tolist()), case.label))

    def on_validation_epoch_end(self) -> None:
        """Log the scores over all bags of all processes; their sum selects the weights."""
        found = [item for part in distributed.gather(self._validated) for item in part]
        self._validated = []
        if not found:
            return
        probabilities = np.array([row for row, _ in found])
        scores = classification_scores(probabilities, np.array([label for _, label in found]))
        # With one class in the validation there is no AUC; F1 alone selects then.
        selection = scores["f1"] + float(np.nan_to_num(scores["auc"]))
        self.log("val/f1_plus_auc", selection, prog_bar=True)
        self.log("val/f1", scores["f1"])
        self.log("val/auc", scores["auc"])

    def predict_step(self, cases: list[Bag], _: int) -> list[BagPrediction]:
        """Probabilities and attention of whole bags."""
        return [self._predict(case) for case in cases]

    def configure_optimizers(self) -> Any:
        """AdamW, half a cosine per step."""
        training = self.settings.training
        adam = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(steps, 1))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _outputs(self, case: Bag) -> BagOutput:
        features = torch.from_numpy(case.features)[None].to(self.device)
        return self.model.outputs(features)

    def _predict(self, case: Bag) -> BagPrediction:
        output = self._outputs(case)
        attention = output.weights[0].mean(dim=0)  # (t, n)
        return BagPrediction(
            name=case.name,
            probabilities=tuple(output.logits[0].double().softmax(0).tolist()),
            attention=attention.detach().float().cpu().numpy(),
            coords=case.coords,
            patch_size=case.patch_size,
            slide_size=case.slide_size,
            label=case.label,
            path=case.path,
        )


class AcmilRecipe(Recipe[AcmilSettings, Bag, BagPrediction]):
    """Classify slides from the features of their patches."""

    card: ClassVar[Card] = Card(
        name="acmil",
        title="ACMIL: attention-challenging multiple instance learning",
        task="classification of whole slides from patch features",
        reads=("CLAM, TRIDENT and ACMIL h5", "pt, npy and npz", "csv tables of bags"),
        writes="json of probabilities, csv and GeoJSON (QuPath) of attention",
        paper="Zhang et al., ECCV 2024, arXiv 2311.07125",
        layout=LAYOUT,
        verified="equal to the official networks, losses and gradients on fixed weights; "
        "exact parameter counts at all published widths",
        trained="musk1 (UCI), 5 x 10 folds: accuracy 0.80 and AUC 0.89 with acmil-ga, 0.82 and "
        "0.90 with gated (stated: 0.874 of a support vector machine)",
        reproduced="none: the paper's slide features are not public here",
        notice="research use only: not a medical device",
    )
    settings: ClassVar[type[AcmilSettings]] = AcmilSettings
    presets: ClassVar[Mapping[str, Callable[[], AcmilSettings]]] = {
        "small": small,
        "paper": paper,
        "paper-mha": paper_mha,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/f1_plus_auc", "max")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.features",
        "data.labels",
        "data.splits",
        "data.patch_size",
        "data.thumbnails",
        "data.geojson_patches",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """Synthetic slides with clusters of tumour patches, in CLAM's layout."""
        write_sample(out, seed=seed)

    def check(self, settings: AcmilSettings, root: Path) -> Check:
        """Read every bag."""
        found = check_data(settings.data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: AcmilSettings, root: Path) -> AcmilSettings:
        """Take classes and channels from the data."""
        data = plan_data(settings.data, root)
        listing = list_bags(root, data)
        warn_of_left_out(listing.warnings)
        warn_of_leaks(root, patients_in_several_splits(listing.files))
        assert data.in_dim is not None
        model = replace(settings.model, classes=len(data.classes), in_dim=data.in_dim)
        return replace(settings, model=model, data=data)

    def train_data(self, settings: AcmilSettings, root: Path) -> BagSet:
        """The training bags."""
        files = find_bags(root, settings.data, "train")
        return BagSet(files, settings.data, skipped=_skipped(settings.data, root))

    def augment(self, settings: AcmilSettings) -> Callable[[Bag, np.random.Generator], Bag] | None:
        """Some of the patches of a large bag, where that is asked for."""
        most = settings.training.max_patches
        return None if most is None else partial(thin_out, most=most)

    def collate(self, samples: list[Bag]) -> BagBatch:
        """Pad the bags of a batch to one size."""
        return pad_bags(samples)

    def cases(self, settings: AcmilSettings, root: Path, split: str) -> BagSet:
        """Whole bags with their labels."""
        files = find_bags(root, settings.data, split)
        skipped = _skipped(settings.data, root)
        return BagSet(files, replace(settings.data, cache_mb=0), skipped=skipped)

    def inputs(self, settings: AcmilSettings, paths: Sequence[Path]) -> BagSet:
        """Whole bags."""
        return BagSet(find_inputs(paths, settings.data), replace(settings.data, cache_mb=0))

    def model(self, settings: AcmilSettings) -> BagClassifier:
        """The network."""
        return BagClassifier(settings.model)

    def start(self, settings: AcmilSettings, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, BagClassifier)
        if settings.training.weights is not None:
            load_official(model, settings.training.weights)

    def module(self, settings: AcmilSettings, model: nn.Module) -> AcmilModule:
        """The network with its loss."""
        assert isinstance(model, BagClassifier)
        return AcmilModule(model, settings)

    def write_prediction(
        self, settings: AcmilSettings, prediction: BagPrediction, out: Path
    ) -> list[Path]:
        """Probabilities as json, attention as csv and GeoJSON."""
        names, most = settings.data.class_names, settings.data.geojson_patches
        return write_prediction(prediction, out, names, geojson_patches=most)

    def score(self, settings: AcmilSettings, prediction: BagPrediction) -> list[Row]:
        """The probabilities of the classes, and how concentrated the attention is."""
        assert prediction.label is not None
        names = settings.data.class_names
        mean = prediction.mean_attention
        best = int(np.argmax(prediction.probabilities))
        probabilities = zip(names, prediction.probabilities, strict=True)
        return [
            {
                "case": prediction.name,
                "label": names[prediction.label],
                "predicted": names[best],
                **{f"p({name})": value for name, value in probabilities},
                "patches": len(mean),
                **{f"top{count}_attention": top_mass(mean, count) for count in TOPS},
            }
        ]

    def report(self, settings: AcmilSettings, rows: Sequence[Row]) -> Report:
        """Accuracy, macro F1 and AUC with bootstrap intervals, per class; concentration."""
        names = settings.data.class_names
        probabilities = np.array([[float(row[f"p({n})"] or 0.0) for n in names] for row in rows])
        labels = np.array([names.index(str(row["label"])) for row in rows])
        scores = classification_scores(probabilities, labels)
        spans = bootstrap_intervals(probabilities, labels, seed=settings.trainer.seed)
        counts = confusion(probabilities.argmax(axis=1), labels, len(names))
        masses = [float(row[f"top{TOP}_attention"] or 0.0) for row in rows]
        curve = _mean_concentration(rows)
        table: list[Row] = [
            {"score": name, "value": value, "low (95 %)": spans[name][0], "high": spans[name][1]}
            for name, value in scores.items()
        ]
        return Report(
            metrics={**scores, f"top{TOP}_attention": float(np.mean(masses))},
            tables=[
                Table(title="scores", rows=table),
                Table(title="per class", rows=_per_class(counts, probabilities, labels, names)),
                Table(title="concentration", rows=curve),
            ],
            plots={
                "roc": draw_roc(probabilities, labels, names),
                "confusion": draw_confusion(counts, names),
                "concentration": draw_mean_concentration(curve),
            },
        )

    def explain(self, settings: AcmilSettings, module: L.LightningModule, case: Bag) -> Explanation:
        """Attention over the slide, of all branches and each, and how concentrated it is."""
        assert isinstance(module, AcmilModule)
        prediction = module.predict_step([case], 0)[0]
        mean = prediction.mean_attention
        arrays: dict[str, np.ndarray] = {
            "attention": mean,
            "branch_attention": prediction.attention,
            "concentration": concentration(mean),
        }
        figures = {"concentration": draw_concentration(prediction)}
        if prediction.coords is not None:
            arrays["coords"] = prediction.coords
        if prediction.coords is not None and prediction.patch_size is not None:
            thumbnail = find_thumbnail(
                case.name, case.path, settings.data.thumbnails, case.slide_size
            )
            figures["heatmap"] = draw_heatmaps(prediction, thumbnail, settings.data.class_names)
        return Explanation(name=case.name, arrays=arrays, figures=figures)

    def exportable(self, settings: AcmilSettings, model: nn.Module) -> Exportable:
        """Bags of any size to class scores and attention."""
        assert isinstance(model, BagClassifier)
        auto = torch.export.Dim.AUTO
        width = settings.model.in_dim
        shapes = ((1, 300, width), (1, 77, width))
        return Exportable(
            model=ScoresAndAttention(model, settings.data).eval(),
            examples=[(torch.randn(shape),) for shape in shapes],
            dynamic_shapes=({1: auto},),
            input_names=("features",),
            output_names=("logits", "attention"),
            refused=_refused(settings),
        )

    def contenders(self, settings: AcmilSettings) -> list[Contender]:
        """ACMIL and the baselines on one bag of 50,000 patches."""
        shape = (1, BENCH_PATCHES, settings.model.in_dim)
        config = settings.model
        single = AcmilConfig(
            kind="gated",
            in_dim=config.in_dim,
            inner_dim=config.inner_dim,
            hidden=config.hidden,
            classes=config.classes,
        )
        several = replace(config, kind="acmil-ga")
        networks: dict[str, Callable[[], nn.Module]] = {
            f"ACMIL-GA ({several.branches} branches)": partial(WithOutputs, several),
            "gated ABMIL (heed)": partial(WithOutputs, single),
            "gated ABMIL (plain torch)": partial(PlainGatedAbmil, single),
            "mean pooling": partial(WithOutputs, replace(single, kind="mean", hidden=128)),
        }
        return [
            Contender(name=name, build=build, inputs=partial(_bench_bag, shape), loss=_bench_loss)
            for name, build in networks.items()
        ]

    def stages(self, settings: AcmilSettings) -> Mapping[str, Callable[[], object]]:
        """From a file with the features of 50,000 patches to class scores, and a training step."""
        folder = TemporaryDirectory()
        path = Path(folder.name) / "slide.h5"
        features = _bench_bag((1, BENCH_PATCHES, settings.model.in_dim))[0]
        write_features(path, features[0].half().numpy(), None, patch_size=None)
        model = WithOutputs(settings.model)

        def read() -> object:
            return folder and read_bag(BagFile(name="slide", path=path))  # the folder must live

        def look() -> object:
            model.eval()
            with torch.inference_mode():
                return model(features)

        def learn() -> object:
            model.train().zero_grad()
            _bench_loss(model(features)).backward()  # type: ignore[no-untyped-call]
            return None

        return {"read": read, "network": look, "training step": learn}


def _skipped(data: BagData, root: Path) -> tuple[str, ...]:
    return broken_rows(root, data) if data.on_error == "skip" else ()


class ScoresAndAttention(nn.Module):
    """What is exported: class scores (b, k) and the mean attention (b, n) of features as in files.

    Where the training standardised the channels, so does the program.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: BagClassifier, data: BagData) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", data.feature_mean), ("std", data.feature_std)):
            self.register_buffer(name, torch.tensor(values) if values else None)

    def forward(
        self, features: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b n"]]:
        """Scores and attention."""
        if self.mean is not None and self.std is not None:
            features = (features - self.mean) / self.std
        output = self.model.outputs(features)
        return output.logits, output.weights.mean(dim=(1, 2))


class WithOutputs(BagClassifier):
    """Gives everything that the loss needs, for the benchmark."""

    def forward(self, features: Tensor, key_mask: Tensor | None = None) -> BagOutput:  # type: ignore[override]
        """All outputs."""
        return self.outputs(features, key_mask)


class PlainGatedAbmil(nn.Module):
    """Gated attention pooling in plain torch, of the same widths: a peer for the benchmark."""

    def __init__(self, config: AcmilConfig) -> None:
        super().__init__()
        width = config.width
        self.reduce = nn.Sequential(nn.Linear(config.in_dim, width, bias=False), nn.ReLU())
        self.tanh = nn.Sequential(nn.Linear(width, config.hidden), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(width, config.hidden), nn.Sigmoid())
        self.score = nn.Linear(config.hidden, 1)
        self.head = nn.Linear(width, config.classes)

    def forward(self, features: Float[Tensor, "1 n d"]) -> BagOutput:
        """Class scores."""
        h = self.reduce(features[0])
        weights = self.score(self.tanh(h) * self.gate(h)).T.softmax(dim=1)
        return BagOutput(logits=self.head(weights @ h))


def _bench_bag(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)),)


def _bench_loss(output: Any) -> Tensor:
    labels = torch.ones(len(output.logits), dtype=torch.long, device=output.logits.device)
    return acmil_loss(output, labels).total


def _refused(settings: AcmilSettings) -> Mapping[Literal["export", "onnx"], str]:
    if settings.model.kind != "transmil":
        return {}
    why = "the square layout of transmil depends on the number of patches"
    return {"export": why, "onnx": why}


def _mean_concentration(rows: Sequence[Row]) -> list[Row]:
    """How much of the attention of a slide its most attended patches hold, over all slides.

    A slide with fewer patches holds all of its attention in them. The curve ends where that is so
    for every slide.
    """
    patches = np.array([int(row["patches"] or 0) for row in rows])
    curve: list[Row] = []
    for count in TOPS:
        shares = np.array([float(row[f"top{count}_attention"] or 0.0) for row in rows])
        low, high = np.quantile(shares, (0.25, 0.75))
        curve.append(
            {
                "most attended patches": count,
                "mean share": float(shares.mean()),
                "low quartile": float(low),
                "high quartile": float(high),
                "even attention": float(np.minimum(count / patches, 1).mean()),
            }
        )
        if count >= patches.max():
            break
    return curve


def _per_class(
    counts: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[Row]:
    rows: list[Row] = []
    for number, name in enumerate(names):
        hits, said, true = counts[number, number], counts[:, number].sum(), counts[number].sum()
        rows.append(
            {
                "class": name,
                "bags": int(true),
                "precision": float(hits / said) if said else None,
                "recall": float(hits / true) if true else None,
                "auc": roc_auc(probabilities[:, number], labels == number),
            }
        )
    return rows


RECIPE = AcmilRecipe()
