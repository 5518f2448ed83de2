"""Causal long-short attention: a window of tokens and summaries of chunks before, in one softmax.

With chunks of c tokens that r summaries each stand for, and a window of w tokens:

    token j with i - w < j <= i:   (s q_i + u) . LN(k_j) + (s q_i + b) . R(i - j)
    summary a of a chunk that ended before that of i:   s q_i . (LN(P k)_a + R'(p))

where P is a softmax within the chunk, p counts summaries back from the latest one that is visible,
s = d^-1/2, and R, R' map sinusoids. Zhu et al., "Long-short transformer" (arXiv 2107.02192), in the
variant of arXiv 2210.07661, whose code lets `memory` zero vectors before the sequence, and the
places of the window there, take part in the softmax: `phantom_slots=True`. `long_short` has the
importer of its weights. There is no mask of pairs: a summary holds all tokens of its chunk.

Cost per head for n tokens: time n (3/2 w + n r / c) d, memory n (3/2 w + n r / c): the scores of
places are a bias. Observed or steered: time n^2 d.

Sites: `compress`, what summaries read, and `attend`, weights of [summaries, tokens].
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.long_short import Norm, check_long_short, normed_heads, read_by_scores
from heed_core.attention.multi_head import check_heads
from heed_core.attention.projected import check_positive
from heed_core.cache import KVCache, restores_cache
from heed_core.impl import Impl
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32
from heed_core.recurrence import join, split
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_shape, check_some, check_tokens


def causal_long_short_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m d"],
    scores: Float[Tensor, "b h m r"],
    near_norm: Norm,
    far_norm: Norm,
    content_bias: Float[Tensor, "h d"],
    place_bias: Float[Tensor, "h d"],
    near_place: Float[Tensor, "h w d"],
    far_place: Float[Tensor, "h p d"],
    *,
    chunk: int,
    phantoms: int | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    norm_eps: float = 1e-5,
    sites: tuple[Attend, Attend] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Causal long-short attention of the last n of m tokens.

    Args:
        query: Of the last n tokens; s is applied here.
        key: One row per token, before its norm.
        value: One row per token, before its norm.
        scores: Of tokens in the r summaries of their chunk.
        near_norm: Of the keys and values of tokens.
        far_norm: Of those of summaries.
        content_bias: u.
        place_bias: b.
        near_place: R, a row for each of the w distances of a window.
        far_place: R', a row per summary back, at least one and as many as the last token sees.
        chunk: Tokens that summaries stand for.
        phantoms: Summaries of nothing before the first, beside places of nothing in windows, as in
            the published code; neither if not given.
        padding_mask: True = real token.
        norm_eps: Of the norms.
        sites: Where summaries are read, and where attention is computed, with scale 1.

    Raises:
        ValueError: Shapes that do not fit, a chunk below 1.
        TypeError: A padding mask that is not boolean.
    """
    check_positive(chunk=chunk)
    check_long_short(query, key, value, near_norm, far_norm)
    check_shape("scores", scores, (*key.shape[:3], None), "batch, heads, tokens, summaries")
    _check_places(key, scores, content_bias, place_bias, near_place, far_place, chunk, phantoms)
    compress, attend = (Attend(), Attend(scale=1.0)) if sites is None else sites
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    n, m = query.shape[2], key.shape[2]
    far_key, far_value, present = _summaries(compress, key, value, scores, chunk, padding_mask)
    far_key, far_value = (normed_heads(x, far_norm, norm_eps) for x in (far_key, far_value))
    if phantoms is not None:
        far_key, far_value = (_after(far_norm[1], phantoms, x) for x in (far_key, far_value))
        present = torch.cat([present.new_ones(present.shape[0], phantoms), present], dim=1)
    near_key, near_value = (normed_heads(x, near_norm, norm_eps) for x in (key, value))
    whole = attend.attachments is not None or n != m
    rows, asking, asked = _blocks(
        query * query.shape[3] ** -0.5, m, near_place.shape[1], whole, phantoms is not None
    )
    allowed = _windows(asking, asked, near_place.shape[1], m, phantoms is not None, padding_mask)
    seen, latest = _visible(asking, present, chunk, scores.shape[3], phantoms or 0)
    blocks, place = rows.shape[2], asked.clamp(0, max(m - 1, 0))

    def beside(summaries: Tensor, tokens: Tensor) -> Tensor:
        every = summaries.transpose(1, 2)[:, None].expand(-1, blocks, -1, -1, -1)
        some = tokens.transpose(1, 2)[:, place]  # (b, blocks, u, h, d)
        if phantoms is not None:
            nothing = near_norm[1].reshape(tokens.shape[1], -1).to(tokens.dtype)
            some = torch.where((asked < 0)[..., None, None], nothing, some)
        return _stacked(torch.cat([every, some], dim=2)).transpose(1, 2)

    # The rows below hold u for both parts; the products of summaries have none.
    far_bias = _by_distance(rows, far_place, latest)
    far_bias = (
        far_bias - at_least_float32((far_key * content_bias[:, None]).sum(-1))[:, :, None, None]
    )
    away = asking[:, :, None] - asked[:, None]
    near_bias = _by_distance(rows + place_bias[:, None, None], near_place, away)
    mixed: Tensor = attend(
        _stacked((rows + content_bias[:, None, None]).transpose(1, 2)),
        beside(far_key, near_key),
        beside(far_value, near_value),
        mask=_stacked(torch.cat([seen, allowed.expand(*seen.shape[:3], -1)], dim=-1))[:, None],
        bias=_stacked(torch.cat([far_bias, near_bias], dim=-1).transpose(1, 2)),
        causal=False,
    )
    by_sample = torch.unflatten(mixed, 0, (query.shape[0], blocks))
    return join(by_sample.transpose(1, 2), n)


