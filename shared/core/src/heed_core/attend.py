"""The attention call: the only place where softmax attention is computed.

    O = softmax over the permitted keys of (scale * Q K^T + bias) V

Every back-end gives the same numbers within rounding; `reference` is the specification.
`explain_dispatch` tells which one runs a call and why. To watch or edit the weights of a model use
`heed_core.sites`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.backends import flex, reference, sdpa
from heed_core.dispatch import (
    Backend,
    BackendReport,
    Facts,
    UnsupportedBackend,
    autocasting,
    explain,
    select,
)
from heed_core.impl import Impl
from heed_core.tokens import check_bias, check_finite, check_mask

__all__ = [
    "BACKENDS",
    "ORDER",
    "BackendReport",
    "Impl",
    "UnsupportedBackend",
    "attend",
    "check_arguments",
    "default_scale",
    "explain_dispatch",
]

BACKENDS = {
    "sdpa": Backend("sdpa", sdpa.why_not, sdpa.run),
    "flex": Backend("flex", flex.why_not, flex.run),
    "reference": Backend("reference", reference.why_not, reference.run),
}
"""All back-ends by name."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a query may be."""

ORDER = ("sdpa", "reference")
"""What `impl="auto"` tries in turn. Flex compiles for seconds on first use, so it runs only when
asked for."""


def attend(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    mask: Bool[Tensor, "*mask"] | None = None,
    bias: Float[Tensor, "*bias"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n e"]:
    """Softmax attention.

    Args:
        query: One row per token that asks; float16, bfloat16, float32 or float64.
        key: One row per token that may be attended to. Its g heads divide h: head i uses group i //
            (h / g).
        value: What is averaged; its width may differ from the key's.
        mask: True = may attend; broadcastable to (b, h, n, m). A row that may attend to nothing
            gives zeros and zero gradients.
        bias: Added to the scores; broadcastable to (b, h, n, m), differentiable. -inf forbids a
            pair.
        causal: Query i may see key j only if j <= i + m - n (the last query sees every key); AND
            with `mask`.
        scale: Factor of the products; default d ** -0.5.
        dropout: Probability of dropping a weight, whatever the mode: a caller passes 0 in eval.
        impl: The back-end; "auto" picks by plain facts, a name never falls back to another.

    Returns:
        The averaged values, in the type of `query`.

    Raises:
        ValueError: A shape, scale, dropout or `impl` that cannot be used.
        TypeError: A mask that is not boolean, a bias that is not floating, types that differ.
        UnsupportedBackend: The back-end named by `impl` cannot run this call.
    """
    query, key, value = autocast_together(query, key, value)
    check_arguments(query, key, value, mask=mask, bias=bias, scale=scale, dropout=dropout)
    scale = default_scale(query) if scale is None else scale
    backend = select(_facts(query, key, value, bias, dropout), impl, backends=BACKENDS, order=ORDER)
    return backend.run(
        query, key, value, mask=mask, bias=bias, causal=causal, scale=scale, dropout=dropout
    )


def explain_dispatch(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    mask: Bool[Tensor, "*mask"] | None = None,
    bias: Float[Tensor, "*bias"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> list[BackendReport]:
    """Tell which back-end `attend` would use for these arguments, and why not the others."""
    query, key, value = autocast_together(query, key, value)
    check_arguments(query, key, value, mask=mask, bias=bias, scale=scale, dropout=dropout)
    facts = _facts(query, key, value, bias, dropout)
    return explain(facts, impl, backends=BACKENDS, order=ORDER)


def default_scale(query: Float[Tensor, "b h n d"]) -> float:
    """D ** -0.5."""
    return float(query.shape[-1] ** -0.5)


def _facts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: float) -> Facts:
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    return Facts(
        device=query.device.type,
        dtype=query.dtype,
        needs_grad=needs_grad,
        dropout=dropout,
        queries=query.shape[2],
        keys=key.shape[2],
        key_dim=query.shape[3],
        value_dim=value.shape[3],
    )


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    dropout: float,
) -> None:
    """Raise a ValueError or TypeError that names the argument, if a call cannot be computed."""
    _check_tensors(query, key, value)
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number; multiply `query` by a learned temperature instead")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is not None:
        check_mask(mask, full)
    if bias is not None:
        check_bias(bias, full)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels), got shape {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the type of query, {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(
                f"{name} must be on the device of query, {query.device}, got {x.device}"
            )
    check_finite(query=query, key=key, value=value)
    batch, heads, _, dim = query.shape
    groups = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != dim or dim == 0:
        raise ValueError(
            f"key must be (b, g, m, d) for query (b, h, n, d) with d > 0, got key "
            f"{tuple(key.shape)} for query {tuple(query.shape)}"
        )
    if groups == 0 or heads % groups:
        raise ValueError(
            f"the number of heads of key ({groups}) must divide that of query ({heads})"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must agree with key in batch, heads and tokens, got value "
            f"{tuple(value.shape)} and key {tuple(key.shape)}"
        )


def autocast_together(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inside `torch.autocast`: bring all to its type, as it does for torch's own attention.

    float64 stays.
    """
    kind = query.device.type
    if not autocasting(kind) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)
