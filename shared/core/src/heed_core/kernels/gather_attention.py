"""Softmax attention of blocks of queries to keys that each block names, without gathering them all.

    O_i = softmax over the kept slots s of (scale * Q_i . K_[idx(s)] + bias_[idx(s)]) V_[idx(s)]

The core of bi-level routing (a region's cells attend to the cells of the regions on its routes) and
of dynamic masks (a run of queries attends to the keys that any of them keeps). On the CPU blocks
pass one by one: time n s (d + e), memory s (d + e) for gathered keys beside inputs and outputs, and
with gradients no more: the backward pass gathers again. A query that keeps nothing gets zeros and
zero gradients. Sums run in float32 at least.

The Triton kernels read keys through the indices, tile by tile; gradients of keys are added
atomically, in an order that is not fixed. They were compared with the torch form in Triton's
interpreter and compiled for a GPU, but never run on one, so that they run only when asked for by
name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from heed_core.kernels.triton_calls import KernelImpl, takes_triton, why_not_triton
from heed_core.precision import at_least_float32, without_autocast

MOST_CHANNELS = 128
"""Of keys and of values: tiles of so many still fit on any chip, backwards too."""

_GIVEN = (
    "Tensor query, Tensor key, Tensor value, Tensor index, Tensor? kept, Tensor? bias, "
    "float scale, bool triton"
)


def why_not(device: str, dtype: torch.dtype, *, key_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot run a call; None if it can."""
    if (reason := why_not_triton(device, dtype)) is not None:
        return reason
    for name, width in (("keys", key_dim), ("values", value_dim)):
        if width > MOST_CHANNELS:
            return f"{name} have {width} channels, more than {MOST_CHANNELS}"
    return None


