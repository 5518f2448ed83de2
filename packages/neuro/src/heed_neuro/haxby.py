"""Object categories and cortex: decoding and encoding of block-design fMRI, run by run.

The data are those of Haxby et al. (Science 293, 2001), or any others of that form: a .npz with
`bold` (volumes, voxels), `label` and `run` of each volume, `rest` between blocks. Decoding tells
the category of a block from the mean of its volumes by a linear support vector machine; encoding
predicts each voxel's time course from the categories by ridge regression. Both leave a run out.

Two choices move the accuracy of decoding by a tenth or more. The machines tell one category from
all others: with a dozen blocks per category, machines of pairs see too few, and their votes are
worse. And how far labels run ahead of the blood response depends on how they were written: of the
series in PyMVPA, categories can be told from the first labelled volume on and no longer after the
last, so that its labels follow the response already, and a shift loses. `decode_by_delay` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy import signal  # type: ignore[import-untyped]

from heed_core.arrays import load_arrays
from heed_core.errors import InputError
from heed_neuro.noise_ceiling import pearson
from heed_neuro.ridge import RidgeOptions, ridge_cv

REST = "rest"
_ROUNDING = 1e-10
_LARGEST = 1e100


@dataclass(frozen=True, kw_only=True)
class BlockDesign:
    """Volumes of several runs, each labelled."""

    bold: Float[np.ndarray, "volumes voxels"]
    labels: np.ndarray
    runs: np.ndarray

    @property
    def categories(self) -> tuple[str, ...]:
        """All labels but rest, sorted."""
        return tuple(sorted({str(label) for label in self.labels} - {REST}))


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What was decoded, block by block."""

    true: np.ndarray
    predicted: np.ndarray
    runs: np.ndarray
    categories: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of the blocks that are right."""
        return float((self.true == self.predicted).mean())


def read_blocks(path: Path) -> BlockDesign:
    """Read a .npz with bold, label and run.

    Raises:
        InputError: No such file, damaged, a missing or unfit array.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="give a .npz with bold, label, run")
    found = load_arrays(path)
    missing = sorted({"bold", "label", "run"} - set(found))
    if missing:
        raise InputError(f"has no array {missing[0]!r}", path=path, remedy="add it")
    bold, labels, runs = found["bold"], found["label"].astype(str), found["run"]
    if bold.ndim != 2 or labels.shape != runs.shape or labels.shape != bold.shape[:1]:
        raise InputError(
            f"has bold {bold.shape}, label {labels.shape} and run {runs.shape}; they must be "
            "(volumes, voxels), (volumes,) and (volumes,)",
            path=path,
            remedy="save them so",
        )
    for name in ("bold", "run"):
        if found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            raise InputError(
                f"holds NaN or infinite values in {name}", path=path, remedy="correct it"
            )
    design = BlockDesign(bold=bold.astype(np.float64), labels=labels, runs=runs)
    if len(design.categories) < 2 or len(np.unique(runs)) < 2:
        raise InputError(
            "needs at least two categories and two runs", path=path, remedy="correct label and run"
        )
    if np.abs(design.bold).max(initial=0.0) > _LARGEST:
        raise InputError(f"holds values above {_LARGEST:g}", path=path, remedy="correct bold")
    if not clean(design).any():
        raise InputError("has no voxel that varies", path=path, remedy="correct bold")
    return design


def clean(design: BlockDesign) -> Float[np.ndarray, "volumes voxels"]:
    """Remove linear trends and bring each voxel to mean 0 and deviation 1, run by run.

    A voxel that is a line in a run but for rounding is 0 there.
    """
    result = np.empty_like(design.bold)
    for run in np.unique(design.runs):
        own = design.runs == run
        trendless = signal.detrend(design.bold[own], axis=0)
        std = trendless.std(axis=0)
        varies = std > _ROUNDING * np.abs(design.bold[own]).max(axis=0)
        result[own] = np.where(varies, trendless, 0.0) / np.where(varies, std, 1.0)
    return result


def shifted(design: BlockDesign, volumes: int) -> np.ndarray:
    """The label of the stimulus that a volume's blood answers to: that of some volumes before."""
    labels = np.full(design.labels.shape, REST, dtype=design.labels.dtype)
    for run in np.unique(design.runs):
        own = np.flatnonzero(design.runs == run)
        labels[own[volumes:]] = design.labels[own[: max(len(own) - volumes, 0)]]
    return labels


def decode(design: BlockDesign, *, delay: int = 2) -> Decoding:
    """The category of each block from its mean volume, leaving one run out.

    Args:
        design: The volumes.
        delay: Volumes between a stimulus and its blood response.

    Raises:
        InputError: Within some runs the delay leaves less than two categories to learn from.
    """
    from sklearn.multiclass import OneVsRestClassifier  # type: ignore[import-untyped]
    from sklearn.svm import SVC  # type: ignore[import-untyped]

    bold, labels = clean(design), shifted(design, delay)
    means, names, runs = [], [], []
    for run in np.unique(design.runs):
        for category in design.categories:
            own = (design.runs == run) & (labels == category)
            if own.any():
                means.append(bold[own].mean(axis=0))
                names.append(category)
                runs.append(run)
    y, run_of = np.array(names), np.array(runs)
    if any(len(set(y[run_of != run])) < 2 for run in np.unique(design.runs)):
        raise InputError(
            f"a delay of {delay} volumes leaves too few blocks to learn from",
            remedy="lower it, or give longer runs",
        )
    x = np.stack(means)
    predicted = np.empty_like(y)
    for run in np.unique(run_of):
        held = run_of == run
        machines = OneVsRestClassifier(SVC(kernel="linear", C=1.0)).fit(x[~held], y[~held])
        predicted[held] = machines.predict(x[held])
    return Decoding(true=y, predicted=predicted, runs=run_of, categories=design.categories)


def decode_by_delay(design: BlockDesign, delays: Sequence[int]) -> dict[int, float]:
    """Accuracy of `decode` for each delay: where labels fit the blood response.

    NaN for a delay that leaves too few blocks.
    To choose a delay by it and to report its accuracy is to choose on the test.
    """
    found: dict[int, float] = {}
    for delay in delays:
        try:
            found[delay] = decode(design, delay=delay).accuracy
        except InputError:
            found[delay] = float("nan")
    return found


def encode(
    design: BlockDesign, *, delay: int = 2, options: RidgeOptions | None = None
) -> Float[np.ndarray, " voxels"]:
    """Correlation of each voxel's time course with its prediction from the categories.

    The features of a volume are one per category (1 while it is shown, `delay` volumes before); a
    run is predicted from the others. Penalties are chosen within these.
    """
    bold, labels = clean(design), shifted(design, delay)
    x = torch.from_numpy(np.stack([labels == name for name in design.categories], axis=1)).double()
    predicted = np.empty_like(bold)
    for run in np.unique(design.runs):
        held = design.runs == run
        fit = ridge_cv(x[~held], bold[~held], options)
        predicted[held] = fit.predict(x[held]).numpy()
    return pearson(predicted, bold)
