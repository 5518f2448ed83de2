"""Training slices, their augmentation, and the check of whole data sets."""

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from heed_core.errors import InputError
from heed_medical.segmentation.augmentation import SliceAugmentation, augment
from heed_medical.segmentation.cases import read_case
from heed_medical.segmentation.checking import check_data
from heed_medical.segmentation.layouts import find_cases
from heed_medical.segmentation.phantoms import write_sample
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.segmentation.slices import CaseData, SliceData, pad_to, window_starts

DATA = Path(os.environ.get("HEED_DATA", Path(__file__).parents[4] / "shared" / "data"))
SHAPE = (20, 28, 5)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    for layout in ("nnunet", "png", "nifti"):
        write_sample(root / layout, layout=layout, cases=8, shape=SHAPE, seed=2)
    return root


@pytest.fixture
def sample(samples, tmp_path):
    return lambda layout: shutil.copytree(samples / layout, tmp_path / layout)


def training(root, **fields):
    plan = replace(plan_data(SegmentationData(), root), **fields)
    return find_cases(root, plan, "train"), plan


def test_samples_have_the_planned_size(samples):
    files, plan = training(samples / "nnunet")
    data = SliceData(files, plan)
    assert len(data) == 5 * SHAPE[2]
    case = read_case(files[1], plan)
    sample = data[SHAPE[2] + 3]
    assert data.source(SHAPE[2] + 3) == (case.name, 3)
    assert sample["image"].shape == (1, 32, 32)
    assert sample["image"].dtype == torch.float32
    assert sample["label"].dtype == torch.int64
    inner = sample["label"][6:26, 2:30]
    np.testing.assert_array_equal(inner, case.label[..., 3])
    np.testing.assert_array_equal(sample["image"][0, 6:26, 2:30], case.image[0, ..., 3])
    assert (sample["label"][:6] == -100).all()
    assert (sample["label"][:, 30:] == -100).all()


def test_windows_of_large_slices_cover_everything(samples):
    files, plan = training(samples / "nnunet", size=(8, 16))
    data = SliceData(files[:1], plan)
    tops, lefts = window_starts(20, 8, 0.25), window_starts(28, 16, 0.25)
    assert len(data) == SHAPE[2] * len(tops) * len(lefts)
    foreground = sum(int((data[i]["label"] > 0).sum()) for i in range(len(data)))
    assert foreground >= int((read_case(files[0], plan).label > 0).sum())


@given(length=st.integers(1, 300), window=st.integers(1, 64), overlap=st.floats(0, 0.9))
def test_window_starts(length, window, overlap):
    starts = window_starts(length, window, overlap)
    covered = np.zeros(length, bool)
    for start in starts:
        assert 0 <= start <= max(0, length - window)
        covered[start : start + window] = True
    assert covered.all()
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= max(1, window * (1 - overlap) + 1)).all()


@given(height=st.integers(1, 20), width=st.integers(1, 20), grow=st.integers(0, 12))
def test_padding_keeps_the_middle(height, width, grow):
    array = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    padded = pad_to(array, (height + grow, width))
    top = grow // 2
    np.testing.assert_array_equal(padded[:, top : top + height], array)
    assert set(np.unique(padded)) == set(np.unique(array))


def test_background_slices_are_thinned(samples):
    files, plan = training(samples / "nnunet")
    everything = SliceData(files, plan)
    none = SliceData(files, replace(plan, background_slices=0.0))
    some = [i for i in range(len(everything)) if (everything[i]["label"] > 0).any()]
    assert [none.source(i) for i in range(len(none))] == [everything.source(i) for i in some]


def test_a_small_cache_changes_nothing(samples):
    files, plan = training(samples / "nnunet")
    large, small = SliceData(files, plan), SliceData(files, replace(plan, cache_mb=0))
    assert len(pickle.dumps(large)) < 100_000  # decoded volumes stay behind
    for index in (0, 12, 24, 3):
        for key in ("image", "label"):
            assert torch.equal(large[index][key], small[index][key])


