"""Augmentation of training slices."""

import os
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from heed_medical.segmentation.labels import IGNORE_INDEX
from heed_medical.segmentation.slices import SliceSample

if TYPE_CHECKING:
    from albumentations import Compose  # type: ignore[import-untyped]

_IGNORE_BYTE = 255


@dataclass(frozen=True, kw_only=True)
class SliceAugmentation:
    """How training slices are varied; the defaults are those of the MSGA paper's code."""

    flip_probability: float = 0.5
    """Of a vertical flip, and independently of a horizontal one."""
    rotation_probability: float = 0.5
    """Of a rotation."""
    rotation_deg: float = 30.0
    """Rotation angles are drawn evenly from minus to plus this."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "rotation_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be within 0..1, got {getattr(self, name)}")
        if not 0.0 <= self.rotation_deg <= 180.0:
            raise ValueError(f"rotation_deg must be within 0..180, got {self.rotation_deg}")


_DEFAULT = SliceAugmentation()


def augment(
    sample: SliceSample, rng: np.random.Generator, options: SliceAugmentation = _DEFAULT
) -> SliceSample:
    """Flip and rotate a slice and its label together; a pure function of its arguments.

    The image is interpolated linearly, the label by its nearest pixel; corners that turn in are 0
    and background.
    """
    pipeline = _pipeline(options)
    seed = int(rng.integers(2**31))
    # one source for all transforms: Compose.set_random_seed would give each the same numbers
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    label = sample["label"].numpy()
    mask = np.where(label == IGNORE_INDEX, _IGNORE_BYTE, label).astype(np.uint8)
    image = np.moveaxis(sample["image"].numpy(), 0, -1)
    turned = pipeline(image=np.ascontiguousarray(image), mask=mask)
    classes = turned["mask"].astype(np.int64)
    classes[classes == _IGNORE_BYTE] = IGNORE_INDEX
    return {
        "image": torch.from_numpy(np.ascontiguousarray(np.moveaxis(turned["image"], -1, 0))),
        "label": torch.from_numpy(classes),
    }


@lru_cache(maxsize=8)
def _pipeline(options: SliceAugmentation) -> "Compose":
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)  # threads of loader workers fight for cores
    rotate = A.Rotate(
        limit=(-options.rotation_deg, options.rotation_deg),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        border_mode=cv2.BORDER_CONSTANT,
        fill=0,
        fill_mask=0,
        p=options.rotation_probability,
    )
    flips = [
        A.VerticalFlip(p=options.flip_probability),
        A.HorizontalFlip(p=options.flip_probability),
    ]
    return A.Compose([*flips, rotate])
