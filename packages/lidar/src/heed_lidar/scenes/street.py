"""A street as functions of the place: height and kind of the ground, and where its curbs run.

All of it follows from one field, the distance s to the curb line: negative on the carriageway, zero
at the foot of the curb, positive behind it. Heights, labels and the true curb polylines are read
from the same field, so they agree to the last digit.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from heed_lidar.scenes.centreline import Centreline

Side = Literal["left", "right"]

OUTLIER, CAR, CURB, ROAD, SIDEWALK, OTHER_GROUND = 1, 10, 3, 40, 48, 49
BUILDING, FENCE, VEGETATION, TRUNK, TERRAIN, POLE = 50, 51, 70, 71, 72, 80
"""Raw ids of SemanticKITTI, and 3 of 3D-Curb for the curb."""

DROPPED_SHARE = 0.12
"""Height of a dropped curb as a share of the full one."""
DROPPED_RAMP_M = 0.7
"""Length along the curb over which it is lowered."""


@dataclass(frozen=True, kw_only=True)
class SideStreet:
    """A street that leaves the main one at a right angle."""

    u_m: float
    side: Side
    half_width_m: float = 3.0
    fillet_m: float = 5.0
    """Radius of the curb at the two corners."""


@dataclass(frozen=True, kw_only=True)
class DroppedCurb:
    """A driveway: the curb is lowered and does not count as a curb."""

    u_m: float
    side: Side
    half_length_m: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A rectangle of the carriageway with another surface: a repaired or paved strip."""

    u_m: tuple[float, float]
    v_m: tuple[float, float]
    change: float
    """Added to the remission."""


@dataclass(frozen=True, kw_only=True)
class SpeedBump:
    """A cosine bump across the carriageway; it is no curb."""

    u_m: float
    half_length_m: float = 0.6
    height_m: float = 0.07


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One edge of the carriageway and what lies behind it, from the road outwards."""

    curbed: bool = True
    """False: the surfaces meet flush, and there is no curb."""
    depth_m: float = 0.2
    """Width of the curb stone; all of it counts as curb."""
    face_m: float = 0.06
    """Width of the stone's sloping face, where the height rises."""
    verge_m: float = 0.0
    """Grass between curb and sidewalk."""
    sidewalk_m: float = 2.0
    """Paved width; beyond it there is terrain. 0: terrain begins at once."""

    def __post_init__(self) -> None:
        if not 0 < self.face_m <= self.depth_m:
            raise ValueError(
                f"face_m must be above 0 and at most depth_m {self.depth_m}, got {self.face_m}"
            )

    @property
    def paved_m(self) -> float:
        """Where the terrain begins, behind the curb line."""
        return (self.depth_m if self.curbed else 0.0) + self.verge_m + self.sidewalk_m


