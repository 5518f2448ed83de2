"""Write curbs as map files: GeoJSON, CSV, OpenStreetMap XML in the way of Lanelet2, DXF.

Lines are simplified to a few centimetres first. A file is written under another name in the same
folder and renamed, so that a reader never sees half of it.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float64

from heed_core.errors import InputError
from heed_lidar.curves import Curb, simplify
from heed_lidar.geodesy import Origin, to_wgs84

Frame = Literal["sensor", "map"]

REACH_M = 100_000.0
"""Farther from an origin its tangent plane is 800 m above the ground and more."""
_HIGH_STEP_M = 0.12
_DEGREE_DIGITS = 9  # a tenth of a millimetre
_METRE_DIGITS = 4


def write_geojson(
    curbs: Sequence[Curb],
    path: Path,
    *,
    origin: Origin | None = None,
    frame: str = "",
    stamp: float | None = None,
    frame_id: str | None = None,
    crs: Frame = "sensor",
    tolerance_m: float = 0.05,
) -> Path:
    """Write a FeatureCollection of LineStrings (RFC 7946); the path of the file comes back.

    With an origin the coordinates are WGS84 longitude, latitude and height. Without one they are
    metres: the file is named `*.local.geojson` and its member `heed:crs` names the frame.

    Args:
        curbs: What is written.
        path: Ends in .geojson.
        origin: Where the curbs' frame lies on the earth.
        frame: Name of the scan, a property of each curb.
        stamp: Time of the scan in seconds, a property of each curb.
        frame_id: Name that a recording gives the frame of its scans, a property of each curb.
        crs: The frame of the curbs; of use without an origin only.
        tolerance_m: Of the simplification.

    Raises:
        ValueError: A number that is not finite.
        InputError: The file cannot be written; a curb is more than 100 km from the origin.
    """
    features, corners = [], []
    told: dict[str, object] = {"frame": frame, "stamp": stamp, "frame_id": frame_id}
    for curb, line in _lines(curbs, tolerance_m):
        vertices = line if origin is None else _on_earth(line, origin, path)
        vertices = _rounded(vertices, origin)
        corners.append(vertices)
        features.append(
            {
                "type": "Feature",
                "bbox": _box(vertices),
                "geometry": {"type": "LineString", "coordinates": vertices.tolist()},
                "properties": _properties(curb) | told,
            }
        )
    document: dict[str, object] = {"type": "FeatureCollection", "features": features}
    if corners:
        document["bbox"] = _box(np.concatenate(corners))
    if origin is None:
        document["heed:crs"] = crs
        path = path.with_name(f"{path.name.removesuffix('.geojson')}.local.geojson")
    return _write(path, json.dumps(document, allow_nan=False, indent=1) + "\n")


def read_geojson(path: Path, *, crs: Frame | None = None) -> list[Curb]:
    """Read what `write_geojson` wrote without an origin: curbs in metres.

    Args:
        path: The file.
        crs: The frame that the curbs have to be in; None: any.

    Raises:
        InputError: The file does not exist, is something else, holds degrees, or curbs in another
            frame.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.get("heed:crs")
        curbs = [] if found is None else [_curb_of(feature) for feature in document["features"]]
    except FileNotFoundError:
        raise InputError("does not exist", path=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"is not a file of curbs ({type(error).__name__}: {error})",
            path=path,
            remedy="give what predict wrote",
        ) from error
    if found is None:
        raise InputError(
            "holds degrees, curbs in metres are needed", path=path, remedy="leave out map_origin"
        )
    if crs is not None and found != crs:
        raise InputError(f"holds curbs in the frame of a {found}, not of a {crs}", path=path)
    return curbs


def _curb_of(feature: dict[str, Any]) -> Curb:
    known = feature["properties"]
    polyline = np.asarray(feature["geometry"]["coordinates"], dtype=np.float64)
    if polyline.ndim != 2 or polyline.shape[1] != 3 or len(polyline) < 2:
        raise ValueError(f"a line of shape {polyline.shape}")
    if not np.isfinite(polyline).all():
        raise ValueError("a vertex that is not finite")
    return Curb(
        number=int(known["id"]),
        polyline=polyline,
        side="left" if known["side"] == "left" else "right",
        length_m=float(known["length_m"]),
        rmse_m=float(known["rmse_m"]),
        points=int(known["n_points"]),
        step_height_m=float(known["step_height_m"]),
        score=float(known["score"]),
    )


