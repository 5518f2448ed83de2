"""From a slide to features: tissue, tiles, encoders, files, overlays."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from heed_core.errors import InputError
from heed_medical.bags.bag import BagFile
from heed_medical.bags.files import read_bag
from heed_medical.bags.heatmap import find_thumbnail, lay_out
from heed_medical.bags.metrics import classification_scores, concentration, roc_auc, top_mass
from heed_medical.bags.prediction import BagPrediction, write_prediction
from heed_medical.slides.encoding import Encoder, load_encoder
from heed_medical.slides.features import extract, find_slides
from heed_medical.slides.geojson import patch_collection
from heed_medical.slides.reading import open_slide
from heed_medical.slides.tiling import Tiling, tile_corners
from heed_medical.slides.tissue import TissueSearch, otsu, tissue_mask

WSI = Path(os.environ.get("HEED_DATA", Path(__file__).parents[3] / "../shared/data")) / "wsi"
needs_slides = pytest.mark.skipif(not WSI.is_dir(), reason="the real slides are not here")


class MeanColour(nn.Module):
    """The mean of each colour channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def picture(path: Path, width: int = 300, height: int = 200) -> np.ndarray:
    """White, with a pink block of tissue and a speck."""
    pixels = np.full((height, width, 3), 245, np.uint8)
    pixels[40:160, 60:220] = (200, 120, 170)
    pixels[5:8, 5:8] = (200, 120, 170)
    Image.fromarray(pixels).save(path)
    return pixels


def test_tissue_is_the_coloured_block_without_specks(tmp_path: Path):
    pixels = picture(tmp_path / "a.png")
    mask = tissue_mask(pixels, TissueSearch(least_area=0.01))
    wanted = np.zeros_like(mask)
    wanted[40:160, 60:220] = True
    assert (mask != wanted).sum() <= 16  # the median rounds the corners
    assert not tissue_mask(np.full((50, 60, 3), 240, np.uint8), TissueSearch()).any()
    assert tissue_mask(np.full((50, 60, 3), (180, 60, 120), np.uint8), TissueSearch()).all()


def test_otsu_divides_two_heaps():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.03, 500), rng.normal(0.7, 0.05, 300)])
    assert 0.3 < otsu(values) < 0.6


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from([0.0, 0.5]))
def test_tiles_lie_inside_and_show_tissue(width: int, height: int, side: int, overlap: float):
    rng = np.random.default_rng(width * height)
    mask = rng.random((height, width)) < 0.5
    tiling = Tiling(tile=side, overlap=overlap, least_tissue=0.5)
    corners = tile_corners(mask, (width, height), side, tiling)
    step = max(1, round(side * (1 - overlap)))
    wanted = [
        (x, y)
        for y in range(0, max(height - side, 0) + 1, step)
        for x in range(0, max(width - side, 0) + 1, step)
        if mask[y : y + side, x : x + side].mean() >= 0.5
    ]
    assert [tuple(corner) for corner in corners] == wanted


