"""Read DICOM images: single pictures and series that make a volume.

Slices are ordered by their place in the patient (ImagePositionPatient along the normal of the
slices), or by InstanceNumber where no place is stored; never by file name. Values are rescaled
(RescaleSlope, RescaleIntercept), and MONOCHROME1 is inverted so that larger is brighter. Axes are
(rows, columns, slices). The frames of one file are slices where it says where they lie.
"""

import itertools
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float32, Float64
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue

from heed_core.errors import InputError, reason_of
from heed_medical.dicom_pixels import (
    grey_values,
    is_colour,
    luminance,
    padding_mask,
    shown,
    stored_values,
    top_value,
)
from heed_medical.images import MedicalImage, picture_affine, shape_text

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """One slice: a file, or a frame of one."""

    path: Path
    header: Dataset
    """What is known of its place."""
    frame: int | None = None
    """Its number in the file, from 1 on; None: the only one."""
    values: Float32[np.ndarray, "rows columns"] | None = None

    @property
    def place(self) -> str | None:
        return None if self.frame is None else f"frame {self.frame}"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its suffix, or by the mark at byte 128 where it has none."""
    if path.suffix.lower() in {".dcm", ".dicom", ".ima"}:
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def list_series(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The series in a folder: SeriesInstanceUID -> files in the order of their slices.

    Sub-folders are not looked into.

    Raises:
        InputError: A DICOM file that cannot be read.
    """
    series = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and is_dicom(path):
            header = _read(path, pixels=False)
            series[str(header.get("SeriesInstanceUID", ""))].append((path, header))
    return {
        uid: tuple(one.path for one in _in_order([_Slice(path=p, header=h) for p, h in found]))
        for uid, found in series.items()
    }


def read_series(files: Sequence[Path]) -> MedicalImage:
    """Read the slices of one series as `(1, rows, columns, slices)`.

    Args:
        files: The files, in any order; or one whose frames are the slices.

    Raises:
        InputError: A file that is missing, truncated, not DICOM, without pixels, in colour, in an
            encoding whose decoder is missing, or that does not fit the others; slices that are
            missing, or several without their spacing.
    """
    found = [one for path in files for one in _slices(_read(path, pixels=True), path)]
    ordered = _in_order(found)
    planes = [one.values for one in ordered]
    assert planes[0] is not None
    for one, plane in zip(ordered, planes, strict=True):
        assert plane is not None
        if plane.shape != planes[0].shape:
            raise InputError(
                f"is {shape_text(plane.shape)} pixels, the first slice is "
                f"{shape_text(planes[0].shape)}",
                path=one.path,
                remedy="keep one series per folder",
            )
    array = np.stack([plane for plane in planes if plane is not None], axis=-1)
    return MedicalImage(array=array[None], affine_ras=_series_affine(ordered))


def read_plane(
    path: Path, *, voi: bool = False
) -> tuple[Float32[np.ndarray, "rows columns"], tuple[float, float] | None]:
    """Read one picture in grey, and the values that are black and white where the file says so.

    Colours become their luminance; padding takes the lowest value of the image.

    Args:
        path: The file.
        voi: Values within 0..1 as they are shown, where the file stores a window or a table.

    Raises:
        InputError: As `read_series`; several frames; a window that cannot be used.
    """
    dataset = _read(path, pixels=True)
    stored = stored_values(dataset, path)
    colour = is_colour(dataset)
    if stored.ndim > 2 + colour:
        raise InputError(
            f"holds {len(stored)} frames, one picture is needed",
            path=path,
            remedy="write the frame that counts to a file of its own",
        )
    if colour:
        return luminance(stored), (0.0, top_value(dataset))
    display = shown(stored, dataset, path) if voi else None
    values = grey_values(stored, dataset, path) if display is None else display
    padding = padding_mask(stored, dataset)
    if padding.any() and not padding.all():
        values = np.where(padding, values[~padding].min(), values)
    return values, (0.0, 1.0) if display is not None else _own_range(dataset)


def _own_range(dataset: Dataset) -> tuple[float, float] | None:
    """Black and white of 8-bit pixels without a unit; None: not known."""
    rescaled = dataset.get("RescaleSlope") not in (None, 1) or dataset.get("RescaleIntercept")
    signed = int(dataset.get("PixelRepresentation", 0))
    bits = int(dataset.get("BitsStored", 16))
    if bits != 8 or signed or rescaled or dataset.get("ModalityLUTSequence"):
        return None
    return 0.0, top_value(dataset)


