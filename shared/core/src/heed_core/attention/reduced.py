"""Reduced attention: self-attention with merged, shared or missing matrices.

    S = scale * X W_QK X^T        Y = softmax(S) X W_VO        scale = (C / H) ** -0.5

Between its matrices it is `attend(q, k, v)`, with k the queries or X and v the values or X.

Bermeitinger, Hrycej, Pavone, Kath and Handschuh, "Reducing the transformer architecture to a
minimum" (arXiv 2410.13732). With one head nothing is lost by merging: W_QK = W_Q W_K^T, W_VO = W_V
W_O. Parameters of a layer of width N without biases:

| qk             | W_QK                    | parameters  | vo        | output      | parameters |
|----------------|-------------------------|-------------|-----------|-------------|------------|
| separate       | W_Q W_K^T               | 2 N^2       | separate  | A X W_V W_O | 2 N^2      |
| collapsed      | one matrix              | N^2         | collapsed | A X W_VO    | N^2        |
| symmetric      | W_Q W_Q^T, as published | N^2         | none      | A X         | 0          |
| cholesky       | T T^T, T triangular     | N (N+1) / 2 |           |             |            |
| symmetric-full | one symmetric matrix    | N (N+1) / 2 |           |             |            |

Symmetric scores do not make the weights symmetric: softmax normalises rows. A merged W_QK of each
of several heads would need N^2 per head, more than it replaces: only `separate` and `symmetric`,
and `vo` `separate` and `none`, are for more than one head.

Cost for n tokens of width C: time n^2 C, memory n C with fused kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.cache import KVCache, restores_cache
from heed_core.constants import WithConstants
from heed_core.impl import Impl
from heed_core.layers import held_matrix_and_bias, type_and_place
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_dtype, check_tokens, with_padding

QueryKey = Literal["separate", "collapsed", "symmetric", "cholesky", "symmetric-full"]
ValueOut = Literal["separate", "collapsed", "none"]
ONE_HEAD = ("collapsed", "cholesky", "symmetric-full")


class ReducedAttention(nn.Module):
    """Self-attention with as few matrices as its options say.

    Args:
        dim: Channels of a token, N.
        heads: More than one only with `qk` separate or symmetric and `vo` separate or none.
        qk: How scores are made; see the table above.
        vo: How values are made and mixed. none: each output is a convex combination of the tokens
            (of their slices, with several heads).
        bias: Whether every matrix that is there has a bias.
        dropout: Probability of dropping a weight in training.
        causal: A token sees itself and those before it.
        impl: Back-end of `attend`.

    Example:
        >>> minimum = ReducedAttention(16, qk="collapsed", vo="none")
        >>> minimum(torch.randn(1, 5, 16)).shape, sum(p.numel() for p in minimum.parameters())
        (torch.Size([1, 5, 16]), 256)
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        qk: QueryKey = "separate",
        vo: ValueOut = "separate",
        bias: bool = False,
        dropout: float = 0.0,
        causal: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        _check_options(dim, heads, qk, vo)
        self.dim, self.heads, self.qk, self.vo = dim, heads, qk, vo
        packed = qk in ("cholesky", "symmetric-full")
        self.query = _Triangle(dim, qk, bias=bias) if packed else nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias) if qk == "separate" else None
        self.value = None if vo == "none" else nn.Linear(dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias) if vo == "separate" else None
        scale = (dim / heads) ** -0.5
        self.attend = Attend(causal=causal, scale=scale, dropout=dropout, impl=impl)

    @property
    def causal(self) -> bool:
        """Whether a token sees itself and those before it only."""
        return self.attend.causal

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            mask: True = may attend, broadcastable to (b, heads, n, m), m = n; with a cache m counts
                its tokens too.
            padding_mask: True = real token, for all tokens so far: with a cache also those before.
            cache: From `new_cache`, for decoding; `causal` only.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        if cache is not None and not self.causal:
            raise ValueError("cache serves causal=True only")
        made = self.query(x)
        value = x if self.value is None else self.value(x)
        query, key, value = (self._heads(t) for t in (made, self._keys(x, made), value))
        if cache is not None:
            key, value = cache.append(key, value)
        mask = with_padding(mask, padding_mask, key, heads=self.heads, queries=x.shape[1])
        mixed = self.attend(query, key, value, mask=mask)
        y: Tensor = mixed.transpose(1, 2).flatten(2)
        return y if self.out is None else self.out(y)

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for decoding; without matrices of their own, keys or values are tokens.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.query)
        dtype = own if dtype is None else dtype
        width = self.dim // self.heads
        return KVCache(batch, self.heads, max_len, width, dtype=dtype, device=device)

    @torch.no_grad()
    def collapse(self) -> ReducedAttention:
        """The same function with one matrix for the scores and one for the values.

        Exact, biases included, for every query that may attend to something: what a bias adds to
        all keys alike falls out of the softmax, and what is added to every value is added to the
        output. A query that may attend to nothing gives 0, where `out` would have added its bias.

        Raises:
            ValueError: There are several heads, or layers that are not plain, such as adapters.
        """
        if self.heads > 1:
            raise ValueError(
                f"{self.heads} heads cannot be collapsed: each would need a {self.dim} x "
                f"{self.dim} matrix of its own, which is more than it replaces"
            )
        vo: ValueOut = "none" if self.vo == "none" else "collapsed"
        scores, key_shift = self.score_matrix()
        small = ReducedAttention(self.dim, qk="collapsed", vo=vo, bias=key_shift is not None)
        small.attend.causal, small.attend.impl = self.attend.causal, self.attend.impl
        small.attend.dropout = self.attend.dropout
        small.to(scores.device, scores.dtype).train(self.training)
        query = cast(nn.Linear, small.query)
        query.weight.copy_(scores.T)  # q_i = x_i W_QK
        if key_shift is not None:
            query.bias.copy_(key_shift)
        if small.value is not None:
            values, shift = self._value_matrix()
            small.value.weight.copy_(values.T)
            if shift is not None:
                small.value.bias.copy_(shift)
        return small

    def score_matrix(self) -> tuple[Float[Tensor, "c c"], Float[Tensor, " c"] | None]:
        """W and b of a layer with one head: scores are scale * (x_i W + b) x_j^T, up to a row."""
        if self.heads > 1:
            raise ValueError(f"{self.heads} heads have no common matrix of scores")
        into_query, shift = _held("query", self.query)
        if self.qk in ("collapsed", "symmetric-full"):
            return into_query.T, shift
        into_key = into_query if self.key is None else _held("key", self.key)[0]
        return into_query.T @ into_key, None if shift is None else shift @ into_key

    def _value_matrix(self) -> tuple[Tensor, Tensor | None]:
        assert self.value is not None
        weight, shift = _held("value", self.value)
        values = weight.T
        if self.out is None:
            return values, shift
        merged = values @ _held("out", self.out)[0].T
        return merged, None if shift is None else cast(Tensor, self.out(shift))

    def _keys(self, x: Tensor, query: Tensor) -> Tensor:
        if self.key is not None:
            return cast(Tensor, self.key(x))
        return query if self.qk in ("symmetric", "cholesky") else x

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        return tokens.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, qk={self.qk!r}, vo={self.vo!r}"


