"""How many associations a Hebbian memory holds: theory and simulation.

N pairs of unit keys and values of one length are added up, S = sum_i v_i k_i', and asked with a
stored key: S k_j = v_j + sum_(i != j) (k_i . k_j) v_i. What is added to v_j is interference.

* Worst case, the guarantee: interference is at most (N - 1) mu |v|, where mu is the largest
  |k_i . k_j|, near sqrt(2 ln(N^2) / d_k) for random keys. All signs are right while
  (N - 1) mu < 1: N grows as sqrt(d_k), log factors aside. This is the O(sqrt(d_k)) of the abstract
  of arXiv 2508.08289.
* Average case: interference has the variance (N - 1) / d_k per unit of value: N grows as d_k at one
  fidelity. Copies of the abstract that lost the sign of the root say O(d_k); its second version
  claims that for the average. Both statements hold, of different things; here they have two names.

Orthonormal keys do not interfere: exact up to N = d_k, and beyond that there are none. The delta
rule, repeated, is exact for any N <= d_k linearly independent keys, as it solves S K = V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64
from scipy.stats import norm  # type: ignore[import-untyped]
from torch import Tensor

from heed_neuro.conditioning.cues import coherence_of_random, cue_vectors, max_coherence

LOADS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
"""N / d_k of the table."""


def capacity_worst(d_k: int) -> int:
    """The largest N whose values have all signs right for sure: (N - 1) mu(N) < 1.

    Example:
        >>> capacity_worst(64), capacity_worst(4096)
        (4, 19)
    """
    _check_positive(d_k=d_k)
    count = 1
    while count * coherence_of_random(count + 1, d_k) < 1:
        count += 1
    return count


def capacity_average(d_k: int, cosine: float) -> float:
    """N at which an answer has this mean cosine with what was stored: 1 + d_k (1 / cos^2 - 1).

    Example:
        >>> round(capacity_average(64, 0.9), 2)
        16.01
    """
    _check_positive(d_k=d_k)
    if not 0 < cosine <= 1:
        raise ValueError(f"cosine must be above 0 and at most 1, got {cosine}")
    return 1 + d_k * (1 / cosine**2 - 1)


def expected_cosine(count: int, d_k: int) -> float:
    """Of an answer with what was stored: 1 / sqrt(1 + (N - 1) / d_k)."""
    _check_positive(count=count, d_k=d_k)
    return float((1 + (count - 1) / d_k) ** -0.5)


def expected_bit_error(count: int, d_k: int) -> float:
    """Share of wrong signs of values of +-1: Q(sqrt(d_k / (N - 1))), Q the tail of the normal."""
    _check_positive(count=count, d_k=d_k)
    return 0.0 if count == 1 else float(norm.sf(math.sqrt(d_k / (count - 1))))


def relative_error(count: int, d_k: int) -> float:
    """Length of the interference as a share of the value's: sqrt((N - 1) / d_k)."""
    _check_positive(count=count, d_k=d_k)
    return math.sqrt((count - 1) / d_k)


def hebbian_memory(
    keys: Float64[Tensor, "*b n d_k"], values: Float64[Tensor, "*b n d_v"]
) -> Float64[Tensor, "*b d_v d_k"]:
    """All pairs added up, with eta = 1."""
    return values.mT @ keys


def recall_scores(
    keys: Float64[Tensor, "n d_k"], values: Float64[Tensor, "n d_v"]
) -> dict[str, float]:
    """How well a Hebbian memory gives back what it stored.

    Returns:
        Mean cosine, share of wrong signs, share of answers whose nearest stored value (by cosine)
        is the right one, and the coherence of the keys.
    """
    answers = keys @ hebbian_memory(keys, values).mT
    lengths = values.norm(dim=1)
    cosines = (answers * values).sum(1) / (answers.norm(dim=1) * lengths)
    nearest = (answers @ (values / lengths[:, None]).mT).argmax(dim=1)
    return {
        "cosine": float(cosines.mean()),
        "bit_error": float((answers * values < 0).double().mean()),
        "nearest": float((nearest == torch.arange(len(keys))).double().mean()),
        "coherence": max_coherence(keys),
    }


def simulate_capacity(
    d_k: int, count: int, *, d_v: int = 64, repeats: int = 20, seed: int = 0
) -> dict[str, float]:
    """Mean `recall_scores` over draws of random keys and values of +-1."""
    _check_positive(d_k=d_k, count=count, d_v=d_v, repeats=repeats)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for repeat in range(repeats):
        keys = cue_vectors("random", count, d_k, seed=seed * 100_003 + repeat)
        signs = torch.randint(0, 2, (count, d_v), generator=generator)
        found.append(recall_scores(keys, 2.0 * signs.double() - 1.0))
    return {name: sum(one[name] for one in found) / repeats for name in found[0]}


def capacity_rows(
    widths: Sequence[int] = (64, 256),
    *,
    loads: Sequence[float] = LOADS,
    d_v: int = 64,
    repeats: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The table of capacity: simulated beside theory, for each width and load."""
    rows = []
    for d_k in widths:
        for load in loads:
            count = max(1, round(load * d_k))
            found = simulate_capacity(d_k, count, d_v=d_v, repeats=repeats, seed=seed)
            rows.append(
                {
                    "d_k": d_k,
                    "N": count,
                    "N/d_k": count / d_k,
                    "cosine": found["cosine"],
                    "cosine theory": expected_cosine(count, d_k),
                    "bit error": found["bit_error"],
                    "bit error theory": expected_bit_error(count, d_k),
                    "nearest": found["nearest"],
                    "(N-1) mu": (count - 1) * found["coherence"],
                }
            )
    return rows


def guarantee_rows(widths: Sequence[int]) -> list[dict[str, Any]]:
    """Worst and average capacity of each width."""
    return [
        {
            "d_k": d_k,
            "worst case (all signs sure)": capacity_worst(d_k),
            "sqrt(d_k)": math.sqrt(d_k),
            "average, cosine 0.95": capacity_average(d_k, 0.95),
            "average, cosine 0.9": capacity_average(d_k, 0.9),
            "average, cosine 0.707": capacity_average(d_k, 0.707),
        }
        for d_k in widths
    ]


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
