"""torch's FlexAttention, compiled: masks and biases are fused, masked blocks are skipped.

It is worth its compilation (seconds on first use, and again for a new kind of call) on CUDA with
large, sparse masks. On the CPU it has a forward pass only (pytorch/pytorch#169224).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch._dynamo
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.dispatch import Facts, UnsupportedBackend

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MIN_CUDA_DIM = 16
"""Smallest key and value width of the CUDA kernel."""

MAX_KINDS = 256
"""Kinds of calls (widths, masks, types) that one process may compile before torch raises."""

MAX_CAUSAL = 16
"""Pairs of lengths whose causal blocks are kept; a mask that is given is read in each call."""


def why_not(facts: Facts) -> str | None:
    """Refuse what FlexAttention cannot do."""
    if facts.device not in ("cpu", "cuda"):
        return f"FlexAttention does not run on {facts.device!r}"
    if facts.dropout > 0.0:
        return "FlexAttention has no dropout"
    if facts.dtype == torch.float64:
        return "FlexAttention does not take torch.float64"
    if facts.device == "cpu" and facts.needs_grad:
        return "FlexAttention has no backward pass on the CPU"
    if facts.queries == 0 or facts.keys == 0:
        return "FlexAttention takes no empty sequence"
    narrow = min(facts.key_dim, facts.value_dim)
    if facts.device == "cuda" and narrow < MIN_CUDA_DIM:
        return f"FlexAttention on CUDA needs at least {MIN_CUDA_DIM} channels, got {narrow}"
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
    """Compute attention with a compiled FlexAttention kernel; `dropout` is 0."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    block_mask = None
    if mask is None and causal:
        plain = type(query) is Tensor and not torch.compiler.is_compiling()
        make = _causal_blocks if plain else _causal_blocks.__wrapped__
        block_mask = make(queries, keys, query.device)
    elif mask is not None:
        from torch.nn.attention.flex_attention import create_block_mask

        block_mask = create_block_mask(
            _mask_mod(mask, causal, keys - queries),
            B=1 if mask.ndim < 4 or mask.shape[-4] == 1 else batch,
            H=1 if mask.ndim < 3 or mask.shape[-3] == 1 else heads,
            Q_LEN=queries,
            KV_LEN=keys,
            device=query.device,
        )
    return _run(query, key, value, bias=bias, block_mask=block_mask, scale=scale)


def run_blocks(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    block_mask: BlockMask,
    scale: float,
    bias: Float[Tensor, "*bias"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """Compute attention where a mask of blocks allows it; all other blocks are left out.

    A bias broadcasts to (b, h, n, m) and is added to the scores. On CUDA the tiles of the kernel
    become as small as the blocks.

    Raises:
        UnsupportedBackend: The kernel cannot run the call (float64, a gradient on the CPU; on CUDA
            blocks of other sizes than 16, 32, 64 ...).
    """
    options, smallest = {}, min(block_mask.BLOCK_SIZE)
    inputs = [x for x in (query, key, value, bias) if x is not None]
    facts = Facts(
        device=query.device.type,
        dtype=query.dtype,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        dropout=0.0,
        queries=query.shape[2],
        keys=key.shape[2],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
    )
    reason = why_not(facts)
    if query.device.type == "cuda":
        tiles = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
        options["kernel_options"] = dict.fromkeys(tiles, min(smallest, 64))
        if reason is None and (smallest < 16 or smallest & (smallest - 1)):
            reason = f"its blocks on CUDA are a power of 2 of at least 16, got {smallest}"
    if reason is not None:
        raise UnsupportedBackend(f"FlexAttention cannot run this call: {reason}")
    return _run(query, key, value, bias=bias, block_mask=block_mask, scale=scale, **options)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None,
    block_mask: BlockMask | None,
    scale: float,
    **options: dict[str, int],
) -> Tensor:
    if scale <= 0.0:  # the kernel takes the maximum before it scales
        query, scale = query * scale, 1.0
    return _kernel(
        query,
        key,
        value,
        score_mod=None if bias is None else _score_mod(bias),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )


@lru_cache(maxsize=MAX_CAUSAL)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> BlockMask:
    """The blocks of a causal call without a mask, made once for each pair of lengths."""
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(mode=False):  # calls with gradients may use them later
        return create_block_mask(
            _mask_mod(None, True, keys - queries),
            B=1,
            H=1,
            Q_LEN=queries,
            KV_LEN=keys,
            device=device,
        )


Index = Tensor


def _mask_mod(
    mask: Tensor | None, causal: bool, offset: int
) -> Callable[[Index, Index, Index, Index], Tensor]:
    def past(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return j <= i + offset

    if mask is None:
        return past
    look_up = _reader(mask)

    def both(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return look_up(b, h, i, j) & past(b, h, i, j)

    return both if causal else look_up


def _score_mod(bias: Tensor) -> Callable[[Tensor, Index, Index, Index, Index], Tensor]:
    look_up = _reader(bias)

    def add(score: Tensor, b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return score + look_up(b, h, i, j)

    return add


def _reader(table: Tensor) -> Callable[[Index, Index, Index, Index], Tensor]:
    """Read a broadcastable table by full indices, without expanding it."""
    table = table.reshape(*[1] * (4 - table.ndim), *table.shape)
    b_on, h_on, i_on, j_on = (int(size != 1) for size in table.shape)

    def read(b: Index, h: Index, i: Index, j: Index) -> Tensor:
        return table[b * b_on, h * h_on, i * i_on, j * j_on]

    return read


@cache
def _compiled_kernel(dynamic: bool | None) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # with fullgraph torch raises where it would otherwise fall back to unfused code
    kernel = torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)
    return cast(Callable[..., Tensor], kernel)


def _kernel(query: Tensor, *args: Tensor, **options: object) -> Tensor:
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        kernel = cast(Callable[..., Tensor], flex_attention)
        return kernel(query, *args, **options)
    # torch 2.13 writes CPU kernels that do not compile for masks of symbolic length
    dynamic = False if query.device.type == "cpu" else None
    with torch._dynamo.config.patch(recompile_limit=MAX_KINDS):
        return _compiled_kernel(dynamic)(query, *args, **options)
