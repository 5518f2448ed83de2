"""Files with wrong bytes in them: every reader reads one or says in one line that it cannot."""

from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import RLELossless

from heed_core.testing.damage import check_readers
from heed_medical.bags.bag import BagFile
from heed_medical.bags.files import read_bag
from heed_medical.dicom import list_series, read_plane, read_series
from heed_medical.ecg.reading import LEADS, read_ecg, stated_duration_s
from heed_medical.ecg.signals import prepare_ecg
from heed_medical.ecg.writing import write_record
from heed_medical.images import (
    is_colour,
    nifti_shape,
    read_mask_nifti,
    read_mask_picture,
    read_nifti,
    read_picture,
)
from heed_medical.pictures.reading import read_grey
from heed_medical.segmentation.phantoms import write_sample


def slice_of_a_series(folder: Path) -> Path:
    write_sample(folder / "s", layout="chaos", cases=4, shape=(20, 24, 6), seed=3)
    series = folder / "s/Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase"
    data = min(series.iterdir()).read_bytes()
    (folder / "alone").mkdir()
    path = folder / "alone" / "slice.dcm"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("encoded", [False, True])
def test_dicom(tmp_path: Path, encoded: bool):
    path = slice_of_a_series(tmp_path)
    if encoded:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    assert read_plane(path)[0].shape == (20, 24)
    readers = [
        read_plane,
        lambda p: read_grey(p, voi=True),
        lambda p: read_series([p]),
        lambda p: list_series(p.parent),
    ]
    for seed in range(3):
        check_readers(path, readers, seed=seed)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "lzw.tif", "float.tif"])
def test_pictures(tmp_path: Path, name: str):
    values = np.random.default_rng(0).integers(0, 255, (40, 50))
    kind = np.float32 if name == "float.tif" else np.uint8
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    Image.fromarray(values.astype(kind)).save(tmp_path / name, **options)
    readers = [
        read_grey,
        read_mask_picture,
        is_colour,
        lambda p: read_picture(p, channels="rgb"),
    ]
    check_readers(tmp_path / name, readers)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_nifti(tmp_path: Path, name: str, kind: type):
    values = np.random.default_rng(0).integers(0, 200, (12, 10, 8)).astype(kind)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / name)
    check_readers(tmp_path / name, [read_nifti, read_mask_nifti, nifti_shape])


@pytest.mark.parametrize("part", ["rec.hea", "rec.dat"])
def test_ecg(tmp_path: Path, part: str):
    leads = np.random.default_rng(0).normal(size=(12, 1000))
    write_record(
        tmp_path / "rec", leads, rate_hz=100, names=LEADS, unit="mV", steps_per_unit=1000.0
    )
    check_readers(tmp_path / part, [lambda p: prepare_ecg(read_ecg(p)), stated_duration_s])


@pytest.mark.parametrize("name", ["bag.h5", "bag.pt", "bag.npy", "bag.npz"])
def test_bags_of_features(tmp_path: Path, name: str):
    path = tmp_path / name
    features = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    match path.suffix:
        case ".h5":
            with h5py.File(path, "w") as file:
                file.update(features=features, coords=np.zeros((9, 2), np.int64))
        case ".pt":
            torch.save(torch.from_numpy(features), path)
        case ".npy":
            np.save(path, features)
        case _:
            np.savez(path, features=features)
    for seed in range(2):
        check_readers(path, [lambda p: read_bag(BagFile(name="a", path=p))], seed=seed)
