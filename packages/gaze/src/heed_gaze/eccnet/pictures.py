"""Pictures to classify: what the variants of eccNET are trained on (Gupta et al., section 3.5).

    DATA/train/CLASS/*.png, DATA/val/CLASS/*.png [, DATA/test/CLASS/*.png]   as ImageNet, Places
    DATA/images/train/CLASS/*.png ...                                       the same, beside scenes
    DATA/*-images-idx3-ubyte[.gz], DATA/*-labels-idx1-ubyte[.gz]             as MNIST

A variant sees every picture turned, through a fisheye lens or behind a grid.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.eccnet.experiments import EXPERIMENTS, item_picture
from heed_gaze.eccnet.layouts import SUFFIXES, resized
from heed_gaze.readers.pictures import read_picture

Variant = Literal["none", "rot90", "fisheye", "grid"]
SPLITS = ("train", "val", "test")
ENLARGED = 256 / 224
"""Shortest side of a picture before it is cut, over the side of the cut."""
GRID_FIRST, GRID_STEP, GRID_WIDTH = 45, 50, 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture with its class."""

    name: str
    pixels: UInt8[np.ndarray, "s s 3"]
    label: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one picture lies: a file, or one of an idx file."""

    name: str
    path: Path
    label: int
    index: int | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The pictures of a split, and the names of the classes."""

    places: tuple[Place, ...]
    classes: tuple[str, ...]


def picture_root(root: Path) -> Path | None:
    """The folder with `train`, or with idx files, at or below a data set's folder; None: none."""
    for folder in (root, root / "images"):
        if (folder / "train").is_dir() or any(_idx_files(folder)):
            return folder
    return None


