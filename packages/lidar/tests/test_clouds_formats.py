"""Files of points: what is read is what was stored, and damaged files are refused in one line."""

import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from heed_core.errors import InputError
from heed_lidar.clouds.cloud import CloudOptions, PointCloud, make_cloud, scaled_intensity
from heed_lidar.clouds.cloud import FileColumns as Columns
from heed_lidar.clouds.pcd import lzf_decompress
from heed_lidar.clouds.ply import write_ply
from heed_lidar.clouds.reading import cloud_suffix, read_cloud
from heed_lidar.clouds.text import write_csv

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
RESTRICTED, CLOUDS = DATA / "restricted" / "lidar", DATA / "lidar-clouds"
XYZI = np.array(
    [[1.5, -2.25, 0.125, 0.5], [40.0, 3.0, -1.75, 0.25], [-7.0, 8.5, 2.0, 1.0]], dtype="<f4"
)


def real(path):
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


def one_line(fault):
    text = str(fault.value)
    assert "\n" not in text
    return text


def pcd(data, *, fields="x y z intensity", size="4 4 4 4", kind="F F F F", points=3, mode="binary"):
    count = " ".join("1" for _ in fields.split())
    head = (
        f"# .PCD v0.7\nVERSION 0.7\nFIELDS {fields}\nSIZE {size}\nTYPE {kind}\nCOUNT {count}\n"
        f"WIDTH {points}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA {mode}\n"
    )
    return head.encode() + data