class SharedValueStack(nn.Module):
    """Layers without values of their own and one value matrix behind the last.

        X_l = softmax(scale * X_(l-1) W_l X_(l-1)^T) X_(l-1)        Y = X_L W_VO

    What a stack without norms, residuals and MLPs comes to when its matrices are merged.

    Args:
        layers: Each with `vo="none"`.
        bias: Whether the value matrix has a bias.
    """

    def __init__(self, layers: Sequence[ReducedAttention], *, bias: bool = False) -> None:
        super().__init__()
        if not layers or any(layer.vo != "none" for layer in layers):
            raise ValueError('layers must be at least one, each with vo="none"')
        self.layers = nn.ModuleList(layers)
        self.value = nn.Linear(layers[0].dim, layers[0].dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "*#mask"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend in every layer; the mask is the same for all."""
        for layer in self.layers:
            x = layer(x, mask=mask)
        return cast(Tensor, self.value(x))


@torch.no_grad()
def collapse_stack(layers: Sequence[ReducedAttention]) -> SharedValueStack:
    """The stack that computes `layers` one after the other with one value matrix for all.

    Every layer's values are linear in those of the layer before, so that W_VO of the first l layers
    moves into the scores of the next: W_QK -> P W_QK P^T with P = W_VO,1 ... W_VO,l.

    Raises:
        ValueError: A layer has several heads or a bias, which moves into nothing, or is not plain.
    """
    if not layers or any(_held("query", layer.query)[1] is not None for layer in layers):
        raise ValueError("layers must be at least one, without biases")
    merged, moved = [], torch.eye(layers[0].dim).to(_held("query", layers[0].query)[0])
    for layer in layers:
        scores, _ = layer.score_matrix()
        small = ReducedAttention(layer.dim, qk="collapsed", vo="none", causal=layer.attend.causal)
        small.to(scores.device, scores.dtype)
        cast(nn.Linear, small.query).weight.copy_((moved @ scores @ moved.T).T)
        merged.append(small)
        if layer.value is not None:
            moved = moved @ layer._value_matrix()[0]
    stack = SharedValueStack(merged).to(moved.device, moved.dtype)
    stack.value.weight.copy_(moved.T)
    return stack


class _Triangle(WithConstants):
    """A linear map whose matrix is made of N (N+1) / 2 numbers: triangular, or symmetric."""

    def __init__(self, dim: int, kind: QueryKey, *, bias: bool) -> None:
        super().__init__()
        self.dim, self.kind = dim, kind
        self.packed = nn.Parameter(torch.empty(dim * (dim + 1) // 2))
        nn.init.uniform_(self.packed, -(dim**-0.5), dim**-0.5)  # as nn.Linear's
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.make_constants()

    def constants(self) -> Mapping[str, Tensor]:
        """Where the numbers lie in the matrix."""
        rows, columns = torch.tril_indices(self.dim, self.dim)
        return {"place": rows * self.dim + columns}

    @property
    def weight(self) -> Tensor:
        """(out, in), as that of a linear layer: x @ weight.T."""
        place = cast(Tensor, self.place)
        lower = self.packed.new_zeros(self.dim**2).index_copy(0, place, self.packed)
        lower = lower.view(self.dim, self.dim)
        return lower.T if self.kind == "cholesky" else lower + lower.tril(-1).T

    def forward(self, x: Tensor) -> Tensor:
        """Rows times the matrix."""
        check_dtype(self.packed.dtype, x=x)
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, kind={self.kind!r}, bias={self.bias is not None}"


def _held(name: str, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, _Triangle):
        return layer.weight, layer.bias
    return held_matrix_and_bias(name, layer)


def _check_options(dim: int, heads: int, qk: QueryKey, vo: ValueOut) -> None:
    for name, value, allowed in (("qk", qk, get_args(QueryKey)), ("vo", vo, get_args(ValueOut))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if dim < 1 or heads < 1 or dim % heads:
        raise ValueError(f"heads must divide dim={dim}, got {heads}")
    if heads > 1 and (qk in ONE_HEAD or vo == "collapsed"):
        raise ValueError(
            f"qk={qk!r}, vo={vo!r} need one head, got {heads}: every head would need a {dim} x "
            f"{dim} matrix of its own, which is more than the two that it replaces"
        )
