"""Linear attention and the delta rules: one result in every form, what theory says, decoding."""

import pytest
import torch
from torch import Tensor

from heed_core import observe, steer
from heed_core.attention.delta_rule import (
    DeltaRuleAttention,
    delta_rule,
    delta_rule_weights,
    gated_delta_rule,
)
from heed_core.attention.linear import LinearAttention, linear_attention
from heed_core.kernels.state_scan import state_scan

FORMS = [
    {"form": "recurrent"},
    {"form": "parallel"},
    {"form": "chunked"},
    {"form": "chunked", "chunk": 5},
]
MODULES = {
    "linear": lambda **o: LinearAttention(12, heads=3, causal=True, **o),
    "retention": lambda **o: LinearAttention(
        12, heads=3, causal=True, features="identity", normalise=False, decay="retention", **o
    ),
    "gated": lambda **o: LinearAttention(12, heads=3, causal=True, decay="gated", **o),
    "delta": lambda **o: DeltaRuleAttention(12, heads=3, value_dim=5, **o),
    "gated-delta": lambda **o: DeltaRuleAttention(12, heads=2, gated=True, **o),
}


def draw(length: int, *, dtype=torch.float64, rate: float = 1.0, by_channel: bool = False):
    """Query, key of length 1, value, beta, log decay and a state."""
    query, key = torch.randn(2, 3, length, 6, dtype=dtype), torch.randn(2, 3, length, 6).to(dtype)
    key = key / key.norm(dim=-1, keepdim=True)
    value = torch.randn(2, 3, length, 4, dtype=dtype)
    beta = torch.rand(2, 3, length, dtype=dtype)
    decay = -rate * torch.rand(2, 3, length, *((6,) if by_channel else ()), dtype=dtype)
    return query, key, value, beta, decay, torch.randn(2, 3, 6, 4, dtype=dtype)


