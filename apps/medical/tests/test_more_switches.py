"""The switches that make MoRE what the released code is, from the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heed_medical.ecg.writing import write_record
from heed_medical.more import MoreClassifier, small_config
from heed_medical_cli import APP
from heed_medical_cli.more import MoreModule
from heed_runtime.testing.contract import call
from heed_runtime.trained import open_trained

CPU = ("--device", "cpu")
TINY = ("--model.tower.depth", 2, "--model.text.depth", 1, "--model.text.max-tokens", 60,
        "--trainer.batch", 4, "--trainer.max-steps", 4, *CPU)  # fmt: skip
RELEASED = (
    *("--training.no-learn-temperature", "--training.same-is-negative"),
    *("--training.no-one-per-subject", "--model.text.pool", "mean-all"),
    *("--model.tower.schedule", "constant", "--model.tower.key-drop", 0.3),
    *("--training.augmentation.permutation", "each-lead", "--training.augmentation.flip", 0.5),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Studies of PTB-XL's classes, of which one has two; two pairs share an X-ray."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = ["name,subject_id,xray_path,ecg_path,xray_report,ecg_report,split,NORM,MI"]
    cells = [("train", n % 2, 1 - n % 2) for n in range(8)] + [("val", 1, 0), ("val", 0, 1)]
    cells += [("test", 1, 0), ("test", 1, 1), ("test", 0, 1)]
    for n, (split, norm, infarct) in enumerate(cells):
        grey = rng.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"{n}.png")
        write_record(folder / f"e{n}", rng.normal(size=(12, 600)), rate_hz=100)
        picture = 10 if n == 11 else n
        rows.append(f"{n},s{n},{picture}.png,e{n}.hea,Note {n}.,Rate {n}.,{split},{norm},{infarct}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def last_epoch(run: Path) -> dict[str, str]:
    with (run / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))[-1]


@pytest.fixture(scope="module")
def released(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("released") / "run"
    call(APP, "train", "more", "--data", root, "--out", run, *TINY, *RELEASED)
    return run


def test_the_temperature_rests_and_no_pair_of_xray_and_ecg_is_learnt(released: Path):
    epoch = last_epoch(released)
    assert float(epoch["train/temperature"]) == pytest.approx(0.1, rel=1e-6)
    assert "train/loss_xray_ecg" not in epoch
    opened = open_trained(APP, released, device="cpu")
    assert opened.model.xray.shares == opened.model.ecg.shares == [0.3, 0.3]
    assert opened.model.text.tokens([("a", "")])[0].shape == (1, 60)
    assert opened.recipe.train_data(opened.settings, root_of(opened)).apart == []


def root_of(opened: object) -> Path:
    return Path(opened.run.facts()["data"]["path"])  # type: ignore[attr-defined]


def test_the_defaults_learn_the_temperature_and_may_weigh_the_third_pair(
    root: Path, tmp_path: Path
):
    words = ("train", "more", "--data", root, "--out", tmp_path / "run", *TINY)
    call(APP, *words, "--training.xray-ecg-weight", 0.5)
    epoch = last_epoch(tmp_path / "run")
    parts = {name: float(epoch[f"train/{name}"]) for name in ("loss_text_xray", "loss_text_ecg",
             "loss_xray_ecg", "loss", "temperature")}  # fmt: skip
    assert parts["temperature"] != pytest.approx(0.1, rel=1e-4)
    whole = parts["loss_text_xray"] + parts["loss_text_ecg"] + 0.5 * parts["loss_xray_ecg"]
    assert parts["loss"] == pytest.approx(whole, rel=1e-4)
    opened = open_trained(APP, tmp_path / "run", device="cpu")
    assert isinstance(opened.recipe.module(opened.settings, opened.model), MoreModule)
    assert len(set(opened.recipe.train_data(opened.settings, root).apart)) == 8


def test_an_evaluation_has_rank_and_precision_and_counts_an_xray_once(released: Path):
    found = call(APP, "evaluate", released, *CPU)
    metrics = found["metrics"]
    assert 1 <= metrics["ecg_to_xray_median_rank"] <= 2
    assert 1 <= metrics["text_to_ecg_median_rank"] <= 3
    assert {f"text_to_xray_finding_precision@{k}" for k in (1, 5, 10)} < set(metrics)
    with (released / "evaluation" / "test" / "retrieval.csv").open() as stream:
        rows = {(r["from"], r["to"]): r for r in csv.DictReader(stream)}
    counts = [rows["ecg", "xray"][name] for name in ("pairs", "queries", "gallery")]
    assert counts == ["3", "3", "2"]


def test_each_study_may_count_for_its_first_finding_alone(released: Path):
    several = call(APP, "zero-shot", released, *CPU)
    single = call(APP, "zero-shot", released, "--single-label", *CPU)
    positive = [
        {r["finding"]: r["positive"] for r in found["findings"] if r["modality"] == "ecg"}
        for found in (several, single)
    ]
    assert positive == [{"NORM": 2, "MI": 2}, {"NORM": 2, "MI": 1}]


def test_hidden_ecgs_change_nothing_in_training_and_all_in_use():
    torch.manual_seed(0)
    model = MoreClassifier(small_config(), classes=2, dropout=0.0, ecg_drop=0.999999)
    xray, ecg = torch.randn(3, 3, 64, 64), torch.randn(2, 3, 12, 500)
    assert torch.equal(model(xray=xray, ecg=ecg[0]), model(xray=xray, ecg=ecg[1]))
    model.ecg_drop = 0.0
    assert not torch.allclose(model(xray=xray, ecg=ecg[0]), model(xray=xray, ecg=ecg[1]))
    model.ecg_drop = 0.999999
    model.eval()
    assert not torch.allclose(model(xray=xray, ecg=ecg[0]), model(xray=xray, ecg=ecg[1]))
