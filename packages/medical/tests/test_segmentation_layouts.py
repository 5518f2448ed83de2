"""Folders on disk -> cases, splits and plans."""

import json
import shutil

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.segmentation.cases import read_case
from heed_medical.segmentation.labels import CHAOS_LABELS
from heed_medical.segmentation.layouts import find_cases, find_inputs, list_cases
from heed_medical.segmentation.phantoms import write_sample
from heed_medical.segmentation.planning import plan_data
from heed_medical.segmentation.settings import SegmentationData
from heed_medical.splits import SPLITS

LAYOUTS = ("nnunet", "msd", "nifti", "png", "chaos")
SHAPE = (24, 32, 11)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    for layout in LAYOUTS:
        write_sample(root / layout, layout=layout, cases=8, shape=SHAPE, seed=1)
    return root


@pytest.fixture
def sample(samples, tmp_path):
    def copy(layout):
        return shutil.copytree(samples / layout, tmp_path / layout)

    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_is_found_and_planned(samples, layout):
    root = samples / layout
    listing = list_cases(root, SegmentationData())
    assert listing.layout == layout
    assert listing.problems == ()
    plan = plan_data(SegmentationData(), root)
    assert plan.layout == layout
    assert (plan.size, plan.axis, plan.input_channels) == ((32, 32), "axial", 1)
    counts = {s: len(find_cases(root, plan, s)) for s in SPLITS}
    assert counts == {"train": 5, "val": 1, "test": 2}


def test_every_layout_holds_the_same_volumes(samples):
    """Axes, slice order, grey values and orientation on disk differ; what is read does not."""
    read = {}
    for layout in LAYOUTS:
        plan = plan_data(SegmentationData(), samples / layout)
        files = sorted(find_cases(samples / layout, plan, "test"), key=lambda c: c.name)
        read[layout] = [read_case(f, plan) for f in files]
    for layout, cases in read.items():
        for case, reference in zip(cases, read["nnunet"], strict=True):
            assert case.image.shape == (1, *SHAPE), layout
            np.testing.assert_array_equal(case.label, reference.label, err_msg=layout)
            if layout != "png":
                np.testing.assert_allclose(case.image, reference.image, atol=1e-3)
                np.testing.assert_allclose(case.spacing_mm, reference.spacing_mm, rtol=1e-5)


def test_slices_are_ordered_by_number(samples):
    (case, *_) = find_cases(samples / "png", SegmentationData(), "train")
    numbers = [int(p.stem.split("slice_")[1]) for p in case.images]
    assert numbers == list(range(1, SHAPE[2] + 1))  # 10 and 11 after 9
    assert [p.name for p in case.masks] == [p.name for p in case.images]


def test_classes_from_dataset_json(samples):
    expected = ("background=0", "liver=1", "right_kidney=2", "left_kidney=3")
    for layout in ("nnunet", "msd"):
        assert plan_data(SegmentationData(), samples / layout).labels == expected


def test_classes_from_masks(samples):
    plan = plan_data(SegmentationData(), samples / "nifti")
    assert plan.labels == ("background=0", "label_1=1", "label_2=2", "label_3=3")
    assert plan_data(SegmentationData(), samples / "png").labels == CHAOS_LABELS


def test_nnunet_modalities_become_channels(sample):
    root = sample("nnunet")
    for path in sorted((root / "imagesTr").iterdir()) + sorted((root / "imagesTs").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
    plan = plan_data(SegmentationData(), root)
    assert plan.input_channels == 2
    assert read_case(find_cases(root, plan, "train")[0], plan).image.shape == (2, *SHAPE)
    victim = sorted((root / "imagesTr").glob("*_0001.nii.gz"))[0]
    victim.unlink()
    with pytest.raises(InputError, match="1 of 2 modalities"):
        find_cases(root, plan, "train")
    single = find_inputs([sorted((root / "imagesTr").glob("*_0000.nii.gz"))[0]], plan)
    with pytest.raises(InputError, match=r"has 1 channel .* 2 expected"):
        read_case(single[0], plan)


def test_nnunet_ignore_label_and_regions(sample):
    root = sample("nnunet")
    content = json.loads((root / "dataset.json").read_text())
    content["labels"] = {"background": 0, "liver": 1, "kidney": 2, "ignore": 3}
    (root / "dataset.json").write_text(json.dumps(content))
    plan = plan_data(SegmentationData(), root)
    assert plan.ignore == (3,)
    assert len(plan.labels) == 3
    assert (read_case(find_cases(root, plan, "train")[0], plan).label == -100).any()
    content["labels"] = {"background": 0, "whole": [1, 2]}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"dataset\.json.*'whole'"):
        plan_data(SegmentationData(), root)
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        plan_data(SegmentationData(), root)