@pytest.mark.parametrize("length", [1, 5, 64, 131])
@pytest.mark.parametrize("by_channel", [False, True])
def test_recurrent_parallel_and_chunked_agree_with_gradients(length, by_channel) -> None:
    query, key, value, beta, decay, state = draw(length, by_channel=by_channel)
    leaves = [x.requires_grad_() for x in (query, key, value, beta, decay, state)]

    def run(options: dict) -> list[Tensor]:
        linear, first = linear_attention(
            query, key, value, log_decay=decay, state=state, causal=True, **options
        )
        gated, second = gated_delta_rule(query, key, value, beta, decay, state=state, **options)
        outputs = [linear, first, gated, second]
        loss = sum((x.sin() * (i + 1)).sum() for i, x in enumerate(outputs))
        return outputs + list(torch.autograd.grad(loss, leaves))

    expected = run(FORMS[0])
    for options in FORMS[1:]:
        for ours, wanted in zip(run(options), expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("by_channel", [False, True])
def test_float32_forms_agree_to_1e5(by_channel) -> None:
    query, key, value, beta, decay, state = draw(200, dtype=torch.float32, by_channel=by_channel)
    calls = [
        lambda **o: linear_attention(
            query, key, value, log_decay=decay, state=state, causal=True, **o
        )[0],
        lambda **o: gated_delta_rule(query, key, value, beta, decay, state=state, **o)[0],
        lambda **o: delta_rule(query, key, value, beta, state=state, **o)[0],
    ]
    for call in calls:
        expected = call(form="recurrent")
        for options in FORMS[1:]:
            torch.testing.assert_close(call(**options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_channel", [False, True])
def test_a_decay_far_below_the_smallest_float_stays_finite(by_channel) -> None:
    query, key, value, beta, decay, state = draw(
        70, dtype=torch.float32, rate=90.0, by_channel=by_channel
    )
    decay.requires_grad_()
    for options in FORMS[1:]:
        out, last = gated_delta_rule(query, key, value, beta, decay, state=state, **options)
        wanted, _ = gated_delta_rule(query, key, value, beta, decay, state=state, form="recurrent")
        # logarithms that sum up to thousands keep 2e-4 in float32
        torch.testing.assert_close(out, wanted, rtol=5e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(out.sum() + last.sum(), decay)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("cut", [1, 17, 64])
def test_a_sequence_in_two_parts_with_the_state_between(cut: int) -> None:
    query, key, value, beta, decay, state = draw(90)
    whole, last = gated_delta_rule(query, key, value, beta, decay, state=state)
    parts, between = [], state
    for part in (slice(0, cut), slice(cut, None)):
        rows = (x[:, :, part] for x in (query, key, value, beta, decay))
        out, between = gated_delta_rule(*rows, state=between)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(between, last, rtol=1e-10, atol=1e-10)


def test_not_causal_is_the_last_state_of_causal_for_every_query() -> None:
    query, key, value, *_ = draw(30)
    out, state = linear_attention(query, key, value)
    _, causal_state = linear_attention(query, key, value, causal=True)
    torch.testing.assert_close(state, causal_state)
    torch.testing.assert_close(out, 6**-0.5 * query @ causal_state)


def test_value_heads_share_key_heads() -> None:
    query, key, _, beta, decay, _ = draw(20)
    wide = torch.randn(2, 6, 20, 4, dtype=torch.float64)
    rates, decays = beta.repeat_interleave(2, 1), decay.repeat_interleave(2, 1)
    found, _ = gated_delta_rule(query, key, wide, rates, decays)
    for head in range(6):
        one = slice(head, head + 1)
        group = slice(head // 2, head // 2 + 1)
        alone, _ = gated_delta_rule(
            query[:, group], key[:, group], wide[:, one], rates[:, one], decays[:, one]
        )
        torch.testing.assert_close(found[:, one], alone)


def test_the_delta_rule_converges_to_least_squares() -> None:
    """Rescorla-Wagner over repeated trials ends at the associations of linear regression."""
    cues, outcomes = torch.randn(9, 5).double(), torch.randn(9, 2).double()
    cues = cues / cues.norm(dim=1, keepdim=True)
    solution = torch.linalg.lstsq(cues, outcomes).solution
    state = None
    for epoch in range(12):
        key = cues.repeat(200, 1)[None, None]
        value = outcomes.repeat(200, 1)[None, None]
        beta = torch.full((1, 1, key.shape[2]), 0.3 * 0.6**epoch, dtype=torch.float64)
        _, state = delta_rule(key, key, value, beta, state=state)
    torch.testing.assert_close(state[0, 0], solution, rtol=0, atol=2e-2)


def test_hebb_does_not_mind_the_order_of_trials_but_the_delta_rule_does() -> None:
    query, key, value, beta, *_ = draw(12)
    order = torch.randperm(12)
    shuffled = [x[:, :, order] for x in (query, key, value, beta)]
    _, hebb = linear_attention(query, key, value, causal=True)
    _, hebb_shuffled = linear_attention(*shuffled[:3], causal=True)
    torch.testing.assert_close(hebb, hebb_shuffled)
    _, delta = delta_rule(query, key, value, beta)
    _, delta_shuffled = delta_rule(*shuffled)
    assert float((delta - delta_shuffled).abs().max()) > 1e-2


def test_a_second_writing_of_a_key_replaces_the_first_with_delta_and_adds_with_hebb() -> None:
    key = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    key[..., 0] = 1.0
    value = torch.tensor([[1.0], [5.0]], dtype=torch.float64)[None, None]
    _, delta = delta_rule(key, key, value, torch.ones(1, 1, 2, dtype=torch.float64))
    _, hebb = linear_attention(key, key, value, causal=True)
    assert float(delta[0, 0, 0, 0]) == 5.0
    assert float(hebb[0, 0, 0, 0]) == 6.0


@pytest.mark.parametrize("name", MODULES)
def test_decoding_token_by_token_equals_one_forward(name: str) -> None:
    module = MODULES[name]().double().eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        cache = module.new_cache(2)
        parts = [module(x[:, :4], cache=cache)]
        twin = cache.clone()
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
        assert (cache.length, twin.length) == (9, 4)
        twin.reorder(torch.tensor([1, 0]))
        swapped = module(x[[1, 0], 4:], cache=twin)
        torch.testing.assert_close(swapped, whole[[1, 0], 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODULES)
def test_the_probe_states_weights_that_reproduce_the_output(name: str) -> None:
    module = MODULES[name]().double().eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    plain = module(x)
    with observe(module) as record:
        assert torch.equal(module(x), plain)
    weights = record["probe"]
    value = module.value(x).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    torch.testing.assert_close(
        module.out((weights @ value).transpose(1, 2).flatten(2)), plain, rtol=1e-8, atol=1e-8
    )
    assert bool(torch.equal(weights.triu(1), torch.zeros_like(weights)))
    if getattr(module, "normalise", False):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9).double())
    with pytest.raises(ValueError, match="not steered"), steer(module, lambda w, call: w):
        pass


def test_weights_of_the_delta_rule_show_what_was_overwritten() -> None:
    key = torch.zeros(1, 1, 3, 4)
    key[0, 0, :, 0] = 1.0
    weights = delta_rule_weights(key, key, torch.ones(1, 1, 3), scale=1.0)
    torch.testing.assert_close(weights[0, 0], torch.eye(3))


@pytest.mark.parametrize("form", ["chunked", "recurrent", "parallel"])
def test_modules_of_one_form_are_those_of_another(form: str) -> None:
    for build in MODULES.values():
        torch.manual_seed(1)
        first = build()
        torch.manual_seed(1)
        second = build(form=form)
        x = torch.randn(1, 70, 12)
        torch.testing.assert_close(first(x), second(x), rtol=1e-5, atol=1e-5)


def test_lengths_of_zero_and_one() -> None:
    for build in MODULES.values():
        module = build()
        assert module(torch.randn(2, 0, 12)).shape == (2, 0, 12)
        assert bool(module(torch.randn(2, 1, 12)).isfinite().all())


@pytest.mark.parametrize("name", MODULES)
def test_autocast_keeps_the_state_in_float32(name: str) -> None:
    module, x = MODULES[name](), torch.randn(1, 20, 12)
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = module(x)
    assert found.dtype == torch.bfloat16
    assert float((found - exact).abs().max() / exact.abs().max()) < 0.05


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_state_scan_is_a_good_operator(diagonal: bool, steps: int) -> None:
    carry = torch.randn(1, 2, steps, 3, 1 if diagonal else 3, dtype=torch.float64)
    update = torch.randn(1, 2, steps, 3, 2, dtype=torch.float64)
    start = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    rows = tuple(x.requires_grad_() for x in (carry, update, start))
    torch.library.opcheck(state_scan, rows)
    torch.autograd.gradcheck(state_scan, rows)
    torch.autograd.gradgradcheck(state_scan, rows, fast_mode=True)
    states = state_scan(*rows)
    assert torch.equal(states[:, :, 0], start)
    for step in range(steps):
        left = carry[:, :, step].squeeze(-1).diag_embed() if diagonal else carry[:, :, step]
        torch.testing.assert_close(
            states[:, :, step + 1], left @ states[:, :, step] + update[:, :, step]
        )


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    query, key, value, beta, decay, state = draw(6)
    with pytest.raises(ValueError, match="form must be one of"):
        linear_attention(query, key, value, form="fast")
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        linear_attention(query, key, value, causal=True, chunk=0)
    with pytest.raises(ValueError, match="needs form='chunked'"):
        delta_rule(query, key, value, beta, form="recurrent", chunk=4)
    with pytest.raises(ValueError, match="log_decay has no effect"):
        linear_attention(query, key, value, log_decay=decay)
    with pytest.raises(ValueError, match="log_decay must be broadcastable"):
        gated_delta_rule(query, key, value, beta, decay[..., :-1])
    with pytest.raises(ValueError, match="beta must be"):
        delta_rule(query, key, value, beta[..., :-1])
    with pytest.raises(ValueError, match="state must be"):
        delta_rule(query, key, value, beta, state=state.mT)
    with pytest.raises(ValueError, match="key must have"):
        linear_attention(query, key[:, :, :-1], value[:, :, :-1], causal=True)
    with pytest.raises(ValueError, match="must divide"):
        linear_attention(query, key, torch.randn(2, 4, 6, 4).double())
    with pytest.raises(ValueError, match="value must have"):
        linear_attention(query, key, value[:, :, :-1])


@pytest.mark.bad_input
def test_wrong_options_are_named() -> None:
    for options, said in (
        ({"decay": "gated"}, "needs causal=True"),
        ({"decay": "fast", "causal": True}, "decay must be one of"),
        ({"features": "relu"}, "features must be one of"),
        ({"features": "identity"}, "needs features='elu'"),
        ({"causal": True, "context_dim": 4}, "self-attention only"),
        ({"form": "fast"}, "form must be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            LinearAttention(12, heads=3, **options)
    with pytest.raises(ValueError, match="value_dim must be"):
        DeltaRuleAttention(12, heads=3, value_dim=0)
    module = LinearAttention(12, heads=3)
    with pytest.raises(ValueError, match="cache serves causal=True only"):
        module(torch.randn(1, 2, 12), cache=module.new_cache(1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_the_delta_rule_of_padded_samples_is_that_of_each_alone(gated, form, side) -> None:
    module = DeltaRuleAttention(12, heads=3, value_dim=5, gated=gated, **form).double()
    lengths, n = (9, 6, 1), 9
    real = torch.arange(n) < torch.tensor(lengths)[:, None]
    if side == "left":
        real = real.flip(1)
    elif side == "within":
        real = torch.stack([row[torch.randperm(n)] for row in real])
    x = torch.randn(3, n, 12, dtype=torch.float64).masked_fill(~real[..., None], torch.nan)
    x.requires_grad_()
    leaves = [x, *module.parameters()]
    found = module(x, padding_mask=real)[real]
    alone = torch.cat([module(x[i : i + 1, real[i]])[0] for i in range(3)])
    torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-10)
    probe = torch.randn_like(alone)
    ours, wanted = (torch.autograd.grad((y * probe).sum(), leaves) for y in (found, alone))
    assert bool((ours[0][~real] == 0).all())
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
def test_padding_before_decoding_leaves_no_trace_in_the_cache(gated: bool) -> None:
    module = DeltaRuleAttention(12, heads=3, gated=gated).double().eval()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    real = torch.arange(9) >= torch.tensor([[3], [0]])
    with torch.no_grad():
        cache = module.new_cache(2)
        parts = [module(x[:, :5], padding_mask=real[:, :5], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(5, 9)]
        found, alone = torch.cat(parts, dim=1), module(x[:1, 3:])
    torch.testing.assert_close(found[:1, 3:], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1:], module(x[1:]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("half", [False, True])
def test_tokens_of_zeros_do_not_burst_the_gradients_of_the_delta_rule(half: bool) -> None:
    attention = DeltaRuleAttention(12, heads=3, gated=True)
    x = torch.randn(2, 5, 12)
    x[:, 2] = 0.0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        found = attention(x)
    found.float().sum().backward()
    assert x.grad.abs().max() < 1e3
    assert all(p.grad.isfinite().all() for p in attention.parameters())
