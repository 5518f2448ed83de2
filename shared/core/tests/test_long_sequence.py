"""The efficient attentions of long sequences: limits of theory, blocks, decoding, faults."""

import pytest
import torch
from torch import Tensor

from heed_core import observe
from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.cosformer import CosformerAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer
from heed_core.attention.local import LocalAttention, local_attention
from heed_core.attention.long_short import CausalLongShortAttention, LongShortAttention
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import (
    PerformerAttention,
    orthogonal_features,
    performer_attention,
)
from heed_core.attention.prob_sparse import ProbSparseAttention, sample_keys
from heed_core.attention.projected import UnsupportedPattern
from heed_core.attention.randomized import RandomizedAttention
from heed_core.testing.oracle import naive_attention

PARAMETERS = {
    "local": (lambda: LocalAttention(512, heads=8), 1_050_624),
    "abc": (lambda: BoundedMemoryAttention(512, heads=8), 1_052_672),
    "performer": (lambda: PerformerAttention(512, heads=8), 1_050_624),
    "lara": (lambda: RandomizedAttention(512, heads=8), 1_050_624),
    "cosformer": (lambda: CosformerAttention(512, heads=8), 1_050_624),
    "nystrom": (lambda: NystromAttention(512, heads=8), 1_050_624),
    "nystrom conv 5": (lambda: NystromAttention(512, heads=8, conv_width=5), 1_050_664),
    "probsparse": (lambda: ProbSparseAttention(512, heads=8), 1_050_624),
    "longshort ns": (lambda: LongShortAttention(512, heads=8), 1_118_336),
    "longshort cs, 1 summary": (lambda: CausalLongShortAttention(512, heads=8), 1_580_552),
    "s4d 1 channel": (lambda: DiagonalStateMixer(512), 271_888),
    "s4d 8 channels": (lambda: DiagonalStateMixer(512, channels=8), 2_167_824),
    "s4d bidirectional 8": (lambda: DiagonalStateMixer(512, channels=8, causal=False), 2_233_360),
}
LONG = {
    "local": lambda: LocalAttention(12, heads=3, window=4),
    "local causal": lambda: LocalAttention(12, heads=3, window=5, causal=True),
    "probsparse": lambda: ProbSparseAttention(12, heads=3, factor=2),
    "longshort": lambda: LongShortAttention(12, heads=3, window=5, landmarks=3),
    "longshort causal": lambda: CausalLongShortAttention(12, heads=3, window=5, chunk=4, rank=2),
}
DECODING = {
    "local": lambda: LocalAttention(12, heads=3, window=4, causal=True),
    "abc": lambda: BoundedMemoryAttention(12, heads=3, slots=3, causal=True),
    "performer": lambda: PerformerAttention(12, heads=3, features=5, causal=True),
    "longshort": lambda: CausalLongShortAttention(12, heads=3, window=4, chunk=3, rank=2),
    "s4d": lambda: DiagonalStateMixer(12, channels=2, state=4),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_numbers_of_parameters(name: str) -> None:
    build, count = PARAMETERS[name]
    with torch.device("meta"):
        module = build()
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("name", LONG)
def test_blocks_equal_the_whole_map_with_gradients(name: str) -> None:
    module = LONG[name]().double().eval()
    x = torch.randn(2, 75, 12, dtype=torch.float64, requires_grad=True)
    real = torch.arange(75) < torch.tensor([[75], [61]])
    leaves = [x, *module.parameters()]

    def run() -> list[Tensor]:
        out = module(x, padding_mask=real)[real]
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    found = run()
    with observe(module) as record:  # makes the whole map
        expected = run()
    assert record["attend"].shape[2] == 75
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", DECODING)
def test_decoding_equals_one_forward(name: str) -> None:
    module, x = DECODING[name]().double().eval(), torch.randn(2, 21, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        cache = module.new_cache(2, 21) if name == "longshort" else module.new_cache(2)
        parts = [module(x[:, :6], cache=cache)]
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(6, 21)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DECODING)
def test_the_prefix_does_not_know_the_future(name: str) -> None:
    module, x = DECODING[name]().eval(), torch.randn(2, 70, 12)
    changed = torch.cat([x[:, :40], 3 * torch.randn(2, 30, 12)], dim=1)
    out, other = module(x), module(changed)
    torch.testing.assert_close(out[:, :40], other[:, :40], rtol=1e-5, atol=1e-5)
    assert float((out[:, 40:] - other[:, 40:]).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_a_wide_window_is_full_attention(causal: bool) -> None:
    query, key, value = torch.randn(3, 2, 3, 40, 4, dtype=torch.float64)
    found = local_attention(query, key, value, window=40, causal=causal)
    expected = naive_attention(query, key, value, causal=causal)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_slots_that_single_out_tokens_are_full_attention() -> None:
    module = BoundedMemoryAttention(6, heads=1, slots=6, qkv_bias=False, out_bias=False).double()
    module.key_control.data = module.value_control.data = 1e3 * torch.eye(6, dtype=torch.float64)
    for layer in (module.query, module.key, module.value, module.out):
        layer.weight.data = torch.eye(6, dtype=torch.float64)
    x = torch.eye(6, dtype=torch.float64)[None]
    full = naive_attention(x[None], x[None], x[None])[0]
    torch.testing.assert_close(module(x), full, rtol=1e-10, atol=1e-10)


def test_few_tokens_make_nystrom_exact() -> None:
    module = NystromAttention(12, heads=3, landmarks=9).double()
    full = MultiHeadAttention(12, heads=3).double()
    full.load_state_dict(module.state_dict())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), full(x), rtol=1e-10, atol=1e-10)


