"""Data sets that come as JSON, and how one is told from another.

| layout | the document |
| --- | --- |
| neutral JSON | `{"scanpaths": [...]}`, see `neutral` |
| COCO-Search18 | list of `{"name", "subject", "task", "X", "Y", "T" (ms), "bbox" (x, y, w, h)}` |
| STI (Amazon, VIU) | picture -> `{"fixations": {viewer: [[x, y], ...]}, "ground_truth", "size"}` |
| ViSioNS | picture -> `{"subject", "X", "Y", "T" in ms, "target_bbox" [y0, x0, y1, x1], ...}` |
| OSIE as JSON | `{"image_size", "images": {picture: {"split", "subjects": [{"x", "y", "ms"}]}}}` |
| objects | `{"layouts": [...], "trials": [{"layout", "target", "subject", "x", "y", "objects"}]}` |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from heed_core.errors import InputError
from heed_gaze.readers.neutral import read_neutral_json
from heed_gaze.readers.trials import Trials, build_trial, size_of, text_of
from heed_gaze.scanpaths import Scanpath, Size

COCO_SEARCH_SIZE: Size = (1680, 1050)
"""Screen of COCO-Search18: all pictures were padded to it."""
_MS = 1e-3

Document = Mapping[str, object] | Sequence[object]
JsonReader = Callable[[Path, object], Trials]


def load_json(path: Path) -> object:
    """The document of a JSON file.

    Raises:
        InputError: It is empty, truncated or no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise InputError("is empty", path=path, remedy="get the file again")
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"is no whole JSON file ({error})", path=path, remedy="get the file again"
        ) from None


def json_layout(document: object) -> str | None:
    """Which of `JSON_READERS` reads a document; None: it holds no scanpaths that are known."""
    if isinstance(document, list):
        return "COCO-Search18" if _any_has(document, {"X", "Y"}) else None
    if not isinstance(document, Mapping):
        return None
    if "scanpaths" in document:
        return "neutral JSON"
    if "images" in document:
        return "OSIE as JSON"
    if "trials" in document:
        return "objects"
    if _any_has(document.values(), {"fixations"}):
        return "STI"
    return "ViSioNS" if _any_has(document.values(), {"X", "Y"}) else None


def _any_has(entries: object, names: set[str]) -> bool:
    """Whether one of the first entries has the names; a single broken one hides no layout."""
    assert isinstance(entries, list) or hasattr(entries, "__iter__")
    for _, entry in zip(range(10), entries, strict=False):
        if isinstance(entry, Mapping) and names <= set(entry):
            return True
    return False


def read_coco_search(path: Path, document: object) -> Trials:
    """COCO-Search18 (Chen et al., Scientific Reports 2021): the task is the target's category."""
    assert isinstance(document, list)
    for number, entry in enumerate(document, start=1):
        place = f"trial {number}"
        yield _trial(path, place, entry, ("name", "X", "Y"), _coco_facts)


def _coco_facts(entry: Mapping[str, object]) -> dict[str, object]:
    box = entry.get("bbox")
    x, y, w, h = (float(v) for v in box) if isinstance(box, list) and box else (0.0,) * 4
    return {
        "image": text_of(entry["name"]),
        "subject": text_of(entry.get("subject")),
        "task": text_of(entry.get("task")),
        "condition": text_of(entry.get("condition")),
        "split": text_of(entry.get("split")),
        "target_box": (x, y, x + w, y + h) if w > 0 and h > 0 else None,
    }


def read_visions(path: Path, document: object) -> Trials:
    """ViSioNS (Travi et al., 2022): viewers and programs in one format, a file for each."""
    assert isinstance(document, Mapping)
    for image, entry in document.items():
        facts = partial(_visions_facts, image)
        yield _trial(path, f"image {image}", entry, ("X", "Y"), facts)


def _visions_facts(image: str, entry: Mapping[str, object]) -> dict[str, object]:
    box = entry.get("target_bbox")
    y0, x0, y1, x1 = (float(v) for v in box) if isinstance(box, list) and box else (0.0,) * 4
    return {
        "image": image,
        "subject": text_of(entry.get("subject")),
        "task": text_of(entry.get("target_object")),
        "size_px": size_of(entry.get("image_width"), entry.get("image_height")),
        "target_box": (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None,
    }


def _trial(
    path: Path,
    place: str,
    entry: object,
    needed: Sequence[str],
    facts: Callable[[Mapping[str, object]], dict[str, object]],
) -> Scanpath | InputError:
    """A trial with X and Y in pixels and, where they are known, T in milliseconds."""
    if not isinstance(entry, Mapping):
        return InputError("is no trial", path=path, place=place)
    missing = [name for name in needed if name not in entry]
    if missing:
        return InputError(f"has no {missing[0]!r}", path=path, place=place)
    try:
        known = facts(entry)
    except (TypeError, ValueError):
        return InputError("has a box or a size of other than numbers", path=path, place=place)
    times = entry.get("T")
    return build_trial(
        path, place, known, x=entry["X"], y=entry["Y"], duration=times or None, seconds=_MS
    )


def read_sti(path: Path, document: object) -> Trials:
    """Amazon.json and VIU.json of the Search Target Inference data (Stauden et al., 2018).

    One scanpath per picture and viewer; the task is the target's picture or the cue word. Where
    there are several boxes, the first counts. No durations are known.
    """
    assert isinstance(document, Mapping)
    for image, entry in document.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("fixations"), Mapping):
            yield InputError("has no fixations", path=path, place=f"image {image}")
            continue
        try:
            facts = _sti_facts(image, entry)
        except (TypeError, ValueError, KeyError, AttributeError):
            yield InputError(
                "size and ground_truth must hold numbers", path=path, place=f"image {image}"
            )
            continue
        for viewer, points in entry["fixations"].items():
            place = f"image {image}, viewer {viewer}"
            yield _points_trial(path, place, {**facts, "subject": text_of(viewer)}, points)


