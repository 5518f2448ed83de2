"""Routers of heads: which heads a token uses, with which gates, and how evenly heads are used.

The equations are those of `heed_core.attention.mixture_of_heads`; the gates serve any attention
whose head outputs are multiplied by them (Jin et al., arXiv 2410.11842).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from heed_core.exchange import same_for_all, sum_of_all
from heed_core.precision import at_least_float32, without_autocast

Gating = Literal["code", "paper"]
"""Whether gates are scaled and divided as in the published code, or plain as in the paper."""


Router = Literal["learned", "norm"]
"""What chooses heads: three learned maps, or the lengths of the queries."""


class Routing(NamedTuple):
    """What a router says of every token."""

    gates: Float[Tensor, "b n h"]
    """Shared heads first; 0 for routed heads that were not chosen."""
    probabilities: Float[Tensor, "b n e"]
    """Of the routed heads, before choosing."""
    chosen: Bool[Tensor, "b n e"]


def mixture_gates(
    x: Float[Tensor, "b n c"],
    routed_weight: Float[Tensor, "e c"] | None,
    shared_weight: Float[Tensor, "s c"] | None,
    kind_weight: Float[Tensor, "2 c"] | None,
    *,
    shared: int,
    active: int,
    gating: Gating = "code",
) -> Routing:
    """Gates by learned routers, in float32 at least.

    Args:
        x: What the routers read: the input of the queries.
        routed_weight: W_r; None without routed heads.
        shared_weight: W_s; None with less than two shared heads.
        kind_weight: W_h; None unless there are both kinds.
        shared: S.
        active: K.
        gating: Scaled as the published code, or as the paper.

    Raises:
        ValueError: Routers of other sizes, an unknown `gating`.
    """
    _check_routers(x, routed_weight, shared_weight, kind_weight, shared, active, gating)
    plain = gating == "paper"
    gates = []
    with without_autocast(x):
        x = at_least_float32(x)
        kind = _logits(x, kind_weight).softmax(-1) * (1.0 if plain else 2.0)
        if shared:
            share = _logits(x, shared_weight, shared).softmax(-1)
            share = share * (1.0 if plain else float(shared))
            gates.append(share if kind_weight is None else kind[..., :1] * share)
        probabilities = _logits(x, routed_weight).softmax(-1)
        if routed_weight is None:
            probabilities = x.new_zeros(*x.shape[:2], 0)
        chosen = choose_heads(probabilities, active)
        routed = probabilities.masked_fill(~chosen, 0.0)
        if not plain:
            least = torch.finfo(routed.dtype).eps
            routed = active * routed / routed.sum(-1, keepdim=True).clamp(min=least)
        gates.append(routed if kind_weight is None else kind[..., 1:] * routed)
    return Routing(torch.cat(gates, dim=-1), probabilities, chosen)


def norm_gates(
    query: Float[Tensor, "b h n d"], *, shared: int, active: int, straight_through: bool = False
) -> Routing:
    """Gates by the lengths of the queries, before any rotation: 1 for chosen heads, else 0.

    Args:
        query: Of all heads, shared ones first.
        shared: S.
        active: K.
        straight_through: Let gradients pass the gates of chosen heads as if they were the
            probabilities.
    """
    with without_autocast(query):
        lengths = torch.linalg.vector_norm(at_least_float32(query[:, shared:]), dim=-1).transpose(
            1, 2
        )
        chosen = choose_heads(lengths, active)
        spread = lengths.std(-1, keepdim=True) if lengths.shape[-1] > 1 else lengths[..., :1]
        probabilities = (lengths / spread.clamp(min=1e-6)).softmax(-1)
        gates = chosen.to(probabilities.dtype)
        if straight_through:
            gates = gates + gates * (probabilities - probabilities.detach())
        gates = F.pad(gates, (shared, 0), value=1.0)
    return Routing(gates, probabilities, chosen)


def choose_heads(scores: Float[Tensor, "b n e"], active: int) -> Bool[Tensor, "b n e"]:
    """The `active` largest of each token; of equal ones, the first."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)[..., :active]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def balance_loss(
    probabilities: Float[Tensor, "b n e"],
    chosen: Bool[Tensor, "b n e"],
    padding_mask: Bool[Tensor, "b n"] | None = None,
    *,
    sync: bool = False,
) -> Float[Tensor, ""]:
    """E sum_e P_e F_e: of head e the mean probability P and how often it was chosen, F.

    Args:
        probabilities: Of the routed heads.
        chosen: Whether a token uses them.
        padding_mask: True = real token; others do not count.
        sync: Count the tokens of all processes of `torch.distributed`, which must all call; where
            it was not started there is one. The average of their gradients, which
            `DistributedDataParallel` takes, is then the gradient of one process with all tokens.
    """
    heads = probabilities.shape[-1]
    kind = probabilities.dtype
    one = probabilities.new_ones(*probabilities.shape[:2], 1)
    real = one if padding_mask is None else padding_mask[..., None].to(kind)
    sums = (torch.cat([probabilities, chosen.to(kind), one], dim=-1) * real).sum((0, 1))
    if sync and heads and dist.is_available() and dist.is_initialized():
        sums = sum_of_all(same_for_all(sums, None), None)
    mean = sums / sums[-1].clamp(min=1.0)
    return heads * (mean[:heads] * mean[heads:-1]).sum()


