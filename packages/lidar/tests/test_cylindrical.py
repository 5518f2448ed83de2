"""Points to cylindrical voxels: the published numbers, the border cells, majority labels."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from heed_lidar.cylindrical import CylindricalGrid, collate, to_polar, voxel_labels, voxelise

GOLDEN = Path(__file__).parent / "golden" / "cylinder3d" / "fixture.safetensors"
DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
GRID = CylindricalGrid()


def index_of(*xyz: float, grid: CylindricalGrid = GRID) -> list[int]:
    return voxelise(np.array([xyz], float), None, grid)[1][0].tolist()


def test_cells_have_the_published_size():
    # 50 / 479 m, 2 pi / 359 rad, 6 / 31 m: the code divides by one less than the cells.
    assert GRID.cell == pytest.approx([0.104384, 0.0175019, 0.193548], rel=1e-5)


@pytest.mark.parametrize(
    ("xyz", "expected"),
    [
        ((10.0, 0.0, -1.73), [95, 179, 11]),
        ((-1.0, 0.0, 0.0), [9, 359, 20]),  # phi = pi
        ((-1.0, -0.0, 0.0), [9, 0, 20]),  # phi = -pi
        ((60.0, 0.0, 0.0), [479, 179, 20]),  # clipped
        ((10.0, 0.0, -40.0), [95, 179, 0]),
        ((10.0, 0.0, 40.0), [95, 179, 31]),
    ],
)
def test_index(xyz, expected):
    assert index_of(*xyz) == expected


@pytest.mark.parametrize(
    ("low", "high", "cells", "expected"),
    [
        (-3.0, 1.0, 32, [95, 179, 9]),  # 1.27 m / (4 m / 31) = 9.84
        (-3.0, 1.0, 64, [95, 179, 20]),  # 1.27 m / (4 m / 63) = 20.0025
        (-5.0, 3.0, 32, [95, 179, 12]),  # nuScenes: 3.27 m / (8 m / 31) = 12.67
        (-1.73, 1.0, 32, [95, 179, 0]),
        (-4.0, -1.73, 32, [95, 179, 31]),
    ],
)
def test_index_with_other_bounds_of_z(low, high, cells, expected):
    grid = CylindricalGrid(
        shape=(480, 360, cells), low=(0.0, -math.pi, low), high=(50.0, math.pi, high)
    )
    assert grid.cell[2] == pytest.approx((high - low) / (cells - 1))
    assert index_of(10.0, 0.0, -1.73, grid=grid) == expected
    features, index = voxelise(np.array([[10.0, 0.0, -1.73]]), None, grid)
    centre = low + (index[0, 2] + 0.5) * (high - low) / (cells - 1)
    assert features[0, 2] == pytest.approx(-1.73 - centre, abs=1e-6)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_index_equals_the_published_one(precision):
    golden = load_file(GOLDEN)
    points = golden["input.points"]
    grid = CylindricalGrid(shape=(24, 18, 8))
    features, index = voxelise(points[:, :3].astype(precision), points[:, 3], grid)
    np.testing.assert_array_equal(index, golden["input.point_index"][:, 1:])
    expected = golden["input.point_features"]
    np.testing.assert_allclose(features, expected, atol=2**-23 * 50)


def test_features_stand_in_the_published_order():
    xyz, remission = np.array([[3.0, -4.0, -1.7]]), np.array([0.25], np.float32)
    features, index = voxelise(xyz, remission, GRID)
    polar = [5.0, math.atan2(-4.0, 3.0), -1.7]
    centre = (index[0] + 0.5) * GRID.cell + GRID.low
    expected = [*(polar - centre), *polar, 3.0, -4.0, 0.25]
    assert features[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_features_of_points_outside_are_not_clipped():
    features, _ = voxelise(np.array([[60.0, 0.0, 0.0]]), None, GRID)
    assert features[0, 3] == 60.0
    assert features[0, 0] > 9.0  # far from the centre of the border cell
    assert features[0, 8] == 0.0  # no remission


def test_features_of_absurd_points_are_finite():
    xyz = np.array([[1e30, 1.0, -1.7], [1e300, -1e300, 1e300], [4.0, -1e40, 0.0]])
    features, index = voxelise(xyz, None, GRID)
    assert np.isfinite(features).all()
    assert index.tolist() == [[479, 179, 11], [479, 134, 31], [479, 89, 20]]


def test_points_outside_may_be_dropped():
    xyz = np.array([[60.0, 0, 0], [5.0, 1, 0], [5.0, 1, 3]])
    grid = CylindricalGrid(out_of_range="drop")
    features, index = voxelise(xyz, np.array([0.1, 0.2, 0.3], np.float32), grid)
    assert grid.inside(xyz).tolist() == [False, True, False]
    assert features[:, 8].tolist() == [np.float32(0.2)]
    assert index.tolist() == [index_of(5.0, 1.0, 0.0)]


def test_an_empty_scan_has_no_voxels():
    features, index = voxelise(np.zeros((0, 3)), None, GRID)
    assert features.shape == (0, 9)
    assert index.shape == (0, 3)


@given(rho=st.floats(0.0, 50.0), phi=st.floats(-math.pi, math.pi), z=st.floats(-4.0, 2.0))
def test_a_point_lies_in_its_cell(rho, phi, z):
    xyz = np.array([[rho * math.cos(phi), rho * math.sin(phi), z]])
    features, index = voxelise(xyz, None, GRID)
    assert (index >= 0).all()
    assert (index < np.array(GRID.shape)).all()
    assert (np.abs(features[0, :3]) <= GRID.cell / 2 + 1e-6).all()


def test_points_are_treated_one_by_one():
    rng = np.random.default_rng(0)
    xyz, remission = rng.normal(size=(50, 3)) * 20, rng.random(50).astype(np.float32)
    order = rng.permutation(50)
    straight = voxelise(xyz, remission, GRID)
    mixed = voxelise(xyz[order], remission[order], GRID)
    for one, other in zip(straight, mixed, strict=True):
        np.testing.assert_array_equal(one[order], other)


def test_a_wrapped_circle_has_cells_of_one_size_and_no_gap():
    grid = CylindricalGrid(shape=(24, 18, 8), wrap_phi=True)
    assert grid.cell[1] == pytest.approx(2 * math.pi / 18)
    phi = np.radians([-180.0, -170.0, 170.0, 180.0])
    xyz = np.stack([3 * np.cos(phi), 3 * np.sin(phi), np.zeros(4)], axis=1)
    xyz[0, 1] = -0.0
    features, index = voxelise(xyz, None, grid)
    assert index[:, 1].tolist() == [0, 0, 17, 17]
    np.testing.assert_allclose(features[:, 1], np.radians([-10, 0, 0, 10]), atol=1e-6)


@pytest.mark.bad_input
def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"xyz must be .*\(4, 2\)"):
        voxelise(np.zeros((4, 2)), None, GRID)
    with pytest.raises(ValueError, match=r"intensity must be \(4,\), got \(3,\)"):
        voxelise(np.zeros((4, 3)), np.zeros(3, np.float32), GRID)
    with pytest.raises(ValueError, match="shape"):
        CylindricalGrid(shape=(480, 1, 32))
    with pytest.raises(ValueError, match="low must be below high"):
        CylindricalGrid(low=(0.0, -1.0, 2.0))
    with pytest.raises(ValueError, match="clip or drop, got 'wrap'"):
        CylindricalGrid(out_of_range="wrap")
    with pytest.raises(ValueError, match="wrap_phi needs phi to span 2 pi"):
        CylindricalGrid(low=(0.0, -1.0, -4.0), wrap_phi=True)


def loop_labels(classes, voxels, count):
    result = []
    for voxel in range(count):
        votes = classes[voxels == voxel].tolist()
        result.append(min(set(votes), key=lambda c: (-votes.count(c), c)) if votes else 0)
    return result


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=40))
def test_voxels_have_the_class_of_most_points(pairs):
    classes = torch.tensor([c for c, _ in pairs], dtype=torch.long)
    voxels = torch.tensor([v for _, v in pairs], dtype=torch.long)
    found = voxel_labels(classes, voxels, num_voxels=7, num_classes=5)
    assert found.tolist() == loop_labels(classes, voxels, 7)


def test_voxel_labels_equal_the_published_ones():
    golden = {name: torch.from_numpy(array) for name, array in load_file(GOLDEN).items()}
    coords, rows = torch.unique(golden["input.point_index"].long(), dim=0, return_inverse=True)
    assert torch.equal(coords.int(), golden["output.coords"])
    found = voxel_labels(
        golden["input.point_labels"].long(), rows, num_voxels=len(coords), num_classes=20
    )
    assert torch.equal(found.int(), golden["output.voxel_labels"])


def test_scans_are_told_apart_in_a_batch():
    rng = np.random.default_rng(1)
    scans = [voxelise(rng.normal(size=(n, 3)) * 10, None, GRID) for n in (5, 0, 3)]
    classes = [np.full(n, n, np.int64) for n in (5, 0, 3)]
    batch = collate(scans, classes)
    assert (batch.size, batch.counts) == (3, (5, 0, 3))
    assert batch.index[:, 0].tolist() == [0] * 5 + [2] * 3
    assert batch.index.dtype == torch.int32
    assert batch.classes.tolist() == [5] * 5 + [3] * 3
    np.testing.assert_array_equal(batch.points[5:].numpy(), scans[2][0])
    np.testing.assert_array_equal(batch.index[5:, 1:].numpy(), scans[2][1])
    assert batch.to("cpu").counts == batch.counts


@pytest.mark.bad_input
def test_bad_batches_are_refused():
    scan = voxelise(np.ones((4, 3)), None, GRID)
    with pytest.raises(ValueError, match="at least one scan"):
        collate([])
    with pytest.raises(ValueError, match=r"\[4\], got \[3\]"):
        collate([scan], [np.zeros(3, np.int64)])


def test_a_real_scan():
    path = DATA / "restricted" / "lidar" / "000000.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    scan = np.fromfile(path, "<f4").reshape(-1, 4)
    features, index = voxelise(scan[:, :3].astype(np.float64), scan[:, 3], GRID)
    assert np.isfinite(features).all()
    assert (index.max(axis=0) < GRID.shape).all()
    np.testing.assert_allclose(features[:, 3:6], to_polar(scan[:, :3]), rtol=1e-5, atol=1e-5)
    assert 0.3 < len(np.unique(index, axis=0)) / len(index) < 0.6
    road = np.fromfile(path.with_suffix(".label"), "<u4") & 0xFFFF == 40
    assert np.median(index[road, 2]) == 11  # the sensor is 1.73 m above it
