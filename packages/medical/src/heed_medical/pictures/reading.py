"""Read one picture or DICOM image as grey values within 0..1, and resize it."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32
from PIL import Image

from heed_core.errors import InputError
from heed_medical.dicom import is_dicom, read_plane
from heed_medical.images import check_finite, file_kind, open_picture, read_picture, shape_text

_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def read_grey(
    path: Path, *, window: tuple[float, float] | None = None, voi: bool = False
) -> Float32[np.ndarray, "h w"]:
    """Read a picture in grey, 0 black and 1 white; colours become their luminance.

    8-bit pictures are divided by 255. Pictures of more bits and DICOM images (whose MONOCHROME1
    is inverted) go from their lowest to their highest value, a constant one to 0.

    Args:
        path: A picture or a DICOM file.
        window: The values that become 0 and 1 instead.
        voi: DICOM images are shown by the window or table that they store, where they store one.

    Raises:
        InputError: The file is missing, broken, not a picture, or a DICOM file without pixels or
            in an encoding that cannot be read.
    """
    values, whole = _values(path, voi=voi)
    check_finite(values, path)
    if values.size == 0:
        raise InputError(f"is empty ({shape_text(values.shape)} pixels)", path=path)
    low, high = window or whole or (float(values.min()), float(values.max()))
    if high <= low:
        return np.zeros_like(values)
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def _values(
    path: Path, *, voi: bool
) -> tuple[Float32[np.ndarray, "h w"], tuple[float, float] | None]:
    """The stored values, and the range of their type where it says what is black and white."""
    if not path.is_file():
        raise InputError("does not exist", path=path)
    if file_kind(path) != "picture" and is_dicom(path):
        return read_plane(path, voi=voi)
    grey = read_picture(path, channels="grey", convert=True).array[0]
    with open_picture(path) as picture:
        mode = picture.mode
    if mode in _WIDE_MODES:
        return grey, None
    return grey, (0.0, 1.0) if mode == "1" else (0.0, 255.0)


def resize_grey(
    picture: Float32[np.ndarray, "h w"], size: tuple[int, int]
) -> Float32[np.ndarray, "p q"]:
    """Resize without cropping, smoothing where the picture becomes smaller."""
    if picture.shape == size:
        return picture
    height, width = size
    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(image, dtype=np.float32)
