"""Attention of a sequence that several processes share, each with a part of the tokens.

Every process holds n / P tokens of queries, keys and values and gets its rows of the exact result,
with gradients. With e bytes per number and B samples, H query and G key heads of width D, a process
receives forwards

* `ring` (Liu et al., arXiv 2310.01889): keys and values go round, 2 (P - 1) B G (n / P) D e, and
  memory is that of n / P tokens; backwards the blocks go round again, with their gradients in
  float32;
* `allgather`: keys and values of all, the same bytes, and backwards as many numbers in float32;
  memory of the keys and values of n tokens;
* `ulysses` (Jacobs et al., arXiv 2309.14509): tokens are exchanged for heads and back,
  (P - 1) / P (2 B H + 2 B G) (n / P) D e, backwards the same; memory of n tokens of H / P heads.
  Where P does not divide G, key heads are repeated until it does, and G counts them so; where it
  does not divide H either, processes get shares of heads that differ by one.

Scores exist in tiles of `TILE` x `TILE` only, and are computed again backwards from the logarithm
of their sum; tiles that causality hides are left out. Outputs and gradients are summed in float32
at least. With layout "zigzag" the sequence is cut into 2 P chunks, of which process r holds chunks
r and 2 P - 1 - r: causal, all have the same work. Lengths that do not divide are padded
(`shard_sequence`); padded keys are hidden by a padding mask. Rotary codes need the places of
`global_positions`. There is no dropout. Where the sequence fits and the weights do not, share the
heads instead: `head_parallel`.

An `Attend` site can be passed to `allgather` and `ulysses`: while something is attached to it,
attention runs there with a whole map, keys in the order of the sequence. With `allgather` its rows
are this process's queries; with `ulysses` all queries, in order, and its heads are this process's
share. `ring` has no moment at which the weights of a row are known, so that there is nothing to
observe or steer: it refuses a site with attachments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args, overload

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.attend import autocast_together, check_arguments
from heed_core.exchange import (
    CommCounter,
    check_together,
    from_all,
    gather_tokens,
    heads_for_tokens,
    pass_on,
    tokens_for_heads,
)
from heed_core.precision import at_least_float32
from heed_core.sequence_layout import (
    Layout,
    all_positions,
    check_layout,
    global_positions,
    padded_length,
    shard_sequence,
    unshard_sequence,
)
from heed_core.sites import Attend
from heed_core.tokens import check_padding

__all__ = [
    "CommCounter",
    "Layout",
    "MaskFunction",
    "Method",
    "context_parallel_attention",
    "global_positions",
    "padded_length",
    "shard_sequence",
    "unshard_sequence",
]

TILE = 512
"""Queries and keys whose scores are held at a time."""

Method = Literal["ring", "allgather", "ulysses"]
"""How processes exchange them."""

MaskFunction = Callable[[Tensor, Tensor], Tensor]
"""(places of queries (n, 1), places of keys (1, m)) -> whether they may attend, boolean (n, m)."""


@overload
def context_parallel_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n e"],
    *,
    group: dist.ProcessGroup | None = None,
    method: Method = "ring",
    layout: Layout = "contiguous",
    causal: bool = False,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    mask_fn: MaskFunction | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    site: Attend | None = None,
    return_lse: Literal[False] = False,
) -> Float[Tensor, "b h n e"]: ...


@overload
def context_parallel_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n e"],
    *,
    group: dist.ProcessGroup | None = None,
    method: Method = "ring",
    layout: Layout = "contiguous",
    causal: bool = False,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    mask_fn: MaskFunction | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    site: Attend | None = None,
    return_lse: Literal[True],
) -> tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]: ...


def context_parallel_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n e"],
    *,
    group: dist.ProcessGroup | None = None,
    method: Method = "ring",
    layout: Layout = "contiguous",
    causal: bool = False,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    mask_fn: MaskFunction | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    site: Attend | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "b h n e"] | tuple[Float[Tensor, "b h n e"], Float[Tensor, "b h n"]]:
    """Softmax attention of this process's queries to the keys of all.

    Args:
        query: Of the tokens that this process holds.
        key: Of the same tokens; its g heads divide h.
        value: What is averaged.
        group: The processes; all if not given.
        method: How keys and values, or heads, are exchanged.
        layout: Which tokens a process holds.
        causal: Query i sees key j only if j <= i, by places in the whole sequence.
        padding_mask: True = real token, of the tokens that this process holds.
        mask_fn: Whether places of queries may attend to places of keys; AND with the others.
        scale: Of the products; default d ** -0.5.
        dropout: Must be 0: the processes would have to draw the same numbers.
        site: Where attention may be watched; costs nothing until something is attached to it.
        return_lse: Also return the logarithm of each query's sum of exponentials, in float32 at
            least and without gradient; -inf where nothing may be attended to.

    Raises:
        ValueError: An unknown option, shapes that do not fit, or a site with attachments where
            there is no map, here or on another process; shapes, types or options that differ
            between processes. All processes raise.
        TypeError: A type that cannot be computed with, a mask that is not boolean.
    """
    query, key, value = autocast_together(query, key, value)
    fault = _fault(
        lambda: _check_call(
            query, key, value, method, layout, padding_mask, mask_fn, scale, dropout
        ),
        lambda: _check_site(site, method, return_lse),
    )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    options = f"{query.dtype}, {method}, {layout}, causal={causal}, return_lse={return_lse}"
    check_together(f"{shapes}, {options}", fault, group, query.device)
    plan = _Plan(
        group=group,
        layout=layout,
        causal=causal,
        mask_fn=mask_fn,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        world=dist.get_world_size(group),
        count=query.shape[2],
        real=_all_real(padding_mask, query, group),
    )
    if method == "ring":
        out, lse = _Ring.apply(query, key, value, plan)  # type: ignore[no-untyped-call]
    elif method == "allgather":
        key, value = gather_tokens(key, group), gather_tokens(value, group)
        out, lse = _here(site, query, key, value, plan, [dist.get_rank(group)])
    else:
        out, lse = _by_heads(site, query, key, value, plan, return_lse)
    return (out, lse) if return_lse else out


def _here(
    site: Attend | None, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, asking: list[int]
) -> tuple[Tensor, Tensor]:
    """Queries of some processes and the keys of all; no log-sum-exp from a watched site."""
    if site is not None and site.attachments is not None:
        mixed = _at_site(site, query, key, value, plan, asking)
        return mixed, mixed.new_empty(0)
    out, lse = _Streaming.apply(query, key, value, plan, asking)  # type: ignore[no-untyped-call]
    return out, lse


def _by_heads(
    site: Attend | None, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """All tokens of a share of the heads, and the way back."""
    heads, repeats = query.shape[1], _repeats(query.shape[1], key.shape[1], plan.world)
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    query, key, value = (heads_for_tokens(x, plan.group) for x in (query, key, value))
    out, lse = _here(site, query, key, value, plan, list(range(plan.world)))
    out = tokens_for_heads(out, heads, plan.group)
    if with_lse:
        lse = tokens_for_heads(lse[..., None], heads, plan.group)[..., 0]
    return out, lse


def _repeats(heads: int, groups: int, world: int) -> int:
    """How often key heads are repeated, so that processes can share them like those of queries."""
    if heads % world:
        return heads // groups
    return math.lcm(groups, world) // groups


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What all blocks of a call have in common."""

    group: dist.ProcessGroup | None
    layout: Layout
    causal: bool
    mask_fn: MaskFunction | None
    scale: float
    world: int
    count: int
    """Tokens of a process."""
    real: Tensor | None
    """(P, b, n / P)."""

    def tokens(self, process: int) -> slice:
        """Where a process's tokens stand when those of all are in the order of the processes."""
        return slice(process * self.count, (process + 1) * self.count)

    def strips(self, process: int) -> Iterator[tuple[slice, int]]:
        """At most `TILE` tokens of a process at neighbouring places, and the first place."""
        if self.layout == "contiguous":
            size, firsts = self.count, [process * self.count]
        else:
            size = self.count // 2
            firsts = [process * size, (2 * self.world - 1 - process) * size]
        for run, first in enumerate(firsts):
            for start in range(0, size, TILE):
                stop = min(start + TILE, size)
                yield slice(run * size + start, run * size + stop), first + start

    def allowed(self, rows: Tensor, columns: Tensor, real: Tensor | None) -> Tensor | None:
        """Who may attend to whom by places, broadcastable to (b, 1, n, m); None = all."""
        rows, columns = rows[:, None], columns[None]
        parts: list[Tensor] = []
        if self.causal:
            parts.append(columns <= rows)
        if self.mask_fn is not None:
            found = self.mask_fn(rows, columns)
            _check_found(found)
            parts.append(found)
        if real is not None:
            parts.append(real[:, None, None])
        total = None
        for part in parts:
            total = part if total is None else total & part
        return total


