"""What is asked of tokens, contexts and padding masks, with one answer for what does not fit."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor


def check_real(**tensors: Tensor | None) -> None:
    """Raise a TypeError that names a tensor that holds no floating-point numbers."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_some(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names (batch, *spatial, channels) without a single token."""
    for name, x in tensors.items():
        if x is not None and 0 in x.shape[1:-1]:
            raise ValueError(f"{name} must have at least one token, got {tuple(x.shape)}")


def check_tokens(name: str, x: Tensor, dim: int, *, batch: int | None = None) -> None:
    """Raise a ValueError for tokens of another shape, a TypeError for what is no real number.

    Args:
        name: Of the argument.
        x: Must be (batch, tokens, dim).
        dim: Channels.
        batch: Samples; any number if not given.
    """
    if x.dim() != 3 or x.shape[2] != dim or (batch is not None and x.shape[0] != batch):
        samples = "batch" if batch is None else f"batch {batch}"
        raise ValueError(f"{name} must be ({samples}, tokens, {dim}), got {tuple(x.shape)}")
    check_real(**{name: x})


def check_padding(
    padding_mask: Tensor, batch: int, length: int, *, of: str = "tokens attended to"
) -> None:
    """Raise a TypeError or ValueError for a padding mask of another type or shape."""
    if padding_mask.dtype != torch.bool:
        raise TypeError(
            f"padding_mask must be boolean, True = real token, got {padding_mask.dtype}"
        )
    if tuple(padding_mask.shape) != (batch, length):
        raise ValueError(
            f"padding_mask must be {(batch, length)} (batch, {of}), got {tuple(padding_mask.shape)}"
        )


def with_padding(
    mask: Bool[Tensor, "*#mask"] | None, padding_mask: Bool[Tensor, "b m"] | None, key: Tensor
) -> Bool[Tensor, "*#mask"] | None:
    """The permission of a mask and of a padding mask of the keys (b, g, m, d) together.

    Raises:
        ValueError: A padding mask of another shape.
        TypeError: One that is not boolean.
    """
    if padding_mask is None:
        return mask
    check_padding(padding_mask, key.shape[0], key.shape[2])
    real = padding_mask[:, None, None]
    return real if mask is None else mask & real
