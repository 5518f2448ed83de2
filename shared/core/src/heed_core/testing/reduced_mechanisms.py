"""Reduced, conditional and class attention for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.class_attention import ClassAttentionBlock
from heed_core.attention.conditional import ConditionalCrossAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Symmetry,
    permutation,
    unseen_masked,
)
from heed_core.testing.oracle import naive_attention
from heed_core.testing.vision_formulas import layer_norm, linear


def _triangular(module: nn.Module) -> Tensor:
    """The packed numbers, row by row, as a lower triangular matrix."""
    packed, dim = cast(Tensor, module.packed), cast(int, module.dim)
    rows, begin = [], 0
    for i in range(dim):
        rows.append(torch.cat([packed[begin : begin + i + 1], packed.new_zeros(dim - i - 1)]))
        begin += i + 1
    return torch.stack(rows)


def _heads(x: Tensor, heads: int) -> Tensor:
    return torch.stack(x.chunk(heads, dim=-1), dim=1)


def _reduced(module: nn.Module, inputs: Inputs) -> Tensor:
    module, x = cast(ReducedAttention, module), inputs["x"]
    if module.qk == "cholesky":
        lower = _triangular(cast(nn.Module, module.query))
        query = key = (x[..., None] * lower).sum(-2)
    else:
        query = linear(cast(nn.Module, module.query), x)
        key = query if module.qk == "symmetric" else x
    value = x if module.value is None else linear(module.value, x)
    cut = [_heads(t, module.heads) for t in (query, key, value)]
    mixed = naive_attention(*cut, mask=inputs.get("mask"), causal=module.causal)
    mixed = mixed.transpose(1, 2).flatten(2)
    return mixed if module.out is None else linear(module.out, mixed)


def _conditional(module: nn.Module, inputs: Inputs) -> Tensor:
    module, x = cast(ConditionalCrossAttention, module), inputs["x"]
    embedding = module.condition
    assert embedding.mask is not None
    code = torch.stack([torch.clamp(embedding.mask[int(c)], min=0) for c in inputs["condition"]])
    query = linear(module.query, linear(embedding.linear, code))[:, None]
    key, value = linear(module.key, x), linear(module.value, x)
    cut = [_heads(t, module.heads) for t in (query, key, value)]
    mixed = naive_attention(*cut, mask=inputs["padding_mask"][:, None, None])
    return linear(module.out, mixed.transpose(1, 2).flatten(2))


def _class_block(module: nn.Module, inputs: Inputs) -> Tensor:
    module, x = cast(ClassAttentionBlock, module), inputs["x"]
    assert module.scales is not None
    tokens, layers = layer_norm(module.norm, x), module.attention
    rows = (linear(layers.query, tokens[:, :1]), linear(layers.key, tokens))
    cut = [_heads(t, 2) for t in (*rows, linear(layers.value, tokens))]
    mixed = naive_attention(*cut, mask=inputs["padding_mask"][:, None, None])
    seen = linear(layers.out, mixed.transpose(1, 2).flatten(2))
    first = x[:, :1] + module.scales[0] * seen
    hidden = linear(module.ffn.expand, layer_norm(module.ffn_norm, first))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden * 0.5**0.5))
    first = first + module.scales[1] * linear(module.ffn.contract, hidden)
    return torch.cat([first, x[:, 1:]], dim=1)


def _class_tokens(batch: int, size: int) -> Inputs:
    real = torch.arange(size) < size - 1 - torch.arange(batch)[:, None] % 2
    return {**_tokens(batch, size), "padding_mask": real}


def _others_reversed(inputs: Inputs) -> Inputs:
    return {
        name: torch.cat([x[:, :1], x[:, 1:].flip(1)], dim=1) if x.dim() > 1 else x
        for name, x in inputs.items()
    }


def _tokens(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, 8)}


def _masked(batch: int, size: int) -> Inputs:
    real = torch.arange(size) < size - 1 - torch.arange(batch)[:, None] % 2
    return {**_tokens(batch, size), "mask": real[:, None, None]}


def _asked(batch: int, size: int) -> Inputs:
    real = torch.arange(size) < size - 1 - torch.arange(batch)[:, None] % 2
    condition = torch.arange(batch) % 2 + 1
    return {**_tokens(batch, size), "condition": condition, "padding_mask": real}


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


def _first_rows(output: Tensor) -> Tensor:
    """Those of tokens that are never hidden: a hidden token's own row depends on it."""
    return output[:, :2]


