"""Folders on disk -> scans, splits, classes, and what check finds in them."""

import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_lidar.checking import check_data
from heed_lidar.curb_labels import read_curb_rows
from heed_lidar.labels import BUILTIN, read_labels, write_label_map, write_labels
from heed_lidar.layouts import ScanFile, find_inputs, find_scans, list_scans, natural_key
from heed_lidar.poses import find_poses, moves_along_z, read_calib, read_poses, read_times
from heed_lidar.scans import ScanData, crop_scan, load_scan, raw_by_row
from heed_lidar.settings import (
    LidarData,
    plan_data,
    to_file_frame,
    to_sensor_frame,
)

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
RESTRICTED = DATA / "restricted" / "lidar"
IDS = np.array([0, 3, 40, 48, 50, 44, 3])


def points(n=7, seed=0, z=-1.7):
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(2, 30, (n, 3))
    xyz[:, 2] = z
    return np.c_[xyz, rng.uniform(0, 1, n)].astype("<f4")


def write_scan(root, sequence, stem, *, rows=None, raw=IDS, folder="labels"):
    place = root / "sequences" / sequence
    rows = points(len(IDS) if raw is None else len(raw)) if rows is None else rows
    (place / "velodyne").mkdir(parents=True, exist_ok=True)
    (place / "velodyne" / f"{stem}.bin").write_bytes(rows.tobytes())
    if raw is not None:
        (place / folder).mkdir(exist_ok=True)
        write_labels(place / folder / f"{stem}.label", raw | (5 << 16))
    return place / "velodyne" / f"{stem}.bin"


@pytest.fixture
def kitti(tmp_path):
    """Few sequences of the official lists, frames with gaps, an unlabelled test sequence."""
    root = tmp_path / "kitti"
    for stem in ("000010", "000002", "000100"):
        write_scan(root, "00", stem)
    write_scan(root, "02", "000001")
    write_scan(root, "08", "000001")
    write_scan(root, "11", "000001", raw=None)
    return root


def names(scans):
    return [scan.name for scan in scans]


def test_splits_are_the_official_sequences_that_are_there(kitti):
    data = LidarData()
    assert list_scans(kitti, data).layout == "semantic-kitti"
    train = find_scans(kitti, data, "train")
    assert names(train) == ["00/000002", "00/000010", "00/000100", "08/000001"]
    assert names(find_scans(kitti, data, "val")) == ["02/000001"]
    other = LidarData(labels="semantic-kitti")
    assert names(find_scans(kitti, other, "val")) == ["08/000001"]
    assert {s.split for s in find_scans(kitti, other, "train")} == {"train"}


def test_sequences_can_be_named(kitti):
    data = LidarData(val=("8",), test=("02",))
    assert names(find_scans(kitti, data, "val")) == ["08/000001"]
    assert names(find_scans(kitti, data, "test")) == ["02/000001"]
    assert {s.sequence for s in find_scans(kitti, data, "train")} == {"00"}


def test_a_split_without_labelled_scans_says_what_is_there(kitti):
    with pytest.raises(InputError, match=r"has 1 scans in the split test and no labels for them"):
        find_scans(kitti, LidarData(), "test")
    with pytest.raises(InputError) as fault:
        find_scans(kitti, LidarData(val=("07",)), "val")
    assert "train 4, val 0, test 0; sequences: 00, 02, 08, 11" in str(fault.value)
    assert "--data.val" in str(fault.value)
    with pytest.raises(InputError, match="no labelled scans in the split train"):
        find_scans(kitti, LidarData(layout="nrs", labels="nrs"), "train")
    nrs = LidarData(layout="nrs", labels="nrs", train=("00",))
    assert len(find_scans(kitti, nrs, "train")) == 3


@pytest.mark.parametrize(("labels", "others"), [("nrs", 2), ("curb-only", 2), ("curb", 4)])
def test_labels_of_nrs_are_curb_and_others_for_every_label_map(kitti, labels, others):
    """Of a network that learnt 3D-Curb too, where the id 0 is ignored and 40 is road."""
    data = LidarData(layout="nrs", labels=labels, test=("00",))
    scan = load_scan(find_scans(kitti, data, "test")[0], data)
    assert scan.classes.tolist() == [1 if raw == 3 else others for raw in IDS]
    written = raw_by_row(scan.classes, scan.cloud, data.label_map)
    assert data.label_map.classes_of(written).tolist() == scan.classes.tolist()


