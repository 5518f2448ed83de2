"""Batches of studies, and their augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from heed_medical.more.network import LEADS
from heed_medical.more.studies import Study
from heed_medical.more.text import Text

SEGMENTS = 4
"""Of an ECG, which are warped or put in another order."""


@dataclass(frozen=True)
class StudyBatch:
    """Studies together; rows without a modality are 0 or empty and not `valid`."""

    xray: Float[Tensor, "b 3 h w"] | None
    """None where no study has one."""
    ecg: Float[Tensor, "b 12 n"] | None
    text: Sequence[Text]
    valid: dict[str, Bool[Tensor, " b"]]
    """By modality."""
    groups: Int64[Tensor, "2 b"]
    """Numbers of the subject and of the report; equal ones are the same, -1 is not known."""

    def to(self, device: torch.device) -> StudyBatch:
        """The batch on another device."""
        return StudyBatch(
            xray=None if self.xray is None else self.xray.to(device),
            ecg=None if self.ecg is None else self.ecg.to(device),
            text=self.text,
            valid={name: rows.to(device) for name, rows in self.valid.items()},
            groups=self.groups.to(device),
        )


def join(studies: Sequence[Study]) -> StudyBatch:
    """Make a batch of studies."""
    xrays = _stack([study.xray for study in studies])
    groups = [
        [_number(study.file.subject) for study in studies],
        [_number("\n".join(study.text)) if study.text else -1 for study in studies],
    ]
    return StudyBatch(
        xray=None if xrays is None else xrays.unsqueeze(1).expand(-1, 3, -1, -1),
        ecg=_stack([study.ecg for study in studies]),
        text=[study.text or ("", "") for study in studies],
        valid={
            name: torch.tensor([study.of(name) is not None for study in studies])
            for name in ("xray", "ecg", "text")
        },
        groups=torch.tensor(groups),
    )


def _stack(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
    known = next((array for array in arrays if array is not None), None)
    if known is None:
        return None
    zero = np.zeros_like(known)
    return torch.from_numpy(np.stack([zero if array is None else array for array in arrays]))


def _number(text: str) -> int:
    """A number of a text, the same in every process; -1 of an empty one."""
    if not text:
        return -1
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def rows_to_encode(valid: Bool[Tensor, " b"]) -> Int64[Tensor, " k"]:
    """Rows that a tower is given: the valid ones, and others where these are fewer than two.

    Batch normalisation needs two rows, which one process must have alone; of several, whose
    statistics are shared, each has one at least. And every process must run every tower.
    """
    rows = valid.nonzero()[:, 0]
    if len(rows) >= 2:
        return rows
    others = (~valid).nonzero()[:, 0]
    return torch.cat([rows, others])[:2]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """A pure function of a study and a generator.

    Args:
        crop: Probability of a crop of an X-ray to 20 to 100 % of its area, resized back.
        tone: Probability of another brightness and contrast.
        blur: Probability of a blur.
        flip: Probability of a mirror image; left and right of a report are then wrong.
        ecg: Whether ECGs are warped in time or their segments put in another order.
        permutation: One order for all leads, or one per lead, as released.
    """

    crop: float = 0.8
    tone: float = 0.8
    blur: float = 0.5
    flip: float = 0.0
    ecg: bool = True
    permutation: Literal["all-leads", "each-lead"] = "all-leads"

    def __post_init__(self) -> None:
        for name in ("crop", "tone", "blur", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def __call__(self, study: Study, rng: np.random.Generator) -> Study:
        """Another look of the same study."""
        xray, ecg = study.xray, study.ecg
        if xray is not None:
            xray = self._xray(xray, rng)
        if ecg is not None and self.ecg:
            kind = rng.integers(3)
            if kind == 0:
                ecg = warp_time(ecg, rng)
            elif kind == 1:
                ecg = permute_segments(ecg, rng, each_lead=self.permutation == "each-lead")
        return replace(study, xray=xray, ecg=ecg)

    def _xray(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        import cv2

        height, width = picture.shape
        if rng.random() < self.crop:
            share = np.sqrt(rng.uniform(0.2, 1.0))
            h, w = max(int(height * share), 1), max(int(width * share), 1)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            part = np.ascontiguousarray(picture[top : top + h, left : left + w])
            picture = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
        if rng.random() < self.tone:
            picture = picture * rng.uniform(0.6, 1.4) + rng.uniform(-0.4, 0.4)
        if rng.random() < self.blur:
            picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.1, 2.0) * height / 224)
        if rng.random() < self.flip:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture, dtype=np.float32)


def warp_time(
    ecg: Float32[np.ndarray, "12 n"], rng: np.random.Generator, *, width: float = 0.25
) -> Float32[np.ndarray, "12 n"]:
    """Stretch some of four segments by 1 + width and squeeze the others; the length stays."""
    parts = np.array_split(np.arange(ecg.shape[1]), SEGMENTS)
    stretched = np.zeros(SEGMENTS, dtype=bool)
    stretched[rng.choice(SEGMENTS, SEGMENTS // 2, replace=False)] = True
    times = [
        np.linspace(
            part[0], part[-1], max(round(len(part) * (1 + width if s else 1 / (1 + width))), 1)
        )
        for part, s in zip(parts, stretched, strict=True)
    ]
    where = np.concatenate(times)
    where = np.interp(np.linspace(0, len(where) - 1, ecg.shape[1]), np.arange(len(where)), where)
    grid = np.arange(ecg.shape[1])
    return np.stack([np.interp(where, grid, lead) for lead in ecg]).astype(np.float32)


def permute_segments(
    ecg: Float32[np.ndarray, "12 n"], rng: np.random.Generator, *, each_lead: bool = False
) -> Float32[np.ndarray, "12 n"]:
    """Put four segments in another order, the same for all leads or one for each."""
    parts = np.array_split(np.arange(ecg.shape[1]), SEGMENTS)
    if not each_lead:
        return ecg[:, np.concatenate([parts[i] for i in rng.permutation(SEGMENTS)])]
    orders = [np.concatenate([parts[i] for i in rng.permutation(SEGMENTS)]) for _ in range(LEADS)]
    return np.take_along_axis(ecg, np.stack(orders), axis=1)
