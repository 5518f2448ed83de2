"""The oracle: attention in loops from its formula, and how far a fast version may be from it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def naive_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g m d"],
    value: Float[Tensor, "b g m e"],
    *,
    mask: Bool[Tensor, "*mask"] | None = None,
    bias: Float[Tensor, "*bias"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "b h n e"]:
    """`heed_core.attend` in loops over batch, head, query and key, in the type of its inputs.

    Differentiable, shares no code with any back-end; meant for float64 and a few dozen tokens.
    """
    batch, heads, n, dim = query.shape
    m, groups = key.shape[2], key.shape[1]
    scale = 1.0 / dim**0.5 if scale is None else scale
    full = (batch, heads, n, m)
    allowed = torch.ones(full, dtype=torch.bool) if mask is None else mask.expand(full)
    added = torch.zeros(full, dtype=query.dtype) if bias is None else bias.expand(full)
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(n):
                seen = [
                    j
                    for j in range(m)
                    if bool(allowed[b, h, i, j])
                    and (not causal or j <= i + m - n)
                    and added[b, h, i, j] != -torch.inf
                ]
                rows.append(
                    _one_row(
                        [
                            scale * (query[b, h, i] * key[b, g, j]).sum() + added[b, h, i, j]
                            for j in seen
                        ],
                        [value[b, g, j] for j in seen],
                        value,
                    )
                )
    # empty rows belong to the graph too: their gradients are zero, not missing
    nothing = 0.0 * (query.sum() + key.sum() + value.sum())
    if not rows:
        return value.new_zeros(batch, heads, n, value.shape[3]) + nothing
    return torch.stack(rows).reshape(batch, heads, n, value.shape[3]) + nothing


def _one_row(scores: list[Tensor], values: list[Tensor], like: Tensor) -> Tensor:
    if not scores:
        return like.new_zeros(like.shape[3])
    top = max(float(score.detach()) for score in scores)
    shares = [(score - top).exp() for score in scores]
    total = torch.stack(shares).sum()
    result = like.new_zeros(like.shape[3])
    for share, value in zip(shares, values, strict=True):
        result = result + share / total * value
    return result


def error_budget(exact: Tensor, eager: Tensor) -> float:
    """The largest error that a fast version may have.

    2 x (error of the same type in eager + one rounding).

    Args:
        exact: The float64 result.
        eager: The result of the plain formula in the type under test.
    """
    if exact.numel() == 0:
        return 0.0
    exact = exact.detach().double()
    error = (eager.detach().double() - exact).abs().max()
    rounding = torch.finfo(eager.dtype).eps * exact.abs().max()
    return float(2 * (error + rounding))


def assert_within_budget(actual: Tensor, *, exact: Tensor, eager: Tensor, what: str = "") -> None:
    """Fail if `actual` is farther from `exact` than `error_budget` allows.

    Raises:
        AssertionError: Another shape, a value that is not finite, or too large an error.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}"
    if actual.numel() == 0:
        return
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error = float((actual.detach().double() - exact.detach().double()).abs().max())
    budget = error_budget(exact, eager)
    assert error <= budget, f"{what}: error {error:.3g} is above the budget {budget:.3g}"
