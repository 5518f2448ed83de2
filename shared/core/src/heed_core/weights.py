"""Weights of other libraries under our names: a state dict in, a state dict out.

| from | to | function |
| --- | --- | --- |
| timm `Attention` (packed `qkv`, `proj`) | `MultiHeadAttention` | `attention_from_timm` |
| `torch.nn.MultiheadAttention` | `MultiHeadAttention` | `attention_from_torch` |
| `torch.nn.TransformerEncoderLayer` | `EncoderBlock` | `encoder_block_from_torch` |
| `torch.nn.TransformerDecoderLayer` | `DecoderBlock` | `decoder_block_from_torch` |
| `torch.nn.TransformerEncoder`, `TransformerDecoder` | `Encoder`, `Decoder` | `stack_from_torch` |

Every tensor is used, or the function raises: `load_state_dict` of the result, which is strict,
then tells what is missing. torch's layers have `activation="relu"`, `norm_first=False` unless said
otherwise, and one dropout for everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

State = Mapping[str, Tensor]
_PARTS = ("query", "key", "value")


def attention_from_timm(state: State) -> dict[str, Tensor]:
    """Rename the weights of timm's `Attention`: `qkv`, `proj` and, with q/k norm, the norms.

    Raises:
        ValueError: A name that timm's plain attention does not have.
    """
    names = {"proj": "out", "q_norm": "query_norm", "k_norm": "key_norm"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "qkv":
            result |= _unpacked(tensor, kind)
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of timm's Attention")
    return result


def attention_from_torch(state: State) -> dict[str, Tensor]:
    """Rename the weights of `torch.nn.MultiheadAttention`, with one width or with several.

    Raises:
        ValueError: A name that it does not have, or `bias_k`, `bias_v`, which we do not have.
    """
    names = {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
    names |= {f"{part[0]}_proj_weight": f"{part}.weight" for part in _PARTS}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("in_proj_weight", "in_proj_bias"):
            result |= _unpacked(tensor, name.removeprefix("in_proj_"))
        elif name in names:
            result[names[name]] = tensor
        else:
            raise ValueError(f"{name!r} has no counterpart in MultiHeadAttention")
    return result


def encoder_block_from_torch(state: State) -> dict[str, Tensor]:
    """Rename the weights of `torch.nn.TransformerEncoderLayer`."""
    return _block(
        state,
        attentions={"self_attn": "attention"},
        modules={
            "norm1": "attention_norm",
            "norm2": "feed_norm",
            "linear1": "feed.expand",
            "linear2": "feed.contract",
        },
    )


def decoder_block_from_torch(state: State) -> dict[str, Tensor]:
    """Rename the weights of `torch.nn.TransformerDecoderLayer`."""
    return _block(
        state,
        attentions={"self_attn": "attention", "multihead_attn": "context_attention"},
        modules={
            "norm1": "attention_norm",
            "norm2": "context_norm",
            "norm3": "feed_norm",
            "linear1": "feed.expand",
            "linear2": "feed.contract",
        },
    )


def stack_from_torch(state: State, *, kind: Literal["encoder", "decoder"]) -> dict[str, Tensor]:
    """Rename the weights of `torch.nn.TransformerEncoder` or `TransformerDecoder`."""
    convert: dict[str, Callable[[State], dict[str, Tensor]]] = {
        "encoder": encoder_block_from_torch,
        "decoder": decoder_block_from_torch,
    }
    if kind not in convert:
        raise ValueError(f"kind must be 'encoder' or 'decoder', got {kind!r}")
    layers: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = name.split(".", 2)
        if parts[0] == "layers" and len(parts) == 3:
            layers.setdefault(parts[1], {})[parts[2]] = tensor
        elif parts[0] == "norm":
            result[name] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of a stack of torch's transformer layers")
    for index, layer in layers.items():
        result |= {f"layers.{index}.{name}": t for name, t in convert[kind](layer).items()}
    return result


def _unpacked(tensor: Tensor, kind: str) -> dict[str, Tensor]:
    if tensor.shape[0] % 3:
        raise ValueError(f"packed {kind} must have 3 x rows, got {tuple(tensor.shape)}")
    return {f"{part}.{kind}": t for part, t in zip(_PARTS, tensor.chunk(3), strict=True)}


def _block(
    state: State, *, attentions: Mapping[str, str], modules: Mapping[str, str]
) -> dict[str, Tensor]:
    packed: dict[str, dict[str, Tensor]] = {ours: {} for ours in attentions.values()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module in attentions:
            packed[attentions[module]][rest] = tensor
        elif module in modules:
            result[f"{modules[module]}.{rest}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of torch's transformer layers")
    for ours, weights in packed.items():
        result |= {f"{ours}.{name}": t for name, t in attention_from_torch(weights).items()}
    return result
