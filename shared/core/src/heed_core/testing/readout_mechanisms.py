"""Read-outs by learned queries for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.query_readout import CrossAttentionReadout
from heed_core.testing.conformance import Inputs, Mechanism, permutation, unseen_masked
from heed_core.testing.oracle import naive_attention
from heed_core.testing.vision_formulas import layer_norm, linear

QUERIES, DIM, HEADS = 4, 12, 2


def _readout(module: nn.Module, inputs: Inputs) -> Tensor:
    """The formula, with the attention in loops."""
    module = cast(CrossAttentionReadout, module)
    tokens = inputs["tokens"]
    start = inputs.get("start", torch.zeros_like(module.codes)).expand(len(tokens), -1, -1)
    placed = tokens + inputs.get("positions", torch.zeros_like(tokens))
    query = layer_norm(module.query_norm, start) + module.codes

    def heads(layer: nn.Module, x: Tensor) -> Tensor:
        rows = linear(layer, x)
        return rows.view(*rows.shape[:2], HEADS, -1).transpose(1, 2)

    attention, padding = module.attention, inputs.get("padding_mask")
    mixed = naive_attention(
        heads(attention.query, query),
        heads(attention.key, placed),
        heads(attention.value, placed if module.value_pos else tokens),
        mask=None if padding is None else padding[:, None, None],
    )
    state = start + linear(attention.out, mixed.transpose(1, 2).flatten(2))
    hidden = linear(module.feed.expand, layer_norm(module.feed_norm, state)).clamp(min=0)
    return layer_norm(module.final_norm, state + linear(module.feed.contract, hidden))


def _build(value_pos: bool) -> Callable[[float], nn.Module]:
    def build(dropout: float) -> nn.Module:
        module = CrossAttentionReadout(
            QUERIES, DIM, heads=HEADS, ffn=8, value_pos=value_pos, dropout=dropout
        )
        # It adds one number to a row of scores, which a softmax does not see: no gradient.
        del module.attention.key.bias
        module.attention.key.register_buffer("bias", torch.linspace(-1.0, 1.0, DIM))
        return module

    return build


def _padded(batch: int, size: int) -> Inputs:
    lengths = size - torch.arange(batch) % 3
    return {
        "tokens": torch.randn(batch, size, DIM),
        "positions": torch.randn(size, DIM),
        "padding_mask": masks.padding(lengths, size)[:, 0, 0],
        "start": torch.randn(QUERIES, DIM),
    }


def _plain(batch: int, size: int) -> Inputs:
    return {
        "tokens": torch.randn(batch, size, DIM),
        "positions": torch.randn(batch, size, DIM),
        "start": torch.randn(QUERIES, DIM),
    }


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


_WRONG = (
    (_spoilt("tokens", lambda x: x[..., :-1]), "tokens must be (batch, tokens, 12)"),
    (_spoilt("positions", lambda x: x[..., 1:, :]), "positions must be (tokens, channels)"),
    (_spoilt("start", lambda x: x[1:]), "start must be (queries, channels)"),
)

READOUT_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="query-readout",
        build=_build(value_pos=False),
        inputs=_padded,
        reference=_readout,
        size=6,
        exponent=1.0,
        unseen=(unseen_masked(("tokens",), "padding_mask", axis=1),),
        wrong=(*_WRONG, (_spoilt("padding_mask", lambda x: x.float()), "must be boolean")),
        dynamic={"tokens": {1: "n"}, "positions": {0: "n"}, "padding_mask": {1: "n"}, "start": {}},
        excused={"symmetry": "codes and mask are ordered here; see query-readout-placed-values"},
    ),
    Mechanism(
        name="query-readout-placed-values",
        build=_build(value_pos=True),
        inputs=_plain,
        reference=_readout,
        size=6,
        exponent=1.0,
        symmetries=(permutation(("tokens", "positions"), axis=1, out_axis=None),),
        wrong=_WRONG,
        dynamic={"tokens": {1: "n"}, "positions": {1: "n"}, "start": {}},
        excused={"unseen": "no mask is given here; see query-readout"},
    ),
)
"""Queries that read a token map."""
