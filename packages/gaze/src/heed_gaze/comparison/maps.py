"""Scores of one scanpath as a map of where the viewers of a picture look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from heed_gaze.comparison.matching import Case
from heed_gaze.metrics import saliency
from heed_gaze.metrics.saliency import Cells, Map
from heed_gaze.scanpaths import Scanpath

MAP_SCORES = (
    "nss", "auc_judd", "auc_borji", "auc_shuffled", "correlation", "similarity", "kl_divergence",
    "information_gain",
)  # fmt: skip
LONGEST = 128
"""Cells along the longer side of a map: about a quarter of a degree each."""
EVEN = 0.01
"""Weight of an even density in a map: no place has probability 0."""
_ELSEWHERE = 2000


@dataclass(frozen=True, kw_only=True)
class Viewers:
    """Where some viewers of a picture looked."""

    fixations: Cells
    density: Map


class Elsewhere:
    """Where viewers look in all pictures but one, for the scores that discount it."""

    def __init__(self, cases: Sequence[Case], *, degree: float, seed: int) -> None:
        self._degree, self._seed = degree, seed
        self._relative = {
            (case.image, case.task): np.concatenate(
                [path.xy_px / np.array(case.size_px) for path in case.human]
            )
            for case in cases
        }

    def of(self, case: Case) -> tuple[Cells, Map]:
        """Some fixations of other pictures as cells of this one, and the density of all of them.

        Without another picture: every cell once, and an even density.
        """
        shape = saliency.map_shape(case.size_px, LONGEST)
        others = [xy for key, xy in self._relative.items() if key[0] != case.image]
        if not others:
            y, x = np.indices(shape).reshape(2, -1)
            return np.stack([x, y], axis=1), np.full(shape, 1 / np.prod(shape))
        places = np.concatenate(others) * np.array(case.size_px)
        path = Scanpath(image=case.image, subject="", xy_px=places, size_px=case.size_px)
        density = saliency.fixation_density(
            [path],
            case.size_px,
            sigma_px=self._degree * case.size_px[0],
            shape=shape,
            uniform=EVEN,
        )
        cells = saliency.cells_of(path, shape)
        if len(cells) > _ELSEWHERE:
            rng = np.random.default_rng(self._seed)
            cells = cells[rng.choice(len(cells), _ELSEWHERE, replace=False)]
        return cells, density


class MapScorer:
    """Scores scanpaths of one picture as maps.

    Args:
        case: The picture and its viewers.
        elsewhere: Of the data set.
        degree: One degree of visual angle, as a share of the picture's width; the standard
            deviation of the blur.
        seed: Of the random cells of AUC-Borji and of the order among equal cells.
    """

    def __init__(self, case: Case, elsewhere: Elsewhere, *, degree: float, seed: int) -> None:
        self._shape = saliency.map_shape(case.size_px, LONGEST)
        self._case, self._seed = case, seed
        self._sigma_px = degree * case.size_px[0]
        self._negatives, self._baseline = elsewhere.of(case)
        self._cells = [saliency.cells_of(path, self._shape) for path in case.human]
        self._maps = [self._density([path]) * len(path) for path in case.human]
        self._all = np.sum(self._maps, axis=0)

    def _density(self, paths: Sequence[Scanpath]) -> Map:
        return saliency.fixation_density(
            paths, self._case.size_px, sigma_px=self._sigma_px, shape=self._shape
        )

    def viewers(self, without: int | None = None) -> Viewers:
        """All viewers, or all but one."""
        kept = [cells for k, cells in enumerate(self._cells) if k != without]
        total = self._all if without is None else self._all - self._maps[without]
        density = saliency.as_density(np.maximum(total, 0.0))  # differences may round below 0
        return Viewers(fixations=np.concatenate(kept), density=density)

    def score(self, path: Scanpath, viewers: Viewers) -> Float64[np.ndarray, " 8"]:
        """The scores `MAP_SCORES` of one scanpath's blurred fixations."""
        density = (1 - EVEN) * self._density([path]) + EVEN / self._all.size
        fixations = viewers.fixations
        return np.array(
            [
                saliency.nss(density, fixations),
                saliency.auc_judd(density, fixations, break_ties=self._seed),
                saliency.auc_borji(density, fixations, seed=self._seed),
                saliency.auc_shuffled(density, fixations, self._negatives),
                saliency.correlation(density, viewers.density),
                saliency.similarity(density, viewers.density),
                saliency.kl_divergence(viewers.density, density),
                saliency.information_gain(density, self._baseline, fixations),
            ]
        )
