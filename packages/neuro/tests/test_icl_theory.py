"""Exact risks against Monte Carlo and stored numbers, the loss against autograd, the flow."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heed_neuro.icl import theory
from heed_neuro.icl.estimators import kernel_regression, one_step, preconditioned_step, ridge
from heed_neuro.icl.flow import Flow, find_stages, gradient_flow, live_heads
from heed_neuro.icl.risks import at_length, baselines, monte_carlo, risk_of
from heed_neuro.icl.tasks import LinearTask, Sequences, draw

GOLDEN = Path(__file__).parent / "golden" / "icl"
TASK = LinearTask()


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def test_the_numbers_that_the_paper_reads_off():
    assert theory.debiased_rate(TASK) == pytest.approx(0.8791, abs=5e-5)
    assert theory.vanilla_rate(TASK) == pytest.approx(0.8602, abs=5e-5)
    assert theory.manifold_mu(0.13, TASK) == pytest.approx(3.381, abs=5e-4)
    assert theory.high_dimensional_bayes_risk(0.125, 0.1) == pytest.approx(0.1141, abs=5e-5)
    assert theory.bayes_ratio_bound(0.125, 0.1) == pytest.approx(2.085, abs=5e-4)
    best = theory.gradient_risk(theory.debiased_rate(TASK), TASK, debiased=True)
    assert best == pytest.approx(1.1 - theory.debiased_rate(TASK) * (1 - 1 / 40), abs=1e-12)
    assert best == pytest.approx(0.242857, abs=5e-7)
    assert theory.gradient_risk(theory.vanilla_rate(TASK), TASK, debiased=False) == pytest.approx(
        0.2398, abs=5e-5
    )


@pytest.mark.parametrize("debiased", [True, False])
def test_the_exact_risk_is_the_closed_form_and_smallest_at_its_rate(debiased):
    d, length, s2 = 5, 40, 0.1
    best = theory.debiased_rate(TASK) if debiased else theory.vanilla_rate(TASK)
    for eta in (0.3, best, 1.2):
        if debiased:
            squared = ((length - 1) * (length + d) + s2 * d * (length - 1)) / length**2
            wanted = 1 + s2 - 2 * eta * (length - 1) / length + eta**2 * squared
        else:
            wanted = 1 + s2 - 2 * eta + eta**2 * (1 + (d + 1 + s2 * d) / length)
        assert theory.gradient_risk(eta, TASK, debiased=debiased) == pytest.approx(wanted)
    around = [theory.gradient_risk(best + e, TASK, debiased=debiased) for e in (-1e-3, 0, 1e-3)]
    assert min(around) == around[1]


@pytest.mark.parametrize("debiased", [True, False])
def test_no_matrix_beats_the_best_one(debiased):
    task = LinearTask(rho=0.5, length=12)
    best = theory.preconditioner(task, debiased=debiased)
    lowest = theory.preconditioned_risk(best, task, debiased=debiased)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = best + 0.02 * rng.normal(size=(5, 5))
        assert theory.preconditioned_risk(other, task, debiased=debiased) > lowest
    assert lowest < theory.preconditioned_risk(
        theory.vanilla_rate(task) * np.eye(5), task, debiased=debiased
    )


def test_the_best_matrix_is_near_the_inverse_covariance():
    found = {}
    for length in (10, 40, 200):
        task = LinearTask(rho=0.5, length=length)
        best, inverse = theory.preconditioner(task, debiased=False), np.linalg.inv(task.sigma)
        size = np.linalg.norm(best)
        found[length] = (
            (best * inverse).sum() / size / np.linalg.norm(inverse),
            np.trace(best) / size / 5**0.5,
        )
    wanted = {10: (0.985, 0.94), 40: (0.998, 0.90), 200: (1.0, 0.88)}
    for length, pair in wanted.items():
        assert found[length] == pytest.approx(pair, abs=6e-3)


@pytest.mark.parametrize(
    "task", [LinearTask(length=10), LinearTask(dim=3, length=8, rho=0.6, noise_variance=0.3)]
)
def test_the_exact_risks_agree_with_monte_carlo(task):
    steps = {debiased: theory.preconditioner(task, debiased=debiased) for debiased in (True, False)}
    predictors = {
        "plain": lambda s: preconditioned_step(s, task, steps[False], debiased=False),
        "debiased": lambda s: preconditioned_step(s, task, steps[True], debiased=True),
        "zero": lambda s: torch.zeros_like(s.query[..., :1]),
    }
    risks, _ = monte_carlo(predictors, task, samples=40_000, seed=3)
    exact = {
        "plain": theory.preconditioned_risk(steps[False], task, debiased=False),
        "debiased": theory.preconditioned_risk(steps[True], task, debiased=True),
        "zero": theory.zero_risk(task),
    }
    for name, risk in risks.items():
        assert abs(risk.mean - exact[name]) < 4 * risk.standard_error, name
        assert risk.standard_error < 0.02 * exact[name], name


def test_the_approximate_loss_and_its_gradient_are_those_of_autograd():
    rng = np.random.default_rng(1)
    omega, mu = rng.normal(size=4) * 0.3, rng.normal(size=4)
    a, m = (torch.from_numpy(x).requires_grad_() for x in (omega, mu))
    inner = a[:, None] * a + 1.1 / 40 * (5 * a[:, None] * a).exp()
    loss = 1 + 0.1 - 2 * (m * a).sum() + (m[:, None] * inner * m).sum()
    loss.backward()
    assert theory.approximate_loss(omega, mu, TASK) == pytest.approx(loss.item(), abs=1e-12)
    by_omega, by_mu = theory.approximate_gradient(omega, mu, TASK)
    np.testing.assert_allclose(by_omega, a.grad, atol=1e-12)
    np.testing.assert_allclose(by_mu, m.grad, atol=1e-12)
    _, still = theory.approximate_gradient(omega, theory.optimal_mu(omega, TASK), TASK)
    np.testing.assert_allclose(still, 0.0, atol=1e-10)


def test_the_manifold_is_where_mu_is_best():
    gamma = 0.2
    best = theory.optimal_mu(np.array([gamma, -gamma]), TASK)
    np.testing.assert_allclose(best, theory.manifold_mu(gamma, TASK) * np.array([1, -1]))
    tiny = 1e-4
    assert 2 * tiny * theory.manifold_mu(tiny, TASK) == pytest.approx(theory.debiased_rate(TASK))


def test_theory_equals_the_stored_numbers(stored):
    omega, mu = (stored[f"theory.input.{name}"].numpy() for name in ("omega", "mu"))
    found = {
        "mu_star": theory.optimal_mu(omega, TASK),
        "approx_loss": theory.approximate_loss(omega, mu, TASK),
        "approx_loss_halved": theory.approximate_loss(omega, mu, TASK) / 2,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, stored[f"theory.output.{name}"], rtol=1e-10)
    by_omega, by_mu = theory.approximate_gradient(omega, mu, TASK)
    grads = {"omega": by_omega, "mu": by_mu}
    for name, gradient in grads.items():
        wanted = stored[f"theory.grad.{name}_of_halved_loss"]
        np.testing.assert_allclose(gradient / 2, wanted, rtol=1e-9, atol=1e-12)


def test_estimators_equal_the_stored_numbers(stored):
    x, y, query = (stored[f"theory.input.{name}"] for name in ("X", "y", "xq"))
    sequences = Sequences(x=x.mT, y=y[..., None], query=query[:, None])
    omega, mu = stored["theory.input.omega"], stored["theory.input.mu"]
    best = torch.from_numpy(theory.optimal_mu(omega.numpy(), TASK))
    rate = 2 * 0.13 * 3.1  # 2 gamma mu of the stored run (meta.json, "theory")
    candidates = {
        "debiased_gd": one_step(sequences, TASK, rate=rate, debiased=True),
        "gd": one_step(sequences, TASK, rate=rate, debiased=False),
        "ridge": ridge(sequences, TASK),
        "multi_head_softmax": kernel_regression(sequences, omega, mu),
        "multi_head_softmax_optimal_mu": kernel_regression(sequences, omega, best),
    }
    for name, found in candidates.items():
        wanted = stored[f"theory.output.{name}"]
        torch.testing.assert_close(found[:, 0, 0], wanted, rtol=1e-10, atol=1e-10, msg=name)


def test_the_flow_equals_the_stored_one(stored):
    flow = gradient_flow(
        stored["theory.input.flow_omega0"].numpy(),
        stored["theory.input.flow_mu0"].numpy(),
        TASK,
        steps=stored["theory.output.flow_steps"][:5].numpy(),
        rate=0.005,
    )
    np.testing.assert_allclose(flow.omega, stored["theory.output.flow_omega"][:5], atol=1e-10)
    np.testing.assert_allclose(flow.mu, stored["theory.output.flow_mu"][:5], atol=1e-10)
    np.testing.assert_allclose(flow.loss / 2, stored["theory.output.flow_loss_halved"][:5])


def test_the_flow_from_small_values_ends_in_the_pattern():
    rng = np.random.default_rng(4)
    steps = np.unique(np.geomspace(1, 60_000, 60).astype(int))
    flow = gradient_flow(
        rng.normal(size=4) * 0.02, rng.normal(size=4) * 0.02, TASK, steps=steps, rate=0.01
    )
    omega, mu = flow.omega[-1], flow.mu[-1]
    live = live_heads(omega, mu)
    assert abs(mu.sum()) < 1e-2 * np.abs(mu).sum()
    assert (np.sign(omega) == np.sign(mu))[live].all()
    size = np.abs(omega[live])
    assert size.max() - size.min() < 0.02 * size.mean()
    stages = find_stages(flow)
    assert stages.first is not None
    assert stages.second is not None
    assert 0 < stages.first < stages.second <= steps[-1]
    largest = np.abs(flow.omega[:, live]).mean(1)
    assert largest.max() > 1.1 * largest[-1]  # grows, then shrinks
    assert np.abs(mu).sum() > np.abs(flow.mu[len(steps) // 2]).sum()


def test_a_flow_without_the_pattern_has_no_stages():
    still = np.tile([0.1, 0.2], (3, 1))
    flow = Flow(steps=np.arange(3), omega=still, mu=still, loss=np.zeros(3))
    assert find_stages(flow).first is None


@pytest.mark.bad_input
def test_a_flow_recorded_backwards_is_refused():
    with pytest.raises(ValueError, match="ascend"):
        gradient_flow(np.ones(2), np.ones(2), TASK, steps=[5, 3])


TABLE = {
    10: (1.10, 0.495, 0.518, 0.517, 0.751, 0.196),
    20: (1.10, 0.346, 0.354, 0.354, 0.569, 0.134),
    40: (1.10, 0.240, 0.243, 0.243, 0.405, 0.114),
    80: (1.10, 0.175, 0.176, 0.176, 0.289, 0.107),
    160: (1.10, 0.139, 0.140, 0.140, 0.207, 0.103),
}
"""MSE by length: zero, vanilla GD, debiased GD, two heads, one head, ridge (independent runs of 4e5
sequences; rounded to 3 places)."""


def test_linear_attention_is_best_where_it_was_trained_and_rises_beyond():
    risks = [
        theory.linear_attention_risk(at_length(TASK, length), trained=40)
        for length in (20, 40, 80, 160, 320)
    ]
    assert risks[1] == pytest.approx(
        theory.gradient_risk(theory.vanilla_rate(TASK), TASK, debiased=False)
    )
    assert risks[0] > risks[1] < risks[2] < risks[3] < risks[4]
    rate = theory.vanilla_rate(TASK) * 4  # at L = 160, by hand
    wanted = 1.1 - 2 * rate + rate**2 * (1 + (6 + 0.5) / 160)
    assert risks[3] == pytest.approx(wanted)


@pytest.mark.parametrize("task", [LinearTask(length=15), LinearTask(length=15, rho=0.5)])
def test_linear_attention_predicts_with_the_risk_of_its_theory(task):
    """The predictor is a layer of linear attention that divides by 10, here on 15 examples."""
    predict = baselines(task, trained=10)["linear_attention"]
    risks, _ = monte_carlo({"found": predict}, task, samples=40_000, seed=4)
    wanted = theory.linear_attention_risk(task, trained=10)
    assert abs(risks["found"].mean - wanted) < 4 * risks["found"].standard_error
    assert "linear_attention" not in baselines(task)


def check_table(length: int, samples: int, allowed: float) -> None:
    predictors = baselines(at_length(TASK, length))
    risks, errors = monte_carlo(predictors, at_length(TASK, length), samples=samples, seed=length)
    for (name, risk), wanted in zip(risks.items(), TABLE[length], strict=True):
        assert abs(risk.mean - wanted) < max(allowed, 4 * risk.standard_error), (name, risk)
    paired = risk_of(errors["debiased_gd"] - errors["vanilla_gd"])
    assert paired.mean > 4 * paired.standard_error  # debiasing costs, at each finite L


def test_the_table_of_risks_on_few_sequences():
    check_table(10, samples=20_000, allowed=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("length", list(TABLE))
def test_the_table_of_risks(length):
    check_table(length, samples=400_000, allowed=0.004)


def test_two_small_heads_are_debiased_gradient_descent():
    sequences = draw(TASK, 64, generator=torch.Generator().manual_seed(0)).to(dtype=torch.float64)
    rate, gamma = theory.debiased_rate(TASK), 1e-3
    heads = torch.tensor([gamma, -gamma], dtype=torch.float64)
    found = kernel_regression(sequences, heads, rate / 2 / gamma * heads.sign())
    wanted = one_step(sequences, TASK, rate=rate, debiased=True)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_stored_monte_carlo_agrees_with_the_exact_risks():
    runs = json.loads((GOLDEN / "meta.json").read_text())["monte_carlo"]
    for run in runs:
        task = LinearTask(dim=run["d"], length=run["L"], noise_variance=run["sigma2"])
        for name, rate in (
            ("debiased_gd", theory.debiased_rate(task)),
            ("vanilla_gd", theory.vanilla_rate(task)),
        ):
            mse = run["mse"][name]
            exact = theory.gradient_risk(rate, task, debiased=name == "debiased_gd")
            assert abs(mse["value"] - exact) < 3 * mse["standard_error"]
