"""Where MSGA looked: the maps of its second guided step on chosen slices of a case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from heed_core import observe
from heed_core.sites import SiteCall
from heed_medical.msga import Msga
from heed_medical.msga.network import resize
from heed_medical.segmentation.cases import SegmentationCase, to_slices
from heed_medical.segmentation.prediction import SegmentationPrediction

POSITION = "pyramid.second.position.{}.attention.attend"


@dataclass(frozen=True, kw_only=True)
class SliceMaps:
    """The maps of one slice, at the size of the slice; the keys are scales, 1 the finest."""

    index: int
    image: Float32[np.ndarray, "h w"]
    labels: UInt8[np.ndarray, "h w"]
    """The predicted classes."""
    guided: dict[int, Float32[np.ndarray, "h w"]]
    """Strength of the refined attention map: the root mean square of B_s over its channels."""
    position: dict[int, Float32[np.ndarray, "h w"]]
    """Weight of each pixel, averaged over the pixels that were predicted as foreground and divided
    by the weight of even attention: 1 is no preference. Empty where the network has no position
    attention."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, for a file."""
        named = {f"slice{self.index}_labels": self.labels}
        for kind, maps in (("guided", self.guided), ("position", self.position)):
            named |= {f"slice{self.index}_{kind}_scale{s}": array for s, array in maps.items()}
        return named


def attention_maps(
    model: Msga,
    case: SegmentationCase,
    prediction: SegmentationPrediction,
    *,
    device: torch.device,
    most: int = 3,
) -> list[SliceMaps]:
    """The maps of up to `most` slices, spread over the slices with predicted foreground."""
    labels = to_slices(prediction.labels[None], case.slice_axis)[:, 0]
    chosen = spread(np.count_nonzero(labels, axis=(1, 2)), most)
    return [_slice_maps(model, case.slices[i], labels[i], index=i, device=device) for i in chosen]


def spread(foreground: np.ndarray, most: int) -> list[int]:
    """Slices that cut the predicted foreground into equal parts; without any, the middle one."""
    if not foreground.any():
        return [len(foreground) // 2]
    share = np.cumsum(foreground) / foreground.sum()
    marks = (np.arange(most) + 1) / (most + 1)
    return sorted({int(np.searchsorted(share, mark)) for mark in marks})


def _slice_maps(
    model: Msga,
    image: Float32[np.ndarray, "c h w"],
    labels: UInt8[np.ndarray, "h w"],
    *,
    index: int,
    device: torch.device,
) -> SliceMaps:
    height, width = labels.shape
    grid = model.grid(height, width)
    foreground = _foreground_of_grid(model, labels, grid)

    def from_foreground(weights: Tensor, call: SiteCall) -> Tensor:
        return weights[0, 0][foreground.to(weights.device)].mean(0)

    batch = torch.from_numpy(np.ascontiguousarray(image))[None].to(device)
    scales = model.config.scales
    has_position = model.config.attention in ("both", "position")
    with torch.no_grad(), refined_maps(model) as refined:
        if has_position:
            with observe(model, POSITION.format("*"), reduce=from_foreground) as record:
                model.logits(batch)
        else:
            model.logits(batch)

    def to_slice(grid_map: Float[Tensor, "gh gw"]) -> Float32[np.ndarray, "h w"]:
        (top, bottom), (left, right) = model.margins(height, width)
        rows, columns = 4 * grid[0], 4 * grid[1]
        padded = resize(grid_map[None, None].float(), (rows, columns))
        cropped = padded[..., top : rows - bottom, left : columns - right]
        return np.asarray(resize(cropped, (height, width))[0, 0].cpu().numpy(), dtype=np.float32)

    even = 1.0 / (grid[0] * grid[1])
    return SliceMaps(
        index=index,
        image=image[0],
        labels=labels,
        guided={s: to_slice(refined[s][0].square().mean(0).sqrt()) for s in scales},
        position={
            s: to_slice(record[POSITION.format(s)].reshape(grid) / even)
            for s in scales
            if has_position
        },
    )


@contextmanager
def refined_maps(model: Msga) -> Iterator[dict[int, Tensor]]:
    """Collect B_s, the maps of the second step, while the model runs."""
    found: dict[int, Tensor] = {}

    def keep(scale: int) -> torch.utils.hooks.RemovableHandle:
        module = model.pyramid.second.project[str(scale)]
        return module.register_forward_hook(lambda *seen: found.__setitem__(scale, seen[-1]))

    handles = [keep(scale) for scale in model.config.scales]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _foreground_of_grid(model: Msga, labels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Which pixels of the attention grid hold foreground, row-major; all where there is none."""
    enlarged = np.kron(labels > 0, np.ones((model.zoom, model.zoom), dtype=bool))
    padded = np.pad(enlarged, model.margins(*labels.shape))
    blocks = padded.reshape(grid[0], 4, grid[1], 4).any(axis=(1, 3))
    found = torch.from_numpy(blocks.reshape(-1))
    return found if found.any() else torch.ones_like(found)
