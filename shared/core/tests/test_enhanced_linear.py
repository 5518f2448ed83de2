"""Enhanced linear attention and its local module: golden numbers and what the paper claims."""

from pathlib import Path

import pytest
import torch

from heed_core import observe, steer
from heed_core.attention.enhanced_linear import (
    EnhancedLinearAttention,
    EnhancedLinearBlock,
    LocalConcentration,
    LocalWindowBlock,
    enhanced_linear_attention,
    enhanced_linear_block_from_l2vit,
    enhanced_linear_weights,
    local_window_block_from_l2vit,
)
from heed_core.attention.multi_axis import partition
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "l2vit"


def official(golden: GoldenFixture, dtype: torch.dtype, **options: float) -> EnhancedLinearBlock:
    module = EnhancedLinearBlock(24, heads=3, **options)
    module.load_state_dict(enhanced_linear_block_from_l2vit(golden.weights()))
    return module.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_stages_and_gradients(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = official(golden, dtype)
    seen: dict[str, torch.Tensor] = {}
    for name in ("attention", "local", "contract"):
        module.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.update({name: output})
        )
    x = golden.input("x", dtype)
    grid = x.unflatten(1, (6, 7))
    y = module(grid).flatten(1, 2)
    golden.check("y", y)
    positions = grid + module.positions(grid.movedim(-1, 1)).movedim(1, -1)
    golden.check("cpe", positions.flatten(1, 2))
    golden.check("attn", seen["attention"])
    golden.check("lcm", seen["local"].flatten(1, 2))
    golden.check("mlp", seen["contract"].flatten(1, 2))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.attn.temperature", module.attention.temperature.grad)
    golden.check("grad.weights.local_mp.conv1.weight", module.local.first.weight.grad)
    parts = (module.attention.query, module.attention.key, module.attention.value)
    golden.check("grad.weights.attn.qkv.weight", torch.cat([part.weight.grad for part in parts]))


def test_golden_denominators_stand_on_both_sides_of_the_clamp() -> None:
    golden = GoldenFixture.load(GOLDEN)
    attention = official(golden, torch.float64).attention
    x = golden.tensors["output64.cpe"]
    normed = official(golden, torch.float64).attention_norm(x)
    query, key = (
        layer(normed).unflatten(-1, (3, 8)).transpose(1, 2).relu()
        for layer in (attention.query, attention.key)
    )
    sums = (query * key.sum(2, keepdim=True)).sum(-1)
    golden.check("denominator_before_clamp", sums)
    assert (sums < 100).any()
    assert (sums > 100).any()


def test_golden_notices_another_clamp() -> None:
    golden = GoldenFixture.load(GOLDEN)
    module = official(golden, torch.float32, denominator_min=1.0)
    with pytest.raises(AssertionError, match="off"):
        golden.check(
            "y", module(golden.input("x", torch.float32).unflatten(1, (6, 7))).flatten(1, 2)
        )


def local(golden: GoldenFixture, dtype: torch.dtype) -> LocalWindowBlock:
    module = LocalWindowBlock(24, heads=3, size=(3, 3))
    module.load_state_dict(local_window_block_from_l2vit(golden.weights()))
    return module.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_local_block(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "local")
    module = local(golden, dtype)
    seen: dict[str, torch.Tensor] = {}
    for name in ("attention", "positions", "later_positions"):
        module.get_submodule(name).register_forward_hook(
            lambda _, given, output, name=name: seen.update({name: output + 0, f"{name}.in": given})
        )
    x = golden.input("x", dtype)
    y = module(x.unflatten(1, (5, 7))).flatten(1, 2)
    golden.check("y", y)
    golden.check("windows", partition(seen["attention"], (3, 3)).flatten(0, 1))
    for number, name in enumerate(("positions", "later_positions")):
        stage = seen[f"{name}.in"][0] + seen[name]
        golden.check(f"cpe{number}", stage.movedim(1, -1).flatten(1, 2))
    golden.loss(y).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.cpe.1.proj.weight", module.later_positions.weight.grad)
    layers = (module.attention.query, module.attention.key, module.attention.value)
    golden.check("grad.weights.attn.qkv.weight", torch.cat([part.weight.grad for part in layers]))


