"""Every layout is recognised and lands in pixels and seconds; what is broken is named."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from heed_core.errors import InputError
from heed_gaze.readers.reading import read_scanpaths
from heed_gaze.readers.trials import ReadOptions
from heed_gaze.scanpaths import Scanpath, write_scanpaths

XY = np.array([[10.0, 20.0], [30.5, 40.0], [60.0, 5.0]])
DURATION_S = np.array([0.1, 0.25, 0.4])
FULL = Scanpath(
    image="a.png",
    subject="7",
    xy_px=XY,
    size_px=(80, 60),
    task="dog",
    condition="present",
    onset_s=np.array([0.0, 0.2, 0.6]),
    duration_s=DURATION_S,
    objects=np.array([2, 0, 2]),
    split="test",
)


def coco(folder: Path) -> Path:
    path = folder / "coco.json"
    trial = {
        "name": "a.png", "subject": 7, "task": "dog", "condition": "present", "split": "test",
        "bbox": [1, 2, 30, 40], "X": XY[:, 0].tolist(), "Y": XY[:, 1].tolist(),
        "T": [100, 250, 400], "length": 3, "correct": 1, "RT": 900,
    }  # fmt: skip
    path.write_text(json.dumps([trial]))
    return path


def sti(folder: Path) -> Path:
    path = folder / "VIU.json"
    entry = {
        "cue": "dog",
        "fixations": {"7": XY.tolist(), "8": XY[::-1].tolist()},
        "ground_truth": [{"xmin": 1, "ymin": 2, "xmax": 31, "ymax": 42}],
        "size": {"width": 80, "height": 60},
    }
    path.write_text(json.dumps({"a.png": entry}))
    return path


def visions(folder: Path) -> Path:
    path = folder / "subj07_scanpaths.json"
    entry = {
        "subject": "7", "image_height": 60, "image_width": 80, "target_bbox": [2, 1, 42, 31],
        "X": XY[:, 0].tolist(), "Y": XY[:, 1].tolist(), "T": [100, 250, 400],
        "target_object": "dog",
    }  # fmt: skip
    path.write_text(json.dumps({"a.png": entry}))
    return path


def osie_json(folder: Path) -> Path:
    viewer = {"x": XY[:, 0].tolist(), "y": XY[:, 1].tolist(), "ms": [100, 250, 400]}
    images = {"a.png": {"split": "test", "subjects": [viewer]}}
    (folder / "scanpaths.json").write_text(json.dumps({"image_size": [80, 60], "images": images}))
    return folder


def osie_mat(folder: Path) -> Path:
    cells = np.empty((2, 1), dtype=object)
    for k, name in enumerate(("a.png", "b.png")):
        viewers = np.empty((2, 1), dtype=object)
        viewers[0, 0] = {"fix_x": XY[:, 0], "fix_y": XY[:, 1], "fix_duration": [100, 250, 400]}
        viewers[1, 0] = {"fix_x": [5.0], "fix_y": [6.0], "fix_duration": [300]}
        cells[k, 0] = {"img": name, "subjects": viewers}
    savemat(folder / "fixations.mat", {"fixations": cells})
    return folder


def fixatons(folder: Path) -> Path:
    Image.new("RGB", (80, 60)).save((folder / "STIMULI").mkdir() or folder / "STIMULI" / "a.png")
    scans = folder / "SCANPATHS" / "a"
    scans.mkdir(parents=True)
    start = np.array([0.0, 0.2, 0.6])
    np.savetxt(scans / "7", np.column_stack([XY, start, start + DURATION_S]))
    return folder


def objects(folder: Path) -> Path:
    path = folder / "shelf.json"
    boxes = [[0, 0, 20, 40], [20, 0, 40, 40]]
    path.write_text(
        json.dumps(
            {
                "layouts": [{"name": "shelf", "boxes": boxes}],
                "trials": [{"layout": "shelf", "target": 1, "subject": "7", "objects": [0, 1, 1]}],
            }
        )
    )
    return path


@pytest.mark.parametrize(
    ("write", "layout", "size", "timed", "boxed"),
    [
        (coco, "COCO-Search18", (1680, 1050), True, True),
        (sti, "STI", (80, 60), False, True),
        (visions, "ViSioNS", (80, 60), True, True),
        (osie_json, "OSIE as JSON", (80, 60), True, False),
        (osie_mat, "OSIE", (800, 600), True, False),
        (fixatons, "FixaTons", (80, 60), True, False),
    ],
)
def test_a_layout_is_recognised(
    tmp_path: Path,
    write: Callable[[Path], Path],
    layout: str,
    size: tuple[int, int],
    timed: bool,
    boxed: bool,
):
    found = read_scanpaths(write(tmp_path))
    assert found.layout == layout
    path = found.scanpaths[0]
    assert (path.image, path.size_px) == ("a.png", size)
    np.testing.assert_allclose(path.xy_px, XY)
    if timed:
        assert path.duration_s is not None
        np.testing.assert_allclose(path.duration_s, DURATION_S)
    else:
        assert path.duration_s is None
    assert path.target_box == ((1.0, 2.0, 31.0, 42.0) if boxed else None)


def test_every_viewer_of_sti_has_a_record_of_their_own(tmp_path: Path):
    first, second = read_scanpaths(sti(tmp_path)).scanpaths
    assert (first.subject, second.subject) == ("7", "8")
    np.testing.assert_allclose(second.xy_px, XY[::-1])


def test_objects_without_positions_are_at_the_centres_of_their_boxes(tmp_path: Path):
    (path,) = read_scanpaths(objects(tmp_path), ReadOptions(size_px=(40, 40))).scanpaths
    assert path.xy_px.tolist() == [[10.0, 20.0], [30.0, 20.0], [30.0, 20.0]]
    assert (path.image, path.task) == ("shelf", "1")


def test_a_folder_of_fixatons_data_sets_is_read_as_one(tmp_path: Path):
    for name in ("ONE", "TWO"):
        (tmp_path / name).mkdir()
        fixatons(tmp_path / name)
    assert len(read_scanpaths(tmp_path)) == 2


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str):
    bare = Scanpath(image="b.png", subject="8", xy_px=XY[:1])
    path = write_scanpaths(tmp_path / f"found{suffix}", [FULL, bare])
    full, other = read_scanpaths(path).scanpaths
    for name in ("image", "subject", "task", "condition", "split", "size_px"):
        assert getattr(full, name) == getattr(FULL, name)
    for name in ("xy_px", "duration_s", "onset_s", "objects"):
        np.testing.assert_array_equal(getattr(full, name), getattr(FULL, name))
    assert other.duration_s is None
    assert other.objects is None
    assert other.xy_px.tolist() == XY[:1].tolist()


def test_the_index_orders_the_rows_of_a_csv(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("image,subject,index,x,y,duration\na,1,2,5,5,\na,1,0,1,1,\na,1,1,3,3,\n")
    (found,) = read_scanpaths(path).scanpaths
    assert found.xy_px[:, 0].tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("policy", "left"),
    [("drop", [[10.0, 20.0]]), ("clip", [[10.0, 20.0], [80.0, 20.0]]), ("keep", None)],
)
def test_fixations_off_the_picture(tmp_path: Path, policy, left):
    off = np.array([[10.0, 20.0], [81.0, 20.0]])
    path = write_scanpaths(
        tmp_path / "a.csv", [Scanpath(image="a", subject="1", xy_px=off, size_px=(80, 60))]
    )
    with pytest.raises(InputError, match=r"fixation 2 at \(81, 20\) is off the picture"):
        read_scanpaths(path)
    (found,) = read_scanpaths(path, ReadOptions(outside=policy)).scanpaths
    assert found.xy_px.tolist() == (left or off.tolist())


def test_broken_trials_are_skipped_and_listed(tmp_path: Path):
    spoilt = FULL.xy_px.copy()
    spoilt[1, 0] = np.nan
    path = write_scanpaths(tmp_path / "a.json", [replace(FULL, xy_px=spoilt), FULL])
    with pytest.raises(InputError, match="scanpath 1: fixation 2: x is nan"):
        read_scanpaths(path)
    found = read_scanpaths(path, ReadOptions(on_error="skip"))
    assert len(found) == 1
    assert len(found.skipped) == 1
    assert "scanpath 1" in found.skipped[0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "image,subject,index,x,duration\n", "no column 'y'"),
        ("a.csv", "image,subject,index,x,y\n", "no row"),
        ("a.csv", "image,subject,index,x,y\na,1,0,3,left\n", "line 2: y is 'left'"),
        ("a.csv", "image,subject,index,x,y\na,1,0,3,4\na,1,0,3,4\n", "line 3 has the index"),
        ("a.csv", "image,subject,x,y,duration\na,1,3,4,-1\n", "duration is -1, below 0"),
        (
            "a.csv",
            "image,subject,index,x,y,width,height\na,1,0,3,4,80,1e400\n",
            "line 2: width and height must be from 1 to 1000000 pixels, got 80.0 and inf",
        ),
        ("a.csv", "image,subject,index,x,y,width,height\na,1,0,3,4,80,nan\n", "80.0 and nan"),
        ("a.csv", "image,subject,index,x,y,width,height\na,1,0,3,4,-80,60\n", "-80.0 and 60.0"),
        (
            "a.json",
            '{"scanpaths": [{"image": "a", "subject": "1", "x": [1], "y": [2], '
            '"width": 1e400, "height": 60}]}',
            "got inf and 60",
        ),
        (
            "a.json",
            f'[{{"name": "a", "X": [{10**400}], "Y": [1]}}]',
            "X holds something that is not a number|x holds something that is not a number",
        ),
        (
            "a.json",
            '{"scanpaths": [{"image": "a", "subject": "1", "x": [1], "y": [2], '
            f'"width": {10**400}, "height": 60}}]}}',
            "width and height must be from 1",
        ),
        ("a.json", '{"image_size": ["x", 60], "images": {"a": {}}}', "image_size: width and"),
        ("a.json", "", "is empty"),
        ("a.json", '{"scanpaths": [{"image": ', "no whole JSON"),
        ("a.json", "{}", "no scanpaths that are known"),
        ("a.json", '{"scanpaths": []}', "holds no scanpath"),
        ("a.json", '{"scanpaths": [{"image": "a", "subject": "1", "x": [1]}]}', "scanpath 1"),
        ("a.json", '[{"name": "a", "X": [1, 2], "Y": [1]}]', "different numbers"),
        ("a.json", '[{"name": "a", "X": [], "Y": []}]', "no fixation"),
        ("fixations.mat", "MATLAB 5.0 MAT-file, but no more", "no whole MATLAB file"),
        ("a.txt", "1 2 3", "no file of scanpaths"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, said: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=said) as error:
        read_scanpaths(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_matlab_file_is_named(tmp_path: Path):
    file = osie_mat(tmp_path) / "fixations.mat"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match=r"fixations\.mat: is no whole MATLAB file"):
        read_scanpaths(tmp_path)


@pytest.mark.parametrize(
    ("at", "changed", "said"),
    [
        pytest.param(921, b"\x3d", "is no whole MATLAB file", id="tag-that-takes-scipy-down"),
        pytest.param(
            160, struct.pack("<2i", 20_000, 20_000), r"is no whole MATLAB file \(Memory", id="3-GB"
        ),
        pytest.param(124, b"\0\2IM", r"is a MATLAB file of version 7\.3", id="version-7.3"),
    ],
)
def test_a_changed_matlab_file_is_named(tmp_path: Path, at: int, changed: bytes, said: str):
    file = osie_mat(tmp_path) / "fixations.mat"
    content = bytearray(file.read_bytes())
    content[at : at + len(changed)] = changed
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"fixations\.mat: {said}"):
        read_scanpaths(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="holds no file of scanpaths"):
        read_scanpaths(tmp_path)
