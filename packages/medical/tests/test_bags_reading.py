"""Every layout of slide features is read alike; every broken file is one line that names it."""

import csv
import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from heed_core.errors import InputError
from heed_medical.bags.bag import BagFile, patch_side
from heed_medical.bags.checking import check_data
from heed_medical.bags.data import BagSet, pad_bags, plan_data, thin_out
from heed_medical.bags.files import read_bag, read_table
from heed_medical.bags.listing import (
    broken_rows,
    find_bags,
    find_inputs,
    known_bags,
    list_bags,
)
from heed_medical.bags.settings import BagData
from heed_medical.bags.splits import patients_in_several_splits, read_splits

NAMES = [f"s{i:02d}" for i in range(20)]
rng = np.random.default_rng(0)
FEATURES = {name: rng.normal(size=(5 + i, 6)).astype(np.float32) for i, name in enumerate(NAMES)}
COORDS = {
    name: np.stack([np.arange(len(x)) * 512, np.full(len(x), 1024)], 1)
    for name, x in FEATURES.items()
}


def write_table(path: Path, head: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])


def write_labels(root: Path) -> None:
    rows = [
        [f"p{i // 2}", name, "tumor" if i % 4 < 2 else "normal"] for i, name in enumerate(NAMES)
    ]
    write_table(root / "labels.csv", ["case_id", "slide_id", "label"], rows)


def clam(root: Path) -> BagData:
    (root / "h5_files").mkdir()
    (root / "pt_files").mkdir()
    (root / "patches").mkdir()
    for name, x in FEATURES.items():
        with h5py.File(root / "h5_files" / f"{name}.h5", "w") as file:
            file["features"], file["coords"] = x, COORDS[name].astype(np.int32)
        with h5py.File(root / "patches" / f"{name}.h5", "w") as file:
            file["coords"] = COORDS[name]
            file["coords"].attrs["patch_size"] = 256
            file["coords"].attrs["downsample"] = np.array([2.0, 2.0])
        torch.save(torch.from_numpy(x), root / "pt_files" / f"{name}.pt")
    write_labels(root)
    return BagData()


def trident(root: Path) -> BagData:
    for encoder in ("uni", "resnet"):
        folder = root / "20x_256px_0px_overlap" / f"features_{encoder}"
        folder.mkdir(parents=True)
        for name, x in FEATURES.items():
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["features"], file["coords"] = x[None], COORDS[name]
                file["coords"].attrs["patch_size_level0"] = 512
    write_labels(root)
    return BagData(features="20x_256px_0px_overlap/features_uni")


def acmil(root: Path) -> BagData:
    with h5py.File(root / "patch_feats_pretrain_ssl.h5", "w") as file:
        for i, (name, x) in enumerate(FEATURES.items()):
            file[f"{name}/feat"], file[f"{name}/coords"] = x.astype(np.float16), COORDS[name]
            file[name].attrs["label"] = int(i % 4 < 2)
    return BagData()