def literal_lzf(data):
    """Valid LZF without any copies."""
    parts = [data[i : i + 32] for i in range(0, len(data), 32)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def compressed(body, *, size=None):
    packed = literal_lzf(body)
    return np.array([len(packed), size or len(body)], "<u4").tobytes() + packed


def ply(rows, *, order="little", properties=("x", "y", "z", "intensity"), count=None, before=""):
    count = len(rows) if count is None else count
    lines = [f"property float {name}" for name in properties]
    head = "\n".join(
        ["ply", f"format binary_{order}_endian 1.0", "comment made by hand"]
        + [before] * bool(before)
        + [f"element vertex {count}", *lines]
        + ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    )
    return head.encode() + rows.astype("<f4" if order == "little" else ">f4").tobytes()


ASCII_ROWS = "\n".join(" ".join(str(v) for v in row) for row in XYZI.tolist())
ASCII_PLY = (
    "ply\nformat ascii 1.0\nelement camera 1\nproperty float f\nelement vertex 3\n"
    "property float x\nproperty float y\nproperty float z\nproperty float scalar_intensity\n"
    f"end_header\n525\n{ASCII_ROWS}\n"
)
FILES = {
    "kitti.bin": XYZI.tobytes(),
    "five.pcd.bin": np.c_[XYZI, [0, 1, 2]].astype("<f4").tobytes(),
    "ascii.pcd": pcd(ASCII_ROWS.encode(), mode="ascii"),
    "binary.pcd": pcd(XYZI.tobytes()),
    "compressed.pcd": pcd(compressed(XYZI.T.tobytes()), mode="binary_compressed"),
    "little.ply": ply(XYZI),
    "big.ply": ply(XYZI, order="big"),
    "ascii.ply": ASCII_PLY.encode(),
    "header.csv": b"x,y,z,Intensity\n" + ASCII_ROWS.replace(" ", ",").encode(),
    "semicolon.csv": b"\xef\xbb\xbfX;Y;Z;remission\r\n"
    + ASCII_ROWS.replace(" ", ";").replace("\n", "\r\n").encode(),
    "bare.xyz": ASCII_ROWS.encode(),
    "comment.txt": b"// x y z i\n\n" + ASCII_ROWS.encode() + b"\n\n",
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_points(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    cloud = read_cloud(path)
    np.testing.assert_array_equal(cloud.xyz, XYZI[:, :3].astype(np.float64))
    np.testing.assert_array_equal(cloud.intensity, XYZI[:, 3])
    assert cloud.rows.tolist() == [0, 1, 2]
    assert (cloud.name, cloud.rows_in_file) == (name.split(".")[0], 3)
    assert (cloud.ring is not None) == (name == "five.pcd.bin")


def test_arrays_are_read(tmp_path):
    np.save(tmp_path / "plain.npy", XYZI)
    np.save(tmp_path / "wide.npy", np.c_[XYZI, [3, 4, 5]])
    fields = np.zeros(3, dtype=[("x", "f8"), ("y", "f8"), ("z", "f4"), ("ring", "u2")])
    for k, axis in enumerate("xyz"):
        fields[axis] = XYZI[:, k]
    fields["ring"] = [3, 4, 5]
    np.save(tmp_path / "named.npy", fields)
    np.savez(tmp_path / "parts.npz", xyz=XYZI[:, :3], intensity=XYZI[:, 3], ring=[3, 4, 5])
    np.savez_compressed(tmp_path / "axes.npz", **{a: XYZI[:, k] for k, a in enumerate("xyz")})
    options = CloudOptions(columns=("x", "y", "z", "intensity", "ring"))
    for name, ring in (("plain.npy", 0), ("wide.npy", 1), ("named.npy", 1), ("parts.npz", 1),
                       ("axes.npz", 0)):  # fmt: skip
        cloud = read_cloud(tmp_path / name, options if name == "wide.npy" else None)
        np.testing.assert_array_equal(cloud.xyz, XYZI[:, :3])
        assert (cloud.ring is not None and cloud.ring.tolist() == [3, 4, 5]) == bool(ring)
    with pytest.raises(InputError, match="5 columns and they have no names"):
        read_cloud(tmp_path / "wide.npy")


@pytest.mark.parametrize("columns", [3, 5, 6])
def test_rows_of_other_columns_are_not_taken_for_kittis(tmp_path, columns):
    """Of such a size that rows of four would fit."""
    rows = np.random.default_rng(0).uniform(-9, 9, (80, columns)).astype("<f4")
    names = ("x", "y", "z", "intensity", "ring", "time")[:columns]
    rows[:, 3:] = np.abs(rows[:, 3:])
    path = tmp_path / "scan.bin"
    path.write_bytes(rows.tobytes())
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    assert "has negative intensities as rows of 4 float32 columns (x y z intensity)" in str(
        fault.value
    )
    assert "--data.columns" in one_line(fault)
    cloud = read_cloud(path, CloudOptions(columns=names))
    np.testing.assert_array_equal(cloud.xyz, rows[:, :3])
    rows[:, 2] = -1.0
    path.write_bytes(rows.tobytes())
    assert len(read_cloud(path, CloudOptions(columns=names))) == 80


def test_text_as_spreadsheets_and_tables_write_it(tmp_path):
    path = tmp_path / "a.csv"
    for content in (
        "x;y;z;i\n1,5;-2;3,25;0,5\n4;5;6,5;1\n",
        "time,name,x,y,z,i\n10:00,a,1.5,-2,3.25,.5\n10:01,b,4,5,6.5,1\n",
        "x,y,z,i,\n1.5,-2,3.25,.5,\n4,5,6.5,1,\n",
    ):
        path.write_text(content)
        cloud = read_cloud(path)
        np.testing.assert_array_equal(cloud.xyz, [[1.5, -2, 3.25], [4, 5, 6.5]])
        np.testing.assert_array_equal(cloud.intensity, np.float32([0.5, 1]))
    path.write_text("x,y,z,i\n1,2,3,\n,,,0.5\n4,5,6,1\n")
    cloud = read_cloud(path)
    assert (cloud.rows.tolist(), cloud.not_finite) == ([0, 2], 1)
    assert cloud.intensity.tolist() == [0, 1]
    path.write_text("x,y,z,ring\n1,2,3,a\n")
    with pytest.raises(InputError, match="row 2: has 'a', not a number"):
        read_cloud(path)
    path.write_text("Points:0,Points:1,Points:2,intensity\n1,2,3,0.5\n")
    with pytest.raises(InputError, match=r"no column x .*--data.columns names the columns of text"):
        read_cloud(path)
    given = CloudOptions(columns=("x", "y", "z", "intensity"))
    assert read_cloud(path, given).xyz.tolist() == [[1, 2, 3]]


def test_points_of_an_archive_have_what_lies_beside_them(tmp_path):
    np.savez(tmp_path / "a.npz", points=XYZI[:, :3], intensity=XYZI[:, 3], pose=np.eye(4))
    cloud = read_cloud(tmp_path / "a.npz")
    np.testing.assert_array_equal(cloud.xyz, XYZI[:, :3])
    np.testing.assert_array_equal(cloud.intensity, XYZI[:, 3])
    np.savez(tmp_path / "b.npz", points=XYZI, intensity=XYZI[:, 3])
    with pytest.raises(InputError, match="more than one column intensity"):
        read_cloud(tmp_path / "b.npz")


def test_a_mesh_in_text_may_have_its_faces_first(tmp_path):
    faces = "element face 2\nproperty list uchar int vertex_indices\nelement vertex"
    text = ASCII_PLY.replace("element vertex", faces)
    text = text.replace("end_header\n", "end_header\n3 0 1 2\n4 0 1 2 0\n")
    (tmp_path / "a.ply").write_text(text)
    np.testing.assert_array_equal(read_cloud(tmp_path / "a.ply").xyz, XYZI[:, :3])


def test_columns_of_points_instead_of_rows_are_told(tmp_path):
    np.save(tmp_path / "a.npy", np.tile(XYZI, (20, 1)).T)
    with pytest.raises(InputError, match=r"has 60 columns .*transpose it"):
        read_cloud(tmp_path / "a.npy")


def test_rows_without_a_place_are_removed_and_counted(tmp_path):
    rows = np.array(
        [[np.nan, 1, 1, 0.5], [1, 2, 3, 0.1], [0, 0, 0, 0.9], [1, np.inf, 1, 0], [4, 5, 6, np.nan]],
        dtype="<f4",
    )
    path = tmp_path / "scan.bin"
    path.write_bytes(rows.tobytes())
    cloud = read_cloud(path)
    assert cloud.rows.tolist() == [1, 4]
    assert (cloud.rows_in_file, cloud.not_finite, cloud.zeros) == (5, 2, 1)
    np.testing.assert_allclose(cloud.intensity, [0.1, 0.0])
    kept = read_cloud(path, CloudOptions(keep_zeros=True))
    assert (kept.rows.tolist(), kept.zeros) == ([1, 2, 4], 0)


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        (np.array([0.0, 0.5, 1.0]), None, [0, 0.5, 1]),
        (np.array([0.0, 51.0, 255.0]), None, [0, 0.2, 1]),
        (np.array([0, 1], np.uint8), None, [0, 1 / 255]),
        (np.array([0, 65535], np.uint16), None, [0, 1]),
        (np.array([0, 255], np.uint16), None, [0, 1]),
        (np.array([0.0, 4.0]), 8.0, [0, 0.5]),
        (np.array([-1.0, 300.0]), 100.0, [0, 1]),
    ],
)
def test_intensity_ends_up_between_0_and_1(values, scale, expected):
    np.testing.assert_allclose(scaled_intensity(values, scale), expected, rtol=1e-6)


def test_bytes_that_are_no_rows_name_both_column_counts(tmp_path):
    path = tmp_path / "scan.bin"
    path.write_bytes(np.c_[XYZI, [0, 1, 2]].astype("<f4").tobytes())
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    text = one_line(fault)
    assert "60 bytes, not a multiple of 16 (4 float32 columns" in text
    assert "5 columns would fit: --data.columns x y z intensity ring" in text
    assert len(read_cloud(path, CloudOptions(columns=("x", "y", "z", "intensity", "ring")))) == 3
    path.write_bytes(XYZI.tobytes()[:-1])
    with pytest.raises(InputError, match=r"47 bytes.*neither 4 nor 5 columns fit.*truncated"):
        read_cloud(path)


@pytest.mark.parametrize("name", ["scan.bin", "scan.pcd", "scan.csv"])
def test_a_scan_without_points_is_an_error_alone_and_a_warning_in_a_stream(tmp_path, name, caplog):
    empty = {"scan.bin": b"", "scan.csv": b"x,y,z\n"}.get(name, pcd(b"", points=0))
    path = tmp_path / name
    path.write_bytes(empty)
    with pytest.raises(InputError, match=r"scan\.\w+: holds no points; give a scan with points"):
        read_cloud(path)
    with caplog.at_level(logging.WARNING):
        cloud = read_cloud(path, allow_empty=True)
    assert len(cloud) == cloud.rows_in_file == 0
    assert "holds no points; its result is empty" in caplog.text
    path.with_name("nan.bin").write_bytes(np.full((2, 4), np.nan, "<f4").tobytes())
    with pytest.raises(InputError, match="holds no usable point among 2 rows"):
        read_cloud(path.with_name("nan.bin"))


BROKEN = {
    "rows.csv": (b"x,y,z\n1,2,3\n1,2\n", "row 3: has 2 columns, the first row has 3"),
    "word.csv": (b"x,y,z\n1,2,3\n1,two,3\n", "row 3: has 'two', not a number"),
    "noz.csv": (b"x,y,intensity\n1,2,3\n", "has no column z (it has: x, y, intensity)"),
    "wide.txt": (b"1 2 3 4 5 6\n", "row 1: has 6 columns and there are names for 4"),
    "header.csv": (b"x,y,z\n1,2,3,4\n", "row 2: has 4 columns and its header names 3"),
    "latin.csv": (b"x,y,z\n1,2,3 \xff\n", "is not a text file"),
    "cut.pcd": (pcd(XYZI.tobytes()[:-4]), "has 44 bytes of data, 48 were expected for the 3"),
    "huge.pcd": (pcd(XYZI.tobytes(), points=10**15), "48 bytes of data, 16000000000000000 were"),
    "few.pcd": (pcd(b"1 2 3 4\n", mode="ascii"), "has 1 rows, its header says 3 points"),
    "ragged.pcd": (pcd(b"1 2 3 4\n1 2\n1 2 3 4", mode="ascii"), "point 2: has no 4 numbers"),
    "bomb.pcd": (
        pcd(compressed(b"a" * 64, size=16 * 10**8), mode="binary_compressed", points=10**8),
        "holds 66 bytes for",
    ),
    "lzf.pcd": (
        pcd(np.array([4, 48], "<u4").tobytes() + b"\xff\xff\xff\xff", mode="binary_compressed"),
        "compressed data that cannot be read",
    ),
    "noz.pcd": (pcd(XYZI.tobytes(), fields="x y w intensity"), "has no column z"),
    "half.pcd": (b"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\n", "has no TYPE, DATA in its header"),
    "odd.pcd": (pcd(XYZI.tobytes(), size="4 4 4 3"), "TYPE F of SIZE 3"),
    "junk.pcd": (b"\x00\x01\x02 junk\n", "in its header"),
    "cut.ply": (ply(XYZI)[:-5], "43 bytes of vertices, 48 were expected for the 3"),
    "huge.ply": (ply(XYZI, count=10**15), "vertices of its header"),
    "short.ply": (ASCII_PLY[:-20].rsplit("\n", 1)[0].encode(), "rows of vertices, 3 were expected"),
    "word.ply": (ASCII_PLY.replace("40.0", "forty").encode(), "vertex 2: has no 4 numbers"),
    "magic.ply": (b"plx\n", "does not begin with 'ply'"),
    "endless.ply": (b"ply\nformat ascii 1.0\n", "has a header without an end"),
    "type.ply": (ASCII_PLY.replace("float z", "quad z").encode(), "'property quad z'"),
    "list.ply": (
        ply(XYZI, before="element face 1\nproperty list uchar int i"),
        "has lists in its vertices or, in binary, before them",
    ),
    "noxyz.ply": (ply(XYZI, properties=("a", "b", "z", "i")), "no column x and no column y"),
    "empty.npy": (b"", "is empty"),
    "junk.npy": (b"not an array", "is not a numpy array"),
    "junk.npz": (b"not an archive", "is not an archive of arrays"),
    "notes.md": (b"# notes", "is not a file of points"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files_are_refused_in_one_line(tmp_path, name):
    content, expected = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    assert expected in one_line(fault)
    assert one_line(fault).startswith(str(path))


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.none() | st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3),
)
def test_no_damage_does_more_than_change_points_or_refuse(tmp_path_factory, name, cut, changes):
    content = bytearray(FILES[name])
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    if cut is not None:
        del content[int(cut * len(content)) :]
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    text, cloud = f"{path}: read", None
    try:
        cloud = read_cloud(path)
    except InputError as fault:
        text = str(fault)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert cloud is None or np.isfinite(cloud.xyz).all()
    assert cloud is None or len(cloud) <= cloud.rows_in_file


def test_arrays_that_promise_more_than_they_hold_are_refused(tmp_path):
    np.save(tmp_path / "cut.npy", XYZI)
    content = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-4])
    (tmp_path / "huge.npy").write_bytes(content.replace(b"(3, 4), }   ", b"(10**9,4),} "[:12]))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "line.npy", np.arange(5.0))
    np.savez(tmp_path / "odd.npz", x=np.zeros(3), y=np.zeros(3), z=np.zeros(2))
    for name in ("cut.npy", "huge.npy", "text.npy", "line.npy", "odd.npz"):
        with pytest.raises(InputError) as fault:
            read_cloud(tmp_path / name)
        assert name in one_line(fault)


