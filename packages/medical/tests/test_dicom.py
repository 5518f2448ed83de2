"""DICOM series: order, geometry, values, broken files."""

import random

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless

from heed_core.errors import InputError
from heed_medical.dicom import is_dicom, list_series, read_series
from heed_medical.segmentation.phantoms import write_sample


@pytest.fixture
def series(tmp_path):
    write_sample(tmp_path / "s", layout="chaos", cases=4, shape=(20, 24, 6), seed=3)
    folder = tmp_path / "s/Train_Sets/MR/1/T1DUAL/DICOM_anon/InPhase"
    return sorted(folder.iterdir())


def edit(path, **fields):
    dataset = pydicom.dcmread(path)
    for name, value in fields.items():
        if value is None:
            del dataset[name]
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def test_order_is_by_place_not_by_name(series):
    whole = read_series(series)
    names = [f"{i:03d}.dcm" for i in range(len(series))]
    random.Random(1).shuffle(names)
    renamed = [p.rename(p.with_name(n)) for p, n in zip(series, names, strict=True)]
    again = read_series(renamed)
    np.testing.assert_array_equal(again.array, whole.array)
    np.testing.assert_allclose(again.affine_ras, whole.affine_ras)
    (ordered,) = list_series(renamed[0].parent).values()
    heights = [float(pydicom.dcmread(p).ImagePositionPatient[2]) for p in ordered]
    assert heights == sorted(heights)


def test_affine_follows_the_standard(series):
    """Each voxel lies where PS3.3 C.7.6.2.1.1 says, with x and y turned from LPS to RAS."""
    for path in series:
        place = pydicom.dcmread(path).ImagePositionPatient
        turn = np.deg2rad(30)
        rows = [np.cos(turn), np.sin(turn), 0]
        columns = [-np.sin(turn), np.cos(turn), 0]
        edit(
            path, ImageOrientationPatient=[*rows, *columns], ImagePositionPatient=[5, -7, place[2]]
        )
    image = read_series(series)
    top = max(series, key=lambda p: float(pydicom.dcmread(p).ImagePositionPatient[2]))
    dataset = pydicom.dcmread(top)
    row, column = 11, 4
    along_columns = np.array(dataset.ImageOrientationPatient[:3], float)
    along_rows = np.array(dataset.ImageOrientationPatient[3:], float)
    row_mm, column_mm = dataset.PixelSpacing
    lps = (
        np.array(dataset.ImagePositionPatient, float)
        + along_columns * column_mm * column
        + along_rows * row_mm * row
    )
    ras = (image.affine_ras @ [row, column, len(series) - 1, 1])[:3]
    np.testing.assert_allclose(ras, lps * [-1, -1, 1], atol=1e-4)
    assert image.array[0, row, column, -1] == dataset.pixel_array[row, column]


def test_axial_axes(series):
    assert nib.aff2axcodes(read_series(series).affine_ras) == ("P", "L", "S")


def test_instance_numbers_order_slices_without_a_place(series):
    whole = read_series(series)
    for path in series:
        edit(path, ImagePositionPatient=None)
    image = read_series(series[::-1])
    np.testing.assert_array_equal(image.array, whole.array[..., ::-1])  # numbered from the top
    edit(series[2], InstanceNumber=None)
    with pytest.raises(InputError, match="neither ImagePositionPatient nor InstanceNumber"):
        read_series(series)


def test_rescale_and_monochrome1(series):
    plain = read_series(series[:1]).array
    edit(series[0], RescaleSlope=2, RescaleIntercept=-100)
    np.testing.assert_allclose(read_series(series[:1]).array, 2 * plain - 100)
    edit(series[0], PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(read_series(series[:1]).array, 2 * (4095 - plain) - 100)


def test_broken_files(series, tmp_path):
    content = series[0].read_bytes()
    short = tmp_path / "short.dcm"
    for share in (0.0, 0.1, 0.5, 0.9):
        short.write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=r"short\.dcm") as caught:
            read_series([short])
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_series([tmp_path / "none.dcm"])
    (tmp_path / "text.dcm").write_text("hello" * 100)
    with pytest.raises(InputError, match="not a DICOM file"):
        read_series([tmp_path / "text.dcm"])


def test_without_pixels(series):
    edit(series[0], PixelData=None, Modality="SR")
    with pytest.raises(InputError, match=r"has no pixel data \(modality SR\)"):
        read_series(series)


def test_missing_decoder_names_the_transfer_syntax(series):
    dataset = pydicom.dcmread(series[0])
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(series[0], enforce_file_format=True)
    with pytest.raises(InputError, match=r"JPEG 2000 .*1\.2\.840\.10008\.1\.2\.4\.90"):
        read_series(series[:1])


def test_missing_slice(series):
    with pytest.raises(InputError, match="a slice is missing"):
        read_series([*series[:2], *series[3:]])


def test_other_size_and_tilt(series):
    dataset = pydicom.dcmread(series[3])
    edit(series[3], Rows=dataset.Rows - 1, PixelData=dataset.PixelData[: -2 * dataset.Columns])
    with pytest.raises(InputError, match="19 x 24 pixels, the first slice is 20 x 24"):
        read_series(series)


def test_tilted_slice(series):
    edit(series[3], ImageOrientationPatient=[0.8, 0.6, 0, -0.6, 0.8, 0])
    with pytest.raises(InputError, match="tilted"):
        read_series(series)


def test_two_slices_at_one_place(series):
    place = pydicom.dcmread(series[0]).ImagePositionPatient
    edit(series[1], ImagePositionPatient=place)
    with pytest.raises(InputError, match="lies at the same place"):
        read_series(series)


def test_single_radiograph(series):
    image = read_series(series[:1])
    assert image.array.shape == (1, 20, 24, 1)
    np.testing.assert_allclose(
        image.spacing_mm[:2], pydicom.dcmread(series[0]).PixelSpacing, rtol=1e-6
    )


def test_files_without_suffix_are_recognised(series, tmp_path):
    bare = series[0].rename(tmp_path / "IM0001")
    assert is_dicom(bare)
    (tmp_path / "notes").write_text("x" * 300)
    assert not is_dicom(tmp_path / "notes")
    assert not is_dicom(tmp_path / "s/cases.csv")
