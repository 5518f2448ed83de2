"""Labels of released chest X-rays of which there are several, and their known counts."""

import csv
import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.pictures.checking import COVIDX, check_pictures, compare_release
from heed_medical.pictures.layouts import find_pictures, layout_of, list_pictures
from heed_medical.pictures.planning import plan_pictures
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData

RSNA = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(path)


def rsna(root: Path) -> list[dict[str, object]]:
    """Nine patients of three classes, those with an opacity in two rows; pictures are empty."""
    (root / "stage_2_train_images").mkdir()
    classes, targets = [], []
    for number in range(9):
        name, kind = f"id{number}", RSNA[number % 3]
        (root / "stage_2_train_images" / f"{name}.dcm").touch()
        classes += [{"patientId": name, "class": kind}] * (1 + (number % 3 == 2))
        targets.append({"patientId": name, "x": "", "Target": int(number % 3 == 2)})
    write(root / "stage_2_train_labels.csv", targets)
    write(root / "stage_2_detailed_class_info.csv", classes)
    return classes


def test_rsna_has_three_classes_where_they_are_asked_for(tmp_path: Path):
    classes = rsna(tmp_path)
    for label in ("", "Target"):
        data = plan_pictures(PictureData(label=label), tmp_path)
        assert data.classes == ("negative", "positive")
    data = plan_pictures(PictureData(label="class"), tmp_path)
    assert (data.layout, data.classes) == ("rsna", RSNA)
    listing = list_pictures(tmp_path, data)
    assert Counter(p.label for p in listing.pictures) == dict.fromkeys(RSNA, 3)
    assert not listing.problems
    extra = [{"patientId": "id0", "class": RSNA[2]}, {"patientId": "id1", "class": ""}]
    write(tmp_path / "stage_2_detailed_class_info.csv", [*classes, *extra])
    listing = list_pictures(tmp_path, data)
    first, second = listing.problems
    assert f"row 14: has the class 'Lung Opacity' of id0, in an earlier row it is {RSNA[0]!r}" in (
        first
    )
    assert "row 15: has no class" in second
    assert "id0" not in {p.name for p in listing.pictures}
    with pytest.raises(InputError, match="row 14: has the class"):
        find_pictures(tmp_path, data, "train")


def test_a_label_that_rsna_does_not_have_is_refused(tmp_path: Path):
    rsna(tmp_path)
    with pytest.raises(InputError, match=r"--data\.label x is no column of RSNA; use Target"):
        list_pictures(tmp_path, PictureData(label="x"))
    (tmp_path / "stage_2_detailed_class_info.csv").unlink()
    with pytest.raises(InputError, match=r"stage_2_detailed_class_info\.csv: does not exist"):
        list_pictures(tmp_path, PictureData(label="class"))


def mimic(root: Path, labellers: Mapping[str, str]) -> None:
    """Four studies; each labeller's values of pneumonia."""
    rows = []
    for number in range(4):
        subject, study, dicom = f"1000000{number}", f"5000000{number}", f"d{number}"
        save(root / f"files/p10/p{subject}/s{study}/{dicom}.jpg")
        ids = {"subject_id": subject, "study_id": study, "dicom_id": dicom}
        rows.append({**ids, "split": "train", "ViewPosition": "PA"})
    for part in ("split", "metadata"):
        write(root / f"mimic-cxr-2.0.0-{part}.csv.gz", rows)
    for name, values in labellers.items():
        labels = [{**r, "Pneumonia": v} for r, v in zip(rows, values, strict=True)]
        write(root / f"mimic-cxr-2.0.0-{name}.csv.gz", labels)


def positives(root: Path, **settings: str) -> int:
    data = PictureData(**settings)
    assert layout_of(root, data) == "mimic"
    return sum(p.label == "positive" for p in list_pictures(root, data).pictures)


