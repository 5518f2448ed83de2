"""Attention of a sequence that several processes share, each with a part of the tokens.

Every process holds n / P tokens of queries, keys and values and gets its rows of the exact result,
with gradients. With e bytes per number and B samples, H query and G key heads of width D, a process
receives forwards

* `ring` (Liu et al., arXiv 2310.01889): keys and values go round, 2 (P - 1) B G (n / P) D e, and
  memory does not depend on n; backwards the blocks go round again, with their gradients in float32;
* `allgather`: keys and values of all, the same bytes; memory n;
* `ulysses` (Jacobs et al., arXiv 2309.14509): tokens are exchanged for heads and back,
  (P - 1) / P (2 B H + 2 B G) (n / P) D e; heads must divide by P; memory n H / P.

Outputs and gradients are summed in float32 at least. With layout "zigzag" the sequence is cut into
2 P chunks, of which process r holds chunks r and 2 P - 1 - r: causal, all have the same work.
Lengths that do not divide are padded (`shard_sequence`); padded keys are hidden by a padding mask.
Rotary codes need the places of `global_positions`. There is no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from heed_core.precision import at_least_float32

Layout = Literal["contiguous", "zigzag"]
"""Which tokens a process holds."""

Method = Literal["ring", "allgather", "ulysses"]
"""How processes exchange them."""

MaskFunction = Callable[[Tensor, Tensor], Tensor]
"""(places of queries (n, 1), places of keys (1, m)) -> whether they may attend, boolean (n, m)."""


class CommCounter:
    """Counts the bytes that this process receives from others while it is entered."""

    _active: list[CommCounter] = []  # noqa: RUF012 (shared on purpose: a stack of those entered)

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> CommCounter:
        CommCounter._active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        CommCounter._active.remove(self)

    @classmethod
    def note(cls, received: int) -> None:
        """Add bytes to all counters that are entered."""
        for counter in cls._active:
            counter.received += received


def global_positions(
    rank: int, world: int, length: int, layout: Layout = "contiguous"
) -> Int[Tensor, " n"]:
    """The places in the whole sequence of the tokens that a process holds.

    Args:
        rank: Of the process.
        world: P.
        length: Of the padded sequence: a multiple of P, of 2 P for "zigzag".
        layout: Which tokens a process holds.
    """
    _check_layout(layout)
    parts = world if layout == "contiguous" else 2 * world
    if length % parts:
        raise ValueError(f"length must be a multiple of {parts} for {world} processes: {length}")
    chunks = torch.arange(length).view(parts, -1)
    return chunks[rank] if layout == "contiguous" else chunks[[rank, parts - 1 - rank]].flatten()


def padded_length(length: int, world: int, layout: Layout = "contiguous") -> int:
    """The least length that P processes can share."""
    _check_layout(layout)
    parts = world if layout == "contiguous" else 2 * world
    return -(-length // parts) * parts


def shard_sequence(
    x: Tensor, group: dist.ProcessGroup | None, *, layout: Layout = "contiguous", dim: int
) -> Tensor:
    """The part of a whole tensor that this process holds, after padding with zeros (False)."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    length = padded_length(x.shape[dim], world, layout)
    fill = x.new_zeros(*x.shape[:dim], length - x.shape[dim], *x.shape[dim:][1:])
    places = global_positions(rank, world, length, layout).to(x.device)
    return torch.cat([x, fill], dim=dim).index_select(dim, places)


