"""Boolean masks, True = may attend, in shapes that broadcast to (b, h, n, m).

Builders return the smallest such shape, so that nothing is expanded before a kernel needs it. They
are plain tensor
functions: put them together with `combine`, hand the result to `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Device = torch.device | str | None


def causal(n: int, m: int | None = None, *, device: Device = None) -> Bool[Tensor, "n m"]:
    """Query i sees key j iff j <= i + m - n: the last query sees every key.

    Args:
        n: Queries.
        m: Keys; default n.
        device: Where to build it.
    """
    m = n if m is None else m
    _not_negative(n=n, m=m)
    return _distance(n, m, device) <= 0


def padding(lengths: Int[Tensor, " b"], m: int) -> Bool[Tensor, "b 1 1 m"]:
    """Key j of sample b is real iff j < lengths[b].

    Raises:
        TypeError: Lengths that are not integers.
        ValueError: Lengths that are not one per sample.
    """
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.ndim != 1:
        raise ValueError(f"lengths must have shape (batch,), got {tuple(lengths.shape)}")
    _not_negative(m=m)
    columns = torch.arange(m, device=lengths.device)
    return (columns < lengths.unsqueeze(1))[:, None, None, :]


def keys(real: Bool[Tensor, "b m"]) -> Bool[Tensor, "b 1 1 m"]:
    """A mask from "is this token real", one per sample and key.

    Raises:
        TypeError: `real` is not boolean.
        ValueError: `real` is not (batch, keys).
    """
    if real.dtype != torch.bool:
        raise TypeError(f"real must be boolean (True = real token), got {real.dtype}")
    if real.ndim != 2:
        raise ValueError(f"real must have shape (batch, keys), got {tuple(real.shape)}")
    return real[:, None, None, :]


def window(
    n: int,
    m: int | None = None,
    *,
    left: int | None = None,
    right: int | None = None,
    device: Device = None,
) -> Bool[Tensor, "n m"]:
    """Query i, which stands at key position p = i + m - n, sees keys p - left .. p + right.

    Args:
        n: Queries.
        m: Keys; default n.
        left: Keys seen before the own position; None = all.
        right: Keys seen after it; None = all, 0 = a causal window.
        device: Where to build it.

    Raises:
        ValueError: A negative number.
    """
    m = n if m is None else m
    _not_negative(n=n, m=m, left=left, right=right)
    distance = _distance(n, m, device)
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    if left is not None:
        mask = mask & (distance >= -left)
    if right is not None:
        mask = mask & (distance <= right)
    return mask


def window_nd(
    shape: Sequence[int], *, reach: int | Sequence[int], device: Device = None
) -> Bool[Tensor, "n n"]:
    """Cells of a grid see the cells at most `reach` away along every axis.

    Args:
        shape: The grid, (H, W) or any number of axes; tokens are its cells in row-major order.
        reach: For every axis, or one for each; 0 sees only the own index of that axis.
        device: Where to build it.

    Raises:
        ValueError: A negative number, or another count of reaches than axes.
    """
    reaches = [reach] * len(shape) if isinstance(reach, int) else list(reach)
    if len(reaches) != len(shape) or not shape:
        raise ValueError(f"reach must have one number per axis of shape {tuple(shape)}: {reaches}")
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for size, far in zip(shape, reaches, strict=True):
        axis = window(size, left=far, right=far, device=device)
        mask = _kronecker(mask, axis)
    return mask


def blocks(sizes: Sequence[int], *, device: Device = None) -> Bool[Tensor, "n n"]:
    """Block-diagonal: consecutive runs of tokens see only their own run.

    Raises:
        ValueError: A negative size.
    """
    for size in sizes:
        _not_negative(size=size)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    owner = owner.to(device)
    return owner.unsqueeze(1) == owner


def documents(
    query_ids: Int[Tensor, "b n"], key_ids: Int[Tensor, "b m"] | None = None
) -> Bool[Tensor, "b 1 n m"]:
    """Tokens see the tokens of the same document.

    Args:
        query_ids: The document of each query.
        key_ids: The document of each key; default those of the queries.
    """
    key_ids = query_ids if key_ids is None else key_ids
    if query_ids.ndim != 2 or key_ids.ndim != 2 or len(query_ids) != len(key_ids):
        raise ValueError(
            "query_ids and key_ids must be (batch, tokens) of one batch, got "
            f"{tuple(query_ids.shape)} and {tuple(key_ids.shape)}"
        )
    return (query_ids.unsqueeze(2) == key_ids.unsqueeze(1)).unsqueeze(1)


def prefix(n: int, lengths: Int[Tensor, " b"]) -> Bool[Tensor, "b 1 n n"]:
    """Prefix language model: causal, but the first lengths[b] tokens are seen by all."""
    return causal(n, device=lengths.device) | padding(lengths, n)


def combine(*masks: Bool[Tensor, "*#mask"] | None) -> Bool[Tensor, "*#mask"] | None:
    """AND of masks, None = everything; the result is as small as broadcasting allows.

    Raises:
        TypeError: A mask that is not boolean.
        ValueError: Masks that do not broadcast to one shape.
    """
    given = [mask for mask in masks if mask is not None]
    for mask in given:
        if mask.dtype != torch.bool:
            raise TypeError(f"masks must be boolean (True = may attend), got {mask.dtype}")
    result: Tensor | None = None
    for mask in given:
        try:
            result = mask if result is None else result & mask
        except RuntimeError as error:
            shapes = [tuple(mask.shape) for mask in given]
            raise ValueError(f"masks of shapes {shapes} do not broadcast together") from error
    return result


def _distance(n: int, m: int, device: Device) -> Int[Tensor, "n m"]:
    """Key position minus query position, queries aligned to the last keys."""
    rows = torch.arange(n, device=device).unsqueeze(1) + (m - n)
    return torch.arange(m, device=device) - rows


def _kronecker(a: Bool[Tensor, "p p"], b: Bool[Tensor, "q q"]) -> Bool[Tensor, "pq pq"]:
    side = a.shape[0] * b.shape[0]
    return (a[:, None, :, None] & b[None, :, None, :]).reshape(side, side)


def _not_negative(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 0:
            raise ValueError(f"{name} must not be negative, got {number}")
