"""A street cast ray by ray: steps are found, flat roads stay empty."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from heed_lidar.classical import TESTS, ClassicalConfig, detect_curbs, examine, fit_ground
from heed_lidar.clouds.cloud import PointCloud
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.rings import ring_numbers, rings_by_elevation, rings_by_order

HEIGHT = 1.73
DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
SCANS = DATA / "restricted" / "lidar"


def cast(step=0.12, offset=4.0, noise=0.01, seed=0, bump=False, terrace=False):
    """A 64-beam scan of a straight road between two curbs, ring by ring as KITTI stores it.

    `bump` puts a box of 0.15 m on the road ahead, `terrace` a second step 2 m behind the curbs.
    """
    elevation = np.radians(np.linspace(-1.0, -24.8, 64))
    azimuth = np.radians(np.arange(0, 360, 0.18) + 0.01)
    ring, turn = (a.ravel() for a in np.meshgrid(np.arange(64), azimuth, indexing="ij"))
    down = np.tan(elevation[ring])
    x, y = np.cos(turn), np.sin(turn)
    reach = HEIGHT / -down
    for height, place in ((step, offset), (2 * step, offset + 2))[: 1 + terrace]:
        edge = place / np.maximum(np.abs(y), 1e-9)
        top = (HEIGHT - height) / -down
        reach = np.where(reach <= edge, reach, np.maximum(edge, top))
    if bump:
        low, high = 1.0, 1.8  # of y, between 5 and 14 m ahead
        top = (HEIGHT - 0.15) / -down
        inside = (top * y > low) & (top * y < high) & (top * x > 5) & (top * x < 14)
        reach = np.where(inside, top, reach)
    z = down * reach
    far = reach < 60
    xyz = np.column_stack([reach * x, reach * y, z])[far]
    xyz += np.random.default_rng(seed).normal(0, noise, xyz.shape) * [1, 1, 0.3]
    return cloud_of(xyz, ring[far])


def cloud_of(xyz, ring=None):
    n = len(xyz)
    return PointCloud(name="made", xyz=xyz, ring=ring, rows=np.arange(n), rows_in_file=n)


def check_two_curbs(found, offset=4.0):
    assert {curb.side for curb in found.fit.curbs} == {"left", "right"}
    for curb in found.fit.curbs:
        assert np.abs(np.abs(curb.polyline[:, 1]) - offset).max() < 0.2
    for side in ("left", "right"):
        length = sum(curb.length_m for curb in found.fit.curbs if curb.side == side)
        assert length > 15


@pytest.mark.parametrize("step", [0.08, 0.12, 0.18])
def test_a_step_is_found(step):
    cloud = cast(step)
    found = detect_curbs(cloud)
    check_two_curbs(found)
    assert found.ground is not None
    assert HEIGHT - step - 0.02 < found.ground.offset < HEIGHT + 0.02  # road or sidewalk
    points = cloud.xyz[found.curb]
    assert (np.abs(np.abs(points[:, 1]) - 4) < 0.3).mean() > 0.95


def test_the_whole_step_is_found_and_not_one_point_of_each_ring():
    cloud = cast(noise=0.0)
    found = detect_curbs(cloud)
    sides = 4 * cloud.ring + 2 * (cloud.xyz[:, 1] > 0) + (cloud.xyz[:, 0] > 0)
    assert found.curb.sum() > 4 * len(np.unique(sides[found.curb]))


def test_few_rings_are_no_curb():
    cloud = cast()
    four = np.unique(cloud.ring)[24:28]
    few = cloud.select(np.isin(cloud.ring, four))
    assert not detect_curbs(few).curb.any()
    assert detect_curbs(few, ClassicalConfig(min_rings=3)).curb.any()


def test_the_step_nearest_to_the_path_is_the_curb():
    check_two_curbs(detect_curbs(cast(terrace=True)))


def test_a_road_on_a_dam_has_no_curbs():
    assert not detect_curbs(cast(step=-0.12)).curb.any()


def test_tests_of_a_step():
    cloud = cast()
    ground = fit_ground(cloud.xyz)
    points = examine(cloud, ground, ClassicalConfig())
    assert tuple(points.passed) == TESTS
    turn = np.arctan2(cloud.xyz[points.rows, 1], cloud.xyz[points.rows, 0])
    order = np.lexsort((turn, points.ring))
    assert (order == np.arange(len(order))).all()
    ends = np.flatnonzero(np.diff(points.ring)) + 1
    for shift in range(-5, 5):  # windows of 5 on each side of the ends of rings
        assert not points.passed["window"][ends + shift].any()
        assert not points.step[ends + shift].any()
    assert points.passed["window"].sum() == len(order) - 10 * (len(ends) + 1)
    near = np.abs(np.abs(cloud.xyz[points.rows, 1]) - 4) < 0.3
    assert points.step[near].mean() > 10 * points.step[~near].mean()


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_a_flat_road_has_no_curbs(noise):
    found = detect_curbs(cast(step=0.0, noise=noise))
    assert found.fit.curbs == ()
    assert not found.curb.any()


def test_classes_and_scores_agree():
    found = detect_curbs(cast())
    assert (found.classes() == np.where(found.curb, 1, 4)).all()
    assert (np.flatnonzero(found.score) == np.sort(found.rows)).all()
    assert 0.5 <= found.score[found.rows].min() <= found.score.max() <= 1
    assert found.curb.sum() == found.fit.kept.sum()


def test_rings_are_found_in_the_order_of_the_file():
    cloud = cast()
    # Rings beyond 60 m hold no points and are not counted.
    expected = np.unique(cloud.ring, return_inverse=True)[1]
    # Noise takes the first point of a ring across the line straight ahead.
    assert (ring_numbers(cloud.xyz) == expected).mean() > 0.999
    front = np.abs(np.arctan2(cloud.xyz[:, 1], cloud.xyz[:, 0])) < np.radians(40)
    assert (ring_numbers(cloud.xyz[front]) == expected[front]).mean() > 0.995
    clean = cast(noise=0.0).xyz
    assert (ring_numbers(clean) == expected).all()
    assert (ring_numbers(clean[::-1]) == expected.max() - expected[::-1]).all()


def test_shuffled_points_get_rings_by_elevation():
    cloud = cast()
    order = np.random.default_rng(0).permutation(len(cloud))
    shuffled = cloud.xyz[order]
    assert rings_by_order(shuffled) is None
    elevation_deg = (-24.8, -1.0)
    rings = ring_numbers(shuffled, elevation_deg=elevation_deg)
    assert (rings == rings_by_elevation(shuffled, beams=64, elevation_deg=elevation_deg)).all()
    assert (rings == 63 - cloud.ring[order]).mean() > 0.9
    config = ClassicalConfig(elevation_deg=elevation_deg)
    check_two_curbs(detect_curbs(cloud_of(shuffled), config))


def test_the_order_of_the_points_does_not_matter_where_rings_are_known():
    cloud = cast()
    order = np.random.default_rng(0).permutation(len(cloud))
    first = detect_curbs(cloud)
    second = detect_curbs(cloud_of(cloud.xyz[order], cloud.ring[order]))
    # The ground plane comes from other trials: a few points on the edge of a threshold differ.
    assert (first.curb[order] == second.curb).mean() > 0.999
    check_two_curbs(second)


def test_a_gaussian_process_refuses_what_lies_on_the_road():
    cloud = cast(bump=True)

    def on_the_road(config):
        points = cloud.xyz[detect_curbs(cloud, config).curb]
        return int((np.abs(points[:, 1]) < 2.5).sum())

    plain = ClassicalConfig()
    assert on_the_road(plain) > 0
    assert on_the_road(replace(plain, process="gaussian")) == 0
    check_two_curbs(detect_curbs(cast(), replace(plain, process="gaussian")))


def test_the_ground_of_a_tilted_street_with_walls():
    rng = np.random.default_rng(0)
    floor = np.column_stack([rng.uniform(-20, 20, (3000, 2)), np.zeros(3000)])
    floor[:, 2] = 0.05 * floor[:, 0] - 0.02 * floor[:, 1] - 1.7 + rng.normal(0, 0.02, 3000)
    wall = np.column_stack(
        [rng.uniform(-20, 20, 2000), np.full(2000, 6.0), rng.uniform(-2, 5, 2000)]
    )
    plane = fit_ground(np.concatenate([floor, wall]))
    normal = np.array([-0.05, 0.02, 1]) / np.sqrt(1 + 0.05**2 + 0.02**2)
    assert plane.normal == pytest.approx(normal, abs=2e-3)
    assert np.abs(plane.height(floor)).mean() < 0.03
    assert fit_ground(wall) is None


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_clouds_of_next_to_nothing(n):
    found = detect_curbs(cloud_of(cast().xyz[:n]))
    assert found.score.shape == found.curb.shape == (n,)
    assert not found.curb.any()
    assert found.fit.curbs == ()


@pytest.mark.parametrize(
    "change",
    [
        {"elevation_deg": (2.0, -24.8)}, {"range_m": (5.0, 5.0)}, {"height_range_m": (0.5, 0.1)},
        {"beams": 0}, {"window": 0}, {"gap": 0.0}, {"process_variance": -1.0},
    ],
)  # fmt: skip
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ClassicalConfig(**change)


@pytest.mark.parametrize("name", ["0000000280", "0000000428"])
def test_curbs_of_a_real_street(name):
    path = SCANS / f"{name}.bin"
    if not path.exists():
        pytest.skip(f"needs the KITTI scan {path}")
    xyz = np.fromfile(path, "<f4").reshape(-1, 4)[:, :3].astype(np.float64)
    found = detect_curbs(cloud_of(xyz))
    # Both streets are straight, with curbs about 4 m to the right and 6 m to the left.
    for side, low, high in (("right", -5.0, -3.4), ("left", 5.3, 6.8)):
        lengths = [
            curb.length_m
            for curb in found.fit.curbs
            if curb.side == side
            and ((curb.polyline[:, 1] > low) & (curb.polyline[:, 1] < high)).all()
        ]
        assert sum(lengths) > 30
    assert sum(curb.length_m for curb in found.fit.curbs) < 110


REAL = sorted(
    path
    for folder in (SCANS, DATA / "lidar-clouds")
    for path in (folder.glob("*") if folder.is_dir() else ())
    if path.suffix in {".bin", ".pcd", ".ply"}
)


@pytest.mark.parametrize("path", REAL or [None], ids=[path.name for path in REAL] or ["none"])
def test_any_real_cloud_is_gone_through(path):
    """Of streets, rooms and objects, of sensors with rings and without: no fault, sound results."""
    if path is None:
        pytest.skip(f"no real clouds under {DATA}: set HEED_DATA")
    cloud = read_cloud(path)
    found = detect_curbs(cloud, ClassicalConfig())
    assert found.curb.shape == found.score.shape == (len(cloud),)
    assert np.isfinite(found.score).all()
    assert ((found.score > 0) | ~found.curb).all()
    numbers = {curb.number for curb in found.fit.curbs}
    assert len(numbers) == len(found.fit.curbs)
    for curb in found.fit.curbs:
        assert np.isfinite(curb.polyline).all()
        assert (curb.polyline >= cloud.xyz.min(axis=0) - 1).all()
        assert (curb.polyline <= cloud.xyz.max(axis=0) + 1).all()
