"""What the presets small of IVGN and MoRE learn of their samples, and what crippled ones do not."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from heed_medical.more.sample import FINDINGS
from heed_medical_cli import APP
from heed_runtime.testing.contract import call
from heed_runtime.trained import open_trained

pytestmark = pytest.mark.slow


def sample(system: str, root: Path) -> Path:
    call(APP, "sample", system, root, "--seed", 0)
    return root


def trained(system: str, data: Path, out: Path, *flags: object) -> Path:
    call(APP, "train", system, "--data", data, "--out", out, "--device", "cpu", *flags)
    return out


def scores(run: Path, *flags: object) -> dict[str, float]:
    found: dict[str, float] = call(APP, "evaluate", run, "--device", "cpu", *flags)["metrics"]
    return found


def test_ivgn_writes_what_it_sees(tmp_path: Path):
    run = trained("ivgn", sample("ivgn", tmp_path / "data"), tmp_path / "run")
    seeing = scores(run)
    blind = scores(run, "--data.pictures", "ignored")
    assert seeing["bleu_4"] > 0.75, seeing
    assert seeing["different_reports"] >= 8
    assert blind["different_reports"] == 1
    assert "visual_reliance" in seeing
    assert "visual_reliance" not in blind
    assert blind["bleu_4"] < seeing["bleu_4"] - 0.05


def test_more_joins_what_belongs_together(tmp_path: Path):
    """Modalities meet by their report; with reports of other studies they do not."""
    data = sample("more", tmp_path / "data")
    found = scores(trained("more", data, tmp_path / "run"))
    for pair in ("text_to_xray", "text_to_ecg"):
        assert found[f"{pair}_finding_precision@1"] > 0.9, (pair, found)
    for pair in ("xray_to_text", "ecg_to_text"):
        assert found[f"{pair}_finding_precision@1"] > 0.8, (pair, found)
    assert found["xray_to_ecg_finding_precision@1"] > 0.8  # never trained as a pair; chance 0.125
    assert found["xray_zero_shot_auroc"] > 0.75
    there, elsewhere = relevance_of_findings(tmp_path / "run", data)
    assert there > 3, there  # times what an even map has
    assert elsewhere < 1, elsewhere
    shuffled = tmp_path / "shuffled.csv"
    with (data / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    train = [row for row in rows if row["split"] == "train"]
    order = np.random.default_rng(1).permutation(len(train))
    reports = [(train[i]["xray_report"], train[i]["ecg_report"]) for i in order]
    for row, (xray, ecg) in zip(train, reports, strict=True):
        row["xray_report"], row["ecg_report"] = xray, ecg
    with shuffled.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = ("--data.manifest", shuffled, "--data.root", data, "--trainer.max-epochs", 15)
    crippled = scores(trained("more", data, tmp_path / "crippled", *words))
    for pair in ("text_to_xray", "text_to_ecg", "xray_to_ecg"):
        assert crippled[f"{pair}_finding_precision@1"] < 0.5, (pair, crippled)


def relevance_of_findings(run: Path, data: Path) -> tuple[float, float]:
    """How much of the X-ray map lies at the finding, and at a place far from it, to their area.

    Means of 16 test studies, explained by their reports.
    """
    opened = open_trained(APP, run, device="cpu")
    module = opened.recipe.module(opened.settings, opened.model.eval())
    cases = opened.recipe.cases(opened.settings, data, "test")
    found = []
    for number in range(16):
        case = cases[number]
        finding = next(n for n, name in enumerate(FINDINGS) if case.file.labels[name] == 1)
        relevance = opened.recipe.explain(opened.settings, module, case).arrays["xray"]
        y, x = np.mgrid[: len(relevance), : len(relevance)] / len(relevance)
        row, column = divmod(finding, 4)
        parts = []
        for i, j in ((row, column), (1 - row, (column + 2) % 4)):
            near = np.hypot(y - (i + 0.5) / 2, x - (j + 0.5) / 4) < 0.15
            parts.append(relevance[near].sum() / relevance.sum() / near.mean())
        found.append(parts)
    there, elsewhere = np.mean(found, axis=0)
    return float(there), float(elsewhere)


def test_fine_tuning_starts_from_what_was_learnt(tmp_path: Path):
    """A few studies with labels: the pre-trained towers tell findings, random ones less."""
    data = sample("more", tmp_path / "data")
    run = trained("more", data, tmp_path / "run")
    words = ("--data.manifest", few(data, tmp_path / "few.csv"), "--data.root", data,
             "--trainer.max-epochs", 6)  # fmt: skip
    start = ("--training.start-from", run, "--training.trained-blocks", 1)
    tuned = scores(trained("more-findings", data, tmp_path / "tuned", *words, *start))
    fresh = scores(trained("more-findings", data, tmp_path / "fresh", *words))
    assert tuned["macro_auc"] > 0.9, tuned
    assert tuned["macro_auc"] > fresh["macro_auc"] + 0.05, (tuned, fresh)
    probe = call(APP, "probe", run, "--embed", "xray", "--device", "cpu")["metrics"]
    assert probe["macro_auc"] > 0.9


def few(data: Path, path: Path) -> Path:
    """The manifest with a quarter of the training studies."""
    with (data / "manifest.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    train = [row for row in rows if row["split"] == "train"][: len(rows) // 4]
    kept = [*train, *(row for row in rows if row["split"] != "train")]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    return path


def test_several_findings_are_learnt_at_once(tmp_path: Path):
    data = sample("medusa-findings", tmp_path / "data")
    run = trained("medusa-findings", data, tmp_path / "run")
    assert scores(run)["macro_auc"] > 0.8
    folder = run / "evaluation" / "test"
    assert json.loads((folder / "metrics.json").read_text())["n"] == 40
    with (folder / "findings.csv").open() as stream:
        found = {row["finding"]: float(row["auc"]) for row in csv.DictReader(stream)}
    assert min(found["Cardiomegaly"], found["Support Devices"]) > 0.95