def _stacked(x: Tensor) -> Tensor:
    """Samples and blocks as one axis."""
    if not torch.compiler.is_compiling():
        return x.flatten(0, 1)
    blocks = x.shape[1]
    row = torch.arange(x.shape[0] * blocks, device=x.device)
    return x[row // blocks, row % blocks]  # picked rows need no guard on the number of blocks


def _after(nothing: Tensor, count: int, heads: Tensor) -> Tensor:
    """Rows after so many others, which are what a norm makes of zeros: its bias."""
    batch, several, _, width = heads.shape
    empty = nothing.view(several, 1, width).expand(batch, -1, count, -1)
    return torch.cat([empty.to(heads.dtype), heads], dim=2)


def _summaries(
    site: Attend,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    chunk: int,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (b, h, s, d) of the chunks, and whether they hold a real token (b, s)."""
    batch, _, n, width = key.shape
    rows, grades = split(torch.cat([key, value], dim=-1), chunk), split(scores, chunk)
    chunks = rows.shape[2]
    real = torch.ones(batch, 1, n, 1, dtype=key.dtype, device=key.device)
    if padding_mask is not None:
        real = real * padding_mask[:, None, :, None]
    there = split(real, chunk)[..., 0] > 0  # (b, 1, chunks, c)
    read = read_by_scores(
        site,
        grades.mT.transpose(1, 2).flatten(0, 1),  # (b chunks, h, r, c)
        rows.transpose(1, 2).flatten(0, 1),
        there[:, 0].flatten(0, 1)[:, None, None],
    )
    read = read.reshape(batch, chunks, *read.shape[1:]).transpose(1, 2).flatten(2, 3)
    present = there[:, 0].any(-1).repeat_interleave(scores.shape[3], dim=1)
    far_key, far_value = read.tensor_split([width], dim=-1)
    return far_key, far_value, present


def _blocks(
    query: Tensor, m: int, window: int, whole: bool, phantoms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (b, h, blocks, t, d), their places (blocks, t) and those of their keys (blocks, u).

    One block where watched, short or decoding.
    """
    n, device = query.shape[2], query.device
    size = max(16, window // 2)
    if whole or (not torch.compiler.is_compiling() and n <= size):
        asking = torch.arange(m - n, m, device=device)[None]
        first = 1 - window if phantoms else 0
        return query[:, :, None], asking, torch.arange(first, m, device=device)[None]
    rows = split(query, size)
    start = size * torch.arange(rows.shape[2], device=device)[:, None]
    asking = start + torch.arange(size, device=device)
    return rows, asking, start + torch.arange(1 - window, size, device=device)


def _windows(
    asking: Tensor,
    asked: Tensor,
    window: int,
    m: int,
    phantoms: bool,
    padding_mask: Tensor | None,
) -> Tensor:
    """Which keys of its block a query sees, (b or 1, blocks, t, u)."""
    away = asking[:, :, None] - asked[:, None]
    inside = (asked < m) if phantoms else (asked >= 0) & (asked < m)
    allowed = ((away >= 0) & (away < window)) & inside[:, None]
    if padding_mask is None:
        return allowed[None]
    real = padding_mask[:, asked.clamp(0, max(m - 1, 0))] | (asked < 0)
    return allowed & real[:, :, None]


def _visible(
    asking: Tensor, present: Tensor, chunk: int, rank: int, phantoms: int
) -> tuple[Tensor, Tensor]:
    """Which summaries a query sees, (b, blocks, t, s), and how far back they are."""
    summaries = torch.arange(present.shape[1], device=asking.device)
    latest = (asking // chunk * rank + phantoms)[..., None] - 1 - summaries  # (blocks, t, s)
    return (latest >= 0) & present[:, None, None], latest


def _by_distance(rows: Tensor, code: Tensor, away: Tensor) -> Tensor:
    """Products of rows (b, h, blocks, t, d) with the code of each distance (blocks, t, u)."""
    terms = at_least_float32(rows) @ at_least_float32(code)[:, None].mT
    place = away.clamp(0, None).clamp(max=code.shape[1] - 1)
    return terms.gather(-1, place.expand(*rows.shape[:2], *away.shape))


def _check_places(
    key: Tensor,
    scores: Tensor,
    content_bias: Tensor,
    place_bias: Tensor,
    near_place: Tensor,
    far_place: Tensor,
    chunk: int,
    phantoms: int | None,
) -> None:
    _, heads, m, width = key.shape
    check_shape("content_bias", content_bias, (heads, width), "heads, channels")
    check_shape("place_bias", place_bias, (heads, width), "heads, channels")
    check_shape("near_place", near_place, (heads, None, width), "heads, distances, channels")
    check_shape("far_place", far_place, (heads, None, width), "heads, distances, channels")
    seen = (m - 1) // chunk * scores.shape[3] + (phantoms or 0)
    seen = 1 if torch.compiler.is_compiling() else max(1, seen)
    for name, x, least in (("near_place", near_place, 1), ("far_place", far_place, seen)):
        if x.shape[1] < least:
            raise ValueError(f"{name} must have at least {least} distances, got {x.shape[1]}")


class SinusoidMap(nn.Module):
    """Sinusoids of a distance, [sin, cos], mapped to the channels of all heads.

    Args:
        dim: Channels.
        heads: That they are cut into.
        bias: Whether the map has one.
    """

    def __init__(self, dim: int, *, heads: int, bias: bool) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even for sinusoids, got {dim}")
        self.dim, self.heads = dim, heads
        self.map = nn.Linear(dim, dim, bias=bias)

    def forward(self, count: int) -> Float[Tensor, "h p d"]:
        """Rows for distances 0 to count - 1."""
        dtype, device = type_and_place(self.map)
        exact = torch.promote_types(dtype, torch.float32)
        pair = torch.arange(0, self.dim, 2, device=device)
        rate = 10000.0 ** (-pair.to(torch.float64) / self.dim)
        angle = torch.arange(count, device=device)[:, None] * rate
        code = torch.cat([angle.sin(), angle.cos()], dim=-1).to(exact)
        rows: Tensor = self.map(code.to(dtype))
        return rows.reshape(count, self.heads, -1).transpose(0, 1)


class CausalLongShortAttention(nn.Module):
    """Causal long-short attention with its projections.

    Args:
        dim: Channels of a token, in and out; even.
        heads: How many, dividing `dim`.
        window: Tokens seen one by one, the own one included.
        chunk: Tokens that summaries stand for.
        rank: Summaries of a chunk.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        dropout: Probability of dropping a weight in training.
        phantom_slots: Places before the sequence take part, as in the published code.
        memory: Tokens before the sequence, for `phantom_slots`; a multiple of `chunk`.
        norm_eps: Of the layer norms.
        impl: Back-end of the sites.

    Example:
        >>> attention = CausalLongShortAttention(32, heads=4, window=8, chunk=4)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: int = 256,
        chunk: int = 32,
        rank: int = 1,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        phantom_slots: bool = False,
        memory: int = 1024,
        norm_eps: float = 1e-5,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, None)
        check_positive(window=window, chunk=chunk, rank=rank)
        if not isinstance(memory, int) or memory < 0 or (phantom_slots and memory % chunk):
            raise ValueError(f"memory must be a multiple of chunk={chunk}, got {memory!r}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.window, self.chunk, self.rank = window, chunk, rank
        self.phantoms = memory // chunk * rank if phantom_slots else None
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.summarise = nn.Linear(dim, heads * rank)
        self.near_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.far_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.near_place = SinusoidMap(dim, heads=heads, bias=False)
        self.far_place = SinusoidMap(dim, heads=heads, bias=True)
        self.content_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.place_bias = nn.Parameter(torch.zeros(heads, self.head_dim))
        self.compress = Attend(impl=impl)
        self.attend = Attend(scale=1.0, dropout=dropout, impl=impl)
        self.out = nn.Linear(dim, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            padding_mask: True = real token, for all tokens so far: with a cache also those before.
            cache: From `new_cache`, for decoding.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        check_some(x=x)
        key, value, scores = (
            self._heads(layer(x)) for layer in (self.key, self.value, self.summarise)
        )
        if cache is not None:
            key, both = cache.append(key, torch.cat([value, scores], dim=-1))
            value, scores = both.tensor_split([self.head_dim], dim=-1)
        chunks = (key.shape[2] + self.chunk - 1) // self.chunk
        mixed = causal_long_short_attention(
            self._heads(self.query(x)),
            key,
            value,
            scores,
            (self.near_norm.weight, self.near_norm.bias),
            (self.far_norm.weight, self.far_norm.bias),
            self.content_bias,
            self.place_bias,
            self.near_place(self.window),
            self.far_place((self.phantoms or 0) + chunks * self.rank),
            chunk=self.chunk,
            phantoms=self.phantoms,
            padding_mask=padding_mask,
            norm_eps=self.near_norm.eps,
            sites=(self.compress, self.attend),
        )
        return cast(Tensor, self.out(mixed.to(x.dtype).transpose(1, 2).flatten(2)))

    def new_cache(self, batch: int, max_len: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for decoding: keys, and values beside their scores in the summaries.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key)
        return KVCache(
            batch,
            self.heads,
            max_len,
            self.head_dim,
            value_dim=self.head_dim + self.rank,
            dtype=own if dtype is None else dtype,
            device=device,
        )

    def _heads(self, tokens: Tensor) -> Tensor:
        width = tokens.shape[2] // self.heads
        return tokens.view(*tokens.shape[:2], self.heads, width).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return (
            f"heads={self.heads}, window={self.window}, chunk={self.chunk}, rank={self.rank}, "
            f"phantoms={self.phantoms}"
        )
