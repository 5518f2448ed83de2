"""How errors of recall grow with depth, and what width and redundant heads do against them.

The paper (arXiv 2508.08289) names the trade-off of depth, width and redundant heads; the formulas
are ours. A layer's relative error is e = sqrt((N - 1) / d_k). In a stack of L layers of gain a

    E_L^2 = sum_(l < L) a^(2 (L - 1 - l)) e^2      errors of layers independent of each other
    E_L = e (a^L - 1) / (a - 1)                    errors that all add up; L e at a = 1

The mean of H heads with keys of their own has the error e / sqrt(H). Of H decisions about a sign,
each wrong with p < 1/2, the majority is wrong with at most exp(-2 H (1/2 - p)^2) (Hoeffding), and a
stack of L decides right with at least 1 - L times that. Within a fixed width d = H d_k averaging
gains nothing: heads of d / H channels have the error e sqrt(H) each, and their mean e again. So
redundancy serves decisions, not averages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import binom  # type: ignore[import-untyped]

from heed_neuro.conditioning.capacity import expected_bit_error, hebbian_memory, relative_error
from heed_neuro.conditioning.cues import cue_vectors


def error_independent(error: float, layers: int, gain: float) -> float:
    """E_L where the errors of layers are independent."""
    _check(error=error, layers=layers, gain=gain)
    return error * math.sqrt(sum(gain ** (2 * k) for k in range(layers)))


def error_worst(error: float, layers: int, gain: float) -> float:
    """E_L where they all add up."""
    _check(error=error, layers=layers, gain=gain)
    if abs(gain - 1) < 1e-12:
        return layers * error
    return error * (gain**layers - 1) / (gain - 1)


def error_of_heads(error: float, heads: int) -> float:
    """Of the mean of heads that err independently."""
    _check(error=error, layers=heads, gain=1.0)
    return error / math.sqrt(heads)


def majority_bound(wrong: float, heads: int) -> float:
    """At most so often the majority of heads is wrong, each with probability `wrong`."""
    _check_chance(wrong)
    return math.exp(-2 * heads * (0.5 - wrong) ** 2)


def majority_exact(wrong: float, heads: int) -> float:
    """How often it is; a draw counts as half."""
    _check_chance(wrong)
    draw = binom.pmf(heads // 2, heads, wrong) / 2 if heads % 2 == 0 else 0.0
    return float(binom.sf(heads // 2, heads, wrong) + draw)


def stack_right_bound(wrong: float, heads: int, layers: int) -> float:
    """At least so often a whole stack decides right; says nothing where it is below 0."""
    return 1 - layers * majority_bound(wrong, heads)


def heads_needed(wrong: float, layers: int, target: float) -> float:
    """Heads with which a stack is wrong with at most `target`: ln(L / target) / (2 (1/2 - p)^2)."""
    _check_chance(wrong)
    if not 0 < target < 1:
        raise ValueError(f"target must be between 0 and 1, got {target}")
    return math.log(layers / target) / (2 * (0.5 - wrong) ** 2)


def recall_noise(
    d_k: int, count: int, *, heads: int = 1, d_v: int = 64, repeats: int = 1, seed: int = 0
) -> torch.Tensor:
    """Errors of real memories: the answer to the first stored key, less its value.

    Values have length 1; the answers of `heads` memories with keys of their own are averaged.

    Returns:
        (repeats, d_v), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for repeat in range(repeats):
        values = torch.randn(count, d_v, generator=generator, dtype=torch.float64)
        values = values / values.norm(dim=1, keepdim=True)
        total = torch.zeros(d_v, dtype=torch.float64)
        for head in range(heads):
            key_seed = seed * 1_000_003 + repeat * 1009 + head
            keys = cue_vectors("random", count, d_k, seed=key_seed)
            total += hebbian_memory(keys, values) @ keys[0]
        errors.append(total / heads - values[0])
    return torch.stack(errors)


