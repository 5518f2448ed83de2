"""Borrowed neighbours, as published checkpoints were trained with: cases computed by hand."""

import pytest
import torch

from heed_core.sparse import SparseTensor, SubMConv3d
from heed_core.sparse.rulebook import submanifold_window
from heed_lidar.cylinder3d import Cylinder3d, Cylinder3dConfig
from heed_lidar.cylinder3d.legacy import BorrowedNeighbours, share_neighbours
from heed_lidar.cylindrical import CylindricalGrid

GRID = CylindricalGrid(shape=(24, 18, 8))
CONFIG = Cylinder3dConfig(classes=4, width=2, grid=GRID, legacy_rulebooks=True)


def borrowed(kernel: tuple[int, int, int], runs_as: tuple[int, int, int]) -> BorrowedNeighbours:
    conv = SubMConv3d(1, 1, kernel)
    cells = conv.weight.numel()
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, cells + 1).reshape(conv.weight.shape))
    return BorrowedNeighbours(conv, submanifold_window(runs_as, (1, 1, 1)))


def sites(values: dict[tuple[int, int, int], float]) -> SparseTensor:
    coords = torch.tensor([[0, *cell] for cell in values])
    return SparseTensor(torch.tensor([[v] for v in values.values()]), coords, (4, 4, 4), 1)


def test_weights_meet_the_neighbours_of_the_other_kernel():
    # 1x3x3 numbers its cells (phi, z): (-1,-1) 1, (-1,0) 2, ... (0,0) 5, ... (1,1) 9.
    x = sites({(1, 1, 1): 1.0, (1, 2, 1): 10.0, (1, 1, 2): 100.0, (2, 1, 1): 1000.0})
    conv = borrowed((3, 1, 3), (1, 3, 3))
    # At (1,1,1): own 5, (phi+1, z) 8, (phi, z+1) 6; the neighbour along rho is not seen.
    # At (1,2,1): own 5, (phi-1, z) 2, (phi-1, z+1) 3.
    # At (1,1,2): own 5, (phi, z-1) 4, (phi+1, z-1) 7.
    expected = [5 * 1 + 8 * 10 + 6 * 100, 5 * 10 + 2 * 1 + 3 * 100, 5 * 100 + 4 * 1 + 7 * 10]
    assert conv(x).features[:, 0].tolist() == [*expected, 5 * 1000]


def test_a_larger_kernel_uses_its_first_weights():
    x = sites({(1, 1, 1): 1.0, (1, 2, 2): 10.0})
    conv = borrowed((3, 3, 3), (1, 3, 3))
    assert conv(x).features[:, 0].tolist() == [5 * 1 + 9 * 10, 5 * 10 + 1 * 1]
    conv(x).features.sum().backward()
    used = conv.weight.grad.flatten() != 0
    assert used.nonzero()[:, 0].tolist() == [0, 4, 8]


def test_a_smaller_kernel_has_too_few_weights():
    with pytest.raises(ValueError, match=r"\(3, 1, 1\) has no weights for 9 cells"):
        borrowed((3, 1, 1), (1, 3, 3))


def test_a_block_reads_where_its_first_convolution_does():
    network = Cylinder3d(CONFIG)
    runs_as = {
        name: part.window.kernel
        for name, part in network.named_modules()
        if isinstance(part, BorrowedNeighbours)
    }
    assert len(runs_as) == 4 + 4 * 4 + 4 * 3 + 3
    for name, kernel in runs_as.items():
        expected = {"stem": (1, 3, 3), "down": (3, 1, 3), "up": (1, 3, 3), "context": (3, 1, 1)}
        assert kernel == expected[name.split(".")[0]], name


def test_the_weights_have_the_same_names():
    plain = Cylinder3d(Cylinder3dConfig(classes=4, width=2, grid=GRID))
    legacy = Cylinder3d(CONFIG)
    legacy.load_state_dict(plain.state_dict())
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (plain, legacy)]
    assert shapes[0] == shapes[1]


def test_a_convolution_that_borrows_from_its_like_is_unchanged():
    torch.manual_seed(0)
    block = torch.nn.Sequential(SubMConv3d(2, 3, (3, 1, 3)), SubMConv3d(3, 2, (3, 1, 3)))
    coords = torch.unique(torch.randint(5, (40, 3)), dim=0)
    coords = torch.cat([torch.zeros(len(coords), 1, dtype=torch.long), coords], dim=1)
    x = SparseTensor(torch.randn(len(coords), 2), coords, (5, 5, 5), 1)
    before = block(x).features
    share_neighbours(block)
    assert torch.equal(block(x).features, before)


@pytest.mark.parametrize("legacy", [True, False])
def test_the_legacy_stem_is_blind_along_rho(legacy):
    torch.manual_seed(1)
    network = Cylinder3d(
        Cylinder3dConfig(classes=4, width=2, grid=GRID, legacy_rulebooks=legacy)
    ).eval()
    coords = torch.tensor([[0, 3, 4, 5], [0, 4, 4, 5]])
    features = torch.randn(2, 16)
    with torch.no_grad():
        one = network.stem(SparseTensor(features, coords, GRID.shape, 1)).features
        features[1] += 1.0
        other = network.stem(SparseTensor(features, coords, GRID.shape, 1)).features
    assert torch.equal(one[0], other[0]) == legacy
    assert not torch.equal(one[1], other[1])


def test_the_legacy_network_runs_and_differs():
    torch.manual_seed(2)
    legacy, plain = (
        Cylinder3d(Cylinder3dConfig(classes=4, width=2, grid=GRID, legacy_rulebooks=old))
        for old in (True, False)
    )
    plain.load_state_dict(legacy.state_dict())
    index = torch.cat(
        [torch.zeros(200, 1, dtype=torch.long)] + [torch.randint(n, (200, 1)) for n in GRID.shape],
        dim=1,
    )
    points = torch.randn(200, 9)
    with torch.no_grad():  # in training mode, where norms keep untrained layers at size
        difference = legacy(points, index).logits - plain(points, index).logits
    assert difference.isfinite().all()
    assert difference.abs().max() > 0.01
