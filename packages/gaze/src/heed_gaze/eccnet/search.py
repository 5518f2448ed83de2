"""Visual search: fixate the peak of attention, test it, forget it, look again (section 3.3).

A fixation is a row and a column of the picture. With candidate cells (the six experiments of the
paper) the initial fixation is neither tested nor inhibited; after each saccade the whole cell that
was fixated is painted with the background and never looked at again. Without cells every fixation,
the initial one too, is tested and a square around it is not looked at again; the picture stays.

The paper's decision multiplies the map, less its minimum, by the allowed places and takes the first
maximum; here places that are not allowed cannot win even where all allowed ones are at the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8

from heed_core.errors import InputError
from heed_gaze.eccnet.attention import AttentionMap, MapConfig, attention_map, enlarge
from heed_gaze.eccnet.network import EccNet
from heed_gaze.eccnet.surround import Padded, WindowFeatures

CORNER = 64
"""Background beyond the farthest place that can be fixated, in pixels."""
LEAST_TARGET = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A search picture, what is looked for in it, and where that is.

    Raises:
        InputError: Masks of another size, an empty target, a target larger than the picture.
    """

    name: str
    image: UInt8[np.ndarray, "h w 3"]
    target: UInt8[np.ndarray, "th tw 3"]
    truth: Bool[np.ndarray, "h w"] | None = None
    """Where the target is: the recogniser knows. None: nothing is ever found."""
    cells: Bool[np.ndarray, "m h w"] | None = None
    """Candidate places. None: all of the picture."""

    def __post_init__(self) -> None:
        size, target = self.image.shape[:2], self.target.shape[:2]
        if min(target) < LEAST_TARGET or target[0] > size[0] or target[1] > size[1]:
            raise InputError(
                f"the target is {target[0]} x {target[1]} pixels, the search picture "
                f"{size[0]} x {size[1]}",
                path=self.name,
                remedy="give a target that is smaller than the picture",
            )
        for what, mask in (("target's mask", self.truth), ("cells", self.cells)):
            if mask is not None and mask.shape[-2:] != size:
                raise InputError(
                    f"the {what} are for {mask.shape[-2]} x {mask.shape[-1]} pixels, the picture "
                    f"has {size[0]} x {size[1]}",
                    path=self.name,
                    remedy="give masks of the picture's size",
                )
        if self.truth is not None and not self.truth.any():
            raise InputError(
                "the mask of the target is empty", path=self.name, remedy="mark the target's place"
            )
        if self.cells is not None and not self.cells.any():
            raise InputError("no cell holds a pixel", path=self.name, remedy="correct the cells")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a scene is searched."""

    max_fixations: int = 37
    """With the initial one."""
    inhibition: int = 10
    """Side of the square around a fixation that is tested, and, without cells, inhibited."""
    background: int = 255
    """Grey around the picture and in inhibited cells."""
    maps: MapConfig = field(default_factory=MapConfig)

    def __post_init__(self) -> None:
        if self.max_fixations < 1 or self.inhibition < 1:
            raise ValueError(
                f"max_fixations and inhibition must be at least 1, got {self.max_fixations} "
                f"and {self.inhibition}"
            )
        if not 0 <= self.background <= 255:
            raise ValueError(f"background must be 0 to 255, got {self.background}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One decision: where to look next."""

    fixation: tuple[int, int]
    """Where the eye was."""
    values: Float64[np.ndarray, "h w"]
    """Attention over the picture, 0 where nothing may be fixated."""
    allowed: Bool[np.ndarray, "h w"]
    winner: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """What came of a scene."""

    fixations: Int64[np.ndarray, "n 2"]
    """Rows and columns, the initial one first."""
    found_at: int | None
    """Index of the fixation that found the target; None: not found."""
    steps: tuple[Step, ...] = ()

    @property
    def saccades(self) -> int:
        """Eye movements that were made."""
        return len(self.fixations) - 1


@runtime_checkable
class Looker(Protocol):
    """What gives attention over a scene."""

    def look(
        self, image: UInt8[np.ndarray, "h w 3"], fixation: tuple[int, int]
    ) -> Float64[np.ndarray, "h w"]:
        """Attention over the picture, seen from a fixation."""


@runtime_checkable
class Searcher(Protocol):
    """Makes a looker for each scene."""

    def prepare(self, scene: Scene, config: SearchConfig) -> Looker:
        """Remember the target of a scene."""


