"""Pictures and studies with several findings: how they are read, learnt and explained."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_medical.medusa import findings_loss
from heed_medical.medusa.finding_phantoms import FINDINGS, write_findings
from heed_medical.medusa.inputs import MedusaData, read_case
from heed_medical.more import More, MoreClassifier, MoreConfig, small_config
from heed_medical.more.attribution import finding_maps
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.findings import finding_value, findings_of
from heed_medical.pictures.layouts import find_pictures, list_pictures
from heed_medical.pictures.listers import CHEXPERT_FINDINGS
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.settings import PictureData

TWO = ("Edema", "Fracture")


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)


def values(root: Path, **changes: object) -> list[list[float]]:
    data = PictureData(findings=TWO, **changes)  # type: ignore[arg-type]
    return [findings_of(p, data).tolist() for p in list_pictures(root, data).pictures]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    cells = [("1", "0"), ("-1", "1.0"), ("", "-1.0"), ("0", "")]
    rows = []
    for number, (edema, fracture) in enumerate(cells):
        save(tmp_path / f"{number}.png")
        rows.append({"file": f"{number}.png", "Fracture": fracture, "Edema": edema})
    write_table(tmp_path / "labels.csv", rows)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [[1, 0], [math.nan, 1], [0, math.nan], [0, 0]]),
        ({"uncertain": "positive"}, [[1, 0], [1, 1], [0, 1], [0, 0]]),
        ({"uncertain": "negative"}, [[1, 0], [0, 1], [0, 0], [0, 0]]),
        ({"uncertain": "mixed"}, [[1, 0], [1, 1], [0, math.nan], [0, 0]]),
        ({"blank": "leave-out"}, [[1, 0], [math.nan, 1], [math.nan, math.nan], [0, math.nan]]),
    ],
)
def test_uncertain_and_blank_findings_follow_the_policy(
    table: Path, changes: dict[str, str], wanted: list[list[float]]
):
    np.testing.assert_array_equal(values(table, **changes), wanted)
    assert finding_value("-1", "Cardiomegaly", PictureData(uncertain="mixed")) == "negative"


def test_a_value_that_is_none_is_named(table: Path):
    path = table / "labels.csv"
    path.write_text(path.read_text().replace("1.0,-1", "2,-1"))
    data = PictureData(findings=TWO)
    listing = list_pictures(table, data)
    assert "row 3: has Fracture = '2', use 1, 0, -1 or blank" in listing.problems[0]
    with pytest.raises(InputError, match="row 3"):
        find_pictures(table, data, "train")
    with pytest.raises(InputError, match="has no column 'Oedema'"):
        list_pictures(table, PictureData(findings=("Oedema",)))


def test_chexpert_is_read_by_name_and_planned(tmp_path: Path):
    write_findings(tmp_path, train=24, test=6, side=64)
    data = plan_pictures(MedusaData(findings=FINDINGS), tmp_path)
    assert data.layout == "chexpert"
    with (tmp_path / "valid.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    test = find_pictures(tmp_path, data, "test")
    wanted = [[float(row[name]) for name in FINDINGS] for row in rows]
    assert [findings_of(p, data).tolist() for p in test] == wanted
    case = read_case(test[0], data)
    assert case.findings is not None
    assert case.findings.tolist() == wanted[0]
    found = check_pictures(data, tmp_path)
    assert not found.problems
    assert found.counts[-1]["Lung Opacity"] == sum(row[1] for row in wanted)
    train, val = ({p.patient for p in find_pictures(tmp_path, data, s)} for s in ("train", "val"))
    assert not train & val
    with pytest.raises(InputError, match="has no training picture with Fracture"):
        plan_pictures(MedusaData(findings=("Lung Opacity", "Fracture")), tmp_path)


def test_mimic_gives_all_findings_of_a_study(tmp_path: Path):
    labels, splits, views = [], [], []
    for number in range(3):
        subject, study, picture = f"1000000{number}", f"5000000{number}", f"d{number}"
        save(tmp_path / f"files/p10/p{subject}/s{study}/{picture}.jpg")
        blank = dict.fromkeys(sorted(CHEXPERT_FINDINGS), "")
        labels.append({"subject_id": subject, "study_id": study, **blank, TWO[number % 2]: "1.0"})
        splits.append(
            {"dicom_id": picture, "study_id": study, "subject_id": subject, "split": "train"}
        )
        views.append({"dicom_id": picture, "ViewPosition": "PA"})
    for part, rows in (("chexpert", labels), ("split", splits), ("metadata", views)):
        write_table(tmp_path / f"mimic-cxr-2.0.0-{part}.csv", rows)
    assert values(tmp_path) == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    "changes",
    [{"classes": ("a", "b")}, {"label": "Edema"}, {"balance": "classes"}, {"findings": TWO + TWO}],
)
def test_settings_that_have_no_effect_on_findings_are_refused(changes: dict):
    with pytest.raises(ValueError, match="findings"):
        PictureData(**({"findings": TWO} | changes))


def test_unknown_findings_have_neither_loss_nor_gradient():
    logits = torch.tensor([[0.3, -2.0], [1.5, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, math.nan], [math.nan, 0.0]])
    loss = findings_loss(logits, labels)
    wanted = (math.log1p(math.exp(-0.3)) + math.log(2)) / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad == 0).tolist() == [[False, True], [True, False]]
    assert findings_loss(logits, torch.full((2, 2), math.nan)).item() == 0


def test_the_published_head_has_its_parameters():
    with torch.device("meta"):
        model = MoreClassifier(MoreConfig(), classes=4)
    assert sum(p.numel() for p in model.parameters()) == 173_333_764


def test_an_xray_that_the_head_ignores_has_no_relevance():
    torch.manual_seed(0)
    config = small_config()
    model = MoreClassifier(config, classes=3).eval()
    inputs = {"xray": torch.randn(1, 3, 64, 64), "ecg": torch.randn(1, 12, 500)}
    found = finding_maps(model, inputs, 1)
    assert found["xray"].shape == (64, 64)
    assert found["xray"].max() > 0
    assert found["ecg_leads"].shape == (12, 500)
    with torch.no_grad():
        model.head.weight[1, : config.projection] = 0
    found = finding_maps(model, inputs, 1)
    assert found["xray"].max() == 0
    assert found["ecg"].sum() > 0


def test_a_pretrained_model_of_another_size_is_refused():
    classifier = MoreClassifier(small_config(), classes=2, inputs=("ecg",))
    other = small_config()
    model = More(MoreConfig(**(vars(other) | {"projection": 32})))
    with pytest.raises(ValueError, match=r"has no projectors\.ecg\.contract"):
        classifier.start_from(model)
    model = More(MoreConfig(**(vars(other) | {"modalities": ("xray", "text")})))
    with pytest.raises(ValueError, match="has no ecg"):
        classifier.start_from(model)