def test_labels_of_nrs_have_no_other_classes(kitti, tmp_path):
    for labels in ("curb", "semantic-kitti"):
        data = LidarData(layout="nrs", labels=labels, train=("00",))
        with pytest.raises(InputError, match=r"curb and others alone.*labels nrs"):
            plan_data(data)
        assert "--data.labels nrs" in check_data(data, kitti).problems[0]
    with pytest.raises(InputError, match="there is no class 'curb'"):
        load_scan(find_scans(kitti, data, "train")[0], data)
    path = tmp_path / "map.yaml"
    write_label_map(path, BUILTIN["curb"])
    data = LidarData(layout="nrs", labels=str(path), train=("00",))
    assert set(load_scan(find_scans(kitti, data, "train")[0], data).classes) == {0, 1, 2, 3, 4}
    write_scan(kitti, "00", "000002", raw=np.where(IDS == 48, 777, IDS))
    data = LidarData(layout="nrs", labels="nrs", train=("00",))
    assert plan_data(data) == data
    with pytest.raises(InputError, match="has the label id 777"):
        load_scan(find_scans(kitti, data, "train")[0], data)


def test_sequences_may_be_called_like_splits(tmp_path):
    for folder in ("train", "valid", "test"):
        write_scan(tmp_path, folder, "1")
    for split in ("train", "val", "test"):
        assert len(find_scans(tmp_path, LidarData(), split)) == 1


def test_partners_that_are_missing_stop_or_are_skipped(kitti):
    lost = kitti / "sequences/00/labels/000010.label"
    lost.rename(lost.with_name("000011.label"))
    with pytest.raises(InputError, match=r"000010.bin: has no labels.*and 1 more such problem"):
        find_scans(kitti, LidarData(), "train")
    skipping = LidarData(on_error="skip")
    assert names(find_scans(kitti, skipping, "train")) == ["00/000002", "00/000100", "08/000001"]
    assert names(find_scans(kitti, LidarData(), "val")) == ["02/000001"]
    lines = ScanData.of_split(kitti, skipping, "train").skipped
    assert len(lines) == 2
    assert ScanData.of_split(kitti, skipping, "val").skipped == ()
    assert any("000011.label: has no scan in velodyne/" in line for line in lines)


def test_a_scan_has_the_classes_of_its_points(kitti):
    rows = points()
    rows[2, 0] = np.nan
    write_scan(kitti, "00", "000002", rows=rows)
    data = LidarData()
    scan = load_scan(find_scans(kitti, data, "train")[0], data)
    assert scan.classes.tolist() == [0, 1, 3, 4, 4, 1]
    raw = raw_by_row(scan.classes, scan.cloud, data.label_map)
    assert raw.tolist() == [0, 3, 0, 48, 4, 4, 3]
    assert raw.dtype == np.uint32


def test_labels_come_from_the_folder_that_is_named(kitti):
    write_scan(kitti, "00", "000002", raw=np.full(7, 40), folder="derived")
    data = LidarData(labels_folder="derived", on_error="skip")
    found = find_scans(kitti, data, "train")
    assert names(found) == ["00/000002"]
    assert set(load_scan(found[0], data).classes.tolist()) == {2}


def test_labels_of_another_length_and_unknown_ids_name_the_file(kitti):
    data = LidarData()
    path = kitti / "sequences/02/labels/000001.label"
    scan = find_scans(kitti, data, "val")[0]
    write_labels(path, np.full(6, 40))
    with pytest.raises(InputError) as fault:
        load_scan(scan, data)
    assert str(fault.value).startswith(f"{path}: has 6 labels for a scan of 7 points")
    write_labels(path, np.full(7, 123))
    with pytest.raises(InputError) as fault:
        load_scan(scan, data)
    assert str(fault.value).startswith(f"{path}: has the label id 123 (7 points)")
    assert load_scan(scan, data, label=False).classes is None


