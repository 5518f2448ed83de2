"""Models whose attentions became mixtures of heads: what stays, changes, and is refused."""

import copy

import pytest
import torch

from heed_core import observe
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.blocks import BlockConfig, Decoder, Encoder
from heed_core.head_conversion import HeadMixture, convert_to_mixtures, mixtures
from heed_core.relative import RotaryPositions


def encoder(**options) -> Encoder:
    config = BlockConfig(dim=24, heads=6, causal=True, **options)
    return Encoder(config, depth=2, rotary=RotaryPositions(4)).double().eval()


@pytest.mark.parametrize("router", ["norm", "learned"])
def test_with_all_heads_active_nothing_changes(router: str) -> None:
    model = encoder()
    x, real = torch.randn(2, 9, 24).double(), torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    before = model(x, padding_mask=real)
    names = convert_to_mixtures(model, shared=2, active=4, router=router)
    assert names == ["layers.0.attention", "layers.1.attention"]
    torch.testing.assert_close(model(x, padding_mask=real)[real], before[real])


def test_fewer_active_heads_change_it_and_no_weight_is_added() -> None:
    model = encoder()
    before = model(x := torch.randn(2, 9, 24).double())
    size = sum(p.numel() for p in model.parameters())
    convert_to_mixtures(model, shared=2, active=2)
    assert sum(p.numel() for p in model.parameters()) == size
    assert not model.layers[0].attention.training
    assert float((model(x) - before).detach().abs().max()) > 1e-3


def test_it_is_the_mixture_of_each_attention() -> None:
    model = encoder()
    tokens = torch.randn(2, 9, 24).double()
    attention = copy.deepcopy(model.layers[1].attention)
    convert_to_mixtures(model, shared=2, active=2, names="layers.1.*")
    assert isinstance(model.layers[0].attention, MultiHeadAttention)
    expected = MixtureOfHeads.from_attention(attention, shared=2, active=2)(tokens).output
    assert torch.equal(model.layers[1].attention(tokens), expected)


def test_balance_losses_of_all_layers_are_averaged_with_gradients() -> None:
    model = encoder()
    convert_to_mixtures(model, shared=2, active=2, router="learned")
    for layer in model.layers:
        torch.nn.init.normal_(layer.attention.mixture.route.weight)
    x = torch.randn(2, 9, 24).double()
    with mixtures(model) as found:
        model(x)
    assert sorted(found) == ["layers.0.attention.mixture", "layers.1.attention.mixture"]
    losses = [calls[0].balance_loss for calls in found.values()]
    torch.testing.assert_close(found.balance_loss(), (losses[0] + losses[1]) / 2)
    assert float((losses[0] - losses[1]).detach().abs()) > 1e-6
    found.balance_loss().backward()
    for layer in model.layers:
        assert bool(layer.attention.mixture.route.weight.grad.ne(0).any())
    model(x)
    assert [len(calls) for calls in found.values()] == [1, 1]


def test_decoding_and_observing_go_on() -> None:
    model = encoder()
    convert_to_mixtures(model, shared=2, active=2)
    x = torch.randn(2, 7, 24).double()
    with torch.no_grad():
        with observe(model) as record:
            whole = model(x)
        assert record["layers.0.attention.mixture.attend"].shape == (2, 6, 7, 7)
        cache = model.new_cache(2, 7)
        parts = [model(x[:, t : t + 1], cache=cache) for t in range(7)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_attentions_to_a_context_stay() -> None:
    model = Decoder(BlockConfig(dim=24, heads=6, causal=True), depth=1)
    convert_to_mixtures(model, shared=2, active=2)
    assert isinstance(model.layers[0].attention, HeadMixture)
    assert isinstance(model.layers[0].context_attention, MultiHeadAttention)
    assert model(torch.randn(1, 3, 24), torch.randn(1, 4, 24)).shape == (1, 3, 24)


def test_an_attention_in_two_places_stays_one() -> None:
    attention = MultiHeadAttention(24, heads=6)
    model = torch.nn.ModuleDict({"a": attention, "b": attention})
    assert convert_to_mixtures(model, shared=2, active=2) == ["a", "b"]
    assert model["a"] is model["b"]


@pytest.mark.bad_input
def test_what_cannot_be_converted_is_named_and_nothing_changes() -> None:
    model = Encoder(BlockConfig(dim=24, heads=6, causal=True, window=3), depth=1)
    with pytest.raises(ValueError, match=r"layers\.0\.attention cannot become .* no window"):
        convert_to_mixtures(model, shared=2, active=2)
    assert isinstance(model.layers[0].attention, MultiHeadAttention)
    with pytest.raises(ValueError, match="no self-attention MultiHeadAttention named 'head'"):
        convert_to_mixtures(model, shared=2, active=2, names="head")
    with pytest.raises(ValueError, match=r"MixtureOfHeads\.from_attention"):
        convert_to_mixtures(MultiHeadAttention(24, heads=6), shared=2, active=2)
    attention = HeadMixture(MixtureOfHeads(24, heads=6, shared=2, active=2))
    with pytest.raises(ValueError, match="bias must be broadcastable"):
        attention(torch.randn(1, 3, 24), bias=torch.zeros(3, 4))
    with mixtures(attention) as found, pytest.raises(ValueError, match="no mixture of heads was"):
        found.balance_loss()
