"""Pictures of conditioning: learning curves, associations, effects, capacity, depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heed_neuro.conditioning.experiments import Experiment
from heed_neuro.conditioning.phenomena import EMERGES
from heed_runtime.report import COLOURS, new_figure, style

Rows = Sequence[Mapping[str, Any]]
LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def draw_curves(experiment: Experiment) -> Figure:
    """Strength of each cue after each trial: a row of panels per group, a panel per rule."""
    groups, rules = list(experiment.design.groups), list(experiment.found)
    with style():
        figure = new_figure(width_in=max(4.6, 2.9 * len(rules)), height_in=2.6 * len(groups) + 0.8)
        # one scale per rule: groups are compared
        axes = figure.subplots(len(groups), len(rules), squeeze=False, sharey="col")
        for row, group in zip(axes, groups, strict=True):
            for panel, rule in zip(row, rules, strict=True):
                _curves(panel, experiment, group, rule)
            row[0].set_ylabel(f"{group}\nstrength")
        for panel in axes[-1]:
            panel.set_xlabel("trial")
            low, high = panel.get_ylim()
            panel.set_ylim(low, high + 0.12 * (high - low))  # room for the names of phases
        for panel, rule in zip(axes[0], rules, strict=True):
            panel.set_title(rule)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="cue")
        figure.suptitle(experiment.design.title or experiment.design.name, fontsize=11)
    return figure


def _curves(axes: Axes, experiment: Experiment, group: str, rule: str) -> None:
    simulation = experiment.found[rule][group]
    values = simulation.associations[:, :, 0].detach().numpy()
    trials = np.arange(len(values) + 1)
    for index, cue in enumerate(simulation.cues):
        axes.plot(
            trials,
            np.concatenate([[0.0], values[:, index]]),
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINES[index % len(LINES)],
            label=cue,
        )
    schedule = experiment.design.schedules[group]
    end = 0
    for phase in schedule.phases:
        if end:
            axes.axvline(end, color="0.7", linewidth=0.8)
        text = str(phase)
        if len(phase) >= 0.12 * len(schedule):  # a test of one trial has no room for its name
            axes.annotate(
                text if len(text) < 16 else f"{text[:14]}..",
                (end + 0.5 * len(phase), 0.99),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=7,
            )
        end += len(phase)


def draw_associations(experiment: Experiment) -> Figure:
    """The association of each cue after each trial as colours; a panel per group and rule."""
    groups, rules = list(experiment.design.groups), list(experiment.found)
    cues = len(experiment.design.all_cues)
    with style():
        figure = new_figure(
            width_in=max(4.6, 2.6 * len(rules)), height_in=(0.9 + 0.35 * cues) * len(groups) + 0.8
        )
        axes = figure.subplots(len(groups), len(rules), squeeze=False)
        for row, group in zip(axes, groups, strict=True):
            for panel, rule in zip(row, rules, strict=True):
                simulation = experiment.found[rule][group]
                values = simulation.associations[:, :, 0].detach().numpy().T
                most = max(float(np.abs(values).max()), 1e-6)
                image = panel.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most)
                figure.colorbar(image, ax=panel, shrink=0.9)
                panel.set_yticks(range(len(simulation.cues)), simulation.cues)
                panel.grid(visible=False)
                if group == groups[-1]:
                    panel.set_xlabel("trial")
                if panel is row[0]:
                    panel.set_ylabel(group)
        for panel, rule in zip(axes[0], rules, strict=True):
            panel.set_title(rule)
    return figure


def draw_attention(
    weights: Mapping[str, Mapping[str, Float[np.ndarray, "n n"]]], title: str
) -> Figure:
    """What each trial reads of the trials before it: a row per group, a panel per trained layer."""
    groups, kinds = list(weights), list(next(iter(weights.values())))
    with style():
        figure = new_figure(width_in=2.7 * len(kinds), height_in=2.4 * len(groups) + 0.7)
        axes = figure.subplots(len(groups), len(kinds), squeeze=False)
        for row, group in zip(axes, groups, strict=True):
            for panel, kind in zip(row, kinds, strict=True):
                values = weights[group][kind]
                most = max(float(np.abs(values).max()), 1e-6)
                image = panel.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
                figure.colorbar(image, ax=panel, shrink=0.8)
                panel.grid(visible=False)
                if group == groups[-1]:
                    panel.set_xlabel("stored trial")
                if panel is row[0]:
                    panel.set_ylabel(f"{group}\ntrial")
        for panel, kind in zip(axes[0], kinds, strict=True):
            panel.set_title(f"layer {kind}")
        figure.suptitle(title, fontsize=11)
    return figure


def draw_effects(rows: Rows, learners: Sequence[str]) -> Figure:
    """Which phenomena appear: phenomena by learners, the effect as a colour and a number."""
    names = [str(row["phenomenon"]) for row in rows]
    values = np.array(
        [[math.nan if row.get(k) is None else float(row[k]) for k in learners] for row in rows]
    ).reshape(len(rows), len(learners))
    with style():
        figure = new_figure(width_in=2.6 + 0.72 * len(learners), height_in=1.7 + 0.34 * len(names))
        axes = figure.add_subplot()
        image = axes.imshow(np.clip(values, -1, 1), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            shown = "" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(
                j,
                i,
                shown,
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if value >= EMERGES else "normal",
                color="white" if abs(value) > 0.7 else "black",
            )
        axes.set_xticks(range(len(learners)), learners, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="effect (bold: shown)", extend="both")
        axes.set_title("1: full effect, 0: none")
    return figure


def draw_capacity(rows: Rows) -> Figure:
    """Cosine, wrong signs and nearest value against the load, simulated on theory."""
    widths = list(dict.fromkeys(row["d_k"] for row in rows))
    panels = (
        ("cosine", "cosine theory", "cosine of answer and value"),
        ("bit error", "bit error theory", "share of wrong signs"),
        ("nearest", None, "nearest stored value is right"),
    )
    with style():
        figure = new_figure(width_in=10.5, height_in=3.6)
        axes = figure.subplots(1, 3)
        for panel, (name, theory, label) in zip(axes, panels, strict=True):
            for number, width in enumerate(widths):
                mine = [row for row in rows if row["d_k"] == width]
                loads = [row["N/d_k"] for row in mine]
                colour = COLOURS[number % len(COLOURS)]
                if theory:
                    panel.plot(loads, [row[theory] for row in mine], color=colour, linewidth=1)
                panel.plot(
                    loads,
                    [row[name] for row in mine],
                    "os^Dv"[number % 5],
                    color=colour,
                    label=f"d_k = {width}",
                    linestyle="none" if theory else ":",
                )
            panel.set_xscale("log", base=2)
            panel.set(xlabel="pairs per channel, N / d_k", ylabel=label)
        axes[0].plot([], [], color="0.4", linewidth=1, label="theory")
        axes[0].legend()
    return figure


def draw_guarantee(rows: Rows) -> Figure:
    """Worst and average capacity against the width, on logarithmic axes."""
    widths = [row["d_k"] for row in rows]
    with style():
        figure = new_figure(width_in=5.2, height_in=3.8)
        axes = figure.add_subplot()
        names = [name for name in rows[0] if name not in ("d_k", "sqrt(d_k)")]
        for number, name in enumerate(names):
            values = [row[name] for row in rows]
            axes.plot(widths, values, marker="os^D"[number % 4], label=name)
        axes.plot(
            widths, [row["sqrt(d_k)"] for row in rows], color="0.6", ls=":", label="sqrt(d_k)"
        )
        axes.set(xlabel="d_k", ylabel="pairs N", xscale="log", yscale="log")
        axes.legend(fontsize=8)
    return figure


def draw_depth(depth: Rows, width: Rows, heads: Rows) -> Figure:
    """Error against depth, against width, and what redundant heads do."""
    with style():
        figure = new_figure(width_in=13.0, height_in=3.7)
        left, middle, right, last = figure.subplots(1, 4)
        layers = [row["layers"] for row in depth]
        left.plot(layers, [row["simulated"] for row in depth], "o", label="simulated")
        left.plot(layers, [row["independent"] for row in depth], "-", label="independent")
        left.plot(layers, [row["worst"] for row in depth], "--", label="worst case")
        left.set(xlabel="layers", ylabel="relative error")
        left.xaxis.get_major_locator().set_params(integer=True)
        for number, name in enumerate(name for name in width[0] if name != "d_k"):
            values = [row[name] for row in width]
            middle.plot([row["d_k"] for row in width], values, label=name, marker="os^"[number % 3])
        middle.set(xlabel="d_k", ylabel="relative error", xscale="log", yscale="log")
        middle.set_xticks([row["d_k"] for row in width], [str(row["d_k"]) for row in width])
        count = [row["heads"] for row in heads]
        right.plot(count, [row["mean, simulated"] for row in heads], "o", label="mean, simulated")
        right.plot(count, [row["mean, theory"] for row in heads], "-", label="mean, theory")
        right.plot(
            count,
            [row["same width in all, simulated"] for row in heads],
            "s--",
            label="mean, same width in all",
        )
        right.set(xlabel="heads", ylabel="relative error", xscale="log", ylim=(0, None))
        for name, mark in (("simulated", "o"), ("binomial", "-"), ("bound", "--")):
            values = [row[f"majority wrong, {name}"] for row in heads]
            shown = [value if value > 0 else math.nan for value in values]
            last.plot(count, shown, mark, label=f"majority, {name}")
        last.set(xlabel="heads", ylabel="share of wrong signs", xscale="log", yscale="log")
        for axes in (right, last):
            axes.set_xticks(count, [str(value) for value in count])
        for axes in (middle, right, last):
            axes.minorticks_off()
        for axes in (left, middle, right, last):
            axes.legend(fontsize=8)
    return figure