def test_curbs_in_the_plane_replace_or_make_labels(tmp_path):
    rows = points()
    rows[:, :2] += 5 * np.arange(7)[:, None]
    ground = rows.copy()
    ground[:, 0] += 0.3
    both = np.vstack([rows, ground])
    write_scan(tmp_path, "00", "7", rows=both, raw=None)
    place = tmp_path / "sequences/00"
    (place / "curb").mkdir()
    (place / "curb/7.txt").write_text(f"{rows[1, 0]} {rows[1, 1]} 12\n")
    data = LidarData()
    assert list_scans(tmp_path, data).layout == "curb-2d"
    scan = load_scan(find_scans(tmp_path, data, "train")[0], data)
    assert scan.classes.tolist() == [4, 1] + [4] * 12
    write_scan(tmp_path, "00", "7", rows=both, raw=np.full(14, 48))
    both_labels = LidarData(layout="curb-2d")
    scan = load_scan(find_scans(tmp_path, both_labels, "train")[0], both_labels)
    assert scan.classes.tolist() == [3, 1] + [3] * 12
    (place / "curb/7.txt").write_text("1 2 3\n\n4 five 6\n")
    with pytest.raises(InputError, match=r"7.txt, row 3: is not three numbers x y curb_id: '4 fi"):
        load_scan(find_scans(tmp_path, both_labels, "train")[0], both_labels)


def test_a_plain_folder_is_read_in_natural_order(tmp_path):
    for stem in ("scan10", "scan2", "scan1"):
        (tmp_path / f"{stem}.bin").write_bytes(points().tobytes())
    (tmp_path / "poses.txt").write_text("1 0 0 0\n")
    (tmp_path / "table.csv").write_text("x,y,z\n1,2,3\n")
    assert names(find_inputs([tmp_path], LidarData())) == ["scan1", "scan2", "scan10"]
    (tmp_path / "labels").mkdir()
    write_labels(tmp_path / "labels/scan2.label", IDS)
    data = LidarData()
    assert names(find_scans(tmp_path, data, "test")) == ["scan2"]
    with pytest.raises(InputError, match="plain folder of scans, all in the split test"):
        find_scans(tmp_path, data, "train")
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    assert names(find_inputs([tmp_path], data)) == ["table"]


def test_links_to_folders_are_followed_once_and_not_in_circles(tmp_path):
    write_scan(tmp_path / "store", "00", "1")
    root = tmp_path / "mine"
    (root / "sequences/00").mkdir(parents=True)
    (root / "sequences/00/velodyne").symlink_to(tmp_path / "store/sequences/00/velodyne")
    (root / "again").symlink_to(root / "sequences")
    (root / "up").symlink_to(tmp_path)
    (root / "sequences/00/round").symlink_to(root)
    assert names(find_inputs([root], LidarData())) == ["sequences/00/1"]
    (root / "loop").symlink_to(tmp_path / "loops")
    (tmp_path / "loops").mkdir()
    (tmp_path / "loops/self").symlink_to(tmp_path / "loops")
    (tmp_path / "loops/2.bin").write_bytes(points().tobytes())
    assert names(find_inputs([root], LidarData())) == ["loop/2", "sequences/00/1"]


def test_broken_links_are_named(tmp_path, kitti):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/1.bin").symlink_to(tmp_path / "gone.bin")
    found = find_inputs([tmp_path / "scans"], LidarData())
    with pytest.raises(InputError, match=r"1.bin: is a link to .*gone.bin, which does not exist"):
        load_scan(found[0], LidarData())
    (tmp_path / "scans/more").symlink_to(tmp_path / "away")
    with pytest.raises(InputError, match=r"more: is a link to .*away, which does not exist"):
        find_inputs([tmp_path / "scans"], LidarData())
    (kitti / "sequences/12").mkdir()
    (kitti / "sequences/12/velodyne").symlink_to(tmp_path / "away")
    with pytest.raises(InputError, match=r"12/velodyne: is a link to"):
        list_scans(kitti, LidarData())