def _sti_facts(image: str, entry: Mapping[str, object]) -> dict[str, object]:
    boxes = entry.get("ground_truth")
    box = boxes[0] if isinstance(boxes, list) and boxes else boxes
    names = ("xmin", "ymin", "xmax", "ymax")
    target = tuple(float(box[name]) for name in names) if isinstance(box, Mapping) else None
    size = entry.get("size")
    return {
        "image": image,
        "task": text_of(entry.get("target") or entry.get("cue")),
        "size_px": size_of(size["width"], size["height"]) if isinstance(size, Mapping) else None,
        "target_box": target,
    }


def _points_trial(
    path: Path, place: str, facts: Mapping[str, object], points: object
) -> Scanpath | InputError:
    """A trial of [x, y] pairs."""
    try:
        pairs = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError):
        return InputError("must be a list of [x, y]", path=path, place=place)
    return build_trial(path, place, facts, x=pairs[:, 0], y=pairs[:, 1])


def read_osie_json(path: Path, document: object) -> Trials:
    """OSIE as JSON: pixels of `image_size`, fixation durations in milliseconds."""
    assert isinstance(document, Mapping)
    images = document["images"]
    if not isinstance(images, Mapping):
        raise InputError("images must name the pictures", path=path)
    size = document.get("image_size")
    try:
        shape = size_of(*size) if isinstance(size, list) and len(size) == 2 else None
    except ValueError as error:
        raise InputError(f"image_size: {error}", path=path) from None
    for image, entry in images.items():
        viewers = entry.get("subjects") if isinstance(entry, Mapping) else None
        if not isinstance(viewers, list):
            yield InputError("has no list of subjects", path=path, place=f"image {image}")
            continue
        for number, viewer in enumerate(viewers, start=1):
            place = f"image {image}, subject {number}"
            if not isinstance(viewer, Mapping) or not {"x", "y"} <= set(viewer):
                yield InputError("has no x and y", path=path, place=place)
                continue
            facts = {
                "image": image,
                "subject": str(number),
                "size_px": shape,
                "split": text_of(entry.get("split")),
            }
            yield build_trial(
                path,
                place,
                facts,
                x=viewer["x"],
                y=viewer["y"],
                duration=viewer.get("ms"),
                seconds=_MS,
            )


def read_object_trials(path: Path, document: object) -> Trials:
    """Scanpaths over the objects of a layout, as OAT reads them.

    A trial without x and y is placed at the centres of its objects' boxes.
    """
    assert isinstance(document, Mapping)
    layouts = dict(_named_layouts(document.get("layouts")))
    trials = document["trials"]
    if not isinstance(trials, list):
        raise InputError("trials must be a list", path=path)
    for number, trial in enumerate(trials, start=1):
        place = f"trial {number}"
        if not isinstance(trial, Mapping):
            yield InputError("is no trial", path=path, place=place)
            continue
        name = text_of(trial.get("layout"))
        layout = layouts.get(name, {})
        try:
            x, y = _positions(trial, layout)
        except (KeyError, IndexError, TypeError, ValueError):
            yield InputError("has neither x and y nor objects with boxes", path=path, place=place)
            continue
        yield build_trial(
            path,
            place,
            {
                "image": text_of(layout.get("image")) or name,
                "subject": text_of(trial.get("subject")),
                "task": text_of(trial.get("target")),
                "split": text_of(trial.get("split")),
            },
            x=x,
            y=y,
            objects=trial.get("objects"),
        )


def _named_layouts(layouts: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Layouts by name, whether they come as a mapping or as a list with names."""
    if isinstance(layouts, Mapping):
        yield from ((k, v) for k, v in layouts.items() if isinstance(v, Mapping))
    elif isinstance(layouts, list):
        for layout in layouts:
            if isinstance(layout, Mapping):
                yield text_of(layout.get("name") or layout.get("image")), layout


def _positions(trial: Mapping[str, object], layout: Mapping[str, object]) -> tuple[object, object]:
    if trial.get("x") is not None:
        return trial["x"], trial["y"]
    boxes = np.asarray(layout["boxes"], dtype=np.float64).reshape(-1, 4)
    objects = np.asarray(trial["objects"], dtype=np.int64)
    if (objects < 0).any():
        raise IndexError("objects count from 0")
    chosen = boxes[objects]
    return (chosen[:, 0] + chosen[:, 2]) / 2, (chosen[:, 1] + chosen[:, 3]) / 2


def _read_neutral(path: Path, document: object) -> Trials:
    assert isinstance(document, Mapping)
    return read_neutral_json(path, document)


JSON_READERS: Mapping[str, JsonReader] = {
    "neutral JSON": _read_neutral,
    "COCO-Search18": read_coco_search,
    "STI": read_sti,
    "ViSioNS": read_visions,
    "OSIE as JSON": read_osie_json,
    "objects": read_object_trials,
}
"""Layout -> what reads it."""
