"""What `bench` measures: a scan of about 110,000 points on each back-end, and the stages of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heed_core.sparse import (
    BackendName,
    RulebookCache,
    SparseTensor,
    unique_voxels,
    use_backend,
)
from heed_core.sparse.rulebook import Rulebook, RulebookTable, Window
from heed_lidar.classical import ClassicalConfig, detect_curbs
from heed_lidar.clouds.cloud import PointCloud
from heed_lidar.curves import fit_curbs
from heed_lidar.cylinder3d import CylindricalNetwork
from heed_lidar.cylindrical import CylindricalGrid, PointBatch, collate, voxelise
from heed_lidar.labels import CURB_RAW
from heed_lidar.scenes.plans import draw_scene
from heed_lidar.scenes.sensor import Sensor, Sweep, sweep
from heed_lidar_cli.street import NetworkSettings, PointLogits
from heed_runtime.engine import device_of
from heed_runtime.recipe import Contender

AnyRulebook = Rulebook | RulebookTable
SENSOR = Sensor(azimuth_step_deg=0.18)
"""Gives about 110,000 points, as a 64-beam sensor on a car does."""
CLUTTER = 0.2
"""Share of the curb points of the benchmark that lie anywhere in the scan."""


@cache
def street() -> Sweep:
    """A made scan, the same for all contenders."""
    rng = np.random.default_rng(0)
    return sweep(draw_scene(rng, kind="straight"), SENSOR, rng)


def scan_batch(grid: CylindricalGrid) -> PointBatch:
    """The scan in voxels."""
    scan = street()
    return collate([voxelise(scan.xyz, scan.remission, grid)])


def inputs(grid: CylindricalGrid) -> tuple[Tensor, ...]:
    """Points and index."""
    batch = scan_batch(grid)
    return batch.points, batch.index


def on_backend(build: Callable[[], CylindricalNetwork], backend: BackendName) -> nn.Module:
    """The network with all its convolutions on one back-end."""
    network = build()
    use_backend(network, backend)
    return PointLogits(network)


def contenders(
    build: Callable[[], CylindricalNetwork], settings: NetworkSettings
) -> list[Contender]:
    """This network on every back-end, a peer, and what none can be faster than."""
    grid = settings.model.grid

    def contender(name: str, make: Callable[[], nn.Module]) -> Contender:
        return Contender(name=name, build=make, inputs=partial(inputs, grid), loss=Tensor.mean)

    installed = importlib.util.find_spec("spconv") is not None
    missing = None if installed else "spconv is not installed"
    if grid.wrap_phi:
        missing = "its convolutions do not go round a circle"
    peer = contender("spconv, a rulebook per layer", partial(on_spconv, build, settings))
    return [
        *(
            contender(f"heed, {backend}", partial(on_backend, build, backend))
            for backend in get_args(BackendName)
            if installed or backend != "spconv"
        ),
        replace(peer, missing=missing),
        contender("its matrix products alone", partial(products_of, build, grid)),
    ]


def on_spconv(build: Callable[[], CylindricalNetwork], settings: NetworkSettings) -> nn.Module:
    """The network as a user of spconv writes it."""
    from heed_lidar_cli.spconv_peer import SpconvPeer

    return SpconvPeer(build(), native=device_of(settings.trainer).type == "cpu")


class Recorded(RulebookCache):
    """Remembers what was asked of it, so that it can be asked again of an empty cache."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, Window]] = []

    def submanifold(self, level: int, window: Window) -> AnyRulebook:
        """The rulebook of a convolution that stays on a level."""
        self.asked.append(("submanifold", level, window))
        return super().submanifold(level, window)

    def strided(self, level: int, window: Window) -> tuple[AnyRulebook, int]:
        """The rulebook of a convolution that leaves a level, and the level that it makes."""
        self.asked.append(("strided", level, window))
        return super().strided(level, window)


class Sizes(TorchDispatchMode):
    """Notes the sizes of all matrix products (m, k) @ (k, n) while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Note the sizes of a product."""
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.found.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


