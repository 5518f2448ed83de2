"""Pointer heads for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.pointer import PointerHead
from heed_core.testing.conformance import (
    Inputs,
    Mechanism,
    Symmetry,
    permutation,
    unseen_masked,
)
from heed_core.testing.vision_formulas import linear


class _Finite(nn.Module):
    """A head whose logits of absent tokens are 0 instead of -inf, so that they can be compared."""

    def __init__(self, head: PointerHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(x, memory, memory_mask=memory_mask)
        return logits.masked_fill(logits.isneginf(), 0.0)


def _pointer(module: nn.Module, inputs: Inputs) -> Tensor:
    """The double loop over queries and tokens."""
    head = cast(PointerHead, module.head if isinstance(module, _Finite) else module)
    x, memory = inputs["x"], inputs["memory"]
    query, key = linear(head.query, x), linear(head.key, memory)
    scale = query.new_tensor(head.head_dim if head.scale is None else head.scale**-2).rsqrt()
    rows = []
    for t in range(x.shape[1]):
        columns = []
        for j in range(memory.shape[1]):
            products = (query[:, t] * key[:, j]).view(-1, head.heads, head.head_dim)
            columns.append(products.sum(-1) * scale)
        columns += [torch.zeros_like(columns[0])] * head.extra_slots
        rows.append(torch.stack(columns, dim=1))
    scores = torch.stack(rows, dim=1)  # (b, n, m + extra, h)
    mixed = scores.mean(-1) if head.mix is None else linear(head.mix, scores)[..., 0]
    if "memory_mask" in inputs:
        there = inputs["memory_mask"]
        absent = torch.cat([~there, there.new_zeros(len(there), head.extra_slots)], dim=1)
        mixed = mixed.masked_fill(absent[:, None], 0.0)
    return mixed


def _masked(batch: int, size: int) -> Inputs:
    lengths = size + 3 - torch.arange(batch) % 3
    return {
        "x": torch.randn(batch, size, 12),
        "memory": torch.randn(batch, size + 3, 12),
        "memory_mask": masks.padding(lengths, size + 3)[:, 0, 0],
    }


def _plain(batch: int, size: int) -> Inputs:
    return {"x": torch.randn(batch, size, 12), "memory": torch.randn(batch, size + 3, 7)}


def _spoilt(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {**inputs, name: change(inputs[name])}


def _permuted_slots(extra: int) -> Callable[[Tensor], Tensor]:
    def move(output: Tensor) -> Tensor:
        m = output.shape[2] - extra
        order = torch.arange(m - 1, -1, -1).roll(2)  # as `permutation` orders the tokens
        return torch.cat([output[..., order], output[..., m:]], dim=-1)

    return move


_WRONG = (
    (_spoilt("x", lambda x: x[..., :-1]), "x must be (batch, tokens, 12)"),
    (_spoilt("memory", lambda x: x[0]), "memory must be (batch, tokens"),
    (_spoilt("memory", lambda x: x[:1]), "memory must have the batch of x"),
)
_EXCUSED = {
    "eval-deterministic": "the mechanism has no dropout",
    "observe": "the mechanism has no softmax; its site `probe` states softmax(logits)",
}


def _symmetries(arguments: tuple[str, ...], extra: int) -> tuple[Symmetry, ...]:
    tokens = permutation(arguments, axis=1, out_axis=None)
    return (
        permutation(("x",), axis=1, out_axis=1),
        replace(tokens, on_output=_permuted_slots(extra)),
    )


POINTER_MECHANISMS: tuple[Mechanism, ...] = (
    Mechanism(
        name="pointer-mixed",
        build=lambda dropout: _Finite(PointerHead(12, heads=2, extra_slots=1)),
        inputs=_masked,
        reference=_pointer,
        exponent=2.0,
        unseen=(unseen_masked(("memory",), "memory_mask", axis=1),),
        symmetries=_symmetries(("memory", "memory_mask"), 1),
        wrong=(
            *_WRONG,
            (_spoilt("memory_mask", lambda x: x[:, 1:]), "memory_mask must be"),
            (_spoilt("memory_mask", lambda x: x.float()), "memory_mask must be boolean"),
        ),
        dynamic={"x": {1: "n"}, "memory": {1: "m"}, "memory_mask": {1: "m"}},
        excused=_EXCUSED,
    ),
    Mechanism(
        name="pointer-mean",
        build=lambda dropout: PointerHead(
            12, heads=3, extra_slots=2, mix="mean", head_dim=4, scale=0.3, memory_dim=7
        ),
        inputs=_plain,
        reference=_pointer,
        exponent=2.0,
        symmetries=_symmetries(("memory",), 2),
        wrong=_WRONG,
        dynamic={"x": {1: "n"}, "memory": {1: "m"}},
        excused={**_EXCUSED, "unseen": "no mask is given here; see pointer-mixed"},
    ),
)
"""Heads that choose among memory tokens."""
