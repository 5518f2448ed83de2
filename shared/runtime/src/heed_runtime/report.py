"""Tables as csv and JSON, figures as PNG, in one legible style."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from heed_runtime.files import atomic_write, write_csv
from heed_runtime.recipe import Table

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def style() -> Iterator[None]:
    """The look of every picture. Draw inside it; it changes no global setting.

    Example:
        >>> with style():
        ...     figure = new_figure()
    """
    import matplotlib as mpl
    from cycler import cycler

    with mpl.rc_context(
        {
            "figure.dpi": 120,
            "savefig.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.prop_cycle": cycler(color=COLOURS),
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    ):
        yield


def new_figure(*, width_in: float = 6.4, height_in: float = 4.0) -> Figure:
    """An empty figure that belongs to no window and is freed with its last reference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure | UInt8[np.ndarray, "height width 3"], path: Path) -> Path:
    """Write a figure or a picture as PNG, as a whole or not at all."""
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    with atomic_write(path) as temporary:
        if isinstance(figure, Figure):
            figure.savefig(temporary, format="png")
        else:
            imsave(temporary, figure, format="png")
    return path


def save_table(table: Table, folder: Path) -> Path:
    """Write a table as `<its title>.csv` into `folder`."""
    return write_csv(folder / f"{slug(table.title)}.csv", table.rows)


def slug(title: str) -> str:
    """A title as a file's stem.

    Example:
        >>> slug("Dice, per organ (%)")
        'dice-per-organ'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "table"


def curves(
    rows: Sequence[Mapping[str, float | None]], *, monitor: tuple[str, str] | None = None
) -> Figure:
    """Draw the columns of `metrics.csv` against the epoch, a panel per quantity.

    Columns that differ only in a leading `train/`, `val/` or `test/` share a panel.

    Args:
        rows: A row per epoch with the column `epoch`; None is a missing value.
        monitor: Name and direction ("max" or "min") of the metric whose best epoch is marked.
    """
    from matplotlib.ticker import MaxNLocator

    panels = _panels(rows)
    columns = min(2, len(panels)) or 1
    lines = math.ceil(len(panels) / columns) or 1
    with style():
        figure = new_figure(width_in=5.2 * columns, height_in=3.2 * lines)
        for index, (title, names) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, index + 1)
            for number, name in enumerate(names):
                points = _points(rows, name)
                axes.plot(
                    [epoch for epoch, _ in points],
                    [value for _, value in points],
                    label=name,
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4 if len(points) < 40 else 0,
                )
            axes.set(xlabel="epoch", ylabel=title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if monitor is not None and monitor[0] in names:
                _mark_best(axes, rows, monitor)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
    return figure


def _panels(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[str]]:
    names = dict.fromkeys(key for row in rows for key in row if key not in ("epoch", "step"))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(re.sub("^(train|val|test)[/_]", "", name), []).append(name)
    return panels


def _mark_best(
    axes: Axes, rows: Sequence[Mapping[str, float | None]], monitor: tuple[str, str]
) -> None:
    pick = max if monitor[1] == "max" else min
    if points := _points(rows, monitor[0]):
        epoch, value = pick(points, key=lambda point: point[1])
        axes.axvline(epoch, color="0.5", linestyle=":", label=f"best: {value:.4g}")


def _points(rows: Sequence[Mapping[str, float | None]], name: str) -> list[tuple[float, float]]:
    """(epoch, value) where there is a finite value."""
    pairs = ((row.get("epoch"), row.get(name)) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None and math.isfinite(y)]
