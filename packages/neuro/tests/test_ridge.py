"""Ridge against its closed form and against himalaya; penalties per target; bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heed_neuro.ridge import (
    RidgeOptions,
    choose_alphas,
    kernel_ridge_predict,
    linear_kernel,
    moments,
    ridge,
    ridge_cv,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "ridge" / "fixture.safetensors")
FOLDS = {"tall": 5, "wide": 4}


def problem(name: str) -> tuple[torch.Tensor, ...]:
    return tuple(GOLDEN[f"input.{name}.{part}"] for part in ("X", "Y", "X_test", "alphas"))


@pytest.mark.parametrize(("rows", "features"), [(30, 7), (9, 25), (12, 12)])
def test_it_is_the_closed_form(rows: int, features: int):
    torch.manual_seed(0)
    x, y = torch.randn(rows, features).double(), torch.randn(rows, 4).double()
    alphas = torch.tensor([0.1, 1.0, 30.0, 1e4], dtype=torch.float64)
    found = ridge(x, y, alphas).coef
    for target, alpha in enumerate(alphas):
        eye = torch.eye(features, dtype=torch.float64)
        wanted = torch.linalg.solve(x.T @ x + alpha * eye, x.T @ y[:, target])
        torch.testing.assert_close(found[:, target], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FOLDS)
def test_given_penalties_per_target_equal_himalaya(name: str):
    x, y, _, _ = problem(name)
    found = ridge(x, y, GOLDEN[f"input.{name}.per_target_alpha"])
    wanted = GOLDEN[f"output.{name}.per_target_alpha_coef"]
    torch.testing.assert_close(found.coef, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("batch", [3, 4096])
def test_cross_validation_equals_himalaya(name: str, intercept: bool, batch: int):
    x, y, x_test, alphas = problem(name)
    prefix = f"output.{name}.{'intercept' if intercept else 'no_intercept'}."
    options = RidgeOptions(
        alphas=tuple(alphas.tolist()),
        folds=FOLDS[name],
        intercept=intercept,
        targets_batch=batch,
    )
    fit = ridge_cv(x, y, options)
    table = GOLDEN[f"{prefix}cv_score_table"]
    torch.testing.assert_close(fit.scores, table, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fit.alphas, GOLDEN[f"{prefix}best_alphas"], rtol=1e-12, atol=0)
    torch.testing.assert_close(fit.coef, GOLDEN[f"{prefix}coef"], rtol=1e-7, atol=1e-8)
    wanted = GOLDEN[f"{prefix}prediction_test"]
    torch.testing.assert_close(fit.predict(x_test), wanted, rtol=1e-8, atol=1e-8)
    found, chosen = kernel_ridge_predict(x @ x.T, y, x_test @ x.T, options)
    torch.testing.assert_close(found, GOLDEN[f"{prefix}kernel_prediction_test"])
    torch.testing.assert_close(chosen, GOLDEN[f"{prefix}kernel_best_alphas"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FOLDS)
def test_one_penalty_for_all_targets_equals_himalaya(name: str):
    x, y, x_test, alphas = problem(name)
    prefix = f"output.{name}.intercept.global_"
    fit = ridge_cv(
        x, y, RidgeOptions(alphas=tuple(alphas.tolist()), folds=FOLDS[name], per_target=False)
    )
    torch.testing.assert_close(fit.alphas, GOLDEN[f"{prefix}best_alpha"], rtol=1e-12, atol=0)
    test = GOLDEN[f"input.{name}.Y_test"]
    left = (test - fit.predict(x_test)).square().sum(0)
    r2 = 1 - left / (test - test.mean(0)).square().sum(0)
    torch.testing.assert_close(r2, GOLDEN[f"{prefix}r2_test"], rtol=1e-8, atol=1e-8)


def test_another_kernel_equals_himalaya():
    x, y, x_test, alphas = problem("tall")

    def gaussian(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * x.shape[1]))

    options = RidgeOptions(alphas=tuple(alphas.tolist()), folds=5, intercept=False)
    found, chosen = kernel_ridge_predict(gaussian(x, x), y, gaussian(x_test, x), options)
    torch.testing.assert_close(chosen, GOLDEN["output.tall.rbf.best_alphas"])
    wanted = GOLDEN["output.tall.rbf.prediction_test"]
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


def test_equal_scores_choose_the_larger_penalty():
    scores = torch.zeros(3, 2).double()
    assert choose_alphas(scores, RidgeOptions(alphas=(1.0, 10.0, 100.0))).tolist() == [100.0] * 2


def test_targets_are_read_in_batches():
    class Watched:
        shape = (20, 10)
        widest = 0

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            self.widest = max(self.widest, index[1].stop - index[1].start)
            return np.ones((20, 10))[index]

    y = Watched()
    ridge_cv(torch.randn(20, 3), y, RidgeOptions(targets_batch=4))
    assert y.widest == 4


def test_a_kernel_summed_over_blocks_is_that_of_z_scored_rows():
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(3, 2, (6, 11)), rng.normal(size=(4, 11))
    rows[:, 5] = 7.0  # does not vary
    mean, std = moments(rows, block=4)
    found = linear_kernel(columns, rows, mean=mean, std=std, block=4, dtype=torch.float64)
    kept = np.arange(11) != 5
    z = [(t[:, kept] - rows[:, kept].mean(0)) / rows[:, kept].std(0) for t in (columns, rows)]
    np.testing.assert_allclose(found.numpy(), z[0] @ z[1].T, rtol=1e-5)


@pytest.mark.bad_input
def test_wrong_options_are_refused():
    for wrong in ({"alphas": ()}, {"alphas": (0.0,)}, {"folds": 1}, {"targets_batch": 0}):
        with pytest.raises(ValueError, match="must be"):
            RidgeOptions(**wrong)
    with pytest.raises(ValueError, match="folds"):
        ridge_cv(torch.zeros(3, 2), torch.zeros(3, 1))
