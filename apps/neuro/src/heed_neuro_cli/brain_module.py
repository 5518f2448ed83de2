"""The brain encoder with its loss, validation and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from heed_neuro.brain_encoder.network import BrainEncoder, encoding_loss
from heed_neuro.brain_encoder.scores import mean_r
from heed_neuro_cli.brain_cases import Batch, ImageSet
from heed_neuro_cli.brain_settings import BrainSettings


@dataclass(frozen=True, kw_only=True)
class BrainPrediction:
    """The predicted responses to a set of images."""

    name: str
    images: tuple[Path, ...]
    predicted: Mapping[str, np.ndarray]
    """Group -> (images, vertices)."""
    case: ImageSet


class BrainModule(L.LightningModule):
    """Mean squared error of each hemisphere, AdamW; the best epoch by mean validation r."""

    def __init__(self, model: BrainEncoder, settings: BrainSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The loss of a batch."""
        found = self.model(batch.features, batch.saliency)
        loss = encoding_loss(found, batch.responses)
        self.log(
            "train/loss",
            loss,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch.features),
        )
        if self.settings.model.kind == "conv":
            loss = loss + self.settings.training.norm_penalty * self.model.l2_penalty()
        return loss

    def validation_step(self, cases: list[ImageSet], _: int) -> None:
        """Mean correlation over vertices, and the loss, of a set of images."""
        for case in cases:
            predicted = self._predict(case)
            loss = encoding_loss(
                [torch.from_numpy(predicted[group]) for group in case.measured],
                [torch.from_numpy(own) for own in case.measured.values()],
            )
            r = mean_r(predicted, case.measured)
            self.log("val/loss", loss, sync_dist=True, batch_size=1)
            # A constant prediction correlates with nothing: it is no best epoch.
            value = 0.0 if np.isnan(r) else r
            self.log("val/r", value, prog_bar=True, sync_dist=True, batch_size=1)

    def predict_step(self, cases: list[ImageSet], _: int) -> list[BrainPrediction]:
        """The responses to sets of images."""
        return [
            BrainPrediction(
                name=case.name, images=case.images, predicted=self._predict(case), case=case
            )
            for case in cases
        ]

    def configure_optimizers(self) -> Any:
        """AdamW, halved every so many epochs."""
        own = self.settings.training
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=own.learning_rate, weight_decay=own.weight_decay
        )
        steps = torch.optim.lr_scheduler.StepLR(optimizer, own.step_epochs, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": steps}

    @torch.no_grad()
    def _predict(self, case: ImageSet) -> dict[str, np.ndarray]:
        return predict_images(
            self.model, case, batch=self.settings.trainer.batch, device=self.device
        )


@torch.no_grad()
def predict_images(
    model: BrainEncoder, case: ImageSet, *, batch: int, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """The responses of each group to the images of a set, (images, vertices)."""
    groups = [group.name for group in model.config.groups]
    parts: list[Sequence[np.ndarray]] = []
    for start in range(0, len(case.rows), batch):
        features, saliency = case.batch(slice(start, start + batch))
        given = None if saliency is None else saliency.to(device)
        found = model(features.to(device), given)
        parts.append([own.float().cpu().numpy() for own in found])
    columns = zip(*parts, strict=True)
    return {g: np.concatenate(own) for g, own in zip(groups, columns, strict=True)}