class EccNetSearcher:
    """Looks with eccNET.

    Args:
        network: In eval mode.
        reuse_surround: Compute features only where the picture is; off: in the whole window.
    """

    def __init__(self, network: EccNet, *, reuse_surround: bool = True) -> None:
        self.network, self.reuse_surround = network, reuse_surround
        self._windows: dict[tuple[int, int], WindowFeatures] = {}

    def prepare(self, scene: Scene, config: SearchConfig) -> EccNetLooker:
        """Features of the target."""
        side = 2 * (scene.size[0] + CORNER)
        key = side, config.background
        if key not in self._windows:
            self._windows = {key: WindowFeatures(self.network, *key)}
        return EccNetLooker(self.network, self._windows[key], scene, config, self.reuse_surround)


class EccNetLooker:
    """Correlates what the retina sees of one scene with the features of its target."""

    def __init__(
        self,
        network: EccNet,
        windows: WindowFeatures,
        scene: Scene,
        config: SearchConfig,
        reuse_surround: bool,
    ) -> None:
        self.windows, self.config, self.reuse_surround = windows, config, reuse_surround
        target = torch.from_numpy(np.ascontiguousarray(scene.target)).to(network.mean.device)
        with torch.inference_mode():
            self.targets = network.target_features(target.permute(2, 0, 1)[None].float())

    def maps(self, image: UInt8[np.ndarray, "h w 3"], fixation: tuple[int, int]) -> AttentionMap:
        """The steps of the map, on the window."""
        half = self.windows.side // 2
        padded = Padded.around(image, half=half, background=self.config.background)
        see = self.windows.at if self.reuse_surround else self.windows.whole
        with torch.inference_mode():
            return attention_map(see(padded, fixation), self.targets, self.config.maps)

    def look(
        self, image: UInt8[np.ndarray, "h w 3"], fixation: tuple[int, int]
    ) -> Float64[np.ndarray, "h w"]:
        """The sharpened map of the window, less its minimum, enlarged and cut to the picture."""
        side = self.windows.side
        top, left = (side // 2 - at for at in fixation)
        rows, columns = (
            slice(max(start, 0), min(start + size, side))
            for start, size in zip((top, left), image.shape[:2], strict=True)
        )
        sharpened = self.maps(image, fixation).sharpened
        seen = enlarge(sharpened, (side, side), rows, columns) - sharpened.min()
        whole = np.zeros(image.shape[:2])  # what is beyond the window is not seen
        whole[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = seen
        return whole


def search(
    scene: Scene, searcher: Searcher, config: SearchConfig, *, keep_steps: bool = False
) -> Search:
    """Search a scene until the target is found, fixations are used up, or no place is left.

    Args:
        scene: What to search.
        searcher: Gives attention.
        config: The rules.
        keep_steps: Keep the map of each decision.
    """
    looker = searcher.prepare(scene, config)
    state = _State.of(scene, config)
    steps = []
    while not state.over:
        allowed = state.allowed & _reach(scene.size, state.fixation)
        if not allowed.any():
            break
        values = looker.look(state.image, state.fixation)
        winner = first_peak(values, allowed)
        if keep_steps:
            shown = np.where(allowed, values, 0.0)
            steps.append(
                Step(fixation=state.fixation, values=shown, allowed=allowed, winner=winner)
            )
        state.move(winner)
    return Search(
        fixations=np.array(state.fixations, dtype=np.int64),
        found_at=state.found_at,
        steps=tuple(steps),
    )


def first_peak(
    values: Float64[np.ndarray, "h w"], allowed: Bool[np.ndarray, "h w"]
) -> tuple[int, int]:
    """Row and column of the highest allowed value; of equal ones the first in reading order."""
    row, column = np.unravel_index(int(np.argmax(np.where(allowed, values, -np.inf))), values.shape)
    return int(row), int(column)


@dataclass(kw_only=True, eq=False)
class _State:
    """The picture as it is left, what may still be fixated, and where the eye was."""

    scene: Scene
    config: SearchConfig
    image: UInt8[np.ndarray, "h w 3"]
    allowed: Bool[np.ndarray, "h w"]
    fixations: list[tuple[int, int]]
    found_at: int | None = None

    @classmethod
    def of(cls, scene: Scene, config: SearchConfig) -> _State:
        """The start, in the middle."""
        cells = scene.cells
        allowed = np.ones(scene.size, bool) if cells is None else np.asarray(cells.any(axis=0))
        middle = scene.size[0] // 2, scene.size[1] // 2
        state = cls(
            scene=scene, config=config, image=scene.image, allowed=allowed, fixations=[middle]
        )
        if cells is None:
            state.test_and_inhibit_square()
        return state

    @property
    def fixation(self) -> tuple[int, int]:
        """Where the eye is."""
        return self.fixations[-1]

    @property
    def over(self) -> bool:
        """Found, or as often looked as allowed."""
        return self.found_at is not None or len(self.fixations) >= self.config.max_fixations

    def move(self, winner: tuple[int, int]) -> None:
        """Look at a place."""
        self.fixations.append(winner)
        if self.scene.cells is None:
            self.test_and_inhibit_square()
            return
        inside = self.scene.cells[:, winner[0], winner[1]]
        cell = self.scene.cells[inside].any(axis=0)
        self.image = np.where(cell[..., None], np.uint8(self.config.background), self.image)
        self.allowed = self.allowed & ~cell
        self._test()

    def test_and_inhibit_square(self) -> None:
        """Test the fixation; look at its surround no more."""
        self._test()
        self.allowed = self.allowed.copy()
        self.allowed[self._square()] = False

    def _test(self) -> None:
        truth = self.scene.truth
        if truth is not None and truth[self._square()].any():
            self.found_at = len(self.fixations) - 1

    def _square(self) -> tuple[slice, slice]:
        return _square(self.fixation, self.config.inhibition)


def first_found(
    scene: Scene, fixations: Int64[np.ndarray, "n 2"], config: SearchConfig
) -> int | None:
    """Index of the first of anybody's fixations that finds the target; None: there is none.

    Args:
        scene: With the target's place, else nothing is found.
        fixations: Rows and columns, also off the picture.
        config: Its `inhibition` is the side of the square that is looked at.
    """
    if scene.truth is None:
        return None
    for number, (row, column) in enumerate(fixations.tolist()):
        if scene.truth[_square((row, column), config.inhibition)].any():
            return number
    return None


def square_around(at: int | Int64[np.ndarray, " n"], side: int) -> tuple[Any, Any]:
    """First and one past the last pixel along an axis of the square around a fixation."""
    first = at - side // 2
    return first, first + side


def _square(fixation: tuple[int, int], side: int) -> tuple[slice, slice]:
    rows, columns = (
        slice(max(first, 0), max(last, 0))
        for first, last in (square_around(at, side) for at in fixation)
    )
    return rows, columns


def _reach(size: tuple[int, int], fixation: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Places that one saccade can reach: as far as the picture is high."""
    rows, columns = (
        (np.arange(length) >= at - size[0]) & (np.arange(length) < at + size[0])
        for length, at in zip(size, fixation, strict=True)
    )
    return np.asarray(rows[:, None] & columns[None, :])


class ChanceSearcher:
    """Looks anywhere: the floor of every comparison.

    Args:
        seed: Of the whole series of scenes.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def prepare(self, scene: Scene, config: SearchConfig) -> ChanceSearcher:
        """Itself: there is nothing to remember."""
        return self

    def look(
        self, image: UInt8[np.ndarray, "h w 3"], fixation: tuple[int, int]
    ) -> Float64[np.ndarray, "h w"]:
        """Noise; with equal cells each is as probable."""
        return np.asarray(self.rng.random(image.shape[:2]))


class PixelMatchSearcher:
    """Looks where the pixels are most like the target's: normalised cross-correlation of greys."""

    def prepare(self, scene: Scene, config: SearchConfig) -> PixelMatchLooker:
        """Remember the target."""
        return PixelMatchLooker(scene.target, config.background)


@dataclass(frozen=True, eq=False)
class PixelMatchLooker:
    """Slides the target over one scene."""

    target: UInt8[np.ndarray, "h w 3"]
    background: int

    def look(
        self, image: UInt8[np.ndarray, "h w 3"], fixation: tuple[int, int]
    ) -> Float64[np.ndarray, "h w"]:
        """The correlation with the target centred on each pixel."""
        import cv2

        height, width = self.target.shape[:2]
        pad = ((height // 2, (height - 1) // 2), (width // 2, (width - 1) // 2), (0, 0))
        padded = np.pad(image, pad, constant_values=self.background)
        greys = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (padded, self.target)]
        found = cv2.matchTemplate(greys[0], greys[1], cv2.TM_CCOEFF_NORMED)
        return np.nan_to_num(found.astype(np.float64), posinf=0.0, neginf=0.0)
