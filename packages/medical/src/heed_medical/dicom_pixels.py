"""The pixels of a DICOM file as numbers: decoding, colours, units, the window they are shown by.

The order is that of PS3.3 C.7.6.16 and C.11: stored values, modality (RescaleSlope or a table),
then for display VOI (a window or a table). MONOCHROME1 is turned so that larger is brighter.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)

from heed_core.errors import InputError
from heed_medical.images import check_finite
from heed_medical.logs import silenced

LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue (ITU-R BT.601)."""
_PALETTE = "PALETTE COLOR"


def stored_values(dataset: Dataset, path: Path) -> Shaped[np.ndarray, "*frames rows columns"]:
    """The decoded pixels, colours last where there are any; palettes are looked up.

    Raises:
        InputError: There are none, their decoder is missing, or they are damaged.
    """
    if "PixelData" not in dataset and "FloatPixelData" not in dataset:
        kind = str(dataset.get("Modality", ""))
        known = re.fullmatch(r"[A-Z0-9_]{1,16}", kind)
        raise InputError(
            f"has no pixel data (modality {kind if known else 'unknown'})",
            path=path,
            remedy="it is not an image: remove it from the folder",
        )
    try:
        with warnings.catch_warnings(), silenced("pydicom"):  # of each decoder that failed
            warnings.simplefilter("ignore")  # padding bytes after the pixels are harmless
            stored = dataset.pixel_array
            if dataset.get("PhotometricInterpretation") == _PALETTE:
                stored = apply_color_lut(stored, dataset)
    except Exception as error:  # each decoder has its own faults
        raise _decoding_fault(dataset, path, error) from error
    return np.asarray(stored)


def is_colour(dataset: Dataset) -> bool:
    """Whether a pixel has several values: colours, also those of a palette."""
    palette = dataset.get("PhotometricInterpretation") == _PALETTE
    return palette or int(dataset.get("SamplesPerPixel", 1)) > 1


def top_value(dataset: Dataset) -> float:
    """The largest value that a pixel or a palette's colour can have."""
    if dataset.get("PhotometricInterpretation") == _PALETTE:
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    else:
        bits = int(dataset.get("BitsStored", 16))
    return float(2**bits - 1)


def luminance(colours: Shaped[np.ndarray, "*places 3"]) -> Float32[np.ndarray, "*places"]:
    """How bright colours are, in their own range."""
    return np.asarray(colours @ LUMINANCE, dtype=np.float32)


def grey_values(
    stored: Shaped[np.ndarray, "*places"], dataset: Dataset, path: Path
) -> Float32[np.ndarray, "*places"]:
    """Stored values in their unit (Hounsfield, ...), larger brighter.

    Args:
        stored: Of `stored_values`.
        dataset: Says what they mean.
        path: For messages.

    Raises:
        InputError: A value that is not finite.
    """
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        stored = _turned(stored, dataset)
    values = in_unit(stored, dataset).astype(np.float32)
    check_finite(values, path)
    return values


def _turned(stored: Shaped[np.ndarray, "*places"], dataset: Dataset) -> np.ndarray:
    signed = int(dataset.get("PixelRepresentation", 0))
    top = -1 if signed else 2 ** int(dataset.BitsStored) - 1
    dtype = np.int64 if stored.dtype.kind in "iu" else np.float64
    return np.asarray(top - stored.astype(dtype))


def in_unit(
    stored: Shaped[np.ndarray, "*places"], dataset: Dataset
) -> Float64[np.ndarray, "*places"]:
    """Apply the rescaling or the table that gives stored values their unit."""
    if dataset.get("ModalityLUTSequence"):
        return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    values = stored.astype(np.float64) * float(1 if slope is None else slope)
    return np.asarray(values + float(0 if intercept is None else intercept))


def shown(
    stored: Shaped[np.ndarray, "*places"], dataset: Dataset, path: Path
) -> Float32[np.ndarray, "*places"] | None:
    """Stored values as they are shown, 0 black and 1 white; None: the file does not say how.

    Of several windows the first counts, a table comes before windows.

    Raises:
        InputError: A window or table that cannot be used.
    """
    values = in_unit(stored, dataset)
    if dataset.get("VOILUTSequence"):
        grey = _by_table(values, dataset, path)
    elif _has(dataset, "WindowCenter") or _has(dataset, "WindowWidth"):
        grey = _by_window(values, dataset, path)
    else:
        return None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 1.0 - grey
    check_finite(grey, path)
    return np.asarray(grey, dtype=np.float32)


def _has(dataset: Dataset, name: str) -> bool:
    return dataset.get(name) not in (None, "", [])


def _by_table(values: Float64[np.ndarray, "*places"], dataset: Dataset, path: Path) -> np.ndarray:
    try:
        grey = apply_voi(np.rint(values).astype(np.int64), dataset)
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
    except Exception as error:  # a table that is too short, without descriptor, ...
        raise InputError(
            f"stores a VOI table that cannot be used ({error})", path=path, remedy=_OTHERWISE
        ) from None
    return np.asarray(grey / (2.0**bits - 1))


_OTHERWISE = "leave --data.voi out, or give --data.window"


def _by_window(values: Float64[np.ndarray, "*places"], dataset: Dataset, path: Path) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, from 0 to 1."""
    for name, other in (("WindowCenter", "WindowWidth"), ("WindowWidth", "WindowCenter")):
        if not _has(dataset, other):
            raise InputError(f"stores a {name} without {other}", path=path, remedy=_OTHERWISE)
        _check_first(dataset, name, path)
    try:
        with np.errstate(over="ignore"):  # of exponentials far from a sigmoid's centre
            grey = apply_windowing(values, dataset)
        black, white = apply_windowing(np.array([-np.inf, np.inf]), dataset)
    except Exception as error:  # a width or a function that the standard does not know
        raise InputError(
            f"stores a window that cannot be used ({error})", path=path, remedy=_OTHERWISE
        ) from None
    return np.asarray((grey - black) / (white - black))


def _check_first(dataset: Dataset, name: str, path: Path) -> None:
    value = dataset.get(name)
    try:
        number = float(value[0] if isinstance(value, MultiValue) else value)
    except (ValueError, TypeError):
        number = np.nan
    if not np.isfinite(number):
        raise InputError(
            f"has the {name} {str(value)!r}, a number was expected", path=path, remedy=_OTHERWISE
        )


def padding_mask(
    stored: Shaped[np.ndarray, "*places"], dataset: Dataset
) -> Shaped[np.ndarray, "*places"]:
    """Which pixels are no image: PixelPaddingValue, up to PixelPaddingRangeLimit if it is there."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((int(value), int(value if limit is None else limit)))
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))


def _decoding_fault(dataset: Dataset, path: Path, error: Exception) -> InputError:
    meta: Any = getattr(dataset, "file_meta", None) or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on characters that it should not have
        syntax = meta.get("TransferSyntaxUID")
    known = syntax is not None and syntax.is_transfer_syntax  # a damaged one may be anything
    name = f"{syntax.name} ({syntax})" if known else "unknown transfer syntax"
    if known and syntax.is_compressed and _decoder_is_missing(error):
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
