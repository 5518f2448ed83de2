"""People who searched the pictures of a search set, and how alike a search is to theirs.

Their scanpaths lie beside the pictures of a task, in any layout that `heed_gaze.readers` knows:

    TASK/viewers.csv (.json, .mat) or TASK/viewers/    pictures named as in TASK/stimuli

A person has found the target at the first fixation whose square holds some of it: the rule by which
a search ends. Chance looks at any pixel of the picture, again and again; its first fixation is the
middle, as that of a search.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

import numpy as np
from jaxtyping import Bool, Float64
from scipy.stats import rankdata  # type: ignore[import-untyped]

from heed_core.errors import InputError
from heed_gaze.comparison.matching import Case
from heed_gaze.comparison.scoring import CompareSettings, Kind, compare
from heed_gaze.eccnet.search import Scene, Search, SearchConfig, first_found, square_around
from heed_gaze.readers.reading import read_scanpaths
from heed_gaze.readers.trials import ReadOptions
from heed_gaze.scanpaths import Scanpath

logger = logging.getLogger(__name__)

VIEWERS = "viewers"
"""Name of the file, without its suffix, or of the folder."""
SUFFIXES = (".csv", ".json", ".mat", "")
Likeness = Mapping[str, Mapping[Kind, float]]
"""Name of a score -> whose scanpaths -> mean over pairs with a viewer; NaN where undefined."""


def find_viewers(task: Path) -> Path | None:
    """The scanpaths of people who searched the pictures of a task folder."""
    places = (task / f"{VIEWERS}{suffix}" for suffix in SUFFIXES)
    return next((place for place in places if place.exists()), None)


def viewers_of(
    path: Path, picture: Path, *, size: tuple[int, int], others: Iterable[str]
) -> tuple[Scanpath, ...]:
    """The scanpaths of one picture.

    Args:
        path: The file or folder of the task.
        picture: The file of the picture.
        size: Height and width that the picture was brought to; positions follow.
        others: Stems of all pictures of the task.

    Raises:
        InputError: A file that cannot be read, or a scanpath of a picture that is not there.
    """
    known = _read(path, picture.parent, _changed(path))
    unknown = sorted(set(known) - set(others))
    if unknown:
        raise InputError(
            f"has a scanpath of {unknown[0]}, which is no picture of {picture.parent.name}/",
            path=path,
            remedy="name pictures as their files",
        )
    return tuple(_fitted(one, size) for one in known.get(picture.stem, ()))


def _changed(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime_ns for file in files)


@lru_cache(maxsize=4)
def _read(path: Path, pictures: Path, changed: int) -> Mapping[str, Sequence[Scanpath]]:
    """By the stem of the picture; all trials of a task share the file, `changed` is its time."""
    found = read_scanpaths(path, ReadOptions(outside="clip", images=pictures))
    for note in found.notes:
        logger.info("%s: %s", path, note)
    groups: dict[str, list[Scanpath]] = {}
    for one in found.scanpaths:
        groups.setdefault(PurePath(one.image).stem, []).append(one)
    return groups


def _fitted(path: Scanpath, size: tuple[int, int]) -> Scanpath:
    height, width = size
    if path.size_px is None:
        raise InputError(
            "the size of the picture is not known",
            path=path.image,
            remedy="name the picture as its file, or give the columns width and height",
        )
    return path if path.size_px == (width, height) else path.resized((width, height))


def likeness(
    scene: Scene, found: Search, viewers: Sequence[Scanpath], *, seed: int = 0
) -> Likeness:
    """Scores of a search beside viewers, of viewers among each other, of random scanpaths.

    Random ones are as long as viewers' and lie anywhere. The first fixation counts.

    Args:
        scene: What was searched.
        found: The search.
        viewers: At least one; in pixels of the scene.
        seed: Of chance.
    """
    height, width = scene.size
    shared = {"image": scene.name, "size_px": (width, height)}
    own = Scanpath(subject="model", xy_px=found.fixations[:, ::-1].astype(np.float64), **shared)  # type: ignore[arg-type]
    people = tuple(Scanpath(subject=one.subject, xy_px=one.xy_px, **shared) for one in viewers)  # type: ignore[arg-type]
    case = Case(image=scene.name, task="", size_px=(width, height), human=people, predicted=(own,))
    compared = compare([case], CompareSettings(maps=False, seed=seed, resamples=1))
    return {
        name: {kind: float(row[0]) for kind, row in kinds.items()}
        for name, kinds in compared.scores.items()
    }


def found_by(
    scene: Scene, viewers: Sequence[Scanpath], config: SearchConfig
) -> tuple[int | None, ...]:
    """At which fixation each viewer found the target, from 0; None: not at all."""
    return tuple(
        first_found(scene, one.xy_px[:, ::-1].round().astype(np.int64), config) for one in viewers
    )


def chance_of(scene: Scene, config: SearchConfig) -> float:
    """Probability that a fixation anywhere on the picture finds the target."""
    if scene.truth is None:
        return 0.0
    return float(_finding_places(scene.truth, config.inhibition).mean())


def _finding_places(truth: Bool[np.ndarray, "h w"], side: int) -> Bool[np.ndarray, "h w"]:
    """The fixations whose square holds some of the target: sums over squares, by an integral."""
    height, width = truth.shape
    total = np.zeros((height + 1, width + 1), dtype=np.int64)
    total[1:, 1:] = truth.cumsum(axis=0).cumsum(axis=1)
    (top, bottom), (left, right) = (
        (np.clip(low, 0, n), np.clip(high, 0, n))
        for n in (height, width)
        for low, high in [square_around(np.arange(n), side)]
    )
    sums = total[bottom][:, right] - total[bottom][:, left] - total[top][:, right]
    return np.asarray(sums + total[top][:, left] > 0)


@dataclass(frozen=True, kw_only=True)
class Performance:
    """How soon the targets of several pictures are found."""

    curve: Float64[np.ndarray, " n"]
    """Share found by fixation 0, 1, ..."""
    found: float
    """Share found at all."""
    mean: float
    """Number of the finding fixation where there is one, from 0; its median and deviation."""
    median: float
    deviation: float


def performance(found: Sequence[int | None], most: int) -> Performance:
    """Sum searches up.

    Args:
        found: The finding fixation of each, from 0.
        most: The last fixation that counts.
    """
    when = np.array([np.inf if at is None or at > most else at for at in found])
    known = when[np.isfinite(when)]
    statistics = (known.mean(), np.median(known), known.std()) if len(known) else (np.nan,) * 3
    return Performance(
        curve=(when[:, None] <= np.arange(most + 1)).mean(axis=0),
        found=float(np.isfinite(when).mean()),
        mean=float(statistics[0]),
        median=float(statistics[1]),
        deviation=float(statistics[2]),
    )


def chance_curve(
    chances: Sequence[float], at_start: Sequence[bool], most: int
) -> Float64[np.ndarray, " n"]:
    """Share of targets that chance finds by fixation 0, 1, ..., `most`.

    Args:
        chances: `chance_of` of each picture.
        at_start: Whether the fixation in the middle finds its target.
        most: The last fixation that counts.
    """
    missed = (1 - np.array(chances))[:, None] ** np.arange(most + 1)
    return np.asarray(np.where(np.array(at_start)[:, None], 1.0, 1 - missed).mean(axis=0))


def consistency(
    model: Sequence[int | None], viewers: Sequence[Mapping[str, int | None]], *, most: int
) -> tuple[float, float]:
    """Whether the same pictures are hard: rank correlations of finding fixations over pictures.

    Of a searcher with the mean of the viewers, and of each viewer with the mean of the others,
    averaged. A target that is not found counts as found at `most` + 1. NaN where there are fewer
    than three pictures, or no differences.

    Args:
        model: The finding fixation in each picture.
        viewers: Viewer -> finding fixation, of each picture.
        most: The last fixation that counts.
    """
    names = sorted({name for one in viewers for name in one})
    table = np.array([[_at(one.get(name, "away"), most) for name in names] for one in viewers])
    own = np.array([_at(at, most) for at in model])
    known = np.isfinite(table)
    total, count = np.where(known, table, 0.0).sum(axis=1), known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        first = rank_correlation(own, total / count)
        others = [
            rank_correlation(
                table[:, k], (total - np.where(known[:, k], table[:, k], 0)) / (count - known[:, k])
            )
            for k in range(len(names))
        ]
    defined = [one for one in others if np.isfinite(one)]
    return first, float(np.mean(defined)) if defined else float("nan")


def _at(found: int | str | None, most: int) -> float:
    """NaN for a viewer who did not see the picture."""
    if isinstance(found, str):
        return float("nan")
    return float(most + 1 if found is None else min(found, most + 1))


def rank_correlation(first: Float64[np.ndarray, " n"], second: Float64[np.ndarray, " n"]) -> float:
    """Spearman's, over the pictures where both are known."""
    both = np.isfinite(first) & np.isfinite(second)
    ranks = [rankdata(one[both]) for one in (first, second)]
    if both.sum() < 3 or any(np.ptp(one) == 0 for one in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])
