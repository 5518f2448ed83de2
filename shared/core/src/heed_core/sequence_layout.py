"""Which tokens of a sequence each of several processes holds.

Contiguous, process r of P holds the r-th part. In a zigzag the sequence is cut into 2 P chunks, of
which process r holds chunks r and 2 P - 1 - r: under causality all have the same work.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from heed_core.exchange import from_all

Layout = Literal["contiguous", "zigzag"]
"""Which tokens a process holds."""


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
    check_layout(layout)
    parts = world if layout == "contiguous" else 2 * world
    if length % parts:
        raise ValueError(f"length must be a multiple of {parts} for {world} processes: {length}")
    chunks = torch.arange(length).view(parts, -1)
    return chunks[rank] if layout == "contiguous" else chunks[[rank, parts - 1 - rank]].flatten()


def padded_length(length: int, world: int, layout: Layout = "contiguous") -> int:
    """The least length that P processes can share."""
    check_layout(layout)
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
    parts = from_all(x.detach().contiguous(), group)
    order = all_positions(world, x.shape[dim], layout).to(x.device).argsort()
    whole = torch.cat(parts, dim=dim).index_select(dim, order)
    return whole if length is None else whole.narrow(dim, 0, length)


def all_positions(world: int, count: int, layout: Layout) -> Tensor:
    """The places of all, in the order of the processes; each holds `count` tokens."""
    return torch.cat([global_positions(r, world, world * count, layout) for r in range(world)])


def check_layout(layout: Layout) -> None:
    """Raise a ValueError if there is no such layout."""
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {get_args(Layout)}, got {layout!r}")
