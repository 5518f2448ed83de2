"""Lung masks for the body of MEDUSA: pictures resized as it will see them, and its prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from heed_core.errors import InputError
from heed_medical.medusa.inputs import standardise
from heed_medical.medusa.network import UNetBody
from heed_medical.pictures.augmentation import PictureAugmentation, augment_pictures
from heed_medical.pictures.reading import resize_grey
from heed_medical.segmentation.cases import CaseFiles, SegmentationCase, read_case
from heed_medical.segmentation.prediction import SegmentationPrediction
from heed_medical.segmentation.settings import SegmentationData


@dataclass(frozen=True, kw_only=True)
class LungPicture:
    """A picture with its mask, at the size of the body's input."""

    picture: Float32[np.ndarray, "p q"]
    """Values within 0..1."""
    mask: Bool[np.ndarray, "p q"]
    counted: Bool[np.ndarray, "p q"]
    """Where the mask counts."""


class LungBatch(TypedDict):
    """What the body trains on."""

    body: Float[Tensor, "b 1 p q"]
    mask: Float[Tensor, "b 1 p q"]
    counted: Bool[Tensor, "b 1 p q"]


class LungData(Dataset[LungPicture]):
    """Training pictures with masks, resized to `data.size`; read when asked for.

    Args:
        files: Pictures with masks of one class.
        data: As settled by `plan_data`.
        skipped: What the list left out, a line each.

    Raises:
        InputError: On access, a file that cannot be read, or a volume.
    """

    def __init__(
        self, files: Sequence[CaseFiles], data: SegmentationData, *, skipped: Sequence[str] = ()
    ) -> None:
        if data.size is None:
            raise ValueError("size is not settled")
        self.skipped = tuple(skipped)
        self.files, self.data, self.size = tuple(files), data, data.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LungPicture:
        files = self.files[index]
        case = read_case(files, self.data)
        if case.label is None:
            raise InputError("has no mask to train on", path=files.images[0])
        grey, label = only_picture(case), case.label
        inside = resize_grey((label == 1).astype(np.float32), self.size)
        counted = resize_grey((label >= 0).astype(np.float32), self.size)
        return LungPicture(
            picture=resize_grey(grey, self.size), mask=inside > 0.5, counted=counted > 0.5
        )


def only_picture(case: SegmentationCase) -> Float32[np.ndarray, "h w"]:
    """The grey picture of a case.

    Raises:
        InputError: The case is a volume or in colour.
    """
    if case.slice_axis is not None or len(case.image) != 1:
        raise InputError(
            "is no single picture in grey", path=case.frame.files[0], remedy="remove it"
        )
    return np.ascontiguousarray(case.image[0])


def vary_lungs(
    sample: LungPicture, rng: np.random.Generator, options: PictureAugmentation
) -> LungPicture:
    """Move a picture and its mask together; a pure function of its arguments."""
    masks = [sample.mask.astype(np.float32), sample.counted.astype(np.float32)]
    state = rng.bit_generator.state
    (picture,) = augment_pictures([sample.picture], rng, options)
    rng.bit_generator.state = state  # the same change; the masks' brightness ends at 0 or 1
    mask, counted = augment_pictures(masks, rng, options)
    return LungPicture(picture=picture, mask=mask > 0.5, counted=counted > 0.5)


def to_lung_batch(samples: Sequence[LungPicture]) -> LungBatch:
    """The body's input and the masks of some pictures."""
    body = torch.from_numpy(np.stack([sample.picture for sample in samples]))[:, None]
    mask = torch.from_numpy(np.stack([sample.mask for sample in samples]))[:, None]
    counted = torch.from_numpy(np.stack([sample.counted for sample in samples]))[:, None]
    return {"body": standardise(body), "mask": mask.float(), "counted": counted}


@torch.no_grad()
def lung_probability(
    model: UNetBody, case: SegmentationCase, size: tuple[int, int], *, device: torch.device | str
) -> Float32[np.ndarray, "h w"]:
    """The body's lung probability of a picture, at the picture's own size."""
    grey = only_picture(case)
    body = standardise(torch.from_numpy(resize_grey(grey, size))[None, None]).to(device)
    logits = model.mask_logits(body).float()
    larger = F.interpolate(logits, size=grey.shape, mode="bilinear", align_corners=False)
    return np.asarray(torch.sigmoid(larger)[0, 0].cpu().numpy(), dtype=np.float32)


def segment_lungs(
    model: UNetBody, case: SegmentationCase, size: tuple[int, int], *, device: torch.device | str
) -> SegmentationPrediction:
    """The lungs of a picture: where their probability is above one half."""
    inside = lung_probability(model, case, size, device=device)
    return SegmentationPrediction(
        name=case.name,
        labels=(inside > 0.5).astype(np.uint8),
        probabilities=np.stack([1 - inside, inside]),
        reference=case.label,
        spacing_mm=case.spacing_mm,
        slice_axis=case.slice_axis,
        frame=case.frame,
    )