def numpy_files(root: Path) -> BagData:
    for name, x in FEATURES.items():
        np.savez(root / f"{name}.npz", features=x, coords=COORDS[name])
    lines = [
        {"slide_id": n, "label": "tumor" if i % 4 < 2 else "normal"} for i, n in enumerate(NAMES)
    ]
    (root / "labels.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return BagData()


LAYOUTS = {"clam": clam, "trident": trident, "acmil": acmil, "numpy": numpy_files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bags(layout: str, tmp_path: Path):
    data = plan_data(LAYOUTS[layout](tmp_path), tmp_path)
    assert data.in_dim == 6
    assert data.classes == (("0", "1") if layout == "acmil" else ("normal", "tumor"))
    names = []
    for split in ("train", "val", "test"):
        for bag in BagSet(find_bags(tmp_path, data, split), data):
            names.append(bag.name)
            np.testing.assert_allclose(bag.features, FEATURES[bag.name], rtol=2e-3, atol=1e-3)
            np.testing.assert_array_equal(bag.coords, COORDS[bag.name])
            assert bag.patch_size == 512
            assert bag.label == (NAMES.index(bag.name) % 4 < 2)
    assert sorted(names) == NAMES
    check = check_data(data, tmp_path)
    assert not check.problems
    assert sum(row["bags"] for row in check.counts) == 20
    inputs = BagSet(find_inputs([tmp_path], data), data)
    assert sorted(bag.name for bag in inputs) == NAMES
    assert {bag.label for bag in inputs} == {None}


def test_half_precision_stays_half(tmp_path: Path):
    data = acmil(tmp_path)
    bag = BagSet(find_inputs([tmp_path], data), data)[0]
    assert bag.features.dtype == np.float16


def test_patients_stay_together_and_splits_are_reproducible(tmp_path: Path):
    data = clam(tmp_path)
    first, again = (list_bags(tmp_path, data).files for _ in range(2))
    assert [file.split for file in first] == [file.split for file in again]
    assert not patients_in_several_splits(first)
    assert {file.split for file in first} == {"train", "val", "test"}
    other = list_bags(tmp_path, BagData(split_seed=5)).files
    assert [file.split for file in first] != [file.split for file in other]


def test_folds_test_every_bag_once(tmp_path: Path):
    clam(tmp_path)
    tested = []
    for fold in range(5):
        data = BagData(folds=5, fold=fold, classes=("normal", "tumor"))
        parts = {
            s: {f.name for f in find_bags(tmp_path, data, s)} for s in ("train", "val", "test")
        }
        assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 20
        tested += sorted(parts["test"])
    assert sorted(tested) == NAMES


def test_split_files_of_acmil_and_clam(tmp_path: Path):
    clam(tmp_path)
    data = BagData(classes=("normal", "tumor"))
    parts = {"train": NAMES[:12], "val": NAMES[12:15], "test": NAMES[15:19]}
    (tmp_path / "splits.json").write_text(json.dumps({f"{k}_names": v for k, v in parts.items()}))
    for split, names in parts.items():
        assert [file.name for file in find_bags(tmp_path, data, split)] == names
    assert "1 slides are in no split (s19)" in list_bags(tmp_path, data).warnings[0]
    text = (tmp_path / "splits.json").read_text()
    (tmp_path / "splits.json").write_text(text, encoding="utf-8-sig")  # as editors on Windows do
    assert [file.name for file in find_bags(tmp_path, data, "val")] == parts["val"]
    (tmp_path / "splits.json").unlink()
    columns = [[*names, *[""] * (12 - len(names))] for names in parts.values()]
    rows = [[str(i), *row] for i, row in enumerate(zip(*columns, strict=True))]
    write_table(tmp_path / "splits_0.csv", ["", "train", "val", "test"], rows)
    write_table(tmp_path / "splits_1.csv", ["", "train", "val", "test"], rows[:1])
    assert [file.name for file in find_bags(tmp_path, data, "test")] == parts["test"]
    first_fold = BagData(classes=("normal", "tumor"), fold=1)
    assert [file.name for file in find_bags(tmp_path, first_fold, "test")] == ["s15"]


def test_a_validation_part_is_taken_from_the_training_patients(tmp_path: Path):
    clam(tmp_path)
    (tmp_path / "splits.json").write_text(json.dumps({"train": NAMES[:16], "test": NAMES[16:]}))
    files = list_bags(tmp_path, BagData()).files
    held = [file for file in files if file.split == "val"]
    assert {file.label for file in held} == {"normal", "tumor"}
    assert not patients_in_several_splits(files)


def test_few_shot_and_merged_classes(tmp_path: Path):
    acmil(tmp_path)
    data = BagData(classes=("benign=0", "malignant=1"), per_class=2)
    files = find_bags(tmp_path, data, "train")
    assert sorted(str(file.label) for file in files) == ["0", "0", "1", "1"]
    assert data.class_names == ("benign", "malignant")
    merged = BagData(classes=("all=0,1", "none=2"))
    assert {bag.label for bag in BagSet(find_bags(tmp_path, merged, "train"), merged)} == {0}


def test_a_table_of_instances_with_and_without_a_header(tmp_path: Path):
    rows = [[i % 2, f"b{i}", *FEATURES[NAMES[i]][j]] for i in range(12) for j in range(3)]
    with gzip.open(tmp_path / "bags.csv.gz", "wt", newline="") as stream:
        csv.writer(stream).writerows(rows)
    data = plan_data(BagData(standardise=True), tmp_path)
    assert (data.in_dim, data.classes) == (6, ("0", "1"))
    train = BagSet(find_bags(tmp_path, data, "train"), data)
    every = np.concatenate([bag.features for bag in train])
    np.testing.assert_allclose(every.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(every.std(0), 1, atol=1e-5)
    (tmp_path / "bags.csv.gz").unlink()
    head = ["f0", "bag", "f1", "label"]
    write_table(tmp_path / "t.csv", head, [[1, "a", 2, "x"], [3, "b", 4, "y"], [5, "a", 6, "x"]])
    one, two = read_table(tmp_path / "t.csv")
    assert (one.name, one.label, two.name, two.label) == ("a", "x", "b", "y")
    np.testing.assert_array_equal(one.features, [[1, 2], [5, 6]])


def test_bags_are_padded_and_thinned_out(tmp_path: Path):
    data = plan_data(clam(tmp_path), tmp_path)
    bags = [*BagSet(find_bags(tmp_path, data, "train"), data)][:3]
    batch = pad_bags(bags)
    assert batch.key_mask is not None
    for row, mask, bag in zip(batch.features, batch.key_mask, bags, strict=True):
        np.testing.assert_array_equal(row[mask].numpy(), bag.features)
        assert (row[~mask] == 0).all()
    assert pad_bags(bags[:1]).key_mask is None
    thin = thin_out(bags[0], np.random.default_rng(0), most=3)
    assert len(thin.features) == len(thin.coords) == 3
    assert thin_out(bags[0], np.random.default_rng(0), most=100) is bags[0]


def test_the_side_of_a_patch_is_the_smallest_step():
    assert patch_side(np.array([[0, 0], [512, 0], [0, 256]])) == 256
    assert patch_side(np.array([[7, 9]])) is None


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "slide.h5"
    x, coords = FEATURES["s03"].copy(), COORDS["s03"]
    if kind == "truncated":
        with h5py.File(path, "w") as file:
            file["features"] = x
        path.write_bytes(path.read_bytes()[:100])
        return path
    if kind == "pickle":
        path = tmp_path / "slide.pt"
        torch.save({"features": x, "more": Path("x")}, path)
        return path
    if kind == "nan":
        x[2, 1] = np.nan
    if kind == "empty":
        x, coords = x[:0], coords[:0]
    if kind == "coords":
        coords = coords[:-1]
    with h5py.File(path, "w") as file:
        file["feat_" if kind == "name" else "features"] = x[:, 0] if kind == "flat" else x
        file["coords"] = coords
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "is not a readable h5 file"),
        ("pickle", "cannot be read"),
        ("nan", "the first is patch 2"),
        ("empty", "without patches"),
        ("coords", r"must be \(8, 2\)"),
        ("name", "no data set 'features' or 'feat', it holds coords, feat_"),
        ("flat", r"must be a table of numbers"),
        ("width", "6 channels, expected 7"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(kind: str, said: str, tmp_path: Path):
    path = damaged(tmp_path, kind)
    with pytest.raises(InputError, match=said) as caught:
        read_bag(BagFile(name="slide", path=path), in_dim=7 if kind == "width" else None)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_damaged_byte_is_read_or_refused(tmp_path: Path):
    """h5py raises RuntimeError, KeyError and others for damaged attributes and tables."""
    path = tmp_path / "slide.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES["s03"], COORDS["s03"]
        file["coords"].attrs["patch_size_level0"] = 256
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x7F]) + content[at + 1 :])
        try:
            read_bag(BagFile(name="slide", path=path))
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 20


