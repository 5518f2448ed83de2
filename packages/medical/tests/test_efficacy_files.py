"""A labeller's two files: columns and rows in any order, rows that do not pair."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from heed_core.errors import InputError
from heed_medical.reports.efficacy import FINDINGS, match_findings, read_findings

CHEXBERT = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
"""In the order in which CheXbert writes them."""


def write(path: Path, naming: str, rows: dict[str, dict[str, str]], names=FINDINGS) -> Path:
    """A csv with a column of names and the findings that are given; others are blank."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [naming, *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({naming: name, **cells} for name, cells in rows.items())
    return path


def of(labels: np.ndarray, finding: str) -> list[float]:
    return labels[:, FINDINGS.index(finding)].tolist()


def test_files_of_chexbert_pair_by_row_as_their_reports_differ(tmp_path: Path):
    truth = {"Edema, mild.": {"Edema": "1.0"}, "Clear.": {"No Finding": "1.0", "Edema": "0.0"}}
    found = {"Edema.": {"Edema": "-1.0"}, "Clear lungs.": {"Edema": "1.0"}}
    first = write(tmp_path / "truth.csv", "Report Impression", truth, CHEXBERT)
    second = write(tmp_path / "found.csv", "Report Impression", found, CHEXBERT)
    true, called = match_findings(first, second)
    assert of(true, "Edema") == [1, 0]
    assert of(called, "Edema") == [-1, 1]
    assert of(true, "No Finding")[1] == 1
    assert np.isnan(of(true, "Fracture")).all()
    third = write(tmp_path / "few.csv", "Report Impression", {"Edema.": {}}, CHEXBERT)
    with pytest.raises(InputError, match=r"few\.csv: has 1 rows?, .*truth\.csv has 2"):
        match_findings(first, third)


@pytest.mark.parametrize("naming", ["Reports", "report", "text"])
def test_equal_texts_may_come_again(tmp_path: Path, naming: str):
    first = write(tmp_path / "truth.csv", naming, {"a": {"Edema": "1"}, "b": {}})
    second = write(tmp_path / "found.csv", naming, {"same": {"Edema": "1"}})
    second.write_text(second.read_text() + second.read_text().splitlines()[1] + "\n")
    assert of(match_findings(first, second)[1], "Edema") == [1, 1]


@pytest.mark.parametrize("naming", ["id", "Study_ID", "image_id", "case"])
def test_rows_are_paired_by_id_in_any_order_of_rows_and_columns(tmp_path: Path, naming: str):
    rows = {name: {"Edema": value} for name, value in zip("abc", ("1", "0", "-1"), strict=True)}
    first = write(tmp_path / "truth.csv", naming, rows)
    turned = dict(reversed(rows.items()))
    second = write(tmp_path / "found.csv", naming.lower(), turned, sorted(FINDINGS))
    np.testing.assert_array_equal(*match_findings(first, second))


def refused(first: Path, second: Path) -> str:
    with pytest.raises(InputError) as error:
        match_findings(first, second)
    return str(error.value)


def test_rows_that_are_missing_or_come_twice_are_named(tmp_path: Path):
    rows = {name: {"Edema": "1"} for name in ("s1", "s2", "s3")}
    whole = write(tmp_path / "truth.csv", "id", rows)
    few = write(tmp_path / "few.csv", "id", {"s2": {}, "s9": {}})
    assert refused(whole, few) == f"{few}: has no row of s1, s3, which {whole} has"
    more = write(tmp_path / "more.csv", "id", rows | {"s7": {}})
    assert refused(whole, more) == f"{more}: has a row of s7, which {whole} does not have"
    twice = write(tmp_path / "twice.csv", "id", rows)
    lines = twice.read_text().splitlines()
    twice.write_text("\n".join([*lines, lines[2]]) + "\n")
    for pair in ((whole, twice), (twice, whole), (twice, twice)):
        assert re.search(r"twice\.csv, row 5: names 's2', as row 3 does", refused(*pair))
    unnamed = write(tmp_path / "unnamed.csv", "Reports", rows)
    line = refused(whole, unnamed)
    assert line == (
        f"{unnamed}: has no column that names its reports, {whole} has; give both id, study_id, "
        "image_id or case, or neither"
    )


def test_a_finding_may_be_in_another_case(tmp_path: Path):
    path = write(tmp_path / "a.csv", "id", {"x": {"EDEMA": "1"}}, [n.upper() for n in FINDINGS])
    assert of(read_findings(path)[1], "Edema") == [1]
