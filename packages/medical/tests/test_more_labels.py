"""Uncertain and blank findings of studies: one policy for what is read, learnt and checked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.more.checking import check_studies
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import find_studies

FINDINGS = ("Cardiomegaly", "Edema", "Fracture")
CELLS = ["1,0,0", "-1,-1.0,-1", ",1.0,", "0,,1"]
"""Of four training studies, in the order of `FINDINGS`."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    rows = [f"{n},a.png,Note {n}.,train,{cells}" for n, cells in enumerate(CELLS)]
    head = ",".join(["name", "xray_path", "xray_report", "split", *FINDINGS])
    (tmp_path / "manifest.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "unsure", "unnamed"),
    [
        ({}, (None, None, None), 0),
        ({"uncertain": "positive"}, (1, 1, 1), 0),
        ({"uncertain": "negative"}, (0, 0, 0), 0),
        ({"uncertain": "mixed"}, (0, 1, None), 0),
        ({"blank": "leave-out"}, (None, None, None), None),
    ],
)
def test_uncertain_and_blank_findings_follow_the_policy(
    root: Path, changes: dict, unsure: tuple, unnamed: int | None
):
    studies = find_studies(root, MoreData(**changes))
    found = [tuple(study.labels[name] for name in FINDINGS) for study in studies]
    assert found == [(1, 0, 0), unsure, (unnamed, 1, unnamed), (0, unnamed, 1)]
    assert [study.uncertain for study in studies] == [(), FINDINGS, (), ()]


def test_uncertain_findings_count_only_where_they_are_asked_for(root: Path):
    studies = find_studies(root, MoreData(labels=("Edema",)))
    assert [study.uncertain for study in studies] == [(), ("Edema",), (), ()]


def test_a_check_tells_what_uncertain_and_blank_findings_count_as(root: Path):
    warnings = check_studies(MoreData(uncertain="mixed"), root).warnings
    lines = [line.removeprefix(f"{root}: ") for line in warnings]
    assert lines[-3:] == [
        "Cardiomegaly: uncertain in 1 of 4 studies (negative), not mentioned in 1 of 4 studies "
        "(negative)",
        "Edema: uncertain in 1 of 4 studies (positive), not mentioned in 1 of 4 studies (negative)",
        "Fracture: uncertain in 1 of 4 studies (left out), not mentioned in 1 of 4 studies "
        "(negative)",
    ]


def test_a_label_that_is_none_is_named(root: Path):
    path = root / "manifest.csv"
    path.write_text(path.read_text().replace("0,,1", "0,,maybe"))
    with pytest.raises(InputError, match=r"row 5: has Fracture = 'maybe', use 1, 0, -1 or blank"):
        find_studies(root, MoreData())
