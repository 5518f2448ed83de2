"""What `bench eccnet` measures: one fixation and the ring pools, beside the official way.

The official layer pools the whole map with the window of every ring and multiplies with the ring's
mask; the peer does the same in torch, in the memory layout in which torch is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.kernels.ring_pool import ring_of, ring_pool2d
from heed_gaze.eccnet.attention import attention_map
from heed_gaze.eccnet.experiments import EXPERIMENTS, make_displays
from heed_gaze.eccnet.network import EccNet, EccNetConfig
from heed_gaze.eccnet.retina import rings_of
from heed_gaze.eccnet.search import (
    CORNER,
    EccNetSearcher,
    Scene,
    SearchConfig,
    first_peak,
    search,
)
from heed_gaze.eccnet.surround import Padded, WindowFeatures
from heed_runtime.recipe import Contender

POOLS = (3, 4)
"""The pools with rings on the way to the features of a scene."""


class RingPools(nn.Module):
    """Pools 3 and 4 of a window, by rings.

    Args:
        config: Widths and retina.
        side: Of the window.
        official: Pool the whole map for each ring and mask.
    """

    def __init__(self, config: EccNetConfig, side: int, *, official: bool) -> None:
        super().__init__()
        self.official, self.config, self.side = official, config, side
        self.scale = nn.Parameter(torch.ones(()))  # so that there is a gradient

    def forward(self, third: Float[Tensor, "1 c h w"], fourth: Float[Tensor, "1 d k l"]) -> Tensor:
        """The sum of both results, which is cheap."""
        total = self.scale.new_zeros(())
        for pool, x in zip(POOLS, (third, fourth), strict=True):
            rings = rings_of(self.config.retina, pool, x.shape[-1])
            pool_of = _official if self.official else ring_pool2d
            out = pool_of(x * self.scale, rings.windows, rings.radii, centre=rings.centre)
            total = total + out.sum()
        return total


def _official(
    x: Tensor, windows: Sequence[int], radii: Sequence[int], *, centre: tuple[int, int]
) -> Tensor:
    side = x.shape[-1]
    outputs = (side + 1) // 2
    ring = torch.from_numpy(ring_of((outputs, outputs), radii, centre)).to(x.device)
    total = x.new_zeros(())
    for number, window in enumerate(windows):
        missing = max((outputs - 1) * 2 + window - side, 0)
        pad = (missing // 2, missing - missing // 2)
        ones = F.avg_pool2d(F.pad(torch.ones_like(x[:, :1]), pad * 2), window, 2)
        pooled = F.avg_pool2d(F.pad(x, pad * 2), window, 2) / ones
        total = total + pooled * (ring == number)
    return total


class Fixation(nn.Module):
    """Attention of one scene at one fixation, from pixels to the map.

    Args:
        config: The network.
        reuse: Compute only where the picture is.
        official: Pool the official way.
    """

    def __init__(self, config: EccNetConfig, *, reuse: bool, official: bool = False) -> None:
        super().__init__()
        self.network = EccNet(config)
        if official:
            self.network.pools = nn.ModuleList(OfficialPool(config, n) for n in range(1, 6))
        self.reuse = reuse
        self.scene, self.rules = first_scene()
        self.windows: WindowFeatures | None = None

    def forward(self, image: Float[Tensor, "h w 3"]) -> Tensor:
        """The correlation of the last layer."""
        side = 2 * (self.scene.size[0] + CORNER)
        if self.windows is None:
            self.windows = WindowFeatures(self.network, side, self.rules.background)
        pixels = image.cpu().numpy().astype(np.uint8)
        padded = Padded.around(pixels, half=side // 2, background=self.rules.background)
        self.windows.forget()  # each call is the first look at a picture
        see = self.windows.at if self.reuse else self.windows.whole
        middle = (self.scene.size[0] // 2, self.scene.size[1] // 2)
        return see(padded, middle)[-1]


class OfficialPool(nn.Module):
    """A pool of the retina, the official way, on square maps."""

    def __init__(self, config: EccNetConfig, pool: int) -> None:
        super().__init__()
        self.config, self.pool = config, pool

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c oh ow"]:
        """Half the size."""
        rings = rings_of(self.config.retina, self.pool, x.shape[-1])
        return _official(x, rings.windows, rings.radii, centre=rings.centre)


def first_scene() -> tuple[Scene, SearchConfig]:
    """The first trial of experiment 1 and its rules."""
    experiment = EXPERIMENTS[0]
    display = make_displays(experiment, experiment.tasks[1], seed=0, trials=1)[0]
    image, target = (np.repeat(x[..., None], 3, axis=2) for x in (display.image, display.target))
    scene = Scene(
        name="experiment 1", image=image, target=target, truth=display.truth, cells=experiment.cells
    )
    return scene, experiment.rules


def contenders(config: EccNetConfig) -> list[Contender]:
    """One fixation of experiment 1, then the ring pools at the windows of experiments 1 and 3."""
    found = [
        Contender(
            name=name,
            build=partial(Fixation, config, reuse=reuse, official=official),
            inputs=_scene_input,
            loss=_mean,
        )
        for name, reuse, official in (
            ("fixation, 806 px (heed)", True, False),
            ("fixation, whole window", False, False),
            ("fixation, official pools", False, True),
        )
    ]
    for side in (806, 1358):
        for name, official in (("heed", False), ("official way", True)):
            found.append(
                Contender(
                    name=f"pools 3 and 4, {side} px ({name})",
                    build=partial(RingPools, config, side, official=official),
                    inputs=partial(_pool_inputs, config, side),
                    loss=_mean,
                )
            )
    return found


def stages(config: EccNetConfig, device: torch.device) -> Mapping[str, Callable[[], object]]:
    """The steps of a trial of experiment 1, then the whole trial."""
    network = EccNet(config).eval().to(device)
    scene, rules = first_scene()
    searcher = EccNetSearcher(network)
    looker = searcher.prepare(scene, rules)
    middle = (scene.size[0] // 2, scene.size[1] // 2)
    padded = Padded.around(scene.image, half=looker.windows.side // 2, background=rules.background)
    with torch.inference_mode():
        features = looker.windows.at(padded, middle)
    values = looker.look(scene.image, middle)
    allowed = np.asarray(np.any(scene.cells, axis=0))

    def see() -> object:
        looker.windows.forget()
        with torch.inference_mode():
            return looker.windows.at(padded, middle)

    return {
        "features of the target": lambda: searcher.prepare(scene, rules),
        "features at a fixation": see,
        "map of attention": lambda: attention_map(features, looker.targets, rules.maps),
        "decision": lambda: first_peak(values, allowed),
        "whole trial": lambda: search(scene, searcher, rules),
    }


def _scene_input() -> tuple[Tensor, ...]:
    return (torch.from_numpy(first_scene()[0].image).float(),)


def _pool_inputs(config: EccNetConfig, side: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for pool in POOLS:
        length = side
        for _ in range(pool - 1):
            length = (length + 1) // 2
        x = torch.rand(1, config.widths[pool - 1], length, length, generator=generator)
        found.append(x.contiguous(memory_format=torch.channels_last))
    return tuple(found)


def _mean(output: Tensor) -> Tensor:
    return output.mean()
