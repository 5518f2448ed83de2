"""CurbNet's released blocks: official numbers (tests/golden/curbnet_msca), sizes, dead branches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heed_core.sparse import SparseTensor
from heed_lidar.curbnet.released import Block508, Block520, ReleasedConfig, ReleasedCurbNet
from heed_lidar.cylinder3d.network import Down, Level, Up
from heed_lidar.cylinder3d.weights import load_official_state, official_name
from heed_lidar.cylindrical import CylindricalGrid

GOLDEN = Path(__file__).parent / "golden" / "curbnet_msca" / "fixture.safetensors"
GRID = (12, 10, 8)
BLOCKS = {"released508": Block508, "released520": Block520}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
STORED_SINGLE = 1e-7


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def fill(target: nn.Module, weights: dict[str, Tensor], renamed: dict[str, str]) -> None:
    state = {}
    for name, tensor in weights.items():
        stem, _, rest = name.partition(".")
        if tensor.ndim == 5 and tensor.shape[1:4] == (1, 1, 1):
            # What is stored as (out, in) is read in memory as (in, out).
            tensor = tensor.reshape(tensor.shape[4], tensor.shape[0]).T.reshape(tensor.shape)
        state[f"{renamed.get(stem, f'body.{stem}')}.{rest}"] = tensor
    target.load_state_dict(state)


def build(golden: dict[str, Tensor], name: str, dtype: torch.dtype) -> nn.ModuleDict:
    block = BLOCKS[name]
    encoder = Level(channels_in=6, channels_out=8, height=8)
    decoder = Level(channels_in=8, channels_out=8, height=8)
    down = Down(block(encoder, decoder=False), 8, (2, 2, 2))
    up = Up(decoder, of=down.pool, body=block(decoder, decoder=True))
    for side, module in (("down", down), ("up", up)):
        prefix = f"weights.{name}.{side}."
        weights = {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
        fill(
            module,
            weights,
            {
                "pool": "pool",
                "trans_dilao": "mix.conv",
                "trans_bn": "mix.norm",
                "up_subm": "unpool",
            },
        )
    return nn.ModuleDict({"down": down, "up": up}).to(dtype).eval()


def run(blocks: nn.ModuleDict, features: Tensor, skip: Tensor, coords: Tensor) -> list[Tensor]:
    x = SparseTensor(features, coords, GRID, 1)
    own, pooled = blocks["down"](x)
    return [own.features, pooled.features, blocks["up"](pooled, own.with_features(skip)).features]


def inputs(golden: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features, skip = (golden[f"input.{name}"].to(dtype) for name in ("features", "skip"))
    return features.requires_grad_(), skip.requires_grad_(), golden["input.coords"]


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max(), f"off by {error:.3g}"


def scalar(pooled: Tensor, up: Tensor) -> Tensor:
    waves = [torch.sin(0.7 * torch.arange(t.numel(), dtype=t.dtype)) for t in (pooled, up)]
    terms = [(t.flatten() * w).mean() for t, w in zip((pooled, up), waves, strict=True)]
    return 100 * (terms[0] + terms[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_blocks(golden, name, dtype):
    skip, pooled, up = run(build(golden, name, dtype), *inputs(golden, dtype))
    assert_near(skip, golden[f"output64.{name}.down.skip"], TOLERANCE[dtype])
    assert_near(pooled, golden[f"output64.{name}.down.pooled"], TOLERANCE[dtype])
    assert_near(up, golden[f"output64.{name}.up"], TOLERANCE[dtype])
    wanted = golden[f"output64.{name}.scalar"]
    assert_near(scalar(pooled, up), wanted, 100 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_gradients(golden, name):
    blocks = build(golden, name, torch.float64)
    features, skip, coords = inputs(golden, torch.float64)
    _, pooled, up = run(blocks, features, skip, coords)
    wanted = {
        "input": features,
        "skip": skip,
        "weights.down.conv3x1x3b.weight": blocks["down"].body.conv3x1x3b.weight,
        "weights.up.conv1x3x3.weight": blocks["up"].body.conv1x3x3.weight,
    }
    gradients = torch.autograd.grad(scalar(pooled, up), list(wanted.values()))
    for key, gradient in zip(wanted, gradients, strict=True):
        assert_near(gradient, golden[f"grad.{name}.{key}"], STORED_SINGLE)


DEAD = {
    "released508": {
        *(f"down.body.{k}.weight" for k in ("conv1x3x3", "conv3x1x3", "conv3x3x1")),
        *(f"down.body.bn{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")),
        *(f"up.body.{k}c.weight" for k in ("conv1x3x3", "conv3x1x3", "conv3x3x1")),
    },
    "released520": {f"up.body.{k}c.weight" for k in ("conv1x3x3", "conv3x1x3", "conv3x3x1")},
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_dead_branches_get_no_gradient(golden, name):
    blocks = build(golden, name, torch.float32)
    _, pooled, up = run(blocks, *inputs(golden, torch.float32))
    scalar(pooled, up).backward()
    still = {n for n, p in blocks.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == DEAD[name]


@pytest.mark.parametrize(
    ("variant", "classes", "expected"),
    [
        ("508", 5, 290_208_423),
        ("508", 20, 290_260_278),
        ("510", 5, 294_605_095),
        ("510", 20, 294_656_950),
        ("520", 5, 317_300_775),
        ("520", 20, 317_352_630),
    ],
)
def test_sizes(variant, classes, expected):
    with torch.device("meta"):
        network = ReleasedCurbNet(ReleasedConfig(variant=variant, classes=classes))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def small(variant: str) -> ReleasedCurbNet:
    torch.manual_seed(0)
    grid = CylindricalGrid(shape=(24, 18, 16))
    return ReleasedCurbNet(ReleasedConfig(variant=variant, width=2, grid=grid)).eval()


def scan() -> tuple[Tensor, Tensor]:
    columns = [torch.randint(n, (200,)) for n in (24, 18, 16)]
    return torch.randn(200, 9), torch.stack([torch.zeros(200, dtype=torch.long), *columns], 1)


@pytest.mark.parametrize("variant", ["508", "510"])
def test_whole_networks_run_and_load(variant):
    network, other = small(variant), small(variant)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 5 and tensor.shape[1:4] == (1, 1, 1):
            tensor = tensor.reshape(tensor.shape[0], -1).T.reshape(tensor.shape)
        state[f"seg.{official_name(name)}"] = tensor
    load_official_state(other, state)
    points, index = scan()
    with torch.no_grad():
        wanted, got = network(points, index).logits, other(points, index).logits
    assert wanted.isfinite().all()
    assert torch.equal(got, wanted)


def test_508_has_its_blocks_at_the_two_deepest_levels():
    network = small("508")
    assert [isinstance(d.body, Block508) for d in network.down] == [False] * 3 + [True] * 2
    assert [isinstance(u.body, Block508) for u in network.up] == [True] * 2 + [False] * 3


def test_520_cannot_run():
    with pytest.raises(ValueError, match="expected 64 channels on 3 spatial axes, got 32"):
        small("520")(*scan())


@pytest.mark.bad_input
def test_other_variants_are_refused():
    with pytest.raises(ValueError, match="508, 510, 520, got 'plain'"):
        ReleasedConfig(variant="plain")
