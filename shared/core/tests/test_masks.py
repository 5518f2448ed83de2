"""Mask builders against double loops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from heed_core import masks

small = st.integers(0, 7)
reach = st.none() | st.integers(0, 4)


def table(n: int, m: int, sees) -> torch.Tensor:
    return torch.tensor([[bool(sees(i, j)) for j in range(m)] for i in range(n)]).reshape(n, m)


@given(n=small, m=small)
def test_causal(n, m) -> None:
    assert torch.equal(masks.causal(n, m), table(n, m, lambda i, j: j <= i + m - n).bool())
    assert torch.equal(masks.causal(n), masks.causal(n, n))


@given(n=small, m=small, left=reach, right=reach)
def test_window(n, m, left, right) -> None:
    def sees(i: int, j: int) -> bool:
        own = i + m - n
        return (left is None or j >= own - left) and (right is None or j <= own + right)

    found = masks.window(n, m, left=left, right=right)
    assert torch.equal(found, table(n, m, sees).bool())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_window_nd(shape, data) -> None:
    far = data.draw(st.lists(st.integers(0, 3), min_size=len(shape), max_size=len(shape)))
    cells = list(itertools.product(*(range(size) for size in shape)))

    def sees(i: int, j: int) -> bool:
        return all(abs(a - b) <= r for a, b, r in zip(cells[i], cells[j], far, strict=True))

    found = masks.window_nd(shape, reach=far)
    assert torch.equal(found, table(len(cells), len(cells), sees))
    assert torch.equal(
        masks.window_nd(shape, reach=1), masks.window_nd(shape, reach=[1] * len(shape))
    )


def test_window_of_a_wide_grid_is_not_that_of_a_tall_one() -> None:
    wide = masks.window_nd((2, 3), reach=(0, 1))
    expected = torch.block_diag(*[masks.window(3, left=1, right=1).int()] * 2).bool()
    assert torch.equal(wide, expected)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(0, 6))
def test_padding(lengths, m) -> None:
    found = masks.padding(torch.tensor(lengths), m)
    assert found.shape == (len(lengths), 1, 1, m)
    for b, j in itertools.product(range(len(lengths)), range(m)):
        assert bool(found[b, 0, 0, j]) == (j < lengths[b])


@given(st.lists(st.integers(0, 3), max_size=4))
def test_blocks(sizes) -> None:
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    expected = table(len(owner), len(owner), lambda i, j: owner[i] == owner[j]).bool()
    assert torch.equal(masks.blocks(sizes), expected)
    ids = torch.tensor([owner], dtype=torch.long)
    assert torch.equal(masks.documents(ids)[0, 0], expected)


def test_documents_of_queries_and_keys() -> None:
    found = masks.documents(torch.tensor([[0, 1]]), torch.tensor([[1, 1, 0]]))
    assert found.tolist() == [[[[False, False, True], [True, True, False]]]]


@given(n=small, data=st.data())
def test_prefix(n, data) -> None:
    length = data.draw(st.integers(0, 8))
    found = masks.prefix(n, torch.tensor([length]))
    assert torch.equal(found[0, 0], table(n, n, lambda i, j: j <= i or j < length).bool())


def test_keys_and_combine() -> None:
    real = torch.tensor([[True, False, True]])
    both = masks.combine(masks.keys(real), None, masks.causal(2, 3))
    assert both.tolist() == [[[[True, False, False], [True, False, True]]]]
    assert masks.combine(None, None) is None
    assert masks.combine() is None
    assert masks.combine(real) is real


def test_builders_follow_the_device() -> None:
    made = [
        masks.causal(2, 3, device="meta"),
        masks.window(2, 3, left=1, device="meta"),
        masks.window_nd((2, 3), reach=1, device="meta"),
        masks.blocks([1, 2], device="meta"),
        masks.padding(torch.ones(2, dtype=torch.long, device="meta"), 3),
    ]
    assert {mask.device.type for mask in made} == {"meta"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.causal(-1), ValueError, "n must not be negative"),
        (lambda: masks.window(2, left=-1), ValueError, "left must not be negative"),
        (lambda: masks.window_nd((2, 2), reach=[1]), ValueError, "one number per axis"),
        pytest.param(
            lambda: masks.padding(torch.ones(2), 3),
            TypeError,
            "lengths must be integers",
            marks=pytest.mark.bad_input,
        ),
        pytest.param(
            lambda: masks.padding(torch.ones(2, 2).long(), 3),
            ValueError,
            "lengths must have shape",
            marks=pytest.mark.bad_input,
        ),
        (lambda: masks.blocks([2, -1]), ValueError, "size must not be negative"),
        pytest.param(
            lambda: masks.keys(torch.ones(2, 3)),
            TypeError,
            "real must be boolean",
            marks=pytest.mark.bad_input,
        ),
        pytest.param(
            lambda: masks.keys(torch.ones(3) > 0),
            ValueError,
            "real must have shape",
            marks=pytest.mark.bad_input,
        ),
        pytest.param(
            lambda: masks.combine(torch.ones(2, 2)),
            TypeError,
            "masks must be boolean",
            marks=pytest.mark.bad_input,
        ),
        pytest.param(
            lambda: masks.combine(torch.ones(2) > 0, torch.ones(3) > 0),
            ValueError,
            "do not broadcast",
            marks=pytest.mark.bad_input,
        ),
        pytest.param(
            lambda: masks.documents(torch.ones(3).long()),
            ValueError,
            "query_ids and key_ids",
            marks=pytest.mark.bad_input,
        ),
    ],
)
def test_bad_arguments_are_named(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
