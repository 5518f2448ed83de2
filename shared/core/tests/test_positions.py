"""Codes added to the input, against the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.positions import (
    FourierPositions,
    GaussianGramPositions,
    LearnedPositions,
    SinePositions,
    axis_width,
    gaussian_gram_codes,
    grid_positions,
    sine_code,
    sine_grid,
)


def sine_by_loops(position: float, dim: int, base: float = 10000.0) -> list[float]:
    code = []
    for channel in range(0, dim, 2):
        angle = position / base ** (channel / dim)
        code += [math.sin(angle), math.cos(angle)]
    return code


def gaussian(n: int, sigma: float) -> torch.Tensor:
    return torch.tensor(
        [[math.exp(-((i - j) ** 2) / (2 * sigma**2)) for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )


def cosines(codes: torch.Tensor) -> torch.Tensor:
    unit = codes.double() / codes.double().norm(dim=-1, keepdim=True)
    return unit @ unit.T


@given(position=st.integers(0, 10**6), half=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_sine_code_equals_the_formula(position: int, half: int) -> None:
    code = sine_code(torch.tensor([position]), 2 * half)[0]
    want = torch.tensor(sine_by_loops(position, 2 * half))
    torch.testing.assert_close(code, want, atol=1e-6, rtol=0)


def test_sine_layouts_hold_the_same_numbers() -> None:
    positions = torch.arange(7)
    interleaved = sine_code(positions, 12)
    half = sine_code(positions, 12, layout="half")
    assert torch.equal(half, torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], dim=-1))
    assert not torch.equal(half, interleaved)


def test_sine_keeps_far_positions_apart() -> None:
    far = sine_code(torch.tensor([10**6, 10**6 + 1]), 8)
    want = torch.tensor([sine_by_loops(10**6, 8), sine_by_loops(10**6 + 1, 8)])
    torch.testing.assert_close(far, want, atol=1e-6, rtol=0)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), dim=st.integers(1, 13))
@settings(max_examples=40, deadline=None)
def test_sine_grid_concatenates_the_axes_in_order(shape: list[int], dim: int) -> None:
    grid = sine_grid(shape, dim)
    width = axis_width(dim, len(shape))
    assert tuple(grid.shape) == (*shape, dim)
    for place, code in zip(grid_positions(shape).tolist(), grid.flatten(0, -2), strict=True):
        want = [number for position in place for number in sine_by_loops(position, width)][:dim]
        torch.testing.assert_close(code, torch.tensor(want), atol=1e-6, rtol=0)


def test_three_axes_of_256_channels_have_86_each() -> None:
    assert axis_width(256, 3) == 86
    grid = sine_grid((3, 9, 2), 256)
    assert torch.equal(grid[0, 0, :, :172], grid[0, 0, :1, :172].expand(2, -1))
    assert not torch.equal(grid[0, 0, 0, 172:], grid[0, 0, 1, 172:])


def test_normalised_grid_ends_at_a_full_turn() -> None:
    grid = sine_grid((3, 4), 8, normalise=True)
    want = torch.tensor([*sine_by_loops(2 * math.pi, 4), *sine_by_loops(math.pi / 2, 4)])
    torch.testing.assert_close(grid[2, 0], want, atol=1e-6, rtol=0)


def test_sine_module_adds_the_grid_and_continues_a_row() -> None:
    module = SinePositions(10)
    x = torch.randn(2, 3, 5, 10)
    torch.testing.assert_close(module(x), x + sine_grid((3, 5), 10))
    row = torch.randn(2, 9, 10)
    whole = module(row)
    assert torch.equal(module(row[:, 4:], offset=4), whole[:, 4:])
    assert not torch.equal(module(row[:, 4:]), whole[:, 4:])
    assert module(row.bfloat16()).dtype == torch.bfloat16
    assert not list(module.parameters())


def test_learned_positions_slice_offset_and_interpolate() -> None:
    table = LearnedPositions(4, size=(5, 7))
    x = torch.zeros(1, 3, 6, 4)
    assert torch.equal(table(x)[0], table.table[:3, :6])
    row = LearnedPositions(4, size=8)
    assert torch.equal(row(torch.zeros(1, 3, 4), offset=5)[0], row.table[5:8])
    smooth = LearnedPositions(4, size=(5, 7), interpolate=True)
    assert torch.equal(smooth(torch.zeros(1, 5, 7, 4))[0], smooth.table)
    with torch.no_grad():
        smooth.table.copy_(torch.arange(7.0)[:, None].expand(5, 7, 4))
    resized = smooth(torch.zeros(1, 2, 14, 4))[0]
    torch.testing.assert_close(resized[0, 3:6, 0], torch.tensor([1.25, 1.75, 2.25]))


@given(n=st.integers(1, 30), sigma=st.floats(1.0, 3.0), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_gaussian_gram_codes_are_exact(n: int, sigma: float, seed: int) -> None:
    codes = gaussian_gram_codes(n, 86, sigma=sigma, seed=seed)
    assert (cosines(codes) - gaussian(n, sigma)).abs().max() < 1e-5
    torch.testing.assert_close(codes.norm(dim=-1), torch.full((n,), 8.0), atol=1e-3, rtol=0)


def test_gaussian_gram_numbers_of_the_paper() -> None:
    cosine = cosines(gaussian_gram_codes(14, 86))
    for distance, value in enumerate([0.8825, 0.6065, 0.3247, 0.1353, 0.0439], start=1):
        torch.testing.assert_close(
            cosine.diagonal(distance),
            torch.full((14 - distance,), value, dtype=torch.float64),
            atol=6e-5,
            rtol=0,
        )


def test_gaussian_gram_seed_turns_the_codes_only() -> None:
    one, other = gaussian_gram_codes(11, 86, seed=1), gaussian_gram_codes(11, 86, seed=2)
    assert torch.equal(one, gaussian_gram_codes(11, 86, seed=1))
    assert (one - other).abs().max() > 0.1


def test_gaussian_gram_fit_by_adam_goes_the_right_way() -> None:
    start = gaussian_gram_codes(11, 86, fit="adam", norm=None, steps=0)
    codes = gaussian_gram_codes(11, 86, fit="adam", norm=None, steps=300)
    assert (cosines(start) - gaussian(11, 2.0)).abs().max() > 0.5
    assert (cosines(codes) - gaussian(11, 2.0)).abs().max() < 0.15
    scaled = gaussian_gram_codes(11, 86, fit="adam", norm=8.0, steps=10)
    torch.testing.assert_close(scaled.norm(dim=-1).mean().item(), 8.0, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_gaussian_gram_fit_by_adam_in_full() -> None:
    codes = gaussian_gram_codes(14, 86, fit="adam", norm=None)
    assert (cosines(codes) - gaussian(14, 2.0)).abs().max() < 2e-3
    norms = codes.norm(dim=-1)
    assert (norms - norms.mean()).abs().max() < 1e-3 * norms.mean()


def test_gaussian_gram_too_few_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="dim=4 channels cannot hold 30"):
        gaussian_gram_codes(30, 4)
    # sigma so wide that few channels hold many rows
    codes = gaussian_gram_codes(12, 8, sigma=6.0)
    assert (cosines(codes) - gaussian(12, 6.0)).abs().max() < 1e-5


def test_gaussian_gram_module_is_frozen_and_joins_the_axes() -> None:
    module = GaussianGramPositions(11, 256, axes=3)
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"table"}
    assert tuple(module.table.shape) == (15, 86)
    assert torch.equal(module.table[11:], torch.zeros(4, 86))
    code = module(torch.tensor([[[2, 5, 1]], [[11, 11, 0]]]))
    want = torch.cat([module.table[2], module.table[5], module.table[1]])[:256]
    assert torch.equal(code[0, 0], want)
    assert torch.equal(code[1, 0, :172], torch.zeros(172))


def test_fourier_positions_equal_the_formula() -> None:
    module = FourierPositions(6, axes=2, features=8, hidden=5, gamma=0.5).double()
    x = torch.rand(3, 4, 2, dtype=torch.float64)
    first, _, second = module.perceptron
    for place, code in zip(x.flatten(0, 1), module(x).flatten(0, 1), strict=True):
        angles = [float(place @ row) for row in module.frequencies.detach()]
        waves = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        r = torch.tensor(waves, dtype=torch.float64) / math.sqrt(8)
        hidden = first.weight @ r + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        torch.testing.assert_close(code, second.weight @ hidden + second.bias)
    module(x).sum().backward()
    assert module.frequencies.grad is not None
    frozen = FourierPositions(6, learnable=False)
    assert "frequencies" not in dict(frozen.named_parameters())
    assert "frequencies" in frozen.state_dict()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: sine_code(torch.arange(3), 5), "dim must be even"),
        (lambda: sine_code(torch.arange(3), 4, layout="swirl"), "layout must be"),
        (lambda: sine_grid((3, 0), 4), "shape must"),
        (lambda: SinePositions(4)(torch.zeros(1, 3, 5)), "x must be"),
        (lambda: SinePositions(4)(torch.zeros(1, 3, 3, 4), offset=2), "offset=2"),
        (lambda: LearnedPositions(4, size=3)(torch.zeros(1, 5, 4)), "interpolate=True"),
        (lambda: LearnedPositions(4, size=3)(torch.zeros(1, 2, 4), offset=2), "up to 4"),
        (lambda: LearnedPositions(4, size=(3, 3))(torch.zeros(1, 2, 4)), "2 axes"),
        (lambda: gaussian_gram_codes(3, 4, fit="sgd"), "fit must be"),
        (lambda: gaussian_gram_codes(3, 4, norm=None), "norm=None"),
        (lambda: gaussian_gram_codes(3, 4, sigma=0.0), "sigma"),
        (lambda: GaussianGramPositions(3, 8, axes=2)(torch.zeros(1, 3).long()), "2 numbers"),
        (lambda: FourierPositions(4, axes=2)(torch.zeros(1, 3)), "2 numbers"),
        (lambda: FourierPositions(4, features=3), "features must be even"),
    ],
)
def test_bad_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_fourier_codes_keep_their_coordinates_under_autocast() -> None:
    module = FourierPositions(16, axes=2)
    coordinates = torch.rand(20, 2) * 500
    wanted = module(coordinates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(coordinates)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.bad_input
def test_coordinates_without_a_code_are_named() -> None:
    code = GaussianGramPositions(14, 32, zero_rows=2)
    for wrong in (16, -1):
        with pytest.raises(ValueError, match="coordinates must be from 0 to 15"):
            code(torch.tensor([[wrong]]))
    with pytest.raises(TypeError, match="coordinates must be int64"):
        code(torch.tensor([[1.0]]))
