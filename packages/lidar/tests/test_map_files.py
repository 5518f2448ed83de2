"""Map files are read back with general readers and compared; the earth with known places."""

import csv
import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heed_core.errors import InputError
from heed_lidar.curves import Curb, simplify
from heed_lidar.geodesy import (
    Origin,
    ecef_to_geodetic,
    from_wgs84,
    geodetic_to_ecef,
    to_wgs84,
)
from heed_lidar.map_files import write_csv, write_dxf, write_geojson, write_osm

ORIGIN = Origin(latitude_deg=49.011212, longitude_deg=8.4228, altitude_m=116.4, yaw_deg=37.5)


def make_curb(number=0, step=0.1, side="left"):
    x = np.linspace(1, 41, 81)
    y = (4 if side == "left" else -4) + 0.01 * x**2
    polyline = np.column_stack([x, y, -1.7 + 0.02 * x])
    return Curb(
        number=number, polyline=polyline, side=side, length_m=44.5, rmse_m=0.031, points=512,
        step_height_m=step, score=0.875,
    )  # fmt: skip


CURBS = [make_curb(0), make_curb(1, step=0.15, side="right")]


def read_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def check_geojson(document):
    """RFC 7946, for collections of LineStrings with heights."""
    assert document["type"] == "FeatureCollection"
    assert "crs" not in document
    west, south, lowest, east, north, highest = document["bbox"]
    for feature in document["features"]:
        assert feature["type"] == "Feature"
        assert isinstance(feature["properties"], dict)
        assert feature["geometry"]["type"] == "LineString"
        places = feature["geometry"]["coordinates"]
        assert len(places) >= 2
        for x, y, z in places:
            assert west <= x <= east
            assert south <= y <= north
            assert lowest <= z <= highest


def test_coordinates_of_a_map_are_not_put_on_the_earth(tmp_path):
    utm = [replace(c, polyline=c.polyline + np.array([690_000, 5_400_000, 0])) for c in CURBS]
    for write, name in ((write_geojson, "a.geojson"), (write_osm, "a.osm")):
        with pytest.raises(InputError, match=f"{name}: would hold a curb 544. km from map_origin"):
            write(utm, tmp_path / name, origin=ORIGIN)
        assert not (tmp_path / name).exists()
    assert write_geojson(utm, tmp_path / "a.geojson", crs="map").exists()
    near = [replace(c, polyline=c.polyline + np.array([60_000, 70_000, 0])) for c in CURBS]
    assert write_geojson(near, tmp_path / "b.geojson", origin=ORIGIN).exists()


def test_geojson_re_projects_within_a_centimetre(tmp_path):
    told = {"frame": "000042", "stamp": 12.5, "frame_id": "velodyne"}
    path = write_geojson(CURBS, tmp_path / "a.geojson", origin=ORIGIN, **told)
    assert path == tmp_path / "a.geojson"
    document = read_json(path)
    check_geojson(document)
    assert "heed:crs" not in document
    for curb, feature in zip(CURBS, document["features"], strict=True):
        places = np.array(feature["geometry"]["coordinates"])
        assert (abs(places[:, 0] - 8.4228) < 0.001).all()  # longitude first
        local = from_wgs84(places, ORIGIN)
        expected = simplify(curb.polyline, 0.05)
        assert len(expected) < len(curb.polyline) / 4
        assert np.abs(local - expected).max() < 0.001
    assert document["features"][1]["properties"] == {
        "id": 1, "side": "right", "length_m": 44.5, "rmse_m": 0.031, "n_points": 512,
        "step_height_m": 0.15, "score": 0.875, **told,
    }  # fmt: skip


def test_geojson_without_an_origin_says_so(tmp_path):
    path = write_geojson(CURBS, tmp_path / "scan.geojson", crs="map", tolerance_m=0.0)
    assert path.name == "scan.local.geojson"
    assert [p.name for p in tmp_path.iterdir()] == ["scan.local.geojson"]
    document = read_json(path)
    check_geojson(document)
    assert document["heed:crs"] == "map"
    places = np.array(document["features"][0]["geometry"]["coordinates"])
    assert np.abs(places[[0, -1]] - CURBS[0].polyline[[0, -1]]).max() < 1e-4


def test_no_curbs_are_valid_files(tmp_path):
    document = read_json(write_geojson([], tmp_path / "none.geojson", origin=ORIGIN))
    assert document == {"type": "FeatureCollection", "features": []}
    assert write_csv([], tmp_path / "none.csv").read_text().count("\n") == 1
    root = ElementTree.parse(write_osm([], tmp_path / "none.osm", origin=ORIGIN)).getroot()
    assert len(root) == 0