def test_check_lists_every_problem(tmp_path: Path):
    clam(tmp_path)
    (tmp_path / "h5_files" / "s04.h5").write_bytes(b"no")
    (tmp_path / "h5_files" / "s07.h5").unlink()
    (tmp_path / "pt_files" / "s07.pt").unlink()
    with h5py.File(tmp_path / "h5_files" / "s09.h5", "w") as file:
        file["features"] = np.zeros((3, 5))
    check = check_data(BagData(), tmp_path)
    text = "\n".join(check.problems)
    assert len(check.problems) == 3, text
    for said in (
        "s04.h5: is not a readable",
        "row 9: slide 's07' has no features",
        "bag s09 has features of 5",
    ):
        assert said in text
    with pytest.raises(InputError, match="s07"):
        find_bags(tmp_path, BagData(classes=("normal", "tumor")), "train")
    skipping = BagData(classes=("normal", "tumor"), on_error="skip")
    assert find_bags(tmp_path, skipping, "train")


def test_every_broken_row_of_labels_is_told_and_may_be_skipped(tmp_path: Path):
    clam(tmp_path)
    with (tmp_path / "labels.csv").open("a") as stream:
        stream.write("p0,s00,tumor\np1,s03,tumor\np9,s04,\np9,s05,tumor,x\np9,,normal\n")
    told = "\n".join(check_data(BagData(), tmp_path).problems)
    for said in (
        "row 22: lists slide 's00' twice, as in row 2",
        "row 23: lists slide 's03' twice, with other values than in row 5",
        "row 24: has no label",
        "row 25: has another number of fields",
        "row 26: has no slide_id",
    ):
        assert said in told
    with pytest.raises(InputError, match="row 25: has another number of fields"):
        plan_data(BagData(), tmp_path)
    data = plan_data(BagData(on_error="skip"), tmp_path)
    splits = ("train", "val", "test")
    found = {f.name: f.label for split in splits for f in find_bags(tmp_path, data, split)}
    assert (found["s00"], found["s04"], len(found)) == ("tumor", "tumor", 19)
    assert "s03" not in found  # nobody knows which of its labels is right
    assert len(broken_rows(tmp_path, data)) == 5
    with pytest.raises(InputError, match=r"row 25: has another .*and 4 more such rows"):
        known_bags(tmp_path, data)


