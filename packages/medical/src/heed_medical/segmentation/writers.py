"""Write predictions back in the format and frame of their source.

NIfTI and DICOM sources give `<name>.nii.gz` in the voxel grid of the source; a picture gives
`<name>.png`; a volume of pictures gives both. A file is written under another name in the same
folder and renamed, so that a reader never sees half of it.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Integer, Shaped
from PIL import Image

from heed_core.errors import InputError
from heed_medical.images import file_stem, picture_affine
from heed_medical.segmentation.cases import NativeFrame
from heed_medical.segmentation.labels import LabelTable
from heed_medical.segmentation.prediction import SegmentationPrediction


def write_labels(prediction: SegmentationPrediction, out: Path, table: LabelTable) -> list[Path]:
    """Write a prediction into the folder `out`; the files' paths come back.

    Args:
        prediction: What is written; its name may hold `/` for sub-folders.
        out: Made where it does not exist.
        table: The classes and the values that stand for them.

    Raises:
        InputError: The files cannot be written.
    """
    frame = prediction.frame
    native = frame.to_native(prediction.labels)
    written = []
    if frame.kind != "picture":
        path = out / f"{prediction.name}.nii.gz"
        write_nifti(table.decode(native, picture=False), path, frame)
        written.append(path)
    if frame.kind == "picture":
        path = out / f"{prediction.name}.png"
        write_picture(table.decode(native, picture=True), path)
        written.append(path)
    elif frame.kind == "stack":
        planes = table.decode(native, picture=True)
        for number, source in enumerate(frame.files):
            path = out / prediction.name / f"{file_stem(source)}.png"
            write_picture(planes[..., number], path)
            written.append(path)
    return written


def write_nifti(values: Shaped[np.ndarray, "i j k"], path: Path, frame: NativeFrame) -> None:
    """Write a volume with the affine, the spacing and the header of its source.

    Args:
        values: In the axes of the source; their type becomes the type on disk.
        path: Ends in .nii.gz or .nii.
        frame: The source.

    Raises:
        InputError: The file cannot be written.
    """
    affine = frame.affine_ras
    if affine is None:
        affine = picture_affine((1.0, 1.0, 1.0))
    if frame.header is None:
        image = nib.Nifti1Image(values, affine)
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        header = frame.header.copy()
        header.set_data_dtype(values.dtype)
        header["cal_max"] = header["cal_min"] = 0
        if len(header.get_data_shape()) == 2:
            values = values[..., 0]
        image = nib.Nifti1Image(values, affine, header=header)
    image.header.set_slope_inter(1, 0)
    _write(path, lambda part: nib.save(image, part))


def write_picture(values: Integer[np.ndarray, "h w"], path: Path) -> None:
    """Write grey values as png, 8 or 16 bit by their type.

    Raises:
        InputError: The file cannot be written.
    """
    picture = Image.fromarray(np.ascontiguousarray(values))
    _write(path, lambda part: picture.save(part, format="PNG"))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot be written ({error.strerror or error})",
            path=path,
            remedy="choose a folder that is writable and has space",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
