"""The losses of MSGA: segmentation at every read-out, guidance between the steps, reconstruction.

    L = L_seg + 0.25 L_guide + 0.1 L_rec

The targets of the two squared errors are not detached: both sides are pulled towards each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from heed_medical.msga.network import MsgaOutput

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class MsgaLoss:
    """The terms, unweighted, and the weighted sum that is minimised."""

    segmentation: Float[Tensor, ""]
    guide: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    total: Float[Tensor, ""]


def segmentation_loss(
    output: MsgaOutput, labels: Integer[Tensor, "b h w"], *, ignore_index: int = IGNORE
) -> Float[Tensor, ""]:
    """Sum over all read-outs (eight with four scales) of the mean cross-entropy per pixel.

    The mean is taken in each image and then over the images: it is the paper's where no pixel is
    ignored, and several processes that share a batch come to the same number as one.

    Args:
        output: What the network gave in training.
        labels: Class of every pixel.
        ignore_index: Label of the pixels that count for nothing: neither right nor wrong. An
            image of which no other pixel is left adds 0.
    """
    read_outs = (*output.logits_first, *output.logits_refined)
    expected = (read_outs[0].shape[0], *read_outs[0].shape[-2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must be (batch, height, width) = {expected}, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise TypeError(f"labels must be whole numbers (the class ids), got {labels.dtype}")
    target = labels.long()
    counted = (target != ignore_index).sum(dim=(1, 2)).clamp(min=1)
    summed = [
        F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none").sum((1, 2))
        for logits in read_outs
    ]
    return (torch.stack(summed).sum(dim=0) / counted).mean()


def guide_loss(output: MsgaOutput) -> Float[Tensor, ""]:
    """Sum over scales of the mean squared difference between the codes of the two steps."""
    return _squared_errors(output, output.codes_first, output.codes_refined)


def reconstruction_loss(output: MsgaOutput) -> Float[Tensor, ""]:
    """Sum over steps and scales of the autoencoders' mean squared error."""
    return _squared_errors(output, output.ae_inputs, output.ae_outputs)


def msga_loss(
    output: MsgaOutput,
    labels: Integer[Tensor, "b h w"],
    *,
    guide_weight: float = 0.25,
    reconstruction_weight: float = 0.1,
    ignore_index: int = IGNORE,
) -> MsgaLoss:
    """All losses of one batch.

    Args:
        output: What the network gave in training (or `Msga.outputs` in any mode).
        labels: Class of every pixel.
        guide_weight: Weight of the guidance.
        reconstruction_weight: Weight of the reconstruction.
        ignore_index: Label of the pixels that count for nothing.

    Raises:
        ValueError: The labels' shape is not that of the image.
        TypeError: The labels are no whole numbers.
    """
    segmentation = segmentation_loss(output, labels, ignore_index=ignore_index)
    guide, reconstruction = guide_loss(output), reconstruction_loss(output)
    return MsgaLoss(
        segmentation=segmentation,
        guide=guide,
        reconstruction=reconstruction,
        total=segmentation + guide_weight * guide + reconstruction_weight * reconstruction,
    )


def _squared_errors(
    output: MsgaOutput, left: tuple[Tensor, ...], right: tuple[Tensor, ...]
) -> Float[Tensor, ""]:
    if not left:
        return output.logits_refined[0].new_zeros(())
    return torch.stack([F.mse_loss(a, b) for a, b in zip(left, right, strict=True)]).sum()