def _class_row(output: Tensor) -> Tensor:
    """The other rows are the input's."""
    return output[:, :1]


_WRONG = (
    (_spoilt("x", lambda x: x[0]), "x must be (batch, tokens, 8)"),
    (_spoilt("x", lambda x: x[..., 1:]), "x must be (batch, tokens, 8)"),
)

REDUCED_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="reduced-minimum",
        build=lambda dropout: ReducedAttention(
            8, qk="collapsed", vo="none", bias=True, dropout=dropout
        ),
        inputs=_tokens,
        reference=_reduced,
        exponent=2.0,
        symmetries=(permutation(("x",), axis=1, out_axis=1),),
        wrong=_WRONG,
        dynamic={"x": {1: "n"}},
        excused={"unseen": "this variant is built without a mask; reduced-symmetric has one"},
    ),
    Mechanism(
        name="reduced-symmetric",
        build=lambda dropout: ReducedAttention(8, heads=2, qk="symmetric", dropout=dropout),
        inputs=_masked,
        reference=_reduced,
        exponent=2.0,
        unseen=(replace(unseen_masked(("x",), "mask", axis=1), select=_first_rows),),
        wrong=_WRONG,
        dynamic={"x": {1: "n"}, "mask": {3: "n"}},
        excused={"symmetry": "the mask tells places apart; reduced-minimum is permuted"},
    ),
    Mechanism(
        name="reduced-cholesky",
        build=lambda dropout: ReducedAttention(8, qk="cholesky", dropout=dropout),
        inputs=_tokens,
        reference=_reduced,
        exponent=2.0,
        symmetries=(permutation(("x",), axis=1, out_axis=1),),
        wrong=_WRONG,
        dynamic={"x": {1: "n"}},
        excused={"unseen": "this variant is built without a mask; reduced-symmetric has one"},
    ),
    Mechanism(
        name="conditional-cross",
        build=lambda dropout: ConditionalCrossAttention(
            8, heads=2, conditions=3, code="mask", dropout=dropout
        ),
        inputs=_asked,
        reference=_conditional,
        exponent=1.0,
        unseen=(unseen_masked(("x",), "padding_mask", axis=1),),
        symmetries=(permutation(("x", "padding_mask"), axis=1, out_axis=None),),
        wrong=(
            *_WRONG,
            (_spoilt("condition", lambda c: c + 1), "condition must be within 0..2, got 2..3"),
            (_spoilt("condition", lambda c: c.float()), "condition must hold int64 numbers"),
            (_spoilt("condition", lambda c: c[:1]), "condition must be (batch 2,)"),
            (_spoilt("padding_mask", lambda m: m[:, 1:]), "padding_mask must be"),
        ),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
    ),
    Mechanism(
        name="class-block",
        build=lambda dropout: ClassAttentionBlock(
            8, heads=2, hidden=12, layer_scale=0.5, norm_eps=1e-5, dropout=dropout
        ),
        inputs=_class_tokens,
        reference=_class_block,
        smallest=3,
        exponent=1.0,
        unseen=(replace(unseen_masked(("x",), "padding_mask", axis=1), select=_class_row),),
        symmetries=(
            Symmetry(
                name="order of the others",
                on_inputs=_others_reversed,
                on_output=lambda y: torch.cat([y[:, :1], y[:, 1:].flip(1)], dim=1),
            ),
        ),
        wrong=(
            *_WRONG,
            (_spoilt("padding_mask", lambda m: m[:, 1:]), "padding_mask must be"),
            (_spoilt("padding_mask", lambda m: m.float()), "padding_mask must be boolean"),
        ),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
    ),
)
"""Reduced, conditional and class attention."""
