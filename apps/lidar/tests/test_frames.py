"""Scans of other frames than the one that a network learnt, and what is kept for export."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.clouds.cloud import CloudOptions
from heed_lidar.clouds.las import write_las
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP
from heed_runtime.testing.contract import spoken

QUICK = [
    *("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu"),
    *("--model.width", "4", "--model.grid.shape", "48", "36", "8"),
]
SENSOR = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)


def call(*words: object) -> tuple[dict, str]:
    """What a command says as JSON, and the lines of its standard error."""
    code, out, err = spoken(APP, *words, "--json")
    assert code == 0, err
    return json.loads(out), err


def scan(data: Path, number: int = 0, sequence: str = "00") -> Path:
    return data / "sequences" / sequence / "velodyne" / f"{number:06d}.bin"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "data"
    write_scenes(root, SceneSet(sequences={"00": 2, "02": 1, "11": 2}, sensor=SENSOR))
    return root


@pytest.fixture(scope="module")
def turned(data: Path) -> Path:
    """The same data of a sensor whose x points to the left and whose y points backward."""
    root = Path(shutil.copytree(data, data.parent / "turned"))
    for path in root.rglob("*.bin"):
        points = np.fromfile(path, "<f4").reshape(-1, 4)
        np.stack([points[:, 1], -points[:, 0], points[:, 2], points[:, 3]], axis=1).tofile(path)
    return root


TURN = ("--data.xy-transform", "rot90")


def test_compare_scores_the_part_that_lies_ahead_of_a_turned_sensor(data: Path, turned: Path):
    straight, _ = call("compare", data, data, "--roi", "forward:20")
    other, _ = call("compare", data, turned, "--roi", "forward:20")
    right, _ = call("compare", data, turned, "--roi", "forward:20", *TURN)
    assert right["metrics"] == straight["metrics"]
    assert other["metrics"]["points"] != straight["metrics"]["points"]


def test_curb_labels_are_derived_ahead_of_a_turned_sensor(data: Path, turned: Path, tmp_path: Path):
    counts = {}
    cases = {"straight": (data, ()), "other": (turned, ()), "right": (turned, TURN)}
    for name, (root, words) in cases.items():
        found, _ = call("make-curb-labels", root, "--out", tmp_path / name, *words)
        counts[name] = [row["curb"] for row in found["scans"]]
    assert sum(counts["straight"]) > 0
    assert counts["right"] == counts["straight"] != counts["other"]


def test_view_draws_a_turned_and_lifted_scan_as_it_stood(data: Path, turned: Path, tmp_path: Path):
    pictures = {}
    for root, lift, words in ((data, 0, ()), (turned, 1, (*TURN, "--data.z-shift", -1))):
        folder = tmp_path / root.name
        folder.mkdir()
        points = np.fromfile(scan(root), "<f4").reshape(-1, 4)
        (points + np.array([0, 0, lift, 0], "<f4")).tofile(folder / "same.bin")
        shutil.copy(scan(root).parents[1] / "labels/000000.label", folder / "same.label")
        found, _ = call("view", folder / "same.bin", "--out", folder / "pictures", *words)
        pictures[root.name] = [Path(name).read_bytes() for name in found["files"]]
    assert len(pictures["data"]) == 2
    assert pictures["data"] == pictures["turned"]


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    call("train", "curbnet", "--data", data, "--out", data.parent / "run", *QUICK)
    return data.parent / "run"


def spoil(path: Path, share: float) -> str:
    """Make the first rows of a scan NaN; what is to be said of it."""
    points = np.fromfile(path, "<f4").reshape(-1, 4)
    count = round(share * len(points))
    points[:count, 1] = np.nan
    points.tofile(path)
    return f"{count} of its {len(points)} rows ({100 * count / len(points):.3g} %) have"


def test_points_without_a_place_are_said_once(run: Path, data: Path, tmp_path: Path):
    spoilt = Path(shutil.copytree(data, tmp_path / "spoilt"))
    said = {path: spoil(path, 0.9) for path in sorted(spoilt.rglob("*.bin"))}
    one = scan(spoilt, 0, "11")
    cases = {
        ("train", "curbnet", "--data", spoilt, "--out", tmp_path / "new", *QUICK): "02/000000",
        ("evaluate", run, "--data", spoilt, "--split", "test"): "11/000000",
        ("predict", run, spoilt / "sequences/11", "--out", tmp_path / "out"): "000000",
        ("explain", run, one, "--out", tmp_path / "why"): "000000",
    }
    for words, name in cases.items():
        lines = [line for line in call(*words)[1].splitlines() if "NaN or infinite" in line]
        assert f"warning: {name}: " in lines[0]
        assert all(line.endswith("they are left out (said once)") for line in lines)
        assert len(lines) == (2 if words[0] == "train" else 1)  # training scans, validation scans
        if words[0] == "predict":
            assert said[one] in lines[0]
    assert "NaN" not in call("evaluate", run, "--data", data, "--split", "test")[1]


UTM = np.array([447_321.25, 5_411_987.5, 118.125])


@pytest.fixture(scope="module")
def detector(data: Path) -> Path:
    """A run of the classical detector, which finds curbs without having learnt."""
    out = data.parent / "detector"
    few = ("--training.min-rings", "2", "--training.height-stds-m", "0.01")
    call("train", "classical", "--data", data, "--out", out, *few)
    return out


def vertices(folder: Path) -> dict[str, np.ndarray]:
    """The places in all files that predict wrote of a scan, by their kind."""
    with (folder / "tile_curbs.csv").open() as file:
        rows = [[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)]
    document = json.loads((folder / "tile_curbs.local.geojson").read_text())
    lines = [feature["geometry"]["coordinates"] for feature in document["features"]]
    return {
        "csv": np.array(rows),
        "geojson": np.concatenate(lines),
        "ply": read_cloud(folder / "tile_classes.ply", CloudOptions(origin=(0, 0, 0))).xyz,
    }


def test_files_of_a_scan_in_utm_coordinates_keep_centimetres(
    detector: Path, data: Path, tmp_path: Path
):
    points = np.fromfile(scan(data, 0, "11"), "<f4").reshape(-1, 4)
    xyz = points[:, :3].astype(np.float64).round(3)
    found = {}
    for name, origin in (("sensor", np.zeros(3)), ("utm", UTM)):
        folder = tmp_path / name
        folder.mkdir()
        write_las(folder / "tile.las", xyz + origin, intensity=points[:, 3])
        words = ("predict", detector, folder / "tile.las", "--out", folder / "out")
        _, err = call(*words, "--data.origin", *origin, "--data.write", "ply", "csv", "geojson")
        assert "warning" not in err
        found[name] = vertices(folder / "out")
    document = json.loads((tmp_path / "utm/out/tile_curbs.local.geojson").read_text())
    assert document["heed:crs"] == "map"
    for kind, places in found["utm"].items():
        assert len(places) > 1, kind
        np.testing.assert_allclose(places, found["sensor"][kind] + UTM, rtol=0, atol=0.01)


def test_curbs_of_a_sequence_have_the_times_of_its_file(detector: Path, data: Path, tmp_path: Path):
    (data / "sequences/11/times.txt").write_text("12.5\n12.6\n")
    words = ("predict", detector, data / "sequences/11", "--out", tmp_path)
    call(*words, "--data.write", "geojson")
    for number, stamp in enumerate((12.5, 12.6)):
        document = json.loads((tmp_path / f"{number:06d}_curbs.local.geojson").read_text())
        assert document["features"]
        assert {feature["properties"]["stamp"] for feature in document["features"]} == {stamp}
