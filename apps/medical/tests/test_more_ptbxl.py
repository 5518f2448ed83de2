"""PTB-XL in its own layout through MoRE: check, train, zero-shot, with an encoder from a folder."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from heed_medical.ecg.ptbxl import SUPERCLASSES
from heed_medical.ecg.writing import write_record
from heed_medical.more.sample import make_ecg
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import find_studies
from heed_medical_cli import APP
from heed_runtime.testing.contract import call, refusal, spoken

CPU = ("--device", "cpu")
TINY = ("--model.tower.depth", 1, "--model.text.depth", 1, "--trainer.batch", 2,
        "--trainer.max-steps", 2, *CPU)  # fmt: skip
STATEMENTS = """,description,diagnostic,form,diagnostic_class
NORM,normal ECG,1.0,,NORM
IMI,inferior infarction,1.0,,MI
LVH,left ventricular hypertrophy,1.0,,HYP
SR,sinus rhythm,,,
"""
CODES = (
    ("{'NORM': 100.0, 'SR': 0.0}", 1), ("{'IMI': 50.0, 'LVH': 15.0}", 2), ("{'SR': 0.0}", 8),
    ("{'LVH': 100.0}", 9), ("{'NORM': 80.0}", 10), ("{'IMI': 100.0, 'LVH': 0.0}", 10),
)  # fmt: skip
"""Statements and fold of six records."""
LABELS = ("NORM", "MI HYP", "", "HYP", "NORM", "MI HYP")
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ptbxl")
    rng = np.random.default_rng(0)
    rows = []
    for number, (codes, fold) in enumerate(CODES, start=1):
        slow = make_ecg(number, rng)
        names = {}
        for rate, column, part in ((100, "filename_lr", "lr"), (500, "filename_hr", "hr")):
            place = folder / f"records{rate}" / "00000"
            place.mkdir(parents=True, exist_ok=True)
            record = place / f"{number:05d}_{part}"
            write_record(record, slow.repeat(rate // 100, axis=1), rate_hz=rate, names=LEADS)
            names[column] = record.relative_to(folder).as_posix()
        rows.append(
            {
                "ecg_id": number, "patient_id": f"{1000 + number}.0", "scp_codes": codes,
                "report": f"sinusrhythmus {number}", "strat_fold": fold, **names,
            }
        )  # fmt: skip
    with (folder / "ptbxl_database.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "scp_statements.csv").write_text(STATEMENTS)
    return folder


@pytest.mark.parametrize(("rate", "part"), [(100, "lr"), (500, "hr")])
def test_records_are_studies_with_several_labels(root: Path, rate: int, part: str):
    found = find_studies(root, MoreData(ptbxl_rate=rate))  # type: ignore[arg-type]
    assert [study.name for study in found] == [
        f"records{rate}/00000/{number:05d}_{part}" for number in range(1, 7)
    ]
    assert [study.split for study in found] == ["train"] * 3 + ["val", "test", "test"]
    positive = [[name for name in SUPERCLASSES if study.labels[name]] for study in found]
    assert [set(names) for names in positive] == [set(names.split()) for names in LABELS]
    assert found[1].subject == "1002"
    assert found[1].report == ("", "sinusrhythmus 2")
    assert found[1].modalities == ("ecg", "text")


def test_check_counts_and_names_what_is_broken(root: Path, tmp_path: Path):
    counts = {row["split"]: row for row in call(APP, "check", "more", root)["counts"]}
    assert [counts[split]["studies"] for split in ("train", "val", "test")] == [3, 1, 2]
    assert [counts["test"][name] for name in ("NORM", "MI", "HYP", "CD")] == [1, 1, 1, 0]
    broken = shutil.copytree(root, tmp_path / "broken")
    (broken / "records500" / "00000" / "00003_hr.dat").unlink()
    assert call(APP, "check", "more", broken)["problems"] == []
    code, out, _ = spoken(APP, "check", "more", broken, "--data.ptbxl-rate", 500, "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 1
    assert "00003_hr.hea: names 00003_hr.dat" in problem


@pytest.mark.parametrize("rate", [100, 500])
def test_a_run_is_trained_and_asked(root: Path, rate: int, tmp_path: Path):
    run = tmp_path / "run"
    words = ("--data", root, "--data.ptbxl-rate", rate, "--out", run)
    call(APP, "train", "more", *words, *TINY)
    found = call(APP, "zero-shot", run, *CPU)
    assert found["n"] == 2
    assert {row["finding"]: row["prompts"] for row in found["prompts"]} == {
        "NORM": "Normal ECG", "STTC": "ST T Change", "MI": "Myocardial Infarction",
        "HYP": "Hypertrophy", "CD": "Conduction Disturbance",
    }  # fmt: skip
    positive = {row["finding"]: row["positive"] for row in found["findings"]}
    assert positive == {"NORM": 1, "STTC": 0, "MI": 1, "HYP": 1, "CD": 0}
    single = call(APP, "zero-shot", run, "--single-label", *CPU)["findings"]
    assert {row["finding"]: row["positive"] for row in single}["HYP"] == 0
    other = call(APP, "zero-shot", run, "--data.ptbxl-rate", 600 - rate, *CPU)
    assert other["n"] == 2


def test_findings_are_learnt_from_several_labels(root: Path, tmp_path: Path):
    words = ("--data", root, "--data.labels", "NORM", "HYP", "--out", tmp_path / "run")
    tiny = ("--model.more.tower.depth", 1, "--trainer.batch", 2, "--trainer.max-steps", 2, *CPU)
    call(APP, "train", "more-findings", *words, *tiny)
    assert call(APP, "evaluate", tmp_path / "run", *CPU)["metrics"]["cases"] == 2
    line = refusal(APP, "train", "more-findings", "--data", root, "--out", tmp_path / "b", *tiny)
    assert "no training study with and without STTC" in line


def write_encoder(folder: Path) -> Path:
    """A random BERT with a tokenizer of few words."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "report", "from", "ecg", "is")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_run_with_an_encoder_from_a_folder_needs_the_folder_no_more(root: Path, tmp_path: Path):
    folder = write_encoder(tmp_path / "bert")
    run = tmp_path / "run"
    words = ("--data", root, "--out", run, "--training.text-folder", folder)
    tiny = ("--model.tower.depth", 1, "--model.text.lora-rank", 2, *TINY[4:])
    call(APP, "train", "more", *words, *tiny)
    text = json.loads((run / "model" / "config.json").read_text())["settings"]["model"]["text"]
    assert (text["dim"], text["max_tokens"]) == (16, 64)
    shutil.rmtree(folder)
    assert call(APP, "zero-shot", run, *CPU)["n"] == 2
    record = root / "records100" / "00000" / "00005_lr.hea"
    call(APP, "explain", run, root, "--out", tmp_path / "maps", *CPU)
    assert list((tmp_path / "maps").rglob("*00005_lr*"))
    call(APP, "predict", run, record, "--out", tmp_path / "out", *CPU)
