"""Parts of the ground around the sensor, and how settings name them."""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_FORWARD = re.compile(rf"forward(?::(?P<range>{_NUMBER}))?")
_BOX = re.compile(rf"({_NUMBER}):({_NUMBER}),({_NUMBER}):({_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of the ground around the sensor, in metres."""

    x: tuple[float, float] = (-np.inf, np.inf)
    y: tuple[float, float] = (-np.inf, np.inf)
    range_m: float = np.inf
    """Largest horizontal distance to the sensor."""
    ahead: bool = False
    """Only points with x > 0."""

    def __post_init__(self) -> None:
        if not (self.x[0] < self.x[1] and self.y[0] < self.y[1] and self.range_m > 0):
            raise ValueError(f"a region must not be empty, got {self}")

    def contains(self, xyz: Float64[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n"]:
        """Which points lie in the region."""
        x, y = xyz[:, 0], xyz[:, 1]
        inside = (x >= self.x[0]) & (x <= self.x[1]) & (y >= self.y[0]) & (y <= self.y[1])
        inside &= np.hypot(x, y) <= self.range_m
        if self.ahead:
            inside &= x > 0
        return inside


def parse_region(text: str) -> Region:
    """Read `all`, `forward`, `forward:RANGE` or `x0:x1,y0:y1`.

    Raises:
        ValueError: A text of another form, or an empty region.

    Example:
        >>> parse_region("forward:25").range_m
        25.0
    """
    if text == "all":
        return Region()
    if match := _FORWARD.fullmatch(text):
        return Region(ahead=True, range_m=float(match["range"] or 50.0))
    if match := _BOX.fullmatch(text):
        x0, x1, y0, y1 = (float(number) for number in match.groups())
        return Region(x=(x0, x1), y=(y0, y1))
    raise ValueError(
        f"a region must be all, forward, forward:RANGE or x0:x1,y0:y1 in metres, got {text!r}"
    )
