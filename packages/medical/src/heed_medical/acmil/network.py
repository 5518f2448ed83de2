"""ACMIL: attention-challenging multiple instance learning (arXiv 2311.07125), and its baselines.

A slide is a bag of patch features. ACMIL attends to it with several branches: each has a classifier
of its own, a diversity loss keeps their attention apart, and while training the most attended
patches are hidden at random. The slide is classified from the mean of the branches' attention.

Differs from the released code: bags may be padded to a batch (`key_mask`); masked instances get the
score -inf instead of -1e9, and at least one instance of a bag is never hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_medical.acmil.pooling import (
    GatedAttentionPool,
    Masking,
    QueryAttentionPool,
    ReadOut,
    softmax_weights,
    split_heads,
)
from heed_medical.acmil.transmil import TransMilBody

Kind = Literal["acmil-ga", "acmil-mha", "gated", "abmil", "mha", "transmil", "mean", "max"]
MULTI_BRANCH: tuple[Kind, ...] = ("acmil-ga", "acmil-mha")
WITH_HEADS: tuple[Kind, ...] = ("acmil-mha", "mha", "transmil")
INNER_DIM: Mapping[int, int] = {384: 128, 512: 256, 768: 384, 1024: 512, 1536: 768}
"""Width of the patch features -> width inside the network, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AcmilConfig:
    """All that is needed to rebuild the network; the defaults are the paper's ACMIL-GA."""

    kind: Kind = "acmil-ga"
    """acmil-ga, acmil-mha: the paper's, with gated or multi-head attention; gated, abmil:
    attention pooling with and without a gate; mha: one query with heads; transmil: a transformer
    over all patches; mean, max: no attention."""
    in_dim: int = 1024
    """Channels of a patch feature; taken from the data."""
    inner_dim: int | None = None
    """Channels inside. None: half of in_dim, or 128 for 384."""
    classes: int = 2
    """Taken from the data."""
    branches: int = 5
    """Attention branches of acmil-ga and acmil-mha."""
    hidden: int = 128
    """Width of the gated attention network."""
    heads: int = 8
    """Attention heads of acmil-mha, mha and transmil."""
    dropout: float = 0.1
    """Of acmil-mha, mha and transmil."""
    top_instances: int = 10
    """Of this many most attended patches some are hidden in each training step."""
    mask_share: float = 0.6
    """Share of them that is hidden. 0 hides none, which the authors later advised to try."""
    landmarks: int = 256
    """Of transmil: tokens that summarise the others."""

    def __post_init__(self) -> None:
        for name in ("in_dim", "branches", "hidden", "heads", "landmarks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        if self.inner_dim is not None and self.inner_dim < 1:
            raise ValueError(f"inner_dim must be at least 1, got {self.inner_dim}")
        if self.kind in WITH_HEADS and self.width % self.heads:
            raise ValueError(f"inner_dim {self.width} must be a multiple of heads={self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        several = self.kind in MULTI_BRANCH
        if not several and (self.branches, self.top_instances, self.mask_share) != (5, 10, 0.6):
            raise ValueError(
                f"branches, top_instances and mask_share have no effect with kind={self.kind!r}"
            )
        if self.top_instances < 0:
            raise ValueError(f"top_instances must not be negative, got {self.top_instances}")
        if not 0.0 <= self.mask_share <= 1.0:
            raise ValueError(f"mask_share must be within 0..1, got {self.mask_share}")

    @property
    def width(self) -> int:
        """Channels inside the network."""
        if self.inner_dim is not None:
            return self.inner_dim
        return INNER_DIM.get(self.in_dim, max(8, round(self.in_dim / 16) * 8))


@dataclass(frozen=True, kw_only=True)
class BagOutput:
    """Everything that a network says of a batch of bags."""

    logits: Float[Tensor, "b k"]
    """Of the slide."""
    branch_logits: Float[Tensor, "b t k"] | None = None
    """Of each branch; None where there is one classifier only."""
    scores: Float[Tensor, "b h t n"] | None = None
    """Attention before the softmax; None without softmax attention."""
    allowed: Bool[Tensor, "*allowed"] | None = None
    """Which instances entered the softmax; None = all."""
    shares: Float[Tensor, "b t n"] | None = None
    """What each instance contributed where there is no softmax over the instances."""

    @property
    def weights(self) -> Float[Tensor, "b h t n"]:
        """How the instances were weighted by head and branch; the rows sum to one."""
        if self.scores is not None:
            return softmax_weights(self.scores, self.allowed)
        assert self.shares is not None
        return self.shares.unsqueeze(1)


class BagClassifier(nn.Module):
    """A linear reduction of the patch features, then one of the poolings and its classifiers."""

    def __init__(self, config: AcmilConfig) -> None:
        super().__init__()
        self.config = config
        width, classes = config.width, config.classes
        self.reduce = nn.Linear(config.in_dim, width, bias=False)
        self.pool: nn.Module = _pool(config)
        self.branch_heads = nn.ModuleList(
            nn.Linear(width, classes)
            for _ in range(config.branches if config.kind in MULTI_BRANCH else 0)
        )
        self.head = nn.Linear(width, classes)

    def forward(
        self, features: Float[Tensor, "b n d"], key_mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b k"]:
        """Class scores of the slides."""
        return self.outputs(features, key_mask).logits

    def outputs(
        self,
        features: Float[Tensor, "b n d"],
        key_mask: Bool[Tensor, "b n"] | None = None,
        *,
        uniform: Float[Tensor, "b h t k"] | None = None,
    ) -> BagOutput:
        """Everything that losses and pictures need.

        Args:
            features: Of the patches; any floating type.
            key_mask: True = a patch, False = padding. None: all are patches.
            uniform: Random numbers of the masking in training (`stochastic_top_mask`).

        Raises:
            ValueError: A bag without patches, or features of another width.
        """
        _check(features, key_mask, self.config.in_dim)
        h = torch.relu(self.reduce(features.to(self.reduce.weight.dtype)))
        masking = None
        if self.training and self.config.kind in MULTI_BRANCH and self.config.mask_share > 0:
            masking = Masking(
                top=self.config.top_instances, share=self.config.mask_share, uniform=uniform
            )
            masking = masking if masking.top > 0 else None
        if isinstance(self.pool, GatedAttentionPool):
            return self._gated(h, key_mask, masking)
        if isinstance(self.pool, BranchedQueries):
            return self._queries(h, key_mask, masking)
        vectors, shares = self.pool(h, key_mask)
        return BagOutput(logits=self.head(vectors), shares=shares)

    def _gated(self, h: Tensor, key_mask: Tensor | None, masking: Masking | None) -> BagOutput:
        assert isinstance(self.pool, GatedAttentionPool)
        vectors, scores, allowed = self.pool(h, key_mask=key_mask, masking=masking)
        # The mean over branches of the weights, applied to h, is the mean of the pooled vectors.
        return BagOutput(
            logits=self.head(vectors.mean(dim=1)),
            branch_logits=self._branch_logits(vectors),
            scores=scores,
            allowed=allowed,
        )

    def _queries(self, h: Tensor, key_mask: Tensor | None, masking: Masking | None) -> BagOutput:
        assert isinstance(self.pool, BranchedQueries)
        vectors, bag, scores, allowed = self.pool(h, key_mask=key_mask, masking=masking)
        return BagOutput(
            logits=self.head(vectors[:, 0] if bag is None else bag),
            branch_logits=self._branch_logits(vectors),
            scores=scores,
            allowed=allowed,
        )

    def _branch_logits(self, vectors: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k"] | None:
        if not self.branch_heads:
            return None
        return torch.stack([head(vectors[:, t]) for t, head in enumerate(self.branch_heads)], dim=1)


class BranchedQueries(nn.Module):
    """Learned queries with an attention of their own each, and what the branches say together.

    Args:
        config: Of the network.
        bag: Whether there are values and a read-out for the mean attention of all branches.
    """

    def __init__(self, config: AcmilConfig, *, bag: bool) -> None:
        super().__init__()
        width, count = config.width, config.branches if bag else 1
        self.heads = config.heads
        self.queries = nn.Parameter(torch.empty(1, count, width))
        self.branches = nn.ModuleList(
            QueryAttentionPool(width, heads=config.heads, dropout=config.dropout)
            for _ in range(count)
        )
        self.bag_value = nn.Linear(width, width) if bag else None
        self.bag_read_out = ReadOut(width, dropout=config.dropout) if bag else None
        nn.init.normal_(self.queries, std=1e-6)

    def forward(
        self,
        h: Float[Tensor, "b n d"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        masking: Masking | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Vectors (b, t, d), the bag's vector (b, d), scores (b, h, t, n) and what entered."""
        value = None
        if self.bag_value is not None:
            value = split_heads(self.bag_value(h), self.heads)
        found, shared = [], []
        for t, branch in enumerate(self.branches):
            pooled, average = branch(
                self.queries[:, t : t + 1],
                h,
                key_mask=key_mask,
                masking=masking,
                branch=t,
                shared_value=value,
            )
            found.append(pooled)
            shared.append(average)
        bag = None
        if self.bag_read_out is not None:
            bag = self.bag_read_out(torch.stack(shared).mean(dim=0)).squeeze(1)
        allowed = found[0].allowed
        if masking is not None:
            allowed = torch.cat([pooled.allowed for pooled in found], dim=2)
        vectors = torch.cat([pooled.vectors for pooled in found], dim=1)
        return vectors, bag, torch.cat([pooled.scores for pooled in found], dim=2), allowed


class MeanPool(nn.Module):
    """The mean instance."""

    def forward(
        self, h: Float[Tensor, "b n d"], key_mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1 n"]]:
        """The vector, and equal shares."""
        real = h.new_ones(h.shape[:2]) if key_mask is None else key_mask.to(h.dtype)
        shares = real / real.sum(dim=1, keepdim=True)
        return torch.einsum("bn,bnd->bd", shares, h), shares.unsqueeze(1)


class MaxPool(nn.Module):
    """The largest value of each channel."""

    def forward(
        self, h: Float[Tensor, "b n d"], key_mask: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1 n"]]:
        """The vector, and the share of the channels in which an instance is the largest."""
        if key_mask is not None:
            h = h.masked_fill(~key_mask.unsqueeze(2), -torch.inf)
        vectors, largest = h.max(dim=1)
        counts = vectors.new_zeros(h.shape[:2]).scatter_add(1, largest, torch.ones_like(vectors))
        return vectors, (counts / h.shape[2]).unsqueeze(1)


def _pool(config: AcmilConfig) -> nn.Module:
    if config.kind in ("acmil-ga", "gated", "abmil"):
        return GatedAttentionPool(
            config.width,
            hidden=config.hidden,
            branches=config.branches if config.kind == "acmil-ga" else 1,
            gated=config.kind != "abmil",
        )
    if config.kind in ("acmil-mha", "mha"):
        return BranchedQueries(config, bag=config.kind == "acmil-mha")
    if config.kind == "transmil":
        return TransMilBody(
            config.width, heads=config.heads, landmarks=config.landmarks, dropout=config.dropout
        )
    return MeanPool() if config.kind == "mean" else MaxPool()


def _check(features: Tensor, key_mask: Tensor | None, in_dim: int) -> None:
    if features.ndim != 3 or features.shape[2] != in_dim:
        raise ValueError(f"features must be (bags, patches, {in_dim}), got {tuple(features.shape)}")
    if features.shape[1] == 0:
        raise ValueError("features must hold at least one patch per bag")
    if key_mask is not None and key_mask.shape != features.shape[:2]:
        raise ValueError(
            f"key_mask must be {tuple(features.shape[:2])}, got {tuple(key_mask.shape)}"
        )
