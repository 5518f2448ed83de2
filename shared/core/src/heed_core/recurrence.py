"""What the recurrent attentions share: tokens in chunks, products that decay, checks.

A recurrence over tokens costs one small step each. In chunks, what happens within a chunk becomes
products of matrices, and only the state between chunks is carried on (`kernels.state_scan`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed_core.kernels.chunk_scan import wants_triton
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.tokens import check_real

Form = Literal["chunked", "recurrent", "parallel"]
"""How a recurrence is computed: in chunks, token by token, or with the N x N map of one chunk."""

CHUNK = 64
"""Tokens of a chunk."""

CHUNK_BY_CHANNEL = 16
"""The same with a decay per channel, whose products cost chunk x channels for each token."""


def chunk_size(form: Form, chunk: int | None, length: int, *, by_channel: bool) -> int:
    """Tokens of a chunk.

    Raises:
        ValueError: An unknown form, a size below 1, or a size where there are no chunks.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
    if chunk is not None and (form != "chunked" or chunk < 1):
        raise ValueError(
            f"chunk must be at least 1 and needs form='chunked', got {chunk}, {form!r}"
        )
    if form == "parallel":
        return max(1, length)
    if chunk is not None:
        return chunk
    return CHUNK_BY_CHANNEL if by_channel else CHUNK


def check_impl(impl: KernelImpl, form: Form, *, causal: bool = True) -> None:
    """Raise a ValueError for no name, or for one where there are no chunks to be computed."""
    if impl not in get_args(KernelImpl):
        raise ValueError(f"impl must be one of {get_args(KernelImpl)}, got {impl!r}")
    if impl != "auto" and (form != "chunked" or not causal):
        raise ValueError(f"impl={impl!r} needs form='chunked' and causal=True, got {form!r}")


def scan_impl(impl: KernelImpl, form: Form, query: Tensor, chunk: int) -> bool:
    """Whether the chunks of a call run on the Triton kernel.

    Raises:
        ValueError: It was asked for where there are no chunks, or `impl` is no name.
        UnsupportedBackend: It was asked for and cannot run the call.
    """
    check_impl(impl, form)
    kind, dim = query.device.type, query.shape[-1]
    return wants_triton(impl, kind, query.dtype, key_dim=dim, chunk=chunk)


def steps(x: Float[Tensor, "b h n k"]) -> tuple[Float[Tensor, "b h 1 k"], ...]:
    """The tokens one by one, in a way whose gradient costs no more than reading them.

    The gradient of a slice is as large as what it is cut from: cutting n tokens one by one would
    cost n^2.
    """
    return tuple(row.unsqueeze(2) for row in x.unbind(2))


def split(x: Float[Tensor, "b h n k"], size: int) -> Float[Tensor, "b h chunks size k"]:
    """Cut tokens into chunks, the last one filled up with zeros."""
    length = x.shape[2]
    chunks = (length + size - 1) // size
    if torch.compiler.is_compiling():
        # Picked rows need no guard on the length, nor does a spare chunk one on the number of
        # chunks: what is exported takes any length.
        first = size * torch.arange(chunks + 1, device=x.device)
        row = first[:, None] + torch.arange(size, device=x.device)
        picked = x[:, :, row.clamp(max=length - 1)]
        return picked.masked_fill((row >= length)[..., None], 0.0)
    padded = F.pad(x, (0, 0, 0, chunks * size - length))
    return padded.reshape(x.shape[0], x.shape[1], chunks, size, x.shape[3])


