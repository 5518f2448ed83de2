"""What a training, an evaluation and a prediction of MoRE say of studies that lack something."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_medical.ecg.writing import write_record
from heed_medical_cli import APP
from heed_runtime.testing.contract import spoken

TINY = ("--model.tower.depth", 1, "--trainer.batch", 2, "--trainer.max-steps", 2, "--device", "cpu")
ROWS = (
    "t0,a.png,e.hea,Clear.,train,1", "t1,a.png,short.hea,Edema.,train,0",
    "t2,a.png,,Fluid.,train,1", "t3,,e.hea,,train,0", "t4,a.png,e.hea,FINDINGS: ___,train,0",
    "v0,a.png,short.hea,Clear.,val,1", "v1,,e.hea,Edema.,val,0", "x0,a.png,e.hea,,test,1",
    "x1,a.png,e.hea,Clear.,test,0",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "a.png")
    for name, samples in (("e", 1000), ("short", 320)):
        write_record(folder / name, rng.normal(size=(12, samples)), rate_hz=100)
    head = "name,xray_path,ecg_path,xray_report,split,Edema"
    (folder / "manifest.csv").write_text("\n".join([head, *ROWS]) + "\n")
    return folder


def said(*words: object) -> list[str]:
    """The lines about studies and ECGs of a command that works."""
    code, _, err = spoken(APP, *words)
    assert code == 0, err
    lines = [line.removeprefix("warning: ") for line in err.splitlines()]
    return sorted(line for line in lines if "studies " in line or "ECGs " in line)


SHORT = "ECGs last less than 5 s (the shortest 3.2 s); zeros follow them"


def test_every_kind_is_said_once_by_each_verb(root: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert said("train", "more", "--data", root, "--out", run, *TINY) == [
        f"{root}, train: 1 of 2 {SHORT}",
        f"{root}, train: 1 of 4 studies have no ECG",
        f"{root}, train: 1 of 4 studies have no report",
        f"{root}, train: 1 of 5 studies are left out, which do not have two modalities",
        f"{root}, val: 1 of 2 {SHORT}",
        f"{root}, val: 1 of 2 studies have no X-ray",
    ]
    log = (run / "log.txt").read_text()
    assert log.count("ECGs last less than") == 2
    assert said("evaluate", run, "--device", "cpu") == [
        f"{root}, test: 1 of 2 studies have no report"
    ]
    words = ("--out", tmp_path / "out", "--device", "cpu")
    assert said("predict", run, root / "a.png", root / "short.hea", *words) == [
        f"inputs: 1 of 1 {SHORT}",
        "inputs: 1 of 2 studies have no ECG",
        "inputs: 1 of 2 studies have no X-ray",
        "inputs: 2 of 2 studies have no report",
    ]


def test_fine_tuning_says_which_studies_it_cannot_see(root: Path, tmp_path: Path):
    words = ("train", "more-findings", "--data", root, "--out", tmp_path / "run")
    assert said(*words, "--model.more.tower.depth", 1, *TINY[2:]) == [
        f"{root}, train: 1 of 2 {SHORT}",
        f"{root}, train: 2 of 5 studies are left out, which do not have xray and ecg",
        f"{root}, val: 1 of 1 {SHORT}",
        f"{root}, val: 1 of 2 studies are left out, which do not have xray and ecg",
    ]
