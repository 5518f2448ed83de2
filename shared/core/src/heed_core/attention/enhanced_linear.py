"""Enhanced linear attention: linear in the number of tokens, with a local module beside it.

    q, k = ReLU(W_q x), ReLU(W_k x)      v = W_v x
    o_n = tau_h q_n (sum_m k_m^T v_m) / max(q_n . sum_m k_m, 100)
    LCM(x) = conv7(BN(GELU(conv7(x))))   depth-wise

Zheng, "The linear attention resurrection in vision transformer" (L2ViT, arXiv 2501.16182). tau is
learned per head and multiplies the output; there is no scale of queries and keys. The clamp of the
denominator is that of the released weights: where it acts, the effective weights sum to less than
tau. The sums over tokens are float32 at least, since they overflow float16.

Cost for N tokens of width C in heads of width d: time N C d, memory N C + C d. The effective
weights tau q_n . k_m / max(...) are stated to `observe` (N x N, only while observed; rows sum to
tau or less); there is no softmax to steer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.axial import check_grid
from heed_core.attention.bilevel import depthwise
from heed_core.attention.multi_axis import PartitionAttention
from heed_core.attention.multi_head import check_heads
from heed_core.impl import Impl
from heed_core.precision import at_least_float32, without_autocast
from heed_core.sites import Probe
from heed_core.tokens import Pattern, check_padding, check_some, check_tokens


def enhanced_linear_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    value: Float[Tensor, "b h m e"],
    *,
    temperature: Float[Tensor, "#h 1 1"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    denominator_min: float = 100.0,
    key_first: bool = True,
) -> Float[Tensor, "b h n e"]:
    """Linear attention with ReLU features and a clamped denominator.

    Args:
        query: Before the ReLU.
        key: Before the ReLU.
        value: What is averaged.
        temperature: Factor of the output, per head; 1 if not given.
        padding_mask: True = real token.
        denominator_min: The denominator is at least this.
        key_first: Multiply keys and values first (linear in tokens); otherwise queries and keys
            (quadratic), the same numbers within rounding.
    """
    _check_qkv(query, key, value, padding_mask)
    with without_autocast(query):
        q, k, v = (at_least_float32(x) for x in (query.relu(), key.relu(), value))
        if padding_mask is not None:
            k = k.masked_fill(~padding_mask[:, None, :, None], 0)
            v = v.masked_fill(~padding_mask[:, None, :, None], 0)
        total = k.sum(2, keepdim=True)  # (b, h, 1, d)
        denominator = (q @ total.mT).clamp(min=denominator_min)
        mixed = q @ (k.mT @ v) if key_first else (q @ k.mT) @ v
        output = mixed / denominator
        if temperature is not None:
            output = output * temperature
    return output.to(query.dtype)


def enhanced_linear_weights(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h m d"],
    *,
    temperature: Float[Tensor, "#h 1 1"] | None = None,
    padding_mask: Bool[Tensor, "b m"] | None = None,
    denominator_min: float = 100.0,
) -> Float[Tensor, "b h n m"]:
    """The effective weights: what each value is multiplied by. Arguments as above."""
    q, k = at_least_float32(query.relu()), at_least_float32(key.relu())
    if padding_mask is not None:
        k = k.masked_fill(~padding_mask[:, None, :, None], 0)
    products = q @ k.mT
    weights = products / products.sum(-1, keepdim=True).clamp(min=denominator_min)
    return weights if temperature is None else weights * temperature


class EnhancedLinearAttention(nn.Module):
    """Enhanced linear attention with its projections.

    The site is `probe`: effective weights (b, heads, n, n), to observe only.

    Args:
        dim: Channels of a token, in and out.
        heads: Heads.
        head_dim: Channels of a head; dim / heads if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        denominator_min: As in `enhanced_linear_attention`.

    Example:
        >>> EnhancedLinearAttention(24, heads=3)(torch.randn(1, 42, 24)).shape
        torch.Size([1, 42, 24])
    """

    patterns: ClassVar[frozenset[Pattern]] = frozenset({"self"})

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        denominator_min: float = 100.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads, heads, head_dim)
        if denominator_min <= 0:
            raise ValueError(f"denominator_min must be positive, got {denominator_min}")
        head_dim = dim // heads if head_dim is None else head_dim
        self.dim, self.heads, self.denominator_min = dim, heads, denominator_min
        self.query = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.key = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.value = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), head_dim**-0.5))
        self.probe = Probe()
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(
        self, x: Float[Tensor, "b n c"], *, padding_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Attend from every token to every token; `padding_mask` is True for real ones."""
        check_tokens("x", x, self.dim, layer=self.query)
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = enhanced_linear_attention(
            query,
            key,
            value,
            temperature=self.temperature,
            padding_mask=padding_mask,
            denominator_min=self.denominator_min,
        )
        self.probe(
            lambda: enhanced_linear_weights(
                query,
                key,
                temperature=self.temperature,
                padding_mask=padding_mask,
                denominator_min=self.denominator_min,
            )
        )
        return cast(Tensor, self.out(mixed.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"heads={self.heads}, denominator_min={self.denominator_min}"


class LocalConcentration(nn.Module):
    """Two depth-wise convolutions that bring linear attention back to the neighbourhood.

    No residual inside. With kernel 7 a cell sees 13 x 13 cells.

    Args:
        dim: Channels of a cell.
        kernel: Odd side of the convolutions.
        axes: Spatial axes of the grid, 1 to 3.
    """

    def __init__(self, dim: int, *, kernel: int = 7, axes: int = 2) -> None:
        super().__init__()
        self.dim, self.spatial_axes = dim, axes
        self.first = depthwise(dim, kernel, axes)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](dim)
        self.second = depthwise(dim, kernel, axes)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid."""
        check_grid(x, self.dim, axes=self.spatial_axes)
        check_some(x=x)
        hidden = self.norm(F.gelu(self.first(x.movedim(-1, 1))))
        return cast(Tensor, self.second(hidden)).movedim(1, -1)


class EnhancedLinearBlock(nn.Module):
    """L2ViT's global block: position convolution, linear attention, LCM, feed-forward.

    Args:
        dim: Channels of a cell.
        heads: Heads.
        axes: Spatial axes of the grid, 1 to 3.
        hidden: Channels inside the feed-forward; 4 dim if not given.
        kernel: Of the local concentration module.
        qkv_bias: Whether queries, keys and values have a bias.
        denominator_min: As in `enhanced_linear_attention`.
        dropout: Of what is added to the residual.

    Example:
        >>> EnhancedLinearBlock(24, heads=3)(torch.randn(1, 6, 7, 24)).shape
        torch.Size([1, 6, 7, 24])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        axes: int = 2,
        hidden: int | None = None,
        kernel: int = 7,
        qkv_bias: bool = True,
        denominator_min: float = 100.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.dim, self.spatial_axes = dim, axes
        self.positions = depthwise(dim, 3, axes)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = EnhancedLinearAttention(
            dim, heads=heads, qkv_bias=qkv_bias, denominator_min=denominator_min
        )
        self.local_norm = nn.LayerNorm(dim)
        self.local = LocalConcentration(dim, kernel=kernel, axes=axes)
        self.feed_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid."""
        check_grid(x, self.dim, axes=self.spatial_axes, layer=self.expand)
        check_some(x=x)
        x = x + self.positions(x.movedim(-1, 1)).movedim(1, -1)
        mixed = self.attention(self.attention_norm(x).flatten(1, -2))
        x = x + self.dropout(mixed.reshape(x.shape))
        x = x + self.dropout(self.local(self.local_norm(x)))
        hidden = F.gelu(self.expand(self.feed_norm(x)))
        return x + cast(Tensor, self.dropout(self.contract(hidden)))


class LocalWindowBlock(nn.Module):
    """L2ViT's local block: position convolution, window attention, another one, feed-forward.

    Windows that stand over the end of an axis are filled with zeros after the norm. As published,
    these are keys too: theirs is the bias of keys. There is no relative bias and no shift. The site
    is `attention.attend`, see `PartitionAttention`.

    Args:
        dim: Channels of a cell.
        heads: Heads.
        size: Cells of a window along each axis of the grid, 1 to 3 axes.
        hidden: Channels inside the feed-forward; 4 dim if not given.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Of attention weights and of what is added to the residual.
        impl: Back-end of `attend`.

    Example:
        >>> LocalWindowBlock(24, heads=3, size=(3, 3))(torch.randn(1, 5, 7, 24)).shape
        torch.Size([1, 5, 7, 24])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        size: Sequence[int] = (7, 7),
        hidden: int | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.dim, self.size = dim, tuple(size)
        self.attention = PartitionAttention(
            dim,
            heads=heads,
            size=size,
            qkv_bias=qkv_bias,
            dropout=dropout,
            relative_bias=False,
            impl=impl,
        )
        self.positions = depthwise(dim, 3, len(size))
        self.attention_norm = nn.LayerNorm(dim)
        self.later_positions = depthwise(dim, 3, len(size))
        self.feed_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, hidden)
        self.contract = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b *spatial c"]) -> Float[Tensor, "b *spatial c"]:
        """Transform a grid."""
        check_grid(x, self.dim, axes=len(self.size), layer=self.expand)
        check_some(x=x)
        x = x + self.positions(x.movedim(-1, 1)).movedim(1, -1)
        x = x + self.dropout(self._windows(self.attention_norm(x)))
        x = x + self.later_positions(x.movedim(-1, 1)).movedim(1, -1)
        hidden = F.gelu(self.expand(self.feed_norm(x)))
        return x + cast(Tensor, self.dropout(self.contract(hidden)))

    def _windows(self, x: Tensor) -> Tensor:
        """Attention in windows of a grid of any size."""
        spatial = x.shape[1:-1]
        missing = [-length % cells for length, cells in zip(spatial, self.size, strict=True)]
        ends = [side for count in reversed(missing) for side in (0, count)]
        mixed: Tensor = self.attention(F.pad(x, [0, 0, *ends]))
        for axis, length in enumerate(spatial, start=1):
            mixed = mixed.narrow(axis, 0, length)
        return mixed

    def extra_repr(self) -> str:
        """Show the options that no sub-module shows."""
        return f"size={self.size}"


