"""Training 2k steps equals training k steps, being killed, and resuming for k."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from heed_runtime import callbacks
from heed_runtime import run as run_module
from heed_runtime.callbacks import AtomicCheckpoints
from heed_runtime.testing import APP
from heed_runtime.testing.processes import KILLED, kill_when, start, wait


class Killed(BaseException):
    """Ends a training where SIGKILL would."""


def train(*words, code=0):
    assert APP.call(["train", "tokens", "--quiet", *map(str, words)]) == code


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_run(one, two):
    """Bitwise: kept weights, last weights, optimiser, metrics of every epoch."""
    for key, value in weights(one).items():
        assert torch.equal(value, weights(two)[key]), key
    last = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two)]
    for key, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][key]), key
    states = [item["optimizer_states"][0]["state"] for item in last]
    for index, state in states[0].items():
        assert torch.equal(state["exp_avg_sq"], states[1][index]["exp_avg_sq"])
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "tokens"
    assert APP.call(["sample", "tokens", str(root), "--quiet"]) == 0
    return root


COMMON = ("--trainer.max-epochs", 4, "--trainer.batch", 4)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "whole"
    train("--data", data, "--out", run, *COMMON)
    return run


def die_after_save(monkeypatch, count, name="last.ckpt"):
    """Die right after the count-th writing of a checkpoint."""
    saved = []
    original = AtomicCheckpoints.save_checkpoint

    def save(self, checkpoint, path, storage_options=None):
        original(self, checkpoint, path, storage_options)
        saved.append(Path(path).name)
        if saved.count(name) == count:
            raise Killed

    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", save)


@pytest.mark.parametrize(
    ("every", "count", "name"),
    [
        (None, 2, "last.ckpt"),  # at the end of the second epoch
        (2, 1, "last.ckpt"),  # in the middle of the first
        (2, 4, "last.ckpt"),  # in the middle of the second
        (None, 1, "best.ckpt"),  # the best weights are new, the checkpoint is old
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    uninterrupted, data, tmp_path, monkeypatch, every, count, name
):
    run = tmp_path / "run"
    extra = () if every is None else ("--trainer.checkpoint-every", every)
    with monkeypatch.context() as patch:
        die_after_save(patch, count, name)
        with pytest.raises(Killed):
            train("--data", data, "--out", run, *COMMON, *extra)
    train("--resume", run)
    assert_same_run(uninterrupted, run)


def test_the_time_before_a_resumed_epoch_is_none_of_training(data, tmp_path, monkeypatch):
    """A clock that stands still, long after the machine was started."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        die_after_save(patch, 1)
        with pytest.raises(Killed):
            train("--data", data, "--out", run, *COMMON, "--trainer.checkpoint-every", 2)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: 5000.0))
    train("--resume", run)
    assert json.loads((run / "metrics.json").read_text())["training_s"] == 0


def test_a_run_without_checkpoint_starts_again(uninterrupted, data, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def die(*arguments, **named):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Reseed, "on_train_batch_start", die)
        with pytest.raises(Killed):
            train("--data", data, "--out", run, *COMMON)
    assert not list((run / "checkpoints").iterdir())
    train("--resume", run)
    assert_same_run(uninterrupted, run)


