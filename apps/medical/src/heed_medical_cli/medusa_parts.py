"""What the recipes of MEDUSA share, whether pictures have one class or several findings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from heed_medical.medusa import Medusa, MedusaConfig, load_backbone, load_body
from heed_medical.medusa.inputs import CaseData, MedusaBatch, MedusaCase, MedusaData, TrainData
from heed_medical.medusa.inputs import to_batch as batch_of
from heed_medical.medusa.maps import picture_maps
from heed_medical.pictures.augmentation import PictureAugmentation
from heed_medical.pictures.layouts import broken_rows, find_inputs, find_pictures
from heed_medical_cli.classification_plots import draw_maps
from heed_medical_cli.pretrained import BackboneWeights, of_imagenet, weights_file
from heed_runtime.recipe import Explanation, Exportable, Named, Recipe
from heed_runtime.settings import TrainerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureTraining:
    """The minimisation of the loss, and what it starts from."""

    learning_rate: float = 2e-4
    """Of Adam, at the start."""
    augment: bool = True
    """Whether training pictures are varied."""
    augmentation: PictureAugmentation = field(default_factory=PictureAugmentation)
    backbone_weights: BackboneWeights = None
    """Weights of the torchvision network to start the backbone from: a file, or imagenet for
    torchvision's own, which are downloaded unless the folder of torch.hub has them."""
    body_weights: Path | None = None
    """Weights of a body to start from: of a run of medusa-body, or of another MEDUSA."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """All settings of a MEDUSA."""

    model: MedusaConfig = field(default_factory=MedusaConfig)
    data: MedusaData = field(default_factory=MedusaData)
    training: PictureTraining = field(default_factory=PictureTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        self.model.refuse_sizes(self.data.size, self.data.body_size)
        if self.training.body_weights is not None:
            self.need_body("body_weights")

    def need_body(self, name: str) -> None:
        """Refuse a setting of the training that has no effect without a body.

        Raises:
            ValueError: The network has none.
        """
        if self.model.attention != "medusa":
            raise ValueError(f"training.{name} has no effect with attention={self.model.attention}")


SettingsT = TypeVar("SettingsT", bound=PictureSettings)
PredictionT = TypeVar("PredictionT", bound=Named)


def small_model() -> MedusaConfig:
    """A network for a laptop: ResNet-18, a third of the body's width."""
    return MedusaConfig(backbone="resnet18", body_widths=(8, 16, 32, 64, 128))


class PictureModule(L.LightningModule):
    """A MEDUSA that sees cases."""

    model: Medusa

    def batch(self, cases: Sequence[MedusaCase]) -> MedusaBatch:
        """The inputs and labels of cases, on the device."""
        batch = batch_of(cases)
        return {
            "main": batch["main"].to(self.device),
            "body": batch["body"].to(self.device),
            "label": batch["label"].to(self.device),
        }

    def explain(self, case: MedusaCase, target: int, title: str) -> Explanation:
        """Attention of every scale over the picture, and what spoke for an output."""
        maps = picture_maps(self.model, self.batch([case]), target=target)
        neutral = 0.5 if self.model.config.gate == "sigmoid" else 1.0
        figure = draw_maps(case.main, maps, title=title, neutral=neutral)
        return Explanation(name=case.name, arrays=maps.arrays(), figures={"attention": figure})


class PictureRecipe(Recipe[SettingsT, MedusaCase, PredictionT], Generic[SettingsT, PredictionT]):
    """Pictures in, the network, its export."""

    def train_data(self, settings: SettingsT, root: Path) -> TrainData:
        """The training pictures, one or one of each class at a time."""
        files = find_pictures(root, settings.data, "train")
        return TrainData(files, settings.data, skipped=_skipped(settings.data, root))

    def cases(self, settings: SettingsT, root: Path, split: str) -> CaseData:
        """The labelled pictures of a split."""
        files = find_pictures(root, settings.data, split)
        return CaseData(files, settings.data, skipped=_skipped(settings.data, root))

    def inputs(self, settings: SettingsT, paths: Sequence[Path]) -> CaseData:
        """Pictures, without labels."""
        return CaseData(find_inputs(paths), settings.data)

    def model(self, settings: SettingsT) -> Medusa:
        """The network: body and backbone start at random, every gate at 1."""
        return Medusa(settings.model)

    def start(self, settings: SettingsT, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, Medusa)
        named, config = settings.training.backbone_weights, settings.model
        if named is not None:
            load_backbone(model, weights_file(named, config.backbone))
        if settings.training.body_weights is not None:
            load_body(model, settings.training.body_weights)

    def exportable(self, settings: SettingsT, model: nn.Module) -> Exportable:
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


def warn_of_scale(settings: PictureSettings) -> None:
    """Log that weights of ImageNet are about to be given pictures of another scale."""
    weights, model = settings.training.backbone_weights, settings.model
    if model.normalise == "unit" and of_imagenet(weights, model.backbone):
        logger.warning(
            "weights of ImageNet expect --model.normalise imagenet, but the backbone is given "
            "values within 0..1"
        )


def bench_inputs(data: MedusaData, count: int) -> tuple[Tensor, ...]:
    """Random pictures at both sizes, always the same."""
    generator = torch.Generator().manual_seed(0)
    main = torch.rand((count, 3, *data.size), generator=generator)
    return main, torch.randn((count, 1, *data.body_size), generator=generator)


def _skipped(data: MedusaData, root: Path) -> tuple[str, ...]:
    return broken_rows(root, data) if data.on_error == "skip" else ()
