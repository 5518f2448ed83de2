"""A small segmentation data set made by a formula, written in the real layouts.

Each volume is an abdomen of its own shape, tilt and contrast: a liver, two kidneys, bowel loops
and a spine, under an intensity drift and noise. Bowel loops look like kidneys and are background;
the kidneys are told apart by the side of the liver alone, which is mirrored in half of the
volumes. So neither an intensity nor a place nor a small neighbourhood says the class.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float64, UInt8
from nibabel import orientations
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from heed_medical.images import picture_affine
from heed_medical.segmentation.labels import CHAOS_LABELS, LabelTable, parse_labels

SampleLayout = Literal["nnunet", "msd", "nifti", "png", "chaos"]

_TABLE = LabelTable(classes=parse_labels(CHAOS_LABELS[:4]), mode="grey")
_LIVER, _NEAR_KIDNEY, _FAR_KIDNEY = 1, 2, 3
_DISK_AXES = ("RAS", "LPS", "LAS", "PLS")  # scanners and converters write all of them


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """One volume; axes run to posterior, left, superior."""

    name: str
    split: str
    image: Float64[np.ndarray, "p l s"]
    labels: UInt8[np.ndarray, "p l s"]
    spacing_mm: tuple[float, float, float]


def write_sample(
    out: Path,
    *,
    layout: SampleLayout = "nnunet",
    cases: int = 16,
    shape: tuple[int, int, int] = (56, 64, 12),
    seed: int = 0,
) -> None:
    """Write volumes with organs of varied shape into the folder `out`.

    Args:
        out: Made where it does not exist.
        layout: How the files are laid out.
        cases: Volumes, at least 4; a quarter is for the test, an eighth for validation.
        shape: Rows, columns and slices.
        seed: Equal seeds give equal files.
    """
    if cases < 4 or min(shape[:2]) < 16 or shape[2] < 1:
        raise ValueError(
            f"cases must be at least 4 and shape at least (16, 16, 1), got {cases}, {shape}"
        )
    test, val = max(1, cases // 4), max(1, cases // 8)
    splits = ["train"] * (cases - test - val) + ["val"] * val + ["test"] * test
    for number, split in enumerate(splits, start=1):
        rng = np.random.default_rng((seed, number))
        phantom = make_phantom(rng, name=str(number), split=split, shape=shape)
        _WRITERS[layout](out, phantom, rng)
    names = {
        s: [f"phantom_{n}" for n, t in enumerate(splits, 1) if t == s] for s in ("train", "val")
    }
    if layout == "nifti":
        names["test"] = [f"phantom_{n}" for n, t in enumerate(splits, 1) if t == "test"]
    if layout == "chaos":
        rows = [f"{n}_t1-in,{n},{s}" for n, s in enumerate(splits, 1)]
        (out / "cases.csv").write_text("\n".join(["case,patient,split", *rows]) + "\n")
    elif layout != "png":
        (out / "splits.json").write_text(json.dumps(names, indent=2) + "\n")
    if layout in {"nnunet", "msd"}:
        (out / "dataset.json").write_text(
            json.dumps(_dataset_json(layout, splits), indent=2) + "\n"
        )


def make_phantom(
    rng: np.random.Generator, *, name: str, split: str, shape: tuple[int, int, int]
) -> Phantom:
    """Draw one abdomen.

    Args:
        rng: Source of every choice.
        name: Of the case.
        split: Of the case.
        shape: Rows, columns and slices.
    """
    scene = _Scene(rng, shape)
    side = 1.0 if rng.random() < 0.5 else -1.0
    image = np.full(shape, 0.03)
    labels = np.zeros(shape, dtype=np.uint8)
    image[scene.blob((0.0, 0.0, 0.0), (0.9, 0.9, 4.0), rough=0.05)] = 0.28  # skin and fat
    image[scene.blob((0.0, 0.0, 0.0), (0.8, 0.8, 4.0), rough=0.05)] = 0.45
    image[scene.blob((0.55, 0.0, 0.0), (0.16, 0.14, 4.0), rough=0.1)] = 0.92  # spine

    liver = scene.blob((-0.15, -0.42 * side, 0.2), (0.42, 0.34, 1.1), rough=0.5)
    image[liver], labels[liver] = 0.58, _LIVER
    organ = 0.72 + 0.06 * rng.standard_normal()
    for _ in range(int(rng.integers(2, 5))):
        place = (rng.uniform(-0.5, 0.2), side * rng.uniform(0.05, 0.6), rng.uniform(-0.8, 0.8))
        loop = scene.blob(place, scene.kidney_size(), rough=0.3) & (labels == 0)
        image[loop] = organ + 0.02 * rng.standard_normal()
    for number, where in ((_NEAR_KIDNEY, -side), (_FAR_KIDNEY, side)):
        place = (rng.uniform(0.3, 0.48), 0.45 * where, rng.uniform(-0.3, 0.3))
        kidney = scene.blob(place, scene.kidney_size(), rough=0.3)
        image[kidney], labels[kidney] = organ, number
    spacing = (*np.repeat(rng.uniform(1.2, 1.8), 2).tolist(), float(rng.uniform(4.0, 6.0)))
    return Phantom(
        name=name, split=split, image=scene.scan(image), labels=labels, spacing_mm=spacing
    )


class _Scene:
    """A body's coordinates, -1..1 along each axis, shifted, tilted and scaled; and its scanner."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int, int]) -> None:
        self.rng, self.shape = rng, shape
        axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
        rows, columns, self.slices = np.meshgrid(*axes, indexing="ij")
        tilt = np.deg2rad(rng.uniform(-20, 20))
        rows, columns = rows - rng.uniform(-0.08, 0.08), columns - rng.uniform(-0.08, 0.08)
        zoom = rng.uniform(0.85, 1.0, size=2)
        self.rows = (np.cos(tilt) * rows - np.sin(tilt) * columns) / zoom[0]
        self.columns = (np.sin(tilt) * rows + np.cos(tilt) * columns) / zoom[1]

    def kidney_size(self) -> tuple[float, float, float]:
        first, second = self.rng.uniform(0.13, 0.24, size=2)
        return (float(first), float(second), float(self.rng.uniform(0.7, 1.1)))

    def blob(
        self, centre: tuple[float, float, float], size: tuple[float, float, float], *, rough: float
    ) -> np.ndarray:
        """Where an ellipsoid with a wavy surface is."""
        axes = (self.rows, self.columns, self.slices)
        distance = sum(((a - c) / s) ** 2 for a, c, s in zip(axes, centre, size, strict=True))
        return np.asarray(distance + rough * self.waves(0.09) < 1.0)

    def waves(self, width: float) -> np.ndarray:
        """Smooth noise of mean 0 and deviation 1; `width` as a share of the picture's height."""
        noise = self.rng.standard_normal(self.shape)
        rows = width * self.shape[0]
        smooth = ndimage.gaussian_filter(noise, (rows, rows, rows / 4), mode="wrap")
        smooth -= smooth.mean()
        return np.asarray(smooth / max(smooth.std(), 1e-12))

    def scan(self, image: np.ndarray) -> np.ndarray:
        """Blur, drift, noise, and a scale and contrast of its own."""
        blurred = ndimage.gaussian_filter(image, (0.6, 0.6, 0.0))
        drift = np.exp(0.18 * self.waves(0.3))
        noisy = blurred * drift + 0.045 * self.rng.standard_normal(self.shape)
        contrast = np.clip(noisy, 0, None) ** self.rng.uniform(0.8, 1.25)
        return np.asarray(contrast * 10 ** self.rng.uniform(1.5, 3.5))


