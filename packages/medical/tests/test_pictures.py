"""Lists of labelled pictures in their real layouts, reading, augmentation, even batches."""

import csv
import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from heed_core.errors import InputError
from heed_medical.medusa.inputs import MedusaData, TrainData, read_case, to_batch, vary_sample
from heed_medical.medusa.phantoms import make_chest, write_chests, write_lungs
from heed_medical.pictures.augmentation import (
    PictureAugmentation,
    apply_change,
    augment_pictures,
    draw_change,
)
from heed_medical.pictures.batches import even_groups, groups_apart
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.layouts import find_inputs, find_pictures, list_pictures
from heed_medical.pictures.planning import order_classes, plan_pictures
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
STILL = PictureAugmentation(
    flip_probability=0.0,
    rotation_deg=0.0,
    shift=0.0,
    zoom=0.0,
    aspect_probability=0.0,
    brightness=0.0,
)


def save(path: Path, value: int = 100, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size, value, dtype=np.uint8)
    pixels[0, 0] = 255 - value
    Image.fromarray(pixels).save(path)
    return path


def save_dicom(path: Path, pixels: np.ndarray, **fields: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = fields.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = bits - 1, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Modality = "DX"
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    content = stream.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve pictures of six patients, in labels.csv."""
    rows = []
    for number in range(12):
        name = f"images/p{number}.png"
        save(tmp_path / name, value=10 * number)
        split = "train" if number < 6 else "val" if number < 8 else "test"
        rows.append(
            {
                "file": name,
                "label": ("normal", "sick")[number % 2],
                "kind": ("x", "y", "z")[number % 3],
                "patient": f"q{number // 2}",
                "source": "here",
                "split": split,
            }
        )
    write_csv(tmp_path / "labels.csv", rows)
    return tmp_path


def edit(root: Path, row: int, **changes: str) -> None:
    with (root / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rows[row].update(changes)
    write_csv(root / "labels.csv", rows)


def test_a_table_gives_labels_splits_patients_and_sources(table: Path):
    data = plan_pictures(PictureData(), table)
    assert (data.layout, data.classes) == ("table", ("normal", "sick"))
    assert [len(find_pictures(table, data, s)) for s in ("train", "val", "test")] == [6, 2, 4]
    first = find_pictures(table, data, "train")[0]
    assert (first.name, first.label, first.patient) == ("images/p0", "normal", "q0")
    assert first.columns["kind"] == "x"


def test_json_lines_are_a_table_too(table: Path):
    with (table / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    (table / "labels.csv").unlink()
    lines = [
        json.dumps({**row, "label": None if row["file"].endswith("p3.png") else row["label"]})
        for row in rows
    ]
    (table / "list.jsonl").write_text("\n".join(lines))
    listing = list_pictures(table, PictureData())
    assert listing.layout == "table"
    assert len(listing.pictures) == 11
    assert "row 4: has no label" in listing.problems[0]


def test_another_column_can_be_the_label_and_rows_can_be_chosen(table: Path):
    data = plan_pictures(PictureData(label="kind", only=("kind=x", "kind=z")), table)
    assert data.classes == ("x", "z")
    assert len(find_pictures(table, data, "train")) == 4
    with pytest.raises(InputError, match=r"no row has kind = w; its values are x, y, z"):
        plan_pictures(PictureData(only=("kind=w",)), table)
    with pytest.raises(InputError, match="has no column 'colour'"):
        plan_pictures(PictureData(label="colour"), table)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "holdout"}, "row 3: has split 'holdout'"),
        ({"label": ""}, "row 3: has no label"),
        ({"file": ""}, "row 3: names no file"),
        ({"file": "images/gone.png"}, r"row 3: names .*gone\.png, which does not exist"),
        ({"file": "images/p0.png"}, r"row 3: names p0\.png again"),
    ],
)
def test_broken_rows_stop_or_are_skipped(table: Path, changes: dict[str, str], said: str):
    edit(table, 1, **changes)
    with pytest.raises(InputError, match=said):
        find_pictures(table, PictureData(), "train")
    with pytest.raises(InputError, match=said):
        plan_pictures(PictureData(), table)
    assert len(find_pictures(table, PictureData(on_error="skip"), "train")) == 5
    assert any(said.split(":")[0] in line for line in check_pictures(PictureData(), table).problems)


def test_a_label_outside_the_classes_is_named(table: Path):
    data = PictureData(layout="table", classes=("normal", "sick"))
    edit(table, 4, label="sik")
    with pytest.raises(InputError, match=r"row 6: has the label 'sik'.*normal, sick"):
        find_pictures(table, data, "train")
    assert "row 6" in " ".join(check_pictures(data, table).problems)


def test_a_column_that_is_there_twice_is_named(table: Path):
    """Without this, the last of them would count."""
    path = table / "labels.csv"
    path.write_text(path.read_text().replace("kind", "label", 1))
    with pytest.raises(InputError, match=r"labels\.csv: has the column 'label' twice"):
        find_pictures(table, PictureData(), "train")


def test_a_patient_in_two_splits_is_a_problem(table: Path):
    edit(table, 8, patient="q0")
    found = check_pictures(PictureData(), table)
    assert any("patient q0 is in the splits train and test" in line for line in found.problems)


def test_check_reads_every_picture_and_goes_on(table: Path):
    (table / "images/p2.png").write_bytes(b"not a picture")
    whole = (table / "images/p7.png").read_bytes()
    (table / "images/p7.png").write_bytes(whole[:40])
    found = check_pictures(PictureData(), table)
    assert len(found.problems) == 2
    assert "p2.png" in found.problems[0]
    assert "p7.png" in found.problems[1]
    row = next(r for r in found.counts if r["split"] == "train")
    assert (row["pictures"], row["broken"], row["patients"], row["normal"]) == (6, 1, 3, 3)


def test_covidx_lists_are_read_from_the_right(tmp_path: Path):
    for split, lines in {
        "train": [
            "12 a.png negative rsna",
            "COVID-19 (12) b.png positive sirm",
            "Case 7 left c.jpg positive sirm",
            "13 d.png negative rnsa",
        ],
        "test": ["20 a.png negative rsna", "21 e.png positive cohen"],
    }.items():
        for line in lines:
            save(tmp_path / split / line.split()[-3])
        (tmp_path / f"{split}_COVIDx9B.txt").write_text("\n".join(lines) + "\n")
    data = plan_pictures(PictureData(val_share=0.2), tmp_path)
    assert (data.layout, data.classes) == ("covidx", ("negative", "positive"))
    listing = list_pictures(tmp_path, data)
    by_name = {p.name: p for p in listing.pictures}
    assert by_name["train/b"].patient == "COVID-19 (12)"
    assert by_name["train/c"].label == "positive"
    assert by_name["test/a"].path == tmp_path / "test" / "a.png"
    assert listing.drawn == ("val",)
    splits = Counter(p.split for p in listing.pictures)
    assert splits == {"train": 3, "val": 1, "test": 2}
    found = check_pictures(data, tmp_path)
    assert not found.problems
    assert any("called 9B, which has 13992 negative" in line for line in found.warnings)
    assert {row["source"] for row in found.counts} >= {"rsna", "sirm", "cohen"}


def test_one_of_several_covidx_lists_is_chosen(tmp_path: Path):
    for split in ("train", "test"):
        save(tmp_path / split / "a.png")
        save(tmp_path / split / "b.png")
        for release, label in (("9A", "COVID-19"), ("9B", "positive")):
            lines = f"1 a.png {label} rsna\n2 b.png no rsna\n"
            (tmp_path / f"{split}_COVIDx{release}.txt").write_text(lines)
    said = r"several lists of a split \(test_COVIDx9A\.txt, .*--data\.table 9B"
    with pytest.raises(InputError, match=said):
        list_pictures(tmp_path, PictureData())
    (problem,) = check_pictures(PictureData(), tmp_path).problems
    assert "train_COVIDx9B.txt" in problem
    for name in ("9B", "train_COVIDx9B.txt"):
        listing = list_pictures(tmp_path, PictureData(table=name))
        assert listing.layout == "covidx"
        assert not listing.problems
        assert Counter(p.label for p in listing.pictures) == {"positive": 2, "no": 2}
    with pytest.raises(InputError, match=r"has no lists '7'; its lists are test_COVIDx9A"):
        list_pictures(tmp_path, PictureData(layout="covidx", table="7"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,label\na,b\n", r"\(labels\.csv has no column of files; its columns are name, label"),
        ("file;label\na.png;b\n", r"labels\.csv .* separated by semicolons \(file;label\)"),
    ],
)
def test_a_table_that_names_no_pictures_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=f"holds no data set in a known layout .*{said}"):
        list_pictures(tmp_path, PictureData())
    with pytest.raises(InputError, match=f"holds no csv or jsonl .*{said}"):
        list_pictures(tmp_path, PictureData(layout="table"))
    (tmp_path / "labels.csv").write_text("file;note\na.png;heart, lungs\n")
    with pytest.raises(InputError, match=r"row 2: has another .* separated by semicolons"):
        list_pictures(tmp_path, PictureData())


def test_a_table_has_no_effect_where_the_layout_has_its_own(table: Path):
    with pytest.raises(InputError, match=r"--data\.table has no effect in the layout folders"):
        list_pictures(table, PictureData(layout="folders", table="labels.csv"))


def test_a_field_of_several_lines_is_one_field(table: Path):
    edit(table, 0, kind="FINDINGS:\nThe heart\nis large.")
    first, second = find_pictures(table, PictureData(), "train")[:2]
    assert first.columns["kind"].split() == ["FINDINGS:", "The", "heart", "is", "large."]
    assert second.place.endswith("row 3")


def test_a_short_covidx_line_is_named(tmp_path: Path):
    save(tmp_path / "train/a.png")
    (tmp_path / "train_COVIDx9B.txt").write_text("1 a.png negative rsna\nb.png positive sirm\n")
    listing = list_pictures(tmp_path, PictureData())
    assert "row 2: has 3 fields" in listing.problems[0]


def test_an_empty_covidx_list_is_named(tmp_path: Path):
    save(tmp_path / "train/a.png")
    (tmp_path / "train_COVIDx9B.txt").write_text("1 a.png negative rsna\n")
    empty = tmp_path / "test_COVIDx9B.txt"
    empty.write_text("\n")
    assert list_pictures(tmp_path, PictureData()).problems == (f"{empty}: lists no picture",)


def test_classes_keep_the_order_of_the_known_lists():
    assert order_classes({"COVID-19", "normal", "pneumonia"}) == ("normal", "pneumonia", "COVID-19")
    assert order_classes({"level1", "level2"}) == ("level2", "level1")
    assert order_classes({"10", "9", "0"}) == ("0", "9", "10")
    assert order_classes({"atypical", "Normal", "typical"}) == ("Normal", "atypical", "typical")


def test_rsna_labels_a_patient_by_any_of_its_boxes(tmp_path: Path):
    rows = []
    for number in range(10):
        save_dicom(
            tmp_path / f"stage_2_train_images/id{number}.dcm",
            np.arange(48, dtype=np.uint8).reshape(6, 8),
        )
        target = number % 2
        rows += [{"patientId": f"id{number}", "x": "", "Target": target}] * (1 + target)
    write_csv(tmp_path / "stage_2_train_labels.csv", rows)
    data = plan_pictures(PictureData(), tmp_path)
    assert (data.layout, data.classes) == ("rsna", ("negative", "positive"))
    listing = list_pictures(tmp_path, data)
    assert Counter(p.label for p in listing.pictures) == {"negative": 5, "positive": 5}
    assert listing.drawn == ("test", "val")
    assert not check_pictures(data, tmp_path).problems
    assert list_pictures(tmp_path, data).pictures == listing.pictures
    kinds = [{"patientId": f"id{n}", "class": ("Normal", "Lung Opacity")[n % 2]} for n in range(10)]
    write_csv(tmp_path / "stage_2_detailed_class_info.csv", kinds)
    assert not any("source" in line for line in check_pictures(data, tmp_path).warnings)


CHEXPERT = ["Path", "Sex", "Frontal/Lateral", "No Finding", "Edema", "Pneumonia"]


def write_chexpert(root: Path, values: list[str], *, view: str = "frontal") -> None:
    rows = []
    for number, value in enumerate(values):
        path = f"CheXpert-v1.0-small/train/patient{number:05d}/study1/view1_{view}.jpg"
        save(root / Path(*Path(path).parts[1:]))
        rows.append(dict(zip(CHEXPERT, [path, "F", view.title(), "", "1.0", value], strict=True)))
    write_csv(root / "train.csv", rows)


def test_chexpert_findings_are_labels_with_a_policy_for_the_uncertain(tmp_path: Path):
    write_chexpert(tmp_path, ["1.0", "0.0", "-1.0", "", "1.0", "0.0", "", ""])

    def counts(**settings: str) -> Counter:
        data = PictureData(**settings)
        return Counter(p.label for p in list_pictures(tmp_path, data).pictures)

    assert list_pictures(tmp_path, PictureData()).layout == "chexpert"
    assert counts() == {"positive": 2, "negative": 5}
    assert counts(uncertain="positive") == {"positive": 3, "negative": 5}
    assert counts(uncertain="negative", blank="leave-out") == {"positive": 2, "negative": 3}
    assert counts(label="Edema") == {"positive": 8}
    with pytest.raises(InputError, match="has no column 'Oedema'"):
        counts(label="Oedema")
    lines = list_pictures(tmp_path, PictureData(blank="leave-out")).left_out
    assert lines == (
        f"{tmp_path}: 1 picture is left out because Pneumonia is uncertain "
        f"(--data.uncertain leave-out): train/patient00002/study1/view1_frontal",
        f"{tmp_path}: 3 pictures are left out because Pneumonia is not mentioned "
        f"(--data.blank leave-out): train/patient00003/study1/view1_frontal, "
        f"train/patient00006/study1/view1_frontal, train/patient00007/study1/view1_frontal",
    )
    assert lines[1] in check_pictures(PictureData(blank="leave-out"), tmp_path).warnings
    assert not list_pictures(tmp_path, PictureData(uncertain="mixed", label="Edema")).left_out
    write_chexpert(tmp_path, ["1.0", "2.0", "0.0"])
    listing = list_pictures(tmp_path, PictureData())
    assert "row 3: has Pneumonia = '2.0'" in listing.problems[0]
    assert listing.pictures[0].patient == "patient00000"


def test_packed_tables_of_chexpert_are_read_alike(tmp_path: Path):
    write_chexpert(tmp_path, ["1.0", "0.0", "-1.0", ""])
    plain = list_pictures(tmp_path, PictureData())
    table = tmp_path / "train.csv"
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    packed = list_pictures(tmp_path, PictureData())
    assert packed.layout == "chexpert"
    assert [(p.name, p.label) for p in packed.pictures] == [
        (p.name, p.label) for p in plain.pictures
    ]
    assert packed.pictures[0].place.endswith("train.csv.gz, row 2")
    (tmp_path / "train.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"train\.csv\.gz: cannot be read as text"):
        list_pictures(tmp_path, PictureData())


def test_mimic_joins_its_tables_by_name(tmp_path: Path):
    labels, splits, views = [], [], []
    for number in range(8):
        subject, study, dicom = f"1000003{number}", f"5041426{number}", f"d{number}"
        save(tmp_path / f"files/p10/p{subject}/s{study}/{dicom}.jpg")
        part = ("train", "train", "train", "validate")[number % 4]
        part = "test" if number == 6 else part
        labels.append(
            {
                "subject_id": subject,
                "study_id": study,
                "Edema": "1.0",
                "Pneumonia": f"{number % 2}.0",
            }
        )
        splits.append({"dicom_id": dicom, "study_id": study, "subject_id": subject, "split": part})
        views.append({"dicom_id": dicom, "ViewPosition": "LATERAL" if number == 5 else "PA"})
    write_csv(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    write_csv(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", splits)
    write_csv(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", views)
    data = plan_pictures(PictureData(), tmp_path)
    assert (data.layout, data.classes) == ("mimic", ("negative", "positive"))
    listing = list_pictures(tmp_path, data)
    assert Counter(p.split for p in listing.pictures) == {"train": 4, "val": 2, "test": 1}
    assert listing.left_out == (
        f"{tmp_path}: 1 picture is left out because its view is not frontal "
        f"(--data.views frontal): d5",
    )
    everything = list_pictures(tmp_path, PictureData(views="all"))
    assert len(everything.pictures) == 8
    assert not everything.left_out
    write_csv(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", labels[:3])
    (line,) = list_pictures(tmp_path, PictureData(views="all")).left_out
    assert (
        "5 pictures are left out because their study has no row of labels: d3, d4, d5, ..." in line
    )
    damaged = tmp_path / "mimic-cxr-2.0.0-split.csv.gz"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(InputError, match=r"split\.csv\.gz: cannot be read as text"):
        list_pictures(tmp_path, data)


def test_folders_are_classes(tmp_path: Path):
    for split, label in (("train", "NORMAL"), ("train", "PNEUMONIA"), ("test", "NORMAL")):
        for number in range(3):
            save(tmp_path / split / label / f"{label}{number}.jpeg")
    data = plan_pictures(PictureData(val_share=0.3), tmp_path)
    assert (data.layout, data.classes) == ("folders", ("NORMAL", "PNEUMONIA"))
    assert Counter(p.split for p in list_pictures(tmp_path, data).pictures)["test"] == 3


@pytest.mark.parametrize("layout", ["nothing", "one"])
def test_a_folder_without_a_data_set_is_refused(tmp_path: Path, layout: str):
    if layout == "one":
        save(tmp_path / "only" / "a.png")
    with pytest.raises(InputError, match="holds no data set in a known layout"):
        list_pictures(tmp_path, PictureData())
    with pytest.raises(InputError, match="is not a folder"):
        list_pictures(tmp_path / "absent", PictureData())


def test_settings_without_effect_are_refused(tmp_path: Path):
    write_chests(tmp_path, train=4, test=2, side=32)
    with pytest.raises(InputError, match=r"--data\.only has no effect in the layout covidx"):
        list_pictures(tmp_path, PictureData(only=("a=b",)))


def test_grey_values_lie_between_black_and_white(tmp_path: Path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "eight.png")
    assert read_grey(tmp_path / "eight.png") == pytest.approx(ramp / 255)
    Image.fromarray(ramp // 2).save(tmp_path / "dark.png")
    assert read_grey(tmp_path / "dark.png").max() == pytest.approx(127 / 255)
    Image.fromarray(ramp.astype(np.uint16) * 10 + 300).save(tmp_path / "wide.png")
    assert read_grey(tmp_path / "wide.png") == pytest.approx(ramp / 255)
    assert read_grey(tmp_path / "wide.png", window=(300.0, 1575.0)).max() == 1
    Image.fromarray(np.full((8, 8), 900, dtype=np.uint16)).save(tmp_path / "even.png")
    assert read_grey(tmp_path / "even.png").max() == 0
    Image.fromarray(np.dstack([ramp, ramp // 2, ramp // 4])).save(tmp_path / "colour.png")
    assert 0 < read_grey(tmp_path / "colour.png").max() < 0.7


def test_dicom_is_scaled_and_inverted(tmp_path: Path):
    ramp = np.arange(64).reshape(8, 8)
    eight = save_dicom(tmp_path / "a.dcm", (ramp * 2).astype(np.uint8))
    assert read_grey(eight) == pytest.approx(ramp * 2 / 255)
    wide = save_dicom(tmp_path / "b.dcm", (ramp * 50 + 7).astype(np.uint16))
    assert read_grey(wide) == pytest.approx(ramp / 63)
    inverse = save_dicom(
        tmp_path / "c.dcm",
        (ramp * 50).astype(np.uint16),
        PhotometricInterpretation="MONOCHROME1",
    )
    assert read_grey(inverse) == pytest.approx(1 - ramp / 63)
    rescaled = save_dicom(
        tmp_path / "d.dcm", ramp.astype(np.uint8), RescaleSlope="2", RescaleIntercept="-10"
    )
    assert read_grey(rescaled, window=(-10.0, 116.0)) == pytest.approx(ramp / 63)


def test_pictures_are_shown_by_their_window_where_asked(tmp_path: Path):
    ramp = np.arange(0, 6400, 100, dtype=np.uint16).reshape(8, 8)
    fields = {"WindowCenter": 3000, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}
    path = save_dicom(tmp_path / "a.dcm", ramp, **fields)
    file = PictureFile(name="a", path=path)
    sizes = {"size": (64, 64), "body_size": (32, 32)}
    shown, whole = (read_case(file, MedusaData(voi=voi, **sizes)).main for voi in (True, False))
    wanted = np.clip((ramp.astype(float) - 2500) / 1000, 0, 1).astype(np.float32)
    np.testing.assert_allclose(shown, resize_grey(wanted, (64, 64)), atol=1e-6)
    np.testing.assert_allclose(whole, resize_grey(ramp / np.float32(6300), (64, 64)), atol=1e-6)


def test_dicom_that_cannot_be_read_is_named(tmp_path: Path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    bare = save_dicom(tmp_path / "bare.dcm", pixels, PixelData=None)
    with pytest.raises(InputError, match=r"bare\.dcm: has no pixel data"):
        read_grey(bare)
    whole = save_dicom(tmp_path / "packed.dcm", pixels)
    dataset = pydicom.dcmread(whole)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + b"\0" * 60])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "packed.dcm")
    with pytest.raises(InputError, match=r"packed\.dcm: .*JPEG 2000"):
        read_grey(tmp_path / "packed.dcm")
    with pytest.raises(InputError, match="does not exist"):
        read_grey(tmp_path / "gone.dcm")


def test_resizing_keeps_the_mean_and_takes_any_shape():
    picture = np.random.default_rng(0).random((60, 90), dtype=np.float32)
    small = resize_grey(picture, (20, 30))
    assert small.shape == (20, 30)
    assert small.mean() == pytest.approx(picture.mean(), abs=0.01)
    assert resize_grey(picture, (60, 90)) is picture


def test_inputs_get_different_names(tmp_path: Path):
    save(tmp_path / "a/x.png")
    save(tmp_path / "b/x.png")
    save(tmp_path / "b/x.jpg")
    (tmp_path / "b/notes.txt").write_text("hello")
    found = find_inputs([tmp_path / "a/x.png", tmp_path / "b/x.png", tmp_path / "b"])
    assert len(found) == 3
    assert len({p.name for p in found}) == 3
    with pytest.raises(InputError, match="is not a picture that can be read"):
        find_inputs([tmp_path / "b/notes.txt"])
    with pytest.raises(InputError, match="does not exist"):
        find_inputs([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        find_inputs([tmp_path / "empty"])


def blob(size: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    """A soft spot at a place given as shares of the sides, round in the first proportions."""
    y, x = np.mgrid[: size[0], : size[1]]
    y, x = (y + 0.5) / size[0] - row, (x + 0.5) / size[1] - column
    return np.exp(-(y**2 + x**2) / radius**2).astype(np.float32)


def centre(picture: np.ndarray) -> np.ndarray:
    """Centre of the values, as shares of the sides."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    at = [
        ((y + 0.5) * picture).sum() / picture.shape[0],
        ((x + 0.5) * picture).sum() / picture.shape[1],
    ]
    return np.array(at) / picture.sum()


