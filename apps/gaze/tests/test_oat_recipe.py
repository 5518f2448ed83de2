"""OAT from the command line: the table of its evaluation, its files, and what users get wrong."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from PIL import Image

from heed_gaze.oat.decoding import decode_greedy
from heed_gaze.oat.network import NO_TARGET
from heed_gaze.oat.sample import SampleOptions, write_sample
from heed_gaze.oat.workbooks import COLUMNS
from heed_gaze_cli import APP
from heed_gaze_cli.oat import RECIPE, VALIDATION_DRAWS
from heed_gaze_cli.oat_scoring import CHANCE, GREEDY, HUMAN, MULTI, ORDER
from heed_gaze_cli.oat_settings import small
from heed_runtime.testing.contract import call

SAMPLE = SampleOptions(layouts=8, targets=2, viewers=3, cell_px=(24, 18))
TINY = (
    *("--model.dim", "96", "--model.hidden", "16", "--model.encoder-depth", "1"),
    *("--model.decoder-depth", "1", "--data.samples", "5", "--device", "cpu"),
    *("--trainer.max-steps", "2"),
)
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shelves"
    root.mkdir()
    write_sample(root, SAMPLE, seed=1)
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    call(APP, "train", "oat", "--data", data, "--out", out, *TINY)
    return out


def fault(*words: object) -> str:
    """The one line of a user's fault."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = APP.call([str(word) for word in words])
    lines = [line for line in err.getvalue().splitlines() if "error:" in line]
    assert (code, len(lines), out.getvalue()) == (2, 1, ""), err.getvalue()
    assert "Traceback" not in err.getvalue()
    return lines[0]


def test_the_table_has_the_viewers_above_and_the_baselines_below(run: Path, data: Path):
    found = call(APP, "evaluate", run, "--data", data, *CPU)
    assert found["n"] == 2  # scenes of the test split: one layout, two targets
    for table in found["tables"].values():
        assert [row["searcher"] for row in table] == list(ORDER)
    rows = {row["searcher"]: row for row in found["tables"]["likeness to viewers"]}
    assert rows[HUMAN]["delta"] == 0
    assert rows[CHANCE]["sim"] == pytest.approx(1 / (15 + 2))
    assert {row["trials"] for row in rows.values()} == {6}
    for row in rows.values():
        assert 0 <= row["ss"] <= 1
        assert all(0 <= row[f"mm_{part}"] <= 1 for part in ("shape", "length", "position"))
    for row in found["tables"]["behaviour"]:
        assert row["search"] + row["refix"] + row["revisit"] == pytest.approx(1)
    assert found["metrics"]["ss"] == rows[GREEDY]["ss"]
    assert found["metrics"]["multi_ss"] == rows[MULTI]["ss"]
    plots = {Path(name).name for name in found["files"]}
    assert {"likeness.png", "behaviour.png"} <= plots
    alone = call(APP, "evaluate", run, "--data", data, *CPU, "--data.no-baselines")
    names = [row["searcher"] for row in alone["tables"]["behaviour"]]
    assert names == [HUMAN, GREEDY, MULTI]
    assert alone["metrics"] == pytest.approx(found["metrics"])


def test_draws_and_beams_are_written_path_by_path(run: Path, data: Path, tmp_path: Path):
    picture = data / "images" / "shelf-00.png"
    words = ("predict", run, picture, "--data.target", "4", "--data.grid", "3", "5", *CPU)
    for decode, count in (("greedy", 1), ("sample", 5), ("beam", 3)):
        out = tmp_path / decode
        call(
            APP, *words, "--out", out, "--data.decode", decode, "--data.beam-width", "3",
            "--data.samples", "5",
        )  # fmt: skip
        (table,) = out.glob("*.csv")
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len({row["subject"] for row in rows}) == count
        for row in rows:  # an object's position is the middle of its cell
            line, column = divmod(int(row["object"]), 5)
            assert (float(row["x"]), float(row["y"])) == (18 * column + 9, 24 * line + 12)


