"""The oracle itself, against numbers worked out by hand."""

import math

import pytest
import torch

from heed_core.testing.oracle import assert_within_budget, error_budget, naive_attention


def test_two_keys_by_hand() -> None:
    # scores ln 3 and 0 -> weights 3/4 and 1/4
    query = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[math.log(3), 9.0], [0.0, 9.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[8.0], [4.0]]]], dtype=torch.float64)
    assert float(naive_attention(query, key, value, scale=1.0)) == pytest.approx(7.0)
    halved = naive_attention(query, key, value)  # scale 2 ** -0.5
    share = math.exp(math.log(3) / 2**0.5)
    assert float(halved) == pytest.approx((8 * share + 4) / (share + 1))
    bias = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    assert float(naive_attention(query, key, value, scale=1.0, bias=bias)) == pytest.approx(6.0)
    mask = torch.tensor([False, True])
    assert float(naive_attention(query, key, value, mask=mask)) == 4.0
    assert float(naive_attention(query, key, value, mask=mask & False)) == 0.0


def test_causality_and_groups_by_hand() -> None:
    query, key = torch.zeros(1, 4, 2, 1), torch.zeros(1, 2, 3, 1)
    value = torch.tensor([[[[3.0], [6.0], [9.0]], [[0.0], [2.0], [7.0]]]])
    out = naive_attention(query, key, value, causal=True)[0, ..., 0]
    # query 0 sees keys 0 and 1, query 1 all three; heads 0, 1 read group 0, heads 2, 3 group 1
    expected = torch.tensor([[4.5, 6.0], [4.5, 6.0], [1.0, 3.0], [1.0, 3.0]])
    torch.testing.assert_close(out, expected)


def test_the_budget_rejects_what_is_worse_than_eager() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = torch.tensor([1.0, 2.0 + 1e-3])
    budget = error_budget(exact, eager)
    assert budget == pytest.approx(2 * (1e-3 + 2 * 2**-23), rel=1e-3)
    assert_within_budget(exact.float() + 1.9e-3, exact=exact, eager=eager)
    for wrong in (exact.float() + 2.1e-3, torch.tensor([1.0, torch.nan]), torch.ones(3)):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, exact=exact, eager=eager)
