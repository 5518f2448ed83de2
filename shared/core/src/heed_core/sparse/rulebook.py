"""Rulebooks: which row of the input meets which row of the output under which kernel cell.

A sparse convolution computes, for an output site j and the kernel cells k of its window,

    y_j = sum over k of W_k x_i    where site i lies at    i = j * stride - padding + k * dilation

and empty sites are left out (Graham, Engelcke, van der Maaten, arXiv 1711.10275). The rulebook is
the list of these pairs (i, j). Sites are looked up by one int64 number each, `(batch * S0 + i0) *
S1 + i1` and so on, sorted once and searched by bisection: time N V log N, memory N V for N sites
and V kernel cells. The dense grid is never allocated. In a submanifold convolution the cells k and
-k share one search: the pairs of one are those of the other, swapped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

Cell = tuple[int, ...]
"""One number per spatial axis."""

LARGEST_KEY = 2**63 - 1
LARGEST_COORDINATE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a convolution reads around a site: everything that tells two rulebooks of a level apart.

    Args:
        kernel: Cells per axis.
        stride: Input cells between two output cells, per axis.
        padding: Empty cells before the first and after the last input cell, per axis.
        dilation: Input cells between two kernel cells, per axis.
        submanifold: Whether the output sites are the input sites (then the stride is 1 and the
            padding keeps the grid's size).
    """

    kernel: Cell
    stride: Cell
    padding: Cell
    dilation: Cell
    submanifold: bool

    def __post_init__(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            if len(value) != len(self.kernel) or any(size < least for size in value):
                raise ValueError(
                    f"{name} must be {len(self.kernel)} numbers of at least {least}, got {value}"
                )

    @property
    def volume(self) -> int:
        """Kernel cells."""
        return math.prod(self.kernel)

    @property
    def cells(self) -> list[Cell]:
        """Kernel cells in the order of the weight's memory."""
        return list(itertools.product(*(range(size) for size in self.kernel)))

    @property
    def offsets(self) -> list[Cell]:
        """Per kernel cell: where it reads, relative to `output site * stride`."""
        return [
            tuple(k * d - p for k, d, p in zip(cell, self.dilation, self.padding, strict=True))
            for cell in self.cells
        ]

    def output_shape(self, shape: Cell) -> Cell:
        """Size of the output grid.

        Raises:
            ValueError: The kernel is larger than the padded grid.
        """
        if self.submanifold:
            return shape
        sizes = zip(shape, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        result = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        if min(result) < 1:
            raise ValueError(
                f"a kernel {self.kernel} with padding {self.padding} and dilation {self.dilation} "
                f"does not fit into a grid of {shape}"
            )
        return result


def submanifold_window(kernel: Cell, dilation: Cell) -> Window:
    """The window of a convolution whose output sites are its input sites."""
    padding = tuple(d * (k // 2) for k, d in zip(kernel, dilation, strict=True))
    return Window(
        kernel=kernel,
        stride=(1,) * len(kernel),
        padding=padding,
        dilation=dilation,
        submanifold=True,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Sites:
    """The occupied cells of a batch of grids, ready to be searched."""

    coords: Int[Tensor, "n coordinates"]
    """int32: number in the batch, then one index per spatial axis."""
    spatial_shape: Cell
    batch_size: int
    keys: Int64[Tensor, " n"]
    """One number per row."""
    sorted_keys: Int64[Tensor, " n"]
    order: Int64[Tensor, " n"] | None
    """Row of each sorted key; None where the rows are sorted already."""
    circular: Cell = ()
    """Spatial axes whose last cell is a neighbour of the first."""

    @property
    def count(self) -> int:
        """Rows; symbolic in a traced program, which `len` could not be."""
        return self.coords.shape[0]

    def axis(self, axis: int) -> Int[Tensor, " n"]:
        """Index of each row on a spatial axis."""
        return self.columns[axis + 1]

    @cached_property
    def columns(self) -> Int[Tensor, "coordinates n"]:
        """The coordinates, each in one piece of memory."""
        return self.coords.T.contiguous()

    def find(self, keys: Int64[Tensor, "*m"]) -> Int64[Tensor, "*m"]:
        """Rows of keys; the number of sites for keys that no site has."""
        count = self.count
        if not torch.compiler.is_compiling() and count == 0:
            return torch.zeros_like(keys)
        at = torch.searchsorted(self.sorted_keys, keys).clamp_(max=count - 1)
        rows = at if self.order is None else self.order[at]
        return torch.where(self.sorted_keys[at] == keys, rows, count)


def linear_keys(
    coords: Int[Tensor, "n coordinates"], spatial_shape: Cell, batch_size: int
) -> Int64[Tensor, " n"]:
    """One number per site, in the lexicographic order of the coordinates.

    Raises:
        ValueError: The grid has more cells than int64 can count.
    """
    cells = batch_size * math.prod(spatial_shape)
    if cells > LARGEST_KEY or max(spatial_shape) > LARGEST_COORDINATE:
        raise ValueError(
            f"a batch of {batch_size} grids of {spatial_shape} has {cells:.3g} cells; at most "
            f"{LARGEST_KEY:.3g} with at most {LARGEST_COORDINATE} per axis can be numbered"
        )
    keys = coords[:, 0].long()
    for axis, size in enumerate(spatial_shape, start=1):
        keys = keys * size + coords[:, axis]
    return keys


@dataclass(frozen=True, kw_only=True, eq=False)
class Rulebook:
    """Per kernel cell, the input rows that are read and the output rows that they are added to.

    Under one kernel cell no row occurs twice on either side.
    """

    sources: tuple[Int64[Tensor, " _"], ...]
    targets: tuple[Int64[Tensor, " _"], ...]
    num_in: int
    num_out: int
    centre: int | None = None
    """The kernel cell under which every row meets itself, if there is one."""

    @property
    def volume(self) -> int:
        """Kernel cells."""
        return len(self.sources)

    @property
    def num_pairs(self) -> int:
        """Matrix-vector products of a convolution: times i * o it is the multiply-adds."""
        return sum(len(rows) for rows in self.sources)

    def swapped(self) -> Rulebook:
        """The rulebook of the transposed convolution."""
        return Rulebook(
            sources=self.targets,
            targets=self.sources,
            num_in=self.num_out,
            num_out=self.num_in,
            centre=self.centre,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RulebookTable:
    """A rulebook whose sizes are known before its numbers: the form for traced programs."""

    table: Int64[Tensor, "volume outputs"]
    """Input row per kernel cell and output row; `num_in` where the cell is empty."""
    num_in: int

    @cached_property
    def window_rows(self) -> Int64[Tensor, " _"]:
        """Input rows, one output after the other."""
        return self.table.T.flatten()

    @property
    def num_out(self) -> int:
        """Rows of the output."""
        return self.table.shape[1]

    @property
    def volume(self) -> int:
        """Kernel cells."""
        return self.table.shape[0]

    def swapped(self) -> RulebookTable:
        """The rulebook of the transposed convolution."""
        swapped = self.table.new_full((self.volume, self.num_in + 1), self.num_out)
        rows = torch.arange(self.num_out, device=self.table.device).expand(self.volume, -1)
        swapped.scatter_(1, self.table, rows)
        return RulebookTable(table=swapped[:, : self.num_in], num_in=self.num_out)


PairsOfRows = tuple[Int64[Tensor, " _"], Int64[Tensor, " _"]]
"""Rows that are read, rows that they are added to."""


def neighbour_pairs(sites: Sites, offset: Cell) -> PairsOfRows:
    """All pairs of sites of which the first lies at an offset from the second."""
    if not any(offset) or sites.count == 0:
        rows = torch.arange(sites.count, device=sites.keys.device)
        return rows, rows
    wanted, inside = _shifted(sites, offset)
    at = torch.searchsorted(sites.sorted_keys, wanted).clamp_(max=sites.count - 1)
    occupied = sites.sorted_keys.index_select(0, at) == wanted
    targets = (occupied & inside).nonzero()[:, 0]
    sources = at.index_select(0, targets)
    return sources if sites.order is None else sites.order.index_select(0, sources), targets


def _shifted(sites: Sites, offset: Cell) -> tuple[Int64[Tensor, " n"], Bool[Tensor, " n"]]:
    """Per site: the key of the cell at an offset, and whether that lies inside of the grid.

    Without the check of each axis, keys beyond a border would be those of another row.
    """
    keys, inside = sites.keys, torch.ones_like(sites.keys, dtype=torch.bool)
    for axis, (step, size) in enumerate(zip(offset, sites.spatial_shape, strict=True)):
        if step == 0:
            continue
        weight, index = math.prod(sites.spatial_shape[axis + 1 :]), sites.axis(axis)
        keys = keys + step * weight
        if axis in sites.circular:
            turns = torch.div(index + step, size, rounding_mode="floor")
            keys = keys - turns.long() * (size * weight)
        elif step > 0:
            inside &= index < size - step
        else:
            inside &= index >= -step
    return keys, inside


def submanifold_rulebook(
    sites: Sites, window: Window, look_up: Callable[[Cell], PairsOfRows]
) -> Rulebook:
    """The rulebook of a convolution that keeps the sites.

    Args:
        sites: Of the input, and of the output.
        window: Of the convolution.
        look_up: `neighbour_pairs` of these sites, possibly remembered from other windows.
    """
    offsets = window.offsets
    sources, targets = zip(*(look_up(offset) for offset in offsets), strict=True)
    return Rulebook(
        sources=sources,
        targets=targets,
        num_in=sites.count,
        num_out=sites.count,
        centre=offsets.index((0,) * len(window.kernel)),
    )


def submanifold_table(sites: Sites, window: Window) -> RulebookTable:
    """`submanifold_rulebook` for traced programs: all kernel cells at once, few operations."""
    size = _per_axis(sites, sites.spatial_shape)
    moved = sites.columns[1:, None].long() + _per_axis(sites, *window.offsets)
    if sites.circular:
        moved = torch.where(_on_circle(sites), moved % size, moved)
    inside = ((moved >= 0) & (moved < size)).all(dim=0)
    rows = sites.find(_keys_of(sites, moved, sites.spatial_shape))
    return RulebookTable(table=torch.where(inside, rows, sites.count), num_in=sites.count)


def _per_axis(sites: Sites, *cells: Cell) -> Int64[Tensor, "axes cells 1"]:
    """Numbers per axis, to meet tables of (axes, kernel cells, rows)."""
    return sites.keys.new_tensor([[[n] for n in axis] for axis in zip(*cells, strict=True)])


def _on_circle(sites: Sites) -> Bool[Tensor, "axes 1 1"]:
    axes = range(len(sites.spatial_shape))
    return _per_axis(sites, tuple(axis in sites.circular for axis in axes)).bool()


def _keys_of(
    sites: Sites, index: Int64[Tensor, "axes cells n"], shape: Cell
) -> Int64[Tensor, "cells n"]:
    """Keys of cells of a grid, in the batch item of each site."""
    weights = [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]
    within = (index * _per_axis(sites, tuple(weights[1:]))).sum(dim=0)
    return within + sites.columns[0].long() * weights[0]


def strided_rulebook(sites: Sites, window: Window) -> tuple[Rulebook, Sites]:
    """The rulebook of a convolution that makes sites, and these sites.

    A site is made wherever a window holds an occupied cell. Rows are in lexicographic order.
    """
    shape = window.output_shape(sites.spatial_shape)
    rows = torch.arange(sites.count, device=sites.keys.device)
    reached = [(rows, sites.coords[:, 0].long())]
    for axis, size in enumerate(shape):
        index, readers = sites.axis(axis), _readers(sites, window, axis, shape)
        reached = [
            (rows[chosen], keys[chosen] * size + place[here[chosen]])
            for rows, keys in reached
            for here in [index.index_select(0, rows)]
            for place, reads in zip(*readers, strict=True)
            for chosen in [reads.index_select(0, here).nonzero()[:, 0]]
        ]
    made, targets = torch.unique(torch.cat([keys for _, keys in reached]), return_inverse=True)
    rulebook = Rulebook(
        sources=tuple(rows for rows, _ in reached),
        targets=torch.split(targets, [len(rows) for rows, _ in reached]),
        num_in=sites.count,
        num_out=len(made),
    )
    return rulebook, _sorted_sites(made, shape, sites)


def strided_table(sites: Sites, window: Window) -> tuple[RulebookTable, Sites]:
    """`strided_rulebook` for traced programs."""
    shape = window.output_shape(sites.spatial_shape)
    place, reads = _reading_outputs(
        sites.columns[1:, None].long() - _per_axis(sites, *window.offsets),
        stride=_per_axis(sites, window.stride),
        size=_per_axis(sites, shape),
        turns=[_per_axis(sites, turn) for turn in _turns(sites, window, shape)],
    )
    chosen = reads.all(dim=0).flatten().nonzero()[:, 0]
    all_keys = _keys_of(sites, place, shape).flatten()
    made, targets = torch.unique(all_keys.index_select(0, chosen), return_inverse=True)
    torch._check(made.shape[0] > 0)  # type: ignore[no-untyped-call]
    by_input = torch.full_like(all_keys, made.shape[0]).scatter(0, chosen, targets)
    swapped = RulebookTable(table=by_input.view(window.volume, -1), num_in=made.shape[0])
    return swapped.swapped(), _sorted_sites(made, shape, sites)


def _readers(
    sites: Sites, window: Window, axis: int, shape: Cell
) -> tuple[Int64[Tensor, "kernel inputs"], Bool[Tensor, "kernel inputs"]]:
    """Per kernel cell of an axis: which output index reads an input index there, and if one does.

    For all indices of the axis, to be looked up.
    """
    index = torch.arange(sites.spatial_shape[axis], device=sites.keys.device)
    cells = torch.arange(window.kernel[axis], device=sites.keys.device)[:, None]
    return _reading_outputs(
        index + (window.padding[axis] - cells * window.dilation[axis]),
        stride=window.stride[axis],
        size=shape[axis],
        turns=sorted({turn[axis] for turn in _turns(sites, window, shape)}),
    )


def _reading_outputs(
    start: Int64[Tensor, "*n"],
    *,
    stride: int | Tensor,
    size: int | Tensor,
    turns: Iterable[int | Tensor],
) -> tuple[Int64[Tensor, "*n"], Bool[Tensor, "*n"]]:
    """The output index whose window starts at an input index, and if there is one.

    At most one of the turns round a circle leads to one.
    """
    place, reads = torch.zeros_like(start), torch.zeros_like(start, dtype=torch.bool)
    for turn in turns:
        there = start + turn
        at = torch.div(there, stride, rounding_mode="floor")
        hit = (at * stride == there) & (at >= 0) & (at < size)
        place, reads = torch.where(hit, at, place), reads | hit
    return place, reads


def _turns(sites: Sites, window: Window, shape: Cell) -> list[Cell]:
    """What is added to input indices to reach the cells of a window round the circular axes."""
    most = 0
    for axis in sites.circular:
        length, stride = sites.spatial_shape[axis], window.stride[axis]
        if shape[axis] != -(-length // stride):
            raise ValueError(
                f"on a circular axis of {length} cells a stride of {stride} must make "
                f"{-(-length // stride)} cells, but kernel {window.kernel[axis]} and padding "
                f"{window.padding[axis]} make {shape[axis]}"
            )
        last = (window.kernel[axis] - 1) * window.dilation[axis]
        most = max(most, 1 + max(last, window.padding[axis]) // length)
    lengths = [n if axis in sites.circular else 0 for axis, n in enumerate(sites.spatial_shape)]
    return [tuple(turn * n for n in lengths) for turn in range(-most, most + 1)]


def _sorted_sites(keys: Int64[Tensor, " n"], spatial_shape: Cell, of: Sites) -> Sites:
    rest, columns = keys, []
    for size in reversed(spatial_shape):
        columns.append(rest % size)
        rest = torch.div(rest, size, rounding_mode="floor")
    return Sites(
        coords=torch.stack([rest, *reversed(columns)], dim=1).int(),
        spatial_shape=spatial_shape,
        batch_size=of.batch_size,
        keys=keys,
        sorted_keys=keys,
        order=None,
        circular=of.circular,
    )


def per_axis(value: int | Sequence[int], axes: int, name: str) -> Cell:
    """One number per axis, from one number for all or from a sequence.

    Raises:
        ValueError: The sequence has another length.
    """
    result = (value,) * axes if isinstance(value, int) else tuple(int(v) for v in value)
    if len(result) != axes:
        raise ValueError(f"{name} must be one number or {axes}, got {value}")
    return result
