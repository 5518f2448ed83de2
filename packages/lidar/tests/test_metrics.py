"""Scores against hand counts and double loops."""

import math
from itertools import pairwise

import numpy as np
import pytest

from heed_lidar.curves import Curb
from heed_lidar.metrics import (
    CurbScoring,
    confusion_matrix,
    curve_distance,
    score_scan,
    summarise,
    within,
)

NAMES = ("ignore", "curb", "road", "sidewalk", "others")


def random_scan(seed, n=400):
    rng = np.random.default_rng(seed)
    xyz = np.column_stack(
        [rng.uniform(-10, 60, n), rng.uniform(-20, 20, n), rng.normal(-1.7, 1, n)]
    )
    return xyz, rng.integers(0, 5, n), rng.integers(0, 5, n)


def line(n=200, y=3.0):
    return np.column_stack([np.linspace(1, 30, n), np.full(n, y), np.full(n, -1.7)])


def curb_along(y, x0=0.0, x1=31.0):
    polyline = np.array([[x0, y, -1.7], [(x0 + x1) / 2, y, -1.7], [x1, y, -1.7]])
    return Curb(
        number=0, polyline=polyline, side="left", length_m=x1 - x0, rmse_m=0.0, points=9,
        step_height_m=0.1, score=1.0,
    )  # fmt: skip


def test_confusion_matrix_counts_pairs():
    truth, prediction = np.array([1, 1, 2, 3]), np.array([1, 2, 2, 0])
    expected = np.zeros((4, 4), int)
    expected[1, 1] = expected[1, 2] = expected[2, 2] = expected[3, 0] = 1
    counts = confusion_matrix(truth, prediction, 4)
    assert counts.dtype == np.int64
    assert (counts == expected).all()
    with pytest.raises(ValueError, match=r"truth must hold classes 0..2, got \(1, 3\)"):
        confusion_matrix(truth, prediction, 3)


@pytest.mark.bad_input
def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="truth has"):
        confusion_matrix(np.array([1]), np.array([1, 2]), 3)


@pytest.mark.parametrize("seed", range(3))
def test_summary_equals_a_loop_over_points(seed):
    settings = CurbScoring(region="all", tolerances_m=(0.0, 2.0), distance="xyz")
    scans = [random_scan(seed * 10 + i) for i in range(3)]
    rows = [
        row
        for i, scan in enumerate(scans)
        for row in score_scan(str(i), *scan, NAMES, settings=settings)
    ]
    truth = np.concatenate([t for _, t, _ in scans])
    prediction = np.concatenate([p for _, _, p in scans])
    counted = truth > 0
    ious = {}
    for number, name in enumerate(NAMES[1:], start=1):
        t, p = (truth == number) & counted, (prediction == number) & counted
        ious[name] = (t & p).sum() / (t | p).sum()
    summary = summarise(rows)
    assert {row["class"]: row["iou"] for row in summary.classes} == pytest.approx(ious)
    assert summary.metrics["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert summary.metrics["miou_low"] < summary.metrics["miou"] < summary.metrics["miou_high"]
    near_truth = near_prediction = 0
    for xyz, t, p in scans:
        true, guess = xyz[(t == 1)], xyz[(p == 1) & (t > 0)]
        apart = np.linalg.norm(true[:, None] - guess[None], axis=-1) <= 2.0
        near_prediction += apart.any(1).sum()
        near_truth += apart.any(0).sum()
    wide = summary.tolerances[1]
    assert wide["precision"] == pytest.approx(near_truth / ((prediction == 1) & counted).sum())
    assert wide["recall"] == pytest.approx(near_prediction / (truth == 1).sum())


def test_micro_and_macro_differ_as_defined():
    xyz = line(8)
    first = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    guess = np.array([1, 1, 1, 2, 1, 2, 2, 2])  # TP 3, FN 1, FP 1
    none = np.full(8, 2)
    alarm = np.array([1, 2, 2, 2, 2, 2, 2, 2])  # FP 1 without any truth
    rows = score_scan("a", xyz, first, guess, NAMES)
    rows += score_scan("b", xyz, none, alarm, NAMES)
    rows += score_scan("c", xyz, none, none, NAMES)  # no truth, no prediction: left out of macro
    metrics = summarise(rows).metrics
    assert metrics["curb_precision"] == pytest.approx(3 / 5)
    assert metrics["curb_recall"] == pytest.approx(3 / 4)
    assert metrics["curb_f1"] == pytest.approx(6 / 9)
    assert metrics["curb_precision_macro"] == pytest.approx((3 / 4 + 0) / 2)
    assert metrics["curb_f1_macro"] == pytest.approx((3 / 4 + 0) / 2)


def test_ignored_truth_does_not_count_and_ignored_prediction_misses():
    xyz = line(4)
    truth, prediction = np.array([0, 0, 1, 1]), np.array([1, 0, 0, 1])
    (row,) = score_scan("a", xyz, truth, prediction, NAMES)
    assert (row["points"], row["curb truth"], row["curb predicted"], row["curb hit"]) == (
        2,
        2,
        1,
        1,
    )
    metrics = summarise([row]).metrics
    assert (metrics["curb_precision"], metrics["curb_recall"]) == (1.0, 0.5)
    assert metrics["miou"] == pytest.approx(0.5)  # the only class that occurs


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="region must"):
        CurbScoring(region="ahead")
    with pytest.raises(ValueError, match="tolerances_m"):
        CurbScoring(tolerances_m=(-0.1,))


