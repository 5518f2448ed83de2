"""The loss of a report: cross-entropy of each next word, the end included."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def report_loss(
    log_probabilities: Float[Tensor, "b n w"],
    tokens: Int64[Tensor, "b n"],
    lengths: Int64[Tensor, " b"],
) -> Float[Tensor, ""]:
    """Minus the mean log-probability of the words that are there, over all reports together.

    Args:
        log_probabilities: Of the word at each place.
        tokens: The words that should be there: a report without its first 0.
        lengths: Words of each report, its final 0 counted; those behind are filling.
    """
    chosen = log_probabilities.gather(2, tokens[:, :, None])[:, :, 0]
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return -(chosen * real).sum() / real.sum()
