"""Recordings of many scans: topics, frames, byte orders and padding."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heed_core.errors import InputError
from heed_core.testing.damage import check_readers
from heed_lidar.clouds.bags import Recordings, count_frames, decode_points, is_recording
from heed_lidar.clouds.cloud import CloudOptions
from heed_lidar.clouds.reading import read_cloud
from heed_lidar.layouts import find_inputs
from heed_lidar.scans import ScanData
from heed_lidar.settings import LidarData

CODES = {"i1": 1, "u1": 2, "i2": 3, "u2": 4, "i4": 5, "u4": 6, "f4": 7, "f8": 8}
HERE = {"path": Path("a.bag"), "place": "scan 0"}


def message(height=1, width=3, *, big=False, step=26, gap=0, fields=None, data=None):
    """A PointCloud2 as drivers write them: doubles, padding between fields and after rows."""
    fields = fields or [("x", 0, "f8"), ("y", 8, "f4"), ("z", 12, "f4"), ("intensity", 20, "u2")]
    order = ">" if big else "<"
    names, offsets, kinds = zip(*fields, strict=True)
    row = np.dtype(
        {
            "names": names,
            "formats": [order + k for k in kinds],
            "offsets": offsets,
            "itemsize": step,
        }
    )
    points = np.full((height, width * step + gap), 0xAB, np.uint8)
    table = np.ndarray((height, width), row, points, strides=(width * step + gap, step))
    for k, name in enumerate(names):
        table[name] = (np.arange(height * width) + 100 * k + 1).reshape(height, width)
    return SimpleNamespace(
        height=height,
        width=width,
        is_bigendian=big,
        point_step=step,
        row_step=width * step + gap,
        fields=[
            SimpleNamespace(name=n, offset=o, datatype=CODES[k], count=1) for n, o, k in fields
        ],
        data=points.ravel() if data is None else data,
    )


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(0, 4),
    width=st.integers(0, 5),
    big=st.booleans(),
    step=st.integers(22, 40),
    gap=st.integers(0, 9),
)
def test_points_are_decoded_by_their_fields(height, width, big, step, gap):
    found = decode_points(message(height, width, big=big, step=step, gap=gap), **HERE)
    n = height * width
    for k, name in enumerate(("x", "y", "z", "intensity")):
        np.testing.assert_array_equal(found[name], np.arange(n) + 100 * k + 1)
    if n:
        assert found["x"].dtype.isnative
        assert found["intensity"].dtype == np.uint16


def test_messages_that_do_not_hold_their_points_are_refused():
    short = message(2, 3)
    short.data = short.data[:-1]
    with pytest.raises(InputError, match=r"a\.bag, scan 0: has 155 bytes for 2 x 3 points of 26"):
        decode_points(short, **HERE)
    wide = message()
    wide.fields[-1].offset = 25
    with pytest.raises(InputError, match="field intensity beyond the 26 bytes of a point"):
        decode_points(wide, **HERE)
    huge = message()
    huge.width, huge.row_step = 2**31, 2**31 * 26
    with pytest.raises(InputError, match="has 78 bytes for 1 x 2147483648 points"):
        decode_points(huge, **HERE)


def test_fields_of_several_values_are_left_out():
    several = message()
    several.fields.append(SimpleNamespace(name="rgb", offset=22, datatype=2, count=3))
    assert "rgb" not in decode_points(several, **HERE)


rosbags = pytest.importorskip("rosbags")


def write_recording(path, kind, *, topics=("/points",), frames=4, empty=()):
    from rosbags.rosbag1 import Writer as Writer1
    from rosbags.rosbag2 import StoragePlugin
    from rosbags.rosbag2 import Writer as Writer2
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS1_NOETIC if kind == "ros1" else Stores.ROS2_HUMBLE)
    types = store.types
    cloud, header = types["sensor_msgs/msg/PointCloud2"], types["std_msgs/msg/Header"]
    time, field = types["builtin_interfaces/msg/Time"], types["sensor_msgs/msg/PointField"]
    text = types["std_msgs/msg/String"]
    if kind == "ros1":
        writer = Writer1(path)
        extra = {"seq": 0}
        pack = store.serialize_ros1
    else:
        plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
        writer = Writer2(path, version=9, storage_plugin=plugin)
        extra, pack = {}, store.serialize_cdr
    with writer:
        notes = writer.add_connection("/notes", "std_msgs/msg/String", typestore=store)
        links = [
            writer.add_connection(t, "sensor_msgs/msg/PointCloud2", typestore=store) for t in topics
        ]
        for frame in range(frames):
            writer.write(notes, frame * 10**8, pack(text(data="hello"), "std_msgs/msg/String"))
            for link in links:
                m = message(width=0 if frame in empty else 3 + frame)
                sent = cloud(
                    header=header(stamp=time(sec=7, nanosec=frame * 10**8), frame_id="s", **extra),
                    fields=[
                        field(name=f.name, offset=f.offset, datatype=f.datatype, count=1)
                        for f in m.fields
                    ],
                    is_dense=True,
                    **{
                        k: getattr(m, k)
                        for k in (
                            "height", "width", "is_bigendian", "point_step", "row_step", "data"
                        )
                    },
                )  # fmt: skip
                writer.write(link, frame * 10**8 + 5, pack(sent, "sensor_msgs/msg/PointCloud2"))
    return path


def storage_file(folder):
    return next(p for p in folder.iterdir() if p.suffix in {".mcap", ".db3"})


@pytest.fixture(params=["ros1", "ros2", "mcap", "mcap-file"])
def recording(request, tmp_path):
    if request.param == "ros1":
        return write_recording(tmp_path / "drive.bag", "ros1")
    folder = write_recording(tmp_path / "drive", request.param.removesuffix("-file"))
    return storage_file(folder) if request.param == "mcap-file" else folder


def test_recordings_hold_scans_by_number(recording):
    assert is_recording(recording)
    assert count_frames(recording, CloudOptions()) == 4
    held = Recordings()
    for frame in (0, 1, 3, 2, 2):
        cloud = read_cloud(recording, frame=frame, recordings=held)
        assert len(cloud) == 3 + frame
        assert cloud.xyz[0].tolist() == [1, 101, 201]
        assert cloud.stamp == pytest.approx(7 + frame / 10)
        assert cloud.select(np.ones(len(cloud), dtype=bool)).frame_id == "s"
    held.close()
    with pytest.raises(InputError, match="has 4 scans, no scan 4"):
        read_cloud(recording, frame=4)


def test_a_recording_is_one_path_with_many_scans(recording):
    data = LidarData()
    files = find_inputs([recording], data)
    assert [f.name for f in files] == [f"{recording.stem}/{n:06d}" for n in range(4)]
    scans = ScanData(files, data, label=False)
    assert [len(scans[n]) for n in range(4)] == [3, 4, 5, 6]
    copy = pickle.loads(pickle.dumps(scans))
    assert len(copy[2]) == 5


def test_a_recording_cannot_count_more_scans_than_bytes(tmp_path):
    folder = write_recording(tmp_path / "drive", "mcap")
    path = folder / "metadata.yaml"
    assert len(find_inputs([folder], LidarData())) == 4
    path.write_text(path.read_text().replace("message_count: 4", "message_count: 9000000000"))
    with pytest.raises(InputError, match="drive: counts 9000000000 scans, more than it has bytes"):
        find_inputs([folder], LidarData())


def test_empty_scans_in_a_recording_give_empty_results(tmp_path, caplog):
    path = write_recording(tmp_path / "drive.bag", "ros1", empty=(1,))
    data = LidarData()
    scans = ScanData(find_inputs([path], data), data, label=False)
    assert [len(scans[n]) for n in range(4)] == [3, 0, 5, 6]
    assert "holds no points; its result is empty" in caplog.text
    with pytest.raises(InputError, match="holds no points"):
        read_cloud(path, frame=1)


def test_the_topic_must_be_clear(tmp_path):
    path = write_recording(tmp_path / "two.bag", "ros1", topics=("/left", "/right"))
    with pytest.raises(InputError, match=r"2 topics with point clouds: /left, /right; .*topic"):
        count_frames(path, CloudOptions())
    assert count_frames(path, CloudOptions(topic="/left")) == 4
    with pytest.raises(InputError, match=r"no topic '/up'.*choose one of: /left, /right"):
        count_frames(path, CloudOptions(topic="/up"))
    none = write_recording(tmp_path / "none.bag", "ros1", topics=())
    with pytest.raises(InputError, match=r"no topic with point clouds .topics: /notes."):
        count_frames(none, CloudOptions())


@pytest.mark.parametrize("kind", ["ros1", "mcap", "ros2"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_recordings_are_refused_in_one_line(tmp_path, kind, share):
    if kind == "ros1":
        path = write_recording(tmp_path / "drive.bag", "ros1")
    else:
        path = storage_file(write_recording(tmp_path / "drive", kind))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError) as fault:
        [read_cloud(path, frame=n) for n in range(4)]
    assert "drive" in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("kind", ["ros1", "mcap", "ros2"])
def test_damaged_recordings_are_read_or_refused_in_one_line(tmp_path, kind):
    path = write_recording(tmp_path / ("drive.bag" if kind == "ros1" else "drive"), kind)
    parts = [path] if kind == "ros1" else [storage_file(path), path / "metadata.yaml"]

    def read(part):
        whole = path if part.suffix == ".yaml" else part
        scans = Recordings()
        try:
            for frame in range(min(4, count_frames(whole, CloudOptions()))):
                read_cloud(whole, frame=frame, recordings=scans)
        except InputError as fault:
            raise InputError(fault.problem, path=part) from None  # of a folder, its name is told
        finally:
            scans.close()

    for part in parts:
        check_readers(part, [read])