def test_free_viewing_and_files_without_a_target(run: Path, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    found = call(
        APP, "explain", run, data / "images" / "shelf-07.png", "--data.grid", "2", "4",
        "--out", out, *CPU,
    )  # fmt: skip
    assert {Path(name).suffix for name in found["files"]} >= {".png", ".npz"}
    with np.load(out / "shelf-07.npz") as arrays:
        steps = len(arrays["objects"]) + 1
        assert arrays["choice"].shape == (steps, 8)
        # What is left of each step's probability is that of padding.
        assert (arrays["choice"].sum(axis=1) + arrays["stop"] <= 1 + 1e-5).all()
        np.testing.assert_allclose(arrays["decoder_attention"].sum(axis=-1), 1, rtol=1e-4)


def test_weights_are_chosen_by_delta_in_search_and_by_the_loss_in_free_viewing(
    run: Path, data: Path, tmp_path: Path
):
    def without_targets(document: dict) -> None:
        for trial in document["trials"]:
            trial.pop("target")

    free = tmp_path / "run"
    call(
        APP, "train", "oat", "--data", broken(data, tmp_path / "free", without_targets),
        "--out", free, *TINY,
    )  # fmt: skip
    searched, viewed = (json.loads((one / "metrics.json").read_text()) for one in (run, free))
    searched, viewed = (one.get("metrics", one) for one in (searched, viewed))
    assert searched["val/criterion"] == searched["val/delta"] != searched["val/loss"]
    assert viewed["val/criterion"] == viewed["val/loss"] != viewed["val/delta"]


def test_validation_draws_paths_where_nothing_is_searched(data: Path):
    settings = replace(small(), model=replace(small().model, encoder_depth=1, decoder_depth=1))
    cases = RECIPE.cases(settings, data, "val")
    scenes = [cases[0], replace(cases[0], target=NO_TARGET)]
    module = RECIPE.module(settings, RECIPE.model(settings).eval())
    searched, viewed = module._validation_paths(scenes, module.memory(scenes))
    greedy = decode_greedy(module.model, module.memory(scenes[:1]), max_len=module.max_len)[0]
    assert [path.tolist() for path in searched] == [list(greedy.objects)]
    assert len(viewed) == VALIDATION_DRAWS
    assert len({path.tobytes() for path in viewed}) > 1


Edit = Callable[[dict], object]


def trial_of(**facts: object) -> Edit:
    return lambda document: document["trials"][5].update(facts)


def layout_of(**facts: object) -> Edit:
    return lambda document: document["layouts"][0].update(facts)


def looked_at(*x: float) -> Edit:
    def edit(document: dict) -> None:
        trial = document["trials"][5]
        del trial["objects"]
        trial.update(x=list(x), y=[3.0] * len(x))

    return edit


def box_of(*numbers: float) -> Edit:
    return lambda document: document["layouts"][0]["boxes"].__setitem__(3, list(numbers))


def broken(data: Path, out: Path, edit: Edit) -> Path:
    """A copy of the trials with one fault; pictures stay where they are."""
    out.mkdir()
    document = json.loads((data / "shelves.json").read_text())
    for layout in document["layouts"]:
        layout["image"] = str(data / layout["image"])
    edit(document)
    (out / "shelves.json").write_text(json.dumps(document))
    return out


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (trial_of(target=15), "trial 6 (layout 'shelf-00', target 15"),
        (trial_of(target=-3), "target -3 is none of the objects 0 to 14"),
        (trial_of(target="left"), "trial 6: target must be a whole number, got 'left'"),
        (trial_of(objects=[]), "has no fixation"),
        (trial_of(objects=[2, 15]), "object 15 is none of the objects 0 to 14"),
        (trial_of(objects=[2, float("nan")]), "trial 6: objects holds NaN"),
        (trial_of(objects=[[2, 3]]), "trial 6: objects must be a list of numbers"),
        (trial_of(layout="shelf-99"), "trial 6: layout 'shelf-99' is not among the layouts"),
        (looked_at(4.0, float("nan")), "trial 6: x holds NaN or infinity"),
        (looked_at(float("inf")), "trial 6: x holds NaN or infinity"),
        (box_of(80, 0, 95, 24), "layout 'shelf-00' box 3 [80.0, 0.0, 95.0, 24.0] is outside"),
        (box_of(9, 0, 9, 24), "box 3 [9.0, 0.0, 9.0, 24.0] is no box"),
        (box_of(0, 0, float("nan"), 9), "layout 1: boxes holds NaN"),
        (box_of(0, 0, 9), "layout 1: boxes must be a list of rows of 4 numbers"),
        (layout_of(rows=14), "need 15 rows of the position table; the network has 14"),
        (layout_of(cols=15), "need 15 rows of the position table; the network has 14"),
        (layout_of(rows=0), "layout 1: 15 boxes do not fit into 0 rows and 5 cols"),
        (layout_of(image="gone.png"), "has no picture; put it beside the trials"),
    ],
)
def test_a_fault_in_the_trials_is_named(
    run: Path, data: Path, tmp_path: Path, edit: Edit, said: str
):
    root = broken(data, tmp_path / "bad", edit)
    train = fault("train", "oat", "--data", root, "--out", tmp_path / "run", *TINY)
    predict = fault("predict", run, root, "--out", tmp_path / "out", *CPU)
    for line in (train, predict):
        assert said in line
        assert "; " in line  # what to do
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "out").glob("*.csv"))


