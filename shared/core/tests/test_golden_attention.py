"""`attend` against stored outputs of another library's multi-head attention."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heed_core import Attend, observe

GOLDEN = Path(__file__).parent / "golden" / "attention"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch", reason="reads the stored tensors")
    return safetensors.load_file(GOLDEN / "fixture.safetensors")


def run(golden: dict[str, Tensor], impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    names = ("input.x", "weights.qkv.weight", "weights.proj.weight")
    leaves = {name: golden[name].to(dtype).requires_grad_() for name in names}
    x = leaves["input.x"]
    qkv = F.linear(x, leaves["weights.qkv.weight"], golden["weights.qkv.bias"].to(dtype))
    query, key, value = qkv.unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    site = Attend(impl=impl)
    with observe(site) as record:
        heads = site(query, key, value)
    y = F.linear(
        heads.transpose(1, 2).flatten(2),
        leaves["weights.proj.weight"],
        golden["weights.proj.bias"].to(dtype),
    )
    loss = (y * golden["input.loss_weight"].to(dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"y": y, "attention": record[""], "loss": loss.reshape(1)}
    return {**found, **{f"grad.{n}": g for n, g in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_float64_equals_the_stored_outputs(golden, impl) -> None:
    found = run(golden, impl, torch.float64)
    for name in ("y", "attention", "loss"):
        torch.testing.assert_close(found[name], golden[f"output64.{name}"], rtol=1e-10, atol=1e-10)
    for name in ("weights.qkv.weight", "weights.proj.weight"):
        torch.testing.assert_close(
            found[f"grad.{name}"], golden[f"grad64.{name}"], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_float32_is_within_the_stated_tolerance(golden, impl) -> None:
    measured = json.loads((GOLDEN / "meta.json").read_text())["tolerance"]["measured"]
    found = run(golden, impl, torch.float32)
    for name, error in measured.items():
        stored = golden[name if name.startswith("grad.") else f"output.{name}"]
        allowed = 20 * error["max_abs_diff"] + 1e-6 * error["max_abs"]
        assert float((found[name] - stored).abs().max().detach()) <= allowed, name
