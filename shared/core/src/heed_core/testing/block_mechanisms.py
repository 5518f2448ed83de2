"""Multi-head, position and channel attention for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.channel import ChannelGramAttention
from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.position import PositionAttention
from heed_core.relative import RelativeBias, RotaryPositions
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Symmetry,
    Unseen,
    flip,
    permutation,
    shift,
    unseen_future,
    unseen_masked,
)
from heed_core.testing.oracle import naive_attention

_HIDDEN = 2
"""Tokens at the end of some samples that are padding."""


def _project(layer: nn.Module, tokens: Tensor, head_dim: int) -> Tensor:
    """(b, n, c) -> (b, h, n, d), by the formula."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    rows = (tokens[..., None, :] * weight).sum(-1) + bias
    batch, length, width = rows.shape
    return rows.reshape(batch, length, width // head_dim, head_dim).transpose(1, 2)


def _fixed_shift(module: nn.Module, layer: str = "key") -> nn.Module:
    """Take the bias of the keys' last layer out of the parameters.

    It adds one number to a row of scores, which a softmax does not see: its gradient is zero, and
    what is computed for it is rounding alone.
    """
    owner = module.get_submodule(layer)
    width = cast(Tensor, owner.bias).shape[0]
    del owner.bias
    owner.register_buffer("bias", torch.linspace(-1.0, 1.0, width))
    return module


def _layer_norm(layer: nn.Module, heads: Tensor) -> Tensor:
    if isinstance(layer, nn.Identity):
        return heads
    centred = heads - heads.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * cast(Tensor, layer.weight) + cast(Tensor, layer.bias)


def _turned(heads: Tensor) -> Tensor:
    """Rotary code of all channels, pairs (i, i + d / 2)."""
    half = heads.shape[-1] // 2
    place = torch.arange(heads.shape[-2], dtype=torch.float64)[:, None]
    angle = place * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _multi_head(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(MultiHeadAttention, module)
    x = inputs["x"]
    context = inputs.get("context", x)
    query = _layer_norm(module.query_norm, _project(module.query, x, module.head_dim))
    key = _layer_norm(module.key_norm, _project(module.key, context, module.head_dim))
    value = _project(module.value, context, module.head_dim)
    if module.rotary is not None:
        query, key = _turned(query), _turned(key)
    padding = inputs.get("padding_mask")
    mask = None if padding is None else padding[:, None, None]
    bias = None
    if isinstance(module.relative_bias, RelativeBias):
        most = module.relative_bias.max_distance
        table = module.relative_bias.table
        n = x.shape[1]
        rows = [[min(max(j - i, -most), 0) + most for j in range(n)] for i in range(n)]
        bias = table[torch.tensor(rows)].permute(2, 0, 1)
    mixed = naive_attention(query, key, value, mask=mask, bias=bias, causal=module.causal)
    joined = mixed.transpose(1, 2).flatten(2)
    return (joined[..., None, :] * module.out.weight).sum(-1) + module.out.bias


def _tokens(batch: int, size: int) -> Inputs:
    lengths = size - _HIDDEN * (torch.arange(batch) % 2)
    return {
        "x": torch.randn(batch, size, 12),
        "padding_mask": masks.padding(lengths, size)[:, 0, 0],
    }


def _row(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, 12)}


def _with_context(batch: int, size: int) -> Inputs:
    lengths = size + 3 - torch.arange(batch) % 3
    return {
        "x": torch.randn(batch, size, 12),
        "context": torch.randn(batch, size + 3, 7),
        "padding_mask": masks.padding(lengths, size + 3)[:, 0, 0],
    }


def _loud_padding(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["padding_mask"][..., None], 1e4)}


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


_WRONG_TOKENS = (
    (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, tokens, 12)"),
    (_spoilt("x", lambda x: x[0]), "x must be (batch, tokens, 12)"),
)
_WRONG_MASK = (
    (_spoilt("padding_mask", lambda x: x[:, 1:]), "padding_mask must be"),
    (_spoilt("padding_mask", lambda x: x.float()), "padding_mask must be boolean"),
)