@pytest.mark.parametrize("small", [(40, 40), (48, 24)])
def test_all_sizes_of_a_picture_move_together(small: tuple[int, int]):
    options = PictureAugmentation()
    for seed in range(8):
        pictures = [blob(size, 0.45, 0.55, 0.06) for size in ((120, 80), small)]
        moved = augment_pictures(pictures, np.random.default_rng(seed), options)
        np.testing.assert_allclose(centre(moved[0]), centre(moved[1]), atol=0.006)
        assert np.abs(centre(moved[0]) - 0.5).max() < 0.35
    still = augment_pictures(pictures, np.random.default_rng(3), options, changed=(True, False))
    assert still[1] is pictures[1]


def test_a_change_does_what_its_numbers_say():
    picture = np.random.default_rng(0).random((40, 60), dtype=np.float32)
    rng = np.random.default_rng(1)
    change, factor = draw_change(rng, STILL)
    assert apply_change(picture, change, factor=factor) == pytest.approx(picture, abs=1e-5)
    flipped = apply_change(picture, np.diag([-1.0, 1.0, 1.0]))
    assert flipped == pytest.approx(picture[:, ::-1], abs=1e-5)
    shifted = apply_change(picture, np.array([[1, 0, 0.5], [0, 1, 0], [0, 0, 1.0]]))
    assert shifted[:, :45] == pytest.approx(picture[:, 15:], abs=1e-5)
    assert shifted[:, 46:].max() == 0
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
    square = picture[:, :40]
    turned = apply_change(square, turn)
    assert turned == pytest.approx(np.rot90(square, 1), abs=1e-4) or turned == pytest.approx(
        np.rot90(square, -1), abs=1e-4
    )
    assert apply_change(picture, np.eye(3), factor=0.5) == pytest.approx(picture / 2, abs=1e-6)


