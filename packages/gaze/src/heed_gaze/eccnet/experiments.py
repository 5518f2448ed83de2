"""The six search-asymmetry experiments: their items, displays and seeded stimuli.

Gupta et al., NeurIPS 2021, section 2 and appendix. Lengths are degrees of visual angle; items are
drawn with soft edges on a grid of cells, one item in a cell, at a random place in it. A display's
target is one item of another kind than the others; the place to find is the whole cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from heed_gaze.eccnet.attention import MapConfig
from heed_gaze.eccnet.search import SearchConfig

PX_PER_DEGREE = 30
SUPERSAMPLING = 6
"""Points per pixel and axis at which an item's outline is tested."""

Values = np.ndarray[Any, np.dtype[Any]]
Inside = Callable[[Values, Values], Values]
"""Of x (right) and y (down) in degrees from the item's middle: 1 on the item, 0 off, or a grey."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One half of an experiment: one kind of target among the other kind."""

    name: str
    """Its folder below the data set: `curvature/curve_in_lines`."""
    targets: tuple[str, ...]
    """Variants of the target, taken in turn over the trials."""
    distractors: tuple[str, ...]
    """Variants of the other items, taken in turn within a display."""
    human_slope_ms: float
    """Of people's reaction time over the set size, from the classic papers."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Two tasks on the same grid."""

    number: int
    name: str
    tasks: tuple[Task, Task]
    """The easier for people first."""
    view_degrees: float
    grid: int
    """Cells along each side."""
    item_degrees: float
    set_sizes: tuple[int, ...]
    trials: int
    """Per set size."""
    background: int
    foreground: int
    legacy_truth: bool = False
    """Whether the paper's code marks a box that begins at the item's corner, not at the cell's."""
    gaussians: tuple[tuple[int, float | None], tuple[int, float | None]] = ((3, 1.0), (5, 3.0))

    @property
    def side(self) -> int:
        """Of the picture, in pixels."""
        return _px(self.view_degrees)

    @property
    def cell(self) -> int:
        """Side of a cell, in pixels."""
        return _px(self.view_degrees / self.grid)

    @property
    def cells(self) -> Bool[np.ndarray, "m h w"]:
        """The candidate places, row by row."""
        return np.stack([self.cell_mask(number) for number in range(self.grid**2)])

    def cell_mask(self, number: int) -> Bool[np.ndarray, "h w"]:
        """One candidate place."""
        mask = np.zeros((self.side, self.side), dtype=bool)
        row, column = (self.cell * place for place in divmod(number, self.grid))
        mask[row : row + self.cell, column : column + self.cell] = True
        return mask

    @property
    def rules(self) -> SearchConfig:
        """How its displays are searched."""
        return SearchConfig(
            max_fixations=self.grid**2 + 1,
            background=self.background,
            maps=MapConfig(gaussians=self.gaussians),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Display:
    """One trial."""

    image: UInt8[np.ndarray, "h w"]
    target: UInt8[np.ndarray, "k k"]
    truth: Bool[np.ndarray, "h w"]
    set_size: int
    target_cell: int
    item_cells: tuple[int, ...]
    """The target's first."""


def make_displays(
    experiment: Experiment,
    task: Task,
    *,
    seed: int,
    trials: int | None = None,
    legacy: bool = False,
) -> list[Display]:
    """The displays of a task, in blocks of one set size; the same seed gives the same pixels.

    Args:
        experiment: The grid.
        task: What is looked for.
        seed: Of places.
        trials: Displays per set size. None: as many as in the paper.
        legacy: Mark the target's place as the paper's code does in the experiment with
            `legacy_truth`: a box as large as a cell that begins at the item's corner.
    """
    key = (experiment.number, experiment.tasks.index(task))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
    count = experiment.trials if trials is None else trials
    return [
        _display(experiment, task, size, index, rng, legacy=legacy and experiment.legacy_truth)
        for size in experiment.set_sizes
        for index in range(count)
    ]


def _display(
    experiment: Experiment,
    task: Task,
    set_size: int,
    index: int,
    rng: np.random.Generator,
    *,
    legacy: bool,
) -> Display:
    cells = rng.permutation(experiment.grid**2)[:set_size]
    target = item_picture(experiment, task.targets[index % len(task.targets)])
    image = np.full((experiment.side, experiment.side), experiment.background, dtype=np.uint8)
    item_px = target.shape[0]
    truth = experiment.cell_mask(int(cells[0]))
    room = _px(experiment.view_degrees / experiment.grid - experiment.item_degrees)
    for number, cell in enumerate(cells):
        variant = task.distractors[(number - 1 + index) % len(task.distractors)]
        item = target if number == 0 else item_picture(experiment, variant)
        jitter = rng.integers(0, max(room, 1), size=2)
        row, column = (
            experiment.cell * place + shift
            for place, shift in zip(divmod(int(cell), experiment.grid), jitter, strict=True)
        )
        image[row : row + item_px, column : column + item_px] = item
        if number == 0 and legacy:
            truth = np.zeros_like(truth)
            truth[row : row + experiment.cell, column : column + experiment.cell] = True
    return Display(
        image=image,
        target=target,
        truth=truth,
        set_size=set_size,
        target_cell=int(cells[0]),
        item_cells=tuple(int(cell) for cell in cells),
    )


@lru_cache(maxsize=128)
def item_picture(experiment: Experiment, variant: str) -> UInt8[np.ndarray, "k k"]:
    """An item alone on the background, as it stands in displays and as the target's picture."""
    size = _px(experiment.item_degrees)
    kind, _, turn = variant.partition(":")
    points = (np.arange(size * SUPERSAMPLING) + 0.5) / (SUPERSAMPLING * PX_PER_DEGREE)
    x, y = np.meshgrid(points, points)
    middle = size / PX_PER_DEGREE / 2
    x, y = _turned(x - middle, y - middle, turn)
    blocks = ITEMS[kind](x, y).reshape(size, SUPERSAMPLING, size, SUPERSAMPLING)
    if kind == "ramp":  # greys of its own; background where it is not
        on = np.hypot(x, y).reshape(blocks.shape) < DISC_DEGREES / 2
        grey = np.where(on, blocks, experiment.background).mean(axis=(1, 3))
    else:
        share = blocks.mean(axis=(1, 3))
        grey = experiment.background + (experiment.foreground - experiment.background) * share
    return np.asarray(np.rint(grey).astype(np.uint8))


def _turned(x: np.ndarray, y: np.ndarray, turn: str) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of a turned item: degrees clockwise, or a flip."""
    flips = {
        "": (x, y), "left-right": (-x, y), "top-bottom": (x, -y), "transposed": (y, x)
    }  # fmt: skip
    if turn in flips:
        return flips[turn]
    angle = math.radians(float(turn))
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


DISC_DEGREES = 1.04
RAMP_STEPS = 15
STROKE = 0.55
HALF = 2.75
"""Half the side of the items of experiments 3 and 4."""
BORDER = 0.4


def _box(
    x: np.ndarray, y: np.ndarray, left: float, right: float, top: float, bottom: float
) -> np.ndarray:
    return np.asarray((x >= left) & (x < right) & (y >= top) & (y < bottom))


def _curve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An arc of radius 1, 1/6 thick, 1.3 rad long, its middle in the middle."""
    x = x + (1 + math.cos(0.65)) / 2
    return np.asarray((np.abs(np.hypot(x, y) - 1) < 1 / 12) & (np.abs(np.arctan2(y, x)) < 0.65))


def _line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, -0.1, 0.1, -0.6, 0.6)


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, -0.15, 0.15, -1.0, 1.0)


