"""Run a 2-D network over a whole case."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor

from heed_medical.segmentation.cases import NativeFrame, SegmentationCase, from_slices
from heed_medical.segmentation.settings import SLICE_MULTIPLE, SegmentationData
from heed_medical.segmentation.slices import pad_to

Network = Callable[[Tensor], Tensor]
"""Slices (b, c, h, w) with sides of multiples of 8 -> logits (b, k, h, w)."""


@dataclass(frozen=True, kw_only=True)
class SegmentationPrediction:
    """What a network says about one case, in the frame of `SegmentationCase.image`."""

    name: str
    labels: UInt8[np.ndarray, "*spatial"]
    """Class numbers."""
    probabilities: Float32[np.ndarray, " k *spatial"] | None
    reference: Int16[np.ndarray, "*spatial"] | None
    """The label of the case."""
    spacing_mm: tuple[float, ...] | None
    slice_axis: int | None
    frame: NativeFrame


def predict_volume(
    model: Network,
    case: SegmentationCase,
    settings: SegmentationData,
    *,
    batch: int = 8,
    device: torch.device | str = "cpu",
    probabilities: bool = False,
) -> SegmentationPrediction:
    """Run `model` over all slices of a case.

    A slice that fits into `settings.size` is padded by reflection to multiples of 8 and its logits
    are cropped back. A larger one is seen through overlapping windows of that size, whose logits
    are averaged with Gaussian weights.

    Args:
        model: In eval mode.
        case: The case.
        settings: As settled by `plan_data`.
        batch: Slices, or windows, at once.
        device: Where `model` is.
        probabilities: Whether the softmax of the logits is kept.
    """
    slices = case.slices
    labels, kept = [], []
    for start in range(0, len(slices), batch):
        images = np.ascontiguousarray(slices[start : start + batch])
        with torch.no_grad():
            logits = _slice_logits(model, images, settings, batch=batch, device=device)
            labels.append(logits.argmax(1).to(torch.uint8).cpu().numpy())
            if probabilities:
                kept.append(logits.float().softmax(1).cpu().numpy())
    joined = np.concatenate(labels)[:, None]
    return SegmentationPrediction(
        name=case.name,
        labels=np.ascontiguousarray(from_slices(joined, case.slice_axis)[0]),
        probabilities=from_slices(np.concatenate(kept), case.slice_axis) if kept else None,
        reference=case.label,
        spacing_mm=case.spacing_mm,
        slice_axis=case.slice_axis,
        frame=case.frame,
    )


def _slice_logits(
    model: Network,
    images: Float32[np.ndarray, "b c h w"],
    settings: SegmentationData,
    *,
    batch: int,
    device: torch.device | str,
) -> Float[Tensor, "b k h w"]:
    height, width = images.shape[-2:]
    padded = (_round_up(height), _round_up(width))
    x = torch.from_numpy(pad_to(images, padded)).to(device)
    window = settings.size or padded
    if padded[0] <= window[0] and padded[1] <= window[1]:
        logits = model(x)
    else:
        logits = _through_windows(model, x, window, settings.overlap, batch=batch)
    if logits.ndim != 4 or logits.shape[0] != len(images) or tuple(logits.shape[2:]) != padded:
        raise ValueError(
            f"model must return logits (batch, classes, height, width) = "
            f"({len(images)}, k, {padded[0]}, {padded[1]}), got {tuple(logits.shape)}"
        )
    top, left = (padded[0] - height) // 2, (padded[1] - width) // 2
    return logits[:, :, top : top + height, left : left + width]


def _through_windows(
    model: Network,
    x: Float[Tensor, "b c h w"],
    window: tuple[int, int],
    overlap: float,
    *,
    batch: int,
) -> Float[Tensor, "b k h w"]:
    from monai.inferers.utils import sliding_window_inference

    roi = (min(window[0], x.shape[2]), min(window[1], x.shape[3]))
    logits = sliding_window_inference(
        x, roi, sw_batch_size=batch, predictor=model, overlap=overlap, mode="gaussian"
    )
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return one tensor, got {type(logits).__name__}")
    return logits


def _round_up(side: int) -> int:
    return -(-side // SLICE_MULTIPLE) * SLICE_MULTIPLE
