"""The settings of OAT, its presets, and how its data lie on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from heed_gaze.oat.network import OatConfig
from heed_gaze_cli.oat_cases import OatData
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
neutral       shelves.json                 layouts (image, boxes, rows, cols) and trials
              (layout, target, subject, objects or x and y); pictures beside it
STI           Amazon.json, images/*.jpg    binarymask/14x6-*.jpg where there are masks
spreadsheets  *.xlsx, Question/*.png       ID, Target, Question, Choice, X, Y, T_Package, Sub_ID
OSIE          fixations.mat or .json       objects/*.png or boxes.csv, or an even grid
COCO-Search18 *.json, images/              the target is the object that overlaps bbox most
FixaTons, neutral scanpath CSV             free viewing over an even grid
pictures      *.png, *.jpg                 predict and explain: --data.grid, --data.target

Splits: as the file says, else 80/10/10 of all trials at random; --data.split.rule layout, target
        or combination tests on what training does not see."""


@dataclass(frozen=True, kw_only=True)
class OatTraining:
    """The optimiser, and what training starts from."""

    learning_rate: float = 1e-4
    """Of Adam; constant."""
    weights: Path | None = None
    """An official checkpoint to start from."""
    position_table: Path | None = None
    """The checkpoint's own position table (.npy, rows x channels, without zero rows)."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.position_table is not None and self.weights is None:
            raise ValueError("position_table has no effect without weights")


@dataclass(frozen=True, kw_only=True)
class OatSettings:
    """All settings of OAT."""

    model: OatConfig = field(default_factory=OatConfig)
    data: OatData = field(default_factory=OatData)
    training: OatTraining = field(default_factory=OatTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if self.data.natural_size and not self.model.spp:
            raise ValueError("data.natural_size needs model.spp of 2, 3 or 4")


def small() -> OatSettings:
    """OAT for a laptop: small crops, two layers of 96 channels each side."""
    return OatSettings(
        model=OatConfig(
            dim=96, hidden=192, encoder_depth=2, decoder_depth=2, crop=(45, 30), dropout=0.1
        ),
        data=OatData(samples=20),
        training=OatTraining(learning_rate=1e-3),
        trainer=TrainerSettings(max_epochs=40, batch=16, clip=1.0, patience=15),
    )


def paper() -> OatSettings:
    """OAT as published: 512 channels, 4 + 4 layers, 20 trials of each shelf per step."""
    return OatSettings(trainer=TrainerSettings(max_epochs=500, batch=20, clip=1.0, patience=30))
