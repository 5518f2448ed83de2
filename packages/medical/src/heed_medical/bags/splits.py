"""Which bag belongs to which split: from a file, from folds, or drawn by a seed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError, reason_of
from heed_medical.bags.bag import BagFile
from heed_medical.bags.settings import BagData
from heed_medical.splits import SPLITS, Split, in_several_splits

SHARES: Mapping[Split, float] = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Shares of the patients of each class in a split that is drawn by a seed, at least one each."""


def assign_splits(
    root: Path, files: Sequence[BagFile], data: BagData, *, by_rows: bool = False
) -> list[BagFile]:
    """Give every labelled bag a split; bags that a split file leaves out get none.

    Where the data have a training and no validation part, a tenth of the training patients of each
    class, drawn by the seed, becomes it.

    Args:
        root: The data set.
        files: Its bags.
        data: The settings.
        by_rows: Whether splits that bags already have count before a split file that is found;
            one that the settings name counts first.

    Raises:
        InputError: A split file that cannot be read or names no bag of the data.
    """
    if data.folds:
        return _folded(files, data)
    source = _source(root, files, data, by_rows=by_rows)
    if source is not None:
        listed = _listed(source, files)
        placed = [replace(file, split=listed.get(file.name)) for file in files]
        if not any(file.split for file in placed):
            raise InputError(
                "names no slide of the data", path=source, remedy="use the names of the files"
            )
        return _with_validation(placed, data)
    if any(file.split for file in files):
        return _with_validation(files, data)
    return _drawn(files, data)


def names_without_bag(
    root: Path, files: Sequence[BagFile], data: BagData, *, by_rows: bool = False
) -> list[str]:
    """A line where the split file names slides that are none of all the files."""
    source = None if data.folds else _source(root, files, data, by_rows=by_rows)
    if source is None:
        return []
    lost = sorted(set(_listed(source, files)) - {file.name for file in files})
    if not lost:
        return []
    some = ", ".join(lost[:5])
    return [f"{source}: names {len(lost)} slides that have no features in {root} ({some})"]


def _source(root: Path, files: Sequence[BagFile], data: BagData, *, by_rows: bool) -> Path | None:
    """The split file that counts, if one does."""
    if by_rows and data.splits is None and any(file.split for file in files):
        return None
    return _split_file(root, data)


def _listed(source: Path, files: Sequence[BagFile]) -> dict[str, Split]:
    """Name of the slide -> split.

    pandas writes the numbers of a column that it filled up as 1008.0: this is 1008, unless a slide
    is called so.
    """
    names = {file.name for file in files}
    found: dict[str, Split] = {}
    for entry, split in read_splits(source).items():
        whole = entry.removesuffix(".0")
        name = whole if whole in names and entry not in names and whole.isdigit() else entry
        if found.setdefault(name, split) != split:
            raise InputError(
                f"slide {name!r} is in the splits {found[name]} and {split}", path=source
            )
    return found


def patients_in_several_splits(files: Iterable[BagFile]) -> dict[str, tuple[str, ...]]:
    """Patients whose bags lie in more than one split -> these splits."""
    return in_several_splits((file.patient, file.split) for file in files)


def few_shot(files: Sequence[BagFile], data: BagData) -> list[BagFile]:
    """`data.per_class` training bags of each class, chosen by the seed."""
    if data.per_class is None:
        return list(files)
    rng = np.random.default_rng(data.split_seed)
    chosen: set[str] = set()
    for names in _by_class(files, data).values():
        chosen.update(rng.permutation(sorted(names))[: data.per_class].tolist())
    return [file for file in files if file.name in chosen]


def read_splits(path: Path) -> dict[str, Split]:
    """Read a split file: slide name -> split.

    json holds `train_names`, `val_names`, `test_names` (or `train`, `val`, `test`); csv has the
    columns train, val, test of any lengths.

    Raises:
        InputError: Another content, or a slide in two splits.
    """
    if not path.is_file():
        raise InputError("no such file", path=path)
    names = _json_names(path) if path.suffix == ".json" else _csv_names(path)
    found: dict[str, Split] = {}
    for split, entries in names.items():
        for entry in entries:
            name = strip_suffix(entry)
            if found.setdefault(name, split) != split:
                raise InputError(
                    f"slide {name!r} is in the splits {found[name]} and {split}", path=path
                )
    return found


def strip_suffix(name: str) -> str:
    """A slide's name without the suffix of a feature or slide file."""
    return re.sub(r"\.(h5|hdf5|pt|npy|npz|svs|tiff?|ndpi|mrxs|jpe?g|png)$", "", name.strip())


