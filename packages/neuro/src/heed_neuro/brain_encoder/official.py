"""Weights of the authors' encoder (a state dict) under our names.

Their dead weights (self-attention of the only layer, a norm, an unused convolution) are left out.
The linear read-outs are `<group>_embed.0`; queries of the left hemisphere come first in theirs as
in ours.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from heed_core.checkpoints import fill, read_state
from heed_core.errors import InputError
from heed_core.weights import attention_from_torch
from heed_neuro.brain_encoder.network import BrainEncoder

_LAYER = "transformer.decoder.layers.0."
_RENAMED = {
    "query_embed.weight": "decoder.codes",
    "spatial_embed.weight": "maps.logits",
    f"{_LAYER}norm1.": "decoder.query_norm.",
    f"{_LAYER}norm3.": "decoder.feed_norm.",
    f"{_LAYER}linear1.": "decoder.feed.expand.",
    f"{_LAYER}linear2.": "decoder.feed.contract.",
    "transformer.decoder.norm.": "decoder.final_norm.",
    "input_proj.": "project.",
}
_DEAD = (f"{_LAYER}self_attn.", f"{_LAYER}norm2.", "transformer.memory_proj.", "backbone")
_ATTENTION = f"{_LAYER}multihead_attn."


def from_official(
    state: dict[str, Tensor], groups: tuple[str, ...], *, path: Path | None = None
) -> dict[str, Tensor]:
    """Rename a state dict.

    Args:
        state: The authors' names -> tensors.
        groups: Our groups in order; their read-outs are named `lh_embed`, `rh_embed`.
        path: The file to name in errors.

    Raises:
        InputError: A tensor that the official encoder does not have.
    """
    result: dict[str, Tensor] = {}
    attention: dict[str, Tensor] = {}
    readouts = {f"{name}_embed.0.": f"readouts.{k}.linear." for k, name in enumerate(groups)}
    for name, tensor in state.items():
        if name.startswith(_DEAD):
            continue
        if name.startswith(_ATTENTION):
            attention[name.removeprefix(_ATTENTION)] = tensor
            continue
        for theirs, ours in (_RENAMED | readouts).items():
            if name.startswith(theirs):
                result[ours + name.removeprefix(theirs)] = tensor
                break
        else:
            raise InputError(
                f"{name!r} is no weight of the official brain encoder",
                path=path,
                remedy="give the state dict of its class brain_encoder",
            )
    renamed = attention_from_torch(attention)
    result |= {f"decoder.attention.{name}": tensor for name, tensor in renamed.items()}
    if "project.weight" in result:  # a 1 x 1 convolution there, a linear layer here
        result["project.weight"] = result["project.weight"].flatten(1)
    return result


def load_official(model: BrainEncoder, path: Path) -> None:
    """Fill a network with the authors' weights; its own masks stay.

    Raises:
        InputError: Not a weights file, or not the weights of this network.
    """
    names = tuple(group.name for group in model.config.groups)
    found = from_official(read_state(path), names, path=path)
    own = model.state_dict()
    masks = ("vertex", "place", "weight")
    buffers = {
        name: tensor
        for name, tensor in own.items()
        if name.startswith("readouts.")
        and name.rpartition(".")[2] in masks
        and "linear" not in name
    }
    fill(model, found | buffers, lambda name: name, path=path)
