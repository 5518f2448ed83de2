"""Mixture of heads against stored outputs of the published classes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_core import observe
from heed_core.attention.cosine_mixture import (
    CosineMixture,
    OffsetBias,
    PooledCosineMixture,
    cosine_mixture_from_official,
)
from heed_core.attention.mixture_of_heads import (
    MixtureOfHeads,
    mixture_from_dit,
    mixture_from_llama,
)
from heed_core.head_routing import norm_gates
from heed_core.relative import RotaryPositions

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


VIT = {"": (8, 2, 3), "shared_only": (4, 4, 0), "routed_only": (6, 0, 2), "aggregated": (6, 2, 2)}


class StoredOffsets(OffsetBias):
    """With the stored offsets, which were rounded to float32."""

    def __init__(self, heads: int, golden: dict[str, Tensor]) -> None:
        super().__init__(heads)
        self.stored = golden["input.relative_coords_table"], golden["input.relative_pos_index"]

    def forward(self, shape: tuple[int, int], pooled: tuple[int, int] | None = None) -> Tensor:
        offsets, index = self.stored
        table = self.leave(self.enter(offsets.to(self.enter.weight.dtype)).relu())
        return table[index].T.reshape(-1, math.prod(shape), math.prod(pooled or shape))


def vit(golden: dict[str, Tensor], part: str, dtype: torch.dtype) -> torch.nn.Module:
    """Of the published weights, which must all be there."""
    heads, shared, active = VIT[part]
    options = {"heads": heads, "shared": shared, "active": active}
    dim = golden["input.x"].shape[-1]
    if part == "aggregated":
        module = PooledCosineMixture(dim, pool=2, **options)
    else:
        module = CosineMixture(dim, **options)
    module.offset_bias = StoredOffsets(heads, golden)
    module.load_state_dict(cosine_mixture_from_official(weights(golden, "")))
    return module.to(dtype)


NAMES = {
    "temperature": "temperature",
    "wg.weight": "route.weight",
    "wg_0.weight": "kind.weight",
    "wg_1.weight": "share.weight",
    "relative_pos_bias_local": "window_bias",
    "learnable_tokens": "window_tokens",
    "sr.weight": "reduce.weight",
}


@pytest.mark.parametrize("part", VIT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-5)])
def test_vit(part: str, dtype, tolerance: float) -> None:
    golden = load_file(GOLDEN / "moh_vit" / part / "fixture.safetensors")
    module = vit(golden, part, dtype)
    sides = golden["input.grid"].tolist()
    x = golden["input.x"].to(dtype).requires_grad_()
    found = module(x.unflatten(1, sides))

    def close(ours: Tensor, name: str, least: float = 0.0) -> None:
        stored = golden[name].double()
        # the pooled one takes logarithms of counts in float32
        rounding = 1e-7 if part == "aggregated" and name != "output64.pooled" else 0.0
        bound = max(least, tolerance, rounding) * max(1.0, float(stored.abs().max()))
        ours = ours.detach().double().reshape(stored.shape)
        assert float((ours - stored).abs().max()) < bound, name

    gates = found.gates.flatten(1, 2)
    close(found.output.flatten(1, 2), "output64.y")
    if part == "aggregated":
        close(module._pooled(x.unflatten(1, sides))[0], "output64.pooled")
    else:
        assert torch.equal(gates == 0, golden["output64.head_gate"] == 0)
        close(gates, "output64.head_gate")
        bias = module.offset_bias(tuple(sides))
        close(bias, "output64.position_bias")
    own = dict(module.named_parameters())
    stored = [n.removeprefix("grad64.weights.") for n in golden if n.startswith("grad64.weights.")]
    loss = (found.output.flatten(1, 2) * golden["input.loss_weight"]).sum()
    leaves = [x, *(own[NAMES[name]] for name in stored)]
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    for name, gradient in zip(stored, gradients[1:], strict=True):
        close(gradient, f"grad64.weights.{name}")
    if dtype == torch.float32:
        close(gradients[0], "grad.input.x")
    if module.active:
        # the published loss takes means of a float32 mask
        close(found.balance_loss, "output64.balance_loss", least=2e-7)
    if "output64.aux_grad_wg" in golden:
        (gradient,) = torch.autograd.grad(found.balance_loss, module.route.weight)
        close(gradient, "output64.aux_grad_wg", least=2e-7)


@pytest.mark.parametrize("part", VIT)
def test_vit_offsets_of_a_map_are_the_stored_ones(part: str) -> None:
    golden = load_file(GOLDEN / "moh_vit" / part / "fixture.safetensors")
    stored = vit(golden, part, torch.float64).offset_bias
    ours = OffsetBias(VIT[part][0]).double()
    ours.load_state_dict(stored.state_dict())
    shape = tuple(golden["input.grid"].tolist())
    pooled = (shape[0] // 2, shape[1] // 2) if part == "aggregated" else None
    torch.testing.assert_close(ours(shape, pooled), stored(shape, pooled), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["query_embedding", "window_shift", "window_tokens", "kind"])
def test_vit_notices_a_missing_term(name: str) -> None:
    golden = load_file(GOLDEN / "moh_vit" / "aggregated" / "fixture.safetensors")
    module = vit(golden, "aggregated", torch.float64)
    held = getattr(module, name)
    torch.nn.init.zeros_(held.weight if isinstance(held, torch.nn.Module) else held)
    found = module(golden["input.x"].double().unflatten(1, golden["input.grid"].tolist()))
    off = found.output.flatten(1, 2) - golden["output64.y"]
    assert float(off.detach().abs().max()) > 1e-2


@pytest.mark.parametrize("part", ["", "aggregated"])
def test_vit_weights_through_observe(part: str) -> None:
    golden = load_file(GOLDEN / "moh_vit" / part / "fixture.safetensors")
    module = vit(golden, part, torch.float64)
    x = golden["input.x"].double().unflatten(1, golden["input.grid"].tolist())
    with observe(module) as record:
        module(x)
    count = 9 + 3 * 4 if part else 4 * 5
    assert record["attend"].shape == (len(x), module.heads, x[0, ..., 0].numel(), count)
    torch.testing.assert_close(record["attend"].sum(-1), torch.ones_like(record["attend"][..., 0]))


@pytest.mark.bad_input
def test_importers_name_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        mixture_from_dit({"wq.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        mixture_from_llama({"wq.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'wq\.weight' is no weight of"):
        cosine_mixture_from_official({"wq.weight": torch.ones(1)})
