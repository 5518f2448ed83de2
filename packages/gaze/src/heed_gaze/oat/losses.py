"""The loss of OAT: cross-entropy of every step, teacher forced."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from heed_gaze.oat.network import PAD


def scanpath_loss(
    logits: Float[Tensor, "b t ids"],
    wanted: Int64[Tensor, "b t"],
    group: Int64[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens of each group of trials, summed over groups.

    Padding is ignored. With one group this is the plain mean; the paper adds the losses of two
    shelves when it trains on both.

    Args:
        logits: Of objects, STOP and PAD.
        wanted: What followed: objects, STOP, then PAD.
        group: Which group each trial is of, 0, 1, ...; None: one group.
    """
    padding = logits.shape[-1] - 2 + PAD
    # An absent object has the logit -inf and is never wanted, so that no term is infinite.
    tokens = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=padding, reduction="none"
    ).view_as(wanted)
    real = wanted != padding
    if group is None:
        return tokens.sum() / real.sum()
    count = int(group.max()) + 1
    total = logits.new_zeros(count).index_add(0, group, tokens.sum(dim=1).to(logits.dtype))
    weight = logits.new_zeros(count).index_add(0, group, real.sum(dim=1).to(logits.dtype))
    return torch.where(weight > 0, total / weight.clamp(min=1), 0.0).sum()
