"""Convolutional parts: stored numbers of MaxViT and OverLoCK, merging, what each one does."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heed_core.convolutions import (
    BRANCHES,
    DilatedReparamConv,
    GlobalResponseNorm,
    MapLayerNorm,
    MapLayerScale,
    MBConv,
    SqueezeExcite,
    dilated_reparam_from_overlock,
    mbconv_from_timm,
)
from heed_core.testing.golden_fixtures import GoldenFixture

GOLDEN = Path(__file__).parent / "golden"
DTYPES = [torch.float64, torch.float32]


def loaded(module: nn.Module, state: list[tuple[str, Tensor]], dtype: torch.dtype) -> nn.Module:
    module.load_state_dict({name: x.reshape(module.state_dict()[name].shape) for name, x in state})
    return module.to(dtype).eval()


class OverlockBlock:
    """OverLoCK's base block out of our parts."""

    def __init__(self, golden: GoldenFixture, dtype: torch.dtype) -> None:
        def part(module: nn.Module, prefix: str, names: dict[str, str] | None = None) -> nn.Module:
            state = golden.weights(prefix)
            for old, new in (names or {}).items():
                state = {name.replace(old, new): x for name, x in state.items()}
            return loaded(module, list(state.items()), dtype)

        self.near = part(nn.Conv2d(12, 12, 3, padding=1, groups=12), "dwconv.")
        self.scale = part(MapLayerScale(12), "ls.")
        self.norm = part(MapLayerNorm(12), "proj.0.")
        state = dilated_reparam_from_overlock(golden.weights("proj.1."))
        self.dilated = loaded(DilatedReparamConv(12, kernel=9), list(state.items()), dtype)
        self.batch_norm = part(nn.BatchNorm2d(12), "proj.2.")
        gate = SqueezeExcite(12, hidden=16, activation="gelu")
        self.gate = part(gate, "proj.3.proj.", {"1.": "squeeze.", "3.": "excite."})
        self.expand = part(nn.Conv2d(12, 36, 1), "proj.4.")
        self.inner = part(nn.Conv2d(36, 36, 3, padding=1, groups=36), "proj.6.")
        self.response = part(GlobalResponseNorm(36), "proj.7.")
        self.contract = part(nn.Conv2d(36, 12, 1), "proj.8.")

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        x = x + self.near(x)
        dilated = self.dilated(self.norm(x))
        gated = self.gate(self.batch_norm(dilated))
        hidden = F.gelu(self.expand(gated))
        response = self.response(hidden + self.inner(hidden))
        y = self.scale(x) + self.contract(response)
        return {"dwconv": x, "dilated": dilated, "se": gated, "grn": response, "y": y}


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_parts_of_overlock_and_gradients(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "overlock" / "repconv")
    block = OverlockBlock(golden, dtype)
    x = golden.input("x", dtype)
    found = block(x)
    for name, tensor in found.items():
        golden.check(name, tensor)
    golden.loss(found["y"]).backward()
    golden.check("grad.input.x", x.grad)
    golden.check("grad.weights.proj.1.lk_origin.weight", block.dilated.large.weight.grad)
    golden.check("grad.weights.proj.7.gamma", block.response.gamma.grad.view(1, 36, 1, 1))
    golden.check("grad.weights.ls.weight", block.scale.weight.grad.view(12, 1, 1, 1))
    merged = block.dilated.merged()
    golden.check("merged_kernel", merged.weight)
    golden.check("merged_bias", merged.bias)
    block.dilated = merged
    golden.check("y_merged", block(x)["y"])