@pytest.mark.parametrize("schedule", ["plateau", "none"])
def test_the_schedule_goes_on(data, tmp_path, monkeypatch, schedule):
    words = (*COMMON, "--training.schedule", schedule, "--data", data)
    train("--out", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        die_after_save(patch, 3)
        with pytest.raises(Killed):
            train("--out", tmp_path / "killed", *words)
    train("--resume", tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("every", "count"), [(None, 2), (2, 4)])
def test_the_average_of_the_weights_goes_on(data, tmp_path, monkeypatch, every, count):
    words = (*COMMON, "--trainer.average", 0.9, "--preset", "batch-norm", "--data", data)
    extra = () if every is None else ("--trainer.checkpoint-every", every)
    train("--out", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        die_after_save(patch, count)
        with pytest.raises(Killed):
            train("--out", tmp_path / "killed", *words, *extra)
    train("--resume", tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    paths = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("whole", "killed")]
    ends = [torch.load(path, weights_only=True)["current_model_state"] for path in paths]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_the_average_is_what_is_validated_and_kept(data, tmp_path):
    words = ("--data", data, "--trainer.batch", 4, "--trainer.max-steps", 5)
    train("--out", tmp_path / "plain", *words)
    train("--out", tmp_path / "steps", *words, "--trainer.average", 1e-9)
    train("--out", tmp_path / "mean", *words, "--trainer.average", 0.9)
    plain, steps, mean = (weights(tmp_path / name) for name in ("plain", "steps", "mean"))
    for key, value in plain.items():
        torch.testing.assert_close(steps[key], value, atol=1e-6, rtol=1e-6)
    assert max(float((mean[key] - value).abs().max()) for key, value in plain.items()) > 1e-4
    rows = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("plain", "mean")]
    assert rows[0]["metrics"]["val/loss"] != rows[1]["metrics"]["val/loss"]


@pytest.mark.filterwarnings("ignore")  # of Lightning, about the sizes of such a small training
def test_what_a_validation_notes_stays_with_the_average(tmp_path):
    """A threshold that is fitted in validation belongs to the weights that were validated."""

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("noted", torch.full((), 9.0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def training_step(self, batch, index):
            return -self.weight

        def validation_step(self, batch, index):
            pass

        def on_validation_epoch_end(self):
            self.noted.copy_(self.weight)

    module, averaged = Module(), callbacks.Averaged(0.9)
    data = torch.utils.data.DataLoader(torch.zeros(3, 1))
    trainer = L.Trainer(
        max_epochs=2, callbacks=[averaged], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data, data)
    assert float(module.noted) == float(module.weight)
    assert 0.0 < float(module.weight) < 6.0


def test_averages_forget_the_first_weights_and_keep_whole_numbers():
    average = callbacks._average
    one, four = torch.tensor([1.0]), torch.tensor([4.0])
    assert float(average(0.99, one, four, 0)) == pytest.approx(0.1 * 1.0 + 0.9 * 4.0)
    assert float(average(0.99, one, four, 10_000)) == pytest.approx(0.99 * 1.0 + 0.01 * 4.0)
    table = torch.arange(1000)
    assert torch.equal(average(0.99, table, table, 10_000), table)


def test_max_steps_within_an_epoch_then_more(data, tmp_path):
    """8 steps at once, or 4 and then 4 more; an epoch has 6."""
    words = ("--data", data, "--trainer.batch", 4, "--training.schedule", "none")
    train("--out", tmp_path / "whole", *words, "--trainer.max-steps", 8)
    train("--out", tmp_path / "parts", *words, "--trainer.max-steps", 4)
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text())["steps"] == 4
    train("--resume", tmp_path / "parts", "--trainer.max-steps", 8)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_accumulation_is_saved_only_between_steps(data, tmp_path, monkeypatch):
    """A checkpoint holds no half-summed gradient."""
    words = ("--data", data, "--trainer.batch", 4, "--trainer.accumulate", 2)
    words += ("--trainer.max-epochs", 2, "--trainer.checkpoint-every", 1)
    train("--out", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        die_after_save(patch, 2)
        with pytest.raises(Killed):
            train("--out", tmp_path / "killed", *words)
    train("--resume", tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_early_stopping_holds_after_resume(data, tmp_path, capsys):
    """The learning rate is nil, so nothing improves after the first epoch."""
    run = tmp_path / "run"
    words = ("--training.lr", 1e-30, "--trainer.patience", 2, "--trainer.max-epochs", 9)
    train("--data", data, "--out", run, *words)
    rows = (run / "metrics.csv").read_text().splitlines()[1:]
    assert len(rows) == 3
    before = weights(run)
    train("--resume", run)
    assert (run / "metrics.csv").read_text().splitlines()[1:] == rows
    assert all(torch.equal(value, before[key]) for key, value in weights(run).items())


def test_a_finished_run_can_be_resumed_and_lost_results_come_back(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "copy")
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "model")
    train("--resume", run)
    assert_same_run(uninterrupted, run)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_damaged_checkpoint_is_one_line(uninterrupted, tmp_path, capsys, name):
    run = shutil.copytree(uninterrupted, tmp_path / "copy")
    (run / "checkpoints" / name).write_bytes(b"no checkpoint")
    train("--resume", run, code=2)
    assert f"{name}: is not a checkpoint that can be resumed" in capsys.readouterr().err


def test_resume_refuses_what_it_would_ignore(uninterrupted, capsys):
    for words, hint in [
        (("--training.lr", 0.5), "training.lr cannot be changed"),
        (("--seed", 5), "trainer.seed cannot be changed"),
        (("--out", "elsewhere"), "--out has no effect"),
        (("--overwrite",), "--overwrite has no effect"),
        (("--trainer.max-epochs", 2), "can only be raised"),
    ]:
        train("--resume", uninterrupted, *words, code=2)
        assert hint in capsys.readouterr().err


def test_a_broken_checkpoint_is_one_line(uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted, tmp_path / "copy")
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    train("--resume", run, code=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "last.ckpt" in lines[-1]


def test_initial_weights_are_kept_until_the_first_checkpoint(uninterrupted, data, tmp_path):
    run = tmp_path / "run"
    words = ("--trainer.max-epochs", 1, "--training.lr", 1e-30, "--data", data)
    train("--out", run, *words, "--init", uninterrupted)
    for key, value in weights(uninterrupted).items():
        np.testing.assert_allclose(weights(run)[key], value, atol=1e-6)


def kill_and_resume(data, reference, run, log, ready):
    words = ["train", "tokens", "--data", str(data), "--out", str(run), *map(str, COMMON)]
    words += ["--trainer.checkpoint-every", "1"]
    code = kill_when(start(APP, words, log=log), ready)
    assert code in (0, KILLED), log.read_text()
    if not run.exists():  # killed before the folder was there: nothing is half made
        train(*words[2:])
    child = start(APP, ["train", "tokens", "--resume", str(run)], log=log)
    assert wait(child) == 0, log.read_text()
    assert_same_run(reference, run)
    assert [p.name for p in run.parent.iterdir() if p.name.startswith(".tmp")] == [] or code != 0


@pytest.mark.parametrize("rows", [1, 3])
def test_kill_9_in_training(uninterrupted, data, tmp_path, rows):
    run = tmp_path / "run"

    def ready():
        path = run / "metrics.csv"
        return path.exists() and len(path.read_text().splitlines()) > rows

    kill_and_resume(data, uninterrupted, run, tmp_path / "log", ready)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(uninterrupted, data, tmp_path):
    begin = time.monotonic()
    words = ["train", "tokens", "--data", str(data), "--out", str(tmp_path / "timed")]
    words += [*map(str, COMMON), "--trainer.checkpoint-every", "1"]
    assert wait(start(APP, words, log=tmp_path / "log")) == 0
    length_s = time.monotonic() - begin
    for index, moment in enumerate(np.random.default_rng(0).uniform(0, length_s, size=10)):
        begin = time.monotonic()
        run = tmp_path / f"run{index}" / "run"
        run.parent.mkdir()

        def ready(end=begin + moment):
            return time.monotonic() > end

        kill_and_resume(data, uninterrupted, run, tmp_path / f"log{index}", ready)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_tells_how_to_go_on(uninterrupted, data, tmp_path, number, exit_code):
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", "tokens", "--data", str(data), "--out", str(run), *map(str, COMMON)]
    child = start(APP, words, log=log)
    while not (run / "metrics.csv").exists():
        time.sleep(0.005)
    os.kill(child, number)
    code = wait(child)
    assert code == exit_code, log.read_text()
    assert log.read_text().splitlines()[-1].endswith(f"stopped; --resume {run} goes on from here")
    assert (run / "checkpoints" / "last.ckpt").exists()
    train("--resume", run)
    assert_same_run(uninterrupted, run)


def test_two_programs_do_not_train_one_run(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "WAIT_S", 0.0)
    run, log = tmp_path / "run", tmp_path / "log"
    words = ["train", "tokens", "--data", str(data), "--out", str(run), *map(str, COMMON)]
    child = start(APP, [*words, "--trainer.max-epochs", "10000"], log=log)
    while not (run / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.005)
    held = (run / "config.yaml").read_bytes()
    for again in (["--resume", run], ["--data", data, "--out", run, "--overwrite"]):
        train(*again, code=2)
        assert "run: another process is training this run" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == held
    os.kill(child, signal.SIGKILL)
    assert wait(child) == KILLED
    train("--data", data, "--out", run, *COMMON, "--overwrite")
    assert not list(tmp_path.glob(".tmp*"))


def test_a_model_without_its_run_is_not_resumed(uninterrupted, tmp_path, capsys):
    model = shutil.copytree(uninterrupted / "model", tmp_path / "model")
    train("--resume", model, code=2)
    assert "is a model without its run" in capsys.readouterr().err
