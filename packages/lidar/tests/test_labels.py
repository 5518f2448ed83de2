"""Classes, raw ids and label files."""

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from heed_core.errors import InputError
from heed_lidar.labels import (
    BUILTIN,
    RAW_NAMES,
    LabelMap,
    class_texts,
    label_map,
    parse_classes,
    read_label_map,
    read_labels,
    sequence_name,
    with_instances,
    write_label_map,
    write_labels,
)

# SemanticKITTI's published map, written as class: ids.
KITTI_19 = {
    0: (0, 1, 52, 99), 1: (10, 252), 2: (11,), 3: (15,), 4: (18, 258),
    5: (13, 16, 20, 256, 257, 259), 6: (30, 254), 7: (31, 253), 8: (32, 255), 9: (40, 60),
    10: (44,), 11: (48,), 12: (49,), 13: (50,), 14: (51,), 15: (70,), 16: (71,), 17: (72,),
    18: (80,), 19: (81,),
}  # fmt: skip
YAML = {
    "labels": {0: "unlabeled", 1: "outlier", 40: "road", 48: "sidewalk", 3: "curb"},
    "color_map": {0: [0, 0, 0], 1: [0, 0, 255], 40: [255, 0, 255], 48: [75, 0, 75], 3: [9, 8, 7]},
    "learning_map": {0: 0, 1: 0, 40: 1, 48: 2, 3: 3},
    "learning_map_inv": {0: 0, 1: 40, 2: 48, 3: 3},
    "learning_ignore": {0: True, 1: False, 2: False, 3: False},
    "split": {"train": [0, 1], "valid": [8], "test": ["town"]},
}


def test_semantic_kitti_is_the_published_map():
    kitti = BUILTIN["semantic-kitti"]
    for number, ids in KITTI_19.items():
        assert set(kitti.classes_of(np.array(ids)).tolist()) == {number}
    assert set(kitti.to_class) == {raw for ids in KITTI_19.values() for raw in ids}
    written = [0, 10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]
    assert kitti.raw_of(np.arange(20)).tolist() == written
    assert kitti.colours[kitti.class_named("car")].tolist() == [100, 150, 245]
    assert sum(map(len, kitti.split.values())) == 22


def test_curb_maps_take_lane_marking_and_parking_as_others():
    curb = BUILTIN["curb"]
    assert curb.names == ("ignore", "curb", "road", "sidewalk", "others")
    raw = np.array([3, 40, 48, 44, 49, 60, 4, 259, 0, 1, 52, 99])
    assert curb.classes_of(raw).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 0, 0, 0, 0]
    assert curb.raw_of(np.arange(5)).tolist() == [0, 3, 40, 48, 4]
    assert set(curb.to_class) == set(RAW_NAMES)
    assert curb.split["val"] == ("02", "03", "07")
    alone = BUILTIN["curb-only"]
    assert alone.classes_of(raw).tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0]
    assert BUILTIN["nrs"].classes_of(np.array([3, 0, 1])).tolist() == [1, 2, 2]


def test_instance_bits_do_not_matter_for_the_class_and_stay():
    raw = np.array([48 | 7 << 16, 40 | 0xFFFF << 16], np.uint32)
    curb = BUILTIN["curb"]
    classes = curb.classes_of(raw)
    assert classes.tolist() == [3, 2]
    assert curb.raw_of(np.array([1, 2]), instances=raw).tolist() == [3 | 7 << 16, 40 | 0xFFFF << 16]


def test_an_unknown_id_names_the_file_and_the_id():
    with pytest.raises(InputError) as fault:
        BUILTIN["curb"].classes_of(np.array([40, 77, 77, 5 | 9 << 16]), where="08/000001.label")
    assert str(fault.value) == (
        "08/000001.label: has the label ids 5, 77 (3 points), which the label map does not know; "
        "give the map of these labels with --data.labels FILE.yaml"
    )


def test_yaml_is_read(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump(YAML))
    found = label_map(str(path))
    assert found.names == ("ignore", "road", "sidewalk", "curb")
    assert found.classes_of(np.array([1, 40, 48, 3])).tolist() == [0, 1, 2, 3]
    assert found.colours[3].tolist() == [7, 8, 9]  # blue, green, red in the file
    assert found.split == {"train": ("00", "01"), "val": ("08",), "test": ("town",)}
    assert found.to_raw == (0, 40, 48, 3)


def test_ignored_classes_of_a_yaml_become_class_0(tmp_path):
    content = YAML | {"learning_ignore": {0: False, 1: True, 2: False, 3: False}}
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump(content))
    found = read_label_map(path)
    assert found.names == ("ignore", "unlabeled", "sidewalk", "curb")
    assert found.classes_of(np.array([0, 40, 48, 3])).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("key", ["labels", "color_map", "learning_map", "learning_map_inv"])
