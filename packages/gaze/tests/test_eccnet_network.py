"""The retina and the network of eccNET against the paper and stored official numbers."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from heed_core.errors import InputError
from heed_core.kernels.ring_pool import ring_pool2d
from heed_gaze.eccnet.attention import (
    MapConfig,
    attention_map,
    enlarge,
    gaussian_window,
    sharpen,
)
from heed_gaze.eccnet.network import EccNet, EccNetConfig
from heed_gaze.eccnet.retina import EccentricPool, RetinaConfig, rings_of
from heed_gaze.eccnet.weights import CONV_NAMES, load_weights

GOLDEN = Path(__file__).parent / "golden" / "eccnet"
TENSORS = load_file(GOLDEN / "fixture.safetensors")
META = json.loads((GOLDEN / "meta.json").read_text())
TINY = EccNetConfig(widths=(2, 2, 3, 3, 4))


@pytest.mark.parametrize(
    ("side", "pool", "outputs", "windows"),
    [
        (806, 3, 101, [2, 3, 3, 4, 4, 5, 5, 6, 6, 7]),
        (806, 4, 51, [2, 3, 3, 4, 5, 5, 6, 6, 7, 8]),
        (806, 5, 26, [2, 3, 3, 4, 5, 5, 6, 6, 7, 8]),
        (524, 3, 66, [2, 3, 3, 4, 4, 5]),
        (524, 4, 33, [2, 3, 3, 4, 5, 5]),
        (524, 5, 17, [2, 3, 3, 4, 5, 5]),
        *((224, pool, 224 >> pool, [2]) for pool in range(1, 6)),
    ],
)
def test_windows_are_those_of_the_paper(side, pool, outputs, windows):
    for _ in range(pool - 1):
        side = (side + 1) // 2
    rings = rings_of(RetinaConfig(), pool, side)
    assert rings.outputs == outputs
    assert list(rings.windows) == windows


@pytest.mark.parametrize(("pool", "outputs", "last"), [(3, 170, 12), (4, 85, 14), (5, 43, 14)])
def test_rings_of_the_largest_experiments(pool, outputs, last):
    side = 1358
    for _ in range(pool - 1):
        side = (side + 1) // 2
    rings = rings_of(RetinaConfig(), pool, side)
    assert (rings.outputs, len(rings.windows), rings.windows[-1]) == (outputs, 19, last)


@pytest.mark.parametrize("pool", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("side", [17, 66, 101])
def test_windows_never_shrink_and_no_slope_is_a_plain_pool(pool, side):
    windows = rings_of(RetinaConfig(), pool, side).windows
    assert list(windows) == sorted(windows)
    flat = rings_of(RetinaConfig(eccentricity=False), pool, side)
    assert set(flat.windows) == {2}
    x = torch.randn(1, 2, side, side)
    plain = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    found = EccentricPool(RetinaConfig(eccentricity=False), pool)(x)
    assert torch.equal(found, plain)
    ones = EccentricPool(RetinaConfig(), pool)(torch.ones(1, 1, side, side))
    assert torch.allclose(ones, torch.ones_like(ones), atol=1e-6)


def test_turning_the_input_turns_what_odd_rings_see():
    """Only odd windows lie symmetrically about their pixel, on an odd output."""
    rings = rings_of(RetinaConfig(slopes=(0.3,) * 5), 5, 51 * 2 - 1)
    assert rings.outputs % 2 == 1
    windows = [k + 1 - k % 2 for k in rings.windows]
    x = torch.randn(1, 1, 101, 101, dtype=torch.float64)

    def pool(y):
        return ring_pool2d(y, windows, rings.radii, centre=rings.centre)

    assert torch.allclose(pool(x.flip(2, 3)), pool(x).flip(2, 3), atol=1e-12)
    assert not torch.allclose(pool(x.flip(2, 3)), pool(x), atol=1e-3)


@pytest.mark.parametrize("case", list(META["pooling"]))
def test_pools_equal_the_official_ones(case):
    layer = META["pooling"][case]["layer"]
    level = {8: 3, 4: 4, 2: 5}[layer["deg2px"]]
    config = RetinaConfig(pooling=layer["pool_type"])
    assert config.slopes[level - 1] == layer["ecc_slope"]
    rings = rings_of(config, level, META["pooling"][case]["rings"]["side"])
    assert list(rings.windows) == META["pooling"][case]["rings"]["windows"]
    stored = META["pooling"][case]["rings"]["outer_radius_out_px"]
    assert list(rings.radii) == stored[: len(rings.windows) - 1]
    x = TENSORS[f"input.{case}"].float() / 16
    leaf = x.permute(0, 3, 1, 2).clone().requires_grad_()
    out = EccentricPool(config, level)(leaf).permute(0, 2, 3, 1)
    assert torch.allclose(out, TENSORS[f"output.{case}"], atol=2e-6)
    weights = torch.cos(0.37 * torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    (out * weights).sum().backward()
    wanted = TENSORS[f"grad.{case}"].permute(0, 3, 1, 2)
    assert torch.allclose(leaf.grad, wanted, atol=1e-5)


def test_sizes_are_those_of_vgg16():
    def count(config):
        with torch.device("meta"):
            return sum(p.numel() for p in EccNet(config).parameters())

    assert count(EccNetConfig()) == 14_714_688
    assert count(EccNetConfig(classes=1000)) == 138_357_544


def test_at_224_it_is_vgg16_with_average_pools():
    net = EccNet(EccNetConfig(widths=(3, 4, 5, 6, 7), classes=4, hidden=8)).eval()
    picture = torch.rand(2, 3, 224, 224) * 255
    x = (picture / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    for block in net.blocks:
        for layer in block:
            x = layer(x)
        x = F.avg_pool2d(x, 2)
    assert torch.allclose(net(picture), net.classifier(x.flatten(1)), atol=1e-4, rtol=1e-5)


def official(tmp_path):
    """The narrow network of the stored search, filled from a file."""
    state = {k.removeprefix("weights."): v for k, v in TENSORS.items() if k.startswith("weights.")}
    save_file(state, tmp_path / "keras.safetensors")
    net = EccNet(EccNetConfig(widths=tuple(META["search"]["widths"]), weights="keras-caffe")).eval()
    load_weights(net, tmp_path / "keras.safetensors")
    return net


def test_features_and_maps_equal_the_official_ones(tmp_path):
    net = official(tmp_path)
    assert sum(p.numel() for p in net.parameters()) == META["parameters_search_net"]
    target = TENSORS["input.search.target_image"].permute(2, 0, 1)[None].float()
    image = TENSORS["input.search.image"]
    window = torch.full((368, 368, 3), 255.0)
    window[184 - 60 : 184 + 60, 184 - 80 : 184 + 80] = image.float()
    with torch.inference_mode():
        targets = net.target_features(target)
        features = net.features(window.permute(2, 0, 1)[None])
        found = attention_map(features, targets, MapConfig())
    for number, layer in enumerate((3, 4, 5)):
        close(targets[number].permute(0, 2, 3, 1), TENSORS[f"output.target_features_T{layer}"])
        close(
            features[number].permute(0, 2, 3, 1),
            TENSORS[f"output.image_features_F{layer}_step0"],
        )
        close(found.correlations[number], TENSORS[f"output.step0.correlation{layer}"])
    close(found.layer_weights, TENSORS["output.step0.layer_weights"])
    close(found.combined, TENSORS["output.step0.map_combined"])
    close(found.sharpened, TENSORS["output.step0.map_after_dog"])


def close(found, wanted):
    wanted = wanted.double()
    off = (torch.as_tensor(found).double() - wanted).abs().max()
    assert float(off) <= 1e-4 * float(wanted.abs().max())


def test_sharpening_and_enlarging_equal_opencv():
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).random((13, 17))
    for small, large in (((3, 1.0), (5, 3.0)), ((5, 3.0), (7, 5.0)), ((3, None), (5, 1.0))):
        wanted = values
        for _ in range(3):
            low, high = (
                cv2.GaussianBlur(wanted, (n, n), s or 0, borderType=cv2.BORDER_REFLECT_101)
                for n, s in (small, large)
            )
            wanted = wanted + (low - high)
        found = sharpen(values, MapConfig(gaussians=(small, large)))
        assert np.allclose(found, wanted, atol=1e-12)
    for size in ((17, 51), (40, 23), (201, 273), (26, 34)):
        wanted = cv2.resize(values, size[::-1], interpolation=cv2.INTER_AREA)
        assert np.allclose(enlarge(values, size), wanted, atol=1e-6)
        part = enlarge(values, size, slice(3, 9), slice(4, 20))
        assert np.array_equal(part, enlarge(values, size)[3:9, 4:20])


def test_gaussians_are_normalised():
    assert gaussian_window(7, 5.0).sum() == pytest.approx(1)
    assert gaussian_window(3, 1.0)[0] / gaussian_window(3, 1.0)[1] == pytest.approx(np.exp(-0.5))


@pytest.mark.bad_input
@pytest.mark.parametrize(("size", "sigma"), [(4, 1.0), (5, None)])
def test_gaussians_without_a_rule_are_refused(size, sigma):
    with pytest.raises(ValueError, match="si"):
        gaussian_window(size, sigma)


CONFIG = EccNetConfig(widths=(2, 2, 3, 3, 4), classes=3, hidden=5, picture=64)


def keras_state(net):
    """Its weights in Keras's layout: kernels (h, w, in, out), dense rows pixels first."""
    arrays = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            layer = name.split(".")[-1]
            arrays[layer] = module.weight.detach().permute(2, 3, 1, 0), module.bias.detach()
    for layer, index in (("fc1", 0), ("fc2", 3), ("predictions", 6)):
        module = net.classifier[index]
        kernel = module.weight.detach().T
        if layer == "fc1":
            kernel = kernel.view(4, 2, 2, -1).permute(1, 2, 0, 3).reshape(kernel.shape)
        arrays[layer] = kernel, module.bias.detach()
    return arrays


