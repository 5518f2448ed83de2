"""eccNET from the command line: its own faults, baselines, weights and real pictures."""

import csv
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_gaze.eccnet.experiments import EXPERIMENTS
from heed_gaze.eccnet.layouts import Trial, write_stimuli
from heed_gaze.eccnet.retina import RetinaConfig
from heed_gaze.eccnet.sample import write_sample_array
from heed_gaze.eccnet.search import PixelMatchSearcher, Scene, SearchConfig, search
from heed_gaze_cli import APP, eccnet_pictures
from heed_gaze_cli.eccnet_pictures import draw_steps
from heed_gaze_cli.eccnet_scoring import report_searches
from heed_gaze_cli.eccnet_settings import SearchPrediction
from heed_runtime.testing.contract import call

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
WEIGHTS = os.environ.get("HEED_VGG16")
"""A file of VGG16's ImageNet weights, torchvision's or Keras's."""
TINY = (
    *("--preset", "vgg16", "--model.widths", "2", "2", "3", "3", "4", "--device", "cpu"),
    *("--data.most-trials", "1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "stimuli"
    write_stimuli(root, seed=1, trials=1, experiments=(EXPERIMENTS[1],))
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A network that nothing trains, for the search set."""
    out = tmp_path_factory.mktemp("runs") / "run"
    call(APP, "train", "eccnet", "--data", data, "--out", out, *TINY)
    return out


def fault(*words):
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    lines = [line for line in err.getvalue().splitlines() if "error:" in line]
    assert code == 2, err.getvalue()
    assert len(lines) == 1
    return lines[0]


def test_a_network_without_classifier_is_used_as_it_is(run, data):
    found = call(APP, "evaluate", run, "--data", data, "--device", "cpu")
    assert found["n"] == 6
    assert found["metrics"]["asymmetry_index_human"] == pytest.approx(0.5645, abs=1e-4)
    assert found["metrics"]["experiments"] == 1
    tasks = found["tables"]["tasks"]
    assert [row["set_size"] for row in tasks] == [1, 6, 12] * 2
    for row in tasks:
        assert 1 <= row["mean_saccades"] <= 16
        assert row["mean_rt_ms"] == pytest.approx(252.359 * row["mean_saccades"] + 376.271)
        assert row["chance"] == 8.5
    whole = call(
        APP, "evaluate", run, "--data", data, "--device", "cpu", "--data.no-reuse-surround"
    )
    assert whole["tables"] == found["tables"]
    chance = call(APP, "evaluate", run, "--data.searcher", "chance", "--device", "cpu")
    assert chance["tables"] != found["tables"]


def test_a_single_picture_is_searched(run, tmp_path):
    rng = np.random.default_rng(0)
    image = np.full((60, 90), 240, np.uint8)
    image[40:50, 70:80] = rng.integers(0, 99, (10, 10))
    Image.fromarray(image).save(tmp_path / "scene.png")
    Image.fromarray(image[40:50, 70:80]).save(tmp_path / "target.png")
    truth = np.zeros_like(image)
    truth[40:50, 70:80] = 255
    Image.fromarray(truth).save(tmp_path / "truth.png")
    words = ("--data.target", tmp_path / "target.png", "--data.truth", tmp_path / "truth.png")
    call(
        APP, "predict", run, tmp_path / "scene.png", "--out", tmp_path / "out", *words,
        "--data.searcher", "pixel-match", "--device", "cpu",
    )  # fmt: skip
    with (tmp_path / "out" / "scene.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["x"], row["y"]) for row in rows] == [("45.0", "30.0"), ("75.0", "45.0")]
    for suffix in ("png", "gif"):
        assert (tmp_path / "out" / f"scene.{suffix}").stat().st_size > 100
    call(
        APP, "explain", run, tmp_path / "scene.png", "--out", tmp_path / "why", *words,
        "--data.searcher", "pixel-match", "--device", "cpu",
    )  # fmt: skip
    with Image.open(tmp_path / "why" / "scene_steps.gif") as film:
        assert film.n_frames == 2
    said = fault("predict", run, tmp_path / "scene.png", "--out", tmp_path / "again")
    assert "--data.target" in said


def test_steps_that_are_left_out_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rng = np.random.default_rng(0)
    image, target = (rng.integers(0, 255, shape, np.uint8) for shape in ((60, 90, 3), (9, 9, 3)))
    scene = Scene(name="a", image=image, target=target)
    rules = SearchConfig(max_fixations=4)
    trial = Trial(name="a", task="", scene=scene, rules=rules, set_size=None, path=tmp_path)
    found = search(scene, PixelMatchSearcher(), rules, keep_steps=True)
    prediction = SearchPrediction(name="a", trial=trial, search=found)
    titles = [draw_steps(prediction, RetinaConfig()).get_suptitle()]
    monkeypatch.setattr(eccnet_pictures, "MOST_PANELS", 2)
    titles.append(draw_steps(prediction, RetinaConfig()).get_suptitle())
    assert titles == ["a: 3 saccades", "a: 3 saccades (the first 2 are shown)"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("target/1.png", np.zeros((300, 300), np.uint8), "target is 300 x 300"),
        ("gt/1.png", np.zeros((198, 198), np.uint8), "is black"),
        ("gt/1.png", np.full((20, 198), 255, np.uint8), "is for 20 x 198"),
        ("stimuli/1.png", b"", "cannot be read as a picture"),
        ("stimuli/1.png", b"\x89PNG\r\n\x1a\n", "cannot be read as a picture"),
        ("stimuli/1.png", "half", "cannot be read as a picture"),
        ("target/1.png", b"text", "cannot be read as a picture"),
        ("target/1.png", None, "has no target target/1.png"),
        ("gt/1.png", None, "has no mask gt/1.png"),
        ("../gt_mask.npy", b"\x93NUMPY", "is not a numpy array"),
        ("../gt_mask.npy", "half", "is not a numpy array"),
        ("../gt_mask.npy", None, "there is no gt_mask.npy"),
        ("../gt_mask.npy", np.ones((16, 99, 198), np.uint8), "is for 99 x 198 pixels"),
        ("../gt_mask.npy", np.ones((198, 198), np.uint8), "has the shape (198, 198)"),
        ("../gt_mask.npy", np.zeros((2, 198, 198), np.uint8), "has a cell without pixels"),
        ("../gt_mask.npy", np.full((1, 198, 198), np.nan), "holds NaN or infinity"),
        ("trials.csv", b"trial,set_size\n1,one\n", "row 2: needs the columns"),
        ("trials.csv", b"trial,set_size\n1,-3\n", "row 2: needs the columns"),
        ("trials.csv", b"trial,set_size\n1,6\n", "has no row for the trial 2"),
        ("trials.csv", b"", "has no row for the trial 1"),
        ("viewers.csv", b"image,subject,index,x,y\n1.png,a,0,5,nan\n", "y is nan"),
        ("viewers.csv", b"image,subject,index,x,y\n99.png,a,0,5,5\n", "is no picture of stimuli"),
        ("viewers.json", b"{}", "holds no scanpaths that are known"),
    ],
)
def test_broken_files_are_named_in_one_line(run, tmp_path, name, content, said):
    root = tmp_path / "stimuli"
    write_stimuli(root, seed=1, trials=1, experiments=(EXPERIMENTS[1],))
    path = root / "lightning_dir" / "left_right" / name
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        Image.fromarray(content).save(path)
    line = fault("predict", run, root, "--out", tmp_path / "out", "--device", "cpu")
    assert said in line
    assert "left_right" in line or "gt_mask.npy" in line
    assert call(APP, "check", "eccnet", root, code=1) == {}


def test_grey_and_transparent_pictures_are_searched_as_coloured_ones(run, tmp_path):
    rng = np.random.default_rng(0)
    grey = np.full((64, 64), 200, np.uint8)
    grey[40:56, 8:24] = rng.integers(0, 255, (16, 16))
    modes = {"L": "l.png", "RGB": "rgb.png", "RGBA": "rgba.png", "P": "p.png"}
    Image.fromarray(grey[40:56, 8:24]).save(tmp_path / "target.png")
    for mode, name in modes.items():
        Image.fromarray(grey).convert(mode).save(tmp_path / name)
        call(
            APP, "predict", run, tmp_path / name, "--out", tmp_path / mode, "--device", "cpu",
            "--data.target", tmp_path / "target.png", "--data.max-fixations", "3", "--data.no-gif",
        )  # fmt: skip
    tables = {
        mode: [row.split(",")[2:] for row in path.read_text().splitlines()]
        for mode, name in modes.items()
        for path in [(tmp_path / mode / name).with_suffix(".csv")]
    }
    assert all(rows == tables["L"] for rows in tables.values())


def test_searches_of_a_natural_set_are_compared_with_viewers(run, tmp_path):
    """The picture is searched at 544 pixels; viewers saw it at 272."""
    rng = np.random.default_rng(0)
    root = tmp_path / "objectarray"
    scene = rng.integers(120, 136, (272, 272), dtype=np.uint8)
    scene[200:232, 40:72] = rng.integers(0, 255, (32, 32))
    truth = np.zeros_like(scene)
    truth[200:232, 40:72] = 255
    for name, picture in {"stimuli": scene, "target": scene[200:232, 40:72], "gt": truth}.items():
        (root / name).mkdir(parents=True)
        Image.fromarray(picture).save(root / name / "1.png")
    out = tmp_path / "out"
    call(APP, "predict", run, root, "--out", out, "--device", "cpu", "--data.no-gif")
    places = [(136, 136), (70, 190), (56, 216)]
    rows = [
        f"1.png,{viewer},{index},{x + viewer},{y}"
        for viewer in (1, 2)
        for index, (x, y) in enumerate(places)
    ]
    viewers = tmp_path / "viewers.csv"
    viewers.write_text("\n".join(["image,subject,index,x,y", *rows]) + "\n")
    found = call(
        APP, "compare", out / "objectarray", viewers, "--no-maps", "--images", root / "stimuli"
    )
    scores = {row["score"]: row for row in found["scores"]}
    assert scores["scanmatch"]["human"] > 0.9
    assert 0 <= scores["scanmatch"]["predicted"] <= 1


def test_viewers_beside_the_pictures_are_evaluated(run, tmp_path):
    root = write_sample_array(tmp_path, seed=0, trials=3, viewers=3)
    (counts, *_) = call(APP, "check", "eccnet", root)["counts"]
    assert counts["scanpaths of viewers"] == 9
    found = call(
        APP, "evaluate", run, "--data", root, "--device", "cpu", "--data.searcher", "pixel-match",
        "--data.most-trials", "9",
    )  # fmt: skip
    people, chance = found["metrics"]["scanmatch_human"], found["metrics"]["scanmatch_random"]
    assert chance < people < 1
    assert chance < found["metrics"]["scanmatch"] < 1
    rows = {row["searcher"]: row for row in found["tables"]["searches"]}
    assert list(rows) == ["model", "viewers", "chance"]
    # The pixels of the target match it alone; made viewers look at others too, chance at any.
    assert rows["model"]["found"] == rows["viewers"]["found"] == 1
    assert rows["model"]["mean_saccades_when_found"] == 1
    assert 1 < rows["viewers"]["mean_saccades_when_found"] <= 6
    assert rows["viewers"]["trials"] == 9
    assert 0 < rows["chance"]["found"] < 0.4
    assert rows["model"]["area"] > rows["viewers"]["area"] > rows["chance"]["area"]
    assert 0 == rows["viewers"]["mismatch"] < rows["model"]["mismatch"] < rows["chance"]["mismatch"]
    scores = {row["score"]: row for row in found["tables"]["likeness to viewers"]}
    assert scores["scanmatch"]["viewers"] == pytest.approx(people)
    assert scores["scanmatch"]["eccNET (paper)"] == 0.412
    assert (run / "evaluation" / "test" / "viewers.png").is_file()


def test_masks_of_a_single_picture_that_do_not_fit(run, tmp_path):
    for name, size in (("scene", (64, 48)), ("target", (9, 9)), ("large", (65, 9))):
        Image.new("L", size, 90).save(tmp_path / f"{name}.png")
    Image.new("L", (64, 48), 0).save(tmp_path / "black.png")
    np.save(tmp_path / "cells.npy", np.ones((2, 48, 63), np.uint8))
    words = ("predict", run, tmp_path / "scene.png", "--out", tmp_path / "out", "--device", "cpu")
    found = (*words, "--data.target", tmp_path / "target.png")
    assert "the target is 9 x 65" in fault(*words, "--data.target", tmp_path / "large.png")
    assert "is black" in fault(*found, "--data.truth", tmp_path / "black.png")
    assert "is for 9 x 9 pixels" in fault(*found, "--data.truth", tmp_path / "target.png")
    assert "is for 48 x 63 pixels" in fault(*found, "--data.cells", tmp_path / "cells.npy")
    assert "no such file" in fault(*found, "--data.cells", tmp_path / "none.npy")
    assert "no such file" in fault(*words, "--data.target", tmp_path / "none.png")


def test_faults_of_weights_and_tasks_are_told(data, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    words = ("train", "eccnet", "--data", data, "--out", tmp_path / "run", *TINY)
    assert "w.pth" in fault(*words, "--training.weights", tmp_path / "w.pth")
    assert "no search task whose name holds waldo" in fault(*words, "--data.tasks", "waldo")
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    assert "no pictures" in fault("train", "eccnet", "--data", tmp_path / "empty")


def test_stimuli_are_made_whole(tmp_path):
    found = call(APP, "stimuli", "--out", tmp_path / "s", "--experiments", "2", "--trials", "2")
    assert found["n"] == 12
    assert (
        fault("stimuli", "--out", tmp_path / "s", "--experiments", "2").count("is not empty") == 1
    )
    assert "experiments" in fault("stimuli", "--out", tmp_path / "t", "--experiments", "7")


def test_the_report_has_no_index_without_both_tasks():
    row = {
        "task": "intersection/Ts", "set_size": 3, "found_at": None, "cells": 9, "most": 9,
        "fixations": 10, "case": "a",
    }  # fmt: skip
    report = report_searches([row, {**row, "set_size": 6, "found_at": 2}])
    assert "asymmetry_index" not in report.metrics
    assert report.tables[0].rows[0]["mean_saccades"] == 3  # not found: the size of its set


@pytest.mark.slow
def test_real_digits_are_learnt_and_search_works(data, tmp_path):
    root = DATA / "img-mnist-t10k"
    if not root.is_dir():
        pytest.skip(f"no {root}: set HEED_DATA to the folder of real data")
    run = tmp_path / "run"
    small = ("--data.no-flip", "--model.picture", "32", "--device", "cpu")
    trained = call(
        APP, "train", "eccnet", "--data", root, "--out", run, *small,
        "--trainer.max-steps", "400", "--trainer.batch", "32",
    )  # fmt: skip
    assert trained["metrics"]["val/score"] > 0.8
    found = call(APP, "evaluate", run, "--data", data, "--device", "cpu")
    assert found["metrics"]["found"] == 1


@pytest.mark.slow
@pytest.mark.skipif(WEIGHTS is None, reason="set HEED_VGG16 to a file of VGG16's ImageNet weights")
def test_imagenet_features_are_asymmetric(tmp_path):
    """With ImageNet's weights the index is far from that of random ones (paper: .513)."""
    data = tmp_path / "stimuli"
    call(APP, "stimuli", "--out", data, "--trials", "6", "--experiments", "1", "2", "6")
    kind = "keras-caffe" if str(WEIGHTS).endswith((".h5", ".hdf5")) else "torchvision"
    indices = {}
    for name, words in {"imagenet": ("--training.weights", WEIGHTS), "random": ()}.items():
        run = tmp_path / name
        call(
            APP, "train", "eccnet", "--preset", "vgg16", "--model.weights", kind, "--data", data,
            "--out", run, *words,
        )  # fmt: skip
        scores = call(APP, "evaluate", run)
        indices[name] = json.loads(json.dumps(scores["metrics"]))["asymmetry_index"]
    assert indices["imagenet"] > 0.3
    assert abs(indices["random"]) < abs(indices["imagenet"])
