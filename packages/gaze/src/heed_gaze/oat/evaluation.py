"""Scores of scanpaths of one scene against its viewers, and their sums: the table of OAT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from heed_gaze.metrics.behaviour import BEHAVIOUR, behaviours, delta
from heed_gaze.metrics.multimatch import multimatch
from heed_gaze.metrics.saliency import nss
from heed_gaze.metrics.sequences import sequence_score
from heed_gaze.oat.shelves import Layout

Objects = Int64[np.ndarray, " _"]
MULTIMATCH = ("shape", "direction", "length", "position")
SCORES = ("ss", *(f"mm_{name}" for name in MULTIMATCH), "nss", "sim")
"""Higher is more alike; undefined ones are NaN."""
PARTS = tuple(f"behaviour_{name}" for name in BEHAVIOUR)


@dataclass(frozen=True, kw_only=True)
class SceneScores:
    """Means over the viewers of one scene."""

    trials: int
    """Viewers."""
    scores: Mapping[str, float]
    """`SCORES`; NaN where undefined."""
    defined: Mapping[str, int]
    """Of how many viewers each score is the mean."""
    behaviour: Float64[np.ndarray, " 5"]
    """Of the paths, columns as `BEHAVIOUR`."""


def score_paths(
    layout: Layout,
    target: int,
    paths: Sequence[Objects],
    viewers: Sequence[Objects],
    *,
    similarity: float | None = None,
) -> SceneScores:
    """Compare every path with every viewer: means over paths, then over viewers.

    Args:
        layout: Of the scene.
        target: -1: none.
        paths: Of one searcher.
        viewers: Their scanpaths.
        similarity: SIM, where the searcher gives probabilities.
    """
    table = _pairs(layout, target, paths, viewers)
    return SceneScores(
        trials=len(viewers),
        **_summed(table, len(viewers), similarity),  # type: ignore[arg-type]
        behaviour=behaviours(list(paths), [target] * len(paths)).mean(axis=0),
    )


def score_viewers(layout: Layout, target: int, viewers: Sequence[Objects]) -> SceneScores:
    """Compare every viewer with the others; undefined where there is one alone."""
    table = _pairs(layout, target, viewers, viewers)
    for values in table.values():
        np.fill_diagonal(values, np.nan)
    return SceneScores(
        trials=len(viewers),
        **_summed(table, len(viewers), None),  # type: ignore[arg-type]
        behaviour=behaviours(list(viewers), [target] * len(viewers)).mean(axis=0),
    )


def _pairs(
    layout: Layout, target: int, paths: Sequence[Objects], viewers: Sequence[Objects]
) -> dict[str, Float64[np.ndarray, "p v"]]:
    shape = (len(paths), len(viewers))
    # Equal pairs have equal scores: sampled paths and viewers repeat each other.
    kinds: dict[tuple[bytes, bytes], int] = {}
    index = np.array(
        [[kinds.setdefault((p.tobytes(), v.tobytes()), len(kinds)) for v in viewers] for p in paths]
    )
    first = [np.frombuffer(p, dtype=np.int64) for p, _ in kinds]
    second = [np.frombuffer(v, dtype=np.int64) for _, v in kinds]
    found = {"ss": sequence_score(first, second)}
    places = [
        [layout.scanpath(path.tolist(), subject="", target=target) for path in side]
        for side in (first, second)
    ]
    parts = multimatch(places[0], places[1], size_px=layout.size_px)
    for number, name in enumerate(MULTIMATCH):
        found[f"mm_{name}"] = parts[:, number]
    found["nss"] = np.array([_nss(a, b, len(layout)) for a, b in zip(first, second, strict=True)])
    return {name: values[index].reshape(shape).astype(np.float64) for name, values in found.items()}


def _nss(path: Objects, viewer: Objects, objects: int) -> float:
    """NSS over objects: the map is 1 on the objects of the path, 0 elsewhere."""
    values = np.zeros((1, objects))
    values[0, path] = 1
    return nss(values, np.stack([viewer, np.zeros_like(viewer)], axis=1))


def _summed(
    table: Mapping[str, Float64[np.ndarray, "p v"]], viewers: int, similarity: float | None
) -> dict[str, Mapping[str, float]]:
    scores, defined = {}, {}
    for name, values in table.items():
        known = np.isfinite(values)
        count = known.sum(axis=0)
        sums = np.where(known, values, 0.0).sum(axis=0)
        of_viewer = sums[count > 0] / count[count > 0]
        scores[name] = float(of_viewer.mean()) if len(of_viewer) else float("nan")
        defined[name] = len(of_viewer)
    scores["sim"] = float("nan") if similarity is None else similarity
    defined["sim"] = 0 if similarity is None else viewers
    return {"scores": scores, "defined": defined}


def sum_up(scenes: Sequence[SceneScores], humans: Sequence[SceneScores]) -> dict[str, float]:
    """Means over all trials, and delta: the mean relative difference of behaviour to the viewers.

    Args:
        scenes: Of one searcher.
        humans: Of the viewers of the same scenes.
    """
    row: dict[str, float] = {"trials": float(sum(scene.trials for scene in scenes))}
    for name in SCORES:
        weights = np.array([scene.defined[name] for scene in scenes], dtype=np.float64)
        values = np.array([scene.scores[name] for scene in scenes])
        known = weights > 0
        row[name] = (
            float((values[known] * weights[known]).sum() / weights[known].sum())
            if known.any()
            else float("nan")
        )
    mine, theirs = mean_behaviour(scenes), mean_behaviour(humans)
    row["delta"], used = delta(mine, theirs)
    row["delta_parts"] = float(used)
    return row | dict(zip(PARTS, mine.tolist(), strict=True))


def mean_behaviour(scenes: Sequence[SceneScores]) -> Float64[np.ndarray, " 5"]:
    """Mean behaviour over trials."""
    weights = np.array([scene.trials for scene in scenes], dtype=np.float64)
    rows = np.stack([scene.behaviour for scene in scenes])
    return np.asarray((rows * weights[:, None]).sum(axis=0) / weights.sum())
