"""What a model's predictions are compared with: one step of gradient descent, ridge, kernels.

All take `Sequences` and give predictions (b, q, n). Several outputs see their own coordinates only.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heed_neuro.icl.tasks import LinearTask, Sequences

__all__ = ["kernel_regression", "one_step", "preconditioned_step", "ridge"]


def one_step(
    sequences: Sequences, task: LinearTask, *, rate: float, debiased: bool
) -> Float[Tensor, "b q n"]:
    """One step of gradient descent from 0: (eta/L) sum_l y_l (x_l - c).x_q.

    Args:
        sequences: Contexts and queries.
        task: Which coordinates each output sees.
        rate: eta.
        debiased: c is the mean of the context, else 0.
    """
    return preconditioned_step(sequences, task, rate * np.eye(task.dim), debiased=debiased)


def preconditioned_step(
    sequences: Sequences, task: LinearTask, omega: Float[np.ndarray, "d d"], *, debiased: bool
) -> Float[Tensor, "b q n"]:
    """One step with a matrix: (1/L) sum_l y_l (x_l - c)' Omega x_q."""
    x = sequences.x
    if debiased:
        x = x - x.mean(dim=1, keepdim=True)
    masks = torch.from_numpy(task.masks).to(x)
    slope = (x.mT @ sequences.y / x.shape[1]) * masks.T  # (b, d, n)
    turned = torch.from_numpy(omega).to(x) @ sequences.query.mT  # (b, d, q)
    result: Tensor = turned.mT @ slope
    return result


def ridge(
    sequences: Sequences, task: LinearTask, *, strength: float | None = None
) -> Float[Tensor, "b q n"]:
    """Ridge regression in float64; of the default strength the Bayes predictor of the task.

    One beta for all outputs ("paper"): strength d sigma^2. A beta of variance 1 per output
    ("released"): |S_n| sigma^2 each.

    Args:
        sequences: Contexts and queries.
        task: Which coordinates each output sees, and whether outputs share beta.
        strength: Added to the diagonal of X'X.
    """
    x, y, query = (part.double() for part in (sequences.x, sequences.y, sequences.query))
    masks = torch.from_numpy(task.masks).to(x)  # (n, d)
    gram, cross = x.mT @ x, x.mT @ y  # (b, d, d), (b, d, n)
    eye = torch.eye(task.dim).to(x)
    if task.released:
        sizes = masks.sum(1) if strength is None else torch.ones(len(masks)).to(x)
        factor = task.noise_variance if strength is None else strength
        parts = gram[:, None] * masks[:, :, None] * masks[:, None, :]
        shifted = parts + (sizes * factor)[:, None, None] * eye
        beta = torch.linalg.solve(shifted, (cross * masks.T).mT.unsqueeze(-1)).squeeze(-1).mT
    else:
        strength = task.dim * task.noise_variance if strength is None else strength
        shared = (gram[:, None] * masks[:, :, None] * masks[:, None, :]).sum(1)
        beta = torch.linalg.solve(shared + strength * eye, (cross * masks.T).sum(-1, keepdim=True))
    found: Tensor = query @ (beta * masks.T)
    return found.to(sequences.query.dtype)


def kernel_regression(
    sequences: Sequences,
    omega: Float[Tensor, " h"],
    mu: Float[Tensor, " h"],
    *,
    precondition: Float[np.ndarray, "d d"] | None = None,
) -> Float[Tensor, "b q n"]:
    """The predictor of heads: sum_h mu_h sum_l y_l softmax_l(omega_h x_l' Omega x_q).

    One head is the Nadaraya-Watson estimator of the kernel exp(omega x.x') times mu; it is what a
    model of one head is.
    """
    query = sequences.query
    if precondition is not None:
        query = query @ torch.from_numpy(precondition).to(query).T
    scores = torch.einsum("bld,bqd->bql", sequences.x, query)
    result = torch.zeros_like(query[..., :1]).expand(-1, -1, sequences.y.shape[2])
    for one_omega, one_mu in zip(omega.to(query), mu.to(query), strict=True):
        result = result + one_mu * (one_omega * scores).softmax(-1) @ sequences.y
    return result
