"""What the efficient attentions of long sequences share: projections, patterns, checks.

A mechanism serves some of the four patterns of `heed_core.tokens.Pattern`, and refuses others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.tokens import Pattern, check_padding, check_pattern, check_tokens


class ProjectedAttention(nn.Module):
    """Linear maps to queries, keys and values of several heads, and back.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head; dim / heads if not given.
        context_dim: Channels of a context token. If given, a context must be passed.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: A token depends on tokens up to itself.
    """

    patterns: ClassVar[frozenset[Pattern]]

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim, context_dim)
        self.causal = causal
        check_pattern(self, causal=causal, context=context_dim is not None)
        self.dim, self.heads, self.context_dim = dim, heads, context_dim
        self.head_dim = dim // heads if head_dim is None else head_dim
        source, width = dim if context_dim is None else context_dim, heads * self.head_dim
        self.query = nn.Linear(dim, width, bias=qkv_bias)
        self.key = nn.Linear(source, width, bias=qkv_bias)
        self.value = nn.Linear(source, width, bias=qkv_bias)
        self.out = nn.Linear(width, dim, bias=out_bias)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(b, n, h d) -> (b, h, n, d)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`; keys and values of the context, or of `x` itself."""
        source = x if context is None else context
        query, key, value = self.query(x), self.key(source), self.value(source)
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def join(self, mixed: Tensor, x: Tensor) -> Tensor:
        """(b, h, n, d) -> (b, n, c), in the type of the tokens."""
        return cast(Tensor, self.out(mixed.to(x.dtype).transpose(1, 2).flatten(2)))

    def check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        padding_mask: Tensor | None,
        *,
        cached: bool = False,
        past: int = 0,
    ) -> None:
        """Raise a ValueError or TypeError that names the argument that does not fit.

        Args:
            x: Tokens that ask.
            context: Tokens that are attended to, if others.
            padding_mask: Of the tokens that are attended to.
            cached: Whether a cache is given.
            past: Tokens in the cache that the padding mask also covers.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        if context is None and self.context_dim is not None:
            raise ValueError(f"context must be given: keys are made of {self.context_dim} channels")
        if context is not None:
            check_pattern(self, causal=self.causal, context=True)
            check_tokens("context", context, self.key.in_features, batch=x.shape[0], layer=self.key)
        if cached and not self.causal:
            raise ValueError("cache serves causal=True only")
        source = x if context is None else context
        if padding_mask is not None:
            check_padding(padding_mask, source.shape[0], source.shape[1] + past)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, head_dim={self.head_dim}, causal={self.causal}"


def check_positive(**numbers: int) -> None:
    """Raise a ValueError that names a number below 1, a TypeError for what is no integer."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def rename_projections(
    state: Mapping[str, Tensor], extra: Mapping[str, str], who: str
) -> dict[str, Tensor]:
    """Rename `q_proj`, `k_proj`, `v_proj`, `out_proj` and what else a mechanism has.

    Args:
        state: Weights by their published names.
        extra: Published name -> ours, for whole names.
        who: Whose weights they are, for the message.

    Raises:
        ValueError: A name that the published module does not have.
    """
    parts = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in parts.items() for kind in ("weight", "bias")}
    names |= extra
    for name in state:
        if name not in names:
            raise ValueError(f"{name!r} is no weight of {who}")
    return {names[name]: tensor for name, tensor in state.items()}
