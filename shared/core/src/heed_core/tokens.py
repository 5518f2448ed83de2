"""What is asked of tokens, contexts and padding masks, with one answer for what does not fit."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Pattern = Literal["self", "causal self", "cross", "causal cross"]
"""Who attends to whom: tokens to themselves or to a context (cross), and whether outputs may depend
on what comes later (causal). In a causal cross-attention the context is whole and the tokens that
ask are made one after the other: each output depends on its own query alone. The attribute
`patterns` of a token mechanism names those that it serves."""


class UnsupportedPattern(ValueError):  # noqa: N818 (reads as what happened)
    """A mechanism was asked for a pattern that it does not serve."""


def check_pattern(mechanism: nn.Module, *, causal: bool, context: bool) -> None:
    """Raise an `UnsupportedPattern` if a mechanism is built for or given what it does not serve.

    Serves mechanisms that refuse a context where they are causal. Softmax over all pairs
    (`MultiHeadAttention`, `MixtureOfHeads`) takes one: it is aligned bottom-right, its last tokens
    are those of the queries.

    Args:
        mechanism: Names its `patterns`.
        causal: Whether outputs must not depend on what comes later.
        context: Whether others are attended to.
    """
    name, patterns = type(mechanism).__name__, cast(frozenset[Pattern], mechanism.patterns)
    pattern: Pattern = "cross" if context else "causal self" if causal else "self"
    if pattern not in patterns:
        raise UnsupportedPattern(
            f"{name} serves {', '.join(sorted(patterns))}; it has no {pattern} attention"
        )
    if causal and context:
        raise UnsupportedPattern(
            f"{name} with causal=True serves self-attention only: a context has no order with the "
            "tokens that ask; without causal=True each output depends on its own query alone"
        )


CHECK_FINITE = os.environ.get("HEED_CHECK_FINITE") == "1"
"""Whether tensors are looked through for NaN and infinity, which takes a pass over each: it tells
where they begin."""


def check_real(**tensors: Tensor | None) -> None:
    """Raise a TypeError that names a tensor that holds no floating-point numbers."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    check_finite(**tensors)


def check_finite(**tensors: Tensor | None) -> None:
    """Where HEED_CHECK_FINITE is 1, raise a ValueError that names a tensor with NaN or infinity.

    Graphs do not look: they cannot branch on values.
    """
    if not CHECK_FINITE or torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if x is None or x.is_meta or (finite := x.isfinite()).all():
            continue
        first = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite (HEED_CHECK_FINITE=1), got {int((~finite).sum())} of "
            f"{x.numel()} values that are not, the first at {first}"
        )


