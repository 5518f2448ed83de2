"""Attention whose heads several processes share, all with the whole sequence.

    y = sum over processes p of concat_{h of p} softmax(scale * Q_h K_h^T) V_h W_out[h of p]  + b

Each of P processes holds the rows of W_q, W_k and W_v and the columns of W_out of its heads, so
that one sum over the processes per layer is all that they exchange: forwards that of the outputs
(B, N, C), backwards that of the gradients of the tokens. With e bytes per number a process receives
2 (P - 1) / P B N C e both ways, and holds 1 / P of the weights and of the scores. Shoeybi et al.,
"Megatron-LM" (arXiv 1909.08053).

Where N is what does not fit, share the sequence: `context_parallel`.

All processes get the same output bit for bit. There is no dropout: equality with one process would
need its random numbers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.cache import CrossCache, KVCache, WindowCache, restores_cache
from heed_core.exchange import check_together, from_all, head_shares, same_for_all, sum_of_all
from heed_core.layers import held_matrix_and_bias
from heed_core.tokens import check_tokens


class HeadParallelAttention(nn.Module):
    """This process's share of the heads of a `MultiHeadAttention`, in its place.

    Shares are as even as can be: they differ by one group of query heads. The site is
    `own.attend`, with the maps of this process's heads. The parameters are copies; `out_bias` is
    held by all and gets the same gradient on all.

    Args:
        whole: The same on all processes. With rotary codes, causality, windows, grouped heads; not
            with `qk_norm` or `relative_bias`, whose parameters belong to no head or to all.
        group: The processes; all if not given.

    Raises:
        ValueError: More processes than key/value heads, an option that cannot be shared, or layers
            that are not plain, such as adapters.

    Example:
        >>> attention = HeadParallelAttention(MultiHeadAttention(32, heads=4))  # doctest: +SKIP
        >>> attention(torch.randn(1, 5, 32)).shape  # doctest: +SKIP
        torch.Size([1, 5, 32])
    """

    def __init__(
        self, whole: MultiHeadAttention, *, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        _check_shareable(whole, world)
        held = {
            name: held_matrix_and_bias(name, whole.get_submodule(name))
            for name in ("query", "key", "value", "out")
        }
        self.group, self.heads, self.kv_heads = group, whole.heads, whole.kv_heads
        self.shares = head_shares(whole.kv_heads, world)
        first, count = sum(self.shares[:rank]), self.shares[rank]
        served = whole.heads // whole.kv_heads
        self.own_heads = slice(first * served, (first + count) * served)
        with torch.random.fork_rng(devices=[]):  # shares differ, random states must not
            self.own = MultiHeadAttention(
                whole.dim,
                heads=count * served,
                kv_heads=count,
                head_dim=whole.head_dim,
                context_dim=whole.context_dim,
                qkv_bias=held["query"][1] is not None,
                out_bias=False,
                causal=whole.causal,
                window=whole.window,
                scale=whole.attend.scale,
                rotary=whole.rotary,
                impl=whole.attend.impl,
            )
        outwards, bias = held["out"]
        self.own.to(outwards)
        self.out_bias = None if bias is None else nn.Parameter(bias.detach().clone())
        width = whole.head_dim
        asking = slice(first * served * width, (first + count) * served * width)
        shared = slice(first * width, (first + count) * width)
        with torch.no_grad():
            for name, rows in (("query", asking), ("key", shared), ("value", shared)):
                own = cast(nn.Linear, self.own.get_submodule(name))
                weight, shift = held[name]
                own.weight.copy_(weight[rows])
                if shift is not None:
                    own.bias.copy_(shift[rows])
            self.own.out.weight.copy_(outwards[:, asking])
        self.train(whole.training)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "#b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        context_positions: Real[Tensor, "*m"] | None = None,
        cache: KVCache | WindowCache | CrossCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend; all processes call it with the same arguments, but for their own caches.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to; `x` itself if not given.
            mask: True = may attend, broadcastable to (b, all heads, n, m).
            padding_mask: True = real token.
            bias: Added to the scores, broadcastable to (b, all heads, n, m).
            positions: Of `x`, for rotary codes.
            context_positions: Of the context.
            cache: Of `new_cache`: it holds this process's heads.

        Raises:
            ValueError: Shapes that do not fit, or that differ between processes: on all of them.
            TypeError: What `MultiHeadAttention` refuses; where another process finds it, a
                ValueError.
        """
        fault: Exception | None = None
        try:
            part = self._own_part(
                x,
                context,
                mask=mask,
                padding_mask=padding_mask,
                bias=bias,
                positions=positions,
                context_positions=context_positions,
                cache=cache,
            )
        except (TypeError, ValueError) as error:
            fault = error
        shapes = f"x {tuple(x.shape)}, context {None if context is None else tuple(context.shape)}"
        check_together(f"{shapes}, {x.dtype}", fault, self.group, x.device)
        y = sum_of_all(part, self.group)
        return y if self.out_bias is None else y + self.out_bias

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> KVCache | WindowCache:
        """An empty cache of this process's heads; see `MultiHeadAttention.new_cache`."""
        return self.own.new_cache(batch, max_len, dtype=dtype)

    def whole_state(self) -> dict[str, Tensor]:
        """The weights of the `MultiHeadAttention` of all heads, on every process."""
        state = {}
        for name in ("query", "key", "value"):
            for kind, parameter in self.own.get_submodule(name).named_parameters():
                state[f"{name}.{kind}"] = self._joined(parameter.detach())
        state["out.weight"] = self._joined(self.own.out.weight.detach().T).T.contiguous()
        if self.out_bias is not None:
            state["out.bias"] = self.out_bias.detach().clone()
        return state

    def _own_part(
        self,
        x: Tensor,
        context: Tensor | None,
        *,
        mask: Tensor | None,
        bias: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """What this process's heads give; nothing is exchanged."""
        check_tokens("x", x, self.own.dim, layer=self.own.query)
        x = same_for_all(x, self.group)
        context = None if context is None else same_for_all(context, self.group)
        bias = None if bias is None else same_for_all(bias, self.group)
        mask, bias = self._of_own_heads(mask), self._of_own_heads(bias)
        return cast(Tensor, self.own(x, context, mask=mask, bias=bias, **options))

    def _joined(self, rows: Tensor) -> Tensor:
        """Rows of the heads of all processes, whose numbers of heads may differ."""
        per_share = rows.shape[0] // self.shares[dist.get_rank(self.group)]
        widest = rows.new_zeros(max(self.shares) * per_share, *rows.shape[1:])
        widest[: rows.shape[0]] = rows
        parts = from_all(widest, self.group)
        return torch.cat(
            [part[: share * per_share] for part, share in zip(parts, self.shares, strict=True)]
        )

    def _of_own_heads(self, table: Tensor | None) -> Tensor | None:
        if table is None or table.dim() < 3 or table.shape[-3] == 1:
            return table
        if table.shape[-3] != self.heads:
            raise ValueError(
                f"mask and bias must be broadcastable to (batch, {self.heads} heads, n, m), got "
                f"{tuple(table.shape)}"
            )
        return table[..., self.own_heads, :, :]

    def extra_repr(self) -> str:
        """Show whose heads these are."""
        return f"heads={self.own_heads.start}..{self.own_heads.stop - 1} of {self.heads}"


def _check_shareable(whole: MultiHeadAttention, world: int) -> None:
    if world > whole.kv_heads:
        raise ValueError(
            f"kv_heads must be at least the number of processes, {world}, got {whole.kv_heads}"
        )
    if not isinstance(whole.query_norm, nn.Identity) or whole.relative_bias is not None:
        raise ValueError("qk_norm and relative_bias must be None: they belong to no process")
    if whole.attend.dropout:
        raise ValueError(
            f"dropout must be 0 where processes share heads, got {whole.attend.dropout}"
        )
