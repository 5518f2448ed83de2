"""Search sets and pictures on disk: what is written is read, what is broken is named."""

import gzip
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.eccnet.experiments import EXPERIMENTS
from heed_gaze.eccnet.layouts import (
    Trials,
    border_grey,
    find_trials,
    natural_set,
    read_trial,
    write_stimuli,
)
from heed_gaze.eccnet.pictures import (
    Picture,
    Pictures,
    cut_and_flip,
    list_pictures,
    picture_root,
    read_idx,
    warped,
    write_sample_pictures,
)

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(scope="module")
def stimuli(tmp_path_factory):
    root = tmp_path_factory.mktemp("stimuli")
    write_stimuli(root, seed=3, trials=1, experiments=(EXPERIMENTS[1], EXPERIMENTS[4]))
    return root


def test_stimuli_are_read_back(stimuli, tmp_path):
    write_stimuli(tmp_path, seed=3, trials=1, experiments=(EXPERIMENTS[1], EXPERIMENTS[4]))
    files = [p for p in sorted(stimuli.rglob("*")) if p.is_file()]
    assert all((tmp_path / p.relative_to(stimuli)).read_bytes() == p.read_bytes() for p in files)
    found = find_trials(stimuli)
    assert [f.set_size for f in found if f.task == "lightning_dir/top_down"] == [1, 6, 12]
    assert len(found) == 2 * 3 + 2 * 4
    trial = read_trial(found[-1])
    assert trial.rules == EXPERIMENTS[1].rules
    assert trial.scene.cells.shape == (16, 198, 198)
    assert (trial.scene.truth == trial.scene.cells).all(axis=(1, 2)).sum() == 1
    assert len(find_trials(stimuli, tasks=("homo/t0",))) == 4
    assert len(find_trials(stimuli / "lightning_dir" / "top_down", most=1)) == 3


def test_the_official_blocks_need_no_table(stimuli, tmp_path):
    shutil.copytree(stimuli, tmp_path / "s")
    for table in (tmp_path / "s").rglob("trials.csv"):
        table.unlink()
    assert [f.set_size for f in find_trials(tmp_path / "s")] == [
        f.set_size for f in find_trials(stimuli)
    ]


def custom(root, *, image=None, target=None, truth=None, cells=None):
    for part in ("stimuli", "target", "gt"):
        (root / part).mkdir(parents=True)
    image = np.full((50, 40), 200, np.uint8) if image is None else image
    Image.fromarray(image).save(root / "stimuli" / "a.png")
    small = np.zeros((6, 6), np.uint8) if target is None else target
    Image.fromarray(small).save(root / "target" / "a.png")
    mask = np.zeros((50, 40), np.uint8)
    mask[5:9, 5:9] = 255
    Image.fromarray(mask if truth is None else truth).save(root / "gt" / "a.png")
    if cells is not None:
        np.save(root / "gt_mask.npy", cells)
    return root


def test_a_users_own_scenes_are_read(tmp_path):
    trial = Trials(find_trials(custom(tmp_path / "own")))[0]
    assert trial.scene.image.shape == (50, 40, 3)  # grey becomes three channels
    assert (trial.rules.background, trial.set_size, trial.scene.cells) == (200, None, None)
    assert border_grey(trial.scene.image) == 200
    assert natural_set("my/Waldo").target == 32
    shutil.copytree(tmp_path / "own", tmp_path / "waldo")
    waldo = Trials(find_trials(tmp_path))[1]
    assert waldo.scene.image.shape == (736, 896, 3)
    assert waldo.scene.target.shape == (32, 32, 3)
    assert waldo.rules.maps.layer_weights == "equal"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"target": np.zeros((60, 6), np.uint8)}, "target is 60 x 6"),
        ({"truth": np.zeros((50, 40), np.uint8)}, "is black"),
        ({"truth": np.full((10, 40), 255, np.uint8)}, "is for 10 x 40 pixels"),
        ({"cells": np.full((3, 50, 41), 255, np.uint8)}, "is for 50 x 41 pixels"),
        ({"cells": np.full((50, 40), 255, np.uint8)}, r"not \(cells"),
        ({"cells": np.full((1, 50, 40), np.nan)}, "NaN"),
        ({"cells": np.zeros((1, 50, 40), np.uint8)}, "cell without pixels"),
        ({"cells": np.array([["a"]], dtype=object)}, "is not a numpy array"),
    ],
)
def test_scenes_that_do_not_fit_name_the_file(tmp_path, parts, said):
    with pytest.raises(InputError, match=said) as caught:
        Trials(find_trials(custom(tmp_path / "own", **parts)))[0]
    assert str(tmp_path / "own") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(tmp_path, stimuli):
    root = custom(tmp_path / "own")
    (root / "target" / "a.png").unlink()
    with pytest.raises(InputError, match="has no target"):
        find_trials(root)
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(root / "target" / "a.png")
    (root / "gt" / "a.png").rename(root / "gt" / "b.png")
    with pytest.raises(InputError, match="has no mask"):
        find_trials(root)
    (root / "gt" / "b.png").rename(root / "gt" / "a.png")
    (root / "trials.csv").write_text("trial,set_size\na,many\n")
    with pytest.raises(InputError, match=r"trials.csv, row 2"):
        find_trials(root)
    (root / "trials.csv").write_text("trial,set_size\nb,3\n")
    with pytest.raises(InputError, match="no row for the trial a"):
        find_trials(root)
    (root / "trials.csv").unlink()
    for content, said in ((b"", "cannot be read"), (b"\x89PNG\r\n\x1a\n12", "cannot be read")):
        (root / "stimuli" / "a.png").write_bytes(content)
        with pytest.raises(InputError, match=said):
            Trials(find_trials(root))[0]
    copy = tmp_path / "copy"
    shutil.copytree(stimuli, copy)
    task = copy / "categorization" / "homo" / "t0"
    (task / "trials.csv").unlink()
    (task / "stimuli" / "1.png").unlink()
    with pytest.raises(InputError, match="not 4 equal blocks"):
        find_trials(copy)


