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
memory N^2 for the scores, plus N b C where keys are gathered. Below `GATHER_FROM` tokens, and where
more than one key in `GATHER_SHARE` is seen, attention is dense under a mask, which is faster there.
It saves products, not time on a CPU: to choose among N^2 scores alone takes longer than fused exact
attention does (`tools/bench attention connectivity-long`).

Differs from the published code: with pruned tokens the number of keys is that of each sample, and
is not remembered; ties keep the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.multi_head import check_heads
from heed_core.attention.projected import check_positive
from heed_core.impl import Impl
from heed_core.recurrence import check_recurrence
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_indices, check_real, check_shape, check_type

GATHER_FROM = 1024
"""Tokens from which `path="auto"` may gather keys."""
GATHER_SHARE = 64
"""Tokens per key seen from which it does: copies of more keys take more time than products."""

Path = Literal["auto", "mask", "gather"]
"""Dense attention under a mask, the chosen keys alone, or by size."""


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
    empty = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if isinstance(k, int):
        return empty.scatter(-1, _largest(scores, k), True)
    order = _largest(scores, scores.shape[-1])
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return empty.scatter(-1, order, (rank < k[..., None]).expand_as(order))


def _largest(scores: Float[Tensor, "*rows m"], k: int) -> Int64[Tensor, "*rows k"]:
    """Where the k largest of each row are, falling; of equal ones those at the lowest index."""
    scores = scores.detach()
    on_cpu = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and 0 < k < scores.shape[-1]:
        values, order = scores.topk(k)
        least = values[..., -1:]  # all are sorted only where equal ones compete for the last place
        if not ((scores == least).sum(-1) > (values == least).sum(-1)).any():
            return order
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]


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


def connectivity_scores(
    query: Float[Tensor, "b h n e"],
    key: Float[Tensor, "b h n e"],
    down: Float[Tensor, "n r"],
    up: Float[Tensor, "n r"],
    *,
    scale: float | None = None,
    threshold: float = 0.02,
    top_coefficients: int | None = None,
    coefficient_threshold: float | None = None,
    kept: Bool[Tensor, "b n"] | None = None,
    dense: bool = False,
) -> Float[Tensor, "b h p n"]:
    """The low-rank guess A~ of all pairs, but for the first token as the query (p = n - 1).

    Args:
        query: q', reduced.
        key: k', reduced.
        down: E.
        up: U.
        scale: Of the products; heads ** -0.5 if not given.
        threshold: Entries of |U| up to this are zero.
        top_coefficients: Largest coefficients of each row that stay; 8, or the rank if it is less,
            if not given.
        coefficient_threshold: Coefficients up to this are zero, and all others stay.
        kept: False = a pruned token, which counts as zero.
        dense: With all coefficients and the signed basis, as for learning.

    Raises:
        ValueError: Shapes that do not fit, or both ways to choose coefficients.
        TypeError: `kept` that is not boolean.
    """
    check_recurrence(query, key, key, same_length=True)
    check_shape("down", down, (key.shape[2], None), "tokens, rank")
    check_shape("up", up, tuple(down.shape), "tokens, rank")
    top_coefficients = _top_coefficients(top_coefficients, coefficient_threshold, down.shape[1])
    found = _coefficients(query, key, down, scale, kept)
    if dense:
        return found @ up.T
    basis = up.abs()
    basis = basis.masked_fill(basis <= threshold, 0)
    if coefficient_threshold is None:
        stays = topk_mask(found, top_coefficients)
    else:
        stays = found > coefficient_threshold
    return found.masked_fill(~stays, 0) @ basis.T


def connectivity_mask(
    scores: Float[Tensor, "b h p n"],
    keys: int,
    *,
    kept: Bool[Tensor, "b n"] | None = None,
    prune_rows: bool = False,
) -> Bool[Tensor, "b h n n"]:
    """Who may attend to whom by scores; arguments as of `connectivity_attention`."""
    if kept is None:
        chosen = topk_mask(scores, keys)
    else:
        scores = scores.masked_fill(~kept[:, None, None], -torch.inf)
        chosen = topk_mask(scores, kept[:, 1:].sum(1).clamp(max=keys)[:, None, None])
        if prune_rows:
            chosen = chosen & kept[:, None, 1:, None]
    return torch.cat([torch.ones_like(chosen[:, :, :1]), chosen], dim=2)


