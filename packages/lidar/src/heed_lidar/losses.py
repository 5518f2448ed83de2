"""The losses of voxel segmentation, over rows: one row of logits and one label per voxel.

    L = L_voxel + L_Lovasz

| term | of a kept row of class i with probability p | paper |
| --- | --- | --- |
| cross-entropy | -log p | |
| focal | -(1 - p)^gamma log p | Lin et al., ICCV 2017 |
| ACE | -w_i (1 - p)^gamma_i log p | CurbNet, arXiv 2403.16794 |
| Lovasz-softmax | see `lovasz_softmax` | Berman et al., CVPR 2018, arXiv 1705.08790 |

Rows whose label is `ignore` are left out, and the mean runs over the rest. A loss over the occupied
voxels equals the loss over the dense grid, whose empty cells carry the label that is ignored, and
needs no tensor of the grid's size. Where no row is kept every loss is 0, with a graph.

Differs from the CurbNet paper, which leaves the values open and calls delta small: w_i =
1 / log(delta + eta_i) changes its sign unless delta > 1, so delta is 1.02 and w has mean 1.
Its published code applies the focal factor to the mean of a whole batch; here it is per voxel, as
in the paper's equation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Integer
from torch import Tensor

IGNORE = 0
VoxelLoss = Literal["ace", "cross-entropy", "focal", "none"]
RegionLoss = Literal["lovasz", "none"]


@dataclass(frozen=True, kw_only=True)
class ClassBalance:
    """What ACE knows of each class; the entries of the ignored class are 0."""

    weight: tuple[float, ...]
    """w_i: rarer classes weigh more; the mean over the classes that count is 1."""
    gamma: tuple[float, ...]
    """gamma_i: rarer classes are focused more."""


def class_balance(
    counts: Sequence[int],
    *,
    gamma: float = 2.0,
    slope: float = 1.0,
    delta: float = 1.02,
    ignore: int = IGNORE,
) -> ClassBalance:
    """The weights of ACE from how often each class occurs in the training labels.

    eta_i = N_i / N, w_i = 1 / log(delta + eta_i), gamma_i = gamma + slope (1 - eta_i), where N
    counts the classes other than `ignore`. A class that does not occur has eta = 0.

    Args:
        counts: Points of each class; that of `ignore` is of no effect.
        gamma: Focus of a class that is everything.
        slope: What rarity adds to it.
        delta: Above 1, or the weight of a rare class would be negative.
        ignore: The class that is left out.

    Raises:
        ValueError: delta is not above 1, a number is negative, or no class occurs.
    """
    if delta <= 1.0:
        raise ValueError(f"delta must be above 1, or rare classes weigh negative, got {delta}")
    if gamma < 0.0 or slope < 0.0:
        raise ValueError(f"gamma and slope must not be negative, got {gamma} and {slope}")
    if min(counts, default=0) < 0:
        raise ValueError(f"counts must not be negative, got {list(counts)}")
    kept = [index for index in range(len(counts)) if index != ignore]
    total = sum(counts[index] for index in kept)
    if total == 0:
        raise ValueError(f"no class but {ignore} occurs: counts are {list(counts)}")
    share = {index: counts[index] / total for index in kept}
    weight = {index: 1.0 / math.log(delta + share[index]) for index in kept}
    mean = sum(weight.values()) / len(kept)
    return ClassBalance(
        weight=tuple(weight.get(index, 0.0) / mean for index in range(len(counts))),
        gamma=tuple(
            gamma + slope * (1.0 - share[index]) if index in share else 0.0
            for index in range(len(counts))
        ),
    )


def cross_entropy(
    logits: Float[Tensor, "n c"], labels: Integer[Tensor, " n"], *, ignore: int = IGNORE
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the rows that count."""
    return _mean(_log_probability(*_kept(logits, labels, ignore)).neg(), logits)


def focal_loss(
    logits: Float[Tensor, "n c"],
    labels: Integer[Tensor, " n"],
    *,
    gamma: float = 2.0,
    ignore: int = IGNORE,
) -> Float[Tensor, ""]:
    """Mean focal loss over the rows that count: sure rows count less."""
    log_p = _log_probability(*_kept(logits, labels, ignore))
    return _mean(_focused(log_p, torch.full_like(log_p, gamma)), logits)


def ace_loss(
    logits: Float[Tensor, "n c"],
    labels: Integer[Tensor, " n"],
    balance: ClassBalance,
    *,
    ignore: int = IGNORE,
) -> Float[Tensor, ""]:
    """Mean adaptive cross-entropy over the rows that count: rare and unsure rows count more.

    Args:
        logits: Of each row.
        labels: Class of each row.
        balance: Weight and focus of each class (`class_balance`).
        ignore: Label of the rows that count for nothing.
    """
    if len(balance.weight) != logits.shape[1]:
        raise ValueError(
            f"the balance is of {len(balance.weight)} classes, the logits of {logits.shape[1]}"
        )
    rows, classes = _kept(logits, labels, ignore)
    log_p = _log_probability(rows, classes)
    weight, gamma = (log_p.new_tensor(part)[classes] for part in (balance.weight, balance.gamma))
    return _mean(weight * _focused(log_p, gamma), logits)


