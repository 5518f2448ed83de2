"""CurbNet: the sizes that follow from its equations, its sites, and what is Cylinder3D's."""

import dataclasses

import pytest
import torch

from heed_core.sites import attach_points, observe, steer
from heed_core.sparse import unique_voxels
from heed_lidar.curbnet import PRESETS, CurbNet, CurbNetConfig
from heed_lidar.cylinder3d import Cylinder3d, Cylinder3dConfig
from heed_lidar.cylindrical import CylindricalGrid

GRID = CylindricalGrid(shape=(24, 18, 16))
CONFIG = CurbNetConfig(width=4, grid=GRID)
LEVELS = [f"{side}.{level}" for side in ("down", "up") for level in range(4)]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def scan(points: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(n, (points,), generator=generator) for n in GRID.shape]
    index = torch.stack([torch.zeros(points, dtype=torch.long), *columns], dim=1)
    return torch.randn(points, 9, generator=generator), index


@pytest.mark.parametrize(
    ("width", "classes", "expected"),
    [
        (32, 5, 86_055_047),
        (16, 5, 21_616_791),
        (8, 5, 5_498_015),
        (32, 20, 86_106_902),
        (16, 20, 21_642_726),
        (8, 20, 5_510_990),
    ],
)
def test_sizes(width, classes, expected):
    with torch.device("meta"):
        assert count(CurbNet(CurbNetConfig(width=width, classes=classes))) == expected


def test_sizes_of_the_presets():
    with torch.device("meta"):
        sizes = {name: count(CurbNet(config)) for name, config in PRESETS.items()}
    assert sizes == {"base": 86_055_047, "small": 21_616_791, "tiny": 5_168_287}


def test_sizes_of_the_levels():
    with torch.device("meta"):
        network = CurbNet(PRESETS["base"])
    assert [count(d) for d in network.down] == [488_912, 1_559_456, 5_445_440, 21_769_856]
    assert [count(u) for u in network.up] == [40_514_176, 11_901_248, 3_239_072, 941_648]
    assert count(network.down[0].body) == 378_320


def test_a_scan_in_one_voxel_can_be_trained_on():
    torch.manual_seed(0)
    network = CurbNet(CONFIG).train()
    index = torch.tensor([[0, 4, 5, 6]]).expand(10, -1)
    found = network(torch.randn(10, 9), index)
    assert found.logits.shape == (1, 5)
    found.logits.square().sum().backward()
    assert network.down[0].body.fuse.weight.grad.abs().sum() > 0


def test_columns_have_the_height_of_their_level():
    with torch.device("meta"):
        base, tiny = CurbNet(PRESETS["base"]), CurbNet(PRESETS["tiny"])
    for network, heights in ((base, [32, 16, 8, 8]), (tiny, [16, 8, 4, 4])):
        assert [down.body.attention.column for down in network.down] == heights
        assert [up.body.attention.column for up in network.up] == heights[::-1]


def test_without_its_attention_blocks_it_is_cylinder3d():
    torch.manual_seed(0)
    plain = Cylinder3d(Cylinder3dConfig(classes=5, width=4, grid=GRID)).eval()
    network = CurbNet(CONFIG).eval()
    for level in LEVELS:
        network.get_submodule(level).body = plain.get_submodule(level).body
    network.load_state_dict(plain.state_dict())
    points, index = scan()
    with torch.no_grad():
        assert torch.equal(network(points, index).logits, plain(points, index).logits)


def test_every_block_has_a_site_of_channel_weights():
    network = CurbNet(CONFIG).eval()
    points, index = scan()
    assert list(attach_points(network)) == [f"{level}.body.attention.probe" for level in LEVELS]
    with torch.no_grad():
        before = network(points, index).logits
        with observe(network) as record:
            assert torch.equal(network(points, index).logits, before)
    weights = record["down.0.body.attention.probe"]
    coords, _, _ = unique_voxels(index, GRID.shape)
    columns = torch.unique(coords[:, :3], dim=0)
    assert weights.shape == (1, 1, len(columns), 8)
    for level in LEVELS:
        sums = record[f"{level}.body.attention.probe"].sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert record["up.0.body.attention.probe"].shape[-1] == 64


def test_sites_cannot_be_steered():
    with (
        pytest.raises(ValueError, match="can be observed but not steered"),
        steer(CurbNet(CONFIG), lambda weights, call: weights),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "difference"),
    [({"scales": (1, 3)}, -1), ({"reduction": 2}, 1), ({"scale_mode": "stride"}, 1)],
)
def test_settings_reach_the_blocks(change, difference):
    with torch.device("meta"):
        usual, other = CurbNet(CONFIG), CurbNet(dataclasses.replace(CONFIG, **change))
    assert (count(other) - count(usual)) * difference > 0


def test_bare_softmax_is_the_mean_weight_smaller():
    torch.manual_seed(0)
    usual = CurbNet(CONFIG).eval()
    bare = CurbNet(dataclasses.replace(CONFIG, attn_norm="softmax")).eval()
    bare.load_state_dict(usual.state_dict())
    seen: dict[str, torch.Tensor] = {}
    for name, network in (("usual", usual), ("bare", bare)):
        network.down[0].body.attention.register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output.features})
        )
        with torch.no_grad():
            network(*scan())
    torch.testing.assert_close(seen["usual"], 8 * seen["bare"])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "value"), [("scales", ()), ("scales", (3, 1)), ("scales", (0, 1)), ("reduction", 3)]
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        CurbNetConfig(width=4, **{name: value})
