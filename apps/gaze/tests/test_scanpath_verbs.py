"""`compare`, `ceiling` and `view` on usual files, and what they say of broken ones."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_gaze.scanpaths import Scanpath, write_scanpaths
from heed_gaze_cli import APP

SIZE = (120, 90)


def call(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def refusal(*words: object) -> str:
    """The one line that a refused command says."""
    code, out, err = call(*words)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


def viewer(image: str, subject: str, seed: int) -> Scanpath:
    rng = np.random.default_rng(seed)
    return Scanpath(
        image=image,
        subject=subject,
        xy_px=rng.uniform([30.0, 30.0], [90.0, 60.0], (6, 2)),
        duration_s=rng.uniform(0.1, 0.4, 6),
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures with three viewers each; the size is that of the pictures."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    paths = []
    for k, image in enumerate(("a.png", "b.png")):
        Image.new("RGB", SIZE, (90, 120, 60)).save(folder / "images" / image)
        paths += [viewer(image, str(v), 10 * k + v) for v in range(3)]
    write_scanpaths(folder / "scanpaths.csv", paths)
    return folder


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write_scanpaths(
        tmp_path / "predicted.json", [viewer(name, "model", 7) for name in ("a.png", "b.png")]
    )


def test_compare_writes_tables_and_plots(data: Path, predictions: Path, tmp_path: Path):
    out = tmp_path / "scores"
    code, shown, err = call("compare", predictions, data, "--out", out, "--json")
    assert code == 0, err
    document = json.loads(shown)
    assert document["pairs"] == {"predicted": 6, "human": 6, "random": 18, "elsewhere": 18}
    names = {row["score"] for row in document["scores"]}
    assert {"multimatch_shape", "scanmatch", "sequence_score", "nss", "auc_shuffled"} <= names
    for row in document["scores"]:
        assert {"predicted", "human", "random", "elsewhere"} <= set(row)
    stems = {path.name for path in out.iterdir()}
    assert {"metrics.json", "cases.csv", "scores.csv", "examples.png", "saccades.png"} <= stems
    line = refusal("compare", predictions, data, "--out", out)
    assert "--overwrite" in line


def test_ceiling_needs_no_prediction(data: Path):
    code, shown, err = call("ceiling", data, "--json", "--no-maps", "--simplify")
    assert code == 0, err
    rows = json.loads(shown)["scores"]
    assert all("predicted" not in row for row in rows)
    assert "nss" not in {row["score"] for row in rows}


def test_view_draws_a_picture_of_each(data: Path, tmp_path: Path):
    code, _, err = call("view", data, "--out", tmp_path / "drawn", "--subject", "2")
    assert code == 0, err
    drawn = sorted((tmp_path / "drawn").glob("*.png"))
    assert [path.name for path in drawn] == ["a.png", "b.png"]
    assert np.asarray(Image.open(drawn[0])).std() > 5


def test_view_names_drawings_as_the_pictures(tmp_path: Path):
    """Names beyond ASCII, equal names in two folders, tasks; nothing outside the folder."""
    names = ("x/a.png", "y/a.png", "\u00fc \u00e9.png", "../up.png")
    paths = [replace(viewer(name, "1", 0), size_px=SIZE, task="big cup") for name in names[:1]]
    paths += [replace(viewer(name, "1", 0), size_px=SIZE) for name in names[1:]]
    file = write_scanpaths(tmp_path / "viewers.csv", paths)
    out = tmp_path / "out" / "drawn"
    code, _, err = call("view", file, "--out", out)
    assert code == 0, err
    drawn = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png")}
    wanted = ("x/a-big-cup.png", "y/a.png", "\u00fc \u00e9.png", "up.png")
    assert drawn == {f"drawn/{name}" for name in wanted}


def test_scanpaths_without_saccades_are_scored_without_warnings(tmp_path: Path):
    paths = [viewer("a.png", str(v), v).keep(slice(0, 1)) for v in range(3)]
    file = write_scanpaths(tmp_path / "viewers.csv", paths)
    words = ("ceiling", file, "--size", *SIZE, "--no-maps", "--out", tmp_path / "out")
    code, shown, err = call(*words)
    assert code == 0, err
    assert "warning" not in err
    assert "1 pictures, 3 pairs" in shown


def test_tasks_are_counted_beside_pictures(data: Path):
    paths = [
        replace(viewer("a.png", str(v), v), task=task) for task in ("cup", "fork") for v in range(2)
    ]
    (data / "scanpaths.csv").unlink()
    write_scanpaths(data / "scanpaths.csv", paths)
    code, shown, err = call("ceiling", data, "--no-maps")
    assert code == 0, err
    assert "2 tasks in 1 pictures, 2 pairs of scanpaths; means over tasks" in shown


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_broken_predictions_are_named(data: Path, predictions: Path):
    predictions.write_text(predictions.read_text()[:300])
    assert "predicted.json: is no whole JSON" in refusal("compare", predictions, data)
    predictions.write_text("")
    assert "predicted.json: is empty" in refusal("compare", predictions, data)


def test_a_prediction_of_another_picture_is_named(data: Path, tmp_path: Path):
    other = write_scanpaths(tmp_path / "other.csv", [viewer("z.png", "model", 1)])
    assert "z.png: no viewer saw the picture" in refusal("compare", other, data)


def test_broken_data_are_named(data: Path, predictions: Path):
    file = data / "scanpaths.csv"
    whole = file.read_text()
    rewrite(file, "subject", "viewer")
    assert "no column 'subject'" in refusal("compare", predictions, data)
    first = whole.splitlines()[1]
    cells = first.split(",")
    file.write_text(whole.replace(first, ",".join([*cells[:3], "nan", *cells[4:]]), 1))
    assert "line 2: fixation 1: x is nan" in refusal("ceiling", data)
    code, shown, _ = call("ceiling", data, "--on-error", "skip", "--json", "--no-maps")
    assert code == 0
    assert len(json.loads(shown)["skipped"]) == 1
    file.write_text(whole.replace(first, ",".join([*cells[:3], "500", *cells[4:]]), 1))
    assert "off the picture of 120 x 90" in refusal("ceiling", data)
    assert call("ceiling", data, "--outside", "drop", "--no-maps", "--quiet")[0] == 0


def test_pictures_of_unknown_size_are_named(data: Path, predictions: Path):
    for picture in (data / "images").iterdir():
        picture.unlink()
    assert "the size of the picture is not known" in refusal("compare", predictions, data)
    words = ("compare", predictions, data, "--size", *SIZE, "--no-maps", "--quiet")
    assert call(*words)[0] == 0


def test_degrees_need_pictures_of_one_width(data: Path):
    Image.new("RGB", (160, 90)).save(data / "images" / "b.png")
    said = refusal("ceiling", data, "--px-per-degree", "20")
    assert "pictures of one width, these have [120, 160]" in said


def test_a_damaged_picture_is_named(data: Path, tmp_path: Path):
    picture = data / "images" / "a.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert "a.png: cannot be read as a picture" in refusal(
        "view", data, "--out", tmp_path / "drawn"
    )


def test_labels_of_the_wrong_kind_are_named(data: Path, tmp_path: Path):
    labels = tmp_path / "labels"
    labels.mkdir()
    np.save(labels / "a.npy", np.zeros((9, 12)))
    assert "must be (rows, columns) of whole numbers" in refusal(
        "ceiling", data, "--labels", labels
    )


def test_what_is_not_there_is_named(data: Path, tmp_path: Path):
    assert "no such file" in refusal("ceiling", tmp_path / "nothing")
    assert "no scanpath is of the split 'dev'" in refusal("ceiling", data, "--split", "dev")
    assert "no scanpath of c.png" in refusal(
        "view", data, "--only", "c.png", "--out", tmp_path / "drawn"
    )