def test_augmentation_is_a_function_of_its_generator():
    picture = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    options = PictureAugmentation()
    once, again, other = (
        augment_pictures([picture], np.random.default_rng(s), options)[0] for s in (5, 5, 6)
    )
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flip_probability": 2.0}, "flip_probability"),
        ({"zoom": 1.0}, "zoom"),
        ({"rotation_deg": -1.0}, "rotation_deg"),
    ],
)
@pytest.mark.bad_input
def test_augmentation_without_sense_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PictureAugmentation(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": (0, 4)}, "size"),
        ({"window": (5.0, 5.0)}, "window"),
        ({"window": (0.0, 5.0), "voi": True}, "voi has no effect"),
        ({"val_share": 0.0}, "val_share"),
        ({"classes": ("a",)}, "classes"),
        ({"only": ("label",)}, "only must be column=value"),
    ],
)
@pytest.mark.bad_input
def test_settings_without_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        PictureData(**settings)


@pytest.mark.parametrize("rare", [0.1, 0.6])
def test_groups_share_no_sample_and_use_all(rare: float):
    labels = np.random.default_rng(0).choice(3, size=200, p=[0.9 - rare, 0.1, rare])
    groups = even_groups(labels.tolist(), classes=3)
    assert len(groups) == np.bincount(labels).min()
    everything = np.concatenate([pool for group in groups for pool in group])
    assert sorted(everything) == list(range(200))
    for group in groups:
        assert [set(labels[pool]) for pool in group] == [{0}, {1}, {2}]
    with pytest.raises(InputError, match="no training picture"):
        even_groups([0, 0, 1], classes=3)