class Products(nn.Module):
    """The matrix products of a network alone: no back-end of this precision is faster.

    Args:
        sizes: m, k and n of each product.
    """

    def __init__(self, sizes: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.sizes = sizes
        self.rows = nn.Parameter(torch.randn(max(m * k for m, k, _ in sizes)))
        self.taps = nn.Parameter(torch.randn(max(k * n for _, k, n in sizes)))

    def forward(self, *_: Tensor) -> Float[Tensor, ""]:
        """Multiply; the sum of one number of each product."""
        total = self.rows.new_zeros(())
        for m, k, n in self.sizes:
            rows, taps = self.rows[: m * k].view(m, k), self.taps[: k * n].view(k, n)
            total = total + torch.mm(rows, taps)[0, 0]
        return total


@torch.no_grad()
def products_of(build: Callable[[], CylindricalNetwork], grid: CylindricalGrid) -> nn.Module:
    """Those of a network on the scan."""
    points, index = inputs(grid)
    network = build().eval()
    with Sizes() as sizes:
        network(points, index, batch_size=1)
    return Products(sizes.found)


def detector(config: ClassicalConfig) -> Contender:
    """The classical detector; in training mode it does the same."""
    return Contender(
        name="heed, classical",
        build=partial(Detection, config),
        inputs=lambda: (torch.from_numpy(street().xyz),),
        loss=Tensor.sum,
    )


class Detection(nn.Module):
    """The detector as a module, so that it can be measured as one.

    Args:
        config: Its thresholds.
    """

    def __init__(self, config: ClassicalConfig) -> None:
        super().__init__()
        self.config = config
        self.still = nn.Parameter(torch.zeros(()))

    def forward(self, xyz: Float[Tensor, "n 3"]) -> Float[Tensor, ""]:
        """The number of points on curbs."""
        points = xyz.cpu().numpy()
        rows = np.arange(len(points), dtype=np.int64)
        cloud = PointCloud(name="street", xyz=points, rows=rows, rows_in_file=len(points))
        return self.still + float(detect_curbs(cloud, self.config).curb.sum())


def curb_points(
    scan: Sweep, *, seed: int
) -> tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, " n"]]:
    """Curb points as a network finds them: true ones, and false alarms that are `CLUTTER` of all.

    Returns:
        Places in metres, and scores between 0.5 and 1.
    """
    rng = np.random.default_rng(seed)
    true = scan.raw == CURB_RAW
    count = round(CLUTTER / (1 - CLUTTER) * int(true.sum()))
    false = rng.choice(np.flatnonzero(~true), count, replace=False)
    xyz = np.concatenate([scan.xyz[true], scan.xyz[false]])
    return xyz, rng.uniform(0.5, 1.0, len(xyz))


@torch.no_grad()
def stages(
    network: CylindricalNetwork, settings: NetworkSettings
) -> Mapping[str, Callable[[], object]]:
    """Voxels, features of points, rulebooks, convolutions, curves: each on what was made before."""
    device = device_of(settings.trainer)
    grid, scan = settings.model.grid, street()
    network = network.to(device).eval()
    batch = scan_batch(grid).to(device)
    coords, voxel_of_point, _ = unique_voxels(batch.index, grid.shape)
    features = network.points(batch.points, voxel_of_point, len(coords))
    cache = Recorded()
    voxels = SparseTensor(features, coords, grid.shape, 1, cache=cache, circular=grid.circular)
    network.segment(voxels)
    asked = list(dict.fromkeys(cache.asked))
    found_xyz, found_score = curb_points(scan, seed=0)

    @torch.no_grad()
    def point_features() -> Tensor:
        sites, rows, _ = unique_voxels(batch.index, grid.shape)
        found: Tensor = network.points(batch.points, rows, len(sites))
        return found

    def rulebooks() -> RulebookCache:
        fresh = SparseTensor(features, coords, grid.shape, 1, circular=grid.circular).cache
        for kind, level, window in asked:
            getattr(fresh, kind)(level, window)
        return fresh

    @torch.no_grad()
    def convolutions() -> SparseTensor:
        return network.segment(voxels)

    return {
        "voxels": lambda: voxelise(scan.xyz, scan.remission, grid),
        "point features": point_features,
        "rulebooks": rulebooks,
        "convolutions": convolutions,
        "curb lines": lambda: fit_curbs(found_xyz, found_score, settings.data.curves),
    }
