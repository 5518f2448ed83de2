"""What a user sees when a file is broken: one line that names it, exit code 2, nothing lost."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from heed_medical.segmentation.phantoms import write_sample
from heed_medical_cli import APP
from heed_runtime.testing.contract import refusal, spoken

QUICK = [
    *("--trainer.max-steps", "1", "--trainer.batch", "2", "--device", "cpu"),
    *("--model.width", "8", "--model.scales", "1"),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:monai")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets as NIfTI and png, and a run of one step on the first."""
    root = tmp_path_factory.mktemp("made")
    write_sample(root / "nifti", layout="nnunet", cases=8, shape=(16, 24, 3))
    write_sample(root / "png", layout="png", cases=8, shape=(16, 24, 3))
    code, _, err = spoken(
        APP, "train", "msga", "--data", root / "nifti", "--out", root / "run", *QUICK
    )
    assert code == 0, err
    return root


@pytest.fixture
def nifti(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "nifti", tmp_path / "data"))


@pytest.fixture
def png(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "png", tmp_path / "data"))


def first(folder: Path) -> Path:
    return min(path for path in folder.rglob("*") if path.is_file())


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple]) -> None:
    image = nib.load(path)
    data, affine = change(np.asanyarray(image.dataobj), image.affine)
    nib.save(nib.Nifti1Image(data, affine), path)


def other_shape(data: np.ndarray, affine: np.ndarray) -> tuple:
    return data[:-1], affine


def other_affine(data: np.ndarray, affine: np.ndarray) -> tuple:
    return data, affine + np.diag([0.5, 0.0, 0.0, 0.0])


def stray_label(data: np.ndarray, affine: np.ndarray) -> tuple:
    data = data.copy()
    data[0, 0, 0] = 77
    return data, affine


def with_nan(data: np.ndarray, affine: np.ndarray) -> tuple:
    data = data.astype(np.float32)
    data[0, 0, 0] = np.nan
    return data, affine


def assert_refused_everywhere(data: Path, tmp_path: Path, *said: str) -> None:
    """`train` refuses with the file's name and leaves no run; `check` lists it and exits with 1."""
    line = refusal(APP, "train", "msga", "--data", data, "--out", tmp_path / "run", *QUICK)
    for word in said:
        assert word in line
    assert not (tmp_path / "run").exists()
    code, out, _ = spoken(APP, "check", "msga", data)
    assert code == 1
    assert said[0] in out


@pytest.mark.parametrize(
    ("folder", "change", "said"),
    [
        ("labelsTr", other_shape, "shape"),
        ("labelsTr", other_affine, "affine"),
        ("labelsTr", stray_label, "77"),
        ("imagesTr", with_nan, "finite"),
    ],
)
def test_a_wrong_volume(nifti: Path, tmp_path: Path, folder: str, change: Callable, said: str):
    path = first(nifti / folder)
    rewrite(path, change)
    assert_refused_everywhere(nifti, tmp_path, path.name.split(".")[0].removesuffix("_0000"), said)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_truncated_volume(nifti: Path, tmp_path: Path, keep: float, folder: str):
    path = first(nifti / folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    assert_refused_everywhere(nifti, tmp_path, path.name)


def test_a_volume_whose_compressed_content_is_short(nifti: Path, tmp_path: Path):
    path = first(nifti / "imagesTr")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))
    assert_refused_everywhere(nifti, tmp_path, path.name)


def test_a_file_without_its_partner(nifti: Path, tmp_path: Path):
    path = first(nifti / "labelsTr")
    path.unlink()
    assert_refused_everywhere(nifti, tmp_path, path.name.split(".")[0])


def test_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    line = refusal(APP, "train", "msga", "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert "empty" in line
    assert not (tmp_path / "run").exists()


def test_a_picture_in_colour_among_grey_ones(png: Path, tmp_path: Path):
    path = first(png / "train" / "Img")
    with Image.open(path) as grey:
        colour = np.stack([np.asarray(grey), 255 - np.asarray(grey), np.asarray(grey)], -1)
    Image.fromarray(colour.astype(np.uint8)).save(path)
    assert_refused_everywhere(png, tmp_path, path.name)


def test_a_stray_grey_value_in_a_mask(png: Path, tmp_path: Path):
    path = first(png / "train" / "GT")
    with Image.open(path) as mask:
        values = np.asarray(mask).copy()
    values[0, 0] = 31
    Image.fromarray(values).save(path)
    assert_refused_everywhere(png, tmp_path, path.name, "31")


def test_skipping_counts_and_lists(nifti: Path, tmp_path: Path):
    path = first(nifti / "imagesTr")
    path.write_bytes(b"")
    words = ["--data.on-error", "skip", "--data", nifti, "--out", tmp_path / "run", *QUICK]
    code, out, err = spoken(APP, "train", "msga", *words)
    assert code == 0, err
    assert path.name in out + err


def test_an_unknown_key_in_a_file(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("model:\n  widht: 8\n")
    line = refusal(
        APP, "train", "msga", "--config", tmp_path / "mine.yaml", "--out", tmp_path / "run"
    )
    assert "mine.yaml" in line
    assert "model.widht" in line
    assert "width" in line.replace("widht", "")


def test_a_run_of_another_system(made: Path, tmp_path: Path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("system: msga", "system: unet"))
    assert "unet" in refusal(APP, "evaluate", run)


def test_weights_of_another_network(made: Path, tmp_path: Path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    for path in (run / "config.yaml", run / "model" / "config.json"):
        path.write_text(
            path.read_text().replace("width: 8", "width: 16").replace('h": 8', 'h": 16')
        )
    assert "model.safetensors" in refusal(APP, "evaluate", run)


def test_a_folder_that_holds_a_run_is_kept(made: Path):
    before = {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*")}
    line = refusal(APP, "train", "msga", "--data", made / "nifti", "--out", made / "run", *QUICK)
    assert "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*")} == before


def test_an_unwritable_place(made: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    line = refusal(
        APP,
        *("predict", made / "run", made / "nifti" / "imagesTs", "--out", tmp_path / "file" / "out"),
    )
    assert "file" in line
    assert (tmp_path / "file").read_text() == ""


def test_a_broken_input_of_predict_keeps_what_was_written(made: Path, nifti: Path, tmp_path: Path):
    inputs = sorted((nifti / "imagesTs").iterdir())
    inputs[-1].write_bytes(b"not a volume")
    line = refusal(APP, "predict", made / "run", nifti / "imagesTs", "--out", tmp_path / "out")
    assert inputs[-1].name in line
    written = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert len(written) == len(inputs) - 1
    for name in written:
        assert np.isin(nib.load(tmp_path / "out" / name).dataobj, [0, 1, 2, 3]).all()


def test_the_same_input_twice_is_not_written_over(made: Path, tmp_path: Path):
    inputs = made / "nifti" / "imagesTs"
    assert spoken(APP, "predict", made / "run", inputs, "--out", tmp_path / "out")[0] == 0
    assert "--overwrite" in refusal(APP, "predict", made / "run", inputs, "--out", tmp_path / "out")
