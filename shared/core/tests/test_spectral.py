"""Spectral gating: golden numbers, the circular convolution that it equals, energies."""

from pathlib import Path

import pytest
import torch

from heed_core import observe
from heed_core.attention.spectral import (
    SpectralGate,
    resized_spectral_weight,
    spectral_gate,
    spectral_gate_from_spectformer,
    spectral_kernel,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "spectformer"
GRIDS = [(6, 8), (5, 7), (1, 4), (4, 1), (7,), (2, 3, 4)]


def convolved(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    axes = tuple(range(1, x.dim() - 1))
    for place in torch.cartesian_prod(*[torch.arange(n) for n in kernel.shape[:-1]]).reshape(
        -1, len(axes)
    ):
        y += kernel[tuple(place)] * x.roll(tuple(place.tolist()), axes)
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = SpectralGate(12, grid=(6, 8))
    module.load_state_dict(spectral_gate_from_spectformer(golden.weights()))
    module.to(dtype)
    x = golden.input("x", dtype)
    grid = x.reshape(2, 6, 8, 12)
    y = module(grid).reshape(x.shape)
    golden.check("y", y)
    kernel = spectral_kernel(module.weight, (6, 8))
    golden.check("kernel", kernel)
    golden.check("by_convolution", convolved(grid, kernel.detach()).reshape(x.shape))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.complex_weight", module.weight.grad)


def test_golden_notices_a_conjugate_weight() -> None:
    golden = GoldenFixture.load(GOLDEN)
    x = golden.tensors["input.x"]
    weight = golden.weights()["complex_weight"] * torch.tensor([1.0, -1.0])
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", spectral_gate(x.reshape(2, 6, 8, 12), weight).reshape(x.shape))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_gate_is_a_circular_convolution(grid: tuple[int, ...]) -> None:
    module = SpectralGate(3, grid=grid, std=1.0).double()
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    wanted = convolved(x, spectral_kernel(module.weight, grid).detach())
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("grid", GRIDS)
def test_observed_weights_reproduce_the_output(grid: tuple[int, ...]) -> None:
    module = SpectralGate(3, grid=grid, std=1.0).double()
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    with observe(module) as record:
        y = module(x)
    values = x.flatten(1, -2).movedim(-1, 1)[..., None]  # (b, c, N, 1)
    mixed = (record["probe"] @ values)[..., 0].movedim(1, -1)
    torch.testing.assert_close(mixed.reshape(x.shape), y)


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_of_one_are_the_identity(grid: tuple[int, ...]) -> None:
    module = SpectralGate(3, grid=grid).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(module.weight))
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), x)


def test_weights_of_modulus_one_keep_the_energy() -> None:
    """Parseval, for a weight whose self-conjugate frequencies are real."""
    angle = torch.rand(5, 4, 3, dtype=torch.float64) * 6
    angle[:, 0] = 0
    weight = torch.stack([angle.cos(), angle.sin()], dim=-1)
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    energy = spectral_gate(x, weight).square().sum((1, 2))
    torch.testing.assert_close(energy, x.square().sum((1, 2)))


def test_imaginary_parts_of_self_conjugate_frequencies_change_nothing() -> None:
    module = SpectralGate(3, grid=(6, 8), std=1.0).double()
    x = torch.randn(2, 6, 8, 3, dtype=torch.float64)
    before = module(x)
    before.square().sum().backward()
    with torch.no_grad():
        for u in (0, 3):
            for v in (0, 4):
                assert module.weight.grad[u, v, :, 1].abs().max() < 1e-12
                module.weight[u, v, :, 1] += 5.0
    torch.testing.assert_close(module(x), before)


def test_half_precision_in_and_out_with_float32_transforms() -> None:
    module = SpectralGate(4, grid=(7, 5), std=1.0)
    x = torch.randn(2, 7, 5, 4)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), exact)
    half = module.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=5e-3, atol=5e-3)


def test_a_resized_weight_keeps_constants_and_serves_another_grid() -> None:
    weight = torch.randn(14, 8, 3, 2)
    assert torch.equal(resized_spectral_weight(weight, (14, 14)), weight)
    resized = resized_spectral_weight(weight, (24, 20))
    assert resized.shape == (24, 11, 3, 2)
    flat = resized_spectral_weight(torch.ones_like(weight), (24, 24))
    torch.testing.assert_close(flat, torch.ones(24, 13, 3, 2))
    module = SpectralGate(3, grid=(24, 20))
    module.load_state_dict({"weight": resized})


def test_an_empty_batch_gives_zero_gradients() -> None:
    module = SpectralGate(4, grid=(3, 5))
    y = module(torch.zeros(0, 3, 5, 4))
    assert y.shape == (0, 3, 5, 4)
    y.sum().backward()
    assert not module.weight.grad.any()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SpectralGate(0, grid=(3, 4)), "at least 1"),
        (lambda: SpectralGate(4, grid=()), "at least 1"),
        (lambda: spectral_gate(torch.zeros(1, 3, 4, 2), torch.zeros(3, 4, 2, 2)), "weight must be"),
        (lambda: resized_spectral_weight(torch.zeros(3, 3, 2), (4, 4)), "weight must be"),
        (lambda: spectral_gate_from_spectformer({}), "complex_weight"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
