"""A transformer over the patches of a slide in the manner of TransMIL (arXiv 2106.00908).

Two layers of Nystrom attention with a class token, and between them convolutions of three sizes
over the patches laid out in a square. A peer to compare with: built from the paper's description,
not checked against its code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core import Attend

PINV_STEPS = 6


class NystromAttention(nn.Module):
    """Attention through landmark tokens (arXiv 2102.03902).

        softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V

    Q~ and K~ are means over equal runs of tokens. Time O(n m d) with m landmarks.

    Args:
        dim: Channels of a token.
        heads: Divides `dim`.
        landmarks: m; fewer where there are fewer tokens.
        dropout: Of the projected tokens, while training.
    """

    def __init__(self, dim: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_landmarks, self.among_landmarks, self.from_landmarks = Attend(), Attend(), Attend()
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))
        self.local = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)

    def forward(self, x: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 n d"]:
        """All tokens, mixed."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        near, far, inverse = self._landmarks(query, key)
        summary = self.from_landmarks(near, key, value)  # (1, h, m, e)
        mixed = self.to_landmarks(query, far, inverse @ summary) + self.local(value)
        projected: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return projected

    def first_row(self, x: Float[Tensor, "1 n d"]) -> Float[Tensor, "h n"]:
        """How the first token weights the others, without the local term; may be negative."""
        query, key, _ = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        near, far, inverse = self._landmarks(query, key)
        scale = query.shape[-1] ** -0.5
        summary = F.softmax(near @ key.transpose(-2, -1) * scale, dim=-1)
        row = F.softmax(query[:, :, :1] @ far.transpose(-2, -1) * scale, dim=-1)
        return (row @ inverse @ summary)[0, :, 0]

    def _landmarks(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = min(self.landmarks, query.shape[2])
        near, far = _run_means(query, count), _run_means(key, count)
        eye = torch.eye(count, dtype=far.dtype, device=far.device).expand(*far.shape[:2], -1, -1)
        return near, far, _pseudo_inverse(self.among_landmarks(near, far, eye))


def _run_means(x: Float[Tensor, "1 h n e"], count: int) -> Float[Tensor, "1 h m e"]:
    pooled = F.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), count)
    return pooled.transpose(1, 2).reshape(*x.shape[:2], count, x.shape[3])


def _pseudo_inverse(a: Float[Tensor, "1 h m m"]) -> Float[Tensor, "1 h m m"]:
    """Iterated, of third order, from a start that always converges."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-2, -1) / (a.abs().sum(-1).max() * a.abs().sum(-2).max())
    for _ in range(PINV_STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class TransMilBody(nn.Module):
    """Patches to one vector. Each bag goes through alone: the square layout is its own.

    Args:
        dim: Channels of a patch.
        heads: Attention heads.
        landmarks: Of the attention.
        dropout: Of the attention's projection.
    """

    def __init__(self, dim: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.class_token, std=0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.layers = nn.ModuleList(
            NystromAttention(dim, heads=heads, landmarks=landmarks, dropout=dropout)
            for _ in range(2)
        )
        self.positions = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in (7, 5, 3)
        )

    def forward(
        self, h: Float[Tensor, "b n d"], key_mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1 n"]]:
        """The class token, and how it weights the patches in the last layer (positive part)."""
        vectors, shares = [], []
        for index, bag in enumerate(h):
            real = bag if key_mask is None else bag[key_mask[index]]
            vector, share = self._bag(real.unsqueeze(0))
            if key_mask is not None:
                share = h.new_zeros(len(bag)).masked_scatter(key_mask[index], share)
            vectors.append(vector)
            shares.append(share)
        return torch.stack(vectors), torch.stack(shares).unsqueeze(1)

    def _bag(self, patches: Float[Tensor, "1 n d"]) -> tuple[Tensor, Tensor]:
        count = patches.shape[1]
        side = math.isqrt(count - 1) + 1
        cycle = torch.arange(side * side, device=patches.device) % count
        x = torch.cat([self.class_token.to(patches.dtype), patches[:, cycle]], dim=1)
        x = x + self.layers[0](self.norms[0](x))
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        placed = grid + sum(conv(grid) for conv in self.positions)
        x = torch.cat([x[:, :1], placed.flatten(2).transpose(1, 2)], dim=1)
        last, last_layer = self.norms[1](x), self.layers[1]
        assert isinstance(last_layer, NystromAttention)
        x = x + last_layer(last)
        with torch.no_grad():
            row = last_layer.first_row(last).mean(dim=0)[1:].clamp(min=0)
            share = row.new_zeros(count).index_add(0, cycle, row)
            share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
        return self.norms[2](x)[0, 0], share