def test_broken_case_stops_or_is_listed(sample):
    root = sample("nnunet")
    files, plan = training(root)
    files[2].images[0].write_bytes(files[2].images[0].read_bytes()[:500])
    with pytest.raises(InputError, match=files[2].images[0].name):
        SliceData(files, plan)
    data = SliceData(files, replace(plan, on_error="skip"))
    assert len(data) == 4 * SHAPE[2]
    assert len(data.skipped) == 1
    assert files[2].images[0].name in data.skipped[0]
    with pytest.raises(InputError, match="no training slice is left of 1 cases"):
        SliceData(files[2:3], replace(plan, on_error="skip"))
    with pytest.raises(InputError, match=files[2].images[0].name):
        CaseData(files, plan)[2]


def test_slices_need_a_plan(samples):
    files, plan = training(samples / "nnunet")
    with pytest.raises(ValueError, match="plan_data"):
        SliceData(files, replace(plan, size=None))


def disc_sample():
    """An image that is its own label, so that both must move alike."""
    rows, columns = np.mgrid[:40, :56]
    disc = ((rows - 12) ** 2 + (columns - 40) ** 2 < 64).astype(np.int64)
    image = np.stack([disc, 1 - disc]).astype(np.float32)
    return {"image": torch.from_numpy(image), "label": torch.from_numpy(disc)}


