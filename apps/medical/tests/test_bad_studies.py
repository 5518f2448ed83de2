"""What a user of MEDUSA, ACMIL, IVGN and MoRE sees when a file is odd or broken.

Odd files that can be read are read; for others there is one line that names the file and what is
wrong with it, and exit code 2.
"""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import MPEG2MPML, ExplicitVRLittleEndian, JPEG2000Lossless

from heed_medical.ecg.reading import LEADS
from heed_medical.ecg.writing import write_record
from heed_medical.medusa.phantoms import write_chests
from heed_medical.more.sample import make_ecg
from heed_medical.reports.efficacy import FINDINGS
from heed_medical.reports.phantoms import write_studies
from heed_medical_cli import APP
from heed_runtime.arguments import parse
from heed_runtime.run import Run
from heed_runtime.testing.contract import refusal, spoken

STEP = ("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu", "--quiet")
TINY = {
    "medusa": (
        *("--data.size", "64", "64", "--data.body-size", "32", "32"),
        *("--model.body-widths", "4", "8", "--model.hidden", "8"),
    ),
    "acmil": (),
    "ivgn": (
        *("--model.dim", "16", "--model.heads", "2", "--model.hidden", "16", "--model.depth", "1"),
        *("--data.size", "32", "--data.resize", "36", "--data.most-words", "12"),
    ),
    "more": (
        "--model.tower.depth",
        "1",
        "--model.text.depth",
        "1",
        "--model.text.max-tokens",
        "40",
    ),
}
EXPLICIT = str(ExplicitVRLittleEndian)
Change = Callable[[Path], Path]


def answer(*words: object) -> dict:
    """The document of a command that works."""
    code, out, err = spoken(APP, *words, "--json")
    assert code == 0, err
    return dict(json.loads(out))


def train(system: str, data: Path, out: Path, *flags: object) -> tuple[object, ...]:
    return ("train", system, "--data", data, "--out", out, *STEP, *TINY[system], *flags)


def planned(system: str, data: Path) -> Any:
    """The settings that a training on these data has."""
    options = importlib.import_module("heed_runtime.commands.train").Options
    parsed = parse(APP, "train", options, "", [system, *TINY[system]])
    return APP.recipe(system).plan(parsed.settings, data)


