"""`merge`: curbs of many scans come back as the curbs of the street that they were cut from."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.curves import Curb, length_of
from heed_lidar.map_files import read_geojson, write_geojson
from heed_lidar.merging import transform_curbs
from heed_lidar_cli import APP
from heed_lidar_cli.merge import draw

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


def numbers(matrix: np.ndarray) -> str:
    """A row of a file of poses."""
    return " ".join(f"{v:.9f}" for v in matrix[:3].ravel())


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
    rows = [numbers(pose(n)) for n in range(SCANS)]
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
    code, said, _ = call(*words, "--min-scans", SCANS + 1)
    assert code == 0
    assert "2 seen in fewer than 9 scans are left out (--min-scans)" in said
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


CAMERA = np.array([[0.0, -1, 0, 0.1], [0, 0, -1, -0.2], [1, 0, 0, -0.3], [0, 0, 0, 1]])
"""From the LiDAR's axes to those of KITTI's camera."""


@pytest.fixture
def kitti(drive: Path) -> Path:
    """The same drive with the poses of the camera apart from the sequence."""
    sequence = drive / "dataset" / "sequences" / "00"
    sequence.mkdir(parents=True)
    (drive / "dataset" / "poses").mkdir()
    seen = [CAMERA @ pose(n) @ np.linalg.inv(CAMERA) for n in range(SCANS)]
    (drive / "dataset/poses/00.txt").write_text("\n".join(map(numbers, seen)) + "\n")
    (sequence / "calib.txt").write_text(f"Tr: {numbers(CAMERA)}\n")
    return drive


@pytest.mark.parametrize("given", ["poses/00.txt", "sequences/00"])
def test_poses_of_kitti_lie_apart_from_the_sequence(kitti: Path, given: str):
    words = ("merge", kitti / "predictions", "--poses")
    assert call(*words, kitti / "poses.txt", "--out", kitti / "map")[0] == 0
    code, _, err = call(*words, kitti / "dataset" / given, "--out", kitti / "other")
    assert code == 0, err
    name = "map.local.geojson"
    for one, other in zip(
        read_geojson(kitti / "map" / name), read_geojson(kitti / "other" / name), strict=True
    ):
        np.testing.assert_allclose(one.polyline, other.polyline, atol=1e-3)


def test_the_calibration_may_lie_anywhere_and_is_missed(kitti: Path):
    calib = (kitti / "dataset/sequences/00/calib.txt").rename(kitti / "mine.txt")
    poses = kitti / "dataset" / "poses" / "00.txt"
    words = ("merge", kitti / "predictions", "--poses", poses, "--out", kitti / "map")
    code, _, err = call(*words)
    assert code == 2
    assert f"{poses}: moves along z, as a camera does, and there is no calibration" in err
    assert "--calib" in err
    code, _, err = call(*words, "--calib", kitti / "none.txt")
    assert (code, "none.txt: does not exist" in err) == (2, True)
    calib.write_text(f"P0: {numbers(CAMERA)}\n")
    code, _, err = call(*words, "--calib", calib)
    assert (code, "needs the matrix Tr" in err) == (2, True)
    calib.write_text(f"Tr: {numbers(CAMERA)}\n")
    assert call(*words, "--calib", calib)[0] == 0


def test_curbs_in_the_coordinates_of_a_map_are_not_moved_again(drive: Path):
    shift = np.array([500_000.0, 5_400_000.0, 100.0])
    for number in range(SCANS):
        name = f"{number:06d}_curbs"
        curbs = transform_curbs(
            read_geojson(drive / "predictions" / f"{name}.local.geojson"), pose(number)
        )
        placed = [replace(curb, polyline=curb.polyline + shift) for curb in curbs]
        write_geojson(placed, drive / "predictions" / f"{name}.geojson", crs="map")
    words = ("merge", drive / "predictions", "--poses", drive / "poses.txt", "--out", drive / "map")
    code, _, err = call(*words)
    assert code == 2
    assert "000001_curbs.local.geojson: holds curbs in the frame of a map" in err
    assert "1 0 0 0 0 1 0 0 0 0 1 0" in err
    (drive / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * SCANS)
    assert call(*words)[0] == 0
    found = np.concatenate([c.polyline for c in read_geojson(drive / "map" / "map.local.geojson")])
    away = np.abs(np.abs(found[:, 1] - shift[1]) - 4 - 0.02 * (found[:, 0] - shift[0]))
    assert away.max() < 0.06


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "poses.txt").write_text("1 2 3\n"), "has 3 numbers"),
        (lambda d: (d / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n"), "has 1 rows"),
        (lambda d: (d / "poses.txt").write_text("0 " * 12), "row 1: is not a turn and a shift"),
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


@pytest.mark.parametrize("out", [".", "predictions", "calibration"])
def test_folders_that_are_read_are_not_replaced(drive: Path, out: str):
    (drive / "calibration").mkdir()
    poses = (drive / "poses.txt").rename(drive / "calibration" / "poses.txt")
    before = sorted(drive.rglob("*"))
    words = ("merge", drive / "predictions", "--poses", poses, "--out", drive / out, "--overwrite")
    code, _, err = call(*words)
    assert code == 2
    assert "holds files that are read here" in err
    assert sorted(drive.rglob("*")) == before


def test_a_straight_drive_is_drawn_on_the_whole_picture():
    poses = np.tile(np.eye(4), (20, 1, 1))
    poses[:, 0, 3] = np.arange(20) * 50.0
    figure = draw([], poses)
    figure.draw_without_rendering()
    box = figure.axes[0].get_position()
    assert box.height > 0.7
    left, right, low, high = figure.axes[0].axis()
    width_in, height_in = figure.get_size_inches()
    shown = (box.width * width_in) / (box.height * height_in)
    assert (right - left) / (high - low) == pytest.approx(shown)  # a metre is a metre both ways
