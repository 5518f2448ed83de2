"""Monte Carlo risks with error bars: predictors compared on the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heed_neuro.icl import theory
from heed_neuro.icl.estimators import kernel_regression, one_step, preconditioned_step, ridge
from heed_neuro.icl.tasks import LinearTask, Sequences, draw

Predictor = Callable[[Sequences], Tensor]
"""From sequences to predictions (b, q, n)."""

GAMMA = 0.13
"""|omega| of the two heads that the paper reads off after 5e5 steps (d = 5, L = 40)."""

FIT_SEQUENCES = 20_000
FIT_SEED = 20250313
BATCH = 8192


@dataclass(frozen=True, kw_only=True)
class Risk:
    """The mean squared error of one predictor."""

    mean: float
    standard_error: float


def baselines(
    task: LinearTask, *, gamma: float = GAMMA, trained: int | None = None
) -> dict[str, Predictor]:
    """What a model is compared with on a task, each with the best rate for its d, L and sigma^2.

    One output, Sigma = I: zero, one step of plain and of debiased gradient descent, two heads of
    +-gamma, the best head of omega = 1/sqrt d, and ridge, which is the Bayes predictor. Sigma not
    I: the steps also with their best matrices. Several outputs: zero, steps on each output's own
    coordinates, and the Bayes predictor.

    Args:
        task: What the predictors are the best for.
        gamma: |omega| of the two heads.
        trained: Also add the best linear attention for contexts of this length, which is not the
            best for others: it divides by this length, whatever the task's.
    """
    found: dict[str, Predictor] = {"zero": lambda s: torch.zeros_like(_like_answer(s))}
    rates = {kind: _rates(task, debiased=kind == "debiased_gd") for kind in _STEPS}
    for kind, rate in rates.items():
        found[kind] = _step(task, rate, debiased=kind == "debiased_gd")
    if not task.supports and not task.isotropic:
        for debiased in (False, True):
            name = "debiased_preconditioned" if debiased else "preconditioned"
            found[name] = _preconditioned(task, debiased=debiased)
    if not task.supports and task.isotropic:
        mu = theory.manifold_mu(gamma, task)
        found["two_head"] = _heads([gamma, -gamma], [mu, -mu])
        omega = task.dim**-0.5
        found["one_head"] = _heads([omega], [best_scale(task, _heads([omega], [1.0]))])
    if trained is not None:
        found["linear_attention"] = _linear_attention(at_length(task, trained))
    found["ridge"] = lambda s: ridge(s, task)
    return found


def squared_errors(
    predictors: Mapping[str, Predictor], sequences: Sequences
) -> dict[str, Float[np.ndarray, " b"]]:
    """The mean squared error of each sequence over its queries and outputs."""
    answer = sequences.answer
    if answer is None:
        raise ValueError("the sequences have no answers")
    with torch.no_grad():
        return {
            name: (predict(sequences) - answer).double().square().mean((1, 2)).cpu().numpy()
            for name, predict in predictors.items()
        }


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Sums over predictions of two predictors, of which their correlation follows.

    Sums of batches add up, so that any number of sequences is compared in little memory.
    """

    count: float = 0.0
    first: float = 0.0
    second: float = 0.0
    first_squares: float = 0.0
    second_squares: float = 0.0
    products: float = 0.0

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Agreement:
        """Of the predictions for the same sequences."""
        a, b = (part.detach().double().flatten() for part in (first, second))
        return cls(
            count=float(a.numel()),
            first=float(a.sum()),
            second=float(b.sum()),
            first_squares=float(a @ a),
            second_squares=float(b @ b),
            products=float(a @ b),
        )

    def __add__(self, other: Agreement) -> Agreement:
        mine, theirs = asdict(self), asdict(other)
        return Agreement(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def correlation(self) -> float:
        """Pearson's; NaN where a predictor is constant."""
        n = max(self.count, 1.0)
        covariance = self.products - self.first * self.second / n
        variances = (
            self.first_squares - self.first**2 / n,
            self.second_squares - self.second**2 / n,
        )
        if min(variances) <= 0:
            return float("nan")
        return float(covariance / np.sqrt(variances[0] * variances[1]))


def nearest_step(task: LinearTask) -> str:
    """The step of gradient descent that two heads or more approach, among `baselines`."""
    plain = task.supports or task.isotropic
    return "debiased_gd" if plain else "debiased_preconditioned"


def monte_carlo(
    predictors: Mapping[str, Predictor], task: LinearTask, *, samples: int, seed: int
) -> tuple[dict[str, Risk], dict[str, Float[np.ndarray, " s"]]]:
    """The risks on fresh sequences, and the errors of each sequence for paired differences.

    Args:
        predictors: All see the same sequences.
        task: Their distribution.
        samples: How many sequences.
        seed: Of the sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in predictors}
    for start in range(0, samples, BATCH):
        batch = draw(task, min(BATCH, samples - start), generator=generator)
        for name, found in squared_errors(predictors, batch).items():
            parts[name].append(found)
    errors = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    return {name: risk_of(values) for name, values in errors.items()}, errors


def risk_of(errors: Float[np.ndarray, " s"]) -> Risk:
    """Mean and standard error of independent errors."""
    spread = float(errors.std(ddof=1)) if len(errors) > 1 else float("nan")
    return Risk(mean=float(errors.mean()), standard_error=spread / len(errors) ** 0.5)


def best_scale(task: LinearTask, predict: Predictor) -> float:
    """The factor of a predictor with the smallest risk, fitted on sequences of its own."""
    generator = torch.Generator().manual_seed(FIT_SEED)
    sequences = draw(task, FIT_SEQUENCES, generator=generator)
    assert sequences.answer is not None
    found, answer = predict(sequences).double(), sequences.answer.double()
    return float((found * answer).sum() / found.square().sum())


_STEPS = ("vanilla_gd", "debiased_gd")


def _rates(task: LinearTask, *, debiased: bool) -> tuple[float, ...]:
    """The best rate of a step for each output, on its own coordinates."""
    rate = theory.debiased_rate if debiased else theory.vanilla_rate
    if not task.supports:
        return (rate(task),)
    found = []
    for support in task.supports:
        size = len(support)
        # y over the deviation of the signal is a task of `size` coordinates.
        noise = task.noise_variance * (1.0 if task.released else task.dim / size)
        found.append(rate(LinearTask(dim=size, length=task.length, noise_variance=noise)))
    return tuple(found)


def _step(task: LinearTask, rates: tuple[float, ...], *, debiased: bool) -> Predictor:
    def predict(sequences: Sequences) -> Tensor:
        step = one_step(sequences, task, rate=1.0, debiased=debiased)
        return step * torch.tensor(rates).to(step)

    return predict


def _preconditioned(task: LinearTask, *, debiased: bool) -> Predictor:
    omega = theory.preconditioner(task, debiased=debiased)
    return lambda s: preconditioned_step(s, task, omega, debiased=debiased)


def _linear_attention(task: LinearTask) -> Predictor:
    """The best plain step at the task's length L0, divided by L0 at every length."""
    if task.supports or task.isotropic:
        step = _step(task, _rates(task, debiased=False), debiased=False)
    else:
        step = _preconditioned(task, debiased=False)
    return lambda s: step(s) * (s.x.shape[1] / task.length)


def _heads(omega: list[float], mu: list[float]) -> Predictor:
    return lambda s: kernel_regression(s, torch.tensor(omega), torch.tensor(mu))


def _like_answer(sequences: Sequences) -> Tensor:
    return sequences.query[..., :1].expand(-1, -1, sequences.y.shape[2])


def at_length(task: LinearTask, length: int) -> LinearTask:
    """The same task with another context."""
    return replace(task, length=length)
