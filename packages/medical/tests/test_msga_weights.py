"""Checkpoints of others: official MSGA files and residual backbones."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from heed_core.errors import InputError
from heed_medical.msga import Msga, MsgaConfig, load_backbone, load_official
from heed_medical.msga.weights import official_name

SMALL = MsgaConfig(backbone="resnet18", width=8, classes=3)


@pytest.fixture(scope="module")
def source() -> Msga:
    torch.manual_seed(7)
    return Msga(SMALL)


@pytest.fixture(scope="module")
def official(source: Msga) -> dict[str, Tensor]:
    state = {
        official_name(name): tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for name, tensor in source.state_dict().items()
    }
    unused = ("conv6_1.weight", "conv7_4.bias", "attention2.0.weight", "refine4.1.running_mean")
    return state | {name: torch.zeros(2) for name in unused}


def assert_equal(model: Msga, source: Msga) -> None:
    wanted = source.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_official_names_are_all_different_and_run_backwards(source: Msga) -> None:
    names = [official_name(name) for name in source.state_dict()]
    assert len(set(names)) == len(names)
    assert not any("pyramid" in name or "backbone" in name for name in names)
    assert official_name("pyramid.second.project.1.bias") == "conv8_14.bias"
    assert official_name("pyramid.first.semantic.3.weight") == "conv_sem_1_2.weight"
    assert official_name("pyramid.second.channel.3.after.1.weight") == (
        "cam_attention_2_3.attn.5.weight"
    )
    assert official_name("pyramid.fuse.2.1.running_var") == "fuse1.fuse_attn.7.running_var"


@pytest.mark.parametrize("wrapping", ["bare", "module", "state_dict", "safetensors"])
def test_an_official_file_loads(
    source: Msga, official: dict[str, Tensor], wrapping: str, tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pth")
    if wrapping == "safetensors":
        save_file(official, path)
    elif wrapping == "bare":
        torch.save(official, path)
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in official.items()}
        torch.save(wrapped if wrapping == "module" else {"epoch": 3, "state_dict": wrapped}, path)
    model = Msga(SMALL)
    load_official(model, path)
    assert_equal(model, source)


def test_a_backbone_that_was_grouped_in_sequences_loads(
    source: Msga, official: dict[str, Tensor], tmp_path: Path
) -> None:
    def grouped(name: str) -> str:
        for plain, group in (("conv1", "layer0.0"), ("bn1", "layer0.1"), ("layer1", "layer1.1")):
            name = name.replace(f"resnext.{plain}.", f"resnext.{group}.")
        return name

    renamed = {grouped(name): tensor for name, tensor in official.items()}
    assert renamed.keys() != official.keys()
    torch.save(renamed, tmp_path / "w.pth")
    model = Msga(SMALL)
    load_official(model, tmp_path / "w.pth")
    assert_equal(model, source)


def test_wrong_names_and_shapes_are_listed_and_nothing_is_changed(
    official: dict[str, Tensor], tmp_path: Path
) -> None:
    broken = dict(official)
    del broken["conv8_3.weight"]
    broken["conv9_1.weight"] = torch.zeros(1)
    broken["predict1.bias"] = torch.zeros(9)
    torch.save(broken, tmp_path / "w.pth")
    model = Msga(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as fault:
        load_official(model, tmp_path / "w.pth")
    line = str(fault.value)
    assert line.startswith(str(tmp_path / "w.pth"))
    assert "1 missing (conv8_3.weight)" in line
    assert "1 unexpected (conv9_1.weight)" in line
    assert "1 of another shape (predict1.bias (9,) for (3,))" in line
    assert "\n" not in line
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


def test_at_most_twenty_names_are_shown(tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError) as fault:
        load_official(Msga(SMALL), tmp_path / "w.pth")
    missing = str(fault.value).split("missing (")[1].split(")")[0]
    assert len(missing.split(", ")) == 21
    assert missing.endswith(", ...")


class Trap:
    """Anything but a tensor: loading it would run its code."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the file's code ran",))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("trap.pth", pickle.dumps(Trap()), "other Python objects"),
        ("cut.pth", None, "cannot be read|damaged"),
        ("text.pth", b"not weights at all", "damaged|cannot be read"),
        ("empty.pth", b"", "cannot be read|damaged"),
        ("empty.safetensors", b"", "cannot be read"),
        ("text.safetensors", b"not weights at all", "cannot be read"),
    ],
)
def test_files_that_are_no_weights_are_refused(
    name: str, content: bytes | None, problem: str, official: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is None:
        torch.save(official, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as fault:
        load_official(Msga(SMALL), path)
    assert str(fault.value).startswith(str(path))
    assert "\n" not in str(fault.value)


def test_a_whole_saved_model_and_other_things_are_refused(source: Msga, tmp_path: Path) -> None:
    torch.save(source, tmp_path / "model.pth")
    with pytest.raises(InputError, match="other Python objects"):
        load_official(Msga(SMALL), tmp_path / "model.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="no state dict"):
        load_official(Msga(SMALL), tmp_path / "list.pth")
    with pytest.raises(InputError, match="no such file"):
        load_official(Msga(SMALL), tmp_path / "absent.pth")


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("stem", ["sum", "mean"])
def test_a_backbone_for_colour_serves_grey_images(
    stem: str, suffix: str, pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(pretrained, path)
    else:
        save_file(pretrained, path)
    model = Msga(SMALL)
    load_backbone(model, path, stem=stem)
    grey = torch.rand(1, 1, 24, 40)
    colour = grey.expand(1, 3, 24, 40) / (1 if stem == "sum" else 3)
    wanted = torch.nn.functional.conv2d(colour, pretrained["conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(model.backbone.conv1(grey), wanted)
    own = model.backbone.state_dict()
    others = [name for name in own if name != "conv1.weight"]
    assert others
    assert all(torch.equal(own[name], pretrained[name]) for name in others)


def test_the_stem_spreads_over_several_modalities_or_stays(
    pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(pretrained, tmp_path / "w.pth")
    kernels = pretrained["conv1.weight"]
    two = Msga(MsgaConfig(backbone="resnet18", width=8, in_channels=2))
    load_backbone(two, tmp_path / "w.pth")
    torch.testing.assert_close(two.backbone.conv1.weight.sum(1), kernels.sum(1))
    torch.testing.assert_close(two.backbone.conv1.weight[:, 0], two.backbone.conv1.weight[:, 1])
    three = Msga(MsgaConfig(backbone="resnet18", width=8, in_channels=3))
    load_backbone(three, tmp_path / "w.pth")
    assert torch.equal(three.backbone.conv1.weight, kernels)


def test_a_shorter_backbone_takes_what_it_has(
    pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(pretrained, tmp_path / "w.pth")
    model = Msga(MsgaConfig(backbone="resnet18", width=8, scales=(1, 2)))
    load_backbone(model, tmp_path / "w.pth")
    assert torch.equal(
        model.backbone.get_submodule("layer2.1.conv2").weight, pretrained["layer2.1.conv2.weight"]
    )


def test_a_backbone_of_another_architecture_is_refused(
    pretrained: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(pretrained, tmp_path / "resnet18.pth")
    model = Msga(MsgaConfig(backbone="resnet34", width=8))
    with pytest.raises(InputError, match=r"missing \(layer1\.2\.conv1\.weight"):
        load_backbone(model, tmp_path / "resnet18.pth")


@pytest.mark.bad_input
def test_an_unknown_stem_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stem must be 'sum' or 'mean'"):
        load_backbone(Msga(SMALL), tmp_path / "w.pth", stem="max")  # type: ignore[arg-type]
