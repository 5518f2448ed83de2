"""Predictions beside viewers: who is compared with whom, ceilings, chance and intervals."""

from dataclasses import replace

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_gaze.comparison.matching import match, random_path
from heed_gaze.comparison.scoring import (
    CompareSettings,
    Interval,
    attainment,
    bootstrap,
    compare,
    curves_of,
)
from heed_gaze.scanpaths import Scanpath, ScanpathSet

SIZE = (160, 120)
TARGET = (100.0, 60.0, 130.0, 90.0)


def viewers_of(image: str, seed: int, *, viewers: int = 4) -> list[Scanpath]:
    """Viewers who all go over the same places of a picture, with some noise."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(20.0, 100.0, (7, 2))
    return [
        Scanpath(
            image=image,
            subject=str(k),
            xy_px=np.clip(places + rng.normal(0.0, 4.0, places.shape), 0.0, SIZE),
            size_px=SIZE,
            duration_s=rng.uniform(0.1, 0.4, 7),
            target_box=TARGET,
        )
        for k in range(viewers)
    ]


HUMAN = ScanpathSet(scanpaths=tuple(p for k in range(6) for p in viewers_of(f"{k}.png", k)))
QUICK = CompareSettings(resamples=200)


def predicted(paths: list[Scanpath]) -> ScanpathSet:
    return ScanpathSet(scanpaths=tuple(paths))


def test_a_good_prediction_reaches_the_viewers_and_a_random_one_the_floor():
    good = [viewers_of(f"{k}.png", k, viewers=5)[4] for k in range(6)]
    rng = np.random.default_rng(0)
    poor = [random_path(path, rng) for path in good]
    attained = {}
    for name, paths in (("good", good), ("poor", poor)):
        found = compare(match(HUMAN, predicted(paths)), QUICK)
        assert found.pairs["predicted"] == 6 * 4
        assert found.pairs["human"] == 6 * 6
        attained[name] = {
            score: attainment(score, intervals) for score, intervals in found.intervals.items()
        }
    for score in ("multimatch_position", "scanmatch", "sequence_score", "dtw_px", "nss",
                  "kl_divergence", "auc_judd"):  # fmt: skip
        assert attained["good"][score] == pytest.approx(1.0, abs=0.25), score
        assert attained["poor"][score] < 0.3, score


def test_the_same_call_gives_the_same_numbers():
    cases = match(HUMAN)
    first, second = (compare(cases, QUICK).intervals for _ in range(2))
    assert first == second


def test_pictures_are_matched_by_name_without_folder_or_suffix():
    path = viewers_of("x", 0)[0]
    other = Scanpath(image="some/folder/3.jpg", subject="m", xy_px=path.xy_px / 2, size_px=(80, 60))
    (case,) = match(HUMAN, predicted([other]))
    assert (case.image, len(case.human)) == ("3.png", 4)
    np.testing.assert_allclose(case.predicted[0].xy_px, path.xy_px)
    with pytest.raises(InputError, match=r"9\.png: no viewer saw"):
        match(HUMAN, predicted([Scanpath(image="9.png", subject="m", xy_px=path.xy_px)]))


def test_predictions_of_another_split_are_left_out():
    human = ScanpathSet(
        scanpaths=tuple(
            replace(path, split="test" if path.image < "2" else "train") for path in HUMAN.scanpaths
        )
    )
    every = [replace(viewers_of(f"{k}.png", k)[0], image=f"{k}.jpg") for k in range(6)]
    cases = match(human, predicted(every), split="test")
    assert [(case.image, len(case.predicted)) for case in cases] == [("0.png", 1), ("1.png", 1)]
    with pytest.raises(InputError, match="no prediction is of a picture of the split 'test'"):
        match(human, predicted(every[2:]), split="test")
    with pytest.raises(InputError, match=r"9\.png: no viewer saw"):
        match(human, predicted([*every, replace(every[0], image="9.png")]), split="test")


def test_a_task_matters_only_where_viewers_have_one():
    xy = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    paths = {
        task: Scanpath(image="a.png", subject="s", xy_px=xy, size_px=(80, 60), task=task)
        for task in ("", "waldo", "cup")
    }
    for viewers, model in (("", "waldo"), ("waldo", ""), ("waldo", "waldo")):
        (case,) = match(ScanpathSet(scanpaths=(paths[viewers],)), predicted([paths[model]]))
        assert (case.task, len(case.predicted)) == (viewers, 1)
    with pytest.raises(InputError, match="no viewer had the task 'waldo'"):
        match(ScanpathSet(scanpaths=(paths["cup"],)), predicted([paths["waldo"]]))


def test_short_scanpaths_are_counted_where_a_score_is_not_defined():
    short = [path.keep(slice(0, 2)) for path in viewers_of("0.png", 0)]
    cases = match(ScanpathSet(scanpaths=(*short[:1], *HUMAN.scanpaths[1:])))
    found = compare(cases, QUICK)
    assert found.undefined["multimatch_shape"]["human"] == 3


def test_performance_is_the_share_of_trials_that_are_done():
    cases = match(HUMAN)
    curves = curves_of(cases, [()] * len(cases))
    assert set(curves) == {"human"}
    inside = [
        ((p.xy_px >= TARGET[:2]) & (p.xy_px <= TARGET[2:])).all(axis=1).any()
        for p in HUMAN.scanpaths
    ]
    assert curves["human"][:, -1].mean() == pytest.approx(np.mean(inside))


def test_semantic_scores_are_given_where_labels_are():
    labels = {"0.png": np.arange(16 * 12).reshape(12, 16)}
    found = compare(match(HUMAN), QUICK, labels=labels).scores["semantic_sequence_score"]["human"]
    assert np.isfinite(found).tolist() == [True, False, False, False, False, False]


def test_bootstrap_intervals_hold_the_mean_of_normal_samples_as_often_as_they_say():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        found = bootstrap(rng.normal(0.0, 1.0, 60), CompareSettings(resamples=400))
        inside += found.low <= 0.0 <= found.high
    assert inside / 300 == pytest.approx(0.94, abs=0.04)  # three standard errors


def test_a_score_that_does_not_tell_viewers_from_chance_has_no_share():
    human = Interval(mean=0.6, low=0.5, high=0.7)
    kinds = {"predicted": human, "human": human, "random": Interval(mean=0.55, low=0.5, high=0.6)}
    assert np.isnan(attainment("nss", kinds))
    apart = kinds | {"random": Interval(mean=0.2, low=0.1, high=0.3)}
    assert attainment("nss", apart) == 1.0
    assert np.isnan(attainment("dtw_px", apart))  # lower would be better
