"""What `observe` keeps of attention weights: maps, chosen rows and heads, means, statistics.

The weights of one call arrive in pieces of query rows, so that a reduced record needs no whole map
in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Stage = Literal["final", "raw"]
"""Weights as they meet the values, or before any edit."""


@dataclass(frozen=True, kw_only=True)
class SiteCall:
    """One call of a site."""

    site: str = ""
    """Name of the site in the model that was given to `observe` or `steer`."""
    index: int = 0
    """How many calls of the site came before, counted from the attaching."""


Reducer = Callable[[Tensor, SiteCall], Tensor]
Reduction = Literal["heads", "queries", "stats"] | Reducer | None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a record keeps of each map (b, h, n, m), and how."""

    reduce: Reduction = None
    queries: tuple[int, ...] | None = None
    """Query rows to keep, in this order; negative counts from the end. None = all."""
    heads: tuple[int, ...] | None = None
    keep: Literal["last", "all"] = "last"
    stage: Stage = "final"
    grad: bool = False

    def __post_init__(self) -> None:
        if not (self.reduce in (None, "heads", "queries", "stats") or callable(self.reduce)):
            raise ValueError(
                "reduce must be None, 'heads', 'queries', 'stats' or a function of "
                f"(weights, call), got {self.reduce!r}"
            )
        if self.keep not in ("last", "all"):
            raise ValueError(f"keep must be 'last' or 'all', got {self.keep!r}")
        if self.stage not in ("final", "raw"):
            raise ValueError(f"stage must be 'final' or 'raw', got {self.stage!r}")
        if self.reduce == "stats" and (self.grad or self.keep == "all"):
            raise ValueError(
                "reduce='stats' sums all calls up; it takes no grad=True or keep='all'"
            )

    @property
    def whole(self) -> bool:
        """Whether what is kept of a call must be at hand in one piece."""
        return self.grad or self.reduce is None or callable(self.reduce)

    def rows(self, queries: int) -> list[int] | None:
        """The chosen query rows as non-negative numbers."""
        return _absolute("queries", self.queries, queries)

    def chosen_heads(self, heads: int) -> list[int] | None:
        """The chosen heads as non-negative numbers."""
        return _absolute("heads", self.heads, heads)


def _absolute(name: str, chosen: Sequence[int] | None, size: int) -> list[int] | None:
    if chosen is None:
        return None
    if wrong := [i for i in chosen if not -size <= i < size]:
        raise ValueError(f"{name}={wrong} are out of range: the site has {size} {name}")
    return [i % size for i in chosen]


@dataclass
class Running:
    """Mean and spread of a quantity per head, updated in pieces (Welford; Chan et al. 1983)."""

    count: Float[Tensor, " h"]
    """Query rows seen, over the batch and all calls; rows that attend to nothing are left out."""
    mean: Float[Tensor, " h"]
    squares: Float[Tensor, " h"]
    """Sum of squared deviations from the mean."""

    @classmethod
    def empty(cls, heads: int, device: torch.device) -> Running:
        """A quantity that was not seen yet."""
        return cls(*torch.zeros(3, heads, dtype=torch.float64, device=device))

    @property
    def std(self) -> Float[Tensor, " h"]:
        """Standard deviation (the count in the denominator)."""
        return (self.squares / self.count.clamp(min=1)).sqrt()

    def update(self, values: Float[Tensor, "h rows"], present: Bool[Tensor, "h rows"]) -> None:
        """Take the values of further rows in, where `present`."""
        count = present.sum(dim=1).double()
        mean = (values * present).sum(dim=1) / count.clamp(min=1)
        squares = ((values - mean.unsqueeze(1)).square() * present).sum(dim=1)
        total = self.count + count
        shift, share = mean - self.mean, count / total.clamp(min=1)
        self.squares = self.squares + squares + shift.square() * self.count * share
        self.mean = self.mean + shift * share
        self.count = total


