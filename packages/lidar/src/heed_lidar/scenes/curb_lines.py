"""The true curbs of a street as polylines, from the same field as its heights and labels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from heed_lidar.scenes.street import Side, SideStreet, Street

STEP_M = 0.5
SIDE_STREET_M = 45.0
"""Length of a side street's curbs."""


@dataclass(frozen=True, kw_only=True)
class TrueCurb:
    """The upper front edge of one curb."""

    polyline: Float[np.ndarray, "m 3"]
    """Metres, in the frame of the street, vertices about 0.5 m apart."""
    side: Side
    """Side of the main street, by its centreline's direction."""


def true_curbs(street: Street, *, around: tuple[float, float], reach_m: float) -> list[TrueCurb]:
    """Every curb within a distance of a place.

    Lowered curbs and flush edges are left out; what remains is cut where it leaves the circle.

    Args:
        street: The street.
        around: Centre (x, y) of the circle, metres.
        reach_m: Its radius.
    """
    curbs = []
    for side, x, y in _tracks(street, around=around, reach_m=reach_m):
        x, y = _onto_edge(street, side, x, y)
        place = street.place(x, y)
        near = np.hypot(x - around[0], y - around[1]) <= reach_m
        for run in _runs(street.is_curb(place) & near):
            line = np.stack([x[run], y[run], street.height(x[run], y[run])], -1)
            curbs.append(TrueCurb(polyline=line, side=side))
    return curbs


def _tracks(
    street: Street, *, around: tuple[float, float], reach_m: float
) -> list[tuple[Side, Float[np.ndarray, " m"], Float[np.ndarray, " m"]]]:
    """Lines along every edge, roughly on the curb."""
    here, _ = street.centreline.locate(np.array([around[0]]), np.array([around[1]]))
    along = np.arange(here[0] - 2 * reach_m, here[0] + 2 * reach_m, STEP_M)
    tracks = []
    sides: tuple[Side, Side] = ("left", "right")
    for side in sides:
        face = (street.left if side == "left" else street.right).face_m
        offset = (street.half_width_m + face) * (1 if side == "left" else -1)
        joining = [joined for joined in street.side_streets if joined.side == side]
        free = np.ones(len(along), bool)
        for joined in joining:
            free &= np.abs(along - joined.u_m) > joined.half_width_m + joined.fillet_m
            for hand in (1.0, -1.0):
                across, outwards = _corner_track(street, joined, face, hand)
                tracks.append((side, *street.from_side_street(joined, across, outwards)))
        for run in _runs(free):
            u = along[run]
            tracks.append((side, *street.centreline.point(u, np.full(len(u), offset))))
    return tracks


def _corner_track(
    street: Street, joined: SideStreet, face_m: float, hand: float
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Round one corner of a side street and along its edge: (across, outwards)."""
    radius = joined.fillet_m - face_m
    steps = max(3, int(np.ceil(radius * np.pi / 2 / STEP_M)) + 1)
    angle = np.linspace(np.pi / 2, 0, steps)
    centre = joined.half_width_m + joined.fillet_m, street.half_width_m + joined.fillet_m
    beyond = np.arange(centre[1] + STEP_M, centre[1] + SIDE_STREET_M, STEP_M)
    across = np.concatenate(
        [
            centre[0] - radius * np.cos(angle),
            np.full(len(beyond), joined.half_width_m + face_m),
        ]
    )
    outwards = np.concatenate([centre[1] - radius * np.sin(angle), beyond])
    return hand * across, outwards


def _onto_edge(
    street: Street, side: Side, x: Float[np.ndarray, " m"], y: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """Move points onto the upper edge of the curb's face by Newton's steps."""
    face = (street.left if side == "left" else street.right).face_m
    tiny = 1e-5
    for _ in range(4):
        off = street.place(x, y).s - face
        slope_x = (street.place(x + tiny, y).s - street.place(x - tiny, y).s) / (2 * tiny)
        slope_y = (street.place(x, y + tiny).s - street.place(x, y - tiny).s) / (2 * tiny)
        step = off / np.maximum(slope_x**2 + slope_y**2, 0.25)
        x, y = x - step * slope_x, y - step * slope_y
    return x, y


def _runs(keep: Bool[np.ndarray, " m"]) -> list[slice]:
    """Stretches of at least two kept vertices."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep.astype(np.int8), [0]])))
    return [slice(a, b) for a, b in edges.reshape(-1, 2) if b - a >= 2]
