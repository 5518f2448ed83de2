"""In-context regression from the command line: what training reaches, bad input, evaluation."""

import csv
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heed_neuro.icl import theory
from heed_neuro.icl.patterns import support_weights
from heed_neuro.icl.regressor import InContextRegressor, RegressorConfig, set_signs
from heed_neuro.icl.risks import Agreement, at_length, baselines, monte_carlo
from heed_neuro.icl.tasks import LinearTask, draw
from heed_neuro_cli import APP
from heed_neuro_cli.icl_bench import HeadLoop, Projections
from heed_neuro_cli.icl_module import Experiment

FEW = (
    *("--data.val-sequences", "64", "--data.epoch-sequences", "64", "--trainer.batch", "16"),
    *("--data.test-sequences", "200", "--data.lengths", "10", "--device", "cpu"),
)


def call(*words: object) -> tuple[int, dict, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([*map(str, words), "--json", "--quiet"])
    return code, json.loads(out.getvalue() or "{}"), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("icl") / "run"
    code, _, err = call(
        "train", "icl", "--out", path, *FEW, "--trainer.max-epochs", 2, "--data.length", 12
    )
    assert code == 0, err
    return path


def test_evaluate_compares_with_the_theory_at_each_length(run):
    code, found, err = call("evaluate", run)
    assert code == 0, err
    title = next(name for name in found["tables"] if name.startswith("mean squared error"))
    assert "variance 0.1 in context and answer" in title
    assert [row["L"] for row in found["tables"][title]] == [10, 12]
    names = {Path(name).stem for name in found["files"]}
    assert {"circuits", "dynamics", "lengths"} <= names
    assert found["metrics"]["mse_ridge"] < found["metrics"]["mse_debiased_gd"]
    assert abs(found["metrics"]["correlation_with_step"]) <= 1
    exact = next(rows for name, rows in found["tables"].items() if name.startswith("exact"))
    for measured, row in zip(found["tables"][title], exact, strict=True):
        mean, error = map(float, measured["linear_attention"].split(" +- "))
        assert abs(mean - row["linear_attention"]) < 5 * error
    assert exact[1]["linear_attention"] == pytest.approx(exact[1]["vanilla_gd"])  # trained here
    assert exact[0]["linear_attention"] > exact[0]["vanilla_gd"]
    beside = found["tables"]["beside reference"]  # L = 12 has no reference
    assert [row["L"] for row in beside] == [10]
    assert "(0.518)" in beside[0]["debiased_gd"]


def test_evaluate_takes_another_task_and_another_length(run, tmp_path):
    (tmp_path / "task.yaml").write_text("length: 25\nnoise_variance: 0.5\n")
    code, found, err = call("evaluate", run, "--data", tmp_path)
    assert code == 0, err
    title = next(name for name in found["tables"] if name.startswith("exact"))
    assert [row["L"] for row in found["tables"][title]] == [10, 25]
    (tmp_path / "task.yaml").write_text("dim: 4\n")
    code, _, err = call("evaluate", run, "--data", tmp_path)
    assert code == 2
    assert "a task of 4 coordinates" in err


def test_predict_stands_beside_ridge_and_gradient_descent(run, tmp_path):
    code, _, err = call("predict", run, run / "sample", "--out", tmp_path / "out")
    assert code == 0, err
    with (tmp_path / "out" / "five.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    with np.load(run / "sample" / "five.npz") as stored:
        x, y, query = (stored[name].astype(float) for name in ("x", "y", "query"))
    for b, row in enumerate(rows):
        beta = np.linalg.solve(x[b].T @ x[b] + 0.5 * np.eye(5), x[b].T @ y[b])
        assert float(row["ridge"]) == pytest.approx(query[b] @ beta, abs=1e-4)
        assert float(row["answer"]) == pytest.approx(
            float(np.load(run / "sample" / "five.npz")["answer"][b]), abs=1e-4
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data.dim", "0"), "dim must be at least 1"),
        (("--data.length", "1"), "length must be at least 2"),
        (("--model.heads", "0"), "heads must be at least 1"),
        (("--data.covariance", "1,2;2,1", "--data.dim", "2"), "positive definite"),
        (("--data.rho", "1"), "positive definite"),
        (("--data.supports", "1,9"), "supports must be coordinates from 1 to 5"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, said, tmp_path):
    code, _, err = call("train", "icl", "--out", tmp_path / "run", *words)
    assert code == 2
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"x1,x2,y\n1,2,3\n", "a.csv"),
        ("a.csv", b"x1,x2,x3,x4,x5,y\n1,2,3,4,nope,6\n", "row 2: the column 'x5' holds 'nope'"),
        ("a.npz", b"PK\x03\x04 broken", "is not an archive of arrays"),
        ("a.npy", b"", "is a .npy file"),
    ],
)
def test_broken_sequences_are_told_in_one_line(run, name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    code, _, err = call("predict", run, tmp_path / name, "--out", tmp_path / "out")
    assert code == 2
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert said in errors[0]


def test_check_lists_everything_that_is_broken(tmp_path):
    (tmp_path / "task.yaml").write_text("dim: 2\ncovariance: [[1, 2], [2, 1]]\n")
    (tmp_path / "bad.csv").write_text("x1,y\n1,2\n")
    code, found, _ = call("check", "icl", tmp_path)
    assert code != 0
    said = json.dumps(found)
    assert "positive definite" in said
    assert "has no query" in said


def test_the_plain_forms_of_the_benchmark_are_the_same_model():
    torch.manual_seed(0)
    config = RegressorConfig(heads=3)
    ours, plain, loop = InContextRegressor(config), Projections(config), HeadLoop(config)
    state = ours.attention.state_dict()
    plain.load_state_dict(state)
    for index, head in enumerate(loop.heads):
        rows = slice(6 * index, 6 * index + 6)
        parts = {k: v[:, rows] if k.startswith("out") else v[rows] for k, v in state.items()}
        head.load_state_dict(parts)
    sequences = draw(LinearTask(), 4)
    tokens = sequences.context_tokens(), sequences.query_tokens()
    losses = [model(*tokens).square().mean().item() for model in (ours, plain, loop)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def trained(
    heads: int,
    steps: int,
    *,
    task: LinearTask,
    signs: str = "opposite",
    seed: int = 0,
    rate: float = 1e-3,
    activation: str = "softmax",
    clip: float = float("inf"),
) -> Experiment:
    """A training as the recipe's, without the program around it."""
    torch.manual_seed(seed)
    config = RegressorConfig(
        dim=task.dim,
        outputs=task.outputs,
        heads=heads,
        activation=activation,
        fixed_length=task.length,
    )
    model = Experiment(config)
    set_signs(model.regressor, signs)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = draw(task, 256, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(batch.context_tokens(), batch.query_tokens()), batch.answer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model.eval()


def error(model: Experiment, task: LinearTask) -> float:
    risks, _ = monte_carlo(
        {"model": lambda s: model(s.context_tokens(), s.query_tokens())},
        task,
        samples=40_000,
        seed=9,
    )
    return risks["model"].mean


@pytest.mark.slow
def test_one_head_reaches_the_error_of_one_head():
    task = LinearTask()
    model = trained(1, 2000, task=task)
    pattern = model.pattern()
    assert error(model, task) == pytest.approx(0.404, abs=0.01)
    assert 0.44 < abs(float(pattern.omega[0])) < 0.55
    assert abs(float(pattern.mu[0])) == pytest.approx(1.50, abs=0.12)
    assert pattern.sign_match
    assert float(pattern.off_diag_max.max()) < 0.04


@pytest.mark.slow
def test_two_heads_of_opposite_signs_beat_one_and_equal_signs_do_not():
    task = LinearTask()
    opposite = trained(2, 5000, task=task)
    pattern = opposite.pattern()
    assert error(opposite, task) == pytest.approx(0.246, abs=0.01)
    assert pattern.sign_match
    assert pattern.zero_sum < 0.02
    assert 0.17 < pattern.gamma < 0.26
    assert pattern.eta_eff == pytest.approx(0.88, abs=0.05)
    # from a start where no omega or mu is near zero: one that is may drift across
    equal = trained(2, 3000, task=task, signs="equal", seed=3)
    assert error(equal, task) > error(opposite, task) + 0.13


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_heads_of_opposite_signs_leave_the_error_of_one_head_from_any_start(seed: int):
    """Where mu is left to chance, 1 start in 3 is still at 0.40 after 1500 steps."""
    task = LinearTask()
    assert error(trained(2, 1500, task=task, seed=seed), task) < 0.36


@pytest.mark.slow
def test_correlated_coordinates_teach_the_best_matrix():
    task = LinearTask(rho=0.5)
    model = trained(2, 3000, task=task, rate=3e-3)
    found = model.pattern().metrics(task)
    assert found["zero_sum"] < 0.1
    assert found["cosine_to_optimum"] > 0.99
    assert found["cosine_to_identity"] < found["cosine_to_optimum"] - 0.03
    best = theory.preconditioned_risk(
        theory.preconditioner(task, debiased=True), task, debiased=True
    )
    assert error(model, task) < best + 0.03


TWO_OUTPUTS = LinearTask(dim=6, supports=((1, 2, 3, 4), (3, 4, 5, 6)), scaling="released")


@pytest.mark.slow
def test_one_head_for_two_outputs_weighs_what_they_share():
    pattern = trained(1, 1200, task=TWO_OUTPUTS, rate=5e-3).pattern()
    weights = np.abs(support_weights(pattern, TWO_OUTPUTS))[0]
    assert weights[2:4].min() > 1.1 * weights[[0, 1, 4, 5]].max()
    own = np.abs(pattern.ov[0, :, 6:])  # one kernel regression for both
    assert own[0, 1] + own[1, 0] < 0.1 * min(own[0, 0], own[1, 1])


@pytest.mark.slow
def test_four_heads_for_two_outputs_become_a_pair_for_each():
    """The paper's end is near 0.42; one step of gradient descent is at 0.477, zero at 4."""
    model = trained(4, 2500, task=TWO_OUTPUTS, rate=5e-3)
    assert error(model, TWO_OUTPUTS) < 0.56
    pattern = model.pattern()
    weights, gains = support_weights(pattern, TWO_OUTPUTS), pattern.ov[:, :, 6:]
    strongest = np.abs(gains.diagonal(axis1=1, axis2=2)).argmax(1)  # the output of each head
    assert sorted(strongest.tolist()) == [0, 0, 1, 1]
    for output, mask in enumerate(TWO_OUTPUTS.masks.astype(bool)):
        mine = strongest == output
        assert gains[mine, output, output].prod() < 0  # of opposite signs
        assert np.abs(weights[mine][:, ~mask]).max() < 0.3 * np.abs(weights[mine][:, mask]).min()


@pytest.mark.slow
def test_three_heads_for_two_outputs_share_one_in_superposition():
    """A head serves both outputs with opposite signs; the predictor is that of four heads."""
    three, four = (trained(heads, 2500, task=TWO_OUTPUTS, rate=5e-3, seed=1) for heads in (3, 4))
    pattern = three.pattern()
    weights, gains = support_weights(pattern, TWO_OUTPUTS), pattern.ov[:, :, 6:]
    mine = gains.diagonal(axis1=1, axis2=2)  # (heads, outputs)
    shares = mine.prod(axis=1) / np.square(mine).max(axis=1)
    shared = int(shares.argmin())
    assert shares[shared] < -0.2
    assert (np.sign(weights[shared, :2]) == np.sign(mine[shared, 0])).all()  # the first's own
    assert (np.sign(weights[shared, 4:]) == np.sign(mine[shared, 1])).all()  # the second's own
    assert error(three, TWO_OUTPUTS) < error(four, TWO_OUTPUTS) + 0.05
    sequences = draw(TWO_OUTPUTS, 4000, generator=torch.Generator().manual_seed(5))
    tokens = sequences.context_tokens(), sequences.query_tokens()
    with torch.no_grad():
        assert Agreement.of(three(*tokens), four(*tokens)).correlation > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["linear", "square", "tanh"])
def test_other_normalised_activations_end_in_the_same_pattern(activation: str):
    """The gradient is clipped: 1 + C s is normalised by a sum that may come near zero."""
    task = LinearTask()
    model = trained(2, 4000, task=task, rate=2e-3, activation=activation, clip=1.0)
    pattern = model.pattern()
    found = pattern.metrics(task)
    assert error(model, task) < 0.26  # one step of gradient descent: 0.243; one head: 0.404
    assert pattern.sign_match
    assert found["zero_sum"] < 0.05
    assert found["gamma_spread"] < 0.15
    assert found["last_entry_share"] > 0.99
    assert found["cosine_to_identity"] > 0.99


@pytest.mark.slow
def test_softmax_holds_at_longer_contexts_where_linear_attention_does_not():
    task = LinearTask(length=20)
    softmax = trained(2, 2000, task=task, rate=3e-3)
    linear = trained(2, 2000, task=task, rate=3e-3, activation="none")
    assert error(linear, task) < error(softmax, task) + 0.05
    far = at_length(task, 80)
    assert error(softmax, far) < 0.7 * error(softmax, task)  # more examples help
    assert error(linear, far) > 2 * error(linear, task)  # a sum over 4 times as many
    for used in (task, far):
        assert error(linear, used) == pytest.approx(
            theory.linear_attention_risk(used, trained=20), rel=0.15
        )


def test_predictions_of_small_heads_agree_with_the_step_and_the_sums_add_up():
    task = LinearTask()
    sequences = draw(task, 300, generator=torch.Generator().manual_seed(3))
    predictors = baselines(task)
    two, step = (predictors[name](sequences) for name in ("two_head", "debiased_gd"))
    whole = Agreement.of(two, step)
    parts = Agreement.of(two[:100], step[:100]) + Agreement.of(two[100:], step[100:])
    wanted = np.corrcoef(two.flatten(), step.flatten())[0, 1]
    assert whole.correlation == pytest.approx(wanted, abs=1e-6)
    assert parts.correlation == pytest.approx(wanted, abs=1e-6)
    assert wanted > 0.99
    assert np.isnan(Agreement.of(torch.zeros(4), torch.ones(4)).correlation)
