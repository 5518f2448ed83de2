"""The tasks: sequences of a linear regression that a model has to solve in its context.

He et al., "In-Context Linear Regression Demystified" (ICML 2025, arXiv 2503.12734), section 2 and
the sections on anisotropic covariates and on several tasks.

One output: beta ~ N(0, I_d / d), x ~ N(0, Sigma), y = beta.x + e with e ~ N(0, sigma^2), the answer
of the query likewise **with noise**, so that no predictor has a risk below sigma^2.

Several outputs: output n sees only the coordinates S_n. Two conventions are in use:

* "paper": one beta ~ N(0, I_d / d) for all outputs, y_n = beta[S_n].x[S_n] + e, e ~ N(0, sigma^2),
  the answer with noise.
* "released" (the code published with the paper): a beta_n ~ N(0, I) of its own for each output,
  noise of variance |S_n| sigma^2 in the context and **none** in the answer. The signal is |S_n|
  times that of a beta of variance 1 / |S_n|, and so is the noise; risks are |S_n| times as large.

`LinearTask.noise` says the convention in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Scaling = Literal["paper", "released"]


@dataclass(frozen=True, kw_only=True)
class LinearTask:
    """The distribution of the sequences."""

    dim: int = 5
    """d, coordinates of x."""
    length: int = 40
    """L, examples in a context."""
    noise_variance: float = 0.1
    """sigma^2, of the noise of y (a variance, not a standard deviation)."""
    rho: float = 0.0
    """Sigma_ij = rho^|i-j|; 0 is the isotropic case."""
    covariance: tuple[tuple[float, ...], ...] = ()
    """Sigma itself, row by row, instead of `rho`."""
    supports: tuple[tuple[int, ...], ...] = ()
    """S_n: the coordinates, counted from 1, of each output; none: one output that sees all."""
    scaling: Scaling = "paper"
    """The convention of several outputs."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2, got {self.length}")
        if not 0 <= self.noise_variance < float("inf"):
            raise ValueError(
                f"noise_variance must be finite and not negative, got {self.noise_variance}"
            )
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling must be one of {get_args(Scaling)}, got {self.scaling!r}")
        if self.scaling != "paper" and not self.supports:
            raise ValueError(f"scaling={self.scaling!r} has no effect without supports")
        check_covariance(self.dim, self.rho, self.covariance)
        _check_supports(self.dim, self.supports)

    @property
    def outputs(self) -> int:
        """N, numbers that are predicted."""
        return max(1, len(self.supports))

    @property
    def isotropic(self) -> bool:
        """Whether Sigma = I."""
        return bool(np.array_equal(self.sigma, np.eye(self.dim)))

    @property
    def sigma(self) -> Float[np.ndarray, "d d"]:
        """Sigma, the covariance of x."""
        if self.covariance:
            return np.array(self.covariance, dtype=np.float64)
        apart = np.abs(np.subtract.outer(np.arange(self.dim), np.arange(self.dim)))
        return np.asarray(float(self.rho) ** apart, dtype=np.float64)

    @property
    def masks(self) -> Float[np.ndarray, "n d"]:
        """1 where an output sees a coordinate."""
        found = np.zeros((self.outputs, self.dim))
        for row, support in zip(found, self.supports or [range(1, self.dim + 1)], strict=True):
            row[[k - 1 for k in support]] = 1.0
        return found

    @property
    def released(self) -> bool:
        """Whether the convention of the released code holds."""
        return bool(self.supports) and self.scaling == "released"

    @property
    def noise(self) -> str:
        """The convention of the noise, in words."""
        if self.released:
            return (
                f"variance |S_n| x {self.noise_variance:g} in the context, none in the answer; "
                "a beta_n ~ N(0, I) per output"
            )
        return f"variance {self.noise_variance:g} in context and answer; beta ~ N(0, I / d)"


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Contexts with queries, as numbers."""

    x: Float[Tensor, "b l d"]
    y: Float[Tensor, "b l n"]
    query: Float[Tensor, "b q d"]
    answer: Float[Tensor, "b q n"] | None = None
    """What is to be predicted, where it is known."""

    def context_tokens(self) -> Float[Tensor, "b l c"]:
        """(x; y), c = d + n."""
        return torch.cat([self.x, self.y], dim=-1)

    def query_tokens(self) -> Float[Tensor, "b q c"]:
        """(x; 0)."""
        return torch.nn.functional.pad(self.query, (0, self.y.shape[-1]))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Sequences:
        """The same on another device or in another type."""
        answer = None if self.answer is None else self.answer.to(device, dtype)
        x, y, query = (part.to(device, dtype) for part in (self.x, self.y, self.query))
        return Sequences(x=x, y=y, query=query, answer=answer)


def draw(
    task: LinearTask,
    batch: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Sequences:
    """Fresh sequences of a task, float32.

    Args:
        task: Their distribution.
        batch: How many.
        generator: Of the random numbers; torch's own if not given.
        device: Where to make them; must be that of the generator.
    """
    length, dim = task.length, task.dim
    points = torch.randn(batch, length + 1, dim, generator=generator, device=device)
    if not task.isotropic:
        root = np.linalg.cholesky(task.sigma).T.astype(np.float32)
        points = points @ torch.from_numpy(np.ascontiguousarray(root)).to(points)
    signal, noise_sd = _signal(task, points, generator)
    noise = torch.randn(signal.shape, generator=generator, device=device) * noise_sd
    if task.released:
        noise[:, -1] = 0.0
    y = signal + noise
    return Sequences(x=points[:, :-1], y=y[:, :-1], query=points[:, -1:], answer=y[:, -1:])


def _signal(
    task: LinearTask, points: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """beta_n.x (b, l + 1, n), and the noise's standard deviation (n,)."""
    batch, dim = points.shape[0], task.dim
    masks = torch.from_numpy(task.masks).to(points)  # (n, d)
    variance = torch.full((task.outputs,), task.noise_variance).to(points)
    shape = (batch, task.outputs if task.released else 1, dim)
    beta = torch.randn(shape, generator=generator, device=points.device)
    if task.released:
        variance = variance * masks.sum(1)
    else:
        beta = beta * dim**-0.5
    return points @ (beta * masks).mT, variance.sqrt()


def check_covariance(dim: int, rho: float, covariance: Sequence[Sequence[float]]) -> None:
    """Raise a ValueError unless Sigma is a positive definite d x d matrix, given in one way."""
    if not -1 < rho < 1:
        raise ValueError(
            f"rho must be between -1 and 1 for a positive definite covariance, got {rho}"
        )
    if not covariance:
        return
    if rho != 0:
        raise ValueError("rho has no effect where the covariance is given: set one of them")
    if len(covariance) != dim or any(len(row) != dim for row in covariance):
        raise ValueError(f"covariance must have {dim} rows of {dim} numbers")
    sigma = np.array(covariance, dtype=np.float64)
    if not np.isfinite(sigma).all():
        raise ValueError("covariance must hold finite numbers")
    if not np.allclose(sigma, sigma.T):
        raise ValueError("covariance must be symmetric")
    lowest = float(np.linalg.eigvalsh(sigma)[0])
    if lowest <= 0:
        raise ValueError(
            f"covariance must be positive definite, its lowest eigenvalue is {lowest:.3g}"
        )


def _check_supports(dim: int, supports: Sequence[Sequence[int]]) -> None:
    for support in supports:
        if not support or len(set(support)) < len(support):
            raise ValueError(f"supports must be different coordinates, got {tuple(support)}")
        if min(support) < 1 or max(support) > dim:
            raise ValueError(f"supports must be coordinates from 1 to {dim}, got {tuple(support)}")
