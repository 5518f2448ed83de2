"""Transformer blocks: feed-forward, encoder and decoder blocks and stacks of them.

Vaswani et al., "Attention is all you need" (arXiv 1706.03762), with what came since as options:
norms before or after (`norm_first`), RMS norm (arXiv 1910.07467), gated activations (arXiv
2002.05202), and those of `MultiHeadAttention`.

Every attention owns an `Attend` named `attend`, so that it is a site for `observe` and `steer`.
Masks are boolean, True = may attend, a real token. A stack of `Encoder` with `causal=True` and a
cache is a decoder-only language model; `Decoder` also attends to a context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn

from heed_core.attention.multi_head import (
    MultiHeadAttention,
    Norm,
    ScoreBias,
    build_norm,
    check_heads,
)
from heed_core.cache import CrossCache, LayerCache, StackCache, restores_cache
from heed_core.impl import Impl
from heed_core.relative import RotaryPositions
from heed_core.tokens import check_tokens

__all__ = [
    "Activation",
    "BlockConfig",
    "Decoder",
    "DecoderBlock",
    "Encoder",
    "EncoderBlock",
    "FeedForward",
    "MultiHeadAttention",
]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "reglu", "geglu", "swiglu"]
"""Of the feed-forward; the last three are gated: activation(gate) * up."""


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "relu": (F.relu, False),
    "gelu": (F.gelu, False),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), False),
    "silu": (F.silu, False),
    "reglu": (F.relu, True),
    "geglu": (F.gelu, True),
    "swiglu": (F.silu, True),
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, for each token alone.

    Gated activations (arXiv 2002.05202) double the first layer: activation(gate) * up, with the
    gate's rows first.

    Args:
        dim: Channels of a token, in and out.
        hidden: Channels between the layers; 4 dim if not given.
        activation: As `Activation`.
        dropout: After the activation, in training.
        bias: Whether the layers have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(_ACTIVATIONS)}, got {activation!r}"
            )
        hidden = 4 * dim if hidden is None else hidden
        self.activation = activation
        self.gated = _ACTIVATIONS[activation][1]
        self.expand = nn.Linear(dim, hidden * (2 if self.gated else 1), bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Apply to every token."""
        activate = _ACTIVATIONS[self.activation][0]
        hidden = self.expand(x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activate(gate) * up
        else:
            hidden = activate(hidden)
        return cast(Tensor, self.contract(self.dropout(hidden)))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockConfig:
    """All that is needed to build a block of an encoder or a decoder."""

    dim: int
    """Channels of a token."""
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    context_dim: int | None = None
    """Channels of a context token (decoder only); `dim` if not given."""
    hidden: int | None = None
    """Channels inside the feed-forward; 4 dim if not given."""
    activation: Activation = "gelu"
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = True
    """Pre-norm: x + f(norm(x)); otherwise post-norm: norm(x + f(x))."""
    dropout: float = 0.0
    """Of what is added to the residual, and inside the feed-forward."""
    attention_dropout: float = 0.0
    """Of attention weights."""
    qkv_bias: bool = True
    bias: bool = True
    """Of the attention's output and the feed-forward."""
    qk_norm: Norm | None = None
    causal: bool = False
    """Of the attention of tokens to themselves; True for language models."""
    window: int | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        check_heads(self.dim, self.heads, kv_heads, self.head_dim)
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


class _Block(nn.Module):
    """What encoder and decoder blocks have in common."""

    def __init__(
        self,
        config: BlockConfig,
        rotary: RotaryPositions | None,
        relative_bias: ScoreBias | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.attention = _self_attention(config, rotary, relative_bias)
        self.feed_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.feed = FeedForward(
            config.dim,
            hidden=config.hidden,
            activation=config.activation,
            dropout=config.dropout,
            bias=config.bias,
        )
        self.dropout = nn.Dropout(config.dropout)

    def _check(self, x: Tensor) -> None:
        """Before the first norm, whose complaint would name no argument."""
        layer = self.feed.expand if isinstance(self.feed, FeedForward) else None
        check_tokens("x", x, self.config.dim, layer=layer)

    def _residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.config.norm_first:
            return x + cast(Tensor, self.dropout(branch(norm(x))))
        return cast(Tensor, norm(x + self.dropout(branch(x))))


class EncoderBlock(_Block):
    """Self-attention and feed-forward, each with a residual and a norm.

    Args:
        config: Of the block.
        rotary: As in `MultiHeadAttention`.
        relative_bias: As in `MultiHeadAttention`.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        rotary: RotaryPositions | None = None,
        relative_bias: ScoreBias | None = None,
    ) -> None:
        super().__init__(config, rotary, relative_bias)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Transform tokens; arguments as of `MultiHeadAttention`."""
        self._check(x)

        def attention(tokens: Tensor) -> Tensor:
            mixed: Tensor = self.attention(
                tokens,
                mask=mask,
                padding_mask=padding_mask,
                bias=bias,
                positions=positions,
                cache=None if cache is None else cache.own,
            )
            return mixed

        x = self._residual(x, self.attention_norm, attention)
        return self._residual(x, self.feed_norm, self.feed)


class DecoderBlock(_Block):
    """Self-attention, attention to a context, and feed-forward, each with a residual and a norm.

    Args:
        config: Of the block; `causal=True` for autoregression.
        rotary: Of the self-attention, as in `MultiHeadAttention`.
        relative_bias: Of the self-attention, as in `MultiHeadAttention`.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        rotary: RotaryPositions | None = None,
        relative_bias: ScoreBias | None = None,
    ) -> None:
        super().__init__(config, rotary, relative_bias)
        self.context_norm = build_norm(config.norm, config.dim, config.norm_eps)
        self.context_attention = _context_attention(config)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "*#cmask"] | None = None,
        context_padding_mask: Bool[Tensor, "#b m"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Transform tokens.

        Args:
            x: Tokens.
            context: What they attend to; not needed once the cache holds it.
            mask: Of tokens to tokens, as in `MultiHeadAttention`.
            padding_mask: Real tokens, as in `MultiHeadAttention`.
            context_mask: Of tokens to the context.
            context_padding_mask: Real tokens of the context.
            positions: Of the tokens, for `rotary`.
            cache: Of this block, see `Decoder.new_cache`.
        """
        self._check(x)

        def own(tokens: Tensor) -> Tensor:
            mixed: Tensor = self.attention(
                tokens,
                mask=mask,
                padding_mask=padding_mask,
                positions=positions,
                cache=None if cache is None else cache.own,
            )
            return mixed

        def other(tokens: Tensor) -> Tensor:
            mixed: Tensor = self.context_attention(
                tokens,
                context,
                mask=context_mask,
                padding_mask=context_padding_mask,
                cache=None if cache is None else cache.context,
            )
            return mixed

        x = self._residual(x, self.attention_norm, own)
        x = self._residual(x, self.context_norm, other)
        return self._residual(x, self.feed_norm, self.feed)


class Encoder(nn.Module):
    """A stack of encoder blocks.

    Args:
        config: Of every block.
        depth: Number of blocks.
        rotary: Serves every block; it has no parameters.
        relative_bias: Called once per block: each block owns what it makes. For one bias that all
            blocks share, pass `bias` to the call.
        final_norm: Norm after the last block; by default with pre-norm only.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        depth: int,
        rotary: RotaryPositions | None = None,
        relative_bias: Callable[[], ScoreBias] | None = None,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderBlock(
                config,
                rotary=rotary,
                relative_bias=None if relative_bias is None else relative_bias(),
            )
            for _ in range(depth)
        )
        self.norm = _final_norm(config, final_norm)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b m"] | None = None,
        bias: Float[Tensor, "*#bias"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Transform tokens; arguments as of `MultiHeadAttention`, the same for every block."""
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                mask=mask,
                padding_mask=padding_mask,
                bias=bias,
                positions=positions,
                cache=None if cache is None else cache[index],
            )
        return cast(Tensor, self.norm(x))

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> StackCache:
        """An empty cache, for blocks that are causal; arguments as of `MultiHeadAttention`."""
        return StackCache(
            LayerCache(cast(EncoderBlock, layer).attention.new_cache(batch, max_len, dtype=dtype))
            for layer in self.layers
        )


class Decoder(nn.Module):
    """A stack of decoder blocks.

    Args:
        config: Of every block.
        depth: Number of blocks.
        rotary: As in `Encoder`.
        relative_bias: As in `Encoder`.
        final_norm: As in `Encoder`.
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        depth: int,
        rotary: RotaryPositions | None = None,
        relative_bias: Callable[[], ScoreBias] | None = None,
        final_norm: bool | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderBlock(
                config,
                rotary=rotary,
                relative_bias=None if relative_bias is None else relative_bias(),
            )
            for _ in range(depth)
        )
        self.norm = _final_norm(config, final_norm)

    @restores_cache
    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m k"] | None = None,
        *,
        mask: Bool[Tensor, "*#mask"] | None = None,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        context_mask: Bool[Tensor, "*#cmask"] | None = None,
        context_padding_mask: Bool[Tensor, "#b m"] | None = None,
        positions: Real[Tensor, "*n"] | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Transform tokens; arguments as of `DecoderBlock`, the same for every block."""
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                context,
                mask=mask,
                padding_mask=padding_mask,
                context_mask=context_mask,
                context_padding_mask=context_padding_mask,
                positions=positions,
                cache=None if cache is None else cache[index],
            )
        return cast(Tensor, self.norm(x))

    def new_cache(
        self, batch: int, max_len: int, *, dtype: torch.dtype | None = None
    ) -> StackCache:
        """An empty cache, for blocks that are causal; arguments as of `MultiHeadAttention`."""
        return StackCache(
            LayerCache(
                cast(DecoderBlock, layer).attention.new_cache(batch, max_len, dtype=dtype),
                CrossCache(),
            )
            for layer in self.layers
        )


def _final_norm(config: BlockConfig, wanted: bool | None) -> nn.Module:
    wanted = config.norm_first if wanted is None else wanted
    return build_norm(config.norm if wanted else None, config.dim, config.norm_eps)


def _self_attention(
    config: BlockConfig, rotary: RotaryPositions | None, relative_bias: ScoreBias | None
) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.dim,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.bias,
        dropout=config.attention_dropout,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        causal=config.causal,
        window=config.window,
        rotary=rotary,
        relative_bias=relative_bias,
        impl=config.impl,
    )


def _context_attention(config: BlockConfig) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.dim,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        context_dim=config.dim if config.context_dim is None else config.context_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.bias,
        dropout=config.attention_dropout,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        impl=config.impl,
    )
