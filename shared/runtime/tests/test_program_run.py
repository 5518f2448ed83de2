import contextlib
import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from heed_core.errors import InputError
from heed_runtime.recipe import Table
from heed_runtime.report import curves, save_figure, save_table, slug
from heed_runtime.run import Run, fingerprint, free_path, load_weights
from heed_runtime.settings import merge
from heed_runtime.testing import APP

RECIPE = APP.recipe("tokens")
SETTINGS = merge(RECIPE.settings(), {"model": {"width": 8}, "trainer": {"seed": 7}})


def make(path: Path, *, overwrite: bool = False) -> Run:
    return Run.create(
        path,
        system="tokens",
        settings=SETTINGS,
        command=["heed-example", "train", "tokens"],
        overwrite=overwrite,
    )


def test_a_run_opens_as_it_was_made(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
    ]
    assert Run.open(run.path, APP) == run
    facts = json.loads(run.environment.read_text())
    assert facts["seed"] == 7
    assert facts["command"] == ["heed-example", "train", "tokens"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    run.update_environment({"data": {"files": 3}})
    assert json.loads(run.environment.read_text()) == {**facts, "data": {"files": 3}}


def test_a_run_is_replaced_only_on_request_and_other_folders_never(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.log_epoch({"epoch": 0, "loss": 1.0})
    with pytest.raises(InputError, match=r"run: holds a run; .*--overwrite"):
        make(run.path)
    assert run.metrics_csv.exists()
    assert not make(run.path, overwrite=True).metrics_csv.exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is not empty|are no run"):
            make(tmp_path / "photos", overwrite=overwrite)
    assert (tmp_path / "photos" / "a.png").exists()


def test_the_default_path_counts_up_and_is_given_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with free_path("tokens") as first, free_path("tokens") as second:
        assert first.parent == second.parent == Path("runs")
        assert [path.name[-2:] for path in (first, second)] == ["-1", "-2"]
        make(first)
    with free_path("other") as other:
        assert other.name.endswith("-1")
    with contextlib.suppress(KeyboardInterrupt), free_path("tokens") as third:
        assert third.name.endswith("-3")
        raise KeyboardInterrupt
    assert not third.exists()
    assert first.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "is not a run: it has no config.yaml"),
        ({"config.yaml": "model: {}"}, "config.yaml: names no system"),
        ({"config.yaml": "system: token"}, "which heed-example does not have; did you mean 'tok"),
        ({"config.yaml": "system: tokens\nmodel: {widht: 3}"}, "model.widht: unknown key"),
        ({"config.yaml": "system: [tokens"}, "is not valid YAML"),
        ({"model/config.json": "{"}, "is not a model's configuration of this program"),
        ({"config.json": '{"model_type": "vit"}'}, "is not a model's configuration"),
        ({"config.json": '{"system": "msga", "settings": {}}'}, "is of the system 'msga', which"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        Run.open(tmp_path, APP)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Run.open(tmp_path / "no", APP)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a run"):
        Run.open(tmp_path / "file", APP)


def test_the_model_folder_alone_rebuilds_the_model(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    model = RECIPE.model(SETTINGS)
    run.save_model(model)
    run.model_folder.rename(tmp_path / "alone")
    alone = Run.open(tmp_path / "alone", APP)
    assert alone.settings == SETTINGS
    loaded = alone.load_model(RECIPE)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert len(alone.weights_hash()) == 64


def test_a_run_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the run has no weights yet"):
        make(tmp_path / "run").load_model(RECIPE)


def break_weights(path: Path, how: str) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, path)
    elif how == "unknown":
        save_file({**tensors, "new": torch.zeros(1)}, path)
    else:
        save_file({**tensors, name: torch.zeros(3, 3, 3)}, path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", "cannot be read as safetensors"),
        ("empty", "cannot be read as safetensors"),
        ("missing", "is of another model: lacks 1 tensors"),
        ("unknown", "is of another model: has unknown 1 tensors \\(new\\)"),
        ("shape", "is of another model: .* has shape \\(3, 3, 3\\), not"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, how: str, words: str) -> None:
    run = make(tmp_path / "run")
    run.save_model(RECIPE.model(SETTINGS))
    break_weights(run.weights, how)
    with pytest.raises(InputError, match=words) as caught:
        run.load_model(RECIPE)
    assert str(caught.value).startswith(str(run.weights))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a


def test_tied_and_transposed_weights_are_kept(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    old = Tied()
    old.a.weight.data = old.a.weight.data.t()
    run.save_model(old)
    new = Tied()
    load_weights(new, run.weights)
    assert torch.equal(new.a.weight, old.a.weight)
    assert new.a.weight is new.b.weight


def test_metrics_of_an_epoch_replace_those_that_a_killed_run_left(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert run.metrics() == []
    for epoch in range(4):
        run.log_epoch({"epoch": epoch, "loss": 1.0 - epoch / 8})
    run.log_epoch({"epoch": 2, "loss": 0.5, "dice": float("nan")})
    assert run.metrics_csv.read_text() == "epoch,loss,dice\n0,1.0,\n1,0.875,\n2,0.5,\n"
    assert run.metrics()[-1] == {"epoch": 2.0, "loss": 0.5, "dice": None}


def test_the_log_keeps_the_traceback_of_our_faults_and_not_of_the_users(tmp_path: Path) -> None:
    run = make(tmp_path / "run")

    def raising(error: Exception) -> None:
        with run.logging():
            logging.getLogger("heed_runtime.x").warning("before")
            raise error

    with pytest.raises(InputError):
        raising(InputError("bad scan"))
    assert "before" in run.log.read_text()
    assert "Traceback" not in run.log.read_text()
    with pytest.raises(ZeroDivisionError) as caught:
        raising(ZeroDivisionError("ours"))
    assert "ZeroDivisionError: ours" in run.log.read_text()
    assert caught.value.__notes__ == [f"the traceback is in {run.log}"]


def test_a_run_that_takes_no_log_is_used_without(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.log.unlink(missing_ok=True)
    run.log.mkdir()
    with run.logging():
        logging.getLogger("heed_runtime.x").warning("not written")


def test_the_fingerprint_knows_names_sizes_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("123")
    (tmp_path / "y").write_text("45")
    first = fingerprint(tmp_path)
    assert (first["files"], first["bytes"]) == (2, 5)
    (tmp_path / "y").write_text("46")
    second = fingerprint(tmp_path)
    (tmp_path / "y").rename(tmp_path / "z")
    third = fingerprint(tmp_path)
    assert len({facts["sha256"] for facts in (first, second, third)}) == 3
    (tmp_path / "z").rename(tmp_path / "y")
    assert fingerprint(tmp_path) == second
    assert fingerprint(tmp_path / "y")["files"] == 1


def test_curves_mark_the_best_epoch_and_pair_train_with_val(tmp_path: Path) -> None:
    rows = [
        {"epoch": 0, "train_loss": 1.0, "val_loss": 1.5, "val_dice": None, "lr": 0.1},
        {"epoch": 1, "train_loss": 0.5, "val_loss": 1.0, "val_dice": 0.25, "lr": 0.1},
        {"epoch": 2, "train_loss": 0.25, "val_loss": 1.25, "val_dice": 0.5, "lr": 0.05},
    ]
    figure = curves(rows, monitor=("val_loss", "min"))
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert set(panels) == {"loss", "dice", "lr"}
    labels = panels["loss"].get_legend_handles_labels()[1]
    assert labels == ["train_loss", "val_loss", "best: 1"]
    assert panels["loss"].lines[-1].get_xdata()[0] == 1
    assert list(panels["dice"].lines[0].get_xdata()) == [1, 2]
    path = save_figure(figure, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[0] > 300
    assert pixels.min() < 50
    assert pixels.max() == 255
    save_figure(curves([]), tmp_path / "empty.png")


def test_a_table_is_named_by_its_title(tmp_path: Path) -> None:
    path = save_table(Table(title="Dice, per organ (%)", rows=[{"organ": "liver"}]), tmp_path)
    assert path.name == "dice-per-organ.csv"
    assert path.read_text() == "organ\nliver\n"
    assert slug("***") == "table"


def test_settings_that_are_not_finite_survive_the_model_folder(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, training=dataclasses.replace(SETTINGS.training, lr=float("inf"))
    )
    run = Run.create(tmp_path / "r", system="tokens", settings=settings, command=[])
    run.save_model(RECIPE.model(settings))
    run.model_folder.rename(tmp_path / "alone")
    assert Run.open(tmp_path / "alone", APP).settings == settings


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[1]", b"3", b"[" * 100_000])
def test_a_damaged_environment_is_one_line(tmp_path: Path, content: bytes) -> None:
    run = Run(path=tmp_path, system="tokens", settings=None)
    assert run.facts() == {}
    run.update_environment({"data": 1})
    assert run.facts() == {"data": 1}
    run.environment.write_bytes(content)
    with pytest.raises(InputError, match=r"environment\.json: is no whole JSON document") as fault:
        run.update_environment({"data": 2})
    assert "\n" not in str(fault.value)
    assert run.environment.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"epoch,loss\n1,\xff\n", b"loss\n1\n", b"epoch\n1,2\n", b"epoch\nx\n"],
)
def test_a_damaged_table_of_epochs_is_one_line(tmp_path: Path, content: bytes) -> None:
    run = Run(path=tmp_path, system="tokens", settings=None)
    run.log_epoch({"epoch": 1, "loss": 0.5})
    run.metrics_csv.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.csv: is no table of the numbers of epochs"):
        run.log_epoch({"epoch": 2, "loss": 0.4})
    assert run.metrics_csv.read_bytes() == content
