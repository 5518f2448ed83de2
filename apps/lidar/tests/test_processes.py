"""Two processes train the systems of this app to what one trains them to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP
from heed_lidar_cli.street import SegmentationModule
from heed_runtime.testing.processes import start_ranks, wait

SYSTEMS = {
    "curbnet": [
        *("--model.width", "4", "--model.grid.shape", "48", "36", "8", "--trainer.max-steps", "1"),
    ],
    "classical": ["--training.min-rings", "2", "4", "--training.height-stds-m", "0.01"],
}
TOLERANCE = {"curbnet": 1e-4, "classical": 0.0}
"""Largest difference of weights and statistics: sums are rounded in another order, and more so with
every step; where the norms of two processes know nothing of each other it is 0.08 after one."""


def descent(module: SegmentationModule) -> torch.optim.Optimizer:
    """Plain steps down the gradient: Adam's are as large where that is nothing but rounding."""
    return torch.optim.SGD(module.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training scans of different sizes, and more validation scans for one process."""
    root = tmp_path_factory.mktemp("made") / "data"
    sensor = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)
    write_scenes(root, SceneSet(sequences={"00": 4, "02": 3}, sensor=sensor))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_train_to_what_one_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
):
    monkeypatch.setattr(SegmentationModule, "configure_optimizers", descent)  # forks have it too
    words = ["train", system, "--data", str(data), "--quiet", "--device", "cpu"]
    words += [*SYSTEMS[system], "--trainer.batch", "2", "--out"]
    log = tmp_path / "log.txt"
    assert APP.call([*words, str(tmp_path / "alone")]) == 0
    ranks = start_ranks(APP, [*words, str(tmp_path / "both")], ranks=2, log=log)
    codes = [wait(rank) for rank in ranks]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("log.*")]
    alone, both = (
        load_file(tmp_path / run / "model" / "model.safetensors") for run in ("alone", "both")
    )
    for name, value in alone.items():
        reach = TOLERANCE[system] * max(1.0, float(value.abs().max()))
        assert (both[name].double() - value.double()).abs().max() <= reach, name
    metrics = [
        json.loads((tmp_path / run / "metrics.json").read_text())["metrics"]
        for run in ("alone", "both")
    ]
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-3)