def test_golden_notices_padding_that_is_masked() -> None:
    golden = GoldenFixture.load(GOLDEN / "local")
    module = local(golden, torch.float32)
    plain = module.attention.forward

    def masked(x: torch.Tensor) -> torch.Tensor:
        return plain(x, mask=x.ne(0).any(-1))

    module.attention.forward = masked
    x = golden.input("x", torch.float32).unflatten(1, (5, 7))
    with pytest.raises(AssertionError, match="off"):
        golden.check("y", module(x).flatten(1, 2))


def qkv(tokens: int = 9, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(3, 2, 4, tokens, 6, dtype=torch.float64)


@pytest.mark.parametrize("denominator_min", [1e-6, 8.0, 100.0])
def test_the_order_of_products_does_not_matter(denominator_min: float) -> None:
    temperature = torch.rand(4, 1, 1, dtype=torch.float64)
    mask = torch.rand(2, 9) > 0.3
    options = {"temperature": temperature, "padding_mask": mask, "denominator_min": denominator_min}
    query, key, value = qkv()
    linear = enhanced_linear_attention(query, key, value, **options)
    quadratic = enhanced_linear_attention(query, key, value, key_first=False, **options)
    torch.testing.assert_close(linear, quadratic, rtol=1e-12, atol=1e-12)
    weights = enhanced_linear_weights(query, key, **options)
    torch.testing.assert_close(weights @ value, linear, rtol=1e-12, atol=1e-12)
    assert (weights >= 0).all()
    assert (weights.sum(-1) <= temperature[:, 0] + 1e-12).all()


def test_observed_weights_reproduce_the_output() -> None:
    module = EnhancedLinearAttention(8, heads=2, denominator_min=2.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with observe(module) as record:
        output = module(x)
    value = module.value(x).unflatten(-1, (2, 4)).transpose(1, 2)
    mixed = (record["probe"] @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.out(mixed), output)
    with pytest.raises(ValueError, match="not steered"), steer(module, lambda w, call: w):
        pass


def test_queries_without_a_positive_feature_give_zeros() -> None:
    query, key, value = qkv()
    for minimum in (1e-3, 100.0):
        output = enhanced_linear_attention(-query.abs(), key, value, denominator_min=minimum)
        assert torch.equal(output, torch.zeros_like(output))


def test_sums_over_many_tokens_do_not_overflow_half_precision() -> None:
    query, key, value = (x.float().abs() + 4 for x in qkv(tokens=4096))
    exact = enhanced_linear_attention(query, key, value)
    half = enhanced_linear_attention(query.half(), key.half(), value.half())
    torch.testing.assert_close(half.float(), exact, rtol=2e-3, atol=2e-3)
    rough = enhanced_linear_attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    torch.testing.assert_close(rough.float(), exact, rtol=2e-2, atol=2e-2)


def test_the_local_module_sees_13_by_13_cells() -> None:
    module = LocalConcentration(2).eval()
    x = torch.randn(1, 19, 21, 2)
    changed = x.clone()
    changed[0, 9, 10] += 1
    reached = (module(x) - module(changed)).abs().sum(-1)[0].ne(0)
    wanted = torch.zeros(19, 21, dtype=torch.bool)
    wanted[3:16, 4:17] = True
    assert torch.equal(reached, wanted)


def test_no_map_of_all_pairs_is_kept_for_the_gradient() -> None:
    module = EnhancedLinearAttention(8, heads=2)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(1, 512, 8))
    assert max(kept) <= 512 * 8


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes: int) -> None:
    module = EnhancedLinearBlock(8, heads=2, axes=axes)
    x = torch.randn(2, *[3, 4, 5][:axes], 8)
    assert module(x).shape == x.shape


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: EnhancedLinearAttention(8, heads=2, denominator_min=0.0), "denominator_min"),
        (lambda: EnhancedLinearAttention(8, heads=3), "heads must divide"),
        (lambda: LocalConcentration(8, kernel=6), "kernel must be odd"),
        (lambda: LocalConcentration(8, axes=4), "axes must be 1, 2 or 3"),
        (
            lambda: enhanced_linear_attention(torch.zeros(1, 2, 3, 4), *torch.zeros(2, 1, 2, 3, 5)),
            "query must be",
        ),
        (lambda: enhanced_linear_block_from_l2vit({"gamma": torch.zeros(1)}), "no weight of"),
        (
            lambda: local_window_block_from_l2vit({"norm3.bias": torch.zeros(1)}),
            "no weight of L2ViT's LWABlock",
        ),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