@pytest.mark.parametrize("write", [write_geojson, write_csv, write_dxf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, write, value):
    broken = make_curb(7)
    broken.polyline[3, 2] = value
    for curb in (broken, replace(make_curb(7), step_height_m=value)):
        with pytest.raises(ValueError, match="curb 7 has a vertex or measure that is not finite"):
            write([curb], tmp_path / "a.geojson")
    assert list(tmp_path.iterdir()) == []


def test_csv_rows(tmp_path):
    path = write_csv(CURBS, tmp_path / "deep" / "a.csv", frame="scan, one")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["curb_id", "vertex", "x", "y", "z", "side", "score", "frame"]
    right = [row for row in rows if row["side"] == "right"]
    assert [int(row["vertex"]) for row in right] == list(range(len(right)))
    assert {(row["curb_id"], row["score"], row["frame"]) for row in right} == {
        ("1", "0.8750", "scan, one")
    }
    places = np.array([[float(row[axis]) for axis in "xyz"] for row in right])
    assert np.abs(places - simplify(CURBS[1].polyline)).max() < 1e-4


def test_osm_ways_refer_to_their_nodes(tmp_path):
    root = ElementTree.parse(write_osm(CURBS, tmp_path / "a.osm", origin=ORIGIN)).getroot()
    nodes = {node.get("id"): node for node in root.iter("node")}
    ways = list(root.iter("way"))
    ids = [element.get("id") for element in root]
    assert len(set(ids)) == len(ids)
    tags = [{tag.get("k"): tag.get("v") for tag in way.iter("tag")} for way in ways]
    assert [tag["subtype"] for tag in tags] == ["low", "high"]
    assert {tag["type"] for tag in tags} == {"curbstone"}
    for curb, way in zip(CURBS, ways, strict=True):
        used = [nodes[nd.get("ref")] for nd in way.iter("nd")]
        places = [
            [float(n.get("lon")), float(n.get("lat")), float(n.find("tag").get("v"))] for n in used
        ]
        local = from_wgs84(np.array(places), ORIGIN)
        assert np.abs(local - simplify(curb.polyline)).max() < 0.001


def test_dxf_holds_the_vertices(tmp_path):
    lines = write_dxf(CURBS, tmp_path / "a.dxf").read_text().splitlines()
    pairs = list(zip(map(int, lines[::2]), lines[1::2], strict=True))
    assert pairs[0] == (0, "SECTION")
    assert pairs[-2:] == [(0, "ENDSEC"), (0, "EOF")]
    starts = [i for i, pair in enumerate(pairs) if pair == (0, "VERTEX")]
    places = [[float(dict(pairs[i + 1 : i + 6])[code]) for code in (10, 20, 30)] for i in starts]
    expected = np.concatenate([simplify(curb.polyline) for curb in CURBS])
    assert np.abs(np.array(places) - expected).max() < 1e-4
    assert pairs.count((0, "SEQEND")) == 2


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"a\.csv: cannot be written .*; choose a folder"):
        write_csv(CURBS, tmp_path / "out" / "a.csv")


def test_known_places_on_the_earth():
    a, b = 6378137.0, 6356752.314245
    geodetic = np.array([[0.0, 0, 0], [90, 0, 10], [0, 90, 0], [180, -90, 5]])
    ecef = np.array([[a, 0, 0], [0, a + 10, 0], [0, 0, b], [0, 0, -b - 5]])
    assert geodetic_to_ecef(geodetic) == pytest.approx(ecef, abs=1e-6)
    # One degree of latitude at 45 degrees north is 111,132 m long (half a degree on each side).
    there = np.array([[0, 44.5, 0], [0, 45.5, 0.0]])
    chord = np.linalg.norm(np.diff(geodetic_to_ecef(there), axis=0))
    assert chord == pytest.approx(111_132, abs=3)


@given(st.floats(-180, 180), st.floats(-89.9, 89.9), st.floats(-400, 9000))
def test_earth_centred_coordinates_come_back(longitude, latitude, height):
    place = np.array([[longitude, latitude, height]])
    back = ecef_to_geodetic(geodetic_to_ecef(place))
    assert back[0, 1:] == pytest.approx(place[0, 1:], abs=1e-8)
    turned = math.radians(back[0, 0] - longitude)
    assert math.sin(turned / 2) == pytest.approx(0, abs=1e-10)


@given(st.floats(-89, 89), st.floats(-180, 180), st.floats(-360, 360))
def test_local_frames_are_inverted(latitude, longitude, yaw):
    origin = Origin(latitude_deg=latitude, longitude_deg=longitude, altitude_m=50.0, yaw_deg=yaw)
    xyz = np.array([[0.0, 0, 0], [120, -45, 3], [-3000, 2000, -10]])
    assert from_wgs84(to_wgs84(xyz, origin), origin) == pytest.approx(xyz, abs=1e-6)


def test_yaw_turns_from_east_to_north():
    east = Origin(latitude_deg=49.0, longitude_deg=8.0)
    ahead = np.array([[100.0, 0, 0]])
    longitude, latitude, height = to_wgs84(ahead, east)[0]
    assert longitude > 8.001
    assert latitude == pytest.approx(49, abs=1e-6)
    assert height == pytest.approx(
        100**2 / 2 / 6.38e6, abs=1e-5
    )  # the tangent plane leaves the earth
    longitude, latitude, _ = to_wgs84(ahead, replace(east, yaw_deg=90.0))[0]
    assert longitude == pytest.approx(8, abs=1e-9)
    assert latitude == pytest.approx(49 + 100 / 111_200, abs=1e-6)


def test_origins_are_read_and_checked():
    assert Origin.parse("49.011212,8.4228,116.4,37.5") == ORIGIN
    assert Origin.parse("1,2") == Origin(latitude_deg=1.0, longitude_deg=2.0)
    for text in ("", "1", "a,b", "1,2,3,4,5"):
        with pytest.raises(ValueError, match="an origin is LATITUDE,LONGITUDE"):
            Origin.parse(text)
    for text, message in (("91,0", "latitude"), ("0,181", "longitude"), ("nan,0", "finite")):
        with pytest.raises(ValueError, match=message):
            Origin.parse(text)