def connectivity_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    scores: Float[Tensor, "b h p n"],
    *,
    keys: int,
    kept: Bool[Tensor, "b n"] | None = None,
    prune_rows: bool = False,
    path: Path = "auto",
    site: Attend | None = None,
) -> Float[Tensor, "b h n e"]:
    """Attention of every token to the keys with the largest scores, of the first one to all.

    Args:
        query: One row per token, the class token first.
        key: One row per token.
        value: What is averaged.
        scores: As of `connectivity_scores`, for all tokens but the first as the query (p = n - 1);
            they get no gradient.
        keys: How many a query sees.
        kept: False = a pruned token: its query, key and value are zero and no patch attends to it.
            The class token does, as in the published code, with the score zero.
        prune_rows: Whether a pruned token also attends to nothing.
        path: How; watched, attention is dense under a mask.
        site: Where attention is computed, and may be watched; a plain one if not given.

    Raises:
        ValueError: Shapes that do not fit, `keys` out of range, an unknown path.
        TypeError: `kept` that is not boolean.
    """
    check_recurrence(query, key, value, same_length=True)
    batch, heads, n, _ = key.shape
    check_shape("scores", scores, (batch, heads, n - 1, n), "batch, heads, queries, keys")
    check_positive(keys=keys)
    if keys > n:
        raise ValueError(f"keys must be at most {n}, the tokens, got {keys}")
    if path not in get_args(Path):
        raise ValueError(f"path must be 'auto', 'mask' or 'gather', got {path!r}")
    if kept is not None:
        _check_kept(kept, key)
        pruned = ~kept[:, None, :, None]
        query, key, value = (part.masked_fill(pruned, 0) for part in (query, key, value))
    site, scores = Attend() if site is None else site, scores.detach()
    few = n >= GATHER_FROM and GATHER_SHARE * keys <= n
    gathers = path == "gather" or (path == "auto" and few)
    if gathers and site.attachments is None:
        return _gathered(site, query, key, value, scores, keys, kept, prune_rows)
    mask = connectivity_mask(scores, keys, kept=kept, prune_rows=prune_rows)
    mixed: Tensor = site(query, key, value, mask=mask, causal=False)
    return mixed


def _gathered(
    site: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    keys: int,
    kept: Tensor | None,
    prune_rows: bool,
) -> Tensor:
    dropout = site.dropout if site.training else 0.0
    counted = None
    if kept is not None:
        scores = scores.masked_fill(~kept[:, None, None], -torch.inf)
        rank = torch.arange(keys, device=scores.device)
        counted = (rank < kept[:, 1:].sum(1)[:, None])[:, None, None]
        if prune_rows:
            counted = counted & kept[:, None, 1:, None]
        counted = counted.expand(*scores.shape[:3], keys)
    order = _largest(scores, keys)
    patches = gathered_attention(
        query[:, :, 1:], key, value, order,
        mask=counted, scale=site.scale, dropout=dropout, impl=site.impl,
    )  # fmt: skip
    first = attend(query[:, :, :1], key, value, scale=site.scale, dropout=dropout, impl=site.impl)
    return torch.cat([first, patches], dim=2)


def _coefficients(
    query: Tensor, key: Tensor, down: Tensor, scale: float | None, kept: Tensor | None
) -> Tensor:
    """All coefficients of all tokens but the first."""
    if kept is not None:
        _check_kept(kept, key)
        pruned = ~kept[:, None, :, None]
        query, key = query.masked_fill(pruned, 0), key.masked_fill(pruned, 0)
    products: Tensor = query[:, :, 1:] @ (key.mT @ down)
    return (products * (query.shape[1] ** -0.5 if scale is None else scale)).softmax(-1)


