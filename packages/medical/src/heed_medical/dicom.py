"""Read DICOM images: single pictures and series that make a volume.

Slices are ordered by their place in the patient (ImagePositionPatient along the normal of the
slices), or by InstanceNumber where no place is stored; never by file name. Values are rescaled
(RescaleSlope, RescaleIntercept), and MONOCHROME1 is inverted so that larger is brighter. Axes are
(rows, columns, slices).
"""

import contextlib
import itertools
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Float32, Float64
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError

from heed_core.errors import InputError
from heed_medical.images import MedicalImage, check_finite, picture_affine, shape_text

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


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
    return {uid: _in_order(found) for uid, found in series.items()}


def read_series(files: Sequence[Path]) -> MedicalImage:
    """Read the slices of one series as `(1, rows, columns, slices)`.

    Args:
        files: The files, in any order.

    Raises:
        InputError: A file that is missing, truncated, not DICOM, without pixels, in an encoding
            whose decoder is missing, or that does not fit the others; slices that are missing.
    """
    headers = {path: _read(path, pixels=True) for path in files}
    ordered = _in_order(list(headers.items()))
    datasets = [headers[path] for path in ordered]
    slices = [_values(dataset, path) for dataset, path in zip(datasets, ordered, strict=True)]
    for path, plane in zip(ordered, slices, strict=True):
        if plane.shape != slices[0].shape:
            raise InputError(
                f"is {shape_text(plane.shape)} pixels, the first slice is "
                f"{shape_text(slices[0].shape)}",
                path=path,
                remedy="keep one series per folder",
            )
    affine = _series_affine(datasets, ordered)
    return MedicalImage(array=np.stack(slices, axis=-1)[None], affine_ras=affine)


def _read(path: Path, *, pixels: bool) -> FileDataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd values of fields that are not used
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
    except FileNotFoundError:
        raise InputError("does not exist", path=path) from None
    except InvalidDicomError:
        raise InputError("is not a DICOM file", path=path, remedy="copy it again") from None
    except Exception as error:  # pydicom lets the faults of struct and zlib through
        raise InputError(
            f"is a truncated or damaged DICOM file ({type(error).__name__}: {error})",
            path=path,
            remedy="copy it again",
        ) from error
    return dataset


def _in_order(found: Sequence[tuple[Path, FileDataset]]) -> tuple[Path, ...]:
    if len(found) == 1:
        return (found[0][0],)
    if all(_has_place(header) for _, header in found):
        normal = _normal(found[0][1])
        keys = [float(np.dot(normal, _position(header))) for _, header in found]
    elif all(header.get("InstanceNumber") not in (None, "") for _, header in found):
        keys = [float(header.InstanceNumber) for _, header in found]
    else:
        lacking = next(path for path, header in found if not _has_place(header))
        raise InputError(
            "has neither ImagePositionPatient nor InstanceNumber in all slices of its series",
            path=lacking,
            remedy="slices cannot be put in order; export the series again",
        )
    order = sorted(range(len(found)), key=keys.__getitem__)
    for first, second in itertools.pairwise(order):
        if abs(keys[first] - keys[second]) < 1e-4:
            raise InputError(
                f"lies at the same place as {found[first][0].name}",
                path=found[second][0],
                remedy="keep one series (one echo, one time point) per folder",
            )
    return tuple(found[i][0] for i in order)


def _has_place(header: FileDataset) -> bool:
    return bool(header.get("ImagePositionPatient")) and bool(header.get("ImageOrientationPatient"))


def _position(header: FileDataset) -> Float64[np.ndarray, " 3"]:
    return np.array([float(v) for v in header.ImagePositionPatient])


def _directions(header: FileDataset) -> Float64[np.ndarray, "2 3"]:
    """Directions in the patient (LPS) of growing column index and of growing row index."""
    return np.array([float(v) for v in header.ImageOrientationPatient]).reshape(2, 3)


def _normal(header: FileDataset) -> Float64[np.ndarray, " 3"]:
    return np.cross(*_directions(header))


