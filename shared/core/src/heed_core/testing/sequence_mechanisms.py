"""The attentions of sequences for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.complex import ComplexAttention
from heed_core.attention.delta_rule import DeltaRuleAttention
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.mixture_of_heads import MixtureOfHeads
from heed_core.attention.relative_conv import DepthwiseConv, RelativeConvAttention
from heed_core.attention.tensor import TensorAttention
from heed_core.testing import recurrence_formulas as formula
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Sizes,
    Unseen,
    permutation,
    unseen_future,
    unseen_masked,
)
from heed_core.testing.oracle import naive_attention
from heed_core.testing.vision_formulas import linear

_HIDDEN = 2
"""Tokens at the end of some samples that are padding."""


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


class _OutputOfMixture(nn.Module):
    """A mixture of heads, its output alone."""

    def __init__(self, mixture: MixtureOfHeads) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(
        self, x: Tensor, context: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.mixture(x, context, padding_mask=padding_mask).output
        return output


def gates_of(module: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
    """Of a module with three learned routers, (b, n, h), token by token."""
    mixture = cast(MixtureOfHeads, module)
    shared, active = mixture.shared, mixture.active
    shares = linear(cast(nn.Module, mixture.share), x).softmax(-1)
    kinds = linear(cast(nn.Module, mixture.kind), x).softmax(-1)
    likely = linear(cast(nn.Module, mixture.route), x).softmax(-1)
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            values = likely[b, t].tolist()
            best = sorted(range(len(values)), key=lambda e: -values[e])[:active]
            if real is not None and not bool(real[b, t]):
                best = []
            total = torch.stack([likely[b, t, e] for e in best]).sum() if best else None
            row = [2 * kinds[b, t, 0] * shared * shares[b, t, s] for s in range(shared)]
            for e in range(len(values)):
                given = total is not None and e in best
                part = likely[b, t, e] / cast(Tensor, total) if given else 0 * likely[b, t, e]
                row.append(2 * kinds[b, t, 1] * active * part)
            rows.append(torch.stack(row))
    return torch.stack(rows).reshape(*x.shape[:2], mixture.heads)


def _mixture(module: nn.Module, inputs: Inputs) -> Tensor:
    mixture = cast(_OutputOfMixture, module).mixture
    x, real = inputs["x"], inputs.get("padding_mask")
    context = inputs.get("context", x)
    query = formula.heads_of(mixture.query, x, mixture.head_dim)
    key = formula.heads_of(mixture.key, context, mixture.head_dim)
    value = formula.heads_of(mixture.value, context, mixture.head_dim)
    mask = None if real is None else real[:, None, None]
    mixed = naive_attention(query, key, value, mask=mask, causal=mixture.causal)
    own = real if "context" not in inputs else None
    gates = gates_of(mixture, x, own).transpose(1, 2)[..., None]
    return linear(mixture.out, formula.joined(gates * mixed))


def built_mixture(
    dropout: float,
    *,
    causal: bool,
    kv_heads: int,
    context_dim: int | None = None,
    capacity: float | None = None,
) -> nn.Module:
    """A mixture whose gradients are all larger than rounding."""
    mixture = MixtureOfHeads(
        12,
        heads=6,
        shared=2,
        active=2,
        head_dim=4,
        kv_heads=kv_heads,
        context_dim=context_dim,
        causal=causal,
        dropout=dropout,
        capacity=capacity,
    )
    width = mixture.key.out_features
    # A bias of keys shifts a row of scores by one number: its gradient is rounding alone.
    del mixture.key.bias
    mixture.key.register_buffer("bias", torch.linspace(-1.0, 1.0, width))
    return _OutputOfMixture(mixture)


def _complex(module: nn.Module, inputs: Inputs) -> Tensor:
    """Cosines of phase differences, pair by pair of tokens."""
    module = cast(ComplexAttention, module)
    x = inputs["x"]
    source, real = inputs.get("context", x), inputs.get("padding_mask")
    query = formula.heads_of(module.query, x, module.head_dim)
    key = formula.heads_of(module.key, source, module.head_dim)
    value = formula.heads_of(module.value, source, module.head_dim)
    pairs = module.head_dim // 2
    frequency = 10000.0 ** (-2.0 * torch.arange(pairs) / module.head_dim).to(x.dtype)
    lengths = [(t[..., :pairs] ** 2 + t[..., pairs:] ** 2 + 1e-9).sqrt() for t in (query, key)]
    phases = [torch.atan2(t[..., pairs:], t[..., :pairs]) for t in (query, key)]
    n, m = x.shape[1], source.shape[1]
    columns = []
    for j in range(m):
        turn = phases[0] - phases[1][:, :, j : j + 1]
        theta = module.delta[:, None] * turn + module.phase_bias[:, None]
        if module.rotary is not None:
            theta = theta + (torch.arange(n) - j)[:, None] * frequency
        columns.append((lengths[0] * lengths[1][:, :, j : j + 1] * theta.cos()).sum(-1))
    scores = torch.stack(columns, dim=-1)
    nothing = torch.zeros_like(query)
    mixed = naive_attention(
        nothing,
        torch.zeros_like(key),
        value,
        bias=scores,
        mask=None if real is None else real[:, None, None],
        causal=module.causal,
    )
    return linear(module.out, formula.joined(mixed))


def _convolved(conv: DepthwiseConv, heads: Tensor) -> Tensor:
    """Token by token, zeros outside."""
    length, width = heads.shape[2], conv.weight.shape[1]
    shift = width - 1 if conv.causal else width // 2
    rows = []
    for t in range(length):
        row = conv.bias.expand(heads[:, :, 0].shape)
        for tap in range(width):
            if 0 <= t + tap - shift < length:
                row = row + conv.weight[:, tap] * heads[:, :, t + tap - shift]
        rows.append(row)
    return torch.stack(rows, dim=2)


def _relative_conv(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(RelativeConvAttention, module)
    x, real = inputs["x"], inputs.get("padding_mask")
    memory = inputs.get("memory", x[:, :0])
    source = torch.cat([memory, x], dim=1)
    rows = []
    for layer, conv in (
        (module.query, module.query_conv),
        (module.key, module.key_conv),
        (module.value, module.value_conv),
    ):
        heads = formula.heads_of(layer, source, module.head_dim)
        if real is not None:
            heads = heads * real[:, None, :, None]
        rows.append(_convolved(conv, heads))
    past, n, m = memory.shape[1], x.shape[1], source.shape[1]
    query = rows[0][:, :, past:]
    terms = []
    for i in range(n):
        for j in range(m):
            row = module.max_distance + j - past - i
            product = (query[:, :, i] * module.offset_embedding[row]).sum(-1)
            terms.append(product + module.offset_bias[row])
    bias = torch.stack(terms, dim=-1).reshape(*query.shape[:3], m) / module.head_dim**0.5
    mixed = naive_attention(
        query + module.query_bias[:, None],
        rows[1],
        rows[2],
        bias=bias,
        mask=None if real is None else real[:, None, None],
        causal=module.causal,
    )
    return linear(module.out, formula.joined(mixed))


def _built_relative_conv(dropout: float, *, causal: bool) -> nn.Module:
    module = RelativeConvAttention(12, heads=3, max_distance=4100, causal=causal, dropout=dropout)
    # A bias of keys shifts a row of scores by one number: its gradient is rounding alone.
    del module.key_conv.bias
    module.key_conv.register_buffer("bias", torch.linspace(-1.0, 1.0, 4))
    return module


def _segment(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, 12), "memory": torch.randn(batch, size + 1, 12)}


def _rms(layer: nn.Module, heads: Tensor) -> Tensor:
    spread = (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return heads / spread * cast(Tensor, layer.weight)


def _dynamic_mask(module: nn.Module, inputs: Inputs) -> Tensor:
    module = cast(DynamicMaskAttention, module)
    x = inputs["x"]
    source, real = inputs.get("context", x), inputs.get("padding_mask")
    query = _rms(module.query_norm, formula.heads_of(module.query, x, module.head_dim))
    key = _rms(module.key_norm, formula.heads_of(module.key, source, module.head_dim))
    value = formula.heads_of(module.value, source, module.head_dim)
    raised = (1 + linear(module.score, formula.joined(value)).exp()).log() * module.strength
    scores = (raised.exp() if module.form == "exp" else raised).transpose(1, 2)
    n, m = x.shape[1], source.shape[1]
    serves = module.heads // module.kv_heads
    kept = torch.zeros(len(x), module.heads, n, m, dtype=torch.bool)
    for b in range(len(x)):
        for h in range(module.heads):
            ranks = scores[b, h // serves].tolist()
            for i in range(n):
                seen = [
                    j
                    for j in range(m)
                    if (real is None or bool(real[b, j])) and (not module.causal or j <= i + m - n)
                ]
                best = sorted(seen, key=lambda j: (ranks[j], j))[-module.keep :]
                kept[b, h, i, best] = True
    bias = scores.repeat_interleave(serves, dim=1)[:, :, None].expand(-1, -1, n, -1)
    mixed = naive_attention(query, key, value, mask=kept, bias=bias)
    return linear(module.out, formula.joined(mixed))


def _loud_padding(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["padding_mask"][..., None], 1e4)}


def _tensor(module: nn.Module, inputs: Inputs) -> Tensor:
    """Pairs in loops: the exponential or its polynomial."""
    module = cast(TensorAttention, module)
    x, real = inputs["x"], inputs.get("padding_mask")
    layers = (module.query, module.key1, module.key2, module.value1, module.value2)
    query, key1, key2, value1, value2 = (
        formula.heads_of(layer, x, module.head_dim) for layer in layers
    )
    n = x.shape[1]
    rows = []
    for b in range(len(x)):
        seen = [j for j in range(n) if real is None or bool(real[b, j])]
        for h in range(module.heads):
            for i in range(n):
                shares, parts = [], []
                for j in seen:
                    for k in seen:
                        if module.causal and (j > i or k > i):
                            continue
                        score = (query[b, h, i] * key1[b, h, j] * key2[b, h, k]).sum()
                        score = score / module.head_dim
                        share = score.exp()
                        if module.method == "poly":
                            share = 1 + score + score**2 / 2
                        shares.append(share)
                        parts.append(share * value1[b, h, j] * value2[b, h, k])
                rows.append(torch.stack(parts).sum(0) / torch.stack(shares).sum())
    mixed = torch.stack(rows).reshape(query.shape)
    return linear(module.out, formula.joined(mixed))


_NO_DROPOUT = "the mechanism has no dropout: there are no weights to drop"
_NO_SOFTMAX = "the mechanism has no softmax; its site `probe` states effective weights"
_PAIRS = "weights are of pairs of keys: there is no map of queries and keys"
_ORDERED = "causality orders the tokens"

_NEAR = Sizes(most=2050)
"""Half of `max_distance`: the tables have no more rows for segment and memory together."""

SEQUENCE_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="linear-cross",
        build=lambda dropout: LinearAttention(12, heads=3, context_dim=7),
        inputs=_with_context,
        reference=formula.linear_cross,
        exponent=1.0,
        unseen=(unseen_masked(("context",), "padding_mask", axis=1),),
        symmetries=(
            permutation(("x",), axis=1, out_axis=1),
            permutation(("context", "padding_mask"), axis=1, out_axis=None),
        ),
        wrong=(
            *_WRONG_TOKENS,
            *_WRONG_MASK,
            (_spoilt("context", lambda x: x[..., :-1]), "context must be"),
        ),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
        excused={"eval-deterministic": _NO_DROPOUT, "observe": _NO_SOFTMAX},
    ),
    Mechanism(
        name="linear-causal-gated",
        build=lambda dropout: LinearAttention(
            12,
            heads=3,
            causal=True,
            features="identity",
            normalise=False,
            decay="gated",
            chunk=4,
        ),
        inputs=_row,
        reference=formula.linear_decaying,
        exponent=1.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="delta-rule-gated",
        build=lambda dropout: DeltaRuleAttention(12, heads=3, value_dim=5, gated=True, chunk=4),
        inputs=_row,
        reference=formula.delta_gated,
        exponent=1.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="delta-rule-padded",
        build=lambda dropout: DeltaRuleAttention(12, heads=3, value_dim=5, gated=True, chunk=4),
        inputs=_tokens,
        reference=formula.delta_gated,
        exponent=1.0,
        unseen=(
            unseen_future("x", axis=1),
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _NO_SOFTMAX,
        },
    ),
    Mechanism(
        name="mixture-of-heads",
        build=lambda dropout: built_mixture(dropout, causal=False, kv_heads=3),
        inputs=_tokens,
        reference=_mixture,
        exponent=2.0,
        unseen=(
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        symmetries=(permutation(("x", "padding_mask"), axis=1, out_axis=1),),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
    ),
    Mechanism(
        name="mixture-of-heads-causal",
        build=lambda dropout: built_mixture(dropout, causal=True, kv_heads=6),
        inputs=_row,
        reference=_mixture,
        exponent=2.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="mixture-of-heads-capacity",
        build=lambda dropout: built_mixture(dropout, causal=True, kv_heads=3, capacity=1.2),
        inputs=_row,
        reference=_mixture,
        exponent=2.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="dynamic-mask-causal",
        build=lambda dropout: DynamicMaskAttention(
            12, heads=4, kv_heads=2, head_dim=4, keep=3, dropout=dropout
        ),
        inputs=_tokens,
        reference=_dynamic_mask,
        size=7,
        exponent=1.0,
        unseen=(
            unseen_future("x", axis=1),
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="dynamic-mask-cross",
        build=lambda dropout: DynamicMaskAttention(
            12,
            heads=4,
            kv_heads=2,
            head_dim=4,
            keep=3,
            context_dim=7,
            causal=False,
            form="linear",
            dropout=dropout,
        ),
        inputs=_with_context,
        reference=_dynamic_mask,
        exponent=1.0,
        unseen=(unseen_masked(("context",), "padding_mask", axis=1),),
        symmetries=(
            permutation(("x",), axis=1, out_axis=1),
            permutation(("context", "padding_mask"), axis=1, out_axis=None),
        ),
        wrong=(
            *_WRONG_TOKENS,
            *_WRONG_MASK,
            (_spoilt("context", lambda x: x[..., :-1]), "context must be"),
        ),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
    ),
    Mechanism(
        name="complex-causal",
        build=lambda dropout: ComplexAttention(12, heads=3, causal=True, dropout=dropout),
        inputs=_row,
        reference=_complex,
        exponent=2.0,
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="complex-cross",
        build=lambda dropout: ComplexAttention(
            12, heads=3, context_dim=7, base=None, dropout=dropout
        ),
        inputs=_with_context,
        reference=_complex,
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
        ),
        dynamic={"x": {1: "n"}, "context": {1: "m"}, "padding_mask": {1: "m"}},
    ),
    Mechanism(
        name="relative-conv-memory",
        build=lambda dropout: _built_relative_conv(dropout, causal=True),
        inputs=_segment,
        reference=_relative_conv,
        exponent=2.0,
        costly_sizes=(512, 2048),
        unseen=(unseen_future("x", axis=1),),
        wrong=(
            *_WRONG_TOKENS,
            (_spoilt("memory", lambda x: x[..., :-1]), "memory must be"),
        ),
        dynamic={"x": {1: "n"}, "memory": {1: "s"}},
        limits={"n": _NEAR, "s": _NEAR},
        excused={"symmetry": _ORDERED},
    ),
    Mechanism(
        name="relative-conv-centred",
        build=lambda dropout: _built_relative_conv(dropout, causal=False),
        inputs=_tokens,
        reference=_relative_conv,
        size=6,
        exponent=2.0,
        costly_sizes=(1024, 4096),
        unseen=(
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        limits={"n": _NEAR},
        excused={"symmetry": "every offset has scores of its own"},
    ),
    Mechanism(
        name="tensor",
        build=lambda dropout: TensorAttention(12, heads=3),
        inputs=_tokens,
        reference=_tensor,
        exponent=3.0,
        unseen=(
            Unseen(name="padding", change=_loud_padding, select=lambda out: out[:, :-_HIDDEN]),
        ),
        symmetries=(permutation(("x", "padding_mask"), axis=1, out_axis=1),),
        wrong=(*_WRONG_TOKENS, *_WRONG_MASK),
        dynamic={"x": {1: "n"}, "padding_mask": {1: "n"}},
        excused={"eval-deterministic": _NO_DROPOUT, "observe": _PAIRS},
    ),
    Mechanism(
        name="tensor-causal-poly",
        build=lambda dropout: TensorAttention(12, heads=3, causal=True, method="poly", degree=2),
        inputs=_row,
        reference=_tensor,
        exponent=1.0,
        costly_sizes=(512, 1024),
        unseen=(unseen_future("x", axis=1),),
        wrong=_WRONG_TOKENS,
        dynamic={"x": {1: "n"}},
        excused={
            "symmetry": _ORDERED,
            "eval-deterministic": _NO_DROPOUT,
            "observe": _PAIRS,
        },
    ),
)
"""The attentions of sequences in `heed_core.attention`."""
