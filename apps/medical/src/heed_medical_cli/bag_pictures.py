"""Pictures of slides as bags: attention over the slide, its concentration, curves of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from heed_medical.bags.heatmap import lay_out
from heed_medical.bags.metrics import concentration, roc_auc
from heed_medical.bags.prediction import BagPrediction
from heed_runtime.recipe import Row
from heed_runtime.report import new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Thumbnail = tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]
"""The picture of a slide, and width and height of the full slide."""
CLIP_QUANTILE = 0.995
"""Values above this quantile of the patches share the brightest colour."""
LEAST_TOP = 2.0
"""The reddest colour is at least this many times even attention: nearly even attention is grey."""
OPACITY = 0.55
PANEL_IN = 6.0
BAR_IN = 0.8
BRANCHES_IN_ROW = 5
LUMINANCE = (0.299, 0.587, 0.114)


def draw_heatmaps(
    prediction: BagPrediction, thumbnail: Thumbnail | None, classes: Sequence[str]
) -> Figure:
    """The slide and the attention of all branches together, and below it that of each branch.

    Colours give the attention of a patch as a multiple of even attention, n times its weight, which
    is the released code's 100 n times it in readable units: grey is 1, no preference, blue is less
    and red more. Under a map the slide is grey, so that no colour is the
    stain's.
    """
    attention = prediction.attention
    several = len(attention) > 1
    columns = max(BRANCHES_IN_ROW, 1) if several else 1
    rows = -(-len(attention) // columns) if several else 0
    large = 1 + (thumbnail is not None)
    width = PANEL_IN * large
    small = width / columns
    height = PANEL_IN + small * rows
    top = max(_top(values * len(values)) for values in (prediction.mean_attention, *attention))
    with style():
        figure = new_figure(width_in=width + BAR_IN, height_in=height)
        parts = figure.subfigures(
            1 + several, 1, height_ratios=[PANEL_IN, small * rows][: 1 + several], squeeze=False
        ).flat
        upper = list(parts[0].subplots(1, large, squeeze=False).flat)
        if thumbnail is not None:
            _draw_slide(upper[0], thumbnail)
            upper[0].set_title(prediction.name)
        overlay = _draw_map(upper[-1], prediction, prediction.mean_attention, thumbnail, top=top)
        upper[-1].set_title(_verdict(prediction, classes))
        lower = list(parts[1].subplots(rows, columns, squeeze=False).flat) if several else []
        for number, (axes, values) in enumerate(zip(lower, attention, strict=False), start=1):
            _draw_map(axes, prediction, values, thumbnail, top=top)
            axes.set_title(f"branch {number}", fontsize=8)
        for axes in (*upper, *lower):
            axes.set_axis_off()
        bar = parts[0].colorbar(overlay, ax=upper, fraction=0.03, pad=0.01)
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


def draw_mean_concentration(curve: Sequence[Row]) -> Figure:
    """The share of the attention that the k most attended patches hold, over all slides.

    Args:
        curve: Rows of the table `concentration` of `evaluate`.
    """
    columns = {name: [float(row[name] or 0.0) for row in curve] for name in curve[0]}
    counts = columns["most attended patches"]
    with style():
        figure = new_figure(width_in=4.4, height_in=3.2)
        axes = figure.add_subplot()
        axes.fill_between(
            counts, columns["low quartile"], columns["high quartile"],
            color="0.8", label="middle half of the slides",
        )  # fmt: skip
        axes.plot(counts, columns["mean share"], color="black", marker=".", label="mean")
        axes.plot(
            counts, columns["even attention"], color="0.6", linestyle=":", label="even attention"
        )
        axes.set(xscale="log", xlabel="most attended patches", ylabel="share of the attention")
        axes.set(ylim=(0, 1.02), title="Concentration over the slides")
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
    return max(float(np.quantile(values, CLIP_QUANTILE)), LEAST_TOP)


def _draw_slide(axes: Axes, thumbnail: Thumbnail) -> None:
    picture, (width, height) = thumbnail
    axes.imshow(picture, extent=(0, width, height, 0), aspect="equal")


def _draw_map(
    axes: Axes,
    prediction: BagPrediction,
    values: Float[np.ndarray, " n"],
    thumbnail: Thumbnail | None,
    *,
    top: float,
) -> AxesImage:
    """Attention over the slide in grey."""
    from matplotlib.colors import TwoSlopeNorm

    assert prediction.coords is not None
    assert prediction.patch_size is not None
    heatmap = lay_out(prediction.coords, values * len(values), patch_size=prediction.patch_size)
    if thumbnail is not None:
        picture, size = thumbnail
        grey = (picture @ LUMINANCE).astype(np.uint8)
        _draw_slide(axes, (np.repeat(grey[..., None], 3, axis=2), size))
    overlay = axes.imshow(
        heatmap.values,
        extent=heatmap.extent,
        cmap="coolwarm",
        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top),
        alpha=OPACITY if thumbnail is not None else 1.0,
        interpolation="nearest",
        aspect="equal",
    )
    if thumbnail is not None:
        width, height = thumbnail[1]
        axes.set(xlim=(0, width), ylim=(height, 0))
    return overlay
