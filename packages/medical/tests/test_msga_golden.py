"""Equality with numbers that the official network computed (tests/golden/msga)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heed_medical.msga import GuidedPyramid, MsgaOutput, msga_loss
from heed_medical.msga.weights import load_official_state, official_name

GOLDEN = Path(__file__).parent / "golden" / "msga"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
STORED_SINGLE = 1e-7  # computed in float64 but stored as float32: half a unit in the last place


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "fixture.safetensors")


def official_weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {n.removeprefix("weights."): t for n, t in golden.items() if n.startswith("weights.")}
    return {name: t for name, t in weights.items() if not name.startswith("iso_")}


def build(golden: dict[str, Tensor], dtype: torch.dtype) -> GuidedPyramid:
    pyramid = GuidedPyramid([golden[f"input.L{s}"].shape[1] for s in (1, 2, 3, 4)], width=8)
    load_official_state(pyramid, official_weights(golden))
    return pyramid.to(dtype).eval()


def stages(golden: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [golden[f"input.L{s}"].clone().to(dtype).requires_grad_() for s in (1, 2, 3, 4)]


def size(golden: dict[str, Tensor]) -> tuple[int, int]:
    height, width = golden["input.image_size"].tolist()
    return height, width


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max()
    assert error <= tolerance * wanted.abs().max(), f"off by {error:.3g}"


def scalar(logits: Tensor) -> Tensor:
    k = torch.arange(logits.numel(), dtype=torch.float64)
    wave = torch.sin(0.7 * k).to(logits.dtype).reshape(logits.shape)
    return 100 * (logits * wave).mean()


def parameters_by_official_name(pyramid: GuidedPyramid) -> dict[str, nn.Parameter]:
    return {official_name(name): parameter for name, parameter in pyramid.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eval_logits(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    logits = build(golden, dtype)(stages(golden, dtype), size(golden))
    assert_near(logits, golden["output64.logits"], TOLERANCE[dtype])
    assert_near(scalar(logits), golden["output64.scalar"], 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("term", ["first.position.4", "second.channel.1", "first.autoencoder"])
def test_eval_logits_notice_a_missing_term(golden: dict[str, Tensor], term: str) -> None:
    pyramid = build(golden, torch.float64)
    with torch.no_grad():
        for parameter in pyramid.get_submodule(term).parameters():
            parameter.zero_()
        logits = pyramid(stages(golden, torch.float64), size(golden))
    reference = golden["output64.logits"]
    assert (logits - reference).abs().max() > 1e-4 * reference.abs().max()


STAGES = {
    "lateral.1": "down1",
    "lateral.2": "down2",
    "lateral.3": "down3",
    "lateral.4": "down4",
    "fuse": "fuse1",
    "first.position.4": "pam_attention_1_4",
    "first.channel.4": "cam_attention_1_4",
    "first.project.4": "conv8_1",
    "first.project.1": "conv8_4",
    "second.project.4": "conv8_11",
    "second.project.1": "conv8_14",
}
BARE = {"first.position.4.attention": "pam", "first.channel.4.attention": "cam"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_stage(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    pyramid = build(golden, dtype)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in (*STAGES, *BARE):
        pyramid.get_submodule(name).register_forward_hook(
            lambda _module, args, result, name=name: seen.update({name: (args[0], result)})
        )
    pyramid(stages(golden, dtype), size(golden))
    for name, official in STAGES.items():
        wanted = golden[f"output.stage.{official}"]
        assert_near(seen[name][1], wanted, max(TOLERANCE[dtype], STORED_SINGLE))
    for name, official in BARE.items():
        assert_near(seen[name][0], golden[f"output64.stage.{official}.in"], TOLERANCE[dtype])
        assert_near(seen[name][1], golden[f"output64.stage.{official}.out"], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eval_gradients(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    pyramid, inputs = build(golden, dtype), stages(golden, dtype)
    scalar(pyramid(inputs, size(golden))).backward()
    found = {f"input.L{s}": x.grad for s, x in enumerate(inputs, start=1)}
    found |= {f"weights.{n}": p.grad for n, p in parameters_by_official_name(pyramid).items()}
    names = [n for n in golden if n.startswith(("grad.input.", "grad.weights."))]
    assert len(names) == 8
    for name in names:
        gradient = found[name.removeprefix("grad.")]
        assert gradient is not None
        assert_near(gradient, golden[name], max(TOLERANCE[dtype], STORED_SINGLE))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_train_outputs_and_losses(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    output = build(golden, dtype).train()(stages(golden, dtype), size(golden))
    assert isinstance(output, MsgaOutput)
    wanted = golden["output.train.logits_refined.1"]
    assert_near(output.logits_refined[0], wanted, max(TOLERANCE[dtype], STORED_SINGLE))
    loss = msga_loss(output, golden["input.labels"])
    for official, got in {
        "seg": loss.segmentation,
        "guide": loss.guide,
        "rec": loss.reconstruction,
        "total": loss.total,
    }.items():
        assert_near(got, golden[f"output64.train.loss_{official}"], TOLERANCE[dtype])


def test_train_gradients(golden: dict[str, Tensor]) -> None:
    pyramid, inputs = build(golden, torch.float64).train(), stages(golden, torch.float64)
    output = pyramid(inputs, size(golden))
    msga_loss(output, golden["input.labels"]).total.backward()
    found = {f"input.L{s}": x.grad for s, x in enumerate(inputs, start=1)}
    found |= {f"weights.{n}": p.grad for n, p in parameters_by_official_name(pyramid).items()}
    names = [n for n in golden if n.startswith("grad.train.")]
    assert len(names) == 3
    for name in names:
        gradient = found[name.removeprefix("grad.train.")]
        assert gradient is not None
        assert_near(gradient, golden[name], STORED_SINGLE)
