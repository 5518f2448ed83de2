"""Curves through made curbs: what is kept, what is dropped, and that the frame does not matter."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from heed_lidar.curves import (
    CurbFitting,
    cluster_rows,
    fit_curbs,
    length_of,
    resample,
    revert_dropped,
    segment_distance,
    simplify,
)
from heed_lidar.merging import merge_curbs, smooth_curbs, transform_curbs


def raised(xy, seed=0, noise=0.03):
    """Noisy points on a curb face of 0.12 m."""
    rng = np.random.default_rng(seed + 100)
    z = rng.uniform(-1.73, -1.61, len(xy))
    return np.column_stack([xy + rng.normal(0, noise, xy.shape), z])


def street(seed=0, n=1500):
    """Two curved curbs, and a fifth of as many points anywhere; True where a point is curb."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 40, n)
    y = rng.choice([-4.0, 4.0], n) + 0.004 * x**2
    clutter = np.column_stack([rng.uniform(0, 40, n // 5), rng.uniform(-10, 16, n // 5)])
    points = np.concatenate([raised(np.column_stack([x, y]), seed), raised(clutter, seed + 1)])
    return points, np.arange(len(points)) < n


def fit(points, settings=None):
    return fit_curbs(points, np.ones(len(points)), settings)


@pytest.mark.parametrize("seed", range(5))
def test_clutter_goes_and_curbs_stay(seed):
    points, true = street(seed)
    kept = fit(points).kept
    precision_before, precision = true.mean(), true[kept].mean()
    assert precision > precision_before + 0.10
    assert kept[true].mean() > 0.98


def test_two_curbs_are_two_long_curves_on_their_sides():
    curbs = [curb for curb in fit(street()[0]).curbs if curb.length_m > 20]
    assert sorted(curb.side for curb in curbs) == ["left", "right"]
    for curb in curbs:
        x, y, z = curb.polyline.T
        offset = 4.0 if curb.side == "left" else -4.0
        assert np.abs(y - (offset + 0.004 * x**2)).max() < 0.05
        assert curb.rmse_m == pytest.approx(0.03, abs=0.02)
        assert (np.diff(x) > 0).all()
        assert np.abs(z + 1.67).max() < 0.06
        assert curb.step_height_m == pytest.approx(0.8 * 0.12, abs=0.01)  # of uniform heights


def test_a_corner_is_kept():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, np.pi / 2, 500)
    arc = 5 * np.column_stack([np.cos(angle), np.sin(angle)])
    legs = rng.uniform(-12, 0, (2, 600))
    south = np.column_stack([np.full(600, 5.0), legs[0]])
    west = np.column_stack([legs[1], np.full(600, 5.0)])
    result = fit(raised(np.concatenate([arc, south, west])))
    assert result.kept.mean() > 0.95
    assert len(result.curbs) > 1
    assert sum(curb.length_m for curb in result.curbs) == pytest.approx(24 + 2.5 * np.pi, rel=0.1)


def test_a_curb_across_the_road_is_kept():
    y = np.random.default_rng(0).uniform(-10, 10, 500)
    result = fit(raised(np.column_stack([np.full(500, 12.0), y])))
    assert result.kept.mean() > 0.99
    (curb,) = result.curbs
    assert np.abs(curb.polyline[:, 0] - 12).max() < 0.03


def test_curbs_of_a_narrow_island_are_taken_apart():
    result = fit(island())
    assert len(result.curbs) == 2
    assert result.kept.mean() > 0.98


def island(n=1000):
    """Two curbs 0.7 m apart, which clustering joins."""
    x = np.random.default_rng(0).uniform(0, 40, n)
    y = np.where(np.arange(n) % 2, 3.0, 3.7) + 0.005 * x**2
    return raised(np.column_stack([x, y]), noise=0.08)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("scene", [island, lambda: street(0)[0], lambda: street(1, n=600)[0]])
def test_turning_the_scene_changes_nothing(scene, turns):
    points = scene()
    turned = points.copy()
    for _ in range(turns):
        turned = np.column_stack([-turned[:, 1], turned[:, 0], turned[:, 2]])
    assert (fit(points).kept == fit(turned).kept).all()


def test_what_hangs_on_a_curb_does_not_bend_it():
    x = np.random.default_rng(0).uniform(0, 20, 500)
    grass = np.column_stack([np.linspace(12, 20, 120), np.linspace(5.3, 5.6, 120)])
    points = raised(np.concatenate([np.column_stack([x, np.full(500, 5.0)]), grass]))
    (curb,) = fit(points).curbs
    assert np.abs(curb.polyline[:, 1] - 5).max() < 0.03
    assert fit(points).kept[:500].all()
    assert not fit(points).kept[500:].any()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_points_does_not_matter(seed):
    points, _ = street(seed, n=600)
    score = np.random.default_rng(seed).uniform(0.5, 1, len(points))
    order = np.random.default_rng(seed).permutation(len(points))
    first, second = fit_curbs(points, score), fit_curbs(points[order], score[order])
    assert (first.cluster[order] == second.cluster).all()
    for one, other in zip(first.curbs, second.curbs, strict=True):
        assert (one.polyline == other.polyline).all()
        assert replace(one, polyline=other.polyline) == other


def test_points_know_their_curb():
    points, _ = street()
    result = fit(points)
    assert ((result.cluster >= 0) == result.kept).all()
    for number, curb in enumerate(result.curbs):
        assert curb.number == number
        assert (result.cluster == number).sum() == curb.points
    firsts = [tuple(curb.polyline[0]) for curb in result.curbs]
    assert firsts == sorted(firsts)


def test_a_slope_is_not_a_step():
    rng = np.random.default_rng(0)
    x = rng.uniform(5, 25, 600)
    flat = np.column_stack([x, 4 + rng.normal(0, 0.03, 600), 0.08 * x])
    (curb,) = fit(flat).curbs
    assert curb.step_height_m < 0.03


def test_small_and_short_clusters():
    far = np.column_stack([np.linspace(0, 0.6, 5), np.zeros(5), np.zeros(5)])
    blob = far * 0.5 + [20, 0, 0]
    lonely = np.array([[40.0, 0, 0], [40.1, 0, 0]])
    result = fit(np.concatenate([far, blob, lonely]))
    assert result.kept.tolist() == [True] * 5 + [False] * 7
    same = np.zeros((20, 3))
    assert not fit(same).kept.any()


def test_unlikely_points_are_left_out():
    points, true = street()
    score = np.where(true, 0.9, 0.3)
    result = fit_curbs(points, score, CurbFitting(min_score=0.5))
    assert not result.kept[~true].any()
    assert all(curb.score == pytest.approx(0.9) for curb in result.curbs)


def test_no_points_give_no_curbs():
    result = fit(np.zeros((0, 3)))
    assert result.kept.shape == result.cluster.shape == (0,)
    assert result.curbs == ()


@pytest.mark.bad_input
def test_broken_points_are_refused():
    points = np.zeros((9, 3))
    with pytest.raises(ValueError, match=r"xyz must be \(n, 3\)"):
        fit_curbs(points, np.ones(8))
    points[4, 1] = np.nan
    with pytest.raises(ValueError, match="point 4 is not finite"):
        fit(points)


@pytest.mark.parametrize(
    "change",
    [
        {"eps_m": 0.0},
        {"min_points": 1},
        {"degree": 6},
        {"min_score": 2.0},
        {"max_depth": -1},
        {"trim": 0.5},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        CurbFitting(**change)


def naive_core_clusters(xy, eps, min_points):
    """Sets of core points that chains of steps of at most eps join."""
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=-1) <= eps
    core = np.flatnonzero(apart.sum(1) >= min_points)
    groups = {int(i): {int(i)} for i in core}
    for i in core:
        for j in core:
            if apart[i, j] and groups[i] is not groups[j]:
                joined = groups[i] | groups[j]
                groups.update(dict.fromkeys(joined, joined))
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("seed", range(4))
def test_clustering_is_dbscan(seed):
    # On the centres of a grid no two points share a cell, and cells move no point.
    cells = np.unique(np.random.default_rng(seed).integers(0, 200, (140, 2)), axis=0)
    xy = (cells + 0.5) / 20
    clusters = cluster_rows(xy, eps_m=1.0, min_points=5)
    found = {int(row): number for number, rows in enumerate(clusters) for row in rows}
    expected = naive_core_clusters(xy, 1.0 + 1e-9, 5)
    assert len(clusters) == len(expected) > 1
    for group in expected:
        assert len({found[row] for row in group}) == 1


def test_dropped_points_get_another_class():
    classes = np.array([1, 1, 2, 1])
    scores = np.array([[9, 5, 1, 2, 0], [9, 5, 3, 2, 0], [0, 0, 5, 0, 0], [0, 9, 1, 2, 3.0]])
    dropped = np.array([0, 1])
    assert revert_dropped(classes, dropped, scores=scores).tolist() == [3, 2, 2, 1]
    assert revert_dropped(classes, dropped).tolist() == [4, 4, 2, 1]
    assert revert_dropped(classes, dropped[:0], scores=scores).tolist() == classes.tolist()
    assert classes.tolist() == [1, 1, 2, 1]


@given(arrays(np.float64, (12, 3), elements=st.floats(-50, 50)), st.floats(0.01, 5))
def test_simplified_lines_stay_within_the_tolerance(polyline, tolerance):
    short = simplify(polyline, tolerance)
    assert (short[[0, -1]] == polyline[[0, -1]]).all()
    for vertex in polyline:
        nearest = segment_distance(vertex, short[:-1], short[1:])
        assert nearest.min() <= tolerance + 1e-9


def test_a_straight_line_is_two_vertices():
    line = resample(np.array([[0.0, 0, 0], [10, 5, 1]]), 0.5)
    assert len(line) == 24  # 11.225 m
    assert length_of(line) == pytest.approx(np.sqrt(126))
    assert len(simplify(line)) == 2
    line[7, 1] += 0.2
    assert len(simplify(line)) > 2
    with pytest.raises(ValueError, match="tolerance_m"):
        simplify(line, -1.0)


def pose(x, y, angle):
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def drive(frames=6):
    """A straight street seen from a car that drives and turns a little; poses beside it."""
    poses = [pose(8.0 * i, 0.3 * i, 0.02 * i) for i in range(frames)]
    x = np.random.default_rng(0).uniform(0, 90, 8000)
    y = np.where(np.arange(8000) % 2, 5.0, -5.0)
    world = raised(np.column_stack([x, y]))
    seen = []
    for place in poses:
        local = (world - place[:3, 3]) @ place[:3, :3]
        near = (local[:, 0] > 0) & (np.hypot(local[:, 0], local[:, 1]) < 30)
        seen.append(fit(local[near]).curbs)
    return seen, poses


def test_curbs_of_a_drive_become_two():
    frames, poses = drive()
    moved = [
        c for curbs, place in zip(frames, poses, strict=True) for c in transform_curbs(curbs, place)
    ]
    merged = merge_curbs(moved)
    assert [curb.number for curb in merged] == [0, 1]
    assert sorted(curb.side for curb in merged) == ["left", "right"]
    for curb in merged:
        assert np.abs(np.abs(curb.polyline[:, 1]) - 5).max() < 0.05
        assert curb.length_m == pytest.approx(69.5, abs=1.2)  # from 0 to about 40 + sqrt(900 - 25)
        assert curb.step_height_m == pytest.approx(0.096, abs=0.01)
    assert merge_curbs([]) == []


def bend(*, turn):
    """The curbs of a street that turns left by an angle on 60 m of radius, scan by scan."""
    rng = np.random.default_rng(0)
    moved = []
    for at in np.arange(0, turn, 0.05):
        place = pose(60 * np.sin(at), 60 - 60 * np.cos(at), at)
        angle = at + np.linspace(0.05, 0.4, 150)
        arcs = [
            np.stack([r * np.sin(angle), 60 - r * np.cos(angle), 0 * angle], 1) for r in (56, 64)
        ]
        world = np.concatenate(arcs) + rng.normal(scale=0.02, size=(300, 3)) * [1, 1, 0]
        moved += transform_curbs(fit((world - place[:3, 3]) @ place[:3, :3]).curbs, place)
    return moved


def test_merged_bends_are_as_exact_as_the_curbs_of_single_scans():
    merged = merge_curbs(bend(turn=1.5))
    off = [
        np.abs(np.hypot(x, y - 60) - (56 if curb.side == "left" else 64))
        for curb in merged
        for x, y, _ in curb.polyline
    ]
    assert sum(curb.length_m for curb in merged) > 1.6 * 2 * 60
    assert np.mean(off) < 0.02
    assert max(off) < 0.08
    assert all(curb.rmse_m < 0.03 for curb in merged)


def test_merged_curbs_run_in_driving_direction_where_the_street_turns_back():
    merged = merge_curbs(bend(turn=2.8))
    assert any(curb.polyline[-1, 0] < curb.polyline[0, 0] for curb in merged)
    for curb in merged:
        x, y = curb.polyline[:, 0], curb.polyline[:, 1]
        assert (np.diff(np.unwrap(np.arctan2(y - 60, x))) > 0).all()  # anticlockwise


def test_two_pieces_of_one_scan_are_not_two_scans():
    x = np.concatenate([np.linspace(5, 12, 80), np.linspace(12.6, 20, 80)])
    pieces = fit(raised(np.column_stack([x, np.full(160, 5.0)])), CurbFitting(eps_m=0.27)).curbs
    assert len(pieces) == 2
    assert [curb.scans for curb in merge_curbs(pieces, scans=[3, 3])] == [1]
    assert [curb.scans for curb in merge_curbs(pieces)] == [2]
    assert smooth_curbs([[], pieces], [np.eye(4)] * 2) == []
    with pytest.raises(ValueError, match="one per curb"):
        merge_curbs(pieces, scans=[3])


def test_smoothing_drops_what_one_frame_saw():
    frames, poses = drive()
    ghost = replace(frames[-1][0], polyline=frames[-1][0].polyline + np.array([0, 12.0, 0]))
    smooth = smooth_curbs([*frames[:-1], (*frames[-1], ghost)], poses)
    assert len(smooth) == 2
    home = poses[-1]
    for curb in transform_curbs(smooth, home):
        assert np.abs(np.abs(curb.polyline[:, 1]) - 5).max() < 0.05
    assert smooth_curbs([], []) == []
    with pytest.raises(ValueError, match="as many poses"):
        smooth_curbs(frames, poses[:-1])
    with pytest.raises(ValueError, match="rigid motion"):
        transform_curbs(smooth, np.diag([2.0, 2, 2, 1]))


def test_a_curve_does_not_swing_out_over_a_gap_between_its_points():
    left = np.column_stack([np.linspace(25.4, 27.9, 12), np.linspace(-18.6, -17.5, 12)])
    right = np.column_stack([np.linspace(25.2, 27.9, 12), np.linspace(-14.7, -15.4, 12)])
    between = [[27.2, -16.9], [27.2, -16.4], [27.2, -15.9]]  # off the arc: dropped by the fit
    xyz = np.column_stack([np.concatenate([left, right, between]), np.full(27, -1.7)])
    fit = fit_curbs(xyz, np.ones(27))
    assert fit.curbs
    for curb in fit.curbs:
        members = xyz[fit.cluster == curb.number, :2]
        gaps = np.linalg.norm(curb.polyline[:, None, :2] - members[None], axis=2).min(axis=1)
        assert (gaps <= 1.0).all()
