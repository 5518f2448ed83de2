"""Sparse attention with predicted connectivity: a low-rank guess says which keys a query may see.

    q', k' = P_q q, P_k k                            per head, d -> d / reduction
    c = top_j( softmax( s q' (k'^T E) ) )            E: N x r; s = heads ** -0.5 as published
    A~ = c |U|^T, entries of |U| up to a threshold zero       U: N x r
    mask row i = the ceil(keep N) largest of A~_i    the class token, first, sees everything
    O = softmax over the mask of (q . k / sqrt(d)), times v

Wei et al., "Sparsifiner: learning sparse instance-dependent attention for efficient vision
transformers" (arXiv 2303.13755). The mask has no gradient: the predictor learns by reconstruction
of dense attention alone (`ConnectivityAttention.reconstruct`), with signed U and all coefficients.

Cost for N tokens of width C, keeping b keys with rank r: prediction N r (C + N), attention N b C;
memory N^2 for the scores, plus N b C where keys are gathered. Below `GATHER_FROM` tokens attention
is dense under a mask, which is faster there.

Differs from the published code: with pruned tokens the number of keys is that of each sample, and
is not remembered; ties keep the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.multi_head import check_heads
from heed_core.dispatch import Impl
from heed_core.sites import Attend
from heed_core.tokens import check_indices, check_real

GATHER_FROM = 1024
"""Tokens from which `path="auto"` gathers keys."""


def topk_mask(
    scores: Float[Tensor, "*rows m"], k: int | Int[Tensor, "*#rows"]
) -> Bool[Tensor, "*rows m"]:
    """True at the k largest of each row, at the lowest index first where they are equal.

    Args:
        scores: Rows.
        k: How many of each row; a tensor has one number per row, broadcastable.
    """
    if isinstance(k, int) and not 0 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be between 0 and {scores.shape[-1]}, got {k}")
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    wanted = rank < (k[..., None] if isinstance(k, Tensor) else k)
    empty = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return empty.scatter(-1, order, wanted.expand_as(order))


def gathered_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    indices: Int[Tensor, "b h n k"],
    *,
    mask: Bool[Tensor, "b h n k"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n e"]:
    """Attend from each query to keys of its own choice.

    Args:
        query: Of every token.
        key: Of every token.
        value: Of every token.
        indices: The keys of each query; one named twice counts twice.
        mask: True = this choice counts.
        scale: Of the products; d ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        impl: Back-end of `attend`.

    Raises:
        ValueError: Shapes that do not fit; outside of graphs and GPUs, an index of no key.
    """
    if indices.dim() != 4 or indices.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"indices must be {tuple(query.shape[:3])} (b, h, n) and k, got {tuple(indices.shape)}"
        )
    for name, x in (("key", key), ("value", value)):
        if x.dim() != 4 or x.shape[:3] != (*query.shape[:2], key.shape[2]):
            raise ValueError(
                f"{name} must have the batch and heads of query {tuple(query.shape)}, and key and "
                f"value the same tokens, got {tuple(x.shape)}"
            )
    check_indices("indices", indices, key.shape[2], of="keys")
    batch, heads, queries, chosen = indices.shape
    first = torch.arange(batch * heads, device=indices.device) * key.shape[2]
    rows = (indices.flatten(0, 1) + first[:, None, None]).flatten()

    def picked(x: Tensor) -> Tensor:
        """(b, h, m, d) -> (b * h * n, 1, k, d)."""
        found = x.flatten(0, 2).index_select(0, rows)
        return found.reshape(batch * heads * queries, 1, chosen, x.shape[-1])

    mixed = attend(
        query.reshape(batch * heads * queries, 1, 1, query.shape[-1]),
        picked(key),
        picked(value),
        mask=None if mask is None else mask.reshape(batch * heads * queries, 1, 1, chosen),
        scale=scale,
        dropout=dropout,
        impl=impl,
    )
    return mixed.reshape(batch, heads, queries, value.shape[-1])


class LowRankConnectivity(nn.Module):
    """Predict which tokens attend to which, with weights that all heads share.

    Args:
        head_dim: Channels of a query.
        tokens: N, the class token included.
        rank: r.
        heads: Of the attention; sets the published `scale`.
        reduction: Of the channels.
        threshold: Basis entries up to this are zero.
        top_coefficients: Largest coefficients of each row that stay; 8, or the rank if it is less,
            if not given.
        coefficient_threshold: Coefficients up to this are zero, 0.05 in the published code, and
            all others stay.
        shared_basis: Use E for U.
        scale: Of the products; heads ** -0.5 if not given.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        tokens: int,
        rank: int,
        heads: int,
        reduction: int = 2,
        threshold: float = 0.02,
        top_coefficients: int | None = None,
        coefficient_threshold: float | None = None,
        shared_basis: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(head_dim, rank, heads, reduction) < 1 or tokens < 2 or head_dim % reduction:
            raise ValueError(
                "head_dim, rank, heads and reduction must be positive, tokens at least 2, and "
                f"reduction must divide head_dim, got {head_dim, rank, heads, reduction, tokens}"
            )
        if coefficient_threshold is not None and top_coefficients is not None:
            raise ValueError(
                "give top_coefficients or coefficient_threshold, got both, "
                f"{top_coefficients} and {coefficient_threshold}"
            )
        if coefficient_threshold is not None and not 0.0 <= coefficient_threshold < 1.0:
            raise ValueError(
                f"coefficient_threshold must be in [0, 1), got {coefficient_threshold}"
            )
        if top_coefficients is None:
            top_coefficients = min(8, rank)
        if not 1 <= top_coefficients <= rank:
            raise ValueError(
                f"top_coefficients must be between 1 and rank={rank}, got {top_coefficients}"
            )
        self.tokens, self.threshold, self.top_coefficients = tokens, threshold, top_coefficients
        self.coefficient_threshold = coefficient_threshold
        self.scale = heads**-0.5 if scale is None else scale
        self.query = nn.Linear(head_dim, head_dim // reduction)
        self.key = nn.Linear(head_dim, head_dim // reduction)
        self.down = nn.Parameter(torch.empty(tokens, rank))
        self.up = None if shared_basis else nn.Parameter(torch.empty(tokens, rank))
        for basis in (self.down, self.up):
            if basis is not None:
                nn.init.trunc_normal_(basis, std=0.02)

    def coefficients(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        *,
        kept: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h p r"]:
        """All coefficients of all tokens but the first.

        Args:
            query: Of the attention.
            key: Of the attention.
            kept: False = a pruned token, which counts as zero.
        """
        asking, asked = self.query(query), self.key(key)
        if kept is not None:
            pruned = ~kept[:, None, :, None]
            asking, asked = asking.masked_fill(pruned, 0), asked.masked_fill(pruned, 0)
        products: Tensor = asking[:, :, 1:] @ (asked.mT @ self.down)
        return (products * self.scale).softmax(-1)

    def forward(
        self,
        query: Float[Tensor, "b h n d"],
        key: Float[Tensor, "b h n d"],
        *,
        kept: Bool[Tensor, "b n"] | None = None,
        dense: bool = False,
    ) -> Float[Tensor, "b h p n"]:
        """Scores of all pairs, but for the first token as the query (p = n - 1).

        Args:
            query: Of the attention.
            key: Of the attention.
            kept: As in `coefficients`.
            dense: With all coefficients and the signed basis, as for learning.
        """
        found = self.coefficients(query, key, kept=kept)
        basis: Tensor = self.down if self.up is None else self.up
        if dense:
            return found @ basis.T
        basis = basis.abs()
        basis = basis.masked_fill(basis <= self.threshold, 0)
        if self.coefficient_threshold is None:
            stays = topk_mask(found, self.top_coefficients)
        else:
            stays = found > self.coefficient_threshold
        return found.masked_fill(~stays, 0) @ basis.T

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        rank = self.down.shape[1]
        stays = f"top_coefficients={self.top_coefficients}"
        if self.coefficient_threshold is not None:
            stays = f"coefficient_threshold={self.coefficient_threshold}"
        return f"tokens={self.tokens}, rank={rank}, {stays}"


class ConnectivityAttention(nn.Module):
    """Multi-head attention under a predicted mask; the first token is the class token.

    The site is `attend`: weights (b, heads, n, n), zero outside the mask. While it is observed or
    steered keys are not gathered.

    Args:
        dim: Channels of a token, in and out.
        heads: Heads.
        tokens: N, the class token included.
        keep: Share of the keys that a query sees.
        rank: Of the predictor.
        reduction: Of the predictor's channels.
        threshold: Of the predictor's basis.
        top_coefficients: Of the predictor.
        coefficient_threshold: Of the predictor, instead of `top_coefficients`.
        shared_basis: Of the predictor.
        qkv_bias: Whether queries, keys and values have a bias.
        prune_rows: Whether a pruned token also attends to nothing.
        dropout: Probability of dropping a weight in training.
        path: "mask" is dense attention under a mask, "gather" takes the chosen keys alone, "auto"
            goes by size.
        impl: Back-end of `attend`.

    Example:
        >>> attention = ConnectivityAttention(32, heads=4, tokens=21, keep=0.4, rank=7)
        >>> attention(torch.randn(1, 21, 32)).shape
        torch.Size([1, 21, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        tokens: int,
        keep: float = 0.25,
        rank: int = 32,
        reduction: int = 2,
        threshold: float = 0.02,
        top_coefficients: int | None = None,
        coefficient_threshold: float | None = None,
        shared_basis: bool = False,
        qkv_bias: bool = True,
        prune_rows: bool = False,
        dropout: float = 0.0,
        path: Literal["auto", "mask", "gather"] = "auto",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, None)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if path not in ("auto", "mask", "gather"):
            raise ValueError(f"path must be 'auto', 'mask' or 'gather', got {path!r}")
        self.dim, self.heads, self.tokens, self.prune_rows = dim, heads, tokens, prune_rows
        self.keys, self.path = math.ceil(keep * tokens), path
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.connectivity = LowRankConnectivity(
            dim // heads,
            tokens=tokens,
            rank=rank,
            heads=heads,
            reduction=reduction,
            threshold=threshold,
            top_coefficients=top_coefficients,
            coefficient_threshold=coefficient_threshold,
            shared_basis=shared_basis,
        )
        self.attend = Attend(dropout=dropout, impl=impl)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], *, kept: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend under the predicted mask.

        Args:
            x: Tokens, the class token first.
            kept: False = a pruned token: its query, key and value are zero and no patch attends to
                it. The class token does, as in the published code, with the score zero.
        """
        query, key, value = self._projected(x, kept)
        scores = self.connectivity(query, key, kept=kept).detach()
        if self._gathers():
            mixed = self._gathered(query, key, value, scores, kept)
        else:
            mixed = self.attend(query, key, value, mask=self.mask(scores, kept))
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def reconstruct(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h p n"]]:
        """Dense attention, and beside it the dense scores that learn to equal a teacher's weights.

        The predictor's loss is the sum of squares of their difference from the teacher's rows but
        the first.
        """
        query, key, value = self._projected(x, None)
        mixed: Tensor = self.attend(query, key, value)
        scores = self.connectivity(query, key, dense=True)
        return self.out(mixed.transpose(1, 2).flatten(2)), scores

    def mask(
        self, scores: Float[Tensor, "b h p n"], kept: Bool[Tensor, "b n"] | None = None
    ) -> Bool[Tensor, "b h n n"]:
        """Who may attend to whom, by the predicted scores."""
        if kept is None:
            chosen = topk_mask(scores, self.keys)
        else:
            scores = scores.masked_fill(~kept[:, None, None], -torch.inf)
            budget = kept[:, 1:].sum(1).clamp(max=self.keys)
            chosen = topk_mask(scores, budget[:, None, None])
            if self.prune_rows:
                chosen = chosen & kept[:, None, 1:, None]
        return torch.cat([torch.ones_like(chosen[:, :, :1]), chosen], dim=2)

    def _projected(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.tokens, self.dim):
            raise ValueError(
                f"x must be (batch, {self.tokens}, {self.dim}), as the predictor's basis has a row "
                f"per token, got {tuple(x.shape)}"
            )
        check_real(x=x)
        if kept is not None:
            if kept.dtype != torch.bool:
                raise TypeError(f"kept must be boolean (False = pruned), got {kept.dtype}")
            if kept.shape != x.shape[:2]:
                raise ValueError(f"kept must be {tuple(x.shape[:2])}, got {tuple(kept.shape)}")
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        if kept is not None:
            pruned = ~kept[:, None, :, None]
            query, key, value = (part.masked_fill(pruned, 0) for part in (query, key, value))
        return query, key, value

    def _gathers(self) -> bool:
        if self.attend.attachments is not None:
            return False
        return self.path == "gather" or (self.path == "auto" and self.tokens >= GATHER_FROM)

    def _gathered(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, kept: Tensor | None
    ) -> Tensor:
        dropout = self.attend.dropout if self.training else 0.0
        impl = self.attend.impl
        counted = None
        if kept is not None:
            scores = scores.masked_fill(~kept[:, None, None], -torch.inf)
            rank = torch.arange(self.keys, device=scores.device)
            counted = (rank < kept[:, 1:].sum(1)[:, None])[:, None, None]
            if self.prune_rows:
                counted = counted & kept[:, None, 1:, None]
            counted = counted.expand(*scores.shape[:3], self.keys)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.keys]
        patches = gathered_attention(
            query[:, :, 1:], key, value, order, mask=counted, dropout=dropout, impl=impl
        )
        first = attend(query[:, :, :1], key, value, dropout=dropout, impl=impl)
        return torch.cat([first, patches], dim=2)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, tokens={self.tokens}, keys={self.keys}"


def connectivity_attention_from_sparsifiner(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of Sparsifiner's `Attention` with its `mask_predictor`.

    Raises:
        ValueError: A name that it does not have.
    """
    names = {
        "proj": "out",
        "mask_predictor.proj_c_q": "connectivity.query",
        "mask_predictor.proj_c_k": "connectivity.key",
    }
    bases = {
        "mask_predictor.proj_n": "connectivity.down",
        "mask_predictor.proj_back_n": "connectivity.up",
    }
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"{part}.{kind}"] = rows
        elif name in bases:
            result[bases[name]] = tensor
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of Sparsifiner's Attention")
    return result
