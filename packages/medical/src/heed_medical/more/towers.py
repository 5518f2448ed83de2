"""The two vision transformers of MoRE: X-rays and 12-lead ECGs, with attention dropping.

Thapa et al., "MoRE: Multi-Modal Contrastive Pre-training with Transformers on X-Rays, ECGs, and
Diagnostic Report" (arXiv 2410.16239). In training each block drops keys before the softmax
(DropKey, arXiv 2208.02646), the first block most and the last none.

Differs from the released code: there the share of dropped keys is the same in all blocks, because
its schedule is written to an attribute that nothing reads (`schedule="constant"` does the same);
and no token ever loses all keys: it always keeps itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.blocks import BlockConfig, EncoderBlock

NORM_EPS = 1e-6
ECG_PATCH = 5
"""Samples of one step of the ECG stem, and its kernel sizes."""

Schedule = Literal["linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The transformer of a tower."""

    dim: int = 768
    """Channels of a token."""
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    """Channels inside the feed-forward."""
    key_drop: float = 0.3
    """Share of keys that the first block drops in training."""
    schedule: Schedule = "linear"
    """linear: falls to 0 at the last block; constant: the same in every block."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads={self.heads}, got {self.dim}")
        if not 0 <= self.key_drop < 1:
            raise ValueError(f"key_drop must be in [0, 1), got {self.key_drop}")


def drop_schedule(first: float, depth: int, schedule: Schedule = "linear") -> list[float]:
    """Share of dropped keys of each block.

    Example:
        >>> drop_schedule(0.3, 4)
        [0.3, 0.2, 0.1, 0.0]
    """
    if schedule == "constant" or depth == 1:
        return [first] * depth
    return [round(first * (depth - 1 - block) / (depth - 1), 12) for block in range(depth)]


def kept_keys(
    shape: Sequence[int], share: float, *, device: torch.device | None = None
) -> Bool[Tensor, "b h n n"]:
    """Draw which keys each query of each head may see; a query always sees itself."""
    kept = torch.rand(*shape, device=device) >= share
    return kept | torch.eye(shape[-1], dtype=torch.bool, device=device)


def initial_std(dim: int) -> float:
    """Of weights: 0.02 at the published width of 768, and as much per channel at others."""
    return float(0.02 * (768 / dim) ** 0.5)


class Tower(nn.Module):
    """A class token, learned positions and pre-norm blocks without biases of query, key, value.

    Args:
        config: Of the transformer.
        stem: Makes tokens (b, n, dim) of an input.
        tokens: How many.
    """

    def __init__(self, config: TowerConfig, stem: nn.Module, *, tokens: int) -> None:
        super().__init__()
        self.config = config
        self.stem = stem
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = nn.Parameter(torch.zeros(1, tokens + 1, config.dim))
        block = BlockConfig(
            dim=config.dim,
            heads=config.heads,
            hidden=config.hidden,
            norm_eps=NORM_EPS,
            qkv_bias=False,
        )
        self.blocks = nn.ModuleList(EncoderBlock(block) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.shares = drop_schedule(config.key_drop, config.depth, config.schedule)
        self._init_weights()

    def forward(
        self,
        x: Float[Tensor, "b c *size"],
        *,
        kept: Sequence[Bool[Tensor, "b h n n"]] | None = None,
    ) -> Float[Tensor, "b d"]:
        """The class token after the last block.

        Args:
            x: Images or ECGs.
            kept: Per block, the keys that may be seen, instead of a draw.
        """
        tokens = self.stem(x)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if tokens.shape[1] != self.positions.shape[1]:
            raise ValueError(
                f"x must give {self.positions.shape[1] - 1} tokens, {tuple(x.shape)} gives "
                f"{tokens.shape[1] - 1}"
            )
        tokens = tokens + self.positions
        for number, block in enumerate(self.blocks):
            mask = self._mask(tokens, number) if kept is None else kept[number]
            tokens = block(tokens, mask=mask)
        return cast(Tensor, self.norm(tokens)[:, 0])

    def _mask(self, tokens: Tensor, block: int) -> Tensor | None:
        if not self.training or not self.shares[block]:
            return None
        batch, count, _ = tokens.shape
        shape = (batch, self.config.heads, count, count)
        return kept_keys(shape, self.shares[block], device=tokens.device)

    def _init_weights(self) -> None:
        std = initial_std(self.config.dim)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=std)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class ImageStem(nn.Module):
    """Square patches of an image (b, 3, h, w), each to a token."""

    def __init__(self, dim: int, *, patch: int = 16, channels: int = 3) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Row by row."""
        return cast(Tensor, self.project(x).flatten(2).transpose(1, 2))


class EcgStem(nn.Module):
    """Two convolutions over time: token i comes of the samples 5i to 5i + 24 of all leads."""

    def __init__(self, dim: int, *, width: int = 256, leads: int = 12) -> None:
        super().__init__()
        self.down = nn.Conv1d(leads, width, ECG_PATCH, stride=ECG_PATCH)
        self.down_norm = nn.BatchNorm1d(width)
        self.mix = nn.Conv1d(width, dim, ECG_PATCH)
        self.mix_norm = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "b leads t"]) -> Float[Tensor, "b n d"]:
        """From first to last."""
        x = self.down_norm(torch.relu(self.down(x)))
        x = self.mix_norm(torch.relu(self.mix(x)))
        return x.transpose(1, 2)

    @staticmethod
    def tokens(samples: int) -> int:
        """How many tokens so many samples give."""
        return samples // ECG_PATCH - ECG_PATCH + 1
