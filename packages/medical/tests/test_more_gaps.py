"""What studies lack, and how long their ECGs are by their headers."""

from pathlib import Path

import numpy as np
import pytest

from heed_medical.ecg.reading import read_ecg, stated_duration_s
from heed_medical.ecg.writing import write_record
from heed_medical.more import MODALITIES
from heed_medical.more.gaps import lacking, padded
from heed_medical.more.studies import StudyFile


def test_each_kind_that_is_lacking_is_counted_once():
    place = Path("a")
    studies = [
        StudyFile(name="a", xray=place, ecg=place, report=("Clear.", "")),
        StudyFile(name="b", ecg=place, report=("FINDINGS: ___", "")),
        StudyFile(name="c", ecg=place),
    ]
    assert lacking(studies, MODALITIES) == [
        "2 of 3 studies have no X-ray", "2 of 3 studies have no report",
    ]  # fmt: skip
    assert lacking(studies, ("ecg", "text")) == ["2 of 3 studies have no report"]
    assert lacking(studies[:1], MODALITIES) == []


def test_a_header_states_how_long_a_record_is(tmp_path: Path):
    signals = np.random.default_rng(0).normal(size=(12, 1250))
    path = write_record(tmp_path / "a", signals, rate_hz=500)
    for name in (path, path.with_suffix(".dat"), path.with_suffix("")):
        assert stated_duration_s(name) == 2.5 == read_ecg(name).duration_s
    header = path.read_text()
    path.write_text("# a comment\n" + header.replace(" 500 ", " 500/0.1(5) ", 1))
    assert stated_duration_s(path) == 2.5


@pytest.mark.parametrize("line", ["", "# only this", "a 12", "a 12 500", "a 12 x 10", "a 12 0 10"])
def test_a_header_that_states_nothing_is_left_to_the_reader(tmp_path: Path, line: str):
    (tmp_path / "a.hea").write_text(line)
    assert stated_duration_s(tmp_path / "a.hea") is None
    assert stated_duration_s(tmp_path / "none.hea") is None


def test_short_ecgs_are_counted_once_each(tmp_path: Path):
    rng = np.random.default_rng(0)
    lengths = {"short": 320, "shorter": 280, "just": 500, "long": 900}
    paths = {
        name: write_record(tmp_path / name, rng.normal(size=(12, count)), rate_hz=100)
        for name, count in lengths.items()
    }
    studies = [StudyFile(name=name, ecg=path) for name, path in paths.items()]
    again = StudyFile(name="again", ecg=paths["short"])
    assert padded([*studies, again, StudyFile(name="none")], 500) == [
        "2 of 4 ECGs last less than 5 s (the shortest 2.8 s); zeros follow them"
    ]
    assert padded(studies[2:], 500) == []