def join(x: Float[Tensor, "b h chunks size k"], length: int) -> Float[Tensor, "b h n k"]:
    """Undo `split`."""
    if torch.compiler.is_compiling():
        row, size = torch.arange(length, device=x.device), x.shape[3]
        return x[:, :, row // size, row % size]
    return x.flatten(2, 3)[:, :, :length]


def decayed_products(
    left: Float[Tensor, "*batch n d"],
    right: Float[Tensor, "*batch n d"],
    total: Float[Tensor, "*batch n k"] | None,
    *,
    strict: bool = False,
) -> Float[Tensor, "*batch n n"]:
    """Products of rows with earlier rows: sum_c left_ic right_jc exp(total_ic - total_jc).

    Args:
        left: Rows i.
        right: Rows j.
        total: Summed logarithm of the decay up to each row, k = 1 or d; None = no decay.
        strict: Leave out j = i.

    Returns:
        Lower triangular. No exponential is above 1, however strong the decay.
    """
    size = left.shape[-2]
    order = torch.arange(size, device=left.device)
    hidden = order[:, None] <= order if strict else order[:, None] < order
    if total is None:
        return (left @ right.mT).masked_fill(hidden, 0.0)
    away = total.unsqueeze(-2) - total.unsqueeze(-3)  # (*, n, n, k)
    factor = away.masked_fill(hidden[..., None], -torch.inf).exp()
    if total.shape[-1] == 1:
        return (left @ right.mT).masked_fill(hidden, 0.0) * factor.squeeze(-1)
    return (left.unsqueeze(-2) * factor * right.unsqueeze(-3)).sum(-1)


def expand_decay(
    log_decay: Float[Tensor, "*decay"] | None, key: Float[Tensor, "b h n d"]
) -> Float[Tensor, "b h n k"] | None:
    """The decay with its own axis, k = 1 for one per head and d for one per channel.

    Raises:
        ValueError: It has another shape than (b, h, n) or (b, h, n, d), up to broadcasting.
    """
    if log_decay is None:
        return None
    shape = (*key.shape[:3], key.shape[3] if log_decay.ndim == 4 else 1)
    whole = log_decay[..., None] if log_decay.ndim == 3 else log_decay
    fits = whole.ndim == 4 and all(
        size in (1, wanted) for size, wanted in zip(whole.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            "log_decay must be broadcastable to (batch, heads, tokens) or (batch, heads, tokens, "
            f"key channels) = {tuple(key.shape)}, got {tuple(log_decay.shape)}"
        )
    return whole.expand(shape)


def check_recurrence(query: Tensor, key: Tensor, value: Tensor, *, same_length: bool) -> None:
    """Raise a ValueError for queries, keys and values that do not fit each other.

    A TypeError for what holds no real numbers, and for float64 beside another type: modules in half
    precision may bring features in float32.
    """
    check_real(query=query, key=key, value=value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels), got {tuple(x.shape)}"
            )
        if (x.dtype == torch.float64) != (query.dtype == torch.float64):
            raise TypeError(f"{name} must have the type of query, {query.dtype}, got {x.dtype}")
    fits = query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    if not fits or (same_length and query.shape[2] != key.shape[2]):
        raise ValueError(
            f"key must have the batch, heads and channels{' and tokens' if same_length else ''} of "
            f"query {tuple(query.shape)}, got {tuple(key.shape)}"
        )
    if value.shape[0] != key.shape[0] or value.shape[2] != key.shape[2]:
        raise ValueError(
            f"value must have the batch and tokens of key {tuple(key.shape)}, got "
            f"{tuple(value.shape)}"
        )
    if value.shape[1] % key.shape[1]:
        raise ValueError(
            f"the heads of key ({key.shape[1]}) must divide those of value ({value.shape[1]})"
        )


def start_state(
    state: Float[Tensor, "b h d e"] | None, key: Tensor, value: Tensor
) -> Float[Tensor, "b h d e"]:
    """The state before the first token; zeros if none is given.

    Raises:
        ValueError: It has another shape.
    """
    shape = (*value.shape[:2], key.shape[3], value.shape[3])
    if state is None:
        return value.new_zeros(shape)
    if tuple(state.shape) != shape:
        raise ValueError(
            f"state must be (batch, heads, key channels, value channels) = {shape}, got "
            f"{tuple(state.shape)}"
        )
    return state.to(value.dtype)
