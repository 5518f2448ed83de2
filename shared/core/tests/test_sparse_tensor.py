"""Sparse tensors: what is checked, what is put right, where rows are."""

import pytest
import torch

from heed_core.sparse import SparseConv3d, SparseTensor

SHAPE = (4, 5, 6)


def make(coords: list[list[int]], batch: int = 2, **how) -> SparseTensor:
    table = torch.tensor(coords, dtype=how.pop("dtype", torch.int32))
    return SparseTensor(torch.arange(len(coords) * 2.0).reshape(-1, 2), table, SHAPE, batch, **how)


ROWS = [[1, 3, 4, 5], [0, 0, 0, 0], [0, 2, 1, 3]]


def test_rows_keep_their_order_and_int64_becomes_int32() -> None:
    x = make(ROWS, dtype=torch.int64)
    assert x.coords.dtype == torch.int32
    assert x.coords.tolist() == ROWS
    assert len(x) == 3
    assert x.rows(torch.tensor([[0, 2, 1, 3], [1, 3, 4, 5], [0, 1, 1, 1]])).tolist() == [2, 0, -1]


def test_strided_coordinates_are_made_contiguous() -> None:
    table = torch.tensor(ROWS, dtype=torch.int32).T.contiguous().T
    assert not table.is_contiguous()
    x = SparseTensor(torch.ones(3, 2), table, SHAPE, 2)
    assert x.coords.is_contiguous()
    assert x.coords.tolist() == ROWS


def test_dense_puts_rows_where_they_belong() -> None:
    x = make(ROWS)
    grid = x.dense(fill=-1.0)
    assert grid.shape == (2, 2, *SHAPE)
    for row, (b, i, j, k) in enumerate(ROWS):
        assert torch.equal(grid[b, :, i, j, k], x.features[row])
    assert int(grid.eq(-1.0).sum()) == grid.numel() - 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0, 2, 1, 3], r"rows 2 and 3 are the same cell \[0, 2, 1, 3\]"),
        ([0, 2, -1, 3], r"row 3 is \[0, 2, -1, 3\], outside"),
        ([0, 2, 5, 3], r"row 3 is \[0, 2, 5, 3\], outside of a batch of 2 grids of \(4, 5, 6\)"),
        ([2, 2, 1, 3], r"row 3 is \[2, 2, 1, 3\], outside"),
        ([-1, 2, 1, 3], r"row 3 is \[-1, 2, 1, 3\], outside"),
    ],
)
def test_a_bad_row_is_named(row: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([*ROWS, row])


@pytest.mark.bad_input
def test_wrong_types_and_sizes_are_named() -> None:
    coords, features = torch.tensor(ROWS), torch.ones(3, 2)
    with pytest.raises(ValueError, match="a row for each row of coords"):
        SparseTensor(torch.ones(2, 2), coords, SHAPE, 2)
    with pytest.raises(TypeError, match="features must be floating point"):
        SparseTensor(torch.ones(3, 2, dtype=torch.int64), coords, SHAPE, 2)
    with pytest.raises(TypeError, match="coords must be int32 or int64"):
        SparseTensor(features, coords.float(), SHAPE, 2)
    with pytest.raises(ValueError, match=r"coords must be \(n, 1 \+ 2\)"):
        SparseTensor(features, coords, (4, 5), 2)
    with pytest.raises(ValueError, match="at least 1"):
        SparseTensor(features, coords, SHAPE, 0)
    with pytest.raises(ValueError, match="at least 1"):
        SparseTensor(features, coords, (4, 0, 6), 2)


def test_other_features_share_the_sites() -> None:
    x = make(ROWS)
    y = x.with_features(torch.zeros(3, 7))
    assert y.coords is x.coords
    assert y.cache is x.cache
    assert torch.equal((x + x).features, 2 * x.features)
    with pytest.raises(ValueError, match="same sites"):
        _ = x + make(ROWS)


def test_a_cache_is_not_given_to_other_coordinates() -> None:
    x = make(ROWS)
    other = x.coords.clone()
    with pytest.raises(ValueError, match="not the sites of level 0"):
        SparseTensor(x.features, other, SHAPE, 2, 0, x.cache)


def test_validate_names_a_row_that_is_not_finite() -> None:
    x = make(ROWS)
    x.validate()
    features = x.features.clone()
    features[1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"row 1 \(at \[0, 0, 0, 0\]\) is not finite"):
        x.with_features(features).validate()


def test_levels_of_a_strided_convolution() -> None:
    x = make(ROWS)
    y = SparseConv3d(2, 2, 1, stride=2)(make([[0, 2, 2, 2], [1, 0, 4, 4]]))
    assert y.spatial_shape == (2, 3, 3)
    assert y.coords.tolist() == [[0, 1, 1, 1], [1, 0, 2, 2]]
    assert (x.level, y.level) == (0, 1)
