"""One case of a segmentation data set: its files, and the arrays that are read from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float32, Float64, Int16, Shaped
from nibabel import orientations

from heed_core.errors import InputError
from heed_medical.dicom import read_series
from heed_medical.images import (
    MaskImage,
    MedicalImage,
    file_kind,
    picture_affine,
    read_mask_nifti,
    read_mask_picture,
    read_nifti,
    read_picture,
    same_geometry,
    shape_text,
)
from heed_medical.segmentation.settings import AXES, Normalise, SegmentationData

Kind = Literal["picture", "stack", "nifti", "dicom"]

_WORKING_FRAME = orientations.axcodes2ornt(("P", "L", "S"))


@dataclass(frozen=True, kw_only=True)
class CaseFiles:
    """Where one case lies on disk."""

    name: str
    """Unique in its data set; may hold `/`."""
    kind: Kind
    """picture: a 2-D image; stack: pictures that are the slices of a volume; nifti; dicom: one
    series."""
    images: tuple[Path, ...]
    """stack, dicom: the slices in order; picture, nifti: a file per modality (or one that holds
    all)."""
    masks: tuple[Path, ...] = ()
    """One file; one per slice where the masks of a stack or a DICOM series are pictures. Empty: no
    label."""
    split: str | None = None
    patient: str = ""


@dataclass(frozen=True, kw_only=True)
class NativeFrame:
    """How a case lay on disk, to write results back into the same frame.

    In memory, volumes with a known geometry have axes that run to posterior, left and superior:
    the rows, columns and slices of an axial scan as a radiologist sees it.
    """

    kind: Kind
    files: tuple[Path, ...]
    """The image files."""
    shape: tuple[int, ...]
    """Spatial shape on disk."""
    affine_ras: Float64[np.ndarray, "4 4"] | None = None
    """Voxel indices on disk -> mm to the right, anterior, superior; None: not stored."""
    orientation: Float64[np.ndarray, "3 2"] | None = None
    """nibabel's orientation transform from the axes on disk to those in memory."""
    header: nib.Nifti1Header | None = None
    """Of a NIfTI source."""

    def to_working(self, array: Shaped[np.ndarray, "*spatial"]) -> Shaped[np.ndarray, "*working"]:
        """Turn an array from the axes on disk to those in memory."""
        if self.orientation is None:
            return array
        return np.asarray(orientations.apply_orientation(array, self.orientation))

    def to_native(self, array: Shaped[np.ndarray, "*working"]) -> Shaped[np.ndarray, "*spatial"]:
        """Turn an array from the axes in memory back to those on disk."""
        if self.orientation is None:
            return array
        working = orientations.io_orientation(np.eye(4))
        back = orientations.ornt_transform(working, self.orientation)
        return np.asarray(orientations.apply_orientation(array, back))


@dataclass(frozen=True, kw_only=True)
class SegmentationCase:
    """One picture or volume, normalised, with its label where there is one."""

    name: str
    image: Float32[np.ndarray, " c *spatial"]
    label: Int16[np.ndarray, "*spatial"] | None
    """Class numbers; -100 where voxels count for nothing."""
    spacing_mm: tuple[float, ...] | None
    """Per spatial axis of `image`; None: the file stores none (pictures)."""
    affine_ras: Float64[np.ndarray, "4 4"] | None
    """Voxel indices of `image` -> mm to the right, anterior, superior."""
    slice_axis: int | None
    """The spatial axis that slices are numbered along; None for a picture."""
    frame: NativeFrame
    split: str | None = None
    patient: str = ""

    @property
    def slices(self) -> Float32[np.ndarray, "n c h w"]:
        """A view of the image as slices; a picture is one slice."""
        return to_slices(self.image, self.slice_axis)

    @property
    def label_slices(self) -> Int16[np.ndarray, "n h w"] | None:
        """A view of the label as slices."""
        if self.label is None:
            return None
        return to_slices(self.label[None], self.slice_axis)[:, 0]


def to_slices(
    array: Shaped[np.ndarray, " c *spatial"], axis: int | None
) -> Shaped[np.ndarray, "n c h w"]:
    """View a volume as slices along the spatial axis `axis`; None: a picture, one slice."""
    return array[None] if axis is None else np.moveaxis(array, axis + 1, 0)


def from_slices(
    slices: Shaped[np.ndarray, "n c h w"], axis: int | None
) -> Shaped[np.ndarray, " c *spatial"]:
    """Undo `to_slices`."""
    return slices[0] if axis is None else np.moveaxis(slices, 0, axis + 1)


