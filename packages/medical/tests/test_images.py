"""Pictures and NIfTI files, whole and broken."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.images import (
    file_kind,
    file_stem,
    is_colour,
    picture_affine,
    read_mask_nifti,
    read_mask_picture,
    read_nifti,
    read_picture,
    same_geometry,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def save_nifti(path, array, affine=None):
    nib.save(
        nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path
    )
    return path


def save_picture(path, array):
    Image.fromarray(array).save(path)
    return path


def test_suffixes(tmp_path):
    assert file_kind(tmp_path / "a.NII.GZ") == "nifti"
    assert file_kind(tmp_path / "a.JPG") == "picture"
    assert file_kind(tmp_path / "a.csv") == "other"
    assert file_stem(tmp_path / "a.b.nii.gz") == "a.b"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_picture_keeps_values(tmp_path, rng, dtype):
    values = rng.integers(0, np.iinfo(dtype).max, size=(5, 7)).astype(dtype)
    image = read_picture(save_picture(tmp_path / "a.png", values))
    assert image.array.shape == (1, 5, 7)
    assert image.array.dtype == np.float32
    np.testing.assert_array_equal(image.array[0], values.astype(np.float32))


def test_colour_picture(tmp_path, rng):
    values = rng.integers(0, 255, size=(5, 7, 3)).astype(np.uint8)
    path = save_picture(tmp_path / "a.png", values)
    assert is_colour(path)
    with pytest.raises(InputError, match=r"a\.png: is in colour.*--data\.colour grey"):
        read_picture(path)
    np.testing.assert_array_equal(
        read_picture(path, channels="rgb").array, np.moveaxis(values, -1, 0)
    )
    grey = read_picture(path, convert=True).array[0]
    np.testing.assert_allclose(grey, values @ np.array([0.299, 0.587, 0.114]), rtol=1e-5)


def test_colour_file_with_equal_channels_is_grey(tmp_path, rng):
    values = rng.integers(0, 255, size=(5, 7)).astype(np.uint8)
    alpha = np.full((5, 7), 255, np.uint8)
    path = save_picture(tmp_path / "a.png", np.stack([values] * 3 + [alpha], -1))
    assert not is_colour(path)
    np.testing.assert_array_equal(read_picture(path).array[0], values)
    np.testing.assert_array_equal(read_mask_picture(path).array, values)


def test_grey_picture_as_rgb_has_equal_channels(tmp_path, rng):
    values = rng.integers(0, 255, size=(5, 7)).astype(np.uint8)
    array = read_picture(save_picture(tmp_path / "a.png", values), channels="rgb").array
    np.testing.assert_array_equal(array, np.stack([values] * 3))


def test_palette_mask_gives_indices(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + [0] * 759)
    picture.putdata(indices.ravel().tolist())
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask_picture(tmp_path / "m.png").array, indices)


def test_mask_in_colour_is_refused(tmp_path, rng):
    path = save_picture(tmp_path / "m.png", rng.integers(0, 255, size=(4, 4, 3)).astype(np.uint8))
    with pytest.raises(InputError, match=r"m\.png: is a mask in colour"):
        read_mask_picture(path)


@pytest.mark.parametrize("reader", [read_picture, read_mask_picture])
def test_broken_pictures(tmp_path, rng, reader):
    whole = save_picture(tmp_path / "a.png", rng.integers(0, 255, size=(64, 64)).astype(np.uint8))
    content = whole.read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name, what in [
        ("short.png", "truncated"),
        ("empty.png", "not a readable picture"),
        ("text.png", "not a readable picture"),
        ("none.png", "does not exist"),
    ]:
        with pytest.raises(InputError, match=what) as caught:
            reader(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nifti_shapes(tmp_path, rng):
    volume = rng.standard_normal((4, 5, 6)).astype(np.float32)
    image = read_nifti(save_nifti(tmp_path / "a.nii.gz", volume))
    np.testing.assert_array_equal(image.array, volume[None])
    assert image.spacing_mm == (1.0, 2.0, 3.0)
    many = rng.standard_normal((4, 5, 6, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        read_nifti(save_nifti(tmp_path / "b.nii", many)).array, np.moveaxis(many, 3, 0)
    )
    flat = rng.standard_normal((4, 5)).astype(np.float32)
    assert read_nifti(save_nifti(tmp_path / "c.nii", flat)).array.shape == (1, 4, 5, 1)


def test_nifti_scaling_is_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(2.0, -7.0)
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").array[0], expected)


@pytest.mark.parametrize("reader", [read_nifti, read_mask_nifti])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_nifti(tmp_path, rng, reader, suffix, share):
    volume = rng.integers(0, 99, (20, 20, 20)).astype(np.int16)
    content = save_nifti(tmp_path / f"a{suffix}", volume).read_bytes()
    path = tmp_path / f"short{suffix}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"truncated|not a readable NIfTI") as caught:
        reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    volume = np.zeros((3, 4, 5), np.float32)
    volume[1, 2, 3] = value
    path = save_nifti(tmp_path / "a.nii.gz", volume)
    with pytest.raises(InputError, match=r"holds 1 value that is not finite.*\[0, 1, 2, 3\]"):
        read_nifti(path)
    with pytest.raises(InputError, match=r"not finite"):
        read_mask_nifti(path)


def test_mask_of_broken_numbers(tmp_path):
    path = save_nifti(tmp_path / "m.nii.gz", np.full((2, 2, 2), 0.5, np.float32))
    with pytest.raises(InputError, match="not whole numbers"):
        read_mask_nifti(path)


def test_mask_with_four_axes(tmp_path):
    path = save_nifti(tmp_path / "m.nii.gz", np.zeros((2, 2, 2, 3), np.uint8))
    with pytest.raises(InputError, match="shape 2 x 2 x 2 x 3"):
        read_mask_nifti(path)
    single = save_nifti(tmp_path / "s.nii.gz", np.zeros((2, 2, 2, 1), np.uint8))
    assert read_mask_nifti(single).array.shape == (2, 2, 2)


@pytest.mark.parametrize("reader", [read_nifti, read_mask_nifti])
@pytest.mark.parametrize("kind", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_values_that_are_no_numbers(tmp_path, reader, kind):
    path = save_nifti(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), kind))
    with pytest.raises(InputError, match="numbers were expected"):
        reader(path)


def test_affine_that_cannot_be_inverted(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), None)
    image.header["sform_code"] = 1
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(InputError, match="affine that cannot be inverted"):
        read_nifti(tmp_path / "a.nii")


def test_same_geometry_measures_corners():
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    near, far, turned = affine.copy(), affine.copy(), affine.copy()
    near[0, 3], far[0, 3] = 0.05, 0.2
    turned[0, 0], turned[1, 1] = -1.0, 1.0
    assert same_geometry(affine, near, (9, 9, 9))
    assert not same_geometry(affine, far, (9, 9, 9))
    assert not same_geometry(affine, turned, (1, 1, 1))


def test_picture_affine_axes():
    affine = picture_affine((2.0, 3.0, 4.0))
    assert nib.aff2axcodes(affine) == ("P", "L", "S")
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (2.0, 3.0, 4.0))
