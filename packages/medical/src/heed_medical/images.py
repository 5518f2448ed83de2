"""Read pictures (png, jpg, tif, bmp) and NIfTI volumes, with one-line errors for every broken file.

Images come as float32 `(channels, *spatial)`, masks as integers `(*spatial)`, both in the axis
order of the file.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64, Int64
from PIL import Image

from heed_core.errors import InputError, reason_of
from heed_medical.logs import silenced

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI_SUFFIXES = (".nii.gz", ".nii")

_LARGEST_LABEL = 2**31
_MOST_COMPRESSED = 1032
"""How many bytes gzip can make of one, at most."""
_READ_AGAIN = "copy or download the file again"


@dataclass(frozen=True, kw_only=True)
class MedicalImage:
    """An image as it lies on disk, with its place in the patient where the file stores one."""

    array: Float32[np.ndarray, " c *spatial"]
    affine_ras: Float64[np.ndarray, "4 4"] | None = None
    """Voxel indices -> mm to the right, anterior, superior; None: the file stores none."""
    header: nib.Nifti1Header | None = None
    """Of a NIfTI file."""

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Distance of neighbouring voxels along each of the three axes."""
        if self.affine_ras is None:
            return None
        return tuple(float(s) for s in np.linalg.norm(self.affine_ras[:3, :3], axis=0))


@dataclass(frozen=True, kw_only=True)
class MaskImage:
    """The integer values of a mask file."""

    array: Int64[np.ndarray, "*spatial"]
    affine_ras: Float64[np.ndarray, "4 4"] | None = None


def file_kind(path: Path) -> Literal["picture", "nifti", "other"]:
    """What a file is by its name."""
    name = path.name.lower()
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    return "picture" if name.endswith(PICTURE_SUFFIXES) else "other"


def file_stem(path: Path) -> str:
    """The name of a file without its suffix; `.nii.gz` counts as one suffix."""
    for suffix in NIFTI_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def is_colour(path: Path) -> bool:
    """Whether a picture has channels that differ; reads grey pictures' headers only."""
    with open_picture(path) as picture:
        if picture.mode in {"1", "L", "LA", "I", "F"} or picture.mode.startswith("I;16"):
            return False
        return not _channels_agree(_picture_array(picture, path))


def read_picture(
    path: Path, *, channels: Literal["grey", "rgb"] = "grey", convert: bool = False
) -> MedicalImage:
    """Read a picture as `(1, h, w)` or `(3, h, w)`; an alpha channel is dropped.

    Args:
        path: The file.
        channels: grey: one channel; rgb: three, of which a grey picture gets equal ones.
        convert: Whether a colour picture becomes its luminance (ITU-R 601) where grey is asked for.

    Raises:
        InputError: The file is missing, not a picture, truncated, or in colour where grey is
            asked for.
    """
    with open_picture(path) as picture:
        array = _picture_array(picture, path)
    if array.ndim == 2:
        array = array[..., None]
    elif channels == "grey":
        if _channels_agree(array):
            array = array[..., :1]
        elif convert:
            array = array @ np.array([[0.299], [0.587], [0.114]])
        else:
            raise InputError(
                "is in colour, grey was expected",
                path=path,
                remedy="--data.colour grey converts it, --data.channels rgb trains on colours",
            )
    if channels == "rgb" and array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return MedicalImage(array=np.ascontiguousarray(np.moveaxis(array, -1, 0), dtype=np.float32))


def read_mask_picture(path: Path) -> MaskImage:
    """Read the grey values (or palette indices) of a mask picture.

    Raises:
        InputError: The file is missing, not a picture, truncated, or in colour.
    """
    with open_picture(path) as picture:
        indexed = picture.mode == "P"
        array = _loaded(picture, path) if indexed else _picture_array(picture, path)
    if array.ndim == 3:
        if not _channels_agree(array):
            raise InputError(
                "is a mask in colour, grey values were expected",
                path=path,
                remedy="save the mask as grey values, one per class",
            )
        array = array[..., 0]
    return MaskImage(array=_as_integers(array, path))


