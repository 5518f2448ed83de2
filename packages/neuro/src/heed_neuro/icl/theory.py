"""Exact numbers for isotropic and anisotropic tasks of one output, and the approximate loss.

He et al. (arXiv 2503.12734): approximate loss, its optimum over mu, the manifold of optima, the
limit of small omega, Bayes risk in high dimension and the bound. The risks at finite L are moments
of Gaussians and Wishart matrices, derived in the docstrings. NumPy, float64. Risks include the
answer's noise sigma^2.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from heed_neuro.icl.tasks import LinearTask

Heads = Float[np.ndarray, " h"]


def approximate_loss(omega: Heads, mu: Heads, task: LinearTask) -> float:
    """Lt = 1 + s2 - 2 mu.omega + mu'(omega omega' + (1 + s2)/L exp(d omega omega')) mu.

    The whole loss: one helper of the released code halves it.
    """
    return float(1 + task.noise_variance - 2 * mu @ omega + mu @ interaction(omega, task) @ mu)


def interaction(omega: Heads, task: LinearTask) -> Float[np.ndarray, "h h"]:
    """The matrix omega omega' + (1 + s2)/L exp(d omega omega'), exp element by element."""
    outer = np.outer(omega, omega)
    return np.asarray(outer + _spread(task) * np.exp(task.dim * outer))


def approximate_gradient(omega: Heads, mu: Heads, task: LinearTask) -> tuple[Heads, Heads]:
    """The gradient of the approximate loss by omega and by mu."""
    outer = np.outer(omega, omega)
    curved = _spread(task) * np.exp(task.dim * outer)
    product = mu @ omega
    by_mu = 2 * (product - 1) * omega + 2 * curved @ mu
    by_omega = 2 * (product - 1) * mu + 2 * task.dim * mu * (curved @ (mu * omega))
    return by_omega, by_mu


def optimal_mu(omega: Heads, task: LinearTask) -> Heads:
    """mu*(omega) = (omega omega' + (1 + s2)/L exp(d omega omega'))^-1 omega."""
    return np.asarray(np.linalg.solve(interaction(omega, task), omega))


def manifold_mu(gamma: float, task: LinearTask) -> float:
    """The sum of mu over the positive heads where |omega| = gamma: mu_gamma.

    mu_gamma = (gamma/2) / (gamma^2 + (1 + s2)/L sinh(d gamma^2)); the negative heads sum to
    -mu_gamma.
    """
    square = gamma**2
    return float(gamma / 2 / (square + _spread(task) * np.sinh(task.dim * square)))


def debiased_rate(task: LinearTask) -> float:
    """eta* = 1/(1 + (1 + s2) d/L), the best rate of debiased gradient descent at any L."""
    return 1 / (1 + _spread(task) * task.dim)


def vanilla_rate(task: LinearTask) -> float:
    """1/(1 + (d + 1 + s2 d)/L), the best rate of plain gradient descent at any L."""
    return 1 / (1 + (task.dim + 1 + task.noise_variance * task.dim) / task.length)


def preconditioner(task: LinearTask, *, debiased: bool) -> Float[np.ndarray, "d d"]:
    """Omega*, the best matrix of one step (1/L) sum_l y_l (x_l - c)' Omega x_q; the rate is in it.

    Plain (c = 0): ((1 + 1/L) Sigma + (tr Sigma + d s2)/L I)^-1. Debiased (c the mean of the
    context): (Sigma + (tr Sigma + d s2)/L I)^-1. Both follow from `preconditioned_risk`, a
    quadratic function of Omega. For Sigma = I they are eta I.
    """
    sigma = task.sigma
    ridge = (np.trace(sigma) + task.dim * task.noise_variance) / task.length
    grown = 1.0 if debiased else 1 + 1 / task.length
    return np.asarray(np.linalg.inv(grown * sigma + ridge * np.eye(task.dim)))


def preconditioned_risk(
    omega: Float[np.ndarray, "d d"], task: LinearTask, *, debiased: bool
) -> float:
    """The exact risk of one step (1/L) sum_l y_l (x_l - c)' Omega x_q at finite L.

    With S = (1/L) sum (x - c)(x - c)', a Wishart matrix of k degrees of freedom over L (k = L, or
    L - 1 where the mean is taken off), E S = k/L Sigma and
    E S^2 = k/L^2 ((k + 1) Sigma^2 + tr(Sigma) Sigma). With M = Omega',

        risk = s2 + 1/d [tr Sigma - 2 k/L tr(Sigma M Sigma) + tr(Sigma M E[S^2] M')]
                  + s2 k/L^2 tr(Sigma M Sigma M').
    """
    sigma, dim, length = task.sigma, task.dim, task.length
    freedom = length - 1 if debiased else length
    step = omega.T
    mean = freedom / length
    second = mean / length * ((freedom + 1) * sigma @ sigma + np.trace(sigma) * sigma)
    left = np.trace(sigma) - 2 * mean * np.trace(sigma @ step @ sigma)
    bias = (left + np.trace(sigma @ step @ second @ step.T)) / dim
    noise = mean / length * np.trace(sigma @ step @ sigma @ step.T)
    return float(task.noise_variance * (1 + noise) + bias)


def gradient_risk(rate: float, task: LinearTask, *, debiased: bool) -> float:
    """The exact risk of one step of (debiased) gradient descent of a rate.

    For Sigma = I, plain: 1 + s2 - 2 eta + eta^2 (1 + (d + 1 + s2 d)/L); debiased:
    1 + s2 - 2 eta (L-1)/L + eta^2 ((L-1)(L+d) + s2 d (L-1))/L^2, smallest exactly at eta*.
    """
    return preconditioned_risk(rate * np.eye(task.dim), task, debiased=debiased)


def linear_attention_risk(task: LinearTask, *, trained: int) -> float:
    """The exact risk, at the task's L, of the best linear attention for contexts of another length.

    Linear attention divides by the length that it was trained at, L0, whatever the context's. At L0
    the best layer is one plain step with the best matrix; at L it is the same step L / L0 times as
    large. For Sigma = I: 1 + s2 - 2 e + e^2 (1 + (d + 1 + s2 d)/L), e = eta(L0) L / L0, which rises
    with L once L > L0, without bound.

    Args:
        task: With the length at which the layer is used.
        trained: L0.
    """
    step = preconditioner(replace(task, length=trained), debiased=False) * task.length / trained
    return preconditioned_risk(step, task, debiased=False)


def zero_risk(task: LinearTask) -> float:
    """Of predicting 0: tr Sigma / d + s2."""
    return float(np.trace(task.sigma) / task.dim + task.noise_variance)


def high_dimensional_bayes_risk(ratio: float, noise_variance: float) -> float:
    """The Bayes risk for d, L -> infinity with d/L = ratio, Sigma = I, noise included."""
    free = (1 - ratio) / ratio
    root = np.sqrt(4 * noise_variance + (noise_variance + free) ** 2)
    return float((noise_variance - free + root) / 2)


def bayes_ratio_bound(ratio: float, noise_variance: float) -> float:
    """What risk(debiased gradient descent) / Bayes risk cannot exceed, in the same limit."""
    inner = (1 + ratio * noise_variance) * (1 + noise_variance + 1 / ratio)
    return 1 + 1 / noise_variance / inner


def _spread(task: LinearTask) -> float:
    return (1 + task.noise_variance) / task.length
