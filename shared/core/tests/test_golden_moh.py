"""Mixture of heads against stored outputs of the published classes."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from heed_core import observe
from heed_core.attention.mixture_of_heads import (
    MixtureOfHeads,
    mixture_from_dit,
    mixture_from_llama,
)
from heed_core.head_routing import balance_loss, mixture_gates, norm_gates
from heed_core.relative import RotaryPositions
from heed_core.sites import Attend

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def llm() -> dict[str, Tensor]:
    return load_file(GOLDEN / "moh_llm" / "fixture.safetensors")


def weights(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"weights.{prefix}"
    return {name.removeprefix(start): x for name, x in golden.items() if name.startswith(start)}


def llama(golden: dict[str, Tensor], dtype: torch.dtype, **options) -> MixtureOfHeads:
    module = MixtureOfHeads(
        64,
        heads=8,
        kv_heads=2,
        shared=4,
        active=2,
        qkv_bias=False,
        out_bias=False,
        rotary=RotaryPositions(8, base=500000.0),
        router="norm",
        **options,
    )
    plain = {n: x for n, x in weights(golden, "").items() if not n.startswith("dit.")}
    module.load_state_dict(mixture_from_llama(plain))
    return module.to(dtype).eval()


def dit(golden: dict[str, Tensor], dtype: torch.dtype, **options) -> MixtureOfHeads:
    module = MixtureOfHeads(40, heads=8, shared=3, active=2, head_dim=6, **options)
    module.load_state_dict(mixture_from_dit(weights(golden, "dit.")))
    return module.to(dtype).eval()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_llama(llm, dtype, tolerance: float, skip: bool) -> None:
    module = llama(llm, dtype, skip=skip)
    x = llm["input.x"].to(dtype).requires_grad_()
    found = module(x, mask=llm["input.may_attend"])
    assert torch.equal(found.gates != 0, llm["output.gate"])
    assert float((found.output - llm["output64.out"]).detach().abs().max()) < tolerance
    query = module.query(x).unflatten(-1, (8, 8)).transpose(1, 2)
    routing = norm_gates(query, shared=4, active=2)
    torch.testing.assert_close(
        routing.probabilities.double(), llm["output64.router_probs"], rtol=0, atol=tolerance
    )
    loss = (found.output * llm["input.loss_weight"]).sum()
    leaves = [x, module.query.weight]
    gradients = torch.autograd.grad(loss, leaves)
    for name, gradient in zip(("grad.x", "grad.q_proj.weight"), gradients, strict=True):
        torch.testing.assert_close(gradient.double(), llm[name], rtol=0, atol=20 * tolerance)


def test_llama_weights_of_all_heads_through_observe(llm) -> None:
    module = llama(llm, torch.float64, skip=True)
    with observe(module) as record:
        module(llm["input.x"].double(), mask=llm["input.may_attend"])
    torch.testing.assert_close(record["attend"], llm["output64.weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_dit(llm, dtype, tolerance: float, skip: bool) -> None:
    module = dit(llm, dtype, skip=skip)
    x = llm["input.dit.x"].to(dtype).requires_grad_()
    found = module(x)
    stored = llm["output64.dit.gate"]
    assert torch.equal(found.gates == 0, stored == 0)
    for ours, name in ((found.gates, "gate"), (found.output, "out")):
        torch.testing.assert_close(
            ours.double(), llm[f"output64.dit.{name}"], rtol=0, atol=tolerance
        )
    # the published loss takes means of a float32 mask
    stored = llm["output64.dit.balance_loss"]
    torch.testing.assert_close(
        found.balance_loss.double(), stored, rtol=0, atol=max(tolerance, 2e-7)
    )
    loss = (found.output * llm["input.dit.loss_weight"]).sum() + 0.01 * found.balance_loss
    parts = [module.query.weight, module.key.weight, module.value.weight]
    leaves = [x, module.route.weight, *parts]
    gradients = torch.autograd.grad(loss, leaves)
    found_parts = [gradients[0], gradients[1], torch.cat(gradients[2:])]
    names = ("grad.dit.x", "grad.dit.wg.weight", "grad.dit.qkv.weight")
    for name, gradient in zip(names, found_parts, strict=True):
        torch.testing.assert_close(gradient.double(), llm[name], rtol=0, atol=20 * tolerance)


def test_dit_notices_the_paper_s_gates(llm) -> None:
    module = dit(llm, torch.float64, gating="paper")
    found = module(llm["input.dit.x"].double())
    assert float((found.output - llm["output64.dit.out"]).detach().abs().max()) > 1e-2


VIT = {"": (8, 2, 3), "shared_only": (4, 4, 0), "routed_only": (6, 0, 2)}


@pytest.mark.parametrize("part", VIT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_vit(part: str, dtype, tolerance: float) -> None:
    """Gates and loss in an attention of other scores: length-scaled cosines and a bias."""
    golden = load_file(GOLDEN / "moh_vit" / part / "fixture.safetensors")
    heads, shared, active = VIT[part]
    leaves = {
        n: x.to(dtype).requires_grad_() for n, x in golden.items() if n.startswith("weights.")
    }

    def weight(name: str) -> Tensor | None:
        return leaves.get(f"weights.{name}")

    x = golden["input.x"].to(dtype).requires_grad_()
    packed = F.linear(x, weight("qkv.weight"), weight("qkv.bias"))
    query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    heat = F.softplus(weight("temperature")) * math.log(x.shape[1])
    query = (F.normalize(query, dim=-1) + weight("query_embedding")) * heat
    offsets = golden["input.relative_coords_table"].to(dtype)
    hidden = F.linear(offsets, weight("cpb_fc1.weight"), weight("cpb_fc1.bias")).relu()
    table = F.linear(hidden, weight("cpb_fc2.weight"), weight("cpb_fc2.bias"))
    n = x.shape[1]
    bias = table[golden["input.relative_pos_index"]].T.reshape(heads, n, n)
    routing = mixture_gates(
        x, weight("wg.weight"), weight("wg_1.weight"), weight("wg_0.weight"),
        shared=shared, active=active,
    )  # fmt: skip
    mixed = Attend(scale=1.0)(query, F.normalize(key, dim=-1), value, bias=bias)
    gated = (mixed * routing.gates.transpose(1, 2)[..., None]).transpose(1, 2).flatten(2)
    y = F.linear(gated, weight("proj.weight"), weight("proj.bias"))

    def close(ours: Tensor, name: str, least: float = 0.0) -> None:
        stored = golden[name].double()
        bound = max(least, tolerance) * max(1.0, float(stored.abs().max()))
        assert float((ours.detach().double() - stored).abs().max()) < bound, name

    assert torch.equal(routing.gates == 0, golden["output64.head_gate"] == 0)
    close(routing.gates, "output64.head_gate")
    close(y, "output64.y")
    gradients = torch.autograd.grad(
        (y * golden["input.loss_weight"]).sum(), list(leaves.values()), allow_unused=True
    )
    for name, gradient in zip(leaves, gradients, strict=True):
        if f"grad64.{name}" in golden:
            close(gradient, f"grad64.{name}")
    if active:
        close(routing.probabilities, "output64.router_probabilities")
        loss = balance_loss(routing.probabilities, routing.chosen)
        # the published loss takes means of a float32 mask
        close(loss.reshape(1), "output64.balance_loss", least=2e-7)
        again = mixture_gates(
            x, weight("wg.weight"), weight("wg_1.weight"), weight("wg_0.weight"),
            shared=shared, active=active,
        )  # fmt: skip
        loss = balance_loss(again.probabilities, again.chosen)
        (gradient,) = torch.autograd.grad(loss, weight("wg.weight"))
        close(gradient, "output64.aux_grad_wg", least=2e-7)


@pytest.mark.bad_input
def test_importers_name_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        mixture_from_dit({"wq.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        mixture_from_llama({"wq.weight": torch.ones(1)})
