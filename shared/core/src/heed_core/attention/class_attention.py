"""Class attention: the class token alone asks, it and all other tokens answer.

    q = W_q x_0,   K = W_k x,   V = W_v x           x_0 the class token, x all tokens with it
    y_0 = concat_h softmax(d^-1/2 q_h K_h^T) V_h W_out
    x_0 <- x_0 + g_1 * CA(LN(x));   x_0 <- x_0 + g_2 * MLP(LN(x_0))       the other tokens stay

Touvron et al., "Going deeper with image transformers" (CaiT, arXiv 2103.17239), with learned scales
g; without them it ends SpectFormer (arXiv 2304.06446), whose class token begins as the mean of the
others (`with_mean_token`). What tokens compute among themselves and what is read out of them do not
share layers, as they do where a class token takes part in self-attention.

Cost for n tokens of width C: time n C^2, memory n C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attend import attend
from heed_core.attention.multi_head import MultiHeadAttention, check_heads
from heed_core.blocks import FeedForward
from heed_core.impl import Impl
from heed_core.tokens import Pattern, check_some, check_tokens


def with_mean_token(x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
    """Put the mean of the tokens before them: m = n + 1.

    Raises:
        ValueError: Another number of axes, or no token.
    """
    check_tokens("x", x, x.shape[-1])
    check_some(x=x)
    return torch.cat([x.mean(1, keepdim=True), x], dim=1)


def class_attention(
    query: Float[Tensor, "b k c"],
    key: Float[Tensor, "b n c"],
    value: Float[Tensor, "b n e"],
    *,
    heads: int,
    mask: Bool[Tensor, "b n"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Float[Tensor, "b k e"]:
    """What class tokens see of all tokens, before the output projection.

    Args:
        query: Of the class tokens, one or several; they do not see each other unless they are among
            the keys.
        key: Of all tokens.
        value: Of all tokens.
        heads: Which the channels are split into.
        mask: True = the token may be attended to.
        scale: Of the products; (c / heads) ** -0.5 if not given.
        dropout: Probability of dropping a weight.
        impl: Back-end of `attend`.

    Raises:
        ValueError: Channels that `heads` does not divide, or shapes that do not fit.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be (batch, tokens, channels), got {tuple(x.shape)}")
    check_heads(query.shape[-1], heads, heads, None)
    check_heads(key.shape[-1], heads, heads, None)
    check_heads(value.shape[-1], heads, heads, None)
    query, key, value = (
        x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)
        for x in (query, key, value)
    )
    allowed = None if mask is None else mask[:, None, None]
    mixed = attend(query, key, value, mask=allowed, scale=scale, dropout=dropout, impl=impl)
    return mixed.transpose(1, 2).flatten(2)


class ClassAttentionBlock(nn.Module):
    """Class attention and a feed-forward of the class token, which is token 0 (pre-norm).

    The site is `attention.attend`: weights (b, heads, 1, n).

    Args:
        dim: Channels of a token.
        heads: Attention heads.
        hidden: Channels inside the feed-forward; 4 dim if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        layer_scale: Start of the learned scales per channel of what is added; none if not given.
            CaiT takes 1e-5 or less.
        dropout: Of weights and inside the feed-forward, in training.
        norm_eps: Of both norms.
        impl: Back-end of `attend`.

    Example:
        >>> block = ClassAttentionBlock(32, heads=4)
        >>> block(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        hidden: int | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = MultiHeadAttention(
            dim, heads=heads, qkv_bias=qkv_bias, dropout=dropout, impl=impl
        )
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.ffn = FeedForward(dim, hidden=hidden, dropout=dropout)
        self.scales = None
        if layer_scale is not None:
            self.scales = nn.Parameter(torch.full((2, dim), layer_scale))

    def forward(
        self, x: Float[Tensor, "b n c"], *, padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Renew the class token; the other tokens come back as they are.

        Args:
            x: Tokens, the class token first.
            padding_mask: True = real token.

        Raises:
            ValueError: Another shape, or no token.
        """
        check_tokens("x", x, self.dim, layer=self.attention.query)
        check_some(x=x)
        first = x[:, :1]
        tokens = self.norm(x)
        seen = self.attention(tokens[:, :1], tokens, padding_mask=padding_mask)
        first = first + (seen if self.scales is None else self.scales[0] * seen)
        more = self.ffn(self.ffn_norm(first))
        first = first + (more if self.scales is None else self.scales[1] * more)
        place = torch.arange(x.shape[1], device=x.device)[:, None]
        return torch.where(place == 0, first, x)


def class_block_from_spectformer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of SpectFormer's class block, `post_network.0` there.

    Raises:
        ValueError: A name is missing or too many.
    """
    names = {
        "norm1": "norm",
        "attn.q": "attention.query",
        "attn.proj": "attention.out",
        "norm2": "ffn_norm",
        "mlp.fc1": "ffn.expand",
        "mlp.fc2": "ffn.contract",
    }
    kinds = [kind for kind in ("weight", "bias") if f"attn.q.{kind}" in state]
    wanted = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    if "bias" not in kinds:
        wanted.discard("attn.q.bias")
    wanted |= {f"attn.kv.{kind}" for kind in kinds}
    if set(state) != wanted:
        raise ValueError(f"names that differ: {sorted(set(state) ^ wanted)}")
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "attn.kv":
            key, value = tensor.chunk(2)
            renamed |= {f"attention.key.{kind}": key, f"attention.value.{kind}": value}
        else:
            renamed[f"{names[module]}.{kind}"] = tensor
    return renamed
