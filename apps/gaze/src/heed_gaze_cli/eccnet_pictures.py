"""What is drawn of a search: the path, attention at each fixation, rings of the retina, a film."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from heed_gaze.eccnet.retina import RetinaConfig, Rings, rings_of
from heed_gaze.eccnet.search import CORNER, Step
from heed_gaze.plots import draw_heat_map, draw_picture, draw_scanpath
from heed_gaze.scanpaths import Scanpath, write_scanpaths
from heed_gaze_cli.eccnet_settings import SearchPrediction
from heed_runtime.report import new_figure, save_figure, style

MOST_PANELS = 8
FRAME_MS = 700
FILM_SIDE = 420
"""Longest side of the frames of a film, in pixels."""


def scanpath_of(prediction: SearchPrediction, *, until: int | None = None) -> Scanpath:
    """The fixations as a scanpath, x to the right."""
    scene = prediction.trial.scene
    box = None
    if scene.truth is not None:
        rows, columns = np.nonzero(scene.truth)
        box = (
            float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
        )  # fmt: skip
    return Scanpath(
        image=prediction.trial.path.name,
        subject="eccnet",
        xy_px=prediction.search.fixations[:until, ::-1].astype(np.float64),
        size_px=(scene.size[1], scene.size[0]),
        task=prediction.trial.task,
        target_box=box,
    )


def write_search(prediction: SearchPrediction, out: Path, *, gif: bool) -> list[Path]:
    """The fixations as csv, the path over the picture as png, the search as gif."""
    stem = out / prediction.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = scanpath_of(prediction)
    files = [write_scanpaths(stem.with_name(f"{stem.name}.csv"), [path])]
    with style():
        figure = new_figure(width_in=5.0, height_in=5.2)
        axes = figure.add_subplot()
        draw_scanpath(axes, path, picture=prediction.trial.scene.image)
        axes.set_title(title_of(prediction), fontsize=9)
    files.append(save_figure(figure, stem.with_name(f"{stem.name}.png")))
    if gif and prediction.search.steps:
        files.append(write_film(prediction, stem.with_name(f"{stem.name}.gif")))
    return files


def title_of(prediction: SearchPrediction) -> str:
    """What came of the search, in words."""
    found = prediction.search.found_at
    if prediction.trial.scene.truth is None:
        return f"{prediction.name}: {prediction.search.saccades} saccades"
    if found is None:
        return f"{prediction.name}: not found in {prediction.search.saccades} saccades"
    return f"{prediction.name}: found by saccade {found}"


def draw_steps(prediction: SearchPrediction, retina: RetinaConfig) -> Figure:
    """Attention, rings around the fixation and the path so far, a panel per decision."""
    steps = prediction.search.steps[:MOST_PANELS]
    scene = prediction.trial.scene
    columns = min(4, len(steps) + 1)
    lines = -(-(len(steps) + 1) // columns)
    size = (scene.size[1], scene.size[0])
    with style():
        figure = new_figure(width_in=3.2 * columns, height_in=3.4 * lines + 0.3)
        axes = figure.add_subplot(lines, columns, 1)
        draw_picture(axes, (scene.target.shape[1], scene.target.shape[0]), scene.target)
        axes.set_title("target")
        for number, step in enumerate(steps):
            axes = figure.add_subplot(lines, columns, number + 2)
            draw_heat_map(axes, contrast(step), size, picture=scene.image)
            draw_rings(axes, rings_in_window(retina, scene.size[0], 5), step.fixation, pool=5)
            _draw_move(axes, step)
            axes.set_title(f"saccade {number + 1}")
        left_out = len(prediction.search.steps) - len(steps)
        note = f" (the first {len(steps)} are shown)" if left_out else ""
        figure.suptitle(title_of(prediction) + note, fontsize=9)
    return figure


def contrast(step: Step) -> Float64[np.ndarray, "h w"]:
    """Attention from 0, what half of the allowed places have at most, to 1, the winner's."""
    low = float(np.median(step.values[step.allowed]))
    span = float(step.values.max()) - low
    return np.asarray(np.clip((step.values - low) / (span or 1.0), 0.0, 1.0))


