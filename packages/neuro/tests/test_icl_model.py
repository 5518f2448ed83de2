"""The model: stored numbers, the reparametrised form, symmetries, data, files, patterns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heed_core.circuits import kq_ov_circuits
from heed_core.errors import InputError
from heed_core.sites import observe
from heed_neuro.icl.estimators import one_step, ridge
from heed_neuro.icl.files import (
    read_sequences,
    read_task,
    write_sequences_csv,
    write_task,
)
from heed_neuro.icl.patterns import Pattern
from heed_neuro.icl.regressor import (
    InContextRegressor,
    RegressorConfig,
    ReparametrisedRegressor,
    set_signs,
    weights_from_official,
)
from heed_neuro.icl.risks import baselines, monte_carlo
from heed_neuro.icl.tasks import LinearTask, Sequences, draw

GOLDEN = Path(__file__).parent / "golden" / "icl"
TWO_OUTPUTS = LinearTask(dim=6, supports=((1, 2, 3, 4), (3, 4, 5, 6)))


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def official(stored: dict[str, torch.Tensor], prefix: str, heads: int) -> InContextRegressor:
    model = InContextRegressor(RegressorConfig(heads=heads))
    state = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    model.load_state_dict(weights_from_official(state))
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_gradients_and_circuits_equal_the_stored_ones(stored, dtype):
    model = official(stored, "weights.", 2).to(dtype)
    context = stored["input.context_tokens"].clone().to(dtype).requires_grad_()
    query = stored["input.query_token"].clone().to(dtype).requires_grad_()
    with observe(model) as record:
        found = model(context, query)
    close = 1e-10 if dtype == torch.float64 else 1e-5
    wanted = stored["output64.prediction" if dtype == torch.float64 else "output.prediction"]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=close)
    weights = record["attention.attend"][:, :, 0].to(torch.float32)
    torch.testing.assert_close(weights, stored["output.attention"], rtol=0.0, atol=1e-5)
    loss = (found - stored["input.query_answer"].to(dtype)).square().mean()
    torch.testing.assert_close(loss.float(), stored["output.loss"], rtol=0.0, atol=1e-5)
    loss.backward()
    layer = model.attention
    gradients = {
        "context_tokens": context.grad,
        "query_token": query.grad,
        "q_proj.weight": layer.query.weight.grad,
        "k_proj.weight": layer.key.weight.grad,
        "v_proj.weight": layer.value.weight.grad,
        "o_proj.weight": layer.out.weight.grad,
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.float(), stored[f"grad.{name}"], rtol=0.0, atol=1e-5, msg=name
        )
    circuits = kq_ov_circuits(layer)
    torch.testing.assert_close(circuits.kq.float(), stored["output.kq_circuit"], atol=1e-5, rtol=0)
    torch.testing.assert_close(circuits.ov.float(), stored["output.ov_circuit"], atol=1e-5, rtol=0)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"'q\.weight' is no weight"):
        weights_from_official({"q.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("heads", "dim", "outputs", "count"),
    [(1, 5, 1, 114), (2, 5, 1, 228), (4, 5, 1, 456), (8, 5, 1, 912), (3, 6, 2, 3 * 208)],
)
def test_parameters_are_counted_exactly(heads, dim, outputs, count):
    model = InContextRegressor(RegressorConfig(dim=dim, outputs=outputs, heads=heads))
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_reparametrised_model_is_the_attention_with_these_circuits():
    omega, mu = torch.tensor([0.2, -0.3, 0.5]), torch.tensor([2.0, -3.0, 0.7])
    short = ReparametrisedRegressor(omega, mu)
    sequences = draw(LinearTask(), 16, generator=generator())
    full = short.expand(5)
    tokens = sequences.context_tokens(), sequences.query_tokens()
    torch.testing.assert_close(short(*tokens), full(*tokens), rtol=0.0, atol=1e-6)
    circuits = kq_ov_circuits(full.attention)
    pattern = Pattern(kq=circuits.kq.detach().numpy(), ov=circuits.ov.detach().numpy(), dim=5)
    np.testing.assert_allclose(pattern.omega, omega, atol=1e-6)
    np.testing.assert_allclose(pattern.mu, mu, atol=1e-6)
    assert pattern.sign_match
    assert pattern.eta_eff == pytest.approx(0.4 + 0.9 + 0.35, abs=1e-5)
    assert pattern.zero_sum == pytest.approx(0.3 / 5.7, abs=1e-5)
    assert float(pattern.diag_homogeneity.max()) < 1e-6
    assert float(pattern.last_entry_share.min()) == pytest.approx(1.0)
    assert pattern.n_dummy == 0


@pytest.mark.parametrize("activation", ["softmax", "linear", "square", "tanh", "none"])
def test_the_order_of_the_context_changes_nothing(activation):
    torch.manual_seed(0)
    slope = 0.1 if activation in ("linear", "square") else 1.0
    model = InContextRegressor(RegressorConfig(activation=activation, slope=slope)).double()
    sequences = draw(LinearTask(), 4, generator=generator()).to(dtype=torch.float64)
    context, query = sequences.context_tokens(), sequences.query_tokens()
    order = torch.randperm(40, generator=generator())
    torch.testing.assert_close(
        model(context[:, order], query), model(context, query), rtol=1e-10, atol=1e-12
    )
    changed = context.clone()
    changed[:, 0, -1] += 1.0
    assert not torch.allclose(model(changed, query), model(context, query))


def test_linear_attention_divides_by_the_length_it_was_made_for():
    torch.manual_seed(0)
    model = InContextRegressor(RegressorConfig(activation="none", fixed_length=4)).double()
    context, query = torch.randn(2, 9, 6).double(), torch.randn(2, 1, 6).double()
    circuits = kq_ov_circuits(model.attention)
    scores = torch.einsum("blk,hkc,bqc->bhql", context, circuits.kq, query)
    wanted = torch.einsum("bhql,hok,blk->bqo", scores / 4, circuits.ov, context)
    torch.testing.assert_close(model(context, query), wanted)


@pytest.mark.parametrize("signs", ["opposite", "equal", "any"])
def test_signs_at_the_start(signs):
    torch.manual_seed(1)
    model = InContextRegressor(RegressorConfig(heads=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def found() -> tuple[list[float], list[float]]:
        circuits = kq_ov_circuits(model.attention)
        traces = circuits.kq.detach()[:, :5, :5].diagonal(dim1=1, dim2=2).sum(1)
        return traces.sign().tolist(), circuits.ov.detach()[:, 0, 5].sign().tolist()

    unchanged = found()
    assert [1.0] * 4 not in unchanged  # chance alone does not make them agree
    set_signs(model, signs)
    wanted = {"opposite": ([1, -1, 1, -1],) * 2, "equal": ([1] * 4,) * 2, "any": unchanged}
    assert found() == wanted[signs]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.abs(), before[name].abs(), rtol=0.0, atol=0.0)


def test_heads_that_do_nothing_are_counted():
    eye = np.eye(6)
    kq = np.stack([0.2 * eye, -0.2 * eye, 1e-4 * eye])
    ov = np.zeros((3, 1, 6))
    ov[:, 0, -1] = 3.0, -3.0, 0.1
    pattern = Pattern(kq=kq, ov=ov, dim=5)
    assert pattern.n_dummy == 1
    assert pattern.gamma == pytest.approx(0.2)
    assert pattern.metrics(LinearTask())["cosine_to_identity"] == pytest.approx(1.0)


def test_sequences_have_the_moments_of_their_task():
    task = LinearTask(dim=3, length=6, rho=0.5, noise_variance=0.4)
    found = draw(task, 40_000, generator=generator())
    sigma = torch.from_numpy(task.sigma).float()
    assert torch.allclose(found.x.flatten(0, 1).T.cov(), sigma, atol=0.02)
    # Var y = tr Sigma / d + s2 (3 / 3 + .4), of the answer too
    assert float(found.y.var()) == pytest.approx(1.4, abs=0.03)
    assert float(found.answer.var()) == pytest.approx(1.4, abs=0.04)
    assert found.query_tokens().shape == (40_000, 1, 4)
    assert not found.query_tokens()[..., -1].any()


@pytest.mark.parametrize("scaling", ["paper", "released"])
def test_the_conventions_of_several_outputs(scaling):
    task = LinearTask(dim=6, supports=TWO_OUTPUTS.supports, scaling=scaling, noise_variance=0.1)
    found = draw(task, 40_000, generator=generator())
    context, answer = found.y.var(dim=(0, 1)), found.answer.var(dim=(0, 1))
    signal, noise = (4.0, 0.4) if scaling == "released" else (4 / 6, 0.1)
    assert context.tolist() == pytest.approx([signal + noise] * 2, rel=0.03)
    wanted = signal if scaling == "released" else signal + noise
    assert answer.tolist() == pytest.approx([wanted] * 2, rel=0.04)
    assert ("none in the answer" in task.noise) == (scaling == "released")


def test_one_step_on_two_outputs_has_the_risk_of_each_output():
    # released: 4 x (risk of d = 4 without its noise) = 4 x (1 - eta), eta = 1/(1 + 5.4/40)
    task = LinearTask(dim=6, supports=TWO_OUTPUTS.supports, scaling="released")
    risks, _ = monte_carlo(baselines(task), task, samples=30_000, seed=0)
    eta = 1 / (1 + (4 + 1 + 0.4) / 40)
    exact = 4 * (1 - eta)
    assert exact == pytest.approx(0.477, abs=0.002)
    assert abs(risks["vanilla_gd"].mean - exact) < 4 * risks["vanilla_gd"].standard_error
    assert abs(risks["zero"].mean - 4.0) < 4 * risks["zero"].standard_error
    assert risks["ridge"].mean < 0.2 * risks["vanilla_gd"].mean


def test_ridge_is_the_textbook_solution_for_each_sequence():
    sequences = draw(LinearTask(), 3, generator=generator())
    found = ridge(sequences, LinearTask())
    for b in range(3):
        x, y = sequences.x[b].double().numpy(), sequences.y[b, :, 0].double().numpy()
        beta = np.linalg.solve(x.T @ x + 0.5 * np.eye(5), x.T @ y)
        assert float(found[b, 0, 0]) == pytest.approx(
            float(sequences.query[b, 0].double().numpy() @ beta), abs=1e-5
        )
    task = TWO_OUTPUTS
    two = draw(task, 2, generator=generator())
    design = np.concatenate([two.x[0].numpy() * mask for mask in task.masks]).astype(float)
    y = two.y[0].T.reshape(-1).double().numpy()
    beta = np.linalg.solve(design.T @ design + 0.6 * np.eye(6), design.T @ y)
    wanted = (task.masks * beta) @ two.query[0, 0].double().numpy()
    np.testing.assert_allclose(ridge(two, task)[0, 0], wanted, atol=1e-5)


def test_a_step_sees_its_own_coordinates_only():
    two = draw(TWO_OUTPUTS, 2, generator=generator())
    moved = two.query + torch.eye(6)[0]  # seen by the first output only
    other = Sequences(x=two.x, y=two.y, query=moved)
    change = one_step(other, TWO_OUTPUTS, rate=1.0, debiased=False) - one_step(
        two, TWO_OUTPUTS, rate=1.0, debiased=False
    )
    assert bool((change[..., 0] != 0).all())
    assert bool((change[..., 1] == 0).all())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dim": 0}, "dim must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"noise_variance": -0.1}, "noise_variance"),
        ({"rho": 1.0}, "positive definite"),
        ({"dim": 2, "covariance": ((1.0, 2.0), (2.0, 1.0))}, "lowest eigenvalue is -1"),
        ({"dim": 2, "covariance": ((1.0, 0.5), (0.0, 1.0))}, "symmetric"),
        ({"dim": 2, "covariance": ((1.0,), (1.0,))}, "2 rows of 2"),
        ({"supports": ((0, 1),)}, "from 1 to 5"),
        ({"scaling": "released"}, "no effect without supports"),
    ],
)
def test_a_task_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        LinearTask(**wrong)


@pytest.mark.bad_input
def test_a_model_without_heads_is_refused():
    with pytest.raises(ValueError, match="heads must be at least 1"):
        RegressorConfig(heads=0)


def test_tasks_and_sequences_survive_their_files(tmp_path):
    for task in (LinearTask(rho=0.5), TWO_OUTPUTS, LinearTask(dim=1, covariance=((2.0,),))):
        write_task(task, tmp_path / "task.yaml")
        assert read_task(tmp_path / "task.yaml") == task
    sequences = draw(TWO_OUTPUTS, 3, generator=generator())
    write_sequences_csv(sequences, tmp_path / "a.csv")
    found = read_sequences(tmp_path / "a.csv")
    assert found.labels == ("0", "1", "2")
    assert len(found.groups) == 3
    torch.testing.assert_close(found.groups[1].x[0], sequences.x[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.groups[1].y[0], sequences.y[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.groups[2].query[0], sequences.query[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dim: [", "is not valid YAML"),
        ("- 1", "holds no mapping"),
        ("dims: 5", "unknown key 'dims'"),
        ("dim: five", "dim must be a whole number"),
        ("dim: 0", "dim must be at least 1"),
        ("noise_variance: .nan", "noise_variance must be finite"),
        ("covariance: [[1, 2], [2, 1]]\ndim: 2", "positive definite"),
        ("covariance: 3", "list of lists"),
    ],
)
def test_a_broken_description_is_told_in_one_line(text, said, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_task(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


HEAD = "x1,x2,y\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no table"),
        ("a,b\n1,2\n", "has no column 'x1'"),
        ("x1,x3,y\n1,2,3\n", "one is missing"),
        (HEAD + "1,2,3\n4,5,6\n", "has no query"),
        (HEAD + "1,2,3\n4,5,\n", "context of 1 rows"),
        (HEAD + "1,2,3\n1,oh,3\n4,5,\n", "row 3: the column 'x2' holds 'oh'"),
        (HEAD + "1,2,3\n1,,3\n4,5,\n", "the column 'x2' is empty"),
        (HEAD + "1,2,inf\n1,3,3\n4,5,\n", "the column 'y' holds 'inf'"),
        ("x1,y1,y2\n1,2,\n1,2,3\n1,,\n", "some outputs and not others"),
    ],
)
def test_a_broken_csv_is_told_in_one_line(text, said, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_sequences(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = {"x": np.ones((2, 4, 3)), "y": np.ones((2, 4)), "query": np.ones((2, 3))}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y": None}, "has no array 'y'"),
        ({"y": np.ones((2, 5))}, "do not fit"),
        ({"x": np.full((2, 4, 3), np.nan)}, "'x' is not finite at (0, 0, 0)"),
        ({"query": np.array([["a"] * 3] * 2)}, "holds no numbers"),
        ({"answer": np.ones(5)}, "answer (5,) does not fit (2, 1, 1)"),
    ],
)
def test_a_broken_npz_is_told_in_one_line(change, said, tmp_path):
    path = tmp_path / "mine.npz"
    arrays = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    np.savez(path, **arrays)
    with pytest.raises(InputError) as caught:
        read_sequences(path)
    assert said in str(caught.value)
    np.savez(path, **GOOD)
    assert read_sequences(path).groups[0].y.shape == (2, 4, 1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="is not an archive of arrays"):
        read_sequences(path)


def test_stored_trained_weights_show_the_pattern(stored):
    run = json.loads((GOLDEN / "meta.json").read_text())["trained"]
    by_heads = {one["heads"]: one for one in run if one["seed"] == 0 and one["steps"] != 20000}
    for heads in (1, 2, 4):
        circuits = kq_ov_circuits(official(stored, f"trained.H{heads}.weights.", heads).attention)
        pattern = Pattern(kq=circuits.kq.detach().numpy(), ov=circuits.ov.detach().numpy(), dim=5)
        wanted = by_heads[heads]
        omega = [head["omega"] for head in wanted["per_head"]]
        np.testing.assert_allclose(pattern.omega, omega, atol=1e-5)
        assert pattern.eta_eff == pytest.approx(wanted["eta_eff"], abs=1e-5)
        assert pattern.zero_sum == pytest.approx(wanted["zero_sum"], abs=1e-5)
        assert pattern.sign_match
