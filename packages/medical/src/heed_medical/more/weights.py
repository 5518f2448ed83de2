"""Weights of the released MoRE networks.

A file is a `.safetensors` or a state dict saved by torch. Towers follow timm's names under
`xray_model.vit_model.` and `ecg_model.vit_model.` (or `xray.`, `ecg.`), with query, key and value
in one matrix; projectors are `projector_{xray_text,ecg_text,text}.layers.{0,2}.{linear,bn}`. The
text tower is under `text_model.` in the names that peft gives it. No released file was at hand:
towers and projectors were verified on stored tensors, the names of the text tower were not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from heed_core.checkpoints import fill, read_state
from heed_medical.more.network import More

_STEM = {
    "stem.project": "patch_embed.proj",
    "stem.down": "patch_embed.conv1.0",
    "stem.down_norm": "patch_embed.conv1.2",
    "stem.mix": "patch_embed.conv2.0",
    "stem.mix_norm": "patch_embed.conv2.2",
    "norm": "norm",
}
_BLOCK = {
    "attention_norm": "norm1",
    "attention.query": "attn.query",
    "attention.key": "attn.key",
    "attention.value": "attn.value",
    "attention.out": "attn.proj",
    "feed_norm": "norm2",
    "feed.expand": "mlp.fc1",
    "feed.contract": "mlp.fc2",
}
_PROJECTORS = {"xray": "projector_xray_text", "ecg": "projector_ecg_text", "text": "projector_text"}
_LAYERS = {
    "expand": "layers.0.linear",
    "expand_norm": "layers.0.bn",
    "contract": "layers.2.linear",
    "contract_norm": "layers.2.bn",
}


def load_official(model: More, path: Path) -> None:
    """Fill a network from a released checkpoint; temperature and tokenizer stay.

    Raises:
        InputError: The file cannot be read, or its names or shapes are not those of this network.
    """
    load_official_state(model, read_state(path), path=path)


def load_official_state(
    model: More, state: Mapping[str, Tensor], *, path: Path | None = None
) -> None:
    """Fill a network from official names and tensors; nothing changes if they do not fit.

    Tensors of modalities that the network does not have are left out.

    Raises:
        InputError: Names or shapes are not those of this network.
    """
    found = _usual_names(state, model.config.modalities)
    for name in ("log_temperature", "text.tokenizer"):
        if name in model.state_dict():
            found[name] = model.state_dict()[name]
    fill(model, found, official_name, path=path)


def official_name(name: str) -> str:
    """The official name of one of our tensors; query, key and value are parts of `attn.qkv`."""
    head, _, rest = name.partition(".")
    stem, _, leaf = rest.rpartition(".")
    if head == "projectors":
        kind, _, layer = stem.partition(".")
        return f"{_PROJECTORS[kind]}.{_LAYERS[layer]}.{leaf}"
    if head == "text" and rest.startswith("encoder."):
        return f"text_model.{rest.removeprefix('encoder.')}"
    if head not in ("xray", "ecg"):
        return name
    if rest in ("class_token", "positions"):
        return f"{head}.vit_model.{'cls_token' if rest == 'class_token' else 'pos_embed'}"
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
        return f"{head}.vit_model.blocks.{match[1]}.{_BLOCK[match[2]]}.{leaf}"
    return f"{head}.vit_model.{_STEM[stem]}.{leaf}"


def _usual_names(state: Mapping[str, Tensor], modalities: tuple[str, ...]) -> dict[str, Tensor]:
    """One spelling of prefixes, query, key and value apart, only these modalities."""
    found: dict[str, Tensor] = {}
    for official, tensor in state.items():
        name = re.sub(r"^(xray|ecg)_model\.", r"\1.", official)
        name = re.sub(r"^text_model\.(base_model\.model\.)?(roberta\.)?", "text_model.", name)
        kind = re.match(r"(?:projector_)?(xray|ecg|text)", name)
        if kind is None or kind[1] not in modalities:
            continue
        if name.endswith("attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            parts = tensor.chunk(3)
            for part, value in zip(("query", "key", "value"), parts, strict=True):
                found[f"{stem}{part}.weight"] = value
            continue
        found[name] = tensor
    return _with_base_layers(found)


def _with_base_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where old versions of peft wrote `query.weight` beside `query.lora_A`, say `base_layer`."""
    adapted = {name.partition(".lora_A.")[0] for name in state if ".lora_A." in name}
    renamed = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        renamed[f"{stem}.base_layer.{leaf}" if stem in adapted else name] = tensor
    return renamed
