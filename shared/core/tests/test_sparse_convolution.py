"""Sparse convolutions against dense ones, on every back-end; rulebooks, sharing, traps."""

import copy
import importlib.util
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from heed_core.dispatch import UnsupportedBackend
from heed_core.sparse import (
    CAB,
    SparseConv2d,
    SparseConv3d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SparseTensor,
    SubMConv2d,
    SubMConv3d,
    explain_backends,
    sparse_conv,
    use_backend,
)
from heed_core.sparse.backends import ConvolutionFacts, select
from heed_core.sparse.blocks import activate_norm_, norm_rows
from heed_core.sparse.rulebook import LARGEST_KEY, Rulebook, submanifold_window

needs_spconv = pytest.mark.skipif(
    importlib.util.find_spec("spconv") is None, reason="spconv is not installed"
)
BACKENDS = ["torch", "reference", pytest.param("spconv", marks=needs_spconv)]
KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 3), (3, 3, 1), (1, 1, 3), (1, 1, 8), (2, 3, 4)]
SHAPES = [(7, 6, 8), (4, 9, 5)]


def cloud(
    shape: Sequence[int],
    batch: int = 2,
    channels: int = 4,
    *,
    share: float = 0.3,
    dtype: torch.dtype = torch.float64,
    shuffle: bool = True,
) -> SparseTensor:
    coords = (torch.rand(batch, *shape) < share).nonzero()
    if shuffle:
        coords = coords[torch.randperm(len(coords))]
    return SparseTensor(torch.randn(len(coords), channels, dtype=dtype), coords, shape, batch)


