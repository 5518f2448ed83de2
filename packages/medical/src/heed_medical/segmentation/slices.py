"""Training slices, and whole cases, as torch data sets."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor
from torch.utils.data import Dataset

from heed_core.errors import InputError
from heed_medical.segmentation.cases import CaseFiles, SegmentationCase, read_case
from heed_medical.segmentation.labels import IGNORE_INDEX
from heed_medical.segmentation.settings import SegmentationData


class SliceSample(TypedDict):
    """One training sample."""

    image: Float32[Tensor, "c h w"]
    label: Int64[Tensor, "h w"]
    """Class numbers; -100 where pixels count for nothing (padding, ignored values)."""


class SliceData(Dataset[SliceSample]):
    """Training slices of the size `settings.size` out of many cases, not augmented.

    Every case is read once at construction, so that a broken file stops a training before it
    starts. Slices larger than the size are cut into overlapping windows; smaller ones are padded
    by reflection, with labels that count for nothing. Decoded cases are kept up to
    `settings.cache_mb` per process and read again beyond.

    Args:
        files: The cases, all with masks.
        settings: As settled by `plan_data`.
        skipped: What the list left out, a line each.

    Raises:
        InputError: A case that cannot be read (with `on_error="stop"`), or none that can.
    """

    skipped: tuple[str, ...]
    """What was left out, a line each (with `on_error="skip"`)."""

    def __init__(
        self, files: Sequence[CaseFiles], settings: SegmentationData, *, skipped: Sequence[str] = ()
    ) -> None:
        if settings.size is None:
            raise ValueError("size is not settled yet: call plan_data first")
        self._settings = settings
        self._size = settings.size
        self._cache = _CaseCache(limit_bytes=settings.cache_mb * 2**20)
        self._files: list[CaseFiles] = []
        self._index: list[tuple[int, int, int, int]] = []  # case, slice, top, left
        lost = list(skipped)
        rng = np.random.default_rng(settings.split_seed)
        for case_files in files:
            try:
                case = read_case(case_files, settings)
            except InputError as error:
                if settings.on_error == "stop":
                    raise
                lost.append(str(error))
                continue
            self._add(case_files, case, rng)
        self.skipped = tuple(lost)
        if not self._index:
            raise InputError(
                f"no training slice is left of {len(files)} cases ({len(lost)} skipped)"
                + (f"; the first: {lost[0]}" if lost else "")
            )

    def _add(self, files: CaseFiles, case: SegmentationCase, rng: np.random.Generator) -> None:
        labels = case.label_slices
        if labels is None:
            raise InputError("has no mask to train on", path=files.images[0])
        number = len(self._files)
        self._files.append(files)
        self._cache.put(number, case)
        height, width = labels.shape[1:]
        tops = window_starts(height, self._size[0], self._settings.overlap)
        lefts = window_starts(width, self._size[1], self._settings.overlap)
        chances = rng.random(len(labels))
        for position, plane in enumerate(labels):
            empty = not (plane > 0).any()
            if empty and chances[position] >= self._settings.background_slices:
                continue
            self._index += [(number, position, top, left) for top in tops for left in lefts]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> SliceSample:
        number, position, top, left = self._index[index]
        case = self._cache.get(number)
        if case is None:
            case = read_case(self._files[number], self._settings)
            self._cache.put(number, case)
        labels = case.label_slices
        assert labels is not None
        rows, columns = slice(top, top + self._size[0]), slice(left, left + self._size[1])
        image = case.slices[position][:, rows, columns]
        label = labels[position][rows, columns]
        return {
            "image": torch.from_numpy(pad_to(image, self._size)),
            "label": torch.from_numpy(pad_to(label, self._size, fill=IGNORE_INDEX)).long(),
        }

    def source(self, index: int) -> tuple[str, int]:
        """The case's name and the number of the slice that a sample was cut from."""
        number, position, _, _ = self._index[index]
        return self._files[number].name, position


class CaseData(Dataset[SegmentationCase]):
    """Whole cases, read when asked for.

    Args:
        files: The cases.
        settings: As settled by `plan_data`.
        label: Whether masks are read where there are some.
        skipped: What the list left out, a line each.

    Raises:
        InputError: On access, a case that cannot be read.
    """

    def __init__(
        self,
        files: Sequence[CaseFiles],
        settings: SegmentationData,
        *,
        label: bool = True,
        skipped: Sequence[str] = (),
    ) -> None:
        self.files, self.skipped = tuple(files), tuple(skipped)
        self._settings = settings
        self._label = label

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> SegmentationCase:
        return read_case(self.files[index], self._settings, label=self._label)


class _CaseCache:
    """The cases used last, up to a number of bytes; not carried into other processes."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[int, SegmentationCase] = OrderedDict()
        self._bytes = 0

    def get(self, key: int) -> SegmentationCase | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: int, case: SegmentationCase) -> None:
        if _case_bytes(case) > self._limit:
            return
        self._held[key] = case
        self._bytes += _case_bytes(case)
        while self._bytes > self._limit:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= _case_bytes(oldest)

    def __getstate__(self) -> dict[str, object]:
        return {"_limit": self._limit, "_held": OrderedDict(), "_bytes": 0}


def _case_bytes(case: SegmentationCase) -> int:
    return case.image.nbytes + (0 if case.label is None else case.label.nbytes)


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start that cover `length` evenly and overlap by at least a share.

    Example:
        >>> window_starts(10, 4, 0.25)
        [0, 3, 6]
    """
    if length <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = -(-(length - window) // step) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def pad_to(
    array: Shaped[np.ndarray, "*lead h w"], size: tuple[int, int], *, fill: int | None = None
) -> Shaped[np.ndarray, "*lead height width"]:
    """Pad the last two axes evenly on both sides up to `size`, by reflection or with `fill`."""
    missing = [max(0, want - have) for want, have in zip(size, array.shape[-2:], strict=True)]
    widths = [(0, 0)] * (array.ndim - 2) + [(n // 2, n - n // 2) for n in missing]
    if fill is None:
        return np.ascontiguousarray(np.pad(array, widths, mode="reflect"))
    return np.ascontiguousarray(np.pad(array, widths, constant_values=fill))
