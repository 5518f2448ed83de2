"""Frozen networks that turn an image into a map of tokens; weights come from local files alone.

| name | tokens | weights |
| --- | --- | --- |
| dinov2_q | query projections, before the attention, of block -k of DINOv2 | folder or file |
| dinov2, dinov2_cls | normalised output of block -k; its class token | folder or file |
| clip, clip_cls | patch tokens, last block, times the visual projection; image vector | folder |
| resnet50, resnet50_cls | last stage (2048 channels) with frozen batch norms; its mean | file |
| random_q | as dinov2_q, of a small network with random weights (a control) | none |
| pixels | the pixels of each patch (a control, and for made data) | none |

A folder is one of the transformers library (`config.json` and its weights); a file is a state dict
for the timm library (or, of DINOv2, the authors' own). Nothing is downloaded. DINOv2 with registers
is DINOv2 too: the registers are left out of the map.

Images are scaled by ImageNet's mean and standard deviation and padded with zeros, right and below,
to a multiple of the patch; CLIP's are resized to 224. Attention of these networks is theirs: it has
no sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from heed_core.checkpoints import read_state, state_digest
from heed_core.errors import InputError, MissingExtra, reason_of

Name = Literal[
    "dinov2_q", "dinov2", "dinov2_cls", "clip", "clip_cls", "resnet50", "resnet50_cls", "random_q",
    "pixels",
]  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_SIZE = 224
EXTRA = "heed-neuro[backbones]"
WEIGHTS_FLAG = "--backbone.weights (train: --data.backbone.weights)"
DINOV2_BASE = "vit_base_patch14_dinov2"
_DINOV2_FOLDERS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""Type in config.json -> class of the transformers library."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which frozen network, and where its weights are."""

    name: Name = "dinov2_q"
    weights: Path | None = None
    """A folder of the transformers library, or a state dict; none for random_q and pixels."""
    layer: int = 1
    """Of DINOv2: which block, counted from the last one."""
    architecture: str = DINOV2_BASE
    """timm's name of the network that a DINOv2 state dict belongs to."""
    patch: int = 14
    """Of pixels: side of a patch."""

    def __post_init__(self) -> None:
        needs = self.name not in ("random_q", "pixels")
        if self.weights is not None and not needs:
            raise ValueError(f"weights has no effect with name={self.name!r}")
        if self.layer < 1 or self.patch < 1:
            raise ValueError(f"layer and patch must be at least 1, got {self.layer}, {self.patch}")
        if self.layer != 1 and not self.name.startswith(("dinov2", "random")):
            raise ValueError(f"layer has no effect with name={self.name!r}")
        if self.architecture != DINOV2_BASE and not self.name.startswith("dinov2"):
            raise ValueError(f"architecture has no effect with name={self.name!r}")


class Backbone(nn.Module):
    """A frozen network with its preparation of images.

    Args:
        config: As it was asked for.
        network: Holds the weights; never trained.
        tokens: From prepared images (b, 3, h, w) to tokens (b, rows, columns, channels).
        multiple: Images are padded to a multiple of it.
        size: Images are resized to this square; None: not.
    """

    def __init__(
        self,
        config: BackboneConfig,
        network: nn.Module,
        tokens: Callable[[Tensor], Tensor],
        *,
        multiple: int = 1,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.config, self.network, self._tokens = config, network.eval(), tokens
        self.multiple, self.size = multiple, size
        self.requires_grad_(False)

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells its features from those of another network: name, layer, hash of weights."""
        found: dict[str, str | int] = {"name": self.config.name, "layer": self.config.layer}
        if self.config.name == "pixels":
            return {**found, "patch": self.config.patch, "scaled": "imagenet"}
        return {**found, "weights": state_digest(self.network.state_dict())[:16]}

    def prepare(self, path: Path) -> Float[Tensor, "3 h w"]:
        """Read an image and scale it.

        Raises:
            InputError: It cannot be read.
        """
        image = read_image(path)
        if self.size is not None:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).permute(2, 0, 1)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        pixels = (pixels - mean) / std
        below, right = (-pixels.shape[1] % self.multiple, -pixels.shape[2] % self.multiple)
        return F.pad(pixels, (0, right, 0, below))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b rows columns c"]:
        """The tokens of prepared images."""
        self.network.eval()
        return self._tokens(images)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: batch norms are frozen."""
        return super().train(False)


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        InputError: No such file, or damaged.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="check the path")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise InputError(
            f"cannot be read as an image ({reason_of(error, path)})",
            path=path,
            remedy="replace it",
        ) from None


