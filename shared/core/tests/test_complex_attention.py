"""Complex attention: the formula in loops, its limits, decoding."""

import pytest
import torch
from torch import Tensor

from heed_core import observe
from heed_core.attention.complex import ComplexAttention, adapt_phase, complex_attention
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.cache import KVCache
from heed_core.relative import RotaryPositions
from heed_core.testing.memory import peak_bytes


def build(**options) -> ComplexAttention:
    module = ComplexAttention(24, heads=3, **options).double().eval()
    torch.nn.init.normal_(module.phase_bias)
    return module


def scores_by_cosines(query: Tensor, key: Tensor, delta: Tensor, bias: Tensor, frequency: Tensor):
    """The formula, an N x N x d / 2 tensor of cosines."""
    pairs = query.shape[-1] // 2
    q, k = (torch.complex(x[..., :pairs], x[..., pairs:]) for x in (query, key))
    away = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    theta = (
        delta[:, None, None] * (q.angle()[..., :, None, :] - k.angle()[..., None, :, :])
        + bias[:, None, None]
        + away[..., None] * frequency
    )
    return (q.abs()[..., :, None, :] * k.abs()[..., None, :, :] * theta.cos()).sum(-1)


def test_the_dot_product_of_transformed_vectors_is_the_sum_of_cosines() -> None:
    query, key = torch.randn(2, 3, 7, 8).double(), torch.randn(2, 3, 9, 8).double()
    delta, bias = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    frequency = 10000.0 ** (-2.0 * torch.arange(4, dtype=torch.float64) / 8)
    rotary = RotaryPositions(8)
    found = rotary(adapt_phase(query, delta, bias)) @ rotary(adapt_phase(key, delta)).mT
    wanted = scores_by_cosines(query, key, delta, bias, frequency)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)  # 1e-9 below the root


@pytest.mark.parametrize("rotary", [True, False])
def test_the_function_is_softmax_of_the_cosines_with_gradients(rotary: bool) -> None:
    query, key, value = (torch.randn(2, 3, n, 8).double() for n in (5, 9, 9))
    delta, bias = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    leaves = [query, key, value, delta, bias]
    for leaf in leaves:
        leaf.requires_grad_()
    real = torch.arange(9) < torch.tensor([[9], [7]])
    frequency = 10000.0 ** (-2.0 * torch.arange(4, dtype=torch.float64) / 8)
    before = torch.zeros(2, 3, 4, 8).double()  # rows for places that do not ask
    scores = scores_by_cosines(
        torch.cat([before, query], dim=2), key, delta, bias, frequency * float(rotary)
    )[:, :, 4:]
    allowed = real[:, None, None] & torch.ones(5, 9).tril(4).bool()
    wanted = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    found = complex_attention(
        query, key, value, delta, bias,
        rotary=RotaryPositions(8) if rotary else None, causal=True, padding_mask=real,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # 1e-9 below the root
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_function_of_projected_tokens_is_the_module() -> None:
    module, x = build(causal=True), torch.randn(2, 9, 24, dtype=torch.float64)
    places = torch.randint(0, 50, (2, 9))
    module.out = torch.nn.Identity()
    rows = [
        layer(x).unflatten(2, (3, 8)).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    ]
    mixed = complex_attention(
        *rows, module.delta, module.phase_bias,
        rotary=RotaryPositions(8), positions=places, causal=True,
    )  # fmt: skip
    wanted = module(x, positions=places)
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), wanted)


@pytest.mark.bad_input
def test_the_function_names_what_does_not_fit() -> None:
    rows, delta = torch.randn(2, 3, 5, 8), torch.ones(3, 4)
    good = {"query": rows, "key": rows, "value": rows, "delta": delta, "bias": delta}
    complex_attention(**good)
    cache, rotary = KVCache(2, 3, 9, 8), RotaryPositions(8)
    places = {"positions": torch.arange(5)}
    for changed, said in (
        ({"query": rows[0]}, r"query must be \(batch, heads, tokens, channels\)"),
        ({"key": rows[:, :2]}, "key must have the batch, heads and channels of query"),
        ({"value": rows[:, :, 1:]}, "value must have the batch and tokens of key"),
        ({"delta": delta[1:]}, r"delta be \(heads, channels / 2\), got .*\(2, 4\)"),
        ({"bias": delta[0]}, r"bias must be \(3, 4\) \(heads, pairs\), got \(4,\)"),
        ({"padding_mask": torch.ones(2, 4).bool()}, r"padding_mask must be \(2, 5\)"),
        (places, "positions have no effect without rotary"),
        (places | {"rotary": rotary, "query": rows[:, :, 1:]}, "positions .* as many queries"),
        ({"cache": cache}, "cache serves causal=True only"),
    ):
        with pytest.raises(ValueError, match=said):
            complex_attention(**good | changed)
    assert cache.length == 0


