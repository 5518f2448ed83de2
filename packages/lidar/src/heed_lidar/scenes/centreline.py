"""The line that a street follows: straight, or straight - circular arc - straight."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True, kw_only=True)
class Centreline:
    """A line with closed-form street coordinates.

    It runs along +x through the origin, turns by `angle_rad` on an arc that begins at
    x = `start_m`, and goes on straight. A point has the street coordinates u, the length along the
    line from x = 0, and v, its distance to the left of the line.
    """

    radius_m: float | None = None
    """Radius of the arc; None: straight throughout."""
    left: bool = True
    """The line turns to the left."""
    start_m: float = 0.0
    angle_rad: float = math.pi / 2

    def __post_init__(self) -> None:
        if self.radius_m is not None and not self.radius_m > 0:
            raise ValueError(f"radius_m must be positive, got {self.radius_m}")
        if not 0 < self.angle_rad <= math.pi:
            raise ValueError(f"angle_rad must be above 0 and at most pi, got {self.angle_rad}")

    def locate(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Street coordinates (u, v) of points, metres."""
        if self.radius_m is None:
            return x, y
        radius, sign = self.radius_m, self._sign
        across = y - sign * radius
        turned = np.arctan2(x - self.start_m, -sign * across)
        u = self.start_m + radius * np.clip(turned, 0, self.angle_rad)
        v = sign * (radius - np.hypot(x - self.start_m, across))
        end, (cos, sin) = self._end, self._turn
        along = (x - end[0]) * cos + (y - end[1]) * sin
        beside = (y - end[1]) * cos - (x - end[0]) * sin
        on_arc = (turned >= 0) & (turned <= self.angle_rad)
        reach = np.where(on_arc, np.abs(v), np.inf)
        for valid, length, offset in (
            (x <= self.start_m, x, y),
            (along >= 0, self.length_to_end_m + along, beside),
        ):
            nearer = valid & (np.abs(offset) < reach)
            reach = np.where(nearer, np.abs(offset), reach)
            u, v = np.where(nearer, length, u), np.where(nearer, offset, v)
        return u, v

    def point(
        self, u: Float[np.ndarray, " n"], v: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The points with street coordinates (u, v): the inverse of `locate`."""
        if self.radius_m is None:
            return u, v
        turned = np.clip((u - self.start_m) / self.radius_m, 0, self.angle_rad)
        sign = self._sign
        arm = self.radius_m - sign * v
        x = self.start_m + arm * np.sin(turned)
        y = sign * (self.radius_m - arm * np.cos(turned))
        before = np.minimum(u - self.start_m, 0)
        after = np.maximum(u - self.length_to_end_m, 0)
        cos, sin = self._turn
        return x + before + after * cos, y + after * sin

    def heading(self, u: float) -> float:
        """Direction of the line at u, radians from +x to the left."""
        if self.radius_m is None:
            return 0.0
        turned = (u - self.start_m) / self.radius_m
        return self._sign * min(max(turned, 0.0), self.angle_rad)

    @property
    def length_to_end_m(self) -> float:
        """The coordinate u where the arc ends."""
        return self.start_m + (self.radius_m or 0.0) * self.angle_rad

    @property
    def _sign(self) -> float:
        return 1.0 if self.left else -1.0

    @property
    def _turn(self) -> tuple[float, float]:
        return math.cos(self.angle_rad), self._sign * math.sin(self.angle_rad)

    @property
    def _end(self) -> tuple[float, float]:
        radius = self.radius_m or 0.0
        return (
            self.start_m + radius * math.sin(self.angle_rad),
            self._sign * radius * (1 - math.cos(self.angle_rad)),
        )