def test_golden_notices_branches_in_another_order() -> None:
    golden = GoldenFixture.load(GOLDEN / "overlock" / "repconv")
    block = OverlockBlock(golden, torch.float64)
    first, third = block.dilated.small_norms[1], block.dilated.small_norms[3]
    block.dilated.small_norms[1], block.dilated.small_norms[3] = third, first
    with pytest.raises(AssertionError, match="off"):
        golden.check("dilated", block(golden.input("x", torch.float64))["dilated"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_inverted_bottlenecks_of_maxvit(dtype: torch.dtype) -> None:
    golden = GoldenFixture.load(GOLDEN / "maxvit")
    kind = "output64" if dtype == torch.float64 else "output"
    blocks = []
    for block, (dim, stride) in enumerate(((16, 2), (24, 1))):
        module = MBConv(dim, 24, stride=stride)
        module.load_state_dict(mbconv_from_timm(golden.weights(f"blocks.{block}.conv.")))
        blocks.append(module.to(dtype).eval())
    golden.check("block0.conv", blocks[0](golden.input("x", dtype)))
    before = golden.tensors[f"{kind}.block0.attn_grid"].movedim(-1, 1).to(dtype)
    golden.check("block1.conv", blocks[1](before))
    relu = SqueezeExcite(96, hidden=6, activation="relu").to(dtype)
    relu.load_state_dict(blocks[0].gate.state_dict())
    blocks[0].gate = relu
    with pytest.raises(AssertionError, match="off"):
        golden.check("block0.conv", blocks[0](golden.input("x", dtype)))


@pytest.mark.parametrize("kernel", sorted(BRANCHES))
def test_a_merged_kernel_computes_the_same_at_the_borders_too(kernel: int) -> None:
    conv = DilatedReparamConv(3, kernel=kernel).double().train()
    for _ in range(3):
        conv(torch.randn(4, 3, 11, 8, dtype=torch.float64) * 2 + 1)
    conv.eval()
    for norm in (conv.large_norm, *conv.small_norms):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    torch.testing.assert_close(conv.merged()(x), conv(x))
    assert kernel >= max(step * (side - 1) + 1 for side, step in conv.branches)


def test_response_norm_makes_channels_compete() -> None:
    norm, x = GlobalResponseNorm(3).double(), torch.randn(2, 3, 4, 5).double()
    assert torch.equal(norm(x), x)
    nn.init.ones_(norm.gamma)
    nn.init.constant_(norm.beta, 0.5)
    for b in range(2):
        sizes = [float(x[b, c].square().sum()) ** 0.5 for c in range(3)]
        for c in range(3):
            gain = 1 + sizes[c] / (sum(sizes) / 3 + 1e-6)
            torch.testing.assert_close(norm(x)[b, c], gain * x[b, c] + 0.5)


def test_gates_see_means_only() -> None:
    gate, x = SqueezeExcite(6, hidden=2).double(), torch.randn(2, 6, 4, 5).double()
    order = torch.randperm(20)
    moved = x.flatten(2)[..., order].view_as(x)
    wanted = gate(x).flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(gate(moved), wanted)
    share = gate(x) / x
    torch.testing.assert_close(share, share[:, :, :1, :1].expand_as(share))
    assert (share > 0).all()
    assert (share < 1).all()


def test_other_numbers_of_axes() -> None:
    for spatial in ((7,), (3, 4, 5)):
        x = torch.randn(2, 6, *spatial)
        for module in (
            SqueezeExcite(6, hidden=2),
            GlobalResponseNorm(6),
            MapLayerNorm(6),
            MapLayerScale(6),
        ):
            assert module(x).shape == x.shape
    x = torch.randn(2, 6, 3, 4)
    normed = MapLayerNorm(6)(x)
    torch.testing.assert_close(normed.mean(1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)
    assert torch.equal(MapLayerScale(6)(x), x)
    assert torch.equal(MapLayerScale(6, start=0.5)(x), x / 2)


def test_number_of_parameters_of_maxvit_tiny_s_first_stage() -> None:
    """290,792 [published code] less two attentions and four feed-forwards of 64 channels."""
    convolutions = sum(
        sum(p.numel() for p in MBConv(64, 64, stride=stride).parameters()) for stride in (2, 1)
    )
    attention = 3 * (64 * 64 + 64) + 64 * 64 + 64 + 2 * 13 * 13 + 2 * 64
    feed_forward = 2 * 4 * 64 * 64 + 4 * 64 + 64 + 2 * 64
    assert convolutions == 290_792 - 4 * (attention + feed_forward)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: DilatedReparamConv(3, kernel=8), "kernel must be one of"),
        (lambda: DilatedReparamConv(3, kernel=5)(torch.zeros(1, 3, 4)), "height, width"),
        (lambda: MBConv(3, 3, stride=3), "stride must be 1 or 2"),
        (lambda: MBConv(3, 4, stride=2)(torch.zeros(1, 3, 4, 5)), "sizes that stride 2 divides"),
        (lambda: SqueezeExcite(3, hidden=0), "hidden must be at least 1"),
        (lambda: SqueezeExcite(3, hidden=1, activation="tanh"), "activation must be one of"),
        (lambda: GlobalResponseNorm(3)(torch.zeros(1, 4, 2)), "x must be"),
        (lambda: mbconv_from_timm({"norm3.weight": torch.zeros(1)}), "no weight of timm"),
        (lambda: dilated_reparam_from_overlock({"x.weight": torch.zeros(1)}), "no weight of a"),
    ],
)
def test_wrong_arguments_are_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
