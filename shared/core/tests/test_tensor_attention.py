"""Tensor attention: tiles, masks, limits, polynomials."""

import math

import pytest
import torch
from torch import Tensor

from heed_core.attend import attend
from heed_core.attention.tensor import (
    TensorAttention,
    khatri_rao,
    poly_features,
    poly_pays,
    poly_weights,
    taylor_error,
    tensor_attention,
    tensor_attention_poly,
)
from heed_core.kernels import pair_softmax as kernel
from heed_core.testing.memory import peak_bytes


def draw(n: int = 7, n1: int = 9, n2: int = 6, *, size: float = 1.0) -> list[Tensor]:
    lengths = (n, n1, n2, n1, n2)
    return [size * (2 * torch.rand(2, 2, length, 4).double() - 1) for length in lengths]


def by_einsum(rows: list[Tensor], hidden: Tensor | None = None) -> Tensor:
    query, key1, key2, value1, value2 = rows
    scores = torch.einsum("bhic,bhjc,bhkc->bhijk", query, key1, key2) / query.shape[3]
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.flatten(3).softmax(-1).nan_to_num(0.0).reshape(scores.shape)
    return torch.einsum("bhijk,bhjc,bhkc->bhic", weights, value1, value2)


@pytest.mark.parametrize("tile", [2, 5, 32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
def test_tiles_equal_the_whole_tensor(monkeypatch, tile: int, causal, distinct) -> None:
    monkeypatch.setattr(kernel, "TILE", tile)
    monkeypatch.setattr(kernel, "LONG_TILE", tile + 1)
    rows = draw()
    mask1, mask2 = torch.rand(2, 1, 7, 9) < 0.7, torch.rand(2, 2, 1, 6) < 0.7
    mask1[0, 0, 2] = False
    j, k, i = torch.arange(9)[:, None], torch.arange(6), torch.arange(7)[:, None, None]
    hidden = ~(mask1[..., None] & mask2[..., None, :])
    if causal:
        hidden = hidden | (j > i + 2) | (k > i - 1)
    if distinct:
        hidden = hidden | (j == k)
    out = tensor_attention(*rows, mask1=mask1, mask2=mask2, causal=causal, distinct=distinct)
    torch.testing.assert_close(out, by_einsum(rows, hidden), rtol=0, atol=1e-12)
    assert bool((out[0, :, 2] == 0).all())


def test_gradients_of_the_operator() -> None:
    rows = [x[:1, :, :4].requires_grad_() for x in draw()]
    mask = torch.rand(1, 1, 4, 4) < 0.7
    torch.autograd.gradcheck(
        lambda *given: tensor_attention(*given, mask1=mask, causal=True, distinct=True), rows
    )
    given = (*rows, mask, None, True, True, 0.25, False)
    torch.library.opcheck(kernel.pair_softmax, given)


def test_one_second_key_of_ones_is_softmax_attention() -> None:
    query, key, _, value, _ = draw()
    one = torch.ones(2, 2, 1, 4, dtype=torch.float64)
    found = tensor_attention(query, key, one, value, one)
    torch.testing.assert_close(found, attend(query, key, value, scale=0.25))


def test_keys_of_both_kinds_may_be_reordered() -> None:
    query, key1, key2, value1, value2 = draw()
    one, two = torch.randperm(9), torch.randperm(6)
    plain = tensor_attention(query, key1, key2, value1, value2)
    moved = tensor_attention(
        query, key1[:, :, one], key2[:, :, two], value1[:, :, one], value2[:, :, two]
    )
    torch.testing.assert_close(moved, plain)
    swapped = tensor_attention(query, key2, key1, value2, value1)
    torch.testing.assert_close(swapped, plain)


def test_products_of_half_precision_do_not_overflow() -> None:
    rows = [60.0 * x.to(torch.float16) for x in draw()]
    out = tensor_attention(*rows)
    assert out.dtype == torch.float16
    small = [x.double() for x in rows]
    torch.testing.assert_close(out.double(), by_einsum(small), rtol=2e-3, atol=2.0)


def test_khatri_rao_makes_all_pairs() -> None:
    a, b = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4)
    found = khatri_rao(a, b)
    assert found.shape == (1, 1, 15, 4)
    assert torch.equal(found[0, 0, 7], a[0, 0, 1] * b[0, 0, 2])


@pytest.mark.parametrize(("width", "degree"), [(4, 4), (6, 4), (3, 6)])
def test_features_are_monomials_whose_weighted_products_are_the_polynomial(width, degree) -> None:
    x, y, z = (torch.randn(width, dtype=torch.float64) for _ in range(3))
    features = [poly_features(v, degree) for v in (x, y, z)]
    assert len(features[0]) == math.comb(width + degree, degree)
    product = features[0] * features[1] * features[2]
    s = 0.3 * float((x * y * z).sum())
    wanted = sum(s**r / math.factorial(r) for r in range(degree + 1))
    found = float((poly_weights(width, degree, 0.3) * product).sum())
    assert found == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_polynomials_come_close_to_the_exact_attention(causal, distinct, padded) -> None:
    rows = draw(8, 8, 8)
    real = torch.arange(8) < torch.tensor([[8], [6]]) if padded else torch.ones(2, 8).bool()
    mask = real[:, None, None]
    exact = tensor_attention(*rows, mask1=mask, mask2=mask, causal=causal, distinct=distinct)
    errors = []
    for degree in (2, 4, 6):
        found = tensor_attention_poly(
            *rows, degree=degree, real1=real, real2=real, causal=causal, distinct=distinct
        )
        errors.append(float((found - exact).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_the_error_is_below_its_bound() -> None:
    rows = draw(8, 8, 8, size=1.0)
    scores = torch.einsum("bhic,bhjc,bhkc->bhijk", *rows[:3]) / 4
    error = taylor_error(float(scores.abs().max()), 4)
    assert 0.0 < error < 1.0
    bound = 2 * error / (1 - error) * float(rows[3].abs().max() * rows[4].abs().max())
    found = tensor_attention_poly(*rows, degree=4) - tensor_attention(*rows)
    assert float(found.abs().max()) <= bound
    assert taylor_error(0.5, 2) == pytest.approx(
        math.exp(0.5) * (math.exp(0.5) - 1 - 0.5 - 0.125), rel=1e-9
    )


def pair(method: str, **options) -> tuple[TensorAttention, TensorAttention]:
    """A module of a method, and the exact one with its weights."""
    module = TensorAttention(8, heads=4, method=method, degree=2, **options).double()
    exact = TensorAttention(8, heads=4).double()
    exact.load_state_dict(module.state_dict())
    return module, exact


def by_poly(module: TensorAttention, x: Tensor, real: Tensor | None = None) -> Tensor:
    twin = TensorAttention(8, heads=4, method="poly", degree=2).double()
    twin.load_state_dict(module.state_dict())
    return twin(x, padding_mask=real)


def test_auto_takes_the_polynomial_where_it_is_cheaper_and_close() -> None:
    """Two channels, degree 2: 6 monomials, which pay from 7 tokens on, where entries are small."""
    module, exact = pair("auto")
    long = torch.randn(2, 7, 8, dtype=torch.float64)
    for x, poly in ((long / 10, True), (long * 10, False), (long[:, :6] / 10, False)):
        wanted, other = by_poly(module, x), exact(x)
        assert not torch.equal(wanted, other)
        assert torch.equal(module(x), wanted if poly else other)


def test_padding_has_no_part_in_what_auto_decides() -> None:
    module, _ = pair("auto")
    real = torch.arange(9) < torch.tensor([[9], [6]])
    x = torch.randn(2, 9, 8, dtype=torch.float64) / 10
    loud = x.masked_fill(~real[..., None], 1e4)
    assert torch.equal(module(loud, padding_mask=real)[real], by_poly(module, loud, real)[real])


def test_a_tighter_tolerance_is_kept() -> None:
    loose, _ = pair("auto", tolerance=0.5)
    tight, _ = pair("auto", tolerance=1e-12)
    x = torch.randn(1, 9, 8, dtype=torch.float64) / 10
    assert torch.equal(loose(x), by_poly(loose, x))
    assert not torch.equal(tight(x), by_poly(tight, x))


def test_the_polynomial_pays_by_its_number_of_monomials_and_its_bound() -> None:
    query, key1, key2 = draw(7, 18, 24, size=0.1)[:3]
    assert poly_pays(query, key1, key2, degree=4)  # 6 * 70 < 18 * 24
    assert not poly_pays(query, key1[:, :, :17], key2, degree=4)
    reach = float((query.abs().amax((0, 1, 2)) * key1.abs().amax((0, 1, 2))
                   * key2.abs().amax((0, 1, 2))).sum()) / 4  # fmt: skip
    error = taylor_error(reach, 4)
    assert poly_pays(query, key1, key2, degree=4, tolerance=1.01 * error)
    assert not poly_pays(query, key1, key2, degree=4, tolerance=0.99 * error)


@pytest.mark.bad_input
def test_a_strict_module_refuses_large_entries_of_real_tokens() -> None:
    module, _ = pair("poly", strict=True)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    x = torch.randn(2, 9, 8, dtype=torch.float64) / 10
    loud = x.masked_fill(~real[..., None], 1e4)
    assert torch.equal(module(loud, padding_mask=real), by_poly(module, loud, real))
    with pytest.raises(ValueError, match=r"scores reach R=.*eps="):
        module(loud)


def test_number_of_parameters() -> None:
    module = TensorAttention(24, heads=3)
    assert sum(p.numel() for p in module.parameters()) == 6 * 24**2 + 6 * 24


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("method", ["exact", "poly", "auto"])
@torch.no_grad()
def test_decoding_equals_one_forward(method: str, distinct: bool) -> None:
    options = {} if method == "exact" else {"degree": 2}
    module = TensorAttention(
        8, heads=2, causal=True, distinct=distinct, method=method, **options
    ).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64) / 4
    real = torch.arange(9) >= torch.tensor([[0], [2]])
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if method == "auto" else {"rtol": 1e-9, "atol": 1e-10}
    whole = module(x, padding_mask=real)
    cache = module.new_cache(2, 9)
    parts = [
        module(x[:, start:stop], padding_mask=real[:, :stop], cache=cache)
        for start, stop in ((0, 4), (4, 5), (5, 5), (5, 8))
    ]
    assert cache.length == 8
    twin = cache.clone()
    parts.append(module(x[:, 8:], padding_mask=real, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], **tolerance)
    twin.reorder(torch.tensor([1, 1]))
    moved = module(x[1:, 8:].expand(2, -1, -1), padding_mask=real[1:].expand(2, -1), cache=twin)
    torch.testing.assert_close(moved, whole[1:, 8:].expand(2, -1, -1), **tolerance)
    if method == "exact":
        cache.crop(5)
        again = module(x[:, 5:], padding_mask=real, cache=cache)
        torch.testing.assert_close(again, whole[:, 5:])


@pytest.mark.bad_input
def test_a_cache_of_another_kind_is_refused() -> None:
    exact, poly = (TensorAttention(8, heads=2, causal=True, method=m) for m in ("exact", "poly"))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"must be a KVCache with method='exact'.*StateCache"):
        exact(x, cache=poly.new_cache(2, 3))
    with pytest.raises(ValueError, match=r"must be a StateCache with method='poly'.*KVCache"):
        poly(x, cache=exact.new_cache(2, 3))
    with pytest.raises(ValueError, match="serves causal=True only"):
        TensorAttention(8, heads=2)(x, cache=exact.new_cache(2, 3))
    with pytest.raises(ValueError, match="cache serves causal=True only"):
        tensor_attention_poly(*draw(6, 6, 6), cache=poly.new_cache(2, 3))


@pytest.mark.slow
def test_the_cubic_tensor_is_never_held() -> None:
    """With n = 512 and d = 16, the scores alone would take 512 MiB in float32."""
    rows = """
import torch
from heed_core.attention.tensor import tensor_attention
torch.set_num_threads(1)
rows = [torch.randn(1, 1, 512, 16, requires_grad=True) for _ in range(5)]
"""
    call = "tensor_attention(*rows).sum().backward()\n"
    cubic = "torch.einsum('bhic,bhjc,bhkc->bhijk', *rows[:3])\n"
    start = peak_bytes(rows + call.replace("rows", "[x[:, :, :8] for x in rows]"))
    assert peak_bytes(rows + call) - start < 300e6
    assert peak_bytes(rows + cubic) - start > 500e6


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    rows = draw()
    with pytest.raises(ValueError, match="degree must be even"):
        tensor_attention_poly(*rows, degree=3)
    with pytest.raises(ValueError, match="distinct needs as many"):
        tensor_attention_poly(*rows, distinct=True)
    with pytest.raises(ValueError, match="causal needs as many"):
        tensor_attention_poly(*rows, causal=True)
    with pytest.raises(ValueError, match=r"scores reach R=.*eps="):
        tensor_attention_poly(*[9 * x for x in rows], strict=True)
    with pytest.raises(ValueError, match="mask1 must be broadcastable"):
        tensor_attention(*rows, mask1=torch.ones(7, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask2 must be boolean"):
        tensor_attention(*rows, mask2=torch.ones(7, 6))
    with pytest.raises(ValueError, match="key2 must be"):
        tensor_attention(rows[0], rows[1], rows[2][..., :3], rows[3], rows[4])
    with pytest.raises(ValueError, match="value2 must have"):
        tensor_attention(*rows[:4], rows[4][:, :, :-1])
    with pytest.raises(ValueError, match="method must be one of"):
        TensorAttention(12, heads=3, method="fast")
    with pytest.raises(ValueError, match="degree must be even"):
        TensorAttention(12, heads=3, degree=5)
    with pytest.raises(ValueError, match="strict=True has no effect"):
        TensorAttention(12, heads=3, strict=True)
    with pytest.raises(ValueError, match=r"tolerance=0\.1 has no effect"):
        TensorAttention(12, heads=3, method="poly", tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1"):
        TensorAttention(12, heads=3, method="auto", tolerance=2.0)


def test_the_default_device_is_not_that_of_a_call() -> None:
    attention = TensorAttention(12, heads=3, causal=True, method="poly", degree=2)
    x = torch.randn(1, 4, 12)
    wanted = attention(x)
    with torch.device("meta"):
        assert torch.equal(attention(x), wanted)
