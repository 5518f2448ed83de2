"""A plain table of paths, labels and splits is a data set of every system, wherever its files lie.

Also what tables have in common elsewhere: the names of splits, and splits without a case.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heed_core.errors import InputError
from heed_medical.bags import listing as bags
from heed_medical.bags.checking import check_data
from heed_medical.bags.data import BagSet
from heed_medical.bags.settings import BagData
from heed_medical.manifests import folder_and_table, is_table
from heed_medical.more import studies as more
from heed_medical.more.checking import check_studies
from heed_medical.more.settings import MoreData
from heed_medical.pictures import layouts as pictures
from heed_medical.pictures.checking import check_pictures
from heed_medical.pictures.listers import find_table
from heed_medical.pictures.settings import PictureData
from heed_medical.reports import layouts as reports
from heed_medical.reports.checking import check_reports
from heed_medical.reports.settings import ReportData

REPORTS = ReportData(size=32, resize=40, threshold=1, views=1)
LISTS: Mapping[str, Callable[[Path], Sequence[Any]]] = {
    "medusa": lambda root: pictures.list_pictures(root, PictureData()).pictures,
    "acmil": lambda root: bags.list_bags(root, BagData()).files,
    "ivgn": lambda root: reports.list_studies(root, REPORTS).studies,
    "more": lambda root: more.list_studies(root, MoreData()).studies,
}
CHECKS: Mapping[str, Callable[[Path], Any]] = {
    "medusa": lambda root: check_pictures(PictureData(), root),
    "acmil": lambda root: check_data(BagData(), root),
    "ivgn": lambda root: check_reports(REPORTS, root),
    "more": lambda root: check_studies(MoreData(), root),
}
PARTS: Mapping[str, Callable[[Path, str], object]] = {
    "medusa": lambda root, split: pictures.find_pictures(root, PictureData(), split),
    "acmil": lambda root, split: bags.find_bags(root, BagData(classes=("a", "b")), split),
    "ivgn": lambda root, split: reports.studies_of(root, REPORTS, split),
    "more": lambda root, split: more.find_studies(root, MoreData(), split),
}
SPLITS = ("train",) * 4 + ("validation",) * 2 + ("test",) * 2


def write(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return path
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(system: str, root: Path, splits: Sequence[str] = SPLITS) -> list[dict[str, str]]:
    """A row per file of `root`/store, with paths relative to `root`/lists."""
    (root / "store").mkdir()
    rows = []
    for number, split in enumerate(splits):
        path = root / "store" / f"c{number}.{'npy' if system == 'acmil' else 'png'}"
        if system == "acmil":
            np.save(path, np.ones((3, 4), dtype=np.float32))
        else:
            values = np.arange(40 * 48, dtype=np.uint16).reshape(40, 48)
            Image.fromarray((values % 251).astype(np.uint8)).save(path)
        row = {"path": f"../store/{path.name}", "label": "ab"[number % 2], "split": split}
        row |= {"report": "Clear lungs.", "patient": f"p{number}"}
        if system == "more":
            row["xray_path"] = row.pop("path")
        rows.append(row)
    return rows


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("system", list(LISTS))
def test_a_manifest_is_a_data_set(system: str, suffix: str, tmp_path: Path):
    table = write(tmp_path / "lists" / f"manifest.{suffix}", rows_of(system, tmp_path))
    for root in (table, table.parent):
        listed = LISTS[system](root)
        assert Counter(one.split for one in listed) == {"train": 4, "val": 2, "test": 2}
        assert sorted(getattr(one, "patient", "") or one.subject for one in listed) == [
            f"p{number}" for number in range(8)
        ]
        assert list(CHECKS[system](root).problems) == []
    (tmp_path / "store" / Path(listed[-1].name).with_suffix("").name).with_suffix(
        ".npy" if system == "acmil" else ".png"
    ).unlink()
    (problem,) = CHECKS[system](table).problems
    assert "does not exist" in problem


def test_a_table_that_contradicts_the_settings_is_refused(tmp_path: Path):
    table = write(tmp_path / "lists" / "a.csv", rows_of("medusa", tmp_path))
    assert folder_and_table(table, "a.csv", option="--x") == (table.parent, "a.csv")
    assert folder_and_table(table.parent, "b.csv", option="--x") == (table.parent, "b.csv")
    assert [is_table(Path(f"a.{end}")) for end in ("CSV", "csv.gz", "ndjson", "json", "gz")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    for listed in (
        lambda: pictures.list_pictures(table, PictureData(table="b.csv")),
        lambda: reports.list_studies(table, ReportData(annotation="b.csv")),
        lambda: bags.list_bags(table, BagData(labels="b.csv")),
    ):
        with pytest.raises(InputError, match=r"a\.csv: is a table, and --data\.\w+ names another"):
            listed()
    for listed in (
        lambda: pictures.list_pictures(table, PictureData(layout="folders")),
        lambda: reports.list_studies(table, ReportData(layout="r2gen")),
    ):
        with pytest.raises(InputError, match=r"not in the layout \w+; add --data\.layout table"):
            listed()
    assert find_table(table) is not None
    with pytest.raises(InputError, match=r"c0\.png: is not a folder; .* or a csv or jsonl"):
        pictures.list_pictures(tmp_path / "store" / "c0.png", PictureData())
    with pytest.raises(InputError, match=r"c0\.png: is not a folder; .* or a csv or jsonl"):
        reports.list_studies(tmp_path / "store" / "c0.png", REPORTS)


# Slides: features may also lie in the table itself, or many in one file


def test_a_table_of_instances_stays_one(tmp_path: Path):
    for name, head in {"plain": "", "named": "bag,label,split,f0,f1\n"}.items():
        rows = [f"b{n},{n % 2},train,1,2" if head else f"{n % 2},{n},1,2" for n in range(4)]
        path = tmp_path / name / "musk.csv"
        path.parent.mkdir()
        path.write_text(head + "\n".join(rows) + "\n")
        assert not bags.is_manifest(path)
        for root in (path, path.parent):
            assert {file.label for file in bags.list_bags(root, BagData()).files} == {"0", "1"}
    path = write(tmp_path / "only.csv", [{"bag": "b0", "label": "x", "split": "train"}])
    assert bags.is_manifest(path)


def test_slides_in_one_file_are_told_apart_by_their_names(tmp_path: Path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for name in ("s0", "s1"):
            file[f"{name}/feat"] = np.full((2, 3), float(name[1]), dtype=np.float32)
    rows = [{"slide_id": f"s{n}", "path": "../all.h5", "label": "ab"[n]} for n in range(2)]
    table = write(tmp_path / "lists" / "m.csv", rows)
    found = bags.list_bags(table, BagData()).files
    first = BagSet(found, BagData(classes=("a", "b")))
    assert [float(bag.features.mean()) for bag in first] == [0.0, 1.0]
    assert [file.name for file in bags.find_inputs([table], BagData())] == ["s0", "s1"]


def test_the_path_and_the_split_of_a_row_count_first(tmp_path: Path):
    """A file of the same name elsewhere, and a split file beside the table, do not."""
    rows = rows_of("acmil", tmp_path)
    table = write(tmp_path / "lists" / "m.csv", rows)
    np.save(table.parent / "c0.npy", np.zeros((1, 2), dtype=np.float32))
    (table.parent / "splits.json").write_text(json.dumps({"test_names": ["c0"]}))
    for root, split in ((table, "train"), (table.parent, "test")):
        (first,) = [f for f in bags.list_bags(root, BagData()).files if f.name == "c0"]
        assert (first.path.parent.name, first.split) == ("store", split)
    named = bags.list_bags(table, BagData(splits="splits.json")).files
    assert {file.name: file.split for file in named}["c0"] == "test"
    assert not bags.list_bags(table, BagData()).warnings


def test_a_table_of_slides_that_cannot_be_used_is_named(tmp_path: Path):
    rows = rows_of("acmil", tmp_path)
    table = write(tmp_path / "m.csv", rows)  # whence the paths lead nowhere
    with pytest.raises(InputError, match=r"row 2: names .*c0\.npy, which .*and 7 more such rows"):
        bags.list_bags(table, BagData())
    with pytest.raises(InputError, match=r"row 2: names .*c0\.npy, which"):
        bags.find_inputs([table], BagData())
    write(table, [{"path": "a.npy", "class": "a", "split": "train"}])
    with pytest.raises(InputError, match=r"m\.csv: has no column 'label'; its columns are path"):
        bags.list_bags(table, BagData())


# Splits


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("system", list(PARTS))
def test_a_split_without_a_case_is_named(system: str, split: str, tmp_path: Path):
    """Where the others have some."""
    others = [s for s in ("train", "val", "test") if s != split]
    splits = [others[number // 2] for number in range(4)]
    if split == "val":  # the validation is drawn from the training where none is given
        splits = ["test"] * 4
    table = write(tmp_path / "lists" / "manifest.csv", rows_of(system, tmp_path, splits))
    for root in (table, table.parent):
        with pytest.raises(InputError, match=rf"lists.*: (has|holds) no \w+ .*\bsplit '?{split}\b"):
            PARTS[system](root, split)
        assert PARTS[system](root, splits[0])


@pytest.mark.parametrize("system", list(LISTS))
def test_splits_go_by_many_names(system: str, tmp_path: Path):
    rows = rows_of(system, tmp_path, ("train", "valid", "validate", "validation", "TEST"))
    table = write(tmp_path / "lists" / "manifest.csv", rows)
    found = [one.split for one in LISTS[system](table)]
    assert found == ["train", "val", "val", "val", "test"]
