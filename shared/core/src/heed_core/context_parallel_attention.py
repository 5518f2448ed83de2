"""Multi-head attention of a sequence that several processes share, with its projections.

    y = W_out concat_h softmax(scale * Q_h K_g(h)^T) V_g(h)      rows of this process's tokens

All processes hold the whole weights and n / P tokens; queries, keys and values are made of these
alone, and `heed_core.context_parallel` exchanges what its methods say, at the costs stated there.
To share the heads instead: `heed_core.head_parallel`.
"""

from __future__ import annotations

from functools import partial
from typing import cast, get_args

import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.context_parallel import Method, context_parallel_attention
from heed_core.exchange import check_together
from heed_core.sequence_layout import Layout, check_layout, global_positions
from heed_core.tokens import check_tokens


class ContextParallelAttention(nn.Module):
    """A `MultiHeadAttention` whose tokens several processes share.

    The layers are those of `whole`, not copies. A process's gradients of the weights are those of
    its own tokens: their sum over the processes is the gradient of one process with all tokens,
    their mean what `DistributedDataParallel` takes. The site is `whole.attend`, which methods other
    than "ring" run while something is attached to it.

    Args:
        whole: A self-attention, the same on all processes; with rotary codes, `qk_norm`, causality,
            windows, grouped heads.
        group: The processes; all if not given.
        method: How keys and values, or heads, are exchanged.
        layout: Which tokens a process holds; `shard_sequence` cuts a sequence so.

    Raises:
        ValueError: An option that has no meaning for a part of the tokens.

    Example:
        >>> whole = MultiHeadAttention(32, heads=4, causal=True)
        >>> attention = ContextParallelAttention(whole, layout="zigzag")
        >>> attention(shard_sequence(tokens, None, layout="zigzag", dim=1))  # doctest: +SKIP
    """

    def __init__(
        self,
        whole: MultiHeadAttention,
        *,
        group: dist.ProcessGroup | None = None,
        method: Method = "ring",
        layout: Layout = "contiguous",
    ) -> None:
        super().__init__()
        _check_shareable(whole)
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        check_layout(layout)
        self.whole, self.group = whole, group
        self.method: Method = method
        self.layout: Layout = layout

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend; all processes call it together.

        Args:
            x: The tokens that this process holds.
            padding_mask: True = real token, of these tokens.

        Raises:
            ValueError: Shapes that do not fit, or that differ between processes: on all of them.
            TypeError: Another type than that of the weights, a mask that is not boolean; where
                another process finds it, a ValueError.
        """
        whole = self.whole
        try:
            query, key, value = self._projected(x)
        except (TypeError, ValueError) as fault:
            check_together("", fault, self.group, x.device)
            raise
        window = whole.window
        mixed = context_parallel_attention(
            query,
            key,
            value,
            group=self.group,
            method=self.method,
            layout=self.layout,
            causal=whole.causal,
            padding_mask=padding_mask,
            mask_fn=None if window is None else partial(_within, window=window),
            scale=whole.attend.scale,
            site=whole.attend,
        )
        return cast(Tensor, whole.out(mixed.transpose(1, 2).flatten(2)))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this process's tokens, at their places in the sequence."""
        whole = self.whole
        check_tokens("x", x, whole.dim, layer=whole.query)
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        places = global_positions(rank, world, world * x.shape[1], self.layout).to(x.device)

        def heads(tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
            rows = tokens.reshape(
                *tokens.shape[:2], tokens.shape[2] // whole.head_dim, whole.head_dim
            )
            normed: Tensor = rows if norm is None else norm(rows)
            return normed.transpose(1, 2)

        query = heads(whole.query(x), whole.query_norm)
        key = heads(whole.key(x), whole.key_norm)
        if whole.rotary is not None:
            query, key = (whole.rotary(rows, positions=places) for rows in (query, key))
        return query, key, heads(whole.value(x))

    def extra_repr(self) -> str:
        """Show how the tokens are shared."""
        return f"method={self.method!r}, layout={self.layout!r}"


def _within(query: Tensor, key: Tensor, *, window: int) -> Tensor:
    return query - key < window


def _check_shareable(whole: MultiHeadAttention) -> None:
    if whole.context_dim is not None or whole.relative_bias is not None:
        raise ValueError(
            "context_dim and relative_bias must be None where processes share a sequence"
        )
    if whole.attend.dropout:
        raise ValueError(
            f"dropout must be 0 where processes share a sequence, got {whole.attend.dropout}"
        )