def test_paths_that_are_no_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_cloud(tmp_path / "none.bin")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_cloud(tmp_path / "folder.bin")
    assert cloud_suffix(Path("a.PCD.BIN")) == ".pcd.bin"
    assert cloud_suffix(Path("a.pcd.txt")) == ".txt"


def test_coordinates_of_a_map_keep_millimetres(tmp_path):
    places = np.array([[447_321.123, 5_411_987.456, 118.789], [447_340.0, 5_412_000.25, 120.5]])
    write_ply(tmp_path / "map.ply", places)
    cloud = read_cloud(tmp_path / "map.ply")
    assert cloud.origin == (447_300.0, 5_412_000.0, 100.0)
    np.testing.assert_allclose(cloud.xyz + cloud.origin, places, atol=1e-9)
    given = read_cloud(tmp_path / "map.ply", CloudOptions(origin=(447_320.0, 5_411_980.0, 120.0)))
    np.testing.assert_allclose(given.xyz[0], [1.123, 7.456, -1.211], atol=1e-9)
    assert read_cloud(tmp_path / "map.ply").xyz.dtype == np.float64


ATTRIBUTES = {
    "u1": st.integers(0, 255),
    "i4": st.integers(-(2**31), 2**31 - 1),
    "f4": st.floats(-1e6, 1e6, width=32),
    "f8": st.floats(-1e12, 1e12),
}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 20), kind=st.sampled_from(sorted(ATTRIBUTES)))
def test_ply_round_trip(tmp_path_factory, data, n, kind):
    numbers = st.floats(-900, 900, width=32)
    xyz = data.draw(hnp.arrays(np.float64, (n, 3), elements=numbers)) + 0.0
    extra = data.draw(hnp.arrays(kind, n, elements=ATTRIBUTES[kind]))
    colours = data.draw(hnp.arrays(np.uint8, (n, 3)))
    path = tmp_path_factory.mktemp("ply") / "cloud.ply"
    write_ply(path, xyz, colours=colours, attributes={"time": extra})
    cloud = read_cloud(path, CloudOptions(keep_zeros=True))
    np.testing.assert_array_equal(cloud.xyz, xyz)
    np.testing.assert_array_equal(cloud.time, extra.astype(np.float64))
    assert b"property uchar red" in path.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), n=st.integers(1, 20), mode=st.sampled_from(["binary", "ascii", "lzf"]))
