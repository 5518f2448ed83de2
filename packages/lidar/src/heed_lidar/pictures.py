"""Pictures of scans: classes and curbs, values per point, a prediction against the truth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8

from heed_lidar.drawing import (
    Caption,
    ColourBar,
    Line,
    Picture,
    Region,
    Rgb,
    birds_eye,
    perspective,
    with_caption,
)
from heed_lidar.drawing3d import open3d_perspective

Renderer = Literal["own", "open3d"]
"""What draws the view in perspective; open3d is an extra and needs OpenGL, see `drawing3d`."""

CURB_LINE: Rgb = (255, 255, 255)
STREET_COLOURS: Mapping[str, Rgb] = {
    "ignore": (62, 66, 76),
    "curb": (255, 92, 56),
    "road": (118, 128, 148),
    "sidewalk": (94, 176, 214),
    "others": (98, 120, 92),
}
"""Colours that set curbs off from what surrounds them; other classes keep those of their map."""

VIRIDIS = np.array(
    [
        (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137),
        (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
    ]
)  # fmt: skip
"""Knots of matplotlib's viridis (CC0) above its darkest fifth: even steps look even."""
BLUE_TO_ORANGE = np.array(
    [(64, 148, 255), (58, 106, 178), (66, 72, 86), (190, 112, 44), (255, 160, 60)]
)
"""Knots for values about zero: zero recedes into the background."""

HIT: Rgb = (86, 190, 245)
MISS: Rgb = (255, 76, 76)
FALSE_ALARM: Rgb = (255, 206, 64)
REST: Rgb = (78, 84, 98)


@dataclass(frozen=True, kw_only=True)
class PictureSize:
    """How large pictures are."""

    map_px: int = 900
    """Width of the map from above."""
    view_px: tuple[int, int] = (1200, 700)
    """Width and height of the view in perspective."""

    def __post_init__(self) -> None:
        if self.map_px < 100 or min(self.view_px) < 100:
            raise ValueError(f"pictures must be at least 100 pixels wide and high, got {self}")


def draw_scan(
    xyz: Float[np.ndarray, "n 3"],
    classes: Int64[np.ndarray, " n"],
    *,
    names: Sequence[str],
    colours: UInt8[np.ndarray, "c 3"],
    curbs: Iterable[Float[np.ndarray, "m 3"]] = (),
    title: str = "",
    size: PictureSize | None = None,
    renderer: Renderer = "own",
) -> dict[str, Picture]:
    """A scan in the colours of its classes, with curbs as lines.

    Args:
        xyz: Metres, sensor frame.
        classes: Class of each point.
        names: Of the classes.
        colours: Of the classes; `STREET_COLOURS` take their place where they name the class.
        curbs: Polylines, metres.
        title: Written on top.
        size: How large the pictures are.
        renderer: What draws the second.

    Returns:
        `birds-eye` and `perspective`.

    Raises:
        RuntimeError: The renderer is open3d, and it cannot draw here.
    """
    table = class_colours(names, colours)
    seen = np.flatnonzero(np.bincount(classes, minlength=len(names)))
    legend = [(names[int(k)], _rgb(table[k])) for k in seen]
    lines = [Line(points=points, colour=CURB_LINE, width_px=1.2) for points in curbs]
    if lines:
        legend.append(("curb line", CURB_LINE))
    emphasis = classes == names.index("curb") if "curb" in names else None
    caption = Caption(title=title, legend=legend)
    return _both(
        xyz, table[classes], caption, lines=lines, size=size, renderer=renderer, emphasis=emphasis
    )


def draw_values(
    xyz: Float[np.ndarray, "n 3"],
    values: Float[np.ndarray, " n"],
    *,
    name: str,
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    curbs: Iterable[Float[np.ndarray, "m 3"]] = (),
    title: str = "",
    size: PictureSize | None = None,
    renderer: Renderer = "own",
) -> dict[str, Picture]:
    """A scan in the colours of one value per point, with a colour bar.

    Args:
        xyz: Metres, sensor frame.
        values: NaN is drawn grey.
        name: Of the value, with its unit.
        limits: Values of the ends of the colour bar; None: the 1st and 99th percentiles.
        signed: The colours tell the sign, and zero is in the middle.
        curbs: Polylines, metres.
        title: Written on top.
        size: How large the pictures are.
        renderer: What draws the second.

    Returns:
        `birds-eye` and `perspective`.

    Raises:
        RuntimeError: The renderer is open3d, and it cannot draw here.
    """
    low, high = limits or value_limits(values, signed=signed)
    table = heat_table(signed=signed)
    bar = ColourBar(title=name, low=f"{low:.3g}", high=f"{high:.3g}", colours=table)
    lines = [Line(points=points, colour=CURB_LINE, width_px=1.2) for points in curbs]
    shown = heat_colours(values, limits=(low, high), signed=signed)
    return _both(
        xyz, shown, Caption(title=title, bar=bar), lines=lines, size=size, renderer=renderer
    )


