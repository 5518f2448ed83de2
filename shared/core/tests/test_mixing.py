"""Mixing matrices by unit values: what layers compute, what sites show, what cannot be had."""

import pytest
import torch
from torch import Tensor, nn

from heed_core import observe
from heed_core.attention.diagonal_state import causal_convolution
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.multi_axis_mlp import axis_linear
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.relative_conv import RelativeConvAttention
from heed_core.attention.spectral import SpectralGate
from heed_core.mixing import mixing_matrix
from heed_core.testing.conformance import Mechanism
from heed_core.testing.mechanisms import MECHANISMS

SHOWN = (
    "multi-head-self",
    "multi-head-cross-grouped",
    "multi-head-causal-rotary",
    "multi-head-causal-relative-bias",
    "linear",
    "linear-cross",
    "linear-causal-gated",
    "linear-causal-gated-hole",
    "linear-causal-retention-hole",
    "delta-rule-gated",
    "delta-rule-gated-hole",
    "delta-rule-padded",
    "complex",
    "complex-causal",
    "complex-cross",
    "local",
    "local-causal",
    "performer",
    "performer-causal",
    "performer-causal-hole",
    "performer-cross",
    "cosformer",
    "cosformer-cross",
    "prob-sparse",
    "partition-block",
    "partition-grid",
    "lepe-attention",
    "enhanced-linear",
    "reduced-causal",
    "reduced-symmetric",
    "reduced-cholesky",
    "conditional-cross",
)
"""Whose sites show a map of all pairs."""

HIDDEN = ("randomized", "nystrom", "bilevel-plain", "predicted-connectivity")
"""Whose sites show factors or pieces of it, or weights of values that are then cleared (pruned)."""

BY_CHANNEL = ("relative-conv-memory", "relative-conv-centred", "bilevel-uneven")
"""Whose values are convolved, each channel in its own way."""

NOT_LINEAR = {
    "bounded-memory": "values choose the slots of values",
    "bounded-memory-causal": "values choose the slots of values",
    "bounded-memory-causal-hole": "values choose the slots of values",
    "bounded-memory-cross": "values choose the slots of values",
    "dynamic-mask": "values choose the keys",
    "dynamic-mask-causal": "values choose the keys",
    "dynamic-mask-cross": "values choose the keys",
    "long-short": "values are normalised",
    "long-short-causal": "values are normalised",
}

BY_NAME = {mechanism.name: mechanism for mechanism in MECHANISMS}