def open_picture(path: Path) -> Image.Image:
    """Open a picture; its pixels are decoded when they are asked for.

    Raises:
        InputError: The file is missing or not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd tags, which name no file
            return Image.open(path)
    except FileNotFoundError:
        raise InputError("does not exist", path=path) from None
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise InputError(
            f"is not a readable picture ({reason_of(error, path)})", path=path, remedy=_READ_AGAIN
        ) from error


def _loaded(picture: Image.Image, path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(picture)
    except Exception as error:
        raise InputError(
            f"is truncated or damaged ({reason_of(error)})", path=path, remedy=_READ_AGAIN
        ) from error


def _picture_array(picture: Image.Image, path: Path) -> np.ndarray:
    """Values as `(h, w)` or `(h, w, 3)`: palettes applied, alpha dropped, 1 bit as 0 and 1."""
    array = _loaded(picture, path)
    if picture.mode in {"P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}:
        array = np.asarray(picture.convert("RGB"))
    if array.ndim == 3 and array.shape[-1] in {2, 4}:
        array = array[..., :-1]
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _channels_agree(array: np.ndarray) -> bool:
    return array.ndim == 2 or bool((array == array[..., :1]).all())


def read_nifti(path: Path) -> MedicalImage:
    """Read a NIfTI file as `(c, i, j, k)`: a fourth axis becomes channels, a missing third is 1.

    Raises:
        InputError: The file is missing, truncated, not NIfTI, has more than four axes, or values
            that are not finite.
    """
    image = _open_nifti(path)
    array = _three_axes(_nifti_values(image, path), path, most=4)
    with np.errstate(invalid="ignore", over="ignore"):
        array = np.asarray(array, dtype=np.float32)
    array = np.moveaxis(array, 3, 0) if array.ndim == 4 else array[None]
    check_finite(array, path)
    return MedicalImage(
        array=np.ascontiguousarray(array), affine_ras=_affine(image, path), header=image.header
    )


def read_mask_nifti(path: Path) -> MaskImage:
    """Read a NIfTI file of integer labels as `(i, j, k)`.

    Raises:
        InputError: The file is missing, truncated, not NIfTI, not three-dimensional, or holds
            values that are not whole numbers.
    """
    image = _open_nifti(path)
    array = _three_axes(_nifti_values(image, path), path, most=3)
    return MaskImage(array=_as_integers(array, path), affine_ras=_affine(image, path))


def nifti_shape(path: Path) -> tuple[int, ...]:
    """Shape of a NIfTI file, read from its header alone.

    Raises:
        InputError: The file is missing or not NIfTI.
    """
    return tuple(int(n) for n in _open_nifti(path).shape)


def _open_nifti(path: Path) -> nib.Nifti1Pair:
    try:
        with silenced("nibabel.global"):  # headers that it mends, twice each and naming no file
            image = nib.load(path)
    except FileNotFoundError:
        raise InputError("does not exist", path=path) from None
    except Exception as error:  # nibabel lets the faults of zlib, struct and numpy through
        raise InputError(
            f"is not a readable NIfTI file ({reason_of(error)})", path=path, remedy=_READ_AGAIN
        ) from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"is a {type(image).__name__}, not NIfTI", path=path)
    return image


def _nifti_values(image: nib.Nifti1Pair, path: Path) -> np.ndarray:
    stated = math.prod(int(n) for n in image.shape) * image.get_data_dtype().itemsize
    most = path.stat().st_size * (_MOST_COMPRESSED if path.name.lower().endswith(".gz") else 1)
    if stated > most:
        raise InputError(
            f"is truncated or damaged: its header states {shape_text(image.shape)} voxels, "
            f"{stated} bytes",
            path=path,
            remedy=_READ_AGAIN,
        )
    try:
        return np.asanyarray(image.dataobj)
    except MemoryError:
        raise InputError(
            f"does not fit into memory: its header states {shape_text(image.shape)} voxels",
            path=path,
            remedy=f"{_READ_AGAIN}, or cut it",
        ) from None
    except Exception as error:  # nibabel lets the faults of zlib, struct and numpy through
        raise InputError(
            f"is truncated or damaged ({reason_of(error)})", path=path, remedy=_READ_AGAIN
        ) from error


def _three_axes(array: np.ndarray, path: Path, *, most: int) -> np.ndarray:
    if array.dtype.names is not None or np.iscomplexobj(array):
        raise InputError(f"holds values of type {array.dtype}, numbers were expected", path=path)
    while array.ndim > most and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if not 3 <= array.ndim <= most or array.size == 0:
        raise InputError(f"has shape {shape_text(array.shape)}, a volume was expected", path=path)
    return array


def _affine(image: nib.Nifti1Pair, path: Path) -> Float64[np.ndarray, "4 4"]:
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise InputError(
            "has an affine that cannot be inverted",
            path=path,
            remedy="correct the sform or qform of its header",
        )
    return affine


def _as_integers(array: np.ndarray, path: Path) -> Int64[np.ndarray, "*spatial"]:
    if array.dtype.kind == "f":
        check_finite(array, path)
        wrong = (array != np.rint(array)) | (np.abs(array) > _LARGEST_LABEL)
        if wrong.any():
            raise InputError(
                f"holds labels that are not whole numbers (such as {array[wrong][0]:g})",
                path=path,
                remedy="resample masks with nearest neighbour",
            )
    return array.astype(np.int64)


def check_finite(array: np.ndarray, path: Path) -> None:
    """Raise `InputError` where an array holds NaN or infinity; names the first place."""
    if array.dtype.kind != "f":
        return
    wrong = ~np.isfinite(array)
    if count := int(wrong.sum()):
        place = ", ".join(str(int(i)) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"holds {count} value{'s' * (count > 1)} that {'are' if count > 1 else 'is'} not finite"
            f" (NaN or infinity), the first at [{place}]",
            path=path,
            remedy="repair or remove the image",
        )


def picture_affine(spacing_mm: Sequence[float]) -> Float64[np.ndarray, "4 4"]:
    """Affine of a volume of pictures: rows run to posterior, columns to left, slices to superior.

    Args:
        spacing_mm: Distance of rows, of columns and of slices.
    """
    rows, columns, slices = spacing_mm
    return np.array(
        [[0, -columns, 0, 0], [-rows, 0, 0, 0], [0, 0, slices, 0], [0, 0, 0, 1]], dtype=np.float64
    )


def same_geometry(
    first: Float64[np.ndarray, "4 4"],
    second: Float64[np.ndarray, "4 4"],
    shape: Sequence[int],
    *,
    tolerance: float = 0.1,
) -> bool:
    """Whether two affines put every corner of a volume at the same place.

    Args:
        first: An affine.
        second: Another one.
        shape: Spatial shape of the volume.
        tolerance: Largest distance of a corner, as a share of the smallest voxel spacing.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij"))
    moved = (first - second) @ corners.reshape(4, -1)
    spacing = np.linalg.norm(first[:3, :3], axis=0).min()
    shear = np.abs(first[:3, :3] - second[:3, :3]).max()  # a volume one voxel thick has no corners
    return bool(np.abs(moved[:3]).max() <= tolerance * spacing and shear <= tolerance * spacing)


def shape_text(shape: Sequence[int]) -> str:
    """A shape for messages: `(34, 52, 35)` -> `34 x 52 x 35`."""
    return " x ".join(str(n) for n in shape)