def _draw_move(axes: Axes, step: Step) -> None:
    (row, column), (to_row, to_column) = step.fixation, step.winner
    axes.annotate(
        "",
        xy=(to_column, to_row),
        xytext=(column, row),
        arrowprops={"arrowstyle": "->", "color": "#56b4e9", "linewidth": 2},
    )
    axes.plot([column], [row], "o", color="#56b4e9", markersize=5)


def rings_in_window(retina: RetinaConfig, height: int, pool: int) -> Rings:
    """The rings of a pool in the window around a picture of this height."""
    side = 2 * (height + CORNER)
    for _ in range(pool - 1):
        side = (side + 1) // 2
    return rings_of(retina, pool, side)


def draw_rings(axes: Axes, rings: Rings, fixation: tuple[int, int], *, pool: int) -> None:
    """The borders of the rings of a pool, in pixels of the picture; cut by the picture's frame."""
    row, column = fixation
    for radius in rings.radii:
        circle = Circle(
            (column, row), radius * 2**pool, fill=False, color="#009e73", alpha=0.7, linewidth=0.7
        )
        axes.add_patch(circle)


def draw_retina(prediction: SearchPrediction, retina: RetinaConfig) -> Figure:
    """The rings around the first fixation, and windows against eccentricity, of pools 3 to 5."""
    scene = prediction.trial.scene
    fixation = tuple(int(at) for at in prediction.search.fixations[0])
    with style():
        figure = new_figure(width_in=8.4, height_in=4.2)
        axes = figure.add_subplot(1, 2, 1)
        draw_picture(axes, (scene.size[1], scene.size[0]), scene.image)
        draw_rings(
            axes, rings_in_window(retina, scene.size[0], 5), (fixation[0], fixation[1]), pool=5
        )
        axes.set_title("rings of pool 5")
        plot = figure.add_subplot(1, 2, 2)
        for pool in (3, 4, 5):
            rings = rings_in_window(retina, scene.size[0], pool)
            edges = np.array([0, *rings.radii, rings.outputs / 2])
            degrees = edges * 2**pool / retina.px_per_degree
            windows = np.array(rings.windows) * 2 ** (pool - 1) / retina.px_per_degree
            plot.stairs(windows, degrees, label=f"pool {pool}", baseline=None, linewidth=1.6)
        plot.set(xlabel="eccentricity (degrees)", ylabel="window (degrees)")
        plot.legend()
    return figure


def write_film(prediction: SearchPrediction, path: Path) -> Path:
    """An animated GIF: attention at each fixation, and where the eye goes."""
    frames = [
        _frame(prediction.trial.scene.image, step, prediction.search.fixations[: number + 1])
        for number, step in enumerate(prediction.search.steps)
    ]
    last = prediction.search.steps[-1]
    frames.append(_frame(prediction.trial.scene.image, last, prediction.search.fixations))
    pictures = [Image.fromarray(frame).convert("P") for frame in frames]
    durations = [FRAME_MS] * (len(pictures) - 1) + [2 * FRAME_MS]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
    )
    return path


def _frame(
    image: UInt8[np.ndarray, "h w 3"], step: Step, fixations: np.ndarray
) -> UInt8[np.ndarray, "fh fw 3"]:
    """Half picture, half attention, with marks of the path."""
    import cv2

    scale = min(FILM_SIDE / max(image.shape[:2]), 1.0)
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    values = contrast(step)
    heat = cv2.applyColorMap((255 * values).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    share = 0.65 * values[..., None]
    frame = (image * (1 - share) + heat * share).astype(np.uint8)
    frame = np.ascontiguousarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA))
    points: Sequence[tuple[int, int]] = [
        (round(float(column) * scale), round(float(row) * scale)) for row, column in fixations
    ]
    for start, end in itertools.pairwise(points):
        cv2.line(frame, start, end, (86, 180, 233), 2, cv2.LINE_AA)
    for point in points:
        cv2.circle(frame, point, 5, (86, 180, 233), -1, cv2.LINE_AA)
    cv2.circle(frame, points[-1], 9, (213, 94, 0), 2, cv2.LINE_AA)
    return frame