def test_pcd_round_trip(tmp_path_factory, data, n, mode):
    rows = data.draw(hnp.arrays("<f4", (n, 4), elements=st.floats(-900, 900, width=32)))
    body = {
        "binary": rows.tobytes(),
        "ascii": "\n".join(" ".join(map(repr, r)) for r in rows.astype(float).tolist()).encode(),
        "lzf": compressed(rows.T.tobytes()),
    }[mode]
    path = tmp_path_factory.mktemp("pcd") / "cloud.pcd"
    name = {"lzf": "binary_compressed"}.get(mode, mode)
    path.write_bytes(pcd(body, points=n, mode=name, fields="x y z time"))
    cloud = read_cloud(path, CloudOptions(keep_zeros=True))
    np.testing.assert_array_equal(np.c_[cloud.xyz, cloud.time], rows.astype(np.float64))


def test_lzf_copies_reach_back_and_overlap():
    # "abc", then 6 bytes from 3 back (overlapping), then 9 from 9 back with a long length.
    packed = bytes([2]) + b"abc" + bytes([4 << 5, 2]) + bytes([7 << 5, 0, 8])
    assert lzf_decompress(packed, 18) == b"abc" * 6
    with pytest.raises(ValueError, match="bytes instead of"):
        lzf_decompress(packed, 19)
    with pytest.raises(ValueError, match="outside"):
        lzf_decompress(packed, 12)


