"""The efficient attentions of long sequences for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.bounded_memory import BoundedMemoryAttention
from heed_core.attention.causal_long_short import CausalLongShortAttention
from heed_core.attention.cosformer import CosformerAttention
from heed_core.attention.diagonal_state import DiagonalStateMixer
from heed_core.attention.local import LocalAttention
from heed_core.attention.long_short import LongShortAttention
from heed_core.attention.nystrom import NystromAttention
from heed_core.attention.performer import PerformerAttention
from heed_core.attention.prob_sparse import ProbSparseAttention
from heed_core.attention.randomized import RandomizedAttention
from heed_core.testing import long_sequence_formulas as formula
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Unseen,
    permutation,
    unseen_future,
    unseen_masked,
)

_HIDDEN = 2
"""Tokens at the end of some samples that are padding."""


def _without_key_bias(module: nn.Module) -> nn.Module:
    """A bias of keys shifts a row of scores by one number: its gradient is rounding alone."""
    layer = cast(nn.Module, module.key)
    width = cast(Tensor, layer.bias).shape[0]
    del layer.bias
    layer.register_buffer("bias", torch.linspace(-1.0, 1.0, width))
    return module


def _without_summary_bias(module: nn.Module) -> nn.Module:
    """A bias of summaries shifts a row of scores by one number, too."""
    layer = cast(nn.Module, module.summarise)
    width = cast(Tensor, layer.bias).shape[0]
    del layer.bias
    layer.register_buffer("bias", torch.linspace(-1.0, 1.0, width))
    return module


def _row(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, 12)}


def _tokens(batch: int, size: int) -> Inputs:
    lengths = size - _HIDDEN * (torch.arange(batch) % 2)
    return {
        "x": torch.randn(batch, size, 12),
        "padding_mask": masks.padding(lengths, size)[:, 0, 0],
    }


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
    (_spoilt("x", lambda x: x.long()), "x must be floating point"),
)
_WRONG_MASK = (
    (_spoilt("padding_mask", lambda x: x[:, 1:]), "padding_mask must be"),
    (_spoilt("padding_mask", lambda x: x.float()), "padding_mask must be boolean"),
)
_WRONG_CONTEXT = ((_spoilt("context", lambda x: x[..., :-1]), "context must be"),)
_PADDING = Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN])
_FUTURE = unseen_future("x", axis=1)
_OF_CONTEXT = unseen_masked(("context",), "padding_mask", axis=1)
_ASKING = permutation(("x",), axis=1, out_axis=1)
_CONTEXT = permutation(("context", "padding_mask"), axis=1, out_axis=None)
_TOKENS = permutation(("x", "padding_mask"), axis=1, out_axis=1)
_ORDERED = "causality orders the tokens"
_NO_DROPOUT = "the mechanism has no dropout: there are no weights to drop"
_NO_SOFTMAX = "the mechanism has no softmax; its site `probe` states effective weights"
_BY_PLACE = "landmarks are runs of tokens: any other order is another sequence"
_PLACED = "neighbours are near by place: any other order is another sequence"


LONG_SEQUENCE_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="local",
        build=lambda dropout: _without_key_bias(
            LocalAttention(12, heads=3, window=2, dropout=dropout)
        ),
        inputs=_tokens,
        reference=formula.local,
        size=7,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": _PLACED},
    ),
    Mechanism(
        name="local-causal",
        build=lambda dropout: _without_key_bias(
            LocalAttention(12, heads=3, window=4, causal=True, dropout=dropout)
        ),
        inputs=_row,
        reference=formula.local,
        size=7,
        exponent=1.0,
        unseen=(_FUTURE,),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="bounded-memory",
        build=lambda dropout: _without_key_bias(
            BoundedMemoryAttention(12, heads=3, slots=3, dropout=dropout)
        ),
        inputs=_tokens,
        reference=formula.bounded_memory,
        exponent=1.0,
        unseen=(_PADDING,),
        symmetries=(_TOKENS,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
    ),
    Mechanism(
        name="bounded-memory-causal",
        build=lambda dropout: _without_key_bias(
            BoundedMemoryAttention(12, heads=3, slots=3, causal=True, dropout=dropout)
        ),
        inputs=_row,
        reference=formula.bounded_memory,
        exponent=1.0,
        unseen=(_FUTURE,),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "observe": "its site mixes slots; values are sums that every token sees otherwise",
        },
    ),
    Mechanism(
        name="bounded-memory-cross",
        build=lambda dropout: _without_key_bias(
            BoundedMemoryAttention(12, heads=3, slots=3, context_dim=7, dropout=dropout)
        ),
        inputs=_with_context,
        reference=formula.bounded_memory,
        exponent=1.0,
        unseen=(_OF_CONTEXT,),
        symmetries=(_ASKING, _CONTEXT),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK, *_WRONG_CONTEXT),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
    ),
    Mechanism(
        name="performer",
        build=lambda dropout: PerformerAttention(12, heads=3, features=6),
        inputs=_tokens,
        reference=formula.performer,
        exponent=1.0,
        unseen=(_PADDING,),
        symmetries=(_TOKENS,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"eval-deterministic": _NO_DROPOUT, "observe": _NO_SOFTMAX},
    ),
    Mechanism(
        name="performer-causal",
        build=lambda dropout: PerformerAttention(12, heads=3, features=6, causal=True),
        inputs=_row,
        reference=formula.performer,
        exponent=1.0,
        unseen=(_FUTURE,),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="performer-cross",
        build=lambda dropout: PerformerAttention(12, heads=3, features=6, context_dim=7),
        inputs=_with_context,
        reference=formula.performer,
        exponent=1.0,
        unseen=(_OF_CONTEXT,),
        symmetries=(_ASKING, _CONTEXT),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK, *_WRONG_CONTEXT),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
        excused={"eval-deterministic": _NO_DROPOUT, "observe": _NO_SOFTMAX},
    ),
    Mechanism(
        name="cosformer",
        build=lambda dropout: CosformerAttention(12, heads=2),
        inputs=_tokens,
        reference=formula.cosformer,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={
            "symmetry": "weights fall with the distance in the sequence",
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="cosformer-cross",
        build=lambda dropout: CosformerAttention(12, heads=2, context_dim=7),
        inputs=_with_context,
        reference=formula.cosformer,
        exponent=1.0,
        unseen=(_OF_CONTEXT,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK, *_WRONG_CONTEXT),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
        excused={
            "symmetry": "weights fall with the distance of the places",
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="randomized",
        build=lambda dropout: RandomizedAttention(12, heads=3, landmarks=2, dropout=dropout),
        inputs=_tokens,
        reference=formula.randomized,
        size=7,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": _BY_PLACE},
    ),
    Mechanism(
        name="nystrom",
        build=lambda dropout: _without_key_bias(
            NystromAttention(12, heads=3, landmarks=2, conv_width=3, dropout=dropout)
        ),
        inputs=_tokens,
        reference=formula.nystrom,
        size=7,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": _BY_PLACE},
    ),
    Mechanism(
        name="prob-sparse",
        build=lambda dropout: _without_key_bias(
            ProbSparseAttention(12, heads=3, factor=1, dropout=dropout)
        ),
        inputs=_tokens,
        reference=formula.prob_sparse,
        size=8,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": "the keys that a query is measured by are drawn for its place"},
    ),
    Mechanism(
        name="long-short",
        build=lambda dropout: _without_summary_bias(
            LongShortAttention(12, heads=3, window=2, landmarks=2, dropout=dropout)
        ),
        inputs=_tokens,
        reference=formula.long_short,
        size=6,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": _PLACED},
    ),
    Mechanism(
        name="long-short-causal",
        build=lambda dropout: _without_summary_bias(
            CausalLongShortAttention(12, heads=3, window=3, chunk=2, rank=2, dropout=dropout)
        ),
        inputs=_row,
        reference=formula.causal_long_short,
        size=6,
        exponent=2.0,
        costly_sizes=(16384, 65536),
        unseen=(_FUTURE,),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="diagonal-state-causal",
        build=lambda dropout: DiagonalStateMixer(12, channels=2, state=4, dropout=dropout),
        inputs=_row,
        reference=formula.diagonal_state,
        exponent=1.0,
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "unseen": "transforms of the whole sequence mix rounding; causal within it, see tests",
            "symmetry": _ORDERED,
            "observe": "the mechanism has no map that heads share",
        },
    ),
    Mechanism(
        name="diagonal-state",
        build=lambda dropout: DiagonalStateMixer(
            12, channels=2, state=4, causal=False, dropout=dropout
        ),
        inputs=_tokens,
        reference=formula.diagonal_state,
        exponent=1.0,
        unseen=(_PADDING,),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={
            "symmetry": "a response forwards and another one backwards: no order is like another",
            "observe": "the mechanism has no map that heads share",
        },
    ),
)
"""The efficient attentions of long sequences in `heed_core.attention`."""