def _write_volume(values: np.ndarray, path: Path, phantom: Phantom, axes: str) -> None:
    """Write a volume with its axes on disk turned to `axes`."""
    image = nib.Nifti1Image(values, picture_affine(phantom.spacing_mm))
    start = orientations.axcodes2ornt(("P", "L", "S"))
    turn = orientations.ornt_transform(start, orientations.axcodes2ornt(tuple(axes)))
    turned = image.as_reoriented(turn)
    turned.header.set_xyzt_units("mm")
    turned.set_sform(turned.affine, code="scanner")
    turned.set_qform(turned.affine, code="scanner")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(turned, path)


def _write_pair(phantom: Phantom, rng: np.random.Generator, image: Path, label: Path) -> None:
    axes = _DISK_AXES[int(rng.integers(len(_DISK_AXES)))]
    _write_volume(phantom.image.astype(np.float32), image, phantom, axes)
    _write_volume(phantom.labels, label, phantom, axes)


def _nnunet(out: Path, phantom: Phantom, rng: np.random.Generator) -> None:
    part, name = ("Ts" if phantom.split == "test" else "Tr"), f"phantom_{phantom.name}"
    image = out / f"images{part}" / f"{name}_0000.nii.gz"
    _write_pair(phantom, rng, image, out / f"labels{part}" / f"{name}.nii.gz")


