"""Pictures that the medical recipes draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heed_medical_cli.attention_maps import SliceMaps
from heed_runtime.recipe import Row

CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Of the foreground classes in turn; they can be told apart by the colour-blind."""


def draw_attention(maps: SliceMaps, names: Sequence[str]) -> Figure:
    """A slice with its prediction, and the attention of every scale over it."""
    rows = [("refined attention map", maps.guided, "strength")]
    if maps.position:
        rows.append(("looked at by the foreground", maps.position, "times even attention"))
    columns = 1 + len(maps.guided)
    height, width = maps.image.shape
    panel = 2.3
    figure = Figure(
        figsize=(panel * columns * 1.18, (panel * height / width + 0.45) * len(rows) + 0.4),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, (title, scale_maps, unit) in enumerate(rows):
        _draw_slice(grid[row][0], maps, names, outline=row == 0)
        for axes, (scale, values) in zip(grid[row][1:], scale_maps.items(), strict=True):
            axes.imshow(maps.image, cmap="gray")
            overlay = axes.imshow(values, cmap="inferno", alpha=0.6)
            axes.set_title(f"{title}\nscale {scale}", fontsize=8)
            bar = figure.colorbar(overlay, ax=axes, fraction=0.046, pad=0.02)
            bar.set_label(unit, fontsize=7)
            bar.ax.tick_params(labelsize=6)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def _draw_slice(axes: Axes, maps: SliceMaps, names: Sequence[str], *, outline: bool) -> None:
    axes.imshow(maps.image, cmap="gray")
    axes.set_title(f"slice {maps.index}\n{'prediction' if outline else 'image'}", fontsize=8)
    if not outline:
        return
    for number in range(1, len(names)):
        mask = maps.labels == number
        if mask.any() and not mask.all():
            colour = CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.2)
            axes.plot([], [], color=colour, label=names[number])
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=6, loc="lower left", framealpha=0.6)


def draw_scores(rows: Sequence[Row], score: str, label: str) -> Figure:
    """The score of every case, class by class, with its quartiles."""
    classes = list(dict.fromkeys(str(row["class"]) for row in rows))
    values = [
        [float(value) for row in rows if row["class"] == name and (value := row[score]) is not None]
        for name in classes
    ]
    figure = Figure(figsize=(1.6 + 1.1 * len(classes), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(values, tick_labels=classes, showfliers=False, widths=0.5)
    jitter = np.random.default_rng(0)
    for place, column in enumerate(values, start=1):
        axes.plot(
            place + jitter.uniform(-0.12, 0.12, len(column)),
            column,
            "o",
            color=CLASS_COLOURS[(place - 1) % len(CLASS_COLOURS)],
            markersize=4,
            alpha=0.7,
        )
    axes.set_ylabel(label)
    axes.set_title(f"{label} of {len(values[0]) if values else 0} cases")
    axes.grid(axis="y", alpha=0.3)
    return figure
