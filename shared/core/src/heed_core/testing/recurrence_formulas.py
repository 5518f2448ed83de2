"""The recurrent attentions by their formulas, token by token, for the conformance suite."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from heed_core.attention.delta_rule import DeltaRuleAttention
from heed_core.attention.linear import LinearAttention
from heed_core.testing.conformance import Inputs
from heed_core.testing.vision_formulas import linear


def heads_of(layer: nn.Module, tokens: Tensor, head_dim: int) -> Tensor:
    """(b, n, c) -> (b, h, n, d)."""
    rows = linear(layer, tokens)
    batch, length, width = rows.shape
    return rows.reshape(batch, length, width // head_dim, head_dim).transpose(1, 2)


def joined(heads: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, n, h d)."""
    return heads.transpose(1, 2).flatten(2)


def _elu_features(heads: Tensor) -> Tensor:
    return torch.where(heads > 0, heads + 1.0, heads.clamp(max=0.0).exp())


def linear_cross(module: nn.Module, inputs: Inputs) -> Tensor:
    """Pairs of tokens in loops; the weights are similarities over their sum."""
    module = cast(LinearAttention, module)
    x, real = inputs["x"], inputs["padding_mask"]
    context = inputs.get("context", x)
    query = _elu_features(heads_of(module.query, x, module.head_dim))
    key = _elu_features(heads_of(module.key, context, module.head_dim))
    value = heads_of(module.value, context, module.head_dim)
    rows = []
    for b in range(len(x)):
        seen = [j for j in range(context.shape[1]) if real[b, j]]
        for h in range(module.heads):
            for i in range(x.shape[1]):
                shares = torch.stack([(query[b, h, i] * key[b, h, j]).sum() for j in seen])
                parts = [s * value[b, h, j] for s, j in zip(shares, seen, strict=True)]
                rows.append(torch.stack(parts).sum(0) / shares.sum())
    mixed = torch.stack(rows).reshape(len(x), module.heads, x.shape[1], module.head_dim)
    return linear(module.out, joined(mixed))


def linear_decaying(module: nn.Module, inputs: Inputs) -> Tensor:
    """The recurrence, token by token; padding writes nothing and lets nothing fade."""
    module = cast(LinearAttention, module)
    x, width = inputs["x"], module.head_dim
    query, key = heads_of(module.query, x, width), heads_of(module.key, x, width)
    if module.features == "elu":
        query, key = _elu_features(query), _elu_features(key)
    value = heads_of(module.value, x, width)
    if module.gate is None:
        kept = torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(module.heads)])
        gate = kept.to(x.dtype).exp()[:, None, None].expand(key.shape)  # the module's, in float32
    else:
        gate = heads_of(module.gate, x, width).sigmoid() ** (1 / 16)
    if (real := inputs.get("padding_mask")) is not None:
        key = key.masked_fill(~real[:, None, :, None], 0.0)
        gate = gate.masked_fill(~real[:, None, :, None], 1.0)
    state, total = (
        torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None]),
        0.0 * key[:, :, 0],
    )
    rows = []
    for t in range(x.shape[1]):
        state = gate[:, :, t, :, None] * state + key[:, :, t, :, None] * value[:, :, t, None]
        total = gate[:, :, t] * total + key[:, :, t]
        read = (query[:, :, t, :, None] * state).sum(2) / width**0.5
        share = (query[:, :, t] * total).sum(-1, keepdim=True) / width**0.5
        rows.append(read / (share + 1e-10) if module.normalise else read)
    return linear(module.out, joined(torch.stack(rows, dim=2)))


def delta_gated(module: nn.Module, inputs: Inputs) -> Tensor:
    """The recurrence, token by token."""
    module = cast(DeltaRuleAttention, module)
    x, width, real = inputs["x"], module.head_dim, inputs.get("padding_mask")
    if real is not None:
        x = x.masked_fill(~real[..., None], 0.0)
    asked = [heads_of(layer, x, width) for layer in (module.query, module.key)]
    squares = [rows.square().sum(-1, keepdim=True) for rows in asked]
    query, key = (
        rows / (square + (square == 0)).sqrt() for rows, square in zip(asked, squares, strict=True)
    )
    value = heads_of(module.value, x, module.value_dim)
    beta = heads_of(module.beta, x, 1).sigmoid()[..., None]
    gate = heads_of(cast(nn.Module, module.gate), x, 1)[..., None]
    rate = cast(Tensor, module.log_rate).exp()[:, None, None, None]
    decay = (-rate * (1 + gate.exp()).log()).exp()
    if real is not None:
        beta = beta.masked_fill(~real[:, None, :, None, None], 0.0)
        decay = decay.masked_fill(~real[:, None, :, None, None], 1.0)
    state = torch.zeros_like(key[:, :, 0, :, None] * value[:, :, 0, None])
    rows = []
    for t in range(x.shape[1]):
        now = key[:, :, t, :, None]
        state = decay[:, :, t] * state
        guess = (now * state).sum(2, keepdim=True)
        state = state + beta[:, :, t] * now * (value[:, :, t, None] - guess)
        rows.append((query[:, :, t, :, None] * state).sum(2) / width**0.5)
    return linear(module.out, joined(torch.stack(rows, dim=2)))
