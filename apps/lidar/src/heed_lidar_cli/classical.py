"""The recipe of the classical detector: curbs from steps in the rings of a scan, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_lidar.classical import ClassicalConfig, detect_curbs
from heed_lidar.labels import CURB, OTHERS
from heed_lidar.scans import Scan
from heed_lidar_cli.doubts import Doubts
from heed_lidar_cli.prediction import StreetPrediction, curb_class
from heed_lidar_cli.scoring import Counts
from heed_lidar_cli.settings import StreetData, settle
from heed_lidar_cli.street import LAYOUT, Scans, StreetRecipe, StreetSettings
from heed_runtime import distributed
from heed_runtime.errors import UsageError
from heed_runtime.recipe import Card, Contender, Explanation, Exportable
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class ClassicalTraining:
    """Which thresholds are tried on the training scans; the best curb F1 wins."""

    lowest_steps_m: tuple[float, ...] = (0.02, 0.04, 0.06)
    """Lowest height range of a step; the highest stays."""
    height_stds_m: tuple[float, ...] = (0.01, 0.02)
    """Lowest standard deviation of the heights of a step."""
    min_rings: tuple[int, ...] = (2, 4)
    """Rings that have to see a curb."""

    def __post_init__(self) -> None:
        for name in ("lowest_steps_m", "height_stds_m", "min_rings"):
            values = getattr(self, name)
            if not values or min(values) <= 0 or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different numbers above 0, got {values}")


@dataclass(frozen=True, kw_only=True)
class ClassicalSettings(StreetSettings):
    """All settings of the classical detector."""

    model: ClassicalConfig = field(default_factory=ClassicalConfig)
    data: StreetData = field(default_factory=lambda: StreetData(labels="curb-only"))
    training: ClassicalTraining = field(default_factory=ClassicalTraining)
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(max_epochs=1, batch=4, device="cpu")
    )


def candidates(settings: ClassicalSettings) -> list[ClassicalConfig]:
    """The thresholds to try: those of the settings first."""
    own, tried = settings.model, settings.training
    highest = own.height_range_m[1]
    found = [
        replace(own, height_range_m=(low, highest), height_std_m=std, min_rings=rings)
        for low, std, rings in product(tried.lowest_steps_m, tried.height_stds_m, tried.min_rings)
        if low < highest
    ]
    return list(dict.fromkeys([own, *found]))


class Detector(nn.Module):
    """The candidates, and what each of them found in the training scans.

    Args:
        configs: The thresholds to choose from.
    """

    counts: Tensor
    """True, predicted and rightly predicted curb points of each candidate."""

    def __init__(self, configs: Sequence[ClassicalConfig]) -> None:
        super().__init__()
        self.configs = tuple(configs)
        self.register_buffer("counts", torch.zeros(len(configs), 3, dtype=torch.float64))

    @property
    def f1(self) -> Tensor:
        """Of each candidate; 0 before anything was counted."""
        true, predicted, hit = self.counts.unbind(1)
        return 2 * hit / (true + predicted).clamp(min=1)

    @property
    def config(self) -> ClassicalConfig:
        """The candidate with the best F1; the first where several have it."""
        return self.configs[int(self.f1.argmax())]


@dataclass(frozen=True)
class Batch:
    """Scans of a step, which stay on the CPU."""

    scans: tuple[Scan, ...]

    def to(self, device: torch.device | str, **_: object) -> Batch:
        """The batch itself."""
        return self


class ClassicalModule(L.LightningModule):
    """Counts what each candidate finds; there are no gradients.

    The engine counts optimiser steps, so there is an optimiser of one parameter that never moves.
    """

    def __init__(self, model: Detector, settings: ClassicalSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.still = nn.Parameter(torch.zeros(()))
        self.tally = Counts(settings.data)
        self.doubts = Doubts(settings.data, road=False)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Count the curb points of a batch; the loss is 1 - F1 of the best so far."""
        own = np.zeros((len(self.model.configs), 3))
        for scan in batch.scans:
            own += self._count(scan)
        self.model.counts += torch.from_numpy(np.sum(distributed.gather(own), axis=0)).to(
            self.model.counts.device
        )
        loss = (1 - self.model.f1.max()).float()
        self.log(
            "train/loss",
            loss,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.scans),
        )
        return loss + 0 * self.still

    def on_validation_epoch_start(self) -> None:
        """Begin counting."""
        self.tally.clear()

    def validation_step(self, cases: list[Scan], _: int) -> None:
        """Count how the points of whole scans are classified."""
        for scan in cases:
            self.tally.add(scan, self._predict(scan).classes)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all points together."""
        self.log_dict(self.tally.scores(), prog_bar=True, sync_dist=True)

    def predict_step(self, cases: list[Scan], _: int) -> list[StreetPrediction]:
        """The curbs of whole scans."""
        near, far = self.model.config.range_m
        for scan in cases:
            distance = np.hypot(scan.cloud.xyz[:, 0], scan.cloud.xyz[:, 1])
            self.doubts.tell(scan, (distance >= near) & (distance <= far))
        return [self._predict(scan) for scan in cases]

    def configure_optimizers(self) -> Any:
        """One that does nothing."""
        return torch.optim.SGD([self.still], lr=0.0)

    def _count(self, scan: Scan) -> np.ndarray:
        data = self.settings.data
        curb = curb_class(data.label_map)
        assert scan.classes is not None
        counted = data.region.contains(scan.cloud.xyz) & (scan.classes > 0)
        true = (scan.classes == curb) & counted
        rows = []
        for config in self.model.configs:
            found = detect_curbs(scan.cloud, config).curb & counted
            rows.append([true.sum(), found.sum(), (true & found).sum()])
        return np.array(rows, dtype=np.float64)

    def _predict(self, scan: Scan) -> StreetPrediction:
        names = self.settings.data.label_map.names
        curb, others = names.index(CURB), names.index(OTHERS)
        found = detect_curbs(scan.cloud, self.model.config)
        return StreetPrediction(
            name=scan.name,
            scan=scan,
            classes=found.classes(curb=curb, others=others),
            first=np.where(found.score > 0, curb, others).astype(np.int64),
            curb_score=found.score.astype(np.float32),
            curbs=found.fit.curbs,
        )


class ClassicalRecipe(StreetRecipe[ClassicalSettings]):
    """Find curbs without a network: the sanity opponent of those that learn."""

    card: ClassVar[Card] = Card(
        name="classical",
        title="Classical curb detector: steps in the rings, curves through them",
        task="curbs in LiDAR scans: points and lines; nothing is learnt but thresholds",
        reads=("SemanticKITTI", "3D-Curb", "bin, pcd, ply, las, npy, csv", "ROS bags"),
        writes="label, ply; curbs as csv, GeoJSON, OSM; pictures",
        paper="after Wang et al., LidarRoadBoundaryDetection",
        layout=LAYOUT,
        verified="by tests on steps of known height",
        trained="thresholds on 64 made streets: curb F1 0.22, within 15 cm 0.52, on 16 others",
        reproduced="none: 3D-Curb was not at hand",
    )
    settings: ClassVar[type[ClassicalSettings]] = ClassicalSettings
    presets: ClassVar[Mapping[str, Callable[[], ClassicalSettings]]] = {
        "default": ClassicalSettings
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/curb_f1", "max")

    def plan(self, settings: ClassicalSettings, root: Path) -> ClassicalSettings:
        """Take the classes from the label map."""
        data = settle(settings.data)
        for name in (CURB, OTHERS):
            if name not in data.label_map.names:
                raise InputError(
                    f"the labels {data.labels!r} have no class {name!r} "
                    f"({', '.join(data.label_map.names)})",
                    remedy="use --data.labels curb-only",
                )
        return replace(settings, data=data)

    def train_data(self, settings: ClassicalSettings, root: Path) -> Scans:
        """The scans of the training split, whole: rings are not cut."""
        return Scans.of_split(root, settings.data, "train")

    def collate(self, samples: list[Scan]) -> Batch:
        """The scans as they are."""
        return Batch(tuple(samples))

    def model(self, settings: ClassicalSettings) -> Detector:
        """The candidates, with nothing counted."""
        return Detector(candidates(settings))

    def module(self, settings: ClassicalSettings, model: nn.Module) -> ClassicalModule:
        """The candidates, to be counted."""
        assert isinstance(model, Detector)
        return ClassicalModule(model, settings)

    def explain(
        self, settings: ClassicalSettings, module: L.LightningModule, case: Scan
    ) -> Explanation:
        """Which tests the points passed."""
        from heed_lidar_cli.explaining_classical import explain_detector

        assert isinstance(module, ClassicalModule)
        return explain_detector(module.model.config, module.predict_step([case], 0)[0])

    def exportable(self, settings: ClassicalSettings, model: nn.Module) -> Exportable:
        """Nothing: a detector is no network.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "classical is no network: there is nothing to export",
            remedy="call heed_lidar.classical.detect_curbs",
        )

    def contenders(self, settings: ClassicalSettings) -> list[Contender]:
        """The detector on a made scan."""
        from heed_lidar_cli.benchmarks import detector

        return [detector(settings.model)]


RECIPE = ClassicalRecipe()
