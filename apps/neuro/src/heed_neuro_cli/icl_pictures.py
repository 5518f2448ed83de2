"""Pictures of in-context regression: circuits, training, error against length, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heed_neuro.icl.flow import Flow, Stages, find_stages
from heed_neuro.icl.patterns import Pattern
from heed_runtime.report import COLOURS, new_figure, style

NAMES = {
    "zero": "predict 0",
    "vanilla_gd": "GD step",
    "debiased_gd": "debiased GD step",
    "preconditioned": "preconditioned step",
    "debiased_preconditioned": "debiased preconditioned step",
    "two_head": "two heads (theory)",
    "one_head": "best one head",
    "linear_attention": "linear attention (theory)",
    "ridge": "ridge (Bayes)",
    "model": "model",
}
"""Of predictors, in legends."""


def draw_circuits(pattern: Pattern) -> Figure:
    """KQ above, OV below, a column per head, on one colour scale each.

    The columns of the query's y, which is 0, have no effect: training leaves them as they began.
    """
    heads, width = pattern.kq.shape[0], pattern.kq.shape[1]
    outputs = width - pattern.dim
    names = [f"x{k + 1}" for k in range(pattern.dim)]
    names += ["y"] if outputs == 1 else [f"y{k + 1}" for k in range(outputs)]
    with style():
        figure = new_figure(width_in=max(4.6, 2.3 * heads + 1.0), height_in=3.9)
        axes = figure.subplots(2, heads, squeeze=False, height_ratios=[width, max(1.4, outputs)])
        for row, matrices, rows in ((0, pattern.kq, names), (1, pattern.ov, names[pattern.dim :])):
            most = float(np.abs(matrices).max()) or 1.0
            for head in range(heads):
                panel = axes[row][head]
                image = panel.imshow(matrices[head], cmap="RdBu_r", vmin=-most, vmax=most)
                panel.set_xticks(range(width), names, fontsize=8)
                panel.set_yticks(range(len(rows)), rows, fontsize=8)
                panel.grid(visible=False)
            figure.colorbar(image, ax=list(axes[row]), shrink=0.9)
        for head in range(heads):
            axes[0][head].set_title(
                f"head {head + 1}: $\\omega$ {pattern.omega[head]:+.3f}, "
                f"$\\mu$ {pattern.mu[head]:+.2f}",
                fontsize=9,
            )
            axes[0][head].set_xlabel("query (its y is 0)", fontsize=8)
        axes[0][0].set_ylabel("KQ: key")
        axes[1][0].set_ylabel("OV: out")
    return figure


def draw_dynamics(trained: Flow, theory: Flow | None) -> Figure:
    """Omega and mu of each head against the step, and where the two stages end.

    Args:
        trained: What the training went through.
        theory: The gradient flow of the approximate loss from the same start, on a time of its own.
    """
    panels = 1 if theory is None else 2
    with style():
        figure = new_figure(width_in=5.2 * panels, height_in=5.2)
        axes = figure.subplots(2, panels, squeeze=False, sharex="col")
        _course(list(axes[:, 0]), trained, "training")
        if theory is not None:
            _course(list(axes[:, 1]), theory, "gradient flow of the approximate loss")
    return figure


def _course(axes: Sequence[Axes], flow: Flow, title: str) -> None:
    steps = np.maximum(flow.steps, 0.7)
    for panel, values, name in zip(axes, (flow.omega, flow.mu), ("omega", "mu"), strict=True):
        for head in range(values.shape[1]):
            colour = COLOURS[head % len(COLOURS)]
            panel.plot(steps, values[:, head], color=colour, label=f"head {head + 1}")
        if values.shape[1] > 1 and name == "mu":
            panel.plot(steps, values.sum(1), color="0.4", linestyle="--", label="sum")
        panel.set(xscale="log", ylabel=f"$\\{name}$")
        panel.axhline(0.0, color="0.7", linewidth=0.8)
    if flow.omega.shape[1] > 1:
        for step, what in _endings(find_stages(flow)):
            for panel in axes:
                panel.axvline(max(step, 0.7), color="0.5", linestyle=":")
            axes[0].annotate(
                what, (max(step, 0.7), 1.0), xycoords=("data", "axes fraction"),
                xytext=(-3, -3), textcoords="offset points", rotation=90, va="top", ha="right",
                fontsize=8,
            )  # fmt: skip
    axes[0].set_title(title)
    axes[1].set_xlabel("step")
    axes[1].legend(fontsize=8, loc="upper left")


def _endings(stages: Stages) -> list[tuple[int, str]]:
    """Where stages end, and what stands there."""
    if stages.first is not None and stages.first == stages.second:
        return [(stages.first, "stages I and II end")]
    named = ((stages.first, "stage I ends"), (stages.second, "stage II ends"))
    return [(step, what) for step, what in named if step is not None]


def draw_lengths(risks: Mapping[str, Mapping[int, tuple[float, float]]], *, trained: int) -> Figure:
    """The risk of each predictor against the length of the context, with error bars of 2 s.e."""
    own_colours = {"model": "black", "zero": "0.6"}  # the palette has six others
    with style():
        figure = new_figure(width_in=6.8, height_in=4.4)
        axes = figure.add_subplot()
        for index, (name, found) in enumerate(risks.items()):
            lengths = sorted(found)
            means = np.array([found[length][0] for length in lengths])
            errors = np.array([2 * found[length][1] for length in lengths])
            is_model = name == "model"
            axes.errorbar(
                lengths,
                means,
                yerr=errors,
                label=NAMES.get(name, name),
                color=own_colours.get(name, COLOURS[index % (len(COLOURS) - 1)]),
                linewidth=2.4 if is_model else 1.2,
                marker="o" if is_model else ".",
                linestyle="-" if is_model else "--",
                zorder=3 if is_model else 2,
            )
        axes.axvline(trained, color="0.6", linestyle=":")
        axes.annotate(
            "trained here", (trained, 0.99), xycoords=("data", "axes fraction"),
            xytext=(-3, 0), textcoords="offset points", rotation=90, va="top", ha="right",
            fontsize=8, color="0.4",
        )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="examples in the context, L",
            ylabel="mean squared error",
        )  # fmt: skip
        ticks = sorted({length for found in risks.values() for length in found})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        low, high = axes.get_ylim()
        marks = [m for m in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= m <= high]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axes.minorticks_off()
        figure.legend(fontsize=8, loc="outside right upper")
    return figure


def draw_attention(
    weights: Float[np.ndarray, "h l"], scores: Float[np.ndarray, " l"], y: Float[np.ndarray, " l"]
) -> Figure:
    """The weight of each example of a context, by head, against its product with the query."""
    with style():
        figure = new_figure(width_in=6.8, height_in=3.6)
        left, right = figure.subplots(1, 2)
        order = np.argsort(scores)
        for head, row in enumerate(weights):
            colour = COLOURS[head % len(COLOURS)]
            left.plot(scores[order], row[order], ".-", color=colour, label=f"head {head + 1}")
        left.axhline(1 / len(y), color="0.6", linestyle=":", label="1 / L")
        left.set(xlabel="$x_l \\cdot x_q$", ylabel="attention weight")
        left.legend(fontsize=8)
        right.scatter(scores, y, s=14, color=COLOURS[2])
        right.set(xlabel="$x_l \\cdot x_q$", ylabel="$y_l$")
    return figure


def flow_of(rows: Sequence[Mapping[str, Any]], heads: int) -> Flow | None:
    """The course of a training from the rows of cases."""
    steps = sorted({int(row["step"]) for row in rows})
    if len(steps) < 2:
        return None
    omega, mu = np.zeros((len(steps), heads)), np.zeros((len(steps), heads))
    for row in rows:
        index = steps.index(int(row["step"]))
        omega[index, int(row["head"])] = row["omega"]
        mu[index, int(row["head"])] = row["mu"]
    return Flow(steps=np.array(steps), omega=omega, mu=mu, loss=np.zeros(len(steps)))
