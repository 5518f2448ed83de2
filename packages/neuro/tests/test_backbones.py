"""Frozen networks from local files: which tokens they give, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_neuro.brain_encoder.backbones import (
    MEAN,
    STD,
    BackboneConfig,
    build_backbone,
    read_image,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.effect_noise((30, 45), 60).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dino")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def test_pixels_are_the_patches(image: Path):
    network = build_backbone(BackboneConfig(name="pixels", patch=15))
    pixels = network.prepare(image)
    tokens = network(pixels[None])
    assert tokens.shape == (1, 3, 2, 3 * 15 * 15)
    patch = tokens[0, 2, 1].view(3, 15, 15)
    torch.testing.assert_close(patch, pixels[:, 30:45, 15:30], rtol=0, atol=0)


def test_images_are_scaled_and_padded_right_and_below(image: Path, dino: Path):
    network = build_backbone(BackboneConfig(name="dinov2_q", weights=dino))
    pixels = network.prepare(image)
    assert pixels.shape == (3, 56, 42)  # 45 x 30 rows x columns, to multiples of 14
    value = read_image(image).getpixel((29, 44))[0] / 255
    assert float(pixels[0, 44, 29]) == pytest.approx((value - MEAN[0]) / STD[0], abs=1e-6)
    assert float(pixels[:, 45:].abs().max()) == float(pixels[:, :, 30:].abs().max()) == 0.0


@pytest.mark.parametrize("layer", [1, 3])
def test_queries_are_those_of_the_block_counted_from_the_end(layer: int, image: Path, dino: Path):
    network = build_backbone(BackboneConfig(name="dinov2_q", weights=dino, layer=layer))
    pixels = network.prepare(image)[None]
    found = network(pixels)
    assert found.shape == (1, 4, 3, 12)
    model = transformers.Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        hidden = model(pixels, output_hidden_states=True).hidden_states[3 - layer]
        block = model.encoder.layer[3 - layer]
        weights = {name: tensor for name, tensor in block.named_parameters() if "attention" in name}
        weight = next(t for n, t in weights.items() if "q" in n.rpartition(".attention")[2][:12]
                      and n.endswith("weight"))  # fmt: skip
        bias = next(t for n, t in weights.items() if "q" in n.rpartition(".attention")[2][:12]
                    and n.endswith("bias"))  # fmt: skip
        wanted = block.norm1(hidden) @ weight.mT + bias
    torch.testing.assert_close(found, wanted[:, 1:].unflatten(1, (4, 3)), rtol=0, atol=1e-5)


def test_outputs_and_class_tokens(image: Path, dino: Path):
    model = transformers.Dinov2Model.from_pretrained(dino).eval()
    network = build_backbone(BackboneConfig(name="dinov2", weights=dino))
    pixels = network.prepare(image)[None]
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
    torch.testing.assert_close(network(pixels).flatten(1, 2), wanted[:, 1:], rtol=0, atol=1e-5)
    alone = build_backbone(BackboneConfig(name="dinov2_cls", weights=dino))(pixels)
    torch.testing.assert_close(alone[:, 0, 0], wanted[:, 0], rtol=0, atol=1e-5)


def test_registers_are_left_out_of_the_map(image: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        num_register_tokens=3,
    )  # fmt: skip
    model = transformers.Dinov2WithRegistersModel(config).eval()
    with torch.no_grad():
        model.embeddings.register_tokens.normal_()
    model.save_pretrained(tmp_path / "registers")
    network = build_backbone(BackboneConfig(name="dinov2", weights=tmp_path / "registers"))
    pixels = network.prepare(image)[None]
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
    assert wanted.shape[1] == 1 + 3 + 12
    torch.testing.assert_close(network(pixels).flatten(1, 2), wanted[:, 4:], rtol=0, atol=1e-5)
    queries = build_backbone(BackboneConfig(name="dinov2_q", weights=tmp_path / "registers"))
    assert queries(pixels).shape == (1, 4, 3, 12)


def test_clip_gives_projected_patches(image: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=6,
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "clip")
    network = build_backbone(BackboneConfig(name="clip", weights=tmp_path / "clip"))
    pixels = network.prepare(image)[None]
    assert pixels.shape == (1, 3, 28, 28)
    with torch.no_grad():
        output = model(pixels)
        wanted = model.visual_projection(output.last_hidden_state[:, 1:])
    torch.testing.assert_close(network(pixels).flatten(1, 2), wanted, rtol=0, atol=1e-5)
    alone = build_backbone(BackboneConfig(name="clip_cls", weights=tmp_path / "clip"))
    torch.testing.assert_close(alone(pixels)[:, 0, 0], output.image_embeds, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"folder of a clip_vision_model, not of DINOv2"):
        build_backbone(BackboneConfig(name="dinov2", weights=tmp_path / "clip"))


def test_networks_are_told_apart_by_their_weights_and_stay_frozen(dino: Path, tmp_path: Path):
    first = build_backbone(BackboneConfig(name="dinov2", weights=dino))
    model = transformers.Dinov2Model.from_pretrained(dino)
    with torch.no_grad():
        model.layernorm.weight[0] += 1e-3
    model.save_pretrained(tmp_path)
    other = build_backbone(BackboneConfig(name="dinov2", weights=tmp_path))
    same = build_backbone(BackboneConfig(name="dinov2", weights=dino))
    assert first.identity == same.identity != other.identity
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.train().network.training


@pytest.mark.slow
def test_resnet_gives_its_last_stage(image: Path, tmp_path: Path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet50", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    network = build_backbone(BackboneConfig(name="resnet50", weights=tmp_path / "resnet.pt"))
    pixels = network.prepare(image)[None]
    found = network.train()(pixels)
    with torch.no_grad():
        wanted = model.forward_features(pixels)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), wanted, rtol=0, atol=1e-5)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1)
    for state in ({"a": torch.zeros(1)}, vit.state_dict()):
        torch.save(state, tmp_path / "no.pt")
        with pytest.raises(InputError, match="are not the weights of resnet50"):
            build_backbone(BackboneConfig(name="resnet50", weights=tmp_path / "no.pt"))


@pytest.mark.bad_input
def test_what_cannot_be_loaded_is_told(dino: Path, tmp_path: Path):
    with pytest.raises(InputError, match="dinov2_q needs its weights"):
        build_backbone(BackboneConfig())
    with pytest.raises(InputError, match="no such file or folder"):
        build_backbone(BackboneConfig(weights=tmp_path / "missing"))
    with pytest.raises(InputError, match=r"has no config.json"):
        build_backbone(BackboneConfig(weights=tmp_path))
    with pytest.raises(InputError, match="has 3 blocks; layer 4"):
        build_backbone(BackboneConfig(weights=dino, layer=4))
    with pytest.raises(ValueError, match="weights has no effect"):
        BackboneConfig(name="pixels", weights=dino)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match=r"broken.png: cannot be read as an image"):
        read_image(broken)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def retype(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "wide"}))


def widen(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": 16}))


@pytest.mark.bad_input
@pytest.mark.parametrize("spoil", [cut, retype, widen])
def test_a_spoilt_folder_is_one_line(
    spoil: Callable[[Path], None], dino: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(dino, tmp_path / "spoilt"))
    spoil(folder)
    with pytest.raises(InputError, match=r"spoilt: cannot be loaded as Dinov2Model") as caught:
        build_backbone(BackboneConfig(name="dinov2", weights=folder))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the library's own report is many lines


@pytest.mark.bad_input
def test_an_architecture_that_cannot_be_is_told(tmp_path: Path):
    pytest.importorskip("timm")
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    for name, said in (
        ("vit_nobody", "timm has no network named 'vit_nobody'"),
        ("resnet18", "resnet18 is no plain vision transformer"),
        ("vit_tiny_patch16_224", "weights.pt: are not the weights of vit_tiny_patch16_224"),
    ):
        with pytest.raises(InputError, match=said):
            build_backbone(BackboneConfig(name="dinov2", weights=path, architecture=name))
    with pytest.raises(ValueError, match="architecture has no effect with name='clip'"):
        BackboneConfig(name="clip", weights=path, architecture="vit_tiny_patch16_224")
