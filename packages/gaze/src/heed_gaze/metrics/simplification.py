"""MultiMatch's simplification: small steps and straight runs become one saccade.

Dewhurst et al., "It depends on how you look at it", Behavior Research Methods 44 (2012). The two
passes alternate until nothing changes. A short last saccade is joined to the one before it, as
that one then is: the path keeps its end point (the public Python port joins it to the saccade as
it was before the pass, and so loses a part of the way where that one had been joined too).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64


@dataclass(frozen=True, kw_only=True)
class Simplification:
    """When neighbouring saccades are joined.

    Example:
        >>> rows = np.array([[0.0, 0, 9, 0, 0.1], [9.0, 0, 9, 1, 0.1]])
        >>> simplify(rows, Simplification(), diagonal_px=100.0, last_s=0.1).tolist()
        [[0.0, 0.0, 18.0, 1.0, 0.1]]
    """

    direction_deg: float = 45.0
    """Saccades that turn by less are joined ..."""
    duration_s: float = 0.3
    """... where the fixation between them is shorter."""
    amplitude: float = 0.1
    """Saccades below this share of the screen's diagonal are joined to the next, where one of the
    fixations at their ends is shorter than `duration_s`."""

    def __post_init__(self) -> None:
        if min(self.direction_deg, self.duration_s, self.amplitude) < 0:
            raise ValueError(f"thresholds must not be negative, got {self}")


_Saccade = tuple[float, float, float, float, float]
"""Start x and y, dx, dy, and the duration of the fixation before. Plain numbers: a scanpath is too
short for arrays."""


def simplify(
    saccades: Float64[np.ndarray, "n 5"],
    settings: Simplification,
    *,
    diagonal_px: float,
    last_s: float,
) -> Float64[np.ndarray, "m 5"]:
    """Join saccades until no more can be joined.

    Args:
        saccades: Start x and y, dx, dy, duration of the fixation before; NaN durations join
            nothing.
        settings: The thresholds.
        diagonal_px: Of the screen.
        last_s: Duration of the last fixation.
    """
    path: list[_Saccade] = [tuple(row) for row in saccades.tolist()]
    amplitude_px = settings.amplitude * diagonal_px
    before = -1
    while before != len(path):
        before = len(path)
        path = _join_straight(path, settings)
        path = _join_short(path, settings, amplitude_px, last_s)
    return np.array(path, dtype=np.float64).reshape(-1, 5)


def _join(first: _Saccade, second: _Saccade) -> _Saccade:
    return (*first[:2], first[2] + second[2], first[3] + second[3], first[4])


def _join_straight(path: list[_Saccade], settings: Simplification) -> list[_Saccade]:
    found: list[_Saccade] = []
    i = 0
    while i < len(path):
        one = path[i]
        if i + 1 < len(path) and path[i + 1][4] < settings.duration_s:
            following = path[i + 1]
            if _angle_deg(one, following) < settings.direction_deg:
                one = _join(one, following)
                i += 1
        found.append(one)
        i += 1
    return found


def _join_short(
    path: list[_Saccade], settings: Simplification, amplitude_px: float, last_s: float
) -> list[_Saccade]:
    found: list[_Saccade] = []
    i = 0
    while i < len(path):
        one = path[i]
        last = i + 1 == len(path)
        after_s = last_s if last else path[i + 1][4]
        brief = one[4] < settings.duration_s or after_s < settings.duration_s
        short = brief and math.hypot(one[2], one[3]) < amplitude_px
        if short and last and found:
            found[-1] = _join(found[-1], one)
            break
        if short and not last:
            one = _join(one, path[i + 1])
            i += 1
        found.append(one)
        i += 1
    return found


def _angle_deg(a: _Saccade, b: _Saccade) -> float:
    """NaN where one of them has no direction."""
    size = math.hypot(a[2], a[3]) * math.hypot(b[2], b[3])
    if not size:
        return math.nan
    return math.degrees(math.acos(min(max((a[2] * b[2] + a[3] * b[3]) / size, -1.0), 1.0)))
