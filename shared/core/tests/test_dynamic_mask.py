"""Dynamic mask attention: what is kept, the fast paths, decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from heed_core import observe
from heed_core.attend import attend
from heed_core.attention.dynamic_mask import (
    BLOCK,
    DynamicMaskAttention,
    dynamic_mask_attention,
    dynamic_scores,
)
from heed_core.kernels.running_top import running_top
from heed_core.key_selection import keep_blocks, keep_most, keep_positive, latest_largest
from heed_core.relative import RotaryPositions
from heed_core.sites import Attend


def draw(n: int, m: int, *, ties: bool = False) -> list[Tensor]:
    """Queries of 4 heads, keys, values and scores of 2."""
    query = torch.randn(2, 4, n, 6, dtype=torch.float64)
    key, value = (torch.randn(2, 2, m, 6, dtype=torch.float64) for _ in range(2))
    scores = torch.randn(2, 2, m, dtype=torch.float64)
    return [query, key, value, scores.round() if ties else scores]


def kept_by_loops(scores: Tensor, n: int, keep: int, real: Tensor) -> Tensor:
    """(b, g, n, m) of a causal attention; of equal scores the latest key is kept."""
    batch, groups, m = scores.shape
    kept = torch.zeros(batch, groups, n, m, dtype=torch.bool)
    for b in range(batch):
        for g in range(groups):
            for i in range(n):
                seen = [j for j in range(i + m - n + 1) if real[b, j]]
                best = sorted(seen, key=lambda j: (float(scores[b, g, j]), j))[-keep:]
                kept[b, g, i, best] = True
    return kept


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 13),
    more=st.integers(0, 9),
    keep=st.integers(1, 7),
    block=st.integers(1, 6),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_running_top_is_a_sort_for_every_query(n, more, keep, block, ties, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = n + more
    scores = torch.randn(2, 3, m, generator=generator)
    scores = scores.round() if ties else scores
    real = torch.rand(2, m, generator=generator) < 0.7
    index, chosen = running_top(scores, real, n, keep, block, 0)
    found = torch.zeros(2, 3, index.shape[2] * block, m, dtype=torch.int64)
    for t in range(index.shape[2]):
        rows = slice(t * block, (t + 1) * block)
        where = index[:, :, t, None].expand(chosen[:, :, t].shape)
        found[:, :, rows] = found[:, :, rows].scatter_add(-1, where, chosen[:, :, t].long())
    expected = kept_by_loops(scores, n, keep, real)
    assert torch.equal(found[:, :, :n], expected.long())
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    assert torch.equal(keep_most(scores, causal & real[:, None, None], keep), expected)


def test_running_top_is_a_good_operator() -> None:
    scores, real = torch.randn(2, 3, 20), torch.rand(2, 20) < 0.8
    torch.library.opcheck(running_top, (scores, real, 15, 4, 6, 0))
    torch.library.opcheck(running_top, (scores, real, 15, 4, 6, 1))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(150, 150), (70, 150), (1, 100), (128, 128)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_equal_the_whole_map_with_gradients(n: int, m: int, ties, padded) -> None:
    given = draw(n, m, ties=ties)
    real = (torch.arange(m) < torch.tensor([[m], [m - 20]])) if padded else None
    results = []
    for mask in (None, torch.ones(1, 1, n, m, dtype=torch.bool)):  # a mask takes the whole map
        leaves = [x.clone().requires_grad_() for x in given]
        out = dynamic_mask_attention(*leaves, keep=9, causal=True, mask=mask, padding_mask=real)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
def test_one_set_of_keys_equals_the_whole_map(padded) -> None:
    given = draw(7, 30, ties=True)
    real = (torch.arange(30) < torch.tensor([[30], [4]])) if padded else None
    whole = torch.ones(1, 1, 7, 30, dtype=torch.bool)
    results = []
    for mask in (None, whole):
        leaves = [x.clone().requires_grad_() for x in given]
        out = dynamic_mask_attention(*leaves, keep=9, mask=mask, padding_mask=real)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", [False, True])
def test_a_step_of_decoding_keeps_what_a_sort_keeps(dtype, ties: bool) -> None:
    scores = torch.randn(3, 2, 50, dtype=dtype)
    if ties:
        scores = scores.round() * torch.where(torch.rand(50) < 0.5, 1.0, -1.0)  # also -0.0
    scores[1, 1, 7:40] = -torch.inf
    for keep in (1, 9, 50):
        order = sorted(range(50), key=lambda j: (float(scores[0, 1, j]), j))[-keep:]
        assert latest_largest(scores, keep)[0, 1].tolist() == sorted(order)
    index = latest_largest(scores, 9)
    assert torch.equal(index.sort(-1).values, index)
    kept = torch.zeros(3, 2, 50, dtype=torch.bool).scatter(-1, index, True)
    assert torch.equal(kept, keep_most(scores, torch.ones(1, 1, 1, 50).bool(), 9)[:, :, 0])


class Sorted(TorchDispatchMode):
    """The longest row that is sorted."""

    longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "sort" in str(func):
            self.longest = max(self.longest, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def test_a_step_of_decoding_sorts_no_more_than_it_keeps() -> None:
    query, key, scores = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 300, 8), torch.randn(1, 2, 300)
    with Sorted() as found:
        dynamic_mask_attention(query, key, key, scores, keep=9, causal=True)
    assert found.longest == 9


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [None, 2])
def test_heads_with_masks_of_their_own_keep_keys_of_their_own(causal, block_size) -> None:
    query = torch.randn(2, 4, 7, 3, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 3, dtype=torch.float64)
    scores, mask = torch.randn(2, 2, 9, dtype=torch.float64), torch.rand(2, 4, 7, 9) < 0.7
    options = {"keep": 3, "causal": causal, "block_size": block_size}
    found = dynamic_mask_attention(query, key, value, scores, mask=mask, **options)
    for head in range(4):
        one = [x[:, head // 2, None] for x in (key, value, scores)]
        alone = dynamic_mask_attention(
            query[:, head, None], *one, mask=mask[:, head, None], **options
        )
        torch.testing.assert_close(found[:, head, None], alone)


def test_as_many_keys_are_kept_as_in_the_published_models() -> None:
    assert DynamicMaskAttention(12, heads=2).keep == 2048


DOGE = {
    "20M": (256, 8, 2, 1, 13_118_728),
    "60M": (512, 16, 4, 2, 54_571_552),
    "160M": (768, 24, 6, 3, 152_676_168),
    "320M": (1024, 32, 8, 4, 335_750_272),
}


@pytest.mark.parametrize("name", DOGE)
def test_published_language_models_have_their_numbers_of_parameters(name: str) -> None:
    """All attentions are ours; the rest of a language model by its list."""
    dim, layers, heads, kv_heads, published = DOGE[name]
    with torch.device("meta"):
        attention = DynamicMaskAttention(dim, heads=heads, kv_heads=kv_heads)
    own = sum(p.numel() for p in attention.parameters())
    feed_forward = 3 * dim * 2 * dim  # gate, up, down
    total = layers * (own + feed_forward + 4 * dim)  # two norms, two weights of residuals
    assert total + 32768 * dim + dim == published  # tied words, the last norm


def test_keeping_all_keys_is_attention_with_the_scores_as_a_bias() -> None:
    query, key, value, scores = draw(20, 20)
    out = dynamic_mask_attention(query, key, value, scores, keep=20, causal=True)
    bias = scores.repeat_interleave(2, dim=1)[:, :, None]
    torch.testing.assert_close(out, attend(query, key, value, bias=bias, causal=True))
    none = dynamic_mask_attention(query, key, value, 0 * scores, keep=20, causal=True)
    torch.testing.assert_close(none, attend(query, key, value, causal=True))


def test_every_row_keeps_as_many_keys_as_it_can() -> None:
    query, key, value, scores = draw(12, 12)
    site = Attend()
    with observe(site) as record:
        dynamic_mask_attention(query, key, value, scores, keep=5, causal=True, site=site)
    counts = (record[""] > 0).sum(-1)
    expected = torch.arange(1, 13).clamp(max=5).expand(2, 4, 12)
    assert torch.equal(counts, expected)


def test_the_future_takes_no_place_among_kept_keys() -> None:
    """A key to come with the largest score of all changes no earlier row by a bit."""
    query, key, value, scores = draw(200, 200)
    before = dynamic_mask_attention(query, key, value, scores, keep=6, causal=True)
    loud = scores.clone()
    loud[..., 120] = 50.0
    after = dynamic_mask_attention(query, key, value, loud, keep=6, causal=True)
    assert torch.equal(before[:, :, :120], after[:, :, :120])
    assert not torch.equal(before[:, :, 120:], after[:, :, 120:])


def test_equal_scores_keep_the_latest_keys() -> None:
    query, key, value, scores = draw(100, 100)
    out = dynamic_mask_attention(query, key, value, 0 * scores, keep=4, causal=True)
    away = torch.arange(100)[:, None] - torch.arange(100)
    window = (away >= 0) & (away < 4)
    torch.testing.assert_close(out, attend(query, key, value, mask=window))


def test_keys_that_nobody_keeps_get_no_gradient_but_scores_and_strength_do() -> None:
    given = [x.requires_grad_() for x in draw(100, 100)]
    query, key, value, scores = given
    out = dynamic_mask_attention(query, key, value, scores, keep=5, causal=True)
    gradients = torch.autograd.grad(out.sin().sum(), given)
    real = torch.ones(2, 100, dtype=torch.bool)
    kept = kept_by_loops(scores.detach(), 100, 5, real).any(2)
    assert bool((~kept).any())
    for gradient in gradients[1:3]:
        assert bool((gradient[~kept] == 0).all())
        assert bool((gradient[kept] != 0).any())
    module = DynamicMaskAttention(12, heads=2, keep=3)
    module(torch.randn(1, 9, 12)).sin().sum().backward()
    assert bool(module.strength.grad.ne(0).all())
    assert bool(module.score.weight.grad.ne(0).any())


@pytest.mark.parametrize("length", [3, 4, 5, 12, 90])
@pytest.mark.parametrize("form", ["exp", "linear"])
def test_decoding_token_by_token_equals_one_forward(length: int, form: str) -> None:
    module = DynamicMaskAttention(
        12, heads=4, kv_heads=2, keep=4, head_dim=4, form=form, rotary=RotaryPositions(4)
    ).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    x[:, length // 2] = x[:, 0]  # equal values, equal scores
    with torch.no_grad():
        whole = module(x)
        cache = module.new_cache(2, length)
        parts = [module(x[:, t : t + 1], cache=cache) for t in range(length)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        twin = cache.clone()
        twin.crop(2)
        twin.reorder(torch.tensor([1, 0]))
        again = module(x[[1, 0], 2:], cache=twin)
        torch.testing.assert_close(again, whole[[1, 0], 2:])
        assert cache.length == length


def test_blocks_of_keys_are_kept_by_majority() -> None:
    kept = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 1, 0], dtype=torch.bool)
    expected = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(keep_blocks(kept, 4), expected)
    query, key, value, scores = draw(30, 30)
    site = Attend()
    with observe(site) as record:
        dynamic_mask_attention(
            query, key, value, scores, keep=9, causal=True, block_size=4, site=site
        )
    causal = torch.ones(30, 30, dtype=torch.bool).tril()
    expected = keep_blocks(keep_most(scores, causal, 9), 4, torch.arange(30) + 1) & causal
    assert torch.equal(record[""] > 0, expected.repeat_interleave(2, dim=1))
    assert bool(expected[:, :, :9].any(-1).all())  # a query that keeps all that it can see
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        keep_blocks(kept, 0)


def test_decoding_keeps_the_blocks_of_the_whole_call() -> None:
    torch.manual_seed(4)
    module = DynamicMaskAttention(12, heads=3, keep=6, block_size=4).double().eval()
    x = torch.randn(2, 15, 12, dtype=torch.float64)
    cache = module.new_cache(2, 15)
    with torch.no_grad():
        whole = module(x)
        torch.testing.assert_close(module(x[:, :6]), whole[:, :6])
        steps = [module(x[:, at : at + step], cache=cache) for at, step in ((0, 5), (5, 1), (6, 9))]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_operations_grow_with_what_is_kept_not_with_the_length() -> None:
    counts = []
    for n in (10 * BLOCK, 20 * BLOCK):
        query, key = (torch.randn(1, h, n, 8) for h in (4, 2))
        site = Attend(impl="reference")  # whose operations are counted
        with FlopCounterMode(display=False) as counter:
            dynamic_mask_attention(
                query, key, key, torch.randn(1, 2, n), keep=16, causal=True, site=site
            )
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0]
    assert counts[0] == 2 * 2 * 4 * 10 * BLOCK * (16 + BLOCK) * 8


@pytest.mark.parametrize("implementation", ["dynamic", "exact, with the same map"])
def test_twice_the_tokens_cost_twice_and_not_four_times(implementation: str) -> None:
    """4096 and 8192 tokens, 128 keys: counted on tensors without numbers."""
    counts = []
    for n in (4096, 8192):
        query, key = (torch.randn(1, h, n, 8, device="meta") for h in (4, 2))
        scores = torch.randn(1, 2, n, device="meta")
        site = Attend(impl="reference")  # whose operations are counted
        with FlopCounterMode(display=False) as counter:
            if implementation == "dynamic":
                dynamic_mask_attention(query, key, key, scores, keep=128, causal=True, site=site)
            else:
                mask = torch.ones(1, 1, n, n, dtype=torch.bool, device="meta")
                dynamic_mask_attention(
                    query, key, key, scores, keep=128, causal=True, mask=mask, site=site
                )
        counts.append(counter.get_total_flops())
    if implementation == "dynamic":
        assert counts[1] / counts[0] == pytest.approx(2.0, abs=0.05)  # up to a part of a block
    else:
        assert counts[1] == 4 * counts[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [None, 4])
def test_positive_scores_are_kept_and_no_others(causal: bool, block_size: int | None) -> None:
    query, key, value, scores = given = [x.requires_grad_() for x in draw(9, 12, ties=True)]
    real = torch.arange(12) < torch.tensor([[12], [7]])
    options = {"causal": causal, "padding_mask": real, "block_size": block_size}
    out = dynamic_mask_attention(*given, keep="positive", **options)
    allowed = real[:, None, None] & (
        torch.ones(9, 12, dtype=torch.bool).tril(3) if causal else torch.tensor(True)
    )
    kept = torch.zeros(2, 2, 9, 12, dtype=torch.bool)
    for b, g, i, j in torch.ones_like(kept).nonzero().tolist():
        kept[b, g, i, j] = bool(scores[b, g, j] > 0) and bool(
            allowed.expand(2, 1, 9, 12)[b, 0, i, j]
        )
    assert torch.equal(keep_positive(scores, allowed.expand(2, 1, 9, 12)), kept)
    if block_size is not None:
        kept = keep_blocks(kept, block_size, torch.arange(4, 13) if causal else None) & allowed
    both = (x.repeat_interleave(2, dim=1) for x in (kept, scores[:, :, None]))
    expected = attend(query, key, value, **dict(zip(("mask", "bias"), both, strict=True)))
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out.sin().sum(), given)
    wanted = torch.autograd.grad(expected.sin().sum(), given)
    torch.testing.assert_close(gradients, wanted)
    assert bool((gradients[3][~kept.any(2)] == 0).all())


def test_learned_scores_have_one_sign_per_head() -> None:
    """Why the module has no such option: a head would keep every key or none."""
    module = DynamicMaskAttention(12, heads=4, keep=3, form="linear")
    value = torch.randn(2, 4, 9, 3)
    scores = dynamic_scores(value, module.score.weight, None, module.strength, form="linear")
    assert torch.equal(scores > 0, (module.strength > 0)[:, None].expand(2, 4, 9))


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    query, key, value, scores = draw(5, 5)
    for options, said in (
        ({"keep": 0}, "keep must be at least 1"),
        ({"keep": "largest"}, "or 'positive', got 'largest'"),
        ({"keep": "positive", "causal": True, "gather": "torch"}, "a number of kept keys"),
        ({"gather": "flex"}, "with block_size and without mask"),
        ({"padding_mask": torch.ones(2, 4, dtype=torch.bool)}, "padding_mask must be"),
    ):
        with pytest.raises(ValueError, match=said):
            dynamic_mask_attention(query, key, value, scores, **{"keep": 2, **options})
    with pytest.raises(TypeError, match="mask must be boolean"):
        dynamic_mask_attention(query, key, value, scores, keep=2, mask=torch.ones(5, 5))
    with pytest.raises(ValueError, match="scores must be"):
        dynamic_mask_attention(query, key, value, scores[:, :1], keep=2)
    for options, said in (
        ({"keep": 0}, "keep must be"),
        ({"keep": 2, "form": "log"}, "form must be one of"),
        ({"keep": 2, "block_size": 0}, "block_size must be"),
        ({"keep": 2, "context_dim": 5}, "self-attention only"),
    ):
        with pytest.raises(ValueError, match=said):
            DynamicMaskAttention(12, heads=2, **options)
    module = DynamicMaskAttention(12, heads=2, keep=2)
    with pytest.raises(ValueError, match="no order with the tokens"):
        module(torch.randn(1, 3, 12), torch.randn(1, 4, 12))


def test_gathering_by_indices_gives_the_same() -> None:
    options = {"heads": 4, "kv_heads": 2, "keep": 3}
    plain = DynamicMaskAttention(16, **options)
    other = DynamicMaskAttention(16, gather="torch", **options)
    other.load_state_dict(plain.state_dict())
    x, real = torch.randn(2, 90, 16), torch.ones(2, 90, dtype=torch.bool)
    real[0, 80:] = False
    found, wanted = (
        [
            y := module(x, padding_mask=real),
            *torch.autograd.grad(y.square().sum(), module.parameters()),
        ]
        for module in (other, plain)
    )
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.bad_input
def test_gathering_by_indices_serves_causal_calls() -> None:
    crossing = DynamicMaskAttention(16, heads=4, keep=3, causal=False, gather="torch")
    with pytest.raises(ValueError, match="gather='torch' serves causal=True"):
        crossing(torch.randn(1, 9, 16))


@pytest.mark.parametrize(("pairs", "pieces"), [(1, 6), (700, 3), (10**9, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_in_pieces_are_blocks_at_once(
    pairs: int, pieces: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heed_core.attention.dynamic_mask.PAIRS", pairs)
    monkeypatch.setattr("heed_core.attention.dynamic_mask.BLOCK", 7)
    torch.manual_seed(0)
    query = torch.randn(2, 40, 4, 8, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, 2, 45, 2, 8, dtype=torch.float64).transpose(2, 3)
    scores = torch.rand(2, 2, 45, dtype=torch.float64)
    real = torch.arange(45) >= torch.tensor([[0], [11]]) if padded else None
    given = {"keep": 5, "causal": True, "padding_mask": real}
    wanted = dynamic_mask_attention(
        query, key, value, scores, mask=torch.ones(1, 1, dtype=torch.bool), **given
    )
    site, calls = Attend(), []
    site.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = dynamic_mask_attention(query, key, value, scores, site=site, **given)
        assert len(calls) == pieces
        dense = dynamic_mask_attention(query, key.contiguous(), value.contiguous(), scores, **given)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(dense, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exponential_scores_that_overflow_leave_no_nan(dtype: torch.dtype) -> None:
    attention = DynamicMaskAttention(8, heads=2, keep=3, qkv_bias=True).to(dtype)
    with torch.no_grad():
        attention.strength.fill_(2.0)
        attention.score.bias.fill_(60.0)
    x = torch.randn(2, 6, 8, dtype=dtype, requires_grad=True)
    found = attention(x)
    found.sum().backward()
    assert found.isfinite().all()
    assert x.grad.isfinite().all()
