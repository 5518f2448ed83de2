"""The brain encoder from the command line: what it learns, and how it refuses bad data."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from heed_neuro.brain_encoder.made_data import write_made_subject
from heed_neuro_cli import APP
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
    return "cannot be read as a numpy array"


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
