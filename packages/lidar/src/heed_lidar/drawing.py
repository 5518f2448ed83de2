"""Pictures of point clouds by numpy and Pillow alone: no display, no OpenGL.

Points are painted from the farthest to the nearest on a canvas of twice the size, which is then
reduced, so that points and lines have soft edges. `birds_eye` looks straight down with a scale in
metres, `perspective` looks through a pinhole.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

Rgb = tuple[int, int, int]
Picture = UInt8[np.ndarray, "h w 3"]

BACKGROUND: Rgb = (17, 20, 27)
GRID: Rgb = (45, 51, 63)
INK: Rgb = (214, 219, 228)
OVERSAMPLING = 2
MARGIN_PX = 56
"""Space for the axes of a bird's-eye view, left and below."""
HEADER_PX = 40
"""Space for the title."""
NEAR_M = 0.3
"""Nothing nearer to a pinhole is drawn."""
CLEAR_M = 20.0
"""Colours do not fade before this distance."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline in space."""

    points: Float[np.ndarray, "m 3"]
    """Metres."""
    colour: Rgb = (255, 255, 255)
    width_px: float = 2.5


@dataclass(frozen=True, kw_only=True)
class ColourBar:
    """What the colours of values mean."""

    title: str
    low: str
    high: str
    colours: UInt8[np.ndarray, "k 3"]
    """From the lowest value to the highest."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of the ground, metres: x is forward and up in the picture, y is to the left."""

    x_low: float = -30.0
    x_high: float = 50.0
    y_low: float = -30.0
    y_high: float = 30.0

    def __post_init__(self) -> None:
        if not (self.x_low < self.x_high and self.y_low < self.y_high):
            raise ValueError(f"a region needs low < high on both axes, got {self}")


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What is written on a picture."""

    title: str = ""
    legend: Sequence[tuple[str, Rgb]] = ()
    """Names and their colours."""
    bar: ColourBar | None = None


def birds_eye(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    *,
    region: Region | None = None,
    width: int = 1000,
    point_px: float = 2.0,
    emphasis: Bool[np.ndarray, " n"] | None = None,
    polylines: Sequence[Line] = (),
    caption: Caption | None = None,
    sensor: bool = True,
) -> Picture:
    """The view from above, forward upwards; of points over each other the higher one is seen.

    Args:
        xyz: Metres: x forward, y left, z up.
        colours: Of the points.
        region: What is shown; the default reaches 50 m forward and 30 m to the other sides.
        width: Of the map in pixels; the picture adds margins for the axes.
        point_px: Diameter of a point.
        emphasis: Points that are drawn larger and over all others.
        polylines: Lines over the points.
        caption: Title, legend, colour bar.
        sensor: Mark the origin.
    """
    region = region or Region()
    scale = width / (region.y_high - region.y_low)
    height = round((region.x_high - region.x_low) * scale)
    canvas = np.empty((OVERSAMPLING * height, OVERSAMPLING * width, 3), np.uint8)
    canvas[:] = BACKGROUND
    grid_m = _grid_step(region)
    _paint_grid(canvas, region, scale * OVERSAMPLING, grid_m)
    pixels = map_pixels(xyz, region, scale * OVERSAMPLING)
    order = np.argsort(xyz[:, 2], kind="stable")
    large = np.zeros(len(xyz), bool) if emphasis is None else emphasis[order]
    for rows, diameter in ((order[~large], point_px), (order[large], 1.75 * point_px)):
        _paint_points(canvas, pixels[rows], colours[rows], diameter * OVERSAMPLING)
    lines = [(map_pixels(line.points, region, scale * OVERSAMPLING), line) for line in polylines]
    drawn = _reduce(_with_lines(canvas, lines))
    picture = Image.new("RGB", (width + MARGIN_PX + 16, height + MARGIN_PX + HEADER_PX), BACKGROUND)
    picture.paste(drawn, (MARGIN_PX, HEADER_PX))
    pen = ImageDraw.Draw(picture)
    _write_axes(pen, region, scale, grid_m, (width, height))
    if sensor:
        _mark_sensor(pen, region, scale)
    _scale_bar(pen, scale, grid_m, right=MARGIN_PX + width - 12, foot=HEADER_PX + height - 14)
    _write_caption(pen, caption or Caption(), left=MARGIN_PX, top=HEADER_PX)
    return np.asarray(picture)


def perspective(
    xyz: Float[np.ndarray, "n 3"],
    colours: UInt8[np.ndarray, "n 3"],
    *,
    eye: tuple[float, float, float] = (-14.0, 0.0, 9.0),
    look_at: tuple[float, float, float] = (12.0, 0.0, -1.5),
    fov_deg: float = 60.0,
    size: tuple[int, int] = (1200, 700),
    point_m: float = 0.07,
    fog_m: float | None = 90.0,
    polylines: Sequence[Line] = (),
    caption: Caption | None = None,
) -> Picture:
    """The view through a pinhole; the nearest point is seen.

    Args:
        xyz: Metres: x forward, y left, z up.
        colours: Of the points.
        eye: Where the pinhole is, metres.
        look_at: What is in the middle of the picture.
        fov_deg: Horizontal angle of view.
        size: Width and height in pixels.
        point_m: Diameter of a point; at least one pixel is drawn.
        fog_m: Beyond 20 m colours fade towards the background over this distance; None: they
            do not.
        polylines: Lines over the points.
        caption: Title, legend, colour bar.
    """
    if not 1 <= fov_deg < 180:
        raise ValueError(f"fov_deg must be at least 1 and below 180, got {fov_deg}")
    width, height = (OVERSAMPLING * side for side in size)
    camera = _camera(eye, look_at)
    focal = 0.5 * width / math.tan(math.radians(fov_deg) / 2)
    canvas = _sky(width, height)
    local = (xyz - np.asarray(eye)) @ camera.T
    local, shown = local[local[:, 2] > NEAR_M], colours[local[:, 2] > NEAR_M]
    order = np.argsort(-local[:, 2], kind="stable")
    local, shown = local[order], shown[order]
    if fog_m is not None:
        haze = 0.75 * (1 - np.exp(-np.maximum(local[:, 2:] - CLEAR_M, 0) / fog_m))
        shown = (shown * (1 - haze) + np.array(BACKGROUND) * haze).astype(np.uint8)
    pixels = _pinhole(local, focal, width, height)
    diameter = np.clip(np.rint(focal * point_m / local[:, 2]), OVERSAMPLING, 7 * OVERSAMPLING)
    # Sorted far to near, so sizes only grow and each group lies before all that follow.
    for number in np.unique(diameter):
        group = diameter == number
        _paint_points(canvas, pixels[group], shown[group], float(number))
    lines = [
        (_pinhole(part, focal, width, height), line)
        for line in polylines
        for part in _before_eye((line.points - np.asarray(eye)) @ camera.T)
    ]
    return with_caption(_reduce(_with_lines(canvas, lines)), caption or Caption())


def with_caption(picture: Picture | Image.Image, caption: Caption) -> Picture:
    """A view in perspective with its title, legend and colour bar."""
    drawn = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    _write_caption(ImageDraw.Draw(drawn), caption, left=0, top=HEADER_PX)
    return np.asarray(drawn)


def write_png(path: Path, picture: Picture) -> None:
    """Write a picture as PNG to exactly this path."""
    Image.fromarray(picture).save(path, format="PNG")


def map_pixels(
    xyz: Float[np.ndarray, "n c"], region: Region, scale: float
) -> Float64[np.ndarray, "n 2"]:
    """Column and row, in pixels, of points on a map of `scale` pixels per metre."""
    return np.stack([(region.y_high - xyz[:, 1]) * scale, (region.x_high - xyz[:, 0]) * scale], -1)


def _camera(eye: Sequence[float], look_at: Sequence[float]) -> Float64[np.ndarray, "3 3"]:
    """Rows: right, down and forward of the camera."""
    forward = np.asarray(look_at, float) - np.asarray(eye, float)
    length = np.linalg.norm(forward)
    if not length > 0:
        raise ValueError(f"eye and look_at must differ, got {tuple(eye)}")
    forward = forward / length
    upright = (0.0, 0.0, 1.0) if abs(forward[2]) < 0.999 else (1.0, 0.0, 0.0)
    right = np.cross(forward, upright)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(forward, right), forward])


def _pinhole(
    local: Float[np.ndarray, "n 3"], focal: float, width: int, height: int
) -> Float64[np.ndarray, "n 2"]:
    centre = np.array([0.5 * width, 0.5 * height])
    pixels: Float64[np.ndarray, "n 2"] = local[:, :2] / local[:, 2:] * focal + centre
    return pixels


def _before_eye(local: Float[np.ndarray, "m 3"]) -> list[Float64[np.ndarray, "k 3"]]:
    """The parts of a polyline in front of the camera, cut at its near plane."""
    parts: list[list[Float64[np.ndarray, " 3"]]] = [[]]
    for a, b in pairwise(local):
        seen = a[2] > NEAR_M, b[2] > NEAR_M
        if not any(seen):
            continue
        cut = a if all(seen) else a + (NEAR_M - a[2]) / (b[2] - a[2]) * (b - a)
        start, end = (a if seen[0] else cut), (b if seen[1] else cut)
        if not parts[-1]:
            parts[-1].append(start)
        parts[-1].append(end)
        if not seen[1]:
            parts.append([])
    return [np.stack(part) for part in parts if part]


def _disc(diameter: float) -> Int64[np.ndarray, "k 2"]:
    """Offsets (column, row) of the pixels of a disc."""
    reach = math.ceil(diameter / 2)
    side = np.arange(-reach, reach + 1)
    shift = 0.5 if round(diameter) % 2 == 0 else 0.0
    rows, columns = (grid.reshape(-1) for grid in np.meshgrid(side, side, indexing="ij"))
    inside = (columns + shift) ** 2 + (rows + shift) ** 2 <= max(diameter / 2, 0.8) ** 2
    return np.stack([columns[inside], rows[inside]], -1)


def _paint_points(
    canvas: Picture,
    pixels: Float[np.ndarray, "n 2"],
    colours: UInt8[np.ndarray, "n 3"],
    diameter: float,
) -> None:
    """Paint discs in order: a later point covers an earlier one."""
    height, width = canvas.shape[:2]
    inside: Bool[np.ndarray, " n"] = np.all(
        (pixels > -diameter) & (pixels < (width + diameter, height + diameter)), axis=1
    )
    centres = np.floor(pixels[inside]).astype(np.int64)
    disc = _disc(diameter)
    at = centres[:, None] + disc
    shown = np.repeat(colours[inside], len(disc), axis=0)
    columns, rows = at[..., 0].reshape(-1), at[..., 1].reshape(-1)
    on = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    canvas.reshape(-1, 3)[rows[on] * width + columns[on]] = shown[on]


def _with_lines(
    canvas: Picture, lines: Sequence[tuple[Float[np.ndarray, "m 2"], Line]]
) -> Image.Image:
    """The canvas with polylines, each on a dark rim."""
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for rim in (1.5, 0.0):
        for pixels, line in lines:
            width = max(1, round((line.width_px + rim) * OVERSAMPLING))
            path = [(float(a), float(b)) for a, b in pixels]
            pen.line(path, fill=BACKGROUND if rim else line.colour, width=width, joint="curve")
    return image


def _reduce(image: Image.Image) -> Image.Image:
    return image.reduce(OVERSAMPLING)


def _sky(width: int, height: int) -> Picture:
    """A background that grows lighter towards the top."""
    share = np.linspace(1, 0, height)[:, None] ** 2
    column = np.array(BACKGROUND) + share * (np.array(GRID) - np.array(BACKGROUND))
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = column.astype(np.uint8)[:, None]
    return canvas


def _grid_step(region: Region) -> float:
    """The smallest round step that cuts the longer side into at most ten."""
    extent = max(region.x_high - region.x_low, region.y_high - region.y_low)
    step = 10.0 ** math.floor(math.log10(extent / 10))
    return next(step * k for k in (1, 2, 5, 10) if step * k >= extent / 10 - 1e-9)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _paint_grid(canvas: Picture, region: Region, scale: float, step: float) -> None:
    for x in _ticks(region.x_low, region.x_high, step):
        row = min(int((region.x_high - x) * scale), len(canvas) - 1)
        canvas[row : row + OVERSAMPLING] = GRID
    for y in _ticks(region.y_low, region.y_high, step):
        column = min(int((region.y_high - y) * scale), canvas.shape[1] - 1)
        canvas[:, column : column + OVERSAMPLING] = GRID


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _write_axes(
    pen: ImageDraw.ImageDraw,
    region: Region,
    scale: float,
    step: float,
    size: tuple[int, int],
) -> None:
    font, foot = _font(14), HEADER_PX + size[1]
    for x in _ticks(region.x_low, region.x_high, step):
        row = HEADER_PX + (region.x_high - x) * scale
        pen.text((MARGIN_PX - 8, row), f"{x:g}", fill=INK, font=font, anchor="rm")
    for y in _ticks(region.y_low, region.y_high, step):
        column = MARGIN_PX + (region.y_high - y) * scale
        pen.text((column, foot + 8), f"{y:g}", fill=INK, font=font, anchor="mt")
    middle = MARGIN_PX + size[0] / 2
    pen.text((middle, foot + 30), "y, to the left (m)", fill=INK, font=font, anchor="mt")
    pen.text((6, HEADER_PX - 8), "x, forward (m)", fill=INK, font=font, anchor="lb")
    frame = (MARGIN_PX - 1, HEADER_PX - 1, MARGIN_PX + size[0], foot)
    pen.rectangle(frame, outline=GRID)


def _mark_sensor(pen: ImageDraw.ImageDraw, region: Region, scale: float) -> None:
    column, row = map_pixels(np.zeros((1, 2)), region, scale)[0] + (MARGIN_PX, HEADER_PX)
    inside = region.x_low < 0 < region.x_high and region.y_low < 0 < region.y_high
    if inside:
        outline = ((0, -11), (7, 8), (0, 4), (-7, 8))
        arrow = [(column + right, row + down) for right, down in outline]
        pen.polygon(arrow, fill=INK, outline=BACKGROUND)


def _scale_bar(
    pen: ImageDraw.ImageDraw, scale: float, length_m: float, *, right: int, foot: int
) -> None:
    left = right - length_m * scale
    box = (left - 10, foot - 28, right + 10, foot + 10)
    pen.rounded_rectangle(box, radius=5, fill=BACKGROUND, outline=GRID)
    pen.line([(left, foot), (right, foot)], fill=INK, width=3)
    for end in (left, right):
        pen.line([(end, foot - 5), (end, foot + 5)], fill=INK, width=2)
    middle = (left + right) / 2
    pen.text((middle, foot - 6), f"{length_m:g} m", fill=INK, font=_font(14), anchor="mb")


def _write_caption(pen: ImageDraw.ImageDraw, caption: Caption, *, left: int, top: int) -> None:
    if caption.title:
        at = (left + (0 if left else 12) + (110 if left else 0), top - 10)
        pen.text(at, caption.title, fill=INK, font=_font(18), anchor="ls")
    if caption.legend:
        _write_legend(pen, caption.legend, left=left + 12, top=top + 12)
    if caption.bar:
        rows = len(caption.legend)
        _write_bar(pen, caption.bar, left=left + 12, top=top + 12 + (22 * rows + 26 if rows else 0))


def _write_legend(
    pen: ImageDraw.ImageDraw,
    legend: Sequence[tuple[str, Rgb]],
    *,
    left: int,
    top: int,
) -> None:
    font = _font(15)
    wide = max(pen.textlength(name, font=font) for name, _ in legend)
    box = (left, top, left + wide + 42, top + 22 * len(legend) + 10)
    pen.rounded_rectangle(box, radius=5, fill=BACKGROUND, outline=GRID)
    for number, (name, colour) in enumerate(legend):
        row = top + 16 + 22 * number
        pen.rounded_rectangle((left + 10, row - 6, left + 22, row + 6), radius=3, fill=colour)
        pen.text((left + 32, row), name, fill=INK, font=font, anchor="lm")


def _write_bar(pen: ImageDraw.ImageDraw, bar: ColourBar, *, left: int, top: int) -> None:
    font, length = _font(15), 200
    wide = max(length, pen.textlength(bar.title, font=font))
    box = (left, top, left + wide + 24, top + 70)
    pen.rounded_rectangle(box, radius=5, fill=BACKGROUND, outline=GRID)
    pen.text((left + 12, top + 8), bar.title, fill=INK, font=font, anchor="lt")
    for step in range(length):
        colour = bar.colours[step * len(bar.colours) // length]
        at = left + 12 + step
        pen.line([(at, top + 30), (at, top + 43)], fill=tuple(int(c) for c in colour))
    pen.text((left + 12, top + 49), bar.low, fill=INK, font=_font(13), anchor="lt")
    pen.text((left + 12 + length, top + 49), bar.high, fill=INK, font=_font(13), anchor="rt")