def test_augmentation_is_a_function_of_the_generator():
    sample = disc_sample()
    before = {key: value.clone() for key, value in sample.items()}
    results = [augment(sample, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    for key in ("image", "label"):
        assert torch.equal(results[0][key], results[1][key])
        assert torch.equal(sample[key], before[key])
        assert not all(torch.equal(results[0][key], r[key]) for r in results[2:])


def test_image_and_label_move_together():
    for seed in range(20):
        result = augment(disc_sample(), np.random.default_rng(seed))
        apart = (result["image"][0] > 0.5) != (result["label"] == 1)
        assert apart.float().mean() < 0.02
        assert set(result["label"].unique().tolist()) <= {0, 1}  # nearest, never between
        assert result["image"].shape == (2, 40, 56)
        assert result["image"].dtype == torch.float32


def test_flip_rates_and_angles():
    """Without rotation, each of the four flip states comes up a quarter of the time."""
    sample = disc_sample()
    options = SliceAugmentation(rotation_probability=0.0)
    states = [
        (bool(r["label"][:20].any()), bool(r["label"][:, :28].any()))
        for r in (augment(sample, np.random.default_rng(s), options) for s in range(400))
    ]
    for state in {(True, True), (True, False), (False, True), (False, False)}:
        assert 0.15 < states.count(state) / 400 < 0.35
    still = SliceAugmentation(flip_probability=0.0, rotation_probability=0.0)
    same = augment(sample, np.random.default_rng(0), still)
    assert torch.equal(same["image"], sample["image"])
    assert torch.equal(same["label"], sample["label"])


def test_corners_are_background_and_padding_stays_ignored():
    sample = {"image": torch.ones(1, 32, 32), "label": torch.full((32, 32), 2)}
    sample["label"][:, :4] = -100
    options = SliceAugmentation(flip_probability=0.0, rotation_probability=1.0)
    result = augment(sample, np.random.default_rng(3), options)
    outside = result["image"][0] == 0
    assert outside.any()
    assert (result["label"][outside] == 0).float().mean() > 0.9
    assert (result["label"] == -100).any()
    with pytest.raises(ValueError, match="rotation_deg"):
        SliceAugmentation(rotation_deg=200.0)


def test_check_of_a_sound_data_set(samples):
    check = check_data(SegmentationData(), samples / "nnunet")
    assert not check.problems
    assert [row["split"] for row in check.counts] == ["train", "val", "test"]
    train = check.counts[0]
    assert (train["cases"], train["slices"], train["size"]) == (5, 25, "20 x 28")
    files, plan = training(samples / "nnunet")
    liver = sum(int((read_case(f, plan).label == 1).sum()) for f in files)
    assert train["liver (voxels)"] == liver
    assert train["liver (cases)"] == 5


def rewrite(path, change):
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    affine = image.affine.copy()
    array = change(array, affine)
    nib.save(nib.Nifti1Image(array, affine), path)


def put(value):
    def change(array, affine):
        array[0, 0, 0] = value
        return array

    return change


def shift(array, affine):
    affine[:3, 3] += 30.0
    return array


def test_check_lists_every_problem(sample):
    root = sample("nnunet")
    images, labels = root / "imagesTr", root / "labelsTr"
    path = images / "phantom_1_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:400])
    rewrite(labels / "phantom_2.nii.gz", lambda array, affine: array[:-2])
    rewrite(labels / "phantom_3.nii.gz", shift)
    rewrite(labels / "phantom_4.nii.gz", put(77))
    rewrite(images / "phantom_5_0000.nii.gz", put(np.nan))
    (labels / "phantom_6.nii.gz").unlink()
    check = check_data(SegmentationData(), root)
    text = "\n".join(check.problems)
    for part in (
        "phantom_1_0000.nii.gz: is ",
        "phantom_2.nii.gz: has shape",
        "phantom_3.nii.gz: lies elsewhere",
        "phantom_4.nii.gz: has label value 77",
        "phantom_5_0000.nii.gz: holds 1 value that is not finite",
        "phantom_6_0000.nii.gz: has no mask of the same name",
    ):
        assert part in text
    assert check.counts[0]["broken"] == 5


def test_check_of_pictures(sample):
    root = sample("png")
    colour = np.zeros((*SHAPE[:2], 3), np.uint8)
    colour[..., 0] = 90
    Image.fromarray(colour).save(root / "train" / "Img" / "Subj_1slice_2.png")
    mask = np.array(Image.open(root / "train" / "GT" / "Subj_2slice_1.png"))
    mask[0, 0] = 77
    Image.fromarray(mask).save(root / "train" / "GT" / "Subj_2slice_1.png")
    for folder in ("Img", "GT"):
        for path in (root / "test" / folder).glob("Subj_7slice_*.png"):
            shutil.copy(path, root / "train" / folder / path.name)
    text = "\n".join(check_data(SegmentationData(), root).problems)
    assert "Subj_1slice_2.png: is in colour" in text
    assert "has label value 77" in text
    assert "patient 7 is in the splits train and test" in text


def test_check_of_nothing(tmp_path):
    check = check_data(SegmentationData(), tmp_path)
    assert len(check.problems) == 1
    assert "no data set in a known layout" in check.problems[0]


def test_check_warns_of_a_class_in_one_case(sample):
    root = sample("nifti")
    first = sorted((root / "labels").iterdir())[0]
    rewrite(first, put(9))
    check = check_data(SegmentationData(), root)
    assert any("only training case with class label_9" in line for line in check.warnings)


def real(name):
    path = DATA / name
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set HEED_DATA to the folder of the real data sets")
    return path


def test_real_hippocampus():
    check = check_data(SegmentationData(), real("seg-hippocampus"))
    assert not check.problems
    assert [row["cases"] for row in check.counts] == [80, 10, 20]  # of its README


def test_real_nuclei():
    root = real("seg-nuclei")
    plan = plan_data(SegmentationData(label_mode="binary"), root)
    assert (plan.channels, plan.size) == ("rgb", (256, 256))
    assert [len(find_cases(root, plan, s)) for s in ("train", "val", "test")] == [153, 21, 42]


def test_real_lungs():
    root = real("seg-lung")
    check = check_data(SegmentationData(ignore=(127,)), root)
    assert not check.problems
    assert [row["cases"] for row in check.counts] == [57, 9, 17]
