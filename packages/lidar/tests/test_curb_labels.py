"""Curb labels that are derived: on steps whose place is known, and on a real scan."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from heed_core.errors import InputError
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.curb_labels import (
    CurbLabelling,
    curb_labels_2d,
    ground_heights,
    make_curb_labels,
    read_curb_rows,
    write_curb_labels,
)
from heed_lidar.labels import read_labels, write_labels
from heed_lidar.layouts import find_scans
from heed_lidar.scans import load_scan
from heed_lidar.settings import LidarData

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
RESTRICTED = DATA / "restricted" / "lidar"
ROAD, SIDEWALK, TERRAIN, CURB = 40, 48, 72, 3


def street(step_m=0.10, *, length_m=12.0, side=SIDEWALK, first_m=2.0, noise_m=0.005):
    """A road up to y = 3 and beside it a higher strip, points every 0.1 m."""
    x, y = np.meshgrid(np.arange(first_m, first_m + length_m, 0.1), np.arange(-3.0, 6.0, 0.1))
    x, y = x.ravel(), y.ravel() + 0.05
    beside = y > 3
    z = -1.73 + step_m * beside + np.random.default_rng(0).normal(0, noise_m, x.shape)
    raw = np.where(beside, side, ROAD).astype(np.uint32) | (9 << 16)
    return np.stack([x, y, z], axis=1), raw


def is_curb(raw):
    return (raw & 0xFFFF) == CURB


def test_points_at_the_step_become_curb():
    xyz, raw = street()
    # Rows of points are 0.05, 0.15, 0.25 m from the border on both sides.
    new = make_curb_labels(xyz, raw, CurbLabelling(border_m=0.28))
    near = np.abs(xyz[:, 1] - 3) < 0.2
    np.testing.assert_array_equal(is_curb(new), near)
    assert set((new >> 16).tolist()) == {9}
    np.testing.assert_array_equal(new[~near], raw[~near])


@pytest.mark.parametrize(
    ("step_m", "found"), [(0.0, False), (0.02, False), (0.05, True), (0.29, True), (0.35, False)]
)
def test_only_steps_of_a_curbs_height_count(step_m, found):
    xyz, raw = street(step_m, noise_m=0.002)
    assert is_curb(make_curb_labels(xyz, raw)).any() == found


def test_a_step_down_from_the_road_is_no_curb():
    xyz, raw = street(-0.10)
    assert not is_curb(make_curb_labels(xyz, raw)).any()


def test_terrain_counts_and_fences_do_not():
    assert is_curb(make_curb_labels(*street(side=TERRAIN))).any()
    assert not is_curb(make_curb_labels(*street(side=51))).any()


def test_short_pieces_are_dropped():
    assert not is_curb(make_curb_labels(*street(length_m=1.5))).any()
    assert is_curb(make_curb_labels(*street(length_m=2.5))).any()


def test_only_the_near_part_ahead_is_labelled():
    xyz, raw = street(first_m=-30.0, length_m=80.0)
    curb = is_curb(make_curb_labels(xyz, raw))
    assert xyz[curb, 0].min() > 0
    assert 39 < np.hypot(*xyz[curb, :2].T).max() <= 40
    around = is_curb(make_curb_labels(xyz, raw, CurbLabelling(ahead=False, range_m=100.0)))
    assert xyz[around, 0].min() < -29.5


def test_the_order_of_points_does_not_matter():
    xyz, raw = street(noise_m=0.05)
    order = np.random.default_rng(1).permutation(len(xyz))
    np.testing.assert_array_equal(
        make_curb_labels(xyz[order], raw[order]), make_curb_labels(xyz, raw)[order]
    )


def test_scans_without_road_or_points_stay_as_they_are():
    xyz, raw = street()
    for keep in (raw == 0, (raw & 0xFFFF) == SIDEWALK, (raw & 0xFFFF) == ROAD):
        np.testing.assert_array_equal(make_curb_labels(xyz[keep], raw[keep]), raw[keep])


def test_ground_is_the_low_of_the_neighbourhood():
    xyz, _ = street()
    wall = np.array([[5.0, 0.0, 1.0], [5.0, 0.0, 2.5]])
    heights = ground_heights(np.vstack([xyz, wall]), wall)
    np.testing.assert_allclose(heights, -1.73, atol=0.02)


def test_listed_places_make_curb_on_the_ground_alone():
    xyz, raw = street()
    rows = np.array([[x, 3.0, 4.0] for x in np.arange(3, 8, 0.1)])
    high = xyz.copy()[:50]
    high[:, :2] = rows[:, :2]
    high[:, 2] = 0.5
    new = curb_labels_2d(np.vstack([xyz, high]), rows)
    distance = cKDTree(rows[:, :2]).query(xyz[:, :2])[0]
    np.testing.assert_array_equal(is_curb(new)[: len(xyz)], distance <= 0.1)
    assert not is_curb(new)[len(xyz) :].any()
    assert set((new[is_curb(new)] >> 16).tolist()) == {4}
    assert set(new[~is_curb(new)].tolist()) == {4}  # raw id "others"
    kept = curb_labels_2d(xyz, rows, raw=raw)
    np.testing.assert_array_equal(kept[~is_curb(kept)], raw[~is_curb(kept)])
    assert set((kept >> 16).tolist()) == {9}
    np.testing.assert_array_equal(curb_labels_2d(xyz, rows[:0], raw=raw), raw)


def test_lists_are_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1.5 2 7\n\n-3 4e0 8\n")
    assert read_curb_rows(path).tolist() == [[1.5, 2, 7], [-3, 4, 8]]
    path.write_text("\n")
    assert read_curb_rows(path).shape == (0, 3)
    for content, row in (("1 2 3\n1 2\n", 2), ("1 2 3 4\n", 1), ("1 2 nan\n", 1)):
        path.write_text(content)
        with pytest.raises(InputError, match=rf"a.txt, row {row}: is not three numbers"):
            read_curb_rows(path)
    with pytest.raises(InputError, match="does not exist"):
        read_curb_rows(tmp_path / "none.txt")


@pytest.fixture
def kitti(tmp_path):
    root = tmp_path / "kitti"
    for sequence in ("00", "02"):
        place = root / "sequences" / sequence
        (place / "velodyne").mkdir(parents=True)
        (place / "labels").mkdir()
        xyz, raw = street(length_m=4.0)
        rows = np.c_[xyz, np.ones(len(xyz))].astype("<f4")
        rows[0] = 0  # a beam without a return
        (place / "velodyne/000001.bin").write_bytes(rows.tobytes())
        write_labels(place / "labels/000001.label", raw)
    return root


def test_a_new_data_set_is_written_and_nothing_overwritten(kitti, tmp_path):
    out = tmp_path / "curbs"
    before = (kitti / "sequences/00/labels/000001.label").read_bytes()
    counts = list(write_curb_labels(kitti, out, LidarData()))
    assert [c.name for c in counts] == ["00/000001", "02/000001"]
    new = read_labels(out / "sequences/00/labels/000001.label")
    assert counts[0].curb == is_curb(new).sum() > 100
    assert counts[0].points == len(new) == len(before) // 4
    xyz, raw = street(length_m=4.0)
    xyz[0] = np.nan  # the removed row keeps its place
    expected = make_curb_labels(xyz[1:].astype(np.float32).astype(float), raw[1:])
    np.testing.assert_array_equal(new, np.r_[raw[:1], expected])
    assert (kitti / "sequences/00/labels/000001.label").read_bytes() == before
    data = LidarData()
    scan = load_scan(find_scans(out, data, "train")[0], data)
    assert (scan.classes == 1).sum() == counts[0].curb
    with pytest.raises(InputError, match="labels: exists already; choose another folder"):
        list(write_curb_labels(kitti, out, data))


def test_new_labels_may_lie_beside_the_old_ones(kitti):
    data = LidarData()
    with pytest.raises(InputError, match="exists already"):
        list(write_curb_labels(kitti, kitti, data))
    list(write_curb_labels(kitti, kitti, data, folder="curbs_derived"))
    derived = LidarData(labels_folder="curbs_derived")
    scan = load_scan(find_scans(kitti, derived, "val")[0], derived)
    assert (scan.classes == 1).any()
    assert not list(kitti.rglob("*.part"))


def test_broken_scans_stop_or_are_told(kitti, tmp_path):
    (kitti / "sequences/00/labels/000001.label").write_bytes(b"123")
    with pytest.raises(InputError, match=r"000001.label: has 3 bytes"):
        list(write_curb_labels(kitti, tmp_path / "a", LidarData()))
    counts = list(write_curb_labels(kitti, tmp_path / "b", LidarData(on_error="skip")))
    assert counts[0].path is None
    assert "has 3 bytes" in counts[0].problem
    assert counts[1].curb > 100
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no"):
        list(write_curb_labels(tmp_path / "empty", tmp_path / "c", LidarData()))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change",
    [
        {"road": ()},
        {"beside": (40,)},
        {"border_m": 0.0},
        {"step_m": (0.3, 0.1)},
        {"cluster_points": 0},
        {"length_m": -1.0},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CurbLabelling(**change)


def test_a_real_scan_has_the_border_that_was_measured():
    """Border points and the quantiles of their step to the nearest road point, counted by hand."""
    if not RESTRICTED.is_dir():
        pytest.skip(f"{RESTRICTED} is not here")
    cloud = read_cloud(RESTRICTED / "000000.bin")
    raw = read_labels(RESTRICTED / "000000.label", count=len(cloud))
    ids = raw & 0xFFFF
    ahead = (cloud.xyz[:, 0] > 0) & (np.hypot(*cloud.xyz[:, :2].T) <= 40)
    walk, road = cloud.xyz[ahead & (ids == SIDEWALK)], cloud.xyz[ahead & (ids == ROAD)]
    distance, nearest = cKDTree(road[:, :2]).query(walk[:, :2])
    near = distance <= 0.30
    assert (len(walk), near.sum()) == (19_034, 1_762)
    step = walk[near, 2] - road[nearest[near], 2]
    np.testing.assert_allclose(np.quantile(step, (0.1, 0.5, 0.9)), [0.003, 0.064, 0.108], atol=6e-4)
    curb = is_curb(make_curb_labels(cloud.xyz, raw))
    assert set(ids[curb].tolist()) <= {40, 44, 60, 48, 49, 72}
    assert 2_000 < curb.sum() < 3_500
    assert curb[ahead & (ids == SIDEWALK)].sum() > 0.8 * near.sum()
    height = cloud.xyz[curb, 2]
    assert np.quantile(height, 0.9) - np.quantile(height, 0.1) < 1.5
