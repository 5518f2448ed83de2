"""What the ECG machine's statements become in the pairs of MIMIC-CXR and MIMIC-IV-ECG."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from heed_medical.more.pairing import pair_mimic
from heed_medical.more.settings import CHEXPERT


def write(path: Path, names: Sequence[str], values: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([names, values])


@pytest.mark.parametrize(("given", "said"), [({}, 7), ({"statements": 18}, 18)])
def test_the_first_statements_are_the_report(given: dict, said: int, tmp_path: Path):
    cxr, ecg = tmp_path / "cxr", tmp_path / "ecg"
    shot = {"subject_id": "10000001", "study_id": "5", "dicom_id": "a", "ViewPosition": "PA",
            "StudyDate": "21800101"}  # fmt: skip
    write(cxr / "mimic-cxr-2.0.0-metadata.csv", list(shot), list(shot.values()))
    split = ("dicom_id", "subject_id", "split")
    write(cxr / "mimic-cxr-2.0.0-split.csv", split, ("a", "10000001", "test"))
    findings = ("study_id", *sorted(CHEXPERT))
    write(cxr / "mimic-cxr-2.0.0-chexpert.csv", findings, ("5", *[""] * len(CHEXPERT)))
    record = ("subject_id", "study_id", "ecg_time", "path")
    write(ecg / "record_list.csv", record, ("10000001", "41", "2180-01-02 10:00:00", "files/41"))
    words = [f"word{number}" for number in range(18)]
    columns = ("subject_id", "study_id", *(f"report_{number}" for number in range(18)))
    write(ecg / "machine_measurements.csv", columns, ("10000001", "41", *words))
    (row,) = pair_mimic(cxr, ecg, out=tmp_path, **given).rows
    assert row["ecg_report"] == " ".join(words[:said])
