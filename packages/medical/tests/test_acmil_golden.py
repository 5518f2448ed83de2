"""Equality with numbers that the official networks computed (tests/golden/acmil)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from heed_medical.acmil import AcmilConfig, AcmilLoss, BagClassifier, BagOutput, acmil_loss
from heed_medical.acmil.weights import load_official_state, official_name

GOLDEN = Path(__file__).parent / "golden" / "acmil"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
STORED_SINGLE = 1e-7  # gradients were computed in float64 and stored as float32
KINDS = {"abmil": "gated", "ga": "acmil-ga", "mha": "mha", "acmil_mha": "acmil-mha"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def build(golden: dict[str, Tensor], name: str, dtype: torch.dtype) -> BagClassifier:
    config = AcmilConfig(kind=KINDS[name], in_dim=20, inner_dim=16, classes=3, dropout=0.0)
    model = BagClassifier(config)
    start = f"weights.{name}."
    state = {k.removeprefix(start): x for k, x in golden.items() if k.startswith(start)}
    load_official_state(model, state)
    return model.to(dtype).eval()


def features(golden: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return golden["input.features"].clone().to(dtype).requires_grad_()


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max(), f"off by {error:.3g}"


def check_gradients(
    golden: dict[str, Tensor], model: BagClassifier, x: Tensor, prefix: str, dtype: torch.dtype
) -> None:
    found = {f"weights.{official_name(model, n)}": p.grad for n, p in model.named_parameters()}
    found["input"] = x.grad
    names = [n for n in golden if n.startswith(f"grad.{prefix}.")]
    assert len(names) >= 2
    for name in names:
        gradient = found[name.removeprefix(f"grad.{prefix}.")]
        assert gradient is not None, name
        assert_near(gradient, golden[name], max(TOLERANCE[dtype], STORED_SINGLE))


def check_losses(golden: dict[str, Tensor], loss: AcmilLoss, prefix: str, tolerance: float) -> None:
    for official, got in {
        "branch": loss.branch,
        "bag": loss.bag,
        "div": loss.diversity,
        "total": loss.total,
    }.items():
        assert_near(got, golden[f"output64.{prefix}.loss_{official}"], tolerance)


@DTYPES
@pytest.mark.parametrize("name", ["abmil", "mha"])
def test_networks_with_one_classifier(golden: dict[str, Tensor], name: str, dtype: torch.dtype):
    model, x = build(golden, name, dtype), features(golden, dtype)
    output = model.outputs(x)
    assert output.branch_logits is None
    assert_near(output.logits, golden[f"output64.{name}.logits"], TOLERANCE[dtype])
    raw = golden[f"output64.{name}.attention_raw"]
    assert output.scores is not None
    assert_near(output.scores[0].reshape(raw.shape), raw, TOLERANCE[dtype])
    loss = F.cross_entropy(output.logits, golden["input.label"])
    assert_near(loss, golden[f"output64.{name}.loss"], TOLERANCE[dtype])
    loss.backward()
    check_gradients(golden, model, x, f"{name}.eval", dtype)


def check_acmil(
    golden: dict[str, Tensor], output: BagOutput, prefix: str, tolerance: float
) -> None:
    assert output.branch_logits is not None
    assert output.scores is not None
    assert_near(output.branch_logits[0], golden[f"output64.{prefix}.branch_logits"], tolerance)
    assert_near(output.logits, golden[f"output64.{prefix}.slide_logits"], tolerance)
    raw = golden[f"output64.{prefix}.attention_raw"]
    seen = raw > -1e8
    scores = output.scores[0]
    assert_near(scores[seen.view_as(scores)], raw[seen], tolerance)


@DTYPES
@pytest.mark.parametrize("name", ["ga", "acmil_mha"])
def test_acmil_in_eval(golden: dict[str, Tensor], name: str, dtype: torch.dtype):
    model, x = build(golden, name, dtype), features(golden, dtype)
    output = model.outputs(x)
    check_acmil(golden, output, f"{name}.eval", TOLERANCE[dtype])
    loss = acmil_loss(output, golden["input.label"])
    check_losses(golden, loss, f"{name}.eval", TOLERANCE[dtype])
    loss.total.backward()
    check_gradients(golden, model, x, f"{name}.eval", dtype)


@DTYPES
@pytest.mark.parametrize("name", ["ga", "acmil_mha"])
def test_acmil_in_training_hides_the_same_instances(
    golden: dict[str, Tensor], name: str, dtype: torch.dtype
):
    model, x = build(golden, name, dtype).train(), features(golden, dtype)
    if name == "ga":
        uniform = golden["input.stkim_uniform_ga"][None, None]
    else:
        uniform = golden["input.stkim_uniform_mha"].transpose(0, 1)[None]
    output = model.outputs(x, uniform=uniform)
    hidden = golden[f"input.stkim_masked_{name}"].bool()
    assert output.allowed is not None
    assert torch.equal(~output.allowed[0], hidden.view_as(output.allowed[0]))
    check_acmil(golden, output, f"{name}.train", TOLERANCE[dtype])
    loss = acmil_loss(output, golden["input.label"])
    check_losses(golden, loss, f"{name}.train", TOLERANCE[dtype])
    loss.total.backward()
    check_gradients(golden, model, x, f"{name}.train", dtype)


def test_reduced_and_pooled_features(golden: dict[str, Tensor]):
    model, x = build(golden, "ga", torch.float64), features(golden, torch.float64)
    h = torch.relu(model.reduce(x))
    pooled = model.pool(h).vectors[0]
    for got, name in ((h[0], "h"), (pooled, "branch_pool"), (pooled.mean(0)[None], "bag_pool")):
        assert_near(got, golden[f"output64.ga.eval.{name}"], 1e-9)


PUBLISHED = json.loads((GOLDEN / "meta.json").read_text())["published_variants"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_counts_of_all_published_widths(variant: str):
    widths, classes, name, *branches = variant.split()
    in_dim, inner_dim = map(int, widths.split("->"))
    config = AcmilConfig(
        kind={"ABMIL": "gated", "MHA": "mha", "ACMIL_GA": "acmil-ga", "ACMIL_MHA": "acmil-mha"}[
            name
        ],
        in_dim=in_dim,
        classes=int(classes.removeprefix("K=")),
        branches=int(branches[0].removeprefix("T=")) if branches else 5,
    )
    assert config.width == inner_dim
    with torch.device("meta"):
        model = BagClassifier(config)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[variant]["parameters"]