def _ramp(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Darkest at the top, in equal steps."""
    step = np.clip(np.floor((y / DISC_DEGREES + 0.5) * RAMP_STEPS), 0, RAMP_STEPS - 1)
    return np.asarray(step * (255 / (RAMP_STEPS - 1)))


_EDGE = HALF - BORDER


def _upright(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, -STROKE / 2, STROKE / 2, -_EDGE, _EDGE)


def _row(x: np.ndarray, y: np.ndarray, stroke: float, left: float, right: float) -> np.ndarray:
    """A horizontal bar, `stroke` strokes below the top of the item."""
    top = stroke * STROKE - HALF
    return _box(x, y, left, right, top, top + STROKE)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(_upright(x, y) | _row(x, y, 3, -_EDGE, _EDGE))


def _non_cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(_upright(x, y) | _row(x, y, 3, -_EDGE, 0) | _row(x, y, 6, 0, _EDGE))


def _t(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(_upright(x, y) | _box(x, y, -_EDGE, _EDGE, -_EDGE, STROKE - _EDGE))


def _l(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    upright = _box(x, y, -_EDGE, STROKE - _EDGE, -_EDGE, _EDGE)
    return np.asarray(upright | _box(x, y, -_EDGE, _EDGE, _EDGE - STROKE, _EDGE))


ITEMS: Mapping[str, Inside] = {
    "curve": _curve,
    "line": _line,
    "bar": _bar,
    "ramp": _ramp,
    "cross": _cross,
    "non-cross": _non_cross,
    "t": _t,
    "l": _l,
}


def _px(degrees: float) -> int:
    return math.floor(degrees * PX_PER_DEGREE + 1e-9)


def _variants(kind: str, turns: Sequence[str | int]) -> tuple[str, ...]:
    return tuple(f"{kind}:{turn}" if turn != "" else kind for turn in turns)


_ROTATIONS = (-45, -90, -135, 180)
_FLIPS = ("", "left-right", "top-bottom", "transposed")
_OTHERS = (-80, -60, -40, 20, 40, 60, 80)
_SHAPES = {
    "view_degrees": 20.5, "grid": 3, "item_degrees": 5.5, "set_sizes": (3, 6, 9), "trials": 36,
    "background": 255, "foreground": 0, "gaussians": ((5, 3.0), (7, 5.0)),
}  # fmt: skip
_BARS = {
    "view_degrees": 11.3, "grid": 4, "item_degrees": 2.3, "set_sizes": (1, 4, 8, 12),
    "trials": 30, "background": 255, "foreground": 0,
}  # fmt: skip


def _task(name: str, slope: float, target: tuple[str, ...], distractors: tuple[str, ...]) -> Task:
    return Task(name=name, targets=target, distractors=distractors, human_slope_ms=slope)


_CURVES, _LINES = _variants("curve", _ROTATIONS), _variants("line", _ROTATIONS)
EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        number=1,
        name="curvature",
        tasks=(
            _task("curvature/curve_in_lines", 0.80, _CURVES, _LINES),
            _task("curvature/line_in_curves", 7.589285714285713, _LINES, _CURVES),
        ),
        view_degrees=11.3,
        grid=6,
        item_degrees=1.6,
        set_sizes=(8, 16, 32),
        trials=30,
        background=0,
        foreground=255,
    ),
    Experiment(
        number=2,
        name="lighting direction",
        tasks=(
            _task("lightning_dir/top_down", 4.2051282051282035, ("ramp",), ("ramp:top-bottom",)),
            _task("lightning_dir/left_right", 23.88278388278388, ("ramp:-90",), ("ramp:90",)),
        ),
        view_degrees=6.6,
        grid=4,
        item_degrees=1.04,
        set_sizes=(1, 6, 12),
        trials=30,
        background=27,
        foreground=255,
        legacy_truth=True,
        gaussians=((3, None), (5, 1.0)),
    ),
    Experiment(
        number=3,
        name="intersection",
        tasks=(
            _task(
                "intersection/non_cross",
                45.0,
                _variants("non-cross", _FLIPS),
                _variants("cross", _FLIPS),
            ),
            _task(
                "intersection/cross",
                96.0,
                _variants("cross", _FLIPS),
                _variants("non-cross", _FLIPS),
            ),
        ),
        **_SHAPES,  # type: ignore[arg-type]
    ),
    Experiment(
        number=4,
        name="T and L",
        tasks=(
            _task("intersection/Ts", 14.0, _variants("t", _FLIPS), _variants("l", _FLIPS)),
            _task("intersection/Ls", 33.0, _variants("l", _FLIPS), _variants("t", _FLIPS)),
        ),
        **_SHAPES,  # type: ignore[arg-type]
    ),
    Experiment(
        number=5,
        name="orientation, homogeneous",
        tasks=(
            _task("categorization/homo/t20", 2.3770334928229664, ("bar:20",), ("bar:0",)),
            _task("categorization/homo/t0", 9.856459330143538, ("bar:0",), ("bar:20",)),
        ),
        **_BARS,  # type: ignore[arg-type]
    ),
    Experiment(
        number=6,
        name="orientation, heterogeneous",
        tasks=(
            _task(
                "categorization/hetero/t0",
                23.732057416267942,
                ("bar:0",),
                _variants("bar", (*_OTHERS, -20)),
            ),
            _task(
                "categorization/hetero/t20",
                71.11961722488039,
                ("bar:-20",),
                _variants("bar", (*_OTHERS, 0)),
            ),
        ),
        **_BARS,  # type: ignore[arg-type]
    ),
)
"""The paper's experiments, with people's slopes in ms per item as the authors read them off the
classic papers' figures."""


def experiment_of(task: str) -> Experiment | None:
    """The experiment of a task's folder, which may stand deeper."""
    for experiment in EXPERIMENTS:
        if any(f"/{task}".endswith(f"/{own.name}") for own in experiment.tasks):
            return experiment
    return None
