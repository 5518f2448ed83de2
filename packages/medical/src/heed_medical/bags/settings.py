"""The settings of bag data: which files, which labels, which split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BagData:
    """How files become bags and labels.

    Empty `classes` and None in `in_dim` are settled by `plan_data`.
    """

    features: str | None = None
    """Folder or file of the features inside the data folder, where it holds those of several
    encoders. None: all that are found."""
    labels: str | None = None
    """The csv or jsonl file of the labels, relative to the data folder. None: found by its columns
    (slide_id and label)."""
    splits: str | None = None
    """The json or csv file of the splits, relative to the data folder. None: found."""
    classes: tuple[str, ...] = ()
    """The classes in order, each NAME or NAME=LABEL,LABEL to merge labels. Empty: all labels,
    sorted."""
    in_dim: int | None = None
    """Channels of a patch feature. None: those of the first bag."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken bag does: stop, or be skipped, counted and listed."""
    split_seed: int = 0
    """Seed of the split by patient (70 % train, 10 % val, 20 % test) where the data give none."""
    folds: int = 0
    """Cross-validation: cut the patients into this many folds and ignore other splits. 0: none."""
    fold: int = 0
    """Which fold is tested (the next one validates), or which of several split files is used."""
    per_class: int | None = None
    """Few-shot: only this many training slides of each class, chosen by split_seed."""
    standardise: bool = False
    """Scale each channel to mean 0 and deviation 1 over the training patches."""
    feature_mean: tuple[float, ...] = ()
    """Of standardise; computed from the training patches."""
    feature_std: tuple[float, ...] = ()
    """Of standardise; computed from the training patches."""
    patch_size: int | None = None
    """Side of a patch in pixels of the full slide. None: what the file says, or the smallest
    distance of two patches."""
    thumbnails: Path | None = None
    """Folder with a picture or slide file per slide, to draw attention over. None: the folder
    thumbnails beside the features."""
    geojson_patches: int = 5000
    """Most attended patches of a slide that predict writes into its GeoJSON. 0: no GeoJSON."""
    cache_mb: int = 1024
    """Decoded bags are kept in memory up to this size."""

    def __post_init__(self) -> None:
        if self.in_dim is not None and self.in_dim < 1:
            raise ValueError(f"in_dim must be at least 1, got {self.in_dim}")
        if self.folds < 0 or 0 < self.folds < 3:
            raise ValueError(f"folds must be 0 or at least 3, got {self.folds}")
        if self.fold < 0 or (self.folds and self.fold >= self.folds):
            raise ValueError(f"fold must be within 0..{max(self.folds - 1, 0)}, got {self.fold}")
        for name in ("per_class", "patch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("geojson_patches", "cache_mb", "split_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if len(self.feature_mean) != len(self.feature_std):
            raise ValueError(
                f"feature_mean and feature_std must be of one length, got "
                f"{len(self.feature_mean)} and {len(self.feature_std)}"
            )
        if self.feature_mean and not self.standardise:
            raise ValueError("feature_mean has no effect without standardise")
        self.class_of_label  # noqa: B018 (raises where a label has two classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(entry.partition("=")[0] for entry in self.classes)

    @property
    def class_of_label(self) -> Mapping[str, int]:
        """Label in the files -> number of its class."""
        table: dict[str, int] = {}
        for number, entry in enumerate(self.classes):
            name, _, labels = entry.partition("=")
            for label in labels.split(",") if labels else [name]:
                if label in table:
                    raise ValueError(f"classes must name each label once, got {label!r} twice")
                table[label] = number
        return table
