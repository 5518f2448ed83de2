"""Scores of scanpaths and maps against formulas written out, and against another library."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_gaze.metrics import saliency
from heed_gaze.metrics.multimatch import multimatch
from heed_gaze.metrics.recurrence import cross_recurrence, recurrence
from heed_gaze.metrics.saccades import (
    amplitudes_px,
    direction_histogram,
    directions_rad,
    histogram_distance,
)
from heed_gaze.metrics.searching import NEVER, found_at, performance_area, performance_curve
from heed_gaze.metrics.sequences import levenshtein, sequence_score
from heed_gaze.metrics.simplification import Simplification, simplify
from heed_gaze.metrics.symbols import cluster_centres
from heed_gaze.metrics.warping import dtw
from heed_gaze.plots import fit_line, numbers_by_place
from heed_gaze.scanpaths import Scanpath

SIZE = (200, 120)


def made(count: int, rng: np.random.Generator) -> Scanpath:
    return Scanpath(
        image="a",
        subject="1",
        xy_px=rng.uniform([0.0, 0.0], SIZE, (count, 2)),
        duration_s=rng.uniform(0.05, 0.6, count),
    )


def pairs_of(number: int, seed: int, fewest: int = 3) -> tuple[list[Scanpath], list[Scanpath]]:
    rng = np.random.default_rng(seed)
    first, second = (
        [made(int(rng.integers(fewest, 16)), rng) for _ in range(number)] for _ in range(2)
    )
    return first, second


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_multimatch_equals_multimatch_gaze(grouping: bool):
    library = pytest.importorskip("multimatch_gaze", reason="multimatch-gaze is not installed")
    first, second = pairs_of(40, seed=0)
    diagonal = float(np.hypot(*SIZE))
    rule = Simplification(direction_deg=45.0, duration_s=0.3, amplitude=0.1)
    found = multimatch(first, second, size_px=SIZE, simplification=rule if grouping else None)

    def records(path: Scanpath) -> Any:
        columns = [*path.xy_px.T, path.duration_s]
        return np.rec.fromarrays(columns, names="start_x,start_y,duration")

    thresholds = {"TDir": 45.0, "TDur": 0.3, "TAmp": 0.1 * diagonal}
    same = 0
    for a, b, row in zip(first, second, found, strict=True):
        wanted = library.docomparison(
            records(a), records(b), list(SIZE), grouping=grouping, **thresholds
        )
        same += np.allclose(row, np.ravel(wanted), rtol=0, atol=1e-9)
    # The library loses a part of the way where a last saccade is joined to a joined one.
    assert same >= (38 if grouping else 40)


@pytest.mark.parametrize("rule", [None, Simplification()])
def test_multimatch_of_a_batch_is_that_of_each_pair_alone(rule: Simplification | None):
    first, second = pairs_of(12, seed=1, fewest=1)
    together = multimatch(first, second, size_px=SIZE, simplification=rule)
    alone = [
        multimatch([a], [b], size_px=SIZE, simplification=rule)[0]
        for a, b in zip(first, second, strict=True)
    ]
    np.testing.assert_array_equal(together, alone)
    short = [min(len(a), len(b)) < 3 for a, b in zip(first, second, strict=True)]
    assert np.isnan(together).all(axis=1).tolist() == short
    assert any(short)


def test_simplified_paths_keep_their_ends():
    rng = np.random.default_rng(2)
    path = made(14, rng)
    rows = np.column_stack([path.xy_px[:-1], np.diff(path.xy_px, axis=0), path.duration_s[:-1]])
    rule = Simplification(amplitude=0.3, duration_s=1.0)
    found = simplify(rows, rule, diagonal_px=float(np.hypot(*SIZE)), last_s=0.1)
    assert len(found) < len(rows)
    np.testing.assert_allclose(found[0, :2] + found[:, 2:4].sum(axis=0), path.xy_px[-1])
    np.testing.assert_allclose(found[1:, :2], found[:-1, :2] + found[:-1, 2:4])


def edit_distance(a: list[int], b: list[int]) -> int:
    """By the recursion itself."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        edit_distance(a[1:], b) + 1,
        edit_distance(a, b[1:]) + 1,
        edit_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common subsequence, by trying all of them."""
    for size in range(min(len(a), len(b)), 0, -1):
        chosen = set(itertools.combinations(a, size))
        if chosen & set(itertools.combinations(b, size)):
            return size
    return 0


STRINGS = st.lists(st.integers(0, 2), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(STRINGS, STRINGS), min_size=1, max_size=4))
def test_strings_against_recursion_and_trial(pairs: list[tuple[list[int], list[int]]]):
    first, second = ([np.array(pair[side]) for pair in pairs] for side in (0, 1))
    distance, score = levenshtein(first, second), sequence_score(first, second)
    for (a, b), d, s in zip(pairs, distance, score, strict=True):
        assert d == edit_distance(a, b)
        assert s == pytest.approx(common(a, b) / max(len(a), len(b)))


def test_an_empty_string_is_as_far_as_the_other_is_long():
    empty, full = np.zeros(0, dtype=np.int64), np.array([1, 2])
    assert levenshtein([empty], [full]).tolist() == [2.0]
    assert np.isnan(sequence_score([empty], [full])).all()


def test_dtw_against_the_recursion():
    first, second = pairs_of(5, seed=3, fewest=1)

    def cost(a: np.ndarray, b: np.ndarray) -> float:
        table = np.full((len(a) + 1, len(b) + 1), np.inf)
        table[0, 0] = 0.0
        for i, j in np.ndindex(len(a), len(b)):
            nearest = min(table[i, j], table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = np.hypot(*(a[i] - b[j])) + nearest
        return float(table[-1, -1])

    wanted = [cost(a.xy_px, b.xy_px) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(dtw(first, second), wanted)


def test_recurrence_of_a_path_that_repeats_itself():
    """Places 0 1 2 0 1 2: three returns, all on one diagonal, three fixations later."""
    xy = np.tile(np.array([[0.0, 0.0], [50.0, 0.0], [100.0, 0.0]]), (2, 1))
    path = Scanpath(image="a", subject="1", xy_px=xy)
    found = recurrence(path, radius_px=1.0)
    assert found.recurrence == pytest.approx(100 * 3 / 15)
    assert found.determinism == 100.0
    assert found.laminarity == 0.0
    assert found.centre == pytest.approx(100 * 3 / 5)
    other = Scanpath(image="a", subject="2", xy_px=xy[:3])
    across = cross_recurrence(path, other, radius_px=1.0)
    assert across.recurrence == pytest.approx(100 * 3 / 9)
    assert across.centre == 0.0


def test_laminarity_counts_a_place_that_is_stayed_at():
    xy = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [90.0, 0.0]])
    found = recurrence(Scanpath(image="a", subject="1", xy_px=xy), radius_px=1.0)
    # (0,1), (0,2), (1,2) recur: a row of two and a column of two.
    assert found.laminarity == pytest.approx(100 * (2 + 2) / (2 * 3))


def test_a_search_is_over_at_the_first_fixation_on_the_target():
    path = Scanpath(
        image="a",
        subject="1",
        xy_px=np.array([[50.0, 50.0], [9.0, 5.0], [5.0, 5.0]]),
        target_box=(0.0, 0.0, 8.0, 8.0),
    )
    assert found_at(path) == 2
    assert found_at(path, margin_px=1.0) == 1
    assert found_at(path.keep(slice(0, 1))) == NEVER
    curve = performance_curve(np.array([2, 1, NEVER, 0]), 2)
    assert curve.tolist() == [0.25, 0.5, 0.75]
    assert performance_area(curve) == pytest.approx(0.5)


def test_saccades_have_lengths_and_directions_up_is_a_quarter_turn():
    xy = np.array([[0.0, 9.0], [3.0, 5.0], [3.0, 1.0]])
    path = Scanpath(image="a", subject="1", xy_px=xy)
    assert amplitudes_px([path]).tolist() == [5.0, 4.0]
    assert directions_rad([path])[1] == pytest.approx(np.pi / 2)
    assert direction_histogram([path], bins=4).tolist() == [0.0, 1.0, 0.0, 0.0]
    same = direction_histogram([path])
    assert histogram_distance(same, same) == 0.0


def test_clusters_are_where_fixations_gather():
    rng = np.random.default_rng(4)
    places = np.array([[20.0, 20.0], [100.0, 60.0], [180.0, 100.0]])
    xy = np.repeat(places, [30, 20, 10], axis=0) + rng.normal(0.0, 1.5, (60, 2))
    path = Scanpath(image="a", subject="1", xy_px=xy)
    found = cluster_centres([path], 15.0)
    np.testing.assert_allclose(found, places, atol=2.0)


def test_scores_of_maps_at_their_limits():
    rng = np.random.default_rng(5)
    fixations = np.stack([rng.permutation(30)[:9], rng.permutation(20)[:9]], axis=1)
    x, y = fixations.T
    truth = np.zeros((20, 30))
    truth[y, x] = 1.0
    flat = np.ones((20, 30))
    assert saliency.nss(flat, fixations) == 0.0
    assert saliency.auc_borji(flat, fixations, seed=0) == 0.5
    assert saliency.auc_judd(truth, fixations) == pytest.approx(1.0, abs=0.01)
    chance = [saliency.auc_judd(flat, fixations, break_ties=k) for k in range(40)]
    # The i-th of n random thresholds has the false alarm rate i / (n + 1): (n + 2) / (2 n + 2).
    assert np.mean(chance) == pytest.approx(11 / 20, abs=0.02)
    assert saliency.similarity(truth, truth) == pytest.approx(1.0)
    assert saliency.correlation(truth, truth) == pytest.approx(1.0)
    assert saliency.kl_divergence(truth, truth) == pytest.approx(0.0, abs=1e-9)
    bits = saliency.information_gain(truth, flat, fixations)
    assert bits == pytest.approx(np.log2(600 / 9))  # 9 of 600 cells, all mass on them


def test_a_density_sums_to_one_and_peaks_at_the_fixation():
    path = Scanpath(image="a", subject="1", xy_px=np.array([[150.0, 30.0]]), size_px=SIZE)
    shape = saliency.map_shape(SIZE, 100)
    density = saliency.fixation_density([path], SIZE, sigma_px=6.0, shape=shape)
    assert density.sum() == pytest.approx(1.0)
    assert np.unravel_index(density.argmax(), shape) == (15, 75)


def test_lines_are_fitted_by_least_squares():
    x = np.array([1.0, 6.0, 12.0])
    assert fit_line(x, 3.0 - 2.0 * x) == pytest.approx((-2.0, 3.0))
    assert np.isnan(fit_line(x[:1], x[:1])).all()


@pytest.mark.parametrize("y", [[0.1, 0.1, 0.1], [628.63, 880.989, 628.63], [0.3, 0.0, 0.3]])
@pytest.mark.parametrize("x", [[3.0, 6.0, 9.0], [0.1, 0.4, 0.7]])
def test_a_level_line_has_no_slope(x: list[float], y: list[float]):
    slope, rest = fit_line(np.array(x), np.array(y))
    assert (slope, rest) == (0.0, pytest.approx(np.mean(y)))
    slope, _ = fit_line(np.array(x), np.array(y) + 1e-6 * (np.array(x) - x[0]))
    assert slope == pytest.approx(1e-6, rel=1e-3)


def test_fixations_of_one_place_share_their_numbers():
    places = [(0.0, 0.0)] * 3 + [(5.0, 1.0)] * 2 + [(0.0, 0.0)]
    path = Scanpath(image="a", subject="1", xy_px=np.array(places))
    assert numbers_by_place(path) == {(0.0, 0.0): "1-3, 6", (5.0, 1.0): "4, 5"}