def unshard_sequence(
    x: Tensor,
    group: dist.ProcessGroup | None,
    *,
    layout: Layout = "contiguous",
    dim: int,
    length: int | None = None,
) -> Tensor:
    """The whole tensor from the parts of all, cut to a length; no gradient flows."""
    world = dist.get_world_size(group)
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    order = _all_places(world, x.shape[dim], layout).to(x.device).argsort()
    whole = torch.cat(parts, dim=dim).index_select(dim, order)
    return whole if length is None else whole.narrow(dim, 0, length)


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
) -> Float[Tensor, "b h n e"]:
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

    Raises:
        ValueError: An unknown option, or shapes that do not fit or differ between processes.
        TypeError: A mask that is not boolean.
    """
    _check_call(query, key, value, method, layout, padding_mask, dropout)
    world = dist.get_world_size(group)
    _check_alike(query, key, value, group)
    plan = _Plan(
        group=group,
        layout=layout,
        causal=causal,
        mask_fn=mask_fn,
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        places=_all_places(world, query.shape[2], layout).to(query.device).view(world, -1),
        real=_all_real(padding_mask, query, group),
    )
    if method == "ring":
        found: Tensor = _Ring.apply(query, key, value, plan)  # type: ignore[no-untyped-call]
        return found
    if method == "allgather":
        keys, values = (
            _Gather.apply(x, group).movedim(0, 2).flatten(2, 3)  # type: ignore[no-untyped-call]
            for x in (key, value)
        )
        return _whole(query, keys, values, plan, plan.places[dist.get_rank(group)])
    if query.shape[1] % world or key.shape[1] % world:
        raise ValueError(
            f"method='ulysses' needs heads that {world} processes divide, got query "
            f"{query.shape[1]} and key {key.shape[1]}"
        )
    query, key, value = (_heads_for_tokens(x, group) for x in (query, key, value))
    mixed = _whole(query, key, value, plan, plan.places.flatten())
    return _tokens_for_heads(mixed, group)


class _Plan:
    """What all blocks of a call have in common."""

    def __init__(self, **given: Any) -> None:
        self.group: dist.ProcessGroup | None = given["group"]
        self.layout: Layout = given["layout"]
        self.causal: bool = given["causal"]
        self.mask_fn: MaskFunction | None = given["mask_fn"]
        self.scale: float = given["scale"]
        self.places: Tensor = given["places"]  # (P, n / P)
        self.real: Tensor | None = given["real"]  # (P, b, n / P)

    def allowed(self, asking: Tensor, places: Tensor, real: Tensor | None) -> Tensor | None:
        """Who may attend to whom, broadcastable to (b, 1, n, m); None = all."""
        rows, columns = asking[:, None], places[None]
        parts: list[Tensor] = []
        if self.causal:
            parts.append(columns <= rows)
        if self.mask_fn is not None:
            found = self.mask_fn(rows, columns)
            if found.dtype != torch.bool:
                raise TypeError(f"mask_fn must give booleans (True = may attend): {found.dtype}")
            parts.append(found)
        if real is not None:
            parts.append(real[:, None, None])
        total = None
        for part in parts:
            total = part if total is None else total & part
        return total


def _scores(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    """(b, g, h / g, n, m), in float32 at least."""
    scores = _grouped(query, key) @ at_least_float32(key)[:, :, None].mT * scale
    return scores if allowed is None else scores.masked_fill(~_lifted(allowed), -torch.inf)


def _lifted(allowed: Tensor) -> Tensor:
    return allowed[:, :, None] if allowed.dim() == 4 else allowed


def _grouped(rows: Tensor, key: Tensor) -> Tensor:
    """(b, h, n, d) -> (b, g, h / g, n, d)."""
    batch, heads, n, width = rows.shape
    groups = key.shape[1]
    return at_least_float32(rows).reshape(batch, groups, heads // groups, n, width)


def _whole(query: Tensor, key: Tensor, value: Tensor, plan: _Plan, asking: Tensor) -> Tensor:
    """Attention to all keys, in the order of the processes."""
    real = None if plan.real is None else plan.real.movedim(0, 1).flatten(1)
    allowed = plan.allowed(asking, plan.places.flatten(), real)
    scores = _scores(query, key, plan.scale, allowed)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    shares = (scores - top).exp()
    total = shares.sum(-1, keepdim=True)
    shares = shares / total.masked_fill(total == 0, 1.0)
    mixed = shares @ at_least_float32(value)[:, :, None]
    return mixed.flatten(1, 2).to(query.dtype)


class _Ring(torch.autograd.Function):
    """Blocks of keys and values go round; sums are merged by their log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: _Plan) -> Tensor:
        rank, world = dist.get_rank(plan.group), dist.get_world_size(plan.group)
        asked = _grouped(query, key)
        out = asked.new_zeros(*asked.shape[:-1], value.shape[3])
        lse = asked.new_full(asked.shape[:-1], -torch.inf)
        block = [key.contiguous(), value.contiguous()]
        for step in range(world):
            waiting = _pass_on(block, plan.group) if step + 1 < world else None
            source = (rank - step) % world
            for rows, columns in _pieces(plan, rank, source):
                _merge(out, lse, query, block[0], block[1], plan, rank, source, rows, columns)
            if waiting is not None:
                block = waiting()
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, out, lse)
        return out.flatten(1, 2).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        query, key, value, out, lse = ctx.saved_tensors
        rank, world = dist.get_rank(plan.group), dist.get_world_size(plan.group)
        grad = _grouped(grads[0], key)
        delta = (grad * out).sum(-1, keepdim=True)
        to_query = torch.zeros_like(_grouped(query, key))
        block = [key.contiguous(), value.contiguous()]
        back = [torch.zeros_like(at_least_float32(x)) for x in (key, value)]
        # After P steps the gradients of a block, which travel with it, are home again.
        for step in range(world):
            source = (rank - step) % world
            for rows, columns in _pieces(plan, rank, source):
                weights = _weights(lse, query, block[0], plan, rank, source, rows, columns)
                part, spread = grad[..., rows, :], at_least_float32(block[1])[:, :, columns]
                back[1][:, :, columns] += (weights.mT @ part).sum(2)
                inner = weights * (part @ spread[:, :, None].mT - delta[..., rows, :]) * plan.scale
                keys = at_least_float32(block[0])[:, :, columns]
                to_query[..., rows, :] += inner @ keys[:, :, None]
                asking = _grouped(query[:, :, rows], key)
                back[0][:, :, columns] += (inner.mT @ asking).sum(2)
            if world > 1:
                travels = [*block, *back] if step + 1 < world else back
                moved = _pass_on(travels, plan.group)()
                block, back = (moved[:2], moved[2:]) if step + 1 < world else (block, moved)
        return (
            to_query.flatten(1, 2).to(query.dtype),
            back[0].to(key.dtype),
            back[1].to(value.dtype),
            None,
        )