@dataclass
class WeightStatistics:
    """Running statistics of the rows of a site, per head."""

    entropy: Running
    """In nats."""
    max: Running
    """Largest weight of a row."""
    mean: Running
    """Mean weight of a row."""

    @classmethod
    def empty(cls, heads: int, device: torch.device) -> WeightStatistics:
        """Statistics of no row."""
        return cls(*(Running.empty(heads, device) for _ in range(3)))

    def update(self, weights: Float[Tensor, "b h n m"]) -> None:
        """Take the rows of a map in."""
        if weights.numel() == 0:
            return
        rows = weights.double().transpose(0, 1).flatten(1, 2)  # (h, b n, m)
        present = rows.ne(0).any(dim=2)
        self.entropy.update(torch.special.entr(rows).sum(dim=2), present)
        self.max.update(rows.amax(dim=2), present)
        self.mean.update(rows.mean(dim=2), present)

    def table(self) -> Float[Tensor, "h 3"]:
        """Means over all rows; columns entropy, max, mean."""
        return torch.stack([self.entropy.mean, self.max.mean, self.mean.mean], dim=1)


@dataclass
class Recorder:
    """What one `observe` keeps of one site."""

    site: str
    selection: Selection
    start: int = 0
    """Calls of the site before the attaching."""
    kept: list[Tensor] = field(default_factory=list)
    statistics: WeightStatistics | None = None
    _pieces: list[Tensor] = field(default_factory=list)
    _rows: int = 0

    def take(self, weights: Float[Tensor, "b h n m"], call: SiteCall) -> None:
        """Record a whole map."""
        if (heads := self.selection.chosen_heads(weights.shape[1])) is not None:
            weights = weights[:, heads]
        if (rows := self.selection.rows(weights.shape[2])) is not None:
            weights = weights[:, :, rows]
        self.put(weights)
        self.finish(call)

    def put(self, weights: Float[Tensor, "b h rows m"]) -> None:
        """Take the next chosen rows of the current call in."""
        if not self.selection.grad:
            weights = weights.detach()
        match self.selection.reduce:
            case "heads":
                self._pieces.append(weights.mean(dim=1))
            case "queries":
                total = weights.sum(dim=2)
                self._pieces = [self._pieces[0] + total if self._pieces else total]
                self._rows += weights.shape[2]
            case "stats":
                if self.statistics is None:
                    self.statistics = WeightStatistics.empty(weights.shape[1], weights.device)
                self.statistics.update(weights)
            case _:
                self._pieces.append(weights)

    def finish(self, call: SiteCall) -> None:
        """Close the current call."""
        pieces, rows = self._pieces, self._rows
        self._pieces, self._rows = [], 0
        reduce = self.selection.reduce
        if reduce == "stats":
            return
        if reduce == "queries":
            result = pieces[0] / max(rows, 1)
        else:
            joint = -2
            result = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=joint)
            if callable(reduce):
                result = reduce(result, call)
        if self.selection.keep == "last":
            self.kept.clear()
        self.kept.append(result)


class Record(Mapping[str, Tensor]):
    """What `observe` saw: site name -> tensor of the site's latest call.

    (b, h, n, m), or (b, n, m) for `reduce="heads"`, (b, h, m) for `reduce="queries"`, the table (h,
    3) of `WeightStatistics` for `reduce="stats"`, whatever a reducing function returned. Only sites
    that were called are in it. It stays readable after its context.
    """

    def __init__(self, recorders: Mapping[str, Recorder]) -> None:
        self._recorders = recorders

    def __getitem__(self, site: str) -> Tensor:
        recorder = self._called(site)
        if recorder.statistics is not None:
            return recorder.statistics.table()
        return recorder.kept[-1]

    def __iter__(self) -> Iterator[str]:
        return (name for name, recorder in self._recorders.items() if _seen(recorder))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Record({', '.join(self) or 'no site was called'})"

    def calls(self, site: str) -> list[Tensor]:
        """The tensors of the site's calls in order: all with `keep="all"`, else the latest."""
        return list(self._called(site).kept)

    def statistics(self, site: str) -> WeightStatistics:
        """The running statistics of a site, for `reduce="stats"`."""
        found = self._called(site).statistics
        if found is None:
            raise ValueError("there are no statistics: observe with reduce='stats'")
        return found

    def _called(self, site: str) -> Recorder:
        recorder = self._recorders.get(site)
        if recorder is None:
            raise KeyError(f"{site!r} is not observed; observed: {sorted(self._recorders)}")
        if not _seen(recorder):
            raise KeyError(f"site {site!r} was not called inside observe")
        return recorder


def _seen(recorder: Recorder) -> bool:
    return bool(recorder.kept) or recorder.statistics is not None
