"""CheXpert and MIMIC-CXR tables from the command line, packed, with uncertain and blank labels."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_medical.pictures.listers import CHEXPERT_FINDINGS
from heed_medical_cli import APP
from heed_runtime.testing.contract import call, refusal

TWO = ("--data.findings", "Edema", "Cardiomegaly")
CELLS = [("1.0", "0.0"), ("-1.0", "1.0"), ("", "0.0"), ("0.0", ""), ("-1.0", "1.0"), ("1.0", "")]
"""Edema and Cardiomegaly of six training pictures."""


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(len(path.name)).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(grey).save(path)


def write_gz(path: Path, rows: list[dict[str, str]]) -> None:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(gzip.compress(stream.getvalue().encode()))


def labelled(number: int) -> dict[str, str]:
    """The fourteen labels of a picture, in the order of CheXpert."""
    edema, heart = CELLS[number % len(CELLS)]
    return dict.fromkeys(CHEXPERT_FINDINGS, "") | {"Edema": edema, "Cardiomegaly": heart}


@pytest.fixture
def chexpert(tmp_path: Path) -> Path:
    """Six training pictures and two of the test, tables packed."""
    root = tmp_path / "chexpert"
    for table, part, count in (("train", "train", 6), ("valid", "valid", 2)):
        rows = []
        for number in range(count):
            path = f"CheXpert-v1.0-small/{part}/patient{number:03d}_{part}/study1/view1_frontal.jpg"
            save(root / Path(*Path(path).parts[1:]))
            view = {"Path": path, "Sex": "F", "Age": "60", "Frontal/Lateral": "Frontal"}
            rows.append({**view, "AP/PA": "AP", **labelled(number)})
        write_gz(root / f"{table}.csv.gz", rows)
    return root


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    """Eight pictures in three splits; the labels in the order of the alphabet."""
    root = tmp_path / "mimic"
    labels, splits, views = [], [], []
    for number, split in enumerate(("train",) * 6 + ("validate", "test")):
        subject, study = f"1000000{number}", f"5000000{number}"
        ids = {"dicom_id": f"d{number}", "subject_id": subject, "study_id": study}
        save(root / f"files/p10/p{subject}/s{study}/d{number}.jpg")
        labels.append(
            {"subject_id": subject, "study_id": study, **dict(sorted(labelled(number).items()))}
        )
        splits.append({**ids, "split": split})
        views.append({**ids, "ViewPosition": "PA"})
    for part, rows in (("chexpert", labels), ("split", splits), ("metadata", views)):
        write_gz(root / f"mimic-cxr-2.0.0-{part}.csv.gz", rows)
    return root


def of_split(found: dict, split: str) -> dict:
    return next(row for row in found["counts"] if row["split"] == split)


def test_mimic_is_counted_by_name_with_its_own_splits(mimic: Path):
    found = call(APP, "check", "medusa-findings", mimic, *TWO)
    assert not found["problems"]
    train = of_split(found, "train")
    assert (train["pictures"], train["Edema"], train["Cardiomegaly"]) == (6, 2, 2)
    assert of_split(found, "val")["Edema"] == 1
    # a blank is negative and -1 is left out unless the settings say otherwise
    of_edema = next(line for line in found["warnings"] if "Edema:" in line)
    assert "uncertain in 3 of 8 pictures (left out)" in of_edema
    assert "not mentioned in 1 of 8 pictures (negative)" in of_edema


@pytest.mark.parametrize(
    ("uncertain", "edema", "cardiomegaly"),
    [("leave-out", 2, 2), ("positive", 4, 2), ("negative", 2, 2), ("mixed", 4, 2)],
)
def test_uncertain_findings_are_what_the_settings_say(
    mimic: Path, uncertain: str, edema: int, cardiomegaly: int
):
    found = call(APP, "check", "medusa-findings", mimic, *TWO, "--data.uncertain", uncertain)
    train = of_split(found, "train")
    assert (train["Edema"], train["Cardiomegaly"]) == (edema, cardiomegaly)


def test_chexpert_is_checked_whole_and_by_one_finding(chexpert: Path):
    found = call(APP, "check", "medusa-findings", chexpert, *TWO)
    assert not found["problems"]
    assert sum(row["pictures"] for row in found["counts"]) == 8
    assert of_split(found, "test")["Edema"] == 1
    one = call(APP, "check", "medusa", chexpert, "--data.label", "Edema")
    # of the training 1 1 0 and a blank are left, of the test 1; the -1 are left out
    assert sum(row["positive"] for row in one["counts"]) == 3
    assert sum(row["negative"] for row in one["counts"]) == 2
    assert any("uncertain in 3 of 8 pictures (left out)" in line for line in one["warnings"])


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_pictures_of_one_class_each_have_no_findings(tmp_path: Path, layout: str):
    for name in ("normal/a.png", "normal/b.png", "sick/c.png"):
        save(tmp_path / name)
    said = "has pictures of one class each, in the layout folders; train medusa on them"
    if layout == "table":
        (tmp_path / "labels.csv").write_text("file,label\nnormal/a.png,normal\n")
        said = "labels.csv: has no column of a finding of CheXpert; its columns are file, label"
    line = refusal(APP, "train", "medusa-findings", "--data", tmp_path, "--out", tmp_path / "run")
    assert said in line


def test_a_label_that_is_none_is_named(mimic: Path):
    path = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    path.write_bytes(gzip.compress(text.replace("-1.0", "2.0", 1).encode()))
    said = refusal(APP, "train", "medusa-findings", "--data", mimic, "--out", mimic / "run", *TWO)
    assert "row" in said
    assert "has Edema = '2.0', use 1, 0, -1 or blank" in said
    assert "chexpert.csv.gz" in said
