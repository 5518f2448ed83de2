"""The settings of the brain encoder, and what they say of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from heed_core.errors import InputError
from heed_core.folders import unique_names
from heed_neuro.brain_encoder.backbones import BackboneConfig
from heed_neuro.brain_encoder.features import describe
from heed_neuro.brain_encoder.network import BrainEncoderConfig, Group
from heed_neuro.brain_encoder.regions import Regions, whole
from heed_neuro.brain_encoder.source import FeatureSource
from heed_neuro.brain_encoder.splits import SplitMode, split_rows
from heed_neuro.brain_encoder.subject import Subject, check_gaps, read_subject
from heed_runtime.errors import UsageError
from heed_runtime.settings import TrainerSettings


@dataclass(frozen=True, kw_only=True)
class BrainData:
    """Which features of which images, and what is held out."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The frozen network."""
    cache: Path | None = None
    """A folder for features on disk, made or continued. None: in memory."""
    split: SplitMode = "random"
    """How validation images are chosen: a random share, or one of the folds."""
    number: int = 0
    """Which random split, or which fold."""
    folds: int = 10
    share: float = 0.1
    """Of the training images, that a random split holds out."""
    split_seed: int = 0
    saliency: Path | None = None
    """A folder of saliency maps, for model.kind saliency."""
    gaps: Literal["stop", "skip"] = "stop"
    """What to do with NaN responses: refuse them, or leave these vertices of these images out of
    loss and scores."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with an image given to predict or explain that cannot be read. A subject's own
    images belong to the rows of its responses and are never skipped."""
    made_with: str = ""
    """The frozen network in words; set by the training."""
    regions: str = ""
    """Fingerprint of the regions; set by the training."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}")
        if self.folds < 2 or self.number < 0 or self.split_seed < 0:
            raise ValueError(
                "folds must be at least 2, number and split_seed not negative, got "
                f"{self.folds}, {self.number}, {self.split_seed}"
            )


@dataclass(frozen=True, kw_only=True)
class BrainTraining:
    """Loss and minimisation; the defaults are the authors'."""

    learning_rate: float = 5e-4
    """Of AdamW."""
    weight_decay: float = 1e-4
    step_epochs: int = 100
    """Epochs after which the learning rate is halved."""
    norm_penalty: float = 0.02
    """Of the sum of the parameters' norms; model.kind conv only."""
    weights: Path | None = None
    """An official state dict to start from (kind transformer or factorised)."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0 or self.norm_penalty < 0 or self.step_epochs < 1:
            raise ValueError("weight_decay, norm_penalty and step_epochs must not be negative")


@dataclass(frozen=True, kw_only=True)
class BrainSettings:
    """All settings of the brain encoder."""

    model: BrainEncoderConfig = field(default_factory=BrainEncoderConfig)
    data: BrainData = field(default_factory=BrainData)
    training: BrainTraining = field(default_factory=BrainTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if self.data.saliency is not None and self.model.kind != "saliency":
            raise ValueError(f"data.saliency has no effect with kind={self.model.kind!r}")
        if self.training.weights is not None and self.model.kind not in (
            "transformer",
            "factorised",
        ):
            raise ValueError(f"training.weights has no effect with kind={self.model.kind!r}")


def small() -> BrainSettings:
    """For a laptop and made data: pixels as tokens, a narrow encoder, a higher learning rate."""
    groups = (Group(name="all", vertices=12, regions=("faces", "places", "rest"), sizes=(6, 6, 0)),)
    model = BrainEncoderConfig(
        channels=48, grid=(8, 8), dim=32, heads=4, ffn=64, dropout=0.0, groups=groups
    )
    return BrainSettings(
        model=model,
        data=BrainData(backbone=BackboneConfig(name="pixels", patch=4)),
        training=BrainTraining(learning_rate=3e-3),
        trainer=TrainerSettings(max_epochs=12, batch=32, clip=1.0),
    )


def paper() -> BrainSettings:
    """The authors' encoder and training, on DINOv2's last queries: give the weights."""
    return BrainSettings(trainer=TrainerSettings(max_epochs=15, batch=16, clip=0.1))


def source_of(settings: BrainSettings) -> FeatureSource:
    """Where the features come from."""
    import torch

    wanted = settings.trainer.device
    gpu = torch.cuda.is_available() and wanted != "cpu"
    data = settings.data
    return FeatureSource(config=data.backbone, cache=data.cache, device="cuda" if gpu else "cpu")


def regions_of(settings: BrainSettings, subject: Subject) -> tuple[Regions, ...]:
    """What has a query, per group.

    Raises:
        InputError: The data have no streams.
    """
    readout = settings.model.readout
    if readout in ("hemis", "voxels"):
        return tuple(whole(subject.vertices(group)) for group in subject.groups)
    if readout == "streams":
        if not subject.streams:
            raise InputError(
                "has no masks of streams",
                path=subject.root / "roi_masks",
                remedy="add mapping_streams.npy and its masks, or use --model.readout rois_all",
            )
        return tuple(subject.streams[group] for group in subject.groups)
    return tuple(subject.regions[group] for group in subject.groups)


def fingerprint(subject: Subject) -> str:
    """Of the regions of all groups."""
    return "-".join(subject.regions[group].fingerprint for group in subject.groups)


def planned(settings: BrainSettings, root: Path) -> BrainSettings:
    """Take vertices, regions and the size of the token map from the data.

    Raises:
        InputError: The data cannot be used.
        UsageError: The settings do not fit them.
    """
    subject = read_subject(root)
    if settings.data.gaps == "stop":
        check_gaps(subject)
    held_out(settings, len(subject.images["train"]))
    if settings.model.kind == "saliency" and settings.data.saliency is None:
        raise UsageError("model.kind saliency needs maps", remedy="add --data.saliency FOLDER")
    source = source_of(settings)
    rows, columns, channels = source.one(subject.images["train"][0])
    regions = regions_of(settings, subject)
    groups = tuple(Group.of(name, own) for name, own in zip(subject.groups, regions, strict=True))
    return replace(
        settings,
        model=replace(settings.model, channels=channels, grid=(rows, columns), groups=groups),
        data=replace(
            settings.data,
            made_with=describe(source.identity()),
            regions=fingerprint(subject),
        ),
    )


def held_out(settings: BrainSettings, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of training and of validation."""
    data = settings.data
    try:
        return split_rows(
            rows,
            mode=data.split,
            number=data.number,
            folds=data.folds,
            share=data.share,
            seed=data.split_seed,
        )
    except ValueError as error:
        raise UsageError(f"the validation split: {error}", remedy="correct --data") from None


