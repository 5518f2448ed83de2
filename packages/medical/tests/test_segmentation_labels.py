"""Classes and the values that stand for them."""

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_medical.segmentation.labels import (
    CHAOS_LABELS,
    IGNORE_INDEX,
    LabelTable,
    parse_labels,
)
from heed_medical.segmentation.settings import SegmentationData

CHAOS = LabelTable(classes=parse_labels(CHAOS_LABELS), mode="grey")


def test_chaos_ranges():
    """The accepted ranges of the data set: 55-70, 110-135, 175-200, 240-255."""
    for number, (low, high) in enumerate([(0, 0), (55, 70), (110, 135), (175, 200), (240, 255)]):
        values = np.array([low, (low + high) // 2, high])
        np.testing.assert_array_equal(CHAOS.encode(values), number)
    for value in (1, 54, 71, 109, 136, 174, 201, 239, 256):
        with pytest.raises(InputError):
            CHAOS.encode(np.array([0, value]))


def test_round_trip_writes_the_source_values():
    values = np.array([[0, 63, 126], [189, 252, 0]])
    np.testing.assert_array_equal(CHAOS.decode(CHAOS.encode(values), picture=True), values)
    numbers = CHAOS.decode(CHAOS.encode(values), picture=False)
    np.testing.assert_array_equal(numbers, [[0, 1, 2], [3, 4, 0]])


def test_ids_are_kept_in_every_output():
    table = LabelTable(classes=parse_labels(["background=0", "core=1", "edema=2", "enhancing=4"]))
    values = np.array([0, 4, 2, 1])
    for picture in (True, False):
        np.testing.assert_array_equal(table.decode(table.encode(values), picture=picture), values)


def test_values_above_255_need_16_bits():
    table = LabelTable(classes=parse_labels(["background=0", "organ=300"]))
    assert table.decode(np.array([0, 1]), picture=True).dtype == np.uint16


def test_unknown_value_names_file_value_and_list(tmp_path):
    with pytest.raises(InputError) as caught:
        CHAOS.encode(np.array([0, 77, 77, 90]), path=tmp_path / "m.png")
    text = str(caught.value)
    assert str(tmp_path / "m.png") in text
    assert "77, 90" in text
    assert "(3 voxels)" in text
    assert "55-70" in text
    assert "--data.labels" in text


def test_ignored_values():
    table = LabelTable(classes=parse_labels(["background=0", "lung=255"]), ignore=(127,))
    np.testing.assert_array_equal(table.encode(np.array([0, 127, 255])), [0, IGNORE_INDEX, 1])


def test_binary_takes_instance_numbers():
    table = LabelTable(classes=parse_labels(["background=0", "cell=1"]), mode="binary")
    np.testing.assert_array_equal(table.encode(np.array([0, 1, 209])), [0, 1, 1])
    np.testing.assert_array_equal(table.decode(np.array([0, 1]), picture=True), [0, 255])
    with pytest.raises(InputError):
        table.encode(np.array([-1, 1]))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (["background"], "name=value"),
        (["background=0", "organ=x"], "name=value"),
        (["background=0"], "2 to"),
        (["background=0", "organ=1", "organ=2"], "different names"),
        (["background=0", "a=5-10", "b=10-12"], "overlap"),
        (["background=0", "a=5:6-10"], "low <= value <= high"),
    ],
)
def test_wrong_labels(labels, what):
    with pytest.raises(ValueError, match=what):
        parse_labels(labels)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"size": (250, 256)}, "multiples of 8"),
        ({"overlap": 1.0}, "overlap"),
        ({"background_slices": 2.0}, "background_slices"),
        ({"window": (5.0, 5.0)}, "window"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm"),
        ({"input_channels": 0}, "input_channels"),
        ({"cache_mb": -1}, "cache_mb"),
        ({"labels": ("a",)}, "labels"),
    ],
)
def test_wrong_settings(fields, what):
    with pytest.raises(ValueError, match=what):
        SegmentationData(**fields)


def test_table_needs_a_plan():
    with pytest.raises(ValueError, match="plan_data"):
        _ = SegmentationData().table
