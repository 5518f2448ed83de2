"""Training and predictions of in-context linear regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.circuits import kq_ov_circuits
from heed_core.errors import InputError
from heed_neuro.icl.files import NamedSequences
from heed_neuro.icl.patterns import Pattern
from heed_neuro.icl.regressor import InContextRegressor, RegressorConfig
from heed_neuro.icl.risks import (
    Agreement,
    at_length,
    baselines,
    nearest_step,
    squared_errors,
)
from heed_neuro.icl.tasks import LinearTask, Sequences, draw
from heed_neuro_cli.icl_settings import IclSettings, task_of

REFERENCE = "debiased_gd"
"""Risks are also told as paired differences from this one."""

RECORDED = tuple(dict.fromkeys([0, *(round(10 ** (k / 30)) for k in range(180))]))
"""Steps of a training at which the circuits are noted, evenly on a logarithmic scale to 1e6."""


class Experiment(nn.Module):
    """The network, and what became of its circuits while it was trained (no parameters).

    Args:
        config: Of the network.
    """

    steps: Tensor
    course: Tensor

    def __init__(self, config: RegressorConfig) -> None:
        super().__init__()
        self.regressor = InContextRegressor(config)
        self.register_buffer("steps", torch.full((len(RECORDED),), -1.0))
        self.register_buffer("course", torch.zeros(len(RECORDED), 2, config.heads))

    def forward(self, context: Float[Tensor, "b l c"], query: Float[Tensor, "b q c"]) -> Tensor:
        """Predict."""
        return cast(Tensor, self.regressor(context, query))

    def pattern(self) -> Pattern:
        """The circuits now."""
        with torch.no_grad():
            circuits = kq_ov_circuits(self.regressor.attention)
        kq, ov = (part.double().cpu().numpy() for part in (circuits.kq, circuits.ov))
        return Pattern(kq=kq, ov=ov, dim=self.regressor.config.dim)

    def note(self, step: int) -> None:
        """Record omega and mu, if it is time."""
        if step in RECORDED:
            index, pattern = RECORDED.index(step), self.pattern()
            self.steps[index] = step
            self.course[index] = torch.from_numpy(np.stack([pattern.omega, pattern.mu]))


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Sequences that are made when they are needed, always the same."""

    name: str
    task: LinearTask
    count: int
    seed: int
    first: bool
    """Whether it stands for the model itself too."""

    def draw(self) -> Sequences:
        """Make them."""
        return draw(self.task, self.count, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over sequences of a predictor's errors and of their differences from the reference."""

    total: float
    squares: float
    paired: float
    paired_squares: float


@dataclass(frozen=True, kw_only=True)
class ChunkErrors:
    """The errors of all predictors on a chunk."""

    name: str
    length: int
    count: int
    sums: Mapping[str, Sums]
    agreement: Agreement
    """Of the model with the step of gradient descent that it should come near."""
    pattern: Pattern | None
    steps: Float[np.ndarray, " t"]
    course: Float[np.ndarray, "t 2 h"]


@dataclass(frozen=True, kw_only=True)
class FilePredictions:
    """The predictions for a user's file: predictor -> (q, n) for each sequence."""

    name: str
    labels: tuple[str, ...]
    found: tuple[Mapping[str, np.ndarray], ...]
    answers: tuple[np.ndarray | None, ...]


class IclModule(L.LightningModule):
    """Mean squared error on fresh sequences at each step."""

    def __init__(self, settings: IclSettings, model: Experiment) -> None:
        super().__init__()
        self.settings, self.model = settings, model
        self.task = task_of(settings)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Note the circuits before the step."""
        self.model.note(self.global_step)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of as many fresh sequences as the batch has places.

        The runtime seeds torch for each step and process, so that they do not depend on resuming.
        """
        sequences = draw(self.task, len(batch), device=self.device)
        assert sequences.answer is not None
        found = self.model(sequences.context_tokens(), sequences.query_tokens())
        loss = F.mse_loss(found, sequences.answer)
        self.log(
            "train/mse", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch)
        )
        return loss

    def validation_step(self, cases: list[Chunk], batch_idx: int) -> None:
        """Log the error, and what the circuits amount to."""
        pattern = self.model.pattern()
        for chunk in cases:
            errors = squared_errors({"model": self._predict}, chunk.draw().to(self.device))
            found = {
                "val/mse": errors["model"].mean(),
                "val/gamma": pattern.gamma,
                "val/zero_sum": pattern.zero_sum,
                "val/eta_eff": pattern.eta_eff,
            }
            self.log_dict(
                {name: float(value) for name, value in found.items()},
                sync_dist=True,
                batch_size=chunk.count,
            )

    def predict_step(
        self, cases: list[Chunk | NamedSequences], batch_idx: int
    ) -> list[ChunkErrors | FilePredictions]:
        """The errors on chunks, the predictions for files."""
        return [
            self._errors(case) if isinstance(case, Chunk) else self._file(case) for case in cases
        ]

    def configure_optimizers(self) -> Any:
        """Adam or plain gradient descent."""
        training = self.settings.training
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[training.optimizer]
        return kind(self.parameters(), lr=training.learning_rate)

    def _predict(self, sequences: Sequences) -> Tensor:
        return cast(Tensor, self.model(sequences.context_tokens(), sequences.query_tokens()))

    def _errors(self, chunk: Chunk) -> ChunkErrors:
        trained = self.settings.model.fixed_length
        predictors = {"model": self._predict, **_baselines(chunk.task, trained)}
        sequences = chunk.draw().to(self.device)
        errors = squared_errors(predictors, sequences)
        step = predictors[nearest_step(chunk.task)]
        with torch.no_grad():
            agreement = Agreement.of(self._predict(sequences), step(sequences))
        sums = {}
        for name, values in errors.items():
            apart = values - errors[REFERENCE]
            sums[name] = Sums(
                total=float(values.sum()),
                squares=float(np.square(values).sum()),
                paired=float(apart.sum()),
                paired_squares=float(np.square(apart).sum()),
            )
        there = self.model.steps >= 0 if chunk.first else self.model.steps > torch.inf
        return ChunkErrors(
            name=chunk.name,
            length=chunk.task.length,
            count=chunk.count,
            sums=sums,
            agreement=agreement,
            pattern=self.model.pattern() if chunk.first else None,
            steps=self.model.steps[there].double().cpu().numpy(),
            course=self.model.course[there].double().cpu().numpy(),
        )

    def _file(self, case: NamedSequences) -> FilePredictions:
        found: list[Mapping[str, np.ndarray]] = []
        answers: list[np.ndarray | None] = []
        for group in case.groups:
            check_sizes(group, self.settings, case.name)
            task = at_length(self.task, group.x.shape[1])
            predictors = {"model": self._predict, **_baselines(task, None)}
            group = group.to(self.device)
            with torch.no_grad():
                rows = {name: one(group).cpu().numpy() for name, one in predictors.items()}
            for b in range(len(group.x)):
                found.append({name: values[b] for name, values in rows.items()})
                answers.append(None if group.answer is None else group.answer[b].cpu().numpy())
        return FilePredictions(
            name=case.name, labels=case.labels, found=tuple(found), answers=tuple(answers)
        )


@lru_cache(maxsize=64)
def _baselines(task: LinearTask, trained: int | None) -> dict[str, Any]:
    return baselines(task, trained=trained)


def check_sizes(group: Sequences, settings: IclSettings, name: str) -> None:
    """Refuse sequences that the model does not fit.

    Raises:
        InputError: They have other sizes.
    """
    found = (group.x.shape[2], group.y.shape[2])
    wanted = (settings.model.dim, settings.model.outputs)
    if found != wanted:
        raise InputError(
            f"{name}: has {found[0]} coordinates and {found[1]} outputs, the model's task has "
            f"{wanted[0]} and {wanted[1]}",
            remedy="give other sequences, or train a model for these",
        )