def _position(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(PositionAttention, module)
    x = inputs["x"]
    tokens = x.flatten(2).transpose(1, 2)
    query = _project(module.query, tokens, module.query.out_features)
    key = _project(module.key, tokens, module.key.out_features)
    value = _project(module.value, tokens, module.dim)
    mixed = naive_attention(query, key, value, scale=1.0)
    return module.gamma * mixed[:, 0].transpose(1, 2).reshape(x.shape) + x


def _channel(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(ChannelGramAttention, module)
    x = inputs["x"]
    rows = x.flatten(2)
    energy = (rows[:, :, None] * rows[:, None]).sum(-1)
    weights = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
    mixed = (weights[..., None] * rows[:, None]).sum(2)
    return module.gamma * mixed.reshape(x.shape) + x


def _feature_map(batch: int, size: int) -> Inputs:
    return {"x": 0.3 * torch.randn(batch, 16, size, size + 2)}


def _permuted_places(x: Tensor) -> Tensor:
    order = torch.arange(x[0, 0].numel() - 1, -1, -1).roll(3)
    return x.flatten(2)[:, :, order].reshape(x.shape)


_PLACES = Symmetry(
    name="permutation of places",
    on_inputs=lambda inputs: {"x": _permuted_places(inputs["x"])},
    on_output=_permuted_places,
)
_GRID = (_PLACES, flip(("x",), 2), flip(("x",), 3), shift(("x",), 2), shift(("x",), 3))
_NO_DROPOUT = "the mechanism has no dropout"
_NO_MASK = "every place attends to every place: there is no mask"

BLOCK_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="multi-head-self",
        build=lambda dropout: _fixed_shift(MultiHeadAttention(12, heads=3, dropout=dropout)),
        inputs=_tokens,
        reference=_multi_head,
        exponent=2.0,
        unseen=(
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        symmetries=(permutation(("x", "padding_mask"), axis=1, out_axis=1),),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
    ),
    Mechanism(
        name="multi-head-cross-grouped",
        build=lambda dropout: _fixed_shift(
            MultiHeadAttention(
                12, heads=4, kv_heads=2, context_dim=7, qk_norm="layer", dropout=dropout
            ),
            "key_norm",
        ),
        inputs=_with_context,
        reference=_multi_head,
        size=9,
        exponent=2.0,
        unseen=(unseen_masked(("context",), "padding_mask", axis=1),),
        symmetries=(
            permutation(("x",), axis=1, out_axis=1),
            permutation(("context", "padding_mask"), axis=1, out_axis=None),
        ),
        wrong=(
            *_WRONG_TOKENS,
            *_WRONG_MASK,
            (_spoilt("context", lambda x: x[..., :-1]), "context must be"),
            (_spoilt("context", lambda x: x[:1]), "context must be"),
        ),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
    ),
    Mechanism(
        name="multi-head-causal-rotary",
        build=lambda dropout: MultiHeadAttention(
            12, heads=3, kv_heads=1, causal=True, rotary=RotaryPositions(4), dropout=dropout
        ),
        inputs=_row,
        reference=_multi_head,
        exponent=2.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": "causality and positions order the tokens"},
    ),
    Mechanism(
        name="multi-head-causal-relative-bias",
        build=lambda dropout: _fixed_shift(
            MultiHeadAttention(
                12,
                heads=3,
                causal=True,
                relative_bias=RelativeBias(3, kind="clipped", max_distance=4, bidirectional=False),
                dropout=dropout,
            )
        ),
        inputs=_row,
        reference=_multi_head,
        exponent=2.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": "causality and positions order the tokens"},
    ),
    Mechanism(
        name="position",
        build=lambda dropout: _fixed_shift(PositionAttention(16)),
        inputs=_feature_map,
        reference=_position,
        size=3,
        tokens=lambda size: size * (size + 2),
        exponent=2.0,
        costly_sizes=(64, 128),
        symmetries=_GRID,
        wrong=(
            (_spoilt("x", lambda x: x[:, :-1]), "x must be (batch, 16, *spatial)"),
            (_spoilt("x", lambda x: x[0, :, 0]), "x must be (batch, 16, *spatial)"),
        ),
        dynamic={"x": {2: "h", 3: "w"}},
        excused={"unseen": _NO_MASK, "eval-deterministic": _NO_DROPOUT},
    ),
    Mechanism(
        name="channel-gram",
        build=lambda dropout: ChannelGramAttention(),
        inputs=_feature_map,
        reference=_channel,
        size=3,
        tokens=lambda size: size * (size + 2),
        exponent=1.0,
        costly_sizes=(64, 128),
        symmetries=(*_GRID, permutation(("x",), axis=1, out_axis=1)),
        wrong=((_spoilt("x", lambda x: x[0, 0]), "x must be (batch, channels, *spatial)"),),
        dynamic={"x": {2: "h", 3: "w"}},
        excused={"unseen": _NO_MASK, "eval-deterministic": _NO_DROPOUT},
    ),
)
"""The mechanisms of `heed_core.attention`."""
