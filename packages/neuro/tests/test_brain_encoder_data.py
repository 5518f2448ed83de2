"""Files of a subject in both layouts, features on disk, made brains, splits."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_neuro.brain_encoder.arrays import read_mapping
from heed_neuro.brain_encoder.backbones import Backbone, BackboneConfig, build_backbone
from heed_neuro.brain_encoder.features import cached, compute, open_table
from heed_neuro.brain_encoder.made_data import FIXED, PATCH, draw_images, write_made_subject
from heed_neuro.brain_encoder.regions import FAMILIES, STREAMS, reported
from heed_neuro.brain_encoder.saliency import read_saliency
from heed_neuro.brain_encoder.source import FeatureSource
from heed_neuro.brain_encoder.splits import split_rows
from heed_neuro.brain_encoder.subject import (
    SURFACE,
    check_gaps,
    read_subject,
    surface_vertices,
)
from heed_neuro.noise_ceiling import noise_ceiling, signal_to_noise

LEFT, RIGHT = 9, 7


def write_challenge(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """A subject of two tiny hemispheres as the Algonauts 2023 challenge lays it out."""
    rng = np.random.default_rng(0)
    names = {
        "training_split/training_images": [f"train-{k:04d}_nsd-{k * 7:05d}" for k in range(1, 6)],
        "test_split/test_images": [f"test-{k:04d}_nsd-{k * 9:05d}" for k in range(1, 3)],
    }
    for folder, stems in names.items():
        (root / folder).mkdir(parents=True)
        for stem in reversed(stems):  # the order is that of the names, not of writing
            pixels = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{stem}.png")
    masks, fmri = root / "roi_masks", root / "training_split" / "training_fmri"
    masks.mkdir()
    fmri.mkdir()
    written: dict[str, dict[str, np.ndarray]] = {"lh": {}, "rh": {}}
    for family, regions in {**FAMILIES, "streams": STREAMS}.items():
        # Ids have gaps, as those of the challenge: they must be looked up.
        ids = {0: "Unknown", **{3 * k + 2: name for k, name in enumerate(regions)}}
        np.save(masks / f"mapping_{family}.npy", np.array(ids), allow_pickle=True)
        for side, vertices in (("lh", LEFT), ("rh", RIGHT)):
            values = np.zeros(vertices, dtype=np.int64)
            values[: len(regions)] = list(ids)[1 : vertices + 1]
            np.save(masks / f"{side}.{family}_challenge_space.npy", values)
            written[side][family] = values
    for side, vertices in (("lh", LEFT), ("rh", RIGHT)):
        np.save(
            fmri / f"{side}_training_fmri.npy",
            rng.normal(size=(5, vertices)).astype(np.float32),
        )
        whole = np.zeros(SURFACE, dtype=np.int64)
        whole[10 : 10 + vertices] = 1
        np.save(masks / f"{side}.all-vertices_fsaverage_space.npy", whole)
    return written


def test_a_subject_of_the_challenge_is_read(tmp_path: Path):
    write_challenge(tmp_path)
    subject = read_subject(tmp_path)
    assert subject.groups == ("lh", "rh")
    assert [subject.vertices(g) for g in subject.groups] == [LEFT, RIGHT]
    assert [p.name for p in subject.images["train"]][:2] == [
        "train-0001_nsd-00007.png",
        "train-0002_nsd-00014.png",
    ]
    assert len(subject.images["test"]) == 2
    assert set(subject.responses) == {"train"}  # the challenge keeps its test responses
    regions = subject.regions["lh"]
    assert len(regions.names) == 25
    assert regions.names[:3] == ("V1v", "V1d", "V2v")
    assert regions.names[-1] == "rest"
    for k, name in enumerate(FAMILIES["floc-bodies"]):
        assert np.flatnonzero(regions.members[regions.names.index(name)]).tolist() == [k]
    assert np.flatnonzero(regions.members[-1]).tolist() == [7, 8]  # in no family
    assert subject.streams["rh"].names == (*STREAMS, "rest")
    clusters = reported(regions)
    assert int(clusters["cluster visual"].sum()) == 7


def test_measured_tests_and_ceilings_are_taken_where_there_are_any(tmp_path: Path):
    write_challenge(tmp_path)
    for side, vertices in (("lh", LEFT), ("rh", RIGHT)):
        for folder in ("test_split/test_fmri", "noise_ceiling"):
            (tmp_path / folder).mkdir(exist_ok=True)
        np.save(tmp_path / f"test_split/test_fmri/{side}_test_fmri.npy", np.ones((2, vertices)))
        per_cent = np.linspace(0, 80, vertices)
        np.save(tmp_path / f"noise_ceiling/{side}_noise_ceiling.npy", per_cent)
    subject = read_subject(tmp_path)
    assert subject.responses["test"]["rh"].rows([1]).tolist() == [[1.0] * RIGHT]
    np.testing.assert_allclose(subject.ceilings["lh"], np.linspace(0, 0.8, LEFT))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


SPOILT = {
    "training_split/training_fmri/lh_training_fmri.npy": [
        (lambda p: np.save(p, np.zeros((4, LEFT))), "has 4 images where there are 5"),
        (truncated, "is not a numpy array"),
        (lambda p: p.write_bytes(b""), "is not a numpy array"),
        (lambda p: np.save(p, np.zeros(5)), r"has the shape \(5,\)"),
        (lambda p: np.save(p, np.full((5, LEFT), "a")), "not numbers"),
        (Path.unlink, "no such file"),
    ],
    "roi_masks/rh.streams_challenge_space.npy": [
        (lambda p: np.save(p, np.zeros(LEFT, int)), "has 9 vertices where there are 7"),
        (truncated, "is not a numpy array"),
    ],
    "roi_masks/mapping_floc-faces.npy": [
        (lambda p: np.save(p, np.zeros(3)), "is no table of id -> name"),
        (truncated, "is no table of id -> name"),
    ],
}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "number"), [(name, k) for name, cases in SPOILT.items() for k in range(len(cases))]
)
def test_spoilt_files_of_the_challenge_are_named(name: str, number: int, tmp_path: Path):
    write_challenge(tmp_path)
    spoil, said = SPOILT[name][number]
    spoil(tmp_path / name)
    with pytest.raises(InputError, match=said) as caught:
        read_subject(tmp_path)
    assert Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file ran",)


def test_a_mapping_with_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "mapping_streams.npy"
    np.save(path, np.array({1: _Evil()}), allow_pickle=True)
    assert pickle.dumps(_Evil())
    with pytest.raises(InputError, match=r"holds builtins.print"):
        read_mapping(path)
    assert capsys.readouterr().out == ""


def test_gaps_are_found_with_their_row(tmp_path: Path):
    write_challenge(tmp_path)
    path = tmp_path / "training_split/training_fmri/rh_training_fmri.npy"
    values = np.load(path)
    values[3, 1] = np.inf
    np.save(path, values)
    with pytest.raises(InputError, match=r"rh_training_fmri.npy, row 3: holds NaN or infinite"):
        check_gaps(read_subject(tmp_path))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_made_subject(root, seed=0, train=8, test=5)
    return root


def test_a_neutral_subject_has_the_ceilings_of_its_repeats(made: Path):
    subject = read_subject(made)
    repeats = np.load(made / "responses_test_repeats.npy")
    wanted = noise_ceiling(signal_to_noise(repeats.astype(np.float64)).ncsnr, repeats.shape[1])
    np.testing.assert_allclose(subject.ceilings["all"], wanted)
    np.testing.assert_allclose(
        subject.responses["test"]["all"].rows(slice(0, 2)), repeats[:2].mean(1), rtol=1e-6
    )
    assert subject.regions["all"].names == ("faces", "places", "rest")


def test_hemispheres_of_the_neutral_layout(made: Path, tmp_path: Path):
    (tmp_path / "images").symlink_to(made / "images")
    for group, vertices in (("left", 3), ("right", 2)):
        np.save(tmp_path / f"responses_{group}.npy", np.ones((8, vertices), dtype=np.float32))
    subject = read_subject(tmp_path)
    assert {g: subject.regions[g].names for g in subject.groups} == {
        "left": ("all",),
        "right": ("all",),
    }
    (tmp_path / "rois.json").write_text(json.dumps({"left": {"a": [0, 2]}}))
    with pytest.raises(InputError, match="has no group 'right'"):
        read_subject(tmp_path)


def test_counts_of_spikes_are_responses(made: Path, tmp_path: Path):
    (tmp_path / "images").symlink_to(made / "images")
    counts = np.arange(24, dtype=np.uint16).reshape(8, 3)
    np.save(tmp_path / "responses.npy", counts)
    found = read_subject(tmp_path).responses["train"]["all"].rows([2, 0])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, counts[[2, 0]])


@pytest.mark.bad_input
def test_test_responses_without_images_are_not_passed_over(made: Path, tmp_path: Path):
    (tmp_path / "images").symlink_to(made / "images")
    for name in ("responses.npy", "responses_test_repeats.npy"):
        (tmp_path / name).symlink_to(made / name)
    with pytest.raises(InputError, match=r"responses_test_repeats.npy: .* no folder test_images"):
        read_subject(tmp_path)
    challenge = tmp_path / "challenge"
    write_challenge(challenge)
    shutil.rmtree(challenge / "test_split" / "test_images")
    (challenge / "test_split" / "test_fmri").mkdir()
    with pytest.raises(InputError, match=r"test_fmri: .* no folder test_images"):
        read_subject(challenge)


@pytest.mark.bad_input
def test_places_on_another_surface_are_refused(tmp_path: Path):
    write_challenge(tmp_path)
    assert surface_vertices(tmp_path, "lh", LEFT).tolist() == list(range(10, 10 + LEFT))
    path = tmp_path / "roi_masks" / "lh.all-vertices_fsaverage_space.npy"
    for mask, said in (
        (np.ones(LEFT, dtype=int), "has 9 vertices where there are 163842"),
        (np.ones(SURFACE, dtype=int), "marks 163842 vertices where there are 9"),
    ):
        np.save(path, mask)
        with pytest.raises(InputError, match=said):
            surface_vertices(tmp_path, "lh", LEFT)


def test_made_regions_answer_to_what_they_should():
    rng = np.random.default_rng(3)
    images, drive = draw_images(40, rng)
    green = images[:, ::PATCH, ::PATCH, 1] / 255
    for channel, region in ((0, 0), (2, 1)):
        marked = images[:, ::PATCH, ::PATCH, channel] == 255
        assert marked.sum(axis=(1, 2)).tolist() == [1] * 40
        np.testing.assert_allclose(drive[:, region], (green[marked] - 0.5) * 12**0.5, atol=1e-12)
    places = np.argwhere(images[:, ::PATCH, ::PATCH, 0] == 255)[:, 1:]
    assert len(np.unique(places, axis=0)) > 20  # the mark wanders
    images, drive = draw_images(40, rng, task="control")
    for region, (row, column) in enumerate(FIXED.values()):
        value = images[:, row * PATCH, column * PATCH, 1] / 255
        np.testing.assert_allclose(drive[:, region], (value - 0.5) * 12**0.5, atol=1e-12)


class Counting(Backbone):
    """Counts the images that went through a backbone, and may stop."""

    def __init__(self, patch: int = 4) -> None:
        self.seen, self.stop_at = 0, 10**9
        plain = build_backbone(BackboneConfig(name="pixels", patch=patch))
        super().__init__(plain.config, plain.network, plain._tokens, multiple=patch)

    def prepare(self, path: Path) -> torch.Tensor:
        if self.seen >= self.stop_at:
            raise KeyboardInterrupt
        self.seen += 1
        return super().prepare(path)


def test_a_cache_goes_on_where_it_was_stopped_and_is_keyed_by_content(made: Path, tmp_path: Path):
    images = read_subject(made).images["train"]
    network, folder = Counting(), tmp_path / "cache"
    network.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        cached(folder, network, images, batch=2)
    with pytest.raises(InputError, match="holds features of 6 of 8 images"):
        open_table(folder)
    network.seen, network.stop_at = 0, 10**9
    found = cached(folder, network, images, batch=2)
    assert network.seen == 2  # the rest alone
    wanted = compute(build_backbone(network.config), images)
    np.testing.assert_allclose(found, wanted, atol=1e-3)  # float16 on disk
    assert isinstance(found, np.memmap)
    cached(folder, network, images)
    assert network.seen == 2
    copies = tmp_path / "elsewhere"
    copies.mkdir()
    moved = [copies / f"other-{path.name}" for path in images]
    for old, new in zip(images, moved, strict=True):
        new.write_bytes(old.read_bytes())
    cached(folder, network, moved)  # the same pictures under other names
    assert network.seen == 2
    Image.new("RGB", (32, 32)).save(moved[0])
    with pytest.raises(InputError, match="8 other images"):
        cached(folder, network, moved)
    with pytest.raises(InputError, match=r"patch 4\), not of pixels .* patch 8"):
        cached(folder, Counting(8), images)


def test_a_damaged_cache_is_told(made: Path, tmp_path: Path):
    images, network = read_subject(made).images["test"], Counting()
    cached(tmp_path, network, images)
    table = tmp_path / "features.npy"
    table.write_bytes(table.read_bytes()[:200])
    with pytest.raises(
        InputError, match=r"features.npy: is not a numpy array .*; delete the folder"
    ):
        cached(tmp_path, network, images)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is no manifest of features"):
        cached(tmp_path, network, images)


@pytest.mark.bad_input
@pytest.mark.parametrize("spoil", [truncated, Path.unlink, lambda p: np.save(p, np.zeros((5, 2)))])
def test_an_unfinished_cache_that_is_damaged_is_told(spoil, made: Path, tmp_path: Path):
    images, network = read_subject(made).images["test"], Counting()
    network.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, network, images, batch=2)
    network.stop_at = 10**9
    spoil(tmp_path / "features.npy")
    with pytest.raises(InputError, match=r"features.npy: .*; delete the folder"):
        cached(tmp_path, network, images, batch=2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "done": 99}))
    with pytest.raises(InputError, match="is no manifest of features"):
        cached(tmp_path, network, images)


@pytest.mark.bad_input
def test_a_cache_goes_on_with_images_of_its_size_alone(made: Path, tmp_path: Path):
    other = tmp_path / "larger.png"
    Image.new("RGB", (64, 32)).save(other)
    images = [*read_subject(made).images["train"][:2], other]
    network = Counting()
    network.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "cache", network, images, batch=2)
    network.stop_at = 10**9
    with pytest.raises(InputError, match=r"larger.png: is of another size than 00000.png"):
        cached(tmp_path / "cache", network, images, batch=2)


def test_a_finished_cache_serves_without_weights(made: Path, tmp_path: Path):
    """Its manifest is compared then: name, layer, images."""
    images = read_subject(made).images["train"]
    cached(tmp_path / "train", Counting(), images)
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_text())
    manifest["backbone"] = {"name": "dinov2_q", "layer": 3, "weights": "0123456789abcdef"}
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    source = FeatureSource(config=BackboneConfig(name="dinov2_q", layer=3), cache=tmp_path)
    assert source.table("train", images).shape == (8, 8, 8, 48)
    assert source.one(images[0]) == (8, 8, 48)
    for config, said in (
        (BackboneConfig(name="dinov2_q", layer=1), r"\(layer -3.*not of dinov2_q \(layer -1\)"),
        (BackboneConfig(name="clip"), "not of clip"),
    ):
        with pytest.raises(InputError, match=said):
            FeatureSource(config=config, cache=tmp_path).table("train", images)
    with pytest.raises(InputError, match="other images"):
        source.table("train", images[:4])


def test_images_of_two_sizes_are_refused(made: Path, tmp_path: Path):
    other = tmp_path / "larger.png"
    Image.new("RGB", (64, 32)).save(other)
    images = [*read_subject(made).images["train"][:2], other]
    with pytest.raises(InputError, match=r"larger.png: is of another size than 00000.png"):
        compute(Counting(), images)


def test_saliency_is_averaged_to_the_tokens(tmp_path: Path):
    values = np.zeros((8, 12), dtype=np.float32)
    values[:4, :3] = 2.0
    values[7, 11] = 6.0
    np.save(tmp_path / "a.npy", values)
    found = read_saliency(tmp_path, Path("a.png"), (2, 4))
    wanted = np.zeros((2, 4))
    wanted[0, 0], wanted[1, 3] = 24 / 30, 6 / 30
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.save(tmp_path / "a.npy", -values)
    with pytest.raises(InputError, match="is no saliency"):
        read_saliency(tmp_path, Path("a.png"), (2, 4))


def test_folds_hold_every_image_out_once():
    parts = [split_rows(23, mode="folds", number=k, folds=5, seed=1) for k in range(5)]
    held = np.concatenate([test for _, test in parts])
    assert sorted(held.tolist()) == list(range(23))
    for train, test in parts:
        assert sorted([*train, *test]) == list(range(23))
    first, again, other = (split_rows(40, mode="random", number=n)[1].tolist() for n in (0, 0, 1))
    assert first == again != other
    assert len(first) == 4
    with pytest.raises(ValueError, match="must be a fold"):
        split_rows(23, mode="folds", number=5, folds=5)
