"""The two inputs of MEDUSA: the picture for the backbone, and a smaller grey one for the body."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.utils.data import Dataset

from heed_medical.pictures.augmentation import PictureAugmentation, augment_pictures
from heed_medical.pictures.batches import even_groups, groups_apart
from heed_medical.pictures.findings import findings_of
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData


@dataclass(frozen=True, kw_only=True)
class MedusaData(PictureData):
    """How pictures become the inputs and labels of MEDUSA."""

    body_size: tuple[int, int] = (256, 256)
    """Height and width of the body's picture, multiples of 16 for the published widths."""
    decision: Literal["argmax", "calibrated"] = "argmax"
    """How a class is called: the most probable one, or, for two classes, the second from the
    threshold on that was best on the validation pictures of the training."""
    threshold: float | None = None
    """For two classes: the probability from which on the second is called, instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.body_size) < 1:
            raise ValueError(f"body_size must be two positive numbers, got {self.body_size}")
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold must be above 0 and below 1, got {self.threshold}")
        if self.threshold is not None and self.decision == "calibrated":
            raise ValueError("decision=calibrated has no effect with a threshold of your own")
        settles = self.threshold is not None or self.decision == "calibrated"
        if settles and len(self.classes) > 2:
            raise ValueError(f"a threshold needs two classes, there are {len(self.classes)}")


@dataclass(frozen=True, kw_only=True)
class MedusaCase:
    """One picture at both sizes, grey within 0..1."""

    name: str
    main: Float32[np.ndarray, "h w"]
    body: Float32[np.ndarray, "p q"]
    label: int | None = None
    patient: str = ""
    source: str = ""
    findings: Float32[np.ndarray, " k"] | None = None
    """1 present, 0 absent, NaN not known; None: pictures have a class instead."""


class MedusaBatch(TypedDict):
    """What the network trains on."""

    main: Float[Tensor, "b 3 h w"]
    body: Float[Tensor, "b 1 p q"]
    label: Int64[Tensor, " b"]


def read_case(file: PictureFile, data: MedusaData) -> MedusaCase:
    """Read a picture at both sizes.

    Raises:
        InputError: The file cannot be read.
    """
    grey = read_grey(file.path, window=data.window, voi=data.voi)
    label = data.classes.index(file.label) if file.label in data.classes else None
    return MedusaCase(
        name=file.name,
        main=resize_grey(grey, data.size),
        body=resize_grey(grey, data.body_size),
        label=label,
        patient=file.patient,
        source=file.source,
        findings=findings_of(file, data) if data.findings and file.columns else None,
    )


def standardise(picture: Float[Tensor, "*lead h w"]) -> Float[Tensor, "*lead h w"]:
    """Each picture less its mean over its standard deviation; a constant one becomes 0.

    Example:
        >>> standardise(torch.full((1, 4, 4), 0.7)).abs().max().item()
        0.0
    """
    centred = picture - picture.mean((-2, -1), keepdim=True)
    deviation = picture.std((-2, -1), keepdim=True, correction=0)
    constant = deviation < 1e-6
    return torch.where(constant, 0.0, centred / torch.where(constant, 1.0, deviation))


def to_batch(cases: Sequence[MedusaCase]) -> MedusaBatch:
    """The two inputs of some cases; the label of a case without one is -1."""
    main = torch.from_numpy(np.stack([case.main for case in cases]))[:, None]
    body = torch.from_numpy(np.stack([case.body for case in cases]))[:, None]
    labels = [-1 if case.label is None else case.label for case in cases]
    return {
        "main": main.expand(-1, 3, -1, -1).contiguous(),
        "body": standardise(body),
        "label": torch.tensor(labels),
    }


def vary_case(
    case: MedusaCase,
    rng: np.random.Generator,
    options: PictureAugmentation,
    *,
    body: Literal["shared", "none"] = "shared",
) -> MedusaCase:
    """Augment a case; a pure function of its arguments.

    Args:
        case: The picture.
        rng: Where the change is drawn from.
        options: What is varied.
        body: shared: both sizes change in the same way; none: the body sees the picture as it is.
    """
    main, small = augment_pictures(
        [case.main, case.body], rng, options, changed=(True, body == "shared")
    )
    return replace(case, main=main, body=small)


class CaseData(Dataset[MedusaCase]):
    """Pictures, read when asked for.

    Args:
        files: The pictures.
        data: The settings, classes settled.
        skipped: What the list left out, a line each.
    """

    read_ahead = 4

    def __init__(
        self, files: Sequence[PictureFile], data: MedusaData, *, skipped: Sequence[str] = ()
    ) -> None:
        self.files, self.data, self.skipped = tuple(files), data, tuple(skipped)

    @property
    def names(self) -> list[str]:
        """The names of the cases, in order."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> MedusaCase:
        return read_case(self.files[index], self.data)


@dataclass(frozen=True, kw_only=True)
class Lot:
    """Pictures of which one is drawn each time."""

    files: tuple[PictureFile, ...]
    data: MedusaData

    def draw(self, rng: np.random.Generator) -> MedusaCase:
        """Read one of them.

        Raises:
            InputError: The file cannot be read.
        """
        return read_case(self.files[int(rng.integers(len(self.files)))], self.data)


class TrainData(Dataset[tuple[MedusaCase | Lot, ...]]):
    """Training samples: one picture each, or a lot of pictures to draw one of each class from.

    Args:
        files: The pictures.
        data: The settings, classes settled; `balance` says what a sample is.
        skipped: What the list left out, a line each.

    Raises:
        InputError: A class without a picture where samples are balanced.
    """

    def __init__(
        self, files: Sequence[PictureFile], data: MedusaData, *, skipped: Sequence[str] = ()
    ) -> None:
        self.files, self.data, self.skipped = tuple(files), data, tuple(skipped)
        self.groups: list[list[Int64[np.ndarray, " _"]]] | None = None
        self.apart: Sequence[str] = ()
        if data.balance != "none":
            self.groups = even_groups(
                [data.classes.index(str(file.label)) for file in files],
                classes=len(data.classes),
                positive_only=data.balance == "positive",
                seed=data.split_seed,
            )
            if data.balance == "positive":
                self.apart = groups_apart(self.groups)

    def __len__(self) -> int:
        return len(self.files) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> tuple[MedusaCase | Lot, ...]:
        if self.groups is None:
            return (read_case(self.files[index], self.data),)
        return tuple(
            Lot(files=tuple(self.files[i] for i in pool), data=self.data)
            for pool in self.groups[index]
        )


def vary_sample(
    sample: tuple[MedusaCase | Lot, ...],
    rng: np.random.Generator,
    options: PictureAugmentation | None,
    *,
    body: Literal["shared", "none"] = "shared",
) -> tuple[MedusaCase, ...]:
    """Draw from the lots of a training sample and augment its pictures.

    Args:
        sample: Of `TrainData`.
        rng: Where everything random is drawn from.
        options: What is varied; None: nothing.
        body: As in `vary_case`.
    """
    cases = [item.draw(rng) if isinstance(item, Lot) else item for item in sample]
    if options is None:
        return tuple(cases)
    return tuple(vary_case(case, rng, options, body=body) for case in cases)
