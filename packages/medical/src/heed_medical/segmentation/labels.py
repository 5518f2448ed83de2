"""Classes of a segmentation and the values that stand for them in mask files."""

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int16, Integer

from heed_core.errors import InputError

IGNORE_INDEX = -100
"""Class number of voxels that count for nothing; torch's cross-entropy leaves it out by default."""

CHAOS_LABELS = (
    "background=0",
    "liver=63:55-70",
    "right_kidney=126:110-135",
    "left_kidney=189:175-200",
    "spleen=252:240-255",
)
"""The grey values of the CHAOS abdomen masks (MR)."""

MAX_CLASSES = 254
_LABEL = re.compile(
    r"(?P<name>[^=]+)=(?:(?P<value>\d+)|(?P<low>\d+)-(?P<high>\d+)|(\d+):(\d+)-(\d+))"
)


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """One class: its name, the value that is written, the values `low..high` that are read."""

    name: str
    value: int
    low: int
    high: int

    def __str__(self) -> str:
        if self.low == self.high == self.value:
            return f"{self.name}={self.value}"
        return f"{self.name}={self.value}:{self.low}-{self.high}"


def parse_labels(texts: Sequence[str]) -> tuple[LabelClass, ...]:
    """Read classes written as `name=value`, `name=low-high` or `name=value:low-high`.

    Raises:
        ValueError: A text of another form, two classes of one name, overlapping ranges, or too
            many classes.

    Example:
        >>> [str(c) for c in parse_labels(["background=0", "liver=63:55-70"])]
        ['background=0', 'liver=63:55-70']
    """
    classes = tuple(_parse_label(text) for text in texts)
    if len(classes) == 1 or len(classes) > MAX_CLASSES:
        raise ValueError(f"labels must name 2 to {MAX_CLASSES} classes, got {len(classes)}")
    names = [c.name for c in classes]
    if len(set(names)) != len(names):
        raise ValueError(f"labels must have different names, got {', '.join(names)}")
    ordered = sorted(classes, key=lambda c: c.low)
    for first, second in itertools.pairwise(ordered):
        if second.low <= first.high:
            raise ValueError(f"labels must not overlap, got {first} and {second}")
    return classes


def _parse_label(text: str) -> LabelClass:
    match = _LABEL.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"labels must be name=value, name=low-high or name=value:low-high, got {text!r}"
        )
    name, value, low, high, *full = match.groups()
    if value is not None:
        numbers = (int(value),) * 3
    elif low is not None:
        numbers = ((int(low) + int(high)) // 2, int(low), int(high))
    else:
        numbers = (int(full[0]), int(full[1]), int(full[2]))
    if not numbers[1] <= numbers[0] <= numbers[2]:
        raise ValueError(f"labels must have low <= value <= high, got {text!r}")
    return LabelClass(name=name.strip(), value=numbers[0], low=numbers[1], high=numbers[2])


def parse_regions(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read regions written as `name=value,value`: name -> mask values.

    Raises:
        ValueError: A text of another form, or two regions of one name.

    Example:
        >>> parse_regions(["WT=1,2,4", "ET=4"])
        {'WT': (1, 2, 4), 'ET': (4,)}
    """
    regions: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip()
        if not name or not re.fullmatch(r"\d+(,\d+)*", values):
            raise ValueError(f"regions must be name=value,value, got {text!r}")
        if name in regions:
            raise ValueError(f"regions must have different names, got {name} twice")
        regions[name] = tuple(int(value) for value in values.split(","))
    return regions


def brats_regions(values: Collection[int]) -> tuple[str, ...]:
    """The regions of BraTS by the values of its masks; none where these are other values.

    1 is the necrotic core, 2 the oedema; the enhancing tumour is 4, from 2023 on 3.

    Example:
        >>> brats_regions({0, 1, 2, 4})
        ('WT=1,2,4', 'TC=1,4', 'ET=4')
    """
    foreground = set(values) - {0}
    for enhancing in (3, 4):
        if foreground == {1, 2, enhancing}:
            return f"WT=1,2,{enhancing}", f"TC=1,{enhancing}", f"ET={enhancing}"
    return ()


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Mask values <-> class numbers.

    Class `k` is the k-th of `classes`; class 0 is the background. In mode `binary` there are two
    classes and every value above 0 is the second. Values of `ignore` become `IGNORE_INDEX`.
    """

    classes: tuple[LabelClass, ...]
    ignore: tuple[int, ...] = ()
    mode: Literal["ids", "grey", "binary"] = "ids"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        return tuple(c.name for c in self.classes)

    def __len__(self) -> int:
        return len(self.classes)

    def encode(
        self, values: Integer[np.ndarray, "*spatial"], *, path: Path | None = None
    ) -> Int16[np.ndarray, "*spatial"]:
        """Turn the values of a mask file into class numbers.

        Raises:
            InputError: A value that stands for no class; names the file, the value and the allowed
                ones.
        """
        found = np.unique(values)
        codes = np.array([self._class_of(int(v)) for v in found], dtype=np.int16)
        unknown = found[codes < IGNORE_INDEX]
        if unknown.size:
            count = int(np.isin(values, unknown).sum())
            listed = ", ".join(str(int(v)) for v in unknown[:5])
            raise InputError(
                f"has label value{'s' * (unknown.size > 1)} {listed}"
                f"{', ...' * (unknown.size > 5)} ({count} voxels) outside the list: "
                f"{self.allowed()}",
                path=path,
                remedy="correct the mask, or name it by --data.labels or --data.ignore in training",
            )
        return codes[np.searchsorted(found, values)]

    def _class_of(self, value: int) -> int:
        if value in self.ignore:
            return IGNORE_INDEX
        if self.mode == "binary":
            return int(value > 0) if value >= 0 else IGNORE_INDEX - 1
        for number, entry in enumerate(self.classes):
            if entry.low <= value <= entry.high:
                return number
        return IGNORE_INDEX - 1

    def allowed(self) -> str:
        """The values that may stand in a mask, for messages."""
        ranges = [str(c.low) if c.low == c.high else f"{c.low}-{c.high}" for c in self.classes]
        if self.mode == "binary":
            ranges = ["0", "above 0"]
        return ", ".join(ranges + [f"{v} (ignored)" for v in self.ignore])

    def decode(
        self, labels: Integer[np.ndarray, "*spatial"], *, picture: bool
    ) -> Integer[np.ndarray, "*spatial"]:
        """Turn class numbers into the values of a mask file.

        Args:
            labels: Class numbers 0..K-1.
            picture: Whether a picture is written: in modes `grey` and `binary` a picture gets grey
                values and a volume the class numbers.
        """
        if self.mode == "binary":
            values = np.array([0, 255] if picture else [0, 1])
        elif self.mode == "grey" and not picture:
            values = np.arange(len(self.classes))
        else:
            values = np.array([c.value for c in self.classes])
        dtype = np.uint8 if values.max() <= 255 else np.uint16
        return np.asarray(values[labels], dtype=dtype)
