"""Causal mechanisms whose padding stands between real tokens, made of their other rows.

At the end it could not reach a real token anyhow: causality hides it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heed_core.attention.linear import LinearAttention
from heed_core.testing.conformance import Inputs, Mechanism, Unseen, unseen_future
from heed_core.testing.long_sequence_mechanisms import LONG_SEQUENCE_MECHANISMS
from heed_core.testing.sequence_mechanisms import SEQUENCE_MECHANISMS

_ROWS = {row.name: row for row in (*SEQUENCE_MECHANISMS, *LONG_SEQUENCE_MECHANISMS)}
_PADDED = _ROWS["delta-rule-padded"]
_FIRST, _BEHIND = 1, 3
"""The tokens of every second sample that are padding."""


def _with_a_hole(batch: int, size: int) -> Inputs:
    real = torch.ones(batch, size, dtype=torch.bool)
    real[1::2, _FIRST:_BEHIND] = False
    return {"x": torch.randn(batch, size, 12), "padding_mask": real}


def _loud(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].masked_fill(~inputs["padding_mask"][..., None], 1e4)}


def _of_real_tokens(output: Tensor) -> Tensor:
    return torch.cat([output[:, :_FIRST], output[:, _BEHIND:]], dim=1)


def _padded_within(row: str, **changed: Any) -> Mechanism:
    """A causal row, with padding between its tokens."""
    given: dict[str, Any] = {"name": f"{row}-hole", **changed}
    return replace(
        _ROWS[row],
        inputs=_with_a_hole,
        unseen=(
            unseen_future("x", axis=1),
            Unseen(name="padding", change=_loud, select=_of_real_tokens),
        ),
        wrong=_PADDED.wrong,
        dynamic=_PADDED.dynamic,
        **given,
    )


PADDING_MECHANISMS: tuple[Mechanism, ...] = (
    _padded_within("linear-causal-gated"),
    _padded_within(
        "linear-causal-gated",
        name="linear-causal-retention-hole",
        build=lambda _: LinearAttention(12, heads=3, causal=True, decay="retention", chunk=4),
    ),
    _padded_within("delta-rule-gated"),
    _padded_within("bounded-memory-causal"),
    _padded_within("performer-causal"),
)
"""Rows that differ from others in what is padding."""