def build_backbone(config: BackboneConfig) -> Backbone:
    """Build a frozen network and load its weights from the local path.

    Raises:
        InputError: The weights are not given, are not there, or belong to another network.
        MissingExtra: The library that builds it is not installed.
    """
    if config.name == "pixels":
        return _pixels(config)
    if config.name == "random_q":
        return _vision_transformer(config, _random_transformer())
    if config.weights is None:
        raise InputError(
            f"the backbone {config.name} needs its weights",
            remedy=f"give {WEIGHTS_FLAG} FOLDER_OR_FILE, or use the features of a cache",
        )
    if not config.weights.exists():
        raise InputError("no such file or folder", path=config.weights, remedy="check the path")
    if config.name.startswith("clip"):
        return _clip(config)
    if config.name.startswith("resnet50"):
        return _resnet(config)
    if config.weights.is_dir():
        kind = _dinov2_class(config.weights)
        return _vision_transformer(config, _pretrained(kind, config.weights))
    return _timm_transformer(config, _timm_dinov2(config.architecture, config.weights))


def _pixels(config: BackboneConfig) -> Backbone:
    side = config.patch

    def tokens(images: Tensor) -> Tensor:
        cut = F.pixel_unshuffle(images, side)  # (b, 3 side^2, h, w)
        return cut.permute(0, 2, 3, 1).contiguous()

    return Backbone(config, nn.Identity(), tokens, multiple=side)


def _random_transformer() -> nn.Module:
    transformers = _library("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
        )
        return cast(nn.Module, transformers.Dinov2Model(tiny))


def _vision_transformer(config: BackboneConfig, network: Any) -> Backbone:
    layers = network.encoder.layer
    block = _block(layers, config.layer, config)
    patch = int(network.config.patch_size)

    def tokens(images: Tensor) -> Tensor:
        if config.name.endswith("_q"):
            attention = block.attention
            # Named so by transformers 5; by transformers 4 it is attention.attention.query.
            layer = getattr(attention, "q_proj", None) or attention.attention.query
            found = _caught(layer, lambda: network(images))
        else:
            found = network.layernorm(_caught(block, lambda: network(images)))
        return _unrolled(found, images, patch, config.name)

    return Backbone(config, network, tokens, multiple=patch)


