"""The networks' sizes, symmetries and gradients; Cylinder3D and CurbNet share the skeleton."""

import dataclasses

import pytest
import torch
from torch import nn

from heed_core.sparse import SparseTensor
from heed_lidar.curbnet import PRESETS as CURBNET_PRESETS
from heed_lidar.curbnet import CurbNet, CurbNetConfig
from heed_lidar.cylinder3d import PRESETS, Cylinder3d, Cylinder3dConfig
from heed_lidar.cylinder3d.network import STRIDES, level_shapes
from heed_lidar.cylindrical import CylindricalGrid, voxel_labels
from heed_lidar.losses import segmentation_loss

GRID = CylindricalGrid(shape=(24, 18, 16))
NETWORKS = {
    "cylinder3d": lambda: Cylinder3d(Cylinder3dConfig(classes=4, width=4, grid=GRID)),
    "curbnet": lambda: CurbNet(CurbNetConfig(classes=4, width=4, grid=GRID)),
    "curbnet-strides": lambda: CurbNet(
        CurbNetConfig(classes=4, width=4, grid=GRID, scale_mode="stride", attn_norm="softmax")
    ),
}
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(3)
    network = NETWORKS[request.param]()
    settle(network)
    return network


def settle(network: nn.Module) -> None:
    """Give the norms the statistics of a batch: in eval, untrained layers would fade to nothing."""
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        logits = network.train()(*scans(3, seed=9)).logits
    for norm in norms:
        norm.momentum = 0.1
    assert logits.std(dim=0).min() > 0.05
    network.eval()


def scans(count: int = 2, points: int = 150, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count * points, 9, generator=generator)
    columns = [torch.randint(n, (count * points,), generator=generator) for n in GRID.shape]
    number = torch.arange(count).repeat_interleave(points)
    return features, torch.stack([number, *columns], dim=1).int()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("width", "classes", "expected"),
    [
        (32, 20, 55_853_366),
        (32, 17, 55_842_995),
        (32, 5, 55_801_511),
        (16, 20, 14_071_542),
        (16, 5, 14_045_607),
        (8, 20, 3_614_294),
        (8, 5, 3_601_319),
    ],
)
def test_cylinder3d_has_the_published_size(width, classes, expected):
    with torch.device("meta"):
        assert count(Cylinder3d(Cylinder3dConfig(width=width, classes=classes))) == expected


def test_parts_of_cylinder3d_have_the_published_sizes():
    with torch.device("meta"):
        network = Cylinder3d(PRESETS["base"])
    assert count(network.points) == 112_802
    assert count(network.stem) == 27_904
    assert [count(d) for d in network.down] == [221_696, 885_760, 3_540_992, 14_159_872]
    assert [count(u) for u in network.up] == [25_956_352, 8_259_584, 2_065_408, 516_608]
    assert count(network.context) == 37_248
    assert count(network.head) == 69_140


def test_levels_have_the_published_shapes():
    assert level_shapes((480, 360, 32), STRIDES) == [
        (480, 360, 32),
        (240, 180, 16),
        (120, 90, 8),
        (60, 45, 8),
        (30, 23, 8),
    ]


def test_stages_have_these_shapes(network):
    seen: dict[str, SparseTensor] = {}
    for name in ("stem", "context", *(f"down.{k}.pool" for k in range(4)), "up.0", "up.3"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output})
        )
    features, index = scans()
    output = network(features, index)
    shapes = level_shapes(GRID.shape, STRIDES)
    assert seen["stem"].features.shape[1] == 4
    for level in range(4):
        pooled = seen[f"down.{level}.pool"]
        assert pooled.spatial_shape == shapes[level + 1]
        assert pooled.features.shape[1] == 8 * 2**level
    assert (seen["up.0"].spatial_shape, seen["up.0"].features.shape[1]) == (shapes[3], 64)
    assert (seen["up.3"].spatial_shape, seen["up.3"].features.shape[1]) == (shapes[0], 8)
    assert seen["context"].features.shape[1] == 16
    assert output.coords.tolist() == torch.unique(index, dim=0).tolist()
    assert torch.equal(output.coords[output.voxel_of_point], index)
    assert output.logits.shape == (len(output.coords), 4)


def test_the_order_of_points_changes_nothing(network):
    features, index = scans()
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        straight = network(features, index).point_logits
        mixed = network(features[order], index[order]).point_logits
    # The matrix product of the point net may round rows of a batch differently by position.
    torch.testing.assert_close(mixed, straight[order], rtol=1e-5, atol=1e-5)


