"""Where MEDUSA looked on one picture: its attention maps, and what spoke for the called class."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from heed_medical.medusa.inputs import MedusaBatch
from heed_medical.medusa.network import Medusa


@dataclass(frozen=True, kw_only=True)
class PictureMaps:
    """The maps of one picture, each on the grid of its scale.

    Those of a picture that was padded are on the grid of its pixels, cut back to it.
    """

    probabilities: Float32[np.ndarray, " k"]
    gates: dict[int, Float32[np.ndarray, "_ _"]]
    """Scale, 1 the finest -> the mean of A_j over its channels. 1 leaves the features as they are
    (1/2 with the gate `sigmoid`). Empty without attention; one cell for SE."""
    spread: dict[int, Float32[np.ndarray, "_ _"]]
    """Scale -> the standard deviation of A_j over its channels."""
    evidence: Float32[np.ndarray, "_ _"]
    """Grad-CAM of the last stage for the chosen class, its largest value 1 (0 where nothing)."""
    body_mask: Float32[np.ndarray, "p q"] | None
    """The body's lung probability; without meaning unless the body was trained on lung masks."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, for a file."""
        named: dict[str, np.ndarray] = {"probabilities": self.probabilities}
        for kind, maps in (("gate", self.gates), ("spread", self.spread)):
            named |= {f"{kind}{scale}": array for scale, array in maps.items()}
        named["evidence"] = self.evidence
        return named if self.body_mask is None else named | {"body_mask": self.body_mask}


def picture_maps(model: Medusa, batch: MedusaBatch, *, target: int | None = None) -> PictureMaps:
    """The maps of a batch of one picture.

    Args:
        model: The network, in eval mode; its parameters need gradients.
        batch: On the network's device.
        target: The class of the evidence; None: the most probable one.
    """
    with torch.inference_mode(False), torch.enable_grad():
        view = model.watch(batch["main"].clone(), batch["body"].clone())
        number = int(view.logits[0].argmax()) if target is None else target
        (slope,) = torch.autograd.grad(view.logits[0, number], view.last)
    weight = slope.mean((2, 3), keepdim=True)
    evidence = F.relu((weight * view.last).sum(1)[0])
    evidence = evidence / evidence.max().clamp(min=1e-12)
    gates = dict(enumerate(view.gates, start=1))
    size = batch["main"].shape[-2:]
    margins = model.margins(size)

    def grid(cells: Float[Tensor, "h w"]) -> Float32[np.ndarray, "_ _"]:
        if not any(margins) or cells.numel() == 1:
            return _array(cells)
        left, right, above, below = margins
        whole = enlarge(_array(cells), (size[0] + above + below, size[1] + left + right))
        return whole[above : above + size[0], left : left + size[1]]

    return PictureMaps(
        probabilities=_array(view.logits[0].float().softmax(0)),
        gates={scale: grid(gate[0].mean(0)) for scale, gate in gates.items()},
        spread={scale: grid(gate[0].std(0, correction=0)) for scale, gate in gates.items()},
        evidence=grid(evidence),
        body_mask=None if view.body_mask is None else _array(view.body_mask[0, 0]),
    )


def _array(values: Float[Tensor, "..."]) -> Float32[np.ndarray, "..."]:
    return np.asarray(values.detach().float().cpu().numpy(), dtype=np.float32)


def enlarge(grid: Float32[np.ndarray, "_ _"], size: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """A map at the size of the picture, interpolated."""
    maps = torch.from_numpy(np.ascontiguousarray(grid))[None, None]
    larger = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return np.asarray(larger[0, 0].numpy(), dtype=np.float32)
