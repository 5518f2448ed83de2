"""Gaussian and density attention: golden numbers, the closed form, masks, importance."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core import observe
from heed_core.attention.gaussian import (
    DensityAttention,
    GaussianAttention,
    GaussianBlock,
    density_attention,
    density_attention_from_official,
    density_weights,
    gaussian_attention,
    gaussian_attention_from_official,
    gaussian_weights,
    importance_factor,
    layer_contributions,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "gaam"
DTYPES = [torch.float64, torch.float32]
ROWS = torch.zeros(2, 8, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_block(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = GaussianBlock(axes=(1, 2, -1), heads=(2, 3, 2), gaussians=(2, 3, 1))
    module.load_state_dict(gaussian_attention_from_official(golden.weights()))
    module.to(dtype)
    x = golden.input("x", dtype)
    golden.check("y", y := module(x))
    inner = x
    for place, layer in enumerate(module.layers):
        golden.check(f"weights_layer_{place}", layer.weights(inner))
        inner = layer(inner) + inner
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    first = module.layers[0]
    golden.check("grad.weights.layers.0.attention_heads.0.mean_offsets", first.offsets.grad[0])
    golden.check("grad.weights.layers.0.attention_heads.1.c", first.widths.grad[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_padding_value(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "padded")
    module = GaussianAttention(axis=1, heads=2, gaussians=2, padding_value=0.0)
    module.load_state_dict(gaussian_attention_from_official(golden.weights()))
    x = golden.input("x", dtype)
    y = module.to(dtype)(x)
    golden.check("y", y)
    golden.check("weights", module.weights(x))
    golden.loss(y).backward()
    golden.check("grad.weights.attention_heads.1.c", module.widths.grad[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_underflow_needs_the_clamp(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "underflow")
    state = gaussian_attention_from_official(golden.weights())
    x = golden.input("x", dtype)
    found = {}
    for normalize in ("clamped", "exact"):
        module = GaussianAttention(axis=1, gaussians=24, normalize=normalize)
        module.load_state_dict(state)
        found[normalize] = module.to(dtype).weights(x)
    off = (found["clamped"].double() - golden.tensors["output64.weights"]).abs().max()
    most = golden.tensors["output64.weights"].max()
    assert off <= (1e-9 if dtype == torch.float64 else 1e-4) * most
    torch.testing.assert_close(found["exact"].sum(1), torch.ones(2, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_density(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "daam")
    module = DensityAttention(10, heads=4)
    module.load_state_dict(density_attention_from_official(golden.weights()))
    module.to(dtype)
    x = golden.input("x", dtype)
    y = module(x)
    golden.check("y", y)
    golden.check("weights", module.weights(x))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.daams.0.mean_offset", module.offset.grad[:1])
    golden.check("grad.weights.daams.1.c", module.width.grad[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_density_over_time_as_published(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "daam_time")
    x = golden.input("x", dtype)
    for compat in (True, False):
        module = DensityAttention(5, compat_view=compat)
        module.load_state_dict(density_attention_from_official(golden.weights()))
        y = module.to(dtype)(x)
        if compat:
            golden.check("y", y)
            golden.check("weights", module.weights(x))
        else:
            with pytest.raises(AssertionError, match="off"):
                golden.check("y", y)


def product(
    x: torch.Tensor, offsets: torch.Tensor, widths: torch.Tensor, axis: int
) -> torch.Tensor:
    mean, variance = x.mean(axis, keepdim=True), x.var(axis, keepdim=True)
    total = torch.ones_like(x)
    for offset, width in zip(offsets, widths, strict=True):
        exponent = -((x - mean - offset) ** 2) / (2 * width**2 * (variance + 1e-8))
        total = total * exponent.exp() / (2 * math.pi * width**2).sqrt()
    return total


@given(gaussians=st.integers(1, 6), axis=st.integers(0, 2), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_the_closed_form_is_the_product(gaussians: int, axis: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 5, 3, generator=generator, dtype=torch.float64)
    x = x + torch.arange(3)  # no line without spread, where the product underflows
    x = x + torch.arange(5)[:, None] + torch.arange(4)[:, None, None]
    offsets, widths = torch.randn(2, gaussians, generator=generator, dtype=torch.float64)
    offsets, widths = 0.3 * offsets, widths.sign() * (widths.abs() + 0.5)
    wanted = product(x, offsets, widths, axis)
    normalised = wanted / wanted.sum(axis, keepdim=True)
    exact = gaussian_weights(x, offsets, widths, axis=axis)
    torch.testing.assert_close(exact, normalised, rtol=1e-9, atol=1e-12)
    clamped = gaussian_weights(x, offsets, widths, axis=axis, normalize="clamped")
    wanted = wanted / wanted.sum(axis, keepdim=True).clamp(min=1e-8)
    torch.testing.assert_close(clamped, wanted, rtol=1e-9, atol=1e-12)


def test_weights_follow_a_change_of_units() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    offsets, widths = torch.tensor([[0.3, -1.2], [0.8, 1.7]], dtype=torch.float64)
    plain = gaussian_weights(x, offsets, widths, axis=1)
    moved = gaussian_weights(7.0 * x - 3.0, 7.0 * offsets, widths, axis=1)
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", ["exact", "clamped"])
def test_a_mask_gives_the_weights_of_the_values_that_count(normalize: str) -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    offsets, widths = torch.tensor([[0.3, -1.2], [0.8, 1.7]], dtype=torch.float64)
    mask = torch.ones(2, 9, 4, dtype=torch.bool)
    mask[:, 6:] = False
    options = {"axis": 1, "normalize": normalize}
    masked = gaussian_weights(x, offsets, widths, mask=mask, **options)
    alone = gaussian_weights(x[:, :6], offsets, widths, **options)
    torch.testing.assert_close(masked[:, :6], alone)
    assert not masked[:, 6:].any()
    density = density_weights(x, offsets[0], widths[0], axis=1, mask=mask)
    torch.testing.assert_close(
        density[:, :6], density_weights(x[:, :6], offsets[0], widths[0], axis=1)
    )


def test_a_line_without_values_is_zero_with_zero_gradients() -> None:
    module = GaussianAttention(axis=1, gaussians=2)
    x = torch.randn(2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, True, True], [False, False, True, False]])
    y = module(x, mask=mask)
    assert not y[1].any()
    y.square().sum().backward()
    assert not x.grad[1].any()
    assert x.grad.isfinite().all()
    assert module.widths.grad.isfinite().all()


def test_widths_of_zero_are_not_singular() -> None:
    module = GaussianAttention(axis=1, gaussians=1)
    with torch.no_grad():
        module.widths.zero_()
    assert module(torch.randn(2, 5)).isfinite().all()


def test_gradients_reach_offsets_and_widths() -> None:
    module = GaussianAttention(axis=1, heads=2, gaussians=3)
    module(torch.randn(2, 9, 4)).square().sum().backward()
    assert module.offsets.grad.ne(0).all()
    assert module.widths.grad.ne(0).all()


@pytest.mark.parametrize("axis", [1, -1])
def test_gaussian_attention_is_a_product_of_gaussians_in_each_head(axis: int) -> None:
    x = torch.randn(2, 9, 7, dtype=torch.float64, requires_grad=True)
    offsets = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    widths = (torch.rand(2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    each, pieces = x.shape[axis] // 2, []
    for head, piece in enumerate(x.split([each, x.shape[axis] - each], dim=axis)):
        mean, variance = piece.mean(axis, keepdim=True), piece.var(axis, keepdim=True) + 1e-8
        density = 1.0
        for offset, width in zip(offsets[head], widths[head], strict=True):
            spread = width.square() * variance
            away = (piece - mean - offset).square() / spread
            density = density * (-away / 2).exp() / (2 * math.pi * spread).sqrt()
        pieces.append(piece * density / density.sum(axis, keepdim=True))
    found, wanted = gaussian_attention(x, offsets, widths, axis=axis), torch.cat(pieces, dim=axis)
    torch.testing.assert_close(found, wanted)
    leaves = [x, offsets, widths]
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("time", [(), (4,)])
def test_density_attention_is_its_formula_in_each_group(time: tuple[int, ...]) -> None:
    x = torch.randn(2, 6, *time, 5, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    width = (torch.rand(2, 5, dtype=torch.float64) + 0.5).requires_grad_()
    pieces = []
    for head in range(2):
        layers = x[:, 3 * head : 3 * head + 3]
        means = layers.mean(2) if time else layers
        spread = means.var(1, keepdim=True, unbiased=False) + 1e-8 + 1e-5
        away = (means - means.mean(1, keepdim=True) - offset[head]).square() / spread
        gate = (-away / (2 * width[head])).exp()
        pieces.append(layers * (gate[:, :, None] if time else gate))
    found, wanted = density_attention(x, offset, width), torch.cat(pieces, dim=1)
    torch.testing.assert_close(found, wanted)
    leaves = [x, offset, width]
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


def test_the_functions_are_the_modules() -> None:
    x, mask = torch.randn(2, 8, 5), torch.rand(2, 8, 5) > 0.3
    module = GaussianAttention(axis=1, heads=2, gaussians=3)
    torch.nn.init.normal_(module.offsets)
    found = gaussian_attention(x, module.offsets, module.widths, axis=1, mask=mask)
    assert torch.equal(found, module(x, mask=mask))
    density = DensityAttention(5, heads=2)
    torch.nn.init.normal_(density.offset)
    assert torch.equal(density_attention(x, density.offset, density.width), density(x))


def test_observed_weights_are_what_values_are_multiplied_by() -> None:
    x = torch.randn(2, 8, 5)
    module = GaussianAttention(axis=1, heads=2, gaussians=2)
    with observe(module) as record:
        y = module(x)
    weights = record["probe"]  # (b, lines, 1, 8)
    torch.testing.assert_close(weights[:, :, 0].transpose(1, 2) * x, y)
    torch.testing.assert_close(weights.unflatten(-1, (2, 4)).sum(-1), torch.ones(2, 5, 1, 2))
    density = DensityAttention(5, heads=2)
    with observe(density) as record:
        y = density(x)
    torch.testing.assert_close(record["probe"][:, :, 0].transpose(1, 2) * x, y)


def test_published_numbers_of_parameters() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(GaussianBlock(axes=(1, 1, 1), heads=(4, 4, 4), gaussians=(5, 5, 5))) == 120
    assert count(DensityAttention(1024, heads=8)) == 16_384
    assert count(DensityAttention(5120, heads=8)) == 81_920
    assert count(DensityAttention(1024)) == 2_048


def test_heads_of_the_density_form_matter() -> None:
    x = torch.randn(3, 12, 10)
    assert not torch.allclose(DensityAttention(10, heads=4)(x), DensityAttention(10)(x))


def test_importance_reaches_both_ends_and_names_the_layer() -> None:
    weights = torch.rand(6, 5)
    weights[4] += 2
    factor = importance_factor(weights)
    assert factor.min() == 0
    assert factor.max() == 1
    shares = layer_contributions(weights)
    assert shares.argmax() == 4
    torch.testing.assert_close(shares.sum(), torch.tensor(100.0))
    assert not importance_factor(torch.full((3, 2), 0.7)).any()


@pytest.mark.parametrize("layer", [0, 13, 23])
@pytest.mark.parametrize(
    "build",
    [lambda: DensityAttention(16), lambda: GaussianAttention(axis=1, gaussians=1)],
    ids=["density", "gaussian"],
)
def test_a_layer_that_tells_classes_apart_is_found(build, layer: int) -> None:
    """Of 24 layers of noise one holds the class, 0.8 or 2.2: the gate learns to keep that layer."""
    gate, generator = build(), torch.Generator().manual_seed(0)
    labels = torch.randint(2, (256,), generator=generator)
    x = torch.randn(256, 24, 16, generator=generator)
    x[:, layer] += 0.8 + 1.4 * labels[:, None]
    head = torch.nn.Linear(24 * 16, 2)
    torch.nn.init.zeros_(head.weight)
    groups = [{"params": gate.parameters(), "lr": 0.05}, {"params": head.parameters(), "lr": 0.002}]
    steps = torch.optim.Adam(groups)
    before = layer_contributions(gate.weights(x).mean(0).detach())
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(head(gate(x).flatten(1)), labels)
        steps.zero_grad()
        loss.backward()
        steps.step()
    shares = layer_contributions(gate.weights(x).mean(0).detach())
    assert before.argmax() != layer
    assert shares.argmax() == layer
    assert (head(gate(x).flatten(1)).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GaussianAttention(axis=1, heads=4)(torch.zeros(1, 7)), "at least 2 values"),
        (lambda: GaussianAttention(axis=0)(torch.zeros(4, 7)), "a batch axis and an axis 0"),
        (lambda: GaussianAttention(axis=1, gaussians=0), "at least 1"),
        (lambda: GaussianAttention(axis=1, normalize="never"), "normalize must be"),
        (lambda: GaussianBlock(axes=(1, 2), heads=(1,), gaussians=(1, 1)), "one number per layer"),
        (lambda: DensityAttention(0), "at least 1"),
        (
            lambda: gaussian_weights(torch.zeros(1, 3), torch.zeros(2), torch.ones(3), axis=1),
            "offsets and widths",
        ),
        (
            lambda: gaussian_attention(ROWS, torch.zeros(2, 3), torch.ones(2, 2), axis=1),
            r"widths must be \(2, 3\) \(heads, gaussians\), got \(2, 2\)",
        ),
        (
            lambda: gaussian_attention(ROWS, torch.zeros(3), torch.ones(3), axis=1),
            r"offsets must be \(any, any\) \(heads, gaussians\), got \(3,\)",
        ),
        (
            lambda: gaussian_attention(ROWS, torch.zeros(2, 3), torch.ones(2, 3), axis=0),
            "a batch axis and an axis 0",
        ),
        (
            lambda: gaussian_attention(ROWS, torch.zeros(5, 3), torch.ones(5, 3), axis=1),
            "each of 5 heads needs at least 2 values",
        ),
        (
            lambda: gaussian_attention(
                ROWS, torch.zeros(2, 3), torch.ones(2, 3), axis=1, mask=torch.ones(1, 8, 5) > 0
            ),
            "mask must be",
        ),
        (
            lambda: density_attention(ROWS, torch.zeros(2, 5), torch.ones(1, 5)),
            r"width must be \(2, 5\) \(heads, features\), got \(1, 5\)",
        ),
        (
            lambda: density_attention(ROWS, torch.zeros(2, 4), torch.ones(2, 4)),
            r"x must be \(batch, layers, 4\)",
        ),
        (
            lambda: density_attention(ROWS, torch.zeros(3, 5), torch.ones(3, 5)),
            "heads=3 must divide the number of layers, got 8",
        ),
        (lambda: gaussian_attention_from_official({"c": torch.zeros(1)}), "no weight of"),
        (lambda: density_attention_from_official({"b": torch.zeros(1)}), "no weight of"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