def test_what_a_mixed_folder_leaves_out_is_said(tmp_path, caplog):
    (tmp_path / "predictions").mkdir()
    for name in ("a.bin", "predictions/d.bin"):
        (tmp_path / name).write_bytes(points().tobytes())
    np.save(tmp_path / "b.npy", points())
    (tmp_path / "c.csv").write_text("x,y,z\n1,2,3\n")
    (tmp_path / "poses.txt").write_text("1 0 0 0\n")
    assert names(find_inputs([tmp_path], LidarData())) == ["a"]
    assert len(caplog.messages) == 1
    assert "left out (1 .csv, 1 .npy, 1 in predictions/)" in caplog.text
    caplog.clear()
    assert names(list_scans(tmp_path, LidarData()).scans) == ["a"]
    assert len(caplog.messages) == 1
    caplog.clear()
    find_inputs([tmp_path / "a.bin", tmp_path / "predictions"], LidarData())
    assert not caplog.messages


def test_inputs_have_different_names(tmp_path, kitti):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "scan.bin").write_bytes(points().tobytes())
    (tmp_path / "a/scan.xyz").write_text("1 2 3\n")
    found = find_inputs(
        [tmp_path / "a/scan.bin", tmp_path / "b/scan.bin", tmp_path / "a/scan.xyz"], LidarData()
    )
    assert names(found) == ["a/scan_bin", "b/scan", "a/scan_xyz"]
    assert names(find_inputs([kitti], LidarData()))[:2] == [
        "sequences/00/000002",
        "sequences/00/000010",
    ]
    assert all(not scan.labelled for scan in find_inputs([kitti], LidarData()))


def test_scans_of_one_name_are_named_by_their_folders(tmp_path):
    for sequence in ("drive/sequences/00", "drive/sequences/08", "other/sequences/00"):
        folder = tmp_path / sequence / "velodyne"
        folder.mkdir(parents=True)
        (folder / "000000.bin").write_bytes(points().tobytes())
    drive, other = tmp_path / "drive/sequences", tmp_path / "other/sequences"
    data = LidarData()
    up = drive / ".." / "sequences" / "08"
    assert names(find_inputs([drive / "00", up], data)) == ["00/000000", "08/000000"]
    up = drive / ".." / ".." / "other/sequences/00"
    assert ".." not in "".join(names(find_inputs([drive / "00", up], data)))
    assert names(find_inputs([drive / "00", drive / "08"], data)) == ["00/000000", "08/000000"]
    files = [drive / "00/velodyne/000000.bin", drive / "08/velodyne/000000.bin"]
    assert names(find_inputs(files, data)) == ["00/000000", "08/000000"]
    assert names(find_inputs([drive / "00", other / "00"], data)) == [
        "drive/sequences/00/000000",
        "other/sequences/00/000000",
    ]
    assert names(find_inputs([drive, other], data)) == [
        "drive/sequences/00/000000",
        "drive/sequences/08/000000",
        "other/sequences/00/000000",
    ]


