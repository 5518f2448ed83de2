"""Made shelves and viewers: pictures of packages, and scanpaths of a few ways to search.

| strategy | the viewer |
| --- | --- |
| reading | scans row by row from the top left until the target is reached |
| centre-row | the same, but begins with the middle row, then the rows below, then those above |
| guided | looks at the objects whose colour is most like the target's first |
| centre-first | looks at the middle first and goes outwards |
| viewing | looks at a handful of objects near the middle, without a target |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.shelves import Layout, Shelves, Trial, even_boxes, reading_order

Strategy = Literal["reading", "centre-row", "guided", "centre-first", "viewing"]
_NOISE = 0.35  # of the order in which guided and centred viewers go
_REFIX = 0.2  # chance of looking at an object once more before going on


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is made."""

    rows: int = 3
    columns: int = 5
    layouts: int = 16
    targets: int = 4
    """Targets on each layout."""
    strategies: tuple[Strategy, ...] = ("reading", "guided", "centre-first")
    """A viewer each; they take turns."""
    viewers: int = 6
    cell_px: tuple[int, int] = (120, 76)
    """Height and width of a cell."""
    products: int = 24
    """Different packages; a layout shows some of them in random order."""
    noise: bool = True
    """Whether viewers look at objects again now and then."""
    group: str = "shelf"


def write_pictures(out: Path, options: SampleOptions, *, seed: int) -> list[Layout]:
    """Draw the layouts as PNG files into `out`."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    products = [_product(rng, options.cell_px) for _ in range(options.products)]
    height, width = options.cell_px
    size = (options.columns * width, options.rows * height)
    boxes = even_boxes(size, options.rows, options.columns)
    count = options.rows * options.columns
    layouts = []
    for number in range(options.layouts):
        chosen = rng.choice(options.products, size=count, replace=count > options.products)
        picture = np.full((size[1], size[0], 3), 235, dtype=np.uint8)
        for product, (x0, y0, x1, y1) in zip(chosen, boxes.astype(int), strict=True):
            picture[y0:y1, x0:x1] = products[product]
        name = f"{options.group}-{number:02d}"
        path = out / f"{name}.png"
        Image.fromarray(picture).save(path)
        layouts.append(
            Layout(
                name=name,
                boxes=boxes,
                cells=reading_order(options.rows, options.columns, count),
                rows=options.rows,
                columns=options.columns,
                size_px=size,
                image=path,
                group=options.group,
            )
        )
    return layouts


def _product(rng: np.random.Generator, cell_px: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A package on a light shelf: a coloured body with a band, a label and a cap."""
    height, width = cell_px
    picture = np.full((height, width, 3), 235, dtype=np.uint8)
    body, band, cap = (_colour(rng) for _ in range(3))
    left, right = int(width * rng.uniform(0.08, 0.22)), int(width * rng.uniform(0.78, 0.92))
    top, bottom = int(height * rng.uniform(0.08, 0.25)), int(height * 0.95)
    picture[top:bottom, left:right] = body
    picture[top : top + height // 12, left:right] = cap
    middle = int(rng.uniform(0.4, 0.75) * height)
    picture[middle : middle + int(height * rng.uniform(0.06, 0.2)), left:right] = band
    y, x = np.mgrid[:height, :width]
    radius = rng.uniform(0.08, 0.2) * width
    disc = (y - 0.35 * height) ** 2 + (x - 0.5 * width) ** 2 < radius**2
    picture[disc] = 255 - np.array(body)
    return picture


def _colour(rng: np.random.Generator) -> list[int]:
    import colorsys

    hue, saturation, value = rng.uniform(), rng.uniform(0.5, 1.0), rng.uniform(0.45, 1.0)
    return [round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)]


