"""Tensor attention against stored numbers of its cubic formula."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_core.attention.tensor import (
    khatri_rao,
    tensor_attention,
    tensor_attention_poly,
    tensor_attention_weights,
)
from heed_core.kernels import pair_softmax as kernel

GOLDEN = Path(__file__).parent / "golden" / "tensor_attention"
META = json.loads((GOLDEN / "meta.json").read_text())
TOLERANCES = [(torch.float64, 1e-11), (torch.float32, 2e-5)]
PARTS = ("q", "k1", "k2", "v1", "v2")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def options(golden: dict[str, Tensor], case: str) -> dict:
    real = golden["input.self.real_token"][:, None, None]
    return {
        "cross.scale_1_over_d": {},
        "cross.scale_1": {"scale": 1.0},
        "cross.masked": {n: golden[f"input.cross.{n}"] for n in ("mask1", "mask2")},
        "self.causal": {"causal": True},
        "self.distinct": {"distinct": True},
        "self.causal_distinct": {"causal": True, "distinct": True},
        "self.padded": {"mask1": real, "mask2": real},
        "self.causal_padded": {"mask1": real, "mask2": real, "causal": True},
    }[case]


CASES = ["cross.scale_1_over_d", "cross.scale_1", "cross.masked", "self.causal", "self.distinct"]
CASES += ["self.causal_distinct", "self.padded", "self.causal_padded"]


@pytest.mark.parametrize("tile", [1, 4, 32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES, ids=str)
def test_outputs_and_gradients(golden, monkeypatch, dtype, tolerance, case: str, tile: int) -> None:
    monkeypatch.setattr(kernel, "TILE", tile)
    kind = case.split(".")[0]
    rows = [golden[f"input.{kind}.{n}"].to(dtype).requires_grad_() for n in PARTS]
    out = tensor_attention(*rows, **options(golden, case))
    stored = golden[f"output64.{case}.out"]
    torch.testing.assert_close(out.double(), stored, rtol=0, atol=tolerance)
    loss = (out * golden[f"input.{kind}.loss_weight"]).sum()
    for name, gradient in zip(PARTS, torch.autograd.grad(loss, rows), strict=True):
        if f"grad.{case}.{name}" in golden:
            wanted = golden[f"grad.{case}.{name}"]
            torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=20 * tolerance)


def test_sums_and_weights_of_pairs(golden) -> None:
    rows = [golden[f"input.cross.{n}"] for n in PARTS]
    masks = [golden[f"input.cross.mask{i}"] for i in (1, 2)]
    _, sums = kernel.pair_softmax(*rows, *masks, False, False, 0.25, False)
    torch.testing.assert_close(sums, golden["output64.cross.masked.lse"])
    weights = tensor_attention_weights(*rows[:3])
    torch.testing.assert_close(weights[0, 0], golden["output64.cross.pair_weights_head0"])


def test_three_keys(golden) -> None:
    given = {n: golden[f"input.order4.{n}"][None, None] for n in ("q", "k1", "k2", "k3")}
    values = {n: golden[f"input.order4.{n}"][None, None] for n in ("v1", "v2", "v3")}
    out = tensor_attention(
        given["q"],
        given["k1"],
        khatri_rao(given["k2"], given["k3"]),
        values["v1"],
        khatri_rao(values["v2"], values["v3"]),
    )
    torch.testing.assert_close(out[0, 0], golden["output64.order4.out"], rtol=0, atol=1e-11)


@pytest.mark.parametrize("record", META["polynomial"], ids=lambda r: f"B{r['B']}-g{r['degree']}")
def test_polynomials(golden, record) -> None:
    name = f"{record['B']:g}"
    rows = [golden[f"input.poly.B{name}.{n}"][None, None] for n in PARTS]
    out = tensor_attention_poly(*rows, degree=record["degree"])[0, 0]
    stored = golden[f"output64.poly.B{name}.degree{record['degree']}"]
    torch.testing.assert_close(out, stored, rtol=0, atol=1e-9)
    exact = golden[f"output64.poly.B{name}.exact"]
    assert float((out - exact).abs().max()) <= record["bound"]
    torch.testing.assert_close(tensor_attention(*rows)[0, 0], exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("modulus", [20, 37, 101])
def test_three_tokens_that_sum_to_zero(golden, modulus: int) -> None:
    """Five channels find triples; a sentinel key answers where there is none."""
    tokens = golden[f"input.match3.M{modulus}.tokens"]
    n, delta = tokens.shape[1], 1e-6
    turn = 2 * torch.pi / modulus
    c, s = (turn * tokens.double()).cos(), (turn * tokens.double()).sin()
    tau = (1 + torch.cos(torch.tensor(turn, dtype=torch.float64))) / 2
    sharp = (2 * torch.tensor(n + 1.0).double().log() - torch.tensor(delta).log()) / (1 - tau)
    zero, one = torch.zeros_like(c), torch.ones_like(c)
    query = sharp * torch.stack([c, -c, -s, -s, tau * one], dim=-1)
    sentinel = torch.tensor([0.0, 0, 0, 0, 1]).double().expand(len(tokens), 1, 5)
    key1 = torch.cat([torch.stack([c, s, c, s, zero], -1), sentinel], dim=1)
    key2 = torch.cat([torch.stack([c, s, s, c, zero], -1), sentinel], dim=1)
    value = torch.ones(len(tokens), n + 1, 1, dtype=torch.float64)
    value[:, -1] = 0.0
    rows = (x[:, None] for x in (query, key1, key2, value, value))
    found = tensor_attention(*rows, scale=1.0)[:, 0, :, 0]
    assert torch.equal(found > 0.5, golden[f"output.match3.M{modulus}.label"])
    stored = golden[f"output64.match3.M{modulus}.value"]
    torch.testing.assert_close(found, stored, rtol=0, atol=1e-5)