def test_many_random_features_are_softmax_attention() -> None:
    query, key = 0.5 * torch.randn(2, 1, 2, 30, 8, dtype=torch.float64)
    value = torch.rand(1, 2, 30, 8, dtype=torch.float64)
    features = orthogonal_features(2, 4096, 8).double()
    found = performer_attention(query, key, value, features)
    exact = naive_attention(query, key, value)
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.02
    few = performer_attention(query, key, value, features[:, :8])
    assert float((few - exact).norm() / exact.norm()) > 2 * error


def test_a_landmark_for_every_token_averages_values() -> None:
    module = RandomizedAttention(4, heads=1, landmarks=10, out_bias=False).double().eval()
    module.out.weight.data = torch.eye(4, dtype=torch.float64)
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    value, mixed = module.value(x), module(x)
    assert bool((mixed <= value.amax(1, keepdim=True)).all())
    assert bool((mixed >= value.amin(1, keepdim=True)).all())


@pytest.mark.parametrize(
    "build",
    [
        lambda: RandomizedAttention(12, heads=3, landmarks=4),
        lambda: NystromAttention(12, heads=3, landmarks=4, conv_width=3),
        lambda: CosformerAttention(12, heads=3),
        lambda: PerformerAttention(12, heads=3, features=5),
        lambda: ProbSparseAttention(12, heads=3, factor=1),
        lambda: DiagonalStateMixer(12, causal=False),
    ],
)
def test_a_padded_sample_is_the_sample_alone(build) -> None:
    module, x = build().double().eval(), torch.randn(2, 60, 12, dtype=torch.float64)
    real = torch.arange(60) < torch.tensor([[60], [41]])
    padded = module(x, padding_mask=real)[1:, :41]
    torch.testing.assert_close(padded, module(x[1:, :41]), rtol=1e-9, atol=1e-9)


def test_sampled_keys_are_uniform_and_change_with_the_seed() -> None:
    first, second = (sample_keys(torch.tensor(seed), 2000, 5)[0] for seed in (0, 1))
    counts = torch.histc(first.double(), bins=10, min=0, max=2000)
    assert int(first.min()) >= 0
    assert int(first.max()) < 2000
    # A binomial count of n draws in one of ten bins is within five standard deviations.
    assert float((counts - first.numel() / 10).abs().max()) < 5 * (first.numel() * 0.09) ** 0.5
    assert float((first == second).double().mean()) < 0.01


@pytest.mark.bad_input
def test_wrong_patterns_and_options_are_named() -> None:
    for build, said in (
        (lambda: CosformerAttention(12, heads=3, causal=True), "has no causal self attention"),
        (lambda: LocalAttention(12, heads=3, window=0), "window must be at least 1"),
        (lambda: LocalAttention(12, heads=5), "heads must divide"),
        (lambda: BoundedMemoryAttention(12, heads=3, slots=0), "slots must be at least 1"),
        (lambda: PerformerAttention(12, heads=3, features=-1), "features must be at least 1"),
        (lambda: PerformerAttention(12, heads=3, least_normaliser=0.0), "least_normaliser must"),
        (lambda: NystromAttention(12, heads=3, conv_width=4), "conv_width must be odd"),
        (lambda: ProbSparseAttention(12, heads=3, factor=0), "factor must be at least 1"),
        (lambda: DiagonalStateMixer(12, state=3), "state must be even"),
        (
            lambda: CausalLongShortAttention(12, heads=3, chunk=5, phantom_slots=True, memory=8),
            "memory must be a multiple",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            build()
    with pytest.raises(UnsupportedPattern, match="serves self; it has no cross"):
        NystromAttention(12, heads=3).check_call(torch.ones(1, 2, 12), torch.ones(1, 2, 12), None)
    with pytest.raises(TypeError, match="landmarks must be an integer"):
        RandomizedAttention(12, heads=3, landmarks=2.5)
    module = BoundedMemoryAttention(12, heads=3)
    with pytest.raises(ValueError, match="cache serves causal=True only"):
        module(torch.randn(1, 2, 12), cache=module.new_cache(1))


@pytest.mark.bad_input
@pytest.mark.parametrize("pattern", [{"context_dim": 7}, {"causal": True}], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        LocalAttention,
        NystromAttention,
        ProbSparseAttention,
        RandomizedAttention,
        LongShortAttention,
        CosformerAttention,
    ],
)
def test_a_pattern_that_is_not_served_is_named_when_it_is_asked_for(build, pattern) -> None:
    asked = "cross" if "context_dim" in pattern else "causal self"
    if asked in build.patterns:
        build(12, heads=3, **pattern)
        return
    with pytest.raises(UnsupportedPattern, match=f"{build.__name__} serves .* no {asked} att"):
        build(12, heads=3, **pattern)


def test_the_seed_of_prob_sparse_is_saved_with_its_weights() -> None:
    x = torch.randn(2, 40, 12)
    saved = ProbSparseAttention(12, heads=3, factor=1, seed=7).eval()
    loaded = ProbSparseAttention(12, heads=3, factor=1).eval()
    assert not torch.equal(loaded.seed, saved.seed)
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_without_a_seed_leave_that_of_the_options(assign: bool) -> None:
    x = torch.randn(2, 40, 12)
    wanted = ProbSparseAttention(12, heads=3, factor=1, seed=7).eval()
    weights = {name: w for name, w in wanted.state_dict().items() if name != "seed"}
    with torch.device("meta" if assign else "cpu"):
        found = ProbSparseAttention(12, heads=3, factor=1, seed=7).eval()
    found.load_state_dict(weights, assign=assign)
    assert torch.equal(found(x), wanted(x))
