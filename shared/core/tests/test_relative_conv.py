"""Relative convolutional attention: positions, convolutions, memory, decoding."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heed_core import observe
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.relative_conv import (
    ConvKVCache,
    RelativeConvAttention,
    depthwise_conv,
    relative_conv_attention,
    relative_scores,
)


def build(**options) -> RelativeConvAttention:
    module = RelativeConvAttention(12, heads=3, **{"max_distance": 32, **options}).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def shifted(terms: Tensor, keys: int) -> Tensor:
    """The published way: row i moves right by i, then the last columns are kept."""
    batch, heads, queries, width = terms.shape
    padded = torch.cat([terms, terms.new_zeros(batch, heads, queries, 1)], dim=-1)
    flat = padded.reshape(batch, heads, width + 1, queries)
    return flat[:, :, :-1].reshape(batch, heads, queries, width)[..., -keys:]


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (6, 6), (1, 4)])
def test_offsets_by_index_are_those_of_the_shift_trick(queries: int, keys: int) -> None:
    query = torch.randn(2, 3, queries, 4).double()
    table, bias = torch.randn(40, 3, 4).double(), torch.randn(40, 3).double()
    rows = slice(20 - keys, 20 + queries)
    terms = query @ table[rows].permute(1, 2, 0) + bias[rows].T[:, None]
    found = relative_scores(query, table, bias, keys)
    torch.testing.assert_close(found, shifted(terms, keys))


def test_every_score_is_that_of_its_offset() -> None:
    query = torch.randn(1, 2, 4, 3).double()
    table, bias = torch.randn(20, 2, 3).double(), torch.randn(20, 2).double()
    found = relative_scores(query, table, bias, 7)
    for h in range(2):
        for i in range(4):
            for j in range(7):
                row = 10 + j - (i + 3)
                wanted = query[0, h, i] @ table[row, h] + bias[row, h]
                torch.testing.assert_close(found[0, h, i, j], wanted)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_the_causal_convolution_is_torch_s_with_zeros_before(kernel: int) -> None:
    x = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    weight, bias = torch.randn(4, kernel).double(), torch.randn(4).double()
    found = depthwise_conv(x, weight, bias)
    rows = x.transpose(2, 3).flatten(0, 1)
    wanted = F.conv1d(F.pad(rows, (kernel - 1, 0)), weight[:, None], bias, groups=4)
    torch.testing.assert_close(found.flatten(0, 1).transpose(1, 2), wanted)
    if kernel % 2:
        found = depthwise_conv(x, weight, bias, causal=False)
        wanted = F.conv1d(rows, weight[:, None], bias, groups=4, padding="same")
        torch.testing.assert_close(found.flatten(0, 1).transpose(1, 2), wanted)


def test_idle_tables_and_identity_kernels_are_plain_attention() -> None:
    module = build()
    for parameter in (module.offset_embedding, module.offset_bias, module.query_bias):
        torch.nn.init.zeros_(parameter)
    for conv in (module.query_conv, module.key_conv, module.value_conv):
        torch.nn.init.zeros_(conv.bias)
        with torch.no_grad():
            conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand(4, 3))
    plain = MultiHeadAttention(12, heads=3, causal=True).double()
    zeros = {n: torch.zeros_like(x) for n, x in plain.state_dict().items()}
    state = module.state_dict()
    plain.load_state_dict({n: state.get(n, x) for n, x in zeros.items()})
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("conv_context", ["memory", "segment"])
def test_tokens_to_come_change_nothing(conv_context: str) -> None:
    module = build(conv_context=conv_context)
    x, memory = torch.randn(1, 6, 12).double(), torch.randn(1, 4, 12).double()
    loud = x.clone()
    loud[:, 4:] = 1e3
    assert torch.equal(module(x, memory)[:, :4], module(loud, memory)[:, :4])


def test_a_segment_after_its_whole_past_is_the_end_of_one_long_pass() -> None:
    module, x = build(), torch.randn(2, 11, 12, dtype=torch.float64)
    whole = module(x)
    torch.testing.assert_close(module(x[:, 6:], x[:, :6]), whole[:, 6:])
    torch.testing.assert_close(module(x[:, 1:], x[:, :1]), whole[:, 1:])
    official = build(conv_context="segment")
    official.load_state_dict(module.state_dict())
    assert not torch.allclose(official(x[:, 6:], x[:, :6]), whole[:, 6:])


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_decoding_token_by_token_equals_one_forward(kernel: int) -> None:
    module, x = build(kernel=kernel), torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        cache = module.new_cache(2, 9)
        parts = [module(x[:, :4], cache=cache)]
        twin = cache.clone()
        parts += [module(x[:, t : t + 1], cache=cache) for t in range(4, 9)]
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        twin.reorder(torch.tensor([1, 0]))
        torch.testing.assert_close(module(x[[1, 0], 4:], cache=twin), whole[[1, 0], 4:])
        cache.crop(0)
        torch.testing.assert_close(module(x, cache=cache), whole)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("rollback", [0, 4, 16])
def test_tokens_can_be_taken_back(kernel: int, rollback: int) -> None:
    """Every length that can be cropped to, some of them twice, then decoded again."""
    module, x = build(kernel=kernel), torch.randn(2, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = module(x)
        for length in (12, 11, 8, 0, *([5] if rollback == 16 else [])):
            if length and 12 - length > rollback:
                continue
            cache = module.new_cache(2, 12, rollback=rollback)
            module(x[:, :7], cache=cache)
            module(torch.cat([x[:, 7:9], -x[:, 9:]], dim=1), cache=cache)
            cache.crop(length)
            if length > 9:  # behind the wrong tokens
                cache.crop(9 if rollback else 0)
            at = cache.length
            found = module(x[:, at:10], cache=cache), module(x[:, 10:], cache=cache)
            torch.testing.assert_close(torch.cat(found, dim=1), whole[:, at:])


@pytest.mark.bad_input
def test_what_was_not_kept_cannot_be_taken_back() -> None:
    module = build()
    cache = module.new_cache(2, 20, rollback=4)
    with torch.no_grad():
        module(torch.randn(2, 12, 12, dtype=torch.float64), cache=cache)
    with pytest.raises(
        ValueError, match=r"cannot crop 12 tokens to 7: 4 can be taken back, or all"
    ):
        cache.crop(7)
    cache.crop(9)
    with pytest.raises(ValueError, match=r"cannot crop 9 tokens to 7: 1 can be taken back"):
        cache.crop(7)
    assert cache.length == 9
    with pytest.raises(ValueError, match="rollback must be at least 0"):
        module.new_cache(2, 20, rollback=-1)


def test_scores_depend_on_offsets_not_on_places() -> None:
    """The same tokens twice: the second half, seeing itself alone, has the weights of the first."""
    module = build(kernel=1)
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    twice = torch.cat([x, x], dim=1)
    halves = torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool()
    with observe(module) as record:
        module(twice, mask=halves)
    weights = record["attend"]
    torch.testing.assert_close(weights[..., :5, :5], weights[..., 5:, 5:])


def test_padding_is_zeros_to_convolutions() -> None:
    module = build(causal=False)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    real = (torch.arange(8) < 5).expand(2, 8)
    loud = x.masked_fill(~real[..., None], 1e3)
    found = module(loud, padding_mask=real)[:, :5]
    assert torch.equal(found, module(x, padding_mask=real)[:, :5])


def tensors(context: int = 2) -> tuple:
    """Queries with some rows before those that ask, keys, values, taps, u, E and beta."""
    rows = [torch.randn(2, 3, n, 4).double() for n in (5 + context, 8, 8)]
    shifts = torch.randn(4).double(), None, torch.randn(4).double()
    taps = tuple((torch.randn(4, 3).double(), bias) for bias in shifts)
    tables = [torch.randn(*shape).double() for shape in ((3, 4), (20, 3, 4), (20, 3))]
    return *rows, taps, *tables


@pytest.mark.parametrize("causal", [True, False])
def test_the_function_is_the_formula_with_gradients(causal: bool) -> None:
    query, key, value, taps, shift, table, offset_bias = tensors(context=2 if causal else 0)
    real = torch.arange(8) < torch.tensor([[8], [6]])
    leaves = [query, key, value, *(x for pair in taps for x in pair if x is not None)]
    leaves += [shift, table, offset_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    context = 2 if causal else 0

    def formula() -> Tensor:
        kept = real[:, None, :, None].double()
        asks = query * kept[:, :, -query.shape[2] :]
        q, k, v = (
            depthwise_conv(x, weight, bias, causal=causal)
            for x, (weight, bias) in zip((asks, key * kept, value * kept), taps, strict=True)
        )
        q, total = q[:, :, context:], []
        for i in range(5):
            seen = [j for j in range(8) if j <= i + 3 or not causal]
            scores = torch.stack(
                [
                    ((q[:, :, i] + shift) * k[:, :, j]).sum(-1)
                    + (q[:, :, i] * table[10 + j - i - 3]).sum(-1)
                    + offset_bias[10 + j - i - 3]
                    for j in seen
                ],
                dim=-1,
            )
            scores = (scores / 2).masked_fill(~real[:, None, seen], -torch.inf)
            total.append(torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v[:, :, seen]))
        return torch.stack(total, dim=2)

    found = relative_conv_attention(
        query, key, value, taps, shift, table, offset_bias,
        context=context, causal=causal, padding_mask=real,
    )  # fmt: skip
    wanted = formula()
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), leaves),
        torch.autograd.grad(wanted.sin().sum(), leaves),
        strict=True,
    ):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


def test_the_function_of_projected_tokens_is_the_module() -> None:
    module, x = build(), torch.randn(2, 8, 12).double()
    torch.nn.init.eye_(module.out.weight)
    torch.nn.init.zeros_(module.out.bias)
    rows = [
        layer(x).view(2, 8, 3, 4).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    ]
    convs = (module.query_conv, module.key_conv, module.value_conv)
    mixed = relative_conv_attention(
        rows[0][:, :, 1:], *rows[1:], tuple(conv.taps for conv in convs),
        module.query_bias, module.offset_embedding, module.offset_bias, context=2,
    )  # fmt: skip
    wanted = module(x[:, 3:], x[:, :3])
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), wanted)


@pytest.mark.bad_input
def test_the_function_names_what_does_not_fit() -> None:
    query, key, value, taps, shift, table, offset_bias = tensors()
    good = {
        "query": query, "key": key, "value": value, "taps": taps,
        "query_bias": shift, "embedding": table, "offset_bias": offset_bias,
    }  # fmt: skip
    relative_conv_attention(**good)
    cache = ConvKVCache(2, 3, 9, 4, tail=2)
    for changed, said in (
        ({"key": key[0]}, r"key must be \(batch, heads, tokens, channels\)"),
        ({"key": key[:, :2]}, "key must have the batch, heads and channels of query"),
        ({"value": value[:, :, 1:]}, "value must have the batch and tokens of key"),
        ({"taps": (*taps[:2], (taps[2][0][1:], None))}, r"weights of taps must be \(4, 3\)"),
        ({"query_bias": shift[:, 1:]}, r"query_bias must be \(3, 4\)"),
        ({"embedding": table[:, 1:]}, r"embedding must be \(any, 3, 4\)"),
        ({"offset_bias": offset_bias[1:]}, r"offset_bias must be \(20, 3\)"),
        (
            {"embedding": table[:10], "offset_bias": offset_bias[:10]},
            "at most max_distance=5 tokens",
        ),
        ({"context": 8}, "context must be from 0 to 7"),
        ({"padding_mask": torch.ones(2, 7).bool()}, r"padding_mask must be \(2, 8\)"),
        ({"cache": cache, "causal": False}, "cache serves causal=True only"),
    ):
        with pytest.raises(ValueError, match=said):
            relative_conv_attention(**good | changed)
    assert cache.length == 0


def test_number_of_parameters_of_the_published_layer() -> None:
    module = RelativeConvAttention(128, heads=8)
    assert sum(p.numel() for p in module.parameters()) == 1_180_224


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    for options, said in (
        ({"kernel": 0}, "kernel must be at least 1"),
        ({"kernel": 4, "causal": False}, "odd if not causal"),
        ({"max_distance": 0}, "max_distance must be"),
        ({"conv_context": "all"}, "conv_context must be one of"),
    ):
        with pytest.raises(ValueError, match=said):
            RelativeConvAttention(12, heads=3, **options)
    module, x = build(), torch.randn(1, 5, 12).double()
    with pytest.raises(ValueError, match="must be at most max_distance=32 tokens, got 35"):
        module(x, torch.randn(1, 30, 12).double())
    with pytest.raises(ValueError, match="memory must be"):
        module(x, x[..., :-1])
    with pytest.raises(ValueError, match="memory must not be given beside"):
        module(x, x, cache=module.new_cache(1, 9))
    with pytest.raises(ValueError, match="serve causal=True only"):
        build(causal=False)(x, x)