def test_inputs_that_are_no_scans_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    for path, expected in (
        (tmp_path / "notes.md", "is not a file of points"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "holds no scan that can be read"),
    ):
        with pytest.raises(InputError, match=expected):
            find_inputs([path], LidarData())
    for root, expected in (
        (tmp_path, "holds no scans in a known layout"),
        (tmp_path / "notes.md", "is a file"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(InputError, match=expected):
            list_scans(root, LidarData())


def test_an_empty_scan_is_an_error_alone_and_empty_in_a_stream(tmp_path, caplog):
    (tmp_path / "1.bin").write_bytes(b"")
    (tmp_path / "2.bin").write_bytes(points().tobytes())
    data = LidarData()
    with pytest.raises(InputError, match=r"1.bin: holds no points"):
        ScanData(find_inputs([tmp_path / "1.bin"], data), data)[0]
    stream = ScanData(find_inputs([tmp_path], data), data)
    with caplog.at_level(logging.WARNING):
        assert [len(stream[0]), len(stream[1])] == [0, 7]
    assert "1.bin: holds no points; its result is empty" in caplog.text
    assert raw_by_row(np.empty(0, np.int64), stream[0].cloud, data.label_map).shape == (0,)


def test_training_scans_are_cropped_and_data_travels_to_workers(kitti):
    rows = points()
    rows[0, 0] = -5
    write_scan(kitti, "00", "000002", rows=rows)
    data = LidarData(crop="forward")
    files = find_scans(kitti, data, "train")
    whole, cropped = ScanData(files, data)[0], ScanData(files, data, crop=True)[0]
    assert (len(whole), len(cropped)) == (7, 6)
    assert cropped.cloud.rows[0] == 1
    assert cropped.classes.tolist() == whole.classes.tolist()[1:]
    copy = pickle.loads(pickle.dumps(ScanData(files, data)))
    np.testing.assert_array_equal(copy[0].cloud.xyz, whole.cloud.xyz)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        ("none", [1, 2]),
        ("swap", [2, 1]),
        ("rot90", [-2, 1]),
        ("rot-90", [2, -1]),
        ("flip-x", [-1, 2]),
        ("flip-y", [1, -2]),
    ],
)
def test_another_sensors_frame_is_turned_and_turned_back(transform, expected):
    data = LidarData(xy_transform=transform, z_shift=-1.6)
    xyz = np.array([[1.0, 2.0, 3.0]])
    moved = to_sensor_frame(xyz, data)
    np.testing.assert_allclose(moved, [[*expected, 1.4]])
    np.testing.assert_array_equal(xyz, [[1.0, 2.0, 3.0]])
    back = to_file_frame(moved, data, origin=(100.0, 200.0, 300.0))
    np.testing.assert_allclose(back, [[101, 202, 303]])


def test_transform_and_scale_are_applied_to_scans(kitti):
    rows = points()
    rows[:, 3] *= 255
    path = write_scan(kitti, "00", "000002", rows=rows)
    data = LidarData(xy_transform="rot90", z_shift=0.25)
    scan = load_scan(ScanFile(name="a", cloud=path), data)
    np.testing.assert_allclose(scan.cloud.xyz[:, 0], -rows[:, 1])
    np.testing.assert_allclose(scan.cloud.xyz[:, 2], rows[:, 2].astype(float) + 0.25)
    np.testing.assert_allclose(scan.cloud.intensity, rows[:, 3] / 255, rtol=1e-6)