def build(mechanism: Mechanism) -> tuple[nn.Module, dict[str, Tensor]]:
    module = mechanism.build(0.0).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    inputs = mechanism.inputs(2, mechanism.size)
    return module, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def values_and_mixed(module: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [
        module.value.register_forward_hook(lambda _, __, made: found.append(made)),
        module.out.register_forward_pre_hook(lambda _, given: found.append(given[0])),
    ]
    module(**inputs)
    for hook in hooks:
        hook.remove()
    return [x.detach().reshape(x.shape[0], -1, x.shape[-1]) for x in found]


def test_every_layer_with_values_is_in_one_of_the_lists() -> None:
    """So that a new one is looked at."""
    found = set()
    for mechanism in MECHANISMS:
        children = dict(mechanism.build(0.0).named_children())
        if isinstance(children.get("value"), nn.Linear) and "out" in children:
            found.add(mechanism.name)
    # Heads as wide as the tokens: their values are never computed.
    assert found - {"full-width"} == {*SHOWN, *HIDDEN, *BY_CHANNEL, *NOT_LINEAR}


@pytest.mark.parametrize("name", [*SHOWN, *HIDDEN])
def test_matrix_times_values_is_what_was_mixed(name: str) -> None:
    """Up to what does not depend on the values: the output for values of 0."""
    module, inputs = build(BY_NAME[name])
    matrix = mixing_matrix(module, inputs)
    values, mixed = values_and_mixed(module, inputs)
    with torch.no_grad():
        for parameter in module.value.parameters():
            parameter.zero_()
    constant = values_and_mixed(module, inputs)[1]
    batch, heads, n, m = matrix.shape
    for b in range(batch):
        for h in range(heads):
            width = mixed.shape[2] // heads
            group = h * (values.shape[2] // width) // heads
            own = values[b, :, group * width : (group + 1) * width]
            wanted = (mixed - constant)[b, :, h * width : (h + 1) * width]
            torch.testing.assert_close(matrix[b, h] @ own, wanted, rtol=0, atol=1e-10)
    assert (n, m) == (mixed.shape[1], values.shape[1])


@pytest.mark.parametrize("name", SHOWN)
def test_unit_values_find_what_sites_show(name: str) -> None:
    module, inputs = build(BY_NAME[name])
    matrix = mixing_matrix(module, inputs)
    with observe(module) as record:
        module(**inputs)
    shown = record["attend" if "attend" in record else "probe"]
    torch.testing.assert_close(matrix, shown, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["multi-head-cross-grouped", "lepe-attention", "cosformer"])
def test_channels_of_a_head_have_its_matrix(name: str) -> None:
    module, inputs = build(BY_NAME[name])
    by_head = mixing_matrix(module, inputs)
    by_channel = mixing_matrix(module, inputs, per="channel")
    width = by_channel.shape[1] // by_head.shape[1]
    torch.testing.assert_close(by_channel, by_head.repeat_interleave(width, dim=1))


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_channels_that_mix_differently_need_a_matrix_each(name: str) -> None:
    module, inputs = build(BY_NAME[name])
    with pytest.raises(ValueError, match="per='channel' may do"):
        mixing_matrix(module, inputs)
    assert mixing_matrix(module, inputs, per="channel").shape[1] == module.out.in_features


def test_a_convolution_of_values_is_a_toeplitz_factor() -> None:
    module = RelativeConvAttention(8, heads=2, max_distance=16).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    matrix = mixing_matrix(module, x, per="channel")
    with observe(module) as record:
        module(x)
    for channel in range(8):
        taps = module.value_conv.weight[channel % 4]
        toeplitz = torch.zeros(6, 6, dtype=torch.float64)
        for i in range(6):
            for away in range(min(3, i + 1)):
                toeplitz[i, i - away] = taps[2 - away]
        wanted = record["attend"][0, channel // 4] @ toeplitz
        torch.testing.assert_close(matrix[0, channel], wanted)


def test_a_fourier_filter_mixes_its_input_by_circulants() -> None:
    module = SpectralGate(3, grid=(4, 5), std=1.0).double()
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    matrix = mixing_matrix(module, x, values=None, out=None, per="channel")
    with observe(module) as record:
        module(x)
    torch.testing.assert_close(matrix, record["probe"])


class Mixer(nn.Module):
    """The mixing layer of a multi-axis MLP."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, tokens))
        self.bias = nn.Parameter(torch.randn(tokens))

    def forward(self, x: Tensor) -> Tensor:
        return axis_linear(x, self.weight, self.bias)


def test_a_mixing_layer_of_an_mlp_has_the_matrix_of_its_weights() -> None:
    mixer = Mixer(4).double()
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64)  # two blocks of four places
    found = mixing_matrix(mixer, x, values=None, out=None, per="channel")
    for channel in range(6):
        wanted = torch.block_diag(mixer.weight, mixer.weight)
        torch.testing.assert_close(found[0, channel], wanted, check_stride=False)


class StateConvolution(nn.Module):
    """What S4D does before its activation, (b, n, c) in and out."""

    def __init__(self, response: Tensor) -> None:
        super().__init__()
        self.response = response

    def forward(self, x: Tensor) -> Tensor:
        return causal_convolution(x.mT, self.response)[:, 0].mT


def test_a_state_space_mixes_by_the_toeplitz_matrix_of_its_response() -> None:
    response = torch.randn(1, 3, 6, dtype=torch.float64)
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    convolution = StateConvolution(response)
    found = mixing_matrix(convolution, x, values=None, out=None, per="channel")
    for channel in range(3):
        for i in range(6):
            for j in range(6):
                wanted = response[0, channel, i - j] if j <= i else response.new_zeros(())
                torch.testing.assert_close(found[1, channel, i, j], wanted)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_values_that_do_more_than_be_mixed_are_refused(name: str) -> None:
    module, inputs = build(BY_NAME[name])
    for per in ("head", "channel"):
        with pytest.raises(ValueError, match="must be linear in its values"):
            mixing_matrix(module, inputs, per=per)


class ReadsWeights(nn.Module):
    """Never calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.value.weight


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    module, x = MultiHeadAttention(8, heads=2, dropout=0.5), torch.randn(1, 5, 8)
    with pytest.raises(ValueError, match="dropout or a function between"):
        mixing_matrix(module.train(), x)
    with pytest.raises(ValueError, match="no sub-module 'values', only"):
        mixing_matrix(module, x, values="values")
    with pytest.raises(ValueError, match="calls once, it called it 0 times"):
        mixing_matrix(ReadsWeights(), x)
    with pytest.raises(ValueError, match="heads must divide the 8 channels"):
        mixing_matrix(module.eval(), x, heads=3)
    with pytest.raises(ValueError, match="per must be one of"):
        mixing_matrix(module, x, per="token")


def test_nothing_is_left_behind() -> None:
    module, x = LinearAttention(8, heads=2).eval(), torch.randn(1, 5, 8)
    before = module(x)
    mixing_matrix(module, x)
    assert torch.equal(module(x), before)
    with pytest.raises(ValueError, match="linear in its values"):
        mixing_matrix(DynamicMaskAttention(8, heads=2, keep=2).eval(), x)
    assert not module.value._forward_hooks
    assert not module.out._forward_pre_hooks
