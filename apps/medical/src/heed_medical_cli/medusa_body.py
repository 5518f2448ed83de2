"""The recipe that trains the body of MEDUSA alone: lung masks of chest X-rays.

A MEDUSA then starts from it: `train medusa --training.body-weights RUN/model/model.safetensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_medical.medusa import MedusaConfig, UNetBody, body_loss
from heed_medical.medusa.lungs import (
    LungBatch,
    LungData,
    LungPicture,
    lung_probability,
    only_picture,
    segment_lungs,
    to_lung_batch,
    vary_lungs,
)
from heed_medical.medusa.phantoms import write_lungs
from heed_medical.pictures.augmentation import PictureAugmentation
from heed_medical.segmentation.cases import SegmentationCase
from heed_medical.segmentation.layouts import find_cases, left_out, list_cases
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.prediction import SegmentationPrediction
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.splits import patients_in_several_splits
from heed_medical_cli.classification_plots import draw_probability
from heed_medical_cli.leaks import warn_of_leaks
from heed_medical_cli.segmentation_recipe import SegmentationRecipe, mean_dice
from heed_runtime.recipe import Card, Contender, Explanation, Exportable
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
pairs   images/NAME.png   masks/NAME.png   labels.csv: file, mask, split
png     {train,val,test}/Img/NAME.png      .../GT/NAME.png

Masks of one class (--data.label-mode binary makes one of several; --data.ignore leaves values out).
Pictures are resized to --data.size, as MEDUSA resizes them."""


@dataclass(frozen=True, kw_only=True)
class BodyConfig:
    """All that is needed to rebuild the body."""

    widths: tuple[int, ...] = MedusaConfig().body_widths
    """Channels of the levels, the finest first: the body_widths of the MEDUSA to come."""

    def __post_init__(self) -> None:
        MedusaConfig(body_widths=self.widths)


@dataclass(frozen=True, kw_only=True)
class BodyTraining:
    """The minimisation of the loss."""

    learning_rate: float = 1e-3
    """Of Adam; it falls to zero along a cosine."""
    augmentation: PictureAugmentation = field(default_factory=PictureAugmentation)

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


def _data(size: int) -> SegmentationData:
    return SegmentationData(size=(size, size), channels="grey", colour="grey")