@pytest.mark.parametrize("layout", ["old", "model", "names"])
def test_weights_of_keras_are_read(tmp_path, layout):
    config = EccNetConfig(**{**CONFIG.__dict__, "weights": "keras-caffe"})
    source, filled = EccNet(config).eval(), EccNet(config).eval()
    with h5py.File(tmp_path / "w.h5", "w") as file:
        root = file.create_group("model_weights") if layout == "model" else file
        for layer, (kernel, bias) in keras_state(source).items():
            names = f"{layer}/{layer}/kernel:0", f"{layer}/{layer}/bias:0"
            if layout == "old":
                names = f"{layer}/{layer}_W_1:0", f"{layer}/{layer}_b_1:0"
            root[names[0]], root[names[1]] = kernel.numpy(), bias.numpy()
    load_weights(filled, tmp_path / "w.h5")
    picture = torch.rand(1, 3, 64, 64) * 255
    assert torch.allclose(filled(picture), source(picture), atol=1e-6)


def test_weights_of_torchvision_are_read_with_or_without_the_classifier(tmp_path):
    source, filled = EccNet(CONFIG), EccNet(CONFIG)
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    convs = dict(zip(CONV_NAMES, places, strict=True))
    state = {}
    for name, tensor in source.state_dict().items():
        parts = name.split(".")
        state[f"features.{convs[parts[2]]}.{parts[3]}" if parts[0] == "blocks" else name] = tensor
    torch.save(state, tmp_path / "w.pth")
    load_weights(filled, tmp_path / "w.pth")
    for (name, own), other in zip(filled.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(own, other), name
    bare = EccNet(EccNetConfig(**{**CONFIG.__dict__, "classes": 0}))
    load_weights(bare, tmp_path / "w.pth")
    assert torch.equal(bare.blocks[4][0].weight, source.blocks[4][0].weight)


def test_wrong_weights_are_refused_in_one_line(tmp_path):
    net = EccNet(TINY)
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["dense/kernel:0"] = np.ones((2, 2))
    save_file({"features.0.weight": torch.ones(2, 3, 3, 3)}, tmp_path / "part.safetensors")
    save_file({"block1_conv1.kernel": torch.ones(3, 3, 3, 2)}, tmp_path / "keras.safetensors")
    for name, said in {
        "cut.h5": "cannot be read as HDF5",
        "cut.pth": "cannot be read as weights",
        "other.h5": "no layer of VGG16",
        "part.safetensors": "missing",
        "keras.safetensors": "--model.weights keras-caffe",
        "none.h5": "no such file",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            load_weights(net, tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.bad_input
def test_a_classifier_refuses_other_sizes():
    with pytest.raises(ValueError, match="64 x 64"):
        EccNet(CONFIG)(torch.zeros(1, 3, 32, 64))
    with pytest.raises(ValueError, match="no classifier"):
        EccNet(TINY)(torch.zeros(1, 3, 64, 64))