def _slices(dataset: Dataset, path: Path) -> list[_Slice]:
    """The slices in a file, with their values."""
    stored = stored_values(dataset, path)
    if is_colour(dataset):
        stored = _only_grey(stored, path)
    if stored.ndim == 2:
        values = grey_values(stored, dataset, path)
        return [_Slice(path=path, header=dataset, values=values)]
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if len(groups) != len(stored):
        raise InputError(
            f"holds {len(stored)} frames without their places",
            path=path,
            remedy="convert it to NIfTI, or to DICOM of one slice per file",
        )
    headers = [_frame_header(dataset, group) for group in groups]
    return [
        _Slice(path=path, header=header, frame=n, values=grey_values(plane, header, path))
        for n, (plane, header) in enumerate(zip(stored, headers, strict=True), start=1)
    ]


def _only_grey(stored: np.ndarray, path: Path) -> np.ndarray:
    """One of three colours that agree everywhere, as those of a screen shot in grey do."""
    if (stored == stored[..., :1]).all():
        return stored[..., 0]
    raise InputError(
        f"holds colour in one file (shape {shape_text(stored.shape)})",
        path=path,
        remedy="convert it to NIfTI or to grey DICOM",
    )


_FRAME_FIELDS = (
    ("PlanePositionSequence", ("ImagePositionPatient",)),
    ("PlaneOrientationSequence", ("ImageOrientationPatient",)),
    ("PixelMeasuresSequence", ("PixelSpacing", "SliceThickness")),
    ("PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")),
)
_PIXEL_FIELDS = (
    "BitsStored", "PixelRepresentation", "PhotometricInterpretation", "RescaleSlope",
    "RescaleIntercept",
)  # fmt: skip


def _frame_header(dataset: Dataset, group: Dataset) -> Dataset:
    """What a frame's own and the shared functional groups say, as in a file of one slice."""
    header = Dataset()
    for name in _PIXEL_FIELDS:
        if name in dataset:
            setattr(header, name, dataset[name].value)
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    for source in (*shared[:1], group):
        for sequence, names in _FRAME_FIELDS:
            for item in (source.get(sequence) or ())[:1]:
                for name in names:
                    if name in item:
                        setattr(header, name, item[name].value)
    return header


def _read(path: Path, *, pixels: bool) -> FileDataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd values of fields that are not used
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
            for name in (*_NUMBERS, *_WORDS):
                dataset.get(name)  # pydicom interprets an element when it is asked for
    except FileNotFoundError:
        raise InputError("does not exist", path=path) from None
    except InvalidDicomError:
        raise InputError("is not a DICOM file", path=path, remedy="copy it again") from None
    except Exception as error:  # pydicom lets the faults of struct and zlib through
        raise InputError(
            f"is a truncated or damaged DICOM file ({reason_of(error)})",
            path=path,
            remedy="copy it again",
        ) from error
    _check_numbers(dataset, path)
    return dataset


_NUMBERS = {
    "ImagePositionPatient": 3,
    "ImageOrientationPatient": 6,
    "PixelSpacing": 2,
    "ImagerPixelSpacing": 2,
    "NominalScannedPixelSpacing": 2,
    "SliceThickness": 1,
    "InstanceNumber": 1,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
    "Rows": 1,
    "Columns": 1,
    "NumberOfFrames": 1,
    "SamplesPerPixel": 1,
    "BitsAllocated": 1,
    "BitsStored": 1,
    "PixelRepresentation": 1,
    "PixelPaddingValue": 1,
    "PixelPaddingRangeLimit": 1,
}
"""Fields of all files, and how many numbers they hold."""
_WORDS = ("SeriesInstanceUID", "Modality", "PhotometricInterpretation")


def _check_numbers(dataset: Dataset, path: Path) -> None:
    """Refuse a field that is not the numbers it should be; an empty one counts as missing."""
    for name, count in _NUMBERS.items():
        value = dataset.get(name)  # pydicom gives what is no number as text
        if value in (None, ""):
            continue
        several = value if isinstance(value, MultiValue) else [value]
        try:
            fits = bool(np.isfinite([float(v) for v in several]).all())
        except (ValueError, TypeError):
            fits = False
        if not fits or count != len(several):
            wanted = "a number was" if count == 1 else f"{count} numbers were"
            raise InputError(
                f"has the {name} {str(value)[:60]!r}, {wanted} expected",
                path=path,
                remedy="correct the field, or export the file again",
            )


