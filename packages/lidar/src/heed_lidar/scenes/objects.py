"""What stands on a street: boxes, upright cylinders and ellipsoids, hit by rays in closed form."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Hits = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]
"""Distance along each ray (inf where it misses) and |cosine| of the angle of incidence."""


@dataclass(frozen=True, kw_only=True)
class Thing(ABC):
    """A solid with a label and a surface."""

    x: float
    """Centre, metres."""
    y: float
    low: float
    """Height of its foot."""
    high: float
    raw: int
    """Raw id of SemanticKITTI."""
    remission: float = 0.3
    instance: int = 0
    roughness_m: float = 0.0
    """Standard deviation of the surface along a ray: leaves, hedges."""
    porosity: float = 0.0
    """Share of the rays that pass through it."""

    @property
    @abstractmethod
    def reach_m(self) -> float:
        """Horizontal radius of a circle around the centre that holds the thing."""

    @abstractmethod
    def hit(self, origin: Float[np.ndarray, " 3"], directions: Float[np.ndarray, "n 3"]) -> Hits:
        """Where unit rays from one origin meet the thing first."""


@dataclass(frozen=True, kw_only=True)
class Box(Thing):
    """A box that stands upright, turned by `yaw`."""

    length_m: float
    width_m: float
    yaw: float = 0.0

    @property
    def reach_m(self) -> float:
        """Half the diagonal."""
        return 0.5 * math.hypot(self.length_m, self.width_m)

    def hit(self, origin: Float[np.ndarray, " 3"], directions: Float[np.ndarray, "n 3"]) -> Hits:
        """By slabs; the face that is entered last gives the angle of incidence."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        start = (origin - (self.x, self.y, 0)) @ turn
        rays = directions @ turn
        half_length, half_width = 0.5 * self.length_m, 0.5 * self.width_m
        with np.errstate(divide="ignore", invalid="ignore"):
            first = (np.array([-half_length, -half_width, self.low]) - start) / rays
            second = (np.array([half_length, half_width, self.high]) - start) / rays
        enter, leave = np.fmin(first, second), np.fmax(first, second)
        face = enter.argmax(-1)
        near = enter.max(-1)
        hit = (near <= leave.min(-1)) & (near > 0)
        cosine = np.abs(np.take_along_axis(rays, face[:, None], -1)[:, 0])
        return np.where(hit, near, np.inf), cosine


@dataclass(frozen=True, kw_only=True)
class Cylinder(Thing):
    """An upright cylinder; its lids are not seen."""

    radius_m: float

    @property
    def reach_m(self) -> float:
        """The radius."""
        return self.radius_m

    def hit(self, origin: Float[np.ndarray, " 3"], directions: Float[np.ndarray, "n 3"]) -> Hits:
        """By the quadratic equation in the plane."""
        dx, dy = origin[0] - self.x, origin[1] - self.y
        a = (directions[:, :2] ** 2).sum(-1)
        b = directions[:, 0] * dx + directions[:, 1] * dy
        root = b * b - a * (dx * dx + dy * dy - self.radius_m**2)
        deep = np.sqrt(np.maximum(root, 0))
        near = (-b - deep) / np.maximum(a, 1e-12)
        z = origin[2] + near * directions[:, 2]
        hit = (root > 0) & (near > 0) & (z >= self.low) & (z <= self.high)
        return np.where(hit, near, np.inf), np.minimum(deep / self.radius_m, 1.0)


@dataclass(frozen=True, kw_only=True)
class Ellipsoid(Thing):
    """A tree's crown: an upright ellipsoid between `low` and `high`."""

    radius_m: float

    @property
    def reach_m(self) -> float:
        """The horizontal radius."""
        return self.radius_m

    def hit(self, origin: Float[np.ndarray, " 3"], directions: Float[np.ndarray, "n 3"]) -> Hits:
        """As a sphere, in a space where the ellipsoid is one."""
        axes = np.array([self.radius_m, self.radius_m, 0.5 * (self.high - self.low)])
        start = (origin - (self.x, self.y, 0.5 * (self.low + self.high))) / axes
        rays = directions / axes
        a, b = (rays**2).sum(-1), rays @ start
        root = b * b - a * (start @ start - 1)
        deep = np.sqrt(np.maximum(root, 0))
        near = (-b - deep) / a
        hit = (root > 0) & (near > 0)
        return np.where(hit, near, np.inf), np.minimum(deep / np.sqrt(a), 1.0)