def without_padding(routing: Routing, real: Bool[Tensor, "b n"], shared: int) -> Routing:
    """The same where padding (False) chooses no routed head."""
    chosen = routing.chosen & real[..., None]
    kept = F.pad(chosen, (shared, 0), value=True)
    return Routing(routing.gates.masked_fill(~kept, 0.0), routing.probabilities, chosen)


def check_routing(
    heads: int, shared: int, active: int, router: Router, gating: Gating, straight_through: bool
) -> None:
    """Raise a ValueError for numbers of heads or options that do not go together."""
    if not 0 <= shared <= heads:
        raise ValueError(f"shared must be from 0 to heads={heads}, got {shared}")
    if not 0 <= active <= heads - shared:
        raise ValueError(
            f"active must be from 0 to the {heads - shared} heads that are not shared, got {active}"
        )
    if active == 0 and shared < heads:
        raise ValueError(f"active=0 leaves {heads - shared} heads without use; share all of them")
    if router not in get_args(Router):
        raise ValueError(f"router must be one of {get_args(Router)}, got {router!r}")
    if gating not in get_args(Gating):
        raise ValueError(f"gating must be one of {get_args(Gating)}, got {gating!r}")
    if router == "norm" and gating != "code":
        raise ValueError(f"gating={gating!r} has no effect with router='norm'")
    if straight_through and router != "norm":
        raise ValueError("straight_through has no effect without router='norm'")


def check_capacity(capacity: float | None, active: int, skip: bool | None) -> None:
    """Raise a ValueError for a capacity below 1, or one without effect."""
    if capacity is None:
        return
    if not 1.0 <= capacity < math.inf:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if active == 0 or skip is False:
        raise ValueError(
            f"capacity={capacity} has no effect without routed heads (active={active}) or with "
            f"skip=False (skip={skip})"
        )


def _check_routers(
    x: Tensor,
    routed_weight: Tensor | None,
    shared_weight: Tensor | None,
    kind_weight: Tensor | None,
    shared: int,
    active: int,
    gating: str,
) -> None:
    if gating not in get_args(Gating):
        raise ValueError(f"gating must be one of {get_args(Gating)}, got {gating!r}")
    routed = 0 if routed_weight is None else routed_weight.shape[0]
    if shared < 0 or not 0 <= active <= routed:
        raise ValueError(
            f"shared must be at least 0 and active from 0 to the {routed} routed heads, got "
            f"{shared} and {active}"
        )
    given = {
        "routed_weight": (routed_weight, routed),
        "shared_weight": (shared_weight, shared),
        "kind_weight": (kind_weight, 2),
    }
    for name, (weight, rows) in given.items():
        if weight is not None and tuple(weight.shape) != (rows, x.shape[-1]):
            raise ValueError(
                f"{name} must be {(rows, x.shape[-1])} (heads, channels), got {tuple(weight.shape)}"
            )


def _logits(x: Tensor, weight: Tensor | None, width: int = 1) -> Tensor:
    """Zeros without a weight: then all `width` entries have the same share."""
    return (
        x.new_zeros(*x.shape[:2], width)
        if weight is None
        else F.linear(x, at_least_float32(weight))
    )
