"""The efficient attentions against stored outputs of the published library."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heed_core.attention.bounded_memory import BoundedMemoryAttention, abc_from_cab
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.cosformer import CosformerAttention, cosformer_from_cab
from heed_core.attention.diagonal_state import (
    DiagonalStateMixer,
    diagonal_state_from_cab,
    state_response,
)
from heed_core.attention.local import LocalAttention, local_from_cab
from heed_core.attention.long_short import LongShortAttention, long_short_from_cab
from heed_core.attention.nystrom import NystromAttention, nystrom_from_cab
from heed_core.attention.performer import (
    PerformerAttention,
    performer_attention,
    performer_from_cab,
)
from heed_core.attention.prob_sparse import ProbSparseAttention, prob_sparse_from_cab
from heed_core.attention.randomized import RandomizedAttention, randomized_from_cab

GOLDEN = Path(__file__).parent / "golden" / "cab" / "fixture.safetensors"
PRECISE = [(torch.float64, 1e-9), (torch.float32, 2e-5)]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def weights(golden: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    start = f"weights.{name}."
    return {n.removeprefix(start): x for n, x in golden.items() if n.startswith(start)}


def loaded(golden, name: str, module: nn.Module, rename, dtype=torch.float32) -> nn.Module:
    module.load_state_dict(rename(weights(golden, name)))
    return module.to(dtype).eval()


def close(found: Tensor, golden, name: str, tolerance: float) -> None:
    stored = (
        golden[f"output64.{name}"] if f"output64.{name}" in golden else golden[f"output.{name}"]
    )
    torch.testing.assert_close(found.double(), stored.double(), rtol=0, atol=tolerance)


def gradients(golden, name: str, out: Tensor, x: Tensor, theirs: str, parameter: Tensor) -> None:
    found = torch.autograd.grad((out * golden["input.loss_weight"]).sum(), (x, parameter))
    for kind, gradient in zip(("x", theirs), found, strict=True):
        stored = golden[f"grad.{name}.{kind}"]
        torch.testing.assert_close(gradient, stored, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_local(golden, dtype, tolerance) -> None:
    x = golden["input.x"].to(dtype)
    real = ~golden["input.key_is_padding"]
    for name, pattern, causal in (("local_ns", "NS", False), ("local_cs", "CS", True)):
        module = LocalAttention(32, heads=4, window=3, causal=causal)
        module = loaded(golden, name, module, local_from_cab, dtype)
        close(module(x), golden, f"{name}.{pattern}", tolerance)
        close(module(x, padding_mask=real), golden, f"ours.{name}.padding_excluded", tolerance)
    if dtype == torch.float32:
        x.requires_grad_()
        gradients(golden, name, module(x), x, "q_proj.weight", module.query.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_bounded_memory(golden, dtype, tolerance) -> None:
    x, context = golden["input.x"].to(dtype), golden["input.context"].to(dtype)
    real = ~golden["input.key_is_padding"]
    there = ~golden["input.context_is_padding"]

    def abc(name: str, **options) -> nn.Module:
        module = BoundedMemoryAttention(32, heads=4, slots=5, **options)
        return loaded(golden, name, module, abc_from_cab, dtype)

    close(abc("abc")(x), golden, "abc.NS", tolerance)
    close(abc("abc")(x, context), golden, "abc.NC", tolerance)
    close(abc("abc_cc")(x, context), golden, "abc_cc.CC", tolerance)
    close(abc("abc")(x, padding_mask=real), golden, "abc.NS.official_padding", 2e-5)
    found = abc("abc")(x, context, padding_mask=there)
    close(found, golden, "abc.NC.official_padding", 2e-5)
    causal = abc("abc_cs", causal=True)(x)
    close(causal, golden, "ours.abc_cs.CS.recurrence", tolerance)
    assert float((causal - golden["output.abc_cs.CS"]).detach().abs().max()) > 0.1
    if dtype == torch.float32:
        x.requires_grad_()
        gradients(golden, "abc", (m := abc("abc"))(x), x, "compress_k", m.key_control)
        m = abc("abc_cc")
        gradients(golden, "abc_cc", m(x, context), x, "compress_v", m.value_control)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_performer(golden, dtype, tolerance) -> None:
    x, context = golden["input.x"].to(dtype), golden["input.context"].to(dtype)

    def performer(name: str = "performer", least: float = 0.1, **options) -> nn.Module:
        module = PerformerAttention(32, heads=4, features=6, least_normaliser=least, **options)
        return loaded(golden, name, module, performer_from_cab, dtype)

    close(performer()(x), golden, "performer.NS", tolerance)
    close(performer()(x, context), golden, "performer.NC", tolerance)
    close(performer("performer_cc")(x, context), golden, "performer_cc.CC", tolerance)
    close(performer(least=1e-6)(x), golden, "ours.performer.NS.clamp_1e-6", tolerance)
    module = performer()
    drawn = golden["input.performer.train_projection"].to(dtype)
    mixed = performer_attention(*module.project(x, None), drawn, least_normaliser=0.1)
    close(module.join(mixed, x), golden, "performer.NS.train", 2e-5)
    if dtype == torch.float32:
        x.requires_grad_()
        gradients(golden, "performer", module(x), x, "k_proj.weight", module.key.weight)
    # The stored sums are relative to the largest exponent of the whole sequence, which lets the
    # future in by way of the 1e-4; ours to that of the tokens so far: the last one is the same.
    causal = performer(least=1e-6, causal=True)(x)
    stored = golden["output64.ours.performer.CS.prefix_sums"][:, -1]
    torch.testing.assert_close(causal[:, -1].double(), stored, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_cosformer(golden, dtype, tolerance) -> None:
    x, context = golden["input.x"].to(dtype), golden["input.context"].to(dtype)
    module = CosformerAttention(32, heads=4)
    module = loaded(golden, "cosformer", module, cosformer_from_cab, dtype)
    tolerance = max(tolerance, 5e-7)  # the stored angles were rounded to float32
    close(module(x), golden, "cosformer.NS", tolerance)
    close(module(x, context), golden, "cosformer.NC", tolerance)
    if dtype == torch.float32:
        x.requires_grad_()
        gradients(golden, "cosformer", module(x), x, "q_proj.weight", module.query.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_randomized(golden, dtype, tolerance) -> None:
    x = golden["input.x"].to(dtype)
    module = RandomizedAttention(32, heads=4, landmarks=5)
    module = loaded(golden, "lara", module, randomized_from_cab, dtype)
    close(module(x), golden, "lara.NS", tolerance)
    noise = golden["input.lara.noise"].to(dtype).view(2, 4, 5, 8)
    close(module(x, noise=noise), golden, "lara.NS.train", 2e-5)
    if dtype == torch.float32:
        x.requires_grad_()
        gradients(golden, "lara", module(x), x, "v_proj.weight", module.value.weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_nystrom(golden, dtype, tolerance, monkeypatch) -> None:
    x = golden["input.x"].to(dtype)

    def nystrom(name: str = "nystrom", **options) -> nn.Module:
        module = NystromAttention(32, heads=4, landmarks=5, **options)
        return loaded(golden, name, module, nystrom_from_cab, dtype)

    close(nystrom()(x), golden, "ours.nystrom.NS.scale_and_constant", tolerance)

    def one_constant(matrix: Tensor) -> Tensor:
        """Theirs: the inverse of all matrices of a batch starts from one constant."""
        start = matrix.mT / (matrix.sum(-2).max() * matrix.sum(-1).max())
        one = torch.eye(5, dtype=matrix.dtype)
        for _ in range(6):
            step = matrix @ start
            start = start @ (13 * one - step @ (15 * one - step @ (7 * one - step))) / 4
        return start

    monkeypatch.setattr("heed_core.attention.nystrom.iterated_inverse", one_constant)
    theirs = {"scale": 1 / 8}
    close(nystrom(**theirs)(x), golden, "nystrom.NS", tolerance)
    module = nystrom("nystrom_conv", conv_width=3, **theirs)
    close(module(x), golden, "nystrom_conv.NS", tolerance)
    short = nystrom(**theirs)(x[:, :5])
    torch.testing.assert_close(
        short.float(), golden["output.nystrom.NS.short_exact"], rtol=0, atol=2e-5
    )
    if dtype == torch.float32:
        x.requires_grad_()
        out = module(x)
        found = torch.autograd.grad((out * golden["input.loss_weight"]).sum(), module.conv.weight)
        stored = golden["grad.nystrom_conv.conv.weight"]
        torch.testing.assert_close(found[0], stored, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_prob_sparse(golden, dtype, tolerance) -> None:
    x = golden["input.x"].to(dtype)
    module = ProbSparseAttention(32, heads=4, factor=1)
    module = loaded(golden, "probsparse", module, prob_sparse_from_cab, dtype)
    sampled = golden["input.probsparse.sampled_keys"][None]
    out = module(x, sampled=sampled)
    close(out, golden, "probsparse.NS", tolerance)
    assert float((module(x, sampled=sampled.flip(1)) - out).detach().abs().max()) > 1e-3
    if dtype == torch.float32:
        x.requires_grad_()
        name, weight = "value_projection.weight", module.value.weight
        gradients(golden, "probsparse", module(x, sampled=sampled), x, name, weight)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_long_short(golden, dtype, tolerance) -> None:
    del tolerance  # these outputs are stored in float32 only
    x = golden["input.x"].to(dtype)
    module = LongShortAttention(32, heads=4, window=4, landmarks=3)
    module = loaded(golden, "longshort_ns", module, long_short_from_cab, dtype)
    close(module(x), golden, "longshort_ns.NS", 2e-5)
    real = ~golden["input.key_is_padding"]
    found = module(x, padding_mask=real)[real]
    stored = golden["output.longshort_ns.NS.official_padding"][real]
    torch.testing.assert_close(found.float(), stored, rtol=0, atol=2e-5)
    if dtype == torch.float32:
        x.requires_grad_()
        weight = module.summarise.weight
        gradients(golden, "longshort_ns", module(x), x, "dconv_fc.weight", weight)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE, ids=str)
def test_causal_long_short(golden, dtype, tolerance) -> None:
    del tolerance  # these outputs are stored in float32 only
    x = golden["input.x_chunked"].to(dtype)
    options = {"heads": 4, "window": 8, "chunk": 4}
    module = CausalLongShortAttention(32, **options, phantom_slots=True, memory=8)
    module = loaded(golden, "longshort_cs", module, long_short_from_cab, dtype)
    close(module(x), golden, "longshort_cs.CS", 2e-5)
    close(module(x[:, :-1]), golden, "longshort_cs.CS.length_minus_1", 2e-5)
    ours = CausalLongShortAttention(32, **options)
    ours = loaded(golden, "longshort_cs", ours, long_short_from_cab, dtype)
    assert float((ours(x) - module(x)).detach().abs().max()) > 1e-3
    if dtype == torch.float32:
        x.requires_grad_()
        loss = (module(x) * golden["input.loss_weight_chunked"]).sum()
        found = torch.autograd.grad(loss, (x, module.place_bias))
        stored = golden["grad.longshort_cs.x"]
        torch.testing.assert_close(found[0], stored, rtol=1e-4, atol=2e-4)
        stored = golden["grad.longshort_cs.r_r_bias"].view(4, 8)
        torch.testing.assert_close(found[1], stored, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("name", "causal"), [("s4d_cs", True), ("s4d_ns", False)])
def test_diagonal_state(golden, name: str, causal: bool) -> None:
    x = golden["input.x"].clone().requires_grad_()
    module = DiagonalStateMixer(32, channels=2, state=8, causal=causal)
    module = loaded(golden, name, module, diagonal_state_from_cab)
    response = state_response(
        module.coefficients, module.log_step, module.log_decay, module.frequency, 13
    )
    kind = "kernel" if causal else "kernel_forward_then_reversed"
    close(response, golden, f"{name}.{kind}", 1e-5)
    out = module(x)
    close(out, golden, f"{name}.{'CS' if causal else 'NS'}", 1e-5)
    if causal:
        gradients(golden, name, out, x, "kernel.kernel.log_dt", module.log_step)
        with torch.no_grad():
            cache = module.new_cache(2)
            steps = [module(x[:, t : t + 1], cache=cache) for t in range(13)]
        close(torch.cat(steps, dim=1), golden, "s4d_cs.recurrent", 1e-5)
    else:
        gradients(golden, name, out, x, "D", module.skip)
