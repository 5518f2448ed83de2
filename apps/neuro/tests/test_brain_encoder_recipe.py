"""The brain encoder from the command line: what it learns, and how it refuses bad data."""

import contextlib
import csv
import importlib.util
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from heed_neuro.brain_encoder.made_data import write_made_subject
from heed_neuro.rsa import dissimilarities
from heed_neuro_cli import APP, brain_bench
from heed_neuro_cli.brain_pictures import draw_surfaces
from heed_runtime.testing.contract import call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_made_subject(root, seed=0, train=20, test=6)
    return root


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


def refused(*words: object) -> str:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    lines = [line for line in err.getvalue().splitlines() if "error:" in line]
    assert code == 2, err.getvalue()
    assert len(lines) == 1
    return lines[0]


def spoil_rows(root: Path) -> str:
    np.save(root / "responses.npy", np.load(root / "responses.npy")[:-1])
    return "has 19 images where there are 20"


def spoil_nan(root: Path) -> str:
    values = np.load(root / "responses.npy")
    values[7, 2] = np.nan
    np.save(root / "responses.npy", values)
    return "row 7: holds NaN"


def spoil_file(root: Path) -> str:
    path = root / "responses.npy"
    path.write_bytes(path.read_bytes()[:200])
    return "is not a numpy array"


def spoil_regions(root: Path) -> str:
    (root / "rois.json").write_text(json.dumps({"faces": [0, 99]}))
    return "names vertex 99"


def spoil_image(root: Path) -> str:
    (root / "images" / "00003.png").write_bytes(b"no image")
    return "cannot be read as an image"


@pytest.mark.bad_input
@pytest.mark.parametrize("spoil", [spoil_rows, spoil_nan, spoil_file, spoil_regions, spoil_image])
def test_bad_data_are_one_line(spoil, data: Path, tmp_path: Path):
    said = spoil(data)
    words = ("train", "brain-encoder", "--data", data, "--out", tmp_path / "run")
    assert said in refused(*words, "--device", "cpu")