def write_csv(
    curbs: Sequence[Curb], path: Path, *, frame: str = "", tolerance_m: float = 0.05
) -> Path:
    """Write one row per vertex: curb_id, vertex, x, y, z (m), side, score, frame.

    Args:
        curbs: What is written.
        path: Of the file.
        frame: Name of the scan.
        tolerance_m: Of the simplification.

    Raises:
        ValueError: A number that is not finite.
        InputError: The file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["curb_id", "vertex", "x", "y", "z", "side", "score", "frame"])
    for curb, line in _lines(curbs, tolerance_m):
        for number, vertex in enumerate(line):
            place = [f"{value:.{_METRE_DIGITS}f}" for value in vertex]
            table.writerow([curb.number, number, *place, curb.side, f"{curb.score:.4f}", frame])
    return _write(path, text.getvalue())


def write_osm(
    curbs: Sequence[Curb], path: Path, *, origin: Origin, tolerance_m: float = 0.05
) -> Path:
    """Write ways of type curbstone as Lanelet2 reads them.

    The subtype is high for steps of at least 0.12 m, else low.

    Args:
        curbs: What is written.
        path: Ends in .osm.
        origin: Where the curbs' frame lies on the earth; nodes are longitude and latitude.
        tolerance_m: Of the simplification.

    Raises:
        ValueError: A number that is not finite.
        InputError: The file cannot be written; a curb is more than 100 km from the origin.
    """
    root = ElementTree.Element("osm", version="0.6", generator="heed", upload="never")
    ways: list[ElementTree.Element] = []
    nodes = 0
    for curb, line in _lines(curbs, tolerance_m):
        way = ElementTree.Element("way", id="0", visible="true", version="1")
        for longitude, latitude, height in _rounded(_on_earth(line, origin, path), origin):
            nodes += 1
            node = ElementTree.SubElement(
                root,
                "node",
                id=str(nodes),
                visible="true",
                version="1",
                lat=f"{latitude:.{_DEGREE_DIGITS}f}",
                lon=f"{longitude:.{_DEGREE_DIGITS}f}",
            )
            ElementTree.SubElement(node, "tag", k="ele", v=f"{height:.{_METRE_DIGITS}f}")
            ElementTree.SubElement(way, "nd", ref=str(nodes))
        high = curb.step_height_m >= _HIGH_STEP_M
        tags = {
            "type": "curbstone",
            "subtype": "high" if high else "low",
            "height": f"{curb.step_height_m:.2f}",
        }
        for key, value in tags.items():
            ElementTree.SubElement(way, "tag", k=key, v=value)
        ways.append(way)
    for number, way in enumerate(ways, start=nodes + 1):
        way.set("id", str(number))
    root.extend(ways)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return _write(path, f"<?xml version='1.0' encoding='UTF-8'?>\n{text}\n")


def write_dxf(curbs: Sequence[Curb], path: Path, *, tolerance_m: float = 0.05) -> Path:
    """Write 3-D polylines in metres as ASCII DXF (release 12), which every CAD program reads.

    Args:
        curbs: What is written; left and right ones on a layer each.
        path: Ends in .dxf.
        tolerance_m: Of the simplification.

    Raises:
        ValueError: A number that is not finite.
        InputError: The file cannot be written.
    """
    pairs: list[tuple[int, str]] = [(0, "SECTION"), (2, "ENTITIES")]
    for curb, line in _lines(curbs, tolerance_m):
        layer = f"CURB_{curb.side.upper()}"
        pairs += [(0, "POLYLINE"), (8, layer), (66, "1"), (70, "8")]
        pairs += [(10, "0.0"), (20, "0.0"), (30, "0.0")]
        for vertex in line:
            pairs += [(0, "VERTEX"), (8, layer), (70, "32")]
            places = zip((10, 20, 30), vertex, strict=True)
            pairs += [(code, f"{value:.{_METRE_DIGITS}f}") for code, value in places]
        pairs += [(0, "SEQEND"), (8, layer)]
    pairs += [(0, "ENDSEC"), (0, "EOF")]
    return _write(path, "".join(f"{code:3d}\n{value}\n" for code, value in pairs))


def _lines(
    curbs: Sequence[Curb], tolerance_m: float
) -> Iterator[tuple[Curb, Float64[np.ndarray, "m 3"]]]:
    """The curbs with their simplified lines; numbers that no file can hold are refused."""
    for curb in curbs:
        measures = (curb.length_m, curb.rmse_m, curb.step_height_m, curb.score)
        if not (np.isfinite(curb.polyline).all() and np.isfinite(measures).all()):
            raise ValueError(f"curb {curb.number} has a vertex or measure that is not finite")
        yield curb, simplify(curb.polyline, tolerance_m)


def _on_earth(
    line: Float64[np.ndarray, "m 3"], origin: Origin, path: Path
) -> Float64[np.ndarray, "m 3"]:
    """As `to_wgs84`, near the origin, where its plane is the ground."""
    away_m = float(np.hypot(line[:, 0], line[:, 1]).max())
    if away_m > REACH_M:
        raise InputError(
            f"would hold a curb {away_m / 1000:.0f} km from map_origin, the place on the earth of "
            f"(0, 0) in the scans' coordinates; it holds for {REACH_M / 1000:.0f} km",
            path=path.name,
            remedy="the coordinates are a map's (UTM?): leave map_origin out to get GeoJSON in "
            "these metres, or give scans whose (0, 0) is nearby",
        )
    return to_wgs84(line, origin)


def _properties(curb: Curb) -> dict[str, object]:
    return {
        "id": curb.number,
        "side": curb.side,
        "length_m": round(curb.length_m, 3),
        "rmse_m": round(curb.rmse_m, 4),
        "n_points": curb.points,
        "step_height_m": round(curb.step_height_m, 3),
        "score": round(curb.score, 4),
    }


def _rounded(
    vertices: Float64[np.ndarray, "m 3"], origin: Origin | None
) -> Float64[np.ndarray, "m 3"]:
    digits = _METRE_DIGITS if origin is None else _DEGREE_DIGITS
    plane, height = np.round(vertices[:, :2], digits), np.round(vertices[:, 2:], _METRE_DIGITS)
    return np.concatenate([plane, height], axis=1)


def _box(vertices: Float64[np.ndarray, "m 3"]) -> list[float]:
    """West, south, lowest, east, north, highest."""
    return [*vertices.min(axis=0).tolist(), *vertices.max(axis=0).tolist()]


def _write(path: Path, text: str) -> Path:
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror or error})",
            path=path,
            remedy="choose a folder that is writable and has space",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return path
