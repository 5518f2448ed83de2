"""`merge`: curbs of many scans come back as the curbs of the street that they were cut from."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.curves import Curb, length_of
from heed_lidar.map_files import read_geojson, write_geojson
from heed_lidar_cli import APP

STEP_M, SCANS = 4.0, 8
LEFT = np.stack([np.linspace(0, 60, 121), 4.0 + 0.02 * np.linspace(0, 60, 121), np.zeros(121)], 1)
RIGHT = LEFT * [1, -1, 1]


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def pose(number: int) -> np.ndarray:
    """Forward along x, turning a little."""
    angle = 0.02 * number
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[0, 3] = STEP_M * number
    return matrix


def seen_from(line: np.ndarray, number: int) -> np.ndarray:
    home = np.linalg.inv(pose(number))
    near = line[np.abs(line[:, 0] - STEP_M * number - 10) < 10]
    return near @ home[:3, :3].T + home[:3, 3]


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """Curbs of eight scans in the sensor's frames, and the poses."""
    rng = np.random.default_rng(0)
    for number in range(SCANS):
        curbs = []
        for k, (side, line) in enumerate((("left", LEFT), ("right", RIGHT))):
            polyline = seen_from(line, number)
            polyline = polyline + rng.normal(scale=(0.02, 0.02, 0.0), size=polyline.shape)
            curbs.append(
                Curb(
                    number=k,
                    polyline=polyline,
                    side=side,
                    length_m=length_of(polyline),
                    rmse_m=0.02,
                    points=50,
                    step_height_m=0.15,
                    score=0.9,
                )
            )
        path = tmp_path / "predictions" / f"{number:06d}_curbs.geojson"
        write_geojson(curbs, path, frame=path.stem)
    rows = [" ".join(f"{v:.9f}" for v in pose(n)[:3].ravel()) for n in range(SCANS)]
    (tmp_path / "poses.txt").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_street_comes_back(drive: Path):
    out = drive / "map"
    words = ("merge", drive / "predictions", "--poses", drive / "poses.txt", "--out", out)
    code, said, err = call(*words, "--write", "geojson", "csv", "dxf", "--smooth", 3, "--json")
    assert code == 0, err
    assert json.loads(said)["n"] == SCANS
    found = read_geojson(out / "map.local.geojson")
    for side, line in (("left", LEFT), ("right", RIGHT)):
        parts = [curb.polyline for curb in found if curb.side == side]
        vertices = np.concatenate(parts)
        away = np.abs(vertices[:, 1] - np.interp(vertices[:, 0], line[:, 0], line[:, 1]))
        assert away.max() < 0.06
        assert vertices[:, 0].max() - vertices[:, 0].min() > 40
    for name in ("map.csv", "map.dxf", "map.png"):
        assert (out / name).stat().st_size > 0
    smoothed = read_geojson(out / "smoothed" / "000007_curbs.local.geojson")
    assert {curb.side for curb in smoothed} == {"left", "right"}


def test_curbs_of_one_scan_alone_are_left_out(drive: Path):
    out = drive / "map"
    words = ("merge", drive / "predictions", "--poses", drive / "poses.txt", "--out", out)
    assert call(*words, "--min-scans", SCANS + 1)[0] == 0
    assert read_geojson(out / "map.local.geojson") == []


def test_with_an_origin_the_map_lies_on_the_earth(drive: Path):
    out = drive / "map"
    words = ("merge", drive / "predictions", "--poses", drive / "poses.txt", "--out", out)
    assert call(*words, "--map-origin", "48.1,11.5", "--write", "geojson", "osm")[0] == 0
    first = json.loads((out / "map.geojson").read_text())["features"][0]
    longitude, latitude, _ = first["geometry"]["coordinates"][0]
    assert abs(longitude - 11.5) < 0.01
    assert abs(latitude - 48.1) < 0.01
    assert "curbstone" in (out / "map.osm").read_text()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "poses.txt").write_text("1 2 3\n"), "has 3 numbers"),
        (lambda d: (d / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n"), "has 1 rows"),
        (lambda d: (d / "poses.txt").unlink(), "does not exist"),
        (
            lambda d: (d / "predictions/000003_curbs.local.geojson").write_text('{"type": 3'),
            "000003_curbs.local.geojson: is not a file of curbs",
        ),
        (
            lambda d: (d / "predictions/000003_curbs.local.geojson").write_text("[]"),
            "is not a file of curbs",
        ),
    ],
)
def test_broken_files_are_one_line(drive: Path, spoil, said: str):
    spoil(drive)
    words = ("merge", drive / "predictions", "--poses", drive / "poses.txt", "--out", drive / "map")
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (drive / "map").exists()