def test_a_picture_becomes_a_bag_that_is_read_back(tmp_path: Path):
    picture(tmp_path / "a.png")
    encode = Encoder(MeanColour(), mean=(0.0,) * 3, std=(1.0,) * 3)
    found = extract(
        tmp_path / "a.png", tmp_path / "out", encode, tiling=Tiling(tile=20), tissue=TissueSearch()
    )
    bag = read_bag(BagFile(name="a", path=found.path), in_dim=3)
    assert len(bag.features) == found.patches == (160 // 20) * (120 // 20)
    assert bag.patch_size == 20
    assert bag.slide_size == (300, 200)
    np.testing.assert_allclose(bag.features, [[200 / 255, 120 / 255, 170 / 255]] * 48, atol=2e-3)
    assert bag.coords.min(0).tolist() == [60, 40]
    thumbnail = find_thumbnail("a", found.path, None, bag.slide_size)
    assert thumbnail is not None
    assert thumbnail[0].shape == (200, 300, 3)


def test_a_region_is_scaled_and_white_beyond_the_border(tmp_path: Path):
    pixels = picture(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        np.testing.assert_array_equal(slide.region(50, 30, 64, 64), pixels[30:94, 50:114])
        corner = slide.region(280, 180, 40, 20)
        assert (corner[12:] == 255).all()
        assert (corner[:, 12:] == 255).all()
        assert (corner[:9, :9] == 245).all()


@needs_slides
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cmu-1-small-region.svs", (2220, 2967)),
        ("tcga-cr-7395-01a-01-ts1.svs", (4443, 3567)),
    ],
)
def test_real_slides_are_tiled(name: str, size: tuple[int, int], tmp_path: Path):
    encode = Encoder(MeanColour())
    tiling = Tiling(tile=112)
    found = extract(WSI / name, tmp_path, encode, tiling=tiling, tissue=TissueSearch())
    most = (size[0] // 112) * (size[1] // 112)
    assert 0.1 * most < found.patches <= most
    bag = read_bag(BagFile(name="x", path=found.path))
    assert bag.slide_size == size
    with open_slide(WSI / name) as slide:
        assert slide.size == size
        x, y = (int(value) for value in bag.coords[3])
        tile = slide.region(x, y, 112, 112)
        np.testing.assert_allclose(encode(tile[None])[0], bag.features[3], atol=1e-2)
        with pytest.raises(ValueError, match="mpp"):
            Tiling(mpp=-1.0)
        if slide.mpp is None:
            with pytest.raises(InputError, match="micrometres"):
                Tiling(mpp=0.5).side_in(slide, name=name)
        else:
            assert Tiling(tile=100, mpp=2 * slide.mpp).side_in(slide, name=name) == 200


def test_an_exported_encoder_and_a_timm_model(tmp_path: Path):
    batch = torch.export.Dim.AUTO
    program = torch.export.export(
        MeanColour(), (torch.rand(2, 3, 16, 16),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, tmp_path / "e.pt2")
    tiles = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    found = load_encoder(str(tmp_path / "e.pt2"))(tiles)
    np.testing.assert_array_equal(found, Encoder(MeanColour())(tiles))
    with pytest.raises(InputError, match="does not take 5 tiles of 20 pixels"):
        load_encoder(str(tmp_path / "e.pt2"))(np.zeros((5, 20, 20, 3), np.uint8))
    one, two = load_encoder("resnet10t"), load_encoder("resnet10t")
    assert one(tiles).shape == (5, 512)
    np.testing.assert_array_equal(one(tiles), two(tiles))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pth")
    for name, weights, said in (
        ("no_such_model", None, "timm has no model"),
        (str(tmp_path / "no.pt2"), None, "no such file"),
        ("resnet10t", tmp_path / "w.pth", "lacks .* tensors"),
        (str(tmp_path / "e.pt2"), tmp_path / "w.pth", "its own weights"),
    ):
        with pytest.raises(InputError, match=said):
            load_encoder(name, weights=weights)
    (tmp_path / "bad.pt2").write_bytes(b"x")
    with pytest.raises(InputError, match="not a program"):
        load_encoder(str(tmp_path / "bad.pt2"))


def test_slides_in_linked_folders_are_found_and_hidden_ones_are_not(tmp_path: Path):
    (tmp_path / "store").mkdir()
    for name in ("a.svs", "._a.svs", ".hidden.svs"):
        (tmp_path / "store" / name).touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "store")
    assert find_slides([root]) == [root / "link" / "a.svs"]


def test_slides_that_cannot_be_used_are_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        find_slides([tmp_path / "none"])
    with pytest.raises(InputError, match="holds no slide"):
        find_slides([tmp_path])
    (tmp_path / "a.svs").write_bytes(b"no slide")
    (tmp_path / "b.png").write_bytes(b"no picture")
    for name in ("a.svs", "b.png"):
        with pytest.raises(InputError, match=name), open_slide(tmp_path / name):
            pass
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.svs").touch()
    with pytest.raises(InputError, match="has the name of"):
        find_slides([tmp_path])
    Image.new("RGB", (64, 64), (240, 240, 240)).save(tmp_path / "white.png")
    with pytest.raises(InputError, match=r"white\.png: shows no tissue"):
        extract(
            tmp_path / "white.png", tmp_path / "o", Encoder(MeanColour()),
            tiling=Tiling(tile=16), tissue=TissueSearch(),
        )  # fmt: skip


def prediction(n: int = 12) -> BagPrediction:
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(n), size=2).astype(np.float32)
    coords = np.stack([np.arange(n) % 4, np.arange(n) // 4], axis=1) * 256
    return BagPrediction(
        name="sub/x", probabilities=(0.25, 0.75), attention=attention, coords=coords, patch_size=256
    )


def test_the_files_of_a_prediction(tmp_path: Path):
    one = prediction()
    paths = write_prediction(one, tmp_path, ("benign", "malignant"), geojson_patches=5)
    assert [path.name for path in paths] == ["x.json", "x.csv", "x.geojson"]
    document = json.loads(paths[0].read_text())
    assert document["class"] == "malignant"
    assert document["probabilities"] == {"benign": 0.25, "malignant": 0.75}
    lines = paths[1].read_text().splitlines()
    assert lines[0] == "patch,x,y,attention,branch_1,branch_2"
    table = np.array([line.split(",") for line in lines[1:]], dtype=float)
    np.testing.assert_allclose(table[:, 3], one.attention.mean(0), rtol=1e-5)
    np.testing.assert_allclose(table[:, 4:].T, one.attention, rtol=1e-5)
    collection = json.loads(paths[2].read_text())
    assert len(collection["features"]) == 5
    assert len(write_prediction(one, tmp_path, ("a", "b"), geojson_patches=0)) == 2


def test_geojson_squares_are_closed_and_ordered_by_attention():
    one = prediction()
    mean = one.mean_attention
    features = patch_collection(one.coords, one.attention, patch_size=256, most=99)["features"]
    assert len(features) == 12
    order = np.argsort(-mean)
    for feature, index in zip(features, order, strict=True):
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == one.coords[index].tolist()
        edges = np.diff(np.array(ring), axis=0)
        assert (np.abs(edges).sum(1) == 256).all()
        measured = feature["properties"]["measurements"]
        assert measured["attention"] == pytest.approx(mean[index])
        assert measured["times even"] == pytest.approx(12 * mean[index])
        assert measured["branch 1, times even"] == pytest.approx(12 * one.attention[0, index])
        assert measured["branch 2, times even"] == pytest.approx(12 * one.attention[1, index])
    alone = patch_collection(one.coords, one.attention[:1], patch_size=256, most=99)["features"]
    assert set(alone[0]["properties"]["measurements"]) == {"attention", "times even", "rank"}


def test_patches_of_even_attention_are_not_called_high():
    coords = np.stack([np.arange(5), np.zeros(5)], axis=1).astype(np.int64) * 8
    for attention, wanted in (
        ([0.2, 0.2, 0.2, 0.2, 0.2], ["medium"] * 5),
        ([0.6, 0.25, 0.05, 0.05, 0.05], ["high", "medium", "low", "low", "low"]),
        ([0.201, 0.2, 0.2, 0.2, 0.199], ["medium"] * 5),
    ):
        features = patch_collection(coords, np.array([attention]), patch_size=8, most=9)["features"]
        found = [one["properties"]["classification"]["name"] for one in features]
        assert found == [f"attention: {level}" for level in wanted]


def test_a_heatmap_lies_where_the_patches_are():
    coords = np.array([[1000, 500], [1256, 500], [1256, 1012]])
    heatmap = lay_out(coords, np.array([1.0, 2.0, 3.0]), patch_size=256)
    assert heatmap.values.shape == (3, 2)
    assert heatmap.extent == (1000.0, 1512.0, 1268.0, 500.0)
    np.testing.assert_array_equal(heatmap.values, [[1, 2], [np.nan, np.nan], [np.nan, 3]])
    many = np.random.default_rng(0).integers(0, 10**6, (500, 2))
    wide = lay_out(many, np.ones(500), patch_size=1)
    assert max(wide.values.shape) <= 2001
    assert np.nanmax(wide.values) == np.nanmin(wide.values) == 1.0


def test_scores_of_slides():
    labels = np.array([0, 0, 1, 1, 2])
    probabilities = np.eye(3)[[0, 1, 1, 1, 0]] * 0.8 + 0.1
    scores = classification_scores(probabilities, labels)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["balanced_accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert scores["f1"] == pytest.approx((2 / 4 + 4 / 5 + 0) / 3)
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    drawn = rng.dirichlet(np.ones(3), 60).round(1) + 1e-3
    drawn /= drawn.sum(1, keepdims=True)
    labels = rng.integers(3, size=60)
    found = classification_scores(drawn, labels)
    assert found["auc"] == pytest.approx(sklearn.roc_auc_score(labels, drawn, multi_class="ovr"))
    assert found["f1"] == pytest.approx(
        sklearn.f1_score(labels, drawn.argmax(1), average="macro", zero_division=0)
    )
    assert np.isnan(roc_auc(np.array([0.1, 0.2]), np.array([True, True])))


def test_of_two_classes_the_second_gives_the_area():
    """Where the first one's probabilities round to 1, its area would count ties."""
    second = np.array([1e-9, 3e-9, 2e-9, 4e-9], dtype=np.float32)
    probabilities = np.stack([1 - second, second], axis=1)
    assert classification_scores(probabilities, np.array([0, 1, 0, 1]))["auc"] == 1.0


def test_concentration_of_attention():
    weights = np.array([0.1, 0.6, 0.3])
    np.testing.assert_allclose(concentration(weights), [0.6, 0.9, 1.0])
    assert top_mass(weights, 2) == pytest.approx(0.9)
    assert top_mass(weights, 10) == pytest.approx(1.0)


def test_written_features_do_not_depend_on_the_time(tmp_path: Path):
    from heed_medical.slides.writing import write_features

    for name in ("a", "b"):
        write_features(
            tmp_path / f"{name}.h5",
            np.ones((3, 2), np.float16),
            np.zeros((3, 2), np.int64),
            patch_size=8,
        )
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 8
