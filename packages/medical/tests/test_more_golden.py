"""Equality with numbers that the released MoRE networks computed (tests/golden/more)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from heed_medical.ecg.reading import Ecg
from heed_medical.ecg.signals import remove_baseline, resample, to_unit_range
from heed_medical.more import More, MoreClassifier, MoreConfig, TextConfig, TowerConfig, info_nce
from heed_medical.more.network import Projector
from heed_medical.more.studies import GREY_MEAN, GREY_STD, prepare_xray
from heed_medical.more.weights import load_official_state, official_name

GOLDEN = Path(__file__).parent / "golden" / "more"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
STORED_SINGLE = 1e-7  # stages and gradients were computed in float64 and stored as float32
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
MODES = pytest.mark.parametrize("mode", ["eval", "train"])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def config() -> MoreConfig:
    return MoreConfig(
        modalities=("xray", "ecg"),
        tower=TowerConfig(dim=24, depth=3, heads=4, hidden=48, schedule="constant"),
        image_size=(24, 40),
        patch=8,
        ecg_samples=135,
        stem_width=10,
        projection=8,
    )


def build(golden: dict[str, Tensor], dtype: torch.dtype) -> tuple[More, Projector]:
    weights = {
        name.removeprefix("weights."): x
        for name, x in golden.items()
        if name.startswith("weights.")
    }
    model = More(config())
    load_official_state(model, weights)
    projector = Projector(20, 24, 8)
    state = {
        name: weights[official_name(f"projectors.text.{name}")] for name in projector.state_dict()
    }
    projector.load_state_dict(state)
    return model.to(dtype), projector.to(dtype)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max(), f"off by {error:.3g}"


def forward(
    golden: dict[str, Tensor], mode: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], More, Projector]:
    model, projector = build(golden, dtype)
    model.train(mode == "train")
    projector.train(mode == "train")
    x = {
        name: golden[f"input.{key}"].clone().to(dtype).requires_grad_()
        for name, key in (("xray", "xray"), ("ecg", "ecg"), ("text", "text_sentence_vector"))
    }
    found = {"text.projection": projector(x["text"])}
    for name in ("xray", "ecg"):
        tower = getattr(model, name)
        kept = None
        if mode == "train":
            kept = list(~golden[f"input.dropkey_mask.{name}"].bool())
        found[f"{name}.feature"] = tower(x[name], kept=kept)
        found[f"{name}.projection"] = model.projectors[name](found[f"{name}.feature"])
    return found, x, model, projector


@DTYPES
@MODES
def test_features_losses_and_gradients(golden: dict[str, Tensor], mode: str, dtype: torch.dtype):
    found, x, model, projector = forward(golden, mode, dtype)
    temperature = torch.tensor(0.02, dtype=dtype, requires_grad=True)
    for one in ("x", "e"):
        other = found["xray.projection" if one == "x" else "ecg.projection"]
        found[f"loss_t2{one}"] = info_nce(found["text.projection"], other, temperature)
        found[f"loss_{one}2t"] = info_nce(other, found["text.projection"], temperature)
    found["loss"] = sum(found[f"loss_{n}"] for n in ("t2x", "x2t", "t2e", "e2t")) / 2
    checked = 0
    for name, tensor in found.items():
        assert_near(tensor, golden[f"output64.{mode}.{name}"], TOLERANCE[dtype])
        checked += 1
    assert checked == 10
    found["loss"].backward()
    tolerance = max(TOLERANCE[dtype], STORED_SINGLE)
    for name in ("xray", "ecg", "text"):
        assert_near(x[name].grad, golden[f"grad.{mode}.{name}"], tolerance)
    assert_near(temperature.grad, golden[f"grad.{mode}.temperature"], tolerance)
    attention = model.xray.blocks[1].attention
    parts = [layer.weight.grad for layer in (attention.query, attention.key, attention.value)]
    prefix = f"grad.{mode}.weights."
    qkv = golden[f"{prefix}xray.vit_model.blocks.1.attn.qkv.weight"]
    assert_near(torch.cat(parts), qkv, tolerance)
    stem = golden[f"{prefix}ecg.vit_model.patch_embed.conv1.0.weight"]
    assert_near(model.ecg.stem.down.weight.grad, stem, tolerance)
    linear = golden[f"{prefix}projector_text.layers.0.linear.weight"]
    assert_near(projector.expand.weight.grad, linear, tolerance)


@pytest.mark.parametrize("name", ["xray", "ecg"])
def test_stages(golden: dict[str, Tensor], name: str):
    model, _ = build(golden, torch.float64)
    tower = getattr(model.eval(), name)
    seen: dict[str, Tensor] = {}

    def keep(stage: str):
        return lambda _module, _inputs, output: seen.update({stage: output.detach()})

    handles = [
        tower.stem.register_forward_hook(keep("tokens")),
        tower.blocks[0].attention_norm.register_forward_hook(keep("block0.attn_in")),
        tower.blocks[0].attention.register_forward_hook(keep("block0.attn_out")),
        tower.blocks[0].register_forward_hook(keep("block0.out")),
    ]
    tower(golden[f"input.{name}"].double())
    for handle in handles:
        handle.remove()
    for stage, tensor in seen.items():
        assert_near(tensor, golden[f"output.eval.{name}.{stage}"], STORED_SINGLE)
    assert len(seen) == 4


def test_masks_matter(golden: dict[str, Tensor]):
    with_masks = forward(golden, "train", torch.float64)[0]["xray.feature"]
    model, _ = build(golden, torch.float64)
    without = model.xray.eval()(golden["input.xray"].double())
    assert (with_masks - without).abs().max() > 1e-3


def test_ecg_preprocessing(golden: dict[str, Tensor]):
    raw = golden["input.ecg_raw_500hz"].double().numpy().T
    ecg = Ecg(leads_mv=raw, rate_hz=500.0)
    leads = resample(np.nan_to_num(ecg.leads_mv, nan=0.0), rate_hz=ecg.rate_hz)
    assert np.abs(leads - golden["output.ecg_100hz"].numpy()).max() < 1e-6
    flat = remove_baseline(leads)
    assert np.abs(flat[:, ::3] - golden["output.ecg_baseline_removed"].numpy()).max() < 1e-6
    assert np.abs(to_unit_range(flat) - golden["output.ecg_normalised"].numpy()).max() < 1e-6


def chest() -> np.ndarray:
    """Two dark lungs and a heart in 224 x 224, with a fine pattern; from 0.19 to 0.66."""
    y, x = np.mgrid[:224, :224] / 224
    picture = 0.35 + 0.3 * np.exp(-((x - 0.5) ** 2 + (y - 0.6) ** 2) / 0.08)
    for column in (0.28, 0.72):
        picture -= 0.25 * np.exp(-((x - column) ** 2 + (y - 0.45) ** 2) / 0.02)
    return picture + 0.04 * np.sin(40 * y + 6 * x) * np.cos(23 * x)


def test_xray_contrast_is_near_to_that_of_scikit_image():
    wanted = np.load(GOLDEN / "xray_contrast.npy") / 255
    grey = chest().astype(np.float32)
    found = prepare_xray(grey, (224, 224)) * GREY_STD + GREY_MEAN
    assert np.allclose((found.min(), found.max()), (0, 1), atol=1e-6)
    assert np.allclose(found * 255, np.round(found * 255), atol=1e-3)
    error = np.abs(found[::7, ::7] - wanted)
    assert error.mean() < 0.02
    assert error.max() < 0.07
    brighter = prepare_xray(0.1 + 0.8 * grey, (224, 224)) * GREY_STD + GREY_MEAN
    assert np.abs(found - brighter).mean() < 0.005
    assert np.isfinite(prepare_xray(np.full((9, 9), 0.5, dtype=np.float32), (64, 64))).all()


PUBLISHED = json.loads((GOLDEN / "meta.json").read_text())["published_variants"]


def count(module: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def test_parameter_counts_of_the_published_network():
    wanted = PUBLISHED["MultiModal (RoBERTa-base config, random weights)"]
    with torch.device("meta"):
        model = More(MoreConfig())
    parts = wanted["by_child"]
    assert count(model.xray) == parts["xray_model"]
    assert count(model.ecg) == parts["ecg_model"]
    assert count(model.ecg.stem) == wanted["ecg patch stem"]
    assert count(model.text) == parts["text_model"]
    for projector in model.projectors.values():
        assert count(projector) == parts["projector_text"]
    text = {n: p.numel() for n, p in model.text.named_parameters() if p.requires_grad}
    assert sum(size for n, size in text.items() if "lora_" in n) == wanted["LoRA"]
    assert sum(size for n, size in text.items() if "lora_" not in n) == wanted["trainable biases"]
    temperature = 1
    assert count(model) - temperature == wanted["parameters"]
    assert count(model, trainable=True) - temperature == wanted["trainable"]


def test_parameter_counts_of_the_classifier():
    with torch.device("meta"):
        model = MoreClassifier(MoreConfig(text=TextConfig()), classes=4)
    wanted = PUBLISHED["MultiModalHead(in_dim=256)"]
    assert count(model) == wanted["parameters"]
    model.train_only_last(0)
    assert count(model, trainable=True) == wanted["trainable"]
