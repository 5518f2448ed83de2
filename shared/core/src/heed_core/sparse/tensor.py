"""Sparse tensors: a row of features for each occupied cell of a grid.

Sites belong to a *level*. A submanifold convolution stays on the level; a strided convolution makes
a new one; its inverse returns to the old one, with the old sites in the old order. All tensors that
derive from one share one `RulebookCache`, so that a rulebook is built once per level and window,
however many layers or parallel branches use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from heed_core.sparse.rulebook import (
    Cell,
    PairsOfRows,
    Rulebook,
    RulebookTable,
    Sites,
    Window,
    linear_keys,
    neighbour_pairs,
    strided_rulebook,
    strided_table,
    submanifold_rulebook,
    submanifold_table,
)
from heed_core.sparse.scatter import check_coordinates

AnyRulebook = Rulebook | RulebookTable
"""Of pairs; as a table in traced programs."""


class RulebookCache:
    """The sites of all levels of one sparse tensor, and the rulebooks between them."""

    def __init__(self) -> None:
        self._sites: list[Sites] = []
        self._rulebooks: dict[tuple[int, Window], AnyRulebook] = {}
        self._pairs: dict[tuple[int, Cell], PairsOfRows] = {}
        self._made: dict[tuple[int, Window], int] = {}

    def __len__(self) -> int:
        """Levels."""
        return len(self._sites)

    def __repr__(self) -> str:
        return f"RulebookCache({len(self)} levels, {len(self._rulebooks)} rulebooks)"

    def sites(self, level: int) -> Sites:
        """The sites of a level."""
        return self._sites[level]

    def add(self, sites: Sites) -> int:
        """Make a level."""
        self._sites.append(sites)
        return len(self._sites) - 1

    def submanifold(self, level: int, window: Window) -> AnyRulebook:
        """The rulebook of a convolution that stays on a level."""
        key = (level, window)
        if key not in self._rulebooks:
            sites = self._sites[level]
            if torch.compiler.is_compiling():
                self._rulebooks[key] = submanifold_table(sites, window)
            else:
                self._rulebooks[key] = submanifold_rulebook(
                    sites, window, lambda offset: self._neighbours(level, offset)
                )
        return self._rulebooks[key]

    def strided(self, level: int, window: Window) -> tuple[AnyRulebook, int]:
        """The rulebook of a convolution that leaves a level, and the level that it makes."""
        key = (level, window)
        if key not in self._rulebooks:
            build = strided_table if torch.compiler.is_compiling() else strided_rulebook
            self._rulebooks[key], sites = build(self._sites[level], window)
            self._made[key] = self.add(sites)
        return self._rulebooks[key], self._made[key]

    def back(self, level: int, window: Window) -> tuple[AnyRulebook, int]:
        """The rulebook that made a level, if its window was this, and the level that it left.

        Raises:
            ValueError: No convolution with this window made the level.
        """
        for (source, used), made in self._made.items():
            if made == level and used == window:
                return self._rulebooks[source, used], source
        raise ValueError(
            f"the sites of level {level} were not made by the convolution to invert ({window})"
        )

    def _neighbours(self, level: int, offset: Cell) -> PairsOfRows:
        key = (level, offset)
        if key not in self._pairs:
            other = self._pairs.get((level, tuple(-step for step in offset)))
            self._pairs[key] = (
                neighbour_pairs(self._sites[level], offset) if other is None else other[::-1]
            )
        return self._pairs[key]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features of the occupied cells of a batch of grids.

    A new tensor is checked once; int64 or strided coordinates become contiguous int32. Rows may be
    in any order and keep it.

    Args:
        features: One row per occupied cell.
        coords: Number in the batch, then one index per spatial axis, per row; no cell twice.
        spatial_shape: Cells of the grid per axis.
        batch_size: Number of grids.
        level: Of the sites in `cache`; leave it out for a new tensor.
        cache: Of the levels and rulebooks; leave it out for a new tensor.
        circular: Spatial axes that are circles, counted from 0: their last cell is a neighbour of
            their first. Of a new tensor; all tensors that derive from it have the same.

    Raises:
        TypeError: Features that are not floating point, coordinates that are not integers.
        ValueError: Sizes that do not fit; a coordinate outside of the grid or a cell given twice:
            the message names the row.

    Example:
        >>> x = SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 1, 0]]), (4, 4, 2), 1)
        >>> x.dense().shape
        torch.Size([1, 2, 4, 4, 2])
    """

    features: Float[Tensor, "n channels"]
    coords: Int[Tensor, "n coordinates"]
    spatial_shape: Cell
    batch_size: int
    level: int = 0
    cache: RulebookCache = field(default_factory=RulebookCache)
    circular: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or self.features.shape[0] != self.coords.shape[0]:
            raise ValueError(
                "features must be (n, channels) with a row for each row of coords, got "
                f"{tuple(self.features.shape)} for coords {tuple(self.coords.shape)}"
            )
        if not self.features.is_floating_point():
            raise TypeError(f"features must be floating point, got {self.features.dtype}")
        if len(self.cache) == 0:
            object.__setattr__(self, "spatial_shape", tuple(int(s) for s in self.spatial_shape))
            object.__setattr__(self, "level", self.cache.add(self._checked_sites()))
            object.__setattr__(self, "coords", self.cache.sites(self.level).coords)
        elif self.coords is not self.cache.sites(self.level).coords:
            raise ValueError(
                f"coords are not the sites of level {self.level} of this cache; leave level and "
                "cache out to make a tensor from coordinates"
            )

    def __len__(self) -> int:
        """Rows."""
        return self.features.shape[0]

    def __add__(self, other: SparseTensor) -> SparseTensor:
        """The sum of two tensors on the same sites."""
        if other.cache is not self.cache or other.level != self.level:
            raise ValueError("tensors can be added only on the same sites of one cache")
        return self.with_features(self.features + other.features)

    @property
    def sites(self) -> Sites:
        """Where the rows are."""
        return self.cache.sites(self.level)

    def with_features(self, features: Float[Tensor, "n channels"]) -> SparseTensor:
        """Other features on the same sites."""
        return replace(self, features=features)

    def on_level(self, level: int, features: Float[Tensor, "m channels"]) -> SparseTensor:
        """Features on the sites of another level of the cache."""
        sites = self.cache.sites(level)
        return replace(
            self,
            features=features,
            coords=sites.coords,
            spatial_shape=sites.spatial_shape,
            level=level,
        )

    def dense(self, fill: float = 0.0) -> Float[Tensor, "b channels *spatial"]:
        """The whole grid, with `fill` in the empty cells."""
        grid = self.features.new_full(
            (self.batch_size, *self.spatial_shape, self.features.shape[1]), fill
        )
        grid = grid.index_put(tuple(self.coords.long().unbind(1)), self.features)
        return grid.movedim(-1, 1)

    def rows(self, coords: Int[Tensor, "m coordinates"]) -> Int64[Tensor, " m"]:
        """Rows of cells; -1 where a cell is empty."""
        check_coordinates(coords, self.spatial_shape, self.batch_size)
        found = self.sites.find(linear_keys(coords, self.spatial_shape, self.batch_size))
        return torch.where(found < len(self), found, -1)

    def validate(self) -> None:
        """Check what is not checked at each layer: that all features are finite.

        Raises:
            ValueError: A feature is NaN or infinite; the message names the row.
        """
        wrong = ~self.features.isfinite().all(dim=1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"features row {row} (at {self.coords[row].tolist()}) is not finite: "
                f"{self.features[row].tolist()}"
            )

    def _checked_sites(self) -> Sites:
        shape = self.spatial_shape
        if self.batch_size < 1 or not shape or min(shape) < 1:
            raise ValueError(
                f"spatial_shape and batch_size must be at least 1, got {shape} "
                f"and {self.batch_size}"
            )
        if any(not 0 <= axis < len(shape) for axis in self.circular):
            raise ValueError(
                f"circular must name axes from 0 to {len(shape) - 1}, got {self.circular}"
            )
        if self.coords.device != self.features.device:
            raise ValueError(
                f"coords must be on the device of features, {self.features.device}, got "
                f"{self.coords.device}"
            )
        check_coordinates(self.coords, shape, self.batch_size)
        keys = linear_keys(self.coords, shape, self.batch_size)
        sorted_keys, order = keys.sort()
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _refuse_duplicates(sorted_keys, order, self.coords)
        in_order = not compiling and torch.equal(sorted_keys, keys)
        return Sites(
            coords=self.coords.int().contiguous(),
            spatial_shape=shape,
            batch_size=self.batch_size,
            keys=keys,
            sorted_keys=sorted_keys,
            order=None if in_order else order,
            circular=self.circular,
        )


def _refuse_duplicates(sorted_keys: Tensor, order: Tensor, coords: Tensor) -> None:
    twice = sorted_keys[1:] == sorted_keys[:-1]
    if bool(twice.any()):
        first = int(twice.nonzero()[0])
        rows = sorted(order[first : first + 2].tolist())
        raise ValueError(
            f"coords rows {rows[0]} and {rows[1]} are the same cell {coords[rows[0]].tolist()}; "
            "reduce the points of each voxel first (unique_voxels, scatter_reduce_rows)"
        )