def test_the_labeller_of_mimic_is_chosen(tmp_path: Path):
    mimic(tmp_path, {"chexpert": "0001", "negbio": "0111"})
    assert positives(tmp_path) == positives(tmp_path, table="chexpert") == 1
    for table in ("negbio", "mimic-cxr-2.0.0-negbio.csv", "mimic-cxr-2.0.0-negbio.csv.gz"):
        assert positives(tmp_path, table=table) == 3
    assert positives(tmp_path, table="negbio", layout="mimic") == 3
    assert plan_pictures(PictureData(table="negbio"), tmp_path).layout == "mimic"
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    assert positives(tmp_path) == 3
    with pytest.raises(InputError, match=r"has no labels of chexpert; add one of mimic-cxr-2"):
        list_pictures(tmp_path, PictureData(layout="mimic", table="chexpert"))


def test_broken_rows_of_mimic_are_all_told(tmp_path: Path):
    mimic(tmp_path, {"negbio": "0111"})
    for part in ("split", "metadata", "negbio"):
        with gzip.open(tmp_path / f"mimic-cxr-2.0.0-{part}.csv.gz", "at") as stream:
            stream.write("cut,off\n")
    problems = check_pictures(PictureData(), tmp_path).problems
    for part in ("split", "metadata", "negbio"):
        assert any(f"{part}.csv.gz, row 6: has another number" in line for line in problems)


def released(name: str) -> list[PictureFile]:
    """Pictures with the counts of a release, as many patients as it has where that is known."""
    release, pictures = COVIDX[name], []
    for part, counts in (("train", release.train), ("test", release.test)):
        for label, count in counts.items():
            spaced = release.spaced.get(label, 0) if part == "train" else 0
            for number in range(count):
                place = f"x/{part}_COVIDx{name}.txt, row {len(pictures)}"
                patient = f"{'COVID ' if number < spaced else ''}{len(pictures)}"
                pictures.append(
                    PictureFile(
                        name=place, path=Path(place), label=label, patient=patient, place=place
                    )
                )
    return pictures


@pytest.mark.parametrize("name", ["9A", "8B", "8A"])
def test_the_lists_of_a_release_are_recognised(name: str):
    pictures = released(name)
    lines = compare_release(Path("x"), name, COVIDX[name], pictures)
    train, test = (sum(getattr(COVIDX[name], part).values()) for part in ("train", "test"))
    assert lines == [
        f"x: these are the lists of COVIDx {name}: {train} and {test} pictures in train and test"
    ]
    (line,) = compare_release(Path("x"), name, COVIDX[name], pictures[:-1])
    assert f"the lists are called {name}, which has " in line
    assert "in test; here are " in line


def test_the_counts_of_the_releases_are_those_of_their_authors():
    assert sum(COVIDX["9B"].train.values()) == 30482
    assert sum(COVIDX["9A"].train.values()) == 30130
    assert COVIDX["9B"].patients == (16648, 378)
    # 8B: 1,215 positive rows of four fields, 943 of five
    assert COVIDX["8B"].train["positive"] - COVIDX["8B"].spaced["positive"] == 1215


def test_patients_and_rows_of_five_fields_are_compared():
    pictures = released("9B")
    lines = compare_release(Path("x"), "9B", COVIDX["9B"], pictures)
    assert [line.partition("which has ")[2] for line in lines] == [
        "16648 patients in train, counted by id; here are 30482 patients",
        "378 patients in test, counted by id; here are 400 patients",
    ]
    ids = [str(n % 16648) if n < 30482 else f"t{n % 378}" for n in range(len(pictures))]
    few = [replace(p, patient=one) for p, one in zip(pictures, ids, strict=True)]
    assert compare_release(Path("x"), "9B", COVIDX["9B"], few) == [
        "x: these are the lists of COVIDx 9B: 30482 and 400 pictures of 16648 and 378 patients in "
        "train and test"
    ]
    joined = [replace(p, patient=p.patient.replace(" ", "_")) for p in released("8B")]
    (line,) = compare_release(Path("x"), "8B", COVIDX["8B"], joined)
    assert "which has 943 positive in train of patients with a space in the id" in line
    assert line.endswith("here are none")
