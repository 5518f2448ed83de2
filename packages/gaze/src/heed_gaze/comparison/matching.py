"""Which scanpaths are compared: predictions and viewers of the same picture and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np

from heed_core.errors import InputError
from heed_gaze.scanpaths import Scanpath, ScanpathSet, Size

Key = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The scanpaths of one picture and task, all in pixels of the same size."""

    image: str
    task: str
    size_px: Size
    human: tuple[Scanpath, ...]
    predicted: tuple[Scanpath, ...] = ()

    @property
    def name(self) -> str:
        """Picture and task."""
        return f"{self.image} ({self.task})" if self.task else self.image


def match(
    human: ScanpathSet, predicted: ScanpathSet | None = None, *, split: str = ""
) -> list[Case]:
    """The pictures and tasks that viewers looked at, with what was predicted of them.

    A prediction is of a picture if it has its name, also without folders or suffix. A prediction
    without a task is of the only task of its picture; where viewers' tasks are not told, one of any
    task is. Predictions of another size are scaled, those of another split are left out.

    Args:
        human: The viewers.
        predicted: Of any program; None: the viewers alone, all of them.
        split: Only this part of the viewers' data; empty: all.

    Raises:
        InputError: A prediction of a picture that no viewer saw, a picture without a size, nothing
            or no prediction left of the split.
    """
    groups: dict[Key, list[Scanpath]] = {}
    for path in human.scanpaths:
        if not split or path.split == split:
            groups.setdefault(path.key, []).append(path)
    if not groups:
        raise InputError(
            f"no scanpath is of the split {split!r}",
            remedy=f"there are {_splits(human)}",
        )
    if predicted is None:
        return [_case(key, paths, []) for key, paths in groups.items()]
    names = _Names(list(groups))
    seen = {PurePath(path.image).stem for path in human.scanpaths}
    found: dict[Key, list[Scanpath]] = {}
    for path in predicted.scanpaths:
        if names.image_of(path) is not None or PurePath(path.image).stem not in seen:
            found.setdefault(names.key_of(path), []).append(path)
    if not found:
        raise InputError(
            f"no prediction is of a picture of the split {split!r}",
            remedy="predict its pictures, or leave the split away",
        )
    return [_case(key, paths, found[key]) for key, paths in groups.items() if key in found]


def _splits(human: ScanpathSet) -> str:
    return ", ".join(sorted({path.split or "none" for path in human.scanpaths}))


class _Names:
    """Finds the picture and task of a prediction."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = set(keys)
        self._tasks: dict[str, list[str]] = {}
        for image, task in keys:
            self._tasks.setdefault(image, []).append(task)
        self._short: dict[str, set[str]] = {}
        for image in self._tasks:
            for short in (PurePath(image).name, PurePath(image).stem):
                self._short.setdefault(short, set()).add(image)

    def image_of(self, path: Scanpath) -> str | None:
        """The picture that is meant; None: no viewer saw it."""
        if path.image in self._tasks:
            return path.image
        name = PurePath(path.image)
        found = self._short.get(name.name) or self._short.get(name.stem, set())
        if len(found) > 1:
            raise InputError(
                "fits several pictures", path=path.image, remedy="name its folder and suffix too"
            )
        return next(iter(found), None)

    def key_of(self, path: Scanpath) -> Key:
        image = self.image_of(path)
        if image is None:
            raise InputError(
                "no viewer saw the picture",
                path=path.image,
                remedy="predict the pictures of the data set",
            )
        tasks = self._tasks[image]
        if (image, path.task) in self._keys:
            return image, path.task
        if len(tasks) == 1 and not (path.task and tasks[0]):
            return image, tasks[0]
        raise InputError(
            f"no viewer had the task {path.task!r}" if path.task else "is seen with several tasks",
            path=path.image,
            remedy=f"its tasks are: {', '.join(task or 'none' for task in sorted(tasks))}",
        )


def _case(key: Key, human: list[Scanpath], predicted: list[Scanpath]) -> Case:
    image, task = key
    sizes = {path.size_px for path in human}
    size = next(iter(sizes))
    if size is None or len(sizes) > 1:
        raise InputError(
            "the size of the picture is not known" if size is None else "has several sizes",
            path=image,
            remedy="keep the pictures beside the data, or give its width and height",
        )
    return Case(
        image=image,
        task=task,
        size_px=size,
        human=tuple(human),
        predicted=tuple(_fit(path, image, task, size, human[0]) for path in predicted),
    )


def _fit(path: Scanpath, image: str, task: str, size: Size, viewer: Scanpath) -> Scanpath:
    fitted = path if path.size_px in (None, size) else path.resized(size)
    return replace(fitted, image=image, task=task, size_px=size, target_box=viewer.target_box)


def random_path(path: Scanpath, rng: np.random.Generator) -> Scanpath:
    """As many fixations as another scanpath, as long, anywhere on the picture."""
    assert path.size_px is not None
    places = rng.uniform(0.0, np.array(path.size_px, dtype=np.float64), size=(len(path), 2))
    return replace(path, subject="random", xy_px=places)


def moved_path(path: Scanpath, case: Case) -> Scanpath:
    """What a viewer did in another picture, as if in this one."""
    return replace(
        path.resized(case.size_px),
        image=case.image,
        task=case.task,
        target_box=case.human[0].target_box,
    )
