"""The efficient attentions of long sequences: limits of theory, blocks, decoding, faults."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heed_core import masks, observe
from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.causal_long_short import (
    CausalLongShortAttention,
    causal_long_short_attention,
)
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.cosformer import CosformerAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer, diagonal_state_mixing
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.local import LocalAttention, local_attention
from heed_core.attention.long_short import LongShortAttention, long_short_attention
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import (
    PerformerAttention,
    orthogonal_features,
    performer_attention,
)
from heed_core.attention.prob_sparse import ProbSparseAttention, sample_keys
from heed_core.attention.randomized import RandomizedAttention
from heed_core.testing.oracle import naive_attention
from heed_core.tokens import UnsupportedPattern

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


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["local", "longshort", "s4d"])
@torch.no_grad()
def test_padding_masks_of_decoding_tell_of_all_tokens_so_far(name: str) -> None:
    module, x = DECODING[name]().double().eval(), torch.randn(2, 21, 12, dtype=torch.float64)
    real = torch.arange(21) >= torch.tensor([[0], [8]])
    whole = module(x, padding_mask=real)
    cache = module.new_cache(2, 21) if name == "longshort" else module.new_cache(2)
    parts = [
        module(x[:, start:stop], padding_mask=real[:, :stop], cache=cache)
        for start, stop in ((0, 6), (6, 7), (7, 18), (18, 21))
    ]
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[real], whole[real], rtol=1e-9, atol=1e-9)
    cache.crop(21 if name == "local" else 0)
    with pytest.raises(ValueError, match="padding_mask must be"):
        module(x[:, :1], padding_mask=real[:, :2], cache=cache)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 70, 70), (70, 70), (2, 1, 1, 70), (3, 70, 1), (1,)])
@torch.no_grad()
def test_masks_of_pairs_in_local_attention(causal: bool, shape: tuple[int, ...]) -> None:
    module = LocalAttention(12, heads=3, window=4, causal=causal).double()
    x, mask = torch.randn(2, 70, 12, dtype=torch.float64), torch.rand(shape) < 0.6
    real = torch.arange(70) < torch.tensor([[70], [61]])
    found = module(x, mask=mask, padding_mask=real)
    near = masks.window(70, 70, left=3 if causal else 4, right=0 if causal else 4)
    whole = masks.combine(near, mask, masks.keys(real))
    rows = (
        layer(x).unflatten(2, (3, 4)).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    mixed = naive_attention(*rows, mask=whole.expand(2, 3, 70, 70))
    wanted = module.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if causal and len(shape) == 4:
        cache = module.new_cache(2)
        steps = [slice(0, 40), slice(40, 41), slice(41, 70)]
        parts = [
            module(
                x[:, step],
                mask=mask[..., : step.stop] if shape[2] == 1 else mask[:, :, step, : step.stop],
                padding_mask=real[:, : step.stop],
                cache=cache,
            )
            for step in steps
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        module(x, mask=torch.ones(69, dtype=torch.bool))


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


def normed(heads: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
    """(b, h, n, d) through a layer norm over the channels of all heads."""
    tokens = F.layer_norm(heads.transpose(1, 2).flatten(2), norm[0].shape, *norm)
    return tokens.unflatten(2, heads.shape[1::2]).transpose(1, 2)


def softmax_of(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    """Scores (b, h) and values (b, h, d) of the tokens that one query sees."""
    weights = torch.stack(scores, dim=-1).softmax(-1)
    return torch.einsum("bhk,bhkd->bhd", weights, torch.stack(values, dim=2))


def check_with_gradients(found: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted)
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("n", [11, 37])
def test_long_short_attention_is_its_formula(n: int) -> None:
    query, key, value, scores = (draw(2, 3, *s) for s in ((n, 4), (n, 4), (n, 4), (2, n)))
    near, far = [(draw(12), draw(12)) for _ in range(2)]
    rows = [normed(x, near) for x in (key, value)]
    far_key, far_value = (normed(scores.softmax(-1) @ x, far) for x in rows)
    wanted = []
    for i in range(n):
        first = i // 4 * 4
        seen = range(max(0, first - 2), min(n, first + 6))
        pairs = [(far_key[:, :, a], far_value[:, :, a]) for a in range(2)]
        pairs += [tuple(x[:, :, j] for x in rows) for j in seen]
        wanted.append(
            softmax_of([(query[:, :, i] * k).sum(-1) / 2 for k, _ in pairs], [v for _, v in pairs])
        )
    found = long_short_attention(query, key, value, scores, near, far, window=4)
    leaves = [query, key, value, scores, *near, *far]
    check_with_gradients(found, torch.stack(wanted, dim=2), leaves)


@pytest.mark.parametrize("queries", [37, 5])
def test_causal_long_short_attention_is_its_formula(queries: int) -> None:
    n, window, chunk, rank = 37, 5, 4, 2
    query, key, value = (draw(2, 3, length, 4) for length in (queries, n, n))
    scores, near, far = draw(2, 3, n, rank), (draw(12), draw(12)), (draw(12), draw(12))
    content, place = draw(3, 4), draw(3, 4)
    near_place, far_place = draw(3, window, 4), draw(3, n // chunk * rank, 4)
    rows, pieces = [normed(x, near) for x in (key, value)], range(0, n, chunk)
    read = [
        torch.cat(
            [scores[:, :, t : t + chunk].softmax(2).mT @ x[:, :, t : t + chunk] for t in pieces],
            dim=2,
        )
        for x in (key, value)
    ]
    far_key, far_value = (normed(x, far) for x in read)
    wanted = []
    for at in range(queries):
        i, q = n - queries + at, query[:, :, at] / 2
        total, values = [], []
        for a in range(i // chunk * rank):
            back = i // chunk * rank - 1 - a
            total.append((q * (far_key[:, :, a] + far_place[:, back])).sum(-1))
            values.append(far_value[:, :, a])
        for j in range(max(0, i - window + 1), i + 1):
            term = (q + content) * rows[0][:, :, j] + (q + place) * near_place[:, i - j]
            total.append(term.sum(-1))
            values.append(rows[1][:, :, j])
        wanted.append(softmax_of(total, values))
    tensors = [query, key, value, scores, near, far, content, place, near_place, far_place]
    found = causal_long_short_attention(*tensors, chunk=chunk)
    leaves = [query, key, value, scores, *near, *far, content, place, near_place, far_place]
    check_with_gradients(found, torch.stack(wanted, dim=2), leaves)


def test_the_functions_of_projected_tokens_are_the_modules() -> None:
    x = torch.randn(2, 37, 12, dtype=torch.float64)
    for module in (LONG["longshort"]().double(), LONG["longshort causal"]().double()):
        module.out = torch.nn.Identity()
        layers = (module.query, module.key, module.value, module.summarise)
        rows = [layer(x).unflatten(2, (3, -1)).transpose(1, 2) for layer in layers]
        norms = [(norm.weight, norm.bias) for norm in (module.near_norm, module.far_norm)]
        if isinstance(module, LongShortAttention):
            rows[3] = rows[3].mT
            mixed = long_short_attention(*rows, *norms, window=5)
        else:
            biases = module.content_bias, module.place_bias
            places = module.near_place(5), module.far_place(40)  # more rows than are seen
            mixed = causal_long_short_attention(*rows, *norms, *biases, *places, chunk=4)
        torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), module(x))


@pytest.mark.bad_input
def test_long_short_functions_name_what_does_not_fit() -> None:
    rows, scores = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 2)
    norm, bias, places = (torch.ones(12), torch.zeros(12)), torch.zeros(3, 4), torch.ones(3, 4, 4)
    both = {"query": rows, "key": rows, "value": rows, "near_norm": norm, "far_norm": norm}
    plain = both | {"scores": scores.mT, "window": 4}
    biases = {"content_bias": bias, "place_bias": bias}
    causal = both | biases | {"scores": scores, "near_place": places, "far_place": places}
    causal["chunk"] = 4
    long_short_attention(**plain)
    causal_long_short_attention(**causal)
    for good, run in ((plain, long_short_attention), (causal, causal_long_short_attention)):
        for changed, said in (
            ({"query": rows[..., :3]}, "key must have the batch, heads and channels"),
            ({"key": rows[0]}, r"key must be \(batch, heads, tokens, channels\)"),
            ({"key": rows[:, :, :0], "value": rows[:, :, :0]}, "key must have at least one token"),
            ({"value": rows[..., :3]}, r"value must be \(2, 3, 9, 4\) as key"),
            ({"query": rows.repeat(1, 1, 2, 1)}, "query must have at most the tokens of key"),
            ({"scores": scores[:, :2]}, "scores must be "),
            ({"near_norm": (norm[0][1:], norm[1])}, r"weight of near_norm must be \(12\)"),
            ({"far_norm": (norm[0], norm[1][1:])}, r"bias of far_norm must be \(12\)"),
            ({"padding_mask": torch.ones(2, 8).bool()}, r"padding_mask must be \(2, 9\)"),
        ):
            with pytest.raises(ValueError, match=said):
                run(**good | changed)
    with pytest.raises(ValueError, match="window must be at least 1"):
        long_short_attention(**plain | {"window": 0})
    for changed, said in (
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"content_bias": bias[1:]}, r"content_bias must be \(3, 4\)"),
        ({"place_bias": bias[:, 1:]}, r"place_bias must be \(3, 4\)"),
        ({"near_place": places[:, :0]}, "near_place must have at least 1 distances"),
        ({"far_place": places[0]}, r"far_place must be \(3, any, 4\)"),
        ({"far_place": places[:, 1:]}, "far_place must have at least 4 distances, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            causal_long_short_attention(**causal | changed)


@pytest.mark.parametrize("causal", [True, False])
def test_diagonal_state_mixing_is_its_recurrence_with_gradients(causal: bool) -> None:
    tokens, skip = draw(2, 5, 9), draw(3, 5)
    coefficients, log_step = draw(3 if causal else 6, 5, 4, 2), draw(5)
    log_decay, frequency = draw(4), draw(4)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    step = log_step.exp()[:, None]
    rate = torch.complex(-log_decay.exp(), frequency)
    own = torch.view_as_complex(coefficients)

    def run(rows: Tensor, read: Tensor) -> list[Tensor]:
        state, found = torch.zeros(2, 5, 4, dtype=torch.complex128), []
        for t in range(9):
            state = (step * rate).exp() * state + rows[..., t, None]
            weight = read * ((step * rate).exp() - 1) / rate
            found.append(2 * (weight * state[:, None]).sum(-1).real)
        return found

    entering = tokens * real[:, None]
    wanted = torch.stack(run(entering, own[:3]), dim=-1) + skip[..., None] * entering[:, None]
    if not causal:
        later = run(entering.flip(-1), own[3:])[::-1]
        wanted = wanted + torch.stack([*later[1:], torch.zeros_like(later[0])], dim=-1)
    leaves = [tokens, coefficients, log_step, log_decay, frequency, skip]
    found = diagonal_state_mixing(*leaves, causal=causal, padding_mask=real)
    check_with_gradients(found, wanted, leaves)


def test_diagonal_state_mixing_is_the_mixer() -> None:
    module, x = DECODING["s4d"]().double().eval(), torch.randn(2, 9, 12, dtype=torch.float64)
    names = ("coefficients", "log_step", "log_decay", "frequency", "skip")
    found = diagonal_state_mixing(x.mT, *(getattr(module, name) for name in names))
    torch.testing.assert_close(module.out(F.gelu(found).flatten(1, 2).mT), module(x))


@pytest.mark.bad_input
def test_diagonal_state_mixing_names_what_does_not_fit() -> None:
    good = {
        "tokens": torch.randn(2, 5, 9), "coefficients": torch.randn(3, 5, 4, 2),
        "log_step": torch.zeros(5), "log_decay": torch.zeros(4), "frequency": torch.zeros(4),
        "skip": torch.zeros(3, 5),
    }  # fmt: skip
    diagonal_state_mixing(**good)
    cache = DiagonalStateMixer(5, state=8).new_cache(2)
    for changed, said in (
        ({"tokens": torch.randn(5, 9)}, r"tokens must be \(any, any, any\)"),
        ({"tokens": torch.randn(2, 5, 0)}, "tokens must have at least one token"),
        ({"coefficients": torch.randn(2, 5, 4, 2)}, r"coefficients must be \(3, 5, any, 2\)"),
        ({"causal": False}, r"coefficients must be \(6, 5, any, 2\)"),
        ({"log_step": torch.zeros(4)}, r"log_step must be \(5\)"),
        ({"log_decay": torch.zeros(5)}, r"log_decay must be \(4\)"),
        ({"frequency": torch.zeros(5)}, r"frequency must be \(4\)"),
        ({"skip": torch.zeros(3, 4)}, r"skip must be \(any, 5\)"),
        ({"padding_mask": torch.ones(2, 8).bool()}, r"padding_mask must be \(2, 9\)"),
        (
            {"cache": cache, "causal": False, "coefficients": torch.randn(6, 5, 4, 2)},
            "cache serves causal=True only",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            diagonal_state_mixing(**good | changed)


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


@pytest.mark.compile
def test_a_graph_of_sparse_queries_holds_no_map_of_all_pairs() -> None:
    module, x = ProbSparseAttention(8, heads=2, factor=1).eval(), torch.randn(1, 600, 8)
    length = {"x": {1: torch.export.Dim("n", max=4096)}}
    with torch.no_grad():
        program = torch.export.export(module, (), kwargs={"x": x}, dynamic_shapes=length)
    made = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [value.numel() for value in made if isinstance(value, Tensor)]
    sizes = [int(size) if isinstance(size, int) else size.node.hint for size in sizes]
    assert max(sizes) <= 24 * 600 * 8 < 600**2
    other = torch.randn(1, 450, 8)
    torch.testing.assert_close(program.module()(x=other), module(other), rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize(
    "build",
    [
        LinearAttention,
        DynamicMaskAttention,
        partial(ComplexAttention, base=None),
        BoundedMemoryAttention,
        PerformerAttention,
    ],
)
def test_a_causal_mechanism_says_why_it_takes_no_context(build) -> None:
    said = "with causal=True serves self-attention only: a context has no order"
    with pytest.raises(UnsupportedPattern, match=said):
        build(12, heads=3, causal=True, context_dim=5)
    module = build(12, heads=3, causal=True)
    with pytest.raises(ValueError, match="context"):
        module(torch.randn(1, 4, 12), torch.randn(1, 6, 12))


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