def read_case(
    files: CaseFiles, settings: SegmentationData, *, label: bool = True
) -> SegmentationCase:
    """Read one case and bring it into the working frame.

    Args:
        files: Where it lies.
        settings: As settled by `plan_data`.
        label: Whether masks are read where there are some.

    Raises:
        InputError: A file that is missing, truncated, of another shape or geometry than its
            partner, holds values that are not finite, or labels outside the list.
    """
    native = read_native(files, settings)
    check_channels(native, files, settings)
    frame = native_frame(files, native.array.shape[1:], native.affine_ras, native.header)
    image = np.stack([frame.to_working(channel) for channel in native.array])
    affine, spacing = working_affine(frame)
    axis = _slice_axis(files.kind, image.shape[1:], spacing, settings)
    joint = files.kind in {"picture", "stack"}
    found = None
    if label and files.masks:
        mask = read_mask(files, native)
        codes = settings.table.encode(mask.array, path=files.masks[0])
        found = np.ascontiguousarray(frame.to_working(codes))
    return SegmentationCase(
        name=files.name,
        image=normalise(image, settings.normalise, axis=axis, window=settings.window, joint=joint),
        label=found,
        spacing_mm=spacing,
        affine_ras=affine,
        slice_axis=axis,
        frame=frame,
        split=files.split,
        patient=files.patient,
    )


def read_native(files: CaseFiles, settings: SegmentationData) -> MedicalImage:
    """Read the image of a case in the axes of its files, all modalities, not normalised.

    Raises:
        InputError: As `read_case`.
    """
    if files.kind == "dicom":
        return read_series(files.images)
    if files.kind == "nifti":
        return _read_modalities(files)
    channels: Literal["grey", "rgb"] = "rgb" if settings.channels == "rgb" else "grey"
    pictures = [
        read_picture(path, channels=channels, convert=settings.colour == "grey").array
        for path in files.images
    ]
    _check_same_size([p.shape[1:] for p in pictures], files.images)
    if files.kind == "picture":
        return MedicalImage(array=np.concatenate(pictures))
    affine = None if settings.spacing_mm is None else picture_affine(settings.spacing_mm)
    return MedicalImage(array=np.stack(pictures, axis=-1), affine_ras=affine)


def _read_modalities(files: CaseFiles) -> MedicalImage:
    volumes = [read_nifti(path) for path in files.images]
    first = volumes[0]
    for path, volume in zip(files.images[1:], volumes[1:], strict=True):
        _check_fits(volume.array.shape[1:], volume.affine_ras, first, path, files.images[0])
    return MedicalImage(
        array=np.concatenate([v.array for v in volumes]),
        affine_ras=first.affine_ras,
        header=first.header,
    )


def read_mask(files: CaseFiles, image: MedicalImage) -> MaskImage:
    """Read the mask values of a case and compare their shape and geometry with the image's.

    Raises:
        InputError: As `read_case`.
    """
    paths = files.masks
    if file_kind(paths[0]) == "nifti":
        mask = read_mask_nifti(paths[0])
        _check_fits(mask.array.shape, mask.affine_ras, image, paths[0], files.images[0])
        return mask
    if len(paths) == 1 and image.array.ndim == 3:
        mask = read_mask_picture(paths[0])
        _check_fits(mask.array.shape, None, image, paths[0], files.images[0])
        return mask
    if len(paths) != image.array.shape[-1]:
        raise InputError(
            f"has {len(paths)} masks for {image.array.shape[-1]} slices",
            path=paths[0].parent,
            remedy="give one mask per slice",
        )
    planes = [read_mask_picture(path).array for path in paths]
    for path, plane in zip(paths, planes, strict=True):
        if plane.shape != image.array.shape[1:3]:
            raise _misfit(plane.shape, image.array.shape[1:3], path, files.images[0])
    return MaskImage(array=np.stack(planes, axis=-1))


def _check_fits(
    shape: tuple[int, ...],
    affine: Float64[np.ndarray, "4 4"] | None,
    image: MedicalImage,
    path: Path,
    partner: Path,
) -> None:
    if tuple(shape) != image.array.shape[1:]:
        raise _misfit(shape, image.array.shape[1:], path, partner)
    if affine is None or image.affine_ras is None:
        return
    if not same_geometry(image.affine_ras, affine, shape):
        moved = np.abs(affine - image.affine_ras).max()
        raise InputError(
            f"lies elsewhere in the patient than {partner.name}: their affines differ by up to "
            f"{moved:.3g}",
            path=path,
            remedy="resample it into the frame of the image",
        )


