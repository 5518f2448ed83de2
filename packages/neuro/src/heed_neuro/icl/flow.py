"""Gradient flow of the approximate loss, in its two stages.

He et al. (arXiv 2503.12734), section on the training dynamics: from small values, in stage I the
signs of omega and mu of a head come to agree and the mu come to sum to zero; in stage II the
|omega| come to be equal, grow and then shrink along the manifold of optima, while the |mu| grow
steadily.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from heed_neuro.icl.tasks import LinearTask
from heed_neuro.icl.theory import approximate_gradient, approximate_loss

DUMMY = 0.01
"""A head is dead where |omega mu| is below this share of the largest."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """omega and mu at the recorded steps."""

    steps: Int[np.ndarray, " t"]
    omega: Float[np.ndarray, "t h"]
    mu: Float[np.ndarray, "t h"]
    loss: Float[np.ndarray, " t"]


def gradient_flow(
    omega: Float[np.ndarray, " h"],
    mu: Float[np.ndarray, " h"],
    task: LinearTask,
    *,
    steps: Sequence[int] | Int[np.ndarray, " t"],
    rate: float = 0.005,
) -> Flow:
    """Follow the gradient of the approximate loss by Euler steps.

    Args:
        omega: At the start.
        mu: At the start.
        task: Its d, L and sigma^2.
        steps: At which to record, ascending.
        rate: Of an Euler step of the whole loss (of the halved loss of the released code: twice).

    Raises:
        ValueError: Steps that do not ascend.
    """
    wanted = np.asarray(steps)
    if len(wanted) == 0 or wanted[0] < 0 or (np.diff(wanted) <= 0).any():
        raise ValueError("steps must ascend from 0 or later")
    omega, mu = np.array(omega, dtype=np.float64), np.array(mu, dtype=np.float64)
    rows, done = [], 0
    for step in wanted.tolist():
        for _ in range(step - done):
            by_omega, by_mu = approximate_gradient(omega, mu, task)
            omega, mu = omega - rate * by_omega, mu - rate * by_mu
        done = step
        rows.append((omega, mu, approximate_loss(omega, mu, task)))
    return Flow(
        steps=wanted,
        omega=np.stack([row[0] for row in rows]),
        mu=np.stack([row[1] for row in rows]),
        loss=np.array([row[2] for row in rows]),
    )


@dataclass(frozen=True, kw_only=True)
class Stages:
    """At which recorded step a stage ends; None: not within the record."""

    first: int | None
    """Signs agree in every head that lives at the end, and sum mu is near 0."""
    second: int | None
    """The |omega| of these heads are equal."""


def find_stages(flow: Flow, *, zero_sum: float = 0.05, spread: float = 0.05) -> Stages:
    """Where the two stages end, each for good.

    Args:
        flow: The record of a flow or of a training.
        zero_sum: |sum mu| / sum |mu| that counts as zero.
        spread: Standard deviation of |omega| over its mean that counts as equal.
    """
    alive = live_heads(flow.omega[-1], flow.mu[-1])
    omega, mu = flow.omega[:, alive], flow.mu[:, alive]
    agree = (np.sign(omega) == np.sign(mu)).all(1)
    total = np.abs(mu.sum(1)) <= zero_sum * np.maximum(np.abs(mu).sum(1), 1e-300)
    size = np.abs(omega)
    equal = size.std(1) <= spread * size.mean(1)
    return Stages(
        first=_for_good(agree & total, flow.steps),
        second=_for_good(agree & total & equal, flow.steps),
    )


def live_heads(
    omega: Float[np.ndarray, " h"], mu: Float[np.ndarray, " h"]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which heads do something: |omega mu| is at least 1 % of the largest."""
    product = np.abs(omega * mu)
    return np.asarray(product >= DUMMY * product.max())


def _for_good(
    holds: np.ndarray[tuple[int], np.dtype[np.bool_]], steps: Int[np.ndarray, " t"]
) -> int | None:
    if not holds[-1]:
        return None
    broken = np.flatnonzero(~holds)
    return int(steps[broken[-1] + 1] if len(broken) else steps[0])