def _pieces(plan: _Plan, rank: int, source: int) -> list[tuple[slice, slice]]:
    """Rows and columns of a block that may hold permitted pairs: none, all, or half of them."""
    count = plan.places.shape[1]
    everything, half = slice(0, count), count // 2
    if not plan.causal or source == rank:
        return [(everything, everything)]
    if plan.layout == "contiguous":
        return [(everything, everything)] if source < rank else []
    if source < rank:
        return [(everything, slice(0, half))]
    return [(slice(half, count), everything)]


def _block_scores(
    query: Tensor, key: Tensor, plan: _Plan, rank: int, source: int, rows: slice, columns: slice
) -> Tensor:
    real = None if plan.real is None else plan.real[source][:, columns]
    allowed = plan.allowed(plan.places[rank][rows], plan.places[source][columns], real)
    return _scores(query[:, :, rows], key[:, :, columns], plan.scale, allowed)


def _merge(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: _Plan,
    rank: int,
    source: int,
    rows: slice,
    columns: slice,
) -> None:
    """Add a block to the sums of its rows, in place."""
    scores = _block_scores(query, key, plan, rank, source, rows, columns)
    seen = scores.logsumexp(-1)
    total = torch.logaddexp(lse[..., rows], seen)
    # A row that has seen nothing has no total: its old and new parts are both 0.
    safe = total.masked_fill(total.isneginf(), 0.0)
    mixed = (scores - safe[..., None]).exp() @ at_least_float32(value)[:, :, columns][:, :, None]
    kept = (lse[..., rows] - safe).exp()[..., None]
    out[..., rows, :] = out[..., rows, :] * kept + mixed
    lse[..., rows] = total


def _weights(
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    plan: _Plan,
    rank: int,
    source: int,
    rows: slice,
    columns: slice,
) -> Tensor:
    total = lse[..., rows]
    safe = total.masked_fill(total.isneginf(), 0.0)
    return (_block_scores(query, key, plan, rank, source, rows, columns) - safe[..., None]).exp()


