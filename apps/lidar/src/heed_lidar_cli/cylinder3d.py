"""The recipe of Cylinder3D: cylindrical voxels and asymmetric kernels (arXiv 2011.10033)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from heed_lidar.cylinder3d import Cylinder3d, Cylinder3dConfig, CylindricalNetwork, load_official
from heed_lidar.cylindrical import CylindricalGrid
from heed_lidar_cli.settings import NetworkData, NetworkTraining
from heed_lidar_cli.street import LAYOUT, NetworkRecipe, NetworkSettings
from heed_runtime.recipe import Card
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class Cylinder3dTraining(NetworkTraining):
    """The loss and its minimisation; the defaults are those of later retrainings."""

    voxel_loss: Literal["ace", "cross-entropy", "focal", "none"] = "cross-entropy"
    """Of each voxel: ace is cross-entropy that weighs rare classes and unsure voxels more."""
    rate_batch: int | None = 2
    """Scans per step (batch times accumulate) that learning_rate is meant for; another number of
    scans multiplies it by the square root of the ratio. None: it holds for every batch."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 1e-3
    """Of adamw."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: the learning rate falls to a hundredth over the training."""
    weights: Path | None = None
    """A published checkpoint of this network to start from."""


@dataclass(frozen=True, kw_only=True)
class Cylinder3dSettings(NetworkSettings):
    """All settings of Cylinder3D."""

    model: Cylinder3dConfig = field(default_factory=lambda: Cylinder3dConfig(classes=5))
    training: Cylinder3dTraining = field(default_factory=Cylinder3dTraining)


def tiny() -> Cylinder3dSettings:
    """For a laptop: width 8, voxels twice as large, trained on the 25 m ahead."""
    grid = CylindricalGrid(shape=(240, 180, 16))
    return Cylinder3dSettings(
        model=Cylinder3dConfig(classes=5, width=8, grid=grid),
        data=NetworkData(crop="forward:25", roi="forward:25"),
        trainer=TrainerSettings(max_epochs=20, batch=2),
    )


def small() -> Cylinder3dSettings:
    """Half the width, whole scans."""
    return Cylinder3dSettings(
        model=Cylinder3dConfig(classes=5, width=16),
        trainer=TrainerSettings(max_epochs=40, batch=2),
    )


def base() -> Cylinder3dSettings:
    """The network of the paper on the classes of 3D-Curb, with the losses of its release."""
    return Cylinder3dSettings(trainer=TrainerSettings(max_epochs=40, batch=2))


def released() -> Cylinder3dSettings:
    """The published training: 19 classes of SemanticKITTI, Adam at 1e-3, 40 epochs of batch 2.

    It is validated after each epoch; the release also validated within it, every 4,599 steps, which
    is about the middle and the end. The weights that are kept are those at the end of an epoch.
    """
    return Cylinder3dSettings(
        model=Cylinder3dConfig(classes=20),
        data=NetworkData(labels="semantic-kitti", roi="all"),
        training=Cylinder3dTraining(
            optimizer="adam",
            weight_decay=0.0,
            schedule="constant",
            rate_batch=None,
            loss_over="batch",
        ),
        trainer=TrainerSettings(max_epochs=40, batch=2),
    )


class Cylinder3dRecipe(NetworkRecipe[Cylinder3dSettings]):
    """Segment LiDAR scans in cylindrical voxels; the backbone and baseline of CurbNet."""

    card: ClassVar[Card] = Card(
        name="cylinder3d",
        title="Cylinder3D: cylindrical and asymmetrical 3-D convolutions",
        task="segmentation of LiDAR scans, and curbs from it",
        reads=("SemanticKITTI", "3D-Curb", "bin, pcd, ply, las, npy, csv", "ROS bags"),
        writes="label, ply; curbs as csv, GeoJSON, OSM; pictures",
        paper="Zhu et al., CVPR 2021, arXiv 2011.10033",
        layout=LAYOUT,
        verified="equal to the official layers on fixed weights; 55,853,366 parameters",
        trained="not trained here",
        reproduced="none: SemanticKITTI was not at hand",
    )
    settings: ClassVar[type[Cylinder3dSettings]] = Cylinder3dSettings
    presets: ClassVar[Mapping[str, Callable[[], Cylinder3dSettings]]] = {
        "tiny": tiny,
        "small": small,
        "base": base,
        "released": released,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/miou", "max")

    def model(self, settings: Cylinder3dSettings) -> Cylinder3d:
        """The network, freshly initialised."""
        return Cylinder3d(settings.model)

    def start(self, settings: Cylinder3dSettings, root: Path, model: nn.Module) -> None:
        """Take over the official checkpoint that the settings name."""
        if settings.training.weights is not None:
            assert isinstance(model, CylindricalNetwork)
            load_official(model, settings.training.weights)


RECIPE = Cylinder3dRecipe()
