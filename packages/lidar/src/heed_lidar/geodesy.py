"""Local metres <-> WGS84 longitude, latitude and height, through a tangent plane.

Exact closed forms of the ellipsoid: geodetic -> earth-centred (ECEF), east-north-up at an origin
(ENU); back by Bowring's iteration, which is exact to less than a micrometre near the ground.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

SEMI_MAJOR_M = 6_378_137.0
FLATTENING = 1 / 298.257223563
_ECCENTRICITY_2 = FLATTENING * (2 - FLATTENING)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the frame of the curbs lies on the earth."""

    latitude_deg: float
    """WGS84, north positive."""
    longitude_deg: float
    """WGS84, east positive."""
    altitude_m: float = 0.0
    """Above the ellipsoid."""
    yaw_deg: float = 0.0
    """Direction of the x axis, counter-clockwise from east."""

    def __post_init__(self) -> None:
        values = (self.latitude_deg, self.longitude_deg, self.altitude_m, self.yaw_deg)
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"an origin must be finite, got {values}")
        if not abs(self.latitude_deg) <= 90:
            raise ValueError(f"latitude_deg must be within -90..90, got {self.latitude_deg}")
        if not abs(self.longitude_deg) <= 180:
            raise ValueError(f"longitude_deg must be within -180..180, got {self.longitude_deg}")

    @classmethod
    def parse(cls, text: str) -> "Origin":
        """Read `LATITUDE,LONGITUDE[,ALTITUDE[,YAW]]`, degrees and metres.

        Raises:
            ValueError: Another form, or a value out of range.
        """
        try:
            values = [float(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not 2 <= len(values) <= 4:
            raise ValueError(f"an origin is LATITUDE,LONGITUDE[,ALTITUDE[,YAW]], got {text!r}")
        names = ("latitude_deg", "longitude_deg", "altitude_m", "yaw_deg")
        return cls(**dict(zip(names, values, strict=False)))


def geodetic_to_ecef(geodetic: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
    """Longitude, latitude (degrees) and height (m) -> earth-centred x, y, z (m)."""
    longitude, latitude = np.radians(geodetic[:, 0]), np.radians(geodetic[:, 1])
    height = geodetic[:, 2]
    normal = SEMI_MAJOR_M / np.sqrt(1 - _ECCENTRICITY_2 * np.sin(latitude) ** 2)
    across = (normal + height) * np.cos(latitude)
    return np.stack(
        [
            across * np.cos(longitude),
            across * np.sin(longitude),
            (normal * (1 - _ECCENTRICITY_2) + height) * np.sin(latitude),
        ],
        axis=1,
    )


def ecef_to_geodetic(ecef: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
    """Earth-centred x, y, z (m) -> longitude, latitude (degrees) and height (m)."""
    x, y, z = ecef.T
    across = np.hypot(x, y)
    semi_minor = SEMI_MAJOR_M * (1 - FLATTENING)
    second = _ECCENTRICITY_2 / (1 - _ECCENTRICITY_2)
    reduced = np.arctan2(z, (1 - FLATTENING) * across)
    latitude = reduced
    for _ in range(2):
        latitude = np.arctan2(
            z + second * semi_minor * np.sin(reduced) ** 3,
            across - _ECCENTRICITY_2 * SEMI_MAJOR_M * np.cos(reduced) ** 3,
        )
        reduced = np.arctan2((1 - FLATTENING) * np.sin(latitude), np.cos(latitude))
    sine = np.sin(latitude)
    # This form of the height has no division by a cosine, and holds at the poles.
    height = across * np.cos(latitude) + z * sine
    height -= SEMI_MAJOR_M * np.sqrt(1 - _ECCENTRICITY_2 * sine**2)
    return np.stack([np.degrees(np.arctan2(y, x)), np.degrees(latitude), height], axis=1)


def to_wgs84(xyz: Float64[np.ndarray, "n 3"], origin: Origin) -> Float64[np.ndarray, "n 3"]:
    """Metres in the local frame -> longitude, latitude (degrees), height above the ellipsoid (m).

    Args:
        xyz: Right-handed, z up.
        origin: Where the frame lies.
    """
    base, axes = _frame(origin)
    return ecef_to_geodetic(base + xyz @ axes)


def from_wgs84(geodetic: Float64[np.ndarray, "n 3"], origin: Origin) -> Float64[np.ndarray, "n 3"]:
    """The inverse of `to_wgs84`."""
    base, axes = _frame(origin)
    return np.asarray((geodetic_to_ecef(geodetic) - base) @ axes.T)


def _frame(origin: Origin) -> tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3 3"]]:
    """The origin and, as rows, the local axes, both earth-centred."""
    degrees = np.array([[origin.longitude_deg, origin.latitude_deg, origin.altitude_m]])
    longitude, latitude, yaw = np.radians(
        [origin.longitude_deg, origin.latitude_deg, origin.yaw_deg]
    )
    (so, sa, sy), (co, ca, cy) = (f([longitude, latitude, yaw]) for f in (np.sin, np.cos))
    east, north = np.array([-so, co, 0.0]), np.array([-sa * co, -sa * so, ca])
    up = np.array([ca * co, ca * so, sa])
    return geodetic_to_ecef(degrees)[0], np.stack(
        [cy * east + sy * north, cy * north - sy * east, up]
    )
