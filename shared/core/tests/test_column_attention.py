"""Column attention and MSCA: golden numbers, the formula on a dense grid, what the paper claims."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from heed_core import observe
from heed_core.attention.column import ColumnAttention, column_attention
from heed_core.attention.multi_scale_column import MSCA
from heed_core.sparse import SparseTensor, SubMConv3d, use_backend
from heed_core.testing.oracle import error_budget

GOLDEN = Path(__file__).parent / "golden" / "curbnet_msca" / "fixture.safetensors"
SHAPE = (12, 10, 8)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def golden_name(ours: str) -> str:
    """Our name of a weight -> the name in the golden file."""
    if ours.startswith("scales."):
        _, scale, plane, rest = ours.split(".", 3)
        kernel = ("3x1x3", "1x3x3", "3x3x1")[int(plane)]
        return f"group.s{(1, 3, 5)[int(scale)]}_{kernel}.{rest.replace('norm.', 'bn.')}"
    for old, new in (
        ("fuse_norm.", "fuse_bn."),
        ("attention.squeeze.conv.", "squeeze."),
        ("attention.squeeze.norm.", "squeeze_bn."),
        ("attention.encode.", "enc."),
        ("attention.decode.", "dec."),
        ("attention.expand.", "expand."),
    ):
        if ours.startswith(old):
            return ours.replace(old, new)
    return ours


def golden_model(golden: dict[str, torch.Tensor], dtype: torch.dtype, backend: str) -> MSCA:
    model = MSCA(6, 8, column=8, backend=backend)
    model.load_state_dict({k: golden[f"weights.msca.{golden_name(k)}"] for k in model.state_dict()})
    return model.to(dtype).eval()


def off(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    return ((ours.double() - reference.double()).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("backend", ["torch", "reference", "spconv"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_stages_and_gradients(golden, dtype, tolerance: float, backend: str) -> None:
    if backend == "spconv":
        pytest.importorskip("spconv")
    model = golden_model(golden, dtype, backend)
    features = golden["input.features"].clone().to(dtype).requires_grad_()
    x = SparseTensor(features, golden["input.coords"], SHAPE, 2)
    with observe(model) as record:
        y = model(x)
    stages = {
        "X_out": y.features,
        "X_ms": model.multi_scale(x),
        "X_ch": model.attention(x).features,
        "X_5": sum(plane(x).features for plane in model.scales[2]),
        "X_1": sum(plane(x).features for plane in model.scales[0]),
        "C": model.attention.squeeze(x).features,
        "W": record["attention.probe"][0, 0] * 8,
    }
    assert torch.equal(model.attention.columns(x), golden["output.msca.C.coords"])
    for name, ours in stages.items():
        assert off(ours, golden[f"output64.msca.{name}"]) < tolerance, name
    k = torch.arange(y.features.numel(), dtype=torch.float64).reshape(y.features.shape)
    (100 * (y.features * torch.sin(0.7 * k).to(dtype)).mean()).backward()
    tolerance = max(tolerance, 1e-6)  # the stored gradients were rounded to float32
    assert off(features.grad, golden["grad.msca.input"]) < tolerance
    compared = 0
    for name, parameter in model.named_parameters():
        wanted = golden.get(f"grad.msca.weights.{golden_name(name)}")
        if wanted is not None:
            assert off(parameter.grad, wanted) < tolerance, name
            compared += 1
    assert compared == 4


@pytest.mark.parametrize(
    ("sizes", "count"), [((32, 64, 32), 378_320), ((64, 64, 32), 609_744)], ids=str
)
def test_published_sizes(sizes: tuple[int, int, int], count: int) -> None:
    model = MSCA(sizes[0], sizes[1], column=sizes[2])
    assert sum(p.numel() for p in model.parameters()) == count
    if count == 378_320:
        parts = (model.scales, nn_pair(model), model.attention)
        assert [sum(p.numel() for p in part.parameters()) for part in parts] == [
            167_040,
            12_416,
            198_864,
        ]


def nn_pair(model: MSCA) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([model.fuse, model.fuse_norm])


def cloud(shape=SHAPE, batch: int = 2, channels: int = 6, *, share: float = 0.2) -> SparseTensor:
    coords = (torch.rand(batch, *shape) < share).nonzero()
    coords = coords[torch.randperm(len(coords))]
    features = torch.randn(len(coords), channels, dtype=torch.float64)
    return SparseTensor(features, coords, shape, batch)


def fresh(module: torch.nn.Module) -> torch.nn.Module:
    """Random parameters and statistics, so that no norm is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                random = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(random.abs() + 0.5 if "running_var" in name else random * 0.4)
    return module.double().eval()


