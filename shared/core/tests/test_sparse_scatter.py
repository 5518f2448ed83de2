"""Reductions over groups of rows, and the distinct voxels of points."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.sparse import scatter_reduce_rows, unique_voxels

OPERATIONS = {
    "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
}


def loop(src: torch.Tensor, index: torch.Tensor, n: int, op: str) -> torch.Tensor:
    groups = [src[index == group] for group in range(n)]
    zeros = src.new_zeros(src.shape[1])
    return torch.stack([OPERATIONS[op](rows) if len(rows) else zeros for rows in groups])


@pytest.mark.parametrize("op", OPERATIONS)
def test_equals_a_loop_with_gradients(op: str) -> None:
    src = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(9, (40,))
    index[index == 4] = 5  # group 4 is empty
    ours, expected = scatter_reduce_rows(src, index, 9, op), loop(src, index, 9, op)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[4], torch.zeros(3, dtype=torch.float64))
    probe = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad((x * probe).sum(), src)[0] for x in (ours, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_groups_below_zero_keep_their_maximum() -> None:
    assert scatter_reduce_rows(torch.tensor([[-3.0], [-2.0]]), torch.tensor([0, 0]), 1, "max") == -2


def test_a_shared_maximum_shares_its_gradient() -> None:
    src = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    scatter_reduce_rows(src, torch.zeros(3, dtype=torch.long), 1, "max").sum().backward()
    assert src.grad.flatten().tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("op", OPERATIONS)
def test_no_rows_and_half_precision(op: str) -> None:
    empty = scatter_reduce_rows(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 3, op)
    assert torch.equal(empty, torch.zeros(3, 2))
    many = torch.full((5000, 1), 1.0, dtype=torch.bfloat16)
    found = scatter_reduce_rows(many, torch.zeros(5000, dtype=torch.long), 1, op)
    assert found.dtype == torch.bfloat16
    # adding up in bfloat16 would stop at 256
    assert found.item() == {"sum": 4992.0}.get(op, 1.0)


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="op must be one of"):
        scatter_reduce_rows(torch.ones(2, 2), torch.tensor([0, 1]), 2, "median")
    with pytest.raises(ValueError, match=r"src must be \(rows, channels\)"):
        scatter_reduce_rows(torch.ones(2, 2), torch.tensor([0]), 2, "max")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30
    )
)
def test_unique_voxels_equals_sets(points: list[tuple[int, int, int]]) -> None:
    coords = torch.tensor(points)
    voxels, inverse, counts = unique_voxels(coords, (4, 5))
    assert [tuple(row) for row in voxels.tolist()] == sorted(set(points))
    assert torch.equal(voxels[inverse], coords)
    assert counts.tolist() == [points.count(point) for point in sorted(set(points))]


def test_unique_voxels_of_nothing_and_of_a_point_outside() -> None:
    voxels, inverse, counts = unique_voxels(torch.zeros(0, 4, dtype=torch.int32), (4, 4, 4))
    assert voxels.shape == (0, 4)
    assert len(inverse) == len(counts) == 0
    with pytest.raises(ValueError, match=r"row 1 is \[0, 4, 0\]"):
        unique_voxels(torch.tensor([[0, 0, 0], [0, 4, 0]]), (4, 4))
