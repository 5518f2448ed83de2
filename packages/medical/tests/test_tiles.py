"""Tiles that were cut already: folders as bags, places from names, features, a picture of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from heed_core.errors import InputError
from heed_medical.bags.bag import BagFile
from heed_medical.bags.files import read_bag
from heed_medical.bags.heatmap import find_thumbnail
from heed_medical.slides.encoding import Encoder
from heed_medical.slides.features import extract_tiles
from heed_medical.slides.tiles import TileFolder, find_tile_folders, tile_places


class MeanColour(nn.Module):
    """The mean of each colour channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


ENCODE = Encoder(MeanColour(), mean=(0.0,) * 3, std=(1.0,) * 3)


def tile(path: Path, colour: tuple[int, int, int] = (200, 120, 170), side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    return path


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["0_16", "16_0"], [[0, 16], [16, 0]]),
        (["slide_x1024_y2048", "slide_x0_y5"], [[1024, 2048], [0, 5]]),
        (["10253_idx5_x1351_y1101_class0"], [[1351, 1101]]),
        (["TCGA-01_3_1024_2048", "TCGA-01_3_0_512"], [[1024, 2048], [0, 512]]),
        (["s [d=4,x=1024,y=2048,w=512,h=512]"], [[1024, 2048]]),
        (["t1", "t2"], None),
        (["0_16", "t2"], None),
        (["a_5_7", "b_5_7"], None),
        (["SOB_B_A_14-22549AB_0", "SOB_B_A_14-22549AB_1"], None),
    ],
)
def test_places_are_read_from_names(names: list[str], places: list[list[int]] | None):
    found = tile_places([Path(f"{name}.png") for name in names])
    assert (None if found is None else found.tolist()) == places


def test_each_folder_of_tiles_is_a_bag(tmp_path: Path):
    for name in ("tumour/s.1/0_0.png", "tumour/s.1/16_0.jpg", "normal/s2/a.tif", "flat/b.png"):
        tile(tmp_path / "data" / name)
    (tmp_path / "data" / "normal" / "notes.txt").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "data")
    found = {bag.name: len(bag.files) for bag in find_tile_folders([tmp_path / "root"])}
    assert found == {"flat": 1, "s2": 1, "s.1": 2}
    (one,) = find_tile_folders([tmp_path / "data" / "flat"])
    assert one.name == "flat"


def test_folders_that_are_no_bags_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none: no such folder"):
        find_tile_folders([tmp_path / "none"])
    with pytest.raises(InputError, match="holds no tile"):
        find_tile_folders([tmp_path])
    with pytest.raises(InputError, match=r"a\.png: is a file, a folder of tiles is needed"):
        find_tile_folders([tile(tmp_path / "p1" / "0" / "a.png")])
    tile(tmp_path / "p2" / "0" / "a.png")
    with pytest.raises(InputError, match=r"has the name of .*p1/0; bags are named after"):
        find_tile_folders([tmp_path])


def test_tiles_become_a_bag_with_places_and_a_picture(tmp_path: Path):
    red, blue = (250, 10, 10), (10, 10, 250)
    for x, y, colour in ((0, 0, red), (32, 0, blue), (32, 64, red)):
        tile(tmp_path / "s" / f"{x}_{y}.png", colour)
    (bag,) = find_tile_folders([tmp_path / "s"])
    found = extract_tiles(bag, tmp_path / "out", ENCODE, side=8, batch=2)
    assert (found.slide, found.patches, found.dim) == ("s", 3, 3)
    read = read_bag(BagFile(name="s", path=found.path), in_dim=3)
    order = [[0, 0], [32, 0], [32, 64]]
    assert read.coords.tolist() == order
    np.testing.assert_allclose(read.features * 255, [red, blue, red], atol=0.2)
    assert read.patch_size == 32  # half the resolution: tiles of 16 pixels lie 32 apart
    assert read.slide_size == (64, 96)
    picture, size = find_thumbnail("s", found.path, None, read.slide_size)
    assert size == (64, 96)
    height, width = picture.shape[:2]
    for x, y, colour in ((16, 16, red), (48, 16, blue), (48, 80, red), (16, 80, (255, 255, 255))):
        assert picture[y * height // 96, x * width // 64].tolist() == list(colour)


@pytest.mark.parametrize(
    ("places", "side"),
    [
        ([[0, 0], [16, 0]], 16),
        ([[0, 0], [8, 0]], 16),  # they overlap by half
        ([[0, 0], [1, 0], [0, 1]], 1),  # columns and rows instead of pixels
        ([[5, 9]], 16),
    ],
)
def test_the_side_of_a_tile_on_the_slide(places: list[list[int]], side: int, tmp_path: Path):
    files = tuple(tile(tmp_path / "s" / f"{x}_{y}.png") for x, y in places)
    found = extract_tiles(TileFolder(name="s", files=files), tmp_path, ENCODE, side=16, batch=4)
    assert read_bag(BagFile(name="s", path=found.path)).patch_size == side


def test_tiles_without_places_are_a_bag_in_the_order_of_their_numbers(tmp_path: Path):
    for number in (10, 2, 1):
        tile(tmp_path / "s" / f"t{number}.png", (number, 0, 0))
    (bag,) = find_tile_folders([tmp_path / "s"])
    found = extract_tiles(bag, tmp_path / "out", ENCODE, side=16, batch=64)
    read = read_bag(BagFile(name="s", path=found.path))
    assert read.coords is None
    np.testing.assert_allclose(read.features[:, 0] * 255, [1, 2, 10], atol=0.1)
    assert find_thumbnail("s", found.path, None, read.slide_size) is None


def test_broken_tiles_are_named(tmp_path: Path):
    files = [tile(tmp_path / "s" / f"{n}.png") for n in range(3)]
    files[1].write_bytes(files[1].read_bytes()[:40])
    (bag,) = find_tile_folders([tmp_path / "s"])
    with pytest.raises(InputError, match=r"1\.png: cannot be read as a picture"):
        extract_tiles(bag, tmp_path / "out", ENCODE, side=16, batch=64)
    tile(files[1], side=20)
    with pytest.raises(InputError, match=r"1\.png: is 20 x 20 pixels, 0\.png is 16 x 16"):
        extract_tiles(bag, tmp_path / "out", ENCODE, side=16, batch=64)
    assert not (tmp_path / "out").exists()
