"""Axial attention: golden numbers, equality with masked full attention, raster causality."""

from pathlib import Path

import pytest
import torch

from heed_core import attend, observe
from heed_core.attention.axial import (
    AxialAttention,
    AxialBlock,
    MultiAxisAxialAttention,
    RowColumnDecoder,
    axial_attention,
    axial_attention_from_lucidrains,
    shift,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "axial"
DTYPES = [torch.float64, torch.float32]


def channels_last(x: torch.Tensor, channel_axis: int) -> torch.Tensor:
    return x.movedim(channel_axis, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("part", "options", "channel_axis"),
    [
        (".", {"dim": 24, "heads": 3}, -1),
        ("sequential", {"dim": 16, "heads": 2, "combine": "sequence"}, 1),
    ],
)
def test_golden_two_axes(part: str, options: dict, channel_axis: int, dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / part)
    module = MultiAxisAxialAttention(qkv_bias=False, **options)
    module.load_state_dict(axial_attention_from_lucidrains(golden.weights()))
    module.to(dtype)
    x = golden.input("x", dtype)
    cells = channels_last(x, channel_axis)
    y = module(cells).movedim(-1, channel_axis)
    first = module.axes[0](cells)
    second = module.axes[1](first if part == "sequential" else cells)
    golden.check("y", y)
    golden.check("axis0", first.movedim(-1, channel_axis))
    golden.check("axis1", second.movedim(-1, channel_axis))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.axial_attentions.0.fn.to_q.weight", module.axes[0].query.weight.grad)
    pair = torch.cat([module.axes[1].key.weight.grad, module.axes[1].value.weight.grad])
    golden.check("grad.weights.axial_attentions.1.fn.to_kv.weight", pair)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_three_axes(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "three_axes")
    module = MultiAxisAxialAttention(16, axes=3, heads=2, qkv_bias=False)
    module.load_state_dict(axial_attention_from_lucidrains(golden.weights()))
    x = golden.input("x", dtype)
    y = module.to(dtype)(x.movedim(2, -1)).movedim(-1, 2)
    golden.check("y", y)
    golden.loss(y).backward()
    pair = torch.cat([module.axes[2].key.weight.grad, module.axes[2].value.weight.grad])
    golden.check("grad.weights.axial_attentions.2.fn.to_kv.weight", pair)


def test_golden_notices_swapped_axes() -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = MultiAxisAxialAttention(24, heads=3, qkv_bias=False)
    state = axial_attention_from_lucidrains(golden.weights())
    module.load_state_dict(
        {name.replace("axes.0", "axes.2").replace("axes.1", "axes.0").replace("axes.2", "axes.1"): x
         for name, x in state.items()}
    )  # fmt: skip
    with pytest.raises(AssertionError, match="y: "):
        golden.check("y", module(golden.input("x", torch.float32)))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("causal", [False, True])
def test_an_axis_is_full_attention_masked_to_its_lines(axis: int, causal: bool) -> None:
    height, width = 3, 5
    query, key, value = torch.randn(3, 2, 4, height, width, 6, dtype=torch.float64)
    found = axial_attention(query, key, value, axis=axis, causal=causal)
    places = [(r, c) for r in range(height) for c in range(width)]
    own, other = (0, 1) if axis == 0 else (1, 0)
    mask = torch.tensor(
        [
            [p[other] == q[other] and (not causal or q[own] <= p[own]) for q in places]
            for p in places
        ]
    )
    flat = [x.flatten(2, 3) for x in (query, key, value)]
    torch.testing.assert_close(found.flatten(2, 3), attend(*flat, mask=mask))


def test_observed_maps_are_one_per_line() -> None:
    module = AxialAttention(8, heads=2, axis=0)
    with observe(module) as record:
        module(torch.randn(2, 3, 5, 8))
    assert record["attend"].shape == (2 * 5, 2, 3, 3)


def test_shift_moves_in_zeros() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 2, 3, 1)
    assert shift(x, axis=1)[0, :, :, 0].tolist() == [[0, 1, 2], [0, 4, 5]]
    assert shift(x, axis=0)[0, :, :, 0].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert shift(x, axis=1, steps=-2)[0, :, :, 0].tolist() == [[3, 0, 0], [6, 0, 0]]
    assert shift(x, axis=0, steps=5).abs().sum() == 0