def test_chaos_patients_behind_links_are_found(sample, tmp_path):
    root = sample("chaos")
    alone = list_cases(root, SegmentationData())
    (tmp_path / "linked/Train_Sets").mkdir(parents=True)
    (root / "Train_Sets/MR").rename(tmp_path / "store")
    (tmp_path / "linked/Train_Sets/MR").symlink_to(tmp_path / "store")
    linked = list_cases(tmp_path / "linked", SegmentationData())
    assert linked.layout == "chaos"
    assert [case.name for case in linked.cases] == [case.name for case in alone.cases]
    folder = tmp_path / "store/1/T1DUAL/DICOM_anon/InPhase"
    for path in folder.iterdir():
        path.unlink()
    shutil.rmtree(tmp_path / "store/2/T1DUAL/Ground")
    told = "\n".join(list_cases(tmp_path / "linked", SegmentationData()).problems)
    assert "/1/T1DUAL/DICOM_anon/InPhase: holds 0 DICOM series; keep one" in told
    assert "/2/T1DUAL/Ground: has no masks" in told


def write_brats(source, root, *, modalities, between="_", values=(0, 1, 2, 4)):
    """Cases of BraTS whose masks have these values."""
    for image in sorted((source / "images").iterdir()):
        stem = image.name.removesuffix(".nii.gz")
        folder = root / stem
        folder.mkdir(parents=True)
        for modality in modalities:
            shutil.copy(image, folder / f"{stem}{between}{modality}.nii.gz")
        mask = nib.load(source / "labels" / image.name)
        array = np.array(values)[np.asarray(mask.dataobj).astype(int) % len(values)]
        nib.save(
            nib.Nifti1Image(array.astype(np.uint8), mask.affine),
            folder / f"{stem}{between}seg.nii.gz",
        )


@pytest.mark.parametrize(
    ("modalities", "between", "values", "regions"),
    [
        (("flair", "t1", "t1ce", "t2"), "_", (0, 1, 2, 4), ("WT=1,2,4", "TC=1,4", "ET=4")),
        (("t1c", "t1n", "t2f", "t2w"), "-", (0, 1, 2, 3), ("WT=1,2,3", "TC=1,3", "ET=3")),
        (("t1c", "t1n", "t2f", "t2w"), "-", (0, 1, 2, 1), ()),
    ],
)
def test_brats_has_its_regions(samples, tmp_path, modalities, between, values, regions):
    write_brats(samples / "nifti", tmp_path, modalities=modalities, between=between, values=values)
    plan = plan_data(SegmentationData(), tmp_path)
    assert (plan.layout, plan.input_channels, plan.regions) == ("brats", 4, regions)
    numbers = {value: n for n, value in enumerate(sorted(set(values)))}
    assert plan.classes_of_regions == {
        text.partition("=")[0]: tuple(numbers[int(v)] for v in text.partition("=")[2].split(","))
        for text in regions
    }
    case = list_cases(tmp_path, plan).cases[0]
    assert [
        path.name.removesuffix(".nii.gz")[len(case.name) + 1 :] for path in case.images
    ] == list(modalities)


def test_cases_without_all_modalities_are_named(samples, tmp_path):
    write_brats(samples / "nifti", tmp_path, modalities=("flair", "t1", "t1ce", "t2"))
    first, second, third, *_ = sorted(tmp_path.iterdir())
    (first / f"{first.name}_t1ce.nii.gz").unlink()
    (second / f"{second.name}_t1.nii.gz").rename(second / f"{second.name}_dwi.nii.gz")
    for path in third.glob("*_[ft]*"):
        path.unlink()
    listing = list_cases(tmp_path, SegmentationData())
    assert not {first.name, second.name, third.name} & {case.name for case in listing.cases}
    told = "\n".join(listing.problems)
    assert f"{first}: case {first.name} has no t1ce; add it or remove the case" in told
    assert f"{second}: case {second.name} has no t1" in told
    assert f"{second.name}_dwi.nii.gz: is not named" in told
    assert f"{third}: has no modalities" in told
    with pytest.raises(InputError, match=r"_dwi.*and 3 more such problems"):
        find_cases(tmp_path, SegmentationData(), "train")


def test_regions_that_do_not_fit_are_refused(samples):
    for regions, told in (
        (("whole",), "regions must be name=value,value"),
        (("a=1,x",), "regions must be name=value,value"),
        (("a=1", "a=2"), "regions must have different names"),
    ):
        with pytest.raises(ValueError, match=told):
            SegmentationData(regions=regions)
    for regions, told in (
        (("whole=1,9",), "region whole names the value 9"),
        (("class_1=1,2",), "region class_1 has the name of a class"),
    ):
        settings = SegmentationData(labels=("background=0", "class_1=1", "b=2"), regions=regions)
        with pytest.raises(InputError, match=told):
            plan_data(settings, samples / "nifti")