def check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raise a TypeError that names tensors of another type than the weights, `dtype`.

    Under autocast, which converts, nothing is wrong.
    """
    for name, x in tensors.items():
        if x is None or x.dtype == dtype:
            continue
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{name} must have the type of the weights, {dtype}, got {x.dtype}; convert it, or "
                "the module, with `.to`"
            )


def check_type(layer: nn.Module, **tensors: Tensor | None) -> None:
    """The same for the weights of a layer such as `nn.Linear`.

    What a layer takes that was wrapped, quantised or put in the place of torch's is not known.
    """
    weight = layer._parameters.get("weight")
    if "forward" in vars(layer) or layer._forward_pre_hooks or weight is None:
        return
    if weight.is_floating_point():
        check_dtype(weight.dtype, **tensors)


def check_some(**tensors: Tensor | None) -> None:
    """Raise a ValueError that names (batch, *spatial, channels) without a single token."""
    for name, x in tensors.items():
        if x is not None and 0 in x.shape[1:-1]:
            raise ValueError(f"{name} must have at least one token, got {tuple(x.shape)}")


def check_shape(name: str, x: Tensor, shape: tuple[int | None, ...], axes: str) -> None:
    """Raise a ValueError for a tensor of another shape.

    Args:
        name: Of the argument.
        x: What was given.
        shape: What it must be; None = any number.
        axes: Their names, for the message.
    """
    fits = x.dim() == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be ({wanted}) ({axes}), got {tuple(x.shape)}")


def check_tokens(
    name: str, x: Tensor, dim: int, *, batch: int | None = None, layer: nn.Module | None = None
) -> None:
    """Raise a ValueError for tokens of another shape, a TypeError for those of another type.

    Args:
        name: Of the argument.
        x: Must be (batch, tokens, dim).
        dim: Channels.
        batch: Samples; any number if not given.
        layer: Whose type they must have, see `check_type`; any real numbers if not given.
    """
    if x.dim() != 3 or x.shape[2] != dim or (batch is not None and x.shape[0] != batch):
        samples = "batch" if batch is None else f"batch {batch}"
        raise ValueError(f"{name} must be ({samples}, tokens, {dim}), got {tuple(x.shape)}")
    check_real(**{name: x})
    if layer is not None:
        check_type(layer, **{name: x})


def check_padding(
    padding_mask: Tensor,
    batch: int,
    length: int,
    *,
    of: str = "tokens attended to",
    name: str = "padding_mask",
) -> None:
    """Raise a TypeError or ValueError for a padding mask of another type or shape."""
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, True = real token, got {padding_mask.dtype}")
    if tuple(padding_mask.shape) != (batch, length):
        raise ValueError(
            f"{name} must be {(batch, length)} (batch, {of}), got {tuple(padding_mask.shape)}"
        )


def check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> None:
    """Raise a TypeError for a mask that is not boolean, a ValueError for one of another shape.

    Args:
        mask: True = may attend.
        full: What it must be broadcastable to: batch, heads, queries, keys.
    """
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean (True = may attend), got {mask.dtype}; "
            "what is added to the scores goes into `bias`"
        )
    check_broadcast("mask", mask, full)


def check_broadcast(name: str, x: Tensor, full: tuple[int, int, int, int]) -> None:
    """Raise a ValueError for what is not broadcastable to (batch, heads, queries, keys)."""
    fits = x.ndim <= 4 and all(
        size in (1, wanted) for size, wanted in zip(reversed(x.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must be broadcastable to (b, h, n, m) = {tuple(full)}, "
            f"got shape {tuple(x.shape)}"
        )


def check_bias(bias: Tensor, full: tuple[int, int, int, int]) -> None:
    """Raise a TypeError for a bias that is not real, a ValueError for one of another shape.

    Args:
        bias: Added to scores; may be -inf.
        full: What it must be broadcastable to: batch, heads, queries, keys.
    """
    if not bias.is_floating_point():
        raise TypeError(f"bias must be floating point, got {bias.dtype}; booleans go into `mask`")
    check_broadcast("bias", bias, full)


def check_indices(name: str, index: Int[Tensor, "*n"], length: int, *, of: str) -> None:
    """Raise a TypeError for indices that are no whole numbers, a ValueError for some outside.

    Their values are looked at on the CPU and outside of graphs only: elsewhere it would wait.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {index.dtype}")
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = index.aminmax()
    if int(low) < 0 or int(high) >= length:
        raise ValueError(
            f"{name} must be from 0 to {length - 1}, one of the {length} {of}, got from "
            f"{int(low)} to {int(high)}"
        )


def with_padding(
    mask: Bool[Tensor, "*#mask"] | None,
    padding_mask: Bool[Tensor, "b m"] | None,
    key: Float[Tensor, "b g m d"],
    *,
    heads: int,
    queries: int,
) -> Bool[Tensor, "*#mask"] | None:
    """The permission of a mask and of a padding mask of the keys together.

    Raises:
        ValueError: A mask of another shape.
        TypeError: One that is not boolean.
    """
    batch, _, keys, _ = key.shape
    if mask is not None:
        check_mask(mask, (batch, heads, queries, keys))
    if padding_mask is None:
        return mask
    check_padding(padding_mask, batch, keys)
    real = padding_mask[:, None, None]
    return real if mask is None else mask & real
