"""Scores against a brute-force computation, and their summary."""

import math

import numpy as np
import pytest

from heed_medical.segmentation.cases import NativeFrame
from heed_medical.segmentation.metrics import (
    bootstrap_interval,
    compare_masks,
    score_case,
    summarise,
)
from heed_medical.segmentation.prediction import SegmentationPrediction


def surface(mask):
    """Voxels of the mask with a face neighbour outside of it, or outside of the volume."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(mask.ndim):
        for step in (1, -1):
            inside &= np.roll(padded, step, axis)
    edge = padded & ~inside
    return np.argwhere(edge[(slice(1, -1),) * mask.ndim])


def brute_force(first, second, spacing):
    a, b = surface(first) * spacing, surface(second) * spacing
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return distances.min(1), distances.min(0)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 4.0)])
@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_equal_brute_force(spacing, seed):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (12, 10, 8)], indexing="ij"), -1)
    centre, radius = rng.uniform(3, 6, 3), rng.uniform(2, 5)
    first = np.linalg.norm(grid - centre, axis=-1) < radius
    second = np.linalg.norm(grid - centre - rng.uniform(-2, 2, 3), axis=-1) < radius + 0.7
    there, back = brute_force(first, second, spacing)
    scores = compare_masks(first, second, spacing_mm=spacing)
    assert scores["msd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert scores["hd95"] == pytest.approx(expected, rel=1e-5)
    both = (first & second).sum()
    assert scores["dice"] == pytest.approx(2 * both / (first.sum() + second.sum()))


def test_pictures_are_measured_in_two_dimensions():
    first, second = np.zeros((9, 7), bool), np.zeros((9, 7), bool)
    first[2:5, 2:5] = True
    second[4:7, 2:5] = True
    there, back = brute_force(first, second, (1.0, 1.0))
    scores = compare_masks(first, second)
    assert scores["msd"] == pytest.approx(np.concatenate([there, back]).mean())
    assert scores["dice"] == pytest.approx(2 * 3 / 18)
    assert scores["vs"] == 1.0


def test_volumetric_similarity():
    first, second = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    first[:2] = True  # 32 voxels
    second[:3] = True  # 48 voxels: FN 16, TP 32
    assert compare_masks(first, second)["vs"] == pytest.approx(1 - 16 / (64 + 16))


def test_empty_sides():
    none, some = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert compare_masks(none, none) == {
        "state": "empty", "dice": 1.0, "vs": 1.0, "msd": None, "hd95": None,
        "voxels": 0, "voxels_predicted": 0,
    }  # fmt: skip
    missed, invented = compare_masks(none, some), compare_masks(some, none)
    assert (missed["state"], invented["state"]) == ("missed", "invented")
    for scores in (missed, invented):
        assert (scores["dice"], scores["vs"]) == (0.0, 0.0)
        assert math.isinf(scores["msd"])


def prediction(labels, reference, spacing=(1.0, 1.0, 1.0)):
    return SegmentationPrediction(
        name="a", labels=labels.astype(np.uint8), probabilities=None, reference=reference,
        spacing_mm=spacing, slice_axis=2,
        frame=NativeFrame(kind="nifti", files=(), shape=labels.shape),
    )  # fmt: skip


def test_ignored_voxels_do_not_count():
    labels = np.zeros((4, 4, 2), np.int16)
    labels[:2] = 1
    reference = labels.copy()
    reference[0] = -100
    reference[3] = -100
    labels[3] = 1
    (score,) = score_case(prediction(labels, reference), ["background", "organ"])
    assert score["dice"] == 1.0
    assert score["voxels"] == 8
    assert score["unit"] == "mm"
    assert score["msd"] == 0.0
    (quick,) = score_case(prediction(labels, reference), ["background", "organ"], distances=False)
    assert {**quick, "msd": 0.0, "hd95": 0.0} == score


def test_score_needs_a_reference():
    with pytest.raises(ValueError, match="no reference"):
        score_case(prediction(np.zeros((2, 2, 2)), None), ["background", "organ"])


def row(case, name, state, dice, distance):
    return {
        "case": case, "class": name, "state": state, "dice": dice, "vs": 1.0, "msd": distance,
        "hd95": distance, "unit": "mm", "voxels": 1, "voxels_predicted": 1,
    }  # fmt: skip


def rows():
    return [
        row("a", "x", "both", 0.8, 1.0),
        row("a", "y", "empty", 1.0, None),
        row("b", "x", "both", 0.6, 3.0),
        row("b", "y", "missed", 0.0, math.inf),
    ]


def test_summary():
    summary = summarise(rows())
    assert summary.metrics["dice"] == pytest.approx((0.7 + 0.5) / 2)
    assert summary.metrics["dice_std"] == pytest.approx(np.std([0.8, 1.0, 0.6, 0.0]))
    assert summary.metrics["msd"] == pytest.approx(2.0)  # class y has no finite distance
    assert summary.metrics["missed"] == 1
    assert summary.metrics["cases"] == 2
    x, y = summary.rows
    assert (x["class"], x["dice"], x["msd"]) == ("x", pytest.approx(0.7), pytest.approx(2.0))
    assert (y["empty"], y["missed"], math.isnan(y["msd"])) == (1, 1, True)
    assert 0.3 <= summary.metrics["dice_low"] <= 0.6 <= summary.metrics["dice_high"] <= 0.9


def test_bootstrap_interval_covers_the_mean():
    """Over many draws of 30 normal values, about 95 % of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(size=30).tolist(), samples=500, seed=seed)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99
    assert all(map(math.isnan, bootstrap_interval([])))


def test_regions_are_unions_of_classes():
    rng = np.random.default_rng(0)
    labels, reference = (rng.integers(-1, 4, (6, 5, 4), dtype=np.int16) for _ in range(2))
    labels = np.abs(labels)
    names = ["background", "core", "oedema", "enhancing"]
    regions = {"WT": (1, 2, 3), "TC": (1, 3)}
    found = score_case(prediction(labels, reference), names, regions=regions, distances=False)
    assert [row["class"] for row in found] == [*names[1:], "WT", "TC"]
    for row in found[3:]:
        numbers = regions[row["class"]]
        counted = reference >= 0
        guess = np.isin(labels, numbers) & counted
        truth = np.isin(reference, numbers)
        both = (guess & truth).sum()
        assert row["dice"] == pytest.approx(2 * both / (guess.sum() + truth.sum()))
    classes = score_case(prediction(labels, reference), names, distances=False)
    assert found[:3] == classes
    summary = summarise(found, regions=tuple(regions))
    assert summary.metrics["dice"] == pytest.approx(summarise(classes).metrics["dice"])
    assert summary.metrics["dice_WT"] == pytest.approx(found[3]["dice"])
    assert {row["class"] for row in summary.rows} == {*names[1:], "WT", "TC"}
