"""Arrays of a case: frames, pairs that do not fit, intensities; predictions and files of it."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel import orientations
from PIL import Image

from heed_core.errors import InputError
from heed_medical.segmentation.cases import (
    CaseFiles,
    from_slices,
    normalise,
    read_case,
    to_slices,
    widest_axis,
)
from heed_medical.segmentation.layouts import find_cases, find_inputs
from heed_medical.segmentation.phantoms import write_sample
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.prediction import predict_volume
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.writers import write_labels

SETTINGS = SegmentationData(
    labels=("background=0", "low=1", "high=2"), label_mode="ids", input_channels=1, size=(64, 64)
)
SHAPE = (19, 26, 7)
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, 0.2, -0.15) @ np.diag([1.1, 0.9, 3.0]), [10.0, -20.0, 30.0]
)


def save_pair(folder, axes="RAS", *, affine=OBLIQUE, dtype=np.int16, suffix=".nii.gz"):
    """A volume whose mask is a threshold of it, its axes on disk turned to `axes`."""
    rng = np.random.default_rng(4)
    volume = rng.integers(0, 300, SHAPE).astype(dtype)
    mask = np.digitize(volume, [100, 200]).astype(np.uint8)
    paths = []
    for name, array in (("image", volume), ("mask", mask)):
        image = nib.Nifti1Image(array, affine)
        start = orientations.io_orientation(affine)
        turn = orientations.ornt_transform(start, orientations.axcodes2ornt(tuple(axes)))
        image = image.as_reoriented(turn)
        image.set_sform(image.affine, code=4)
        image.set_qform(image.affine, code=1)
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = b"scanner 5"
        nib.save(image, folder / f"{name}{suffix}")
        paths.append(folder / f"{name}{suffix}")
    return CaseFiles(name="case", kind="nifti", images=(paths[0],), masks=(paths[1],))


def threshold(x):
    """Logits whose argmax is the threshold mask of `save_pair`, from a normalised slice."""
    low, high = 99.5 / 299, 199.5 / 299
    v = x[:, :1]
    return torch.cat([low - v, torch.minimum(v - low, high - v), v - high], dim=1)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PLS", "SAR", "AIL"])
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_prediction_returns_to_the_frame_on_disk(tmp_path, axes, axis):
    files = save_pair(tmp_path, axes)
    settings = SegmentationData(**{**vars_of(SETTINGS), "axis": axis, "normalise": "minmax"})
    case = read_case(files, settings)
    assert nib.aff2axcodes(case.affine_ras) == ("P", "L", "S")
    prediction = predict_volume(threshold, case, settings, batch=3)
    np.testing.assert_array_equal(prediction.labels, case.label)
    (path,) = write_labels(prediction, tmp_path / "out", settings.table)
    written, source, mask = nib.load(path), nib.load(files.images[0]), nib.load(files.masks[0])
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(mask.dataobj))
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-6)
    assert written.get_data_dtype() == np.uint8
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "descrip", "srow_x"):
        np.testing.assert_array_equal(written.header[field], source.header[field], err_msg=field)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["case.nii.gz"]


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_working_affine_points_at_the_same_place(tmp_path):
    files = save_pair(tmp_path, "SAR")
    case = read_case(files, SETTINGS)
    source = nib.load(files.images[0])
    values = np.asarray(source.dataobj)
    for index in [(0, 0, 0), (3, 8, 5), (25, 18, 6)]:
        working = np.linalg.inv(case.affine_ras) @ source.affine
        # the voxel on disk that lies at the place of `index` in memory
        place = np.rint(np.linalg.inv(working) @ [*index, 1])[:3].astype(int)
        assert (values[tuple(place)] >= 200) == (case.label[index] == 2)
        assert (values[tuple(place)] < 100) == (case.label[index] == 0)


def test_nifti_of_two_axes_and_of_four(tmp_path):
    plane = np.arange(12 * 9, dtype=np.float32).reshape(12, 9)
    nib.save(nib.Nifti1Image(plane, np.eye(4)), tmp_path / "flat.nii")
    nib.save(nib.Nifti1Image(np.stack([plane[..., None]] * 2, -1), np.eye(4)), tmp_path / "m.nii")
    for name, channels, shape in (("flat", 1, (12, 9)), ("m", 2, (12, 9, 1))):
        settings = SegmentationData(**{**vars_of(SETTINGS), "input_channels": channels})
        (files,) = find_inputs([tmp_path / f"{name}.nii"], settings)
        case = read_case(files, settings)
        assert case.slices.shape == (1, channels, 9, 12)  # rows run to posterior
        (path,) = write_labels(predict_volume(threshold, case, settings), tmp_path, settings.table)
        assert nib.load(path).shape == shape


def test_mask_of_another_shape_and_place(tmp_path):
    files = save_pair(tmp_path)
    mask = nib.load(files.masks[0])
    values = np.asarray(mask.dataobj)
    nib.save(nib.Nifti1Image(values[:-1], mask.affine), files.masks[0])
    with pytest.raises(InputError, match=r"mask\.nii\.gz: has shape 18 x 26 x 7, its image image"):
        read_case(files, SETTINGS)
    moved = mask.affine.copy()
    moved[0, 3] += 2.0
    nib.save(nib.Nifti1Image(values, moved), files.masks[0])
    with pytest.raises(InputError, match=r"mask\.nii\.gz: lies elsewhere.*up to 2"):
        read_case(files, SETTINGS)
    assert read_case(files, SETTINGS, label=False).label is None


def test_label_outside_the_list(tmp_path):
    files = save_pair(tmp_path)
    mask = nib.load(files.masks[0])
    values = np.asarray(mask.dataobj).copy()
    values[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(values, mask.affine), files.masks[0])
    with pytest.raises(InputError, match=r"mask\.nii\.gz: has label value 9 \(1 voxels\).*0, 1, 2"):
        read_case(files, SETTINGS)


def test_axis_of_slices(tmp_path):
    files = save_pair(tmp_path, affine=np.diag([4.0, 1.0, 1.0, 1.0]))
    case = read_case(files, SETTINGS)
    assert case.slice_axis == 1  # the widest spacing runs left-right
    assert case.slices.shape == (19, 1, 26, 7)
    assert widest_axis((5, 5, 5), (1.0, 1.0, 1.0)) == 2
    assert widest_axis((1, 5, 5), (1.0, 1.0, 1.0)) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_inverse(axis):
    volume = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    slices = to_slices(volume, axis)
    assert slices.shape[0] == volume.shape[axis + 1]
    np.testing.assert_array_equal(from_slices(slices, axis), volume)


def test_intensity_scale_does_not_matter():
    rng = np.random.default_rng(0)
    image = rng.random((2, 6, 7, 5)).astype(np.float32)
    for how in ("minmax", "percentile", "zscore", "slice-minmax", "slice-zscore"):
        first = normalise(image, how, axis=2)
        np.testing.assert_allclose(first, normalise(image * 1000 + 5, how, axis=2), atol=1e-3)
        assert first.dtype == np.float32
    assert normalise(image, "minmax").min() == 0.0
    assert normalise(image, "minmax").max() == 1.0
    by_slice = normalise(image, "slice-minmax", axis=2)
    np.testing.assert_array_equal(by_slice.max((1, 2)), np.ones((2, 5)))
    np.testing.assert_allclose(normalise(image, "zscore").std((1, 2, 3)), 1.0, rtol=1e-5)


def test_channels_share_a_range_only_where_asked():
    image = np.stack([np.array([[0.0, 1.0]]), np.array([[0.0, 4.0]])]).astype(np.float32)
    np.testing.assert_allclose(normalise(image, "minmax")[:, 0, 1], [1.0, 1.0])
    np.testing.assert_allclose(normalise(image, "minmax", joint=True)[:, 0, 1], [0.25, 1.0])


def test_percentile_clips_outliers_and_keeps_sparse_images():
    image = np.linspace(0, 1, 10_000, dtype=np.float32).reshape(1, 100, 100)
    image[0, 0, 0] = 1e6
    assert np.median(normalise(image, "percentile")) == pytest.approx(0.5, abs=0.01)
    sparse = np.zeros((1, 100, 100), np.float32)
    sparse[0, 3, 3] = 7.0
    assert normalise(sparse, "percentile")[0, 3, 3] == 1.0
    assert (normalise(np.full((1, 4, 4), 3.0, np.float32), "minmax") == 0).all()


def test_window_clips_first():
    image = np.array([[[-1000.0, 0.0, 50.0, 3000.0]]], np.float32)
    result = normalise(image, "minmax", window=(-50.0, 150.0))
    np.testing.assert_allclose(result[0, 0], [0.0, 0.25, 0.5, 1.0])


def test_windows_cover_a_large_slice_and_agree_with_one_pass(tmp_path):
    """A network that looks at single pixels gives the same labels through windows."""
    files = save_pair(tmp_path)
    whole = SegmentationData(**{**vars_of(SETTINGS), "normalise": "minmax"})
    small = SegmentationData(**{**vars_of(whole), "size": (16, 8)})
    case = read_case(files, whole)
    seen = []

    def watched(x):
        seen.append(tuple(x.shape[2:]))
        return threshold(x)

    first = predict_volume(threshold, case, whole, probabilities=True)
    second = predict_volume(watched, case, small, probabilities=True)
    assert set(seen) == {(16, 8)}
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_allclose(first.probabilities, second.probabilities, atol=1e-5)
    assert first.probabilities.shape == (3, *case.image.shape[1:])
    np.testing.assert_allclose(first.probabilities.sum(0), 1.0, rtol=1e-5)


def test_network_sees_multiples_of_eight(tmp_path):
    case = read_case(save_pair(tmp_path), SETTINGS)
    seen = []
    predict_volume(lambda x: seen.append(x.shape) or threshold(x), case, SETTINGS, batch=4)
    # rows run to posterior: 26 -> 32, columns to the left: 19 -> 24
    assert seen == [(4, 1, 32, 24), (3, 1, 32, 24)]
    with pytest.raises(ValueError, match="model must return logits"):
        predict_volume(lambda x: threshold(x)[..., :-1], case, SETTINGS)


def test_dicom_prediction_lies_on_the_series(tmp_path):
    write_sample(tmp_path / "s", layout="chaos", cases=4, shape=(24, 32, 6))
    plan = plan_data(SegmentationData(), tmp_path / "s")
    (files,) = find_cases(tmp_path / "s", plan, "test")
    case = read_case(files, plan)

    def truth(x):  # the label, whatever the image
        planes = torch.from_numpy(case.label_slices.astype(np.int64))
        logits = torch.nn.functional.one_hot(planes, len(plan.labels)).movedim(-1, 1).float()
        return logits[: len(x)]

    prediction = predict_volume(truth, case, plan)
    (path,) = write_labels(prediction, tmp_path / "out", plan.table)
    written = nib.load(path)
    assert written.shape == (24, 32, 6)
    assert set(np.unique(written.dataobj)) == {0, 1, 2, 3}  # class numbers, not grey values
    np.testing.assert_array_equal(np.asarray(written.dataobj), case.label)
    np.testing.assert_allclose(written.header.get_zooms(), case.spacing_mm, rtol=1e-5)
    assert nib.aff2axcodes(written.affine) == ("P", "L", "S")


def test_png_volume_gives_masks_and_a_volume(tmp_path):
    write_sample(tmp_path / "s", layout="png", cases=4, shape=(20, 28, 11))
    plan = plan_data(SegmentationData(spacing_mm=(1.5, 1.5, 6.0)), tmp_path / "s")
    (files,) = find_cases(tmp_path / "s", plan, "test")
    case = read_case(files, plan)
    assert case.spacing_mm == pytest.approx((1.5, 1.5, 6.0))
    one_hot = np.eye(len(plan.labels), dtype=np.float32)[case.label_slices]
    padded = np.pad(np.moveaxis(one_hot, -1, 1), ((0, 0), (0, 0), (2, 2), (2, 2)))
    state = {"at": 0}

    def truth(x):
        start = state["at"]
        state["at"] += len(x)
        return torch.from_numpy(padded[start : state["at"]])

    prediction = predict_volume(truth, case, plan, batch=4)
    volume, *masks = write_labels(prediction, tmp_path / "out", plan.table)
    assert [p.name for p in masks] == [p.name for p in files.masks]
    for written, source in zip(masks, files.masks, strict=True):
        np.testing.assert_array_equal(
            np.asarray(Image.open(written)), np.asarray(Image.open(source))
        )
    image = nib.load(volume)
    assert image.shape == (20, 28, 11)
    assert image.header.get_zooms() == pytest.approx((1.5, 1.5, 6.0))


def test_picture_mask_has_the_size_of_the_picture(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (30, 21)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg")
    settings = SegmentationData(
        labels=("background=0", "middle=127", "top=255"), label_mode="grey", size=(32, 32)
    )
    (files,) = find_inputs([tmp_path / "a.jpg"], settings)
    prediction = predict_volume(threshold, read_case(files, settings), settings)
    (path,) = write_labels(prediction, tmp_path / "out", settings.table)
    mask = np.asarray(Image.open(path))
    assert mask.shape == (30, 21)
    assert set(np.unique(mask)) == {0, 127, 255}


def test_unwritable_folder(tmp_path):
    case = read_case(save_pair(tmp_path), SETTINGS)
    prediction = predict_volume(threshold, case, SETTINGS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_labels(prediction, tmp_path / "file" / "sub", SETTINGS.table)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    case = read_case(save_pair(tmp_path), SETTINGS)
    prediction = predict_volume(threshold, case, SETTINGS)
    (path,) = write_labels(prediction, tmp_path / "out", SETTINGS.table)
    before = path.read_bytes()

    def full_disk(image, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_labels(prediction, tmp_path / "out", SETTINGS.table)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["case.nii.gz"]
    assert path.read_bytes() == before


def test_rgb_pictures_of_mixed_sets(tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (16, 24, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "b.png")
    settings = SegmentationData(**{**vars_of(SETTINGS), "channels": "rgb", "input_channels": 3})
    for files in find_inputs([tmp_path / "a.png", tmp_path / "b.png"], settings):
        assert read_case(files, settings).image.shape == (3, 16, 24)


def test_slices_of_another_size(tmp_path):
    write_sample(tmp_path, layout="png", cases=4, shape=(20, 28, 4))
    plan = plan_data(SegmentationData(), tmp_path)
    files = find_cases(tmp_path, plan, "test")[0]
    Image.fromarray(np.zeros((20, 27), np.uint8)).save(files.images[2])
    with pytest.raises(InputError, match=r"is 20 x 27 pixels, .* is 20 x 28"):
        read_case(files, plan)


def test_cases_travel_between_processes(tmp_path):
    import pickle

    case = read_case(save_pair(tmp_path), SETTINGS)
    again = pickle.loads(pickle.dumps(case))
    np.testing.assert_array_equal(again.image, case.image)
    assert again.frame.header == case.frame.header


def test_sample_is_repeatable(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sample(tmp_path / name, layout="png", cases=4, shape=(16, 24, 2), seed=seed)
    contents = [
        [p.read_bytes() for p in sorted((tmp_path / name).rglob("*.png"))] for name in "abc"
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ValueError, match="at least 4"):
        write_sample(tmp_path / "a", cases=3)


def test_sample_splits_are_listed(tmp_path):
    write_sample(tmp_path, layout="nnunet", cases=4, shape=(16, 24, 2))
    splits = json.loads((tmp_path / "splits.json").read_text())
    assert splits == {"train": ["phantom_1", "phantom_2"], "val": ["phantom_3"]}