def _timm_transformer(config: BackboneConfig, network: Any) -> Backbone:
    block = _block(network.blocks, config.layer, config)
    patch = int(network.patch_embed.patch_size[0])

    def tokens(images: Tensor) -> Tensor:
        if config.name.endswith("_q"):
            packed = _caught(block.attn.qkv, lambda: network.forward_features(images))
            found = packed[..., : packed.shape[-1] // 3]
        else:
            found = network.norm(_caught(block, lambda: network.forward_features(images)))
        return _unrolled(found, images, patch, config.name)

    return Backbone(config, network, tokens, multiple=patch)


def _clip(config: BackboneConfig) -> Backbone:
    assert config.weights is not None
    network = _pretrained("CLIPVisionModelWithProjection", config.weights)
    patch = int(network.config.patch_size)

    def tokens(images: Tensor) -> Tensor:
        output = network(images)
        if config.name.endswith("_cls"):
            return cast(Tensor, output.image_embeds)[:, None, None]
        projected = network.visual_projection(output.last_hidden_state)
        return _unrolled(projected, images, patch, config.name)

    return Backbone(config, network, tokens, size=int(network.config.image_size))


def _resnet(config: BackboneConfig) -> Backbone:
    assert config.weights is not None
    network = _library("timm").create_model("resnet50", pretrained=False, num_classes=0)
    _fill(network, read_state(config.weights), "resnet50", config.weights)

    def tokens(images: Tensor) -> Tensor:
        stage = cast(Tensor, network.forward_features(images)).permute(0, 2, 3, 1)
        return stage.mean((1, 2), keepdim=True) if config.name.endswith("_cls") else stage

    return Backbone(config, network, tokens)


def _block(layers: nn.ModuleList | nn.Sequential, layer: int, config: BackboneConfig) -> Any:
    if layer > len(layers):
        raise InputError(
            f"has {len(layers)} blocks; layer {layer} from the end is none of them",
            path=config.weights,
            remedy="lower backbone.layer",
        )
    return layers[len(layers) - layer]


def _caught(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """What a layer gives while `run` runs."""
    caught: list[Tensor] = []

    def note(module: nn.Module, inputs: object, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return caught[-1]


def _unrolled(tokens: Tensor, images: Tensor, patch: int, name: str) -> Tensor:
    """Patch tokens on their grid, without class token and registers; or the class token alone."""
    if name.endswith("_cls"):
        return tokens[:, None, None, 0]
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    return tokens[:, -rows * columns :].reshape(len(tokens), rows, columns, -1)


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(name, EXTRA) from None


def _dinov2_class(folder: Path) -> str:
    """Which class of the transformers library a folder of DINOv2 is for."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return "Dinov2Model"  # what is wrong with the folder is told when it is loaded
    if found not in _DINOV2_FOLDERS:
        raise InputError(
            f"is the folder of a {found}, not of DINOv2",
            path=folder,
            remedy=f"give the folder of a {' or '.join(_DINOV2_FOLDERS.values())}",
        )
    return _DINOV2_FOLDERS[found]


def _pretrained(kind: str, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(
            "has no config.json", path=folder, remedy="give a folder of the transformers library"
        )
    transformers = _library("transformers")
    try:
        with _quiet(transformers):
            network, report = getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # the library lets anything escape from a damaged folder
        reason = reason_of(error).rstrip(":")
        raise InputError(
            f"cannot be loaded as {kind} ({reason})",
            path=folder,
            remedy="give the folder of this network with model.safetensors",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"has no weights for {missing[0]} ({len(missing)} in all)",
            path=folder,
            remedy=f"give the folder of a {kind}",
        )
    return network


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep the library's reports of loading, which are many lines, off the terminal."""
    logging = transformers.utils.logging
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def _timm_dinov2(architecture: str, path: Path) -> Any:
    timm = _library("timm")
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    state = read_state(path)
    remedy = "correct backbone.architecture"
    if not timm.is_model(architecture):
        raise InputError(f"timm has no network named {architecture!r}", remedy=remedy)
    try:
        network = timm.create_model(
            architecture, pretrained=False, num_classes=0, dynamic_img_size=True
        )
    except TypeError:  # a network that knows no such option
        network = None
    if not isinstance(network, VisionTransformer):
        raise InputError(f"{architecture} is no plain vision transformer", remedy=remedy)
    _fill(network, checkpoint_filter_fn(state, network), architecture, path)
    return network


def _fill(network: nn.Module, state: dict[str, Tensor], architecture: str, path: Path) -> None:
    kept = {n: t for n, t in state.items() if not n.startswith(("fc.", "head.", "mask_token"))}
    try:
        network.load_state_dict(kept)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"are not the weights of {architecture} ({reason})",
            path=path,
            remedy="give its state dict, or name the network in backbone.architecture",
        ) from None
