import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from heed_core.checkpoints import fill, read_state, state_digest
from heed_core.errors import InputError


class Code:
    """Stands for any Python object in a file."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "model": {"state_dict": s}}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrap, prefix: str):
    state = network().state_dict()
    torch.save(wrap({prefix + name: tensor for name, tensor in state.items()}), tmp_path / "w.pth")
    found = read_state(tmp_path / "w.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_safetensors_are_read(tmp_path: Path):
    state = network().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors").keys() == state.keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": Code()}, "other Python objects"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.ones(2)], "holds no state dict"),
        (b"\x80\x02nonsense", "is no plain state dict|cannot be read as weights"),
        (b"", "cannot be read as weights|is no plain state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object, said: str):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=said) as caught:
        read_state(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_state(tmp_path / "none.pth")


def renamed(name: str) -> str:
    return name.replace("0.", "linear.").replace("1.", "norm.")


def test_filling_goes_by_the_other_names_and_needs_no_counter():
    source, target = network(), network()
    found = {renamed(name): tensor for name, tensor in source.state_dict().items()}
    del found["norm.num_batches_tracked"]
    fill(target, found, renamed)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop("linear.bias"), r"1 missing \(linear.bias\)"),
        (lambda f: f.update(more=torch.ones(1)), r"1 unexpected \(more\)"),
        (lambda f: f.update({"linear.bias": torch.ones(5)}), r"linear.bias \(5,\) for \(3,\)"),
    ],
)
def test_names_and_shapes_must_agree_or_nothing_changes(change, said: str):
    source, target = network(), network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    found = {renamed(name): tensor for name, tensor in source.state_dict().items()}
    change(found)
    with pytest.raises(InputError, match=said):
        fill(target, found, renamed, path="w.pth")
    assert all(torch.equal(target.state_dict()[name], before[name]) for name in before)


def test_equal_weights_have_one_digest() -> None:
    module = nn.BatchNorm1d(3)  # its counter has no axes
    digest = state_digest(module.state_dict())
    assert state_digest(copy.deepcopy(module).state_dict()) == digest
    assert state_digest(dict(reversed(module.state_dict().items()))) == digest
    for name, tensor in module.state_dict().items():
        assert state_digest({**module.state_dict(), name: tensor + 1}) != digest
        assert state_digest({**module.state_dict(), f"{name}s": tensor}) != digest
