"""The same learning for many animals and long sequences at once, in the forms of the core.

`rules.Memory` takes one step after the other. Where attention knows the rule, the core computes the
same numbers in chunks or with one N x N map.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from heed_core import attend
from heed_core.attention.delta_rule import delta_rule, gated_delta_rule
from heed_core.attention.linear import linear_attention
from heed_core.recurrence import Form
from heed_neuro.conditioning.rules import Rule

CORE_RULES = ("hebb", "trace", "delta", "gated-delta", "softmax")
"""Rules that are attentions; `trace` is the one whose memory fades."""


def learn(
    keys: Float[Tensor, "b n d_k"],
    values: Float[Tensor, "b n d_v"],
    *,
    rule: Rule,
    eta: float = 0.1,
    decay: float | None = None,
    form: Form = "chunked",
) -> tuple[Float[Tensor, "b n d_v"], Float[Tensor, "b d_v d_k"]]:
    """Learn sequences of trials.

    Args:
        keys: Sums of the cues of each trial.
        values: The outcome of each trial.
        rule: One of `CORE_RULES` but softmax.
        eta: Rate of learning.
        decay: What is left of the memory at each trial; for trace and gated-delta only.
        form: How it is computed; the numbers are the same.

    Returns:
        What each trial calls up before it is learnt, and the memory after the last.

    Raises:
        ValueError: A rule that the core does not know, or a decay too many or missing.
    """
    if rule not in CORE_RULES or rule == "softmax":
        raise ValueError(f"rule must be one of {CORE_RULES[:-1]}, got {rule!r}")
    if (decay is not None) != (rule in ("trace", "gated-delta")):
        raise ValueError(f"decay must be given for trace and gated-delta only, got {decay}, {rule}")
    key, value = keys[:, None], values[:, None]
    # A token reads its own writing too: what a trial calls up beforehand, the one before it reads.
    query = torch.cat([key[:, :, 1:], torch.zeros_like(key[:, :, :1])], dim=2)
    rates = value.new_full(value.shape[:3], eta)
    log_decay = None if decay is None else value.new_full(value.shape[:3], math.log(decay))
    if rule in ("hebb", "trace"):
        read, state = linear_attention(
            query, key, eta * value, log_decay=log_decay, causal=True, scale=1.0, form=form
        )
    elif log_decay is None:
        read, state = delta_rule(query, key, value, rates, scale=1.0, form=form)
    else:
        read, state = gated_delta_rule(query, key, value, rates, log_decay, scale=1.0, form=form)
    before = torch.cat([torch.zeros_like(read[:, :, :1]), read[:, :, :-1]], dim=2)
    return before[:, 0], state[:, 0].mT


def recall_exemplars(
    queries: Float[Tensor, "b m d_k"],
    keys: Float[Tensor, "b n d_k"],
    values: Float[Tensor, "b n d_v"],
    *,
    beta: float = 8.0,
) -> Float[Tensor, "b m d_v"]:
    """Softmax over stored trials: the mean of their outcomes by exp(beta q . k)."""
    return attend(queries[:, None], keys[:, None], values[:, None], scale=beta)[:, 0]
