"""The pictures of the field: scanpaths, heat maps, curves of search, histograms of saccades.

Every function draws into axes of matplotlib that the caller made; none opens a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Num, Shaped

from heed_gaze.scanpaths import Scanpath, Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.projections.polar import PolarAxes

HUMAN = "0.25"
"""Colour of the viewers in every plot; programs take the colours of the cycle."""
CHANCE = "0.65"
PATH_COLOUR = "#ffb000"
TARGET_COLOUR = "#00d0ff"
"""Amber and cyan are told apart by colour-blind readers and seen on photographs."""

_LARGEST_RADIUS = 0.045
"""Of the mark of the longest fixation, as a share of the picture's diagonal."""
_SMALLEST_RADIUS = 0.012
_NUMBERED = 40
"""Longer scanpaths would be numbers on numbers."""
_LEGEND_LINE = 0.13
"""Of the height of the axes."""
_ROUNDING = 1e-12


def draw_picture(
    axes: Axes, size_px: Size, picture: Shaped[np.ndarray, "h w ..."] | None = None
) -> None:
    """Show a picture, or an empty frame of its size, in its own pixels, y downwards.

    Args:
        axes: Where.
        size_px: Width and height that positions refer to; the picture is stretched to it.
        picture: Grey or RGB.
    """
    width, height = size_px
    if picture is not None:
        axes.imshow(picture, extent=(0, width, height, 0), cmap="gray", interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color="0.7")


def draw_scanpath(
    axes: Axes,
    path: Scanpath,
    *,
    picture: Shaped[np.ndarray, "h w ..."] | None = None,
    colour: str = PATH_COLOUR,
    numbers: bool = True,
    label: str = "",
) -> None:
    """Draw numbered fixations joined by saccades; the area of a mark is the fixation's duration.

    Without durations all marks are alike. The target's box is drawn where it is known.

    Args:
        axes: Where.
        path: Needs a size, or a picture of its own size.
        picture: What was looked at.
        colour: Of marks and saccades.
        numbers: Whether fixations are numbered from 1; those of one place share a text.
        label: For a legend.
    """
    from matplotlib.patches import Circle

    size = _size_of(path, picture)
    draw_picture(axes, size, picture)
    draw_target(axes, path)
    x, y = path.xy_px.T
    axes.plot(x, y, color="black", linewidth=3.2, alpha=0.45, solid_capstyle="round", zorder=3)
    axes.plot(x, y, color=colour, linewidth=1.6, solid_capstyle="round", label=label, zorder=4)
    for index, radius in enumerate(mark_radii_px(path, size)):
        place = (float(x[index]), float(y[index]))
        axes.add_patch(
            Circle(place, radius, facecolor=colour, edgecolor="black", alpha=0.75, zorder=5)
        )
    if numbers and len(path) <= _NUMBERED:
        for (left, top), text in numbers_by_place(path).items():
            axes.text(
                left,
                top,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="black",
                zorder=6,
                clip_on=True,
            )


def numbers_by_place(path: Scanpath) -> dict[tuple[float, float], str]:
    """The numbers of the fixations at each place, from 1; runs are joined.

    Example:
        >>> xy = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [5.0, 1.0], [0.0, 0.0]])
        >>> numbers_by_place(Scanpath(image="a", subject="1", xy_px=xy))
        {(0.0, 0.0): '1-3, 5', (5.0, 1.0): '4'}
    """
    runs: dict[tuple[float, float], list[list[int]]] = {}
    for number, (x, y) in enumerate(path.xy_px.tolist(), start=1):
        own = runs.setdefault((x, y), [])
        if own and own[-1][-1] == number - 1:
            own[-1].append(number)
        else:
            own.append([number])
    return {place: ", ".join(_run_text(run) for run in own) for place, own in runs.items()}


def _run_text(run: list[int]) -> str:
    return f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))