def normed(norm: torch.nn.BatchNorm1d, grid: torch.Tensor) -> torch.Tensor:
    """LeakyReLU(0.01), then the norm, on a dense (b, c, *spatial) grid in eval mode."""
    at = (1, -1, 1, 1, 1)
    x = torch.where(grid > 0, grid, 0.01 * grid)
    x = (x - norm.running_mean.view(at)) / (norm.running_var.view(at) + norm.eps).sqrt()
    return x * norm.weight.view(at) + norm.bias.view(at)


def dense_column(model: ColumnAttention, x: SparseTensor) -> torch.Tensor:
    """The formula on the dense grid: columns without an occupied cell are never read."""
    squeeze = model.squeeze.conv.weight.permute(0, 4, 1, 2, 3)
    columns = normed(model.squeeze.norm, F.conv3d(x.dense(), squeeze))
    rows = columns.movedim(1, -1)
    hidden = rows @ model.encode.weight.T + model.encode.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    scores = hidden @ model.decode.weight.T + model.decode.bias  # (b, rho, phi, 1, o)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if model.attn_norm == "unit_mean":
        weights = weights * scores.shape[-1]
    taps = model.expand.weight[:, 0, 0]  # (o, D, i)
    spread = torch.einsum("bxyzi,odi->bxydo", scores, taps)
    return (weights * spread).movedim(-1, 1)


def dense_msca(model: MSCA, x: SparseTensor) -> torch.Tensor:
    """Equations (1) to (8) on the dense grid; empty cells are zero for every convolution."""
    grid, sums = x.dense(), []
    for planes in model.scales:
        total = 0
        for cab in planes:
            kernel, dilation = cab.conv.kernel, cab.conv.window.dilation
            padding = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
            weight = cab.conv.weight.permute(0, 4, 1, 2, 3)
            convolved = F.conv3d(grid, weight, padding=padding, dilation=dilation)
            total = total + normed(cab.norm, convolved)
        sums.append(total)
    x1, x3, x5 = sums
    t5, t3 = x5, x3 + x5
    joined = torch.cat([x1 + t3, t3, t5], dim=1)
    fused = torch.einsum("bixyz,oi->boxyz", joined, model.fuse.weight)
    return normed(model.fuse_norm, fused) + dense_column(model.attention, x)


def read(dense: torch.Tensor, x: SparseTensor) -> torch.Tensor:
    return dense.movedim(1, -1)[tuple(x.coords.long().unbind(1))]


@pytest.mark.parametrize("attn_norm", ["unit_mean", "softmax"])
@pytest.mark.parametrize("shape", [(6, 5, 4), (3, 8, 7)])
def test_equals_the_formula_on_the_dense_grid(shape, attn_norm) -> None:
    x = cloud(shape, 2)
    x.features.requires_grad_()
    model = fresh(MSCA(6, 8, column=shape[2], attn_norm=attn_norm))
    ours, exact = model(x).features, read(dense_msca(model, x), x)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    leaves = [x.features, *model.parameters()]
    probe = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad((y * probe).sum(), leaves) for y in (ours, exact))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert bool(b.ne(0).any())


def test_float32_keeps_to_its_budget() -> None:
    x = cloud((6, 5, 4), 2)
    x = x.with_features(x.features.float().double())
    model = fresh(MSCA(6, 8, column=4))
    exact = read(dense_msca(model, x), x)
    wide = x.with_features(x.features.float())
    single = fresh(MSCA(6, 8, column=4)).float()
    eager = read(dense_msca(single, wide), wide)
    found = single(wide).features
    assert (found.double() - exact).abs().max() <= error_budget(exact, eager)


@pytest.mark.parametrize("scale_mode", ["dilation", "stride"])
def test_gradcheck(scale_mode) -> None:
    x = cloud((5, 4, 3), 1, 2)
    model = fresh(MSCA(2, 4, column=3, scale_mode=scale_mode))
    leaves = (x.features.requires_grad_(), *model.parameters())
    assert torch.autograd.gradcheck(
        lambda f, *_: model(x.with_features(f)).features, leaves, fast_mode=True
    )


@pytest.mark.parametrize("scale_mode", ["dilation", "stride"])
def test_batch_order_and_repetition(scale_mode) -> None:
    x = cloud(SHAPE, 3)
    model = fresh(MSCA(6, 8, column=8, scale_mode=scale_mode))
    y = model(x).features
    assert torch.equal(model(x).features, y)
    order = torch.randperm(len(x))
    moved = SparseTensor(x.features[order], x.coords[order], SHAPE, 3)
    torch.testing.assert_close(model(moved).features, y[order], rtol=0, atol=1e-12)
    for item in range(3):
        rows = x.coords[:, 0] == item
        coords = x.coords[rows] * torch.tensor([0, 1, 1, 1])
        alone = model(SparseTensor(x.features[rows], coords, SHAPE, 1)).features
        torch.testing.assert_close(alone, y[rows], rtol=0, atol=1e-12)