@pytest.mark.bad_input
def test_another_brain_or_backbone_is_refused(data: Path, tmp_path: Path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    own = ("--backbone.name", "pixels", "--backbone.patch")
    call(APP, "features", data, "--out", cache, *own, 4)
    assert "not of pixels" in refused("features", data, "--out", cache, *own, 8)
    words = ("--data", data, "--out", run, "--trainer.max-steps", 1, "--device", "cpu")
    call(APP, "train", "brain-encoder", *words, "--data.cache", cache)
    regions = json.loads((data / "rois.json").read_text())
    regions["faces"] = regions["faces"][:-1]
    (data / "rois.json").write_text(json.dumps(regions))
    assert "regions of another subject" in refused("evaluate", run, "--data", data)


@pytest.mark.bad_input
def test_verbs_without_weights_name_their_flag(data: Path, tmp_path: Path):
    for words in (("baselines", data), ("features", data, "--out", tmp_path / "cache")):
        said = refused(*words)
        assert "dinov2_q needs its weights" in said
        assert "give --backbone.weights" in said


def test_runs_and_brains_of_one_name_stand_beside_each_other(data: Path, tmp_path: Path):
    own = ("--backbone.name", "pixels", "--backbone.patch", 4)
    runs = [tmp_path / folder / "run" for folder in ("a", "b")]
    for run in runs:
        words = ("--data", data, "--out", run, "--trainer.max-steps", 1, "--device", "cpu")
        call(APP, "train", "brain-encoder", *words)
    brain = dissimilarities(np.random.default_rng(0).normal(size=(6, 9)))
    np.savez(tmp_path / "rdms.npz", IT=brain, it=brain**2)
    words = (data / "test_images", "--rdms", tmp_path / "rdms.npz", "--draws", 2, "--runs", *runs)
    found = call(APP, "rsa", *words, *own, "--out", tmp_path / "rsa")
    names = {row["representation"] for row in found["similarities"]}
    assert {"a/run: all queries", "b/run: all queries"} <= names
    assert {"rsa-it.png", "rsa-it_2.png"} < {path.name for path in (tmp_path / "rsa").iterdir()}
    with np.load(tmp_path / "rsa" / "rdms.npz") as written:
        assert len(written.files) == len(names)
    found = call(APP, "baselines", data, *own, "--components", 3, "--folds", 2, "--runs", *runs)
    encoders = {row["encoder"] for row in found["encoders"]}
    assert {"transformer (a/run)", "transformer (b/run)"} <= encoders


def make_gaps(root: Path) -> None:
    """Missing trials, a vertex that never varies in the test, and no repeats."""
    for name in ("responses", "responses_test_repeats"):
        values = np.load(root / f"{name}.npy")
        if values.ndim == 3:
            (root / f"{name}.npy").unlink()
            values, name = values.mean(axis=1), "responses_test"
            values[:, 4] = 1.0
        values[1] = np.nan
        values[2, 0] = np.nan
        np.save(root / f"{name}.npy", values)


def test_gaps_are_left_out_and_what_is_undefined_is_counted(data: Path, tmp_path: Path):
    make_gaps(data)
    run, words = tmp_path / "run", ("--trainer.max-steps", 2, "--device", "cpu")
    assert "row 1: holds NaN" in refused("train", "brain-encoder", "--data", data, "--out", run)
    words = ("--data", data, "--out", run, "--data.gaps", "skip", *words)
    trained = call(APP, "train", "brain-encoder", *words)
    assert np.isfinite(trained["metrics"]["val/loss"])
    found = call(APP, "evaluate", run, "--device", "cpu")
    assert found["metrics"]["undefined"] == 1
    assert "accuracy" not in found["metrics"]
    assert any("no noise ceiling: raw r only" in title for title in found["tables"])
    with (run / "evaluation" / "test" / "cases.csv").open() as file:
        rows = {row["vertex"]: row for row in csv.DictReader(file) if row["level"] == "vertex"}
    assert rows["4"]["r"] == ""
    assert all(rows[str(vertex)]["r"] for vertex in range(12) if vertex != 4)


def test_damaged_images_stop_a_prediction_or_are_listed(data: Path, tmp_path: Path):
    run, out = tmp_path / "run", tmp_path / "out"
    words = ("--data", data, "--out", run, "--trainer.max-steps", 1, "--device", "cpu")
    call(APP, "train", "brain-encoder", *words)
    images = data / "test_images"
    whole = call(APP, "predict", run, images, "--out", tmp_path / "whole", "--device", "cpu")
    assert {Path(name).name for name in whole["files"]} == {"all_pred.npy", "images.csv"}
    (images / "00002.png").write_bytes(b"no image")
    assert "00002.png: cannot be read" in refused("predict", run, images, "--out", out)
    words = ("--out", out, "--device", "cpu", "--data.on-error", "skip")
    call(APP, "predict", run, images, *words)
    folder = out / "test_images"
    predicted = np.load(folder / "all_pred.npy")
    kept = [0, 1, 3, 4, 5]
    wanted = np.load(tmp_path / "whole" / "test_images" / "all_pred.npy")[kept]
    np.testing.assert_allclose(predicted, wanted, atol=1e-6)
    listed = (folder / "images.csv").read_text().splitlines()[1:]
    assert listed == [f"{row},{index:05d}.png" for row, index in enumerate(kept)]
    assert "00002.png,cannot be read" in (folder / "skipped.csv").read_text().replace(
        f"{images}/00002.png: ", ""
    )


@pytest.mark.parametrize("case", list(brain_bench.FEATURES))
def test_the_solvers_of_the_benchmark_agree(case: str):
    pytest.importorskip("himalaya")
    x, y = (table.double() for table in brain_bench._table(brain_bench.FEATURES[case], targets=30))
    ours, peer = brain_bench.OurRidge()(x, y), brain_bench.Himalaya()(x, y)
    assert ours.shape == (x.shape[1], 30)
    torch.testing.assert_close(ours, peer, rtol=0, atol=1e-6)


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = {one.name: one.missing for one in brain_bench.contenders()}
    for case in brain_bench.FEATURES:
        assert missing[f"ridge, {case}"] is None
        assert missing[f"ridge by himalaya, {case}"] == "himalaya is not installed"


def test_flat_maps_that_cannot_be_drawn_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = [{"group": "lh", "r": 0.3, "surface": 20_000}]
    assert draw_surfaces(rows) == {}
    assert "none of its vertices is on fsaverage5" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert draw_surfaces(rows) == {}
    assert "heed-neuro[brains]" in caplog.text
    caplog.clear()
    assert draw_surfaces([{"group": "all", "r": 0.3, "surface": None}]) == {}
    assert caplog.text == ""


@pytest.mark.slow
def test_a_fixed_receptive_field_suffices_for_the_control_task(tmp_path: Path):
    (tmp_path / "data").mkdir()
    write_made_subject(tmp_path / "data", seed=2, task="control")
    found = {}
    longer = {"transformer": (), "factorised": ("--trainer.max-epochs", 40)}
    for kind in ("transformer", "factorised"):
        words = ("--data", tmp_path / "data", "--out", tmp_path / kind, "--device", "cpu")
        call(APP, "train", "brain-encoder", *words, "--model.kind", kind, *longer[kind])
        found[kind] = call(APP, "evaluate", tmp_path / kind, "--device", "cpu")["metrics"]["r"]
    assert found["factorised"] >= found["transformer"] - 0.05
    assert found["factorised"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "low", "high"), [("transformer", 0.9, 1), ("factorised", -1, 0.6), ("pooled", -1, 0.6)]
)
def test_only_attention_solves_the_routing_task(kind: str, low: float, high: float, tmp_path: Path):
    call(APP, "sample", "brain-encoder", tmp_path / "data", "--seed", 1)
    words = ("--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu")
    call(APP, "train", "brain-encoder", *words, "--model.kind", kind)
    r = call(APP, "evaluate", tmp_path / "run", "--device", "cpu")["metrics"]["r"]
    assert low < r < high