def draw_target(axes: Axes, path: Scanpath) -> None:
    """Frame the target, where its box is known."""
    from matplotlib.patches import Rectangle

    if path.target_box is None:
        return
    x0, y0, x1, y1 = path.target_box
    axes.add_patch(
        Rectangle(
            (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=TARGET_COLOUR, linewidth=2, zorder=2
        )
    )


def mark_radii_px(path: Scanpath, size_px: Size) -> Float[np.ndarray, " n"]:
    """Radius of each fixation's mark: its square grows with the duration."""
    diagonal = float(np.hypot(*size_px))
    if path.duration_s is None or not path.duration_s.max(initial=0.0) > 0:
        return np.full(len(path), 0.4 * _LARGEST_RADIUS * diagonal)
    share = np.sqrt(path.duration_s / path.duration_s.max())
    return np.asarray(diagonal * np.maximum(_LARGEST_RADIUS * share, _SMALLEST_RADIUS))


def draw_heat_map(
    axes: Axes,
    density: Num[np.ndarray, "h w"],
    size_px: Size,
    *,
    picture: Shaped[np.ndarray, "h w ..."] | None = None,
    strength: float = 0.75,
) -> None:
    """Lay a fixation density or saliency map over a picture; what nobody looked at stays clear.

    Args:
        axes: Where.
        density: Any resolution and scale.
        size_px: Width and height that it covers.
        picture: What was looked at.
        strength: Opacity of the highest value.
    """
    draw_picture(axes, size_px, picture)
    low, high = float(density.min()), float(density.max())
    share = (density - low) / (high - low) if high > low else np.zeros(density.shape)
    axes.imshow(
        share,
        extent=(0, size_px[0], size_px[1], 0),
        cmap="turbo",
        alpha=strength * np.clip(3 * share, 0.0, 1.0),
        interpolation="bilinear",
        vmin=0.0,
        vmax=1.0,
    )


def draw_performance(
    axes: Axes,
    curves: Mapping[str, Float[np.ndarray, " _"]],
    *,
    human: str = "human",
    chance: str = "chance",
) -> None:
    """Draw cumulative performance: the share of trials whose target is found by each fixation.

    Args:
        axes: Where.
        curves: Name -> share found within 0, 1, 2, ... fixations (saccades).
        human: The name whose curve is drawn dark.
        chance: The name whose curve is drawn pale.
    """
    for name, curve in curves.items():
        colour = {human: HUMAN, chance: CHANCE}.get(name)
        line = "--" if name == chance else "-"
        fixations = np.arange(len(curve))
        axes.plot(
            fixations, curve, marker="o", markersize=3, color=colour, linestyle=line, label=name
        )
    axes.set(xlabel="fixation", ylabel="share of targets found", ylim=(-0.02, 1.02))
    axes.legend()


def draw_search_slopes(
    axes: Axes,
    set_sizes: Num[np.ndarray, " n"],
    times: Mapping[str, Num[np.ndarray, " n"]],
    *,
    errors: Mapping[str, Num[np.ndarray, " n"]] | None = None,
    ylabel: str = "reaction time (ms)",
    unit: str = "ms/item",
) -> dict[str, float]:
    """Draw mean reaction time against set size, with least-squares lines; return their slopes.

    Args:
        axes: Where.
        set_sizes: Number of items.
        times: Name of a task -> mean time at each set size; NaN is left out.
        errors: Name of a task -> standard error at each set size.
        ylabel: What the times are, with their unit.
        unit: Of the slope, for the legend.

    Returns:
        The slope of each task; NaN with fewer than two set sizes.
    """
    slopes: dict[str, float] = {}
    sizes = np.asarray(set_sizes, dtype=np.float64)
    for number, (name, values) in enumerate(times.items()):
        known = np.isfinite(values)
        slope, intercept = fit_line(sizes[known], np.asarray(values, dtype=np.float64)[known])
        slopes[name] = slope
        (line,) = axes.plot(sizes, intercept + slope * sizes, linewidth=1.2)
        axes.errorbar(
            sizes,
            values,
            yerr=None if errors is None else errors.get(name),
            fmt="os^Dv"[number % 5],
            color=line.get_color(),
            capsize=3,
            label=f"{name}: {slope:.3g} {unit}",
        )
    axes.set(xlabel="set size (items)", ylabel=ylabel, xticks=sizes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + _LEGEND_LINE * len(times) * (high - low))
    axes.legend(loc="upper left")
    return slopes


def fit_line(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line; NaN with fewer than two different x.

    A slope that is within the rounding of the values is 0: shares of slopes stay what they mean.

    Example:
        >>> fit_line(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 5.0]))
        (2.0, -1.0)
    """
    spread = x - x.mean() if len(x) else x
    variance = float(spread @ spread)
    if variance == 0:
        return float("nan"), float("nan")
    slope = float(spread @ (y - y.mean())) / variance
    if abs(slope) * np.ptp(x) <= _ROUNDING * np.abs(y).max():
        slope = 0.0
    return slope, float(y.mean() - slope * x.mean())


def draw_amplitudes(
    axes: Axes,
    amplitudes: Mapping[str, Float[np.ndarray, " _"]],
    *,
    unit: str = "px",
    bins: int = 30,
) -> None:
    """Draw histograms of saccade amplitudes, each scaled to a density.

    Args:
        axes: Where.
        amplitudes: Name -> amplitudes.
        unit: Of the amplitudes.
        bins: Number of equal bins from 0 to the 99.5th percentile of all of them.
    """
    everything = np.concatenate([np.zeros(0), *amplitudes.values()])
    top = float(np.percentile(everything, 99.5)) if len(everything) else 1.0
    edges = np.linspace(0.0, top or 1.0, bins + 1).tolist()
    for name, values in amplitudes.items():
        if len(values):
            axes.hist(values, bins=edges, density=True, histtype="stepfilled", alpha=0.3)
            colour = axes.patches[-1].get_facecolor()[:3]
            axes.hist(
                values, bins=edges, density=True, histtype="step", color=colour, label=name,
                linewidth=1.5,
            )  # fmt: skip
    axes.set(xlabel=f"saccade amplitude ({unit})", ylabel=f"density (1/{unit})", xlim=(0, None))
    if len(everything):
        axes.legend()
    else:
        axes.set_title("no saccade")


def draw_directions(
    axes: PolarAxes, directions_rad: Mapping[str, Float[np.ndarray, " _"]], *, bins: int = 24
) -> None:
    """Draw the direction rose of saccades: the share of saccades in each sector.

    Args:
        axes: With `projection="polar"`.
        directions_rad: Name -> counter-clockwise from "to the right", "up" is a quarter turn.
        bins: Number of sectors; the first is centred on "to the right".
    """
    width = 2 * np.pi / bins
    for name, values in directions_rad.items():
        if not len(values):
            continue
        sectors = np.floor(np.mod(values + width / 2, 2 * np.pi) / width).astype(int) % bins
        share = np.bincount(sectors, minlength=bins) / len(values)
        around = np.append(np.arange(bins) * width, 2 * np.pi)
        closed = np.append(share, share[0])
        (line,) = axes.plot(around, closed, label=name)
        axes.fill(around, closed, color=line.get_color(), alpha=0.2)
    axes.set_xticks(np.arange(4) * np.pi / 2, ["right", "up", "left", "down"])
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    if any(len(values) for values in directions_rad.values()):
        axes.legend(loc="lower right", bbox_to_anchor=(1.15, -0.15))


def draw_attainment(axes: Axes, scores: Mapping[str, Float[np.ndarray, " 4"]]) -> None:
    """Draw scores between chance (0) and the viewers' agreement (1).

    Args:
        axes: Where.
        scores: Name -> prediction, its lower and upper bound, and scanpaths of other pictures, all
            on that scale.
    """
    names = list(scores)
    rows = np.arange(len(names))
    value, low, high, elsewhere = np.array([scores[name] for name in names]).reshape(-1, 4).T
    left, right = np.minimum(low, high), np.maximum(low, high)
    axes.axvline(0.0, color=CHANCE, linestyle="--", zorder=1)
    axes.axvline(1.0, color=HUMAN, zorder=1)
    axes.errorbar(
        value, rows, xerr=[value - left, right - value], fmt="o", capsize=3, label="predicted"
    )
    axes.plot(elsewhere, rows, marker="|", markersize=10, linestyle="", label="other pictures")
    axes.set_yticks(rows, [name.replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="0: random scanpaths, 1: viewers among themselves")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)


def scanpath_colours(count: int) -> Sequence[str]:
    """So many colours, told apart on photographs, as hex strings."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    table = colormaps["turbo"]
    return [to_hex(table(0.08 + 0.84 * k / max(count - 1, 1))) for k in range(count)]


def _size_of(path: Scanpath, picture: Shaped[np.ndarray, "h w ..."] | None) -> Size:
    if path.size_px is not None:
        return path.size_px
    if picture is None:
        raise ValueError(f"{path.name} has no size; give its picture")
    return picture.shape[1], picture.shape[0]
