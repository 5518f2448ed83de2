"""Official checkpoints of Cylinder3D: layouts, prefixes, and what is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from heed_core.errors import InputError
from heed_core.testing.damage import check_readers
from heed_lidar.curbnet.released import ReleasedConfig, ReleasedCurbNet
from heed_lidar.cylinder3d import Cylinder3d, Cylinder3dConfig, load_official
from heed_lidar.cylinder3d.weights import load_official_state, official_name, read_state
from heed_lidar.cylindrical import CylindricalGrid

GRID = CylindricalGrid(shape=(24, 18, 8))


def build(**settings: object) -> Cylinder3d:
    return Cylinder3d(Cylinder3dConfig(classes=4, width=4, grid=GRID, **settings))


@pytest.fixture(scope="module")
def source() -> Cylinder3d:
    torch.manual_seed(7)
    return build()


@pytest.fixture(scope="module")
def official(source: Cylinder3d) -> dict[str, Tensor]:
    state = {}
    for name, tensor in source.state_dict().items():
        part = "cylinder_3d_generator" if name.startswith("points") else "cylinder_3d_spconv_seg"
        state[f"{part}.{official_name(name)}"] = tensor
    return state


def of_version_1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """(out, kernel, in) to (kernel, in, out)."""
    return {
        name: tensor.movedim(0, -1).contiguous() if tensor.ndim == 5 else tensor
        for name, tensor in state.items()
    }


def assert_equal(network: Cylinder3d, source: Cylinder3d) -> None:
    wanted = source.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_official_names_are_all_different(source):
    names = [official_name(name) for name in source.state_dict()]
    assert len(set(names)) == len(names)
    assert official_name("points.layers.3.bias") == "PPmodel.10.bias"
    assert official_name("points.layers.1.1.running_mean") == "PPmodel.5.running_mean"
    assert official_name("stem.first.1.norm.weight") == "downCntx.bn0_2.weight"
    assert official_name("up.2.body.1.conv.weight") == "upBlock2.conv2.weight"
    assert official_name("context.norms.2.bias") == "ReconNet.bn0_3.bias"
    with pytest.raises(ValueError, match=r"'down.0.body.attention.probe' is no weight"):
        official_name("down.0.body.attention.probe")


@pytest.mark.parametrize("wrapping", ["bare", "module", "state_dict", "safetensors"])
def test_an_official_file_loads(source, official, wrapping, tmp_path):
    path = tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pt")
    if wrapping == "safetensors":
        save_file(official, path)
    elif wrapping == "bare":
        torch.save(official, path)
    elif wrapping == "module":
        torch.save({f"module.{name}": tensor for name, tensor in official.items()}, path)
    else:
        torch.save({"epoch": 3, "model": {"state_dict": official}}, path)
    network = build()
    load_official(network, path)
    assert_equal(network, source)


def test_counters_may_be_absent(source, official):
    network = build()
    load_official_state(network, {n: t for n, t in official.items() if "num_batches" not in n})
    assert_equal(network, source)


def test_the_layout_of_version_1_needs_its_neighbours(source, official, tmp_path):
    path = tmp_path / "old.pt"
    torch.save(of_version_1(official), path)
    with pytest.raises(InputError, match=r"old.pt: .*spconv 1.x.*legacy_rulebooks=True"):
        load_official(build(), path)
    network = build(legacy_rulebooks=True)
    load_official(network, path)
    assert_equal(network, source)


def test_a_converted_old_file_loads_too(source, official):
    network = build(legacy_rulebooks=True)
    load_official_state(network, official)
    assert_equal(network, source)


def test_a_kernel_of_one_cell_is_read_as_spconv_2_reads_it():
    torch.manual_seed(0)
    network = ReleasedCurbNet(ReleasedConfig(width=2, grid=GRID))
    state = {official_name(n): t for n, t in network.state_dict().items()}
    one = network.down[1].body.conv1x1
    stored = torch.randn(8, 1, 1, 1, 4)
    load_official_state(network, state | {"resBlock3.conv1x1.weight": stored})
    x = torch.randn(5, 4)
    by_memory = x @ stored.reshape(4, 8)
    torch.testing.assert_close(x @ one.weight.reshape(8, 4).T, by_memory)


def test_what_does_not_fit_is_named_and_changes_nothing(source, official):
    network = build()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    gone = {n: t for n, t in official.items() if not n.endswith("resBlock3.pool.weight")}
    with pytest.raises(InputError, match=r"1 missing \(resBlock3.pool.weight\)"):
        load_official_state(network, gone)
    with pytest.raises(InputError, match=r"1 unexpected \(head.weight\).*settings"):
        load_official_state(network, official | {"head.weight": torch.zeros(2)})
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_another_width_or_class_list_is_refused(official):
    other = Cylinder3d(Cylinder3dConfig(classes=5, width=4, grid=GRID))
    with pytest.raises(
        InputError, match=r"2 of another shape \(logits.weight \(4, .*\) for \(5, .*logits.bias"
    ):
        load_official_state(other, official)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a"),
        (b"not weights", "cannot be read|no plain state dict"),
        (pickle.dumps(Harmful()), "no plain state dict|cannot be read"),
    ],
)
def test_broken_files_are_refused_in_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "broken.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_state(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_file_without_tensors_is_refused(tmp_path: Path):
    path = tmp_path / "settings.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="holds no state dict"):
        read_state(path)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_damaged_weights_are_read_or_refused_in_one_line(tmp_path, official, name):
    save = torch.save if name == "net.pth" else save_file
    save({key: tensor.clone() for key, tensor in official.items()}, tmp_path / name)
    network = build()
    check_readers(tmp_path / name, [lambda path: load_official(network, path)])