def simulate_depth(
    d_k: int, count: int, layers: int, *, gain: float = 1.0, repeats: int = 200, seed: int = 0
) -> list[float]:
    """Error after each layer of a stack, root mean square over draws.

    A layer turns and scales by `gain` what came in, and adds the error of a memory of its own.
    """
    state = torch.zeros(repeats, 64, dtype=torch.float64)
    found = []
    for layer in range(layers):
        turn, _ = torch.linalg.qr(
            torch.randn(64, 64, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
        )
        noise = recall_noise(d_k, count, repeats=repeats, seed=seed + 7919 * layer)
        state = gain * state @ turn + noise
        found.append(_root_mean_square(state))
    return found


def simulate_heads(
    d_k: int, count: int, heads: Sequence[int], *, repeats: int = 200, seed: int = 0
) -> list[float]:
    """Error of the mean of so many heads, root mean square over draws."""
    return [
        _root_mean_square(recall_noise(d_k, count, heads=h, repeats=repeats, seed=seed))
        for h in heads
    ]


def simulate_fixed_width(
    width: int, count: int, heads: Sequence[int], *, repeats: int = 200, seed: int = 0
) -> list[float]:
    """The same where the heads share `width` channels."""
    return [
        _root_mean_square(
            recall_noise(max(width // h, 1), count, heads=h, repeats=repeats, seed=seed)
        )
        for h in heads
    ]


def simulate_majority(
    d_k: int, count: int, heads: Sequence[int], *, repeats: int = 100, seed: int = 0
) -> list[float]:
    """Share of signs of +-1 that the majority of so many heads has wrong; a draw counts as half."""
    generator = torch.Generator().manual_seed(seed)
    wrong = [0.0] * len(heads)
    for repeat in range(repeats):
        values = 2.0 * torch.randint(0, 2, (count, 64), generator=generator).double() - 1.0
        votes = []
        for head in range(max(heads)):
            key_seed = seed * 1_000_003 + repeat * 1009 + head
            keys = cue_vectors("random", count, d_k, seed=key_seed)
            votes.append((hebbian_memory(keys, values) @ keys[0] * values[0]).sign())
        for index, h in enumerate(heads):
            total = torch.stack(votes[:h]).sum(0)
            wrong[index] += float((total < 0).double().mean() + 0.5 * (total == 0).double().mean())
    return [value / repeats for value in wrong]


def depth_rows(
    d_k: int, count: int, *, layers: int = 12, gain: float = 1.0, repeats: int = 200, seed: int = 0
) -> list[dict[str, Any]]:
    """Error of each depth: simulated, independent, worst."""
    error = relative_error(count, d_k)
    found = simulate_depth(d_k, count, layers, gain=gain, repeats=repeats, seed=seed)
    return [
        {
            "layers": depth,
            "simulated": value,
            "independent": error_independent(error, depth, gain),
            "worst": error_worst(error, depth, gain),
        }
        for depth, value in enumerate(found, start=1)
    ]


def width_rows(
    widths: Sequence[int], count: int, *, layers: int, gain: float = 1.0
) -> list[dict[str, Any]]:
    """Error of a stack against the width of its keys, by theory."""
    return [
        {
            "d_k": d_k,
            "one layer": relative_error(count, d_k),
            f"{layers} layers, independent": error_independent(
                relative_error(count, d_k), layers, gain
            ),
            f"{layers} layers, worst": error_worst(relative_error(count, d_k), layers, gain),
        }
        for d_k in widths
    ]


def head_rows(
    d_k: int,
    count: int,
    heads: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    repeats: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What redundant heads do for the mean and for the majority; and at a fixed width in all."""
    error, wrong = relative_error(count, d_k), expected_bit_error(count, d_k)
    means = simulate_heads(d_k, count, heads, repeats=repeats, seed=seed)
    shared = simulate_fixed_width(d_k, count, heads, repeats=repeats, seed=seed)
    majorities = simulate_majority(d_k, count, heads, repeats=max(repeats // 2, 1), seed=seed)
    rows = []
    for h, mean, split, majority in zip(heads, means, shared, majorities, strict=True):
        rows.append(
            {
                "heads": h,
                "mean, simulated": mean,
                "mean, theory": error_of_heads(error, h),
                "same width in all, simulated": split,
                "same width in all, theory": error,
                "majority wrong, simulated": majority,
                "majority wrong, binomial": majority_exact(wrong, h),
                "majority wrong, bound": majority_bound(wrong, h),
            }
        )
    return rows


def _root_mean_square(errors: torch.Tensor) -> float:
    return float(errors.square().sum(1).mean().sqrt())


def _check(*, error: float, layers: int, gain: float) -> None:
    if error < 0:
        raise ValueError(f"error must not be negative, got {error}")
    if layers < 1:
        raise ValueError(f"layers and heads must be at least 1, got {layers}")
    if gain <= 0:
        raise ValueError(f"gain must be above 0, got {gain}")


def _check_chance(wrong: float) -> None:
    if not 0 <= wrong < 0.5:
        raise ValueError(f"wrong must be at least 0 and below 1/2, got {wrong}")