@pytest.mark.parametrize("positives", [10, 100, 300])
def test_an_epoch_of_positive_balance_has_the_steps_of_the_released_recipe(positives: int):
    labels = np.array([0, 1] * 40 + [2] * positives)
    groups = even_groups(labels.tolist(), classes=3, positive_only=True)
    assert len(groups) // 4 == 80 // 8  # 4 samples are a batch of 8 pictures
    assert all((labels[others] < 2).all() and (labels[own] == 2).all() for others, own in groups)
    assert sorted(np.concatenate([others for others, _ in groups])) == list(range(80))
    assert set(np.concatenate([own for _, own in groups])) == set(range(80, 80 + positives))
    for name, (_, own) in zip(groups_apart(groups), groups, strict=True):
        others = [g[1] for n, g in zip(groups_apart(groups), groups, strict=True) if n != name]
        assert not set(own) & set(np.concatenate(others))


def test_balanced_training_samples_hold_one_picture_of_each_class(tmp_path: Path):
    write_chests(tmp_path, train=20, test=2, side=32)
    rows = (tmp_path / "train_COVIDx_phantom.txt").read_text().splitlines()
    kept = [row for number, row in enumerate(rows) if number % 2 == 0 or number < 6]
    (tmp_path / "train_COVIDx_phantom.txt").write_text("\n".join(kept) + "\n")
    data = plan_pictures(MedusaData(size=(64, 64), body_size=(32, 32), balance="classes"), tmp_path)
    train = TrainData(find_pictures(tmp_path, data, "train"), data)
    drawn = set()
    for seed in range(30):
        sample = vary_sample(train[0], np.random.default_rng(seed), None)
        assert [case.label for case in sample] == [0, 1]
        drawn.add(sample[0].name)
    assert len(drawn) > 1
    batch = to_batch(
        [
            case
            for i in range(2)
            for case in vary_sample(train[i], np.random.default_rng(0), PictureAugmentation())
        ]
    )
    assert batch["main"].shape == (4, 3, 64, 64)
    assert batch["body"].shape == (4, 1, 32, 32)
    assert batch["label"].tolist() == [0, 1, 0, 1]