def lovasz_gradient(truth_sorted: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Gradient of the Jaccard loss's Lovasz extension, for errors that fall.

    With truth y sorted by falling error, J_k = 1 - (G - sum_{j<=k} y_j) / (G + sum_{j<=k}
    (1 - y_j)), G = sum y: g_1 = J_1, g_k = J_k - J_{k-1}.

    Args:
        truth_sorted: 1 where a row is of the class, 0 elsewhere; columns are separate problems.
    """
    total = truth_sorted.sum(dim=0)
    missed = total - truth_sorted.cumsum(dim=0)
    union = total + (1.0 - truth_sorted).cumsum(dim=0)
    jaccard = 1.0 - missed / union
    return torch.cat([jaccard[:1], jaccard.diff(dim=0)])


def lovasz_softmax(
    probabilities: Float[Tensor, "n c"],
    labels: Integer[Tensor, " n"],
    *,
    ignore: int | None = IGNORE,
) -> Float[Tensor, ""]:
    """Mean over the classes present of a convex surrogate of 1 - IoU.

    For each class with a kept row: errors e = |y - p| sorted falling, loss <e, g(y sorted)>. Of
    predictions that are 0 or 1 it is 1 - IoU.

    Args:
        probabilities: Of each row; rows sum to 1.
        labels: Class of each row.
        ignore: Label of the rows that count for nothing; None: every row counts.
    """
    rows, classes = _kept(probabilities, labels, ignore)
    if not len(rows):
        return probabilities.sum() * 0.0
    present = torch.unique(classes)
    truth = (classes[:, None] == present).to(rows.dtype)
    errors, order = (truth - rows[:, present]).abs().sort(dim=0, descending=True, stable=True)
    of_classes: Float[Tensor, " k"] = (errors * lovasz_gradient(truth.gather(0, order))).sum(dim=0)
    return of_classes.mean()


@dataclass(frozen=True, kw_only=True)
class SegmentationLoss:
    """The terms and their sum, which is minimised."""

    voxel: Float[Tensor, ""]
    region: Float[Tensor, ""]
    total: Float[Tensor, ""]


def segmentation_loss(
    logits: Float[Tensor, "n c"],
    labels: Integer[Tensor, " n"],
    *,
    voxel: VoxelLoss = "ace",
    region: RegionLoss = "lovasz",
    balance: ClassBalance | None = None,
    ignore: int = IGNORE,
) -> SegmentationLoss:
    """The sum of a loss per voxel and one per region, both with weight 1.

    CurbNet takes ACE and Lovasz-softmax, Cylinder3D cross-entropy and Lovasz-softmax. Both are
    computed in float32 at least.

    Args:
        logits: Of each occupied voxel.
        labels: Class of each occupied voxel.
        voxel: The loss per voxel.
        region: The loss per region.
        balance: What ACE needs.
        ignore: Label of the voxels that count for nothing.
    """
    if voxel not in get_args(VoxelLoss) or region not in get_args(RegionLoss):
        raise ValueError(
            f"voxel must be one of {get_args(VoxelLoss)} and region one of "
            f"{get_args(RegionLoss)}, got {voxel!r} and {region!r}"
        )
    if voxel == region == "none":
        raise ValueError("voxel and region are both none: there would be nothing to learn")
    if (voxel == "ace") != (balance is not None):
        raise ValueError(f"balance belongs to voxel='ace' and to no other, got {voxel!r}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    per_region = per_voxel = logits.sum() * 0.0
    if balance is not None:
        per_voxel = ace_loss(logits, labels, balance, ignore=ignore)
    elif voxel == "cross-entropy":
        per_voxel = cross_entropy(logits, labels, ignore=ignore)
    elif voxel == "focal":
        per_voxel = focal_loss(logits, labels, ignore=ignore)
    if region == "lovasz":
        per_region = lovasz_softmax(logits.softmax(dim=1), labels, ignore=ignore)
    return SegmentationLoss(voxel=per_voxel, region=per_region, total=per_voxel + per_region)


def _kept(
    rows: Float[Tensor, "n c"], labels: Integer[Tensor, " n"], ignore: int | None
) -> tuple[Float[Tensor, "k c"], Int64[Tensor, " k"]]:
    """The rows that count and their classes."""
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"rows must be (n, classes) and labels (n,), got {tuple(rows.shape)} and "
            f"{tuple(labels.shape)}"
        )
    classes = labels.long()
    if ignore is None:
        return rows, classes
    counted = classes != ignore
    return rows[counted], classes[counted]


def _log_probability(
    logits: Float[Tensor, "n c"], classes: Int64[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probability of the class that each row has."""
    return F.log_softmax(logits, dim=1).gather(1, classes[:, None])[:, 0]


def _focused(log_p: Float[Tensor, " n"], gamma: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-(1 - p)^gamma log p, also where p rounds to 1."""
    # -expm1(log p) = 1 - p without cancellation; the floor keeps the power's gradient finite.
    unsure = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(unsure**gamma) * log_p


def _mean(terms: Float[Tensor, " k"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    return terms.mean() if len(terms) else logits.sum() * 0.0