def test_a_yaml_without_a_needed_key_is_refused(tmp_path, key):
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in YAML.items() if k != key}))
    with pytest.raises(InputError) as fault:
        read_label_map(path)
    assert str(fault.value).startswith(f"{path}: has no table {key}; a label map needs labels")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learning_map_inv": {0: 0, 1: 40, 2: 48}}, "learning_map_inv has no entry for 3"),
        (
            {"color_map": {0: [0, 0, 0], 40: [1, 2], 48: [0, 0, 0], 3: [0, 0, 0]}},
            "color_map.40 must be blue, green and red, got [1, 2]",
        ),
        ({"color_map": {40: [300, 0, 0], 48: [0, 0, 0], 3: [0, 0, 0]}}, "rgb must be within"),
        ({"learning_map": {0: 0, 70000: 1, 48: 2, 3: 3}}, "raw ids must be within 0..65535"),
        ({"learning_map": {0: "zero"}}, "learning_map.0 must hold whole numbers, got 'zero'"),
        ({"labels": {0: "a", 40: "road", 48: "road", 3: "curb"}}, "names must differ"),
        ({"split": {"train": 0}}, "split.train must be a list of sequences, got 0"),
        ({"split": {"valid": "08"}}, "split.valid must be a list of sequences, got '08'"),
        ({"split": [1]}, "split must be a table, got [1]"),
        ({"learning_ignore": 0}, "learning_ignore must be a table, got 0"),
        ({"content": {40: "much"}}, "content.40 must be a share of the points, got 'much'"),
        (
            {"split": {"train": [0, 8], "valid": ["08"]}},
            "the sequence 08 is in split.train and in split.valid",
        ),
    ],
)
def test_a_yaml_whose_keys_do_not_fit_is_refused(tmp_path, change, expected):
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump(YAML | change))
    with pytest.raises(InputError) as fault:
        read_label_map(path)
    assert expected in str(fault.value)
    assert str(path) in str(fault.value)
    assert "\n" not in str(fault.value)


def test_empty_keys_of_a_yaml_are_as_if_absent(tmp_path):
    path = tmp_path / "map.yaml"
    change = {"learning_ignore": None, "content": None, "split": {"train": [1], "test": None}}
    path.write_text(yaml.safe_dump(YAML | change))
    found = read_label_map(path)
    assert found.names == ("ignore", "road", "sidewalk", "curb")
    assert found.split == {"train": ("01",), "test": ()}
    path.write_text(yaml.safe_dump(YAML | {"split": None}))
    assert read_label_map(path).split == {}


def test_the_shares_of_a_yaml_are_kept(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump(YAML | {"content": {0: 0.018, 40: 0.2, 3: 1}}))
    found = read_label_map(path)
    assert found.shares == {0: 0.018, 40: 0.2, 3: 1.0}
    write_label_map(path, found)
    assert yaml.safe_load(path.read_text())["content"] == {0: 0.018, 40: 0.2, 3: 1.0}
    assert read_label_map(path) == found


def test_files_that_are_no_yaml_are_refused(tmp_path):
    for content in (b"a: [1,", b"\xff\xfe\x00", b"- 1\n- 2\n", b""):
        path = tmp_path / "map.yaml"
        path.write_bytes(content)
        with pytest.raises(InputError) as fault:
            read_label_map(path)
        assert "\n" not in str(fault.value)
    with pytest.raises(InputError, match="neither a file nor one of the built-in label maps curb,"):
        label_map("kerb")


@pytest.mark.parametrize("name", BUILTIN)
def test_maps_survive_yaml_and_settings(tmp_path, name):
    whole = BUILTIN[name]
    write_label_map(tmp_path / "map.yaml", whole)
    assert read_label_map(tmp_path / "map.yaml") == whole
    again = parse_classes(class_texts(whole))
    for part in ("names", "to_class", "to_raw", "rgb"):
        assert getattr(again, part) == getattr(whole, part)


@settings(max_examples=50, deadline=None)
@given(raw=hnp.arrays(np.uint32, st.integers(0, 50)))
def test_label_files_survive(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("labels") / "a.label"
    write_labels(path, raw)
    np.testing.assert_array_equal(read_labels(path, count=len(raw)), raw)
    assert path.stat().st_size == 4 * len(raw)
    np.testing.assert_array_equal(with_instances(raw, raw), raw)


def test_label_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.label"
    path.write_bytes(bytes(10))
    with pytest.raises(InputError, match=r"a.label: has 10 bytes, not a multiple of 4.*truncated"):
        read_labels(path)
    path.write_bytes(bytes(12))
    with pytest.raises(InputError, match=r"a.label: has 3 labels for a scan of 4 points"):
        read_labels(path, count=4)
    with pytest.raises(InputError, match="does not exist"):
        read_labels(tmp_path / "none.label")


def test_label_files_are_little_endian(tmp_path):
    write_labels(tmp_path / "a.label", np.array([3 | 1 << 16]))
    assert (tmp_path / "a.label").read_bytes() == b"\x03\x00\x01\x00"


@pytest.mark.bad_input
def test_maps_that_contradict_themselves_are_value_errors():
    good = {"names": ("ignore", "a"), "to_class": {1: 1}, "to_raw": (0, 1), "rgb": ((0, 0, 0),) * 2}
    LabelMap(**good)
    for change, expected in (
        ({"names": ("a", "ignore")}, "names must be 'ignore' and"),
        ({"to_raw": (0,)}, "must have 2 entries"),
        ({"to_class": {1: 2}}, "classes below 2"),
    ):
        with pytest.raises(ValueError, match=expected):
            LabelMap(**(good | change))
    with pytest.raises(ValueError, match="no class 'kerb' among"):
        BUILTIN["curb"].class_named("kerb")
    for texts in (["ignore=0:#000000", "a=x:1#000000"], ["ignore=0:0#000000", "a=1:0#000000"]):
        with pytest.raises(ValueError, match="classes must"):
            parse_classes(texts)


def test_sequence_names_have_two_digits():
    assert [sequence_name(n) for n in (3, "3", "11", "town")] == ["03", "03", "11", "town"]
