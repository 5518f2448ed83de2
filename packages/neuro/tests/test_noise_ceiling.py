"""Noise ceilings: stored numbers, formulas, simulation."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from heed_neuro.noise_ceiling import (
    encoding_accuracy,
    mixed_noise_ceiling,
    noise_ceiling,
    pearson,
    signal_to_noise,
    spearman_brown,
    split_half,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "ridge" / "fixture.safetensors")
REPEATS = GOLDEN["input.ceiling.repeats"].transpose(1, 0, 2)


def stored(name: str) -> np.ndarray:
    return GOLDEN[f"output.ceiling.{name}"]


@pytest.mark.parametrize(
    ("estimator", "name"), [("unbiased", "anova"), ("total", "total_minus_noise_ddof1")]
)
def test_both_estimates_equal_the_stored_numbers(estimator, name: str):
    found = signal_to_noise(REPEATS, estimator=estimator)
    np.testing.assert_allclose(found.noise_variance, stored("noise_variance"), rtol=1e-9)
    np.testing.assert_allclose(found.signal_variance, stored(f"{name}.signal_variance"), atol=1e-9)
    np.testing.assert_allclose(found.ncsnr, stored(f"{name}.ncsnr"), atol=1e-9)
    for trials in (1, 3, 4):
        wanted = stored(f"{name}.noise_ceiling_n{trials}")
        np.testing.assert_allclose(noise_ceiling(found.ncsnr, trials), wanted, atol=1e-9)


def test_the_other_quantities_equal_the_stored_numbers():
    snr = signal_to_noise(REPEATS, estimator="unbiased").ncsnr
    mixed = mixed_noise_ceiling(snr, {3: 70, 2: 20, 1: 9})
    np.testing.assert_allclose(mixed, stored("noise_ceiling_mixed_A70_B20_C9"), atol=1e-9)
    halves = split_half(REPEATS)
    np.testing.assert_allclose(halves, stored("split_half_r_even_odd"), atol=1e-9)
    np.testing.assert_allclose(spearman_brown(halves), stored("spearman_brown"), atol=1e-9)
    r = pearson(GOLDEN["input.ceiling.prediction"], REPEATS.mean(axis=1))
    np.testing.assert_allclose(r, stored("prediction_r"), atol=1e-9)
    found = encoding_accuracy(r, noise_ceiling(snr, 4))
    wanted = stored("encoding_accuracy")
    np.testing.assert_allclose(np.isfinite(found), noise_ceiling(snr, 4) > 0)
    np.testing.assert_allclose(found[np.isfinite(found)], wanted[np.isfinite(found)], atol=1e-9)


def test_the_true_mean_reaches_the_ceiling_exactly():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(20000, 12))
    noise = np.linspace(0.5, 2.0, 12)
    repeats = truth[:, None] + rng.normal(size=(20000, 3, 12)) * noise
    ceiling = noise_ceiling(signal_to_noise(repeats).ncsnr, 3)
    np.testing.assert_allclose(ceiling, 1 / (1 + noise**2 / 3), atol=0.03)
    share = pearson(truth, repeats.mean(axis=1)) ** 2 / ceiling
    np.testing.assert_allclose(share, 1.0, atol=0.03)
    np.testing.assert_allclose(
        spearman_brown(split_half(repeats[:, :2])), 1 / (1 + noise**2 / 2), atol=0.04
    )


def test_more_trials_raise_the_ceiling_by_the_formula():
    snr = np.array([0.5, 1.0])
    np.testing.assert_allclose(noise_ceiling(snr, 1), [0.2, 0.5])
    np.testing.assert_allclose(noise_ceiling(snr, 3), [0.25 / (0.25 + 1 / 3), 0.75])
    np.testing.assert_allclose(mixed_noise_ceiling(snr, {3: 7}), noise_ceiling(snr, 3))


def test_correlations_that_are_undefined_are_nan_and_excluded():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(10, 4))
    truth[:, 1] = 0.1
    r = pearson(truth, truth + rng.normal(size=(10, 4)) * 0.1)
    assert np.isnan(r).tolist() == [False, True, False, False]
    found = encoding_accuracy(np.array([0.5, np.nan, -0.5, 0.5]), np.array([0.5, 0.5, 0.5, 0.0]))
    np.testing.assert_allclose(found, [0.5, np.nan, 0.0, np.nan])


def test_a_vertex_without_noise_has_the_ceiling_one():
    repeats = np.random.default_rng(0).normal(size=(5, 1, 2)).repeat(3, axis=1)
    repeats[:, :, 1] = 0
    ceiling = noise_ceiling(signal_to_noise(repeats).ncsnr, 1)
    np.testing.assert_allclose(ceiling, [1.0, 0.0])


@pytest.mark.bad_input
def test_too_few_repeats_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        signal_to_noise(np.zeros((5, 1, 2)))
    with pytest.raises(ValueError, match="trials"):
        noise_ceiling(np.ones(1), 0)
