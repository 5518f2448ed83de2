"""The retina of eccNET: pooling windows that grow with the distance from fixation.

Gupta et al., "Visual Search Asymmetry: Deep Nets and Humans Share Similar Inherent Biases",
NeurIPS 2021, arXiv 2106.02953. All sizes of rings are pixels of the pool's output, eccentricities
pixels of its input; numbers are rounded half to even, as Python does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.kernels.ring_pool import ring_pool2d

POOLS = 5


@dataclass(frozen=True, kw_only=True)
class RetinaConfig:
    """How the five pools see."""

    px_per_degree: int = 30
    """Pixels of the picture per degree of visual angle."""
    fovea_degrees: float = 4.0
    """Diameter of the centre, where all windows are 2."""
    ring_degrees: float = 1.0
    """Width of a ring, twice: it is measured on the pool's output, which has half the pixels."""
    slopes: tuple[float, ...] = (0.0, 0.0, 0.07, 0.16, 0.32)
    """Growth of the window of each pool per pixel of eccentricity."""
    eccentricity: bool = True
    """Off: every window is 2, as in VGG16."""
    pooling: Literal["avg", "max"] = "avg"
    """The paper's eccNET averages; VGG16 takes the maximum."""

    def __post_init__(self) -> None:
        if len(self.slopes) != POOLS or min(self.slopes) < 0:
            raise ValueError(f"slopes must be {POOLS} numbers of at least 0, got {self.slopes}")
        for name in ("px_per_degree", "fovea_degrees", "ring_degrees"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def px_per_degree_at(self, pool: int) -> int:
        """Pixels per degree at the input of a pool, 1 to 5."""
        return round(self.px_per_degree / (1 << (pool - 1)))


@dataclass(frozen=True, kw_only=True)
class Rings:
    """The rings of one pool at one size of its input."""

    windows: tuple[int, ...]
    """Side of the window in each ring, from the fovea outwards."""
    radii: tuple[int, ...]
    """Outer radius of each ring but the last."""
    outputs: int
    """Side of the output."""

    @property
    def centre(self) -> tuple[int, int]:
        """Row and column of the fixation on the output."""
        return self.outputs // 2, self.outputs // 2


def rings_of(config: RetinaConfig, pool: int, side: int) -> Rings:
    """The rings of pool 1 to 5 for a square input of `side` pixels.

    Where the fovea is as large as the map, there is one ring: a plain pool.

    Example:
        >>> rings_of(RetinaConfig(), 3, 202).windows
        (2, 3, 3, 4, 4, 5, 5, 6, 6, 7)
    """
    outputs = (side + 1) // 2
    density = config.px_per_degree_at(pool)
    fovea = round(config.fovea_degrees * density / 2)
    # A coarse map would have rings of no width.
    step = max(round(config.ring_degrees * density / 2), 1)
    if fovea > outputs / 2:
        return Rings(windows=(2,), radii=(), outputs=outputs)
    slope = config.slopes[pool - 1] if config.eccentricity else 0.0

    def window(radius: int) -> int:
        return 2 + round(slope * (2 * radius - config.fovea_degrees * density))

    radii, windows = [max(fovea, 1)], [2]
    while radii[-1] + step < outputs / 2:
        radii.append(radii[-1] + step)
        windows.append(window(radii[-1]))
    windows.append(window(radii[-1] + step))
    return Rings(windows=tuple(windows), radii=tuple(radii), outputs=outputs)


class EccentricPool(nn.Module):
    """One pool of the retina, centred on the middle of its input.

    An input that is not square is made so by zeros, half of them (rounded down) before it.

    Args:
        config: How it sees.
        pool: Which one, 1 to 5.
    """

    def __init__(self, config: RetinaConfig, pool: int) -> None:
        super().__init__()
        self.config, self.pool = config, pool

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c o o"]:
        """Half the size, rounded up."""
        height, width = x.shape[2:]
        side = max(height, width)
        if height != width:
            above, left = (side - height) // 2, (side - width) // 2
            x = F.pad(x, (left, side - width - left, above, side - height - above))
        rings = rings_of(self.config, self.pool, side)
        return ring_pool2d(
            x, rings.windows, rings.radii, centre=rings.centre, mode=self.config.pooling
        )


def plain_pool(
    x: Float[Tensor, "b c h w"], pooling: Literal["avg", "max"] = "avg"
) -> Float[Tensor, "b c oh ow"]:
    """A 2 x 2 pool that rounds odd sizes up and counts only pixels that exist."""
    return ring_pool2d(x, (2,), (), centre=(0, 0), mode=pooling)
