"""ContMix: golden numbers inside the published block, clamped windows, observed kernels."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from heed_core import observe
from heed_core.attention.context_mixing import (
    ContextMixing,
    clamped_relative_bias,
    context_kernels,
    context_mixing,
    context_mixing_from_overlock,
    neighborhood_av,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden" / "overlock"
DTYPES = [torch.float64, torch.float32]


class Published:
    """The rest of the published block, around the mechanism."""

    def __init__(self, golden: GoldenFixture, dtype: torch.dtype) -> None:
        weights = golden.weights()
        self.mixing = ContextMixing(16, context_dim=8, heads=4, kernel=7)
        self.mixing.load_state_dict(context_mixing_from_overlock(weights))
        self.mixing.to(dtype).eval()
        self.weights = {
            name: x.to(dtype) if x.is_floating_point() else x for name, x in weights.items()
        }

    def conv(self, x: torch.Tensor, name: str, dilation: int = 1) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        padding = dilation * (weight.shape[-1] // 2)
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        return F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (
            self.weights[f"{name}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias)

    def layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6).movedim(-1, 1)

    def response_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        share = size / (size.mean(1, keepdim=True) + 1e-6)
        return (self.weights[f"{name}.gamma"] * share + 1) * x + self.weights[f"{name}.beta"]

    def lepe(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x, "lepe.0.lk_origin"), "lepe.0.origin_bn")
        for side, dilation in ((5, 1), (3, 1), (3, 2), (3, 3)):
            branch = self.conv(x, f"lepe.0.dil_conv_k{side}_{dilation}", dilation)
            y = y + self.norm(branch, f"lepe.0.dil_bn_k{side}_{dilation}")
        return self.norm(y, "lepe.1")

    def before(self, x: torch.Tensor, context: torch.Tensor, initial: torch.Tensor):
        context = self.conv(context, "x_scale") + self.conv(initial, "h_scale")
        joined = torch.cat([x, context], dim=1)
        skip = joined + self.conv(joined, "dwconv1")
        normed = self.layer_norm(skip, "norm1")
        value = F.gelu(self.norm(self.conv(normed, "fusion.0"), "fusion.1"))
        return skip, normed, self.response_norm(self.conv(value, "fusion.3"), "fusion.4")

    def after(self, skip: torch.Tensor, value: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.norm(self.conv(value, "gate.0"), "gate.1"))
        y = mixed + self.lepe(value)
        squeezed = F.gelu(self.conv(y.mean((2, 3), keepdim=True), "se_layer.proj.1"))
        y = y * self.conv(squeezed, "se_layer.proj.3").sigmoid() * gate
        y = self.conv(skip, "ls1") + self.conv(self.norm(y, "proj.0"), "proj.1")
        y = y + self.conv(y, "dwconv2")
        hidden = F.gelu(self.conv(self.layer_norm(y, "norm2"), "mlp.0"))
        hidden = self.response_norm(hidden + self.conv(hidden, "mlp.2"), "mlp.3")
        return self.conv(y, "ls2") + self.conv(hidden, "mlp.4")

    def __call__(self, x: torch.Tensor, context: torch.Tensor, initial: torch.Tensor):
        skip, normed, value = self.before(x, context, initial)
        return self.after(skip, value, self.mixing(normed[:, :16], normed[:, 16:], value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_block_and_gradients(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    block = Published(golden, dtype)
    x, context, initial = (golden.input(n, dtype) for n in ("x", "context", "context_initial"))
    skip, normed, value = block.before(x, context, initial)
    golden.check("fusion", value)
    mixing = block.mixing
    golden.check("query", mixing.query_norm(mixing.query(normed[:, :16])))
    small, large = mixing.weights(normed[:, :16], normed[:, 16:])
    golden.check("weights_small_kernel", small)
    golden.check("weights_large_kernel", large)
    halves = value.unflatten(1, (2, 4, 2)).movedim(3, -1)
    golden.check("window_sum_small", neighborhood_av(small, halves[:, 0], kernel=5))
    golden.check("window_sum_large", neighborhood_av(large, halves[:, 1], kernel=7))
    mixed = mixing(normed[:, :16], normed[:, 16:], value)
    golden.check("mixed", mixed)
    y = block.after(skip, value, mixed)
    golden.check("y", y[:, :16])
    golden.check("context", y[:, 16:])
    golden.loss(y[:, :16]).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.rpb2", mixing.large_bias.grad)
    golden.check("grad.weights.weight_query.0.weight", mixing.query.weight.grad)
    golden.check("grad.weights.weight_proj.weight", mixing.mix.weight.grad[..., None, None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_map_smaller_than_the_kernel(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN)
    names = ("x_small", "context_small", "context_initial_small")
    y = Published(golden, dtype)(*(golden.input(name, dtype) for name in names))
    golden.check("y.small", y[:, :16])
    golden.check("context.small", y[:, 16:])


def starts(size: int, kernel: int) -> list[int]:
    return [min(max(i - kernel // 2, 0), size - kernel) for i in range(size)]


def by_loops(weights: torch.Tensor, value: torch.Tensor, kernel: int) -> torch.Tensor:
    total = torch.zeros_like(value)
    for i, row in enumerate(starts(value.shape[2], kernel)):
        for j, column in enumerate(starts(value.shape[3], kernel)):
            for p in range(kernel):
                for q in range(kernel):
                    weight = weights[:, :, i, j, p * kernel + q, None]
                    total[:, :, i, j] += weight * value[:, :, row + p, column + q]
    return total


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("more", [(0, 0), (0, 3), (2, 1)])
def test_windows_equal_loops_with_gradients(kernel: int, more: tuple[int, int]) -> None:
    size = (kernel + more[0], kernel + more[1])
    weights = torch.randn(2, 2, *size, kernel**2, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 2, *size, 3, dtype=torch.float64, requires_grad=True)
    found, wanted = neighborhood_av(weights, value, kernel=kernel), by_loops(weights, value, kernel)
    torch.testing.assert_close(found, wanted)
    probe = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (weights, value), probe),
        torch.autograd.grad(wanted, (weights, value), probe),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_one_centre_weight_is_the_identity_inside_and_the_whole_map_its_mean() -> None:
    value = torch.randn(1, 2, 7, 9, 3)
    weights = torch.zeros(1, 2, 7, 9, 9)
    weights[..., 4] = 1
    found = neighborhood_av(weights, value, kernel=3)
    assert torch.equal(found[:, :, 1:-1, 1:-1], value[:, :, 1:-1, 1:-1])
    even = torch.full((1, 2, 7, 7, 49), 1 / 49)
    found = neighborhood_av(even, value[:, :, :, :7], kernel=7)
    wanted = value[:, :, :, :7].mean((2, 3), keepdim=True).expand_as(found)
    torch.testing.assert_close(found, wanted)


def test_bias_by_offset_equals_loops() -> None:
    kernel, height, width = 3, 4, 6
    table = torch.randn(2, 5, 5)
    found = clamped_relative_bias(table, height, width)
    for i, row in enumerate(starts(height, kernel)):
        for j, column in enumerate(starts(width, kernel)):
            for p in range(kernel):
                for q in range(kernel):
                    wanted = table[:, row + p - i + 2, column + q - j + 2]
                    assert torch.equal(found[:, i, j, p * kernel + q], wanted)


def mixing(**options: int) -> ContextMixing:
    module = ContextMixing(8, context_dim=4, heads=2, kernel=5, small_kernel=3, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double().eval()


def tensors() -> dict[str, torch.Tensor]:
    """Kernels 3 and 5 of 4 regions for 2 groups, on a map of 6 x 7."""
    shapes = {
        "query": (2, 2, 6, 7, 3), "key": (2, 2, 4, 3), "value": (2, 2, 2, 6, 7, 3),
        "weight": (34, 4), "bias": (34,), "small_bias": (2, 5, 5), "large_bias": (2, 9, 9),
    }  # fmt: skip
    return {
        name: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def test_the_function_is_its_formula_with_gradients() -> None:
    given = tensors()
    tables = (given["small_bias"], given["large_bias"])
    affinity = torch.einsum("bghwc,bgrc->bghwr", given["query"] * 6**-0.5, given["key"])
    logits = (affinity @ given["weight"].T + given["bias"]).split([9, 25], dim=-1)
    wanted = torch.stack(
        [
            by_loops((logit + clamped_relative_bias(table, 6, 7)).softmax(-1), half, kernel)
            for logit, table, half, kernel in zip(
                logits, tables, given["value"].unbind(1), (3, 5), strict=True
            )
        ],
        dim=1,
    )
    found = context_mixing(**given)
    torch.testing.assert_close(found, wanted)
    leaves = list(given.values())
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs)


def test_the_function_of_projected_maps_is_the_module() -> None:
    module = mixing(regions=2)
    module.out, module.out_norm = torch.nn.Identity(), torch.nn.Identity()
    x, value = torch.randn(2, 2, 8, 6, 7, dtype=torch.float64)
    context = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    query = module.query_norm(module.query(x)).unflatten(1, (2, 2)).movedim(2, -1)
    key = module.key_norm(module.key(F.adaptive_avg_pool2d(context, 2)))
    found = context_mixing(
        query, key.unflatten(1, (2, 2)).flatten(3).mT,
        value.unflatten(1, (2, 2, 2)).movedim(3, -1),
        module.mix.weight, module.mix.bias, module.small_bias, module.large_bias,
    )  # fmt: skip
    torch.testing.assert_close(found.movedim(-1, 3).flatten(1, 3), module(x, context, value))


@pytest.mark.bad_input
def test_the_function_names_what_does_not_fit() -> None:
    good = tensors()
    context_mixing(**good)
    kernels = {name: x for name, x in good.items() if name != "value"}
    assert [x.shape[-1] for x in context_kernels(**kernels)] == [9, 25]
    for changed, said in (
        ({"query": good["query"][0]}, r"query must be \(any, any, any, any, any\)"),
        ({"key": good["key"][:1]}, r"key must be \(2, 2, any, 3\)"),
        ({"value": good["value"][:, :1]}, r"value must be \(2, 2, 2, 6, 7, any\)"),
        ({"weight": good["weight"][1:]}, r"weight must be \(34, 4\)"),
        ({"bias": good["bias"][1:]}, r"bias must be \(34\)"),
        ({"small_bias": good["small_bias"][:, 1:]}, "small_bias must be .*2, 4, 5"),
        ({"large_bias": good["large_bias"][:1]}, "large_bias must be .*1, 9, 9"),
        (
            {"query": good["query"][:, :, :4], "value": good["value"][:, :, :, :4]},
            r"the sides of query must be at least those of the kernels, 3 and 5, got \(4, 7\)",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            context_mixing(**good | changed)


def test_observed_kernels_reproduce_the_output() -> None:
    module = mixing()
    x, value = torch.randn(2, 2, 8, 6, 7, dtype=torch.float64)
    context = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    with observe(module) as record:
        y = module(x, context, value)
    halves = value.unflatten(1, (2, 2, 2)).flatten(4).mT  # (b, half, g, N, c)
    mixed = [record[name] @ halves[:, place] for place, name in enumerate(("small", "large"))]
    joined = torch.stack(mixed, dim=1).mT.reshape(x.shape)
    torch.testing.assert_close(module.out_norm(module.out(joined)), y)
    assert record["small"].gt(0).sum(-1).eq(9).all()
    assert record["large"].gt(0).sum(-1).eq(25).all()


def test_regions_may_be_renumbered_with_the_columns_that_mix_them() -> None:
    module = mixing(regions=2)
    x = torch.randn(1, 8, 6, 8, dtype=torch.float64)
    context = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    before = module(x, context, x)
    swapped = torch.cat([context[:, :, 3:], context[:, :, :3]], dim=2)  # the two rows of regions
    with torch.no_grad():
        module.mix.weight.copy_(module.mix.weight[:, [2, 3, 0, 1]])
    torch.testing.assert_close(module(x, swapped, x), before)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ContextMixing(10, context_dim=4, heads=4, kernel=5), "multiple of 2 heads"),
        (lambda: ContextMixing(8, context_dim=4, heads=2, kernel=6), "kernel must be odd"),
        (lambda: ContextMixing(8, context_dim=4, heads=2, kernel=3), "must not exceed"),
        (
            lambda: neighborhood_av(
                torch.zeros(1, 1, 3, 4, 25), torch.zeros(1, 1, 3, 4, 2), kernel=5
            ),
            "at most the sides",
        ),
        (
            lambda: neighborhood_av(
                torch.zeros(1, 1, 3, 4, 8), torch.zeros(1, 1, 3, 4, 2), kernel=3
            ),
            "weights",
        ),
        (lambda: clamped_relative_bias(torch.zeros(2, 4, 4), 5, 5), "table must be"),
        (lambda: context_mixing_from_overlock({}), "are missing"),
    ],
)
def test_wrong_arguments_are_named(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