def test_labels_that_look_like_one_class_are_refused(tmp_path: Path):
    rows = [f"s{number},{label}\n" for number, label in enumerate(("0", "1", "0.0", "1.0"))]
    for number in range(4):
        np.save(tmp_path / f"s{number}.npy", FEATURES["s00"])
    (tmp_path / "labels.csv").write_text("slide_id,label\n" + "".join(rows))
    said = "has the labels '0' and '0.0', which look like one class; write them alike"
    with pytest.raises(InputError, match=said):
        plan_data(BagData(), tmp_path)
    assert any(said in line for line in check_data(BagData(), tmp_path).problems)
    merged = BagData(classes=("no=0,0.0", "yes=1,1.0"))
    assert all(file.label in merged.class_of_label for file in list_bags(tmp_path, merged).files)


def test_check_warns_of_a_label_that_only_some_splits_have(tmp_path: Path):
    clam(tmp_path)
    labels = tmp_path / "labels.csv"
    lines = labels.read_text().splitlines()
    lines[1] = lines[1].rsplit(",", 1)[0] + ",tumour"
    labels.write_text("\n".join(lines) + "\n")
    warnings = check_data(BagData(), tmp_path).warnings
    assert f"{tmp_path}: the split val has no bag with the label tumour" in warnings
    assert f"{tmp_path}: the split test has no bag with the label tumour" in warnings


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("labels.csv", "slide_id,label\ns00,tumor\ns00,normal\n", "row 3: lists slide 's00' twice"),
        ("labels.csv", "slide_id,label\ns00,\n", "row 2: has no label"),
        ("labels.csv", "slide_id,label,split\ns00,a,trian\n", "row 2: has the split 'trian'"),
        ("labels.csv", "slide_id,label\ns00,tumor,1\n", "row 2: has another number of fields"),
        ("splits.json", "{", "is not a JSON file"),
        ("splits.json", '{"train_names": [], "dev_names": []}', "unknown split 'dev_names'"),
        (
            "splits.json",
            '{"train_names": ["s00"], "test_names": ["s00"]}',
            "in the splits train and",
        ),
        ("splits.json", '{"train_names": ["zz"]}', "names no slide of the data"),
        ("splits.csv", "a,b\n1,2\n", "no column train, val or test"),
    ],
)
def test_broken_tables_are_named(name: str, text: str, said: str, tmp_path: Path):
    clam(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        list_bags(tmp_path, BagData())
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name", ["labels.csv", "labels.jsonl", "bags.csv", "short.csv.gz", "long.csv.gz", "zlib.csv.gz"]
)
def test_a_table_in_another_encoding_or_cut_short_is_named(name: str, tmp_path: Path):
    path = tmp_path / name
    if name == "labels.csv":
        path.write_bytes("slide_id,label\ns00,Größe\n".encode("latin-1"))
    elif name == "labels.jsonl":
        path.write_bytes('{"slide_id": "s00", "label": "Größe"}\n'.encode("latin-1"))
    else:
        rows = (f"Größe,ä{i},{rng.normal()},1\n" for i in range(2000))
        table = "label,bag,f0,f1\n" + "".join(rows)
        packed = gzip.compress(table.encode())
        path.write_bytes(
            {
                "bags.csv": table.encode("latin-1"),
                "short.csv.gz": packed[:40],
                "long.csv.gz": packed[:-100],
                "zlib.csv.gz": packed[:30] + b"\xff" * 30 + packed[60:],
            }[name]
        )
    if name.startswith("labels"):
        np.save(tmp_path / "s00.npy", FEATURES["s00"])
    check = check_data(BagData(), tmp_path)
    assert len(check.problems) == 1
    assert str(path) in check.problems[0]
    assert "\n" not in check.problems[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slide;label\ns00;a\n", "labels.csv seems to be separated by semicolons"),
        ("slide\tlabel\ns00\ta\n", "labels.csv seems to be separated by tabs"),
        ("slide_id,grade\ns00,a\n", "labels.csv has the columns slide_id, grade"),
    ],
)
def test_a_table_that_gives_no_labels_is_described(text: str, said: str, tmp_path: Path):
    np.save(tmp_path / "s00.npy", FEATURES["s00"])
    (tmp_path / "labels.csv").write_text(text)
    (tmp_path / "split.csv").write_text("train,val,test\ns00,,\n")
    with pytest.raises(InputError, match=f"holds features and no labels; {said}") as caught:
        list_bags(tmp_path, BagData())
    assert "split.csv" not in str(caught.value)
    said = said.removeprefix("labels.csv ").replace("has the columns", "its columns are")
    with pytest.raises(InputError, match=rf"labels\.csv: has no column '.*'; (it )?{said}"):
        list_bags(tmp_path, BagData(labels="labels.csv"))