def test_a_plan_needs_the_label_file_no_more(kitti, tmp_path):
    path = tmp_path / "map.yaml"
    own = replace(BUILTIN["curb"], split={"train": ("02",), "val": ("00",), "test": ()})
    write_label_map(path, own)
    planned = plan_data(LidarData(labels=str(path)))
    path.unlink()
    assert planned.label_map.names == own.names
    assert planned.label_map.to_class == own.to_class
    assert names(find_scans(kitti, planned, "train")) == ["02/000001"]
    assert plan_data(planned) == planned
    assert plan_data(LidarData()) == LidarData()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("z_shift", float("nan"), "z_shift must be finite, got nan"),
        ("labels_folder", "a/b", "labels_folder must be a folder's name, got 'a/b'"),
        ("crop", "behind", "crop: a region must be all, forward"),
        ("roi", "3:1,0:1", "roi: a region must not be empty"),
        ("classes", ("road",), "classes must be name=written"),
        ("columns", ("x", "y"), "columns must name x, y and z"),
        ("intensity_scale", -1.0, "intensity_scale must be positive"),
        ("origin", (np.inf, 0.0, 0.0), "origin must be finite"),
    ],
)
def test_settings_are_checked(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        LidarData(**{field: value})


def test_a_sequence_is_in_one_split():
    with pytest.raises(ValueError, match="val must not share sequences with train, got 03"):
        LidarData(train=("3",), val=("03",))


def test_natural_order():
    stems = ["b1", "a10", "a2", "a", "10", "9"]
    assert sorted(stems, key=natural_key) == ["9", "10", "a", "a2", "a10", "b1"]


def test_check_lists_everything_that_is_broken(kitti):
    velodyne, labels = kitti / "sequences/00/velodyne", kitti / "sequences/00/labels"
    (velodyne / "000002.bin").write_bytes(points().tobytes()[:-3])
    write_labels(labels / "000010.label", np.full(3, 40))
    write_labels(labels / "000100.label", np.full(7, 222))
    (velodyne / "000200.bin").write_bytes(b"")
    write_labels(labels / "000200.label", np.empty(0, int))
    write_scan(kitti, "00", "000300", raw=None)
    found = check_data(LidarData(), kitti)
    said = "\n".join(found.problems)
    for part in (
        "000300.bin: has no labels",
        "000002.bin: has 109 bytes",
        "000010.label: has 3 labels for a scan of 7",
        "000100.label: has the label id 222",
        "000200.bin: holds no points",
    ):
        assert part in said
    assert len(found.problems) == 5
    train = next(row for row in found.counts if row["split"] == "train")
    assert (train["scans"], train["broken"], train["labelled"]) == (5, 4, 1)
    assert (train["curb (points)"], train["curb (scans)"], train["ignore (points)"]) == (2, 1, 1)
    assert {row["split"] for row in found.counts} == {"train", "val", "test"}


def test_check_warns_of_what_is_odd(kitti):
    found = check_data(LidarData(labels="semantic-kitti", on_error="skip"), kitti)
    assert any("label id 3 " in line for line in found.problems)
    found = check_data(LidarData(z_shift=5.0, val=("09",)), kitti)
    said = "\n".join(found.warnings)
    for part in (
        "no labelled scans in the split test",
        "no labelled scans in the split val",
        "have fewer than 1000 points",
        "--data.z-shift",
    ):
        assert part in said
    assert (
        check_data(LidarData(), kitti / "none")
        .problems[0]
        .endswith("give the folder of a data set")
    )


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (60.0, "have intensities below 0.02 alone (--data.intensity-scale)"),
        (1e-3, "have most of their intensities at the top of the scale (--data.intensity-scale)"),
        (None, None),
    ],
)
def test_check_warns_of_intensities_of_another_scale(kitti, scale, said):
    lines = check_data(LidarData(intensity_scale=scale), kitti).warnings
    found = [line for line in lines if "--data.intensity-scale" in line]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_check_of_a_broken_label_map_is_one_problem(kitti, tmp_path):
    (tmp_path / "map.yaml").write_text("labels: {0: a}\n")
    found = check_data(LidarData(labels=str(tmp_path / "map.yaml")), kitti)
    assert len(found.problems) == 1
    assert "has no table color_map" in found.problems[0]


STILL = "1 0 0 0 0 1 0 0 0 0 1 0"
"""A pose without a turn or a shift."""


