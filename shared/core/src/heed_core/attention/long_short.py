"""Long-short attention: near tokens one by one, far ones by a few summaries, in one softmax.

With tiles of w tokens and L summaries per head (transformer-LS, Eq. 3 to 5):

    K, V = LN(x W_k), LN(x W_v),   P = softmax over tokens of (x W_p),   K~, V~ = LN(P K), LN(P V)
    o_i = softmax over [K~, K_j] of (scale * q_i . k) v,   t w - w // 2 <= j < (t + 1) w + w // 2

for a token i of tile t. Zhu et al., "Long-short transformer" (arXiv 2107.02192), in the variant of
arXiv 2210.07661; not causal, see `causal_long_short`. There is no mask of pairs: a summary holds
all tokens, and whoever may see it sees something of each.

Cost per head for n tokens: time n (2 w + 2 L) d, memory n d. Observed or steered: time n^2 d.

Sites: `compress`, what summaries read, and `attend`, weights of [summaries, tokens].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import masks
from heed_core.attention.projected import ProjectedAttention, check_positive
from heed_core.impl import Impl
from heed_core.recurrence import check_recurrence, join, split
from heed_core.sites import Attend
from heed_core.tokens import Pattern, check_padding, check_shape, check_some

SHORT = 32
"""Up to so many tokens the whole map costs no more."""

Norm = tuple[Float[Tensor, " c"], Float[Tensor, " c"]]
"""Weight and bias of a layer norm over the channels of all heads."""


def read_by_scores(
    site: Attend,
    scores: Float[Tensor, "b h s n"],
    rows: Float[Tensor, "b h n e"],
    mask: Bool[Tensor, "*#mask"] | None = None,
) -> Float[Tensor, "b h s e"]:
    """Rows averaged by the softmax of given scores, at a site."""
    batch, heads, several, length = scores.shape
    asking = rows.new_zeros(batch, heads, several, 1)
    asked = rows.new_zeros(batch, heads, length, 1)
    mixed: Tensor = site(asking, asked, rows, bias=scores, mask=mask, causal=False)
    return mixed


def tiled_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n e"],
    far_key: Float[Tensor, "b h s d"],
    far_value: Float[Tensor, "b h s e"],
    *,
    window: int,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    site: Attend | None = None,
) -> Float[Tensor, "b h n e"]:
    """One softmax over summaries and the tokens of the own tile and half a tile on either side.

    Args:
        query: One row per token.
        key: One row per token.
        value: What is averaged.
        far_key: Of the summaries, which every token sees.
        far_value: What is averaged of them.
        window: Tokens of a tile.
        padding_mask: True = real token.
        site: Where attention is computed, and may be watched; a plain one if not given.
    """
    check_positive(window=window)
    check_recurrence(query, key, value, same_length=True)
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    site = Attend() if site is None else site
    batch, _, n, _ = query.shape
    half, far = window // 2, far_key.shape[2]
    own = torch.arange(n, device=query.device)
    short = not torch.compiler.is_compiling() and n <= SHORT
    if short or site.attachments is not None:
        first = own[:, None] // window * window
        near = (own >= first - half) & (own < first + window + half)
        near = near if padding_mask is None else near & padding_mask[:, None]
        everywhere = near.new_ones(*near.shape[:-1], far)
        allowed = torch.cat([everywhere, near], dim=-1)
        allowed = allowed if padding_mask is None else allowed[:, None]
        pair = (torch.cat(both, dim=2) for both in ((far_key, key), (far_value, value)))
        whole: Tensor = site(query, *pair, mask=allowed, causal=False)
        return whole
    rows = split(query, window)  # (b, h, tiles, w, d)
    tiles = rows.shape[2]
    place = torch.arange(-half, window + half, device=query.device)
    place = window * torch.arange(tiles, device=query.device)[:, None] + place  # (tiles, keys)
    inside = ((place >= 0) & (place < n))[None].expand(batch, -1, -1)
    place = place.clamp(0, max(n - 1, 0))
    if padding_mask is not None:
        inside = inside & padding_mask[:, place]
    allowed = torch.cat([inside.new_ones(batch, tiles, far), inside], dim=-1)

    def tiled(far_rows: Tensor, near_rows: Tensor) -> Tensor:
        some = near_rows.transpose(1, 2)[:, place]  # (b, tiles, keys, h, d)
        every = far_rows.transpose(1, 2)[:, None].expand(-1, tiles, -1, -1, -1)
        return torch.cat([every, some], dim=2).flatten(0, 1).transpose(1, 2)

    mixed: Tensor = site(
        rows.transpose(1, 2).flatten(0, 1),
        tiled(far_key, key),
        tiled(far_value, value),
        mask=allowed.flatten(0, 1)[:, None, None],
        causal=False,
    )
    return join(mixed.reshape(batch, tiles, *mixed.shape[1:]).transpose(1, 2), n)


def long_short_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    value: Float[Tensor, "b h n d"],
    scores: Float[Tensor, "b h s n"],
    near_norm: Norm,
    far_norm: Norm,
    *,
    window: int,
    padding_mask: Bool[Tensor, "b n"] | None = None,
    norm_eps: float = 1e-5,
    sites: tuple[Attend, Attend] | None = None,
) -> Float[Tensor, "b h n d"]:
    """Long-short attention that is not causal.

    Args:
        query: One row per token.
        key: One row per token, before its norm.
        value: One row per token, before its norm.
        scores: Of tokens in the summaries, x W_p: their softmax is P.
        near_norm: Of the keys and values of tokens.
        far_norm: Of those of summaries.
        window: Tokens of a tile.
        padding_mask: True = real token.
        norm_eps: Of the norms.
        sites: Where summaries are read, and where attention is computed.

    Raises:
        ValueError: Shapes that do not fit, a window below 1.
        TypeError: A padding mask that is not boolean.
    """
    check_long_short(query, key, value, near_norm, far_norm)
    check_shape(
        "scores", scores, (*key.shape[:2], None, key.shape[2]), "batch, heads, summaries, tokens"
    )
    compress, attend = (Attend(), Attend()) if sites is None else sites
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
    real = None if padding_mask is None else masks.keys(padding_mask)
    near = [normed_heads(x, near_norm, norm_eps) for x in (key, value)]
    read = read_by_scores(compress, scores, torch.cat(near, dim=-1), real)
    far = (normed_heads(x, far_norm, norm_eps) for x in read.chunk(2, dim=-1))
    return tiled_attention(
        query, *near, *far, window=window, padding_mask=padding_mask, site=attend
    )


def normed_heads(
    heads: Float[Tensor, "b h n d"], norm: Norm, eps: float
) -> Float[Tensor, "b h n d"]:
    """A layer norm over the channels of all heads."""
    tokens = F.layer_norm(heads.transpose(1, 2).flatten(2), norm[0].shape, *norm, eps=eps)
    return tokens.view(*tokens.shape[:2], heads.shape[1], heads.shape[3]).transpose(1, 2)


def check_long_short(
    query: Tensor, key: Tensor, value: Tensor, near_norm: Norm, far_norm: Norm
) -> None:
    """Raise a ValueError if rows and norms do not fit each other."""
    check_recurrence(query, key, value, same_length=False)
    check_some(key=key)
    if value.shape != key.shape:
        raise ValueError(f"value must be {tuple(key.shape)} as key, got {tuple(value.shape)}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query must have at most the tokens of key ({key.shape[2]}), got {query.shape[2]}"
        )
    width = (key.shape[1] * key.shape[3],)
    for name, norm in zip(("near_norm", "far_norm"), (near_norm, far_norm), strict=True):
        for part, x in zip(("weight", "bias"), norm, strict=True):
            check_shape(f"{part} of {name}", x, width, "heads * channels")


class LongShortAttention(ProjectedAttention):
    """Long-short attention that is not causal, with its projections.

    Args:
        dim: Channels of a token, in and out.
        heads: How many.
        window: Tokens of a tile.
        landmarks: Summaries of each head.
        context_dim: Not served: a number raises `UnsupportedPattern`.
        qkv_bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output has a bias.
        causal: Not served: True raises `UnsupportedPattern`; see `CausalLongShortAttention`.
        dropout: Probability of dropping a weight in training.
        norm_eps: Of the layer norms.
        impl: Back-end of the sites.

    Example:
        >>> attention = LongShortAttention(32, heads=4, window=5, landmarks=3)
        >>> attention(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        window: int = 15,
        landmarks: int = 16,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            context_dim=context_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            causal=causal,
        )
        check_positive(window=window, landmarks=landmarks)
        self.window, self.landmarks = window, landmarks
        self.summarise = nn.Linear(dim, heads * landmarks)
        self.near_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.far_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.compress = Attend(impl=impl)
        self.attend = Attend(dropout=dropout, impl=impl)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Attend.

        Args:
            x: Tokens.
            padding_mask: True = real token.
        """
        self.check_call(x, None, padding_mask)
        check_some(x=x)
        query, key, value = self.project(x, None)
        mixed = long_short_attention(
            query,
            key,
            value,
            self.summarise(x).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1),
            (self.near_norm.weight, self.near_norm.bias),
            (self.far_norm.weight, self.far_norm.bias),
            window=self.window,
            padding_mask=padding_mask,
            norm_eps=self.near_norm.eps,
            sites=(self.compress, self.attend),
        )
        return self.join(mixed, x)


def long_short_from_cab(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of the published library's long-short attention, causal or not.

    Raises:
        ValueError: A name that neither has.
    """
    parts = {"W_q": "query", "W_k": "key", "W_v": "value", "W_o": "out", "dconv_fc": "summarise"}
    parts |= {"dual_ln_l": "near_norm", "dual_ln_s": "far_norm", "dconv_1": "summarise"}
    parts |= {"proj_query": "query", "proj_key": "key", "proj_val": "value", "proj_out": "out"}
    parts |= {"dual_ln_win": "near_norm", "dual_ln_dproj": "far_norm"}
    parts |= {"r_net": "near_place.map", "r_net_chunk": "far_place.map"}
    biases = {"r_w_bias": "content_bias", "r_r_bias": "place_bias"}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if name == "pos_emb.inv_freq":
            continue  # a function of the width
        if name in biases:
            result[biases[name]] = tensor.reshape(tensor.shape[1], tensor.shape[-1])
        elif module in parts and kind in ("weight", "bias"):
            result[f"{parts[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of CAB's long-short attention")
    return result
