"""Read the feature files of whole slides: h5 of CLAM, TRIDENT and ACMIL, pt, npy, npz, csv tables.

Whatever is wrong with a file is one `InputError` that names the file, the slide and the data set.
"""

from __future__ import annotations

import csv
import gzip
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64

from heed_core.arrays import load_array, load_arrays
from heed_core.errors import InputError, MissingExtra, reason_of
from heed_medical.bags.bag import Bag, BagFile, patch_side

if TYPE_CHECKING:
    import h5py  # type: ignore[import-untyped]

H5_SUFFIXES = (".h5", ".hdf5")
SUFFIXES = (*H5_SUFFIXES, ".pt", ".npy", ".npz")
FEATURE_NAMES = ("features", "feat", "feats")
COORD_NAMES = ("coords", "coordinates")
_READ_AGAIN = "copy or extract the features again"


def read_bag(file: BagFile, *, in_dim: int | None = None, patch_size: int | None = None) -> Bag:
    """Read one bag.

    Args:
        file: Where it lies.
        in_dim: The channels that its features must have. None: any.
        patch_size: Side of a patch in pixels of the full slide; None: as the file says.

    Raises:
        InputError: The file is missing, damaged, empty, of another width, or holds no number.
        MissingExtra: An h5 file without h5py.
    """
    if file.features is not None:
        found: Mapping[str, Any] = {"features": file.features}
        attributes: Mapping[str, Any] = {}
    else:
        found, attributes = _read(file)
    features = _features(found, file, in_dim)
    coords = _coords(found, file, len(features))
    side = patch_size or _patch_size(attributes)
    if side is None and coords is not None:
        side = patch_side(coords)
    return Bag(
        name=file.name,
        features=features,
        coords=coords,
        patch_size=side,
        slide_size=_slide_size(attributes),
        path=file.path,
    )


@contextmanager
def open_h5(path: Path) -> Iterator[h5py.File]:
    """Open an h5 file to read.

    Raises:
        InputError: It is missing or no h5 file.
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtra("h5py", "heed-medical[slides]") from None
    if not path.is_file():
        raise InputError("no such file", path=path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        reason = reason_of(error)
        raise InputError(
            f"is not a readable h5 file ({reason})", path=path, remedy=_READ_AGAIN
        ) from None
    try:
        with file:
            yield file
    except InputError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:  # of h5py
        reason = reason_of(error)
        raise InputError(f"is damaged ({reason})", path=path, remedy=_READ_AGAIN) from None


def slide_groups(path: Path) -> dict[str, str | None]:
    """The slides in an h5 file that holds many, and their labels; empty for a file of one slide."""
    with open_h5(path) as file:
        import h5py

        groups = {name: group for name, group in file.items() if isinstance(group, h5py.Group)}
        return {name: _label(group.attrs.get("label")) for name, group in groups.items()}


def _label(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.decode()
    return str(value if isinstance(value, str) else np.asarray(value).reshape(-1)[0])


def _read(file: BagFile) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Arrays by name, and the attributes of the coordinates."""
    if not file.path.is_file():
        raise InputError(
            f"no feature file of slide {file.name!r}" if file.path.is_dir() else "no such file",
            path=file.path,
        )
    suffix = file.path.suffix.lower()
    if suffix in H5_SUFFIXES:
        return _read_h5(file)
    if suffix == ".pt":
        return _read_torch(file.path), {}
    if suffix in (".npy", ".npz"):
        return _read_numpy(file.path), {}
    raise InputError(
        "is not a file of features", path=file.path, remedy=f"give one of {', '.join(SUFFIXES)}"
    )


def _read_h5(file: BagFile) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    with open_h5(file.path) as opened:
        import h5py

        node: Any = opened
        if file.group is not None:
            node = opened.get(file.group)
            if not isinstance(node, h5py.Group):
                raise InputError(f"has no slide {file.group!r}", path=file.path)
        try:
            found = {
                name: item[()] for name, item in node.items() if isinstance(item, h5py.Dataset)
            }
        except OSError as error:
            reason = reason_of(error)
            raise InputError(
                f"is damaged ({reason})", path=file.path, place=file.group, remedy=_READ_AGAIN
            ) from None
        attributes = dict(node.attrs)
        for name in COORD_NAMES:
            if name in found:
                attributes |= dict(node[name].attrs)
    return found, attributes | _clam_attributes(file.path, attributes)


