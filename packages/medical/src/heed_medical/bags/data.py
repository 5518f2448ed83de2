"""Bags as a data set, and what the data settle: classes, channels, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed_core.errors import InputError
from heed_medical.bags.bag import Bag, BagFile
from heed_medical.bags.files import read_bag
from heed_medical.bags.listing import class_of, find_bags, list_bags
from heed_medical.bags.settings import BagData
from heed_medical.classification.labels import refuse_look_alikes


@dataclass
class BagSet:
    """The bags of some files; each is read when it is asked for, small ones stay in memory."""

    files: Sequence[BagFile]
    data: BagData
    skipped: Sequence[str] = field(default=(), kw_only=True)
    """What the lists left out, a line each."""
    _kept: dict[int, Bag] = field(default_factory=dict, repr=False)
    _free: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        self._free = self.data.cache_mb * 2**20

    @property
    def names(self) -> list[str]:
        """The names of the bags, known before they are read."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Bag:
        """Read a bag.

        Raises:
            InputError: It cannot be read or its label is of no class.
        """
        if index in self._kept:
            return self._kept[index]
        file = self.files[index]
        bag = read_bag(file, in_dim=self.data.in_dim, patch_size=self.data.patch_size)
        bag = replace(bag, label=class_of(file, self.data))
        if self.data.feature_mean:
            mean = np.asarray(self.data.feature_mean, dtype=np.float32)
            std = np.asarray(self.data.feature_std, dtype=np.float32)
            bag = replace(bag, features=(bag.features.astype(np.float32) - mean) / std)
        if bag.features.nbytes <= self._free:
            self._free -= bag.features.nbytes
            self._kept[index] = bag
        return bag


@dataclass(frozen=True)
class BagBatch:
    """Bags padded to the same number of patches."""

    features: Float[Tensor, "b n d"]
    key_mask: Bool[Tensor, "b n"] | None
    """True = a patch, False = padding; None where no bag is padded."""
    labels: Int64[Tensor, " b"]

    def to(self, device: torch.device) -> BagBatch:
        """The batch on another device."""
        mask = None if self.key_mask is None else self.key_mask.to(device)
        return BagBatch(self.features.to(device), mask, self.labels.to(device))


def pad_bags(bags: Sequence[Bag]) -> BagBatch:
    """Join labelled bags to a batch."""
    sizes = [len(bag.features) for bag in bags]
    longest = max(sizes)
    half = all(bag.features.dtype == np.float16 for bag in bags)
    shape = (len(bags), longest, bags[0].features.shape[1])
    features = torch.zeros(shape, dtype=torch.float16 if half else torch.float32)
    for row, bag in zip(features, bags, strict=True):
        row[: len(bag.features)] = torch.from_numpy(bag.features)
    mask = None
    if min(sizes) < longest:
        mask = torch.arange(longest) < torch.tensor(sizes).unsqueeze(1)
    labels = [bag.label for bag in bags]
    assert None not in labels
    return BagBatch(features, mask, torch.tensor(labels))


def thin_out(bag: Bag, rng: np.random.Generator, *, most: int) -> Bag:
    """At most so many patches of a bag, drawn without replacement, in their order."""
    count = len(bag.features)
    if count <= most:
        return bag
    chosen = np.sort(rng.choice(count, most, replace=False))
    coords = None if bag.coords is None else bag.coords[chosen]
    return replace(bag, features=bag.features[chosen], coords=coords)


def plan_data(data: BagData, root: Path) -> BagData:
    """Settle classes, channels and scaling from the data.

    Raises:
        InputError: There are no bags, only one class, a class without a training bag, or labels
            that look like one class.
    """
    if not data.classes:
        listing = list_bags(root, data)
        if listing.problems and data.on_error == "stop":
            raise InputError(listing.problems[0], remedy="or --data.on-error skip")
        labels = {str(file.label) for file in listing.files}
        refuse_look_alikes(labels, root)
        if len(labels) < 2:
            raise InputError(
                f"holds bags of one class only: {', '.join(sorted(labels))}",
                path=root,
                remedy="add bags of another class",
            )
        numbers = all(label.isdigit() for label in labels)
        data = replace(data, classes=tuple(sorted(labels, key=int if numbers else str)))
    files = find_bags(root, data, "train")
    trained = {class_of(file, data) for file in files}
    if absent := [n for k, n in enumerate(data.class_names) if k not in trained]:
        known = sorted({str(file.label) for file in files})
        raise InputError(
            f"has no training bag of the class {absent[0]}",
            path=root,
            remedy=f"the training bags have the labels {', '.join(known[:12])}",
        )
    train = BagSet(files, replace(data, cache_mb=0))
    if data.in_dim is None:
        data = replace(data, in_dim=_first(train).features.shape[1])
    if data.standardise and not data.feature_mean:
        data = _scaled(data, train)
    return data


def _first(bags: BagSet) -> Bag:
    """The first bag that can be read."""
    fault: InputError | None = None
    for index in range(len(bags)):
        try:
            return bags[index]
        except InputError as error:
            fault = fault or error
            if bags.data.on_error == "stop":
                break
    assert fault is not None
    raise fault


def _scaled(data: BagData, train: BagSet) -> BagData:
    """Mean and deviation of each channel over all training patches, in one pass (Chan et al.)."""
    assert data.in_dim is not None
    count, mean, squares = 0, np.zeros(data.in_dim), np.zeros(data.in_dim)
    for index in range(len(train)):
        try:
            features = train[index].features.astype(np.float64)
        except InputError:
            if data.on_error == "stop":
                raise
            continue
        if features.shape[1] != data.in_dim:
            raise InputError(
                f"has features of {features.shape[1]} channels, expected {data.in_dim}",
                path=train.files[index].path,
            )
        total = count + len(features)
        shift = features.mean(axis=0) - mean
        squares += ((features - features.mean(axis=0)) ** 2).sum(axis=0)
        squares += shift**2 * count * len(features) / total
        mean, count = mean + shift * len(features) / total, total
    std = np.sqrt(squares / max(count, 1))
    std[std == 0] = 1.0
    return replace(data, feature_mean=tuple(mean.tolist()), feature_std=tuple(std.tolist()))
