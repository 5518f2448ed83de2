"""What the bags that we write hold for other tools."""

from pathlib import Path

import numpy as np
import pytest

from heed_medical.bags.bag import Bag, BagFile
from heed_medical.bags.files import read_bag
from heed_medical.bags.writing import write_bags

h5py = pytest.importorskip("h5py")


def bag(name: str, slide_size: tuple[int, int] | None) -> tuple[BagFile, Bag]:
    """Three patches of 512 pixels."""
    made = Bag(
        name=name,
        features=np.ones((3, 4), dtype=np.float32),
        coords=np.array([[0, 0], [512, 0], [0, 1024]]),
        patch_size=512,
        slide_size=slide_size,
        path=Path(f"{name}.h5"),
    )
    return BagFile(name=name, path=made.path, label="a"), made


def test_places_of_clam_have_its_attributes(tmp_path: Path):
    write_bags([bag("sized", (4000, 3000)), bag("bare", None)], tmp_path, "clam")
    kept = {}
    for name in ("sized", "bare"):
        with h5py.File(tmp_path / "patches" / f"{name}.h5") as file:
            kept[name] = {key: np.asarray(x).tolist() for key, x in file["coords"].attrs.items()}
    usual = {"patch_size": 512, "patch_level": 0, "downsample": [1.0, 1.0], "save_path": "patches"}
    assert kept["bare"] == {**usual, "name": "bare"}
    size = {"level_dim": [4000, 3000], "downsampled_level_dim": [4000, 3000]}
    assert kept["sized"] == {**usual, **size, "name": "sized"}
    back = read_bag(BagFile(name="sized", path=tmp_path / "h5_files" / "sized.h5"))
    assert (back.patch_size, back.slide_size) == (512, (4000, 3000))
