"""Attention in its circuits, and with other activations, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.full_width import FullWidthAttention
from heed_core.attention.normalised_activation import NormActAttend, ScoreActivation
from heed_core.testing.conformance import Inputs, Mechanism, permutation, unseen_masked
from heed_core.testing.oracle import naive_attention

_GROUPS, _HEADS, _SLOPE = 2, 4, 0.1


def _projected(layer: nn.Linear, tokens: Tensor, heads: int) -> Tensor:
    rows = (tokens[..., None, :] * layer.weight).sum(-1)
    return torch.stack(rows.chunk(heads, dim=-1), dim=1)


def _full_width(module: nn.Module, inputs: Inputs) -> Tensor:
    """Queries, keys and values of every token, as the formula of multi-head attention has them."""
    module = cast(FullWidthAttention, module)
    heads, context = module.heads, inputs["context"]
    mixed = naive_attention(
        _projected(module.query, inputs["x"], heads),
        _projected(module.key, context, heads),
        _projected(module.value, context, heads),
        mask=inputs["mask"],
    )
    joined = mixed.transpose(1, 2).flatten(2)
    return (joined[..., None, :] * module.out.weight).sum(-1)


def _normalised(f: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Inputs], Tensor]:
    def reference(module: nn.Module, inputs: Inputs) -> Tensor:
        query, key, value, mask = (inputs[name] for name in ("query", "key", "value", "mask"))
        batch, heads, n, dim = query.shape
        rows = []
        for b in range(batch):
            for h in range(heads):
                g = h * key.shape[1] // heads
                for i in range(n):
                    seen = [j for j in range(key.shape[2]) if mask[b, 0, 0, j]]
                    shares = [f((query[b, h, i] * key[b, g, j]).sum() / dim**0.5) for j in seen]
                    parts = [s * value[b, g, j] for s, j in zip(shares, seen, strict=True)]
                    rows.append(torch.stack(parts).sum(0) / torch.stack(shares).sum())
        return torch.stack(rows).reshape(batch, heads, n, value.shape[3])

    return reference


def _padded_context(batch: int, size: int) -> Inputs:
    lengths = size + 3 - torch.arange(batch) % 3
    return {
        "x": torch.randn(batch, size, 6),
        "context": torch.randn(batch, size + 3, 5),
        "mask": masks.padding(lengths, size + 3),
    }


def _padded_keys(batch: int, size: int) -> Inputs:
    lengths = size + 3 - torch.arange(batch) % 3
    return {
        "query": torch.randn(batch, _HEADS, size, 8),
        "key": torch.randn(batch, _GROUPS, size + 3, 8),
        "value": torch.randn(batch, _GROUPS, size + 3, 6),
        "mask": masks.padding(lengths, size + 3),
    }


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


def _normalised_mechanism(
    name: str, activation: ScoreActivation, f: Callable[[Tensor], Tensor]
) -> Mechanism:
    return Mechanism(
        name=f"normalised-activation-{name}",
        build=lambda dropout: NormActAttend(activation),
        inputs=_padded_keys,
        reference=_normalised(f),
        exponent=2.0,
        unseen=(unseen_masked(("key", "value"), "mask", axis=2),),
        symmetries=(permutation(("query",), axis=2, out_axis=2),),
        wrong=(
            (_spoilt("query", lambda x: x[0]), "query must be (batch, heads, tokens, channels)"),
            (_spoilt("key", lambda x: x[..., :-1]), "key must be (b, g, m, d)"),
            (_spoilt("value", lambda x: x[:, :, :-1]), "value must agree with key"),
            (_spoilt("mask", lambda x: x.float()), "mask must be boolean"),
        ),
        dynamic={"query": {2: "n"}, "key": {2: "m"}, "value": {2: "m"}, "mask": {3: "m"}},
        excused={
            "eval-deterministic": "the mechanism has no dropout",
            "observe": "it has no softmax; its own test checks what its probe states",
        },
    )


CIRCUIT_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="full-width",
        build=lambda dropout: FullWidthAttention(6, heads=3, head_dim=4, context_dim=5, out_dim=2),
        inputs=_padded_context,
        reference=_full_width,
        exponent=2.0,
        unseen=(unseen_masked(("context",), "mask", axis=1),),
        symmetries=(permutation(("x",), axis=1, out_axis=1),),
        wrong=(
            (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, tokens, 6)"),
            (_spoilt("context", lambda x: x[..., :-1]), "context must be"),
            (_spoilt("context", lambda x: x[:1]), "context must be"),
        ),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "mask": {3: "m"}},
        excused={"eval-deterministic": "the mechanism has no dropout"},
    ),
    _normalised_mechanism(
        "linear",
        ScoreActivation(name="linear", slope=_SLOPE),
        lambda score: 1 + _SLOPE * score,
    ),
    _normalised_mechanism(
        "square",
        ScoreActivation(name="square", slope=_SLOPE),
        lambda score: (1 + _SLOPE * score) * (1 + _SLOPE * score),
    ),
    _normalised_mechanism(
        "tanh",
        ScoreActivation(name="tanh"),
        lambda score: 2 / (1 + (-2 * score).exp()),
    ),
)
"""Full-width attention and normalised activations."""
