"""Studies on disk: five layouts, their faults, and what the network gets of them."""

import csv
import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heed_core.errors import InputError
from heed_medical.reports.checking import check_reports
from heed_medical.reports.data import (
    StudyData,
    cut_case,
    plan_reports,
    read_study,
    to_batch,
)
from heed_medical.reports.layouts import find_inputs, list_studies, studies_of
from heed_medical.reports.phantoms import write_studies
from heed_medical.reports.settings import ReportData
from heed_medical.reports.words import clean_report

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
SMALL = ReportData(size=32, resize=40, threshold=1, most_words=20)
TEXTS = ("The lungs are clear.", "There is an effusion.", "The heart is large.")


def picture(path: Path, shade: int = 100, shape: tuple[int, int] = (50, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.linspace(0, shade, shape[0] * shape[1]).reshape(shape).astype(np.uint8)
    Image.fromarray(values).save(path)


def annotated(root: Path, content: dict | None = None) -> Path:
    entries = {}
    for split, text in zip(("train", "val", "test"), TEXTS, strict=True):
        picture(root / "images" / split / "0.png")
        picture(root / "images" / split / "1.png", shade=200)
        paths = [f"{split}/0.png", f"{split}/1.png"]
        entries[split] = [{"id": split, "report": text, "image_path": paths, "split": split}]
    (root / "annotation.json").write_text(json.dumps({**entries, **(content or {})}))
    return root


def test_the_annotation_of_r2gen(tmp_path):
    root = annotated(tmp_path)
    data = plan_reports(SMALL, root)
    assert data.layout == "r2gen"
    assert data.vocabulary == (".", "<unk>", "are", "clear", "lungs", "the")
    case = read_study(studies_of(root, data, "test")[0], data)
    assert case.report == "the heart is large ."
    assert case.numbers == (0, 6, 2, 2, 2, 1, 0)
    assert [p.shape for p in case.pictures] == [(32, 32)] * 2


def test_an_unknown_split_is_refused_with_the_keys(tmp_path):
    root = annotated(tmp_path, {"    ": []})
    with pytest.raises(InputError, match=r"unknown split '    '; its keys are 'train', 'val'"):
        list_studies(root, SMALL)


def test_broken_entries_are_named_all_and_may_be_skipped(tmp_path):
    bad = [{"id": "x"}, {"id": "y", "report": "Clear.", "image_path": []}, 3]
    good = {"id": "z", "report": "Clear.", "image_path": ["train/0.png"]}
    root = annotated(tmp_path, {"train": [*bad, good]})
    assert len(check_reports(SMALL, root).problems) == 3
    with pytest.raises(InputError, match=r"train\[0\]: has no report"):
        studies_of(root, SMALL, "train")
    assert [s.name for s in studies_of(root, replace(SMALL, on_error="skip"), "train")] == ["z"]


def test_a_missing_picture_names_its_study(tmp_path):
    root = annotated(tmp_path)
    (root / "images" / "test" / "1.png").unlink()
    data = plan_reports(SMALL, root)
    with pytest.raises(InputError, match=r"1\.png: does not exist \(study test\)"):
        read_study(studies_of(root, data, "test")[0], data)
    assert len(check_reports(data, root).problems) == 1


def test_a_lone_picture_is_repeated_or_left_out(tmp_path):
    picture(tmp_path / "a.png")
    study = find_inputs([tmp_path / "a.png"], views=2)[0]
    data = replace(SMALL, vocabulary=("<unk>", "a"))
    twice = read_study(study, data)
    assert twice.views == (True, True)
    assert np.array_equal(*twice.pictures)
    once = read_study(study, replace(data, lone="mask"))
    assert once.views == (True, False)
    assert once.pictures[0].any()
    assert not once.pictures[1].any()
    none = read_study(study, replace(data, pictures="ignored"))
    assert none.views == (False, False)
    assert not any(p.any() for p in none.pictures)


def test_a_table_with_rows_per_picture(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    rows = [
        {"file": "a.png", "id": "1", "text": TEXTS[0], "split": "train"},
        {"file": "b.png", "id": "1", "text": TEXTS[0], "split": "train"},
        {"file": "c.png", "id": "2", "text": TEXTS[1], "split": "test"},
    ]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    listing = list_studies(tmp_path, SMALL)
    assert [(s.name, len(s.pictures), s.split) for s in listing.studies] == [
        ("1", 2, "train"), ("2", 1, "test"),
    ]  # fmt: skip
    lines = [json.dumps({**row, "split": ""}) for row in rows]
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    assert {s.split for s in list_studies(tmp_path, SMALL).studies} <= {"train", "val", "test"}


def test_a_report_of_several_lines_keeps_its_words_apart(tmp_path):
    rows = 'file,text\na.png,"FINDINGS:\nThe heart\r\nis large."\nb.png,Clear.\n'
    (tmp_path / "labels.csv").write_text(rows, newline="")
    first, second = list_studies(tmp_path, SMALL).studies
    assert (first.report or "").split() == ["FINDINGS:", "The", "heart", "is", "large."]
    assert second.report == "Clear."


def test_a_report_with_a_comma_and_no_quotes_is_named(tmp_path):
    rows = "file,text,split\na.png,Clear.,train\nb.png,The heart, is normal. Clear.,train\n"
    (tmp_path / "labels.csv").write_text(rows + "c.png,Clear, too.,train\nd.png,Clear.,none\n")
    said = r"labels\.csv, row 3: has another number of fields than the header"
    with pytest.raises(InputError, match=said):
        studies_of(tmp_path, SMALL, "train")
    (study,) = studies_of(tmp_path, replace(SMALL, on_error="skip"), "train")
    assert study.name == "a"
    told = "\n".join(check_reports(SMALL, tmp_path).problems)
    assert all(f"row {number}: has " in told for number in (3, 4, 5))


def test_a_table_without_reports_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n")
    with pytest.raises(InputError, match=r"labels\.csv: has no column 'report'"):
        list_studies(tmp_path, SMALL)


def test_drawn_splits_keep_patients_together(tmp_path):
    lines = ["file,text,patient", *(f"{i}.png,Clear.,p{i // 3}" for i in range(60))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    studies = list_studies(tmp_path, SMALL).studies
    splits: dict[str, set] = {}
    for study in studies:
        splits.setdefault(study.patient, set()).add(study.split)
    assert all(len(names) == 1 for names in splits.values())
    assert {s.split for s in studies} == {"train", "val", "test"}


def test_missing_validation_is_drawn_and_given_splits_stay(tmp_path):
    rows = [(i, "test" if i >= 48 else "train") for i in range(60)]
    lines = ["file,text,patient,split", *(f"{i}.png,Clear.,p{i // 3},{s}" for i, s in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    studies = list_studies(tmp_path, SMALL).studies
    assert [s.split for s in studies if int(s.name) >= 48] == ["test"] * 12
    val = {s.patient for s in studies if s.split == "val"}
    train = {s.patient for s in studies if s.split == "train"}
    assert (len(val), len(train)) == (2, 14)
    lines[1:4] = [f"{i}.png,Clear.,p0,{'' if i else 'test'}" for i in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    again = list_studies(tmp_path, SMALL).studies
    assert {s.split for s in again if s.patient == "p0"} == {"test"}


def test_the_raw_sources_of_indiana(tmp_path):
    xml = tmp_path / "xml"
    for number in (10, 11, 12):
        path = xml / "ecgen-radiology" / f"{number}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '<e><AbstractText Label="FINDINGS">Clear lungs.</AbstractText>'
            '<AbstractText Label="IMPRESSION">Normal.</AbstractText>'
            f'<parentImage id="CXR{number}"/></e>'
        )
    both = replace(SMALL, sections=("findings", "impression"))
    found = list_studies(xml, both)
    assert found.layout == "openi"
    assert [(s.name, s.split) for s in found.studies] == [
        ("10", "test"), ("11", "val"), ("12", "train"),
    ]  # fmt: skip
    assert found.studies[0].report == "Clear lungs. Normal."
    (xml / "ecgen-radiology" / "13.xml").write_text("<e><broken")
    assert "13.xml: is not readable XML" in list_studies(xml, both).problems[0]

    table = tmp_path / "kaggle"
    table.mkdir()
    (table / "indiana_reports.csv").write_text("uid,findings\n1,Clear lungs.\n2,\n")
    (table / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,b.png,Lateral\n1,a.png,Frontal\n"
    )
    (study,) = list_studies(table, SMALL).studies
    assert [p.name for p in study.pictures] == ["a.png", "b.png"]


def test_every_broken_row_of_indiana_is_told(tmp_path):
    (tmp_path / "indiana_reports.csv").write_text(
        "uid,findings\n1,Clear lungs.\nx,Clear.\n2,a,b\n2,Clear.\n3,\n1,Large heart.\n"
    )
    (tmp_path / "indiana_projections.csv").write_text(
        "uid,filename,projection\n1,a.png,Frontal\n,b.png,Frontal\n2,,Frontal\n"
    )
    listing = list_studies(tmp_path, SMALL)
    assert [(s.name, s.report) for s in listing.studies] == [("1", "Clear lungs.")]
    assert listing.left_out == 2
    assert [line.partition(", ")[2].partition(";")[0] for line in listing.problems[:-1]] == [
        "row 4: has another number of fields than the header",
        "row 3: has no uid or filename",
        "row 4: has no uid or filename",
        "row 3: has no uid that is a number",
    ]
    assert "holds the study '1' twice" in listing.problems[-1]


def test_a_study_that_comes_twice_is_told_and_the_first_counts(tmp_path):
    first, again = (
        {"id": "z", "report": text, "image_path": ["train/0.png"]} for text in ("Clear.", "Large.")
    )
    root = annotated(tmp_path, {"train": [first, again, again]})
    told = [x for x in check_reports(SMALL, root).problems if "holds the study 'z' twice" in x]
    assert len(told) == 2
    with pytest.raises(InputError, match="holds the study 'z' twice"):
        plan_reports(SMALL, root)
    (study,) = studies_of(root, replace(SMALL, on_error="skip"), "train")
    assert study.report == "Clear."


def test_mimic_joins_split_and_reports(tmp_path):
    rows = "dicom_id,study_id,subject_id,split\nd1,5,10000032,train\nd2,6,10000032,validate\n"
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(gzip.compress(rows.encode()))
    folder = tmp_path / "files" / "p10" / "p10000032"
    folder.mkdir(parents=True)
    (folder / "s5.txt").write_text(" EXAM: chest\n FINDINGS:\n Clear\n lungs.\n\n IMPRESSION: ok\n")
    listing = list_studies(tmp_path, SMALL)
    (study,) = listing.studies
    assert study.name == "p10000032/s5/d1"
    assert study.report == "Clear\n lungs."
    assert study.pictures == (folder / "s5" / "d1.jpg",)
    assert "s6.txt: the report is missing" in listing.problems[0]
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(
        gzip.compress((rows + "d3,5,10000032,dev2\nd4,,10000032,test\nd5,5\n").encode())
    )
    listing = list_studies(tmp_path, SMALL)
    assert len(listing.studies) == 1
    told = "\n".join(listing.problems)
    for said in ("row 4: has the unknown split 'dev2'", "row 5: lacks", "row 6: has another numb"):
        assert said in told


def test_folders_without_a_list_are_refused(tmp_path):
    with pytest.raises(InputError, match="is in no layout that is known"):
        list_studies(tmp_path, SMALL)
    with pytest.raises(InputError, match="no such folder"):
        list_studies(tmp_path / "none", SMALL)
    with pytest.raises(InputError, match="holds no picture"):
        find_inputs([tmp_path], views=2)


def test_an_empty_report_is_learnt_as_a_full_stop_and_told(tmp_path):
    entry = {"id": "e", "report": " (*) ", "image_path": ["train/0.png"]}
    root = annotated(tmp_path, {"val": [entry]})
    assert clean_report(entry["report"]).split() == ["."]
    assert any("report of e is empty" in line for line in check_reports(SMALL, root).warnings)


RELEASES = {
    (2069, 296, 590): "this is IU X-Ray as released with R2Gen",
    (3062, 382, 382): "this is another circulated copy of IU X-Ray, not that of R2Gen's numbers",
    (2069, 296, 589): "no release that is known",
    (270790, 2130, 3858): "this is MIMIC-CXR as released with R2Gen",
}


@pytest.mark.parametrize(
    "counts",
    [pytest.param(c, marks=[pytest.mark.slow] if sum(c) > 9999 else []) for c in RELEASES],
)
def test_check_says_which_release_an_annotation_is(tmp_path, counts):
    entries = {
        split: [
            {"id": f"{split}{n}", "report": "Clear.", "image_path": ["a.png"]} for n in range(c)
        ]
        for split, c in zip(("train", "val", "test"), counts, strict=True)
    }
    (tmp_path / "annotation.json").write_text(json.dumps(entries))
    found = check_reports(replace(SMALL, pictures="ignored"), tmp_path)
    assert not found.problems
    told = " / ".join(map(str, counts))
    assert found.warnings[0] == f"{tmp_path}: {told} studies: {RELEASES[counts]}"


def test_words_that_are_all_rare_are_refused(tmp_path):
    with pytest.raises(InputError, match="no word occurs 9 times in the 1 training reports"):
        plan_reports(replace(SMALL, threshold=9), annotated(tmp_path))


def test_folders_become_studies_and_large_ones_become_pictures(tmp_path):
    root = annotated(tmp_path)
    assert [s.name for s in find_inputs([root], views=2)] == [
        "images/test", "images/train", "images/val",
    ]  # fmt: skip
    assert len(find_inputs([root], views=1)) == 6


def test_pictures_in_linked_folders_are_found_and_hidden_ones_are_not(tmp_path):
    root = annotated(tmp_path / "store") / "images" / "train"
    (root / "._x.png").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(root)
    (study,) = find_inputs([tmp_path / "in"], views=2)
    assert study.name == "link"
    assert len(study.pictures) == 2


def test_batches_hold_what_the_network_takes(tmp_path):
    root = annotated(tmp_path)
    data = plan_reports(SMALL, root)
    studies = [studies_of(root, data, split)[0] for split in ("train", "test")]
    cases = [StudyData(studies, data, training=True)[i] for i in range(2)]
    assert cases[0].pictures[0].shape == (40, 48)
    cut = [cut_case(case, np.random.default_rng(0), size=32) for case in cases]
    batch = to_batch(cut)
    assert batch["images"].shape == (2, 2, 3, 32, 32)
    assert batch["tokens"].tolist() == [[0, 6, 5, 3, 4, 1, 0], [0, 6, 2, 2, 2, 1, 0]]
    assert batch["lengths"].tolist() == [7, 7]
    plain, mirrored = (
        cut_case(cases[0], np.random.default_rng(0), size=32, flip=flip) for flip in (0.0, 1.0)
    )
    assert np.array_equal(plain.pictures[0][:, ::-1], mirrored.pictures[0])
    grey = torch.from_numpy(cut[0].pictures[0])
    torch.testing.assert_close(batch["images"][0, 0, 0], (grey - 0.485) / 0.229)


def test_the_sample_is_in_order_and_needs_both_views(tmp_path):
    write_studies(tmp_path, train=60, val=6, test=8, seed=1)
    found = check_reports(replace(SMALL, threshold=3), tmp_path)
    assert not found.problems
    assert [row["studies"] for row in found.counts] == [60, 6, 8]


@pytest.mark.parametrize(
    "changes",
    [{"views": 0}, {"size": 300}, {"most_words": 2}, {"write": ()}, {"sections": ()}],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ReportData(**changes)


def test_real_reports_of_indiana(tmp_path):
    archive = DATA / "restricted" / "iu-xray-reports" / "NLMCXR_reports.tgz"
    if not archive.is_file():
        pytest.skip(f"needs {archive}")
    import tarfile

    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    data = ReportData(pictures="ignored")
    found = check_reports(data, tmp_path)
    assert not found.problems
    studies = {row["split"]: int(row["studies"]) for row in found.counts}
    assert sum(studies.values()) > 3000
    assert any("reports without findings or picture are left out" in x for x in found.warnings)
    train, test = found.counts[0], found.counts[2]
    assert 25 < train["mean length"] < 45
    assert test["unknown words"] / test["words"] < 0.05


def test_real_pairs_of_pictures_and_notes():
    root = DATA / "restricted" / "cxr-notes"
    if not root.is_dir():
        pytest.skip(f"needs {root}")
    data = plan_reports(ReportData(views=1), root)
    assert data.layout == "table"
    counts = {s: len(studies_of(root, data, s)) for s in ("train", "val", "test")}
    assert counts == {"train": 144, "val": 21, "test": 41}
    case = read_study(studies_of(root, data, "test")[0], data)
    assert case.pictures[0].shape == (224, 224)
