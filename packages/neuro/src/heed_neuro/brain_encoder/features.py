"""Features of images: computed once by a frozen network, kept on disk, read by memory-mapping.

A cache is a folder per list of images with

```
features.npy     (images, rows, columns, channels), float16
manifest.json    the network, a hash of each image, how many are done
```

It is written in order, batch by batch, so that a call that was stopped goes on where it was. It is
refused where its network (name, layer, hash of the weights) or its images (hashes of the files)
are other ones than asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from heed_core.arrays import load_array
from heed_core.errors import InputError, reason_of
from heed_neuro.brain_encoder.backbones import Backbone

MANIFEST, TABLE = "manifest.json", "features.npy"
MOST_IN_MEMORY = 2 * 1024**3
"""Bytes of features that are kept without a cache."""

Progress = Callable[[int], None]
"""Called with how many more images are done."""


def compute(
    backbone: Backbone,
    images: Sequence[Path],
    *,
    device: str = "cpu",
    batch: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Features of images in memory, float32 (images, rows, columns, channels).

    Raises:
        InputError: An image cannot be read, is of another size, or there are too many.
    """
    found: list[np.ndarray] = []
    for part in _batches(backbone, images, device, batch, start=0):
        found.append(part)
        if part.nbytes / len(part) * len(images) > MOST_IN_MEMORY:
            raise InputError(
                f"the features of {len(images)} images need "
                f"{part.nbytes / len(part) * len(images) / 1e9:.0f} GB",
                remedy="write them to disk: add --data.cache FOLDER",
            )
        if progress is not None:
            progress(len(part))
    return np.concatenate(found)


def cached(
    folder: Path,
    backbone: Backbone,
    images: Sequence[Path],
    *,
    device: str = "cpu",
    batch: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Features from a cache; what it lacks is computed and added.

    Returns:
        The memory-mapped table.

    Raises:
        InputError: The cache is of another network or of other images, or damaged; an image cannot
            be read.
    """
    wanted = {"backbone": backbone.identity, "images": [content_hash(path) for path in images]}
    found = read_manifest(folder)
    if found is not None:
        _refuse_others(folder, found, wanted)
    done = int(found["done"]) if found is not None else 0
    if progress is not None and done:
        progress(done)
    if done < len(images):
        _extend(folder, backbone, images, wanted, done, (device, batch), progress)
    return open_table(folder)


def open_table(folder: Path) -> np.ndarray:
    """The features of a finished cache, memory-mapped.

    Raises:
        InputError: There is none, it is unfinished or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError("holds no features", path=folder, remedy="run features")
    total = len(manifest["images"])
    if manifest["done"] < total:
        raise InputError(
            f"holds features of {manifest['done']} of {total} images",
            path=folder,
            remedy="run features again, with the weights: it goes on",
        )
    return _load_table(folder / TABLE, total, "r")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is no cache.

    Raises:
        InputError: It is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if {"backbone", "images", "done"} <= set(found) and _counts(found):
            return dict(found)
    except (ValueError, TypeError):
        pass
    raise InputError("is no manifest of features", path=path, remedy="delete the folder")


def _counts(manifest: dict[str, Any]) -> bool:
    images, done = manifest["images"], manifest["done"]
    return isinstance(images, list) and type(done) is int and 0 <= done <= len(images)


def _load_table(path: Path, images: int, mode: Literal["r", "r+"]) -> np.ndarray:
    try:
        table = load_array(path, mapped=True)
        if mode == "r+":  # checked above: numpy would fill a file that is too short with zeros
            table = np.lib.format.open_memmap(path, mode="r+")
    except (InputError, OSError) as error:
        problem = error.problem if isinstance(error, InputError) else reason_of(error, path)
        raise InputError(problem, path=path, remedy="delete the folder") from None
    if table.ndim != 4 or len(table) != images:
        raise InputError(
            f"has the shape {table.shape} for {images} images",
            path=path,
            remedy="delete the folder",
        )
    return table


def content_hash(path: Path) -> str:
    """Of a file's bytes."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        reason = (error.strerror or "cannot be read").lower()
        raise InputError(reason, path=path, remedy="check the file") from None


def describe(identity: dict[str, Any]) -> str:
    """A backbone in words."""
    weights = f", weights {identity['weights']}" if "weights" in identity else ""
    patch = f", patch {identity['patch']}" if "patch" in identity else ""
    return f"{identity.get('name')} (layer -{identity.get('layer')}{weights}{patch})"


def _refuse_others(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found["backbone"] != wanted["backbone"]:
        raise InputError(
            f"holds features of {describe(found['backbone'])}, not of "
            f"{describe(wanted['backbone'])}",
            path=folder,
            remedy="choose another cache, or the backbone that made it",
        )
    if found["images"] != wanted["images"]:
        raise InputError(
            f"holds features of {len(found['images'])} other images",
            path=folder,
            remedy="choose another cache",
        )


def _extend(
    folder: Path,
    backbone: Backbone,
    images: Sequence[Path],
    manifest: dict[str, Any],
    done: int,
    how: tuple[str, int],
    progress: Progress | None,
) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or "cannot be written").lower()
        raise InputError(reason, path=folder, remedy="choose another cache") from None
    table = _load_table(folder / TABLE, len(images), "r+") if done else None
    for part in _batches(backbone, images, *how, start=done):
        if table is None:
            table = np.lib.format.open_memmap(
                folder / TABLE, mode="w+", dtype=np.float16, shape=(len(images), *part.shape[1:])
            )
        if part.shape[1:] != table.shape[1:]:
            raise InputError(
                f"is of another size than {images[0].name}",
                path=images[done],
                remedy="bring all images to one size",
            )
        table[done : done + len(part)] = part
        cast("np.memmap[Any, Any]", table).flush()
        done += len(part)
        _write(folder / MANIFEST, {**manifest, "done": done})
        if progress is not None:
            progress(len(part))


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _batches(
    backbone: Backbone, images: Sequence[Path], device: str, batch: int, *, start: int
) -> Iterator[np.ndarray]:
    backbone = backbone.to(device)
    shape: torch.Size | None = None
    for first in range(start, len(images), batch):
        prepared = []
        for path in images[first : first + batch]:
            pixels = backbone.prepare(path)
            shape = pixels.shape if shape is None else shape
            if pixels.shape != shape:
                raise InputError(
                    f"is of another size than {images[start].name}",
                    path=path,
                    remedy="bring all images to one size",
                )
            prepared.append(pixels)
        yield backbone(torch.stack(prepared).to(device)).float().cpu().numpy()