def list_pictures(root: Path, split: str) -> Listing:
    """The pictures of a split; without `test`, or without `val`, the one stands for the other.

    Raises:
        InputError: There are none, or val has a class that train has not.
    """
    folder = picture_root(root)
    if folder is None:
        raise InputError(
            "holds no pictures to classify: neither train/CLASS/ nor idx files",
            path=root,
            remedy="see the layout in info",
        )
    if not (folder / "train").is_dir():
        return _list_idx(folder, split)
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))
    other = {"val": "test", "test": "val"}.get(split, split)
    found = next((n for n in (split, other) if (folder / n).is_dir()), None)
    if found is None:
        raise InputError(f"has no folder {split}", path=folder, remedy="add it")
    strange = [p.name for p in (folder / found).iterdir() if p.is_dir() and p.name not in classes]
    if strange:
        raise InputError(
            f"is a class that train has not ({', '.join(classes[:8])})",
            path=folder / found / sorted(strange)[0],
            remedy="rename or remove the folder",
        )
    places = tuple(
        Place(name=f"{found}/{name}/{path.stem}", path=path, label=label)
        for label, name in enumerate(classes)
        for path in sorted((folder / found / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    )
    if len(classes) < 2 or not places:
        raise InputError(
            f"holds {len(places)} pictures of {len(classes)} classes, needed are 2 classes or more",
            path=folder / found,
            remedy="see the layout in info",
        )
    return Listing(places=places, classes=classes)


def _idx_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-images-idx3-ubyte*")) if folder.is_dir() else []


def _list_idx(folder: Path, split: str) -> Listing:
    """Of a `train` file the last tenth is val; of a test file alone 8, 1 and 1 tenths in order."""
    files = {("train" if p.name.startswith("train") else "test"): p for p in _idx_files(folder)}
    spans = {"train": (0.0, 0.9), "val": (0.9, 1.0), "test": (0.0, 1.0)}
    part = "test" if split == "test" else "train"
    if len(files) == 1:
        part = next(iter(files))
        spans = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
    if split not in spans or part not in files:
        raise InputError(f"has no pictures of the split {split!r}", path=folder)
    path = files[part]
    label_name = path.name.replace("images-idx3", "labels-idx1")
    labels = read_idx(path.with_name(label_name))
    count = len(read_idx(path))
    if labels.ndim != 1 or len(labels) != count:
        raise InputError(
            f"has {len(labels)} labels for {count} pictures", path=path.with_name(label_name)
        )
    low, high = (round(share * count) for share in spans[split])
    places = tuple(
        Place(name=f"{split}/{k:05d}", path=path, label=int(labels[k]), index=k)
        for k in range(low, high)
    )
    classes = tuple(str(k) for k in range(int(labels.max()) + 1))
    return Listing(places=places, classes=classes)


@lru_cache(maxsize=8)
def read_idx(path: Path) -> UInt8[np.ndarray, ...]:
    """The array of an idx file of bytes, compressed or not.

    Raises:
        InputError: Not such a file, or cut short.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise InputError("no such file", path=path, remedy="add it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot be unpacked ({error})", path=path, remedy="copy it again"
        ) from None
    if len(data) < 8 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise InputError("is no idx file of bytes", path=path)
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if len(values) != np.prod(shape):
        raise InputError(
            f"holds {len(values)} bytes, not {'x'.join(map(str, shape))}",
            path=path,
            remedy="copy it again",
        )
    return values.reshape(shape)


def read_place(place: Place) -> UInt8[np.ndarray, "h w 3"]:
    """One picture as RGB."""
    if place.index is None:
        return read_picture(place.path)
    return np.repeat(read_idx(place.path)[place.index][..., None], 3, axis=2)


def squared(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The middle square of a picture, brought to a side."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return resized(pixels[top : top + short, left : left + short], (side, side))


def warped(pixels: UInt8[np.ndarray, "s s 3"], variant: Variant) -> UInt8[np.ndarray, "s s 3"]:
    """A square picture as a variant sees it."""
    if variant == "rot90":
        return np.ascontiguousarray(np.rot90(pixels))
    if variant == "fisheye":
        return _fisheye(pixels)
    if variant == "grid":
        return _behind_grid(pixels)
    return pixels


def _fisheye(pixels: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The middle enlarged, the margin pressed together: radius r shows what was at r^1.6."""
    side = len(pixels)
    place = (np.arange(side) - (side - 1) / 2) / (side / 2)
    x, y = np.meshgrid(place, place)
    scale = np.minimum(np.hypot(x, y), 1.0) ** 0.6
    across, down = ((v * scale * side / 2 + (side - 1) / 2).astype(np.float32) for v in (x, y))
    return cv2.remap(
        np.ascontiguousarray(pixels),
        across,
        down,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _behind_grid(pixels: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """Black lines of 5 pixels every 50, both ways, as on a picture of 224 pixels."""
    scale = len(pixels) / 224
    place = np.arange(len(pixels)) / scale
    line = (place >= GRID_FIRST) & ((place - GRID_FIRST) % GRID_STEP < GRID_WIDTH)
    seen = pixels.copy()
    seen[line] = 0
    seen[:, line] = 0
    return seen


@dataclass(frozen=True)
class Pictures:
    """Pictures to classify, each read when it is asked for."""

    places: Sequence[Place]
    side: int
    variant: Variant = "none"
    for_training: bool = False
    """Larger than `side`, to be cut at random."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Picture:
        place = self.places[index]
        larger = squared(read_place(place), round(self.side * ENLARGED))
        pixels = warped(larger, self.variant)
        if not self.for_training:
            start = (len(pixels) - self.side) // 2
            pixels = pixels[start : start + self.side, start : start + self.side]
        return Picture(name=place.name, pixels=pixels, label=place.label)


def cut_and_flip(side: int, *, flip: bool) -> Callable[[Picture, np.random.Generator], Picture]:
    """A random cut of a training picture; half of the pictures are mirrored."""

    def augment(picture: Picture, rng: np.random.Generator) -> Picture:
        room = len(picture.pixels) - side
        top, left = rng.integers(0, room + 1, size=2)
        pixels = picture.pixels[top : top + side, left : left + side]
        if flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return Picture(name=picture.name, pixels=np.ascontiguousarray(pixels), label=picture.label)

    return augment


def write_sample_pictures(root: Path, *, seed: int) -> None:
    """Write pictures of the experiments' items as classes: 6 kinds, 24 + 6 of each."""
    kinds = {
        "curve": (0, "curve"), "line": (0, "line"), "cross": (2, "cross"),
        "t": (3, "t"), "l": (3, "l"), "disc": (1, "ramp"),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    for name, (number, kind) in kinds.items():
        for split, count in (("train", 24), ("val", 6)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                angle = int(rng.integers(0, 360))
                item = item_picture(EXPERIMENTS[number], f"{kind}:{angle}")
                picture = _on_canvas(item, EXPERIMENTS[number].background, rng)
                Image.fromarray(picture).save(folder / f"{index:02d}.png")


def _on_canvas(
    item: UInt8[np.ndarray, "k k"], background: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "s s"]:
    side = 48
    size = int(rng.integers(30, 44))
    small = np.asarray(Image.fromarray(item).resize((size, size), Image.Resampling.BILINEAR))
    canvas = np.full((side, side), background, dtype=np.uint8)
    top, left = rng.integers(0, side - size + 1, size=2)
    canvas[top : top + size, left : left + size] = small
    return canvas if rng.random() < 0.5 else np.uint8(255) - canvas
