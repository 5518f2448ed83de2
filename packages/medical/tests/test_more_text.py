"""What MoRE reads of reports: cleaned, introduced, and replaced where there is none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_medical.ecg.writing import write_record
from heed_medical.more import small_config
from heed_medical.more.pairing import report_of_findings
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import StudySet, clean_report, find_studies, introduced


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "FINAL REPORT FINDINGS: Clear lungs. IMPRESSION: No effusion.",
            "Clear lungs. No effusion.",
        ),
        ("WET READ: Edema. findings: None.", "Edema. None."),
        ("EXAMINATION: Chest (AP).\n\n COMPARISON: None.", "Chest (AP). None."),
        ("REASON FOR EXAM:  Cough. CHEST, PA AND LATERAL: Clear.", "Cough. Clear."),
        ("Compared with ___, the heart is large.", "Compared with , the heart is large."),
        ("Seen at 10:45 by Dr. ___. No effusion.", "No effusion."),
        ("Telephoned at 9:05AM. Clear.", "Clear."),
        ("Told at 11:20 p.m. on ___. Clear.", "Clear."),
        ("Read at 3 p.m. by ___. Clear.", "Clear."),
        ("Read at 10 AM. Clear.", "Clear."),
        ("A tube ends 5 cm above the carina: 2 cm more. At T10 AP view.", None),
        ("sinus rhythm. seen at 9:15. wide qrs.", "sinus rhythm. wide qrs."),
        ("sinus rhythm. compared with tracing of 12:9:91, it is the same.", None),
        ("Seen by Dr. ___ at 10:45. Clear.", "Clear."),
        ("A 1:99 chance.", None),
        ("10:45", ""),
        ("FINDINGS: ___", ""),
    ],
)
def test_headers_lines_and_times_of_day_are_taken_off(text: str, wanted: str | None):
    assert clean_report(text) == (text if wanted is None else wanted)


def test_a_report_without_statements_of_the_ecg_says_so():
    xray = "The report from Xray is: Clear."
    assert introduced(("FINDINGS: Clear.", "Sinus rhythm")) == (
        xray, "The report from ECG is: Sinus rhythm",
    )  # fmt: skip
    assert introduced(("Clear.", ""), with_ecg=True) == (
        xray, "The report from ECG is: ECG note not available.",
    )  # fmt: skip
    assert introduced(("Clear.", ""), with_ecg=False) == (xray, "")
    assert introduced(("", "Sinus rhythm"), with_ecg=True) == (
        "", "The report from ECG is: Sinus rhythm",
    )  # fmt: skip
    assert introduced(("", ""), with_ecg=True) is None


def test_studies_say_so_where_they_have_an_ecg(tmp_path: Path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "a.png")
    write_record(tmp_path / "e", np.random.default_rng(0).normal(size=(12, 1000)), rate_hz=100)
    rows = ["a.png,e.hea,Clear.,", "a.png,,Clear.,", ",e.hea,,", "a.png,e.hea,,Sinus rhythm"]
    text = "\n".join(["xray_path,ecg_path,xray_report,ecg_report", *rows]) + "\n"
    (tmp_path / "manifest.csv").write_text(text)
    files, config = find_studies(tmp_path, MoreData()), small_config()
    none = "The report from ECG is: ECG note not available."
    texts = [study.text for study in StudySet(files, MoreData(), config)]
    assert [text and text[1] for text in texts] == [
        none, "", None, "The report from ECG is: Sinus rhythm",
    ]  # fmt: skip
    without = replace(config, modalities=("xray", "text"))
    texts = [study.text for study in StudySet(files[:2], MoreData(), without)]
    assert [text and text[1] for text in texts] == ["", ""]


def test_findings_stand_for_a_report_that_is_empty():
    labels = {"Edema": "1", "Fracture": "0", "Pneumonia": "-1", "Cardiomegaly": "1"}
    labels |= {"Atelectasis": "-1", "Lung Lesion": ""}
    assert report_of_findings(labels) == (
        "Edema, Cardiomegaly is present. uncertain finding of Pneumonia, Atelectasis"
    )
    assert report_of_findings({"Edema": "1"}) == "Edema is present."
    assert report_of_findings({"Edema": "-1"}) == "uncertain finding of Edema"
    assert report_of_findings({"Edema": "0", "Fracture": ""}) == ""