def test_cases_hold_both_sizes_of_a_picture(table: Path):
    data = plan_pictures(MedusaData(size=(64, 96), body_size=(32, 48)), table)
    case = read_case(find_pictures(table, data, "test")[1], data)
    assert (case.main.shape, case.body.shape) == ((64, 96), (32, 48))
    assert (case.label, case.patient, case.source) == (1, "q4", "here")


def test_phantoms_are_told_apart_by_place_alone(tmp_path: Path):
    means = [
        [
            make_chest(np.random.default_rng((9, i, c)), positive=bool(c)).picture.mean()
            for i in range(60)
        ]
        for c in (0, 1)
    ]
    assert abs(np.mean(means[0]) - np.mean(means[1])) < 0.6 * np.std(means[0])
    write_lungs(tmp_path / "lungs", pictures=8)
    mask = np.asarray(Image.open(tmp_path / "lungs/masks/chest_000.png"))
    assert set(np.unique(mask)) == {0, 255}
    assert 0.05 < (mask > 0).mean() < 0.5
    write_chests(tmp_path / "chests", train=20, test=4, side=32)
    found = check_pictures(PictureData(), tmp_path / "chests")
    assert not found.problems


@pytest.mark.skipif(not (DATA / "cxr").is_dir(), reason="the data set cxr is not here")
def test_the_real_chest_x_rays_are_listed_as_their_readme_says():
    root = DATA / "cxr"
    data = plan_pictures(PictureData(), root)
    assert data.classes == ("normal", "covid19", "pneumonia")
    counts = [len(find_pictures(root, data, s)) for s in ("train", "val", "test")]
    assert counts == [484, 70, 139]
    kermany = plan_pictures(PictureData(only=("source=kermany2018",)), root)
    assert kermany.classes == ("normal", "pneumonia")
    kinds = PictureData(label="sublabel", only=("sublabel=bacterial", "sublabel=viral"))
    assert plan_pictures(kinds, root).classes == ("bacterial", "viral")
    case = read_grey(find_pictures(root, data, "test")[0].path)
    assert min(case.shape) == 256
