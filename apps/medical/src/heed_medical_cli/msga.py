"""The recipe of MSGA: multi-scale self-guided attention (arXiv 1906.02849) on 2-D slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_medical.msga import Msga, MsgaConfig, load_backbone, load_official, msga_loss
from heed_medical.segmentation.augmentation import SliceAugmentation, augment
from heed_medical.segmentation.cases import SegmentationCase
from heed_medical.segmentation.layouts import find_cases, left_out, list_cases
from heed_medical.segmentation.phantoms import write_sample
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.prediction import SegmentationPrediction, predict_volume
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.slices import SliceData, SliceSample
from heed_medical.segmentation.splits import patients_in_several_splits
from heed_medical_cli.attention_maps import attention_maps
from heed_medical_cli.leaks import warn_of_leaks
from heed_medical_cli.pictures import draw_attention
from heed_medical_cli.pretrained import BackboneWeights, weights_file
from heed_medical_cli.segmentation_recipe import SegmentationRecipe, mean_dice
from heed_runtime.recipe import Card, Contender, Explanation, Exportable
from heed_runtime.settings import TrainerSettings

Loss = Callable[[Any], Tensor]
SMALL_SLICE = 48
"""Slices with a shorter side below this are enlarged twice: the network's grid is 4 x 4 pixels."""

LAYOUT = """\
msd     imagesTr/CASE.nii.gz          labelsTr/CASE.nii.gz   dataset.json or cases.csv
nnunet  imagesTr/CASE_0000.nii.gz     labelsTr/CASE.nii.gz   dataset.json; _0001 ... per modality
nifti   images/CASE.nii.gz            labels/CASE.nii.gz     or CASE-label.nii.gz beside it
png     {train,val,test}/Img/Subj_<s>slice_<k>.png           .../GT/ of the same name, grey
pairs   images/NAME.png               masks/ or labels/      labels.csv: file, mask, split
chaos   ID/T1DUAL/DICOM_anon/InPhase/*.dcm and ID/T1DUAL/Ground/*.png
brats   CASE/CASE_{flair,t1,t1ce,t2,seg}.nii.gz

Splits: folders, a column `split`, splits.json, or else 70/10/20 by patient."""


