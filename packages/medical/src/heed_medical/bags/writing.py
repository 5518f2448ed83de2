"""Write bags in the layouts that slide tools read: CLAM, TRIDENT, ACMIL, plain arrays, one csv.

Whatever `bags.files` reads of a bag is kept: features, coordinates, the side of a patch, label,
patient and split. What a layout has no place for lies beside it in `labels.csv` and a split file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from heed_core.errors import InputError, MissingExtra
from heed_medical.bags.bag import Bag, BagFile
from heed_medical.slides.writing import write_features
from heed_medical.splits import SPLITS

BagLayout = Literal["clam", "trident", "acmil", "pt", "npy", "csv"]
BAG_LAYOUTS: tuple[BagLayout, ...] = get_args(BagLayout)

Read = tuple[BagFile, Bag]
"""What the lists say of a bag, and the bag."""


def write_bags(
    bags: Iterable[Read], out: Path, layout: BagLayout, *, encoder: str = "features"
) -> None:
    """Write bags into an empty folder, one after the other.

    Args:
        bags: In the order in which they are written.
        out: The folder.
        layout: clam: h5_files/, pt_files/ and patches/; trident: features_ENCODER/ of h5; acmil:
            one patch_feats_pretrain_ENCODER.h5 with float16 features (float32 for a bag that has
            one beyond float16, 65504) and labels as numbers; pt, npy: a file per slide, without
            coordinates; csv: one table with a row per patch.
        encoder: The name that trident and acmil give the features.

    Raises:
        InputError: A csv of a bag without a label, or a name that comes twice.
        MissingExtra: h5py is not installed.
    """
    listed: dict[str, BagFile] = {}
    table = out / "bags.csv"
    for file, bag in bags:
        if file.name in listed:
            raise InputError(f"slide {file.name!r} comes twice", path=file.path)
        listed[file.name] = file
        if layout == "clam":
            _write_clam(out, bag)
        elif layout == "trident":
            _write_h5(out / f"features_{encoder}" / f"{bag.name}.h5", bag)
        elif layout == "acmil":
            _append_group(out / f"patch_feats_pretrain_{encoder}.h5", bag)
        elif layout == "csv":
            _append_rows(table, file, bag)
        else:
            _write_array(out / f"{bag.name}.{layout}", bag)
    files = list(listed.values())
    if layout == "acmil":
        _write_numbers(out / f"patch_feats_pretrain_{encoder}.h5", files)
    if layout != "csv":
        _write_labels(out / "labels.csv", files)
    _write_splits(out, files, as_json=layout == "acmil")


def label_numbers(files: Iterable[BagFile]) -> dict[str, int]:
    """Label -> the number that stands for it in ACMIL's file: itself, or its place in the order.

    Example:
        >>> label_numbers([BagFile(name=n, path=Path(n), label=n) for n in ("tumor", "normal")])
        {'normal': 0, 'tumor': 1}
    """
    labels = sorted({file.label for file in files if file.label is not None})
    if all(label.isdigit() for label in labels):
        return {label: int(label) for label in labels}
    return {label: number for number, label in enumerate(labels)}


def _write_clam(out: Path, bag: Bag) -> None:
    """`h5_files/`, `pt_files/`, and in `patches/` the places with the size of a patch.

    The places are those of the full slide, level 0. `save_path` is relative to the data, since a
    folder that is written under a temporary name does not know its own.
    """
    _write_h5(out / "h5_files" / f"{bag.name}.h5", bag, dtype=np.float32)
    _write_array(out / "pt_files" / f"{bag.name}.pt", bag)
    if bag.coords is None:
        return
    path = out / "patches" / f"{bag.name}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _h5py().File(path, "w") as file:
        coords = file.create_dataset("coords", data=bag.coords.astype(np.int32))
        coords.attrs["name"] = bag.name
        if bag.patch_size is not None:
            coords.attrs["patch_size"], coords.attrs["patch_level"] = bag.patch_size, 0
            coords.attrs["downsample"] = np.ones(2)
        if bag.slide_size is not None:
            coords.attrs["level_dim"] = coords.attrs["downsampled_level_dim"] = bag.slide_size
        coords.attrs["save_path"] = path.parent.name


def _write_h5(path: Path, bag: Bag, dtype: Any = None) -> None:
    features = bag.features if dtype is None else bag.features.astype(dtype)
    write_features(path, features, bag.coords, patch_size=bag.patch_size, slide_size=bag.slide_size)


def _write_array(path: Path, bag: Bag) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, bag.features, allow_pickle=False)
        return
    import torch

    torch.save(torch.from_numpy(bag.features.astype(np.float32)), path)


def _append_group(path: Path, bag: Bag) -> None:
    with _h5py().File(path, "a") as file:
        group = file.create_group(bag.name)
        fits = bool((np.abs(bag.features) <= np.finfo(np.float16).max).all())
        group["feat"] = bag.features.astype(np.float16 if fits else np.float32)
        if bag.coords is not None:
            group["coords"] = bag.coords.astype(np.int32)
            if bag.patch_size is not None:
                group["coords"].attrs["patch_size_level0"] = bag.patch_size


def _write_numbers(path: Path, files: Sequence[BagFile]) -> None:
    numbers = label_numbers(files)
    with _h5py().File(path, "a") as opened:
        for file in files:
            if file.label is not None:
                opened[file.name].attrs["label"] = numbers[file.label]


def _append_rows(path: Path, file: BagFile, bag: Bag) -> None:
    """A row per patch: label, bag, patient, split, features."""
    if file.label is None:
        raise InputError(
            f"slide {file.name!r} has no label, which a table needs",
            path=file.path,
            remedy="label it, or convert to another layout",
        )
    begins = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if begins:
            names = [f"f{number}" for number in range(bag.features.shape[1])]
            writer.writerow(["label", "bag", "patient", *names])
        before = [file.label, file.name, file.patient or file.name]
        for row in bag.features.astype(np.float32):
            writer.writerow([*before, *(f"{value:.9g}" for value in row)])


def _write_labels(path: Path, files: Sequence[BagFile]) -> None:
    if any(file.label is not None for file in files):
        rows = [[file.patient or file.name, file.name, file.label] for file in files if file.label]
        _write_csv(path, ["case_id", "slide_id", "label"], rows)


def _write_splits(out: Path, files: Sequence[BagFile], *, as_json: bool) -> None:
    names = {split: [f.name for f in files if f.split == split] for split in SPLITS}
    if not any(names.values()):
        return
    if as_json:
        content: Mapping[str, list[str]] = {
            f"{split}_names": found for split, found in names.items()
        }
        (out / "split.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return
    rows = [list(row) for row in zip_longest(*names.values(), fillvalue="")]
    _write_csv(out / "splits.csv", list(names), rows)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra("h5py", "heed-medical[slides]") from None
    return h5py
