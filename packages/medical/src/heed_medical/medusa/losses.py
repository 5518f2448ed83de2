"""The losses of MEDUSA: weighted cross-entropy of the classes, and the body's on lung masks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def class_loss(
    logits: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    weights: Sequence[float] | None = None,
) -> Float[Tensor, ""]:
    """The mean over pictures of `w_y * CE`: not divided by the sum of the weights.

    Args:
        logits: Class scores.
        labels: Class numbers.
        weights: One per class; None is 1 for all.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    if weights is not None:
        losses = losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)[labels]
    return losses.mean()


def findings_loss(logits: Float[Tensor, "b k"], labels: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """The mean binary cross-entropy over the findings that are known (not NaN); 0 without any.

    Args:
        logits: Scores of the findings.
        labels: 1 present, 0 absent, NaN not known.
    """
    known = torch.isfinite(labels)
    losses = F.binary_cross_entropy_with_logits(
        logits, torch.where(known, labels, 0.0), reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


def body_loss(
    logits: Float[Tensor, "b 1 h w"],
    mask: Float[Tensor, "b 1 h w"],
    counted: Bool[Tensor, "b 1 h w"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy plus one minus the soft Dice, both a mean over pictures.

    Args:
        logits: The body's mask scores.
        mask: 1 inside.
        counted: Which pixels count; None: all.
    """
    weight = torch.ones_like(mask) if counted is None else counted.to(mask.dtype)
    dims = (1, 2, 3)
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    entropy = (entropy * weight).sum(dims) / weight.sum(dims).clamp(min=1.0)
    inside = torch.sigmoid(logits) * weight
    overlap = (inside * mask).sum(dims)
    dice = (2 * overlap + 1) / (inside.sum(dims) + (mask * weight).sum(dims) + 1)
    return (entropy + 1 - dice).mean()
