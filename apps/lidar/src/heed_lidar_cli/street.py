"""What the networks of this app share: training on voxels, prediction of whole scans."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from heed_core.errors import InputError
from heed_core.sparse import SparseTensor, unique_voxels
from heed_lidar.augmentation import Crop, augment, crop
from heed_lidar.checking import check_data
from heed_lidar.cylinder3d.network import CylindricalNetwork
from heed_lidar.cylindrical import (
    CylindricalGrid,
    PointBatch,
    collate,
    voxel_labels,
    voxelise,
)
from heed_lidar.layouts import find_inputs
from heed_lidar.losses import ClassBalance, class_balance, segmentation_loss
from heed_lidar.scans import Scan, ScanData, crop_scan
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli.doubts import Doubts, tell_lost
from heed_lidar_cli.prediction import StreetPrediction, finish, write_files
from heed_lidar_cli.scoring import Counts, report, score
from heed_lidar_cli.settings import CHANGEABLE, NetworkData, NetworkTraining, StreetData, settle
from heed_runtime.engine import uses_cuda
from heed_runtime.errors import UsageError
from heed_runtime.outputs import Written
from heed_runtime.recipe import (
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
sequences/SS/velodyne/NNNNNN.bin   float32 x y z remission; x forward, y left, z up, metres
sequences/SS/labels/NNNNNN.label   uint32: semantic id (3 = curb in 3D-Curb) and instance
sequences/SS/curb/NNNNNN.txt       or instead of labels: rows x y curb_id
DIR/*.{bin,pcd,ply,las,laz,npy,csv} a plain folder of scans; a .label beside each to score them

Splits: sequences by name (3D-Curb: train 00 01 04-06 08-10, val 02 03 07), --data.train, or
folders sequences/{train,val,test}. Another label map: --data.labels semantic-kitti.yaml"""

SAMPLE = SceneSet(
    sequences={"00": 8, "02": 2, "11": 2},
    sensor=Sensor(field_of_view_deg=180.0, azimuth_step_deg=0.35),
)
"""Made streets: 3D-Curb trains on sequence 00, validates on 02; 11 is a test sequence."""


class NetworkConfig(Protocol):
    """What the settings of every network say."""

    @property
    def classes(self) -> int:
        """Classes, the ignored one included."""

    @property
    def grid(self) -> CylindricalGrid:
        """The voxels."""


@dataclass(frozen=True, kw_only=True)
class StreetSettings:
    """The settings of every system of this app; a system says what its model and training are."""

    model: Any
    data: StreetData = field(default_factory=StreetData)
    training: Any
    trainer: TrainerSettings = field(default_factory=TrainerSettings)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(StreetSettings):
    """The settings of every network of this app."""

    model: NetworkConfig
    data: NetworkData = field(default_factory=NetworkData)
    training: NetworkTraining = field(default_factory=NetworkTraining)


class Voxels(NamedTuple):
    """A training scan as a network takes it."""

    features: Float32[np.ndarray, "n 9"]
    cells: Int32[np.ndarray, "n 3"]
    classes: Int64[np.ndarray, " n"]


SettingsT = TypeVar("SettingsT", bound=StreetSettings)
NetworkSettingsT = TypeVar("NetworkSettingsT", bound=NetworkSettings)


class Scans(ScanData):
    """Scans by name, read ahead; see `SizedData` of the runtime.

    The first of them that loses points is told of; where several processes load them, by one.
    """

    read_ahead = 2
    told = False
    """Whether that was said."""

    def __getitem__(self, index: int) -> Scan:
        """Read a scan."""
        scan = super().__getitem__(index)
        worker = get_worker_info()
        if not self.told and (worker is None or worker.id == 0):
            self.told = tell_lost(scan)
        return scan

    @property
    def names(self) -> list[str]:
        """Of the scans, in order."""
        return [file.name for file in self.files]


class TrainingScans(Scans):
    """Labelled scans, cut as `data.crop` says; one of which nothing is left is a fault."""

    def __getitem__(self, index: int) -> Scan:
        """Read a scan."""
        scan = super().__getitem__(index)
        if len(scan) < 2:
            raise InputError(
                f"has no points in the part {self._data.crop!r} that is used in training",
                path=self.path(index),
                remedy="choose another --data.crop",
            )
        return scan


def find_training_scans(data: StreetData, root: Path) -> TrainingScans:
    """The scans of the training split."""
    return TrainingScans.of_split(root, data, "train", crop=True)