def test_suffix_pairs_and_brats(samples, tmp_path):
    source = sorted((samples / "nifti" / "images").iterdir())
    for image in source:
        mask = samples / "nifti" / "labels" / image.name
        stem = image.name.removesuffix(".nii.gz")
        flat, nested = tmp_path / "flat", tmp_path / "brats" / stem
        flat.mkdir(exist_ok=True)
        nested.mkdir(parents=True)
        shutil.copy(image, flat / image.name)
        shutil.copy(mask, flat / f"{stem}-label.nii.gz")
        for modality in ("flair", "t1", "t1ce", "t2"):
            shutil.copy(image, nested / f"{stem}_{modality}.nii.gz")
        shutil.copy(mask, nested / f"{stem}_seg.nii.gz")
    assert list_cases(tmp_path / "flat", SegmentationData()).layout == "nifti"
    assert len(list_cases(tmp_path / "flat", SegmentationData()).cases) == len(source)
    plan = plan_data(SegmentationData(), tmp_path / "brats")
    assert (plan.layout, plan.input_channels) == ("brats", 4)


def write_pairs(root, names, *, masks="masks", table=None):
    for folder in ("images", masks):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(names):
        image = np.full((20, 28), number, np.uint8)
        image[:4] = 200
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray((image > 100).astype(np.uint8)).save(root / masks / f"{name}.png")
    if table:
        (root / "labels.csv").write_text(table)
    return root


def test_split_by_seed_is_by_patient_and_repeatable(tmp_path):
    names = [f"n{i:02d}" for i in range(40)]
    rows = [f"images/{n}.png,masks/{n}.png,p{i // 2}" for i, n in enumerate(names)]
    root = write_pairs(tmp_path, names, table="\n".join(["file,mask,patient", *rows]))
    cases = list_cases(root, SegmentationData()).cases
    again = list_cases(root, SegmentationData()).cases
    other = list_cases(root, SegmentationData(split_seed=1)).cases
    assert cases == again
    assert [c.split for c in cases] != [c.split for c in other]
    counts = {s: sum(c.split == s for c in cases) for s in SPLITS}
    assert counts == {"train": 28, "val": 4, "test": 8}  # 70, 10, 20 % of 20 patients of two
    by_patient = {c.patient: {d.split for d in cases if d.patient == c.patient} for c in cases}
    assert all(len(found) == 1 for found in by_patient.values())


def test_tables(tmp_path):
    table = "file,mask,split\n" + "\n".join(
        f"images/{n}.png,masks/{n}.png,{s}"
        for n, s in [("a", "train"), ("b", "validation"), ("c", "test"), ("gone", "train")]
    )
    root = write_pairs(tmp_path, ["a", "b", "c", "extra"], table=table)
    listing = list_cases(root, SegmentationData())
    assert {c.name: c.split for c in listing.cases} == {"a": "train", "b": "val", "c": "test"}
    text = "\n".join(listing.problems)
    assert "row 5: names images/gone.png, which does not exist" in text
    assert "extra.png: has no row in labels.csv" in text
    with pytest.raises(InputError, match="row 5"):
        find_cases(root, SegmentationData(), "train")
    assert len(find_cases(root, SegmentationData(on_error="skip"), "train")) == 1


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("file,mask,split\nimages/a.png,masks/a.png,trian", "row 2: has split 'trian'"),
        ("file,mask,split\nimages/a.png,masks/a.png", "row 2"),
    ],
)
def test_wrong_tables(tmp_path, table, what):
    root = write_pairs(tmp_path, ["a"], table=table)
    with pytest.raises(InputError, match=what):
        find_cases(root, SegmentationData(), "train")


def test_splits_json(tmp_path):
    root = write_pairs(tmp_path, ["a", "b", "c"])
    (root / "splits.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    with pytest.raises(InputError, match=r"c\.png: is in no split"):
        find_cases(root, SegmentationData(), "train")
    (root / "splits.json").write_text(json.dumps({"train": ["a"], "val": ["b"], "test": ["c"]}))
    assert [c.name for c in find_cases(root, SegmentationData(), "test")] == ["c"]
    (root / "splits.json").write_text(json.dumps({"folds": 5}))
    with pytest.raises(InputError, match=r"splits\.json: has no lists of cases"):
        find_cases(root, SegmentationData(), "test")


def test_files_without_pairs(tmp_path):
    root = write_pairs(tmp_path, ["a", "b", "c"], masks="labels")
    (root / "images" / "b.png").unlink()
    (root / "labels" / "c.png").unlink()
    problems = "\n".join(list_cases(root, SegmentationData()).problems)
    assert "b.png: has no image of the same name" in problems
    assert "c.png: has no mask of the same name" in problems
    with pytest.raises(InputError, match="1 more such problem"):
        find_cases(root, SegmentationData(), "train")


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        list_cases(tmp_path / "none", SegmentationData())
    with pytest.raises(InputError, match="no data set in a known layout"):
        list_cases(tmp_path, SegmentationData())
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="holds no labelled case"):
        list_cases(tmp_path, SegmentationData())
    with pytest.raises(InputError, match="holds no labelled case in the layout png"):
        list_cases(tmp_path, SegmentationData(layout="png"))
    file = tmp_path / "file.txt"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file, a folder was expected"):
        list_cases(file, SegmentationData())


