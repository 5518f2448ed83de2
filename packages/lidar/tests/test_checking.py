"""What a user is told of a scan that lies elsewhere than where curbs are looked for."""

from pathlib import Path

import numpy as np
import pytest

from heed_lidar.checking import check_data, frame_doubts
from heed_lidar.cylindrical import CylindricalGrid
from heed_lidar.layouts import ScanFile
from heed_lidar.scans import Scan, load_scan
from heed_lidar.settings import LidarData

UTM = np.array([500_123.456, 5_400_789.012, 115.3])


def street(count: int = 2000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.column_stack(
        [rng.uniform(2, 30, count), rng.uniform(-8, 8, count), np.full(count, -1.7)]
    )


def read(path: Path, xyz: np.ndarray, data: LidarData) -> Scan:
    np.save(path, np.column_stack([xyz, np.full(len(xyz), 0.5)]))
    return load_scan(ScanFile(name=path.stem, cloud=path), data)


@pytest.mark.parametrize(
    ("shift", "data", "kinds"),
    [
        ([0, 0, 0], LidarData(), set()),
        (UTM, LidarData(), {"origin", "outside"}),
        (UTM, LidarData(origin=(500_123.456, 5_400_789.012, 115.3)), set()),
        ([900.0, 0, 0], LidarData(), {"outside"}),  # a map's of its own, below 10 km
        ([0, 0, 1.73], LidarData(), {"road"}),  # seen from the ground
        ([0, 0, 1.73], LidarData(z_shift=-1.73), set()),
        ([0, 0, 20.0], LidarData(), {"outside"}),
    ],
)
def test_a_scan_in_another_frame_raises_doubts(tmp_path: Path, shift, data, kinds):
    scan = read(tmp_path / "a.npy", street() + shift, data)
    seen = CylindricalGrid().inside(scan.cloud.xyz)
    doubts = frame_doubts(scan, data, seen)
    assert set(doubts) == kinds
    assert all("--data." in line for line in doubts.values())
    assert "road" not in frame_doubts(scan, data, seen, road=False)


def test_the_doubt_about_an_origin_names_the_one_that_was_taken(tmp_path: Path):
    scan = read(tmp_path / "a.npy", street() + UTM, LidarData())
    assert (
        "(500100, 5400800, 100)" in frame_doubts(scan, LidarData(), np.ones(2000, bool))["origin"]
    )


def test_a_scan_without_points_raises_none(tmp_path: Path):
    scan = read(tmp_path / "a.npy", street(1), LidarData())
    empty = Scan(name="a", cloud=scan.cloud.select(np.zeros(1, bool)), classes=None, file=scan.file)
    assert frame_doubts(empty, LidarData(), np.zeros(0, bool)) == {}


def test_check_names_the_scans_whose_origin_is_guessed(tmp_path: Path):
    read(tmp_path / "a.npy", street() + UTM, LidarData())
    assert any("--data.origin" in line for line in check_data(LidarData(), tmp_path).warnings)
    given = LidarData(origin=(500_123.456, 5_400_789.012, 115.3))
    assert not any("--data.origin" in line for line in check_data(given, tmp_path).warnings)
