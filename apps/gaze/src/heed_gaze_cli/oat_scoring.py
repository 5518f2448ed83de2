"""The table of OAT: its scanpaths beside those of viewers and of searchers without a network."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from heed_gaze.metrics.behaviour import BEHAVIOUR
from heed_gaze.oat import baselines
from heed_gaze.oat.evaluation import (
    PARTS,
    SCORES,
    SceneScores,
    score_paths,
    score_viewers,
    sum_up,
)
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.pictures import read_layout_picture
from heed_gaze_cli.oat_cases import Scene
from heed_runtime.recipe import Report, Row, Table
from heed_runtime.report import new_figure, style

GREEDY, MULTI, HUMAN, CHANCE = "OAT greedy", "OAT sampled", "human", "random"
ORDER = (
    HUMAN,
    GREEDY,
    MULTI,
    "Markov, first order",
    "target similarity",
    "saliency",
    "centre bias",
    CHANCE,
)
"""Rows of the table."""


@dataclass(frozen=True, kw_only=True)
class OatPrediction:
    """Decoded scanpaths of one scene."""

    name: str
    scene: Scene
    paths: tuple[tuple[int, ...], ...]
    """As asked for by `data.decode`, best or first drawn first."""
    log_probabilities: tuple[float, ...]
    stopped: tuple[bool, ...]
    samples: tuple[tuple[int, ...], ...] = ()
    """Drawn paths, where the scene has viewers."""
    greedy: tuple[int, ...] = ()
    similarities: tuple[float, ...] = field(default=())
    """Mean probability given to each viewer's next object (SIM)."""


def score_scene(prediction: OatPrediction, *, samples: int, max_len: int) -> list[Row]:
    """A row per searcher."""
    scene = prediction.scene
    viewers, target, layout = scene.paths, scene.target, scene.layout
    sim = float(np.mean(prediction.similarities))
    found = {
        HUMAN: score_viewers(layout, target, viewers),
        GREEDY: score_paths(layout, target, [np.array(prediction.greedy)], viewers, similarity=sim),
        MULTI: score_paths(
            layout, target, [np.array(path) for path in prediction.samples], viewers, similarity=sim
        ),
    }
    for name, (paths, similarity) in searchers(scene, samples=samples, max_len=max_len).items():
        found[name] = score_paths(layout, target, paths, viewers, similarity=similarity)
    return [_row(prediction.name, name, scores) for name, scores in found.items()]


def searchers(
    scene: Scene, *, samples: int, max_len: int
) -> dict[str, tuple[baselines.Paths, float | None]]:
    """Paths of the searchers without a network, and their SIM where they have probabilities."""
    reference, layout = scene.reference, scene.layout
    if reference is None:
        return {}
    # The draws depend on the scene alone, not on the order of scenes.
    rng = np.random.default_rng(zlib.crc32(scene.name.encode()))
    found: dict[str, tuple[baselines.Paths, float | None]] = {}
    if (chain := reference.chain(layout)) is not None:
        paths = baselines.markov_paths(chain, samples=samples, max_len=max_len, rng=rng)
        sim = float(np.mean([baselines.markov_similarity(chain, path) for path in scene.paths]))
        found["Markov, first order"] = (paths, sim)
    if scene.target != NO_TARGET:
        weights = baselines.colour_similarity(scene.crops, scene.target)
        found["target similarity"] = (
            baselines.guided_paths(weights, scene.target, reference, samples=samples, rng=rng),
            None,
        )
    weights = baselines.object_saliency(read_layout_picture(layout), layout)
    found["saliency"] = (
        baselines.guided_paths(weights, scene.target, reference, samples=samples, rng=rng),
        None,
    )
    found["centre bias"] = (
        baselines.centre_paths(layout, reference, samples=samples, rng=rng),
        None,
    )
    found[CHANCE] = (
        baselines.random_paths(layout, reference, samples=samples, rng=rng),
        1 / (len(layout) + 2),
    )
    return found


