"""Patterns that mechanisms also serve, made of their other rows: the suite runs every pattern."""

from __future__ import annotations

from dataclasses import replace

from heed_core.attention.complex import ComplexAttention
from heed_core.attention.dynamic_mask import DynamicMaskAttention
from heed_core.attention.linear import LinearAttention
from heed_core.attention.reduced import ReducedAttention
from heed_core.testing.conformance import Mechanism, unseen_future
from heed_core.testing.reduced_mechanisms import REDUCED_MECHANISMS
from heed_core.testing.sequence_mechanisms import SEQUENCE_MECHANISMS, built_mixture

_ROWS = {row.name: row for row in (*SEQUENCE_MECHANISMS, *REDUCED_MECHANISMS)}
_OWN, _CROSS = _ROWS["mixture-of-heads"], _ROWS["linear-cross"]


def _to_themselves(row: str) -> Mechanism:
    """A row of a cross-attention, for tokens that attend to themselves."""
    return replace(
        _ROWS[row],
        inputs=_OWN.inputs,
        unseen=_OWN.unseen,
        symmetries=_OWN.symmetries,
        wrong=_OWN.wrong,
        dynamic=_OWN.dynamic,
    )


PATTERN_MECHANISMS: tuple[Mechanism, ...] = (
    replace(
        _to_themselves("linear-cross"),
        name="linear",
        build=lambda _: LinearAttention(12, heads=3),
    ),
    replace(
        _to_themselves("dynamic-mask-cross"),
        name="dynamic-mask",
        build=lambda dropout: DynamicMaskAttention(
            12,
            heads=4,
            kv_heads=2,
            head_dim=4,
            keep=3,
            causal=False,
            form="linear",
            dropout=dropout,
        ),
        size=7,
    ),
    replace(
        _to_themselves("complex-cross"),
        name="complex",
        symmetries=(),
        build=lambda dropout: ComplexAttention(12, heads=3, dropout=dropout),
        excused={"symmetry": "phases tell distances apart"},
    ),
    replace(
        _OWN,
        name="mixture-of-heads-cross",
        build=lambda dropout: built_mixture(dropout, causal=False, kv_heads=3, context_dim=7),
        inputs=_CROSS.inputs,
        unseen=_CROSS.unseen,
        symmetries=_CROSS.symmetries,
        wrong=_CROSS.wrong,
        dynamic=_CROSS.dynamic,
    ),
    replace(
        _ROWS["reduced-cholesky"],
        name="reduced-causal",
        build=lambda dropout: ReducedAttention(
            8, heads=2, qk="symmetric", causal=True, dropout=dropout
        ),
        unseen=(unseen_future("x", axis=1),),
        symmetries=(),
        excused={"symmetry": "causality orders the tokens"},
    ),
)
"""Rows that differ from others in who attends to whom."""
