"""The recipe of CurbNet's released code: to count it, and to go on from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from heed_core.errors import InputError
from heed_lidar.curbnet.released import ReleasedConfig, ReleasedCurbNet
from heed_lidar.cylinder3d import CylindricalNetwork, load_official
from heed_lidar.cylindrical import CylindricalGrid
from heed_lidar_cli.curbnet import refuse_without_curb
from heed_lidar_cli.settings import NetworkData, NetworkTraining
from heed_lidar_cli.street import LAYOUT, NetworkRecipe, NetworkSettings
from heed_runtime.recipe import Card
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class ReleasedTraining(NetworkTraining):
    """The loss and its minimisation."""

    weights: Path | None = None
    """A checkpoint of the released code to start from."""


@dataclass(frozen=True, kw_only=True)
class ReleasedSettings(NetworkSettings):
    """All settings of the released network."""

    model: ReleasedConfig = field(default_factory=ReleasedConfig)
    training: ReleasedTraining = field(default_factory=ReleasedTraining)


def tiny() -> ReleasedSettings:
    """For a laptop: width 4, voxels twice as large, trained on the 25 m ahead."""
    return ReleasedSettings(
        model=ReleasedConfig(width=4, grid=CylindricalGrid(shape=(240, 180, 16))),
        data=NetworkData(crop="forward:25", roi="forward:25"),
        training=ReleasedTraining(learning_rate=2e-3, schedule="cosine"),
        trainer=TrainerSettings(max_epochs=12, batch=1),
    )


def released() -> ReleasedSettings:
    """The network that the checkpoint's name points to, trained as the paper says."""
    return ReleasedSettings(
        training=ReleasedTraining(loss_over="batch"),
        trainer=TrainerSettings(max_epochs=100, batch=6),
    )


class ReleasedRecipe(NetworkRecipe[ReleasedSettings]):
    """Find curbs with the network of the released code, which is not the paper's."""

    card: ClassVar[Card] = Card(
        name="curbnet-released",
        title="CurbNet as released: five levels, no column attention; for its checkpoints",
        task="curbs in LiDAR scans: points and lines",
        reads=("SemanticKITTI", "3D-Curb", "bin, pcd, ply, las, npy, csv", "ROS bags"),
        writes="label, ply; curbs as csv, GeoJSON, OSM; pictures",
        paper="the code of Zhao et al., arXiv 2403.16794",
        layout=LAYOUT,
        verified="its blocks equal to the released ones on fixed weights; 294,605,095 parameters",
        trained="not trained here: branches that never learn are kept, train curbnet instead",
        reproduced="none: no weights were released",
    )
    settings: ClassVar[type[ReleasedSettings]] = ReleasedSettings
    presets: ClassVar[Mapping[str, Callable[[], ReleasedSettings]]] = {
        "tiny": tiny,
        "released": released,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/curb_f1", "max")

    def plan(self, settings: ReleasedSettings, root: Path) -> ReleasedSettings:
        """Take the classes, one of which is the curb, and count them."""
        if settings.model.variant == "520":
            raise InputError(
                "the variant 520 can be counted and does not run, as in the released code",
                remedy="choose another --model.variant",
            )
        refuse_without_curb(settings.data)
        return super().plan(settings, root)

    def model(self, settings: ReleasedSettings) -> ReleasedCurbNet:
        """The network, freshly initialised."""
        return ReleasedCurbNet(settings.model)

    def start(self, settings: ReleasedSettings, root: Path, model: nn.Module) -> None:
        """Take over the checkpoint that the settings name."""
        if settings.training.weights is not None:
            assert isinstance(model, CylindricalNetwork)
            load_official(model, settings.training.weights)


RECIPE = ReleasedRecipe()
