"""Files with wrong bytes in them: every reader reads one or says in one line that it cannot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from heed_core.errors import InputError
from heed_core.testing.damage import check_readers
from heed_lidar.clouds.las import write_las
from heed_lidar.clouds.ply import write_ply
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.curb_labels import read_curb_rows
from heed_lidar.curves import Curb
from heed_lidar.labels import read_label_map, read_labels
from heed_lidar.map_files import read_geojson, write_geojson
from heed_lidar.poses import read_calib, read_poses, read_times

MOTION = "1 0 0 {} 0 1 0 0.5 0 0 1 0\n"
TEXTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "poses.txt": ("".join(MOTION.format(k) for k in range(5)), read_poses),
    "calib.txt": ("P0: " + MOTION.format(0) + "Tr: " + MOTION.format(1), read_calib),
    "times.txt": ("0.0\n1.0e-1\n0.2\n", read_times),
    "curbs.txt": ("1.0 2.0 0\n1.5 2.0 0\n-3 4 1\n", read_curb_rows),
}
TABLES = {
    "labels": {0: "unlabeled", 40: "road", 48: "sidewalk"},
    "color_map": {0: [0, 0, 0], 40: [255, 0, 255], 48: [75, 0, 75]},
    "learning_map": {0: 0, 40: 1, 48: 2},
    "learning_map_inv": {0: 0, 1: 40, 2: 48},
    "learning_ignore": {0: True, 1: False, 2: False},
}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_beside_scans(tmp_path: Path, name: str):
    text, read = TEXTS[name]
    (tmp_path / name).write_text(text)
    for seed in range(3):
        check_readers(tmp_path / name, [read], seed=seed)


def test_label_maps(tmp_path: Path):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(TABLES))
    for seed in range(4):
        check_readers(tmp_path / "map.yaml", [read_label_map], seed=seed)


@pytest.mark.parametrize("text", ["[" * 5000, "labels: !!int x", "labels: !!bool x", "a: &a [*a]"])
def test_label_maps_of_odd_yaml(tmp_path: Path, text: str):
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(InputError, match=r"map\.yaml: "):
        read_label_map(tmp_path / "map.yaml")


def test_labels(tmp_path: Path):
    (tmp_path / "a.label").write_bytes(np.arange(40, dtype="<u4").tobytes())
    check_readers(tmp_path / "a.label", [lambda p: read_labels(p, count=40)])


def test_maps(tmp_path: Path):
    line = np.column_stack([np.arange(4.0), np.ones(4), np.zeros(4)])
    curb = Curb(
        number=0,
        polyline=line,
        side="left",
        length_m=3.0,
        rmse_m=0.01,
        points=40,
        step_height_m=0.12,
        score=0.9,
    )
    path = write_geojson([curb], tmp_path / "curbs.geojson")
    for seed in range(4):
        check_readers(path, [read_geojson], seed=seed)


@pytest.mark.parametrize("name", ["tile.las", "tile.laz"])
def test_tiles(tmp_path: Path, name: str):
    places = np.random.default_rng(0).uniform(-50, 50, (60, 3)).round(3)
    write_las(tmp_path / name, places, intensity=np.linspace(0, 1, 60, dtype=np.float32))
    for seed in range(2):
        check_readers(tmp_path / name, [read_cloud], seed=seed)


@pytest.mark.parametrize("name", ["scan.bin", "scan.pcd.bin", "scan.npy", "scan.npz"])
def test_arrays(tmp_path: Path, name: str):
    points = np.random.default_rng(0).uniform(1, 50, (60, 5)).astype("<f4")
    match name:
        case "scan.npy":
            np.save(tmp_path / name, points[:, :4])
        case "scan.npz":
            np.savez_compressed(tmp_path / name, xyz=points[:, :3], intensity=points[:, 3])
        case _:
            points[:, : 5 if ".pcd" in name else 4].tofile(tmp_path / name)
    for seed in range(2):
        check_readers(tmp_path / name, [read_cloud], seed=seed, refused=5)


@pytest.mark.parametrize("form", ["ascii", "binary", "binary_compressed"])
def test_pcd(tmp_path: Path, form: str):
    points = np.random.default_rng(0).uniform(-50, 50, (60, 3)).astype("<f4")
    body = points.tobytes()
    if form == "ascii":
        body = "\n".join(" ".join(f"{v:.3f}" for v in row) for row in points).encode()
    elif form == "binary_compressed":  # columns, as runs of at most 32 bytes as they are
        columns = points.T.tobytes()
        runs = [columns[k : k + 32] for k in range(0, len(columns), 32)]
        packed = b"".join(bytes([len(run) - 1]) + run for run in runs)
        body = np.array([len(packed), len(columns)], "<u4").tobytes() + packed
    header = f"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 60\nDATA {form}\n"
    (tmp_path / "scan.pcd").write_bytes(header.encode() + body)
    np.testing.assert_allclose(read_cloud(tmp_path / "scan.pcd").xyz, points, atol=6e-4)
    for seed in range(2):
        check_readers(tmp_path / "scan.pcd", [read_cloud], seed=seed)


@pytest.mark.parametrize("form", ["binary", "ascii"])
def test_ply(tmp_path: Path, form: str):
    points = np.random.default_rng(0).uniform(-50, 50, (60, 3))
    write_ply(tmp_path / "scan.ply", points)
    if form == "ascii":
        lines = (" ".join(f"{v:.3f}" for v in row) for row in points)
        head = "ply\nformat ascii 1.0\nelement vertex 60\n"
        head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
        (tmp_path / "scan.ply").write_text(head + "\n".join(lines))
    for seed in range(2):
        check_readers(tmp_path / "scan.ply", [read_cloud], seed=seed)


def test_text(tmp_path: Path):
    rows = "\n".join(f"{k}.5,{k},-1.7,{k / 60:.2f}" for k in range(60))
    (tmp_path / "scan.csv").write_text("x,y,z,intensity\n" + rows)
    for seed in range(2):
        check_readers(tmp_path / "scan.csv", [read_cloud], seed=seed)
