"""The table: predictions, viewers among themselves, and two kinds of chance, with intervals.

Every score is a mean over pictures of means within the picture; its interval is a percentile
bootstrap over pictures, whose scanpaths are not independent of each other.

* predicted: each predicted scanpath against each viewer of the picture.
* human: each viewer against the others, the ceiling.
* random: scanpaths of viewers' lengths and durations at random places, the floor.
* elsewhere: viewers' scanpaths of other pictures, a floor that knows where people tend to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Float64

from heed_gaze.comparison.maps import MAP_SCORES, Elsewhere, MapScorer
from heed_gaze.comparison.matching import Case, moved_path, random_path
from heed_gaze.comparison.pairs import Labels, Pair, PairSettings, Picture, score_pairs
from heed_gaze.metrics.searching import found_all, performance_area, performance_curve
from heed_gaze.metrics.symbols import cluster_centres
from heed_gaze.scanpaths import Scanpath, Size

Kind = Literal["predicted", "human", "random", "elsewhere"]
KINDS: tuple[Kind, ...] = ("predicted", "human", "random", "elsewhere")
LOWER_IS_BETTER = frozenset({"edit_distance", "string_edit_distance", "dtw_px", "kl_divergence"})
_LEVEL = 0.95
_CHANCE_DRAWS = 3
"""Random and moved scanpaths per picture."""


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How scanpaths are compared."""

    pairs: PairSettings = field(default_factory=PairSettings)
    maps: bool = True
    """Score scanpaths also as maps."""
    seed: int = 0
    """Of chance and of the bootstrap."""
    resamples: int = 2000
    """Bootstrap samples."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over pictures with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found."""

    cases: Sequence[Case]
    scores: Mapping[str, Mapping[Kind, Float64[np.ndarray, " c"]]]
    """Name of a score -> kind -> mean of each case; NaN where it is not defined."""
    intervals: Mapping[str, Mapping[Kind, Interval]]
    undefined: Mapping[str, Mapping[Kind, int]]
    """Pairs that a score is not defined for, where there are some."""
    chance: Sequence[tuple[Scanpath, ...]]
    """The random scanpaths of each case."""
    pairs: Mapping[Kind, int]
    """How many pairs were compared."""