def _in_order(found: Sequence[_Slice]) -> list[_Slice]:
    if len(found) == 1:
        return list(found)
    if all(_has_place(one.header) for one in found):
        normal = _normal(found[0].header)
        keys = [float(np.dot(normal, _position(one.header))) for one in found]
    elif all(one.header.get("InstanceNumber") not in (None, "") for one in found):
        keys = [float(one.header.InstanceNumber) for one in found]
    else:
        lacking = next(one for one in found if not _has_place(one.header))
        raise InputError(
            "has neither ImagePositionPatient nor InstanceNumber in all slices of its series",
            path=lacking.path,
            place=lacking.place,
            remedy="slices cannot be put in order; export the series again",
        )
    order = sorted(range(len(found)), key=keys.__getitem__)
    for first, second in itertools.pairwise(order):
        if abs(keys[first] - keys[second]) < 1e-4:
            raise InputError(
                f"lies at the same place as {found[first].path.name}",
                path=found[second].path,
                place=found[second].place,
                remedy="keep one series (one echo, one time point) per folder",
            )
    return [found[i] for i in order]


def _has_place(header: Dataset) -> bool:
    return bool(header.get("ImagePositionPatient")) and bool(header.get("ImageOrientationPatient"))


def _position(header: Dataset) -> Float64[np.ndarray, " 3"]:
    return np.array([float(v) for v in header.ImagePositionPatient])


def _directions(header: Dataset) -> Float64[np.ndarray, "2 3"]:
    """Directions in the patient (LPS) of growing column index and of growing row index."""
    return np.array([float(v) for v in header.ImageOrientationPatient]).reshape(2, 3)


def _normal(header: Dataset) -> Float64[np.ndarray, " 3"]:
    return np.cross(*_directions(header))


def _series_affine(slices: Sequence[_Slice]) -> Float64[np.ndarray, "4 4"] | None:
    """Affine of (row, column, slice) indices; axial around the origin where no place is stored.

    None for one picture whose spacing is not stored.
    """
    first = slices[0].header
    spacing = _spacing(slices[0])
    if spacing is None and len(slices) == 1:
        return None
    if spacing is None:
        raise InputError(
            "has no PixelSpacing",
            path=slices[0].path,
            place=slices[0].place,
            remedy="sizes in mm are not known: export the series again, or convert it to NIfTI",
        )
    row_mm, column_mm = spacing
    thickness_mm = float(first.get("SliceThickness") or 1.0)
    if not all(_has_place(one.header) for one in slices):
        return picture_affine((row_mm, column_mm, thickness_mm))
    along_columns, along_rows = _directions(first)
    step = _normal(first) * thickness_mm
    if len(slices) > 1:
        step = _slice_step(slices)
    affine = np.eye(4)
    affine[:3, 0] = along_rows * row_mm
    affine[:3, 1] = along_columns * column_mm
    affine[:3, 2] = step
    affine[:3, 3] = _position(first)
    return np.asarray(_LPS_TO_RAS @ affine)


def _spacing(one: _Slice) -> tuple[float, float] | None:
    """Distance of rows and of columns in mm; None where the file does not tell."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        value = one.header.get(name)
        if not value:
            continue
        numbers = [float(v) for v in value]
        if not all(v > 0 for v in numbers):
            listed = ", ".join(f"{v:g}" for v in numbers)
            raise InputError(
                f"has the {name} {listed}, two positive numbers were expected",
                path=one.path,
                place=one.place,
                remedy="correct it, or convert the series to NIfTI",
            )
        return numbers[0], numbers[1]
    return None


def _slice_step(slices: Sequence[_Slice]) -> Float64[np.ndarray, " 3"]:
    """The vector (LPS, mm) from one slice to the next."""
    reference = _directions(slices[0].header)
    positions = np.array([_position(one.header) for one in slices])
    for one in slices:
        if np.abs(_directions(one.header) - reference).max() > 1e-3:
            raise InputError(
                "is tilted against the first slice of its series",
                path=one.path,
                place=one.place,
                remedy="keep one series per folder",
            )
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    usual = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - usual) > 0.1 * usual)
    if wrong.size:
        after = slices[int(wrong[0]) + 1]
        raise InputError(
            f"lies {gaps[wrong[0]]:.2f} mm after the slice before it, the others {usual:.2f} mm",
            path=after.path,
            place=after.place,
            remedy="a slice is missing: complete the series",
        )
    return np.asarray((positions[-1] - positions[0]) / (len(positions) - 1))
