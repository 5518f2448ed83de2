"""Pictures of slides as bags: attention over the slide, its concentration, curves of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64, UInt8

from heed_medical.bags.heatmap import Heatmap, lay_out
from heed_medical.bags.metrics import concentration, roc_auc
from heed_medical.bags.prediction import BagPrediction
from heed_runtime.report import new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Thumbnail = tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]
"""The picture of a slide, and width and height of the full slide."""
CLIP_QUANTILE = 0.995
"""Values above this quantile of the patches share the brightest colour."""
PANEL_IN = 3.0


def draw_heatmaps(
    prediction: BagPrediction, thumbnail: Thumbnail | None, classes: Sequence[str]
) -> Figure:
    """The slide, the attention of all branches together, and of each branch.

    Colours give the attention of a patch as a multiple of even attention: 1 is no preference.
    """
    assert prediction.coords is not None
    assert prediction.patch_size is not None
    attention = [prediction.mean_attention]
    titles = [_verdict(prediction, classes)]
    if len(prediction.attention) > 1:
        attention += list(prediction.attention)
        titles += [f"branch {t + 1}" for t in range(len(prediction.attention))]
    maps = [
        lay_out(prediction.coords, values * len(values), patch_size=prediction.patch_size)
        for values in attention
    ]
    panels = len(maps) + (thumbnail is not None)
    columns = min(4, panels)
    rows = -(-panels // columns)
    with style():
        figure = new_figure(width_in=PANEL_IN * columns, height_in=PANEL_IN * rows)
        everywhere = list(figure.subplots(rows, columns, squeeze=False).flat)
        grid = list(everywhere)
        for axes in grid:
            axes.set_axis_off()
        if thumbnail is not None:
            axes = grid.pop(0)
            _draw_slide(axes, thumbnail)
            axes.set_title(prediction.name, fontsize=8)
        top = max(_top(values * len(values)) for values in attention)
        for axes, heatmap, title in zip(grid, maps, titles, strict=False):
            overlay = _draw_map(axes, heatmap, thumbnail, top=top)
            axes.set_title(title, fontsize=8)
        bar = figure.colorbar(overlay, ax=everywhere, fraction=0.03, pad=0.01)
        bar.set_label("times even attention")
    return figure


def draw_concentration(prediction: BagPrediction) -> Figure:
    """Share of the attention that the k most attended patches hold."""
    with style():
        figure = new_figure(width_in=4.4, height_in=3.2)
        axes = figure.add_subplot()
        count = prediction.attention.shape[1]
        ranks = np.arange(1, count + 1)
        if len(prediction.attention) > 1:
            for number, row in enumerate(prediction.attention, start=1):
                axes.plot(ranks, concentration(row), linewidth=0.8, label=f"branch {number}")
        mean = concentration(prediction.mean_attention)
        axes.plot(ranks, mean, color="black", label="slide")
        axes.plot(ranks, ranks / count, color="0.6", linestyle=":", label="even attention")
        axes.set(xscale="log", xlabel="most attended patches", ylabel="share of the attention")
        axes.set_title(f"{prediction.name}: the top 10 hold {mean[min(10, count) - 1]:.0%}")
        axes.legend(fontsize=7)
    return figure


def draw_roc(
    probabilities: np.ndarray, labels: Int64[np.ndarray, " n"], classes: Sequence[str]
) -> Figure:
    """ROC curves, each class against the rest; with two classes that of the second."""
    with style():
        figure = new_figure(width_in=4.0, height_in=3.8)
        axes = figure.add_subplot()
        for number in range(1 if len(classes) == 2 else 0, len(classes)):
            positive = labels == number
            if positive.all() or not positive.any():
                continue
            order = np.argsort(-probabilities[:, number], kind="stable")
            edges = np.flatnonzero(np.diff(probabilities[order, number], append=-1.0))
            hits = np.cumsum(positive[order])[edges] / positive.sum()
            alarms = np.cumsum(~positive[order])[edges] / (~positive).sum()
            auc = roc_auc(probabilities[:, number], positive)
            axes.plot([0, *alarms], [0, *hits], label=f"{classes[number]} (AUC {auc:.3f})")
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
        axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        if len(axes.get_lines()) > 1:
            axes.legend(fontsize=7, loc="lower right")
    return figure


def draw_confusion(counts: Int64[np.ndarray, "k k"], classes: Sequence[str]) -> Figure:
    """Rows are labels, columns predictions."""
    with style():
        figure = new_figure(width_in=1.6 + 0.7 * len(classes), height_in=1.4 + 0.6 * len(classes))
        axes = figure.add_subplot()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
        ticks: Any = range(len(classes))
        axes.set(xlabel="predicted", ylabel="label")
        axes.set_xticks(ticks, classes, rotation=30, ha="right")
        axes.set_yticks(ticks, classes)
        axes.grid(visible=False)
    return figure


def _verdict(prediction: BagPrediction, classes: Sequence[str]) -> str:
    best = int(np.argmax(prediction.probabilities))
    return f"called {classes[best]} ({prediction.probabilities[best]:.2f})"


def _top(values: np.ndarray) -> float:
    return max(float(np.quantile(values, CLIP_QUANTILE)), 1.0)


def _draw_slide(axes: Axes, thumbnail: Thumbnail) -> None:
    picture, (width, height) = thumbnail
    axes.imshow(picture, extent=(0, width, height, 0), aspect="equal")


def _draw_map(
    axes: Axes, heatmap: Heatmap, thumbnail: Thumbnail | None, *, top: float
) -> AxesImage:
    if thumbnail is not None:
        _draw_slide(axes, thumbnail)
    overlay = axes.imshow(
        heatmap.values,
        extent=heatmap.extent,
        cmap="inferno",
        vmin=0.0,
        vmax=top,
        alpha=0.6 if thumbnail is not None else 1.0,
        interpolation="nearest",
        aspect="equal",
    )
    if thumbnail is not None:
        width, height = thumbnail[1]
        axes.set(xlim=(0, width), ylim=(height, 0))
    return overlay
