"""Weights that others trained: the official checkpoints of MSGA, and residual backbones.

`heed_core.checkpoints` says which files can be read.

Official names beside ours (s = scale, 1 the finest; g = 1 first step, 2 second):

| official | ours |
| --- | --- |
| `resnext` | `backbone` |
| `downS` | `pyramid.lateral.S` |
| `predictS`, `predictS_2` | `pyramid.predict_first.S`, `pyramid.predict_refined.S` |
| `fuse1.fuse_attn` | `pyramid.fuse` |
| `pam_attention_g_s.attn`, `cam_attention_g_s.attn` | `pyramid.first.position.s`, `.channel.s` |
| `semanticModule_g_1` | `pyramid.first.autoencoder` |
| `conv_sem_g_k`, `conv8_k` and `conv8_1k` | `.semantic.s`, `.project.s` with **k = 5 - s** |
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from heed_core.checkpoints import fill, read_state
from heed_medical.msga.network import GuidedPyramid, Msga

UNUSED_OFFICIAL = re.compile(r"^(conv6_|conv7_|attention\d|refine\d|resnext\.fc\.)")
POINTWISE = re.compile(r"(query|key|value)_conv\.weight$")  # 1 x 1 convolutions; linear in ours


def load_official(model: Msga | GuidedPyramid, path: Path | str) -> None:
    """Fill the network from an official checkpoint.

    Args:
        model: A network with all four scales and both branches.
        path: The checkpoint.

    Raises:
        InputError: The file cannot be read, or its names or shapes are not those of this network.
    """
    load_official_state(model, read_state(path), path=path)


def load_official_state(
    model: Msga | GuidedPyramid, state: Mapping[str, Tensor], *, path: Path | str | None = None
) -> None:
    """Fill the network from tensors under the official names.

    Args:
        model: A network with all four scales and both branches.
        state: The tensors; layers that the official network never uses are passed over.
        path: The file to name in errors.

    Raises:
        InputError: Names or shapes are not those of this network.
    """
    found = {
        _plain_backbone(name): tensor.flatten(1) if POINTWISE.search(name) else tensor
        for name, tensor in state.items()
        if not UNUSED_OFFICIAL.match(name)
    }
    fill(model, found, official_name, path=path)


def official_name(name: str) -> str:
    """The official name of one of our parameters or buffers, ours given as in `Msga`.

    Example:
        >>> official_name("pyramid.first.project.4.weight")
        'conv8_1.weight'
    """
    name = name.removeprefix("pyramid.")
    for pattern, rename in _RULES:
        if match := pattern.fullmatch(name):
            return rename(*match.groups())
    return name


def load_backbone(model: Msga, path: Path | str, *, stem: Literal["sum", "mean"] = "sum") -> None:
    """Fill the backbone from pretrained weights under torchvision's names.

    A stem for another number of channels than the network's is adapted: its kernels are summed
    or averaged over the channels, and the result is spread evenly over the network's channels.
    With "sum" a grey image gives what its copy in every channel gave; "mean" is weaker by the
    number of channels, which the batch normalisation takes up while training.

    Args:
        model: The network; only its backbone changes.
        path: A weights file for the same architecture; its classifier is left out.
        stem: How a stem for other channels becomes one for this network.

    Raises:
        InputError: The file cannot be read, or is not for this backbone.
    """
    if stem not in ("sum", "mean"):
        raise ValueError(f"stem must be 'sum' or 'mean', got {stem!r}")
    state = {
        name: tensor for name, tensor in read_state(path).items() if not name.startswith("fc.")
    }
    depth = len(model.backbone.stage_names)
    state = {n: t for n, t in state.items() if not re.match(rf"layer[{depth + 1}-9]\.", n)}
    kernels = state.get("conv1.weight")
    if kernels is not None and kernels.ndim == 4:
        state["conv1.weight"] = _adapt_stem(kernels, model.config.in_channels, stem)
    fill(model.backbone, state, lambda name: name, path=path)


def _adapt_stem(
    kernels: Float[Tensor, "o i kh kw"], channels: int, stem: Literal["sum", "mean"]
) -> Float[Tensor, "o c kh kw"]:
    if kernels.shape[1] == channels:
        return kernels
    whole = kernels.sum(1, keepdim=True) if stem == "sum" else kernels.mean(1, keepdim=True)
    return (whole / channels).repeat(1, channels, 1, 1)


def _plain_backbone(name: str) -> str:
    """Backbone names as torchvision has them, also where the layers were grouped in sequences.

    A grouped backbone counts its parts: `layer0.{0,1}` are the stem's convolution and
    normalisation, and `layer1.1` is the first stage behind the pooling `layer1.0`.
    """
    if not name.startswith("resnext."):
        return name
    name = re.sub(r"^resnext\.layer0\.0\.", "resnext.conv1.", name)
    name = re.sub(r"^resnext\.layer0\.1\.", "resnext.bn1.", name)
    return re.sub(r"^resnext\.layer1\.\d+\.(?=\d+\.)", "resnext.layer1.", name)


def _step(name: str) -> str:
    return "1" if name == "first" else "2"


def _backwards(scale: str) -> int:
    return 5 - int(scale)


def _branch(step: str, kind: str, scale: str, part: str, rest: str) -> str:
    letter = "p" if kind == "position" else "c"
    stem = f"{letter}am_attention_{_step(step)}_{scale}.attn"
    if part == "attention":
        return f"{stem}.3." + re.sub(r"^(query|key|value)\.", r"\1_conv.", rest)
    index, tail = rest.split(".", 1)
    return f"{stem}.{int(index) + (4 if part == 'after' else 0)}.{tail}"


def _autoencoder(step: str, level: str, rest: str) -> str:
    verb = "encode" if level.startswith("enc") else "decode"
    return f"semanticModule_{_step(step)}_1.{level}.{verb}.{rest}"


_RULES: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = (
    (re.compile(r"backbone\.(.+)"), lambda rest: f"resnext.{rest}"),
    (re.compile(r"lateral\.(\d)\.(.+)"), lambda s, rest: f"down{s}.{rest}"),
    (re.compile(r"predict_first\.(\d)\.(.+)"), lambda s, rest: f"predict{s}.{rest}"),
    (re.compile(r"predict_refined\.(\d)\.(.+)"), lambda s, rest: f"predict{s}_2.{rest}"),
    (
        re.compile(r"fuse\.(\d)\.(\d)\.(.+)"),
        lambda block, i, rest: f"fuse1.fuse_attn.{3 * int(block) + int(i)}.{rest}",
    ),
    (
        re.compile(r"(first|second)\.(position|channel)\.(\d)\.(before|attention|after)\.(.+)"),
        _branch,
    ),
    (re.compile(r"(first|second)\.autoencoder\.(\w+)\.(.+)"), _autoencoder),
    (
        re.compile(r"(first|second)\.semantic\.(\d)\.(.+)"),
        lambda step, s, rest: f"conv_sem_{_step(step)}_{_backwards(s)}.{rest}",
    ),
    (
        re.compile(r"first\.project\.(\d)\.(.+)"),
        lambda s, rest: f"conv8_{_backwards(s)}.{rest}",
    ),
    (
        re.compile(r"second\.project\.(\d)\.(.+)"),
        lambda s, rest: f"conv8_1{_backwards(s)}.{rest}",
    ),
)
