"""Files with wrong bytes in them: every reader reads one or says in one line that it cannot."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from heed_core.testing.damage import check_readers
from heed_gaze.eccnet.layouts import read_cells
from heed_gaze.eccnet.pictures import read_idx
from heed_gaze.eccnet.results import read_results
from heed_gaze.oat.files import read_shelves, write_neutral
from heed_gaze.oat.importers import ImportOptions, read_mask
from heed_gaze.oat.sample import SampleOptions, write_sample
from heed_gaze.readers.pictures import read_picture
from heed_gaze.readers.reading import read_scanpaths
from heed_gaze.scanpaths import Scanpath, write_scanpaths

XY = np.array([[10.0, 20.0], [30.5, 40.0], [60.0, 5.0]])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_scanpaths(tmp_path: Path, suffix: str):
    made = [
        Scanpath(
            image="a.png",
            subject=name,
            xy_px=XY,
            size_px=(80, 60),
            duration_s=np.array([0.1, 0.25, 0.4]),
        )
        for name in ("7", "8")
    ]
    path = write_scanpaths(tmp_path / f"found{suffix}", made)
    for seed in range(6):
        check_readers(path, [read_scanpaths], seed=seed)


def test_matlab(tmp_path: Path):
    cells = np.empty((1, 1), dtype=object)
    viewers = np.empty((1, 1), dtype=object)
    viewers[0, 0] = {"fix_x": XY[:, 0], "fix_y": XY[:, 1], "fix_duration": [100, 250, 400]}
    cells[0, 0] = {"img": "a.png", "subjects": viewers}
    savemat(tmp_path / "fixations.mat", {"fixations": cells})
    check_readers(tmp_path / "fixations.mat", [read_scanpaths], changed=5, refused=8)


def test_shelves(tmp_path: Path):
    shelves = write_sample(tmp_path, SampleOptions(layouts=2, targets=1, viewers=2), seed=0)
    path = write_neutral(tmp_path / "shelves.json", shelves)
    for seed in range(2):
        check_readers(path, [lambda p: read_shelves(p, ImportOptions())], seed=seed, refused=5)


def test_pictures_and_masks(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.bmp"):
        Image.fromarray(values).save(tmp_path / name)
        check_readers(tmp_path / name, [read_picture, read_mask])


def test_arrays(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5), dtype=np.uint8)
    header = b"\0\0\x08" + bytes([3]) + struct.pack(">3I", *images.shape)
    (tmp_path / "a-idx3-ubyte").write_bytes(header + images.tobytes())
    (tmp_path / "a-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    np.save(tmp_path / "cells.npy", np.ones((2, 4, 5), bool))
    for seed in range(4):
        for name in ("a-idx3-ubyte", "a-idx3-ubyte.gz"):
            check_readers(tmp_path / name, [read_idx.__wrapped__], seed=seed)
        check_readers(tmp_path / "cells.npy", [read_cells], seed=seed)


def test_results(tmp_path: Path):
    (tmp_path / "results.csv").write_text(
        "task,set_size,saccades\n" + "".join(f"a,{k},{k % 3 + 1}\n" for k in range(1, 9))
    )
    read_results(tmp_path / "results.csv")
    for seed in range(4):
        check_readers(tmp_path / "results.csv", [read_results], seed=seed)