def test_a_blank_in_json_lines_is_a_blank(tmp_path: Path):
    """Null is neither a label nor a patient, and blank lines are no rows."""
    for name, features in FEATURES.items():
        np.save(tmp_path / f"{name}.npy", features)
    lines = [{"slide_id": name, "label": n % 2, "patient": None} for n, name in enumerate(FEATURES)]
    table = tmp_path / "labels.jsonl"
    table.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert {file.patient for file in list_bags(tmp_path, BagData()).files} == {None}
    table.write_text(table.read_text().replace('"label": 1', '"label": null'))
    with pytest.raises(InputError, match=r"labels\.jsonl, row 3: has no label"):
        plan_data(BagData(), tmp_path)


def test_labels_of_other_slides_are_not_called_missing(tmp_path: Path):
    np.save(tmp_path / "s00.npy", FEATURES["s00"])
    (tmp_path / "labels.csv").write_text("slide_id,label\nt00,a\n")
    with pytest.raises(InputError, match=r"labels\.csv: lists none of the slides whose features"):
        list_bags(tmp_path, BagData())
    (tmp_path / "labels.csv").write_text("slide_id,label\n")
    with pytest.raises(InputError, match=r"labels\.csv: lists no slide"):
        list_bags(tmp_path, BagData())


def acmil_files(root: Path, encoders: tuple[str, ...]) -> None:
    for encoder in encoders:
        with h5py.File(root / f"patch_feats_pretrain_{encoder}.h5", "w") as file:
            for number, (name, x) in enumerate(FEATURES.items()):
                file.create_group(name)["feat"] = x
                file[name].attrs["label"] = number % 2


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_several_acmil_files_one_is_asked_for(count: int, tmp_path: Path):
    encoders = ("natural", "medical", "uni", "virchow")[:count]
    acmil_files(tmp_path, encoders)
    with pytest.raises(InputError, match=r"holds slide 's00' twice.*--data\.features"):
        list_bags(tmp_path, BagData())
    one = list_bags(tmp_path, BagData(features="patch_feats_pretrain_natural.h5"))
    assert {file.label for file in one.files} == {"0", "1"}
    first = min(tmp_path.iterdir())
    if count > 2:  # a damaged file does not hide what the others are
        first.write_bytes(b"no")
        with pytest.raises(InputError, match=first.name):
            list_bags(tmp_path, BagData())


def test_numbers_that_pandas_made_floats_are_slides(tmp_path: Path):
    names = [str(1000 + i) for i in range(8)]
    for name in names:
        np.save(tmp_path / f"{name}.npy", FEATURES["s00"])
    write_table(
        tmp_path / "labels.csv",
        ["slide_id", "label"],
        [[name, i % 2] for i, name in enumerate(names)],
    )
    rows = ["0,1000,1004.0,1006.0", "1,1001,1005.0,1007.0", "2,1002,,", "3,1003,,"]
    (tmp_path / "splits_0.csv").write_text("\n".join([",train,val,test", *rows]) + "\n")
    listing = list_bags(tmp_path, BagData())
    assert [file.split for file in listing.files] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    assert listing.warnings == []
    np.save(tmp_path / "1004.0.npy", FEATURES["s00"])
    with (tmp_path / "labels.csv").open("a") as stream:
        stream.write("1004.0,1\n")
    split_of = {file.name: file.split for file in list_bags(tmp_path, BagData()).files}
    assert (split_of["1004.0"], split_of["1004"]) == ("val", None)
    (tmp_path / "1004.0.npy").unlink()
    (tmp_path / "splits_0.csv").write_text("train,val,test\n1004,1004.0,1001\n")
    with pytest.raises(InputError, match="slide '1004' is in the splits train and val"):
        list_bags(tmp_path, BagData())


