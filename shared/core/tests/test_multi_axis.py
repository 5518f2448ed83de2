"""Block and grid attention: golden numbers, partitions, who reaches whom."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.attention.multi_axis import (
    MultiAxisAttention,
    PartitionAttention,
    PartitionBlock,
    partition,
    partition_attention,
    partition_block_from_timm,
    resized_bias_table,
    unpartition,
)
from heed_core.relative import GridRelativeBias
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "maxvit"
MODES = {"attn_block": "block", "attn_grid": "grid"}


@pytest.fixture(scope="module")
def golden() -> GoldenFixture:
    return GoldenFixture.load(GOLDEN)


def official(golden: GoldenFixture, block: int, part: str, dtype: torch.dtype) -> PartitionBlock:
    module = PartitionBlock(24, heads=3, size=(3, 3), mode=MODES[part])
    module.load_state_dict(partition_block_from_timm(golden.weights(f"blocks.{block}.{part}.")))
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [0, 1])
def test_golden_blocks(golden, block: int, dtype: torch.dtype) -> None:
    stored = "output64" if dtype == torch.float64 else "output"
    for part, before in (("attn_block", "conv"), ("attn_grid", "attn_block")):
        x = golden.tensors[f"{stored}.block{block}.{before}"]
        x = x.movedim(1, -1) if before == "conv" else x
        module = official(golden, block, part, dtype)
        golden.check(f"block{block}.{part}", module(x))
        if block == 0:
            alone = partition(module.attention(module.attention_norm(x)), (3, 3), mode=MODES[part])
            golden.check(f"block0.{part}.attention_only", alone.flatten(0, 1).unflatten(1, (3, 3)))


def batch_norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    stored = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var")]
    learned = [weights[f"{name}.{part}"] for part in ("weight", "bias")]
    return F.batch_norm(x, *stored, *learned, eps=1e-3)


def convolutions(x: torch.Tensor, weights: dict[str, torch.Tensor], stride: int) -> torch.Tensor:
    """MBConv, which stands before the two attentions."""

    def conv(y: torch.Tensor, name: str, **options: int) -> torch.Tensor:
        return F.conv2d(y, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)

    def gelu(y: torch.Tensor) -> torch.Tensor:
        return F.gelu(y, approximate="tanh")

    shortcut = conv(F.avg_pool2d(x, 2), "shortcut.expand") if stride == 2 else x
    y = gelu(batch_norm(conv(batch_norm(x, weights, "pre_norm"), "conv1_1x1"), weights, "norm1"))
    y = F.pad(y, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
    groups = y.shape[1]
    y = gelu(batch_norm(conv(y, "conv2_kxk", stride=stride, groups=groups), weights, "norm2"))
    squeezed = conv(F.silu(conv(y.mean((2, 3), keepdim=True), "se.fc1")), "se.fc2")
    return conv(y * squeezed.sigmoid(), "conv3_1x1") + shortcut


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_stage_and_its_gradients(golden, dtype: torch.dtype) -> None:
    y = x = golden.input("x", dtype)
    modules = []
    for block in (0, 1):
        weights = {
            name: tensor.to(dtype)
            for name, tensor in golden.weights(f"blocks.{block}.conv.").items()
        }
        y = convolutions(y, weights, stride=2 - block).movedim(1, -1)
        pair = [official(golden, block, part, dtype) for part in MODES]
        y = pair[1](pair[0](y)).movedim(-1, 1)
        modules.append(pair)
    golden.check("y", y)
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    first = modules[0][0].attention
    parts = (first.query, first.key, first.value)
    packed = torch.cat([part.weight.grad for part in parts])
    golden.check("grad.weights.blocks.0.attn_block.attn.qkv.weight", packed)
    table = modules[0][1].attention.relative_bias.table.grad.T.reshape(3, 5, 5).flip(1, 2)
    golden.check("grad.weights.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table", table)


def test_golden_order_of_cells(golden) -> None:
    pixels = torch.arange(54).reshape(1, 6, 9, 1)
    for mode in ("window", "grid"):
        groups = partition(pixels, (3, 3), mode="block" if mode == "window" else "grid")
        assert torch.equal(groups[0, :, :, 0], golden.tensors[f"output.pixel_order.{mode}"])


def test_golden_notices_a_table_of_the_opposite_offsets(golden) -> None:
    module = official(golden, 0, "attn_block", torch.float32)
    with torch.no_grad():
        module.attention.relative_bias.table.copy_(module.attention.relative_bias.table.flip(0))
    x = golden.tensors["output.block0.conv"].movedim(1, -1)
    with pytest.raises(AssertionError, match="off"):
        golden.check("block0.attn_block", module(x))


def test_a_table_of_either_layout_gives_the_bias_of_its_offsets() -> None:
    rows, columns = 2, 3
    swin = torch.arange(15.0 * 2).reshape(15, 2)  # rows (di + 1) * 5 + dj + 2, query minus key
    tensorflow = torch.stack([swin.reshape(3, 5, 2)[2 - i] for i in range(3)]).flip(1)
    for table in (swin, tensorflow.permute(2, 0, 1)):
        renamed = partition_block_from_timm({"attn.rel_pos.relative_position_bias_table": table})
        bias = GridRelativeBias(2, shape=(rows, columns))
        bias.load_state_dict({"table": renamed["attention.relative_bias.table"]})
        found = bias(6, 6)
        for query in range(6):
            for key in range(6):
                down = query // columns - key // columns
                right = query % columns - key % columns
                assert torch.equal(found[:, query, key], swin[(down + 1) * 5 + right + 2])


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    mode=st.sampled_from(["block", "grid"]),
)
@settings(max_examples=40, deadline=None)
def test_unpartition_undoes_partition(counts: list[int], sizes: list[int], mode: str) -> None:
    sizes = sizes[: len(counts)]
    spatial = [count * size for count, size in zip(counts, sizes, strict=True)]
    x = torch.arange(2 * math.prod(spatial) * 3).reshape(2, *spatial, 3)
    groups = partition(x, sizes, mode=mode)
    assert groups.shape == (2, math.prod(counts), math.prod(sizes), 3)
    assert torch.equal(unpartition(groups, sizes, spatial, mode=mode), x)


def test_a_grid_is_a_window_of_the_swapped_factors() -> None:
    x = torch.randn(2, 4, 9, 5)
    swapped = x.reshape(2, 2, 2, 3, 3, 5).transpose(1, 2).transpose(3, 4).reshape(2, 4, 9, 5)
    assert torch.equal(partition(x, (2, 3), mode="grid"), partition(swapped, (2, 3)))


@pytest.mark.parametrize("mode", ["block", "grid"])
def test_a_cell_reaches_exactly_its_group(mode: str) -> None:
    module = PartitionAttention(8, heads=2, size=(2, 3), mode=mode).double()
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 1, 4] += torch.randn(8)
    reached = (module(x) - module(changed)).abs().sum(-1)[0].ne(0)
    wanted = torch.zeros(4, 9, dtype=torch.bool)
    if mode == "block":
        wanted[0:2, 3:6] = True
    else:
        wanted[1::2, 1::3] = True
    assert torch.equal(reached, wanted)


def test_block_then_grid_reaches_every_cell() -> None:
    module = MultiAxisAttention(8, heads=2, size=(3, 3)).double()
    x = torch.randn(1, 9, 9, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 4, 7] += torch.randn(8)
    assert (module(x) - module(changed)).abs().sum(-1).gt(1e-12).all()


@pytest.mark.parametrize("mode", ["block", "grid"])
def test_functional_form_is_what_the_module_computes(mode: str) -> None:
    module = PartitionAttention(8, heads=2, size=(2, 3), mode=mode).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    query, key, value = (
        layer(x).unflatten(-1, (2, 4)).movedim(-2, 1)
        for layer in (module.query, module.key, module.value)
    )
    mixed = partition_attention(
        query, key, value, size=(2, 3), mode=mode, bias=module.relative_bias(6, 6)
    )
    torch.testing.assert_close(module.out(mixed.movedim(1, -2).flatten(-2)), module(x))


def test_three_spatial_axes() -> None:
    module = PartitionAttention(8, heads=2, size=(1, 2, 3), mode="grid")
    assert module(torch.randn(2, 3, 4, 6, 8)).shape == (2, 3, 4, 6, 8)


def test_a_resized_table_keeps_its_corners_centre_and_constants() -> None:
    bias = GridRelativeBias(2, shape=(3, 3))
    table = bias.table.detach()
    assert torch.equal(resized_bias_table(table, (3, 3), (3, 3)), table)
    resized = resized_bias_table(table, (3, 3), (5, 6)).reshape(9, 11, 2)
    torch.testing.assert_close(resized[4, 5], table.reshape(5, 5, 2)[2, 2])
    flat = resized_bias_table(torch.full_like(table, 0.5), (3, 3), (5, 6))
    torch.testing.assert_close(flat, torch.full((99, 2), 0.5))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: PartitionAttention(8, heads=2, size=(7, 7))(torch.zeros(1, 14, 230, 8)),
            "spatial axis 1 must be a multiple of 7, got 230",
        ),
        (lambda: partition(torch.zeros(1, 4, 4, 2), (2,)), "size must have one positive number"),
        (lambda: partition(torch.zeros(1, 4, 4, 2), (2, 2), mode="strip"), "mode must be"),
        (lambda: PartitionAttention(8, heads=2, size=(0, 2)), "size must have one positive number"),
        (lambda: resized_bias_table(torch.zeros(9, 2), (3, 3), (5, 5)), "table must have 25 rows"),
        (lambda: partition_block_from_timm({"ls1.gamma": torch.zeros(1)}), "no weight of timm"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
