"""The settings of segmentation data: which files, which slices, which classes."""

from dataclasses import dataclass
from typing import Literal

from heed_medical.segmentation.labels import LabelTable, parse_labels, parse_regions

Layout = Literal["auto", "png", "pairs", "nifti", "nnunet", "msd", "brats", "chaos"]
Axis = Literal["auto", "coronal", "sagittal", "axial"]
LabelMode = Literal["auto", "ids", "grey", "binary"]
Channels = Literal["auto", "grey", "rgb"]
Normalise = Literal["minmax", "percentile", "zscore", "slice-minmax", "slice-zscore"]

AXES: dict[str, int] = {"coronal": 0, "sagittal": 1, "axial": 2}
"""Slicing direction -> axis in memory (posterior, left, superior)."""

SLICE_MULTIPLE = 8
"""Sides of the slices that a network gets are multiples of this."""


@dataclass(frozen=True, kw_only=True)
class SegmentationData:
    """How files become slices and labels.

    Fields that are `auto`, None or empty are settled by `plan_data`.
    """

    layout: Layout = "auto"
    """How the folder is laid out. png: {train,val,test}/{Img,GT}/Subj_<s>slice_<k>.png; pairs:
    pictures and masks in two folders or named by a csv; nifti: images/ and labels/, or
    <case>-label.nii.gz beside <case>.nii.gz; nnunet, msd: imagesTr/ and labelsTr/; brats:
    <case>/<case>_seg.nii.gz beside its modalities; chaos: DICOM series with Ground/*.png."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a broken case does: stop, or be skipped, counted and listed."""
    sequence: Literal["t1-in", "t1-out", "t2", "ct"] = "t1-in"
    """Which series of a CHAOS folder is read."""
    axis: Axis = "auto"
    """The direction that volumes are cut along; auto: the axis of the widest spacing, axial where
    all are equal."""
    size: tuple[int, int] | None = None
    """Height and width of training slices and of prediction windows, multiples of 8; larger slices
    are cut into windows, smaller ones padded. None: what holds every slice, at most 256."""
    overlap: float = 0.25
    """Share of a window that overlaps the next one where a slice is larger than size."""
    channels: Channels = "auto"
    """Pictures are read as grey or as rgb; auto: grey in the png layout, elsewhere rgb if any
    picture is in colour."""
    colour: Literal["stop", "grey"] = "stop"
    """What a picture in colour does where grey is expected: stop, or be converted to luminance."""
    input_channels: int | None = None
    """Channels of an image: modalities of a volume, colours of a picture."""
    labels: tuple[str, ...] = ()
    """The classes, background first, each name=value, name=low-high or name=value:low-high (the
    value that is written, the range that is read). Empty: from dataset.json, or the values of the
    training masks."""
    label_mode: LabelMode = "auto"
    """ids: mask values are ids, kept in all outputs; grey: they are grey values of pictures, NIfTI
    outputs get class numbers; binary: every value above 0 is one class, for instance labels."""
    ignore: tuple[int, ...] = ()
    """Mask values that count neither in training nor in the scores."""
    regions: tuple[str, ...] = ()
    """Unions of classes that are scored beside the classes, each name=value,value of mask values.
    Empty: none, but in the layout brats WT (whole tumour), TC (its core) and ET (enhancing)."""
    normalise: Normalise = "percentile"
    """Intensities: percentile (0.5 to 99.5, clipped) or minmax to [0, 1], or zscore, of the whole
    volume and each modality; slice-...: of each slice alone."""
    window: tuple[float, float] | None = None
    """Intensities are clipped to this range first (for CT: lowest and highest Hounsfield unit)."""
    spacing_mm: tuple[float, float, float] | None = None
    """Row, column and slice spacing of png volumes, which store none."""
    background_slices: float = 1.0
    """Share of the training slices without any foreground that is kept."""
    cache_mb: int = 1024
    """Decoded training volumes are kept in memory up to this size."""
    split_seed: int = 0
    """Seed of the split by patient (70 % train, 10 % val, 20 % test) where the data give none."""

    def __post_init__(self) -> None:
        self._check_size()
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if not 0.0 <= self.background_slices <= 1.0:
            raise ValueError(f"background_slices must be within 0..1, got {self.background_slices}")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"window must be (low, high) with low < high, got {self.window}")
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise ValueError(f"spacing_mm must be positive, got {self.spacing_mm}")
        if self.input_channels is not None and self.input_channels < 1:
            raise ValueError(f"input_channels must be at least 1, got {self.input_channels}")
        if self.cache_mb < 0:
            raise ValueError(f"cache_mb must not be negative, got {self.cache_mb}")
        parse_labels(self.labels)
        parse_regions(self.regions)

    def _check_size(self) -> None:
        if self.size is not None and any(s < 8 or s % SLICE_MULTIPLE for s in self.size):
            raise ValueError(f"size must be two multiples of {SLICE_MULTIPLE}, got {self.size}")

    @property
    def table(self) -> LabelTable:
        """The classes; needs settings that `plan_data` has settled."""
        if not self.labels or self.label_mode == "auto":
            raise ValueError("labels and label_mode are not settled yet: call plan_data first")
        return LabelTable(
            classes=parse_labels(self.labels), ignore=self.ignore, mode=self.label_mode
        )

    @property
    def classes_of_regions(self) -> dict[str, tuple[int, ...]]:
        """Region -> the numbers of its classes; needs settings that `plan_data` has settled."""
        numbers = {entry.value: number for number, entry in enumerate(self.table.classes)}
        return {
            name: tuple(numbers[value] for value in values)
            for name, values in parse_regions(self.regions).items()
        }
