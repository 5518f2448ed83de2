"""Files with wrong bytes in them: every reader reads one or says in one line that it cannot."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import RLELossless

from heed_core.errors import InputError, MissingExtra
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

TRIALS = 40


def damaged(data: bytes, *, seed: int) -> Iterator[bytes]:
    """Cut short, or with 1 to 30 bytes replaced: near the start, in the header or anywhere."""
    rng = random.Random(seed)
    for _ in range(TRIALS // 4):
        yield data[: rng.randrange(len(data))]
    for _ in range(TRIALS):
        changed = bytearray(data)
        reach = rng.choice([min(len(data), n) for n in (64, 600, len(data))])
        for _ in range(rng.choice([1, 4, 30])):
            changed[rng.randrange(reach)] = rng.randrange(256)
        yield bytes(changed)


def try_all(path: Path, readers: list[Callable[[Path], object]], *, seed: int) -> None:
    """Each reader on the file and on each damaged copy; warnings are errors in this test run."""
    refused = 0
    for reader in readers:
        reader(path)  # whole
    for data in damaged(path.read_bytes(), seed=seed):
        path.write_bytes(data)
        for reader in readers:
            try:
                reader(path)
            except (InputError, MissingExtra) as error:
                refused += 1
                told = str(error)
                assert path.stem in told, told
                assert len(told.splitlines()) == 1, told
                assert len(told) < 500, told
    assert refused >= TRIALS // 4


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
    whole = path.read_bytes()
    assert read_plane(path)[0].shape == (20, 24)
    readers = [
        read_plane,
        lambda p: read_grey(p, voi=True),
        lambda p: read_series([p]),
        lambda p: list_series(p.parent),
    ]
    for seed in range(3):
        path.write_bytes(whole)
        try_all(path, readers, seed=seed)


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
    try_all(tmp_path / name, readers, seed=0)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_nifti(tmp_path: Path, name: str, kind: type):
    values = np.random.default_rng(0).integers(0, 200, (12, 10, 8)).astype(kind)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / name)
    try_all(tmp_path / name, [read_nifti, read_mask_nifti, nifti_shape], seed=0)


@pytest.mark.parametrize("part", ["rec.hea", "rec.dat"])
def test_ecg(tmp_path: Path, part: str):
    leads = np.random.default_rng(0).normal(size=(12, 1000))
    write_record(
        tmp_path / "rec", leads, rate_hz=100, names=LEADS, unit="mV", steps_per_unit=1000.0
    )
    try_all(tmp_path / part, [lambda p: prepare_ecg(read_ecg(p)), stated_duration_s], seed=0)


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
        whole = path.read_bytes()
        try_all(path, [lambda p: read_bag(BagFile(name="a", path=p))], seed=seed)
        path.write_bytes(whole)
