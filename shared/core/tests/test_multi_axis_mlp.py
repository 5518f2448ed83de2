"""Multi-axis gated MLP and cross-gating: golden numbers and what the paper claims."""

from pathlib import Path

import pytest
import torch

from heed_core.attention.multi_axis import partition
from heed_core.attention.multi_axis_mlp import (
    AxisGatedMlp,
    CrossGating,
    MultiAxisMlp,
    axis_linear,
    cross_gating_from_maxim,
    multi_axis_mlp_from_maxim,
    spatial_gate,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "maxim"
DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_multi_axis_mlp(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = MultiAxisMlp(8, block=(4, 4), grid=(2, 2))
    module.load_state_dict(multi_axis_mlp_from_maxim(golden.weights()))
    module.to(dtype)
    seen: dict[str, torch.Tensor] = {}
    for name in ("grid", "block", "expand"):
        module.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output})
        )
    x = golden.input("x", dtype)
    y = module(x)
    golden.check("y", y)
    golden.check("tap.GridGmlpLayer", seen["grid"])
    golden.check("tap.BlockGmlpLayer", seen["block"])
    golden.check("tap.in_project", seen["expand"])
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check(
        "grad.weights.GridGmlpLayer/GridGatingUnit/Dense_0/kernel", module.grid.mix.weight.grad.T
    )
    golden.check("grad.weights.BlockGmlpLayer/in_project/kernel", module.block.expand.weight.grad.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_cross_gating(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "cross_gating")
    module = CrossGating(6, x_dim=9, y_dim=10, block=(4, 4), grid=(2, 2), upsample=True)
    module.load_state_dict(cross_gating_from_maxim(golden.weights()))
    module.to(dtype)
    seen: dict[str, torch.Tensor] = {}
    for name in ("x_gate", "y_gate", "up"):
        module.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output})
        )
    x, y = golden.input("x", dtype), golden.input("y", dtype)
    first, second = module(x, y)
    golden.check("y", first)
    golden.check("y_gated", second)
    golden.check("tap.ConvTranspose_0", seen["up"].movedim(1, -1))
    golden.check("tap.SplitHeadMultiAxisGating_x", seen["x_gate"])
    golden.check("tap.SplitHeadMultiAxisGating_y", seen["y_gate"])
    golden.loss(first).backward()
    golden.check("grad.input.x", x.grad)
    up = module.up.weight.grad.flip(2, 3).permute(2, 3, 0, 1)
    golden.check("grad.weights.ConvTranspose_0/kernel", up)
    golden.check(
        "grad.weights.SplitHeadMultiAxisGating_x/Dense_0/kernel",
        module.x_gate.grid_mix.weight.grad.T,
    )


def test_golden_notices_a_transposed_convolution_that_is_not_flipped() -> None:
    golden = GoldenFixture.load(GOLDEN / "cross_gating")
    module = CrossGating(6, x_dim=9, y_dim=10, block=(4, 4), grid=(2, 2), upsample=True)
    state = cross_gating_from_maxim(golden.weights())
    state["up.weight"] = state["up.weight"].flip(2, 3)
    module.load_state_dict(state)
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", module(golden.tensors["input.x"], golden.tensors["input.y"])[0])


def test_axis_linear_mixes_places_for_each_channel() -> None:
    x = torch.randn(2, 3, 4, 5)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    wanted = torch.einsum("on,bgnc->bgoc", weight, x) + bias[:, None]
    torch.testing.assert_close(axis_linear(x, weight, bias), wanted)


@pytest.mark.parametrize("mode", ["block", "grid"])
def test_an_identity_matrix_gates_by_the_normalised_half(mode: str) -> None:
    module = AxisGatedMlp(4, size=(2, 3), mode=mode)
    with torch.no_grad():
        module.mix.weight.copy_(torch.eye(6))
        module.mix.bias.zero_()
    x = torch.randn(1, 4, 6, 4)
    hidden = torch.nn.functional.gelu(module.expand(module.norm(x)), approximate="tanh")
    u, v = hidden.chunk(2, dim=-1)
    wanted = x + module.contract(spatial_gate(u, module.gate_norm(v)))
    torch.testing.assert_close(module(x), wanted)


def test_a_zero_last_layer_is_the_identity() -> None:
    module = MultiAxisMlp(4, block=(2, 2))
    torch.nn.init.zeros_(module.contract.weight)
    torch.nn.init.zeros_(module.contract.bias)
    x = torch.randn(1, 4, 6, 4)
    assert torch.equal(module(x), x)


def test_the_same_weights_serve_other_sizes() -> None:
    module = MultiAxisMlp(4, block=(4, 4), grid=(2, 2))
    for size in ((4, 8), (8, 4), (12, 16)):
        assert module(torch.randn(1, *size, 4)).shape == (1, *size, 4)


@pytest.mark.parametrize("mode", ["block", "grid"])
def test_a_cell_reaches_exactly_its_group(mode: str) -> None:
    module = AxisGatedMlp(4, size=(2, 3), mode=mode).double()
    x = torch.randn(1, 4, 9, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 4] += torch.randn(4)
    reached = (module(x) - module(changed)).abs().sum(-1, keepdim=True).gt(1e-12)
    of_group = partition(reached, (2, 3), mode=mode)[0, :, :, 0].sum(1)
    assert sorted(of_group.tolist()) == [0, 0, 0, 0, 0, 6]


def test_three_axes() -> None:
    module = MultiAxisMlp(4, block=(1, 2, 3), grid=(2, 1, 1))
    assert module(torch.randn(1, 2, 4, 3, 4)).shape == (1, 2, 4, 3, 4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: AxisGatedMlp(4, size=(0, 2)), "at least 1"),
        (lambda: AxisGatedMlp(4, size=(2, 2), mode="row"), "mode must be"),
        (lambda: MultiAxisMlp(4, block=(2, 2))(torch.zeros(1, 4, 5, 4)), "spatial axis 1 must be"),
        (lambda: CrossGating(4, block=(2,), upsample=True), "upsample needs"),
        (lambda: axis_linear(torch.zeros(3, 4), torch.zeros(2, 2)), "weight must be"),
        (lambda: multi_axis_mlp_from_maxim({"a/kernel": torch.zeros(1, 1)}), "no weight of"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
