"""One subject's data: images, responses by hemisphere, regions, noise ceilings. Two layouts.

Algonauts 2023 (the Natural Scenes Dataset), and a neutral one for any recording; `read_subject`
tells them apart. Responses stay on disk (memory-mapped); `rows` reads some.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from heed_core.errors import InputError
from heed_neuro.brain_encoder.arrays import read_array, read_mapping, refuse_gaps
from heed_neuro.brain_encoder.regions import FAMILIES, STREAMS, Regions, whole, with_rest
from heed_neuro.noise_ceiling import noise_ceiling, signal_to_noise

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SURFACE = 163842
"""Vertices of a hemisphere of fsaverage."""

LAYOUT = """\
Algonauts 2023, a folder per subject
  training_split/training_images/*.png             in the order of the rows
  training_split/training_fmri/{lh,rh}_training_fmri.npy        (images, vertices)
  test_split/test_images/*.png
  test_split/test_fmri/{lh,rh}_test_fmri.npy       where you have them
  noise_ceiling/{lh,rh}_noise_ceiling.npy          (vertices,), where you have them
  roi_masks/mapping_FAMILY.npy, {lh,rh}.FAMILY_challenge_space.npy,
            {lh,rh}.all-vertices_fsaverage_space.npy
neutral, any recording
  images/*                      in the order of the rows of
  responses.npy                 (images, vertices), or responses_GROUP.npy, one file per group
  test_images/*                 responses_test_repeats.npy (images, repeats, vertices),
                                or responses_test.npy (images, vertices); likewise _GROUP
  noise_ceiling.npy             (vertices,), where there are no repeats; likewise _GROUP
  rois.json                     {region: [vertex, ...]}, or {group: {region: [vertex, ...]}}"""

Split = Literal["train", "test"]
_SURFACE = {"vertices": SURFACE}


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What one group of vertices answered to the images of one split."""

    path: Path
    values: np.ndarray
    """(images, vertices) or (images, repeats, vertices), memory-mapped."""

    @property
    def vertices(self) -> int:
        """How many there are."""
        return int(self.values.shape[-1])

    def rows(self, index: Sequence[int] | np.ndarray | slice) -> Float[np.ndarray, "n v"]:
        """The responses to some images, averaged over repeats."""
        found = np.asarray(self.values[index], dtype=np.float32)
        return found.mean(axis=1) if found.ndim == 3 else found


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One subject's data."""

    root: Path
    groups: tuple[str, ...]
    """Hemispheres, or "all"."""
    images: Mapping[str, tuple[Path, ...]]
    """Of each split, in the order of the responses' rows."""
    responses: Mapping[str, Mapping[str, Responses]]
    """Split -> group -> responses; a split without any is absent."""
    regions: Mapping[str, Regions]
    """Group -> regions."""
    streams: Mapping[str, Regions] = field(default_factory=dict)
    """Group -> streams, where the layout has them."""
    ceilings: Mapping[str, Float[np.ndarray, " v"]] = field(default_factory=dict)
    """Group -> noise ceiling of the test responses."""

    def vertices(self, group: str) -> int:
        """Vertices of a group."""
        return self.regions[group].vertices


def read_subject(root: Path) -> Subject:
    """Open a subject's folder.

    Raises:
        InputError: Neither layout, or files that do not fit each other.
    """
    if not root.is_dir():
        raise InputError("no such folder", path=root, remedy="check the path")
    if (root / "training_split").is_dir():
        return _algonauts(root)
    if list(root.glob("responses*.npy")):
        return _neutral(root)
    raise InputError(
        "holds neither training_split/ (Algonauts) nor responses.npy (neutral)",
        path=root,
        remedy="give the folder of one subject; info shows the layouts",
    )


def find_images(folder: Path) -> tuple[Path, ...]:
    """The images of a folder by name; the order of the rows."""
    if not folder.is_dir():
        raise InputError("no such folder", path=folder, remedy="see the layout in info")
    found = tuple(sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES))
    if not found:
        raise InputError("holds no image", path=folder, remedy="put the images there")
    return found


def check_gaps(subject: Subject) -> None:
    """Raise an InputError at the first response that is not finite."""
    for responses in subject.responses.values():
        for own in responses.values():
            refuse_gaps(own.path, own.values)


def _open(path: Path, images: int, vertices: int | None, *, repeats: bool = False) -> Responses:
    axes = ("images", "repeats", "vertices") if repeats else ("images", "vertices")
    lengths = {"images": images} | ({} if vertices is None else {"vertices": vertices})
    return Responses(path=path, values=read_array(path, axes=axes, lengths=lengths))


def _algonauts(root: Path) -> Subject:
    images = {"train": find_images(root / "training_split" / "training_images")}
    test = root / "test_split" / "test_images"
    if test.is_dir():
        images["test"] = find_images(test)
    groups = ("lh", "rh")
    folder = root / "training_split" / "training_fmri"
    train = {
        g: _open(folder / f"{g}_training_fmri.npy", len(images["train"]), None) for g in groups
    }
    responses: dict[str, dict[str, Responses]] = {"train": train}
    measured = root / "test_split" / "test_fmri"
    if measured.is_dir():
        _need_images(measured, test, images)
        responses["test"] = {
            g: _open(measured / f"{g}_test_fmri.npy", len(images["test"]), train[g].vertices)
            for g in groups
        }
    ceilings = {}
    for g in groups:
        path = root / "noise_ceiling" / f"{g}_noise_ceiling.npy"
        if path.is_file():
            ceilings[g] = read_ceiling(path, train[g].vertices)
    masks = root / "roi_masks"
    return Subject(
        root=root,
        groups=groups,
        images=images,
        responses=responses,
        regions={g: algonauts_regions(masks, g, train[g].vertices) for g in groups},
        streams={
            g: algonauts_regions(masks, g, train[g].vertices, {"streams": STREAMS})
            for g in groups
            if (masks / "mapping_streams.npy").is_file()
        },
        ceilings=ceilings,
    )


def algonauts_regions(
    folder: Path,
    hemisphere: str,
    vertices: int,
    families: Mapping[str, Sequence[str]] = FAMILIES,
) -> Regions:
    """The regions of some families in their order, and the rest.

    Ids are looked up in each family's own mapping; a region that the subject lacks is empty.

    Raises:
        InputError: A file is missing, or of another number of vertices.
    """
    named: dict[str, np.ndarray] = {}
    for family, names in families.items():
        ids = {name: key for key, name in read_mapping(folder / f"mapping_{family}.npy").items()}
        path = folder / f"{hemisphere}.{family}_challenge_space.npy"
        values = read_array(path, axes=("vertices",), lengths={"vertices": vertices})
        for name in names:
            absent = np.zeros(vertices, dtype=bool)
            named[name] = np.asarray(values) == ids[name] if name in ids else absent
    return with_rest(named, vertices)


def surface_vertices(root: Path, hemisphere: str, vertices: int) -> np.ndarray | None:
    """Where the vertices of the challenge lie among the 163842 of fsaverage, if the file is there.

    Raises:
        InputError: The file names another number of vertices.
    """
    path = root / "roi_masks" / f"{hemisphere}.all-vertices_fsaverage_space.npy"
    if not path.is_file():
        return None
    mask = np.asarray(read_array(path, axes=("vertices",), kinds="fiub", lengths=_SURFACE)) > 0
    if int(mask.sum()) != vertices:
        raise InputError(
            f"marks {int(mask.sum())} vertices where there are {vertices}",
            path=path,
            remedy="use files of one subject",
        )
    return np.flatnonzero(mask)


def read_ceiling(path: Path, vertices: int) -> Float[np.ndarray, " v"]:
    """Read a noise ceiling, shares in [0, 1] (or per cent, as some releases have them)."""
    found = read_array(path, axes=("vertices",), lengths={"vertices": vertices})
    values = np.nan_to_num(np.asarray(found, dtype=np.float64))
    if values.max(initial=0.0) > 1.0:
        values = values / 100.0
    if values.min(initial=0.0) < 0 or values.max(initial=0.0) > 1:
        raise InputError(
            "holds values outside 0 to 1 (or 0 to 100 per cent)", path=path, remedy="check the file"
        )
    return values


def _neutral(root: Path) -> Subject:
    names = sorted(p.stem for p in root.glob("responses*.npy") if "_test" not in p.stem)
    if "responses" in names and len(names) > 1:
        raise InputError(
            f"holds responses.npy and {names[-1]}.npy", path=root, remedy="keep one or the others"
        )
    if not names:
        raise InputError("has no responses.npy", path=root, remedy="see the layout in info")
    groups = tuple(name.removeprefix("responses_") for name in names)
    groups = ("all",) if groups == ("responses",) else groups
    suffix = {g: "" if groups == ("all",) and names == ["responses"] else f"_{g}" for g in groups}
    images = {"train": find_images(root / "images")}
    count = len(images["train"])
    train = {g: _open(root / f"responses{suffix[g]}.npy", count, None) for g in groups}
    responses: dict[str, dict[str, Responses]] = {"train": train}
    test = root / "test_images"
    for path in root.glob("responses_test*.npy"):
        _need_images(path, test, {"test"} if test.is_dir() else ())
    if test.is_dir():
        images["test"] = find_images(test)
        found = _neutral_test(root, suffix, len(images["test"]), train)
        if found:
            responses["test"] = found
    regions = read_rois(root / "rois.json", {g: train[g].vertices for g in groups})
    ceilings = {
        g: read_ceiling(path, train[g].vertices)
        for g in groups
        if (path := root / f"noise_ceiling{suffix[g]}.npy").is_file()
    }
    return Subject(
        root=root,
        groups=groups,
        images=images,
        responses=responses,
        regions=regions,
        ceilings=_from_repeats(responses.get("test", {})) | ceilings,
    )


def _need_images(path: Path, folder: Path, splits: Container[str]) -> None:
    if "test" not in splits:
        raise InputError(
            f"holds test responses, but there is no folder {folder.name} of their images",
            path=path,
            remedy=f"add {folder}, or move the responses elsewhere",
        )


def _neutral_test(
    root: Path, suffix: Mapping[str, str], images: int, train: Mapping[str, Responses]
) -> dict[str, Responses]:
    found = {}
    for group, end in suffix.items():
        repeats = root / f"responses_test_repeats{end}.npy"
        plain = root / f"responses_test{end}.npy"
        vertices = train[group].vertices
        if repeats.is_file():
            found[group] = _open(repeats, images, vertices, repeats=True)
        elif plain.is_file():
            found[group] = _open(plain, images, vertices)
    if found and len(found) < len(suffix):
        missing = sorted(set(suffix) - set(found))
        raise InputError(
            f"has test responses of {', '.join(found)} but not of {', '.join(missing)}",
            path=root,
            remedy="add them",
        )
    return found


def _from_repeats(responses: Mapping[str, Responses]) -> dict[str, np.ndarray]:
    """Noise ceilings of averages over all repeats."""
    found = {}
    for group, own in responses.items():
        if own.values.ndim == 3 and min(own.values.shape[:2]) > 1:
            ratio = signal_to_noise(np.asarray(own.values, dtype=np.float64)).ncsnr
            found[group] = noise_ceiling(np.nan_to_num(ratio, posinf=1e6), own.values.shape[1])
    return found


def read_rois(path: Path, vertices: Mapping[str, int]) -> dict[str, Regions]:
    """Read rois.json: regions as lists of vertex numbers; without the file one region of all.

    Raises:
        InputError: Not such a table, or a vertex that does not exist.
    """
    if not path.is_file():
        return {group: whole(count) for group, count in vertices.items()}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"is no JSON ({error})", path=path, remedy="correct it") from None
    if not isinstance(table, dict):
        raise InputError("is no table of regions", path=path, remedy="see the layout in info")
    nested = bool(table) and all(isinstance(value, dict) for value in table.values())
    found = {}
    for group, count in vertices.items():
        own = table.get(group) if nested else table
        if own is None:
            raise InputError(f"has no group {group!r}", path=path, remedy="add its regions")
        if not nested and len(vertices) > 1:
            raise InputError(
                f"has one table for the groups {', '.join(vertices)}",
                path=path,
                remedy="give each its own: {group: {region: [vertex, ...]}}",
            )
        found[group] = with_rest(
            {str(name): _mask(path, str(name), index, count) for name, index in own.items()}, count
        )
    return found


def _mask(path: Path, name: str, index: object, vertices: int) -> np.ndarray:
    whole_numbers = isinstance(index, list) and all(type(i) is int for i in index)
    if name == "rest" or not whole_numbers:
        problem = "is made by the program" if name == "rest" else "must be a list of whole numbers"
        raise InputError(problem, path=path, place=f"region {name!r}", remedy="correct it")
    assert isinstance(index, list)
    if outside := [i for i in index if not 0 <= i < vertices]:
        raise InputError(
            f"names vertex {outside[0]}, but the responses have {vertices} (0 to {vertices - 1})",
            path=path,
            place=f"region {name!r}",
            remedy="use the regions of this subject",
        )
    mask = np.zeros(vertices, dtype=bool)
    mask[index] = True
    return mask