def read(dense: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
    """Rows of a dense (b, c, *spatial) grid at coordinates."""
    return dense.movedim(1, -1)[tuple(coords.long().unbind(1))]


def dense_weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight.movedim(-1, 1)  # (o, i, *kernel)


def dense_submanifold(x: SparseTensor, layer: SubMConv3d) -> torch.Tensor:
    """Zero padding of the same size, by hand, so that even kernels work too."""
    padding: list[int] = []
    for size, dilation in zip(reversed(layer.kernel), reversed(layer.window.dilation), strict=True):
        padding += [dilation * (size // 2), dilation * (size - 1 - size // 2)]
    convolve = {2: F.conv2d, 3: F.conv3d}[len(layer.kernel)]
    grid = F.pad(x.dense(), padding)
    return convolve(grid, dense_weight(layer), layer.bias, dilation=layer.window.dilation)


def dense_inverse(x: SparseTensor, like: Sequence[int], layer: nn.Module) -> torch.Tensor:
    """The transposed convolution as the gradient of the forward one: any size, any stride."""
    window = layer.window
    convolve = {2: F.conv2d, 3: F.conv3d}[len(like)]
    probe = torch.zeros(
        x.batch_size, layer.out_channels, *like, dtype=x.features.dtype, requires_grad=True
    )
    weight = layer.weight.movedim(-1, 0)  # (i, o, *kernel): what maps back
    forward = convolve(
        probe, weight, stride=window.stride, padding=window.padding, dilation=window.dilation
    )
    return torch.autograd.grad(forward, probe, x.dense(), create_graph=True)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_submanifold_equals_the_dense_convolution(kernel, dilation: int, backend: str) -> None:
    for shape, batch in zip(SHAPES, (1, 3), strict=True):
        x = cloud(shape, batch)
        layer = SubMConv3d(4, 5, kernel, dilation=dilation, bias=True, backend=backend).double()
        y = layer(x)
        assert y.coords is x.coords
        expected = read(dense_submanifold(x, layer), x.coords)
        torch.testing.assert_close(y.features, expected, rtol=0, atol=1e-10)


STRIDED = [
    ((3, 3, 3), 2, 1, 1),
    ((3, 3, 3), (2, 2, 1), 1, 1),
    ((3, 3, 3), 1, 1, 1),
    ((1, 1, 5), (1, 1, 5), 0, 1),
    ((2, 2, 2), 2, 0, 1),
    ((3, 1, 3), (5, 1, 5), (1, 0, 1), 1),
    ((1, 3, 3), (1, 3, 2), (0, 1, 1), 1),
    ((3, 3, 3), 2, 2, 2),
    ((3, 3, 3), (2, 1, 3), 3, 3),
    ((3, 3, 3), 2, 5, 5),
    *(((3, 3, 1), (2, 2, 1), (d, d, 0), (d, d, 1)) for d in (1, 2, 3, 5)),
    *(((1, 1, 3), (1, 1, 2), (0, 0, d), (1, 1, d)) for d in (1, 2, 3, 5)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), STRIDED)
def test_strided_and_inverse_equal_the_dense_ones(
    kernel, stride, padding, dilation, backend: str
) -> None:
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    for shape, batch in zip(SHAPES, (3, 1), strict=True):
        x = cloud(shape, batch)
        down = SparseConv3d(4, 5, kernel, **how, bias=True)
        up = SparseInverseConv3d(5, 3, of=down, bias=True)
        for layer in (down, up):
            layer.double().backend = backend
        y = down(x)
        expected = F.conv3d(x.dense(), dense_weight(down), None, **how)
        unbiased = y.with_features(y.features - down.bias)
        torch.testing.assert_close(unbiased.dense(), expected, rtol=0, atol=1e-10)
        z = up(unbiased)
        assert z.coords is x.coords
        assert z.level == x.level
        expected = read(dense_inverse(unbiased, shape, up), x.coords) + up.bias
        torch.testing.assert_close(z.features, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_that_are_not_contiguous_give_the_same(backend: str) -> None:
    x = cloud((5, 6, 4), channels=8)
    down = SparseConv3d(4, 5, 3, stride=2, padding=1)
    net = nn.Sequential(SubMConv3d(4, 4, 3), down, SparseInverseConv3d(5, 3, of=down)).double()
    use_backend(net, backend)
    every_other = x.with_features(x.features[:, ::2])
    turned = x.with_features(x.features[:, ::2].T.contiguous().T)
    plain = x.with_features(x.features[:, ::2].contiguous())
    assert plain.features.is_contiguous()
    for given in (every_other, turned):
        assert not given.features.is_contiguous()
        found, wanted = net(given).features, net(plain).features
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_dense_inverse_of_these_tests_is_the_transposed_convolution() -> None:
    x = cloud((7, 5, 9))
    down = SparseConv3d(4, 5, 3, stride=2, padding=1).double()
    up = SparseInverseConv3d(5, 3, of=down).double()
    y = down(x)
    weight = up.weight.permute(4, 0, 1, 2, 3)
    expected = F.conv_transpose3d(y.dense(), weight, stride=2, padding=1)
    torch.testing.assert_close(dense_inverse(y, (7, 5, 9), up), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_the_dense_ones(backend: str) -> None:
    x = cloud((5, 6, 4))
    x.features.requires_grad_()
    keep = SubMConv3d(4, 5, (3, 1, 3), dilation=2, bias=True)
    down = SparseConv3d(5, 6, 3, stride=2, padding=1)
    up = SparseInverseConv3d(6, 3, of=down)
    for layer in (keep, down, up):
        layer.double().backend = backend
    leaves = [x.features, keep.weight, keep.bias, down.weight, up.weight]
    y = up(down(keep(x))).features
    probe = torch.randn_like(y)
    found = torch.autograd.grad((y * probe).sum(), leaves)

    kept = read(dense_submanifold(x, keep), x.coords)
    middle = x.with_features(kept)
    coarse = F.conv3d(middle.dense(), dense_weight(down), stride=2, padding=1)
    # the dense grid has all cells; those that no window reaches are zero and give no gradient
    made = down(middle)
    back = dense_inverse(made.with_features(read(coarse, made.coords)), x.spatial_shape, up)
    wanted = torch.autograd.grad((read(back, x.coords) * probe).sum(), leaves)
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "layer",
    [SubMConv3d(2, 3, (3, 1, 3)), SparseConv3d(2, 3, 3, stride=2, padding=1)],
    ids=["submanifold", "strided"],
)
def test_gradcheck(layer: nn.Module) -> None:
    layer = layer.double()
    x = cloud((4, 3, 5), 1, 2)
    inverse = SparseInverseConv3d(3, 2, of=layer).double() if layer.window.stride[0] > 1 else None

    def run(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(layer, {"weight": weight}, x.with_features(features))
        return out.features if inverse is None else inverse(out).features

    assert torch.autograd.gradcheck(
        run, (x.features.requires_grad_(), layer.weight), atol=1e-7, rtol=1e-5
    )


@needs_spconv
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32_agrees_between_back_ends(kernel) -> None:
    x = cloud((9, 8, 8), 2, 16, dtype=torch.float32)
    layer = SubMConv3d(16, 16, kernel)
    down = SparseConv3d(16, 16, kernel, stride=2, padding=[k // 2 for k in kernel])
    up = SparseInverseConv3d(16, 16, of=down)
    outputs = {}
    for backend in ("torch", "spconv"):
        for module in (layer, down, up):
            module.backend = backend
        outputs[backend] = [layer(x), down(x), up(down(x))]
    for ours, theirs in zip(*outputs.values(), strict=True):
        assert torch.equal(ours.coords, theirs.coords)
        torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=1e-5)


@needs_spconv
@pytest.mark.filterwarnings("ignore")  # spconv's own layers warn of what they import
def test_equals_the_layers_of_spconv() -> None:
    import spconv.pytorch as official
    from spconv.core import ConvAlgo

    x = cloud((9, 8, 7), 2, 4, dtype=torch.float32)
    ours = nn.ModuleList([SubMConv3d(4, 6, (3, 1, 3)), SparseConv3d(6, 5, 3, stride=2, padding=1)])
    ours.append(SparseInverseConv3d(5, 3, of=ours[1]))
    native = {"bias": False, "algo": ConvAlgo.Native}
    theirs = nn.ModuleList(
        [
            official.SubMConv3d(4, 6, (3, 1, 3), indice_key="a", **native),
            official.SparseConv3d(6, 5, 3, 2, 1, indice_key="b", **native),
            official.SparseInverseConv3d(5, 3, 3, indice_key="b", **native),
        ]
    )
    y, z = x, official.SparseConvTensor(x.features, x.coords, list(x.spatial_shape), 2)
    for our_layer, their_layer in zip(ours, theirs, strict=True):
        their_layer.weight.data = our_layer.weight.data.clone()  # one layout: (out, *kernel, in)
        y, z = our_layer(y), their_layer(z)
        torch.testing.assert_close(y.dense(), z.dense(), rtol=0, atol=1e-5)


def test_two_axes() -> None:
    x = cloud((7, 6), 2)
    keep, down = SubMConv2d(4, 5, 3).double(), SparseConv2d(5, 6, 3, stride=2, padding=1).double()
    up = SparseInverseConv2d(6, 3, of=down).double()
    y = keep(x)
    expected = read(dense_submanifold(x, keep), x.coords)
    torch.testing.assert_close(y.features, expected, rtol=0, atol=1e-10)
    z = down(y)
    expected = F.conv2d(y.dense(), dense_weight(down), stride=2, padding=1)
    torch.testing.assert_close(z.dense(), expected, rtol=0, atol=1e-10)
    expected = read(dense_inverse(z, (7, 6), up), x.coords)
    torch.testing.assert_close(up(z).features, expected, rtol=0, atol=1e-10)


def test_a_kernel_of_one_cell_is_a_linear_map() -> None:
    x = cloud((5, 5, 5))
    layer = SubMConv3d(4, 6, 1, bias=True).double()
    expected = x.features @ layer.weight.reshape(6, 4).T + layer.bias
    torch.testing.assert_close(layer(x).features, expected)
    assert len(x.cache) == 1
    assert "0 rulebooks" in repr(x.cache)


def test_different_kernels_on_one_tensor_use_different_rulebooks() -> None:
    x = cloud((6, 6, 6))
    first, second = SubMConv3d(4, 4, (1, 3, 3)).double(), SubMConv3d(4, 4, (3, 1, 3)).double()
    with torch.no_grad():
        second.weight.copy_(first.weight.movedim(1, 2))  # the same nine matrices
    twice = first(first(x)).features
    mixed = second(first(x)).features
    assert (twice - mixed).abs().max() > 0.1
    expected = read(dense_submanifold(first(x), second), x.coords)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-10)


def test_rulebooks_are_built_once_and_shared_by_branches(monkeypatch) -> None:
    from heed_core.sparse import tensor

    built: list[str] = []
    for name in ("submanifold_rulebook", "strided_rulebook"):
        original = getattr(tensor, name)
        monkeypatch.setattr(
            tensor, name, lambda *a, f=original, n=name: (built.append(n), f(*a))[1]
        )
    x = cloud((8, 8, 8), dtype=torch.float32)
    branches = [nn.Sequential(CAB(4, 4, (1, 3, 3)), CAB(4, 4, (3, 1, 3))) for _ in range(3)]
    down = [SparseConv3d(4, 4, 3, stride=2, padding=1) for _ in range(2)]
    up = SparseInverseConv3d(4, 4, of=down[0])
    merged = branches[0](x) + branches[1](x) + branches[2](x)
    first, second = down[0](merged), down[1](merged)
    assert first.level == second.level
    branches[0](up(first))
    assert sorted(built) == ["strided_rulebook", "submanifold_rulebook", "submanifold_rulebook"]


def test_two_strided_convolutions_make_two_levels_which_are_not_confused() -> None:
    x = cloud((8, 8, 8))
    down = SparseConv3d(4, 4, 3, stride=2, padding=1).double()
    other = SparseConv3d(4, 4, 3, stride=(2, 2, 1), padding=1).double()
    up = SparseInverseConv3d(4, 4, of=down).double()
    y, z = down(x), other(x)
    assert y.level != z.level
    assert y.spatial_shape != z.spatial_shape
    up(y)
    with pytest.raises(ValueError, match="were not made by the convolution to invert"):
        up(z)
    with pytest.raises(ValueError, match="same sites"):
        _ = y + z


def test_the_inverse_does_not_own_its_convolution() -> None:
    down = SparseConv3d(2, 3, 3, stride=2, padding=1)
    up = SparseInverseConv3d(3, 2, of=down)
    assert set(up.state_dict()) == {"weight"}
    assert len(list(up.modules())) == 1


@pytest.mark.bad_input
def test_a_stride_is_refused_by_the_submanifold_convolution() -> None:
    with pytest.raises(TypeError, match="stride"):
        SubMConv3d(4, 4, 3, stride=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_another_order_give_the_same_in_that_order(backend: str) -> None:
    x = cloud((6, 7, 8), shuffle=False)
    order = torch.randperm(len(x))
    moved = SparseTensor(x.features[order], x.coords[order], x.spatial_shape, 2)
    layer = SubMConv3d(4, 5, 3).double()
    down = SparseConv3d(4, 5, 3, stride=2, padding=1).double()
    up = SparseInverseConv3d(5, 3, of=down).double()
    for module in (layer, down, up):
        module.backend = backend
    torch.testing.assert_close(layer(moved).features, layer(x).features[order], rtol=0, atol=1e-13)
    assert torch.equal(down(moved).coords, down(x).coords)
    torch.testing.assert_close(down(moved).features, down(x).features, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        up(down(moved)).features, up(down(x)).features[order], rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_items_of_a_batch_do_not_mix(backend: str) -> None:
    whole = cloud((5, 4, 6), 3)
    net = nn.Sequential(SubMConv3d(4, 4, 3), SparseConv3d(4, 4, 3, stride=2, padding=1)).double()
    use_backend(net, backend)
    together = net(whole).dense()
    for item in range(3):
        rows = whole.coords[:, 0] == item
        coords = whole.coords[rows] * torch.tensor([0, 1, 1, 1])
        alone = net(SparseTensor(whole.features[rows], coords, (5, 4, 6), 1))
        torch.testing.assert_close(alone.dense()[0], together[item], rtol=0, atol=1e-13)


def test_borders_do_not_wrap() -> None:
    ends = [[0, 3, 4], [1, 0, 0], [0, 0, 4], [0, 1, 0], [0, 0, 0], [0, 3, 0], [2, 3, 4], [2, 3, 0]]
    coords = torch.tensor([[0, *end] for end in ends])
    x = SparseTensor(torch.ones(8, 1), coords, (4, 4, 5), 1)
    for kernel in ((1, 1, 3), (3, 3, 3), (1, 3, 3)):
        layer = SubMConv3d(1, 1, kernel)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        expected = read(dense_submanifold(x, layer), x.coords)
        assert torch.equal(layer(x).features, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_empty_tensors_pass_forward_and_backward(backend: str, training: bool) -> None:
    down = SparseConv3d(6, 4, 3, stride=2, padding=1, bias=True)
    up = SparseInverseConv3d(4, 2, of=down)
    net = nn.Sequential(CAB(3, 6, (1, 3, 3)), down, SubMConv3d(4, 4, 3), up).train(training)
    use_backend(net, backend)
    features = torch.zeros(0, 3, requires_grad=True)
    coords = torch.zeros(0, 4, dtype=torch.int32)
    y = net(SparseTensor(features, coords, (8, 8, 8), 2))
    assert y.features.shape == (0, 2)
    y.features.sum().backward()
    assert all(p.grad is not None and bool(p.grad.eq(0).all()) for p in net.parameters())
    assert all(bool(b.isfinite().all()) for b in net.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_without_any_pair(backend: str) -> None:
    """Without padding, a cell at the border can be read by no window."""
    x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 4, 4, 4]]), (5, 5, 5), 1)
    down = SparseConv3d(2, 3, 2, stride=2, backend=backend)
    up = SparseInverseConv3d(3, 2, of=down, backend=backend)
    y = down(x)
    assert len(y) == 0
    assert torch.equal(up(y).features, torch.zeros(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_acts_in_eval_as_in_training(backend: str) -> None:
    x = cloud((5, 5, 5), dtype=torch.float32)
    layers = [SubMConv3d(4, 3, 3, bias=True), SparseConv3d(4, 3, 3, stride=2, padding=1, bias=True)]
    for layer in layers:
        layer.backend = backend
        assert layer.bias.abs().min() > 0
        trained = layer.train()(x).features
        with torch.no_grad():
            assert torch.equal(layer.eval()(x).features, trained)
            plain = copy.deepcopy(layer)
            plain.bias = None
            torch.testing.assert_close(plain(x).features + layer.bias, trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_of_the_cpu_runs_in_float32(backend: str) -> None:
    x = cloud((5, 5, 5), dtype=torch.float32)
    layer = SubMConv3d(4, 3, 3, bias=True, backend=backend)
    plain = layer(x).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x).features, plain)
        half = layer(x.with_features(x.features.bfloat16())).features
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float16, "torch"),
        (torch.bfloat16, "torch"),
        pytest.param(torch.float16, "spconv", marks=needs_spconv),
    ],
)
def test_half_precision_keeps_to_its_budget(dtype: torch.dtype, backend: str) -> None:
    exact = cloud((6, 6, 6), 1, 16)
    exact = exact.with_features(exact.features.to(dtype).double())
    layer = SubMConv3d(16, 16, 3, backend=backend).to(dtype)
    wide = copy.deepcopy(layer).double()
    wanted = wide(exact).features
    found = layer(exact.with_features(exact.features.to(dtype))).features
    assert found.dtype == dtype
    plain = copy.deepcopy(layer)
    plain.backend = "reference"
    eager = plain(exact.with_features(exact.features.to(dtype))).features
    error, eager_error = ((x.double() - wanted).abs().max() for x in (found, eager))
    assert error <= 2 * (eager_error + torch.finfo(dtype).eps * wanted.abs().max())


@needs_spconv
def test_spconv_refuses_bfloat16_with_a_reason() -> None:
    layer = SubMConv3d(4, 4, 3, backend="spconv").bfloat16()
    x = cloud((4, 4, 4), dtype=torch.bfloat16)
    with pytest.raises(UnsupportedBackend, match=r"no kernels for torch\.bfloat16"):
        layer(x)
    reports = {report.name: report for report in explain_backends("cpu", torch.bfloat16)}
    assert reports["torch"].chosen
    assert not reports["spconv"].usable
    assert "bfloat16" in reports["spconv"].reason


def test_absence_of_spconv_is_told_and_never_hidden(monkeypatch) -> None:
    from heed_core.sparse.backends import spconv

    monkeypatch.setattr(spconv, "installed", lambda: False)
    x = cloud((4, 4, 4), dtype=torch.float32)
    SubMConv3d(4, 4, 3)(x)
    with pytest.raises(UnsupportedBackend, match=r"pip install 'heed-core\[sparse\]'"):
        SubMConv3d(4, 4, 3, backend="spconv")(x)


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    x = cloud((4, 4, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match="backend must be one of"):
        SubMConv3d(4, 4, 3, backend="minkowski")
    with pytest.raises(ValueError, match="backend must be one of"):
        use_backend(nn.Identity(), "minkowski")
    with pytest.raises(ValueError, match="expected 5 channels on 3 spatial axes, got 4"):
        SubMConv3d(5, 4, 3)(x)
    with pytest.raises(ValueError, match="on 2 spatial axes"):
        SubMConv2d(4, 4, 3)(x)
    with pytest.raises(ValueError, match="kernel must be one number or 3"):
        SubMConv3d(4, 4, (3, 3))
    with pytest.raises(ValueError, match="dilation must be 3 numbers of at least 1"):
        SubMConv3d(4, 4, 3, dilation=0)
    with pytest.raises(ValueError, match="at least 1"):
        SubMConv3d(0, 4, 3)
    with pytest.raises(ValueError, match="does not fit into a grid"):
        SparseConv3d(4, 4, 5)(x)
    rulebook = x.cache.submanifold(0, submanifold_window((3, 3, 3), (1, 1, 1)))
    with pytest.raises(ValueError, match="do not fit a rulebook of"):
        sparse_conv(x.features, torch.zeros(4, 1, 3, 3, 4), rulebook)


def test_initial_weights_are_those_of_torch() -> None:
    torch.manual_seed(3)
    ours = SubMConv3d(8, 16, (3, 1, 3), bias=True)
    bound = (8 * 9) ** -0.5
    for parameter in (ours.weight, ours.bias):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound
    dense = nn.Conv3d(8, 16, (3, 1, 3))
    assert abs(ours.weight.std() / dense.weight.std() - 1) < 0.05


def test_a_huge_grid_costs_its_sites_only() -> None:
    shape = (10_000, 10_000, 1_000)
    coords = torch.stack(
        [torch.zeros(100, dtype=torch.int64), *(torch.randint(s, (100,)) for s in shape)], dim=1
    )
    coords[1] = coords[0] + torch.tensor([0, 0, 0, 1 if coords[0, 3] < 999 else -1])
    coords[2] = torch.tensor([0, 9_999, 9_999, 999])
    x = SparseTensor(torch.randn(100, 4), coords, shape, 1)
    down = SparseConv3d(4, 4, 3, stride=2, padding=1)
    y = SparseInverseConv3d(4, 4, of=down)(down(SubMConv3d(4, 4, 3)(x)))
    assert y.features.isfinite().all()
    rulebook = x.cache.submanifold(0, submanifold_window((3, 3, 3), (1, 1, 1)))
    assert rulebook.num_pairs == 102  # 100 centres, and the two neighbours see each other


def test_a_grid_that_cannot_be_numbered_is_refused() -> None:
    coords = torch.zeros(1, 4, dtype=torch.int32)
    size = 2**21
    assert size**3 * 2 > LARGEST_KEY
    SparseTensor(torch.ones(1, 1), coords, (size - 1, size, size), 1)
    with pytest.raises(ValueError, match="can be numbered"):
        SparseTensor(torch.ones(1, 1), coords, (size, size, size), 2)


def test_operations_grow_with_the_pairs_and_pairs_with_the_sites() -> None:
    """At a fixed density twice the sites are twice the pairs and twice the multiplications."""
    counts, pairs = [], []
    for length in (200, 400):
        x = cloud((length, 16, 16), 1, 4, share=0.1, dtype=torch.float32)
        layer = SubMConv3d(4, 8, 3)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        rulebook = x.cache.submanifold(0, layer.window)
        assert isinstance(rulebook, Rulebook)
        counts.append(counter.get_total_flops())
        pairs.append(rulebook.num_pairs)
        assert rulebook.num_pairs <= 27 * len(x)
        assert counts[-1] == 2 * rulebook.num_pairs * 4 * 8
    assert 1.8 < counts[1] / counts[0] < 2.2
    assert 1.8 < pairs[1] / pairs[0] < 2.2


def test_training_keeps_no_gathered_copies() -> None:
    """What autograd saves is the input and the weight, not a gathered copy per kernel cell."""
    x = cloud((8, 8, 8), 1, 16, dtype=torch.float32)
    x.features.requires_grad_()
    sizes: dict[str, int] = {}
    for backend in ("torch", "reference"):
        layer = SubMConv3d(16, 16, 3, backend=backend)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            layer(x)
        sizes[backend] = sum(saved)
    assert sizes["torch"] == x.features.numel() + 27 * 16 * 16
    assert sizes["reference"] > 2 * sizes["torch"]


class SmallNet(nn.Module):
    """Down, up, skip and a head, from rows and coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = CAB(4, 8, (3, 1, 3), dilation=2)
        self.down = SparseConv3d(8, 8, 3, stride=(2, 2, 1), padding=1)
        self.middle = CAB(8, 8, (1, 3, 3))
        self.up = SparseInverseConv3d(8, 8, of=self.down)
        self.head = SubMConv3d(8, 3, 3, bias=True)

    def forward(self, features: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        x = self.stem(SparseTensor(features, coords, (8, 9, 6), 2))
        y: SparseTensor = self.head(self.up(self.middle(self.down(x))) + x)
        return y.features


@pytest.mark.compile
def test_an_exported_program_takes_any_number_of_cells() -> None:
    net = SmallNet().eval()
    rows = torch.export.Dim("rows")
    first = cloud((8, 9, 6), dtype=torch.float32)
    shapes = {"features": {0: rows}, "coords": {0: rows}}
    program = torch.export.export(
        net, (first.features, first.coords), dynamic_shapes=shapes, strict=False
    ).module()
    for share in (0.05, 0.3, 0.7):
        x = cloud((8, 9, 6), dtype=torch.float32, share=share)
        expected = net(x.features, x.coords)
        torch.testing.assert_close(program(x.features, x.coords), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_network_gives_the_same() -> None:
    net = SmallNet().eval()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", dynamic=True)
    for share in (0.2, 0.4):
        x = cloud((8, 9, 6), dtype=torch.float32, share=share)
        with torch.no_grad():
            expected, found = (run(x.features, x.coords) for run in (net, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_environment_chooses_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cloud((4, 4, 4))
    conv = SubMConv3d(4, 3, 3).double()
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "reference")
    assert [r.name for r in explain_backends("cpu", torch.float64) if r.chosen] == ["reference"]
    facts = ConvolutionFacts("cpu", torch.float64, tracing=False)
    assert select(facts, "auto").name == "reference"
    assert select(facts, "torch").name == "torch"
    assert select(facts._replace(tracing=True), "auto").name == "torch"
    found = conv(x).features
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "")
    assert select(facts, "auto").name == "torch"
    torch.testing.assert_close(found, conv(x).features)
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "spcnov")
    with pytest.raises(UnsupportedBackend, match=r"HEED_SPARSE_BACKEND must be auto or .*'spcnov'"):
        conv(x)


def test_a_back_end_of_the_environment_that_cannot_run_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEED_SPARSE_BACKEND", "spconv")
    facts = ConvolutionFacts("cpu", torch.bfloat16, tracing=False)
    with pytest.raises(UnsupportedBackend, match="HEED_SPARSE_BACKEND=spconv cannot run this call"):
        select(facts, "auto")
    assert not any(report.chosen for report in explain_backends("cpu", torch.bfloat16))


@pytest.mark.parametrize("count", [0, 1])
def test_a_norm_learns_nothing_from_too_few_rows(count: int) -> None:
    norm = nn.BatchNorm1d(3).double()
    norm(torch.randn(9, 3, dtype=torch.float64) + 1)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    rows = torch.randn(count, 3, dtype=torch.float64, requires_grad=True)
    found = norm_rows(norm, rows)
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    torch.testing.assert_close(found, norm.eval()(rows) if count else rows)
    found.sum().backward()
    assert norm.bias.grad.tolist() == [count] * 3


def test_norms_in_place_call_their_hooks() -> None:
    norm = nn.BatchNorm1d(3).eval()
    rows = torch.randn(5, 3)
    with torch.no_grad():
        wanted = activate_norm_(norm, rows.clone())
        own = norm.register_forward_hook(lambda module, given, found: found + 1)
        torch.testing.assert_close(activate_norm_(norm, rows.clone()), wanted + 1)
        own.remove()
        before = norm.register_forward_pre_hook(lambda module, given: (given[0] * 0,))
        assert not torch.allclose(activate_norm_(norm, rows.clone()), wanted)
        before.remove()
        told: list[nn.Module] = []
        every = nn.modules.module.register_module_forward_hook(lambda m, *_: told.append(m))
        activate_norm_(norm, rows.clone())
        every.remove()
        assert told == [norm]
        given = rows.clone()
        assert activate_norm_(norm, given) is given


@pytest.mark.parametrize("made", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("count", [0, 5])
def test_norms_in_place_are_those_with_gradients(made: dict[str, bool], count: int) -> None:
    norm = nn.BatchNorm1d(3, **made).double()
    norm(torch.randn(9, 3, dtype=torch.float64) + 1)
    norm.eval()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if count == 0 and norm.running_mean is None:
        pytest.skip("batch statistics of no rows")
    rows = torch.randn(count, 3, dtype=torch.float64)
    wanted = activate_norm_(norm, rows.clone())
    with torch.no_grad():
        given = rows.clone()
        found = activate_norm_(norm, given)
        torch.testing.assert_close(found, wanted)
        assert (found is given) == (not made)  # overwritten where the norm is fixed
        torch.testing.assert_close(wanted, norm(F.leaky_relu(rows)) if count else rows)


def test_gradients_of_functions_are_those_of_autograd() -> None:
    x = cloud((7, 6, 8))
    layer = SubMConv3d(4, 5, 3, backend="torch").double()

    def loss(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        given = {"weight": weight}
        y = torch.func.functional_call(layer, given, (x.with_features(features),))
        return y.features.sin().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(x.features, layer.weight)
    leaves = x.features.clone().requires_grad_(), layer.weight
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.Identity()])
def test_another_norm_may_stand_in_the_place_of_the_batch_norm(norm: nn.Module) -> None:
    rows = torch.randn(6, 4)
    wanted = norm(F.leaky_relu(rows, 0.01))
    with torch.no_grad():
        torch.testing.assert_close(activate_norm_(norm, rows.clone()), wanted)