def test_a_block_has_the_published_number_of_parameters() -> None:
    for dim in (8, 24):
        count = sum(p.numel() for p in AxialBlock(dim, heads=4, axis=1).parameters())
        assert count == 6 * dim**2 + 10 * dim


def test_new_blocks_are_almost_the_identity() -> None:
    block = AxialBlock(64, heads=4, axis=0, hidden=128)
    x = torch.randn(2, 5, 7, 64)
    torch.testing.assert_close(block(x), x, rtol=1e-4, atol=1e-4)
    spread = {"query": 64**-0.5, "out": 1e-5 * 64**-0.5}
    spread |= {"expand": 64**-0.5, "contract": 1e-5 * 128**-0.5}
    for name, wanted in spread.items():
        part = block if hasattr(block, name) else block.attention
        layer = getattr(part, name)
        # Ten standard errors of a standard deviation from 4096 numbers.
        assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=0.11), name
        assert float(layer.weight.detach().abs().max()) <= 2 / 0.8796 * wanted, name
        assert not layer.bias.any(), name
    decoder = RowColumnDecoder(8, heads=2, outer_depth=2, inner_depth=1)
    x, context = torch.randn(2, 1, 4, 5, 8)
    begun = shift(x, axis=1) + shift(x + context, axis=0) + context
    torch.testing.assert_close(decoder(x, context), begun, rtol=1e-4, atol=1e-4)


def decoder(**options: int) -> RowColumnDecoder:
    """With weights drawn at random: those of a new one do next to nothing."""
    settings = {"heads": 2, "outer_depth": 2, "inner_depth": 1, **options}
    module = RowColumnDecoder(8, **settings).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def test_each_cell_depends_on_all_cells_before_it_and_on_no_other() -> None:
    height, width = 4, 5
    module = decoder()
    x, context = torch.randn(2, 1, height, width, 8, dtype=torch.float64)
    x.requires_grad_()
    y = module(x, context)
    for place in range(height * width):
        row, column = divmod(place, width)
        (gradient,) = torch.autograd.grad(
            (y[0, row, column] * torch.randn(8, dtype=torch.float64)).sum(), x, retain_graph=True
        )
        reached = gradient[0].abs().sum(-1).flatten().ne(0)
        assert reached[:place].all(), f"cell {place} misses a cell before it"
        assert not reached[place:].any(), f"cell {place} sees itself or a later one"


@pytest.mark.parametrize("depths", [(2, 1), (4, 3)])
def test_decoding_cell_by_cell_equals_one_forward(depths: tuple[int, int]) -> None:
    module = decoder(outer_depth=depths[0], inner_depth=depths[1])
    x, context = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = module(x, context)
        state = module.new_state(3, (4, 5))
        for row in range(4):
            module.begin_row(x[:, row - 1] if row else None, context[:, row], state)
            for column in range(5):
                y = module.step(x[:, row, column - 1] if column else None, state)
                torch.testing.assert_close(y, wanted[:, row, column])


@pytest.mark.bad_input
@torch.no_grad()
def test_a_refused_row_leaves_the_state_as_it_was() -> None:
    module, x = decoder(), torch.randn(3, 5, 8, dtype=torch.float64)
    state = module.new_state(3, (4, 5))
    module.begin_row(None, x, state)
    for previous, context, told in ((x, x[:, :4], "context"), (x[:2], x, "previous")):
        with pytest.raises(ValueError, match=rf"{told} must be \(3, 5, 8\)"):
            module.begin_row(previous, context, state)
    assert [cache.length for cache in state.columns] == [0] * len(state.columns)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: AxialAttention(8, heads=2, axis=2)(torch.zeros(1, 3, 3, 8)), "axis must be below"),
        (lambda: AxialAttention(8, heads=3, axis=0), "heads must divide"),
        (lambda: MultiAxisAxialAttention(8, heads=2, combine="product"), "combine must be"),
        (lambda: MultiAxisAxialAttention(8, heads=2, axes=0), "axes must be"),
        (lambda: RowColumnDecoder(8, heads=2, outer_depth=3, inner_depth=1), "outer_depth"),
        (lambda: axial_attention_from_lucidrains({"to_q.weight": torch.zeros(1)}), "no weight of"),
        (
            lambda: AxialAttention(8, heads=2, axis=0)(
                torch.zeros(1, 1, 3, 8),
                cache=AxialAttention(8, heads=2, axis=0).new_cache(1, (3, 3)),
            ),
            "a cache serves causal",
        ),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
