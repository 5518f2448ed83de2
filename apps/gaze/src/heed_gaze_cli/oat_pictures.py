"""Pictures of OAT: scanpaths over shelves, and what each step attended to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heed_gaze.oat.shelves import Layout
from heed_gaze.plots import TARGET_COLOUR, draw_picture, draw_scanpath
from heed_runtime.report import new_figure, style

_MOST_STEPS = 12
_STRONGEST = 0.8  # opacity of the strongest object


def _size_in(layout: Layout, width: float) -> tuple[float, float]:
    return width, max(1.2, width * layout.size_px[1] / layout.size_px[0])


def draw_path(
    layout: Layout,
    picture: UInt8[np.ndarray, "h w 3"],
    paths: Sequence[Sequence[int]],
    *,
    target: int,
    title: str,
) -> Figure:
    """The first path, numbered, over the shelf; below it how often all visit each object."""
    width, height = _size_in(layout, 7.0)
    several = len(paths) > 1
    with style():
        figure = new_figure(width_in=width, height_in=(height + 0.4) * (1 + several))
        axes = figure.add_subplot(1 + several, 1, 1)
        draw_scanpath(
            axes, layout.scanpath(paths[0], subject="oat", target=target), picture=picture
        )
        axes.set_title(title)
        if several:
            below = figure.add_subplot(2, 1, 2)
            visits = np.mean([np.isin(np.arange(len(layout)), path) for path in paths], axis=0)
            draw_picture(below, layout.size_px, picture)
            _shade(below, layout, visits)
            mark_target(below, layout, target)
            below.set_title(f"share of {len(paths)} paths that visit each object")
    return figure


def draw_steps(
    layout: Layout,
    picture: UInt8[np.ndarray, "h w 3"],
    weights: Float[np.ndarray, "steps n"],
    stop: Float[np.ndarray, " steps"],
    path: Sequence[int],
    *,
    target: int,
    title: str,
) -> Figure:
    """A panel per step: the weight of every object, and the path so far.

    Args:
        layout: Of the shelf.
        picture: Of the shelf.
        weights: Of the objects at each step.
        stop: Weight of the target's token at each step, which is that of stopping.
        path: Objects chosen at the steps; a last step without one is the choice to stop.
        target: -1: none.
        title: Of the whole.
    """
    shown = min(len(weights), _MOST_STEPS)
    columns = min(3, shown)
    lines = math.ceil(shown / columns)
    width, height = _size_in(layout, 3.6)
    with style():
        figure = new_figure(width_in=width * columns, height_in=(height + 0.45) * lines + 0.4)
        for step in range(shown):
            axes = figure.add_subplot(lines, columns, step + 1)
            draw_picture(axes, layout.size_px, picture)
            _shade(axes, layout, weights[step])
            mark_target(axes, layout, target)
            _draw_history(axes, layout, path[: step + 1])
            chosen = f"object {path[step]}" if step < len(path) else "stop"
            axes.set_title(f"{step + 1}: {chosen}, p(stop) {stop[step]:.2f}", fontsize=8)
        rest = len(weights) - shown
        figure.suptitle(title if rest <= 0 else f"{title} (first {shown} of {len(weights)} steps)")
    return figure


def mark_target(axes: Axes, layout: Layout, target: int) -> None:
    """Frame the target, if there is one."""
    from matplotlib.patches import Rectangle

    if target < 0:
        return
    x0, y0, x1, y1 = layout.boxes[target].tolist()
    axes.add_patch(
        Rectangle(
            (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=TARGET_COLOUR, linewidth=2, zorder=4
        )
    )


def _shade(axes: Axes, layout: Layout, weights: Float[np.ndarray, " n"]) -> None:
    """Darken the objects that got nothing; what got most stays as it is, with its number on it."""
    from matplotlib.patches import Rectangle

    top = max(float(weights.max()), 1e-9)
    for (x0, y0, x1, y1), weight in zip(layout.boxes.tolist(), weights.tolist(), strict=True):
        axes.add_patch(
            Rectangle(
                (x0, y0), x1 - x0, y1 - y0, facecolor="black", edgecolor="none",
                alpha=_STRONGEST * (1 - weight / top), zorder=2,
            )
        )  # fmt: skip
        if weight > 0.1 * top and weight > 0.01:
            axes.text(
                (x0 + x1) / 2, y1 - 0.08 * (y1 - y0), f"{100 * weight:.0f}", ha="center",
                va="bottom", fontsize=6, color="white", zorder=6,
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.8, "edgecolor": "none"},
            )  # fmt: skip


def _draw_history(axes: Axes, layout: Layout, path: Sequence[int]) -> None:
    from heed_gaze.plots import PATH_COLOUR

    x, y = layout.centres_px[np.asarray(path, dtype=np.int64)].T
    axes.plot(x, y, color=PATH_COLOUR, linewidth=1.2, alpha=0.9, zorder=5)
    axes.plot(x[-1:], y[-1:], "o", color=PATH_COLOUR, markeredgecolor="black", zorder=6)