@dataclass(frozen=True, kw_only=True)
class Relief:
    """How the whole ground bends: z = grade x + cross y + bend x^2 / 2, metres."""

    grade: float = 0.0
    cross: float = 0.0
    bend_per_m: float = 0.0

    def height(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Height at places, metres."""
        z: Float[np.ndarray, " n"] = (self.grade + 0.5 * self.bend_per_m * x) * x + self.cross * y
        return z


@dataclass(frozen=True, kw_only=True)
class Place:
    """Points of the ground in the coordinates of the street."""

    u: Float[np.ndarray, " n"]
    v: Float[np.ndarray, " n"]
    s: Float[np.ndarray, " n"]
    """Distance to the curb line, negative on the carriageway."""
    left: Bool[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Street:
    """A carriageway with its edges. x and y are metres in the frame of the street."""

    centreline: Centreline = field(default_factory=Centreline)
    half_width_m: float = 4.0
    curb_height_m: float = 0.12
    """Height of the faces that are built; 0 leaves labels and polylines where they are."""
    left: Edge = field(default_factory=Edge)
    right: Edge = field(default_factory=Edge)
    cross_fall: float = 0.02
    """The carriageway falls towards the curbs, sidewalks fall towards the carriageway."""
    relief: Relief = field(default_factory=Relief)
    undulation_m: float = 0.05
    """Amplitude of the terrain's waves."""
    side_streets: tuple[SideStreet, ...] = ()
    dropped: tuple[DroppedCurb, ...] = ()
    bumps: tuple[SpeedBump, ...] = ()
    patches: tuple[Patch, ...] = ()

    def __post_init__(self) -> None:
        if not self.curb_height_m >= 0:
            raise ValueError(f"curb_height_m must be at least 0, got {self.curb_height_m}")
        if not self.half_width_m > 0:
            raise ValueError(f"half_width_m must be positive, got {self.half_width_m}")

    @property
    def relief_range_m(self) -> tuple[float, float]:
        """Lowest and highest ground above the relief."""
        paved = max(edge.verge_m + edge.sidewalk_m for edge in (self.left, self.right))
        bump = max((bump.height_m for bump in self.bumps), default=0.0)
        slopes = self.cross_fall * max(self.half_width_m, paved)
        return -self.undulation_m - 0.01, self.curb_height_m + slopes + bump + self.undulation_m

    def place(self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Place:
        """Street coordinates of points."""
        u, v = self.centreline.locate(x, y)
        s = np.abs(v) - self.half_width_m
        left = v > 0
        for joining in self.side_streets:
            here = left if joining.side == "left" else ~left
            along, _ = self._along_side_street(joining, x[here], y[here])
            s[here] = _corner(s[here], np.abs(along) - joining.half_width_m, joining.fillet_m)
        return Place(u=u, v=v, s=s, left=left)

    def height(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """Height of the ground, metres."""
        place = self.place(x, y)
        s = place.s
        above: Float[np.ndarray, " n"] = self.cross_fall * np.clip(-s, 0, self.half_width_m)
        for bump in self.bumps:
            phase = np.clip((place.u - bump.u_m) / bump.half_length_m, -1, 1)
            above += bump.height_m * (0.5 + 0.5 * np.cos(np.pi * phase)) * (s < 0)
        behind = np.flatnonzero(s > 0)
        for edge, here in self._by_side(place, behind):
            above[here] = self._height_behind(edge, place, here, x[here], y[here])
        above += self.relief.height(x, y)
        return above

    def labels(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Raw id of the ground at points."""
        place = self.place(x, y)
        raw = np.full(len(x), ROAD)
        for bump in self.bumps:
            raw[(np.abs(place.u - bump.u_m) < bump.half_length_m) & (place.s < 0)] = OTHER_GROUND
        for edge, here in self._by_side(place, np.flatnonzero(place.s >= 0)):
            s = place.s[here]
            stone = edge.depth_m if edge.curbed else 0.0
            found = np.where(s < edge.paved_m, SIDEWALK, TERRAIN)
            found[s < stone + edge.verge_m] = TERRAIN
            full = self.is_curb(place)[here]
            found[s < stone] = np.where(full, CURB, SIDEWALK)[s < stone]
            raw[here] = found
        return raw

    def is_curb(self, place: Place) -> Bool[np.ndarray, " n"]:
        """Where the edge beside a place is a curb of (more than half) its full height."""
        curbed = np.where(place.left, self.left.curbed, self.right.curbed)
        return curbed & (self._raised(place) > 0.5)

    def changes(
        self, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> Float[np.ndarray, " n"]:
        """What patches add to the remission of the carriageway at points."""
        place = self.place(x, y)
        total = np.zeros(len(x))
        for patch in self.patches:
            inside = (place.u > patch.u_m[0]) & (place.u < patch.u_m[1]) & (place.s < 0)
            total[inside & (place.v > patch.v_m[0]) & (place.v < patch.v_m[1])] = patch.change
        return total

    def _by_side(
        self, place: Place, rows: Int[np.ndarray, " m"]
    ) -> tuple[tuple[Edge, Int[np.ndarray, " l"]], tuple[Edge, Int[np.ndarray, " r"]]]:
        left = place.left[rows]
        return (self.left, rows[left]), (self.right, rows[~left])

    def _height_behind(
        self,
        edge: Edge,
        place: Place,
        rows: Int[np.ndarray, " m"],
        x: Float[np.ndarray, " m"],
        y: Float[np.ndarray, " m"],
    ) -> Float[np.ndarray, " m"]:
        s = place.s[rows]
        stone = edge.depth_m if edge.curbed else 0.0
        paved = np.clip(s - stone, 0, edge.verge_m + edge.sidewalk_m)
        above: Float[np.ndarray, " m"] = self.cross_fall * paved
        if edge.curbed:
            raised = self._raised(place, rows)
            ramp = np.clip((s - stone) / 1.2, 0, 1)
            rise = np.clip(s / edge.face_m, 0, 1)
            above += self.curb_height_m * rise * (raised + (1 - raised) * ramp)
        outside = np.clip(s - edge.paved_m, 0, 1)
        wild = outside > 0
        above[wild] += self.undulation_m * outside[wild] * _waves(x[wild], y[wild])
        return above

    def _raised(
        self, place: Place, rows: Int[np.ndarray, " m"] | slice = slice(None)
    ) -> Float[np.ndarray, " m"]:
        """Height of the curb beside places as a share of the full one."""
        u, left = place.u[rows], place.left[rows]
        near = np.abs(place.v[rows]) < self.half_width_m + 4.0
        raised = np.ones(len(u))
        for drop in self.dropped:
            away = np.clip((np.abs(u - drop.u_m) - drop.half_length_m) / DROPPED_RAMP_M, 0, 1)
            lowered = DROPPED_SHARE + (1 - DROPPED_SHARE) * away
            here = near & (left == (drop.side == "left"))
            raised[here] = np.minimum(raised, lowered)[here]
        return raised

    def _along_side_street(
        self, joining: SideStreet, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Coordinates (across, outwards) of points in the frame of a side street."""
        px, py = self.centreline.point(np.array([joining.u_m]), np.array([0.0]))
        yaw = self.centreline.heading(joining.u_m)
        cos, sin = np.cos(yaw), np.sin(yaw)
        across = (x - px) * cos + (y - py) * sin
        outwards = (y - py) * cos - (x - px) * sin
        return across, outwards if joining.side == "left" else -outwards

    def from_side_street(
        self,
        joining: SideStreet,
        across: Float[np.ndarray, " n"],
        outwards: Float[np.ndarray, " n"],
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Points (x, y) from coordinates in the frame of a side street."""
        px, py = self.centreline.point(np.array([joining.u_m]), np.array([0.0]))
        yaw = self.centreline.heading(joining.u_m)
        cos, sin = np.cos(yaw), np.sin(yaw)
        side = outwards if joining.side == "left" else -outwards
        return px + across * cos - side * sin, py + across * sin + side * cos


def _waves(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Uneven ground in [-1, 1]: waves of 3 to 15 m, bent by each other."""
    long_ = np.sin(0.43 * x + 1.7 * np.sin(0.29 * y)) + np.sin(0.51 * y + 1.4 * np.sin(0.23 * x))
    short = np.sin(1.9 * x + 1.1 * y + 2.0 * long_)
    return 0.35 * long_ + 0.3 * short


def _corner(
    main: Float[np.ndarray, " n"], joining: Float[np.ndarray, " n"], fillet_m: float
) -> Float[np.ndarray, " n"]:
    """Distance to the curb of two streets that meet at a right angle with a rounded corner.

    `main` and `joining` are the distances to the edges of each street alone.
    """
    a, b = fillet_m - main, fillet_m - joining
    return fillet_m - np.hypot(np.maximum(a, 0), np.maximum(b, 0)) - np.minimum(np.maximum(a, b), 0)
