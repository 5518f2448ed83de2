"""Pictures of generated reports: what each word looked at, and how scores are spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from matplotlib import colormaps
from matplotlib.figure import Figure

from heed_medical.pictures.reading import resize_grey
from heed_runtime.recipe import Row
from heed_runtime.report import new_figure, style

MOST_WORDS = 30
"""Words that are drawn; the arrays hold all."""
_COLUMNS = 6


def draw_words(
    pictures: Sequence[Float32[np.ndarray, "h w"]],
    words: Sequence[str],
    attention: Float32[np.ndarray, "n v p q"],
    reliance: Float32[np.ndarray, " n"],
) -> Figure:
    """The pictures once per word, with the attention of the word over them and its reliance.

    Brightness is of one scale: the highest weight of the report is the brightest.
    """
    shown = min(len(words), len(attention), MOST_WORDS)
    columns = min(_COLUMNS, max(shown, 1))
    rows = max(-(-shown // columns), 1)
    scene = np.concatenate(pictures, axis=1)
    height, width = scene.shape
    gap = max(height // 5, 4)
    mosaic = np.ones((rows * (height + gap), columns * (width + gap), 3), dtype=np.float32)
    panel = 1.9
    figure = Figure(
        figsize=(panel * columns, panel * columns * mosaic.shape[0] / mosaic.shape[1] + 0.3),
        layout="constrained",
    )
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title("attention of each word, and how much it relied on the pictures", fontsize=9)
    top = float(attention.max(initial=0.0)) or 1.0
    colours = colormaps["inferno"]
    for number in range(shown):
        maps = zip(attention[number], pictures, strict=True)
        over = np.concatenate([resize_grey(m, (p.shape[0], p.shape[1])) for m, p in maps], axis=1)
        tile = 0.5 * scene[..., None] + 0.5 * colours(over / top)[..., :3]
        row, column = divmod(number, columns)
        y, x = row * (height + gap) + gap, column * (width + gap)
        mosaic[y : y + height, x : x + width] = tile
        label = f"{words[number]}  {reliance[number]:.2f}"
        axes.text(x, y - 1, label, fontsize=7, verticalalignment="bottom")
    axes.imshow(mosaic)
    return figure


def draw_scores(rows: Sequence[Row]) -> Figure:
    """How the scores of single reports are spread."""
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        bins = np.linspace(0, 1, 21)
        for name in ("bleu_4", "rouge_l"):
            values = [float(row[name] or 0.0) for row in rows]
            axes.hist(values, bins=list(bins), alpha=0.6, label=name)
        axes.set(xlabel="score of a report", ylabel="reports")
        axes.legend()
    return figure
