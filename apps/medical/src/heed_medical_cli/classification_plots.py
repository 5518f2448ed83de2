"""Plots of classifiers: ROC, precision and recall, calibration, confusion; maps over a picture."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from heed_medical.classification.metrics import (
    Predictions,
    average_precision,
    calibration,
    confusion,
    precision_recall,
    roc_auc,
    roc_curve,
)
from heed_medical.medusa.maps import PictureMaps, enlarge
from heed_runtime.report import new_figure, style

PANEL_WIDTH = 256
"""Small pictures are enlarged to about this many pixels."""
HEADING = 18
"""Height of a line of text in pixels."""


def draw_plots(found: Predictions) -> dict[str, Figure]:
    """All plots by name; a curve of a class without positive or negative cases is left out."""
    with style():
        return {
            "roc": _draw_roc(found),
            "precision-recall": _draw_precision_recall(found),
            "calibration": _draw_calibration(found),
            "confusion": _draw_confusion(found),
        }


def _shown(found: Predictions) -> list[int]:
    """The classes with a curve: the second of two, all of several."""
    numbers = [1] if len(found.names) == 2 else range(len(found.names))
    return [k for k in numbers if 0 < (found.labels == k).sum() < len(found.labels)]


def _draw_roc(found: Predictions) -> Figure:
    figure = new_figure(width_in=4.6, height_in=4.4)
    axes = figure.add_subplot()
    for k in _shown(found):
        scores, positive = found.probabilities[:, k], found.labels == k
        curve = roc_curve(scores, positive)
        axes.plot(curve.x, curve.y, label=f"{found.names[k]}: {roc_auc(scores, positive):.3f}")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    if len(found.names) == 2:
        wrong, hits = _rates(found)
        axes.plot(wrong, hits, "o", color="black", label="as called", markersize=5)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (area)")
    _legend(figure)
    return figure


def _rates(found: Predictions) -> tuple[float, float]:
    cells = confusion(found.labels, found.called, classes=2)
    with np.errstate(invalid="ignore"):
        wrong, hits = cells[:, 1] / cells.sum(1)
    return float(wrong), float(hits)


def _draw_precision_recall(found: Predictions) -> Figure:
    figure = new_figure(width_in=4.6, height_in=4.4)
    axes = figure.add_subplot()
    for k in _shown(found):
        scores, positive = found.probabilities[:, k], found.labels == k
        curve = precision_recall(scores, positive)
        area = average_precision(scores, positive)
        (line,) = axes.step(curve.x, curve.y, where="pre", label=f"{found.names[k]}: {area:.3f}")
        axes.axhline(positive.mean(), color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="sensitivity", ylabel="positive predictive value", ylim=(0, 1.02))
    axes.set_title("Precision and recall (average)")
    _legend(figure)
    return figure


def _draw_calibration(found: Predictions) -> Figure:
    figure = new_figure(width_in=4.6, height_in=4.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":")
    for k in _shown(found):
        rows = calibration(found.probabilities[:, k], found.labels == k)
        x = [float(row["probability"] or 0) for row in rows]
        y = [float(row["share"] or 0) for row in rows]
        axes.plot(x, y, label=found.names[k])
        size = [8 + 60 * float(row["cases"] or 0) / len(found.labels) for row in rows]
        axes.scatter(x, y, s=size)
    axes.set(xlabel="predicted probability", ylabel="share of the cases", title="Calibration")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    _legend(figure)
    return figure


def _draw_confusion(found: Predictions) -> Figure:
    classes = len(found.names)
    cells = confusion(found.labels, found.called, classes=classes)
    shares = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    side = 2.2 + 0.7 * classes
    figure = new_figure(width_in=side + 0.6, height_in=side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(classes):
        for j in range(classes):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{cells[i, j]:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(classes), found.names, rotation=30, ha="right")
    axes.set_yticks(range(classes), found.names)
    axes.set(xlabel="called", ylabel="label", title=f"{len(found.labels)} cases")
    axes.grid(visible=False)
    return figure


def _legend(figure: Figure) -> None:
    axes = figure.axes[0]
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def draw_maps(
    picture: Float32[np.ndarray, "h w"], maps: PictureMaps, *, title: str, neutral: float
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A picture with the attention of every scale over it, and the evidence for its class.

    Drawn without axes, because there may be thousands of them.

    Args:
        picture: Values within 0..1.
        maps: Of this picture.
        title: What was called.
        neutral: The attention that leaves features as they are.
    """
    zoom = max(1, round(PANEL_WIDTH / picture.shape[1]))
    grey = np.kron(picture, np.ones((zoom, zoom), dtype=np.float32))
    size = (grey.shape[0], grey.shape[1])
    panels = [_panel(grey, None, title)]
    for scale, attention in maps.gates.items():
        if attention.size == 1:
            continue
        shown = enlarge(attention, size)
        most = max(float(np.abs(shown - neutral).max()), 1e-3)
        colours = colormaps["RdBu_r"]((shown - neutral) / (2 * most) + 0.5)
        text = f"scale {scale}: blue {neutral - most:.3f}, red {neutral + most:.3f}"
        panels.append(_panel(grey, colours, text))
    colours = colormaps["inferno"](enlarge(maps.evidence, size))
    panels.append(_panel(grey, colours, "evidence (Grad-CAM)"))
    columns = min(len(panels), 3)
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    rows = [np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    return np.vstack(rows)


def draw_probability(
    picture: Float32[np.ndarray, "h w"], probability: Float32[np.ndarray, "h w"], title: str
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A picture beside the same with a probability over it, from black (0) to yellow (1)."""
    zoom = max(1, round(PANEL_WIDTH / picture.shape[1]))
    low, high = float(picture.min()), float(picture.max())
    unit = (picture - low) / max(high - low, 1e-6)
    grey, shown = (np.kron(x, np.ones((zoom, zoom), np.float32)) for x in (unit, probability))
    return np.hstack(
        [_panel(grey, None, "picture"), _panel(grey, colormaps["inferno"](shown), title)]
    )


def _panel(
    grey: Float32[np.ndarray, "h w"], colours: np.ndarray | None, text: str
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The picture, half covered by colours, under a line of text."""
    values = np.repeat(grey[..., None], 3, axis=-1)
    if colours is not None:
        values = 0.5 * values + 0.5 * colours[..., :3]
    pixels = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    heading = Image.new("RGB", (grey.shape[1], HEADING), "white")
    ImageDraw.Draw(heading).text((4, 3), text, fill="black")
    framed = np.vstack([np.asarray(heading), pixels])
    return np.pad(framed, ((0, 4), (0, 4), (0, 0)), constant_values=255)
