"""The times of scans, which KITTI's layout keeps in a file of the sequence."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.layouts import find_inputs
from heed_lidar.poses import time_of
from heed_lidar.scans import load_scan
from heed_lidar.settings import LidarData


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    folder = tmp_path / "sequences" / "08"
    (folder / "velodyne").mkdir(parents=True)
    for number in (0, 2, 3):
        np.ones((5, 4), "<f4").tofile(folder / "velodyne" / f"{number:06d}.bin")
    (folder / "times.txt").write_text("0.0\n1.036e-01\n2.074e-01\n")
    return folder


def test_a_scan_has_the_time_of_the_row_that_its_name_counts(sequence: Path):
    data = LidarData()
    found = {file.name: load_scan(file, data).cloud.stamp for file in find_inputs([sequence], data)}
    assert found == {"000000": 0.0, "000002": 0.2074, "000003": None}  # there is no fourth row


def test_a_scan_may_be_named_from_its_own_folder(
    sequence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(sequence / "velodyne")
    assert time_of(Path("000002.bin")) == 0.2074
    shutil.copy("000002.bin", tmp_path / "scan.bin")
    monkeypatch.chdir(tmp_path)
    assert time_of(Path("scan.bin")) is None


def test_other_files_have_no_time(sequence: Path):
    first = sequence / "velodyne" / "000000.bin"
    assert time_of(first.with_name("first.bin")) is None
    assert time_of(sequence / "clouds" / "000000.bin") is None
    (sequence / "times.txt").unlink()
    assert time_of(first) is None


def test_broken_times_are_warned_of_once(sequence: Path, caplog: pytest.LogCaptureFixture):
    (sequence / "times.txt").write_text("0.0\n0.1 0.2\n0.3\n")
    for number in (0, 2, 0):
        assert time_of(sequence / "velodyne" / f"{number:06d}.bin") is None
    (line,) = caplog.messages
    assert line.endswith(
        "times.txt, row 2: has 2 numbers, one was expected; its scans have no times"
    )
