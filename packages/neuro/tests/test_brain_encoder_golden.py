"""Parity with the authors' encoder on fixed weights: outputs, stages, gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from heed_core import observe
from heed_core.errors import InputError
from heed_core.positions import masked_sine_grid
from heed_neuro.brain_encoder.network import (
    BrainEncoder,
    BrainEncoderConfig,
    Group,
    encoding_loss,
)
from heed_neuro.brain_encoder.official import load_official
from heed_neuro.brain_encoder.regions import Regions

GOLDEN = load_file(Path(__file__).parent / "golden" / "brain_encoder" / "fixture.safetensors")
NAMES = ("a", "b", "rest")


def stored(name: str) -> torch.Tensor:
    return GOLDEN[name].clone()


def regions() -> tuple[Regions, Regions]:
    found = [stored(f"input.{side}_roi_masks").numpy() > 0 for side in ("lh", "rh")]
    assert any((mask.sum(0) > 1).any() for mask in found), "no overlap in the fixture"
    return tuple(Regions(names=NAMES, members=mask) for mask in found)


def official(tmp_path: Path, prefix: str, **settings) -> BrainEncoder:
    own = regions()
    groups = tuple(Group.of(name, r) for name, r in zip(("lh", "rh"), own, strict=True))
    sizes = {"channels": 32, "dim": 32, "heads": 4, "ffn": 48, "grid": (5, 7)}
    config = BrainEncoderConfig(overlap="sum", groups=groups, **(sizes | settings))
    model = BrainEncoder(config).eval()
    model.settle(own)
    start = f"{prefix}weights."
    weights = {k.removeprefix(start): v for k, v in GOLDEN.items() if k.startswith(start)}
    save_file(weights, tmp_path / "official.safetensors")
    load_official(model, tmp_path / "official.safetensors")
    return model


def test_outputs_stages_and_gradients(tmp_path: Path):
    model = official(tmp_path, "")
    x = stored("input.features").requires_grad_()
    features, real = x.permute(0, 2, 3, 1), ~stored("input.padding_mask")
    code = masked_sine_grid(real, 32).permute(0, 3, 1, 2)
    torch.testing.assert_close(code, stored("output.position_code"), rtol=1e-5, atol=1e-5)
    with observe(model, sites="decoder.attention.attend") as record:
        tokens = model.region_tokens(features, real=real)
    weights = record["decoder.attention.attend"]
    torch.testing.assert_close(
        weights.reshape(2, 4, 6, 5, 7), stored("output.attention_per_head"), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(tokens, stored("output.output_tokens"), rtol=1e-5, atol=1e-5)
    left, right = model(features, real=real)
    torch.testing.assert_close(left, stored("output.lh_pred"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(right, stored("output.rh_pred"), rtol=1e-5, atol=1e-5)
    everything = model.readouts[0].linear(tokens[:, :3]).transpose(1, 2)
    torch.testing.assert_close(everything, stored("output.lh_all"), rtol=1e-5, atol=1e-5)
    loss = encoding_loss((left, right), (stored("input.lh_target"), stored("input.rh_target")))
    torch.testing.assert_close(loss, stored("output.loss"), rtol=1e-5, atol=1e-5)
    loss.backward()
    attention = model.decoder.attention
    packed = torch.cat([p.weight.grad for p in (attention.query, attention.key, attention.value)])
    layer = "grad.transformer.decoder.layers.0.multihead_attn.in_proj_weight"
    for found, name in (
        (x.grad, "grad.features"),
        (model.decoder.codes.grad, "grad.query_embed.weight"),
        (model.readouts[0].linear.weight.grad, "grad.lh_embed.0.weight"),
        (packed, layer),
    ):
        torch.testing.assert_close(found, stored(name), rtol=1e-5, atol=1e-6, msg=name)


def test_the_fixed_maps(tmp_path: Path):
    model = official(tmp_path, "factorised.", kind="factorised")
    features = stored("factorised.input.features").permute(0, 2, 3, 1)
    tokens = model.region_tokens(features)
    torch.testing.assert_close(
        tokens, stored("factorised.output.output_tokens"), rtol=1e-5, atol=1e-5
    )
    for own, readout, mine, side in zip(
        regions(), model.readouts, tokens.split(3, dim=1), ("lh", "rh"), strict=True
    ):
        everything = readout.linear(mine).transpose(1, 2)
        wanted = stored(f"factorised.output.{side}_f_pred")
        torch.testing.assert_close(everything, wanted, rtol=1e-5, atol=1e-5)
        total = (everything * torch.from_numpy(own.members.T.astype(np.float32))).sum(2)
        torch.testing.assert_close(readout(mine), total, rtol=1e-5, atol=1e-5)


def test_dead_weights_are_passed_over_and_strange_ones_refused(tmp_path: Path):
    weights = {k.removeprefix("weights."): v for k, v in GOLDEN.items() if k.startswith("weights.")}
    model = official(tmp_path, "")
    layer = "transformer.decoder.layers.0."
    dead = {
        f"{layer}self_attn.out_proj.bias": torch.zeros(32),
        f"{layer}norm2.bias": torch.ones(32),
    }
    save_file(weights | dead, tmp_path / "more.safetensors")
    load_official(model, tmp_path / "more.safetensors")
    save_file(weights | {"strange.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(InputError, match="strange"):
        load_official(model, tmp_path / "strange.safetensors")
    del weights["query_embed.weight"]
    save_file(weights, tmp_path / "fewer.safetensors")
    with pytest.raises(InputError, match="1 missing"):
        load_official(model, tmp_path / "fewer.safetensors")