def _msd(out: Path, phantom: Phantom, rng: np.random.Generator) -> None:
    part, name = ("Ts" if phantom.split == "test" else "Tr"), f"phantom_{phantom.name}.nii.gz"
    _write_pair(phantom, rng, out / f"images{part}" / name, out / f"labels{part}" / name)


def _nifti(out: Path, phantom: Phantom, rng: np.random.Generator) -> None:
    name = f"phantom_{phantom.name}.nii.gz"
    _write_pair(phantom, rng, out / "images" / name, out / "labels" / name)


def _png(out: Path, phantom: Phantom, rng: np.random.Generator) -> None:
    grey = _eight_bit(phantom.image)
    values = _TABLE.decode(phantom.labels, picture=True)
    for number in range(grey.shape[2]):
        name = f"Subj_{phantom.name}slice_{number + 1}.png"
        for folder, array in (("Img", grey), ("GT", values)):
            path = out / phantom.split / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array[..., number])).save(path)


def _eight_bit(image: np.ndarray) -> np.ndarray:
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    return np.asarray(np.rint(255 * (image - low) / np.maximum(high - low, 1e-12)), dtype=np.uint8)


def _chaos(out: Path, phantom: Phantom, rng: np.random.Generator) -> None:
    """DICOM slices from superior to inferior, as scanners number them."""
    patient = out / "Train_Sets" / "MR" / phantom.name / "T1DUAL"
    values = _TABLE.decode(phantom.labels, picture=True)
    stored = np.rint(phantom.image / phantom.image.max() * 4095).astype(np.uint16)
    series = _uid(rng)
    for folder in ("DICOM_anon/InPhase", "Ground"):
        (patient / folder).mkdir(parents=True, exist_ok=True)
    count = stored.shape[2]
    for instance, number in enumerate(reversed(range(count)), start=1):
        name = f"IMG-0004-{instance:05d}"
        path = patient / "DICOM_anon" / "InPhase" / f"{name}.dcm"
        _write_dicom(path, stored[..., number], phantom, number, instance, series)
        mask = Image.fromarray(np.ascontiguousarray(values[..., number]))
        mask.save(patient / "Ground" / f"{name}.png")


def _uid(rng: np.random.Generator) -> str:
    return f"2.25.{int(rng.integers(2**62))}"


def _write_dicom(
    path: Path, plane: np.ndarray, phantom: Phantom, number: int, instance: int, series: str
) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

    row_mm, column_mm, slice_mm = phantom.spacing_mm
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"{series}.{instance}")
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = f"{series}.{instance}"
    dataset.PatientID, dataset.Modality, dataset.SeriesInstanceUID = phantom.name, "MR", series
    dataset.InstanceNumber = instance
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [0, 0, f"{number * slice_mm:.6f}"]
    dataset.PixelSpacing = [f"{row_mm:.6f}", f"{column_mm:.6f}"]
    dataset.SliceThickness = f"{slice_mm:.6f}"
    dataset.Rows, dataset.Columns = plane.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.ascontiguousarray(plane).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def _dataset_json(layout: SampleLayout, splits: list[str]) -> dict[str, object]:
    training = sum(split != "test" for split in splits)
    names = _TABLE.names
    if layout == "nnunet":
        return {
            "channel_names": {"0": "phantom"},
            "labels": {name: number for number, name in enumerate(names)},
            "numTraining": training,
            "file_ending": ".nii.gz",
        }
    return {
        "name": "phantom",
        "modality": {"0": "phantom"},
        "labels": {str(number): name for number, name in enumerate(names)},
        "numTraining": training,
        "numTest": len(splits) - training,
    }


_WRITERS: Mapping[str, Callable[[Path, Phantom, np.random.Generator], None]] = {
    "nnunet": _nnunet,
    "msd": _msd,
    "nifti": _nifti,
    "png": _png,
    "chaos": _chaos,
}
