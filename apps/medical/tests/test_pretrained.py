"""Backbones that start from torchvision's weights of ImageNet, without any network."""

from email.message import Message
from io import BytesIO
from pathlib import Path
from urllib.error import URLError
from urllib.response import addinfourl

import pytest
import torch
import torchvision
from torch import Tensor

from heed_medical.medusa.phantoms import write_chests
from heed_medical.reports.phantoms import write_studies
from heed_medical.segmentation.phantoms import write_sample
from heed_medical_cli import APP
from heed_medical_cli.pretrained import of_imagenet, weights_file
from heed_runtime.run import Run
from heed_runtime.testing.contract import refusal, spoken

NAME = "resnet18-f37072fd.pth"
"""What torchvision calls the first weights of its ResNet-18."""
TINY = {
    "medusa": (
        *("--data.size", "64", "64", "--data.body-size", "32", "32"),
        *("--model.body-widths", "4", "8", "--model.hidden", "8"),
    ),
    "msga": ("--model.width", "8", "--model.scales", "1", "--model.backbone", "resnet18"),
    "ivgn": (
        *("--model.dim", "16", "--model.heads", "2", "--model.hidden", "16", "--model.depth", "1"),
        *("--data.size", "32", "--data.resize", "36", "--data.most-words", "12"),
        *("--model.backbone", "resnet18"),
    ),
}
WARNING = "weights of ImageNet expect --model.normalise imagenet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_chests(root / "medusa", train=8, test=2, side=64)
    write_studies(root / "ivgn", train=8, val=2, test=2, side=48)
    write_sample(root / "msga", seed=0)
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub, and no network."""

    def nowhere(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", nowhere)
    return tmp_path / "torch" / "hub" / "checkpoints"


def released(path: Path) -> dict[str, Tensor]:
    """Weights as torchvision releases them; the values are random."""
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return dict(state)


def train(system: str, made: Path, tmp_path: Path, *flags: object) -> tuple[object, ...]:
    return (
        *("train", system, "--data", made / system, "--out", tmp_path / "run", *TINY[system]),
        *("--trainer.max-steps", 1, "--trainer.batch", 2, "--device", "cpu", "--quiet", *flags),
    )


@pytest.mark.parametrize("system", TINY)
def test_imagenet_without_a_network_says_where_to_put_the_file(
    system: str, made: Path, tmp_path: Path, hub: Path
):
    line = refusal(APP, *train(system, made, tmp_path, "--training.backbone-weights", "imagenet"))
    assert f"https://download.pytorch.org/models/{NAME}: cannot be downloaded" in line
    assert "Name or service not known" in line
    assert f"put the file at {hub / NAME}, or name it with --training.backbone-weights" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("system", TINY)
def test_imagenet_is_taken_from_the_folder_of_the_hub(
    system: str, made: Path, tmp_path: Path, hub: Path
):
    state = released(hub / NAME)
    flags = ("--training.backbone-weights", "imagenet")
    code, _, err = spoken(APP, *train(system, made, tmp_path, *flags))
    assert code == 0, err
    run = Run.open(tmp_path / "run", APP)
    recipe = APP.recipe(system)
    assert run.settings.training.backbone_weights == "imagenet"
    model = recipe.model(run.settings)
    recipe.start(run.settings, tmp_path, model)
    found = {name.rpartition("layer1.")[2]: x for name, x in model.state_dict().items()}
    assert torch.equal(found["0.conv1.weight"], state["layer1.0.conv1.weight"])


def test_what_is_downloaded_must_be_the_released_file(
    hub: Path, monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path
):
    answer = addinfourl(BytesIO(b"a page of a proxy"), Message(), "https://download.pytorch.org")
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: answer)
    flags = ("--training.backbone-weights", "imagenet", "--json")
    line = refusal(APP, *train("medusa", made, tmp_path, *flags))
    assert "cannot be downloaded (invalid hash value" in line
    assert list(hub.iterdir()) == []


def test_a_backbone_that_is_not_of_torchvision_has_no_imagenet(made: Path, tmp_path: Path):
    flags = ("--training.backbone-weights", "imagenet", "--model.backbone", "conv")
    line = refusal(APP, *train("ivgn", made, tmp_path, *flags))
    assert "no weights of ImageNet for the backbone conv" in line


@pytest.mark.parametrize("named", ["imagenet", NAME, "own.pth"])
@pytest.mark.parametrize("normalise", ["unit", "imagenet"])
def test_imagenet_and_pictures_of_another_scale_are_told(
    named: str, normalise: str, made: Path, tmp_path: Path, hub: Path
):
    released(hub / NAME)
    path = hub / NAME
    if named == "own.pth":
        path = path.rename(tmp_path / named)
    weights = "imagenet" if named == "imagenet" else path
    flags = ("--training.backbone-weights", weights, "--model.normalise", normalise)
    code, _, err = spoken(APP, *train("medusa", made, tmp_path, *flags))
    assert code == 0, err
    assert err.count(WARNING) == (normalise == "unit" and named != "own.pth")


def test_files_are_taken_as_they_are_named():
    assert weights_file(Path("gone/w.pth"), "resnet50") == Path("gone/w.pth")
    assert of_imagenet(Path("gone/resnet50-11ad3fa6.pth"), "resnet50")
    assert not of_imagenet(Path("gone/resnet50-11ad3fa6.pth"), "resnet18")
    assert not of_imagenet(None, "resnet18")
