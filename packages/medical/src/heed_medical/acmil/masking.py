"""Stochastic top-K instance masking: hide some of the most attended instances while training.

Of the `top` instances with the highest scores a share, drawn anew in every step, leaves the
softmax, so that its mass moves to the others (arXiv 2311.07125, section 3.3).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def stochastic_top_mask(
    scores: Float[Tensor, "b h t n"],
    *,
    top: int,
    share: float,
    key_mask: Bool[Tensor, "b n"] | None = None,
    uniform: Float[Tensor, "b h t k"] | None = None,
) -> Bool[Tensor, "b h t n"]:
    """Which instances stay: False at int(min(top, n) * share) of the top scores of each row.

    The hidden ones are those of the smallest random numbers. At least one instance of a bag stays.

    Args:
        scores: Attention before the softmax; each row draws its own.
        top: K, how many of the highest scores may be hidden.
        share: Which share of them is hidden.
        key_mask: True = an instance of the bag, False = padding. K is at most the bag's size.
        uniform: Random numbers for the top scores in descending order, k = min(top, n); None draws
            them from torch's generator.
    """
    size = scores.shape[-1]
    most = min(top, size)
    real = scores.new_full((len(scores), 1, 1, 1), size, dtype=torch.long)
    hidden_scores = scores.detach()
    if key_mask is not None:
        real = key_mask.sum(dim=1).view(-1, 1, 1, 1)
        hidden_scores = hidden_scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    ranked = hidden_scores.topk(most, dim=-1).indices  # (b, h, t, k), highest first
    if uniform is None:
        uniform = torch.rand(ranked.shape, device=scores.device)
    candidates = real.clamp(max=most)
    count = torch.minimum((candidates * share).long(), real - 1)
    place = torch.arange(most, device=scores.device)
    order = uniform.masked_fill(place >= candidates, torch.inf).argsort(dim=-1)
    drawn = ranked.gather(-1, order)
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter(-1, drawn, (place >= count).expand_as(drawn))
