"""The losses of ACMIL: the slide's, the branches' (semantic) and the diversity of their attention.

    L = CE(slide, y) + mean_t CE(branch_t, y) + 2 / (T (T - 1)) sum_{i<j} cos(p_i, p_j)

p_t is the attention of branch t over the patches. With one branch only the first term is left.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from heed_medical.acmil.network import BagOutput


@dataclass(frozen=True, kw_only=True)
class AcmilLoss:
    """The terms, unweighted, and the weighted sum that is minimised."""

    bag: Float[Tensor, ""]
    branch: Float[Tensor, ""]
    diversity: Float[Tensor, ""]
    total: Float[Tensor, ""]


def attention_diversity(weights: Float[Tensor, "b h t n"]) -> Float[Tensor, " b"]:
    """Mean cosine between the attention of two branches, averaged over pairs and heads.

    0 where branches look at different patches, 1 where all look at the same; 0 for one branch. The
    gradient vanishes where branches are exactly equal.
    """
    branches = weights.shape[2]
    if branches == 1:
        return weights.sum(dim=(1, 2, 3)) * 0.0
    unit = F.normalize(weights, dim=-1)
    cosines = unit @ unit.transpose(-2, -1)  # (b, h, t, t)
    pairs = cosines.triu(diagonal=1).sum(dim=(-2, -1))
    return (pairs * 2 / (branches * (branches - 1))).mean(dim=1)


def acmil_loss(
    output: BagOutput,
    labels: Int64[Tensor, " b"],
    *,
    branch_weight: float = 1.0,
    diversity_weight: float = 1.0,
) -> AcmilLoss:
    """All losses of a batch of bags, each a mean over the bags.

    Args:
        output: What the network gave.
        labels: Class of each bag.
        branch_weight: Weight of the branches' loss.
        diversity_weight: Weight of the diversity.

    Raises:
        ValueError: Another number of labels than bags.
    """
    if labels.shape != output.logits.shape[:1]:
        raise ValueError(f"labels must be ({len(output.logits)},), got {tuple(labels.shape)}")
    bag = F.cross_entropy(output.logits, labels)
    branch = diversity = bag.new_zeros(())
    if output.branch_logits is not None:
        count = output.branch_logits.shape[1]
        repeated = labels.repeat_interleave(count)
        branch = F.cross_entropy(output.branch_logits.flatten(0, 1), repeated)
        # A single branch is not trained by itself; its head still has a (zero) gradient.
        branch = branch * float(count > 1)
        diversity = attention_diversity(output.weights).mean()
    total = bag + branch_weight * branch + diversity_weight * diversity
    return AcmilLoss(bag=bag, branch=branch, diversity=diversity, total=total)
