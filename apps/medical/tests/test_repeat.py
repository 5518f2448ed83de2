"""Training with several seeds: mean and deviation of the test, folds scored together, going on."""

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from heed_medical_cli import APP
from heed_runtime.testing.contract import call, noticed, spoken

QUICK = ("--trainer.max-steps", "2", "--trainer.batch", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 18 bags of which the second class is shifted."""
    root = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    with (root / "bags.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["label", "bag", *(f"f{n}" for n in range(8))])
        for bag in range(18):
            for row in rng.normal(size=(5, 8)) + bag % 2:
                writer.writerow([bag % 2, f"b{bag:02d}", *row.round(3)])
    return root / "bags.csv"


@pytest.fixture(scope="module")
def repeated(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("repeat") / "out"
    words = ("repeat", "acmil", "--data", table, "--out", out, "--seeds", 3, *QUICK)
    return out, noticed(APP, "acmil", *words)


def test_mean_and_deviation_are_those_of_the_runs(repeated: tuple[Path, dict]):
    out, found = repeated
    assert sorted(path.name for path in out.glob("seed_*")) == ["seed_0", "seed_1", "seed_2"]
    scores = [
        json.loads((out / f"seed_{n}/evaluation/test/metrics.json").read_text())["metrics"]
        for n in range(3)
    ]
    seeds = [
        json.loads((out / f"seed_{n}/evaluation/test/metrics.json").read_text())["settings"]
        for n in range(3)
    ]
    assert [one["trainer"]["seed"] for one in seeds] == [0, 1, 2]
    assert {one["data"]["split_seed"] for one in seeds} == {0}
    for name in ("accuracy", "auc", "top10_attention"):
        values = [one[name] for one in scores]
        assert found["metrics"][name]["mean"] == pytest.approx(statistics.mean(values))
        assert found["metrics"][name]["std"] == pytest.approx(statistics.stdev(values))
    assert len({one["auc"] for one in scores}) > 1 or len({one["accuracy"] for one in scores}) > 1
    document = json.loads((out / "metrics.json").read_text())
    assert document["metrics"] == found["metrics"]
    assert [run["seed"] for run in document["runs"]] == [0, 1, 2]
    with (out / "runs.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["auc"]) for row in rows] == pytest.approx([one["auc"] for one in scores])


def test_a_seed_alone_is_the_seed_among_others(
    repeated: tuple[Path, dict], table: Path, tmp_path: Path
):
    call(APP, "train", "acmil", "--data", table, "--out", tmp_path / "one", "--seed", 1, *QUICK)
    call(APP, "evaluate", tmp_path / "one", "--device", "cpu")
    files = [tmp_path / "one", repeated[0] / "seed_1"]
    alone, among = (
        json.loads((path / "evaluation/test/metrics.json").read_text()) for path in files
    )
    assert alone["weights_sha256"] == among["weights_sha256"]
    assert alone["metrics"] == among["metrics"]


def test_it_goes_on_where_it_was_and_refuses_other_settings(
    repeated: tuple[Path, dict], table: Path, tmp_path: Path
):
    out, found = repeated
    before = (out / "seed_0" / "metrics.json").stat().st_mtime_ns
    (out / "seed_2" / "evaluation" / "test" / "metrics.json").unlink()
    words = ("repeat", "acmil", "--data", table, "--out", out)
    again = call(APP, *words, "--seeds", 3, *QUICK)
    assert again["metrics"] == found["metrics"]
    more = call(APP, *words, "--seeds", 4, *QUICK)
    assert len(more["runs"]) == 4
    assert (out / "seed_0" / "metrics.json").stat().st_mtime_ns == before
    code, _, err = spoken(APP, *words, "--seeds", 3, *QUICK, "--training.learning-rate", 0.5)
    assert code == 2
    assert "training.learning_rate 0.001, not 0.5" in err
    (tmp_path / "notes.txt").touch()
    code, _, err = spoken(APP, "repeat", "acmil", "--data", table, "--out", tmp_path, *QUICK)
    assert code == 2
    assert "holds files that are no runs of repeat" in err


def test_the_folds_of_a_seed_are_scored_together(table: Path, tmp_path: Path):
    flags = ("--data.folds", 3, "--seeds", 2, *QUICK)
    found = call(APP, "repeat", "acmil", "--data", table, "--out", tmp_path / "out", *flags)
    tested = []
    for seed in range(2):
        bags = []
        for fold in range(3):
            folder = tmp_path / "out" / f"seed_{seed}" / f"fold_{fold}" / "evaluation" / "test"
            with (folder / "cases.csv").open() as stream:
                bags += [(row["case"], row["label"] == row["predicted"], fold)
                         for row in csv.DictReader(stream)]  # fmt: skip
        assert sorted(name for name, _, _ in bags) == [f"b{n:02d}" for n in range(18)]
        accuracy = statistics.mean(right for _, right, _ in bags)
        assert found["runs"][seed]["accuracy"] == pytest.approx(accuracy)
        assert found["runs"][seed]["n"] == 18
        tested.append({name: fold for name, _, fold in bags})
    assert tested[0] != tested[1]  # each seed cuts other folds


def test_what_cannot_be_repeated_is_said(table: Path, tmp_path: Path):
    words = ("repeat", "acmil", "--data", table, "--out", tmp_path / "out", *QUICK)
    for flags, told in (
        (("--seeds", 1), "seeds must be at least 2, got 1"),
        (("--trainer.devices", 2), "one process"),
        (("--data.folds", 3, "--data.fold", 1), "--data.fold"),
        (("--split", "other"), "other"),
    ):
        code, _, err = spoken(APP, *words, *flags)
        assert code == 2
        assert told in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_failed_at_once_can_be_repeated_otherwise(table: Path, tmp_path: Path):
    words = ("repeat", "acmil", "--data", table, "--out", tmp_path / "out", "--seeds", 2, *QUICK)
    code, _, err = spoken(APP, *words, "--data.classes", "x", "y")
    assert code == 2
    assert "bags.csv" in err
    assert call(APP, *words)["seeds"] == 2
