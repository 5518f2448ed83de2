"""Predicting many cases: reading ahead, going on after a stop, what was skipped, other settings."""

import functools
import json
import os
import shutil
import signal
import threading
import time

import pytest

from heed_core.errors import InputError
from heed_runtime.data import Loaded, ReadAhead
from heed_runtime.errors import UsageError
from heed_runtime.outputs import JOURNAL, LOCK, STAGING, Outputs
from heed_runtime.recipe import Exportable
from heed_runtime.run import Run
from heed_runtime.testing import APP, contract
from heed_runtime.testing.contract import call
from heed_runtime.testing.tokens import Files, TokenRecipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return contract.check_sample(APP, "tokens", tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    call(APP, "train", "tokens", "--data", data, "--out", path, "--trainer.max-steps", 1)
    return path


class Source:
    """Numbers, each given with a count of those that were asked for."""

    def __init__(self, size, fault=None):
        self.size, self.fault, self.given = size, fault, 0

    def __iter__(self):
        for number in range(self.size):
            if number == self.fault:
                raise OSError("broken")
            self.given += 1
            yield Loaded(number, ())


def settled(read):
    """The value of `read` when it no longer changes."""
    before, value = None, read()
    while value != before:
        time.sleep(0.05)
        before, value = value, read()
    return value


def test_reading_ahead_keeps_the_order_and_stays_within_its_depth():
    source = Source(10)
    for number, loaded in enumerate(ReadAhead(source, 2)):
        assert loaded.batch == number
        assert settled(lambda: source.given) <= number + 3  # this one, and two ahead
    assert number == 9


def test_reading_ahead_ends_its_thread_when_it_is_left_and_passes_faults_on():
    before = threading.active_count()
    source = Source(100)
    for _ in ReadAhead(source, 2):
        break
    assert settled(threading.active_count) == before
    assert source.given <= 4
    with pytest.raises(OSError, match="broken"):
        list(ReadAhead(Source(5, fault=3), 2))
    assert settled(threading.active_count) == before


def test_predict_reads_ahead_where_the_cases_ask_for_it(run, data, tmp_path, monkeypatch):
    threads = set()
    read = Files.__getitem__
    monkeypatch.setattr(
        Files, "__getitem__", lambda *args: threads.add(threading.get_ident()) or read(*args)
    )
    words = ("predict", run, data / "test", "--device", "cpu", "--out")
    call(APP, *words, tmp_path / "a")
    assert threads == {threading.get_ident()}
    threads.clear()
    monkeypatch.setattr(Files, "read_ahead", 2, raising=False)
    call(APP, *words, tmp_path / "b")
    assert threads
    assert threading.get_ident() not in threads
    for path in (tmp_path / "a").glob("*.csv"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_predict_goes_on_where_it_was_stopped(run, data, tmp_path, monkeypatch, capsys):
    inputs = shutil.copytree(data / "test", tmp_path / "inputs")
    good = (inputs / "003.csv").read_text()
    (inputs / "003.csv").write_text("broken")
    words = ("predict", run, inputs, "--out", tmp_path / "out", "--device", "cpu")
    call(APP, *words, code=2)
    (inputs / "003.csv").write_text(good)
    call(APP, *words, code=2)  # what is there is not overwritten
    stamp = (tmp_path / "out" / "000.csv").stat().st_mtime_ns
    predicted = []
    write = TokenRecipe.write_prediction
    monkeypatch.setattr(
        TokenRecipe,
        "write_prediction",
        lambda *args: predicted.append(args[2].name) or write(*args),
    )
    found = call(APP, *words, "--resume")
    assert (found["n"], found["earlier"]) == (3, 3)
    assert predicted == ["003", "004", "005"]
    assert (tmp_path / "out" / "000.csv").stat().st_mtime_ns == stamp
    found = call(APP, *words, "--resume")
    assert (found["n"], found["earlier"]) == (0, 6)


def test_a_data_set_that_knows_its_names_reads_none_of_the_cases_that_are_there(
    run, data, tmp_path, monkeypatch
):
    words = ("predict", run, data / "test", "--out", tmp_path / "out", "--device", "cpu")
    call(APP, *words)
    (tmp_path / "out" / "002.csv").unlink()
    names = property(lambda self: [name for name, _, _ in self.entries])
    monkeypatch.setattr(Files, "names", names, raising=False)
    read, asked = Files.__getitem__, []
    monkeypatch.setattr(Files, "__getitem__", lambda s, i: asked.append(i) or read(s, i))
    assert call(APP, *words, "--resume")["earlier"] == 5
    assert asked == [2]


def test_what_another_model_or_hand_made_is_no_done_case(run, data, tmp_path):
    out = tmp_path / "out"
    words = ("predict", run, data / "test" / "000.csv", "--out", out, "--device", "cpu")
    call(APP, *words)
    entry = json.loads((out / JOURNAL).read_text())
    assert entry == {"case": "000", "files": ["000.csv"], "by": Run.open(run, APP).weights_hash()}
    (out / JOURNAL).write_text(json.dumps(entry | {"by": "another"}) + '\n{"case": "00')
    call(APP, *words, "--resume", code=2)


def test_files_that_a_kill_left_behind_are_replaced_and_no_others(tmp_path):
    def write(folder):
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text("new")
        return [folder / "a.txt"]

    with Outputs(tmp_path / "out", overwrite=False, maker="m") as outputs:
        outputs.put("a", write)
    (tmp_path / "out" / "b.txt").unlink()  # killed between the two
    (tmp_path / "out" / "a.txt").write_text("old")
    again = Outputs(tmp_path / "out", overwrite=False, maker="m", resume=True)
    assert again.done == frozenset()
    with again:
        again.put("a", write)
    assert (tmp_path / "out" / "a.txt").read_text() == "new"
    assert Outputs(tmp_path / "out", overwrite=False, maker="m", resume=True).done == {"a"}
    (tmp_path / "out" / "c.txt").write_text("mine")

    def write_c(folder):
        (folder / "c.txt").write_text("new")
        return [folder / "c.txt"]

    with again, pytest.raises(ValueError, match=r"c\.txt: exists already"):
        again.put("c", write_c)
    assert (tmp_path / "out" / "c.txt").read_text() == "mine"


def staged(folder):
    return {path.name for path in folder.glob(".tmp-*") if path.suffix != LOCK}


def killed_while_writing(folder):
    """A process that dies within `put`; the folder that it wrote in is left."""
    before = staged(folder) if folder.is_dir() else set()
    child = os.fork()
    if not child:
        with Outputs(folder, overwrite=False, maker="m") as outputs:
            outputs.put("a", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = staged(folder) - before
    return left


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_what_a_kill_left_is_removed_and_nothing_of_others(tmp_path, how):
    out = tmp_path / "out"
    first, second = killed_while_writing(out), killed_while_writing(out)
    (out / ".tmp-mine").mkdir()
    (tmp_path / "data").mkdir()
    (out / f"{STAGING}link").symlink_to(tmp_path / "data")
    (out / f"{STAGING}link{LOCK}").touch()
    with Outputs(out, overwrite=False, maker="m") as living:
        there = staged(out)
        assert {first, second} < there  # without a wish to go on or to overwrite all is left
        given = {"overwrite": how == "overwrite", "resume": how == "resume"}
        with Outputs(out, maker="m", **given) as other:
            assert len(staged(out) & there) == len(there) - 2
            assert staged(out) - there
            for outputs, name in ((living, "a"), (other, "b")):
                write = functools.partial(write_one, name)
                assert outputs.put(name, write) == [out / name]
    assert staged(out) == {".tmp-mine", f"{STAGING}link"}
    assert not list(out.glob(f"*{LOCK}"))
    assert (tmp_path / "data").is_dir()


def write_one(name, folder):
    (folder / name).write_text(name)
    return [folder / name]


def test_skipped_cases_are_listed_at_once(run, data, tmp_path):
    inputs = shutil.copytree(data / "test", tmp_path / "inputs")
    (inputs / "001.csv").write_text("broken")
    words = ("predict", run, inputs, "--out", tmp_path / "out", "--device", "cpu")
    found = call(APP, *words, "--data.on-error", "skip")
    assert found["n"] == 5
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in lines] == found["skipped"]
    assert "001.csv" in found["skipped"][0]


def test_a_use_of_a_run_changes_what_the_recipe_allows_and_nothing_else(
    run, data, tmp_path, capsys
):
    words = ["predict", str(run), str(data / "test"), "--out", str(tmp_path / "out")]
    assert APP.call([*words, "--data.tokens", "7"]) == 2
    assert f"--data.tokens is settled by the training of {run}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert APP.call(["evaluate", "--data.on-error", "skip", str(run), "--help"]) == 0
    assert "--data.on-error" in capsys.readouterr().out
    call(APP, "evaluate", "--data.on-error", "skip", run, "--device", "cpu")
    stored = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert stored["settings"]["data"]["on_error"] == "skip"
    call(APP, "explain", run, data / "test" / "000.csv", "--out", tmp_path / "e", "--data.on-error",
         "skip")  # fmt: skip


def test_a_system_without_a_program_to_export_says_so(run, tmp_path, monkeypatch, capsys):
    words = ["export", str(run), "--out", str(tmp_path / "model.onnx")]
    exportable = TokenRecipe.exportable

    def no_onnx(self, settings, model):
        found = exportable(self, settings, model)
        return Exportable(**{**vars(found), "refused": {"onnx": "has no sorting"}})

    monkeypatch.setattr(TokenRecipe, "exportable", no_onnx)
    assert APP.call(words) == 2
    line = "tokens cannot be written as onnx: has no sorting; use --format export"
    assert line in capsys.readouterr().err

    def nothing(self, settings, model):
        raise UsageError("tokens has no network", remedy="export another system")

    monkeypatch.setattr(TokenRecipe, "exportable", nothing)
    assert APP.call(words) == 2
    assert "tokens has no network; export another system" in capsys.readouterr().err
    contract.check_export(APP, run, tmp_path)
    assert not list(tmp_path.iterdir())
    assert call(APP, "info", "tokens")["model"]["parameters"] > 0


def test_bench_shows_the_stages_and_the_modes_that_are_asked_for(monkeypatch):
    stages = {"read": lambda: sum(range(99)), "compute": lambda: sum(range(999))}
    monkeypatch.setattr(TokenRecipe, "stages", lambda self, settings: stages)
    words = ("bench", "tokens", "--rounds", 2, "--no-memory", "--device", "cpu", "--modes")
    found = call(APP, *words, "inference")
    assert {row["mode"] for row in found["rows"]} == {"inference"}
    assert [row["stage"] for row in found["stages"]] == ["read", "compute"]
    assert sum(row["share"] for row in found["stages"]) == pytest.approx(1)
    assert all(row["ms"] * row["calls_per_s"] == pytest.approx(1e3) for row in found["stages"])
    call(APP, *words, "inference", "inference", code=2)


def test_the_journal_takes_whole_lines_from_several_writers(tmp_path):
    from heed_runtime.outputs import append_json

    path = tmp_path / "j.jsonl"
    threads = [
        threading.Thread(target=lambda n=n: [append_json(path, {"n": n}) for _ in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 200


def test_among_inputs_only_what_was_written_is_replaced(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")

    def put(name, text):
        with Outputs(folder, overwrite=True, maker="m", inputs=[folder]) as outputs:
            outputs.put(name, lambda out: [_written(out / name, text)])

    put("a.txt", "old")
    put("a.txt", "new")
    assert (folder / "a.txt").read_text() == "new"
    with pytest.raises(InputError, match=r"mine\.txt: lies among the inputs"):
        put("mine.txt", "new")
    assert (folder / "mine.txt").read_text() == "mine"


def _written(path, text):
    path.write_text(text)
    return path
