"""The pattern that training leaves in the circuits, in numbers.

He et al. (arXiv 2503.12734), section on the pattern: KQ_h -> [omega_h I, *; 0, *] and
OV_h -> (0, mu_h), with sign omega_h = sign mu_h; where there are two heads or more, |omega_h| is
one gamma for all live heads and the mu_h sum to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from heed_neuro.icl.flow import live_heads
from heed_neuro.icl.tasks import LinearTask
from heed_neuro.icl.theory import preconditioner


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The circuits of a model, and what they amount to."""

    kq: Float[np.ndarray, "h c c"]
    """Key by query; the query's y is 0, so that the last n columns do nothing."""
    ov: Float[np.ndarray, "h n c"]
    dim: int

    @property
    def omega(self) -> Float[np.ndarray, " h"]:
        """The mean of the diagonal of each head's block of x."""
        return np.asarray(self._block.diagonal(axis1=1, axis2=2).mean(1))

    @property
    def mu(self) -> Float[np.ndarray, " h"]:
        """What each head gives of y: with several outputs, of its strongest pair of outputs."""
        last = self.ov[:, :, self.dim :].reshape(len(self.ov), -1)
        return np.asarray(last[np.arange(len(last)), np.abs(last).argmax(1)])

    @property
    def live(self) -> Bool[np.ndarray, " h"]:
        """Heads that do something."""
        return np.asarray(live_heads(self.omega, self.mu))

    @property
    def diag_homogeneity(self) -> Float[np.ndarray, " h"]:
        """Standard deviation of the diagonal over its mean's size; 0 is a multiple of I."""
        diagonal = self._block.diagonal(axis1=1, axis2=2)
        return np.asarray(diagonal.std(1) / np.maximum(np.abs(diagonal.mean(1)), 1e-300))

    @property
    def off_diag_max(self) -> Float[np.ndarray, " h"]:
        """Largest size beside the diagonal of the block of x."""
        beside = np.abs(self._block * (1 - np.eye(self.dim)))
        return np.asarray(beside.max(axis=(1, 2)))

    @property
    def y_row_max(self) -> Float[np.ndarray, " h"]:
        """Largest size in the rows of y: how much the score looks at a token's y."""
        return np.asarray(np.abs(self.kq[:, self.dim :, : self.dim]).max(axis=(1, 2)))

    @property
    def last_entry_share(self) -> Float[np.ndarray, " h"]:
        """|OV of y| / |OV|; 1 is the pattern."""
        whole = np.linalg.norm(self.ov.reshape(len(self.ov), -1), axis=1)
        last = np.linalg.norm(self.ov[:, :, self.dim :].reshape(len(self.ov), -1), axis=1)
        return np.asarray(last / np.maximum(whole, 1e-300))

    @property
    def zero_sum(self) -> float:
        """|sum mu| / sum |mu|."""
        return float(np.abs(self.mu.sum()) / max(np.abs(self.mu).sum(), 1e-300))

    @property
    def sign_match(self) -> bool:
        """Whether omega and mu agree in sign in every live head."""
        return bool((np.sign(self.omega) == np.sign(self.mu))[self.live].all())

    @property
    def gamma(self) -> float:
        """Mean |omega| of the live heads."""
        return float(np.abs(self.omega[self.live]).mean())

    @property
    def gamma_spread(self) -> float:
        """Standard deviation of |omega| of the live heads over gamma."""
        return float(np.abs(self.omega[self.live]).std() / max(self.gamma, 1e-300))

    @property
    def n_dummy(self) -> int:
        """Heads that do nothing."""
        return int((~self.live).sum())

    @property
    def debiased(self) -> bool:
        """Whether live heads of both signs subtract the mean of the context from each other.

        Then the heads come near a step of debiased gradient descent, else one head's kernel
        regression, whose first order is the plain step.
        """
        signs = np.sign(self.mu[self.live])
        return bool(signs.max() > 0 > signs.min())

    @property
    def eta_eff(self) -> float:
        """Sum of omega mu: the rate of the step of gradient descent that the heads make."""
        return float(self.omega @ self.mu)

    @property
    def effective(self) -> Float[np.ndarray, "n d d"]:
        """sum_h mu_h (block of KQ_h), per output: what stands for eta Omega in one step."""
        own = np.stack([self.ov[:, n, self.dim + n] for n in range(self.ov.shape[1])])  # (n, h)
        return np.asarray(np.einsum("nh,hij->nij", own, self._block))

    @property
    def _block(self) -> Float[np.ndarray, "h d d"]:
        return self.kq[:, : self.dim, : self.dim]

    def metrics(self, task: LinearTask) -> dict[str, float]:
        """All numbers of the pattern, flat."""
        found = {
            "zero_sum": self.zero_sum,
            "sign_match": float(self.sign_match),
            "gamma": self.gamma,
            "gamma_spread": self.gamma_spread,
            "n_dummy": float(self.n_dummy),
            "eta_eff": self.eta_eff,
            "diag_homogeneity": float(self.diag_homogeneity[self.live].max()),
            "off_diag_max": float(self.off_diag_max.max()),
            "y_row_max": float(self.y_row_max.max()),
            "last_entry_share": float(self.last_entry_share[self.live].min()),
        }
        if not task.supports:
            best = preconditioner(task, debiased=self.debiased)
            found |= {
                "cosine_to_optimum": cosine(self.effective[0], best),
                "cosine_to_identity": cosine(self.effective[0], np.eye(self.dim)),
            }
        return found


def cosine(a: Float[np.ndarray, "d d"], b: Float[np.ndarray, "d d"]) -> float:
    """Of two matrices as vectors."""
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


def support_weights(pattern: Pattern, task: LinearTask) -> Float[np.ndarray, "h d"]:
    """The diagonal of each head's block of x, for tasks of several outputs.

    It says which coordinates count. One head weighs the shared coordinates more; with two
    heads per output a head's are zero off its
    output's coordinates.
    """
    if not task.supports:
        raise ValueError("the task has one output: there are no supports")
    return np.asarray(pattern._block.diagonal(axis1=1, axis2=2))
