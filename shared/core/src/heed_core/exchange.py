"""What processes that share a sequence send each other, with gradients: rings, all to all.

`CommCounter` counts the bytes that arrive. Every function here is collective: all processes of the
group call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from heed_core.precision import at_least_float32

MOST_SAID = 256
"""Bytes that processes tell each other of a call or its fault."""


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


def pass_on(tensors: list[Tensor], group: dist.ProcessGroup | None) -> Callable[[], list[Tensor]]:
    """Begin to send tensors to the next process; the call of the result waits for the previous."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = ((rank + 1) % world, (rank - 1) % world)
    if group is not None:
        after, before = (dist.get_global_rank(group, r) for r in (after, before))
    arriving = [torch.empty_like(x) for x in tensors]
    moves = [dist.P2POp(dist.isend, x, after, group) for x in tensors]
    moves += [dist.P2POp(dist.irecv, x, before, group) for x in arriving]
    waiting = dist.batch_isend_irecv(moves)
    CommCounter.note(sum(_bytes(x) for x in arriving))

    def wait() -> list[Tensor]:
        for one in waiting:
            one.wait()
        return arriving

    return wait


def gather_tokens(
    x: Float[Tensor, "b g n d"], group: dist.ProcessGroup | None
) -> Float[Tensor, "b g m d"]:
    """The tokens of all processes, in the order of the processes.

    Backwards the gradients are summed in float32 at least and each process gets those of its own
    tokens: as many numbers as forwards.
    """
    found: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return found.movedim(0, 2).flatten(2, 3)


def head_shares(heads: int, world: int) -> list[int]:
    """Heads of each process: as even as can be."""
    return [heads * (rank + 1) // world - heads * rank // world for rank in range(world)]


def heads_for_tokens(
    x: Float[Tensor, "b h n d"], group: dist.ProcessGroup | None
) -> Float[Tensor, "b own m d"]:
    """All tokens of this process's share of the heads, from all heads of its tokens."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shares = head_shares(x.shape[1], world)
    found = _exchange(x.transpose(0, 1), shares, [shares[rank]] * world, group)  # (P own, b, n, d)
    by_process = found.reshape(world, shares[rank], *found.shape[1:])
    return by_process.permute(2, 1, 0, 3, 4).flatten(2, 3)


def tokens_for_heads(
    x: Float[Tensor, "b own m d"], heads: int, group: dist.ProcessGroup | None
) -> Float[Tensor, "b h n d"]:
    """The way back of `heads_for_tokens`."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shares = head_shares(heads, world)
    batch, own, tokens, width = x.shape
    parts = x.reshape(batch, own, world, tokens // world, width).permute(2, 1, 0, 3, 4)
    return _exchange(parts.flatten(0, 1), [shares[rank]] * world, shares, group).transpose(0, 1)


def sum_of_all(
    x: Float[Tensor, "*shape"], group: dist.ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """The sum over all processes, bit for bit the same on all, added in float32 at least.

    Backwards the gradient passes: what follows is the same computation on all processes. A process
    receives 2 (P - 1) / P of the bytes of `x`, whose numbers are padded until P divides them.
    """
    found: Tensor = _SumOfAll.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def same_for_all(
    x: Float[Tensor, "*shape"], group: dist.ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """A tensor that all processes hold, on its way to what they do not do alike.

    Backwards the gradients of all are summed, as in `sum_of_all`.
    """
    found: Tensor = _SameForAll.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def from_all(x: Shaped[Tensor, "*shape"], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all processes, not counted and without gradients."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def check_together(
    call: str,
    fault: Exception | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> None:
    """Raise on all processes where one cannot make its call or makes another: none waits for ever.

    Args:
        call: What must be the same on all: shapes, types, options. At most `MOST_SAID` bytes count.
        fault: What this process found wrong with its own call.
        group: The processes; all if not given.
        device: Where tensors can be sent from.

    Raises:
        Exception: The fault itself.
        ValueError: Another process has one, or makes another call; with what each says.
    """
    if fault is not None and not (dist.is_available() and dist.is_initialized()):
        raise fault
    said = (call if fault is None else f"!{fault}").encode()[:MOST_SAID].ljust(MOST_SAID)
    told = from_all(torch.tensor(list(said), dtype=torch.uint8, device=device), group)
    if fault is not None:
        raise fault
    if all(torch.equal(one, told[0]) for one in told):
        return
    lines = [bytes(one.tolist()).decode(errors="ignore").strip() for one in told]
    faulty = any(line.startswith("!") for line in lines)
    shown = [
        f"process {rank}: {line.removeprefix('!')}"
        for rank, line in enumerate(lines)
        if line.startswith("!") or not faulty
    ]
    what = "a process cannot make its call" if faulty else "all processes must make the same call"
    raise ValueError(f"{what}; {'; '.join(shown)}")


class _Gather(torch.autograd.Function):
    """The tensors of all processes, (P, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.kind = group, x.dtype
        world = dist.get_world_size(group)
        CommCounter.note((world - 1) * _bytes(x))
        return torch.stack(from_all(x.contiguous(), group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter whose sum has one order on every back-end: that of the processes.
        parts = at_least_float32(grads[0])
        world, batch = parts.shape[:2]
        own = _exchanged(parts.flatten(0, 1), [batch] * world, [batch] * world, ctx.group)
        return own.view(parts.shape).sum(0).to(ctx.kind), None


class _Exchange(torch.autograd.Function):
    """Rows of the first axis go to the processes in turn, so many to each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return _exchanged(x, given, taken, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], ctx.taken, ctx.given, ctx.group), None, None, None


class _SumOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SameForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Each process sums a share of the numbers, in the order of the processes, for all."""
    world = dist.get_world_size(group)
    flat = x.flatten()
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % world)])
    share = flat.numel() // world
    parts = _exchanged(flat, [share] * world, [share] * world, group).view(world, share)
    own = at_least_float32(parts).sum(0).to(x.dtype)
    CommCounter.note((world - 1) * _bytes(own))
    return torch.cat(from_all(own, group))[: x.numel()].view(x.shape)


def _exchange(
    x: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    found: Tensor = _Exchange.apply(x, given, taken, group)  # type: ignore[no-untyped-call]
    return found


def _exchanged(
    x: Tensor, given: Sequence[int], taken: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    result = x.new_empty(sum(taken), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), list(taken), list(given), group=group)
    rank = dist.get_rank(group)
    CommCounter.note(_bytes(result) - _bytes(result[: taken[rank]]))
    return result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