def _row(case: str, searcher: str, scores: SceneScores) -> Row:
    return {
        "case": case,
        "searcher": searcher,
        "trials": scores.trials,
        **{name: _known(scores.scores[name]) for name in SCORES},
        **dict(zip(PARTS, scores.behaviour.tolist(), strict=True)),
        **{f"n_{name}": scores.defined[name] for name in SCORES},
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scores(row: Row) -> SceneScores:
    """A row read back."""
    return SceneScores(
        trials=int(row["trials"] or 0),
        scores={n: float("nan") if row[n] is None else float(row[n] or 0) for n in SCORES},
        defined={name: int(row[f"n_{name}"] or 0) for name in SCORES},
        behaviour=np.array([float(row[part] or 0) for part in PARTS]),
    )


def make_report(rows: Sequence[Row]) -> Report:
    """The table of all searchers, and its pictures."""
    names = [name for name in ORDER if any(row["searcher"] == name for row in rows)]
    groups = {name: [_scores(row) for row in rows if row["searcher"] == name] for name in names}
    of_case = {row["case"]: _scores(row) for row in rows if row["searcher"] == HUMAN}
    totals: dict[str, dict[str, float]] = {}
    for name in names:
        cases = [row["case"] for row in rows if row["searcher"] == name]
        totals[name] = sum_up(groups[name], [of_case[case] for case in cases])
    metrics = {
        **{name: totals[GREEDY][name] for name in (*SCORES, "delta")},
        **{f"multi_{name}": totals[MULTI][name] for name in (*SCORES, "delta")},
        "human_ss": totals[HUMAN]["ss"],
        "delta_parts": totals[GREEDY]["delta_parts"],
    }
    undefined = {
        name: int(total["trials"] - sum(scene.defined["mm_shape"] for scene in groups[name]))
        for name, total in totals.items()
    }
    return Report(
        metrics=metrics,
        tables=[
            Table(title="likeness to viewers", rows=_likeness(totals, undefined)),
            Table(title="behaviour", rows=_behaviour(totals)),
        ],
        plots={"likeness": draw_likeness(totals), "behaviour": draw_behaviour(totals)},
    )


def _likeness(totals: Mapping[str, Mapping[str, float]], undefined: Mapping[str, int]) -> list[Row]:
    return [
        {
            "searcher": name,
            "trials": int(total["trials"]),
            **{column: _known(total[column]) for column in SCORES},
            "delta": _known(total["delta"]),
            "no multimatch": undefined[name],
        }
        for name, total in totals.items()
    ]


def _behaviour(totals: Mapping[str, Mapping[str, float]]) -> list[Row]:
    return [
        {
            "searcher": name,
            **{short: total[part] for short, part in zip(BEHAVIOUR, PARTS, strict=True)},
            "delta": _known(total["delta"]),
            "parts of delta": int(total["delta_parts"]),
        }
        for name, total in totals.items()
    ]


def draw_likeness(totals: Mapping[str, Mapping[str, float]]) -> Figure:
    """Sequence score and delta of every searcher."""
    names = list(totals)[::-1]
    with style():
        figure = new_figure(width_in=9.0, height_in=0.9 + 0.36 * len(names))
        panels = (("ss", "sequence score (higher is better)"), ("delta", "delta (lower is better)"))
        for number, (score, label) in enumerate(panels, start=1):
            axes = figure.add_subplot(1, 2, number)
            values = [totals[name][score] for name in names]
            colours = ["C1" if name.startswith("OAT") else "0.6" for name in names]
            colours = [
                "0.25" if name == HUMAN else c for name, c in zip(names, colours, strict=True)
            ]
            axes.barh(names, [0.0 if math.isnan(v) else v for v in values], color=colours)
            for place, value in enumerate(values):
                text = "undefined" if math.isnan(value) else f"{value:.3f}"
                axes.annotate(
                    text, (0.0 if math.isnan(value) else value, place), xytext=(3, 0),
                    textcoords="offset points", va="center", fontsize=8,
                )  # fmt: skip
            axes.set_xlabel(label)
            axes.margins(x=0.15)
            axes.grid(visible=False, axis="y")
    return figure


def draw_behaviour(totals: Mapping[str, Mapping[str, float]]) -> Figure:
    """How each searcher's fixations divide into search, refixations and revisits."""
    names = list(totals)[::-1]
    with style():
        figure = new_figure(width_in=7.5, height_in=1.1 + 0.36 * len(names))
        axes = figure.add_subplot()
        left = np.zeros(len(names))
        for number, part in enumerate(("search", "refix", "revisit")):
            values = np.array([totals[name][f"behaviour_{part}"] for name in names])
            axes.barh(names, values, left=left, color=f"C{number}", label=part)
            left += values
        for place, name in enumerate(names):
            length = totals[name]["behaviour_length"]
            axes.annotate(f"{length:.1f} fixations", (1.01, place), va="center", fontsize=8)
        axes.set(xlabel="share of fixations", xlim=(0, 1.22), xticks=np.linspace(0, 1, 6))
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
        axes.grid(visible=False, axis="y")
    return figure
