"""The matrix of a layer, whatever was put around it; every mechanism is checked by the suite."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from heed_core.attention.conditional import ConditionEmbedding
from heed_core.attention.full_width import FullWidthAttention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.reduced import ReducedAttention, collapse_stack
from heed_core.blocks import BlockConfig, Encoder
from heed_core.circuits import kq_ov_circuits
from heed_core.head_conversion import convert_to_mixtures
from heed_core.layers import matrix_and_bias, type_and_place
from heed_core.testing.low_rank import LowRank, adapt


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_layer_gives_what_it_holds(bias: bool) -> None:
    layer = nn.Linear(3, 5, bias=bias)
    weight, shift = matrix_and_bias(layer)
    assert weight is layer.weight
    assert shift is layer.bias


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_put_around_a_layer_is_in_its_matrix(bias: bool) -> None:
    layer = LowRank(nn.Linear(3, 5, bias=bias))
    weight, shift = matrix_and_bias(layer)
    x = torch.randn(7, 3)
    torch.testing.assert_close(nn.functional.linear(x, weight, shift), layer(x))
    layer = nn.Linear(3, 5, bias=bias)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    weight, shift = matrix_and_bias(layer)
    torch.testing.assert_close(nn.functional.linear(x, weight, shift), layer(x))


def test_a_call_that_was_replaced_on_the_layer_itself_is_in_its_matrix() -> None:
    layer = nn.Linear(3, 5)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # as libraries that move weights do
    x = torch.randn(7, 3)
    torch.testing.assert_close(nn.functional.linear(x, *matrix_and_bias(layer)), layer(x))


def test_a_layer_without_its_width_is_named() -> None:
    with pytest.raises(TypeError, match=r"Sequential stands in the place of nn\.Linear"):
        matrix_and_bias(nn.Sequential(nn.Linear(3, 5)))


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "route", "share", "kind"])
def test_adapters_count_where_heads_are_skipped(name: str) -> None:
    mixture = MixtureOfHeads(12, heads=6, head_dim=4, shared=2, active=2, skip=True).eval()
    merged = adapt(mixture, name)
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(mixture(x).output, merged(x).output, rtol=1e-3, atol=1e-4)


@pytest.mark.compile
@torch.no_grad()
def test_adapters_count_in_graphs_that_skip_heads() -> None:
    mixture = MixtureOfHeads(8, heads=4, shared=2, active=1, causal=True, capacity=1.2).eval()
    for name in ("query", "out"):
        adapt(mixture, name)
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(compiled(x).output, mixture(x).output, rtol=1e-4, atol=1e-5)


def test_adapters_count_for_conditions_by_number() -> None:
    embedding = ConditionEmbedding(3, 8)
    merged = adapt(embedding, "linear")
    asked = torch.tensor([0, 2])
    torch.testing.assert_close(embedding(asked), merged(asked))


def test_adapters_are_in_circuits() -> None:
    for name in ("query", "key", "value", "out"):
        attention = MultiHeadAttention(12, heads=3)
        merged = adapt(attention, name)
        found, wanted = kq_ov_circuits(attention), kq_ov_circuits(merged)
        torch.testing.assert_close(found.ov, wanted.ov, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.kq, wanted.kq, rtol=1e-4, atol=1e-4)


def test_pruned_layers_stay_pruned_while_they_learn() -> None:
    attention = FullWidthAttention(8, heads=2)
    for layer in (attention.query, attention.out):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    optimiser = torch.optim.SGD(attention.parameters(), lr=0.1)
    x = torch.randn(2, 5, 8)
    before = attention(x, x)
    for _ in range(2):
        optimiser.zero_grad()
        attention(x, x).square().sum().backward()
        optimiser.step()
    assert not torch.allclose(attention(x, x), before)
    assert int((attention.query.weight == 0).sum()) == attention.query.weight.numel() // 2


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_layers_serve_forward_and_decoding() -> None:
    encoder = Encoder(BlockConfig(dim=16, heads=2, causal=True), depth=1).eval()
    small = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    assert type_and_place(small.layers[0].attention.key) == (torch.float32, torch.device("cpu"))
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        cache = small.new_cache(2, 4)
        steps = [small(x[:, i : i + 1], cache=cache) for i in range(4)]
        torch.testing.assert_close(torch.cat(steps, dim=1), encoder(x), rtol=0.1, atol=0.1)
    mixture = MixtureOfHeads(12, heads=6, head_dim=4, shared=2, active=2, skip=True).eval()
    small = torch.ao.quantization.quantize_dynamic(mixture, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(small(x).output, mixture(x).output, rtol=0.1, atol=0.1)


def test_conversions_copy_parametrized_weights() -> None:
    attention = MultiHeadAttention(12, heads=3)
    twin = copy.deepcopy(attention)
    for layer in (twin.query, twin.value, twin.out):
        weight_norm(layer)
    x = torch.randn(2, 5, 12)
    plain, normed = (
        MixtureOfHeads.from_attention(one, shared=2, active=1)(x).output
        for one in (attention, twin)
    )
    torch.testing.assert_close(normed, plain)


def test_conversions_refuse_what_they_would_lose() -> None:
    model = nn.ModuleDict({"a": MultiHeadAttention(12, heads=3)})
    adapt(model, "a.query")
    with pytest.raises(ValueError, match=r"query must be a plain nn\.Linear"):
        MixtureOfHeads.from_attention(model["a"], shared=2, active=1)
    with pytest.raises(ValueError, match="a cannot become a mixture of heads: query must be"):
        convert_to_mixtures(model, shared=2, active=1)
    layer = ReducedAttention(8)
    adapt(layer, "value")
    with pytest.raises(ValueError, match=r"value must be a plain nn\.Linear"):
        layer.collapse()
    with pytest.raises(ValueError, match=r"value must be a plain nn\.Linear"):
        collapse_stack([layer])