def test_csv_round_trip(tmp_path):
    xyz = np.array([[1.23456, -2.0, 0.5], [3.0, 4.0, 5.0]])
    write_csv(tmp_path / "a.csv", xyz, attributes={"curb": np.array([1, 0]), "i": np.ones(2)})
    assert (tmp_path / "a.csv").read_text().splitlines()[:2] == [
        "x,y,z,curb,i",
        "1.2346,-2.0000,0.5000,1,1",
    ]
    np.testing.assert_allclose(read_cloud(tmp_path / "a.csv").xyz, xyz, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"x,y,z,x\n1,2,3,4\n"),
        ("a.csv", b"x,y,z,X\n1,2,3,4\n"),
        ("a.pcd", pcd(XYZI.tobytes(), fields="x y z x")),
        ("b.pcd", pcd(ASCII_ROWS.encode(), fields="x y z x", mode="ascii")),
        ("a.ply", ply(XYZI, properties=("x", "y", "z", "x"))),
        ("b.ply", ASCII_PLY.replace("scalar_intensity", "x").encode()),
    ],
)
def test_a_column_that_is_there_twice_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    assert one_line(fault).startswith(f"{path}: has more than one column x")


@pytest.mark.parametrize("axes", ["x", "xyz"])
def test_an_archive_with_two_x_is_refused(tmp_path, axes):
    beside = {axis: np.zeros(2) for axis in axes}
    np.savez(tmp_path / "a.npz", xyz=np.ones((2, 3)), **beside)
    with pytest.raises(InputError, match="more than one column x"):
        read_cloud(tmp_path / "a.npz")


