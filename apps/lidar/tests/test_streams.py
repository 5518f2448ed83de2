"""Folders as streams: memory that does not grow with them, and what a kill leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.scenes.files import SceneSet, write_scenes
from heed_lidar.scenes.sensor import Sensor
from heed_lidar_cli import APP
from heed_runtime.testing.contract import call
from heed_runtime.testing.processes import KILLED, kill_when, start, wait

QUICK = [
    *("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu", "--quiet"),
    *("--model.width", "4", "--model.grid.shape", "120", "90", "8"),
]
PEAK = """
import resource, sys
from heed_lidar_cli import APP
assert APP.call(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def make(root: Path, sensor: Sensor, *counts: int) -> Path:
    """A run, and folders of so many scans that are links to one."""
    write_scenes(root / "data", SceneSet(sequences={"00": 2, "02": 1}, sensor=sensor))
    words = ["train", "curbnet", "--data", str(root / "data"), "--out", str(root / "run"), *QUICK]
    assert APP.call(words) == 0
    source = root / "data" / "sequences" / "00" / "velodyne" / "000000.bin"
    for count in counts:
        folder = root / f"scans{count}"
        folder.mkdir()
        for number in range(count):
            os.link(source, folder / f"{number:06d}.bin")
    return root


def peak_kib(made: Path, count: int, out: Path) -> int:
    words = ["predict", str(made / "run"), str(made / f"scans{count}"), "--out", str(out)]
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, *words, "--device", "cpu", "--quiet", "--data.write", "label"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return int(finished.stdout.split()[-1])


@pytest.mark.slow
def test_the_memory_of_a_stream_does_not_grow_with_its_length(tmp_path: Path):
    made = make(tmp_path, Sensor(azimuth_step_deg=0.35), 20, 200)
    short = peak_kib(made, 20, tmp_path / "short")
    long = peak_kib(made, 200, tmp_path / "long")
    assert len(list((tmp_path / "long").glob("*.label"))) == 200
    assert long < 1.2 * short


def label_of(curbs: Path) -> str:
    return curbs.name.replace("_curbs.csv", ".label")


def test_ctrl_c_is_one_line_and_leaves_whole_files_to_go_on_from(tmp_path: Path):
    made = make(tmp_path, Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0), 30)
    words = ["predict", str(made / "run"), str(made / "scans30"), "--device", "cpu", "--quiet"]
    words += ["--data.write", "label", "csv", "--out", str(tmp_path / "out")]
    out, log = tmp_path / "out", tmp_path / "log"
    child = start(APP, words, log=log)
    while not (out / "000002_curbs.csv").exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
        time.sleep(0.002)
    os.kill(child, signal.SIGINT)
    assert wait(child) == 130
    assert log.read_text().splitlines() == [
        "heed-lidar: stopped; the same command with --resume goes on from here"
    ]
    done = [path for path in out.glob("*_curbs.csv") if path.with_name(label_of(path)).exists()]
    assert 3 <= len(done) < 30
    rows = (made / "scans30" / "000000.bin").stat().st_size // 16
    assert {path.stat().st_size for path in out.glob("*.label")} == {4 * rows}
    assert not list(out.glob(".tmp-*"))
    said = log.stat().st_size
    assert wait(start(APP, [*words, "--resume"], log=log)) == 0
    assert f"{len(done)} were there" in log.read_text()[said:]
    assert len(list(out.glob("*.label"))) == 30


