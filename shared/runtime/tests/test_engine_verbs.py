"""The verbs that compute: what they write, what they refuse."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from heed_runtime.commands.export import compare
from heed_runtime.testing import APP, contract
from heed_runtime.testing.contract import call
from heed_runtime.testing.tokens import Settings, TokenRecipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return contract.check_sample(APP, "tokens", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    call(APP, "train", "tokens", "--data", data, "--out", path, "--trainer.max-epochs", 2)
    return path


def test_card_and_settings(tmp_path):
    contract.check_card(APP, "tokens")
    contract.check_settings(APP, "tokens", tmp_path)


def test_life(data, tmp_path):
    contract.check_life(APP, "tokens", data, tmp_path, flags=("--model.width", "8"))


def test_train_without_data_uses_the_sample(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "tokens", "--out", str(run), "--trainer.max-steps", "1", "--device", "cpu"]
    assert APP.call(words) == 0
    captured = capsys.readouterr()
    assert (run / "sample" / "labels.csv").exists()
    assert "sample data set" in captured.err
    assert captured.out.strip().splitlines()[-1] == f"wrote {run}"
    call(APP, "evaluate", run)


def test_evaluate_writes_what_it_shows(run, data):
    shown = call(APP, "evaluate", run, "--split", "test")
    folder = run / "evaluation" / "test"
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["metrics"] == shown["metrics"]
    assert stored["n"] == 6
    assert len(stored["weights_sha256"]) == 64
    with (folder / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = np.mean([int(row["correct"]) for row in rows])
    assert shown["metrics"]["accuracy"] == pytest.approx(expected)
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json", "cases.csv", "accuracy-per-class.csv", "accuracy.png",
    }  # fmt: skip
    assert call(APP, "evaluate", run, "--data", data)["metrics"] == shown["metrics"]


def test_predict_takes_files_folders_and_patterns(run, data, tmp_path):
    single = call(APP, "predict", run, data / "test" / "000.csv", "--out", tmp_path / "a")
    folder = call(APP, "predict", run, data / "test", "--out", tmp_path / "b")
    pattern = call(APP, "predict", run, str(data / "test" / "00*.csv"), "--out", tmp_path / "c")
    assert (single["n"], folder["n"], pattern["n"]) == (1, 6, 6)
    first = (tmp_path / "a" / "000.csv").read_bytes()
    assert first == (tmp_path / "b" / "000.csv").read_bytes()
    assert first == (tmp_path / "c" / "000.csv").read_bytes()
    assert not list((tmp_path / "b").glob(".tmp*"))


def test_predict_never_overwrites_unless_told(run, data, tmp_path, capsys):
    words = ("predict", str(run), str(data / "test" / "000.csv"), "--out", str(tmp_path / "a"))
    target = tmp_path / "a" / "000.csv"
    target.parent.mkdir()
    target.write_text("mine")
    assert APP.call(words) == 2
    assert "000.csv: exists already" in capsys.readouterr().err
    assert target.read_text() == "mine"
    call(APP, *words, "--overwrite")
    assert target.read_text() != "mine"


@pytest.mark.parametrize("given", ["000.csv", "."])
@pytest.mark.parametrize("linked", [False, True])
def test_predict_replaces_no_input_even_when_told(run, data, tmp_path, capsys, given, linked):
    scans = shutil.copytree(data / "test", tmp_path / "scans")
    before = (scans / "000.csv").read_bytes()
    out = scans
    if linked:
        (out := tmp_path / "linked").symlink_to(scans)
    words = ["predict", str(run), str(scans / given), "--out", str(out), "--overwrite"]
    assert APP.call(words) == 2
    assert "000.csv: lies among the inputs" in capsys.readouterr().err
    assert (scans / "000.csv").read_bytes() == before


def test_two_inputs_of_one_name_are_refused(run, data, tmp_path, capsys):
    words = ["predict", str(run), str(data / "test" / "000.csv"), str(data / "val" / "000.csv")]
    assert APP.call([*words, "--out", str(tmp_path / "a")]) == 2
    assert "would be written for" in capsys.readouterr().err


def broken_copy(data, tmp_path, split, name="001.csv"):
    root = shutil.copytree(data, tmp_path / "broken")
    (root / split / name).write_text("1,2\n")
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_stops_or_is_skipped_and_counted(data, tmp_path, capsys, workers):
    root = broken_copy(data, tmp_path, "train")
    words = ["train", "tokens", "--data", str(root), "--trainer.max-epochs", "1"]
    words += ["--device", "cpu", "--workers", str(workers), "--out"]
    assert APP.call([*words, str(tmp_path / "stopped")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "001.csv: has 1 rows of 2 columns" in lines[-1]
    assert "Traceback" not in "".join(lines)
    found = call(APP, *words, tmp_path / "skipped", "--data.on-error", "skip")
    assert [str(root / "train" / "001.csv") in line for line in found["skipped"]["train"]] == [True]


def test_predict_skips_what_the_run_was_told_to_skip(data, tmp_path, capsys):
    root = broken_copy(data, tmp_path, "test")
    quick = ("--trainer.max-steps", 1, "--data.on-error", "skip", "--device", "cpu")
    call(APP, "train", "tokens", "--data", root, "--out", tmp_path / "run", *quick)
    shown = call(APP, "predict", tmp_path / "run", root / "test", "--out", tmp_path / "out")
    assert (shown["n"], len(shown["skipped"])) == (5, 1)
    scores = call(APP, "evaluate", tmp_path / "run")
    assert (scores["n"], len(scores["skipped"])) == (5, 1)
    explained = call(APP, "explain", tmp_path / "run", root / "test", "--out", tmp_path / "why")
    assert (explained["n"], len(explained["skipped"])) == (5, 1)
    tables = [path for path in explained["files"] if path.endswith("_attention.csv")]
    assert len(tables) == 5
    attention = np.load(tables[0].replace("_attention.csv", ".npz"))["attention"]
    np.testing.assert_allclose(np.loadtxt(tables[0], delimiter=","), attention, atol=1e-5)
    (root / "labels.csv").write_text("file,split\n")
    assert APP.call(["evaluate", str(tmp_path / "run")]) == 2
    assert "no column 'label'" in capsys.readouterr().err


def test_a_data_set_smaller_than_the_batch_says_so(data, tmp_path, capsys):
    words = ["train", "tokens", "--data", str(data), "--out", str(tmp_path / "run")]
    words += ["--trainer.batch", "100", "--trainer.max-epochs", "1", "--device", "cpu"]
    assert APP.call(words) == 0
    assert "24 training samples, fewer than batch=100: the batch is 24" in capsys.readouterr().err


def test_training_refuses_bad_places_and_options(run, data, tmp_path, capsys):
    for words, hint in [
        (("--data", tmp_path / "none"), "no such file or folder"),
        (("--data", data, "--out", run), "holds a run"),
        (("--data", data, "--out", tmp_path / "x", "--device", "cuda"), "sees no GPU"),
        (("--data", data, "--out", tmp_path / "x", "--trainer.strategy", "fsdp"), "needs GPUs"),
        (("--data", data, "--out", tmp_path / "x", "--trainer.extra", "profilr=1"), "profiler"),
    ]:
        if "cuda" in words and torch.cuda.is_available():
            continue
        assert APP.call(["train", "tokens", *map(str, words)]) == 2, hint
        assert hint in capsys.readouterr().err
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(run, tmp_path):
    import resource

    from heed_core.errors import InputError
    from heed_runtime.callbacks import AtomicCheckpoints

    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpoints()
    writer.save_checkpoint({"epoch": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            writer.save_checkpoint({"tensor": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert writer.load_checkpoint(path) == {"epoch": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_with_code_is_not_loaded(run, tmp_path, capsys):
    import pathlib

    copy = shutil.copytree(run, tmp_path / "copy")
    torch.save({"state_dict": pathlib.PurePath("x")}, copy / "checkpoints" / "last.ckpt")
    assert APP.call(["train", "tokens", "--resume", str(copy)]) == 2
    assert "last.ckpt" in capsys.readouterr().err


@pytest.mark.compile
def test_export_agrees_with_the_model(run, tmp_path):
    contract.check_export(APP, run, tmp_path)


def test_export_refuses_a_program_that_differs(run):
    recipe = TokenRecipe()
    exportable = recipe.exportable(Settings(), recipe.model(Settings()))

    def off(tokens):
        return (exportable.model(tokens) + 1e-3,)

    rows = compare(exportable, off)
    assert [row["ok"] for row in rows] == [False, False]
    assert rows[0]["error"] == pytest.approx(1e-3, rel=1e-2)
    assert all(row["ok"] for row in compare(exportable, lambda x: (exportable.model(x),)))


def test_bench_compares_with_peers(capsys):
    found = call(APP, "bench", "tokens", "--rounds", 2, "--no-memory", "--device", "cpu")
    assert {(row["name"], row["mode"]) for row in found["rows"]} == {
        (name, mode)
        for name in ("heed tokens", "torch encoder")
        for mode in ("training", "inference")
    }
    ours = [row for row in found["rows"] if row["name"] == "heed tokens"]
    assert all(row["time_to_ours"] == 1 for row in ours)
    assert all(row["items_per_s"] == pytest.approx(8e3 / row["ms"]) for row in ours)
    assert found["missing"] == [{"name": "absent", "why": "not installed"}]


@pytest.mark.slow
def test_bench_measures_memory_in_a_fresh_process():
    found = call(APP, "bench", "tokens", "--rounds", 1, "--device", "cpu")
    assert all(row["peak_mib"] >= 0 for row in found["rows"])
