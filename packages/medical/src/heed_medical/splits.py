"""The parts of a data set, and who is in more than one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train", "training": "train", "tr": "train",
    "val": "val", "valid": "val", "validation": "val", "validate": "val", "dev": "val",
    "test": "test", "testing": "test", "ts": "test",
}  # fmt: skip
"""What tables and folders call the splits, in lower case -> the split."""


def in_several_splits(
    members: Iterable[tuple[str | None, str | None]],
) -> dict[str, tuple[str, ...]]:
    """Those who are in more than one split -> these splits, both in order.

    Args:
        members: Patient and split of each file; those without the one or the other do not count.

    Example:
        >>> in_several_splits([("a", "train"), ("b", "val"), ("a", "test"), (None, "test")])
        {'a': ('train', 'test')}
    """
    seen: dict[str, set[str]] = {}
    for patient, split in members:
        if patient and split:
            seen.setdefault(patient, set()).add(split)
    return {
        patient: tuple(split for split in SPLITS if split in found)
        for patient, found in sorted(seen.items())
        if len(found) > 1
    }
