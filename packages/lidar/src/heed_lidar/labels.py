"""Classes of points, the raw ids that stand for them in label files, and these files.

A `.label` file holds one little-endian uint32 per point: the low 16 bits are the id of the class,
the high 16 bits that of the instance (SemanticKITTI, Behley et al., ICCV 2019).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Int64, Integer, UInt8, UInt32

from heed_core.errors import InputError, reason_of

IGNORE = 0
"""The class of points that count for nothing."""
IGNORE_NAME = "ignore"
CURB_RAW, OTHERS_RAW = 3, 4
"""Raw ids that 3D-Curb adds to those of SemanticKITTI."""
ID_MASK = 0xFFFF
INSTANCE_MASK = 0xFFFF0000

Rgb = tuple[int, int, int]

RAW_NAMES: Mapping[int, str] = {
    0: "unlabeled", 1: "outlier", 3: "curb", 4: "others", 10: "car", 11: "bicycle", 13: "bus",
    15: "motorcycle", 16: "on-rails", 18: "truck", 20: "other-vehicle", 30: "person",
    31: "bicyclist", 32: "motorcyclist", 40: "road", 44: "parking", 48: "sidewalk",
    49: "other-ground", 50: "building", 51: "fence", 52: "other-structure", 60: "lane-marking",
    70: "vegetation", 71: "trunk", 72: "terrain", 80: "pole", 81: "traffic-sign",
    99: "other-object", 252: "moving-car", 253: "moving-bicyclist", 254: "moving-person",
    255: "moving-motorcyclist", 256: "moving-on-rails", 257: "moving-bus", 258: "moving-truck",
    259: "moving-other-vehicle",
}  # fmt: skip
"""The ids of SemanticKITTI and 3D-Curb."""

_RAW_BGR: Mapping[int, Rgb] = {
    0: (0, 0, 0), 1: (0, 0, 255), 3: (0, 255, 0), 4: (128, 128, 128), 10: (245, 150, 100),
    11: (245, 230, 100), 13: (250, 80, 100), 15: (150, 60, 30), 16: (255, 0, 0), 18: (180, 30, 80),
    20: (255, 0, 0), 30: (30, 30, 255), 31: (200, 40, 255), 32: (90, 30, 150), 40: (255, 0, 255),
    44: (255, 150, 255), 48: (75, 0, 75), 49: (75, 0, 175), 50: (0, 200, 255), 51: (50, 120, 255),
    52: (0, 150, 255), 60: (170, 255, 150), 70: (0, 175, 0), 71: (0, 60, 135), 72: (80, 240, 150),
    80: (150, 240, 255), 81: (0, 0, 255), 99: (255, 255, 50), 252: (245, 150, 100),
    253: (200, 40, 255), 254: (30, 30, 255), 255: (90, 30, 150), 256: (255, 0, 0),
    257: (250, 80, 100), 258: (180, 30, 80), 259: (255, 0, 0),
}  # fmt: skip

_KITTI_SPLIT = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{n:02d}" for n in range(11, 22)),
}
_CURB_SPLIT = {
    "train": ("00", "01", "04", "05", "06", "08", "09", "10"),
    "val": ("02", "03", "07"),
    "test": tuple(f"{n:02d}" for n in range(11, 22)),
}


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Raw ids of label files <-> class numbers of a network. Class 0 is `ignore`."""

    names: tuple[str, ...]
    """Of the classes, `ignore` first."""
    to_class: Mapping[int, int]
    """Raw id -> class; an id that is not here is an error."""
    to_raw: tuple[int, ...]
    """Class -> the raw id that is written."""
    rgb: tuple[Rgb, ...]
    """Colour of each class."""
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The data set's own split: train, val, test -> names of sequences."""
    shares: Mapping[int, float] = field(default_factory=dict)
    """Raw id -> its share of all points, where the file says so (`content`)."""

    def __post_init__(self) -> None:
        n = len(self.names)
        if n < 2 or self.names[IGNORE] != IGNORE_NAME:
            raise ValueError(f"names must be {IGNORE_NAME!r} and at least one class: {self.names}")
        if len(set(self.names)) != n:
            raise ValueError(f"names must differ, got {self.names}")
        if len(self.to_raw) != n or len(self.rgb) != n:
            raise ValueError(f"to_raw and rgb must have {n} entries, one per class")
        wrong = {raw: c for raw, c in self.to_class.items() if not 0 <= c < n}
        if wrong:
            raise ValueError(f"to_class must give classes below {n}, got {wrong}")
        ids = [*self.to_class, *self.to_raw]
        if min(ids) < 0 or max(ids) > ID_MASK:
            raise ValueError(f"raw ids must be within 0..{ID_MASK}, got {min(ids)}..{max(ids)}")
        if any(not 0 <= part <= 255 for colour in self.rgb for part in colour):
            raise ValueError(f"rgb must be within 0..255, got {self.rgb}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def colours(self) -> UInt8[np.ndarray, "c 3"]:
        """Red, green and blue of each class."""
        return np.array(self.rgb, dtype=np.uint8)

    def class_named(self, name: str) -> int:
        """The number of a class.

        Raises:
            ValueError: There is no such class.
        """
        if name not in self.names:
            raise ValueError(f"there is no class {name!r} among {', '.join(self.names)}")
        return self.names.index(name)

    @cached_property
    def _table(self) -> Int64[np.ndarray, " ids"]:
        table = np.full(ID_MASK + 1, -1, dtype=np.int64)
        table[list(self.to_class)] = list(self.to_class.values())
        return table

    def classes_of(
        self, raw: Integer[np.ndarray, " n"], *, where: str | Path | None = None
    ) -> Int64[np.ndarray, " n"]:
        """Classes of raw labels; instance bits are ignored.

        Args:
            raw: Labels as stored.
            where: The file that they come from, for the message.

        Raises:
            InputError: An id that the map does not know; names the file and the id.
        """
        ids = np.asarray(raw).astype(np.int64) & ID_MASK
        classes: Int64[np.ndarray, " n"] = self._table[ids]
        if (classes < 0).any():
            unknown, counts = np.unique(ids[classes < 0], return_counts=True)
            listed = ", ".join(str(i) for i in unknown[:5]) + ", ..." * (len(unknown) > 5)
            raise InputError(
                f"has the label id{'s' * (len(unknown) > 1)} {listed} ({counts.sum()} points), "
                f"which the label map does not know",
                path=where,
                remedy="give the map of these labels with --data.labels FILE.yaml",
            )
        return classes

    def raw_of(
        self,
        classes: Integer[np.ndarray, " n"],
        *,
        instances: Integer[np.ndarray, " n"] | None = None,
    ) -> UInt32[np.ndarray, " n"]:
        """Raw labels of classes.

        Args:
            classes: Class numbers.
            instances: Raw labels whose instance bits are kept.
        """
        raw: UInt32[np.ndarray, " n"] = np.array(self.to_raw, dtype=np.uint32)[classes]
        return raw if instances is None else with_instances(raw, instances)


def with_instances(
    raw: Integer[np.ndarray, " n"], instances: Integer[np.ndarray, " n"]
) -> UInt32[np.ndarray, " n"]:
    """The ids of `raw` with the instance bits of `instances`."""
    ids = np.asarray(raw, dtype=np.uint32) & np.uint32(ID_MASK)
    return ids | (np.asarray(instances, dtype=np.uint32) & np.uint32(INSTANCE_MASK))


def _builtin(
    classes: Sequence[tuple[str, int, Sequence[int]]], split: Mapping[str, tuple[str, ...]]
) -> LabelMap:
    """A map of `(name, raw id written, raw ids read)`, in the colours of SemanticKITTI."""
    return LabelMap(
        names=tuple(name for name, _, _ in classes),
        to_class={raw: number for number, (_, _, ids) in enumerate(classes) for raw in ids},
        to_raw=tuple(written for _, written, _ in classes),
        rgb=tuple(_reversed(_RAW_BGR[written]) for _, written, _ in classes),
        split=split,
    )


def _reversed(colour: Rgb) -> Rgb:
    return colour[2], colour[1], colour[0]


def _all_but(*taken: int) -> tuple[int, ...]:
    return tuple(raw for raw in RAW_NAMES if raw not in taken)


_NOTHING = (0, 1, 52, 99)
BUILTIN: Mapping[str, LabelMap] = {
    "curb": _builtin(
        [
            (IGNORE_NAME, 0, _NOTHING),
            ("curb", CURB_RAW, (3,)),
            ("road", 40, (40,)),
            ("sidewalk", 48, (48,)),
            ("others", OTHERS_RAW, _all_but(3, 40, 48, *_NOTHING)),
        ],
        _CURB_SPLIT,
    ),
    "curb-only": _builtin(
        [
            (IGNORE_NAME, 0, _NOTHING),
            ("curb", CURB_RAW, (3,)),
            ("others", OTHERS_RAW, _all_but(3, *_NOTHING)),
        ],
        _CURB_SPLIT,
    ),
    "nrs": _builtin(
        [
            (IGNORE_NAME, 0, ()),
            ("curb", CURB_RAW, (3,)),
            ("others", OTHERS_RAW, _all_but(3)),
        ],
        {},
    ),
    "semantic-kitti": _builtin(
        [
            (IGNORE_NAME, 0, _NOTHING),
            ("car", 10, (10, 252)),
            ("bicycle", 11, (11,)),
            ("motorcycle", 15, (15,)),
            ("truck", 18, (18, 258)),
            ("other-vehicle", 20, (13, 16, 20, 256, 257, 259)),
            ("person", 30, (30, 254)),
            ("bicyclist", 31, (31, 253)),
            ("motorcyclist", 32, (32, 255)),
            ("road", 40, (40, 60)),
            ("parking", 44, (44,)),
            ("sidewalk", 48, (48,)),
            ("other-ground", 49, (49,)),
            ("building", 50, (50,)),
            ("fence", 51, (51,)),
            ("vegetation", 70, (70,)),
            ("trunk", 71, (71,)),
            ("terrain", 72, (72,)),
            ("pole", 80, (80,)),
            ("traffic-sign", 81, (81,)),
        ],
        _KITTI_SPLIT,
    ),
}
"""curb: curb, road, sidewalk and others (3-D Curb). curb-only: the same data without the auxiliary
classes. nrs: curb and others, every id counts. semantic-kitti: its 19 classes."""


CURB, OTHERS = "curb", "others"


def curb_and_others(label_map: LabelMap) -> LabelMap:
    """The same classes for labels that tell curb alone: every other id, 0 included, is `others`.

    Raises:
        InputError: The map has no such classes.
    """
    for name in (CURB, OTHERS):
        if name not in label_map.names:
            raise InputError(
                f"the layout nrs has labels of curb and others alone, there is no class {name!r}",
                remedy="use --data.labels nrs",
            )
    curb, others = label_map.names.index(CURB), label_map.names.index(OTHERS)
    return replace(
        label_map, to_class={raw: curb if raw == CURB_RAW else others for raw in RAW_NAMES}
    )


def label_map(labels: str) -> LabelMap:
    """The map of a built-in name or of a yaml file.

    Raises:
        InputError: Neither; or the file is no label map.
    """
    if labels in BUILTIN:
        return BUILTIN[labels]
    path = Path(labels)
    if not path.is_file():
        raise InputError(
            f"is neither a file nor one of the built-in label maps {', '.join(BUILTIN)}",
            path=labels,
            remedy="name one of these or give a file like semantic-kitti.yaml",
        )
    return read_label_map(path)


_NEEDED_KEYS = ("labels", "color_map", "learning_map", "learning_map_inv")


def read_label_map(path: Path) -> LabelMap:
    """Read a label map in the form of `semantic-kitti.yaml`.

    Its classes that `learning_ignore` marks (0 where the key is absent or empty) become class 0;
    the others are numbered from 1 in their order. Its colours are blue, green, red.

    Raises:
        InputError: The file is no yaml, lacks a key, or its keys do not fit each other.
    """
    content = _read_yaml(path)
    missing = [key for key in _NEEDED_KEYS if not isinstance(content.get(key), dict)]
    if missing:
        raise InputError(
            f"has no table {', '.join(missing)}",
            path=path,
            remedy=f"a label map needs {', '.join(_NEEDED_KEYS)}",
        )
    try:
        return _parse_label_map(content)
    except ValueError as error:
        raise InputError(f"is not a usable label map ({error})", path=path) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:
        first = reason_of(error)
        raise InputError(f"is not yaml ({first})", path=path) from None
    if not isinstance(content, dict):
        raise InputError("is not a table of keys", path=path, remedy="give a label map")
    return content


def _parse_label_map(content: Mapping[str, Any]) -> LabelMap:
    learning = _numbers(content, "learning_map")
    inverse = _numbers(content, "learning_map_inv")
    marks = _table(content, "learning_ignore", {0: True})
    ignored = {_number("learning_ignore", c) for c, mark in marks.items() if mark}
    kept = sorted(set(learning.values()) - ignored)
    number = {c: k for k, c in enumerate(kept, start=1)}
    raw_names, colours = content["labels"], content["color_map"]
    written = [_entry("learning_map_inv", inverse, c) for c in kept]
    return LabelMap(
        names=(IGNORE_NAME, *(str(_entry("labels", raw_names, raw)) for raw in written)),
        to_class={raw: number.get(c, IGNORE) for raw, c in learning.items()},
        to_raw=(inverse.get(0, 0) if 0 in ignored else 0, *written),
        rgb=((0, 0, 0), *(_bgr(_entry("color_map", colours, raw), raw) for raw in written)),
        split=_parse_split(_table(content, "split", {})),
        shares={
            _number("content", raw): _share(raw, share)
            for raw, share in _table(content, "content", {}).items()
        },
    )


_SPLIT_KEYS = {"train": "train", "val": "valid", "test": "test"}
"""Of a split, the key in the file."""


def _parse_split(split: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for name, key in _SPLIT_KEYS.items():
        if key not in split:
            continue
        given = [] if split[key] is None else split[key]
        if not isinstance(given, list):
            raise ValueError(f"split.{key} must be a list of sequences, got {given!r}")
        found[name] = tuple(sequence_name(s) for s in given)
        for sequence in found[name]:
            if owners.setdefault(sequence, key) != key:
                raise ValueError(
                    f"the sequence {sequence} is in split.{owners[sequence]} and in split.{key}"
                )
    return found


def _table(content: Mapping[str, Any], key: str, default: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A table that may be absent, which an empty key says too."""
    found = content.get(key)
    if found is None:
        return default
    if not isinstance(found, dict):
        raise ValueError(f"{key} must be a table, got {found!r}")
    return found


def _entry(table: str, entries: Mapping[Any, Any], key: int) -> Any:
    if key not in entries:
        raise ValueError(f"{table} has no entry for {key}")
    return entries[key]


def _numbers(content: Mapping[str, Any], key: str) -> dict[int, int]:
    entries = content[key].items()
    return {_number(key, one): _number(f"{key}.{one}", other) for one, other in entries}


def _number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(f"{key} must hold whole numbers, got {value!r}")
    return int(value)


def _share(raw: Any, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"content.{raw} must be a share of the points, got {value!r}")
    return float(value)


def _bgr(colour: Any, raw: int) -> Rgb:
    if not isinstance(colour, list) or len(colour) != 3:
        raise ValueError(f"color_map.{raw} must be blue, green and red, got {colour!r}")
    blue, green, red = (_number(f"color_map.{raw}", part) for part in colour)
    return red, green, blue


def sequence_name(name: str | int) -> str:
    """The name of a sequence's folder: numbers get two digits.

    Example:
        >>> sequence_name(8), sequence_name("8"), sequence_name("town")
        ('08', '08', 'town')
    """
    text = str(name)
    return text.zfill(2) if text.isdecimal() else text


def write_label_map(path: Path, label_map: LabelMap) -> None:
    """Write a label map in the form of `semantic-kitti.yaml`."""
    names = {raw: RAW_NAMES.get(raw, str(raw)) for raw in sorted(label_map.to_class)}
    colours = {raw: list(_RAW_BGR.get(raw, (128, 128, 128))) for raw in names}
    for name, raw, colour in zip(label_map.names, label_map.to_raw, label_map.rgb, strict=True):
        if name != IGNORE_NAME:
            names[raw], colours[raw] = name, list(_reversed(colour))
    numbers = range(len(label_map))
    shares = {raw: float(share) for raw, share in label_map.shares.items()}
    content: dict[str, object] = {
        "labels": names,
        "color_map": colours,
        **({"content": shares} if shares else {}),
        "learning_map": {raw: int(label_map.to_class[raw]) for raw in sorted(label_map.to_class)},
        "learning_map_inv": {c: int(label_map.to_raw[c]) for c in numbers},
        "learning_ignore": {c: c == IGNORE for c in numbers},
        "split": {
            _SPLIT_KEYS[split]: [int(s) if s.isdecimal() else s for s in sequences]
            for split, sequences in label_map.split.items()
        },
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None), "utf-8")


def class_texts(label_map: LabelMap) -> tuple[str, ...]:
    """The classes as `name=written:read,read#rrggbb`, for settings that hold a whole map.

    Example:
        >>> class_texts(BUILTIN["curb"])[2]
        'road=40:40#ff00ff'
    """
    texts = []
    for number, (name, raw) in enumerate(zip(label_map.names, label_map.to_raw, strict=True)):
        read = ",".join(str(r) for r, c in sorted(label_map.to_class.items()) if c == number)
        texts.append(f"{name}={raw}:{read}#{bytes(label_map.rgb[number]).hex()}")
    return tuple(texts)


def parse_classes(texts: Sequence[str]) -> LabelMap:
    """Undo `class_texts`.

    Raises:
        ValueError: A text of another form, or an id that two classes read.
    """
    names, to_class, to_raw, rgb = [], {}, [], []
    for number, text in enumerate(texts):
        name, _, rest = text.rpartition("=")
        ids, _, colour = rest.partition("#")
        written, _, read = ids.partition(":")
        try:
            red, green, blue = bytes.fromhex(colour)
            ids_read = [int(raw) for raw in read.split(",") if raw]
            to_raw.append(int(written))
        except ValueError:
            raise ValueError(
                f"classes must be name=written:read,read#rrggbb, got {text!r}"
            ) from None
        twice = [raw for raw in ids_read if raw in to_class]
        if twice:
            raise ValueError(f"classes must read each id once, got {twice[0]} again in {text!r}")
        to_class.update(dict.fromkeys(ids_read, number))
        names.append(name)
        rgb.append((red, green, blue))
    return LabelMap(names=tuple(names), to_class=to_class, to_raw=tuple(to_raw), rgb=tuple(rgb))


def read_labels(path: Path, *, count: int | None = None) -> UInt32[np.ndarray, " n"]:
    """Read a `.label` file.

    Args:
        path: The file.
        count: Points of the scan that the labels belong to.

    Raises:
        InputError: The file is missing or truncated, or does not have `count` labels.
    """
    if not path.is_file():
        raise InputError("does not exist", path=path, remedy="give the labels of this scan")
    data = path.read_bytes()
    if len(data) % 4:
        raise InputError(
            f"has {len(data)} bytes, not a multiple of 4 (one uint32 per point)",
            path=path,
            remedy="the file is truncated: copy it again",
        )
    if count is not None and len(data) // 4 != count:
        raise InputError(
            f"has {len(data) // 4} labels for a scan of {count} points",
            path=path,
            remedy="labels and scan must be of the same frame",
        )
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


def write_labels(path: Path, raw: Integer[np.ndarray, " n"]) -> None:
    """Write a `.label` file."""
    path.write_bytes(np.asarray(raw).astype("<u4").tobytes())