def _misfit(
    shape: tuple[int, ...], expected: tuple[int, ...], path: Path, partner: Path
) -> InputError:
    return InputError(
        f"has shape {shape_text(shape)}, its image {partner.name} has {shape_text(expected)}",
        path=path,
        remedy="resample it into the frame of the image",
    )


def _check_same_size(shapes: list[tuple[int, ...]], paths: tuple[Path, ...]) -> None:
    for path, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"is {shape_text(shape)} pixels, {paths[0].name} of the same case is "
                f"{shape_text(shapes[0])}",
                path=path,
                remedy="bring all pictures of a case to one size",
            )


def check_channels(image: MedicalImage, files: CaseFiles, settings: SegmentationData) -> None:
    """Raise `InputError` where an image has other channels than the settings say."""
    expected, got = settings.input_channels, image.array.shape[0]
    if expected is not None and got != expected:
        names = ", ".join(path.name for path in files.images[:4])
        raise InputError(
            f"has {got} channel{'s' * (got > 1)} ({names}), {expected} expected",
            path=files.images[0],
            remedy="give the same modalities, in the same order, as in training",
        )


def native_frame(
    files: CaseFiles,
    shape: tuple[int, ...],
    affine_ras: Float64[np.ndarray, "4 4"] | None,
    header: nib.Nifti1Header | None = None,
) -> NativeFrame:
    """The frame of a case, from the spatial shape and affine of its image as it lies on disk."""
    orientation = None
    if affine_ras is not None:
        start = orientations.io_orientation(affine_ras)
        orientation = orientations.ornt_transform(start, _WORKING_FRAME)
    return NativeFrame(
        kind=files.kind,
        files=files.images,
        shape=shape,
        affine_ras=affine_ras,
        orientation=orientation,
        header=header,
    )


def working_affine(
    frame: NativeFrame,
) -> tuple[Float64[np.ndarray, "4 4"] | None, tuple[float, ...] | None]:
    """Affine and voxel spacing of a case in memory; None where the files store none."""
    if frame.affine_ras is None or frame.orientation is None:
        return None, None
    affine = frame.affine_ras @ orientations.inv_ornt_aff(frame.orientation, frame.shape)
    return affine, tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))


def _slice_axis(
    kind: Kind,
    shape: tuple[int, ...],
    spacing_mm: tuple[float, ...] | None,
    settings: SegmentationData,
) -> int | None:
    if kind == "picture":
        return None
    if kind == "stack":
        return 2
    if settings.axis != "auto":
        return AXES[settings.axis]
    return widest_axis(shape, spacing_mm or (1.0, 1.0, 1.0))


def widest_axis(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> int:
    """The axis that a volume was scanned along: of the widest spacing, else the last.

    A volume one voxel thick was scanned along that axis, whatever its spacing.
    """
    if sum(n == 1 for n in shape) == 1:
        return shape.index(1)
    widest = int(np.argmax(spacing_mm))
    return widest if spacing_mm[widest] > 1.01 * spacing_mm[2] else 2


def normalise(
    image: Float32[np.ndarray, " c *spatial"],
    how: Normalise,
    *,
    axis: int | None = None,
    window: tuple[float, float] | None = None,
    joint: bool = False,
) -> Float32[np.ndarray, " c *spatial"]:
    """Bring intensities to a common range; a constant image becomes 0.

    Args:
        image: Intensities as stored.
        how: The rule, see `SegmentationData.normalise`.
        axis: The spatial axis of slices, for the rules that treat each slice alone.
        window: The range that intensities are clipped to first.
        joint: Whether the channels share one range (colours), or have one each (modalities).
    """
    if window is not None:
        image = np.clip(image, *window)
    keep = set() if joint else {0}
    if how.startswith("slice-") and axis is not None:
        keep.add(axis + 1)
    over = tuple(i for i in range(image.ndim) if i not in keep)
    rule = how.removeprefix("slice-")
    if rule == "zscore":
        shift = image.mean(over, keepdims=True, dtype=np.float64)
        scale = image.std(over, keepdims=True, dtype=np.float64)
    else:
        shift, high = image.min(over, keepdims=True), image.max(over, keepdims=True)
        if rule == "percentile":
            inner = np.percentile(image, (0.5, 99.5), axis=over, keepdims=True)
            some = inner[1] > inner[0]  # else nearly all values are equal: keep the full range
            shift, high = np.where(some, inner[0], shift), np.where(some, inner[1], high)
        scale = high.astype(np.float64) - shift
    scaled = (image - shift) / np.where(scale > 0, scale, 1.0)
    if rule != "zscore":
        scaled = np.clip(scaled, 0.0, 1.0)
    return np.ascontiguousarray(scaled, dtype=np.float32)