def count_classes(scans: TrainingScans, data: StreetData) -> tuple[int, ...]:
    """Points of each class in all training scans; one pass over the data.

    Raises:
        InputError: A scan cannot be read and is not to be skipped; no point has a class.
    """
    counts = np.zeros(len(data.label_map), dtype=np.int64)
    for index in range(len(scans)):
        try:
            classes = scans[index].classes
        except InputError:
            if data.on_error == "stop":
                raise
            continue
        assert classes is not None
        counts += np.bincount(classes, minlength=len(counts))
    if not counts[1:].any():
        raise InputError(
            "no point of the training scans has a class that counts",
            path=scans.path(0).parent,
            remedy="check the labels and --data.labels",
        )
    return tuple(int(count) for count in counts)


def mean_of(scans: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The mean over scans."""
    return torch.stack(list(scans)).mean()


class SegmentationModule(L.LightningModule):
    """Loss, optimiser and validation of a network of cylindrical voxels.

    The loss is the mean over the scans of a batch, or over its voxels, as `loss_over` says.
    """

    def __init__(self, model: CylindricalNetwork, settings: NetworkSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.counts = Counts(settings.data)
        self.doubts = Doubts(settings.data, road=True)

    def training_step(self, batch: PointBatch, _: int) -> Tensor:
        """The loss of a batch of scans."""
        assert batch.classes is not None
        found = self.model(batch.points, batch.index, batch_size=batch.size)
        labels = voxel_labels(
            batch.classes,
            found.voxel_of_point,
            num_voxels=len(found.logits),
            num_classes=found.logits.shape[1],
        )
        training, balance = self.settings.training, self._balance()
        scan_of_voxel = found.coords[:, 0]
        parts = [scan_of_voxel == number for number in range(batch.size)]
        losses = [
            segmentation_loss(
                found.logits[rows],
                labels[rows],
                voxel=training.voxel_loss,
                region=training.region_loss,
                balance=balance,
            )
            for rows in (parts if training.loss_over == "scan" else [scan_of_voxel >= 0])
        ]
        total = mean_of([loss.total for loss in losses])
        values = {"train/loss": total, "train/voxel_loss": mean_of([loss.voxel for loss in losses])}
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=batch.size)
        return total

    def on_validation_epoch_start(self) -> None:
        """Begin counting."""
        self.counts.clear()

    def validation_step(self, cases: list[Scan], _: int) -> None:
        """Count how the points of scans, cut as in training, are classified."""
        for scan in cases:
            seen = crop_scan(scan, self.settings.data.crop)
            self.counts.add(seen, self.probabilities(seen).argmax(axis=1))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all points together."""
        self.log_dict(self.counts.scores(), prog_bar=True, sync_dist=True)

    def predict_step(self, cases: list[Scan], _: int) -> list[StreetPrediction]:
        """Classes and curbs of whole scans."""
        data = self.settings.data
        for scan in cases:
            self.doubts.tell(scan, self.settings.model.grid.inside(scan.cloud.xyz))
        return [finish(scan, self.probabilities(scan), data) for scan in cases]

    def probabilities(self, scan: Scan) -> Float[np.ndarray, "n c"]:
        """Of each point and class; zeros for a point outside a grid that drops such points."""
        grid: CylindricalGrid = self.settings.model.grid
        found = np.zeros((len(scan), self.settings.model.classes), dtype=np.float32)
        cloud = scan.cloud
        drops = grid.out_of_range == "drop"
        rows = np.flatnonzero(grid.inside(cloud.xyz)) if drops else np.arange(len(scan))
        if len(rows):
            batch = collate([voxelise(cloud.xyz, cloud.intensity, grid)]).to(self.device)
            with torch.no_grad():
                logits = self.model(batch.points, batch.index, batch_size=1).point_logits
            found[rows] = logits.float().softmax(dim=1).cpu().numpy()
        return found

    def configure_optimizers(self) -> Any:
        """The optimiser and the schedule of the settings."""
        training = self.settings.training
        rate = first_rate(training, self.settings.trainer)
        optimizer: torch.optim.Optimizer
        if training.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=rate)
        else:
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=rate, weight_decay=training.weight_decay
            )
        if training.schedule == "constant":
            return optimizer
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(cosine_to_a_hundredth, steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def _balance(self) -> ClassBalance | None:
        training = self.settings.training
        if training.voxel_loss != "ace":
            return None
        return class_balance(
            training.class_counts,
            gamma=training.gamma,
            slope=training.gamma_slope,
            delta=training.delta,
        )


def first_rate(training: NetworkTraining, trainer: TrainerSettings) -> float:
    """The learning rate of the first step.

    Example:
        >>> first_rate(NetworkTraining(rate_batch=2), TrainerSettings(batch=8))
        0.002
    """
    if training.rate_batch is None:
        return training.learning_rate
    scans = trainer.batch * trainer.accumulate
    return training.learning_rate * math.sqrt(scans / training.rate_batch)


def cosine_to_a_hundredth(step: int, *, steps: int) -> float:
    """Factor of the learning rate: 1 at the first step, 0.01 at the last."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def cut_scan(scan: Scan, rng: np.random.Generator, cut: Crop) -> Scan:
    """The part of a training scan that a crop keeps.

    Raises:
        InputError: It keeps less than two points.
    """
    if cut.sector_deg == 360 and math.isinf(cut.range_m):
        return scan
    kept = crop(scan.cloud.xyz, rng, cut)
    if np.count_nonzero(kept) < 2:
        raise InputError(
            "has no points in the part that training.cut leaves",
            path=scan.file.cloud,
            remedy="choose other --training.cut.range-m and --training.cut.sector-deg",
        )
    assert scan.classes is not None
    return replace(scan, cloud=scan.cloud.select(kept), classes=scan.classes[kept])


def prepare(
    scan: Scan, rng: np.random.Generator, *, training: NetworkTraining, grid: CylindricalGrid
) -> Voxels:
    """Cut, turn, flip, scale and shift a training scan, then find its voxels.

    Raises:
        InputError: The cut leaves nothing.
    """
    scan = cut_scan(scan, rng, training.cut)
    assert scan.classes is not None
    moved = augment(scan.cloud.xyz, rng, training.augmentation)
    features, cells = voxelise(moved, scan.cloud.intensity, grid)
    kept = grid.inside(moved) if grid.out_of_range == "drop" else slice(None)
    return Voxels(features, cells, scan.classes[kept])


class StreetRecipe(Recipe[SettingsT, Scan, StreetPrediction]):
    """The part of a recipe that does not depend on the network: data, files and scores."""

    changeable: ClassVar[tuple[str, ...]] = CHANGEABLE

    def sample(self, out: Path, *, seed: int) -> None:
        """Made street scans in SemanticKITTI's layout with the classes of 3D-Curb."""
        write_scenes(out, replace(SAMPLE, seed=seed))

    def check(self, settings: SettingsT, root: Path) -> Check:
        """Read every scan."""
        found = check_data(settings.data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def cases(self, settings: SettingsT, root: Path, split: str) -> Scans:
        """Whole labelled scans."""
        return Scans.of_split(root, settings.data, split)

    def inputs(self, settings: SettingsT, paths: Sequence[Path]) -> Scans:
        """Whole scans, in natural order; what an earlier prediction wrote is none of them."""
        files = find_inputs(paths, settings.data, passed_over=Written())
        return Scans(files, settings.data, label=False)

    def write_prediction(
        self, settings: SettingsT, prediction: StreetPrediction, out: Path
    ) -> list[Path]:
        """Classes per point, curbs as lines, pictures."""
        return write_files(prediction, out, settings.data)

    def score(self, settings: SettingsT, prediction: StreetPrediction) -> list[Row]:
        """Counts of one scan, before and after the curves are fitted."""
        return score(prediction, settings.data)

    def report(self, settings: SettingsT, rows: Sequence[Row]) -> Report:
        """Curbs, with and without a tolerance, and classes."""
        return report(rows, seed=settings.trainer.seed)


class NetworkRecipe(StreetRecipe[NetworkSettingsT]):
    """The part of a recipe that networks of cylindrical voxels share."""

    changeable: ClassVar[tuple[str, ...]] = (
        *CHANGEABLE,
        "data.curves",
        "data.clean",
        "data.revert",
    )

    def plan(self, settings: NetworkSettingsT, root: Path) -> NetworkSettingsT:
        """Take the classes from the label map and count them in the training labels.

        Raises:
            UsageError: Mixed precision on the CPU, which has no fast sparse convolution of it.
        """
        precision = settings.trainer.precision
        if precision != "32-true" and not uses_cuda(settings.trainer):
            raise UsageError(
                f"precision={precision} trains sparse networks on a GPU alone",
                remedy="leave --precision out on the CPU",
            )
        data = settle(settings.data)
        training = settings.training
        if training.voxel_loss == "ace" and not training.class_counts:
            scans = find_training_scans(data, root)
            scans.told = True  # what is odd is said when they are trained on
            counts = count_classes(scans, data)
            training = replace(training, class_counts=counts)
        model: Any = settings.model
        model = replace(model, classes=len(data.label_map))
        return replace(settings, model=model, data=data, training=training)

    def train_data(self, settings: NetworkSettingsT, root: Path) -> TrainingScans:
        """The scans of the training split, cut as the settings say."""
        return find_training_scans(settings.data, root)

    def augment(self, settings: NetworkSettingsT) -> Callable[[Scan, np.random.Generator], Voxels]:
        """Cut, turn, flip, scale and shift; then find the voxels."""
        return partial(prepare, training=settings.training, grid=settings.model.grid)

    def collate(self, samples: list[Voxels]) -> PointBatch:
        """One batch of all scans."""
        voxels = [(sample.features, sample.cells) for sample in samples]
        return collate(voxels, [sample.classes for sample in samples])

    @abstractmethod
    def model(self, settings: NetworkSettingsT) -> CylindricalNetwork:
        """The network, freshly initialised."""

    def module(self, settings: NetworkSettingsT, model: nn.Module) -> SegmentationModule:
        """The network with its loss."""
        assert isinstance(model, CylindricalNetwork)
        return SegmentationModule(model, settings)

    def explain(
        self, settings: NetworkSettingsT, module: L.LightningModule, case: Scan
    ) -> Explanation:
        """Heights, points, and for multi-scale channel attention columns and scales."""
        from heed_lidar_cli.explaining import explain_network

        assert isinstance(module, SegmentationModule)
        return explain_network(module, module.predict_step([case], 0)[0])

    def exportable(self, settings: NetworkSettingsT, model: nn.Module) -> Exportable:
        """Points and voxels of one scan to the logits of the voxels."""
        assert isinstance(model, CylindricalNetwork)
        grid = settings.model.grid
        auto = torch.export.Dim.AUTO
        return Exportable(
            model=VoxelProgram(model).eval(),
            examples=[voxels_of(*scattered(grid, n, seed=n), grid=grid) for n in (600, 900)],
            dynamic_shapes=({0: auto}, {0: auto}, {0: auto}),
            input_names=("points", "voxel_of_point", "voxels"),
            output_names=("logits",),
            refused={"onnx": "its search for neighbouring voxels has no ONNX operators"},
        )

    def contenders(self, settings: NetworkSettingsT) -> list[Contender]:
        """This network on each back-end, and on spconv as it is used elsewhere."""
        from heed_lidar_cli.benchmarks import contenders

        return contenders(partial(self.model, settings), settings)

    def stages(self, settings: NetworkSettingsT) -> Mapping[str, Callable[[], object]]:
        """From the points of a scan to its curbs."""
        from heed_lidar_cli.benchmarks import stages

        return stages(self.model(settings), settings)


class PointLogits(nn.Module):
    """A network of one scan at a time that gives logits per point, the ignored class included.

    Args:
        network: What computes them.
    """

    def __init__(self, network: CylindricalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, points: Float[Tensor, "p 9"], index: Int32[Tensor, "p 4"]
    ) -> Float[Tensor, "p c"]:
        """The logits of each point's voxel."""
        found = self.network(points, index, batch_size=1)
        logits: Tensor = found.logits[found.voxel_of_point]
        return logits


class VoxelProgram(nn.Module):
    """A network as a program of tensors alone: the voxels are found before it.

    Args:
        network: What computes the logits.
    """

    def __init__(self, network: CylindricalNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        points: Float[Tensor, "p 9"],
        voxel_of_point: Int64[Tensor, " p"],
        voxels: Int32[Tensor, "v 4"],
    ) -> Float[Tensor, "v c"]:
        """The logits of each voxel, the ignored class included.

        Args:
            points: Features of `voxelise`.
            voxel_of_point: Row of each point's voxel.
            voxels: Number of the scan (0), rho, phi and z; each occupied voxel once.
        """
        features = self.network.points(points, voxel_of_point, voxels.shape[0])
        grid = self.network.grid
        x = SparseTensor(features, voxels, grid.shape, 1, circular=grid.circular)
        logits: Tensor = self.network.segment(x).features
        return logits


def voxels_of(points: Tensor, index: Tensor, *, grid: CylindricalGrid) -> tuple[Tensor, ...]:
    """What `VoxelProgram` takes."""
    voxels, voxel_of_point, _ = unique_voxels(index, grid.shape)
    return points, voxel_of_point, voxels


def scattered(grid: CylindricalGrid, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Points and index of a scan of points strewn over the ground."""
    rng = np.random.default_rng(seed)
    rho, phi = rng.uniform(2.0, 30.0, count), rng.uniform(-np.pi, np.pi, count)
    xyz = np.stack([rho * np.cos(phi), rho * np.sin(phi), rng.uniform(-1.9, -1.4, count)], axis=1)
    batch = collate([voxelise(xyz, rng.uniform(0, 1, count), grid)])
    return batch.points, batch.index
