"""Scores of pairs of scanpaths: a prediction (or a viewer) and a viewer of the same picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64, Integer

from heed_gaze.metrics.multimatch import MULTIMATCH, multimatch
from heed_gaze.metrics.recurrence import cross_recurrence
from heed_gaze.metrics.scanmatch import ScanMatch, scanmatch
from heed_gaze.metrics.sequences import levenshtein, sequence_score, string_edit_distance
from heed_gaze.metrics.simplification import Simplification
from heed_gaze.metrics.symbols import label_symbols, nearest_symbols
from heed_gaze.metrics.warping import dtw, scaled_time_delay_embedding
from heed_gaze.scanpaths import Scanpath, Size

Labels = Integer[np.ndarray, "h w"]
Scores = dict[str, Float64[np.ndarray, " p"]]
Pair = tuple[Scanpath, Scanpath]


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Units and grids of the scores."""

    scanmatch: ScanMatch = field(default_factory=ScanMatch)
    simplification: Simplification | None = None
    """Merge small saccades before MultiMatch; None: compare what was recorded."""
    degree: float = 1 / 32
    """One degree of visual angle as a share of the picture's width."""
    radius_deg: float = 2.0
    """Fixations nearer than that recur; also the window of the clusters of the sequence score."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What the scores of one picture need beside its scanpaths."""

    centres_xy: Float64[np.ndarray, "k 2"]
    """Clusters of the viewers' fixations."""
    labels: Labels | None = None
    """What is where, for the semantic sequence score."""


def score_pairs(
    pairs: Sequence[Pair],
    pictures: Mapping[tuple[str, str], Picture],
    size_px: Size,
    settings: PairSettings,
) -> Scores:
    """All scores of pairs in pictures of one size; NaN where one is not defined.

    Args:
        pairs: A prediction and a viewer.
        pictures: Of each key.
        size_px: Of all pictures.
        settings: Units and grids.
    """
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    vectors = multimatch(first, second, size_px=size_px, simplification=settings.simplification)
    scores = {f"multimatch_{name}": vectors[:, k] for k, name in enumerate(MULTIMATCH)}
    scores["scanmatch"] = scanmatch(first, second, size_px=size_px, settings=settings.scanmatch)
    scores |= _of_symbols(first, second, pictures)
    scores["string_edit_distance"] = string_edit_distance(first, second, size_px=size_px)
    scores["dtw_px"] = dtw(first, second)
    scores["time_delay_embedding"] = scaled_time_delay_embedding(first, second, size_px=size_px)[
        :, 0
    ]
    radius = settings.radius_deg * settings.degree * size_px[0]
    found = [cross_recurrence(a, b, radius_px=radius) for a, b in pairs]
    scores["recurrence"] = np.array([one.recurrence for one in found])
    scores["determinism"] = np.array([one.determinism for one in found])
    scores["laminarity"] = np.array([one.laminarity for one in found])
    return scores


def _of_symbols(
    first: Sequence[Scanpath],
    second: Sequence[Scanpath],
    pictures: Mapping[tuple[str, str], Picture],
) -> Scores:
    """Sequence scores and edit distances over clusters and over labels."""
    paths = {*first, *second}
    clusters = {id(path): nearest_symbols(path, pictures[path.key].centres_xy) for path in paths}
    a, b = ([clusters[id(path)] for path in side] for side in (first, second))
    scores = {"sequence_score": sequence_score(a, b), "edit_distance": levenshtein(a, b)}
    labelled = {
        id(path): label_symbols(path, labels, path.size_px)
        for path in paths
        if (labels := pictures[path.key].labels) is not None
    }
    if labelled:
        known = np.array([id(path) in labelled for path in first])
        score = np.full(len(first), np.nan)
        chosen = np.flatnonzero(known).tolist()
        score[known] = sequence_score(
            [labelled[id(first[k])] for k in chosen], [labelled[id(second[k])] for k in chosen]
        )
        scores["semantic_sequence_score"] = score
    return scores