def gather_attention(
    query: Float[Tensor, "b h blocks t d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    index: Int[Tensor, "b i blocks s"],
    *,
    kept: Bool[Tensor, "b j blocks t s"] | None = None,
    bias: Float[Tensor, "b g m"] | None = None,
    scale: float | None = None,
    impl: KernelImpl = "auto",
) -> Float[Tensor, "b h blocks t e"]:
    """Attention of blocks of queries to the keys that each block names.

    Args:
        query: In blocks of t.
        key: Its g heads divide h: head i uses group i // (h / g).
        value: What is averaged.
        index: The keys of each block, of every group or the same for all (i = g or 1). A key named
            twice counts twice.
        kept: True = the query may attend to the slot (j = g or 1); all if not given.
        bias: Of the keys, added to the scores.
        scale: Of the products; default d ** -0.5.
        impl: Who runs it.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: `kept` that is not boolean, `index` that is not int64.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    _check(query, key, value, index, kept, bias)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    triton = takes_triton(
        impl,
        lambda: why_not(
            query.device.type, query.dtype, key_dim=key.shape[-1], value_dim=value.shape[-1]
        ),
    )
    with without_autocast(query):
        rows = [at_least_float32(x) for x in (query, key, value)]
        added = None if bias is None else at_least_float32(bias)
        output: Tensor = gathered_softmax(*rows, index, kept, added, scale, triton)[0]
    return output.to(query.dtype)


@torch.library.custom_op(
    "heed::gathered_softmax", mutates_args=(), schema=f"({_GIVEN}) -> (Tensor, Tensor)"
)
def gathered_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs and the logarithm of the sum of exponentials (b, h, blocks, t), as above."""
    if triton:
        from heed_core.kernels.gather_attention_triton import launch_forward

        return launch_forward(query, key, value, index, kept, bias, scale)
    batch, heads, _, _, _ = query.shape
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    sums = query.new_zeros(query.shape[:-1])
    for block, rows in _blocks(query, key.shape[1]):
        where = _where(key, index, block)
        scores = _scores(rows, key, where, kept, bias, block, scale)
        level = scores.logsumexp(-1)
        shares = (scores - _finite(level)[..., None]).exp()
        mixed = shares @ _picked(value, where)[:, :, None]
        output[:, :, block] = mixed.reshape(batch, heads, *mixed.shape[3:])
        sums[:, :, block] = level.reshape(batch, heads, -1)
    return output, sums


@gathered_softmax.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    return output, query.new_empty(query.shape[:-1])


@torch.library.custom_op(
    "heed::gathered_softmax_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor output, Tensor sums, {_GIVEN})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def gathered_softmax_backward(
    grad: Tensor,
    output: Tensor,
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and of one number per key (a bias, given or not)."""
    if triton:
        from heed_core.kernels.gather_attention_triton import launch_backward

        return launch_backward(grad, output, sums, query, key, value, index, kept, bias, scale)
    groups = key.shape[1]
    to_query, to_key = query.new_zeros(query.shape), key.new_zeros(key.shape)
    to_value, to_bias = value.new_zeros(value.shape), key.new_zeros(key.shape[:3])
    inner = (grad * output).sum(-1)
    for block, rows in _blocks(query, groups):
        where = _where(key, index, block)
        scores = _scores(rows, key, where, kept, bias, block, scale)
        level, part = (_by_group(x[:, :, block], groups) for x in (sums, inner))
        back = _by_group(grad[:, :, block], groups)
        shares = (scores - _finite(level)[..., None]).exp()  # (b, g, h / g, t, s)
        to_scores = shares * (back @ _picked(value, where)[:, :, None].mT - part[..., None])
        found = scale * to_scores @ _picked(key, where)[:, :, None]
        to_query[:, :, block] = found.reshape(to_query[:, :, block].shape)
        _scatter(to_value, where, (shares.mT @ back).sum(2))
        _scatter(to_key, where, scale * (to_scores.mT @ rows).sum(2))
        _scatter(to_bias[..., None], where, to_scores.sum((2, 3))[..., None])
    return to_query, to_key, to_value, to_bias


@gathered_softmax_backward.register_fake
def _(
    grad: Tensor, output: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_query, to_key, to_value = (x.new_empty(x.shape) for x in (query, key, value))
    return to_query, to_key, to_value, key.new_empty(key.shape[:3])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *given, output, sums = ctx.saved_tensors
    found = gathered_softmax_backward(grad.contiguous(), output, sums, *given, *ctx.options)
    to_bias = None if given[5] is None else found[3]
    return (*found[:3], None, None, to_bias, None, None)


gathered_softmax.register_autograd(_backward, setup_context=_remember)


@register_flop_formula([torch.ops.heed.gathered_softmax])
def _flops(query: Any, key: Any, value: Any, index: Any, *_: Any, **__: Any) -> int:
    batch, heads, blocks, size, width = query
    return int(2 * batch * heads * blocks * size * index[-1] * (width + value[-1]))


def _blocks(query: Tensor, groups: int) -> Iterator[tuple[int, Tensor]]:
    """Queries of each block, (b, g, h / g, t, d)."""
    for block in range(query.shape[2]):
        yield block, _by_group(query[:, :, block], groups)


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _where(key: Tensor, index: Tensor, block: int) -> Tensor:
    """The keys of a block, (b, g, s)."""
    return index[:, :, block].expand(-1, key.shape[1], -1)


def _picked(x: Tensor, where: Tensor) -> Tensor:
    """(b, g, m, d) -> (b, g, s, d)."""
    return x.gather(2, where[..., None].expand(-1, -1, -1, x.shape[3]))


def _scatter(total: Tensor, where: Tensor, given: Tensor) -> None:
    """Add rows (b, g, s, d) at their places, in place."""
    total.scatter_add_(2, where[..., None].expand(given.shape), given)


def _scores(
    rows: Tensor,
    key: Tensor,
    where: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    block: int,
    scale: float,
) -> Tensor:
    """(b, g, h / g, t, s)."""
    scores = scale * rows @ _picked(key, where)[:, :, None].mT
    if bias is not None:
        scores = scores + bias.gather(2, where)[:, :, None, None]
    if kept is not None:
        scores = scores.masked_fill(~kept[:, :, None, block], -torch.inf)
    return scores


def _finite(level: Tensor) -> Tensor:
    return level.masked_fill(level == -torch.inf, 0.0)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
) -> None:
    if query.dim() != 5:
        raise ValueError(
            f"query must be (batch, heads, blocks, tokens, channels), got {tuple(query.shape)}"
        )
    batch, heads, blocks, size, width = query.shape
    fits = key.dim() == 4 and key.shape[0] == batch and key.shape[3] == width
    if not fits or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            "key must be (batch, groups, keys, channels) with the batch and channels of query and "
            f"groups that divide its heads {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must agree with key {tuple(key.shape)}: {tuple(value.shape)}")
    groups = (1, key.shape[1])
    if index.dim() != 4 or index.shape[1] not in groups or index.shape[::2] != (batch, blocks):
        raise ValueError(
            f"index must be (batch {batch}, 1 or {groups[1]}, blocks {blocks}, slots), got "
            f"{tuple(index.shape)}"
        )
    if index.dtype != torch.int64:
        raise TypeError(f"index must hold int64 numbers, got {index.dtype}")
    if kept is not None:
        if kept.dtype != torch.bool:
            raise TypeError(f"kept must be boolean, True = may attend, got {kept.dtype}")
        wanted = (batch, blocks, size, index.shape[3])
        if kept.dim() != 5 or kept.shape[1] not in groups or (
            kept.shape[0], *kept.shape[2:]) != wanted:  # fmt: skip
            raise ValueError(
                f"kept must be (batch {batch}, 1 or {groups[1]}, blocks {blocks}, tokens {size}, "
                f"slots {index.shape[3]}), got {tuple(kept.shape)}"
            )
    if bias is not None and bias.shape != key.shape[:3]:
        raise ValueError(f"bias must be {tuple(key.shape[:3])}, got {tuple(bias.shape)}")
