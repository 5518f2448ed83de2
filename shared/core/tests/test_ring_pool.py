"""Pooling by rings and correlation with a template, against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.kernels.ring_pool import ring_of, ring_pool2d, ring_pool2d_reference
from heed_core.kernels.xcorr import xcorr2d

CASES = [  # size, windows, radii, centre, stride
    ((12, 17), (2, 3, 5), (2, 4), (3, 4), 2),
    ((13, 8), (1, 4, 7, 9), (1, 2, 3), (3, 2), 2),
    ((9, 9), (3, 5), (2,), (1, 1), 3),
    ((5, 6), (2, 6), (1,), (1, 1), 1),
    ((1, 1), (2, 3), (4,), (0, 0), 2),
    ((14, 11), (2,), (), (3, 3), 2),
    ((14, 11), (5,), (), (3, 3), 2),
]


def by_loops(x, windows, radii, centre, stride, mode):
    """The formula, output by output, in float64."""
    x = np.asarray(x, dtype=np.float64)
    sizes = x.shape[2:]
    outs = [-(-n // stride) for n in sizes]
    result = np.empty((*x.shape[:2], *outs))
    for oy in range(outs[0]):
        for ox in range(outs[1]):
            d2 = (oy - centre[0]) ** 2 + (ox - centre[1]) ** 2
            ring = sum(d2 >= r * r for r in radii)
            k = windows[ring]
            spans = []
            for o, n, m in zip((oy, ox), sizes, outs, strict=True):
                start = o * stride - max((m - 1) * stride + k - n, 0) // 2
                spans.append(slice(max(start, 0), min(start + k, n)))
            cells = x[:, :, spans[0], spans[1]]
            pool = cells.mean if mode == "avg" else cells.max
            result[:, :, oy, ox] = pool(axis=(2, 3))
    return result


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(("size", "windows", "radii", "centre", "stride"), CASES)
def test_equals_the_loops_outputs_and_gradients(size, windows, radii, centre, stride, mode):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = by_loops(x, windows, radii, centre, stride, mode)
    found = {}
    for function in (ring_pool2d, ring_pool2d_reference):
        leaf = x.clone().requires_grad_()
        out = function(leaf, windows, radii, centre=centre, stride=stride, mode=mode)
        assert torch.allclose(out, torch.from_numpy(wanted), atol=1e-12)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        found[function] = leaf.grad
    assert torch.allclose(found[ring_pool2d], found[ring_pool2d_reference], atol=1e-12)


@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    windows=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    stride=st.integers(1, 3),
    at=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=40, deadline=None)
def test_a_constant_stays_and_any_layout_of_memory_is_equal(size, windows, stride, at):
    outs = [-(-n // stride) for n in size]
    centre = (int(at[0] * (outs[0] - 1)), int(at[1] * (outs[1] - 1)))
    rings = windows, list(range(1, len(windows)))
    ones = ring_pool2d(torch.ones(1, 2, *size), *rings, centre=centre, stride=stride)
    assert ones.shape[2:] == tuple(outs)
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-6)
    x = torch.randn(2, 5, *size)
    plain = ring_pool2d(x, *rings, centre=centre, stride=stride)
    last = x.to(memory_format=torch.channels_last)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (last, turned):
        assert torch.allclose(
            ring_pool2d(other, *rings, centre=centre, stride=stride), plain, atol=1e-6
        )
    alone = ring_pool2d(x[1:], *rings, centre=centre, stride=stride)
    assert torch.allclose(alone, plain[1:], atol=1e-6)


def test_large_maps_lose_no_accuracy():
    """A bright corner before the window would cancel in an integral image of float32."""
    x = torch.randn(1, 1, 340, 340)
    x[..., :60, :60] += 1e6
    rings = (2, 5, 12), (30, 60)
    found = ring_pool2d(x, *rings, centre=(85, 85))[..., 60:, 60:]
    wanted = ring_pool2d_reference(x.double(), *rings, centre=(85, 85))[..., 60:, 60:]
    assert float((found - wanted).abs().max()) < 1e-5


def test_rings_partition_the_plane_with_strict_outer_radii():
    ring = ring_of((7, 9), (2, 3), (3, 4))
    assert ring[3, 4] == 0
    assert ring[3, 6] == 1  # at distance 2 exactly
    assert ring[1, 4] == 1
    assert ring[3, 7] == 2
    counts = np.bincount(ring.ravel(), minlength=3)
    assert counts.sum() == 63
    assert counts[0] == 9  # distances 0, 1, sqrt 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("windows", "radii"), [((2, 3), ()), ((2, 0), (3,)), ((2, 3, 4), (3, 3)), ((2, 3), (0,))]
)
def test_rings_that_make_no_sense_are_refused(windows, radii):
    with pytest.raises(ValueError, match=r"windows|radii"):
        ring_pool2d(torch.ones(1, 1, 8, 8), windows, radii, centre=(2, 2))


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_compiles_whole(mode):
    x = torch.randn(2, 4, 20, 18)

    def pool(x):
        return ring_pool2d(x * 2, (2, 3, 6), (3, 5), centre=(5, 4), mode=mode)

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), pool(x), atol=1e-6)


def test_exports():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return ring_pool2d(x, (2, 3, 6), (3, 5), centre=(5, 4))

    x = torch.randn(2, 4, 20, 18)
    program = torch.export.export(Pool(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    again = torch.randn(3, 4, 20, 18)
    assert torch.allclose(program.module()(again), Pool()(again), atol=1e-6)


def test_correlation_equals_the_loops():
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    template = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    found = xcorr2d(features, template)
    padded = np.zeros((2, 3, 12, 12))
    padded[:, :, 1:7, 1:8] = features.detach().numpy()  # (4 - 1) // 2 and (3 - 1) // 2 before
    wanted = np.zeros((2, 6, 7))
    for y in range(6):
        for x in range(7):
            part = padded[:, :, y : y + 4, x : x + 3] * template.detach().numpy()
            wanted[:, y, x] = part.sum(axis=(1, 2, 3))
    assert np.allclose(found.detach().numpy(), wanted, atol=1e-12)
    assert torch.autograd.gradcheck(xcorr2d, (features[:, :, :3, :3], template[..., :2, :2]))


@pytest.mark.bad_input
def test_correlation_refuses_other_channels():
    with pytest.raises(ValueError, match="template must have"):
        xcorr2d(torch.ones(1, 3, 8, 8), torch.ones(1, 2, 2, 2))
