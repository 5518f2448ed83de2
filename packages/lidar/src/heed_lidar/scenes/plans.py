"""Streets drawn at random: their course, their edges, and what stands on them.

Neither place nor height nor brightness alone tells a curb: the sensor's lane and the width vary,
some edges have no step, some steps are no curbs, and patches change the brightness of the road.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from heed_lidar.scenes.centreline import Centreline
from heed_lidar.scenes.objects import Box, Cylinder, Ellipsoid, Thing
from heed_lidar.scenes.sensor import Scene, Surfaces
from heed_lidar.scenes.street import (
    BUILDING,
    CAR,
    FENCE,
    OTHER_GROUND,
    POLE,
    TRUNK,
    VEGETATION,
    DroppedCurb,
    Edge,
    Patch,
    Relief,
    Side,
    SideStreet,
    SpeedBump,
    Street,
)

Kind = Literal["straight", "curve", "tee", "cross"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SIDES: tuple[Side, Side] = ("left", "right")
EXTENT_M = 75.0
"""Things are placed as far as this before and behind the sensor."""


def draw_scene(
    rng: np.random.Generator,
    *,
    kind: Kind | None = None,
    curb_height_m: float | None = None,
    driven_m: float = 0.0,
) -> Scene:
    """A scene at random.

    Args:
        rng: Source of chance; the same state gives the same scene.
        kind: Course of the street; None: drawn, too.
        curb_height_m: Height of all curb faces, 0 for none; None: drawn from 0.06 to 0.18.
            Whatever it is, the rest of the scene is the same.
        driven_m: The sensor has come this far along the street; all else stays the same.
    """
    kind = kind or KINDS[rng.integers(len(KINDS))]
    street = _street(rng, kind)
    offset = rng.uniform(-0.65, 0.25) * street.half_width_m
    x, y = street.centreline.point(np.array([0.0, driven_m]), np.array([offset, offset]))
    surfaces = _surfaces(rng)
    yaw, pitch, roll = np.radians(rng.normal(0, (2.0, 0.4, 0.4)))
    if curb_height_m is not None:
        street = replace(street, curb_height_m=curb_height_m)
    things = tuple(_things(rng, street, (float(x[0]), float(y[0]))))
    return Scene(
        name=kind,
        street=street,
        things=things,
        surfaces=surfaces,
        sensor_xy=(float(x[1]), float(y[1])),
        yaw=street.centreline.heading(driven_m) + float(yaw),
        pitch=float(pitch),
        roll=float(roll),
    )


def _street(rng: np.random.Generator, kind: Kind) -> Street:
    half_width = rng.uniform(2.8, 5.5)
    edges = [_edge(rng) for _ in SIDES]
    if not (edges[0].curbed or edges[1].curbed):
        edges[rng.integers(2)] = replace(_edge(rng), curbed=True)
    joining = _side_streets(rng, kind)
    return Street(
        centreline=_centreline(rng, kind),
        half_width_m=half_width,
        curb_height_m=rng.uniform(0.06, 0.18),
        left=edges[0],
        right=edges[1],
        cross_fall=rng.uniform(0.01, 0.03),
        relief=Relief(
            grade=rng.normal(0, 0.02),
            cross=rng.normal(0, 0.01),
            bend_per_m=rng.normal(0, 1 / 2500),
        ),
        undulation_m=rng.uniform(0.01, 0.08),
        side_streets=joining,
        dropped=tuple(_dropped(rng, joining)),
        bumps=tuple(_bumps(rng)),
        patches=tuple(_patches(rng, half_width)),
    )


def _centreline(rng: np.random.Generator, kind: Kind) -> Centreline:
    if kind != "curve":
        return Centreline()
    return Centreline(
        radius_m=float(np.exp(rng.uniform(np.log(20), np.log(200)))),
        left=bool(rng.integers(2)),
        start_m=rng.uniform(-15, 15),
        angle_rad=rng.uniform(0.5, 1.8),
    )


def _edge(rng: np.random.Generator) -> Edge:
    depth = rng.uniform(0.15, 0.3)
    return Edge(
        curbed=bool(rng.random() < 0.88),
        depth_m=depth,
        face_m=rng.uniform(0.03, 0.1),
        verge_m=rng.uniform(0.8, 2.5) if rng.random() < 0.3 else 0.0,
        sidewalk_m=rng.uniform(1.5, 4.0) if rng.random() < 0.9 else 0.0,
    )


def _side_streets(rng: np.random.Generator, kind: Kind) -> tuple[SideStreet, ...]:
    if kind not in ("tee", "cross"):
        return ()
    u, width, fillet = rng.uniform(2, 25), rng.uniform(2.6, 4.5), rng.uniform(2.5, 8)
    sides = SIDES if kind == "cross" else (SIDES[rng.integers(2)],)
    return tuple(
        SideStreet(u_m=u, side=side, half_width_m=width, fillet_m=fillet) for side in sides
    )


def _dropped(rng: np.random.Generator, joining: tuple[SideStreet, ...]) -> Iterator[DroppedCurb]:
    for side in SIDES:
        for u in _spaced(rng, 15.0, 60.0):
            drop = DroppedCurb(u_m=u, side=side, half_length_m=rng.uniform(1.2, 2.5))
            mouths = [abs(u - j.u_m) - j.half_width_m - j.fillet_m for j in joining]
            if min(mouths, default=9.0) > drop.half_length_m + 1:
                yield drop


def _bumps(rng: np.random.Generator) -> Iterator[SpeedBump]:
    if rng.random() < 0.25:
        height, half_length = rng.uniform(0.05, 0.1), rng.uniform(0.3, 1.2)
        yield SpeedBump(u_m=rng.uniform(8, 25), height_m=height, half_length_m=half_length)


def _patches(rng: np.random.Generator, half_width_m: float) -> Iterator[Patch]:
    for u in _spaced(rng, 10.0, 40.0):
        v = rng.uniform(-half_width_m, half_width_m)
        yield Patch(
            u_m=(u, u + rng.uniform(3, 25)),
            v_m=(v, v + rng.uniform(0.8, 3.0)),
            change=rng.uniform(-0.1, 0.15),
        )


def _surfaces(rng: np.random.Generator) -> Surfaces:
    road, sidewalk = rng.uniform(0.14, 0.3), rng.uniform(0.16, 0.36)
    return Surfaces(
        road=road,
        sidewalk=sidewalk,
        curb=(road, sidewalk)[rng.integers(2)] + rng.normal(0, 0.02),
        terrain=rng.uniform(0.28, 0.4),
        other_ground=rng.uniform(0.15, 0.3),
        spread=rng.uniform(0.04, 0.08),
    )


def _spaced(rng: np.random.Generator, shortest: float, longest: float) -> Iterator[float]:
    """Positions along the street at random distances."""
    u = -EXTENT_M + rng.uniform(0, longest)
    while u < EXTENT_M:
        yield float(u)
        u += rng.uniform(shortest, longest)


@dataclass(frozen=True, kw_only=True)
class _Site:
    """Puts things beside a street, in its coordinates, and refuses places that are taken."""

    rng: np.random.Generator
    street: Street
    sensor_xy: tuple[float, float]

    def edge(self, side: Side) -> Edge:
        return self.street.left if side == "left" else self.street.right

    def at(self, u: float, side: Side, s: float) -> tuple[float, float, float, float]:
        """Place (x, y), its direction along the street and its ground, s behind the curb line."""
        v = (self.street.half_width_m + s) * (1 if side == "left" else -1)
        x, y = self.street.centreline.point(np.array([u]), np.array([v]))
        ground = self.street.height(x, y)
        return float(x[0]), float(y[0]), self.street.centreline.heading(u), float(ground[0])

    def clears(self, box: Box, low: float, high: float = math.inf) -> bool:
        """The outline of a box keeps between two distances to the curb line, off the sensor."""
        along = np.array([-1, -0.5, 0, 0.5, 1]) * 0.5 * box.length_m
        across = np.array([-0.5, 0, 0.5]) * box.width_m
        a, b = (grid.reshape(-1) for grid in np.meshgrid(along, across))
        cos, sin = math.cos(box.yaw), math.sin(box.yaw)
        x, y = box.x + a * cos - b * sin, box.y + a * sin + b * cos
        s = self.street.place(x, y).s
        off_sensor = math.dist((box.x, box.y), self.sensor_xy) > 3.5 + 0.5 * box.length_m
        return bool(s.min() >= low and s.max() <= high and off_sensor)


def _things(
    rng: np.random.Generator, street: Street, sensor_xy: tuple[float, float]
) -> Iterator[Thing]:
    site = _Site(rng=rng, street=street, sensor_xy=sensor_xy)
    makers: tuple[Callable[[_Site, Side], Iterator[Thing]], ...] = (
        _buildings,
        _garden_walls,
        _terraces,
        _planters,
        _poles_and_trees,
        _parked_cars,
        _wheel_stops,
    )
    for side in SIDES:
        for make in makers:
            yield from make(site, side)
    yield from _moving_cars(site)


def _buildings(site: _Site, side: Side) -> Iterator[Thing]:
    rng, setback = site.rng, site.rng.uniform(0.3, 9)
    u = -EXTENT_M
    while u < EXTENT_M:
        length, width = rng.uniform(8, 22), rng.uniform(7, 12)
        s = site.edge(side).paved_m + max(setback + rng.normal(0, 0.4), 0.1)
        x, y, yaw, z = site.at(u + length / 2, side, s + width / 2)
        box = Box(
            x=x,
            y=y,
            low=z - 1.5,
            high=z + rng.uniform(4, 12),
            raw=BUILDING,
            remission=rng.uniform(0.15, 0.4),
            length_m=length,
            width_m=width,
            yaw=yaw,
        )
        if rng.random() < 0.85 and site.clears(box, site.edge(side).paved_m):
            yield box
        u += length + (rng.uniform(2, 12) if rng.random() < 0.5 else 0.2)


def _garden_walls(site: _Site, side: Side) -> Iterator[Thing]:
    """Low walls, fences and hedges that follow the street behind the sidewalk."""
    rng, edge = site.rng, site.edge(side)
    for u in _spaced(rng, 8.0, 35.0):
        kind, length = rng.integers(3), rng.uniform(4, 18)
        width = (rng.uniform(0.15, 0.3), 0.06, rng.uniform(0.4, 0.9))[kind]
        height = (rng.uniform(0.1, 0.6), rng.uniform(0.8, 1.6), rng.uniform(0.6, 1.8))[kind]
        x, y, yaw, z = site.at(u, side, edge.paved_m + width / 2 + rng.uniform(0, 0.8))
        box = Box(
            x=x,
            y=y,
            low=z - 0.3,
            high=z + height,
            raw=(FENCE, FENCE, VEGETATION)[kind],
            remission=(0.3, 0.25, 0.35)[kind],
            roughness_m=(0.0, 0.02, 0.08)[kind],
            porosity=(0.0, 0.4, 0.1)[kind],
            length_m=length,
            width_m=width,
            yaw=yaw,
        )
        if site.clears(box, edge.paved_m - 0.2):
            yield box


def _terraces(site: _Site, side: Side) -> Iterator[Thing]:
    """Raised floors: steps as high as a curb that are none."""
    rng, edge = site.rng, site.edge(side)
    for u in _spaced(rng, 20.0, 70.0):
        length, width, height = rng.uniform(3, 10), rng.uniform(1.5, 4), rng.uniform(0.08, 0.2)
        x, y, yaw, z = site.at(u, side, edge.paved_m + width / 2 - 0.3)
        box = Box(
            x=x,
            y=y,
            low=z - 0.3,
            high=z + height,
            raw=OTHER_GROUND,
            remission=rng.uniform(0.15, 0.35),
            length_m=length,
            width_m=width,
            yaw=yaw,
        )
        if edge.sidewalk_m and site.clears(box, edge.depth_m + 0.6):
            yield box


def _planters(site: _Site, side: Side) -> Iterator[Thing]:
    rng, edge = site.rng, site.edge(side)
    if edge.sidewalk_m < 1.5 or rng.random() < 0.5:
        return
    for u in _spaced(rng, 12.0, 50.0):
        s = edge.depth_m + edge.verge_m + rng.uniform(0.5, edge.sidewalk_m - 0.4)
        x, y, yaw, z = site.at(u, side, s)
        box = Box(
            x=x,
            y=y,
            low=z - 0.1,
            high=z + rng.uniform(0.15, 0.5),
            raw=FENCE,
            remission=rng.uniform(0.15, 0.4),
            length_m=rng.uniform(0.8, 2.5),
            width_m=rng.uniform(0.4, 0.8),
            yaw=yaw,
        )
        if site.clears(box, edge.depth_m):
            yield box


def _poles_and_trees(site: _Site, side: Side) -> Iterator[Thing]:
    rng, edge = site.rng, site.edge(side)
    for u in _spaced(rng, 12.0, 35.0):
        s = edge.depth_m + rng.uniform(0.3, 0.7)
        x, y, yaw, z = site.at(u, side, s)
        radius = rng.uniform(0.05, 0.12)
        foot = Box(x=x, y=y, low=z, high=z, raw=POLE, length_m=0.3, width_m=0.3, yaw=yaw)
        if not site.clears(foot, edge.depth_m):
            continue
        if rng.random() < 0.5:
            yield Cylinder(x=x, y=y, low=z, high=z + rng.uniform(3, 8), raw=POLE, radius_m=radius)
            continue
        trunk = rng.uniform(1.8, 3.2)
        yield Cylinder(x=x, y=y, low=z, high=z + trunk + 0.8, raw=TRUNK, radius_m=2 * radius)
        yield Ellipsoid(
            x=x,
            y=y,
            low=z + trunk,
            high=z + trunk + rng.uniform(3, 6),
            raw=VEGETATION,
            remission=0.32,
            radius_m=rng.uniform(1.2, 2.8),
            roughness_m=0.35,
            porosity=0.35,
        )


def _car(site: _Site, x: float, y: float, yaw: float, z: float, instance: int) -> list[Box]:
    """A body on four wheels and a cabin; rays pass under the body."""
    rng = site.rng
    length, width, remission = rng.uniform(3.7, 4.8), rng.uniform(1.65, 1.9), rng.uniform(0.03, 0.4)
    parts = [
        (0.0, 0.0, length, width, 0.28, 0.9),
        (-0.15, 0.0, 0.55 * length, width - 0.2, 0.9, 1.48),
    ]
    parts += [
        (along * 0.3 * length, across * (width / 2 - 0.12), 0.6, 0.22, 0.0, 0.6)
        for along in (-1, 1)
        for across in (-1, 1)
    ]
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [
        Box(
            x=x + a * cos - b * sin,
            y=y + a * sin + b * cos,
            low=z + low,
            high=z + high,
            raw=CAR,
            instance=instance,
            remission=remission,
            length_m=size,
            width_m=wide,
            yaw=yaw,
        )
        for a, b, size, wide, low, high in parts
    ]


def _parked_cars(site: _Site, side: Side) -> Iterator[Thing]:
    rng = site.rng
    if rng.random() < 0.35:
        return
    longest = rng.uniform(8, 40)
    for number, u in enumerate(_spaced(rng, 6.0, longest)):
        x, y, yaw, z = site.at(u, side, -1.05 - rng.uniform(0, 0.3))
        instance = 1 + 2 * number + SIDES.index(side)
        car = _car(site, x, y, yaw + rng.normal(0, 0.03), z, instance)
        if site.clears(car[0], -3.0, -0.02) and abs(x - site.sensor_xy[0]) > 4:
            yield from car


def _wheel_stops(site: _Site, side: Side) -> Iterator[Thing]:
    """Concrete bars on the carriageway, as high as a curb."""
    rng = site.rng
    if rng.random() < 0.75:
        return
    for u in _spaced(rng, 10.0, 50.0):
        x, y, yaw, z = site.at(u, side, -rng.uniform(0.3, 1.2))
        box = Box(
            x=x,
            y=y,
            low=z - 0.1,
            high=z + rng.uniform(0.08, 0.14),
            raw=OTHER_GROUND,
            remission=rng.uniform(0.2, 0.4),
            length_m=1.7,
            width_m=0.16,
            yaw=yaw + (0.0, math.pi / 2)[rng.integers(2)],
        )
        if site.clears(box, -9.0, -0.02):
            yield box


def _moving_cars(site: _Site) -> Iterator[Thing]:
    rng, half = site.rng, site.street.half_width_m
    for number, u in enumerate(_spaced(rng, 25.0, 80.0)):
        side = SIDES[rng.integers(2)]
        x, y, yaw, z = site.at(u, side, -half + 0.25 * half + rng.uniform(0, 0.5))
        car = _car(site, x, y, yaw, z, 500 + number)
        if math.dist((x, y), site.sensor_xy) > 9:
            yield from car
