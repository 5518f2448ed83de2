"""torch's fused `scaled_dot_product_attention`, brought to the semantics of `attend`.

Differs from a plain call: causality is bottom-right aligned (torch's flag is top-left) and combines
with a mask; a row without a permitted key is zero with zero gradients in every kernel; on the CPU,
keys and values of unequal width, strided channels and masks of any rank stay on the kernel that
holds no n x m map (torch alone falls back to one that materialises it). A bias that needs
gradients, and dropout on the CPU, have only the materialising kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.dispatch import Facts


def why_not(facts: Facts) -> str | None:
    """Accept every call: torch has a kernel for each float format that `attend` takes."""
    return None


def run(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    mask: Bool[Tensor, "*mask"] | None,
    bias: Float[Tensor, "*bias"] | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Float[Tensor, "b h n e"]:
    """Compute attention with the best kernel that torch has for the call."""
    on_cpu = query.device.type == "cpu"
    if scale <= 0.0:  # fused kernels take the maximum before they scale
        query, scale = query * scale, 1.0
    width = value.shape[3]
    if on_cpu:
        query, key, value = _fit_cpu_kernel(query, key, value)
    # comparisons of symbolic sizes stay symbolic; branches on them are plain booleans
    square = causal and mask is None and bias is None and _true(query.shape[2] == key.shape[2])
    grouped = _true(query.shape[1] != key.shape[1])
    if causal and not square and query.shape[2] != 1:
        mask = _and_past(mask, query, key)
    added = _additive(mask, bias, query)
    empty = None
    if added is not None and not on_cpu:  # CPU kernels give zeros there by themselves
        added, empty = _open_empty_rows(added)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=added,
        is_causal=square,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=grouped,
    )
    if width != value.shape[3]:
        output = output[..., :width]
    return output if empty is None else output.masked_fill(empty, 0.0)


def _true(condition: bool) -> bool:
    return True if condition else False  # noqa: SIM210 (bool() of a symbolic one stays symbolic)


def _fit_cpu_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad to equal widths with zeros, which change no product, and make channels contiguous."""
    missing = value.shape[3] - query.shape[3]
    if missing > 0:
        query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
    elif missing < 0:
        value = F.pad(value, (0, -missing))
    return _dense(query), _dense(key), _dense(value)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _and_past(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    columns = torch.arange(keys, device=query.device)
    rows = torch.arange(queries, device=query.device).unsqueeze(1)
    past = columns <= rows + (keys - queries)
    return past if mask is None else past & mask


def _additive(mask: Tensor | None, bias: Tensor | None, query: Tensor) -> Tensor | None:
    """One mask of rank 4: boolean, or additive in the type of the query."""
    if bias is None:
        added = mask
    else:
        if bias.dtype != query.dtype:  # what overflows would be +inf, and the row NaN
            bias = bias.clamp(max=torch.finfo(query.dtype).max).to(query.dtype)
        added = bias if mask is None else torch.where(mask, bias, -torch.inf)
    if added is None or added.ndim == 4:
        return added
    return added.reshape(*[1] * (4 - added.ndim), *added.shape)


def _open_empty_rows(added: Tensor) -> tuple[Tensor, Tensor]:
    """Let rows without a permitted key attend anywhere, and tell which they are."""
    if added.dtype == torch.bool:
        empty = ~added.any(dim=-1, keepdim=True)
        return added | empty, empty
    empty = (added == -torch.inf).all(dim=-1, keepdim=True)
    return added.masked_fill(empty, 0.0), empty
