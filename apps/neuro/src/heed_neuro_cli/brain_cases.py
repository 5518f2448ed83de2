"""Sets of images with their features and responses: what the encoder is trained and judged on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heed_core.errors import InputError
from heed_neuro.brain_encoder.backbones import read_image
from heed_neuro.brain_encoder.regions import Regions
from heed_neuro.brain_encoder.saliency import read_saliencies, read_saliency
from heed_neuro.brain_encoder.source import FeatureSource
from heed_neuro.brain_encoder.subject import IMAGES, Subject, find_images, surface_vertices
from heed_neuro_cli.brain_settings import BrainSettings, checked_source, held_out, opened

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One training image."""

    features: np.ndarray
    responses: tuple[np.ndarray, ...]
    saliency: np.ndarray | None


@dataclass(frozen=True)
class Batch:
    """Training images of a step."""

    features: Tensor
    responses: tuple[Tensor, ...]
    saliency: Tensor | None

    def to(self, device: torch.device | str, **_: object) -> Batch:
        """Move all tensors."""
        return Batch(
            self.features.to(device),
            tuple(own.to(device) for own in self.responses),
            None if self.saliency is None else self.saliency.to(device),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples."""
    responses = zip(*(sample.responses for sample in samples), strict=True)
    saliencies = [sample.saliency for sample in samples]
    present = [own for own in saliencies if own is not None]
    return Batch(
        torch.from_numpy(np.stack([sample.features for sample in samples])),
        tuple(torch.from_numpy(np.stack(own)) for own in responses),
        torch.from_numpy(np.stack(present)) if present else None,
    )


@dataclass(frozen=True)
class TrainingImages:
    """The images to train on; features are read when they are asked for."""

    table: np.ndarray
    subject: Subject
    rows: np.ndarray
    saliency: Path | None

    @classmethod
    def of(cls, settings: BrainSettings, root: Path) -> TrainingImages:
        """The training part of a subject."""
        subject = opened(settings, root)
        images = subject.images["train"]
        table = checked_source(settings).table("train", images)
        rows, _ = held_out(settings, len(images))
        return cls(table, subject, rows, settings.data.saliency)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        responses = self.subject.responses["train"]
        saliency = None
        if self.saliency is not None:
            grid = (self.table.shape[1], self.table.shape[2])
            saliency = read_saliency(self.saliency, self.subject.images["train"][row], grid)
        return Sample(
            np.asarray(self.table[row], dtype=np.float32),
            tuple(responses[g].rows(np.array([row]))[0] for g in self.subject.groups),
            saliency,
        )


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images that is predicted and scored as one."""

    name: str
    images: tuple[Path, ...]
    features: np.ndarray
    """(images, rows, columns, channels), perhaps memory-mapped; `rows` says which are these."""
    rows: np.ndarray
    saliency: Path | None = None
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Group -> (images, vertices)."""
    regions: Mapping[str, Regions] = field(default_factory=dict)
    ceilings: Mapping[str, np.ndarray] = field(default_factory=dict)
    surface: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    """Group -> where its vertices are on fsaverage."""
    skipped: Mapping[Path, str] = field(default_factory=dict)
    """Images of the folder that are left out -> why."""

    def batch(self, index: slice) -> tuple[Tensor, Tensor | None]:
        """Features and saliency of some images."""
        features = np.asarray(self.features[self.rows[index]], dtype=np.float32)
        saliency = None
        if self.saliency is not None:
            found = read_saliencies(self.saliency, self.images[index], features.shape[1:3])
            saliency = torch.from_numpy(found)
        return torch.from_numpy(features), saliency


@dataclass(frozen=True)
class OneSplit:
    """The images of one split of a subject, as one case."""

    settings: BrainSettings
    root: Path
    split: str

    def __post_init__(self) -> None:
        # Faults of the data are told before anything is computed.
        subject = opened(self.settings, self.root)
        if self.split not in ("train", "val", "test"):
            raise InputError(
                f"has no split {self.split!r}", path=self.root, remedy="use train, val or test"
            )
        if self.split == "test" and "test" not in subject.responses:
            raise InputError(
                "has no measured responses to the test images",
                path=self.root,
                remedy="use --split val, or add them (see info)",
            )

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> ImageSet:
        if index:
            raise IndexError(index)
        subject = opened(self.settings, self.root)
        kind = "test" if self.split == "test" else "train"
        images = subject.images[kind]
        rows = np.arange(len(images))
        if kind == "train":
            train, held = held_out(self.settings, len(images))
            rows = train if self.split == "train" else held
        ceilings = subject.ceilings if kind == "test" else {}
        return ImageSet(
            name=f"{subject.root.resolve().name}-{self.split}",
            images=tuple(images[row] for row in rows),
            features=checked_source(self.settings).table(kind, images),
            rows=rows,
            saliency=self.settings.data.saliency,
            measured={g: subject.responses[kind][g].rows(rows) for g in subject.groups},
            regions=subject.regions,
            ceilings=ceilings,
            surface={
                g: surface_vertices(subject.root, g, subject.vertices(g)) for g in subject.groups
            },
        )


@dataclass(frozen=True)
class GivenImages:
    """The images that a user gave: a file is a set of one, a folder one of all its images."""

    settings: BrainSettings
    paths: Sequence[Path]

    @property
    def names(self) -> Sequence[str]:
        """Of the sets."""
        return [path.stem if path.is_file() else path.resolve().name for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageSet:
        path = self.paths[index]
        images, skipped = images_in(path), {}
        if self.settings.data.on_error == "skip" and path.is_dir():
            skipped = unreadable(images)
            images = tuple(image for image in images if image not in skipped)
        for line in skipped.values():
            logger.warning("skipped: %s", line)
        if not images:
            raise InputError("holds no image that can be read", path=path, remedy="replace them")
        source: FeatureSource = checked_source(self.settings)
        features = source.compute(images)
        return ImageSet(
            name=self.names[index],
            images=images,
            features=features,
            rows=np.arange(len(images)),
            saliency=self.settings.data.saliency,
            skipped=skipped,
        )


def unreadable(images: Sequence[Path]) -> dict[Path, str]:
    """Images that cannot be read -> why."""
    found = {}
    for path in images:
        try:
            read_image(path)
        except InputError as error:
            found[path] = str(error)
    return found


def images_in(path: Path) -> tuple[Path, ...]:
    """The images of a folder (of a subject: its test images), or one file.

    Raises:
        InputError: No image.
    """
    if not path.is_dir():
        if path.suffix.lower() not in IMAGES:
            raise InputError(
                f"is no image ({', '.join(IMAGES)})", path=path, remedy="give images or folders"
            )
        return (path,)
    for inner in ("test_split/test_images", "test_images", "images"):
        if (path / inner).is_dir():
            return find_images(path / inner)
    return find_images(path)
