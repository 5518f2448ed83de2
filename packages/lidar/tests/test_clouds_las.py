"""LAS files, of points in the coordinates of a map."""

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_lidar.clouds.las import write_las
from heed_lidar.clouds.reading import read_cloud

laspy = pytest.importorskip("laspy")
UTM = np.array([447_321.0, 5_411_987.0, 118.0])


@pytest.fixture
def places():
    rng = np.random.default_rng(0)
    return UTM + rng.uniform(-50, 50, (200, 3)).round(3)


@pytest.mark.parametrize("name", ["tile.las", "tile.laz"])
def test_map_coordinates_keep_millimetres(tmp_path, places, name):
    intensity = np.linspace(0, 1, 200, dtype=np.float32)
    colours = np.tile(np.array([[0, 128, 255]], np.uint8), (200, 1))
    write_las(tmp_path / name, places, intensity=intensity, classes=np.arange(200), colours=colours)
    cloud = read_cloud(tmp_path / name)
    np.testing.assert_allclose(cloud.xyz + cloud.origin, places, atol=0.6e-3)
    assert np.abs(cloud.xyz).max() < 200
    # What float32 would have kept of the northing, without the shift: steps of half a metre.
    assert np.abs(places[:, 1].astype(np.float32) - places[:, 1]).max() > 0.1
    np.testing.assert_allclose(cloud.intensity, intensity, atol=1 / 65535)
    stored = laspy.read(tmp_path / name)
    assert stored.classification.tolist() == list(range(200))
    assert [int(v[0]) for v in (stored.red, stored.green, stored.blue)] == [0, 128 * 257, 65535]


def test_small_intensities_are_of_16_bits_too(tmp_path):
    write_las(tmp_path / "a.las", np.ones((2, 3)), intensity=np.array([0, 1e-3], np.float32))
    np.testing.assert_allclose(read_cloud(tmp_path / "a.las").intensity, [0, 66 / 65535], atol=1e-6)


@pytest.mark.parametrize(("version", "form"), [("1.2", 0), ("1.2", 3), ("1.4", 6), ("1.4", 7)])
def test_a_file_without_intensities_has_none(tmp_path, places, version, form):
    """The format has the field always; it is 0 throughout where nothing was measured."""
    header = laspy.LasHeader(point_format=form, version=version)
    header.scales, header.offsets = [0.01, 0.01, 0.001], [400_000, 5_000_000, 100]
    tile = laspy.LasData(header)
    tile.xyz = places
    tile.write(tmp_path / "a.las")
    cloud = read_cloud(tmp_path / "a.las")
    assert cloud.intensity is None
    away = np.abs(cloud.xyz + cloud.origin - places).max(axis=0)
    assert (away < [0.0051, 0.0051, 0.00051]).all()
    tile.intensity = np.arange(len(places))
    tile.write(tmp_path / "b.las")
    assert read_cloud(tmp_path / "b.las").intensity is not None


@pytest.mark.parametrize("cut", [0, 3, 100, 500])
@pytest.mark.parametrize("name", ["tile.las", "tile.laz"])
def test_damaged_files_are_refused_in_one_line(tmp_path, places, name, cut):
    path = tmp_path / name
    write_las(path, places)
    path.write_bytes(path.read_bytes()[: -cut or 0])
    with pytest.raises(InputError) as fault:
        read_cloud(path)
    assert str(fault.value).startswith(str(path))
    assert "\n" not in str(fault.value)


def test_a_decompressor_that_gives_up_is_told_in_one_line(tmp_path, places, monkeypatch):
    """lazrs, written in Rust, panics on some damaged files: with what is no `Exception`."""
    panic = type("PanicException", (BaseException,), {})

    def give_up(self):
        raise panic("mid > len")

    path = tmp_path / "tile.laz"
    write_las(path, places)
    monkeypatch.setattr(laspy.LasReader, "read", give_up)
    with pytest.raises(InputError, match=r"tile.laz: is not a readable LAS file \(mid > len\)"):
        read_cloud(path)
    panic.__name__ = "KeyboardInterrupt"
    with pytest.raises(BaseException, match="mid > len") as fault:
        read_cloud(path)
    assert not isinstance(fault.value, InputError)


def test_a_header_of_too_many_points_is_refused(tmp_path, places):
    path = tmp_path / "tile.las"
    write_las(path, places)
    content = bytearray(path.read_bytes())
    content[247:255] = np.array([10**12], "<u8").tobytes()  # number of points, LAS 1.4 table
    path.write_bytes(content)
    with pytest.raises(InputError, match="too short for the 1000000000000 points"):
        read_cloud(path)


@pytest.mark.parametrize("points", [60, 120_001])
def test_layers_that_cannot_be_there_are_refused(tmp_path, points):
    """The decompressor allocates what each layer of a chunk claims, and ends the process."""
    path = tmp_path / "tile.laz"
    write_las(path, np.random.default_rng(0).uniform(0, 50, (points, 3)))
    assert len(read_cloud(path)) == points
    content = bytearray(path.read_bytes())
    at = int.from_bytes(content[96:100], "little") + 8  # the first chunk: a point, their number
    for _ in range((points - 1) // 50_000):
        first, at = at, at + 36 + 4 + 40
        at += int(np.frombuffer(content, "<u4", count=10, offset=first + 40).sum())
    assert int.from_bytes(content[at + 36 : at + 40], "little") == points % 50_000
    content[at + 43] = 0xB8
    path.write_bytes(content)
    with pytest.raises(InputError, match="counts more records than the file holds"):
        read_cloud(path)


@pytest.mark.parametrize(("name", "at"), [("tile.las", 100), ("tile.las", 243), ("tile.laz", 0)])
def test_counts_of_records_that_cannot_be_there_are_refused(tmp_path, places, name, at):
    path = tmp_path / name
    write_las(path, places)
    content = bytearray(path.read_bytes())
    if not at:  # the table of chunks of a compressed file: a version, then their number
        first = int.from_bytes(content[96:100], "little")
        at = int.from_bytes(content[first : first + 8], "little") + 4
    content[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(InputError, match="counts more records than the file holds"):
        read_cloud(path)


@pytest.mark.bad_input
def test_classes_must_fit_into_a_byte(tmp_path):
    with pytest.raises(ValueError, match=r"classes must be within 0..255, got 0..256"):
        write_las(tmp_path / "a.las", np.zeros((2, 3)), classes=np.array([0, 256]))
    write_las(tmp_path / "none.las", np.empty((0, 3)))
    with pytest.raises(InputError, match="holds no points"):
        read_cloud(tmp_path / "none.las")
