"""Softmax attention written out: the specification of `attend` and the oracle of its back-ends.

    S = scale * Q K^T + bias,   A = softmax over the permitted keys of S,   O = A V

Q is (b, h, n, d), K is (b, g, m, d), V is (b, g, m, e); head i reads group i // (h / g). Products,
softmax and sums run in float32 (float64 for float64), and O is cast back to the type of Q. A row
without a permitted key has A = 0, O = 0 and zero gradients. Time O(n m (d + e)) and memory O(n m)
per head; where nothing keeps the scores, they are made for some rows at a time.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed_core.dispatch import Facts, autocasting

PIECE_BYTES = 256 * 2**20
"""Of scores that exist at a time, where neither gradients nor dropout need all of them."""


def why_not(facts: Facts) -> str | None:
    """Accept every call."""
    return None


def run(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    mask: Bool[Tensor, "*mask"] | None,
    bias: Float[Tensor, "*bias"] | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Float[Tensor, "b h n e"]:
    """Compute attention step by step."""
    queries, keys = query.shape[2], key.shape[2]
    of_rows = partial(_some_rows, queries=queries, causal=causal, scale=scale, dropout=dropout)
    kept = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, bias)
    )
    if kept or dropout > 0.0 or torch.compiler.is_compiling():
        return of_rows(query, key, value, mask, bias, None)
    row_bytes = query.shape[0] * query.shape[1] * keys * max(4, query.element_size())
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    if step >= queries:
        return of_rows(query, key, value, mask, bias, None)
    numbers = torch.arange(queries, device=query.device)
    parts = [
        of_rows(query[:, :, rows], key, value, _rows(mask, rows), _rows(bias, rows), rows)
        for rows in (numbers[start : start + step] for start in range(0, queries, step))
    ]
    return torch.cat(parts, dim=2)


def _some_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    rows: Tensor | None,
    *,
    queries: int,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """The same for the rows of `query`: all, or those whose numbers among `queries` are `rows`."""
    allowed = permission(
        mask, causal=causal, queries=queries, keys=key.shape[2], device=query.device, rows=rows
    )
    products = scores(query, key, scale=scale, bias=bias)
    if allowed is None and bias is None:  # no row can be empty
        weights = torch.softmax(products, dim=-1)
    else:
        weights = masked_softmax(products, allowed)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return mix(weights, value).to(query.dtype)


def _rows(table: Tensor | None, rows: Tensor) -> Tensor | None:
    """Of what is broadcastable to (b, h, n, m)."""
    if table is None or table.dim() < 2 or table.shape[-2] == 1:
        return table
    return table[..., rows, :]


def scores(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    *,
    scale: float,
    bias: Float[Tensor, "*bias"] | None = None,
) -> Float[Tensor, "b h n m"]:
    """Scaled products plus bias, before any permission is applied."""
    products = grouped_product(_wide(query), _wide(key).transpose(-2, -1))
    if scale != 1.0:
        products = products * scale
    return products if bias is None else products + bias.to(products.dtype)


def permission(
    mask: Bool[Tensor, "*#mask"] | None,
    *,
    causal: bool,
    queries: int,
    keys: int,
    device: torch.device,
    rows: Int[Tensor, " rows"] | None = None,
) -> Bool[Tensor, "*#mask"] | None:
    """Which pairs may attend: `mask` AND, if `causal`, j <= i + m - n. None = all.

    Args:
        mask: Broadcastable to (b, h, n, m), or to the chosen rows of it.
        causal: Whether the future is hidden.
        queries: n.
        keys: m.
        device: Where to build the causal part.
        rows: Only these query rows.
    """
    if not causal:
        return mask
    rows = torch.arange(queries, device=device) if rows is None else rows
    past = torch.arange(keys, device=device) <= rows.unsqueeze(1) + (keys - queries)  # (n, m)
    return past if mask is None else past & mask


def masked_softmax(
    scores: Float[Tensor, "b h n m"], allowed: Bool[Tensor, "*mask"] | None
) -> Float[Tensor, "b h n m"]:
    """Softmax over the permitted keys; zeros and zero gradients where a row has none.

    A key whose score is -inf counts as not permitted.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)


def mix(
    weights: Float[Tensor, "b h n m"], value: Float[Tensor, "b g m e"]
) -> Float[Tensor, "b h n e"]:
    """Average the values by the weights, in the type of the weights."""
    return grouped_product(weights, value.to(weights.dtype))


def grouped_product(
    left: Float[Tensor, "b h n k"], right: Float[Tensor, "b g k m"]
) -> Float[Tensor, "b h n m"]:
    """Matrix product of each head with its group, without a copy of the groups."""
    if autocasting(left.device.type):  # would round the operands
        with torch.autocast(left.device.type, enabled=False):
            return grouped_product(left, right)
    heads, groups = left.shape[1], right.shape[1]
    if heads == groups:
        return left @ right
    per_group = heads // groups
    by_group = torch.unflatten(left, 1, (groups, per_group)).flatten(2, 3)  # heads as rows
    return torch.unflatten(by_group @ right, 2, (per_group, left.shape[2])).flatten(1, 2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
