"""Studies as the network sees them: pictures of equal size, and the numbers of words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.utils.data import Dataset

from heed_core.errors import InputError
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical.reports.layouts import Study, list_studies
from heed_medical.reports.settings import ReportData
from heed_medical.reports.words import Vocabulary, clean_report

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass(frozen=True, kw_only=True)
class ReportCase:
    """The pictures of a study, grey within 0..1, and its report."""

    name: str
    pictures: tuple[Float32[np.ndarray, "h w"], ...]
    """One per view; of equal sizes once a training picture was cut."""
    views: tuple[bool, ...]
    """Which views are there."""
    report: str | None = None
    """Cleaned; None: to be written."""
    numbers: tuple[int, ...] = ()
    """Of its words, with both zeros, cut."""


class ReportBatch(TypedDict):
    """What the network trains on."""

    images: Float[Tensor, "b v 3 h w"]
    views: Bool[Tensor, "b v"]
    tokens: Int64[Tensor, "b n"]
    lengths: Int64[Tensor, " b"]
    """Numbers of each report, both zeros counted."""


def plan_reports(data: ReportData, root: Path) -> ReportData:
    """Fill the open fields (layout, vocabulary) from the training reports.

    Raises:
        InputError: There is no training report, or no word often enough.
    """
    listing = list_studies(root, data)
    if listing.problems and data.on_error == "stop":
        raise InputError(listing.problems[0], remedy="or --data.on-error skip")
    if data.vocabulary:
        return replace(data, layout=listing.layout)
    cleaned = [
        clean_report(study.report or "", data.dialect)
        for study in listing.studies
        if study.split == "train"
    ]
    if not cleaned:
        raise InputError("has no training reports", path=root, remedy="add some to the split")
    found = Vocabulary.of(cleaned, threshold=data.threshold)
    if len(found) < 3:  # <unk> and the full stop
        raise InputError(
            f"no word occurs {data.threshold} times in the {len(cleaned)} training reports",
            path=root,
            remedy="lower --data.threshold",
        )
    return replace(data, layout=listing.layout, vocabulary=found.words)


def read_study(study: Study, data: ReportData, *, training: bool = False) -> ReportCase:
    """Read a study.

    Args:
        study: Its files.
        data: The settings, vocabulary settled.
        training: Pictures keep their proportions, with `resize` as the shorter side.

    Raises:
        InputError: A picture is missing or cannot be read.
    """
    pictures, views = _read_pictures(study, data, training=training)
    case = ReportCase(name=study.name, pictures=pictures, views=views)
    if study.report is None:
        return case
    report = clean_report(study.report, data.dialect)
    numbers = Vocabulary(data.vocabulary).encode(report, most=data.most_words)
    return replace(case, report=report, numbers=tuple(numbers))


def _read_pictures(
    study: Study, data: ReportData, *, training: bool
) -> tuple[tuple[Float32[np.ndarray, "h w"], ...], tuple[bool, ...]]:
    blank = np.zeros((data.size, data.size), dtype=np.float32)
    if data.pictures == "ignored":
        return (blank,) * data.views, (False,) * data.views
    found = []
    for path in study.pictures[: data.views]:
        if not path.is_file():
            raise InputError(
                f"does not exist (study {study.name})",
                path=path,
                remedy="add it, or name the folder with --data.images",
            )
        grey = read_grey(path)
        found.append(resize_grey(grey, _size(grey.shape, data, training=training)))
    lacking = data.views - len(found)
    if data.lone == "duplicate":
        return (*found, *(found[-1:] * lacking)), (True,) * data.views
    return (*found, *([blank] * lacking)), (True,) * len(found) + (False,) * lacking


def _size(shape: tuple[int, ...], data: ReportData, *, training: bool) -> tuple[int, int]:
    if not training:
        return data.size, data.size
    factor = data.resize / min(shape)
    height, width = (max(data.resize, round(side * factor)) for side in shape)
    return height, width


def cut_case(
    case: ReportCase, rng: np.random.Generator, *, size: int, flip: float = 0.0
) -> ReportCase:
    """A random square of each picture, mirrored with a probability; a pure function.

    Mirroring swaps left and right, which a report tells apart.
    """
    mirror = rng.random() < flip
    pictures = []
    for picture in case.pictures:
        top, left = (int(rng.integers(side - size + 1)) for side in picture.shape)
        square = picture[top : top + size, left : left + size]
        pictures.append(np.ascontiguousarray(square[:, ::-1] if mirror else square))
    return replace(case, pictures=tuple(pictures))


def to_images(cases: Sequence[ReportCase]) -> tuple[Tensor, Tensor]:
    """Pictures (b, v, 3, h, w) in three equal colours, less ImageNet's mean, and views (b, v)."""
    grey = torch.from_numpy(np.stack([np.stack(case.pictures) for case in cases]))
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
    views = torch.tensor([case.views for case in cases])
    return (grey[:, :, None] - mean) / deviation, views


def to_tokens(cases: Sequence[ReportCase]) -> tuple[Int64[Tensor, "b n"], Int64[Tensor, " b"]]:
    """Numbers of the words, filled up with 0, and how many there are."""
    lengths = torch.tensor([len(case.numbers) for case in cases])
    tokens = torch.zeros(len(cases), int(lengths.max()), dtype=torch.long)
    for row, case in zip(tokens, cases, strict=True):
        row[: len(case.numbers)] = torch.tensor(case.numbers)
    return tokens, lengths


def to_batch(cases: Sequence[ReportCase]) -> ReportBatch:
    """Pictures and words of some cases."""
    images, views = to_images(cases)
    tokens, lengths = to_tokens(cases)
    return {"images": images, "views": views, "tokens": tokens, "lengths": lengths}


class StudyData(Dataset[ReportCase]):
    """Studies, read when asked for.

    Args:
        studies: Where they are.
        data: The settings, vocabulary settled.
        training: As of `read_study`.
        skipped: What the list left out, a line each.
    """

    read_ahead = 4

    def __init__(
        self,
        studies: Sequence[Study],
        data: ReportData,
        *,
        training: bool = False,
        skipped: Sequence[str] = (),
    ) -> None:
        self.studies, self.data = tuple(studies), data
        self.training, self.skipped = training, tuple(skipped)

    @property
    def names(self) -> list[str]:
        """The names of the cases, in order."""
        return [study.name for study in self.studies]

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> ReportCase:
        return read_study(self.studies[index], self.data, training=self.training)
