"""Sparse convolutions round a circle, and the tables of traced programs against rulebooks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heed_core.sparse import SparseConv3d, SparseInverseConv3d, SparseTensor, SubMConv3d
from heed_core.sparse.rulebook import (
    Rulebook,
    Window,
    strided_rulebook,
    strided_table,
    submanifold_table,
    submanifold_window,
)

SHAPE = (5, 12, 4)
AXIS = 1
"""The circle."""


def cloud(shape: tuple[int, ...] = SHAPE, *, circular: tuple[int, ...] = (AXIS,)) -> SparseTensor:
    coords = (torch.rand(2, *shape) < 0.3).nonzero()
    coords = coords[torch.randperm(len(coords))]
    features = torch.randn(len(coords), 3, dtype=torch.float64)
    return SparseTensor(features, coords, shape, 2, circular=circular)


def read(dense: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    return dense.movedim(1, -1)[tuple(coords.long().unbind(1))]


def round_the_circle(dense: torch.Tensor, before: int, after: int) -> torch.Tensor:
    size = dense.shape[2 + AXIS]
    return dense.index_select(2 + AXIS, torch.arange(-before, size + after) % size)


def dense_weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight.movedim(-1, 1)


@pytest.mark.parametrize("dilation", [1, 3, 7])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 3, 1), (1, 5, 1), (1, 1, 3)])
def test_submanifold_equals_the_dense_convolution_of_the_unrolled_circle(kernel, dilation) -> None:
    x = cloud()
    layer = SubMConv3d(3, 4, kernel, dilation=dilation).double()
    reach = [dilation * (k // 2) for k in kernel]
    padded = round_the_circle(x.dense(), reach[AXIS], reach[AXIS])
    padded = F.pad(padded, (reach[2], reach[2], 0, 0, reach[0], reach[0]))
    dense = F.conv3d(padded, dense_weight(layer), dilation=dilation)
    torch.testing.assert_close(layer(x).features, read(dense, x.coords), rtol=0, atol=1e-10)


def test_strided_and_inverse_equal_the_dense_ones_of_the_unrolled_circle() -> None:
    x = cloud()
    down = SparseConv3d(3, 4, 3, stride=2, padding=1).double()
    up = SparseInverseConv3d(4, 2, of=down).double()

    def forward(grid: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.conv3d(round_the_circle(grid, 1, 0), weight, stride=2, padding=(1, 0, 1))

    y = down(x)
    assert y.spatial_shape == (3, 6, 2)
    torch.testing.assert_close(
        y.dense(), forward(x.dense(), dense_weight(down)), rtol=0, atol=1e-10
    )
    probe = torch.zeros(2, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    made = forward(probe, up.weight.movedim(-1, 0))
    expected = torch.autograd.grad(made, probe, y.dense())[0]
    z = up(y)
    assert z.coords is x.coords
    torch.testing.assert_close(z.features, read(expected, x.coords), rtol=0, atol=1e-10)


def test_later_levels_are_circles_too() -> None:
    """Turning the input by the stride turns the output by one cell."""
    x = cloud()
    down, layer = (
        SparseConv3d(3, 4, 3, stride=2, padding=1).double(),
        SubMConv3d(4, 4, 3).double(),
    )
    turned = x.coords.clone()
    turned[:, 1 + AXIS] = (turned[:, 1 + AXIS] + 2) % SHAPE[AXIS]
    straight = layer(down(x)).dense()
    other = layer(down(SparseTensor(x.features, turned, SHAPE, 2, circular=(AXIS,)))).dense()
    torch.testing.assert_close(other, straight.roll(1, 2 + AXIS), rtol=0, atol=1e-10)
    flat = layer(down(SparseTensor(x.features, turned, SHAPE, 2))).dense()
    assert not torch.allclose(flat, straight.roll(1, 2 + AXIS), atol=1e-3)


def as_table(rulebook: Rulebook) -> torch.Tensor:
    table = torch.full((rulebook.volume, rulebook.num_out), rulebook.num_in)
    for row, sources, targets in zip(table, rulebook.sources, rulebook.targets, strict=True):
        row[targets] = sources
    return table


@pytest.mark.parametrize("circular", [(), (AXIS,), (0, 2)])
@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
def test_tables_of_submanifold_convolutions_hold_the_pairs(kernel, dilation, circular) -> None:
    x = cloud(circular=circular)
    window = submanifold_window(kernel, (dilation,) * 3)
    rulebook = x.cache.submanifold(0, window)
    assert isinstance(rulebook, Rulebook)
    assert torch.equal(submanifold_table(x.sites, window).table, as_table(rulebook))


@pytest.mark.parametrize("circular", [(), (AXIS,)])
@pytest.mark.parametrize("shape", [SHAPE, (4, 9, 5)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 1), (1, 1, 1)),
     ((1, 1, 4), (1, 1, 4), (0, 0, 0)), ((3, 1, 3), (3, 1, 3), (1, 0, 1))],
)  # fmt: skip
def test_tables_of_strided_convolutions_hold_the_pairs(
    kernel, stride, padding, shape, circular
) -> None:
    x = cloud(shape, circular=circular)
    window = Window(
        kernel=kernel, stride=stride, padding=padding, dilation=(1, 1, 1), submanifold=False
    )
    rulebook, sites = strided_rulebook(x.sites, window)
    table, same = strided_table(x.sites, window)
    assert torch.equal(sites.coords, same.coords)
    assert torch.equal(table.table, as_table(rulebook))
    assert torch.equal(table.swapped().table, as_table(rulebook.swapped()))
    if kernel == (3, 3, 3):  # every cell is read
        assert len(torch.cat(rulebook.sources).unique()) == len(x)


@pytest.mark.bad_input
def test_circles_that_do_not_close_are_refused() -> None:
    with pytest.raises(ValueError, match="circular must name axes from 0 to 2"):
        cloud(circular=(3,))
    with pytest.raises(ValueError, match="circular axis of 12 cells"):
        SparseConv3d(3, 4, 3, stride=2, padding=0).double()(cloud())