def make_trials(
    layouts: Sequence[Layout], options: SampleOptions, *, seed: int
) -> tuple[Trial, ...]:
    """Let viewers look at layouts; the last two eighths of the layouts are for val and test."""
    from heed_gaze.readers.pictures import read_picture

    rng = np.random.default_rng([seed, 1])
    trials = []
    for number, layout in enumerate(layouts):
        share = number / len(layouts)
        split = "train" if share < 0.75 else "val" if share < 0.875 else "test"
        assert layout.image is not None
        colours = _mean_colours(read_picture(layout.image), layout)
        targets = rng.choice(len(layout), size=options.targets, replace=False)
        for target in targets.tolist():
            for viewer in range(options.viewers):
                strategy = options.strategies[viewer % len(options.strategies)]
                searched = NO_TARGET if strategy == "viewing" else target
                order = STRATEGIES[strategy](layout, searched, colours, rng)
                trials.append(
                    Trial(
                        layout=layout.name,
                        target=searched,
                        subject=f"{strategy}-{viewer + 1}",
                        objects=_look(order, searched, rng, noise=options.noise),
                        split=split,
                    )
                )
    return tuple(trials)


def write_sample(out: Path, options: SampleOptions, *, seed: int) -> Shelves:
    """Write pictures and `shelves.json`."""
    from heed_gaze.oat.files import NEUTRAL, write_neutral

    (out / "images").mkdir(parents=True, exist_ok=True)
    layouts = write_pictures(out / "images", options, seed=seed)
    shelves = Shelves(
        layouts={layout.name: layout for layout in layouts},
        trials=make_trials(layouts, options, seed=seed),
        kind="neutral JSON",
    )
    write_neutral(out / NEUTRAL, shelves)
    return shelves


Order = Int64[np.ndarray, " _"]
Colours = Float64[np.ndarray, "_ 3"]


def _mean_colours(picture: UInt8[np.ndarray, "h w 3"], layout: Layout) -> Colours:
    boxes = layout.boxes.astype(int)
    return np.stack([picture[y0:y1, x0:x1].mean(axis=(0, 1)) for x0, y0, x1, y1 in boxes])


def _look(order: Order, target: int, rng: np.random.Generator, *, noise: bool) -> Order:
    """Go through objects until the target is reached; now and then look once more."""
    length = int(rng.integers(4, 8)) if target == NO_TARGET else int((order == target).argmax()) + 1
    path: list[int] = []
    for seen in order[:length].tolist():
        path.append(seen)
        if noise and len(path) > 2 and seen != target and rng.uniform() < _REFIX:
            path.append(path[-1] if rng.uniform() < 0.5 else path[-2])
    return np.array(path)


def _reading(layout: Layout, target: int, colours: Colours, rng: np.random.Generator) -> Order:
    return np.lexsort((layout.cells[:, 1], layout.cells[:, 0]))


def _centre_row(layout: Layout, target: int, colours: Colours, rng: np.random.Generator) -> Order:
    turned = (layout.cells[:, 0] - layout.rows // 2) % layout.rows
    return np.lexsort((layout.cells[:, 1], turned))


def _guided(layout: Layout, target: int, colours: Colours, rng: np.random.Generator) -> Order:
    """The target itself is seen third or fourth: its surroundings are looked at first."""
    distance = np.linalg.norm(colours - colours[target], axis=1) / 255
    order = np.argsort(distance + 0.1 * rng.uniform(size=len(layout)))
    others = order[order != target]
    return np.insert(others, min(int(rng.integers(2, 4)), len(others)), target)


def _centre_first(layout: Layout, target: int, colours: Colours, rng: np.random.Generator) -> Order:
    centre = np.array([layout.rows - 1, layout.columns - 1]) / 2
    distance = np.hypot(*(layout.cells - centre).T)
    return np.argsort(distance + _NOISE * rng.uniform(size=len(layout)))


STRATEGIES: dict[Strategy, Callable[[Layout, int, Colours, np.random.Generator], Order]] = {
    "reading": _reading,
    "centre-row": _centre_row,
    "guided": _guided,
    "centre-first": _centre_first,
    "viewing": _centre_first,
}
"""Strategy -> the order in which it goes over the objects of a layout."""
