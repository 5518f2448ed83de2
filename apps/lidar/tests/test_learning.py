"""What the smallest network learns of made streets: curbs, better than without a network."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.scenes.files import write_scenes
from heed_lidar_cli import APP
from heed_lidar_cli.street import SAMPLE


def scores(*words: object) -> dict[str, float]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([*(str(word) for word in words), "--json", "--quiet"])
    assert code == 0, err.getvalue()
    return json.loads(out.getvalue()).get("metrics", {})


def explained_heights(run: Path, data: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Edges of slices above the road, and how much the curb logit falls where each is flattened."""
    scans = sorted((data / "sequences" / "11" / "velodyne").glob("*.bin"))[:4]
    scores("explain", run, *scans, "--out", out)
    found = [np.load(out / f"{scan.stem}.npz") for scan in scans]
    falls = np.mean([each["height_logit_fall"] for each in found], axis=0)
    return found[0]["height_edges_m"], falls


@pytest.mark.slow  # about ten minutes of one core
def test_a_network_beats_the_detector_and_looks_at_the_step(tmp_path: Path):
    streets, flat = tmp_path / "streets", tmp_path / "flat"
    sequences = {"00": 64, "02": 4, "11": 16}
    write_scenes(streets, replace(SAMPLE, sequences=sequences))
    write_scenes(flat, replace(SAMPLE, sequences={**sequences, "00": 1}, curb_height_m=0.0))
    network, detector = tmp_path / "network", tmp_path / "detector"
    scores("train", "curbnet", "--data", streets, "--out", network)
    near = ("--data.crop", "forward:25", "--data.roi", "forward:25")
    scores("train", "classical", "--data", streets, "--out", detector, *near)
    learnt = scores("evaluate", network, "--data", streets)
    classical = scores("evaluate", detector, "--data", streets)
    without_steps = scores("evaluate", network, "--data", flat)
    assert learnt["curb_f1"] > classical["curb_f1"] + 0.2
    assert learnt["curb_f1"] > 0.6
    assert learnt["curb_f1_0.15"] > 0.8
    assert without_steps["curb_recall"] < 0.2
    edges, falls = explained_heights(network, streets, tmp_path / "why")
    at_road_level = (edges[:-1] >= 0) & (edges[1:] <= 0.2)
    assert falls[at_road_level].sum() > np.abs(falls[edges[:-1] >= 0.3]).sum()
