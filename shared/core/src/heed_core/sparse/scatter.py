"""Reductions over groups of rows, and the distinct voxels of a cloud of points.

No dependency beyond torch; deterministic on the CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from heed_core.sparse.rulebook import Cell, linear_keys

Reduction = Literal["max", "min", "sum", "mean"]


def scatter_reduce_rows(
    src: Float[Tensor, "rows channels"],
    index: Int64[Tensor, " rows"],
    n: int,
    op: Reduction,
) -> Float[Tensor, "n channels"]:
    """Reduce the rows of each group; a group without rows gives zeros.

    Half-precision input is reduced in float32. Where several rows of a group share the extremum of
    a channel, its gradient is spread evenly over them.

    Args:
        src: The rows.
        index: The group of each row, in [0, n).
        n: Number of groups.
        op: "max", "min", "sum" or "mean".

    Raises:
        ValueError: Sizes that do not fit, or an unknown `op`.

    Example:
        >>> scatter_reduce_rows(torch.tensor([[1.0], [5.0]]), torch.tensor([0, 0]), 2, "max")
        tensor([[5.],
                [0.]])
    """
    if src.dim() != 2 or index.shape != src.shape[:1]:
        raise ValueError(
            f"src must be (rows, channels) and index (rows,), got {tuple(src.shape)} and "
            f"{tuple(index.shape)}"
        )
    names = {"max": "amax", "min": "amin", "sum": "sum", "mean": "mean"}
    if op not in names:
        raise ValueError(f"op must be one of {sorted(names)}, got {op!r}")
    wide = src.to(torch.promote_types(src.dtype, torch.float32))
    groups = index[:, None].expand_as(wide)
    empty = wide.new_zeros(n, src.shape[1])
    if op in ("sum", "mean"):
        total = empty.index_add(0, index, wide)
        if op == "sum":
            return total.to(src.dtype)
        counts = torch.bincount(index, minlength=n).clamp_(min=1)
        return (total / counts[:, None]).to(src.dtype)
    return empty.scatter_reduce(0, groups, wide, names[op], include_self=False).to(src.dtype)


def unique_voxels(
    coords: Int[Tensor, "points coordinates"], shape: Cell
) -> tuple[Int[Tensor, "n coordinates"], Int64[Tensor, " points"], Int64[Tensor, " n"]]:
    """The distinct rows of `coords`, sorted lexicographically.

    Args:
        coords: Number in the batch, then one index per spatial axis, per point.
        shape: Size of the grid per spatial axis; every index must lie inside.

    Returns:
        The voxels, the row of each point's voxel, and the number of points of each voxel.

    Raises:
        ValueError: An index outside of the grid; the message names its row.
    """
    check_coordinates(coords, shape)
    batch_size = 1 if coords.shape[0] == 0 else int(coords[:, 0].max()) + 1
    keys = linear_keys(coords, shape, batch_size)
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    voxels = coords.new_empty(counts.shape[0], coords.shape[1])
    voxels[inverse] = coords  # all points of a voxel write the same row
    return voxels, inverse, counts


def check_coordinates(
    coords: Int[Tensor, "n coordinates"], shape: Cell, batch_size: int | None = None
) -> None:
    """Refuse coordinates that are not (batch, *spatial) integers inside of the grid.

    Raises:
        TypeError: The coordinates are not integers.
        ValueError: Another shape, or a row outside of the grid, which the message names.
    """
    if coords.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"coords must be int32 or int64, got {coords.dtype}")
    if coords.dim() != 2 or coords.shape[1] != 1 + len(shape):
        raise ValueError(
            f"coords must be (n, 1 + {len(shape)}) for a grid of {tuple(shape)}, got "
            f"{tuple(coords.shape)}"
        )
    if coords.shape[0] == 0 or torch.compiler.is_compiling():
        return
    low, high = (x.tolist() for x in coords.aminmax(dim=0))
    batches = high[0] + 1 if batch_size is None else batch_size
    limits = (batches, *shape)
    if min(low) >= 0 and all(top < limit for top, limit in zip(high, limits, strict=True)):
        return
    wrong = ((coords < 0) | (coords >= coords.new_tensor(limits))).any(dim=1)
    row = int(wrong.nonzero()[0])
    raise ValueError(
        f"coords row {row} is {coords[row].tolist()}, outside of a batch of {batches} grids of "
        f"{tuple(shape)}"
    )