def test_check_warns_of_names_without_a_slide_and_of_slides_without_a_split(tmp_path: Path):
    clam(tmp_path)
    lists = {"train_names": NAMES[:8], "val_names": NAMES[8:12], "test_names": [*NAMES[12:18], "z"]}
    path = tmp_path / "split.json"
    path.write_text(json.dumps(lists))
    warnings = check_data(BagData(), tmp_path).warnings
    assert f"{path}: names 1 slides that have no features in {tmp_path} (z)" in warnings
    assert f"{tmp_path}: 2 slides are in no split (s18, s19)" in warnings
    assert not any("names 1" in line for line in check_data(BagData(folds=5), tmp_path).warnings)


def test_linked_folders_are_searched_and_hidden_files_are_not(tmp_path: Path):
    root, store = tmp_path / "data", tmp_path / "store"
    root.mkdir()
    (store / ".cache").mkdir(parents=True)
    for folder, name in ((store, "s00"), (store, "._s01"), (store / ".cache", "s02")):
        np.save(folder / f"{name}.npy", FEATURES["s00"])
    np.save(root / "s03.npy", FEATURES["s03"])
    (root / "a").symlink_to(store)
    (root / "b").symlink_to(store)
    (store / "again").symlink_to(root)
    assert [file.name for file in find_inputs([root], BagData())] == ["s00", "s03"]
    write_table(root / "labels.csv", ["slide_id", "label"], [["s00", "x"], ["s03", "y"]])
    (root / "._labels.csv").write_bytes(b"\0\xff")
    (root / "splits").mkdir()
    (root / "splits" / "._0.csv").write_bytes(b"\0\xff")
    assert len(list_bags(root, BagData()).files) == 2


def test_inputs_of_one_name_are_told_apart(tmp_path: Path):
    for folder in ("d1", "d2"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "s.npy", FEATURES["s00"])
    torch.save(torch.from_numpy(FEATURES["s01"]), tmp_path / "d2" / "s.pt")
    paths = [tmp_path / name for name in ("d1/s.npy", "d2/s.npy", "d1/s.npy", "d2/s.pt")]
    files = find_inputs(paths, BagData())
    assert [file.name for file in files] == ["d1/s", "d2/s", "d2/s_2"]
    assert [file.path for file in files] == [paths[0], paths[1], paths[3]]
    assert [file.name for file in find_inputs(paths[:1], BagData())] == ["s"]


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such file or folder"):
        list_bags(tmp_path / "nothing", BagData())
    with pytest.raises(InputError, match="holds no features"):
        list_bags(tmp_path, BagData())
    np.save(tmp_path / "s00.npy", FEATURES["s00"])
    with pytest.raises(InputError, match="holds features and no labels"):
        list_bags(tmp_path, BagData())
    with pytest.raises(InputError, match="does not exist"):
        list_bags(tmp_path, BagData(labels="other.csv"))
    (tmp_path / "labels.csv").write_text("slide_id,label\ns00,a\n")
    with pytest.raises(InputError, match="one class only"):
        plan_data(BagData(), tmp_path)
    with pytest.raises(InputError, match=r"'a', the classes are x, y"):
        find_bags(tmp_path, BagData(classes=("x", "y")), "train")
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "s00.npy", FEATURES["s00"])
    with pytest.raises(InputError, match=r"twice.*--data.features"):
        list_bags(tmp_path, BagData())
    with pytest.raises(InputError, match="no such file"):
        read_splits(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 2}, "folds"),
        ({"folds": 5, "fold": 5}, "fold must be within 0..4"),
        ({"classes": ("a=1,2", "b=2")}, "'2' twice"),
        ({"per_class": 0}, "per_class"),
        ({"feature_mean": (1.0,)}, "feature_std"),
        ({"feature_mean": (1.0,), "feature_std": (1.0,)}, "no effect"),
    ],
)
def test_settings_without_sense_are_refused(options: dict, said: str):
    with pytest.raises(ValueError, match=said):
        BagData(**options)