def test_check_lists_every_fault(data: Path, tmp_path: Path):
    def edit(document: dict) -> None:
        trial_of(target=15)(document)
        document["trials"][7]["objects"] = []
        layout_of(image="gone.png")(document)

    root = broken(data, tmp_path / "bad", edit)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert APP.call(["check", "oat", str(root), "--json"]) == 1
    problems = json.loads(out.getvalue())["problems"]
    assert [any(word in p for p in problems) for word in ("trial 6", "trial 8", "gone.png")] == [
        True
    ] * 3
    words = ("train", "oat", "--data", root, "--out", tmp_path / "run", *TINY)
    assert "target 15" in fault(*words)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("shelves.json", b"", "is empty"),
        ("shelves.json", b'{"layouts": [{"name": "a", "bo', "is no whole JSON file"),
        ("shelves.json", b"\x80\x81\x82", "is no whole JSON file"),
        ("shelves.json", b"[1, 2]", "holds no layouts and trials"),
        ("shelves.json", b'{"layouts": [], "trials": []}', "holds no layout"),
        ("Amazon.json", b'{"1.jpg": {"fixations": {"1": [[3, 4', "is no whole JSON file"),
        ("trials.xlsx", b"PK\x03\x04 and no more", "is no spreadsheet that can be read"),
        ("scanpaths.csv", b"image,subject,index,x,y\na.png,1,0,3,nan\n", "nan"),
        ("scanpaths.csv", b"image,subject,index,x\na.png,1,0,3\n", "no column 'y'"),
        ("fixations.mat", b"MATLAB 5.0 MAT-file", "fixations.mat"),
        ("notes.txt", b"nothing", "holds no file of scanpaths that is known"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, content: bytes, said: str):
    root = tmp_path / "data"
    root.mkdir()
    (root / name).write_bytes(content)
    line = fault("train", "oat", "--data", root, "--out", tmp_path / "run", *TINY)
    assert said in line
    assert str(root) in line
    assert not (tmp_path / "run").exists()


def test_faults_of_an_importer_name_row_or_trial(tmp_path: Path):
    def collage(fixations: object, box: object) -> Path:
        entry = {
            "fixations": {"1": fixations},
            "ground_truth": [box],
            "size": {"width": 140, "height": 60},
            "target": "target_1.jpg",
        }
        (tmp_path / "Amazon.json").write_text(json.dumps({"1.jpg": entry}))
        return tmp_path / "Amazon.json"

    box = {"xmin": 1, "xmax": 9, "ymin": 1, "ymax": 9}
    words = ("train", "oat", *TINY, "--out", tmp_path / "run", "--data")
    line = fault(*words, collage([[1, 2], [float("nan"), 2]], box))
    assert "Amazon.json" in line
    assert "1.jpg" in line
    assert "nan" in line
    assert "has no fixation" in fault(*words, collage([], box))
    line = fault(*words, collage([[1, 2]], {"xmin": 1, "ymin": 1, "ymax": 9}))
    assert "image 1.jpg: size and ground_truth must hold numbers" in line

    book = openpyxl.Workbook()
    sheet = book.worksheets[0]
    sheet.append(list(COLUMNS))
    good = {
        "ID": 1, "Target": "a", "Question": "Q1_1", "Choice": 3, "X": 5.0, "Y": 9.0,
        "T_Package": 4, "Sub_ID": "s",
    }  # fmt: skip
    for row in (good, {**good, "ID": 2, "Choice": 23}):
        sheet.append([row[name] for name in COLUMNS])
    book.save(tmp_path / "trials.xlsx")
    assert "object 22 is none of the objects 0 to 21" in fault(*words, tmp_path / "trials.xlsx")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"text", None])
def test_a_damaged_picture_is_named(run: Path, data: Path, tmp_path: Path, content: bytes | None):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    picture = root / "images" / "shelf-00.png"
    picture.write_bytes(picture.read_bytes()[:200] if content is None else content)
    for words in (
        ("train", "oat", "--data", root, "--out", tmp_path / "run", *TINY),
        ("predict", run, picture, "--out", tmp_path / "out", *CPU),
    ):
        assert f"{picture}: cannot be read as a picture" in fault(*words)


def test_pictures_and_targets_that_do_not_fit(run: Path, data: Path, tmp_path: Path):
    words = ("predict", run, data / "images" / "shelf-00.png", "--out", tmp_path / "out", *CPU)
    assert "target 99 is none of the objects 0 to 47" in fault(*words, "--data.target", "99")
    assert "need 21 rows" in fault(*words, "--data.grid", "20", "2")
    Image.new("RGB", (3, 2)).save(tmp_path / "dot.png")
    line = fault("predict", run, tmp_path / "dot.png", "--out", tmp_path / "out", *CPU)
    assert "dot.png" in line
    assert "of 3 x 2 pixels is smaller than a pixel" in line


def test_weights_and_tables_of_other_networks_are_refused(data: Path, tmp_path: Path):
    words = ("train", "oat", "--data", data, "--out", tmp_path / "run", *TINY)
    weights, table = tmp_path / "w.pth", tmp_path / "p.npy"
    weights.write_bytes(b"not weights")
    assert "w.pth" in fault(*words, "--training.weights", weights)
    torch.save({"model": {"a": torch.zeros(3)}}, weights)
    assert "w.pth" in fault(*words, "--training.weights", weights)
    given = (*words, "--training.weights", weights, "--training.position-table", table)
    table.write_bytes(b"\x93NUMPY")
    assert "p.npy: is not a numpy array" in fault(*given)
    np.save(table, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "p.npy: is not a numpy array" in fault(*given)
    np.save(table, np.zeros(7))
    assert "must be rows x channels of numbers, got (7,)" in fault(*given)
    np.save(table, np.full((14, 16), np.nan))
    assert "p.npy: holds NaN or infinity" in fault(*given)
    assert "no effect without weights" in fault(*words, "--training.position-table", table)
