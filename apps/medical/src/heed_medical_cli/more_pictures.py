"""Pictures of MoRE: where its towers looked, and how well modalities find each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heed_medical.ecg.reading import LEADS
from heed_medical.ecg.signals import RATE_HZ
from heed_runtime.recipe import Row
from heed_runtime.report import new_figure, style

_MOST_WORDS = 60


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """What a study has, and the relevance of its parts."""

    xray: tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]] | None = None
    """The picture and its map."""
    ecg: tuple[Float32[np.ndarray, "12 n"], Float32[np.ndarray, " n"]] | None = None
    """The leads and the map over time."""
    text: tuple[Sequence[str], Float32[np.ndarray, " n"]] | None = None
    """Words and their relevance."""


def draw_relevance(found: Relevance) -> Figure:
    """X-ray under its map, leads over the relevance of time, a bar per word."""
    rows = [name for name in ("xray", "ecg", "text") if getattr(found, name) is not None]
    heights = [{"xray": 3.2, "ecg": 4.5, "text": 2.6}[name] for name in rows]
    with style():
        figure = Figure(figsize=(8.0, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
        for name, part in zip(rows, parts, strict=True):
            if name == "xray" and found.xray is not None:
                _draw_xray(part.subplots(1, 2), *found.xray)
            elif name == "ecg" and found.ecg is not None:
                _draw_ecg(part.subplots(), *found.ecg)
            elif found.text is not None:
                _draw_text(part.subplots(), *found.text)
    return figure


def _draw_xray(axes: Sequence[Axes], picture: np.ndarray, relevance: np.ndarray) -> None:
    for place in axes:
        place.imshow(picture, cmap="gray")
        place.set_axis_off()
    axes[1].imshow(relevance, cmap="inferno", alpha=0.5)
    axes[0].set_title("X-ray")
    axes[1].set_title("relevance")


def _draw_ecg(axes: Axes, leads: np.ndarray, relevance: np.ndarray) -> None:
    time = np.arange(leads.shape[1]) / RATE_HZ
    heights = -2.0 * np.arange(len(leads))
    span = (0.0, float(time[-1]), float(heights[-1]) - 1.5, 1.5)
    axes.imshow(relevance[None], aspect="auto", extent=span, cmap="Reds", alpha=0.7)
    axes.plot(time, leads.T + heights, color="black", linewidth=0.5)
    axes.set_yticks(heights, LEADS)
    axes.set_xlabel("time (s); red: relevant")
    axes.grid(visible=False)


def _draw_text(axes: Axes, words: Sequence[str], relevance: np.ndarray) -> None:
    shown = [_plain(word) for word in words[:_MOST_WORDS]]
    axes.bar(range(len(shown)), relevance[: len(shown)])
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
    axes.set_ylabel("relevance")


def draw_recall(rows: Sequence[Row]) -> Figure:
    """Recall against the number of answers looked at."""
    with style():
        figure = new_figure()
        axes = figure.add_subplot()
        for row in rows:
            ks = [int(key.partition("@")[2]) for key in row if key.startswith("recall@")]
            values = [float(row[f"recall@{k}"] or 0.0) for k in ks]
            axes.plot(ks, values, marker="o", label=f"{row['from']} to {row['to']}")
        axes.set(xlabel="answers looked at", ylabel="recall", ylim=(0, 1.02))
        if rows:
            axes.legend()
    return figure


def _plain(word: str) -> str:
    """Without signs that begin a formula or have no glyph."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in word).replace("$", r"\$")
