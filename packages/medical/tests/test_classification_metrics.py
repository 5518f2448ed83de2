"""Scores of classifiers against scikit-learn, counting by hand, and known distributions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_medical.classification.metrics import (
    Predictions,
    average_precision,
    best_threshold,
    brier_score,
    calibration,
    calibration_error,
    confusion,
    precision_recall,
    roc_auc,
    roc_curve,
    summarise,
)

CASES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: 0 < sum(flag for _, flag in pairs) < len(pairs)
)


def split(pairs: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([a / 6 for a, _ in pairs]), np.array([b for _, b in pairs])


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_areas_are_those_of_counting_pairs_and_of_scikit_learn(pairs):
    from sklearn import metrics

    scores, positive = split(pairs)
    won = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p in scores[positive]
        for n in scores[~positive]
    ]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(won))
    expected = metrics.average_precision_score(positive, scores)
    assert average_precision(scores, positive) == pytest.approx(expected)


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_the_threshold_is_the_best_there_is(pairs):
    scores, positive = split(pairs)

    def gain(threshold: float) -> float:
        called = scores >= threshold
        return float(called[positive].mean() - called[~positive].mean())

    best = best_threshold(scores, positive)
    assert 0.0 < best < 1.0
    most = max(gain(t) for t in np.r_[0, np.linspace(0.001, 1, 400)])
    if most > 0:
        assert gain(best) == pytest.approx(most)
    else:
        assert best == 0.5


def test_a_threshold_needs_both_classes_and_scores_that_tell_them_apart():
    assert best_threshold(np.array([0.2, 0.7]), np.array([True, True])) == 0.5
    assert best_threshold(np.array([0.2, 0.7]), np.array([True, False])) == 0.5
    assert best_threshold(np.array([0.3, 0.3]), np.array([True, False])) == 0.5


def test_a_threshold_is_as_far_from_both_classes_in_log_odds():
    two = np.array([False, True])
    assert best_threshold(np.array([0.1, 0.9]), two) == pytest.approx(0.5)
    assert best_threshold(np.array([0.2, 0.5]), two) == pytest.approx(1 / 3)  # odds 1/4, 1: 1/2
    assert best_threshold(np.array([0.5, 0.8]), two) == pytest.approx(2 / 3)
    assert best_threshold(np.array([1 - 1e-9, 1.0]), two) == 1 - 5e-10
    assert 0 < best_threshold(np.array([0.0, 1e-9]), two) <= 1e-9


def test_of_equally_good_thresholds_the_one_in_the_widest_gap_is_taken():
    scores = np.array([0.05, 0.1, 0.5, 0.9])
    positive = np.array([False, True, False, True])
    # half of one class is wrong both from 0.1 and from 0.9 on
    assert best_threshold(scores, positive) == pytest.approx(0.75)  # odds 1 and 9: 3


def test_curves_begin_and_end_where_they_must():
    scores, positive = np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False])
    curve = roc_curve(scores, positive)
    assert (curve.x[0], curve.y[0]) == (0, 0)
    assert (curve.x[-1], curve.y[-1]) == (1, 1)
    assert curve.y.tolist() == [0, 0.5, 1, 1]
    assert curve.x.tolist() == [0, 0, 0.5, 1]
    recall = precision_recall(scores, positive)
    assert recall.y.tolist() == pytest.approx([1, 2 / 3, 0.5])
    with pytest.raises(ValueError, match="positive and negative"):
        roc_curve(scores, np.zeros(4, dtype=bool))


def test_scores_of_a_class_are_those_of_its_two_by_two_table():
    labels = np.array([0, 0, 0, 1, 1, 2])
    called = np.array([0, 0, 1, 1, 2, 2])
    chances = np.eye(3)[called] * 0.8 + 0.2 / 3
    found = Predictions(
        names=("a", "b", "c"),
        labels=labels,
        called=called,
        probabilities=chances,
        groups=np.arange(6),
    )
    assert confusion(labels, called, classes=3).tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    summary = summarise(found, samples=200)
    a, b, c = summary.rows
    assert (a["sensitivity"], a["ppv"], a["specificity"]) == (2 / 3, 1.0, 1.0)
    assert (b["sensitivity"], b["ppv"], b["specificity"]) == (0.5, 0.5, 0.75)
    assert (c["sensitivity"], c["ppv"], c["specificity"]) == (1.0, 0.5, 0.8)
    assert summary.metrics["accuracy"] == pytest.approx(4 / 6)
    assert summary.metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert summary.metrics["cases"] == 6
    assert summary.metrics["accuracy_low"] < 4 / 6 < summary.metrics["accuracy_high"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        right = rng.random(80) < 0.8
        labels = rng.integers(2, size=80)
        called = np.where(right, labels, 1 - labels)
        found = Predictions(
            names=("n", "p"),
            labels=labels,
            called=called,
            probabilities=np.eye(2)[called],
            groups=np.arange(80),
        )
        metrics = summarise(found, samples=150, seed=trial).metrics
        covered += metrics["accuracy_low"] <= 0.8 <= metrics["accuracy_high"]
    assert 50 <= covered <= 60


def test_pictures_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(1)
    labels = np.repeat(rng.integers(2, size=40), 5)
    called = np.where(np.repeat(rng.random(40) < 0.8, 5), labels, 1 - labels)
    widths = []
    for groups in (np.arange(200), np.arange(200) // 5):
        found = Predictions(
            names=("n", "p"),
            labels=labels,
            called=called,
            probabilities=np.eye(2)[called],
            groups=groups,
        )
        metrics = summarise(found, samples=400).metrics
        widths.append(metrics["accuracy_high"] - metrics["accuracy_low"])
    assert widths[1] > 1.6 * widths[0]  # the square root of 5 in the limit


def test_calibrated_probabilities_have_no_calibration_error():
    rng = np.random.default_rng(2)
    chance = rng.random(20_000)
    labels = (rng.random(20_000) < chance).astype(int)
    both = np.stack([1 - chance, chance], axis=1)
    assert calibration_error(both, labels) < 0.02
    sure = np.stack([1 - np.round(chance), np.round(chance)], axis=1)
    assert calibration_error(sure, labels) == pytest.approx(0.25, abs=0.02)
    for row in calibration(chance, labels == 1):
        assert row["probability"] == pytest.approx(row["share"], abs=0.05)
    assert brier_score(both, labels) == pytest.approx(2 / 6, abs=0.02)
    assert brier_score(np.eye(2)[labels], labels) == 0


def test_a_class_without_cases_gives_no_number_and_no_fault():
    found = Predictions(
        names=("n", "p"),
        labels=np.zeros(5, dtype=int),
        called=np.zeros(5, dtype=int),
        probabilities=np.full((5, 2), 0.5),
        groups=np.arange(5),
    )
    summary = summarise(found, samples=20)
    assert summary.metrics["accuracy"] == 1.0
    assert math.isnan(summary.metrics["auc"])
    assert math.isnan(float(summary.rows[1]["sensitivity"] or 0))


@pytest.mark.bad_input
def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Predictions(
            names=("n", "p"),
            labels=np.zeros(3, dtype=int),
            called=np.zeros(3, dtype=int),
            probabilities=np.zeros((3, 3)),
            groups=np.arange(3),
        )