@pytest.mark.bad_input
def test_programmers_faults_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="columns must name x, y and z, got x y"):
        CloudOptions(columns=("x", "y"))
    with pytest.raises(ValueError, match="intensity_scale must be positive, got 0"):
        CloudOptions(intensity_scale=0)
    with pytest.raises(ValueError, match=r"intensity must have the shape \(1,\), got \(2,\)"):
        PointCloud(
            name="a",
            xyz=np.zeros((1, 3)),
            intensity=np.zeros(2, np.float32),
            rows=np.zeros(1, int),
            rows_in_file=1,
        )
    for attributes in ({"a b": np.zeros(1)}, {"x": np.zeros(1)}, {"a": np.zeros(2)}):
        with pytest.raises(ValueError, match="attributes must be"):
            write_ply(tmp_path / "a.ply", np.zeros((1, 3)), attributes=attributes)
    assert not (tmp_path / "a.ply").exists()


def test_selection_keeps_rows_of_the_file():
    columns = {"x": np.array([1.0, np.nan, 3.0, 4.0]), "y": np.zeros(4), "z": np.zeros(4)}
    columns["ring"] = np.arange(4)
    cloud = make_cloud(Columns(values=columns), CloudOptions(), path=Path("a.csv"))
    part = cloud.select(np.array([False, True, True]))
    assert (part.rows.tolist(), part.ring.tolist(), part.rows_in_file) == ([2, 3], [2, 3], 4)


def test_real_scans_are_read():
    kitti = read_cloud(real(RESTRICTED / "000000.bin"))
    assert (len(kitti), kitti.zeros, kitti.not_finite) == (123_389, 0, 0)
    road = np.abs(kitti.xyz[:, 2] + 1.73) < 0.3
    assert road.mean() > 0.2  # the sensor is 1.73 m above the road
    sweep = read_cloud(real(RESTRICTED / "nuscenes_sweep.pcd.bin"))
    assert len(sweep) == 34_688
    assert sorted(set(sweep.ring.tolist())) == list(range(32))
    assert 0.9 < sweep.intensity.max() <= 1


@pytest.mark.parametrize("name", ["251370668.pcd", "source.ply", "target.ply"])
def test_real_clouds_equal_open3d(name):
    path = real(CLOUDS / name)
    if importlib.util.find_spec("open3d") is None:
        pytest.skip("open3d is not installed")
    o3d = pytest.importorskip("open3d")
    cloud = read_cloud(path, CloudOptions(keep_zeros=True, intensity_scale=1e9))
    theirs = o3d.t.io.read_point_cloud(str(path))
    places = theirs.point.positions.numpy()
    finite = np.isfinite(places).all(axis=1)
    np.testing.assert_array_equal(cloud.xyz, places[finite].astype(np.float64))
    assert cloud.intensity is not None
    assert len(cloud) > 60_000


@pytest.mark.parametrize("count", ["999999999999", "2147483647", "70000", "-1", "1.5", "x"])
@pytest.mark.parametrize("mode", ["ascii", "binary", "binary_compressed"])
def test_a_pcd_point_of_senseless_size_is_refused(tmp_path, count, mode):
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd(bytes(48), mode=mode).replace(b"COUNT 1 ", f"COUNT {count} ".encode()))
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    assert "has a header that cannot be used" in one_line(fault)


def test_coordinates_beyond_any_place_are_left_out(tmp_path):
    """Some drivers write the greatest number where nothing returned."""
    rows = np.array([[1, 2, 3, 0.5], [3.4e38, 0, 0, 0.5], [0, -1e30, 0, 0.5], [5e6, 0, 0, 0.5]])
    rows.astype("<f4").tofile(tmp_path / "a.bin")
    cloud = read_cloud(tmp_path / "a.bin")
    assert cloud.rows.tolist() == [0, 3]
    assert cloud.not_finite == 2