def enhanced_linear_block_from_l2vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of L2ViT's global block (`LGABlock`).

    Raises:
        ValueError: A name that it does not have.
    """
    names = {
        "norm3": "local_norm",
        "attn": "attention",
        "local_mp.conv1": "local.first",
        "local_mp.bn": "local.norm",
        "local_mp.conv2": "local.second",
    }
    return _from_l2vit(state, names, "LGABlock")


def local_window_block_from_l2vit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of L2ViT's local block (`LWABlock`).

    Raises:
        ValueError: A name that it does not have.
    """
    return _from_l2vit(state, {"cpe.1.proj": "later_positions"}, "LWABlock")


def _from_l2vit(state: Mapping[str, Tensor], own: Mapping[str, str], who: str) -> dict[str, Tensor]:
    names = {
        "cpe.0.proj": "positions",
        "norm1": "attention_norm",
        "norm2": "feed_norm",
        "attn.proj": "attention.out",
        "mlp.fc1": "expand",
        "mlp.fc2": "contract",
        **own,
    }
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"attention.{part}.{kind}"] = rows
        elif module in names:
            result[f"{names[module]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no weight of L2ViT's {who}")
    return result


def _check_qkv(query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None) -> None:
    if (
        query.dim() != 4
        or key.dim() != 4
        or query.shape[:2] != key.shape[:2]
        or query.shape[3] != key.shape[3]
        or value.shape[:3] != key.shape[:3]
    ):
        raise ValueError(
            "query must be (b, h, n, d), key (b, h, m, d) and value (b, h, m, e), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if padding_mask is not None:
        check_padding(padding_mask, key.shape[0], key.shape[2])
