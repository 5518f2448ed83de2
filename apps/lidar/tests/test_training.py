"""How networks are trained: what the loss is taken over, parts of scans, precision."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from heed_core.errors import InputError
from heed_lidar.augmentation import Augmentation, Crop
from heed_lidar.curbnet import CurbNetConfig
from heed_lidar.cylinder3d.network import VoxelLogits
from heed_lidar.cylindrical import CylindricalGrid, PointBatch
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP, curbnet, curbnet_released, cylinder3d
from heed_lidar_cli.settings import NetworkData, NetworkTraining
from heed_lidar_cli.street import SegmentationModule, prepare
from heed_runtime.testing.contract import refusal

GRID = CylindricalGrid(shape=(48, 36, 8))
SETTINGS = curbnet.CurbNetSettings(
    model=CurbNetConfig(width=4, grid=GRID),
    data=NetworkData(labels="curb-only"),
    training=NetworkTraining(voxel_loss="cross-entropy", region_loss="none"),
)


class Says(nn.Module):
    """A network that says of each point, which is its own voxel, what it was told to.

    Args:
        probabilities: Of each class.
    """

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities, dtype=torch.float64).clamp(min=1e-30).log()

    def forward(self, points: torch.Tensor, index: torch.Tensor, *, batch_size: int) -> VoxelLogits:
        """The logits that were given."""
        rows = torch.arange(len(index))
        return VoxelLogits(logits=self.logits, coords=index, voxel_of_point=rows)


def loss(probabilities: list[list[float]], classes: list[int], **training: str) -> float:
    """Of a scan of one voxel and another one of the rest."""
    settings = dataclasses.replace(
        SETTINGS, training=dataclasses.replace(SETTINGS.training, **training)
    )
    module = SegmentationModule(Says(probabilities), settings)
    module.log_dict = lambda *args, **kwargs: None
    n = len(classes)
    index = torch.tensor([[min(k, 1), k, 0, 0] for k in range(n)], dtype=torch.int32)
    batch = PointBatch(
        points=torch.zeros(n, 9), index=index, counts=(1, n - 1), classes=torch.tensor(classes)
    )
    return float(module.training_step(batch, 0))


def test_the_loss_of_voxels_is_a_mean_over_scans_or_over_the_voxels_of_all():
    half, quarter = [0.0, 0.5, 0.5], [0.0, 0.25, 0.75]
    said, classes = [half, quarter, quarter, quarter], [1, 1, 1, 1]
    bit = math.log(2)
    assert loss(said, classes, loss_over="scan") == pytest.approx((1 + 2) / 2 * bit)
    assert loss(said, classes, loss_over="batch") == pytest.approx((1 + 3 * 2) / 4 * bit)


def test_the_loss_of_regions_is_of_each_scan_or_of_all_voxels_together():
    """Of hard answers it is the mean of 1 - IoU over the classes that are there."""
    curb, other = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    said, classes = [other, curb, curb, other], [1, 1, 1, 2]
    kinds = {"voxel_loss": "none", "region_loss": "lovasz"}
    assert loss(said, classes, loss_over="scan", **kinds) == pytest.approx((1 + 0) / 2)
    both = ((1 - 2 / 3) + (1 - 1 / 2)) / 2
    assert loss(said, classes, loss_over="batch", **kinds) == pytest.approx(both)


def test_published_trainings_take_the_loss_over_the_batch():
    published = (
        curbnet.paper(), curbnet.small(), curbnet_released.released(), cylinder3d.released()
    )  # fmt: skip
    assert {settings.training.loss_over for settings in published} == {"batch"}
    own = (curbnet.tiny(), curbnet.base(), cylinder3d.tiny(), cylinder3d.base())
    assert {settings.training.loss_over for settings in own} == {"scan"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "data"
    sensor = Sensor(beams=24, azimuth_step_deg=1.0)
    write_scenes(root, SceneSet(sequences={"00": 1, "02": 1}, sensor=sensor))
    return root


STILL = Augmentation(rotate_deg=0.0, flip=False, scale=0.0, shift_m=0.0)


def azimuths(data: Path, cut: Crop, seed: int) -> np.ndarray:
    """Of the points of the training scan that are trained on, in degrees."""
    scan = curbnet.RECIPE.train_data(SETTINGS, data)[0]
    training = NetworkTraining(cut=cut, augmentation=STILL)
    found = prepare(scan, np.random.default_rng(seed), training=training, grid=GRID)
    assert len(found.features) == len(found.cells) == len(found.classes)
    assert np.hypot(*found.features[:, 6:8].T).max() <= cut.range_m
    return np.degrees(np.arctan2(found.features[:, 7], found.features[:, 6]))


def test_a_cut_is_ahead_or_another_sector_of_a_scan_each_time(data: Path):
    ahead = Crop(range_m=20.0, sector_deg=60.0)
    assert np.abs(azimuths(data, ahead, 0)).max() <= 30.01
    middles = []
    for seed in range(4):
        angles = azimuths(data, dataclasses.replace(ahead, facing="random"), seed)
        middle = np.degrees(np.angle(np.exp(1j * np.radians(angles)).mean()))
        assert np.abs((angles - middle + 180) % 360 - 180).max() <= 60.1
        middles.append(round(middle))
    assert len(set(middles)) == 4
    everything = azimuths(data, NetworkTraining().cut, 0)
    assert len(everything) == len(curbnet.RECIPE.train_data(SETTINGS, data)[0])


def test_a_cut_that_leaves_nothing_or_does_nothing_is_refused(data: Path):
    with pytest.raises(
        InputError, match=r"000000\.bin: has no points in the part that training.cut"
    ):
        azimuths(data, Crop(range_m=0.1), 0)
    with pytest.raises(ValueError, match=r"facing=random has no effect with cut\.sector_deg=360"):
        NetworkTraining(cut=Crop(sector_deg=360.0, facing="random"))


def test_a_cut_is_a_setting_of_the_command_line(data: Path, tmp_path: Path):
    words = [
        *("train", "curbnet", "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"),
        *("--trainer.max-steps", "1", "--device", "cpu", "--model.width", "4"),
        *("--model.grid.shape", "48", "36", "8", "--training.cut.facing", "random"),
    ]
    sector = ["--training.cut.range-m", "15", "--training.cut.sector-deg", "90"]
    assert APP.call([*words, *sector]) == 0
    assert "    range_m: 15.0\n    sector_deg: 90.0\n" in (tmp_path / "run/config.yaml").read_text()
    config = ["--config", str(tmp_path / "run/config.yaml")]
    assert APP.call([*words[:4], *config, "--out", str(tmp_path / "again"), "--quiet"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which may do it")
@pytest.mark.parametrize("system", ["curbnet", "curbnet-released", "cylinder3d"])
def test_mixed_precision_is_of_gpus_alone(data: Path, tmp_path: Path, system: str):
    words = ["train", system, "--data", str(data), "--out", str(tmp_path / "run"), "--precision"]
    assert refusal(APP, *words, "bf16-mixed") == (
        "heed-lidar: error: precision=bf16-mixed trains sparse networks on a GPU alone; leave "
        "--precision out on the CPU"
    )
    assert not (tmp_path / "run").exists()