def make_run(system: str, data: Path, out: Path) -> None:
    """A run as `train` leaves it, of a model that has not learnt."""
    recipe, settings = APP.recipe(system), planned(system, data)
    run = Run.create(out, system=system, settings=settings, command=["train", system])
    run.save_model(recipe.model(settings))
    run.update_environment({"data": {"path": str(data)}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of each system, and a run with a random model."""
    root = tmp_path_factory.mktemp("made")
    write_chests(root / "medusa", train=16, test=4, side=64)
    write_studies(root / "ivgn", train=8, val=2, test=2, side=48)
    write_slides(root / "acmil")
    write_triplets(root / "more")
    for system in TINY:
        make_run(system, root / system, root / f"{system}-run")
    return root


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda system: Path(shutil.copytree(made / system, tmp_path / "data"))


def write_slides(root: Path) -> None:
    """Twelve bags in the layout of CLAM."""
    rng = np.random.default_rng(0)
    (root / "h5_files").mkdir(parents=True)
    names = [f"slide_{number:03d}" for number in range(12)]
    for name in names:
        with h5py.File(root / "h5_files" / f"{name}.h5", "w") as file:
            file["features"] = rng.normal(size=(20, 64)).astype(np.float32)
    rows = [f"patient_{n:03d},{name},{'ab'[n % 2]}" for n, name in enumerate(names)]
    (root / "labels.csv").write_text("\n".join(["case_id,slide_id,label", *rows]) + "\n")
    columns = [names[:8], names[8:10], names[10:]]
    rows = [",".join(c[i] if i < len(c) else "" for c in columns) for i in range(8)]
    (root / "splits.csv").write_text("\n".join(["train,val,test", *rows]) + "\n")


def write_triplets(root: Path) -> None:
    """Eight studies: X-ray, ECG and reports."""
    rng = np.random.default_rng(0)
    for folder in ("images", "ecgs"):
        (root / folder).mkdir(parents=True)
    rows = ["name,subject_id,xray_path,ecg_path,xray_report,ecg_report,split,Cardiomegaly"]
    for number in range(8):
        split = "train" if number < 4 else "val" if number < 6 else "test"
        name = f"{split}{number:03d}"
        Image.fromarray(picture(rng, 255, np.uint8)).save(root / "images" / f"{name}.png")
        write_record(root / "ecgs" / name, make_ecg(number, rng), rate_hz=100)
        rows.append(
            f"{name},s-{name},images/{name}.png,ecgs/{name}.hea,Note {number}.,Rate {number}.,"
            f"{split},{number % 2}"
        )
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def save_dicom(path: Path, pixels: np.ndarray, **fields: object) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = EXPLICIT
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = bits = pixels.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = bits - 1, 0, 1
    dataset.PhotometricInterpretation, dataset.Modality = "MONOCHROME2", "DX"
    dataset.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def picture(rng: np.random.Generator, high: int, kind: type) -> np.ndarray:
    pixels = rng.integers(0, high + 1, (70, 80)).astype(kind)
    pixels[0, :2] = 0, high
    return pixels


# MEDUSA


def probabilities(run: Path, path: Path, out: Path) -> list[float]:
    answer("predict", run, path, "--out", out, "--device", "cpu")
    return list(json.loads((out / f"{path.stem}.json").read_text())["probabilities"].values())


def test_monochrome1_and_16_bits_mean_the_same_picture(made: Path, tmp_path: Path):
    eight = picture(np.random.default_rng(0), 255, np.uint8)
    paths = [
        save_dicom(tmp_path / "eight.dcm", eight),
        save_dicom(tmp_path / "inverse.dcm", 255 - eight, PhotometricInterpretation="MONOCHROME1"),
        save_dicom(tmp_path / "wide.dcm", eight.astype(np.uint16) * 257),
    ]
    Image.fromarray(eight).save(tmp_path / "eight.png")
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    paths += [tmp_path / "eight.png", tmp_path / "wide.png"]
    found = [
        probabilities(made / "medusa-run", path, tmp_path / str(n)) for n, path in enumerate(paths)
    ]
    np.testing.assert_allclose(found, np.tile(found[0], (5, 1)), atol=1e-5)


@pytest.mark.parametrize("system", ["medusa", "ivgn", "more"])
def test_dicom_that_cannot_be_read_names_file_and_reason(made: Path, tmp_path: Path, system: str):
    run, out = made / f"{system}-run", tmp_path / "out"
    whole = save_dicom(tmp_path / "whole.dcm", np.zeros((64, 64), np.uint8))
    dataset = pydicom.dcmread(whole)
    dataset.file_meta.TransferSyntaxUID = MPEG2MPML
    dataset.PixelData = pydicom.encaps.encapsulate([bytes(64)])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    line = refusal(APP, "predict", run, tmp_path / "film.dcm", "--out", out, "--device", "cpu")
    assert "film.dcm" in line
    assert "MPEG2" in line
    assert "1.2.840.10008.1.2.4.100" in line
    dataset = pydicom.dcmread(whole)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "packed.dcm", enforce_file_format=True)
    line = refusal(APP, "predict", run, tmp_path / "packed.dcm", "--out", out, "--device", "cpu")
    assert "packed.dcm" in line
    assert "JPEG 2000" in line
    dataset = pydicom.dcmread(whole)
    del dataset.PixelData
    dataset.save_as(tmp_path / "bare.dcm")
    line = refusal(APP, "predict", run, tmp_path / "bare.dcm", "--out", out, "--device", "cpu")
    assert "bare.dcm: has no pixel data" in line
    short = tmp_path / "short.dcm"
    short.write_bytes(whole.read_bytes()[:-1000])
    assert "short.dcm" in refusal(APP, "predict", run, short, "--out", out, "--device", "cpu")


def test_an_id_with_a_space_is_an_id(copied: Callable[[str], Path]):
    data = copied("medusa")
    lines = (data / "train_COVIDx_phantom.txt").read_text().splitlines()
    one = lines[4].split()
    (data / "train_COVIDx_phantom.txt").write_text(
        "\n".join([*lines[:4], " ".join(["CR 42 A", *one[1:]]), *lines[5:]]) + "\n"
    )
    before = answer("check", "medusa", data)
    assert not before["problems"]
    test = (data / "test_COVIDx_phantom.txt").read_text().splitlines()
    test[0] = " ".join(["CR 42 A", *test[0].split()[-3:]])
    (data / "test_COVIDx_phantom.txt").write_text("\n".join(test) + "\n")
    code, out, _ = spoken(APP, "check", "medusa", data)
    assert code == 1
    assert "CR 42 A" in out


@pytest.mark.parametrize("system", ["medusa", "ivgn", "more", "acmil"])
def test_a_patient_in_two_splits_is_told(
    copied: Callable[[str], Path], system: str, caplog: pytest.LogCaptureFixture
):
    data = copied(system)
    planned(system, data)
    assert "in several splits" not in caplog.text
    if system == "medusa":
        first = (data / "train_COVIDx_phantom.txt").read_text().split()[0:2]
        path = data / "test_COVIDx_phantom.txt"
        rows = path.read_text().splitlines()
        rows[0] = " ".join([*first, *rows[0].split()[-3:]])
        path.write_text("\n".join(rows) + "\n")
    elif system == "ivgn":
        content = json.loads((data / "annotation.json").read_text())
        for split in ("train", "test"):
            content[split][0]["subject_id"] = "p1"
        (data / "annotation.json").write_text(json.dumps(content))
    elif system == "more":
        edit(data / "manifest.csv", "s-test006", "s-train000")
    else:
        text = (data / "labels.csv").read_text().splitlines()
        text[-1] = "patient_001," + text[-1].partition(",")[2]
        (data / "labels.csv").write_text("\n".join(text) + "\n")
    code, out, err = spoken(APP, "check", system, data)
    assert code == (1 if system in ("medusa", "more") else 0), err
    assert "is in the splits" in " ".join((out + err).split())
    planned(system, data)
    assert f"{data}: patients in several splits (1): " in caplog.text


@pytest.mark.parametrize("system", list(TINY))
def test_a_split_that_is_none_is_refused(made: Path, system: str):
    words = ("evaluate", made / f"{system}-run", "--split", "dev", "--device", "cpu")
    line = refusal(APP, *words)
    assert "split" in line
    assert "dev" in line


def test_lines_of_covidx_that_are_short_or_have_another_label(
    copied: Callable[[str], Path], tmp_path: Path
):
    data = copied("medusa")
    path = data / "train_COVIDx_phantom.txt"
    whole = path.read_text()
    path.write_text(whole + "p9 chest.png\n")
    line = refusal(APP, *train("medusa", data, tmp_path / "run"))
    assert "row 17" in line
    assert "2 fields" in line
    path.write_text(whole.replace("chest_0003.png positive", "chest_0003.png perhaps"))
    words = ("--data.classes", "negative", "positive")
    assert "'perhaps'" in refusal(APP, *train("medusa", data, tmp_path / "run", *words))


def test_a_picture_of_numbers_that_are_none(made: Path, tmp_path: Path):
    pixels = np.zeros((64, 64), dtype=np.float32)
    pixels[3, 4] = np.nan
    Image.fromarray(pixels).save(tmp_path / "nan.tif")
    words = ("--out", tmp_path / "out", "--device", "cpu")
    line = refusal(APP, "predict", made / "medusa-run", tmp_path / "nan.tif", *words)
    assert "nan.tif" in line
    assert "not finite" in line


# ACMIL


def _pt(path: Path) -> Path:
    torch.save(torch.zeros(4, 64), path.with_suffix(".pt"))
    content = path.with_suffix(".pt").read_bytes()
    path.with_suffix(".pt").write_bytes(content[: len(content) // 2])
    return path.with_suffix(".pt")


def _array(array: np.ndarray) -> Change:
    def write(path: Path) -> Path:
        np.save(path.with_suffix(".npy"), array)
        return path.with_suffix(".npy")

    return write


def _h5(**arrays: np.ndarray) -> Change:
    def write(path: Path) -> Path:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
        return path

    return write


def _text(path: Path) -> Path:
    path.write_text("not a file of features")
    return path


def _pickled(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return path.with_suffix(".npy")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_h5(coords=np.zeros((4, 2))), "has no data set 'features' or 'feat', it holds coords"),
        (_h5(features=np.zeros((0, 64))), "is a bag without patches"),
        (_h5(features=np.zeros((4, 64)), coords=np.zeros((3, 2))), "'coords' must be (4, 2)"),
        (_h5(features=np.zeros((4, 63))), "has features of 63 channels, expected 64"),
        (_h5(features=np.full((2, 64), np.inf)), "2 patches have features that are not numbers"),
        (_array(np.zeros(64)), "'features' must be a table of numbers"),
        (_array(np.full((3, 64), np.nan)), "3 patches have features that are not numbers"),
        (_array(np.array([["a", "b"]])), "'features' must be a table of numbers"),
        (_pickled, "is not a numpy array"),
        (_pt, "cannot be read"),
        (_text, "is not a readable h5 file"),
    ],
)  # fmt: skip
def test_a_broken_bag_at_prediction(made: Path, tmp_path: Path, write: Change, said: str):
    path = write(tmp_path / "slide.h5")
    words = ("--out", tmp_path / "out", "--device", "cpu")
    line = refusal(APP, "predict", made / "acmil-run", path, *words)
    assert f"{path.name}: {said}" in line


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("splits.csv", "a,b\n1,2\n", "splits.csv: has no column train, val or test"),
        ("splits.csv", "train,val,test\nother,x,y\n", "splits.csv: names no slide of the data"),
        ("labels.csv", "slide_id,class\nslide_000,a\n", "holds features and no labels"),
        ("labels.csv", "slide_id,label\nslide_000,a,b\n", "row 2: has another number of fields"),
    ],
)
def test_broken_lists_of_bags(
    copied: Callable[[str], Path], tmp_path: Path, name: str, text: str, said: str
):
    data = copied("acmil")
    (data / name).write_text(text)
    assert said in refusal(APP, *train("acmil", data, tmp_path / "run"))


def test_a_class_without_a_training_bag_is_refused(copied: Callable[[str], Path], tmp_path: Path):
    data = copied("acmil")
    edit(data / "labels.csv", "slide_011,b", "slide_011,c")
    line = refusal(APP, *train("acmil", data, tmp_path / "run"))
    assert "has no training bag of the class c; the training bags have the labels a, b" in line
    code, out, err = spoken(APP, "check", "acmil", data)
    assert code == 1
    assert "the label c is in the training split" in " ".join((out + err).split())


# IVGN


def test_an_unknown_split_key_lists_the_keys(copied: Callable[[str], Path], tmp_path: Path):
    data = copied("ivgn")
    edit(data / "annotation.json", '"test": [', '"    ": [')
    line = refusal(APP, *train("ivgn", data, tmp_path / "run"))
    assert "unknown split '    '; its keys are 'train', 'val', '    '" in line
    assert spoken(APP, "check", "ivgn", data)[0] == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"report": "', '"text": "', "train[0]: has no report"),
        ("train0000/0.png", "train0000/9.png", "does not exist (study train0000)"),
        ('"train": [', '"train": [1, ', "train[0]: is not an entry"),
        ('"train": [', '"train": [,', "is not readable json"),
        ('"id": "train0001"', '"id": "train0000"', "holds the study 'train0000' twice"),
    ],
)
def test_broken_annotations(
    copied: Callable[[str], Path], tmp_path: Path, old: str, new: str, said: str
):
    data = copied("ivgn")
    edit(data / "annotation.json", old, new)
    assert said in refusal(APP, *train("ivgn", data, tmp_path / "run", "--trainer.max-steps", "4"))


def test_findings_that_are_no_utf_8_are_named(made: Path, tmp_path: Path):
    paths = [tmp_path / "truth.csv", tmp_path / "found.csv"]
    for path in paths:
        path.write_bytes(f"id,{','.join(FINDINGS)}\ncaf\xe9{',1' * 14}\n".encode("latin-1"))
    words = ("--data.truth-findings", paths[0], "--data.found-findings", paths[1])
    line = refusal(APP, "evaluate", made / "ivgn-run", *words, "--device", "cpu", "--quiet")
    assert "truth.csv: cannot be read as text" in line


def test_an_empty_report_is_learnt_and_told(copied: Callable[[str], Path], tmp_path: Path):
    data = copied("ivgn")
    content = json.loads((data / "annotation.json").read_text())
    content["train"][0]["report"] = ""
    content["train"][1]["report"] = "?!"
    (data / "annotation.json").write_text(json.dumps(content))
    code, out, err = spoken(APP, "check", "ivgn", data)
    assert code == 0
    for name in ("train0000", "train0001"):
        assert f"report of {name} is empty" in " ".join((out + err).split())
    code, _, err = spoken(APP, *train("ivgn", data, tmp_path / "run"))
    assert code == 0
    told = "an empty report in 2 of 8 studies (train0000, train0001): a lone full stop stands"
    assert err.count(told) == 1
    assert err.count("an empty report") == 1


def test_a_lone_picture_is_repeated_and_told_by_every_verb(
    copied: Callable[[str], Path], tmp_path: Path
):
    data, run = copied("ivgn"), tmp_path / "run"
    content = json.loads((data / "annotation.json").read_text())
    lone = [content["train"][2], *content["val"], content["test"][0]]
    for study in lone:
        study["image_path"] = study["image_path"][:1]
    (data / "annotation.json").write_text(json.dumps(content))
    picture = data / "images" / "test0000" / "0.png"
    said = "fewer than 2 pictures in {} ({}): the last one is repeated"
    code, _, err = spoken(APP, *train("ivgn", data, run))
    assert code == 0, err
    assert err.count(f"{data}, train: " + said.format("1 of 8 studies", "train0002")) == 1
    assert f"{data}, val: fewer than 2 pictures in 2 of 2 studies" in err
    once = f"{data}, test: " + said.format("1 of 2 studies", "test0000")
    assert spoken(APP, "evaluate", run, "--device", "cpu")[2].count(once) == 1
    once = "inputs: " + said.format("1 of 1 studies", "0")
    for verb in ("predict", "explain"):
        words = (verb, run, picture, "--out", tmp_path / verb, "--device", "cpu")
        code, _, err = spoken(APP, *words)
        assert (code, err.count(once)) == (0, 1), err
        words = (verb, run, picture.parent, "--out", tmp_path / verb / "both", "--device", "cpu")
        assert "fewer than" not in spoken(APP, *words)[2]


def test_pictures_and_studies_of_one_name_are_told_apart(made: Path, tmp_path: Path):
    for folder in ("d1", "d2"):
        shutil.copytree(made / "ivgn" / "images" / "test0000", tmp_path / folder / "x")
    pictures = [tmp_path / folder / "x" / "0.png" for folder in ("d1", "d2")]
    studies = [picture.parent for picture in pictures]
    words = ("predict", made / "ivgn-run", *pictures, pictures[0], *studies)
    answer(*words, "--out", tmp_path / "out", "--device", "cpu")
    found = [path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/**/*.json")]
    assert sorted(path.as_posix() for path in found) == [
        "d1/x.json", "d1/x/0.json", "d2/x.json", "d2/x/0.json",
    ]  # fmt: skip


def test_a_vocabulary_of_another_training_is_refused(made: Path, tmp_path: Path):
    run = Path(shutil.copytree(made / "ivgn-run", tmp_path / "run"))
    edit(run / "config.yaml", "- <unk>\n", "- <unk>\n  - superfluous\n")
    picture = made / "ivgn" / "images" / "test0000"
    line = refusal(APP, "predict", run, picture, "--out", tmp_path / "out", "--device", "cpu")
    assert "data.vocabulary has" in line
    assert "different trainings" in line


# MoRE


def rewrite_ecg(data: Path, **changes: object) -> Path:
    """Another record in the place of the first one."""
    options: dict = {"rate_hz": 100, "names": LEADS, **changes}
    signals = options.pop("signals", make_ecg(0, np.random.default_rng(0)))
    return write_record(data / "ecgs" / "train000", signals, **options)


def test_leads_of_other_names_order_and_rate_are_read(
    copied: Callable[[str], Path], made: Path, tmp_path: Path
):
    data = copied("more")
    signals = make_ecg(0, np.random.default_rng(0))
    path = rewrite_ecg(data)
    out = ("--out", tmp_path / "a", "--device", "cpu")
    answer("predict", made / "more-run", path, *out)
    names = [f"lead_{name.lower()}" for name in LEADS]
    rewrite_ecg(data, signals=np.concatenate([signals[::-1], signals[:1]]),
                names=[*names[::-1], "vx"])  # fmt: skip
    answer("predict", made / "more-run", path, "--out", tmp_path / "b", "--device", "cpu")
    found = [np.load(tmp_path / name / "train000.npz")["ecg"] for name in ("a", "b")]
    np.testing.assert_allclose(*found, atol=1e-5)
    rewrite_ecg(data, signals=np.repeat(signals, 5, axis=1), rate_hz=500)
    answer("predict", made / "more-run", path, "--out", tmp_path / "c", "--device", "cpu")
    assert float(np.load(tmp_path / "c" / "train000.npz")["ecg"] @ found[0]) > 0.9


def test_a_missing_lead_is_named_and_can_be_filled(
    copied: Callable[[str], Path], made: Path, tmp_path: Path
):
    data = copied("more")
    path = rewrite_ecg(data, names=["XYZ", *LEADS[1:]])
    words = ("predict", made / "more-run", path, "--out", tmp_path / "out", "--device", "cpu")
    line = refusal(APP, *words)
    assert "train000.hea: has no lead I (its signals: XYZ, II" in line
    assert spoken(APP, *words, "--data.missing-leads", "zero")[0] == 0
    assert "has no lead I" in refusal(
        APP, *train("more", data, tmp_path / "run", "--trainer.max-steps", "3")
    )


def test_missing_samples_are_told_and_empty_leads_refused(
    copied: Callable[[str], Path], made: Path, tmp_path: Path
):
    data = copied("more")
    signals = make_ecg(0, np.random.default_rng(0))
    signals[2, 10:20] = np.nan
    path = rewrite_ecg(data, signals=signals)
    code, out, err = spoken(APP, "check", "more", data)
    assert code == 0
    assert "10 samples are missing (NaN)" in " ".join((out + err).split())
    signals[2] = np.nan
    rewrite_ecg(data, signals=signals)
    words = ("--out", tmp_path / "out", "--device", "cpu")
    assert "has no values in the lead III" in refusal(
        APP, "predict", made / "more-run", path, *words
    )
    path.with_suffix(".dat").write_bytes(path.with_suffix(".dat").read_bytes()[:99])
    assert "train000.hea" in refusal(APP, "predict", made / "more-run", path, *words)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (",train,", ",tran,", "split 'tran' is none of train, val, test"),
        ("images/train000.png", "images/gone.png", "gone.png: does not exist"),
        ("ecgs/train000.hea", "ecgs/gone.hea", "gone.hea: does not exist"),
        ("Cardiomegaly", "Cardiomegali", "has no finding 'Cardiomegaly'"),
    ],
)  # fmt: skip
def test_broken_manifests(
    copied: Callable[[str], Path], tmp_path: Path, old: str, new: str, said: str
):
    data = copied("more")
    edit(data / "manifest.csv", old, new)
    if "finding" in said:
        words = ("--data.labels", "Cardiomegaly")
        assert "Cardiomegaly" in refusal(APP, *train("more", data, tmp_path / "run", *words))
        return
    code, out, err = spoken(APP, "check", "more", data)
    assert code == 1
    assert said in " ".join((out + err).split())
    if "exist" in said or "split" in said:
        words = train("more", data, tmp_path / "run", "--trainer.max-steps", "3")
        assert said in refusal(APP, *words)


def test_an_empty_report_alone_is_refused(made: Path, tmp_path: Path):
    (tmp_path / "note.txt").write_text("FINDINGS:  ___ \n")
    words = ("--out", tmp_path / "out", "--device", "cpu")
    line = refusal(APP, "predict", made / "more-run", tmp_path / "note.txt", *words)
    assert "note.txt: is an empty report" in line
