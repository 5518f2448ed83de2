"""Beam search without a length penalty, for any model that gives log-probabilities step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Step = Callable[[Int64[Tensor, " rows"], Int64[Tensor, " rows"]], Float[Tensor, "rows words"]]
"""From the last word of every row, and the row that each row goes on from, to log-probabilities of
the next word. Rows are batch x beam, the beams of a sample side by side."""


class Decoded(NamedTuple):
    """The best sequence of every sample."""

    tokens: Int64[Tensor, "b t"]
    """Filled with `end` behind its end."""
    scores: Float[Tensor, " b"]
    """Sum of the log-probabilities of its tokens, its end included, less penalties."""


@torch.no_grad()
def beam_search(
    step: Step,
    *,
    batch: int,
    beam: int,
    most: int,
    end: int = 0,
    trigram_penalty: float = 0.0,
    device: torch.device | str | None = None,
) -> Decoded:
    """The most probable sequence that a beam finds.

    A beam that ends is kept as a result and falls out of the race; at the last step every beam is a
    result. The search stops early only when no beam can get better than the results, which changes
    nothing. Samples do not depend on each other; of equal scores the first beam and the lowest
    word win. With `beam=1` this is greedy decoding.

    Args:
        step: The model.
        batch: Samples.
        beam: Beams per sample.
        most: Tokens at most.
        end: The token that begins and ends a sequence.
        trigram_penalty: Taken off the log-probability of a word for each time that it has already
            followed the same two words. R2Gen takes 2 ln 2 in greedy decoding, nothing with beams.
        device: Where the rows are.

    Example:
        >>> table = torch.tensor([[0.1, 0.9], [0.8, 0.2]]).log()
        >>> beam_search(lambda last, parents: table[last], batch=1, beam=2, most=4).tokens
        tensor([[1, 0, 0, 0]])
    """
    for name, count in (("batch", batch), ("beam", beam), ("most", most)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if trigram_penalty < 0:
        raise ValueError(f"trigram_penalty must not be negative, got {trigram_penalty}")
    first = torch.arange(batch, device=device)[:, None] * beam
    last = torch.full((batch * beam,), end, device=device)
    parents = torch.arange(batch * beam, device=device)
    tokens = torch.full((batch, beam, most), end, device=device)
    best = torch.full((batch, most), end, device=device)
    sums = torch.full((batch, beam), -torch.inf, dtype=torch.float64, device=device)
    sums[:, 0] = 0.0  # all beams are alike at first: one goes on
    record = torch.full((batch,), -torch.inf, dtype=torch.float64, device=device)
    for place in range(most):
        chances = step(last, parents).double()
        width = chances.shape[1]
        scores = sums[:, :, None] + chances.view(batch, beam, width)
        if trigram_penalty and place > 2:
            scores = scores - trigram_penalty * count_repeats(tokens[:, :, :place], width)
        total = scores.flatten(1)
        ranked = total.sort(dim=1, descending=True, stable=True)
        sums, chosen = ranked.values[:, :beam], ranked.indices[:, :beam]
        origin, word = chosen // width, chosen % width
        tokens = tokens.gather(1, origin[:, :, None].expand(-1, -1, most))
        tokens[:, :, place] = word
        ended = word == end if place + 1 < most else torch.ones_like(word, dtype=torch.bool)
        value, which = sums.masked_fill(~ended, -torch.inf).max(1)
        better = value > record
        found = tokens.gather(1, which[:, None, None].expand(-1, -1, most))[:, 0]
        best = torch.where(better[:, None], found, best)
        record = torch.where(better, value, record)
        sums = sums.masked_fill(word == end, -torch.inf)
        if bool((sums.amax(1) <= record).all()):
            break
        parents, last = (first + origin).flatten(), word.flatten()
    return Decoded(best, record)


def count_repeats(tokens: Int64[Tensor, "b k t"], words: int) -> Float[Tensor, "b k words"]:
    """How often each word has followed a row's last two tokens within the row.

    Example:
        >>> count_repeats(torch.tensor([[[1, 2, 3, 1, 2]]]), 4)
        tensor([[[0., 0., 0., 1.]]], dtype=torch.float64)
    """
    same = (tokens[..., :-2] == tokens[..., -2:-1]) & (tokens[..., 1:-1] == tokens[..., -1:])
    counts = torch.zeros(*tokens.shape[:2], words, dtype=torch.float64, device=tokens.device)
    return counts.scatter_add_(2, tokens[..., 2:], same.double())