@dataclass(frozen=True, kw_only=True)
class BodySettings:
    """All settings of the body's training."""

    model: BodyConfig = field(default_factory=BodyConfig)
    data: SegmentationData = field(default_factory=lambda: _data(256))
    training: BodyTraining = field(default_factory=BodyTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        multiple = MedusaConfig(body_widths=self.model.widths).body_multiple
        if self.data.size is None or any(side % multiple for side in self.data.size):
            raise ValueError(f"data.size must be multiples of {multiple}, got {self.data.size}")


def small() -> BodySettings:
    """The body of MEDUSA's preset small, at 96 pixels."""
    return BodySettings(
        model=BodyConfig(widths=(8, 16, 32, 64, 128)),
        data=_data(96),
        trainer=TrainerSettings(max_epochs=15, batch=4),
    )


def paper() -> BodySettings:
    """The body of MEDUSA's preset paper, at 256 pixels; the schedule is ours."""
    return BodySettings(trainer=TrainerSettings(max_epochs=100, batch=8))


class BodyModule(L.LightningModule):
    """Loss, optimiser and validation of the body."""

    def __init__(self, model: UNetBody, settings: BodySettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: LungBatch, _: int) -> Tensor:
        """The loss of a batch of pictures."""
        logits = self.model.mask_logits(batch["body"])
        loss = body_loss(logits, batch["mask"], batch["counted"])
        count = len(logits)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss

    def validation_step(self, cases: list[SegmentationCase], _: int) -> None:
        """Dice of whole pictures, as the evaluation computes it."""
        for prediction in self.predict_step(cases, 0):
            dice = mean_dice(prediction, self.settings.data.table.names)
            self.log("val/dice", dice, on_epoch=True, batch_size=1, sync_dist=True)

    def predict_step(self, cases: list[SegmentationCase], _: int) -> list[SegmentationPrediction]:
        """Lung masks of pictures."""
        size = self.settings.data.size
        assert size is not None
        return [segment_lungs(self.model, case, size, device=self.device) for case in cases]

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate along a cosine."""
        adam = torch.optim.Adam(self.model.parameters(), lr=self.settings.training.learning_rate)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class _Masks(nn.Module):
    """The body with its mask scores as the output."""

    def __init__(self, body: UNetBody) -> None:
        super().__init__()
        self.body = body

    def forward(self, picture: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        return self.body.mask_logits(picture)


class BodyRecipe(SegmentationRecipe[BodySettings]):
    """Train the body of MEDUSA on lung masks."""

    card: ClassVar[Card] = Card(
        name="medusa-body",
        title="The body of MEDUSA alone: lung masks",
        task="segmentation of lungs, to start MEDUSA from",
        reads=("png and jpg with masks",),
        writes="png masks",
        paper="Aboutalebi et al., Frontiers in Medicine 2022, arXiv 2110.06063",
        layout=LAYOUT,
        verified="reconstructed: the paper says that the body is a U-Net, not how wide it is",
        trained="57 X-rays with lung masks, preset small, a minute: Dice 0.87 on 17 others",
        reproduced="none: the paper gives no numbers for it",
        notice="research use only: not a medical device; MEDUSA is a reconstruction",
    )
    settings: ClassVar[type[BodySettings]] = BodySettings
    presets: ClassVar[Mapping[str, Callable[[], BodySettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/dice", "max")

    def sample(self, out: Path, *, seed: int) -> None:
        """Chests with the masks of their lungs."""
        write_lungs(out, seed=seed)

    def plan(self, settings: BodySettings, root: Path) -> BodySettings:
        """Take the values of the masks from the data."""
        data = plan_data(settings.data, root)
        warn_of_leaks(root, patients_in_several_splits(list_cases(root, data).cases))
        if len(data.table) != 2:
            raise InputError(
                f"has masks of {len(data.table) - 1} classes "
                f"({', '.join(data.table.names[1:])}), one is needed",
                path=root,
                remedy="use --data.label-mode binary, or --data.ignore VALUE",
            )
        return BodySettings(
            model=settings.model, data=data, training=settings.training, trainer=settings.trainer
        )

    def train_data(self, settings: BodySettings, root: Path) -> LungData:
        """The training pictures with their masks."""
        files = find_cases(root, settings.data, "train")
        return LungData(files, settings.data, skipped=left_out(root, settings.data))

    def augment(
        self, settings: BodySettings
    ) -> Callable[[LungPicture, np.random.Generator], LungPicture]:
        """Move picture and mask together."""
        options = settings.training.augmentation
        return lambda sample, rng: vary_lungs(sample, rng, options)

    def collate(self, samples: list[LungPicture]) -> LungBatch:
        """The pictures of all samples."""
        return to_lung_batch(samples)

    def model(self, settings: BodySettings) -> UNetBody:
        """The body, at random."""
        return UNetBody(1, settings.model.widths)

    def module(self, settings: BodySettings, model: nn.Module) -> BodyModule:
        """The body with its loss."""
        assert isinstance(model, UNetBody)
        return BodyModule(model, settings)

    def explain(
        self, settings: BodySettings, module: L.LightningModule, case: SegmentationCase
    ) -> Explanation:
        """The lung probability over the picture: the body has no attention of its own."""
        assert isinstance(module, BodyModule)
        assert settings.data.size is not None
        size = settings.data.size
        inside = lung_probability(module.model, case, size, device=module.device)
        return Explanation(
            name=case.name,
            arrays={"probability": inside},
            figures={"lungs": draw_probability(only_picture(case), inside, "lung probability")},
        )

    def exportable(self, settings: BodySettings, model: nn.Module) -> Exportable:
        """Any number of standardised grey pictures of the trained size to mask scores."""
        assert isinstance(model, UNetBody)
        assert settings.data.size is not None
        size = settings.data.size
        return Exportable(
            model=_Masks(model).eval(),
            examples=[(torch.randn(n, 1, *size),) for n in (2, 3)],
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            input_names=("picture",),
            output_names=("logits",),
        )

    def contenders(self, settings: BodySettings) -> list[Contender]:
        """The body beside MONAI's U-Net of the same widths."""
        from monai.networks.nets.basic_unet import BasicUNet

        size, widths = settings.data.size, settings.model.widths
        assert size is not None
        generator = torch.Generator().manual_seed(0)
        mask = (torch.rand((4, 1, *size), generator=generator) > 0.5).float()

        def inputs() -> tuple[Tensor, ...]:
            return (torch.randn((4, 1, *size), generator=torch.Generator().manual_seed(1)),)

        def loss(output: Tensor) -> Tensor:
            return body_loss(output, mask.to(output.device))

        def peer() -> nn.Module:
            return BasicUNet(
                spatial_dims=2, in_channels=1, out_channels=1, features=(*widths, widths[0])
            )

        ours = Contender(
            name="MEDUSA body",
            build=lambda: _Masks(UNetBody(1, widths)),
            inputs=inputs,
            loss=loss,
            items=4,
        )
        if len(widths) != 5:
            return [ours]
        return [
            ours,
            Contender(name="MONAI BasicUNet", build=peer, inputs=inputs, loss=loss, items=4),
        ]


RECIPE = BodyRecipe()