def compare(
    cases: Sequence[Case],
    settings: CompareSettings | None = None,
    *,
    labels: Mapping[str, Labels] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Comparison:
    """Score every case.

    Args:
        cases: With or without predictions.
        settings: Which scores.
        labels: Name of a picture -> what is where, for the semantic sequence score.
        progress: Called once per case.
    """
    settings = settings or CompareSettings()
    rng = np.random.default_rng(settings.seed)
    degree = settings.pairs.degree
    pictures = {
        (case.image, case.task): Picture(
            centres_xy=cluster_centres(
                case.human, settings.pairs.radius_deg * degree * case.size_px[0]
            ),
            labels=(labels or {}).get(case.image),
        )
        for case in cases
    }
    chance = [_random(case, rng) for case in cases]
    moved = [_moved(cases, k, rng) for k in range(len(cases))]
    table = _Table(cases)
    for kind, paired in _all_pairs(cases, chance, moved, rng):
        for size, group in _by_size(cases, paired).items():
            found = score_pairs([pair for _, pair in group], pictures, size, settings.pairs)
            table.add(kind, [index for index, _ in group], found)
    elsewhere = Elsewhere(cases, degree=degree, seed=settings.seed)
    for index, case in enumerate(cases):
        if settings.maps:
            scorer = MapScorer(case, elsewhere, degree=degree, seed=settings.seed)
            for kind, rows in _map_scores(case, scorer, chance[index], moved[index]):
                columns = dict(zip(MAP_SCORES, rows.T, strict=True))
                table.add(kind, [index] * len(rows), columns, count=False)
        progress()
    return table.finished(settings, chance)


def _random(case: Case, rng: np.random.Generator) -> tuple[Scanpath, ...]:
    chosen = rng.permutation(len(case.human))[:_CHANCE_DRAWS]
    return tuple(random_path(case.human[k], rng) for k in chosen)


def _moved(cases: Sequence[Case], index: int, rng: np.random.Generator) -> tuple[Scanpath, ...]:
    """Scanpaths of other pictures with the same task where there are some, else of any task."""
    case = cases[index]
    others = [k for k, one in enumerate(cases) if one.image != case.image]
    others = [k for k in others if cases[k].task == case.task] or others
    if not others:
        return ()
    picked = rng.choice(others, size=_CHANCE_DRAWS)
    return tuple(
        moved_path(cases[k].human[rng.integers(len(cases[k].human))], case) for k in picked
    )


Paired = list[tuple[int, Pair]]


def _all_pairs(
    cases: Sequence[Case],
    chance: Sequence[tuple[Scanpath, ...]],
    moved: Sequence[tuple[Scanpath, ...]],
    rng: np.random.Generator,
) -> Iterator[tuple[Kind, Paired]]:
    """The pairs of each kind with the index of their case.

    Two viewers are one pair, in random order: some scores are directed.
    """
    predicted = [
        (k, (path, viewer))
        for k, case in enumerate(cases)
        for path in case.predicted
        for viewer in case.human
    ]
    yield "predicted", predicted
    human: Paired = []
    for k, case in enumerate(cases):
        for pair in combinations(case.human, 2):
            human.append((k, pair if rng.random() < 0.5 else pair[::-1]))
    yield "human", human
    floors: dict[Kind, Sequence[tuple[Scanpath, ...]]] = {"random": chance, "elsewhere": moved}
    for kind, paths in floors.items():
        floor = [
            (k, (path, viewer))
            for k, case in enumerate(cases)
            for path in paths[k]
            for viewer in case.human
        ]
        yield kind, floor


def _by_size(cases: Sequence[Case], paired: Paired) -> dict[Size, Paired]:
    groups: dict[Size, Paired] = {}
    for index, pair in paired:
        groups.setdefault(cases[index].size_px, []).append((index, pair))
    return groups


def _map_scores(
    case: Case, scorer: MapScorer, chance: Sequence[Scanpath], moved: Sequence[Scanpath]
) -> Iterator[tuple[Kind, Float64[np.ndarray, "n 8"]]]:
    everyone = scorer.viewers()
    groups: dict[Kind, Sequence[Scanpath]] = {
        "predicted": case.predicted,
        "random": chance,
        "elsewhere": moved,
    }
    for kind, paths in groups.items():
        if paths:
            yield kind, np.stack([scorer.score(path, everyone) for path in paths])
    if len(case.human) > 1:
        yield (
            "human",
            np.stack(
                [scorer.score(path, scorer.viewers(without=k)) for k, path in enumerate(case.human)]
            ),
        )


class _Table:
    """Collects means per case."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        self._scores: dict[str, dict[Kind, np.ndarray]] = {}
        self._undefined: dict[str, dict[Kind, int]] = {}
        self._pairs: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def add(
        self,
        kind: Kind,
        index: Sequence[int],
        columns: Mapping[str, Float64[np.ndarray, " p"]],
        *,
        count: bool = True,
    ) -> None:
        """Rows of a kind; a case's rows come in one call."""
        places = np.array(index, dtype=np.int64)
        if count:
            self._pairs[kind] += len(places)
        for name, values in columns.items():
            known = np.isfinite(values)
            if not known.all():
                lost = self._undefined.setdefault(name, {})
                lost[kind] = lost.get(kind, 0) + int((~known).sum())
            number = np.bincount(places[known], minlength=len(self._cases))
            total = np.bincount(places[known], values[known], minlength=len(self._cases))
            row = self._scores.setdefault(name, {}).setdefault(
                kind, np.full(len(self._cases), np.nan)
            )
            row[number > 0] = total[number > 0] / number[number > 0]

    def finished(
        self, settings: CompareSettings, chance: Sequence[tuple[Scanpath, ...]]
    ) -> Comparison:
        """With searches and intervals."""
        self._scores |= _search_scores(self._cases, chance)
        shown = {
            name: kinds
            for name, kinds in self._scores.items()
            if any(np.isfinite(row).any() for row in kinds.values())
        }
        return Comparison(
            cases=self._cases,
            scores=shown,
            intervals={
                name: {kind: bootstrap(row, settings) for kind, row in kinds.items()}
                for name, kinds in shown.items()
            },
            undefined={name: lost for name, lost in self._undefined.items() if name in shown},
            chance=chance,
            pairs=self._pairs,
        )


def curves_of(
    cases: Sequence[Case], chance: Sequence[tuple[Scanpath, ...]], *, most: int | None = None
) -> dict[Kind, Float64[np.ndarray, "c n"]]:
    """Cumulative performance of each case with a known target, by kind; NaN without scanpaths.

    Args:
        cases: Some of which know the target's box.
        chance: Random scanpaths of each case.
        most: The last fixation that counts; None: the longest of the viewers.
    """
    groups: dict[Kind, Sequence[Sequence[Scanpath]]] = {
        "predicted": [case.predicted for case in cases],
        "human": [case.human for case in cases],
        "random": chance,
    }
    known = [k for k, case in enumerate(cases) if case.human[0].target_box is not None]
    if not known:
        return {}
    if most is None:
        most = max(len(path) for k in known for path in cases[k].human) - 1
    curves = {
        kind: np.stack([performance_curve(found_all(paths[k]), most) for k in known])
        for kind, paths in groups.items()
    }
    return {kind: rows for kind, rows in curves.items() if np.isfinite(rows).any()}


def _search_scores(
    cases: Sequence[Case], chance: Sequence[tuple[Scanpath, ...]]
) -> dict[str, dict[Kind, Float64[np.ndarray, " c"]]]:
    """Area under each case's performance curve, where the target's place is known."""
    found: dict[Kind, Float64[np.ndarray, " c"]] = {}
    known = [k for k, case in enumerate(cases) if case.human[0].target_box is not None]
    for kind, rows in curves_of(cases, chance).items():
        column = np.full(len(cases), np.nan)
        column[known] = [performance_area(row) for row in rows]
        found[kind] = column
    return {"performance_area": found} if found else {}


def bootstrap(row: Float64[np.ndarray, " c"], settings: CompareSettings) -> Interval:
    """Mean of the finite values and its percentile bootstrap interval."""
    values = row[np.isfinite(row)]
    if not len(values):
        return Interval(mean=np.nan, low=np.nan, high=np.nan)
    means = _weights(len(values), settings.resamples, settings.seed) @ values
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


@lru_cache(maxsize=8)
def _weights(count: int, resamples: int, seed: int) -> Float64[np.ndarray, "r n"]:
    """Weight of each value in each bootstrap sample; all scores draw the same pictures."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(drawn / count)


def attainment(name: str, intervals: Mapping[Kind, Interval]) -> float:
    """How far predictions come from the random floor (0) to the viewers' agreement (1).

    NaN where the score does not tell viewers from chance: their interval is not on its better side.
    """
    if any(kind not in intervals for kind in ("predicted", "human", "random")):
        return float("nan")
    floor, ceiling = intervals["random"].mean, intervals["human"]
    better = ceiling.high < floor if name in LOWER_IS_BETTER else ceiling.low > floor
    if not better:
        return float("nan")
    return (intervals["predicted"].mean - floor) / (ceiling.mean - floor)
