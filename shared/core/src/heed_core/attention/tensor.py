"""Tensor attention: queries attend to pairs of keys, and see what three tokens have in common.

    S_ijk = scale * sum_c q_ic k1_jc k2_kc,    p_i = softmax over all pairs (j, k) of S_i
    o_ic = sum_jk p_ijk v1_jc v2_kc

Alman & Song, "How to capture higher-order correlations? Generalizing matrix softmax attention to
Kronecker computation" (arXiv 2310.04064). The scale is 1 / d unless told otherwise: with entries up
to B, scores then stay below B^3. Higher orders: pass `khatri_rao(k2, k3)` and `khatri_rao(v2, v3)`
as the second keys and values.

`tensor_attention` is exact: time n^3 d per head, memory n d and one tile. `tensor_attention_poly`
takes the exponential's Taylor polynomial of even degree g: with rho = C(d + g, g) monomials, time
n rho d and memory n rho (causal: n rho d; decoding, 2 rho d in all); its error is bounded where
scores are (`taylor_error`).

There is no map of queries and keys to observe or steer: weights are of pairs, (b, h, n, n1, n2).
`tensor_attention_weights` makes them for small n.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.multi_head import check_heads
from heed_core.cache import KVCache, StateCache, check_sequences, restores_cache
from heed_core.kernels.pair_softmax import pair_softmax, wants_triton
from heed_core.kernels.triton_calls import KernelImpl
from heed_core.layers import type_and_place
from heed_core.precision import at_least_float32, without_autocast
from heed_core.tokens import Pattern, check_padding, check_tokens

Method = Literal["exact", "poly", "auto"]
"""Softmax over all pairs, the Taylor polynomial of its exponential, or `poly_pays` decides."""

TOLERANCE = 1e-3
"""Relative error of entries that `poly_pays` allows."""


def tensor_attention(
    query: Float[Tensor, "b h n d"],
    key1: Float[Tensor, "b h n1 d"],
    key2: Float[Tensor, "b h n2 d"],
    value1: Float[Tensor, "b h n1 e"],
    value2: Float[Tensor, "b h n2 e"],
    *,
    mask1: Bool[Tensor, "*#mask1"] | None = None,
    mask2: Bool[Tensor, "*#mask2"] | None = None,
    causal: bool = False,
    distinct: bool = False,
    scale: float | None = None,
    impl: KernelImpl = "auto",
) -> Float[Tensor, "b h n e"]:
    """Exact tensor attention, in tiles, in float32 at least.

    Args:
        query: One row per token that asks.
        key1: First keys.
        key2: Second keys.
        value1: Values of the first keys.
        value2: Values of the second keys.
        mask1: True = may attend, broadcastable to (b, h, n, n1). A pair needs both masks.
        mask2: True = may attend, broadcastable to (b, h, n, n2).
        causal: Both keys of a pair at or before the query, aligned bottom-right.
        distinct: Forbid pairs of twice the same place, j = k.
        scale: Of the products; default 1 / d.
        impl: Who runs the tiles, see `kernels.pair_softmax`.

    Raises:
        ValueError: Shapes that do not fit each other.
        TypeError: A mask that is not boolean.
        UnsupportedBackend: The kernel was asked for and cannot run the call.
    """
    _check_pairs(query, key1, key2, value1, value2)
    mask1, mask2 = _four(mask1, "mask1", query, key1), _four(mask2, "mask2", query, key2)
    scale = 1.0 / query.shape[3] if scale is None else scale
    triton = wants_triton(impl, query, value1)
    with without_autocast(query):
        rows = [at_least_float32(x).contiguous() for x in (query, key1, key2, value1, value2)]
        output: Tensor = pair_softmax(*rows, mask1, mask2, causal, distinct, scale, triton)[0]
    return output.to(query.dtype)


def tensor_attention_weights(
    query: Float[Tensor, "b h n d"],
    key1: Float[Tensor, "b h n1 d"],
    key2: Float[Tensor, "b h n2 d"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h n n1 n2"]:
    """The weights of all pairs, without masks: memory n n1 n2, for small n."""
    scale = 1.0 / query.shape[3] if scale is None else scale
    scores = torch.einsum("bhic,bhjc,bhkc->bhijk", query, key1, key2) * scale
    return scores.flatten(3).softmax(-1).reshape(scores.shape)


def khatri_rao(
    a: Float[Tensor, "b h n d"], b: Float[Tensor, "b h m d"]
) -> Float[Tensor, "b h nm d"]:
    """Products of all pairs of rows, those of `b` running fastest.

    Pairs of keys as keys make `tensor_attention` one of higher order. Pairs have no place in the
    sequence: `causal`, `distinct` and masks of single keys then mean nothing.
    """
    return (a[..., :, None, :] * b[..., None, :, :]).flatten(-3, -2)


def poly_features(x: Float[Tensor, "*batch d"], degree: int) -> Float[Tensor, "*batch rho"]:
    """All monomials of the channels of total degree 0 ... degree, C(d + degree, degree) of them."""
    features = [x.new_ones(*x.shape[:-1], 1)]
    first = [0]  # per monomial of the last degree, the least channel that may still be multiplied
    for _ in range(degree):
        parent = [p for p, start in enumerate(first) for _ in range(start, x.shape[-1])]
        channel = [c for start in first for c in range(start, x.shape[-1])]
        chosen = torch.tensor(parent, device=x.device), torch.tensor(channel, device=x.device)
        features.append(features[-1].index_select(-1, chosen[0]) * x.index_select(-1, chosen[1]))
        first = channel
    return torch.cat(features, dim=-1)


def poly_weights(
    width: int, degree: int, scale: float, *, device: torch.device | None = None
) -> Float[Tensor, " rho"]:
    """Factors scale^|a| / prod(a_c!) of the monomials of `poly_features`, float64."""
    last = [(1.0, 0, 0)]  # per monomial: factor, its last channel and how often that one is in it
    weights = [1.0]
    for _ in range(degree):
        following = []
        for factor, start, count in last:
            for channel in range(start, width):
                repeats = count + 1 if channel == start else 1
                following.append((factor * scale / repeats, channel, repeats))
        last = following
        weights += [factor for factor, _, _ in last]
    return torch.tensor(weights, dtype=torch.float64, device=device)


def taylor_error(largest: float, degree: int) -> float:
    """Relative error of the polynomial of exp(s) for |s| <= largest, e^R sum_(r > g) R^r / r!.

    Below 1, it bounds the error of outputs by 2 eps / (1 - eps) max|v1| max|v2|.
    """
    if largest > 700.0:  # beyond what a float holds
        return math.inf
    term, total, power = 1.0, 0.0, 0
    while power <= degree or term > 1e-18 * max(total, 1e-300):
        power += 1
        term *= largest / power
        if power > degree:
            total += term
        if term == 0.0:
            break
    return math.exp(largest) * total


def poly_pays(
    query: Float[Tensor, "b h n d"],
    key1: Float[Tensor, "b h n1 d"],
    key2: Float[Tensor, "b h n2 d"],
    *,
    degree: int = 4,
    scale: float | None = None,
    tolerance: float = TOLERANCE,
) -> bool:
    """Whether the polynomial is cheaper than all pairs, 6 rho < n1 n2, and close to them.

    This reads the entries, which no graph can: compiled calls get False.

    Args:
        query: One row per token that asks; zeros where its output is not needed.
        key1: First keys; zeros for padding.
        key2: Second keys; zeros for padding.
        degree: Of the polynomial.
        scale: Of the products; default 1 / d.
        tolerance: Of the bound of the error, see `taylor_error`.
    """
    width = query.shape[3]
    if torch.compiler.is_compiling() or query.is_meta:
        return False
    if 6 * math.comb(width + degree, degree) >= key1.shape[2] * key2.shape[2]:
        return False
    largest = _largest_score(query, key1, key2, 1.0 / width if scale is None else scale)
    return taylor_error(largest, degree) < tolerance


def tensor_attention_poly(
    query: Float[Tensor, "b h n d"],
    key1: Float[Tensor, "b h n1 d"],
    key2: Float[Tensor, "b h n2 d"],
    value1: Float[Tensor, "b h n1 e"],
    value2: Float[Tensor, "b h n2 e"],
    *,
    degree: int = 4,
    real1: Bool[Tensor, "b n1"] | None = None,
    real2: Bool[Tensor, "b n2"] | None = None,
    causal: bool = False,
    distinct: bool = False,
    scale: float | None = None,
    strict: bool = False,
    cache: StateCache | None = None,
) -> Float[Tensor, "b h n e"]:
    """Tensor attention by the Taylor polynomial of the exponential.

    Args:
        query: One row per token that asks.
        key1: First keys.
        key2: Second keys.
        value1: Values of the first keys.
        value2: Values of the second keys.
        degree: Of the polynomial, even: then it is positive everywhere.
        real1: First keys that are no padding.
        real2: Second keys that are no padding.
        causal: Both keys at or before the query; n = n1 = n2.
        distinct: Forbid pairs of twice the same place; n1 = n2.
        scale: Of the products; default 1 / d.
        strict: Refuse entries for which the error has no bound (this reads the entries).
        cache: For decoding, causal only: "first", "second" and "same" (b, h, rho, e + 1), the sums
            over earlier tokens of monomials times [values, 1] of the first keys, the second ones
            and of both together, which these tokens renew.

    Raises:
        ValueError: An odd degree, shapes that do not fit, entries that are too large, or a cache
            that is not causal.
    """
    _check_pairs(query, key1, key2, value1, value2)
    _check_poly(query, key1, key2, degree, causal, distinct)
    for name, real, key in (("real1", real1, key1), ("real2", real2, key2)):
        if real is not None:
            check_padding(real, key.shape[0], key.shape[2], name=name)
    scale = 1.0 / query.shape[3] if scale is None else scale
    if strict:
        _check_entries(query, key1, key2, scale, degree)
    if cache is not None:
        check_sequences(cache, query.shape[0])
        if not causal:
            raise ValueError("cache serves causal=True only")
    with without_autocast(query):
        q, k1, k2, v1, v2 = (at_least_float32(x) for x in (query, key1, key2, value1, value2))
        weights = poly_weights(q.shape[3], degree, scale, device=q.device).to(q)
        asked = poly_features(q, degree) * weights
        first, second = poly_features(k1, degree), poly_features(k2, degree)
        first, second = _without_padding(first, real1), _without_padding(second, real2)
        v1, v2 = (torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) for v in (v1, v2))
        if causal:
            sums = {"first": _running(first, v1), "second": _running(second, v2)}
            if distinct:
                sums["same"] = _running(first * second, v1 * v2)
            if cache is not None:
                sums = _continued(sums, cache)
            state = sums["first"] * sums["second"]
            if distinct:
                state = state - sums["same"]
            read = (asked[..., None] * state).sum(-2)
        else:
            whole = (first.mT @ v1) * (second.mT @ v2)
            if distinct:
                whole = whole - (first * second).mT @ (v1 * v2)
            read = asked @ whole
        total = read[..., -1:]
        empty = total <= 0
        output = (read[..., :-1] / total.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return output.to(query.dtype)


class TensorAttention(nn.Module):
    """Self-attention to pairs of tokens, with its projections: queries, two keys, two values.

    Products of two values of variance 1 have variance 1, so that values begin as usual. The order
    is 3, that of pairs: the pairs of `khatri_rao`, as keys, would make it higher, but have no place
    in the sequence that `causal`, `distinct` and masks could speak of.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Both keys of a pair at or before the query.
        distinct: Forbid pairs of twice the same token.
        scale: Of the products; 1 / head_dim if not given.
        method: Exact, by polynomials, or in each call the cheaper one that is close enough; graphs
            are then exact. One call decides for all its samples.
        degree: Of the polynomial.
        strict: With `method="poly"`, refuse entries for which the error has no bound.
        tolerance: With `method="auto"`, of the bound of the polynomial's error; 1e-3 if not given.
        impl: Who runs the tiles of the exact form, see `kernels.pair_softmax`.

    Example:
        >>> TensorAttention(32, heads=4)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self", "causal self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        distinct: bool = False,
        scale: float | None = None,
        method: Method = "exact",
        degree: int = 4,
        strict: bool = False,
        tolerance: float | None = None,
        impl: KernelImpl = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        _check_degree(degree)
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        self.causal, self.distinct, self.scale = causal, distinct, scale
        _check_method(method, strict, tolerance, impl)
        self.method, self.degree, self.strict = method, degree, strict
        self.tolerance = TOLERANCE if tolerance is None else tolerance
        self.impl: KernelImpl = impl
        width = heads * head_dim
        self.query = nn.Linear(dim, width, bias=qkv_bias)
        self.key1 = nn.Linear(dim, width, bias=qkv_bias)
        self.key2 = nn.Linear(dim, width, bias=qkv_bias)
        self.value1 = nn.Linear(dim, width, bias=qkv_bias)
        self.value2 = nn.Linear(dim, width, bias=qkv_bias)
        self.out = nn.Linear(width, dim, bias=out_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        cache: KVCache | StateCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend to pairs.

        Args:
            x: Tokens.
            padding_mask: True = real token, for all tokens so far: with a cache also those before.
            cache: From `new_cache`, for decoding; `causal` only. With `method="auto"` pairs are
                exact.
        """
        check_tokens("x", x, self.dim, layer=self.query)
        past = self._past(x, cache)
        if padding_mask is not None:
            check_padding(padding_mask, x.shape[0], past + x.shape[1], of="tokens so far")
        layers = (self.query, self.key1, self.key2, self.value1, self.value2)
        rows = [self._heads(layer(x)) for layer in layers]
        if isinstance(cache, KVCache):
            rows[1:] = _appended(cache, rows)
        own = None if padding_mask is None else padding_mask[:, past:]
        if not isinstance(cache, KVCache) and self._by_polynomial(rows, own):
            mixed = tensor_attention_poly(
                *rows,
                degree=self.degree,
                real1=own,
                real2=own,
                cache=cache,
                causal=self.causal,
                distinct=self.distinct,
                scale=self.scale,
            )
        else:
            mask = None if padding_mask is None else padding_mask[:, None, None]
            mixed = tensor_attention(
                *rows,
                mask1=mask,
                mask2=mask,
                causal=self.causal,
                distinct=self.distinct,
                scale=self.scale,
                impl=self.impl,
            )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> KVCache | StateCache:
        """An empty cache for decoding: both keys and both values; a state if `method="poly"`.

        Args:
            batch: Sequences decoded together.
            max_len: Tokens that it must hold; a state holds any number.
            dtype: Of keys and values; that of the weights if not given.
        """
        own, device = type_and_place(self.key1)
        dtype = own if dtype is None else dtype
        if self.method == "poly":
            monomials = math.comb(self.head_dim + self.degree, self.degree)
            shape = (batch, self.heads, monomials, self.head_dim + 1)
            exact = torch.promote_types(dtype, torch.float32)
            names = ("first", "second", "same") if self.distinct else ("first", "second")
            zeros = {name: torch.zeros(shape, dtype=exact, device=device) for name in names}
            return StateCache(zeros)
        return KVCache(batch, self.heads, max_len, 2 * self.head_dim, dtype=dtype, device=device)

    def _past(self, x: Tensor, cache: KVCache | StateCache | None) -> int:
        """Tokens before these."""
        if cache is None:
            return 0
        kind = StateCache if self.method == "poly" else KVCache
        if not self.causal or not isinstance(cache, kind):
            raise ValueError(
                f"cache serves causal=True only and must be a {kind.__name__} with "
                f"method={self.method!r}, as from new_cache, got {type(cache).__name__}"
            )
        check_sequences(cache, x.shape[0])
        return cache.length

    def _by_polynomial(self, rows: list[Tensor], padding_mask: Tensor | None) -> bool:
        if self.method == "exact" or (self.method == "poly" and not self.strict):
            return self.method == "poly"
        query, key1, key2 = rows[:3]
        if padding_mask is not None:
            hidden = ~padding_mask[:, None, :, None]
            query, key1, key2 = (x.masked_fill(hidden, 0.0) for x in (query, key1, key2))
        if self.method == "poly":
            scale = 1.0 / self.head_dim if self.scale is None else self.scale
            _check_entries(query, key1, key2, scale, self.degree)
            return True
        return poly_pays(
            query, key1, key2, degree=self.degree, scale=self.scale, tolerance=self.tolerance
        )

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, causal={self.causal}, method={self.method!r}"


def _appended(cache: KVCache, rows: list[Tensor]) -> list[Tensor]:
    """Both keys and both values of all tokens so far."""
    _, key1, key2, value1, value2 = rows
    pairs = cache.append(torch.cat([key1, key2], dim=-1), torch.cat([value1, value2], dim=-1))
    return [half for pair in pairs for half in pair.chunk(2, dim=-1)]


def _without_padding(features: Tensor, real: Tensor | None) -> Tensor:
    return features if real is None else features * real[:, None, :, None].to(features.dtype)


def _running(features: Tensor, value: Tensor) -> Tensor:
    """Sums over tokens so far of outer products, (b, h, n, rho, e)."""
    return (features[..., :, None] * value[..., None, :]).cumsum(2)


def _continued(sums: dict[str, Tensor], cache: StateCache) -> dict[str, Tensor]:
    """Sums that go on from those in the cache, which gets the last of them."""
    sums = {name: total + cache[name][:, :, None] for name, total in sums.items()}
    tokens = sums["first"].shape[2]
    if tokens:
        cache.update({name: total[:, :, -1] for name, total in sums.items()}, tokens=tokens)
    return sums


def _four(mask: Tensor | None, name: str, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean, True = may attend, got {mask.dtype}")
    full = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {full}, got {tuple(mask.shape)}")
    return mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)


def _check_pairs(query: Tensor, key1: Tensor, key2: Tensor, value1: Tensor, value2: Tensor) -> None:
    for name, x in (("query", query), ("key1", key1), ("key2", key2)):
        if x.dim() != 4 or x.shape[:2] != query.shape[:2] or x.shape[3] != query.shape[3]:
            raise ValueError(
                f"{name} must be (batch, heads, tokens, channels) like query "
                f"{tuple(query.shape)}, got {tuple(x.shape)}"
            )
    for name, x, key in (("value1", value1, key1), ("value2", value2, key2)):
        if x.dim() != 4 or x.shape[:3] != key.shape[:3] or x.shape[3] != value1.shape[3]:
            raise ValueError(
                f"{name} must have the tokens of its key {tuple(key.shape)} and the channels of "
                f"value1, got {tuple(x.shape)}"
            )


def _check_degree(degree: int) -> None:
    if degree < 2 or degree % 2:
        raise ValueError(
            f"degree must be even and at least 2 (an odd polynomial can vanish), got {degree}"
        )


def _check_poly(
    query: Tensor, key1: Tensor, key2: Tensor, degree: int, causal: bool, distinct: bool
) -> None:
    _check_degree(degree)
    same = key1.shape[2] == key2.shape[2]
    if distinct and not same:
        raise ValueError(
            f"distinct needs as many key1 as key2, got {key1.shape[2]} and {key2.shape[2]}"
        )
    if causal and not (same and query.shape[2] == key1.shape[2]):
        raise ValueError(
            "causal needs as many query, key1 and key2, got "
            f"{query.shape[2]}, {key1.shape[2]} and {key2.shape[2]}"
        )


def _largest_score(query: Tensor, key1: Tensor, key2: Tensor, scale: float) -> float:
    """A bound of all scores, by the largest entry of each channel."""
    if 0 in (query.numel(), key1.numel(), key2.numel()):
        return 0.0
    tops = [at_least_float32(x.detach()).abs().amax((0, 1, 2)) for x in (query, key1, key2)]
    return abs(scale) * float((tops[0] * tops[1] * tops[2]).sum())


def _check_method(method: Method, strict: bool, tolerance: float | None, impl: KernelImpl) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if method == "poly" and impl != "auto":
        raise ValueError(f"impl={impl!r} has no effect on method='poly'")
    if strict and method != "poly":
        raise ValueError(f"strict=True has no effect without method='poly', got {method!r}")
    if tolerance is not None and method != "auto":
        raise ValueError(f"tolerance={tolerance} has no effect without method='auto'")
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")


def _check_entries(query: Tensor, key1: Tensor, key2: Tensor, scale: float, degree: int) -> None:
    largest = _largest_score(query, key1, key2, scale)
    error = taylor_error(largest, degree)
    if error >= 1.0:
        raise ValueError(
            f"entries are too large for degree={degree}: scores reach R={largest:.3g}, where the "
            f"error eps={error:.3g} is no longer below 1; raise the degree or use tensor_attention"
        )