def moved_cell(x: SparseTensor, row: int, height: int) -> SparseTensor:
    coords = x.coords.clone()
    coords[row, 3] = height
    return SparseTensor(x.features, coords, x.spatial_shape, x.batch_size)


def test_a_cell_acts_in_its_column_only() -> None:
    x = cloud(SHAPE, 2)
    model = fresh(ColumnAttention(6, 8, column=8))
    before = model(x).features
    features = x.features.clone()
    features[0] += 1.0
    changed = (model(x.with_features(features)).features != before).any(dim=1)
    column = (x.coords[:, :3] == x.coords[0, :3]).all(dim=1)
    assert int(column.sum()) > 1, "the test needs a column with several cells"
    assert torch.equal(changed, column)


def test_the_height_of_a_cell_changes_the_weights_of_its_whole_column() -> None:
    """What a gate of 1x1x1 convolutions cannot do: the features stay, only the height changes."""
    coords = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 6], [0, 3, 1, 2]])
    x = SparseTensor(torch.randn(3, 6, dtype=torch.float64), coords, SHAPE, 1)
    model = fresh(ColumnAttention(6, 8, column=8))
    weights = []
    for height in (6, 3):
        with observe(model) as record:
            model(moved_cell(x, 1, height))
        weights.append(record["probe"][0, 0])
    assert weights[0].shape == (2, 8)
    assert (weights[0][0] - weights[1][0]).abs().max() > 1e-3
    assert torch.equal(weights[0][1], weights[1][1])


class CellGate(torch.nn.Module):
    """The same attention with 1x1x1 convolutions in the place of those of a whole column."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = SubMConv3d(6, 8, 1)
        self.decode = torch.nn.Linear(8, 8)

    def forward(self, x: SparseTensor) -> torch.Tensor:
        """The weights of each cell."""
        return self.decode(F.leaky_relu(self.squeeze(x).features, 0.01)).softmax(dim=1)


def test_a_gate_of_single_cells_does_not_see_the_height() -> None:
    """What tells it from `ColumnAttention`, whose weights change in the test above."""
    coords = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 6], [0, 3, 1, 2]])
    x = SparseTensor(torch.randn(3, 6, dtype=torch.float64), coords, SHAPE, 1)
    gate = fresh(CellGate())
    assert torch.equal(gate(x), gate(moved_cell(x, 1, 3)))
    features = x.features.clone()
    features[1] += 1.0
    changed = (gate(x) != gate(x.with_features(features))).any(dim=1)
    assert changed.tolist() == [False, True, False]  # and not the other cell of its column


@pytest.mark.parametrize("scale_mode", ["dilation", "stride"])
def test_a_column_of_64_cells_on_every_back_end(scale_mode) -> None:
    """Twice the volume that spconv's fast kernels take; its native algorithm has no limit."""
    pytest.importorskip("spconv")
    x = cloud((5, 6, 64), 2, share=0.05)
    x.features.requires_grad_()
    model = fresh(MSCA(6, 8, column=64, scale_mode=scale_mode))
    found = {}
    for backend in ("reference", "torch", "spconv"):
        use_backend(model, backend)
        y = model(x).features
        (slope,) = torch.autograd.grad(y.sin().sum(), x.features)
        found[backend] = y, slope
    assert len(torch.unique(x.coords[:, 3])) > 40
    for backend in ("torch", "spconv"):
        for ours, wanted in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    if scale_mode == "dilation":
        exact = read(dense_msca(model, x), x)
        torch.testing.assert_close(found["spconv"][0], exact, rtol=1e-9, atol=1e-9)


def influence_in_phi(model: Callable[[SparseTensor], torch.Tensor]) -> int:
    """How many cells along phi a change of one cell reaches."""
    coords = torch.tensor([[0, 6, j, 3] for j in range(25)])
    features = torch.randn(25, 6, dtype=torch.float64)
    shape = (12, 25, 8)
    before = model(SparseTensor(features, coords, shape, 1))
    features = features.clone()
    features[12] += 1.0
    after = model(SparseTensor(features, coords, shape, 1))
    reached = (before != after).any(dim=1).nonzero()[:, 0]
    return int((reached - 12).abs().max())