def draw_comparison(
    xyz: Float[np.ndarray, "n 3"],
    truth: Bool[np.ndarray, " n"],
    predicted: Bool[np.ndarray, " n"],
    *,
    name: str = "curb",
    title: str = "",
    size: PictureSize | None = None,
) -> dict[str, Picture]:
    """Where a prediction of one class is right, misses it, and gives a false alarm.

    Args:
        xyz: Metres, sensor frame.
        truth: Points of the class.
        predicted: Points that are said to be.
        name: Of the class.
        title: Written on top.
        size: How large the pictures are.

    Returns:
        `birds-eye` and `perspective`.
    """
    kind = np.where(truth, np.where(predicted, 1, 2), np.where(predicted, 3, 0))
    counts = np.bincount(kind, minlength=4)
    table = np.array([REST, HIT, MISS, FALSE_ALARM], np.uint8)
    meanings = ("no " + name, name + " found", name + " missed", "false alarm")
    legend = [(f"{meanings[k]} ({counts[k]:,})", _rgb(table[k])) for k in (1, 2, 3)]
    caption = Caption(title=title, legend=legend)
    return _both(xyz, table[kind], caption, lines=[], size=size, emphasis=kind > 0)


def class_colours(
    names: Sequence[str], colours: UInt8[np.ndarray, "c 3"]
) -> UInt8[np.ndarray, "c 3"]:
    """Colours of classes that stand out against the dark background."""
    table = np.array(colours, dtype=np.float64)
    weights = (0.3, 0.59, 0.11)
    for number, name in enumerate(names):
        table[number] = STREET_COLOURS.get(name, table[number])
        shade = float(table[number] @ weights)
        lift = max(0.0, 70 - shade) / (255 - shade)
        table[number] += lift * (255 - table[number])
    return table.round().astype(np.uint8)


def heat_table(*, signed: bool = False, steps: int = 256) -> UInt8[np.ndarray, "steps 3"]:
    """Colours from the lowest value to the highest."""
    knots = BLUE_TO_ORANGE if signed else VIRIDIS
    at = np.linspace(0, 1, steps)
    places = np.linspace(0, 1, len(knots))
    table = np.stack([np.interp(at, places, knots[:, band]) for band in range(3)], -1)
    return table.round().astype(np.uint8)


def heat_colours(
    values: Float[np.ndarray, " n"], *, limits: tuple[float, float], signed: bool = False
) -> UInt8[np.ndarray, "n 3"]:
    """Colours of values; those beyond the limits take the colour of the limit, NaN is grey."""
    low, high = limits
    table = heat_table(signed=signed)
    share = (values - low) / (high - low) if high > low else np.zeros(len(values))
    known = np.isfinite(share)
    rows = np.clip(np.where(known, share, 0) * len(table), 0, len(table) - 1).astype(np.int64)
    return np.where(known[:, None], table[rows], np.array(REST, np.uint8))


def value_limits(values: Float[np.ndarray, " n"], *, signed: bool = False) -> tuple[float, float]:
    """Ends of a colour bar: the 1st and 99th percentiles, symmetric about 0 for signed values."""
    known = values[np.isfinite(values)]
    if not len(known):
        return (-1.0, 1.0) if signed else (0.0, 1.0)
    low, high = (float(v) for v in np.percentile(known, [1, 99]))
    if not signed:
        return low, high
    most = max(abs(low), abs(high))
    return -most, most


def shown_region(xyz: Float[np.ndarray, "n 3"]) -> Region:
    """The part of a scan that is worth drawing: where its points are, up to 50 m away."""
    if not len(xyz):
        return Region()
    low, high = np.percentile(xyz[:, :2], [1, 99], axis=0)
    x_low, x_high = (float(5 * round(x / 5)) for x in np.clip((low[0], high[0]), -35, 50))
    x_low, x_high = min(x_low, 0.0), max(x_high, 10.0)
    aside = max(-low[1], high[1], 0.35 * (x_high - x_low))
    aside = float(5 * math.ceil(min(aside, 30.0) / 5))
    return Region(x_low=x_low, x_high=x_high, y_low=-aside, y_high=aside)


def _both(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    caption: Caption,
    *,
    lines: Sequence[Line],
    size: PictureSize | None,
    renderer: Renderer = "own",
    emphasis: Bool[np.ndarray, " n"] | None = None,
) -> dict[str, Picture]:
    """The map, with some points emphasised, and the view."""
    size = size or PictureSize()
    if renderer == "open3d":
        bare = open3d_perspective(xyz, colours, size=size.view_px, polylines=lines)
        view = with_caption(bare, caption)
    else:
        view = perspective(xyz, colours, size=size.view_px, polylines=lines, caption=caption)
    return {
        "birds-eye": birds_eye(
            xyz,
            colours,
            region=shown_region(xyz),
            width=size.map_px,
            emphasis=emphasis,
            polylines=lines,
            caption=caption,
        ),
        "perspective": view,
    }


def _rgb(colour: UInt8[np.ndarray, " 3"]) -> Rgb:
    red, green, blue = (int(part) for part in colour)
    return red, green, blue
