"""Settle what depends on the data: layout, channels, classes, slicing direction, slice size."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_medical.images import (
    file_kind,
    is_colour,
    picture_affine,
    read_mask_nifti,
    read_mask_picture,
)
from heed_medical.segmentation.cases import (
    CaseFiles,
    native_frame,
    read_mask,
    read_native,
    widest_axis,
    working_affine,
)
from heed_medical.segmentation.labels import (
    CHAOS_LABELS,
    brats_regions,
    parse_labels,
    parse_regions,
)
from heed_medical.segmentation.layouts import Listing, list_cases
from heed_medical.segmentation.settings import (
    AXES,
    SLICE_MULTIPLE,
    Axis,
    Channels,
    LabelMode,
    SegmentationData,
)

LARGEST_SIDE = 256
"""Slices are cut into windows above this side, unless a size is asked for."""
SMALLEST_SIDE = 32
MOST_DERIVED_CLASSES = 32
"""More values than this in the masks are taken for instance numbers."""


@dataclass(frozen=True, kw_only=True)
class CaseSurvey:
    """What the mask of a case says without its image."""

    shape: tuple[int, ...]
    """Spatial, in the working frame."""
    widest: int | None
    """The axis that the case was scanned along; None for pictures."""
    values: frozenset[int]
    """Mask values."""


def plan_data(settings: SegmentationData, root: Path) -> SegmentationData:
    """Fill every open field (layout, channels, labels, axis, size, ...) from the data.

    Masks of the training split are read, and one image.

    Raises:
        InputError: No training cases; a broken file (with `on_error="stop"`); classes that
            cannot be told from the masks.
    """
    listing = list_cases(root, settings)
    train = [case for case in listing.cases if case.split == "train"]
    if not train:
        raise InputError("has no training cases", path=root, remedy="add cases to the split train")
    settings = replace(
        settings, layout=listing.layout, channels=_channels(settings, listing, train)
    )
    surveys = survey_cases(train, settings)
    if not surveys:
        raise InputError("has no training case that can be read", path=root)
    labels, mode, ignore = _classes(settings, listing, train, [s.values for s in surveys])
    axis = _axis(settings, surveys)
    return replace(
        settings,
        regions=_regions(settings, labels, mode, path=root),
        labels=labels,
        label_mode=mode,
        ignore=ignore,
        axis=axis,
        size=settings.size or _size(surveys, AXES[axis]),
        input_channels=settings.input_channels or _count_channels(train, settings),
    )


def survey_cases(cases: Sequence[CaseFiles], settings: SegmentationData) -> list[CaseSurvey]:
    """Survey the masks of cases; broken ones raise, or are left out with `on_error="skip"`."""
    surveys = []
    for case in cases:
        try:
            surveys.append(_survey(case, settings))
        except InputError:
            if settings.on_error == "stop":
                raise
    return surveys


def _survey(files: CaseFiles, settings: SegmentationData) -> CaseSurvey:
    path = files.masks[0]
    affine = None
    if files.kind == "dicom":
        image = read_native(files, settings)
        values, affine = read_mask(files, image).array, image.affine_ras
    elif file_kind(path) == "nifti":
        mask = read_mask_nifti(path)
        values, affine = mask.array, mask.affine_ras
    elif files.kind == "picture":
        values = read_mask_picture(path).array
    else:
        planes = [read_mask_picture(p).array for p in files.masks]
        values = planes[0][..., None]
        found = frozenset(int(v) for plane in planes for v in np.unique(plane))
        return CaseSurvey(shape=(*planes[0].shape, len(planes)), widest=2, values=found)
    if files.kind != "picture" and affine is None:
        affine = picture_affine(settings.spacing_mm or (1.0, 1.0, 1.0))
    frame = native_frame(files, values.shape, affine)
    shape = frame.to_working(values).shape
    _, spacing_mm = working_affine(frame)
    return CaseSurvey(
        shape=shape,
        widest=None if spacing_mm is None else widest_axis(shape, spacing_mm),
        values=frozenset(int(v) for v in np.unique(values)),
    )


def _channels(settings: SegmentationData, listing: Listing, train: Sequence[CaseFiles]) -> Channels:
    pictures = [c for c in train if c.kind in {"picture", "stack"}]
    if settings.channels != "auto":
        return settings.channels
    if not pictures or listing.layout == "png" or settings.colour == "grey":
        return "grey"
    for case in pictures:
        try:
            if is_colour(case.images[0]):
                return "rgb"
        except InputError:
            if settings.on_error == "stop":
                raise
    return "grey"


def _count_channels(train: Sequence[CaseFiles], settings: SegmentationData) -> int:
    fault: InputError | None = None
    for case in train:
        try:
            return int(read_native(case, settings).array.shape[0])
        except InputError as error:
            if settings.on_error == "stop":
                raise
            fault = error
    assert fault is not None
    raise fault


def _classes(
    settings: SegmentationData,
    listing: Listing,
    train: Sequence[CaseFiles],
    values: Sequence[frozenset[int]],
) -> tuple[tuple[str, ...], LabelMode, tuple[int, ...]]:
    drawn = file_kind(train[0].masks[0]) == "picture"
    ignore = settings.ignore or listing.ignore
    mode: LabelMode = settings.label_mode
    if mode == "binary":
        return settings.labels or ("background=0", "foreground=1"), mode, ignore
    if mode == "auto":
        mode = "grey" if drawn and not listing.label_names else "ids"
    if settings.labels or listing.label_names:
        return settings.labels or listing.label_names, mode, ignore
    if drawn and _is_chaos(values):
        return CHAOS_LABELS, mode, ignore
    return _derived(frozenset().union(*values) - set(ignore), train), mode, ignore


def _regions(
    settings: SegmentationData, labels: tuple[str, ...], mode: LabelMode, *, path: Path
) -> tuple[str, ...]:
    classes = parse_labels(labels)
    values = [entry.value for entry in classes]
    if not settings.regions:
        return brats_regions(values) if settings.layout == "brats" and mode == "ids" else ()
    for name, named in parse_regions(settings.regions).items():
        unknown = [value for value in named if value not in values]
        if unknown:
            raise InputError(
                f"the region {name} names the value {unknown[0]}; the classes are "
                f"{', '.join(map(str, classes))}",
                path=path,
                remedy="correct --data.regions",
            )
        if name in {entry.name for entry in classes}:
            raise InputError(
                f"the region {name} has the name of a class",
                path=path,
                remedy="rename it in --data.regions",
            )
    return settings.regions


def _is_chaos(values: Sequence[frozenset[int]]) -> bool:
    """Whether at least two organs of the CHAOS table are in half of the masks."""
    organs = parse_labels(CHAOS_LABELS)[1:]
    usual = [
        organ
        for organ in organs
        if 2 * sum(any(organ.low <= v <= organ.high for v in found) for found in values)
        >= len(values)
    ]
    return len(usual) >= 2


def _derived(values: frozenset[int], train: Sequence[CaseFiles]) -> tuple[str, ...]:
    folder = train[0].masks[0].parent
    foreground = sorted(values - {0})
    if not foreground:
        raise InputError(
            "holds masks that are all background", path=folder, remedy="check that they are masks"
        )
    if len(foreground) > MOST_DERIVED_CLASSES or foreground[0] < 0:
        raise InputError(
            f"holds masks with {len(foreground)} values ({foreground[0]} to {foreground[-1]})",
            path=folder,
            remedy="for instance numbers use --data.label-mode binary, else name the classes "
            "with --data.labels",
        )
    if len(foreground) == 1:
        return ("background=0", f"foreground={foreground[0]}")
    return ("background=0", *(f"label_{value}={value}" for value in foreground))


def _axis(settings: SegmentationData, surveys: Sequence[CaseSurvey]) -> Axis:
    if settings.axis != "auto":
        return settings.axis
    votes = Counter(s.widest for s in surveys if s.widest is not None)
    number = votes.most_common(1)[0][0] if votes else AXES["axial"]
    names: dict[int, Axis] = {0: "coronal", 1: "sagittal", 2: "axial"}
    return names[number]


def _size(surveys: Sequence[CaseSurvey], axis: int) -> tuple[int, int]:
    sides = []
    for survey in surveys:
        along = axis if survey.widest is not None else None
        sides.append([n for i, n in enumerate(survey.shape) if i != along])
    height, width = np.max(sides, axis=0)
    return _side(int(height)), _side(int(width))


def _side(longest: int) -> int:
    rounded = -(-longest // SLICE_MULTIPLE) * SLICE_MULTIPLE
    return min(max(rounded, SMALLEST_SIDE), LARGEST_SIDE)
