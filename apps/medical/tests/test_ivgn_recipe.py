"""IVGN from the command line: both protocols of its scores, METEOR's program, what it writes."""

import csv
import json
import math
from itertools import cycle
from pathlib import Path

import pytest
import torch

from heed_medical.ivgn import Ivgn
from heed_medical.reports.phantoms import write_studies
from heed_medical.reports.words import Vocabulary
from heed_medical_cli import APP
from heed_runtime.run import Run
from heed_runtime.testing.contract import call, refusal

TINY = (
    *("--model.dim", 16, "--model.heads", 2, "--model.hidden", 16, "--model.depth", 1),
    *("--data.size", 32, "--data.resize", 36, "--data.most-words", 12),
    *("--trainer.max-steps", 1, "--trainer.batch", 2, "--device", "cpu"),
)
USUAL = "The heart is normal. The lungs are clear."
REPORTS = ("The heart is enlarged.", f"{USUAL} {USUAL}")
"""Of the test: one with a word that no training report has, one of 20 words."""
WRITTEN = ("the heart is <unk> .", "the heart is normal . the lungs are clear .")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ivgn")
    write_studies(root / "data", train=8, val=2, test=2, side=48)
    path = root / "data" / "annotation.json"
    content = json.loads(path.read_text())
    for split, reports in (("train", [USUAL] * 8), ("val", [USUAL] * 2), ("test", REPORTS)):
        for study, report in zip(content[split], reports, strict=True):
            study["report"] = report
    path.write_text(json.dumps(content))
    call(APP, "train", "ivgn", "--data", root / "data", "--out", root / "run", *TINY)
    return root / "run"


@pytest.fixture
def written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the network sees, it writes `WRITTEN`, one report for each study."""
    vocabulary = Vocabulary(Run.open(run, APP).settings.data.vocabulary)
    numbers = cycle(vocabulary.encode(text, most=12)[1:] for text in WRITTEN)

    def write(*_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([next(numbers)]), torch.zeros(1)

    monkeypatch.setattr(Ivgn, "write", write)


def rouge(precision: float, recall: float) -> float:
    return 2.44 * precision * recall / (recall + 1.44 * precision)


@pytest.mark.usefixtures("written")
@pytest.mark.parametrize("protocol", ["r2gen", "full"])
def test_a_protocol_maps_and_cuts_the_references_or_not(run: Path, protocol: str):
    """Fifteen words are written, five and ten of them.

    r2gen: the references have 5 and 11 words, and hold all n-grams that were written.
    full: they have 5 and 20, and the first lacks what the unknown word is part of.
    """
    shown = call(APP, "evaluate", run, "--device", "cpu", "--data.protocol", protocol)
    if protocol == "r2gen":
        references = ["the heart is <unk> .", "the heart is normal . the lungs are clear . the"]
        wanted = dict.fromkeys((1, 2, 3, 4), math.exp(1 - 16 / 15))
        longest = (rouge(1, 1) + rouge(1, 10 / 11)) / 2
    else:
        references = ["the heart is enlarged .", " ".join([WRITTEN[1]] * 2)]
        precisions = (14 / 15, 11 / 13, 9 / 11, 7 / 9)
        wanted = {
            n: math.exp(1 - 25 / 15) * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)
        }
        longest = (rouge(4 / 5, 4 / 5) + rouge(1, 10 / 20)) / 2
    for n, value in wanted.items():
        assert shown["metrics"][f"bleu_{n}"] == pytest.approx(value, abs=1e-6)
    assert shown["metrics"]["rouge_l"] == pytest.approx(longest)
    folder = run / "evaluation" / "test"
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["settings"]["data"]["protocol"] == protocol
    with (folder / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["reference"] for row in rows] == references
    assert [row["report"] for row in rows] == list(WRITTEN)
    with (folder / "scores.csv").open() as stream:
        assert {row["protocol"] for row in csv.DictReader(stream)} == {protocol}


@pytest.mark.usefixtures("written")
def test_the_program_of_meteor_scores_the_reports(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    java, jar = tmp_path / "java", tmp_path / "meteor-1.5.jar"
    lines = ("#!/bin/sh", f'cat "$4" "$5" > {tmp_path}/given', 'echo "Final score: 0.25"')
    java.write_text("\n".join(lines) + "\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    words = ("evaluate", run, "--device", "cpu", "--data.meteor-jar", jar)
    assert "meteor-1.5.jar: no such file" in refusal(APP, *words, "--quiet")
    jar.touch()
    metrics = call(APP, *words)["metrics"]
    assert metrics["meteor"] == 0.25
    assert 0 < metrics["meteor_es"] < 1
    references = ["the heart is <unk> .", "the heart is normal . the lungs are clear . the"]
    assert (tmp_path / "given").read_text().splitlines() == [*WRITTEN, *references]


def test_predict_writes_text_and_a_row_per_word(run: Path, tmp_path: Path):
    study = run.parent / "data" / "images" / "test0000"
    words = ("--out", tmp_path, "--device", "cpu", "--data.write", "json", "txt", "csv")
    found = call(APP, "predict", run, study, *words)
    files = {Path(name).suffix: Path(name) for name in found["files"]}
    content = json.loads(files[".json"].read_text())
    assert len(content["words"]) > 0
    assert (
        files[".txt"].read_text() == content["report"] + "\n" == " ".join(content["words"]) + "\n"
    )
    with files[".csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["word"] for row in rows] == content["words"]
    assert [int(row["place"]) for row in rows] == list(range(1, len(rows) + 1))
    shares = [float(row["visual_reliance"]) for row in rows]
    assert shares == pytest.approx(content["visual_reliance"])
    assert all(0 < share < 1 for share in shares)