@dataclass(frozen=True, kw_only=True)
class MsgaTraining:
    """The loss and its minimisation; the defaults are the paper's."""

    learning_rate: float = 1e-3
    """Of Adam, at the start."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """plateau: halve the learning rate when the Dice of the validation stands still (the paper);
    cosine: let it fall to zero over the epochs, which suits short trainings."""
    halve_after: int = 50
    """Of plateau: after this many validations without a better Dice."""
    guide_weight: float = 0.25
    """Weight of the guidance between the two steps."""
    reconstruction_weight: float = 0.1
    """Weight of the autoencoders' reconstruction."""
    augmentation: SliceAugmentation = field(default_factory=SliceAugmentation)
    weights: Path | None = None
    """An official MSGA checkpoint to start from."""
    backbone_weights: BackboneWeights = None
    """Weights of the torchvision ResNet or ResNeXt to start the backbone from: a file, or imagenet
    for torchvision's own, which are downloaded unless the folder of torch.hub has them."""
    backbone_stem: Literal["sum", "mean"] = "sum"
    """How the colour channels of those weights' first convolution become the image's channels."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.halve_after < 1:
            raise ValueError(f"halve_after must be at least 1, got {self.halve_after}")
        if self.schedule == "cosine" and self.halve_after != 50:
            raise ValueError("halve_after has no effect with schedule=cosine")
        if min(self.guide_weight, self.reconstruction_weight) < 0:
            raise ValueError("guide_weight and reconstruction_weight must not be negative")
        if self.weights is not None and self.backbone_weights is not None:
            raise ValueError("weights already holds a backbone: leave backbone_weights out")
        if self.backbone_weights is None and self.backbone_stem != "sum":
            raise ValueError("backbone_stem has no effect without backbone_weights")


@dataclass(frozen=True, kw_only=True)
class MsgaSettings:
    """All settings of MSGA."""

    model: MsgaConfig = field(default_factory=MsgaConfig)
    data: SegmentationData = field(default_factory=SegmentationData)
    training: MsgaTraining = field(default_factory=MsgaTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)


def small() -> MsgaSettings:
    """A network and schedule for a laptop: ResNet-18, a quarter of the width, 40 epochs.

    Slices are not flipped: mirrored anatomy hides what tells left from right, front from back.
    """
    return MsgaSettings(
        model=MsgaConfig(backbone="resnet18", width=16),
        training=MsgaTraining(
            schedule="cosine", augmentation=SliceAugmentation(flip_probability=0.0)
        ),
        trainer=TrainerSettings(max_epochs=40, batch=16),
    )


def paper() -> MsgaSettings:
    """The network and schedule of the paper: ResNeXt-101 32x8d, 500 epochs, batches of 8."""
    return MsgaSettings(trainer=TrainerSettings(max_epochs=500, batch=8))


class MsgaModule(L.LightningModule):
    """Loss, optimiser and validation of MSGA."""

    def __init__(self, model: Msga, settings: MsgaSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: SliceSample, _: int) -> Tensor:
        """The loss of a batch of slices."""
        loss = msga_loss(
            self.model.outputs(batch["image"]),
            batch["label"],
            guide_weight=self.settings.training.guide_weight,
            reconstruction_weight=self.settings.training.reconstruction_weight,
        )
        values = {"train/loss": loss.total, "train/cross_entropy": loss.segmentation}
        count = len(batch["image"])
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss.total

    def validation_step(self, cases: list[SegmentationCase], _: int) -> None:
        """Dice of whole cases, as the evaluation computes it."""
        for case in cases:
            prediction = self._predict(case)
            dice = mean_dice(prediction, self.settings.data.table.names)
            self.log("val/dice", dice, on_epoch=True, batch_size=1, sync_dist=True, prog_bar=True)

    def predict_step(self, cases: list[SegmentationCase], _: int) -> list[SegmentationPrediction]:
        """Class numbers of whole cases."""
        return [self._predict(case) for case in cases]

    def configure_optimizers(self) -> Any:
        """Adam with the schedule of the settings."""
        training = self.settings.training
        adam = torch.optim.Adam(
            self.model.parameters(), lr=training.learning_rate, betas=(0.9, 0.99)
        )
        if training.schedule == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(steps, 1))
            return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            adam, mode="max", factor=0.5, patience=training.halve_after
        )
        schedule = {"scheduler": plateau, "monitor": "val/dice", "strict": False}
        return {"optimizer": adam, "lr_scheduler": schedule}

    def _predict(self, case: SegmentationCase) -> SegmentationPrediction:
        return predict_volume(
            self.model.logits,
            case,
            self.settings.data,
            batch=self.settings.trainer.batch,
            device=str(self.device),
        )


class MsgaRecipe(SegmentationRecipe[MsgaSettings]):
    """Segment CT, MR and pictures slice by slice."""

    card: ClassVar[Card] = Card(
        name="msga",
        title="MSGA: multi-scale self-guided attention",
        task="segmentation of slices of volumes, and of pictures",
        reads=("NIfTI", "DICOM series", "png and jpg", "nnU-Net and MSD folders"),
        writes="NIfTI in the input's frame, or png masks",
        paper="Sinha & Dolz, IEEE JBHI 2020, arXiv 1906.02849",
        layout=LAYOUT,
        verified="equal to the official network on fixed weights; 103,556,063 parameters",
        trained="hippocampus MR (MSD): Dice 0.81 on 20 test volumes, preset small, 5 epochs",
        reproduced="none: the paper's CHAOS test labels are not public",
        notice="research use only: not a medical device",
    )
    settings: ClassVar[type[MsgaSettings]] = MsgaSettings
    presets: ClassVar[Mapping[str, Callable[[], MsgaSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/dice", "max")

    def sample(self, out: Path, *, seed: int) -> None:
        """Volumes with organs whose class depends on where they lie, as an nnU-Net raw folder."""
        write_sample(out, layout="nnunet", seed=seed)

    def plan(self, settings: MsgaSettings, root: Path) -> MsgaSettings:
        """Take classes, channels, slicing direction and slice size from the data."""
        data = plan_data(settings.data, root)
        warn_of_leaks(root, patients_in_several_splits(list_cases(root, data).cases))
        channels = data.input_channels or settings.model.in_channels
        zoom = settings.model.zoom
        if zoom is None:
            assert data.size is not None
            zoom = 2 if min(data.size) < SMALL_SLICE else 1
        model = replace(settings.model, classes=len(data.table), in_channels=channels, zoom=zoom)
        return replace(settings, model=model, data=data)

    def train_data(self, settings: MsgaSettings, root: Path) -> SliceData:
        """Slices of the training cases."""
        files = find_cases(root, settings.data, "train")
        return SliceData(files, settings.data, skipped=left_out(root, settings.data))

    def augment(
        self, settings: MsgaSettings
    ) -> Callable[[SliceSample, np.random.Generator], SliceSample]:
        """Flips and rotations."""
        options = settings.training.augmentation
        return lambda sample, rng: augment(sample, rng, options)

    def model(self, settings: MsgaSettings) -> Msga:
        """The network, as the released recipe initialises it."""
        return Msga(settings.model)

    def start(self, settings: MsgaSettings, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, Msga)
        training = settings.training
        if training.weights is not None:
            load_official(model, training.weights)
        if training.backbone_weights is not None:
            path = weights_file(training.backbone_weights, settings.model.backbone)
            load_backbone(model, path, stem=training.backbone_stem)

    def module(self, settings: MsgaSettings, model: nn.Module) -> MsgaModule:
        """The network with its loss."""
        assert isinstance(model, Msga)
        return MsgaModule(model, settings)

    def explain(
        self, settings: MsgaSettings, module: L.LightningModule, case: SegmentationCase
    ) -> Explanation:
        """Attention of the second step at every scale, over the slices with most foreground."""
        assert isinstance(module, MsgaModule)
        prediction = module.predict_step([case], 0)[0]
        maps = attention_maps(module.model, case, prediction, device=module.device)
        names = settings.data.table.names
        return Explanation(
            name=case.name,
            arrays={name: array for one in maps for name, array in one.arrays().items()},
            figures={f"slice{one.index}": draw_attention(one, names) for one in maps},
        )

    def exportable(self, settings: MsgaSettings, model: nn.Module) -> Exportable:
        """Slices of any size to logits."""
        channels = settings.model.in_channels
        height, width = settings.data.size or (128, 128)
        sizes = ((2, height, width), (3, height + 24, width + 8))
        free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        return Exportable(
            model=model.eval(),
            examples=[(torch.rand(n, channels, h, w),) for n, h, w in sizes],
            dynamic_shapes=(free,),
            input_names=("image",),
            output_names=("logits",),
        )

    def contenders(self, settings: MsgaSettings) -> list[Contender]:
        """MSGA beside MONAI's networks, on a batch of four slices."""
        channels, classes = settings.model.in_channels, settings.model.classes
        height, width = settings.data.size or (128, 128)
        shape = (4, channels, -(-height // 32) * 32, -(-width // 32) * 32)
        labels = torch.randint(
            0, classes, (4, *shape[2:]), generator=torch.Generator().manual_seed(0)
        )

        def inputs() -> tuple[Tensor, ...]:
            return (torch.rand(shape, generator=torch.Generator().manual_seed(1)),)

        def cross_entropy(output: Any) -> Tensor:
            return nn.functional.cross_entropy(output, labels.to(output.device))

        def ours(output: Any) -> Tensor:
            return msga_loss(output, labels.to(output.logits.device)).total

        def contender(name: str, build: Callable[[], nn.Module], loss: Loss) -> Contender:
            return Contender(name=name, build=build, inputs=inputs, loss=loss, items=4)

        peers = _monai_networks(channels, classes)
        return [
            contender(f"MSGA ({settings.model.backbone})", lambda: Msga(settings.model), ours),
            *(contender(f"MONAI {name}", peers[name], cross_entropy) for name in peers),
        ]


def _monai_networks(channels: int, classes: int) -> dict[str, Callable[[], nn.Module]]:
    from monai.networks.nets.attentionunet import AttentionUnet
    from monai.networks.nets.swin_unetr import SwinUNETR
    from monai.networks.nets.unet import UNet

    widths = (32, 64, 128, 256, 512)
    common: dict[str, Any] = {
        "spatial_dims": 2,
        "in_channels": channels,
        "out_channels": classes,
    }
    stages: dict[str, Any] = {"channels": widths, "strides": (2,) * 4, **common}
    return {
        "UNet": lambda: UNet(num_res_units=2, **stages),
        "AttentionUnet": lambda: AttentionUnet(**stages),
        "SwinUNETR": lambda: SwinUNETR(feature_size=24, **common),
    }


RECIPE = MsgaRecipe()