def test_empty_split_and_wrong_split(tmp_path):
    table = "file,mask,split\nimages/a.png,masks/a.png,train"
    root = write_pairs(tmp_path, ["a"], table=table)
    with pytest.raises(InputError, match=r"no cases in the split test \(train 1, val 0, test 0\)"):
        find_cases(root, SegmentationData(), "test")
    with pytest.raises(InputError, match="has no split 'tset'; use train, val, test"):
        find_cases(root, SegmentationData(), "tset")


def test_derived_classes_refuse_instance_numbers(tmp_path):
    root = write_pairs(tmp_path, ["a", "b", "c"])
    for name in "abc":
        instances = np.arange(20 * 28, dtype=np.uint16).reshape(20, 28) // 8
        Image.fromarray(instances).save(root / "masks" / f"{name}.png")
    with pytest.raises(InputError, match=r"--data\.label-mode binary"):
        plan_data(SegmentationData(), root)
    plan = plan_data(SegmentationData(label_mode="binary"), root)
    assert plan.labels == ("background=0", "foreground=1")


def test_colour_is_planned(tmp_path):
    root = write_pairs(tmp_path, ["a", "b", "c"])
    assert plan_data(SegmentationData(), root).channels == "grey"
    colour = np.zeros((20, 28, 3), np.uint8)
    colour[..., 1] = 200
    for name in "abc":
        Image.fromarray(colour).save(root / "images" / f"{name}.png")
    plan = plan_data(SegmentationData(), root)
    assert (plan.channels, plan.input_channels) == ("rgb", 3)
    assert plan_data(SegmentationData(colour="grey"), root).input_channels == 1
    with pytest.raises(InputError, match="is in colour"):
        plan_data(SegmentationData(channels="grey"), root)


def test_chaos_masks_follow_ranks_where_names_differ(sample):
    root = sample("chaos")
    plan = plan_data(SegmentationData(), root)
    expected = read_case(find_cases(root, plan, "test")[0], plan)
    for number, path in enumerate(sorted(root.rglob("Ground/*.png"))):
        path.rename(path.with_name(f"mask_{number:04d}.png"))
    again = read_case(find_cases(root, plan, "test")[0], plan)
    np.testing.assert_array_equal(again.label, expected.label)
    next(root.rglob("Ground/*.png")).unlink()
    problems = list_cases(root, plan).problems
    assert any("10 masks for 11 slices" in line for line in problems)


def test_inputs_from_files_and_folders(samples, tmp_path):
    plan = plan_data(SegmentationData(), samples / "nnunet")
    assert len(find_inputs([samples / "nnunet"], plan)) == 8  # images alone, masks left out
    stacks = find_inputs([samples / "png"], SegmentationData())
    assert {c.name for c in stacks} == {f"Subj_{n}" for n in range(1, 9)}
    series = find_inputs([samples / "chaos"], SegmentationData())
    assert len(series) == 8
    assert len({c.name for c in series}) == 8  # InPhase eight times: patients make them unique
    assert all(c.kind == "dicom" and len(c.images) == SHAPE[2] for c in series)
    file = next((samples / "nifti" / "images").iterdir())
    twice = find_inputs([file, file], SegmentationData())
    assert len(twice) == 1
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="is not an image that can be read"):
        find_inputs([tmp_path / "notes.txt"], SegmentationData())
    with pytest.raises(InputError, match="holds no image"):
        find_inputs([tmp_path], SegmentationData())
    with pytest.raises(InputError, match="does not exist"):
        find_inputs([tmp_path / "none"], SegmentationData())


def test_two_series_in_one_folder(samples, tmp_path):
    for patient in ("1", "2"):
        for path in (samples / "chaos").glob(f"Train_Sets/MR/{patient}/T1DUAL/DICOM_anon/*/*.dcm"):
            shutil.copy(path, tmp_path / f"{patient}_{path.name}")
    found = find_inputs([tmp_path], SegmentationData())
    assert [c.name.rsplit("_series", 1)[1] for c in found] == ["1", "2"]
    for case in found:
        owners = {pydicom.dcmread(p, stop_before_pixels=True).PatientID for p in case.images}
        assert len(owners) == 1
