"""From saccades to reaction times, slopes and the asymmetry index (Gupta et al., section 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import f as f_distribution  # type: ignore[import-untyped]

from heed_gaze.eccnet.experiments import EXPERIMENTS, Experiment
from heed_gaze.plots import fit_line


@dataclass(frozen=True, kw_only=True)
class ReactionTime:
    """RT = ms_per_saccade * saccades + ms_at_rest; the paper's, fitted on other people's data."""

    ms_per_saccade: float = 252.359
    ms_at_rest: float = 376.271

    @classmethod
    def fit(
        cls, saccades: Float64[np.ndarray, " n"], rt_ms: Float64[np.ndarray, " n"]
    ) -> ReactionTime:
        """The line of least squares.

        Raises:
            ValueError: All numbers of saccades are equal.
        """
        if np.ptp(saccades) == 0:
            raise ValueError("saccades must differ to fit a line")
        slope, rest = np.polyfit(saccades, rt_ms, 1)
        return cls(ms_per_saccade=float(slope), ms_at_rest=float(rest))

    def of(self, saccades: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
        """Reaction times in ms."""
        return np.asarray(self.ms_per_saccade * saccades + self.ms_at_rest)


def scored_saccades(found_at: int | None, set_size: int) -> int:
    """Saccades of a trial; a target that was not found counts as the size of its set."""
    return set_size if found_at is None else found_at


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task over its set sizes."""

    set_sizes: tuple[int, ...]
    mean_saccades: tuple[float, ...]
    mean_rt_ms: tuple[float, ...]
    standard_error_ms: tuple[float, ...]
    """Of the reaction time; NaN for one trial."""
    slope_ms: float
    """Per item, of the mean reaction times; NaN for one set size."""
    intercept_ms: float


def score_task(
    set_sizes: Sequence[int],
    saccades: Sequence[float],
    model: ReactionTime = ReactionTime(),
) -> TaskScore:
    """Sum up trials.

    Args:
        set_sizes: Of each trial.
        saccades: Of each trial.
        model: Saccades to reaction times.
    """
    sizes, counts = np.asarray(set_sizes), np.asarray(saccades, dtype=np.float64)
    groups = {int(size): counts[sizes == size] for size in np.unique(sizes)}
    rts = {size: model.of(group) for size, group in groups.items()}
    means = tuple(float(rt.mean()) for rt in rts.values())
    slope, intercept = fit_line(np.array(list(groups), dtype=np.float64), np.array(means))
    return TaskScore(
        set_sizes=tuple(groups),
        mean_saccades=tuple(float(group.mean()) for group in groups.values()),
        mean_rt_ms=means,
        standard_error_ms=tuple(
            float(rt.std(ddof=1) / np.sqrt(len(rt))) if len(rt) > 1 else float("nan")
            for rt in rts.values()
        ),
        slope_ms=slope,
        intercept_ms=intercept,
    )


def asymmetry_index(hard_slope: float, easy_slope: float) -> float:
    """(h - e) / (h + e) of the slopes of the task that is harder and easier for people.

    Negative slopes count as 0; without any slope the index is 0. 1 is people's asymmetry at its
    largest, -1 the opposite.

    Example:
        >>> asymmetry_index(96.0, 45.0)
        0.3617021276595745
    """
    if np.isnan(hard_slope) or np.isnan(easy_slope):
        return float("nan")
    hard, easy = max(hard_slope, 0.0), max(easy_slope, 0.0)
    return 0.0 if hard + easy == 0 else (hard - easy) / (hard + easy)


@dataclass(frozen=True, kw_only=True)
class ExperimentScore:
    """Both tasks of an experiment."""

    experiment: Experiment
    tasks: Mapping[str, TaskScore]
    index: float
    human_index: float
    f_value: float
    """Does the slope or height depend on the task? Of nested linear models; NaN: too few trials."""
    p_value: float


def score_experiment(
    experiment: Experiment,
    trials: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    model: ReactionTime = ReactionTime(),
) -> ExperimentScore:
    """Score an experiment.

    Args:
        experiment: Which.
        trials: Name of each of its two tasks -> set size and saccades of each trial.
        model: Saccades to reaction times.
    """
    easy, hard = experiment.tasks
    scores = {task.name: score_task(*trials[task.name], model) for task in (easy, hard)}
    f_value, p_value = interaction_test(
        *(
            (np.asarray(sizes, dtype=np.float64), model.of(np.asarray(counts, dtype=np.float64)))
            for sizes, counts in (trials[easy.name], trials[hard.name])
        )
    )
    return ExperimentScore(
        experiment=experiment,
        tasks=scores,
        index=asymmetry_index(scores[hard.name].slope_ms, scores[easy.name].slope_ms),
        human_index=human_index(experiment),
        f_value=f_value,
        p_value=p_value,
    )


def human_index(experiment: Experiment) -> float:
    """The asymmetry index of people."""
    easy, hard = experiment.tasks
    return asymmetry_index(hard.human_slope_ms, easy.human_slope_ms)


def human_mean() -> float:
    """Over the six experiments: .564."""
    return float(np.mean([human_index(experiment) for experiment in EXPERIMENTS]))


def interaction_test(
    *tasks: tuple[Float64[np.ndarray, " _"], Float64[np.ndarray, " _"]],
) -> tuple[float, float]:
    """F and p of `rt ~ size * task` against `rt ~ size`; set sizes and times of each task.

    NaN where the larger model has as many parameters as there are trials, or no variance.
    """
    size = np.concatenate([one[0] for one in tasks])
    rt = np.concatenate([one[1] for one in tasks])
    task = np.repeat(np.arange(len(tasks)), [len(one[0]) for one in tasks])
    small = np.column_stack([np.ones_like(size), size])
    large = np.column_stack(
        [small]
        + [column for k in range(1, len(tasks)) for column in (small * (task == k)[:, None]).T]
    )
    rests = [_residual(design, rt) for design in (small, large)]
    added = large.shape[1] - small.shape[1]
    free = len(rt) - int(np.linalg.matrix_rank(large))
    if free < 1 or rests[1] <= 1e-9 * max(float((rt**2).sum()), 1.0):
        return float("nan"), float("nan")
    value = (rests[0] - rests[1]) / added / (rests[1] / free)
    return float(value), float(f_distribution.sf(value, added, free))


def _residual(design: np.ndarray, values: np.ndarray) -> float:
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - design @ solution) ** 2).sum())
