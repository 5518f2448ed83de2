"""Pictures of the brain encoder: regions, ceilings, where queries look, flat maps."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from heed_runtime.recipe import Row
from heed_runtime.report import COLOURS, new_figure, style

logger = logging.getLogger(__name__)

MOST_QUERIES = 12
"""Maps that one picture shows."""


def draw_regions(rows: Sequence[Row]) -> Figure:
    """Mean r of each region with its 95 % interval, and the encoding accuracy."""
    alone = len({row["group"] for row in rows}) == 1
    named = [str(row["region"]) if alone else f"{row['group']} {row['region']}" for row in rows]
    values = [_number(row["r"]) for row in rows]
    low = [v - _number(row["r_low"]) for v, row in zip(values, rows, strict=True)]
    high = [_number(row["r_high"]) - v for v, row in zip(values, rows, strict=True)]
    places = np.arange(len(rows))[::-1]
    with style():
        figure = new_figure(height_in=max(2.5, 0.24 * len(rows) + 1.2))
        axes = figure.add_subplot()
        axes.errorbar(
            values, places, xerr=np.clip(np.nan_to_num([low, high]), 0, None), fmt="o",
            color=COLOURS[0], label="r, mean over vertices (95 %)",
        )  # fmt: skip
        accuracies = [_number(row["accuracy"]) for row in rows]
        if np.isfinite(accuracies).any():
            axes.plot(accuracies, places, "D", color=COLOURS[1], label="encoding accuracy")
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_yticks(places, named)
        axes.set(xlabel="r, accuracy", ylim=(-0.7, len(rows) - 0.3))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def draw_ceiling(rows: Sequence[Row]) -> Figure:
    """r^2 of each vertex (0 where r is negative) against its noise ceiling."""
    points = [
        (_number(row["ceiling"]), max(_number(row["r"]), 0.0) ** 2)
        for row in rows
        if row["ceiling"] is not None and row["r"] is not None
    ]
    x, y = np.array(points).T if points else (np.zeros(0), np.zeros(0))
    with style():
        figure = new_figure(width_in=4.4)
        axes = figure.add_subplot()
        if len(x) > 2000:
            drawn = axes.hexbin(x, y, gridsize=50, mincnt=1, bins="log", cmap="viridis")
            figure.colorbar(drawn, label="vertices")
        else:
            axes.plot(x, y, "o", color=COLOURS[0], markersize=4)
        axes.plot([0, 1], [0, 1], color="0.4", linewidth=0.8)
        axes.set(xlabel="noise ceiling", ylabel="r squared (0 where r < 0)")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure


def draw_surfaces(rows: Sequence[Row]) -> dict[str, Figure]:
    """Flat maps of r, where the vertices' places on fsaverage and nilearn are there."""
    placed = [row for row in rows if row["surface"] is not None]
    if placed and importlib.util.find_spec("nilearn") is None:
        logger.warning("no flat maps: they need nilearn (pip install 'heed-neuro[brains]')")
        return {}
    from heed_neuro.brain_encoder.surface import COARSE, draw_surface

    found = {}
    for group in ("lh", "rh"):
        own = [row for row in placed if row["group"] == group]
        values = np.array([_number(row["r"]) for row in own])
        index = np.array([int(_number(row["surface"])) for row in own])
        if np.isfinite(values[index < COARSE]).any():
            found[f"flat-{group}"] = draw_surface(
                values, index, hemisphere=group, title=f"r, {group}"
            )
        elif own:
            logger.warning("no flat map of %s: none of its vertices is on fsaverage5", group)
    return found


def draw_maps(picture: np.ndarray, maps: np.ndarray, names: Sequence[str]) -> Figure:
    """Where each query looks, over the image.

    Args:
        picture: The image, (rows, columns, 3), 0 to 1.
        maps: A map per query at the size of the image.
        names: Of the queries.
    """
    shown = min(len(maps), MOST_QUERIES)
    columns = min(4, shown + 1)
    lines = -(-(shown + 1) // columns)
    with style():
        figure = new_figure(width_in=2.2 * columns, height_in=2.4 * lines)
        axes = figure.add_subplot(lines, columns, 1)
        axes.imshow(picture)
        axes.set_title("image")
        axes.set_axis_off()
        for place in range(shown):
            axes = figure.add_subplot(lines, columns, place + 2)
            axes.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
            axes.imshow(maps[place], cmap="inferno", alpha=0.6, vmin=0)
            axes.set_title(names[place])
            axes.set_axis_off()
    return figure


def draw_mean_maps(maps: np.ndarray, names: Sequence[str]) -> Figure:
    """The mean map of each query over all images."""
    columns = min(5, len(maps))
    lines = -(-len(maps) // columns)
    with style():
        figure = new_figure(width_in=max(3.0, 1.8 * columns), height_in=2.0 * lines)
        for place, (own, name) in enumerate(zip(maps, names, strict=True)):
            axes = figure.add_subplot(lines, columns, place + 1)
            axes.imshow(own, cmap="inferno", vmin=0)
            axes.set_title(name, fontsize=8)
            axes.set_axis_off()
    return figure


def draw_similarity(similarity: np.ndarray, names: Sequence[str]) -> Figure:
    """Cosine of each pair of queries."""
    size = max(3.6, 0.16 * len(names) + 2.0)
    with style():
        figure = new_figure(width_in=size + 0.8, height_in=size)
        axes = figure.add_subplot()
        drawn = axes.imshow(similarity, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.grid(visible=False)
        figure.colorbar(drawn, label="cosine of the queries")
    return figure


def draw_bars(
    values: dict[str, float],
    *,
    label: str,
    spans: dict[str, tuple[float, float]] | None = None,
    band: tuple[float, float] | None = None,
) -> Figure:
    """Named values as bars, with intervals and a band of what is possible."""
    names = list(values)
    with style():
        figure = new_figure(height_in=max(2.4, 0.3 * len(names) + 1.2))
        axes = figure.add_subplot()
        places = np.arange(len(names))[::-1]
        axes.barh(places, list(values.values()), color=COLOURS[0])
        if spans:
            centre = np.array([values[name] for name in names])
            edges = np.array([spans[name] for name in names]).T
            errors = np.clip([centre - edges[0], edges[1] - centre], 0, None)
            axes.errorbar(centre, places, xerr=errors, fmt="none", color="0.2")
        if band:
            axes.axvspan(*band, color="0.85", label="noise ceiling", zorder=0)
            axes.legend()
        axes.set_yticks(places, names)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_xlabel(label)
    return figure


def picture_of(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image as numbers from 0 to 1."""
    from heed_neuro.brain_encoder.backbones import read_image

    image = read_image(path)
    if size is not None:
        image = image.resize((size[1], size[0]))
    return np.asarray(image, dtype=np.float32) / 255.0


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