def _clam_attributes(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What CLAM keeps in a file of its own: `patches/<slide>.h5` beside the folder of features."""
    import h5py

    if "patch_size" in known or "patch_size_level0" in known:
        return {}
    beside = path.parent.parent / "patches" / path.name
    if not beside.is_file() or not h5py.is_hdf5(beside):
        return {}
    with open_h5(beside) as opened:
        return dict(opened["coords"].attrs) if "coords" in opened else {}


def _read_torch(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        with warnings.catch_warnings():  # of an unusual pickle version, which names no file
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader lets anything escape from a damaged file
        reason = reason_of(error)
        raise InputError(f"cannot be read ({reason})", path=path, remedy=_READ_AGAIN) from None
    named = loaded if isinstance(loaded, Mapping) else {"features": loaded}
    tensors = {str(k): x for k, x in named.items() if isinstance(x, torch.Tensor)}
    return {k: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for k, x in tensors.items()}


def _read_numpy(path: Path) -> Mapping[str, Any]:
    return load_arrays(path) if path.suffix.lower() == ".npz" else {"features": load_array(path)}


def _features(
    found: Mapping[str, Any], file: BagFile, in_dim: int | None
) -> Float[np.ndarray, "n d"]:
    where: dict[str, Any] = {"path": file.path, "place": file.group}
    if file.features is not None:
        where["place"] = f"bag {file.name}"
    name = next((name for name in FEATURE_NAMES if name in found), None)
    if name is None:
        has = ", ".join(sorted(found)) or "nothing"
        raise InputError(
            f"has no data set {' or '.join(map(repr, FEATURE_NAMES[:2]))}, it holds {has}",
            remedy=_READ_AGAIN,
            **where,
        )
    array = np.asarray(found[name])
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{name!r} must be a table of numbers (patches, channels), got {array.dtype} "
            f"{array.shape}",
            **where,
        )
    if len(array) == 0:
        raise InputError("is a bag without patches", remedy="leave the slide out", **where)
    if in_dim is not None and array.shape[1] != in_dim:
        raise InputError(
            f"has features of {array.shape[1]} channels, expected {in_dim}",
            remedy="use the features of the encoder that the others come from",
            **where,
        )
    if array.dtype != np.float16:
        array = array.astype(np.float32, copy=False)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{int((~finite).sum())} patches have features that are not numbers (NaN or infinite), "
            f"the first is patch {int(np.flatnonzero(~finite)[0])}",
            remedy=_READ_AGAIN,
            **where,
        )
    return array


def _coords(
    found: Mapping[str, Any], file: BagFile, patches: int
) -> Int64[np.ndarray, "n 2"] | None:
    name = next((name for name in COORD_NAMES if name in found), None)
    if name is None:
        return None
    array = np.asarray(found[name])
    if array.ndim == 3 and len(array) == 1:
        array = array[0]
    if array.shape != (patches, 2) or array.dtype.kind not in "fiu":
        raise InputError(
            f"{name!r} must be ({patches}, 2) for {patches} patches, got {array.shape}",
            path=file.path,
            place=file.group,
            remedy=_READ_AGAIN,
        )
    return array.astype(np.int64)


def _patch_size(attributes: Mapping[str, Any]) -> int | None:
    if "patch_size_level0" in attributes:
        return round(float(attributes["patch_size_level0"]))
    if "patch_size" not in attributes:
        return None
    downsample = np.asarray(attributes.get("downsample", 1.0), dtype=float).reshape(-1)[0]
    return round(float(attributes["patch_size"]) * float(downsample))


def _slide_size(attributes: Mapping[str, Any]) -> tuple[int, int] | None:
    if "level0_width" not in attributes or "level0_height" not in attributes:
        return None
    return int(attributes["level0_width"]), int(attributes["level0_height"])


def read_table(path: Path) -> list[BagFile]:
    """Read a csv file (or csv.gz) with a row per instance: label, bag, features.

    With a header the columns `bag` and `label` may stand anywhere, `split` and `patient` may be
    there too, and all others are features. Without a header the first column is the label and the
    second the bag.

    Raises:
        InputError: A row of another length, a field that is no number, a bag with two labels.
    """
    rows = _csv_rows(path)
    head = [name.strip().lower() for name in rows[0]]
    named = "bag" in head and "label" in head
    if not named:
        head = ["label", "bag", *map(str, range(len(head) - 2))]
    special: dict[str, int] = {
        name: head.index(name) for name in ("bag", "label", "split", "patient") if name in head
    }
    columns = [index for index, name in enumerate(head) if index not in special.values()]
    bags: dict[str, list[int]] = {}
    body = rows[1:] if named else rows
    for number, row in enumerate(body):
        if len(row) != len(head):
            place = f"row {number + 1 + named}"
            raise InputError(f"has {len(row)} fields, expected {len(head)}", path=path, place=place)
        bags.setdefault(row[special["bag"]], []).append(number)
    if not bags or not columns:
        raise InputError("holds no bag", path=path)
    features = _numbers(path, body, columns, first=1 + named)
    return [
        _bag_of_rows(path, name, [body[i] for i in indices], features[indices], special)
        for name, indices in bags.items()
    ]


def _csv_rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise InputError("no such file", path=path)
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        reason = reason_of(error)
        raise InputError(
            f"is not a csv file ({reason})", path=path, remedy="save it as csv in UTF-8"
        ) from None
    if not rows or len(rows[0]) < 3:
        raise InputError(
            "is not a table of bags", path=path, remedy="give the columns label, bag, features"
        )
    return rows


def _numbers(
    path: Path, rows: list[list[str]], columns: list[int], *, first: int
) -> Float[np.ndarray, "n d"]:
    table = np.empty((len(rows), len(columns)), dtype=np.float32)
    for number, row in enumerate(rows):
        try:
            table[number] = [float(row[index]) for index in columns]
        except ValueError as error:
            raise InputError(
                f"holds a feature that is no number ({error})",
                path=path,
                place=f"row {number + first}",
            ) from None
    return table


def _bag_of_rows(
    path: Path,
    name: str,
    rows: list[list[str]],
    features: Float[np.ndarray, "n d"],
    special: Mapping[str, int],
) -> BagFile:
    def only(column: str) -> str | None:
        if column not in special:
            return None
        values = {row[special[column]] for row in rows}
        if len(values) > 1:
            raise InputError(
                f"has the {column}s {', '.join(sorted(values))}", path=path, place=f"bag {name}"
            )
        return next(iter(values))

    label = only("label")
    assert label is not None
    if label.replace(".", "", 1).isdigit() and float(label).is_integer():
        label = str(int(float(label)))
    split = only("split")
    if split is not None and split not in ("train", "val", "test"):
        raise InputError(
            f"has the split {split!r}; train, val and test are known",
            path=path,
            place=f"bag {name}",
        )
    return BagFile(
        name=name.strip(),
        path=path,
        features=features,
        label=label,
        patient=only("patient"),
        split=split,  # type: ignore[arg-type]
    )
