"""Stimuli of the six experiments, and the scorer on printed and stored results."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.ndimage import label
from scipy.stats import linregress

from heed_gaze.eccnet.experiments import EXPERIMENTS, experiment_of, item_picture, make_displays
from heed_gaze.eccnet.scoring import (
    ReactionTime,
    asymmetry_index,
    human_index,
    human_mean,
    interaction_test,
    score_experiment,
    score_task,
    scored_saccades,
)

STORED = Path(os.environ.get("HEED_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
PRINTED = {  # mean saccades of eccNET by set size, and its index (the paper's released results)
    "curvature/curve_in_lines": (1, 1, 1),
    "curvature/line_in_curves": (1.17, 1.37, 1.60),
    "lightning_dir/top_down": (1, 1, 1),
    "lightning_dir/left_right": (1, 1.40, 1.37),
    "intersection/non_cross": (1.53, 1.86, 2.31),
    "intersection/cross": (2.0, 3.25, 4.31),
    "intersection/Ts": (1.03, 1.14, 1.31),
    "intersection/Ls": (1.75, 2.72, 4.11),
    "categorization/homo/t20": (1, 1.97, 3.63, 5.33),
    "categorization/homo/t0": (1, 1, 1, 1),
    "categorization/hetero/t0": (1, 1, 1.03, 1.07),
    "categorization/hetero/t20": (1, 1.17, 1.40, 1.60),
}
INDICES = (1, 1, 0.495, 0.789, -1, 0.791)


def test_printed_saccades_give_the_printed_indices():
    found = [
        score_experiment(e, {t.name: (e.set_sizes, PRINTED[t.name]) for t in e.tasks}).index
        for e in EXPERIMENTS
    ]
    # Two decimals of the printed means move .791 by up to .007.
    assert np.allclose(found, INDICES, atol=0.007)
    assert np.mean(found) == pytest.approx(0.513, abs=0.005)


def test_people_have_the_printed_indices():
    found = [human_index(e) for e in EXPERIMENTS]
    assert np.allclose(found, (0.809, 0.701, 0.362, 0.404, 0.611, 0.500), atol=0.0006)
    assert human_mean() == pytest.approx(0.564, abs=0.0005)


@pytest.mark.parametrize("model", ["eccNET", "IVSN", "chance"])
def test_released_results_are_scored_as_officially(model):
    path = STORED / "eccnet" / "fixture.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}: set HEED_GOLDEN to the folder of stored numbers")
    import json

    meta = json.loads((path.parent / "meta.json").read_text())["scoring"][model]
    arrays = load_file(path)
    indices = []
    for e in EXPERIMENTS:
        trials = {}
        for task in e.tasks:
            key = f"exp{e.number}_{'_'.join(task.name.split('/')[1:])}"
            found = arrays[f"input.scoring.{model}.{key}"]
            sizes = np.repeat(e.set_sizes, e.trials)
            pairs = zip(found.tolist(), sizes.tolist(), strict=True)
            counts = [scored_saccades(None if at < 0 else at, size) for at, size in pairs]
            trials[task.name] = (sizes.tolist(), counts)
            score, wanted = score_task(sizes.tolist(), counts), meta["tasks"][key]
            assert np.allclose(score.mean_saccades, wanted["mean_saccades"], atol=1e-9)
            assert np.allclose(score.mean_rt_ms, wanted["mean_rt_ms"], atol=1e-9)
            assert score.slope_ms == pytest.approx(wanted["slope_ms_per_item"], abs=1e-9)
        indices.append(score_experiment(e, trials).index)
    assert np.allclose(indices, meta["asymmetry_index"], atol=1e-9)
    assert np.mean(indices) == pytest.approx(meta["mean"], abs=1e-9)


def test_indices_of_special_slopes():
    assert asymmetry_index(0.0, 0.0) == 0
    assert asymmetry_index(-3.0, -1.0) == 0
    assert asymmetry_index(5.0, -2.0) == 1
    assert asymmetry_index(-1.0, 2.0) == -1


def test_level_tasks_have_no_asymmetry():
    level = ([3, 6, 9], [1.0, 2.0, 1.0])
    for experiment in EXPERIMENTS:
        easy, hard = (task.name for task in experiment.tasks)
        found = score_experiment(experiment, {easy: ([3, 6, 9], [1.0] * 3), hard: level})
        assert (found.index, found.tasks[hard].slope_ms) == (0.0, 0.0)


def test_slopes_are_of_the_means_and_the_line_is_fitted():
    rng = np.random.default_rng(0)
    sizes, counts = np.repeat([2, 4, 9], 5), rng.integers(1, 6, 15).astype(float)
    means = [252.359 * counts[sizes == n].mean() + 376.271 for n in (2, 4, 9)]
    score = score_task(sizes.tolist(), counts.tolist())
    wanted = linregress([2, 4, 9], means)
    assert score.slope_ms == pytest.approx(wanted.slope)
    assert score.intercept_ms == pytest.approx(wanted.intercept)
    fitted = ReactionTime.fit(counts, 200 * counts + 300)
    assert (fitted.ms_per_saccade, fitted.ms_at_rest) == pytest.approx((200, 300))


def test_the_f_test_is_that_of_nested_regressions():
    rng = np.random.default_rng(1)
    size = np.tile([1.0, 2.0, 3.0, 4.0], 5)
    first, second = size + rng.normal(size=20), 2 * size + rng.normal(size=20)
    f_value, p_value = interaction_test((size, first), (size, second))
    pooled = linregress(np.tile(size, 2), np.concatenate([first, second]))
    rest = (
        (np.concatenate([first, second]) - pooled.slope * np.tile(size, 2) - pooled.intercept) ** 2
    ).sum()
    apart = 0.0
    for one in (first, second):
        line = linregress(size, one)
        apart += ((one - line.slope * size - line.intercept) ** 2).sum()
    assert f_value == pytest.approx((rest - apart) / 2 / (apart / 36))
    assert p_value < 1e-3
    same = interaction_test((size, first), (size, first))
    assert same[0] == pytest.approx(0, abs=1e-9)
    assert np.isnan(interaction_test((size[:2], first[:2]), (size[:2], first[:2]))[0])


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: f"experiment-{e.number}")
def test_displays_hold_the_items_and_one_target(experiment):
    sizes = {1: (339, 56), 2: (198, 49), 3: (615, 205), 4: (615, 205), 5: (339, 84), 6: (339, 84)}
    assert (experiment.side, experiment.cell) == sizes[experiment.number]
    for task in experiment.tasks:
        displays = make_displays(experiment, task, seed=4, trials=3)
        again = make_displays(experiment, task, seed=4, trials=3)
        other = make_displays(experiment, task, seed=5, trials=3)
        assert [d.image.tobytes() for d in displays] == [d.image.tobytes() for d in again]
        assert displays[0].image.tobytes() != other[0].image.tobytes()
        cells = experiment.cells
        for display in displays:
            ink = display.image != experiment.background
            # A ramp holds a step that is nearly the background: count cells with ink there.
            count = label(ink, np.ones((3, 3)))[1] if experiment.number != 2 else 0
            with_ink = [int(k) for k in np.flatnonzero((cells & ink).any(axis=(1, 2)))]
            assert with_ink == sorted(display.item_cells)
            assert len(with_ink) == display.set_size
            assert count in (0, display.set_size)
            assert np.array_equal(display.truth, cells[display.target_cell])
            assert display.target_cell == display.item_cells[0]
            rows, columns = np.nonzero(ink & display.truth)
            t_rows, t_columns = np.nonzero(display.target != experiment.background)
            shape = np.ptp(rows), np.ptp(columns)
            assert shape == (np.ptp(t_rows), np.ptp(t_columns))
            part = display.image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            target = display.target[
                t_rows.min() : t_rows.max() + 1, t_columns.min() : t_columns.max() + 1
            ]
            assert np.array_equal(part, target)


def test_numbers_of_trials_are_the_papers():
    assert [len(e.set_sizes) * e.trials for e in EXPERIMENTS] == [90, 90, 108, 108, 120, 120]
    assert [e.rules.max_fixations for e in EXPERIMENTS] == [37, 17, 10, 10, 17, 17]
    assert experiment_of("some/where/intersection/Ts").number == 4
    assert experiment_of("waldo") is None


def test_items_are_what_they_are_called():
    by_number = {e.number: e for e in EXPERIMENTS}
    ink = {  # area in square degrees
        "curve:-45": (1, 1.3 / 6),
        "line:-90": (1, 1.2 * 0.2),
        "cross": (3, 4.7 * 0.55 * 2 - 0.55**2),
        "non-cross": (3, 4.7 * 0.55 * 2 - 0.55**2),
        "l:transposed": (4, 4.7 * 0.55 * 2 - 0.55**2),
        "t": (4, 4.7 * 0.55 * 2 - 0.55**2),
        "bar:20": (5, 2 * 0.3),
    }
    for variant, (number, area) in ink.items():
        e = by_number[number]
        share = (item_picture(e, variant).astype(float) - e.background) / (
            e.foreground - e.background
        )
        assert share.sum() / 900 == pytest.approx(area, rel=0.02), variant
    ramp = item_picture(by_number[2], "ramp").astype(float)
    # A point on the edge of a step may fall to either side.
    assert np.abs(item_picture(by_number[2], "ramp:top-bottom") - ramp[::-1]).max() <= 3
    assert np.abs(item_picture(by_number[2], "ramp:-90") - ramp.T).max() <= 3
    assert ramp[1, 15] < 30 < 225 < ramp[-2, 15]
    tilted = item_picture(by_number[5], "bar:20").astype(float) < 128
    rows, columns = np.nonzero(tilted)
    assert columns[rows < 20].mean() > columns[rows > 50].mean()  # clockwise from upright