def _values(dataset: FileDataset, path: Path) -> Float32[np.ndarray, "rows columns"]:
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        kind = dataset.get("Modality", "unknown")
        raise InputError(
            f"has no pixel data (modality {kind})",
            path=path,
            remedy="it is not an image: remove it from the folder",
        )
    try:
        with warnings.catch_warnings(), _silent_decoders():
            warnings.simplefilter("ignore")  # padding bytes after the pixels are harmless
            stored = dataset.pixel_array
    except Exception as error:  # each decoder has its own faults
        raise _decoding_fault(dataset, path, error) from error
    if stored.ndim != 2:
        what = "colour" if int(dataset.get("SamplesPerPixel", 1)) > 1 else "several frames"
        raise InputError(
            f"holds {what} in one file (shape {shape_text(stored.shape)})",
            path=path,
            remedy="convert it to NIfTI or to grey single-frame DICOM",
        )
    values = stored.astype(np.float64)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        signed = int(dataset.get("PixelRepresentation", 0))
        values = (-1.0 if signed else 2.0 ** int(dataset.BitsStored) - 1.0) - values
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = values * float(1 if slope is None else slope)
    values = (values + float(0 if intercept is None else intercept)).astype(np.float32)
    check_finite(values, path)
    return values


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Without the tracebacks that pydicom logs of each decoder that failed."""
    logger = logging.getLogger("pydicom")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _decoding_fault(dataset: FileDataset, path: Path, error: Exception) -> InputError:
    meta = getattr(dataset, "file_meta", {})
    syntax = meta.get("TransferSyntaxUID") if meta else None
    name = f"{syntax.name} ({syntax})" if syntax is not None else "unknown transfer syntax"
    if syntax is not None and syntax.is_compressed and _decoder_is_missing(error):
        return InputError(
            f"is encoded as {name}, for which no decoder is installed",
            path=path,
            remedy="install pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg, "
            "or decompress the file",
        )
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return InputError(
        f"has pixel data that cannot be decoded as {name}: truncated or damaged ({text})",
        path=path,
        remedy="copy the file again",
    )


_NO_DECODER = ("plugin", "missing", "no available", "not installed", "no pixel data decoders")
"""What pydicom says where it has no decoder for an encoding."""


def _decoder_is_missing(error: Exception) -> bool:
    text = str(error).lower()
    return any(part in text for part in _NO_DECODER)


def _series_affine(
    datasets: Sequence[FileDataset], paths: Sequence[Path]
) -> Float64[np.ndarray, "4 4"]:
    """Affine of (row, column, slice) indices; axial around the origin where no place is stored."""
    first = datasets[0]
    spacing = first.get("PixelSpacing") or first.get("ImagerPixelSpacing") or (1.0, 1.0)
    row_mm, column_mm = (float(v) for v in spacing)
    thickness_mm = float(first.get("SliceThickness") or 1.0)
    if not all(_has_place(d) for d in datasets):
        return picture_affine((row_mm, column_mm, thickness_mm))
    along_columns, along_rows = _directions(first)
    step = _normal(first) * thickness_mm
    if len(datasets) > 1:
        step = _slice_step(datasets, paths)
    affine = np.eye(4)
    affine[:3, 0] = along_rows * row_mm
    affine[:3, 1] = along_columns * column_mm
    affine[:3, 2] = step
    affine[:3, 3] = _position(first)
    return np.asarray(_LPS_TO_RAS @ affine)


def _slice_step(
    datasets: Sequence[FileDataset], paths: Sequence[Path]
) -> Float64[np.ndarray, " 3"]:
    """The vector (LPS, mm) from one slice to the next."""
    reference = _directions(datasets[0])
    positions = np.array([_position(d) for d in datasets])
    for dataset, path in zip(datasets, paths, strict=True):
        if np.abs(_directions(dataset) - reference).max() > 1e-3:
            raise InputError(
                "is tilted against the first slice of its series",
                path=path,
                remedy="keep one series per folder",
            )
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    usual = float(np.median(gaps))
    wrong = np.flatnonzero(np.abs(gaps - usual) > 0.1 * usual)
    if wrong.size:
        raise InputError(
            f"lies {gaps[wrong[0]]:.2f} mm after the slice before it, the others {usual:.2f} mm",
            path=paths[int(wrong[0]) + 1],
            remedy="a slice is missing: complete the series",
        )
    return np.asarray((positions[-1] - positions[0]) / (len(positions) - 1))
