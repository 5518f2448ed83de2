"""Position and channel attention: golden numbers, the formulas in loops, what the papers claim."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from heed_core import observe, steer
from heed_core.attention.channel import ChannelGramAttention, channel_gram_attention
from heed_core.attention.position import PositionAttention, position_attention

GOLDEN = Path(__file__).parent / "golden" / "msga" / "fixture.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def official_pair(
    golden: dict[str, torch.Tensor], dtype: torch.dtype, scale: float = 1.0
) -> tuple[PositionAttention, ChannelGramAttention]:
    position, channel = PositionAttention(24, scale=scale), ChannelGramAttention()
    state = {"gamma": golden["weights.iso_pam.gamma"]}
    for part in ("query", "key", "value"):
        weight = golden[f"weights.iso_pam.{part}_conv.weight"]
        state[f"{part}.weight"] = weight.flatten(1)
        state[f"{part}.bias"] = golden[f"weights.iso_pam.{part}_conv.bias"]
    position.load_state_dict(state)
    channel.load_state_dict({"gamma": golden["weights.iso_cam.gamma"]})
    return position.to(dtype), channel.to(dtype)


def off(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    return ((ours.double() - reference.double()).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_golden_outputs_weights_and_gradients(golden, dtype, tolerance: float, impl: str) -> None:
    position, channel = official_pair(golden, dtype)
    position.attend.impl = channel.attend.impl = impl
    x = golden["input.iso"].clone().to(dtype).requires_grad_()
    pam, cam = position(x), channel(x)
    assert off(pam, golden["output64.iso.pam"]) < tolerance
    assert off(cam, golden["output64.iso.cam"]) < tolerance
    k = torch.arange(pam.numel(), dtype=dtype).reshape(pam.shape)
    (100 * ((pam + 2 * cam) * torch.sin(0.7 * k)).mean()).backward()
    # the stored gradients were rounded to float32
    tolerance = max(tolerance, 1e-6)
    assert off(x.grad, golden["grad.iso.input"]) < tolerance
    assert off(channel.gamma.grad, golden["grad.iso.weights.cam.gamma"]) < tolerance
    weight = golden["grad.iso.weights.pam.query_conv.weight"].flatten(1)
    assert off(position.query.weight.grad, weight) < tolerance


def test_golden_attention_maps_through_observe(golden) -> None:
    position, channel = official_pair(golden, torch.float64)
    x = golden["input.iso"].double()
    with observe(position) as maps:
        position(x)
    assert off(maps["attend"][:, 0], golden["output.iso.pam_attention"]) < 2e-5
    with observe(channel) as maps:
        channel(x)
    assert off(maps["attend"][:, 0], golden["output.iso.cam_attention"]) < 2e-5


def test_golden_notices_a_wrong_scale(golden) -> None:
    position, _ = official_pair(golden, torch.float64, scale=3**-0.5)
    out = position(golden["input.iso"].double())
    assert off(out, golden["output64.iso.pam"]) > 1e-3


def position_by_loops(module: PositionAttention, x: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = x.shape
    out = torch.empty_like(x)
    places = [(r, c) for r in range(height) for c in range(width)]
    for b in range(batch):
        queries = [module.query(x[b, :, r, c]) for r, c in places]
        keys = [module.key(x[b, :, r, c]) for r, c in places]
        values = [module.value(x[b, :, r, c]) for r, c in places]
        for i, (r, c) in enumerate(places):
            scores = [(queries[i] * key).sum().item() for key in keys]
            total = sum(math.exp(score) for score in scores)
            mixed = torch.zeros(channels, dtype=x.dtype)
            for score, value in zip(scores, values, strict=True):
                mixed += math.exp(score) / total * value
            out[b, :, r, c] = module.gamma * mixed + x[b, :, r, c]
    return out


def test_position_attention_equals_a_double_loop_on_an_8_by_8_map() -> None:
    module = PositionAttention(64, gamma=0.7).double()
    with torch.no_grad():
        x = torch.randn(1, 64, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(module(x), position_by_loops(module, x))
        scaled = PositionAttention(64, gamma=0.7, scale=8**-0.5).double()
        scaled.load_state_dict(module.state_dict())
        assert (scaled(x) - module(x)).abs().max() > 1e-3


def channel_by_loops(x: torch.Tensor, gamma: float, *, invert: bool) -> torch.Tensor:
    rows = x.flatten(2)
    out = torch.empty_like(rows)
    for b, sample in enumerate(rows):
        for i, row in enumerate(sample):
            energies = [(row * other).sum().item() for other in sample]
            most = max(energies)
            exponents = [most - e if invert else e - most for e in energies]
            total = sum(math.exp(e) for e in exponents)
            mixed = sum(
                math.exp(e) / total * other for e, other in zip(exponents, sample, strict=True)
            )
            out[b, i] = gamma * mixed + row
    return out.reshape(x.shape)


@pytest.mark.parametrize("invert", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 4, 7), (2, 3, 2, 3, 4)])
def test_channel_attention_equals_a_double_loop(shape, invert: bool) -> None:
    x = 0.5 * torch.randn(shape, dtype=torch.float64)
    module = ChannelGramAttention(invert=invert, gamma=0.7).double()
    torch.testing.assert_close(
        module(x), channel_by_loops(x, 0.7, invert=invert), rtol=1e-6, atol=1e-7
    )
    mixed = channel_gram_attention(x, invert=invert)
    torch.testing.assert_close(module.gamma * mixed + x, module(x))


@pytest.mark.parametrize("shape", [(2, 16, 5, 7), (1, 16, 9), (2, 16, 2, 3, 4)])
def test_functional_form_is_what_the_module_adds(shape) -> None:
    module = PositionAttention(16, gamma=1.5).double()
    x = torch.randn(shape, dtype=torch.float64)

    def project(layer: torch.nn.Linear) -> torch.Tensor:
        return layer(x.movedim(1, -1)).movedim(-1, 1)

    mixed = position_attention(project(module.query), project(module.key), project(module.value))
    torch.testing.assert_close(1.5 * mixed + x, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_are_the_identity_at_first_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 16, 5, 7).to(dtype)
    for module in (PositionAttention(16), ChannelGramAttention()):
        assert torch.equal(module.to(dtype)(x), x)


@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_permuting_places_permutes_both(height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, height, width, generator=generator, dtype=torch.float64)
    order = torch.randperm(height * width, generator=generator)

    def permuted(maps: torch.Tensor) -> torch.Tensor:
        return maps.flatten(2)[:, :, order].reshape(maps.shape)

    for module in (PositionAttention(8, gamma=0.9), ChannelGramAttention(gamma=0.9)):
        module.double()
        torch.testing.assert_close(module(permuted(x)), permuted(module(x)))


def test_permuting_channels_permutes_channel_attention_and_keeps_its_map_of_places() -> None:
    module = ChannelGramAttention(gamma=0.9).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])
    with observe(module) as maps:
        module(x)
        before = maps["attend"]
        module(x.flip(2, 3))
    torch.testing.assert_close(maps["attend"], before)


def test_channels_that_are_alike_give_each_other_less_weight() -> None:
    same, other = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    x = torch.stack([same, same, other]).reshape(1, 3, 2, 2)
    with observe(module := ChannelGramAttention(gamma=1.0)) as maps:
        module(x)
    weights = maps["attend"][0, 0]
    assert weights[0, 1] < weights[0, 2]
    assert weights[1, 0] < weights[1, 2]
    # by hand: E = [2, 2, 0], max - E = [0, 0, 2]
    torch.testing.assert_close(weights[0, 2].item(), math.e**2 / (2 + math.e**2), rtol=1e-6, atol=0)


def test_channel_products_do_not_overflow_half_precision() -> None:
    x = torch.full((1, 4, 64, 64), 8.0)
    x[:, 1:] *= torch.tensor([1.0, 0.5, 0.25]).reshape(1, 3, 1, 1)
    module = ChannelGramAttention(gamma=1.0)
    exact = module(x)
    half = module.half()(x.half())
    assert half.isfinite().all()
    torch.testing.assert_close(half.float(), exact, atol=1e-2, rtol=2e-3)
    module = module.float()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x), exact)


def test_both_can_be_steered() -> None:
    x = torch.randn(1, 8, 3, 5)
    for module in (PositionAttention(8, gamma=1.0), ChannelGramAttention(gamma=1.0)):
        with steer(module, lambda weights, call: torch.eye(weights.shape[-1]).expand_as(weights)):
            steered = module(x)
        value = x if isinstance(module, ChannelGramAttention) else None
        if value is None:
            value = module.value(x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(steered, value + x)
        assert not torch.allclose(module(x), steered)


def test_gradients_reach_every_parameter_once_gamma_has_moved() -> None:
    module = PositionAttention(16, gamma=0.1)
    module(torch.randn(2, 16, 5, 7)).square().sum().backward()
    # a bias of the keys shifts a row of scores by one number, which a softmax does not see
    for name, parameter in module.named_parameters():
        if name != "key.bias":
            assert parameter.grad.abs().max() > 0, name


def test_position_attention_holds_no_map_of_all_pairs_in_backward() -> None:
    module = PositionAttention(16, gamma=1.0)
    x = torch.randn(1, 16, 24, 32, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert max(kept) < (24 * 32) ** 2 / 4


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: PositionAttention(0), "dim and qk_dim"),
        (lambda: PositionAttention(8, qk_dim=0), "dim and qk_dim"),
        (lambda: PositionAttention(8)(torch.zeros(1, 7, 3, 3)), "x must be \\(batch, 8"),
        (lambda: PositionAttention(8)(torch.zeros(1, 8)), "x must be"),
        (lambda: ChannelGramAttention()(torch.zeros(1, 8)), "x must be"),
        (
            lambda: position_attention(
                torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 8, 3)
            ),
            "one spatial size",
        ),
    ],
)
def test_wrong_shapes_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
