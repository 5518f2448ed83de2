"""The circuits of heads predict what layers do; full-width attention is multi-head attention."""

import pytest
import torch

from heed_core.attention.axial import AxialAttention
from heed_core.attention.bilevel import BilevelAttention
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.full_width import FullWidthAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.normalised_activation import (
    NormActAttend,
    ScoreActivation,
    norm_act_attention,
)
from heed_core.circuits import kq_ov_circuits
from heed_core.relative import RotaryPositions
from heed_core.sites import observe
from heed_core.weights import attention_from_torch

C, H = 12, 4


def tokens(n: int, width: int = C) -> torch.Tensor:
    return torch.randn(2, n, width, dtype=torch.float64)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_circuits_of_multi_head_attention_give_its_weights_and_output(kv_heads):
    torch.manual_seed(0)
    layer = MultiHeadAttention(
        C, heads=H, kv_heads=kv_heads, head_dim=5, context_dim=7, qkv_bias=False, out_bias=False
    ).double()
    x, context = tokens(3), tokens(6, 7)
    with observe(layer) as record:
        output = layer(x, context)
    circuits = kq_ov_circuits(layer)
    weights = torch.einsum("bmk,hkc,bnc->bhnm", context, circuits.kq, x).softmax(-1)
    torch.testing.assert_close(record["attend"], weights)
    added = torch.einsum("bhnm,hok,bmk->bno", weights, circuits.ov, context)
    torch.testing.assert_close(output, added)


def test_the_circuits_of_torch_attention_are_read_through_its_weights():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(C, H, bias=False, batch_first=True).double()
    ours = MultiHeadAttention(C, heads=H, qkv_bias=False, out_bias=False).double()
    ours.load_state_dict(attention_from_torch(theirs.state_dict()))
    x = tokens(5)
    output, weights = theirs(x, x, x, average_attn_weights=False)
    circuits = kq_ov_circuits(ours)
    scores = torch.einsum("bmk,hkc,bnc->bhnm", x, circuits.kq, x)
    torch.testing.assert_close(scores.softmax(-1), weights)
    torch.testing.assert_close(torch.einsum("bhnm,hok,bmk->bno", weights, circuits.ov, x), output)


@pytest.mark.parametrize(
    ("layer", "scale"),
    [
        (AxialAttention(C, heads=H, axis=0), 3**-0.5),
        (BilevelAttention(C, heads=H, regions=(2, 2), topk=1), C**-0.5),
        (MixtureOfHeads(C, heads=H, shared=1, active=1), 3**-0.5),
        (LinearAttention(C, heads=H, features="identity", normalise=False), 3**-0.5),
    ],
)
def test_other_layers_have_circuits_with_their_own_scale(layer, scale):
    found = kq_ov_circuits(layer)
    query, key = (part.weight.unflatten(0, (H, -1))[1] for part in (layer.query, layer.key))
    torch.testing.assert_close(found.kq[1], scale * key.T @ query)
    value, out = layer.value.weight[3:6], layer.out.weight[:, 3:6]
    torch.testing.assert_close(found.ov[1], out @ value)


@pytest.mark.parametrize(
    ("layer", "error", "said"),
    [
        (torch.nn.Linear(2, 2), TypeError, "Linear has no circuits"),
        (ComplexAttention(C, heads=3), TypeError, "ComplexAttention has no circuits"),
        (MultiHeadAttention(C, heads=H, qk_norm="rms"), ValueError, "a norm of the queries"),
        (
            MultiHeadAttention(C, heads=3, rotary=RotaryPositions(4)),
            ValueError,
            "a rotation by position",
        ),
        (LinearAttention(C, heads=H), ValueError, "features of queries"),
    ],
)
def test_layers_without_circuits_are_refused(layer, error, said):
    with pytest.raises(error, match=said):
        kq_ov_circuits(layer)


def test_full_width_attention_has_the_weights_and_outputs_of_multi_head_attention():
    torch.manual_seed(0)
    plain = MultiHeadAttention(
        C, heads=H, head_dim=C, context_dim=C, qkv_bias=False, out_bias=False
    ).double()
    ours = FullWidthAttention(C, heads=H).double()
    ours.load_state_dict(plain.state_dict())
    x, context = tokens(2), tokens(7)
    mask = torch.ones(2, H, 2, 7, dtype=torch.bool)
    mask[1, 2, :, 3:] = False
    torch.testing.assert_close(ours(x, context, mask=mask), plain(x, context, mask=mask))


@pytest.mark.bad_input
@pytest.mark.parametrize("wrong", [{"heads": 0}, {"heads": 2, "out_dim": 0}])
def test_full_width_attention_refuses_sizes_below_one(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        FullWidthAttention(C, **wrong)


def qkv() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (2, 5, 5))


def test_growing_powers_tend_to_softmax():
    query, key, value = qkv()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = []
    for power in (8, 64, 512):
        activation = ScoreActivation(name="power", slope=1 / power, power=power)
        found = norm_act_attention(query, key, value, activation)
        errors.append(float((found - exact).abs().max()))
    # (1 + x / p)^p = exp(x - x^2 / 2p + ...): the error falls as 1 / p.
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.05)


def test_small_scores_act_as_the_first_order_of_the_activation_says():
    query, key, value = qkv()
    query = 1e-5 * query
    centred = value - value.mean(-2, keepdim=True)
    first = (query @ key.mT / 2) @ centred / 5
    for activation, slope in (
        (ScoreActivation(name="linear", slope=0.7), 0.7),
        (ScoreActivation(name="square", slope=0.7), 1.4),
        (ScoreActivation(name="tanh"), 1.0),
    ):
        change = norm_act_attention(query, key, value, activation) - value.mean(-2, keepdim=True)
        torch.testing.assert_close(change, slope * first, rtol=1e-3, atol=1e-9)


def test_the_probe_states_the_weights_and_empty_rows_are_zero():
    query, key, value = qkv()
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool)
    mask[0, :, 1], mask[1, :, 0, 2:] = False, False
    site = NormActAttend(ScoreActivation(name="tanh"))
    with observe(site) as record:
        output = site(query, key, value, mask=mask)
    weights = record["probe"]
    torch.testing.assert_close(weights @ value, output)
    wanted = torch.ones(2, 3, 2, dtype=torch.float64)
    wanted[0, :, 1] = 0.0
    torch.testing.assert_close(weights.sum(-1), wanted)
    assert not output[0, :, 1].any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "wrong", [{"name": "exp"}, {"slope": 0.0}, {"power": 0}, {"name": "tanh", "power": 3}]
)
def test_an_activation_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|no effect"):
        ScoreActivation(**wrong)