def test_a_scan_alone_is_a_scan_in_a_batch(network):
    features, index = scans(3)
    with torch.no_grad():
        together = network(features, index).point_logits
        for number in range(3):
            own = index[:, 0] == number
            alone = index[own] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
            torch.testing.assert_close(
                network(features[own], alone).point_logits, together[own], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("network", ["cylinder3d", "curbnet"], indirect=True)
@pytest.mark.parametrize("wraps", [True, False])
def test_a_grid_that_wraps_has_no_seam(network, wraps):
    """Turning a scan by the coarsest cell moves its classes along and changes none of them.

    The strides 3 and 5 of the third network know no such turn.
    """
    network.grid = CylindricalGrid(shape=(24, 32, 16), wrap_phi=wraps)
    points, index = scans(1)
    turned = index.clone()
    turned[:, 2] = (turned[:, 2] + 16) % 32
    with torch.no_grad():
        straight, moved = (network(points, where).point_logits for where in (index, turned))
    known = slice(1, None)  # the ignored class is at -inf
    assert torch.allclose(moved[:, known], straight[:, known], atol=1e-4) == wraps


def test_points_of_a_voxel_share_their_class_and_none_is_ignored(network):
    features, index = scans()
    index[:, 1:] //= 4
    with torch.no_grad():
        network.head.bias[0] = 1e6  # the ignored class would win everywhere
        output = network(features, index)
    assert (output.logits.argmax(1) == 0).all()
    assert output.point_logits[:, 0].isneginf().all()
    assert (output.point_classes != 0).all()
    assert torch.equal(output.point_classes, output.point_logits.argmax(1))
    first = torch.zeros(len(output.coords), dtype=torch.long)
    first[output.voxel_of_point] = output.point_classes
    assert torch.equal(first[output.voxel_of_point], output.point_classes)


def test_every_parameter_learns(network):
    network.train()
    features, index = scans()
    output = network(features, index)
    labels = voxel_labels(
        torch.arange(len(features)) % 4,
        output.voxel_of_point,
        num_voxels=len(output.coords),
        num_classes=4,
    )
    segmentation_loss(output.logits, labels, voxel="cross-entropy").total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_loss_of_occupied_voxels_is_that_of_the_dense_grid(network):
    features, index = scans()
    with torch.no_grad():
        output = network(features, index, batch_size=2)
    labels = voxel_labels(
        torch.arange(len(features)) % 4,
        output.voxel_of_point,
        num_voxels=len(output.coords),
        num_classes=4,
    )
    assert (labels == 0).any()
    cells = (2, *GRID.shape)
    dense_labels = torch.zeros(cells, dtype=torch.long)
    dense_logits = torch.zeros(*cells, 4)
    where = tuple(output.coords.long().unbind(1))
    dense_labels[where], dense_logits[where] = labels, output.logits
    dense = segmentation_loss(
        dense_logits.flatten(0, -2), dense_labels.flatten(), voxel="cross-entropy"
    )
    occupied = segmentation_loss(output.logits, labels, voxel="cross-entropy")
    torch.testing.assert_close(dense.total, occupied.total)


def test_an_empty_scan_gives_nothing(network):
    with torch.no_grad():
        output = network(torch.zeros(0, 9), torch.zeros(0, 4, dtype=torch.int32))
    assert output.logits.shape == (0, 4)
    assert output.point_classes.shape == (0,)


def test_an_empty_scan_in_a_batch_leaves_the_others(network):
    features, index = scans(1)
    with torch.no_grad():
        alone = network(features, index).logits
        beside = network(features, index, batch_size=3).logits
    assert torch.equal(alone, beside)


def test_a_network_is_rebuilt_from_its_config(network):
    again = type(network)(dataclasses.replace(network.config)).eval()
    again.load_state_dict(network.state_dict())
    features, index = scans()
    with torch.no_grad():
        assert torch.equal(again(features, index).logits, network(features, index).logits)


def test_autocast_stays_finite(network):
    features, index = scans()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(features, index).logits
    with torch.no_grad():
        full = network(features, index).logits
    assert half.isfinite().all()
    assert (half.float() - full).abs().max() < 0.2 * full.abs().max()


@pytest.mark.bad_input
def test_bad_inputs_are_named(network):
    features, index = scans()
    with pytest.raises(ValueError, match=r"points must be \(p, 9\), got \(300, 8\)"):
        network(features[:, :8], index)
    with pytest.raises(ValueError, match=r"index must be \(300, 4\), got \(300, 3\)"):
        network(features, index[:, 1:])
    index[7, 2] = GRID.shape[1]
    with pytest.raises(ValueError, match="row 7"):
        network(features, index)


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", [Cylinder3dConfig, CurbNetConfig])
@pytest.mark.parametrize(
    ("name", "value"), [("classes", 1), ("width", 0), ("point_features", 0), ("voxel_features", 0)]
)
def test_bad_settings_are_named(kind, name, value):
    with pytest.raises(ValueError, match=f"{name} .*got {value}"):
        kind(**{name: value})


def test_presets_of_both_networks_agree():
    for name, config in PRESETS.items():
        other = CURBNET_PRESETS[name]
        assert (config.width, config.grid) == (other.width, other.grid)


def learn(network: nn.Module, steps: int) -> tuple[float, float]:
    """Losses before and after: a class for low, middle and high cells of four crops."""
    features, index = scans(4, 60, seed=5)
    classes = 1 + (index[:, 3].long() * 3) // GRID.shape[2]
    features[:, 5] = index[:, 3].float() - 8  # what tells the height, as the voxeliser would
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    network.train()
    losses = []
    for _ in range(steps):
        output = network(features, index)
        labels = voxel_labels(
            classes, output.voxel_of_point, num_voxels=len(output.coords), num_classes=4
        )
        loss = segmentation_loss(output.logits, labels, voxel="cross-entropy").total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        right = (network(features, index).point_classes == classes).float().mean()
    return losses[0], losses[-1], float(right)


@pytest.mark.slow
def test_a_few_crops_are_learned_by_heart(network):
    first, last, right = learn(network, 60)
    assert last < 0.1 * first
    assert right > 0.99


def test_points_in_parts_have_the_logits_of_all_at_once(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, index = scans()
    wanted = network(points, index).logits
    assert wanted.requires_grad
    monkeypatch.setattr("heed_lidar.cylinder3d.network.POINTS_AT_ONCE", 37)
    parts: list[int] = []
    network.points.register_forward_hook(lambda *_: parts.append(0))
    network.points.norm.register_forward_hook(lambda _, given, __: parts.append(len(given[0])))
    with torch.no_grad():
        torch.testing.assert_close(network(points, index).logits, wanted, rtol=1e-4, atol=1e-5)
    assert parts == [37] * 8 + [300 - 8 * 37, 0]
