"""Weights of the official OAT checkpoints.

A file is a `.safetensors`, a state dict saved by torch, or a Lightning checkpoint of it. Official
names beside ours:

| official | ours |
| --- | --- |
| `cnn_embedding.cnn1.0`, `cnn2.0`, `fc` | `crop_encoder.conv1`, `conv2`, `project` |
| `transformer_encoder.layers.i`, `transformer_decoder...` | `encoder.layers.i`, `decoder...` |
| `self_attn.in_proj` (rows of q, k, v), `out_proj` | `attention.query`, `key`, `value`, `out` |
| `multihead_attn` | `context_attention` |
| `linear1`, `linear2` | `feed.expand`, `feed.contract` |
| `norm1`, `norm2`, `norm3` | `attention_norm`, (`context_norm`,) `feed_norm` |
| `cross_attentions.h.encode_fc`, `decode_fc` | rows of head h of `pointer.key`, `pointer.query` |
| `readout` | `pointer.mix` |
| position table of n rows, stored beside the checkpoint | `places.table.table`, with 4 zero rows |

`generator` and `LinearEmbedding` have no effect on the outputs and are passed over; where there is
no pointer head, `generator` is `classify`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed_core.checkpoints import State, fill, read_state
from heed_core.errors import InputError
from heed_gaze.oat.network import Oat
from heed_gaze.oat.places import ZERO_ROWS

_ENCODER_NORMS = {"norm1": "attention_norm", "norm2": "feed_norm"}
_DECODER_NORMS = {"norm1": "attention_norm", "norm2": "context_norm", "norm3": "feed_norm"}
_STEMS = {
    "cnn_embedding.cnn1.0": "crop_encoder.conv1",
    "cnn_embedding.cnn2.0": "crop_encoder.conv2",
    "cnn_embedding.fc": "crop_encoder.project",
    "readout": "pointer.mix",
}
_DEAD = ("LinearEmbedding.", "onedpositional_encoding.", "positional_encoding.")
_PREFIXES = ("model.", "module.")


def load_official(model: Oat, path: Path, *, table: Float[Tensor, "n w"] | None = None) -> None:
    """Fill a network from an official checkpoint.

    Args:
        model: Built with the settings of the checkpoint.
        path: The file.
        table: The position table that the checkpoint was trained with, without zero rows; without
            it the network keeps its own, which is another rotation of the same similarities.

    Raises:
        InputError: The file cannot be read, or its names or shapes are not those of this network.
    """
    load_official_state(model, read_state(path), table=table, path=path)


def load_official_state(
    model: Oat,
    state: Mapping[str, Tensor],
    *,
    table: Float[Tensor, "n w"] | None = None,
    path: Path | None = None,
) -> None:
    """Fill a network from official names and tensors; nothing changes if they do not fit.

    Raises:
        InputError: Names or shapes are not those of this network.
    """
    found = convert_state(_without_prefix(state), pointer=model.pointer is not None)
    if model.places.table is not None:
        own = model.places.table.table
        if table is None:
            found["places.table.table"] = own
        elif table.shape != (own.shape[0] - ZERO_ROWS, own.shape[1]):
            raise InputError(
                f"the position table must be {(own.shape[0] - ZERO_ROWS, own.shape[1])}, got "
                f"{tuple(table.shape)}",
                path=path,
                remedy="set table_rows to the number of its rows",
            )
        else:
            found["places.table.table"] = F.pad(table, (0, 0, 0, ZERO_ROWS))
    fill(model, found, lambda name: name, path=path)


def convert_state(state: Mapping[str, Tensor], *, pointer: bool = True) -> State:
    """Our names and tensors from official ones."""
    found: State = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if name.startswith(_DEAD) or (stem == "generator" and pointer):
            continue
        if stem == "generator":
            found[f"classify.{leaf}"] = tensor
        elif match := re.fullmatch(r"cross_attentions\.(\d+)\.(encode|decode)_fc", stem):
            side = "key" if match[2] == "encode" else "query"
            heads.setdefault(f"pointer.{side}.{leaf}", {})[int(match[1])] = tensor
        elif stem in _STEMS:
            found[f"{_STEMS[stem]}.{leaf}"] = tensor
        else:
            found |= _layer(name, tensor)
    for name, parts in heads.items():
        found[name] = torch.cat([parts[number] for number in sorted(parts)])
    return found


def _layer(name: str, tensor: Tensor) -> State:
    """Our tensors of one tensor of a layer; an unknown name stays, to be complained about."""
    match = re.fullmatch(r"transformer_(encoder|decoder)\.layers\.(\d+)\.(.+)\.?", name)
    if match is None:
        return {name: tensor}
    stack, number, rest = match.groups()
    start = f"{stack}.layers.{number}"
    norms = _ENCODER_NORMS if stack == "encoder" else _DECODER_NORMS
    part, _, leaf = rest.partition(".")
    if part in norms:
        return {f"{start}.{norms[part]}.{leaf}": tensor}
    if part in ("linear1", "linear2"):
        return {f"{start}.feed.{'expand' if part == 'linear1' else 'contract'}.{leaf}": tensor}
    owner = {"self_attn": "attention", "multihead_attn": "context_attention"}.get(part)
    if owner is None:
        return {name: tensor}
    if leaf.startswith("in_proj_"):
        kind = leaf.removeprefix("in_proj_")
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{start}.{owner}.{side}.{kind}": rows for side, rows in parts}
    return {f"{start}.{owner}.{leaf.replace('out_proj', 'out')}": tensor}


def _without_prefix(state: Mapping[str, Tensor]) -> State:
    """Names without what Lightning or a wrapper put before all of them."""
    found = dict(state)
    for prefix in _PREFIXES:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found
