"""The core's mechanisms for the conformance suite: every new mechanism gets an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.sites import Attend
from heed_core.testing.block_mechanisms import BLOCK_MECHANISMS
from heed_core.testing.circuit_mechanisms import CIRCUIT_MECHANISMS
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    permutation,
    unseen_future,
    unseen_masked,
)
from heed_core.testing.long_sequence_mechanisms import LONG_SEQUENCE_MECHANISMS
from heed_core.testing.mixture_mechanisms import MIXTURE_MECHANISMS
from heed_core.testing.oracle import naive_attention
from heed_core.testing.padding_mechanisms import PADDING_MECHANISMS
from heed_core.testing.pattern_mechanisms import PATTERN_MECHANISMS
from heed_core.testing.pointer_mechanisms import POINTER_MECHANISMS
from heed_core.testing.readout_mechanisms import READOUT_MECHANISMS
from heed_core.testing.reduced_mechanisms import REDUCED_MECHANISMS
from heed_core.testing.sequence_mechanisms import SEQUENCE_MECHANISMS
from heed_core.testing.vision_mechanisms import VISION_MECHANISMS


class _Call(nn.Module):
    """`Attend` with its tensors as named arguments."""

    def __init__(self, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = Attend(causal=causal, dropout=dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        output: Tensor = self.attend(query, key, value, mask=mask, bias=bias)
        return output


def _qkv(batch: int, n: int, m: int, groups: int = 4) -> Inputs:
    return {
        "query": torch.randn(batch, 4, n, 8),
        "key": torch.randn(batch, groups, m, 8),
        "value": torch.randn(batch, groups, m, 6),
    }


def _masked(batch: int, size: int) -> Inputs:
    m = size + 3
    lengths = torch.arange(batch) % 3 + m - 3
    return {**_qkv(batch, size, m, groups=2), "mask": masks.padding(lengths, m)}


def _biased(batch: int, size: int) -> Inputs:
    return {**_qkv(batch, size, size + 2), "bias": torch.randn(4, size, size + 2)}


def _square(batch: int, size: int) -> Inputs:
    return _qkv(batch, size, size, groups=1)


def _reference(causal: bool) -> Callable[[nn.Module, Inputs], Tensor]:
    def reference(module: nn.Module, inputs: Inputs) -> Tensor:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        mask, bias = inputs.get("mask"), inputs.get("bias")
        return naive_attention(query, key, value, mask=mask, bias=bias, causal=causal)

    return reference


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


_WRONG = (
    (_spoilt("query", lambda x: x[0]), "query must be (batch, heads, tokens, channels)"),
    (_spoilt("key", lambda x: x[..., :-1]), "key must be (b, g, m, d)"),
    (_spoilt("value", lambda x: x[:, :, :-1]), "value must agree with key"),
    (_spoilt("query", lambda x: x[:, :3].repeat(1, 1, 1, 1)), "must divide"),
)

MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="attend-masked-grouped",
        build=lambda dropout: _Call(dropout=dropout),
        inputs=_masked,
        reference=_reference(causal=False),
        exponent=2.0,
        unseen=(unseen_masked(("key", "value"), "mask", axis=2),),
        symmetries=(permutation(("query",), axis=2, out_axis=2),),
        wrong=_WRONG[:3],
        dynamic={
            "query": {2: "n"},
            "key": {2: "m"},
            "value": {2: "m"},
            "mask": {3: "m"},
        },
    ),
    Mechanism(
        name="attend-biased",
        build=lambda dropout: _Call(dropout=dropout),
        inputs=_biased,
        reference=_reference(causal=False),
        exponent=2.0,
        wrong=(*_WRONG[:3], (_spoilt("bias", lambda x: x[:, :-1]), "bias must be broadcastable")),
        excused={
            "unseen": "hides nothing",
            "symmetry": "the bias tells every pair of positions apart",
        },
        dynamic={
            "query": {2: "n"},
            "key": {2: "m"},
            "value": {2: "m"},
            "bias": {1: "n", 2: "m"},
        },
    ),
    Mechanism(
        name="attend-causal",
        build=lambda dropout: _Call(causal=True, dropout=dropout),
        inputs=_square,
        reference=_reference(causal=True),
        exponent=2.0,
        excused={"symmetry": "causality orders the tokens"},
        unseen=(unseen_future("key", axis=2), unseen_future("value", axis=2)),
        wrong=_WRONG[:3],
        dynamic={"query": {2: "n"}, "key": {2: "n"}, "value": {2: "n"}},
    ),
    Mechanism(
        name="attend-cross",
        build=lambda dropout: _Call(dropout=dropout),
        inputs=lambda batch, size: _qkv(batch, size, size + 4),
        reference=_reference(causal=False),
        exponent=2.0,
        excused={"unseen": "hides nothing"},
        symmetries=(
            permutation(("key", "value"), axis=2, out_axis=None),
            permutation(("query",), axis=2, out_axis=2),
        ),
        wrong=_WRONG,
        dynamic={"query": {2: "n"}, "key": {2: "m"}, "value": {2: "m"}},
    ),
    *BLOCK_MECHANISMS,
    *CIRCUIT_MECHANISMS,
    *SEQUENCE_MECHANISMS,
    *MIXTURE_MECHANISMS,
    *PATTERN_MECHANISMS,
    *LONG_SEQUENCE_MECHANISMS,
    *PADDING_MECHANISMS,
    *VISION_MECHANISMS,
    *POINTER_MECHANISMS,
    *REDUCED_MECHANISMS,
    *READOUT_MECHANISMS,
)
"""Every mechanism of the core."""

_PROCESSES = "several processes call it together; a test of its own compares it with one process"
_SPARSE = (
    "it takes a sparse grid, no tensors of one shape; a test of its own writes the formula out"
)

OUTSIDE: Mapping[str, str] = {
    "heed_core.context_parallel": _PROCESSES,
    "heed_core.context_parallel_attention": _PROCESSES,
    "heed_core.head_parallel": _PROCESSES,
    "heed_core.attention.column": _SPARSE,
    "heed_core.attention.multi_scale_column": _SPARSE,
}
"""Modules whose attention has no row here, and why."""
