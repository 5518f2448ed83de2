"""Heads computed for the tokens that use them: gather tokens, attend, put the results back.

Serves attentions whose heads are gated token by token with gates that are mostly 0, as those of
`heed_core.attention.mixture_of_heads`. To gather, the number of tokens of each head must be known:
it is read from the gates, or is given as `room`, as in graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_ALIKE = 0.85
"""Heads are computed together if none has fewer tokens than this share of the most used one's."""

PIECES = 4
"""Causal calls skip in this many pieces of tokens, each with the keys that it can see."""


def gate_heads(
    mixed: Float[Tensor, "b h n e"], gates: Float[Tensor, "b h n"]
) -> Float[Tensor, "b h n e"]:
    """What heads give, times their gates, in the type of what they give."""
    return mixed * gates[..., None].to(mixed.dtype)


def by_tokens(
    run: Callable[..., Tensor],
    ask: Callable[[int, Tensor], Tensor],
    put: Callable[[list[int], Tensor, Tensor], None],
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    shared: int,
    causal: bool,
    room: int | None = None,
) -> None:
    """Each routed head for the tokens with a gate.

    Args:
        run: As `attend`.
        ask: Queries (b, rows, d) of a head for tokens (b, rows).
        put: Takes heads, their tokens (b, heads, rows) and what these get, times the gates.
        key: Of all heads.
        value: Of all heads.
        gates: Of all heads (b, n, h).
        mask: Broadcastable to (b, h, n, m).
        bias: Broadcastable to (b, h, n, m).
        shared: Heads that are left out.
        causal: As of `attend`.
        room: Tokens that each head gets at most; as many as have a gate if not given.
    """
    queries, keys, masked = gates.shape[1], key.shape[2], mask is not None or causal
    single = masked or bias is not None
    for start, stop, seen in _pieces(queries, keys, causal=causal and room is None):
        piece = gates[:, start:stop]
        for heads, rows in alike(piece, shared, room, single=single):
            index, weight = _rows(piece[:, :, heads], rows)  # (b, heads, rows)
            index = index + start
            asking = torch.stack(
                [ask(head, one) for head, one in zip(heads, index.unbind(1), strict=True)], dim=1
            )
            allowed, added = None, None
            if masked:
                sizes = (queries, keys, seen)
                allowed = _allowed(mask, index[:, 0], heads[0], *sizes, causal=causal)
            if bias is not None:
                added = _of_rows(bias, index[:, 0], heads[0], seen)
            pair = (_of_heads(x, heads, seen, gates.shape[2]) for x in (key, value))
            mixed = run(asking, *pair, mask=allowed, bias=added, causal=False)
            put(heads, index, gate_heads(mixed, weight))


def _pieces(queries: int, keys: int, *, causal: bool) -> list[tuple[int, int, int]]:
    """Runs of queries: first, behind the last, and how many keys they can see."""
    if not causal:
        return [(0, queries, keys)]
    step = max(1, -(-queries // PIECES))
    return [
        (start, min(start + step, queries), keys - max(0, queries - start - step))
        for start in range(0, queries, step)
    ]


def alike(
    gates: Float[Tensor, "b n h"], shared: int, room: int | None, *, single: bool
) -> list[tuple[list[int], int]]:
    """Routed heads that are computed together, and the tokens that each gets at most.

    Heads are put together where they were chosen about as often: less is computed in vain than many
    small calls cost.
    """
    every = gates.shape[2]
    routed = range(shared, every)
    if room is not None:
        return [([head], room) for head in routed] if single else [(list(routed), room)]
    counts = (gates.detach() != 0).sum(1)
    most = counts.amax(0).tolist() if counts.numel() else [0] * every
    found: list[tuple[list[int], int]] = []
    for head in sorted(routed, key=lambda head: -most[head]):
        if most[head] == 0:
            break
        if single or not found or most[head] < LEAST_ALIKE * found[-1][1]:
            found.append(([], most[head]))
        found[-1][0].append(head)
    return [(sorted(heads), rows) for heads, rows in found]


def _of_heads(tokens: Tensor, heads: list[int], seen: int, every: int) -> Tensor:
    """Keys or values that serve some of `every` head, without a copy where they lie together."""
    group = [head * tokens.shape[1] // every for head in heads]
    if group == list(range(group[0], group[-1] + 1)):
        return tokens[:, group[0] : group[-1] + 1, :seen]
    return tokens[:, group, :seen]


def _allowed(
    mask: Tensor | None,
    index: Tensor,
    head: int,
    queries: int,
    keys: int,
    seen: int,
    *,
    causal: bool,
) -> Tensor | None:
    """The permission of chosen rows of one head, (b, 1, rows, seen)."""
    allowed = None if mask is None else _of_rows(mask, index, head, seen)
    if causal:
        past = torch.arange(seen, device=index.device) <= index[..., None] + (keys - queries)
        allowed = past[:, None] if allowed is None else past[:, None] & allowed
    return allowed


def _of_rows(table: Tensor, index: Tensor, head: int, seen: int) -> Tensor:
    """Chosen rows of one head of what is broadcastable to (b, h, n, m), and the keys seen."""
    table = table.reshape((1,) * (4 - table.dim()) + table.shape)
    if table.shape[1] > 1:
        table = table[:, head : head + 1]
    table = table[..., :seen] if table.shape[3] > 1 else table
    if table.shape[2] > 1:
        table = table.expand(index.shape[0], -1, -1, -1)
        table = table.gather(2, index[:, None, :, None].expand(-1, -1, -1, table.shape[3]))
    return table


def _rows(
    gates: Float[Tensor, "b n h"], room: int
) -> tuple[Int[Tensor, "b h r"], Float[Tensor, "b h r"]]:
    """The tokens with a gate, in order, and their gates: 0 where a head has fewer than others."""
    gates = gates.transpose(1, 2)
    length = gates.shape[-1]
    order = (gates.detach() == 0).to(torch.uint8).argsort(dim=-1, stable=True)
    if not torch.compiler.is_compiling():
        index = order[..., :room]
        weight = gates.gather(-1, index)
        return index, weight.masked_fill(weight == 0, 0.0)
    place = torch.arange(room, device=gates.device)  # of which there may be more than tokens
    index = order[..., place.clamp(max=length - 1)]
    weight = gates.gather(-1, index)
    return index, weight.masked_fill((weight == 0) | (place >= length), 0.0)


def gather_tokens(
    tokens: Float[Tensor, "b n d"], index: Int[Tensor, "b r"]
) -> Float[Tensor, "b r d"]:
    """The tokens at the places `index` of each sample."""
    batch, length, width = tokens.shape
    first = length * torch.arange(batch, device=index.device)[:, None]
    rows, place = tokens.reshape(-1, width), index + first
    if torch.compiler.is_compiling():  # cutting what was picked into rows would guard its length
        return rows[place]
    return rows.index_select(0, place.flatten()).view(batch, -1, width)