def test_scales_reach_as_far_as_their_dilation() -> None:
    model = fresh(MSCA(6, 8, column=8))
    assert influence_in_phi(lambda x: model(x).features) == 5
    for scale, reach in zip(model.scales, (1, 3, 5), strict=True):
        found = influence_in_phi(lambda x, scale=scale: sum(cab(x).features for cab in scale))
        assert found == reach


@pytest.mark.parametrize("scale", [1, 2])
def test_a_strided_scale_equals_its_formula_on_the_dense_grid(scale: int) -> None:
    x = cloud(SHAPE, 2)
    model = fresh(MSCA(6, 8, column=8, scale_mode="stride"))
    for plane in model.scales[scale]:
        kernel = plane.up.kernel
        how = {
            "stride": [(1, 3, 5)[scale] if k > 1 else 1 for k in kernel],
            "padding": [k // 2 for k in kernel],
        }
        weight = plane.down.conv.weight.permute(0, 4, 1, 2, 3)
        occupied = x.with_features(torch.ones_like(x.features)).dense()
        made = F.conv3d(occupied, torch.ones_like(weight), **how) > 0
        coarse = normed(plane.down.norm, F.conv3d(x.dense(), weight, **how)) * made
        # transposed convolution of any size: the gradient of the forward one
        back = plane.up.weight.permute(4, 0, 1, 2, 3)
        grid = torch.zeros(2, 8, *SHAPE, dtype=torch.float64, requires_grad=True)
        (wide,) = torch.autograd.grad(F.conv3d(grid, back, **how), grid, coarse)
        torch.testing.assert_close(plane(x).features, read(wide, x), rtol=1e-10, atol=1e-10)
    far = (x.coords[:, 2] % 5 >= 2) & (x.coords[:, 2] % 5 <= 3)
    if scale == 2:
        assert bool(model.scales[2][1](x).features[far].eq(0).all())


def test_observed_weights_are_a_softmax_and_give_the_output() -> None:
    x = cloud()
    model = fresh(ColumnAttention(6, 8, column=8))
    plain = model(x).features
    with observe(model) as record:
        assert torch.equal(model(x).features, plain)
    weights, columns = record["probe"], model.columns(x)
    assert weights.shape == (1, 1, len(columns), 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    squeezed = model.squeeze(x)
    scores = model.decode(F.leaky_relu(model.encode(squeezed.features), 0.01))
    values = model.expand(squeezed.with_features(scores)).features
    base = x.coords * torch.tensor([1, 1, 1, 0])
    column = (base[:, None] == columns[None]).all(-1).int().argmax(1)
    torch.testing.assert_close(8 * weights[0, 0][column] * values, plain)


def test_weights_are_one_on_average() -> None:
    values, scores = torch.ones(1, 16), torch.randn(1, 16)
    column = torch.zeros(1, dtype=torch.long)
    assert math.isclose(float(column_attention(values, scores, column).mean()), 1, abs_tol=1e-6)
    bare = column_attention(values, scores, column, attn_norm="softmax")
    assert math.isclose(float(bare.sum()), 1, abs_tol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_no_cells(training: bool) -> None:
    model = MSCA(6, 8, column=8).train(training)
    x = SparseTensor(torch.zeros(0, 6), torch.zeros(0, 4, dtype=torch.int32), SHAPE, 1)
    y = model(x).features
    assert y.shape == (0, 8)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(bool(b.isfinite().all()) for b in model.buffers())


def test_operations_grow_linearly_with_the_cells() -> None:
    model = MSCA(6, 8, column=8).eval()
    counts, cells = [], []
    for length in (100, 400):
        x = cloud((length, 16, 8), 1)
        x = x.with_features(x.features.float())
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
        cells.append(len(x))
    growth = math.log(counts[1] / counts[0]) / math.log(cells[1] / cells[0])
    assert abs(growth - 1.0) < 0.1


@pytest.mark.bad_input
def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="columns have 4 cells, but the grid is"):
        fresh(MSCA(6, 8, column=4))(cloud())
    with pytest.raises(ValueError, match="out_channels must be a multiple of reduction"):
        MSCA(6, 10, column=4)
    with pytest.raises(ValueError, match="scales must ascend"):
        MSCA(6, 8, column=4, scales=(3, 1))
    with pytest.raises(ValueError, match="scale_mode must be"):
        MSCA(6, 8, column=4, scale_mode="pooling")
    rows = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="attn_norm must be"):
        column_attention(torch.ones(2, 4), torch.ones(1, 4), rows, attn_norm="sigmoid")
    with pytest.raises(ValueError, match=r"values must be \(n, c\)"):
        column_attention(torch.ones(2, 4), torch.ones(1, 3), rows)
