"""The recipe of CurbNet: curbs in LiDAR scans by multi-scale channel attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from heed_core.errors import InputError
from heed_lidar.curbnet import PRESETS, CurbNet, CurbNetConfig
from heed_lidar.labels import CURB
from heed_lidar_cli.prediction import curb_class
from heed_lidar_cli.settings import NetworkData, NetworkTraining, StreetData
from heed_lidar_cli.street import LAYOUT, NetworkRecipe, NetworkSettings
from heed_runtime.recipe import Card, Contender
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class CurbNetSettings(NetworkSettings):
    """All settings of CurbNet."""

    model: CurbNetConfig = field(default_factory=CurbNetConfig)


def tiny() -> CurbNetSettings:
    """For a laptop: width 8, voxels twice as large, trained on the 25 m ahead."""
    return CurbNetSettings(
        model=PRESETS["tiny"],
        data=NetworkData(crop="forward:25", roi="forward:25"),
        training=NetworkTraining(learning_rate=2e-3, schedule="cosine"),
        trainer=TrainerSettings(max_epochs=12, batch=1),
    )


def small() -> CurbNetSettings:
    """Half the width, trained as in the paper."""
    return CurbNetSettings(
        model=PRESETS["small"],
        training=NetworkTraining(loss_over="batch"),
        trainer=TrainerSettings(max_epochs=100, batch=6),
    )


def base() -> CurbNetSettings:
    """The paper's network with a learning rate that falls, which needs fewer epochs."""
    return CurbNetSettings(
        training=NetworkTraining(optimizer="adamw", weight_decay=1e-3, schedule="cosine"),
        trainer=TrainerSettings(max_epochs=40, batch=6),
    )


def paper() -> CurbNetSettings:
    """The paper's network and training: Adam at 1e-3, 100 epochs of batch 6."""
    return CurbNetSettings(
        training=NetworkTraining(loss_over="batch"),
        trainer=TrainerSettings(max_epochs=100, batch=6),
    )


def refuse_without_curb(data: StreetData) -> None:
    """Refuse classes without the curb.

    Raises:
        InputError: It names the classes.
    """
    label_map = data.label_map
    if curb_class(label_map) is None:
        raise InputError(
            f"the labels {data.labels!r} have no class {CURB!r} ({', '.join(label_map.names)})",
            remedy="choose other --data.labels, or train cylinder3d",
        )


class CurbNetRecipe(NetworkRecipe[CurbNetSettings]):
    """Find curbs in single LiDAR scans."""

    card: ClassVar[Card] = Card(
        name="curbnet",
        title="CurbNet: curbs by multi-scale channel attention on sparse voxels",
        task="curbs in LiDAR scans: points and lines",
        reads=("SemanticKITTI", "3D-Curb", "bin, pcd, ply, las, npy, csv", "ROS bags"),
        writes="label, ply; curbs as csv, GeoJSON, OSM; pictures",
        paper="Zhao et al., IEEE T-ITS 2025, arXiv 2403.16794",
        layout=LAYOUT,
        verified="built from the paper's equations; 86,055,047 parameters",
        trained="made streets (64, tiny, 12 epochs): curb F1 0.74, within 15 cm 0.87, on 16 others",
        reproduced="none: 3D-Curb was not at hand",
    )
    settings: ClassVar[type[CurbNetSettings]] = CurbNetSettings
    presets: ClassVar[Mapping[str, Callable[[], CurbNetSettings]]] = {
        "tiny": tiny,
        "small": small,
        "base": base,
        "paper": paper,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/curb_f1", "max")

    def plan(self, settings: CurbNetSettings, root: Path) -> CurbNetSettings:
        """Take the classes, one of which is the curb, and count them."""
        refuse_without_curb(settings.data)
        return super().plan(settings, root)

    def model(self, settings: CurbNetSettings) -> CurbNet:
        """The network, freshly initialised."""
        return CurbNet(settings.model)

    def contenders(self, settings: CurbNetSettings) -> list[Contender]:
        """This network on each back-end, on spconv, and beside them what the paper measured."""
        ours = super().contenders(settings)
        why = "published: 48.3 ms a scan of 3D-Curb (20.7 scans/s), preset base"
        return [*ours, replace(ours[0], name="the paper's, RTX 3090", missing=why)]


RECIPE = CurbNetRecipe()
