"""Representational similarity: definitions, ceilings, and real brains."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr

from heed_neuro.rsa import (
    compare,
    compare_with_interval,
    dissimilarities,
    noise_ceiling,
    upper_triangle,
)

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))


def test_dissimilarities_are_scipys_correlation_distances():
    rows = np.random.default_rng(0).normal(size=(6, 9))
    wanted = squareform(pdist(rows, "correlation"))
    np.testing.assert_allclose(dissimilarities(rows), wanted, atol=1e-12)


def test_comparisons_are_those_of_the_upper_triangles():
    rng = np.random.default_rng(0)
    first, second = (dissimilarities(rng.normal(size=(7, 5))) for _ in range(2))
    x, y = upper_triangle(first), upper_triangle(second)
    assert compare(first, second) == pytest.approx(spearmanr(x, y).statistic)
    assert compare(first, second, how="pearson") == pytest.approx(np.corrcoef(x, y)[0, 1])
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i in range(21) for j in range(i)]
    assert compare(first, second, how="kendall") == pytest.approx(np.mean(signs))


def test_an_interval_holds_its_value_and_shrinks_with_images():
    rng = np.random.default_rng(0)
    widths = []
    for images in (10, 60):
        truth = rng.normal(size=(images, 20))
        first = dissimilarities(truth)
        second = dissimilarities(truth + rng.normal(size=truth.shape))
        found = compare_with_interval(first, second, draws=100)
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_a_ceiling_encloses_the_true_model():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20, 30))
    subjects = np.stack([dissimilarities(truth + rng.normal(size=truth.shape)) for _ in range(6)])
    ceiling = noise_ceiling(subjects)
    model = np.mean([compare(dissimilarities(truth), own) for own in subjects])
    assert ceiling.lower - 0.02 < model < ceiling.upper


def test_people_and_monkeys_tell_the_92_pictures_apart_alike():
    path = DATA / "neuro-92images" / "rdms.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with np.load(path, allow_pickle=False) as found:
        human, monkey = found["hit_mean"], found["mit"]
        subjects = found["hit_subject_session"].mean(axis=1)
    # Kriegeskorte et al. 2008: the dissimilarities of the two species correlate by 0.49.
    assert compare(human, monkey, how="pearson") == pytest.approx(0.49, abs=0.02)
    ceiling = noise_ceiling(subjects)
    assert 0 < ceiling.lower < ceiling.upper < 1