def _top_coefficients(top: int | None, threshold: float | None, rank: int) -> int:
    if threshold is not None and top is not None:
        raise ValueError(
            f"give top_coefficients or coefficient_threshold, got both, {top} and {threshold}"
        )
    if threshold is not None and not 0.0 <= threshold < 1.0:
        raise ValueError(f"coefficient_threshold must be in [0, 1), got {threshold}")
    top = min(8, rank) if top is None else top
    if not 1 <= top <= rank:
        raise ValueError(f"top_coefficients must be between 1 and rank={rank}, got {top}")
    return top


def _check_kept(kept: Tensor, key: Tensor) -> None:
    if kept.dtype != torch.bool:
        raise TypeError(f"kept must be boolean (False = pruned), got {kept.dtype}")
    check_shape("kept", kept, (key.shape[0], key.shape[2]), "batch, tokens")


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
        top_coefficients = _top_coefficients(top_coefficients, coefficient_threshold, rank)
        self.tokens, self.threshold, self.top_coefficients = tokens, threshold, top_coefficients
        self.coefficient_threshold = coefficient_threshold
        self.scale = heads**-0.5 if scale is None else scale
        self.query = nn.Linear(head_dim, head_dim // reduction)
        self.key = nn.Linear(head_dim, head_dim // reduction)
        self.down = nn.Parameter(torch.empty(tokens, rank))
        self.up = None if shared_basis else nn.Parameter(torch.empty(tokens, rank))
        self._init_weights()

    def _init_weights(self) -> None:
        for weight in (self.query.weight, self.key.weight, self.down, self.up):
            if weight is not None:
                nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.zeros_(self.key.bias)

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
        return _coefficients(self.query(query), self.key(key), self.down, self.scale, kept)

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
        return connectivity_scores(
            self.query(query),
            self.key(key),
            self.down,
            self.down if self.up is None else self.up,
            scale=self.scale,
            threshold=self.threshold,
            top_coefficients=self.top_coefficients if self.coefficient_threshold is None else None,
            coefficient_threshold=self.coefficient_threshold,
            kept=kept,
            dense=dense,
        )

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
        path: As in `connectivity_attention`.
        impl: Back-end of `attend`.

    Example:
        >>> attention = ConnectivityAttention(32, heads=4, tokens=21, keep=0.4, rank=7)
        >>> attention(torch.randn(1, 21, 32)).shape
        torch.Size([1, 21, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})

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
        path: Path = "auto",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, None)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if path not in get_args(Path):
            raise ValueError(f"path must be 'auto', 'mask' or 'gather', got {path!r}")
        self.dim, self.heads, self.tokens, self.prune_rows = dim, heads, tokens, prune_rows
        self.keys = math.ceil(keep * tokens)
        self.path: Path = path
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
        query, key, value = self._projected(x)
        mixed = connectivity_attention(
            query,
            key,
            value,
            self.connectivity(query, key, kept=kept),
            keys=self.keys,
            kept=kept,
            prune_rows=self.prune_rows,
            path=self.path,
            site=self.attend,
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def reconstruct(
        self, x: Float[Tensor, "b n c"]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b h p n"]]:
        """Dense attention, and beside it the dense scores that learn to equal a teacher's weights.

        The predictor's loss is the sum of squares of their difference from the teacher's rows but
        the first.
        """
        query, key, value = self._projected(x)
        mixed: Tensor = self.attend(query, key, value)
        scores = self.connectivity(query, key, dense=True)
        return self.out(mixed.transpose(1, 2).flatten(2)), scores

    def mask(
        self, scores: Float[Tensor, "b h p n"], kept: Bool[Tensor, "b n"] | None = None
    ) -> Bool[Tensor, "b h n n"]:
        """Who may attend to whom, by the predicted scores."""
        return connectivity_mask(scores, self.keys, kept=kept, prune_rows=self.prune_rows)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.tokens, self.dim):
            raise ValueError(
                f"x must be (batch, {self.tokens}, {self.dim}), as the predictor's basis has a row "
                f"per token, got {tuple(x.shape)}"
            )
        check_real(x=x)
        check_type(self.query, x=x)
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return query, key, value

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