class _Tile(NamedTuple):
    """Queries of one process and keys of another."""

    rows: slice
    columns: slice
    allowed: Tensor | None


def _tiles(plan: _Plan, asking: int, source: int, device: torch.device) -> Iterator[_Tile]:
    """The tiles of a block, without those that only hold the future."""
    for rows, row in plan.strips(asking):
        last = row + rows.stop - rows.start - 1
        for columns, column in plan.strips(source):
            if plan.causal and column > last:
                continue
            real = None if plan.real is None else plan.real[source][:, columns]
            asked = torch.arange(row, last + 1, device=device)
            seen = torch.arange(column, column + columns.stop - columns.start, device=device)
            yield _Tile(rows, columns, plan.allowed(asked, seen, real))


def _scores(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """(b, g, h / g, n, m)."""
    scores = query @ key[:, :, None].mT * scale
    if allowed is None:
        return scores
    allowed = allowed[:, :, None] if allowed.dim() == 4 else allowed
    return scores.masked_fill_(~allowed, -torch.inf)


def _grouped(rows: Tensor, key: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, g, h / g, n, d), in float32 at least."""
    batch, heads, n, width = rows.shape
    groups = key.shape[1]
    return at_least_float32(rows).reshape(batch, groups, heads // max(groups, 1), n, width)


class _Sums(NamedTuple):
    """Queries and what they have gathered so far; tokens are the axis before the last."""

    query: Tensor  # (b, g, h / g, n, d)
    out: Tensor  # (b, g, h / g, n, e)
    lse: Tensor  # (b, g, h / g, n, 1)


class _Back(NamedTuple):
    """What the backward pass knows of queries, and their gradient so far."""

    query: Tensor
    lse: Tensor
    grad: Tensor  # of the outputs
    delta: Tensor  # their products with the outputs, (b, g, h / g, n, 1)
    to_query: Tensor


_Rows = TypeVar("_Rows", _Sums, _Back)


def _of_tokens(rows: _Rows, where: slice) -> _Rows:
    return type(rows)(*(x[..., where, :] for x in rows))


def _nothing_yet(query: Tensor, key: Tensor, value: Tensor) -> _Sums:
    asked = _grouped(query, key)
    out = asked.new_zeros(*asked.shape[:-1], value.shape[3])
    return _Sums(asked, out, asked.new_full((*asked.shape[:-1], 1), -torch.inf))


def _going_back(ctx: Any, grad: Tensor) -> _Back:
    query, key, _, out, lse = ctx.saved_tensors
    spread, asked = _grouped(grad, key), _grouped(query, key)
    delta = (spread * out).sum(-1, keepdim=True)
    safe = lse.masked_fill(lse.isneginf(), 0.0)  # the scores of such a row are all -inf
    return _Back(asked, safe, spread, delta, torch.zeros_like(asked))


def _absorb(sums: _Sums, key: Tensor, value: Tensor, plan: _Plan, asking: int, source: int) -> None:
    """Add the block of a process to the sums of the queries of another, in place."""
    for rows, columns, allowed in _tiles(plan, asking, source, key.device):
        query, out, lse = _of_tokens(sums, rows)
        keys, values = (at_least_float32(x[:, :, columns]) for x in (key, value))
        scores = _scores(query, keys, plan.scale, allowed)
        total = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
        # A row that has seen nothing has no total: its old and new parts are both 0.
        safe = total.masked_fill(total.isneginf(), 0.0)
        out.mul_((lse - safe).exp()).add_((scores - safe).exp_() @ values[:, :, None])
        lse.copy_(total)


def _give_back(
    back: _Back, block: list[Tensor], found: list[Tensor], plan: _Plan, asking: int, source: int
) -> None:
    """Add what queries of one process give to keys and values of another, and get, in place."""
    for rows, columns, allowed in _tiles(plan, asking, source, block[0].device):
        query, lse, grad, delta, to_query = _of_tokens(back, rows)
        keys, values = (at_least_float32(x[:, :, columns]) for x in block)
        weights = (_scores(query, keys, plan.scale, allowed) - lse).exp_()
        found[1][:, :, columns] += (weights.mT @ grad).sum(2)
        inner = weights * (grad @ values[:, :, None].mT - delta) * plan.scale
        to_query += inner @ keys[:, :, None]
        found[0][:, :, columns] += (inner.mT @ query).sum(2)


class _Ring(torch.autograd.Function):
    """Blocks of keys and values go round; sums are merged by their log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        rank = dist.get_rank(plan.group)
        sums = _nothing_yet(query, key, value)
        block = [key.contiguous(), value.contiguous()]
        for step in range(plan.world):
            waiting = pass_on(block, plan.group) if step + 1 < plan.world else None
            _absorb(sums, block[0], block[1], plan, rank, (rank - step) % plan.world)
            if waiting is not None:
                block = waiting()
        return _finished(ctx, sums, query, key, value, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        query, key, value = ctx.saved_tensors[:3]
        rank, world = dist.get_rank(plan.group), plan.world
        back = _going_back(ctx, grads[0])
        block = [key.contiguous(), value.contiguous()]
        found = [torch.zeros_like(at_least_float32(x)) for x in block]
        # After P steps the gradients of a block, which travel with it, are home again.
        for step in range(world):
            _give_back(back, block, found, plan, rank, (rank - step) % world)
            if world > 1:
                last = step + 1 == world
                moved = pass_on(found if last else [*block, *found], plan.group)()
                block, found = (block, moved) if last else (moved[:2], moved[2:])
        to_query = back.to_query.flatten(1, 2).to(query.dtype)
        return to_query, found[0].to(key.dtype), found[1].to(value.dtype), None


class _Streaming(torch.autograd.Function):
    """Keys and values of all, in the order of the processes, for the queries of some of them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, asking: list[int]
    ) -> tuple[Tensor, Tensor]:
        sums = _nothing_yet(query, key, value)
        for place, process in enumerate(asking):
            part = _of_tokens(sums, plan.tokens(place))
            for source in range(plan.world):
                at = plan.tokens(source)
                _absorb(part, key[:, :, at], value[:, :, at], plan, process, source)
        ctx.asking = asking
        return _finished(ctx, sums, query, key, value, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        query, key, value = ctx.saved_tensors[:3]
        back = _going_back(ctx, grads[0])
        found = [torch.zeros_like(at_least_float32(x)) for x in (key, value)]
        for place, process in enumerate(ctx.asking):
            part = _of_tokens(back, plan.tokens(place))
            for source in range(plan.world):
                at = plan.tokens(source)
                block, given = ([x[:, :, at] for x in pair] for pair in ((key, value), found))
                _give_back(part, block, given, plan, process, source)
        to_query = back.to_query.flatten(1, 2).to(query.dtype)
        return to_query, found[0].to(key.dtype), found[1].to(value.dtype), None, None


def _finished(
    ctx: Any, sums: _Sums, query: Tensor, key: Tensor, value: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exp of all heads; what the backward pass needs is kept."""
    ctx.plan = plan
    ctx.save_for_backward(query, key, value, sums.out, sums.lse)
    out, lse = sums.out.flatten(1, 2).to(query.dtype), sums.lse.flatten(1, 2)[..., 0]
    ctx.mark_non_differentiable(lse)
    return out, lse


def _at_site(
    site: Attend, query: Tensor, key: Tensor, value: Tensor, plan: _Plan, asking: list[int]
) -> Tensor:
    """The same with a whole map at a watched site, keys in the order of the sequence."""
    places = all_positions(plan.world, plan.count, plan.layout).to(key.device)
    order = places.argsort()
    key, value = (x.index_select(2, order) for x in (key, value))
    rows = torch.cat([places[plan.tokens(process)] for process in asking])
    whole = len(rows) == len(places)
    if whole:
        query, rows = query.index_select(2, order), rows.sort().values
    real = None
    if plan.real is not None:
        real = plan.real.movedim(0, 1).flatten(1).index_select(1, order)
    own = query.shape[3] ** -0.5 if site.scale is None else site.scale
    query = query if own == plan.scale else query * (plan.scale / own)
    allowed = plan.allowed(rows, torch.arange(len(order), device=key.device), real)
    mixed: Tensor = site(query, key, value, mask=allowed, causal=False)
    return mixed.index_select(2, places) if whole else mixed


def _all_real(
    padding_mask: Tensor | None, query: Tensor, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Padding masks of all, (P, b, n / P): bytes that the formulas leave out."""
    have = torch.tensor([padding_mask is not None], dtype=torch.uint8, device=query.device)
    if not any(bool(x) for x in from_all(have, group)):
        return None
    own = query.new_ones(query.shape[0], query.shape[2], dtype=torch.uint8)
    if padding_mask is not None:
        own = padding_mask.to(torch.uint8).contiguous()
    return torch.stack(from_all(own, group)).bool()


def _fault(*checks: Callable[[], None]) -> Exception | None:
    """What the first check that raises says is wrong."""
    try:
        for check in checks:
            check()
    except (TypeError, ValueError) as error:
        return error
    return None


def _check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: Method,
    layout: Layout,
    padding_mask: Tensor | None,
    mask_fn: MaskFunction | None,
    scale: float | None,
    dropout: float,
) -> None:
    check_layout(layout)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if dropout:
        raise ValueError(f"dropout must be 0 where processes share a sequence, got {dropout}")
    check_arguments(query, key, value, mask=None, bias=None, scale=scale, dropout=dropout)
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key must have the tokens of query, {query.shape[2]}, got {key.shape[2]}: a process "
            "holds both of the same tokens"
        )
    if layout == "zigzag" and query.shape[2] % 2:
        raise ValueError(f"layout='zigzag' needs an even number of tokens, got {query.shape[2]}")
    if padding_mask is not None:
        check_padding(padding_mask, query.shape[0], query.shape[2], of="tokens of this process")
    if mask_fn is not None:
        first = torch.zeros(1, 1, dtype=torch.int64, device=query.device)
        _check_found(mask_fn(first, first))


def _check_found(found: Tensor) -> None:
    if found.dtype != torch.bool:
        raise TypeError(f"mask_fn must give booleans (True = may attend): {found.dtype}")


def _check_site(site: Attend | None, method: Method, return_lse: bool) -> None:
    if site is None:
        return
    if site.dropout and site.training:
        raise ValueError(f"site must have dropout 0 here, got {site.dropout}")
    if site.attachments is None:
        return
    if method == "ring":
        raise ValueError(
            "site has attachments, but method='ring' never holds a row of weights: use 'allgather'"
        )
    if return_lse:
        raise ValueError("return_lse=True is not for a site with attachments: edits may change it")