def _split_file(root: Path, data: BagData) -> Path | None:
    folder = root.parent if root.is_file() else root
    if data.splits is not None:
        return folder / data.splits
    found = [
        path
        for pattern in ("split*.json", "split*.csv", "splits/*.json", "splits/*.csv")
        for path in sorted(folder.glob(pattern))
        if not path.name.startswith(".") and not path.stem.endswith(("_bool", "_descriptor"))
    ]
    if len(found) < 2:
        return found[0] if found else None
    numbered = [p for p in found if re.search(rf"(?<!\d){data.fold}$", p.stem)]
    if len(numbered) != 1:
        raise InputError(
            f"holds {len(found)} split files, {len(numbered)} of fold {data.fold}",
            path=folder,
            remedy="name one with --data.splits",
        )
    return numbered[0]


def _json_names(path: Path) -> dict[Split, list[str]]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"is not a JSON file ({error})", path=path) from None
    keys = {f"{split}{end}": split for split in SPLITS for end in ("", "_names")}
    if not isinstance(loaded, dict) or not set(loaded) & set(keys):
        raise InputError("has no key train_names, val_names or test_names", path=path)
    if unknown := sorted(set(loaded) - set(keys)):
        raise InputError(f"has the unknown split {unknown[0]!r}", path=path)
    for key, names in loaded.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError("is not a list of slide names", path=path, place=key)
    return {keys[key]: names for key, names in loaded.items()}


def _csv_names(path: Path) -> dict[Split, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (UnicodeDecodeError, csv.Error) as error:
        reason = reason_of(error)
        raise InputError(
            f"is not a csv file ({reason})", path=path, remedy="save it as csv in UTF-8"
        ) from None
    if not rows or not set(SPLITS) & set(rows[0]):
        raise InputError("has no column train, val or test", path=path)
    return {
        split: [row[split] for row in rows if row.get(split) and row[split].lower() != "nan"]
        for split in SPLITS
    }


def _patient(file: BagFile) -> str:
    return file.patient or file.name


def _by_class(files: Sequence[BagFile], data: BagData) -> dict[str, list[str]]:
    """Label -> names of its bags."""
    table = data.class_of_label
    found: dict[str, list[str]] = {}
    for file in files:
        label = str(table.get(file.label or "", file.label))
        found.setdefault(label, []).append(file.name)
    return dict(sorted(found.items()))


def _patients_by_class(files: Sequence[BagFile]) -> dict[str, list[str]]:
    """Label -> patients; a patient counts for the label of its first bag."""
    first: dict[str, str] = {}
    for file in sorted(files, key=lambda file: file.name):
        if file.label is not None:
            first.setdefault(_patient(file), file.label)
    found: dict[str, list[str]] = {}
    for patient, label in sorted(first.items()):
        found.setdefault(label, []).append(patient)
    return dict(sorted(found.items()))


def _with_validation(files: Sequence[BagFile], data: BagData) -> list[BagFile]:
    training = [file for file in files if file.split == "train"]
    if not training or any(file.split == "val" for file in files):
        return list(files)
    rng = np.random.default_rng(data.split_seed)
    held: set[str] = set()
    for patients in _patients_by_class(training).values():
        count = max(1, round(SHARES["val"] * len(patients))) if len(patients) > 1 else 0
        held.update(str(patient) for patient in rng.permutation(patients)[:count])
    return [
        replace(file, split="val") if file.split == "train" and _patient(file) in held else file
        for file in files
    ]


def _folded(files: Sequence[BagFile], data: BagData) -> list[BagFile]:
    rng = np.random.default_rng(data.split_seed)
    fold_of: dict[str, int] = {}
    dealt = 0
    for patients in _patients_by_class(files).values():
        for patient in rng.permutation(patients):
            fold_of[str(patient)] = dealt % data.folds
            dealt += 1
    splits: dict[int, Split] = {(data.fold + 1) % data.folds: "val", data.fold: "test"}
    return [
        replace(file, split=splits.get(fold_of[_patient(file)], "train"))
        if file.label is not None
        else file
        for file in files
    ]


def _drawn(files: Sequence[BagFile], data: BagData) -> list[BagFile]:
    rng = np.random.default_rng(data.split_seed)
    split_of: dict[str, Split] = {}
    for patients in _patients_by_class(files).values():
        few = len(patients) < len(SPLITS)
        val, test = (0 if few else max(1, round(SHARES[s] * len(patients))) for s in SPLITS[1:])
        for place, patient in enumerate(rng.permutation(patients)):
            rest: Split = "test" if place < val + test else "train"
            split_of[str(patient)] = "val" if place < val else rest
    return [
        replace(file, split=split_of[_patient(file)]) if file.label is not None else file
        for file in files
    ]