def test_delta_of_one_is_rotary_attention() -> None:
    module = build(causal=True, scale=8**-0.5)
    torch.nn.init.ones_(module.delta)
    torch.nn.init.zeros_(module.phase_bias)
    plain = MultiHeadAttention(
        24, heads=3, qkv_bias=False, out_bias=False, causal=True, rotary=RotaryPositions(8)
    ).double()
    state = {n: x for n, x in module.state_dict().items() if n.endswith("weight")}
    plain.load_state_dict(state)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-6, atol=1e-6)


def test_all_positions_moved_by_one_number_change_no_weight() -> None:
    module, x = build(), torch.randn(2, 9, 24, dtype=torch.float64)
    maps = []
    for start in (0, 1000):
        with observe(module) as record:
            module(x, positions=torch.arange(start, start + 9))
        maps.append(record["attend"])
    torch.testing.assert_close(*maps)


def test_delta_of_zero_without_positions_sees_magnitudes_only() -> None:
    query, key = torch.randn(1, 2, 5, 6).double(), torch.randn(1, 2, 5, 6).double()
    zero = torch.zeros(2, 3, dtype=torch.float64)
    scores = adapt_phase(query, zero) @ adapt_phase(key, zero).mT
    lengths = [(x[..., :3] ** 2 + x[..., 3:] ** 2).sqrt() for x in (query, key)]
    torch.testing.assert_close(scores, lengths[0] @ lengths[1].mT, rtol=0, atol=1e-6)


def test_a_channel_of_zero_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    delta = torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(adapt_phase(x, delta, delta).sum(), (x, delta))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(("dim", "heads"), [(512, 8), (256, 8)])
def test_number_of_parameters(dim: int, heads: int) -> None:
    module = ComplexAttention(dim, heads=heads)
    assert sum(p.numel() for p in module.parameters()) == 4 * dim**2 + dim


@pytest.mark.parametrize("context_dim", [None, 8])
def test_projections_begin_in_xavier_s_range(context_dim: int | None) -> None:
    base = None if context_dim else 10000.0
    module = ComplexAttention(48, heads=4, context_dim=context_dim, base=base)
    for layer in (module.query, module.key, module.value, module.out):
        rows, columns = layer.weight.shape
        bound = (6.0 / (rows + columns)) ** 0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_decoding_token_by_token_equals_one_forward() -> None:
    module, x = build(causal=True), torch.randn(2, 9, 24, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor([[9], [9]])
    with torch.no_grad():
        whole = module(x, padding_mask=real)
        cache = module.new_cache(2, 9)
        parts = [module(x[:, :4], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        cache.crop(5)
        torch.testing.assert_close(module(x[:, 5:], cache=cache), whole[:, 5:])


def test_half_precision_keeps_far_positions_apart() -> None:
    module = build(causal=True).to(torch.bfloat16)
    x = torch.randn(1, 1, 24).to(torch.bfloat16).expand(1, 2, 24)
    maps = []
    for places in ((0, 1), (5000, 5001)):
        with observe(module) as record:
            module(x, positions=torch.tensor(places))
        maps.append(record["attend"])
    torch.testing.assert_close(*maps, rtol=0, atol=0.05)


def test_a_scale_of_one_is_warned_of_in_wide_heads(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({"heads": 4}, {"heads": 2, "scale": 0.125}):
        ComplexAttention(128, **options)
    assert not caplog.records
    ComplexAttention(128, heads=2)
    assert "scale=1 with heads of 64 channels" in caplog.text


def peak_of(impl: str, *, grad: bool) -> int:
    """Torch, the layer and its forward pass of 4096 tokens."""
    return peak_bytes(
        f"""
import torch
from heed_core.attention.complex import ComplexAttention
torch.set_num_threads(1)
with torch.set_grad_enabled({grad}):
    ComplexAttention(512, heads=8, causal=True, impl={impl!r})(torch.randn(1, 4096, 512))
"""
    )


def test_a_long_sequence_needs_no_map_of_all_pairs() -> None:
    """Cosines per pair and channel would be 17 GB, scores of all pairs 0.5 GB and their softmax."""
    assert peak_of("auto", grad=False) < 1.5e9


@pytest.mark.slow
def test_the_measure_of_memory_sees_a_map_of_all_pairs() -> None:
    """With gradients: without them the reference makes some rows at a time."""
    assert peak_of("reference", grad=True) > 2.0e9


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim must be even"):
        ComplexAttention(12, heads=4)
    with pytest.raises(ValueError, match="give base=None"):
        ComplexAttention(24, heads=3, context_dim=5)
    with pytest.raises(ValueError, match="even number of channels"):
        adapt_phase(torch.randn(1, 2, 3, 5), torch.ones(2, 2))
    module = build()
    with pytest.raises(ValueError, match="context must be given if and only if"):
        module(torch.randn(1, 3, 24).double(), torch.randn(1, 3, 24).double())
    with pytest.raises(ValueError, match="cache serves causal=True only"):
        module(torch.randn(1, 3, 24).double(), cache=module.new_cache(1, 4))
    contextual = ComplexAttention(24, heads=3, context_dim=5, base=None)
    with pytest.raises(ValueError, match="positions have no effect"):
        contextual(torch.randn(1, 3, 24), torch.randn(1, 2, 5), positions=torch.arange(3))