@pytest.mark.slow
def test_a_kill_leaves_whole_files_and_a_stream_that_can_be_resumed(tmp_path: Path):
    made = make(tmp_path, Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0), 20)
    words = ["predict", str(made / "run"), str(made / "scans20"), "--device", "cpu", "--quiet"]
    words += ["--data.write", "label", "csv", "--out"]
    assert APP.call([*words, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"

    def begun() -> bool:
        return len(list(out.glob("*.label"))) >= 5

    child = start(APP, [*words, str(out)], log=tmp_path / "log")
    assert kill_when(child, begun) == KILLED
    left = [path for path in out.iterdir() if not path.name.startswith(".")]
    assert 5 <= len(left) < 40, (tmp_path / "log").read_text()
    for path in left:
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    assert wait(start(APP, [*words, str(out), "--resume"], log=tmp_path / "log")) == 0
    assert not list(out.glob(".tmp-*"))
    for path in (tmp_path / "whole").glob("[0-9]*"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    raw = np.fromfile(out / "000000.label", dtype="<u4")
    assert len(raw) == (made / "scans20" / "000000.bin").stat().st_size // 16


def record(path: Path, kind: str, clouds: list[np.ndarray]) -> Path:
    """A recording of two sensors, of which the one on `/top` sees these clouds, 0.1 s apart.

    Returns:
        The ROS 1 bag, or the MCAP file in a folder of ROS 2.
    """
    pytest.importorskip("rosbags", reason="rosbags is not installed")
    from rosbags import rosbag1, rosbag2
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC if kind == "bag" else Stores.ROS2_HUMBLE)
    types, name = store.types, "sensor_msgs/msg/PointCloud2"
    if kind == "bag":
        writer, extra, pack = rosbag1.Writer(path), {"seq": 0}, store.serialize_ros1
    else:
        mcap = rosbag2.StoragePlugin.MCAP
        writer = rosbag2.Writer(path, version=9, storage_plugin=mcap)
        extra, pack = {}, store.serialize_cdr
    fields = [
        types["sensor_msgs/msg/PointField"](name=column, offset=4 * k, datatype=7, count=1)
        for k, column in enumerate(("x", "y", "z", "intensity"))
    ]
    with writer:
        links = {t: writer.add_connection(t, name, typestore=store) for t in ("/rear", "/top")}
        for number, points in enumerate(clouds):
            time_ns = 10**8 * number
            stamp = types["builtin_interfaces/msg/Time"](sec=7, nanosec=time_ns)
            for topic, link in links.items():
                seen = points if topic == "/top" else points[:9]
                header = types["std_msgs/msg/Header"](stamp=stamp, frame_id=topic[1:], **extra)
                message = types[name](
                    header=header, height=1, width=len(seen), fields=fields, is_bigendian=False,
                    point_step=16, row_step=16 * len(seen), data=seen.reshape(-1).view(np.uint8),
                    is_dense=True,
                )  # fmt: skip
                writer.write(link, time_ns, pack(message, name))
    return path if kind == "bag" else next(path.glob("*.mcap"))


@pytest.mark.parametrize("kind", ["bag", "mcap"])
def test_a_recording_is_predicted_scan_by_scan_and_resumed(tmp_path: Path, kind: str):
    sensor = Sensor(beams=24, azimuth_step_deg=1.0, field_of_view_deg=180.0)
    write_scenes(tmp_path / "data", SceneSet(sequences={"00": 3, "02": 1}, sensor=sensor))
    few = ("--training.min-rings", "2", "--training.height-stds-m", "0.01")
    call(APP, "train", "classical", "--data", tmp_path / "data", "--out", tmp_path / "run", *few)
    scans = sorted((tmp_path / "data/sequences/00/velodyne").glob("*.bin"))
    clouds = [np.fromfile(path, "<f4").reshape(-1, 4) for path in scans]
    drive = record(tmp_path / ("drive.bag" if kind == "bag" else "drive"), kind, clouds)
    out = tmp_path / "out"
    words = ("predict", tmp_path / "run", drive, "--out", out, "--data.write", "label", "geojson")
    with redirect_stderr(io.StringIO()) as err:
        assert APP.call([str(word) for word in words]) == 2
    assert "2 topics with point clouds: /rear, /top; choose one with --data.topic" in err.getvalue()
    found = call(APP, *words, "--data.topic", "/top")
    names = [f"{drive.stem}/{number:06d}" for number in range(3)]
    assert [row["case"] for row in found["predictions"]] == names
    for number, name in enumerate(names):
        assert (out / f"{name}.label").stat().st_size == 4 * len(clouds[number])
        document = json.loads((out / f"{name}_curbs.local.geojson").read_text())
        told = [feature["properties"] for feature in document["features"]]
        assert {(p["stamp"], p["frame_id"]) for p in told} == {(7 + 10**8 * number * 1e-9, "top")}
    whole = (out / f"{names[1]}.label").read_bytes()
    (out / f"{names[1]}.label").unlink()
    again = call(APP, *words, "--data.topic", "/top", "--resume")
    assert [row["case"] for row in again["predictions"]] == names[1:2]
    assert again["earlier"] == 2
    assert (out / f"{names[1]}.label").read_bytes() == whole