def opened(settings: BrainSettings, root: Path) -> Subject:
    """A subject that a trained encoder is used on.

    Raises:
        InputError: It is another subject than the encoder's.
    """
    subject = read_subject(root)
    wanted = {group.name: group.vertices for group in settings.model.groups}
    found = {group: subject.vertices(group) for group in subject.groups}
    if found != wanted:
        raise InputError(
            f"has vertices {_counted(found)}, but the encoder predicts {_counted(wanted)}",
            path=root,
            remedy="use the subject that it was trained on",
        )
    if settings.data.regions and fingerprint(subject) != settings.data.regions:
        raise InputError(
            "has the regions of another subject than the one that the encoder was trained on",
            path=root,
            remedy="use its own subject's masks",
        )
    return subject


def labelled(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by name, with as many of the folders above as tell them apart."""
    return dict(zip(unique_names([path.resolve().name for path in runs], runs), runs, strict=True))


def checked_source(settings: BrainSettings) -> FeatureSource:
    """Where the features come from; refuses another network than the training's.

    Raises:
        InputError: The network is another one.
    """
    source = source_of(settings)
    wanted = settings.data.made_with
    if wanted and (found := describe(source.identity())) != wanted:
        raise InputError(
            f"the encoder was trained on features of {wanted}, not of {found}",
            path=settings.data.cache or settings.data.backbone.weights,
            remedy="give the same backbone",
        )
    return source


def _counted(vertices: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in vertices.items())