def _pass_on(tensors: list[Tensor], group: dist.ProcessGroup | None) -> Callable[[], list[Tensor]]:
    """Begin to send tensors to the next process; the call of the result waits for the previous."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = ((rank + 1) % world, (rank - 1) % world)
    if group is not None:
        after, before = (dist.get_global_rank(group, r) for r in (after, before))
    arriving = [torch.empty_like(x) for x in tensors]
    moves = [dist.P2POp(dist.isend, x, after, group) for x in tensors]
    moves += [dist.P2POp(dist.irecv, x, before, group) for x in arriving]
    waiting = dist.batch_isend_irecv(moves)
    CommCounter.note(sum(x.numel() * x.element_size() for x in arriving))

    def wait() -> list[Tensor]:
        for one in waiting:
            one.wait()
        return arriving

    return wait


class _Gather(torch.autograd.Function):
    """The tensors of all processes, (P, ...); gradients are summed and sent home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.kind = group, x.dtype
        world = dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, x.contiguous(), group=group)
        CommCounter.note((world - 1) * x.numel() * x.element_size())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = at_least_float32(grads[0]).contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)].to(ctx.kind), None


class _Exchange(torch.autograd.Function):
    """Part i of the first axis goes to process i; what comes from process i takes its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, x.contiguous(), group=group)
    world = dist.get_world_size(group)
    CommCounter.note((world - 1) * x.numel() // world * x.element_size())
    return result


def _heads_for_tokens(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(b, h, n / P, d) -> (b, h / P, n, d)."""
    world = dist.get_world_size(group)
    batch, heads, n, width = x.shape
    parts = x.reshape(batch, world, heads // world, n, width).movedim(1, 0)
    found: Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return found.movedim(0, 2).flatten(2, 3)


def _tokens_for_heads(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(b, h / P, n, d) -> (b, h, n / P, d)."""
    world = dist.get_world_size(group)
    batch, heads, n, width = x.shape
    parts = x.reshape(batch, heads, world, n // world, width).movedim(2, 0)
    found: Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return found.movedim(0, 1).flatten(1, 2)


def _all_places(world: int, count: int, layout: Layout) -> Tensor:
    return torch.cat([global_positions(r, world, world * count, layout) for r in range(world)])


def _all_real(
    padding_mask: Tensor | None, query: Tensor, group: dist.ProcessGroup | None
) -> Tensor | None:
    """Padding masks of all, (P, b, n / P): bytes that the formulas leave out."""
    have = torch.tensor([padding_mask is not None], dtype=torch.uint8, device=query.device)
    world = dist.get_world_size(group)
    haves = [torch.empty_like(have) for _ in range(world)]
    dist.all_gather(haves, have, group=group)
    if not any(bool(x) for x in haves):
        return None
    own = query.new_ones(query.shape[0], query.shape[2], dtype=torch.uint8)
    if padding_mask is not None:
        own = padding_mask.to(torch.uint8).contiguous()
    parts = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts).bool()


def _check_layout(layout: Layout) -> None:
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")


def _check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: Method,
    layout: Layout,
    padding_mask: Tensor | None,
    dropout: float,
) -> None:
    _check_layout(layout)
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if dropout:
        raise ValueError(f"dropout must be 0 where processes share a sequence, got {dropout}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels), got {tuple(x.shape)}"
            )
    fits = key.shape[0] == query.shape[0] and key.shape[2:] == query.shape[2:]
    if not fits or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "key must have the batch, tokens and channels of query, and heads that divide its: "
            f"{tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must agree with key {tuple(key.shape)}: {tuple(value.shape)}")
    if layout == "zigzag" and query.shape[2] % 2:
        raise ValueError(f"layout='zigzag' needs an even number of tokens, got {query.shape[2]}")
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool:
            raise TypeError(
                f"padding_mask must be boolean, True = real token, got {padding_mask.dtype}"
            )
        if padding_mask.shape != (query.shape[0], query.shape[2]):
            raise ValueError(
                f"padding_mask must be {(query.shape[0], query.shape[2])}, got "
                f"{tuple(padding_mask.shape)}"
            )


def _check_alike(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Raise on all processes if one holds another shape, instead of waiting for ever."""
    own = torch.tensor([*query.shape, *key.shape, *value.shape], device=query.device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    if any(not torch.equal(part, parts[0]) for part in parts):
        shapes = [tuple(part[:4].tolist()) for part in parts]
        raise ValueError(f"query must have one shape on all processes, got {shapes}")