def test_poses_are_turned_into_the_frame_of_the_lidar(tmp_path):
    # Camera: x right, y down, z forward. Two metres ahead is +z there and +x for the LiDAR.
    (tmp_path / "calib.txt").write_text(
        "P0: 7 0 6 0 0 7 1 0 0 0 1 0\nTr: 0 -1 0 0.1 0 0 -1 -0.2 1 0 0 -0.3\n"
    )
    (tmp_path / "poses.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n1 0 0 0 0 1 0 0 0 0 1 2\n")
    (tmp_path / "times.txt").write_text("0.0\n1.036e-01\n")
    calib = read_calib(tmp_path / "calib.txt")
    poses = read_poses(tmp_path / "poses.txt", calib)
    np.testing.assert_allclose(poses[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(poses[1][:3, 3], [2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(read_poses(tmp_path / "poses.txt")[1][:3, 3], [0, 0, 2])
    assert read_times(tmp_path / "times.txt").tolist() == [0.0, 0.1036]


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    pose = "1 0 0 0 0 1 0 0 0 0 1 0"
    contents = {
        "poses.txt": (pose, read_poses, 1),
        "times.txt": ("0.5", read_times, 1),
        "calib.txt": (f"Tr: {pose}", read_calib, 1),
        "curb.txt": ("1 2 3\n4 5 6", read_curb_rows, 2),
    }
    for name, (text, read, count) in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(read(tmp_path / name)) == count
    assert list(read_calib(tmp_path / "calib.txt")) == ["Tr"]


def test_poses_that_cannot_be_read_name_the_row(tmp_path):
    path = tmp_path / "poses.txt"
    for content, read, expected in (
        ("1 2 3\n", read_poses, "row 1: has 3 numbers, 12 were expected"),
        (f"{STILL}\n{STILL[:-2]}\n", read_poses, "row 2: has 11 numbers, 12 were expected"),
        (f"{STILL[:-1]}nan\n", read_poses, "row 1: has a number that is not finite"),
        (f"{STILL}\n{'0 ' * 12}\n", read_poses, "row 2: is not a turn and a shift"),
        (f"Tr: {'2' + STILL[1:]}\n", read_calib, "row 1: is not a turn and a shift"),
        ("\n1 a\n", read_times, "row 2: could not convert string to float: 'a'"),
        ("1 2\n", read_times, "row 1: has 2 numbers, one was expected"),
        ("nan\n", read_times, "row 1: has a number that is not finite"),
        ("Tr 1 2\n", read_calib, "row 1: is not a name and 12 numbers"),
    ):
        path.write_text(content)
        with pytest.raises(InputError) as fault:
            read(path)
        assert str(fault.value).startswith(f"{path}, {expected}")
    path.write_text(f"{STILL}\n")
    with pytest.raises(InputError, match="needs the matrix Tr"):
        read_poses(path, {})


def test_poses_are_found_where_kitti_and_semantic_kitti_have_them(tmp_path):
    sequence = tmp_path / "dataset" / "sequences" / "00"
    sequence.mkdir(parents=True)
    apart, beside = tmp_path / "dataset" / "poses" / "00.txt", sequence / "poses.txt"
    with pytest.raises(InputError, match=r"00: holds no poses.txt, and there is no .*poses/00.txt"):
        find_poses(sequence)
    apart.parent.mkdir()
    apart.touch()
    assert find_poses(apart) == (apart, None)
    (sequence / "calib.txt").touch()
    assert find_poses(sequence) == find_poses(apart) == (apart, sequence / "calib.txt")
    beside.touch()
    assert find_poses(sequence) == find_poses(beside) == (beside, sequence / "calib.txt")
    assert find_poses(apart)[0] == apart


def test_a_camera_moves_along_its_z_whatever_way_the_street_goes():
    def drive(axes):
        """A left turn by a right angle, seen in other axes."""
        poses = np.tile(np.eye(4), (50, 1, 1))
        for k, angle in enumerate(np.linspace(0, np.pi / 2, 50)):
            poses[k, :2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            poses[k, :3, 3] = 100 * np.sin(angle), 100 * (1 - np.cos(angle)), 5 * angle
        return axes @ poses @ np.linalg.inv(axes)

    camera = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert moves_along_z(drive(camera))
    assert not moves_along_z(drive(np.eye(4)))
    assert not moves_along_z(np.tile(np.eye(4), (3, 1, 1)))
    assert not moves_along_z(np.empty((0, 4, 4)))
    standing = np.tile(np.eye(4), (100, 1, 1))
    standing[::2, 2, 3] = 0.01
    assert not moves_along_z(standing)


def test_a_real_scan_in_the_layout(tmp_path):
    if not RESTRICTED.is_dir():
        pytest.skip(f"{RESTRICTED} is not here")
    for part, suffix in (("velodyne", "bin"), ("labels", "label")):
        (tmp_path / "sequences/00" / part).mkdir(parents=True)
        shutil.copy(RESTRICTED / f"000000.{suffix}", tmp_path / "sequences/00" / part)
    data = LidarData(labels="semantic-kitti")
    scan = load_scan(find_scans(tmp_path, data, "train")[0], data)
    counts = np.bincount(scan.classes, minlength=20)
    assert (counts[9], counts[11], counts.sum()) == (20_975, 30_092, 123_389)
    part = crop_scan(scan, "forward:25")
    assert part.cloud.xyz[:, 0].min() > 0
    assert len(part.classes) == len(part)
    raw = read_labels(scan.file.labels, count=len(scan))
    own = data.label_map
    again = own.raw_of(own.classes_of(raw), instances=raw)
    kept = (raw & 0xFFFF) == (again & 0xFFFF)
    assert kept.mean() > 0.9  # moving classes become still ones
    np.testing.assert_array_equal(raw >> 16, again >> 16)