def test_pictures_in_folders_and_their_variants(tmp_path):
    write_sample_pictures(tmp_path / "images", seed=0)
    assert picture_root(tmp_path) == tmp_path / "images"
    listing = list_pictures(tmp_path, "train")
    assert listing.classes == ("cross", "curve", "disc", "l", "line", "t")
    assert len(listing.places) == 6 * 24
    assert list_pictures(tmp_path, "test") == list_pictures(tmp_path, "val")
    pictures = Pictures(listing.places, 32)
    assert pictures[0].pixels.shape == (32, 32, 3)
    larger = Pictures(listing.places, 32, for_training=True)[0]
    cuts = {
        cut_and_flip(32, flip=True)(larger, np.random.default_rng(k)).pixels.tobytes()
        for k in range(9)
    }
    assert len(cuts) > 5
    (tmp_path / "images" / "val" / "star").mkdir()
    with pytest.raises(InputError, match="train has not"):
        list_pictures(tmp_path, "val")
    with pytest.raises(InputError, match="no pictures to classify"):
        list_pictures(tmp_path / "images" / "val", "train")


def test_variants_move_what_they_should():
    rng = np.random.default_rng(0)
    picture = rng.integers(1, 255, (224, 224, 3), dtype=np.uint8)
    assert np.array_equal(warped(picture, "rot90")[0], picture[:, -1])
    grid = warped(picture, "grid")
    black = np.flatnonzero((grid == 0).all(axis=(1, 2)))
    assert black.tolist() == [start + k for start in (45, 95, 145, 195) for k in range(5)]
    assert np.array_equal(grid[:45, :45], picture[:45, :45])
    disc = np.zeros((200, 200, 3), np.uint8)
    y, x = np.mgrid[:200, :200] - 99.5
    disc[np.hypot(y, x) < 25] = 255
    seen = warped(disc, "fisheye")[..., 0] > 127
    radius = np.sqrt(seen.sum() / np.pi)
    assert radius == pytest.approx(100 * 0.25 ** (1 / 1.6), rel=0.02)
    assert warped(picture, "none") is picture


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


def test_idx_files_are_read_and_split(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 5)
    counts = {
        split: len(list_pictures(tmp_path, split).places) for split in ("train", "val", "test")
    }
    assert counts == {"train": 16, "val": 2, "test": 2}
    listing = list_pictures(tmp_path, "test")
    assert listing.places[1].label == 19 % 5
    assert len(listing.classes) == 5
    found: Picture = Pictures(listing.places, 28)[0]
    assert found.pixels.shape == (28, 28, 3)
    whole = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[:-30])
    (tmp_path / "raw").write_bytes(b"\0\0\x08\x01\0\0\0\x09abc")
    (tmp_path / "empty").write_bytes(b"")
    for name, said in (
        ("cut.gz", "unpacked"),
        ("raw", "not 9"),
        ("empty", "no idx"),
        ("no", "such"),
    ):
        with pytest.raises(InputError, match=said):
            read_idx(tmp_path / name)


def test_real_digits_are_read():
    root = DATA / "img-mnist-t10k"
    if not root.is_dir():
        pytest.skip(f"no {root}: set HEED_DATA to the folder of real data")
    listing = list_pictures(root, "train")
    assert (len(listing.places), len(listing.classes)) == (8000, 10)