@pytest.mark.parametrize("seed", range(3))
def test_no_tolerance_is_the_strict_score_and_more_is_never_worse(seed):
    xyz, truth, prediction = random_scan(seed)
    xyz[:, :2] = np.round(xyz[:, :2] / 20)  # many points at the same place
    settings = CurbScoring(region="all", tolerances_m=(0.0, 0.05, 0.5, 1.0, 1.5))
    summary = summarise(score_scan("a", xyz, truth, prediction, NAMES, settings=settings))
    strict = [summary.metrics[f"curb_{s}"] for s in ("precision", "recall", "f1")]
    table = summary.tolerances
    assert [table[0][s] for s in ("precision", "recall", "f1")] == strict
    for narrow, wide in pairwise(table):
        assert all(narrow[s] <= wide[s] for s in ("precision", "recall", "f1"))


def test_a_lateral_shift_is_forgiven_only_by_a_larger_tolerance():
    # Two parallel copies of a line, 0.1 m apart: one is true, the other one is predicted.
    xyz = np.concatenate([line(y=3.0), line(y=3.1)])
    truth = np.repeat([1, 2], 200)
    prediction = np.repeat([2, 1], 200)
    metrics = summarise(score_scan("a", xyz, truth, prediction, NAMES)).metrics
    assert metrics["curb_precision"] == metrics["curb_precision_0.05"] == 0.0
    assert metrics["curb_precision_0.15"] == metrics["curb_recall_0.15"] == 1.0


@pytest.mark.parametrize("tolerance", [0.05, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("start", [3.0, -17.3])
def test_a_shift_by_the_tolerance_itself_is_forgiven_whatever_float32_made_of_it(start, tolerance):
    x = np.arange(1.0, 40.0)
    shifted = [np.column_stack([x, np.full(39, y), 0 * x]) for y in (start, start + tolerance)]
    xyz = np.concatenate(shifted).astype(np.float32).astype(np.float64)
    truth = np.repeat([1, 2], 39)
    found = summarise(score_scan("a", xyz, truth, truth[::-1].copy(), NAMES)).tolerances
    for row in found:
        expected = float(row["tolerance_m"] >= tolerance)
        assert row["precision"] == row["recall"] == expected


def test_distances_reach_their_limit():
    points, others = np.array([[0.0, 0], [0, 3]]), np.array([[0.0, 0.5]])
    assert within(points, others, 0.5).tolist() == [0.5, math.inf]
    assert within(points, others[:0], 0.5).tolist() == [math.inf, math.inf]
    assert within(points[:0], others, 0.5).shape == (0,)


def test_curves_are_measured_from_the_true_points():
    xyz = np.concatenate([line(100, y=3.0), line(100, y=3.5), line(100, y=9.0)])
    truth = np.full(300, 1)
    assert curve_distance(xyz[:, :2], [curb_along(3.1)])[:200] == pytest.approx(
        [0.1] * 100 + [0.4] * 100
    )
    rows = score_scan("a", xyz, truth, truth, NAMES, curbs=[curb_along(3.1)])
    metrics = summarise(rows).metrics
    assert metrics["curve_coverage"] == pytest.approx(1 / 3)
    assert metrics["curve_offset_m"] == pytest.approx(0.25)
    rows = score_scan("a", xyz, truth, truth, NAMES, curbs=[])
    metrics = summarise(rows).metrics
    assert metrics["curve_coverage"] == 0.0
    assert math.isnan(metrics["curve_offset_m"])
    assert "curve_coverage" not in summarise(score_scan("a", xyz, truth, truth, NAMES)).metrics


def test_nothing_to_score():
    empty = np.zeros((0, 3)), np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = score_scan("a", *empty, NAMES, curbs=[])
    metrics = summarise(rows).metrics
    assert metrics["points"] == 0.0
    assert math.isnan(metrics["curb_f1"])
    assert math.isnan(metrics["miou"])
    assert summarise([]).metrics == {"scans": 0.0}


def test_intervals_depend_on_the_scans_and_not_on_their_order():
    rows = [row for i in range(6) for row in score_scan(str(i), *random_scan(i), NAMES)]
    first, again = summarise(rows, seed=1).metrics, summarise(rows, seed=1).metrics
    assert first == again
    assert first["curb_f1_low"] < first["curb_f1"] < first["curb_f1_high"]
    alone = summarise(rows[:1] * 3).metrics
    assert alone["curb_f1_low"] == pytest.approx(alone["curb_f1_high"])


def test_without_a_class_of_curbs_the_classes_alone_are_scored():
    xyz, classes = np.array([[1.0, 0, 0], [2, 0, 0]]), np.array([1, 2])
    rows = score_scan("a", xyz, classes, np.array([1, 1]), ("ignore", "car", "road"))
    found = summarise(rows)
    assert found.metrics["miou"] == pytest.approx(0.25)
    assert "curb_f1" not in found.metrics
    assert [row["class"] for row in found.classes] == ["car", "road"]
