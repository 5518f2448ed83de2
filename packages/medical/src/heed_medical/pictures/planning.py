"""Settle what depends on the data: the layout and the classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from heed_core.errors import InputError
from heed_medical.classification.labels import refuse_look_alikes
from heed_medical.pictures.findings import findings_of
from heed_medical.pictures.layouts import list_pictures
from heed_medical.pictures.records import PictureFile
from heed_medical.pictures.settings import PictureData

DataT = TypeVar("DataT", bound=PictureData)

MOST_CLASSES = 50
"""More labels than this are taken for numbers or names of cases."""
_ORDERS = (
    ("negative", "positive"),
    ("normal", "pneumonia", "COVID-19"),
    ("level2", "level1"),
    ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity"),
)
"""The lists of COVIDx with its classes 0, 1, 2, and RSNA from healthy to pneumonia."""
_NONE_FIRST = ("normal", "negative", "no finding", "healthy", "benign", "control", "none", "no")


def plan_pictures(data: DataT, root: Path) -> DataT:
    """Fill the open fields (layout, classes) from the training pictures.

    Raises:
        InputError: No training pictures; one class alone; too many; a class without a picture;
            labels that look like one class.
    """
    listing = list_pictures(root, data)
    if listing.problems and data.on_error == "stop":
        raise InputError(listing.problems[0], remedy="or --data.on-error skip")
    if data.findings:
        _need_both(listing.pictures, data, root)
        return replace(data, layout=listing.layout)
    counts = Counter(p.label for p in listing.pictures if p.split == "train")
    found = {str(label) for label in counts}
    if not found:
        raise InputError("has no training pictures", path=root, remedy="add some to the split")
    if not data.classes:
        refuse_look_alikes(found, root)
    classes = data.classes or order_classes(found)
    if len(classes) < 2:
        raise InputError(
            f"has one class alone in the training pictures ({classes[0]})",
            path=root,
            remedy="two are needed",
        )
    if len(classes) > MOST_CLASSES:
        raise InputError(
            f"has {len(classes)} different labels in the training pictures",
            path=root,
            remedy="name the column of the classes with --data.label",
        )
    if absent := [name for name in classes if name not in found]:
        raise InputError(
            f"has no training picture of the class {absent[0]}",
            path=root,
            remedy=f"the labels are {', '.join(sorted(found)[:12])}",
        )
    return replace(data, layout=listing.layout, classes=tuple(classes))


def _need_both(pictures: Sequence[PictureFile], data: PictureData, root: Path) -> None:
    """Refuse findings that are never present, or never absent, in the training pictures."""
    train = [findings_of(p, data) for p in pictures if p.split == "train"]
    if not train:
        raise InputError("has no training pictures", path=root, remedy="add some to the split")
    for finding, column in zip(data.findings, np.array(train).T, strict=True):
        for value, word in ((1, "with"), (0, "without")):
            if not (column == value).any():
                raise InputError(
                    f"has no training picture {word} {finding}",
                    path=root,
                    remedy="leave it out of --data.findings",
                )


def order_classes(found: set[str]) -> tuple[str, ...]:
    """The classes in order: as the known lists have them, else what means "nothing" first.

    Example:
        >>> order_classes({"pneumonia", "normal", "covid19"})
        ('normal', 'covid19', 'pneumonia')
    """
    for order in _ORDERS:
        if found <= set(order) and order[0] in found:
            return tuple(name for name in order if name in found)
    if all(name.lstrip("-").isdigit() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found, key=lambda n: (n.lower() not in _NONE_FIRST, n.lower(), n)))
