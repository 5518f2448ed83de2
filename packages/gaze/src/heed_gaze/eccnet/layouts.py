"""Search sets on disk: scenes, targets, truth and cells, in the official folders.

    TASK/stimuli/<i>.png    search pictures (jpg too)
    TASK/target/<i>.png     what to look for
    TASK/gt/<i>.png         white where the target is; absent: nothing is ever found
    gt_mask.npy             in or above TASK: candidate cells (m, h, w), 0 or 255; may be absent
    TASK/trials.csv         trial, set_size; absent: blocks of equal length, where the task is one
                            of the six experiments
    TASK/viewers.csv        people's scanpaths (also .json, .mat, a folder); may be absent

A task is any folder with `stimuli` and `target`. The six experiments of the paper and its three
natural sets are known by their names and searched by their own rules.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from heed_core.errors import InputError
from heed_gaze.eccnet.arrays import read_numbers
from heed_gaze.eccnet.attention import MapConfig
from heed_gaze.eccnet.experiments import (
    EXPERIMENTS,
    Display,
    Experiment,
    experiment_of,
    make_displays,
)
from heed_gaze.eccnet.search import Scene, SearchConfig
from heed_gaze.eccnet.viewers import find_viewers, viewers_of
from heed_gaze.readers.pictures import read_picture
from heed_gaze.scanpaths import Scanpath

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
SCENES, TARGETS, TRUTHS, CELLS, TRIALS = "stimuli", "target", "gt", "gt_mask.npy", "trials.csv"


@dataclass(frozen=True, kw_only=True)
class NaturalSet:
    """Search in photographs and drawings: no cells, equal weights of layers."""

    size: tuple[int, int]
    """Height and width that pictures are brought to."""
    target: int
    """Side that targets are brought to."""
    inhibition: int
    max_fixations: int
    scanmatch: tuple[float, float, float]
    """Published: of people among each other, of eccNET and of IVSN with people."""

    @property
    def rules(self) -> SearchConfig:
        """How its pictures are searched."""
        maps = MapConfig(layer_weights="equal", gaussians=((3, None), (5, 1.0)))
        return SearchConfig(
            max_fixations=self.max_fixations, inhibition=self.inhibition, background=128, maps=maps
        )


NATURAL = {
    "waldo": NaturalSet(
        size=(736, 896), target=32, inhibition=64, max_fixations=81, scanmatch=(0.352, 0.313, 0.287)
    ),
    "naturaldesign": NaturalSet(
        size=(736, 896), target=32, inhibition=64, max_fixations=66, scanmatch=(0.395, 0.311, 0.313)
    ),
    "objectarray": NaturalSet(
        size=(544, 544), target=64, inhibition=45, max_fixations=7, scanmatch=(0.441, 0.412, 0.404)
    ),
}
"""The paper's natural sets, by the name of their folder in small letters. The array has six places
around the middle; the grey of the surround is our choice."""


@dataclass(frozen=True, kw_only=True)
class TrialFile:
    """Where one trial lies."""

    name: str
    """Task and number."""
    task: str
    scene: Path
    target: Path
    truth: Path | None
    cells: Path | None
    set_size: int | None
    viewers: Path | None = None
    """Scanpaths of people who searched the pictures of the task."""
    pictures: tuple[str, ...] = ()
    """Stems of all pictures of the task."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One trial, read."""

    name: str
    task: str
    scene: Scene
    rules: SearchConfig
    set_size: int | None
    path: Path
    viewers: tuple[Scanpath, ...] = ()
    """People who searched it, in pixels of the scene."""


def find_tasks(root: Path) -> list[Path]:
    """The task folders at or below a folder, in order."""
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]
    return [p for p in folders if (p / SCENES).is_dir() and (p / TARGETS).is_dir()]


def find_trials(
    root: Path, *, tasks: Sequence[str] = (), most: int | None = None
) -> list[TrialFile]:
    """The trials of all tasks at or below a folder.

    Args:
        root: The folder.
        tasks: Keep tasks whose name holds one of these words. None: all.
        most: Keep the first so many trials of each set size of a task.

    Raises:
        InputError: A task without pictures, without a target for a picture, or with a table that
            does not fit.
    """
    found = []
    for folder in find_tasks(root):
        name = folder.relative_to(root).as_posix()
        name = folder.name if name == "." else name
        if tasks and not any(word in name for word in tasks):
            continue
        found += _first(list(_trials_of(folder, name)), most)
    return found


def _trials_of(folder: Path, task: str) -> Iterator[TrialFile]:
    scenes = _pictures(folder / SCENES)
    if not scenes:
        raise InputError("holds no picture", path=folder / SCENES, remedy="see the layout in info")
    targets, truths = _pictures(folder / TARGETS), _pictures(folder / TRUTHS)
    sizes = _set_sizes(folder, task, list(scenes))
    cells = next(
        (p / CELLS for p in (folder, *list(folder.parents)[:2]) if (p / CELLS).is_file()), None
    )
    viewers, stems = find_viewers(folder), tuple(scenes)
    for stem, path in scenes.items():
        if stem not in targets:
            raise InputError(
                f"has no target {TARGETS}/{stem}.png", path=path, remedy="add the picture"
            )
        if truths and stem not in truths:
            raise InputError(f"has no mask {TRUTHS}/{stem}.png", path=path, remedy="add the mask")
        yield TrialFile(
            name=f"{task}/{stem}",
            task=task,
            scene=path,
            target=targets[stem],
            truth=truths.get(stem),
            cells=cells,
            set_size=sizes.get(stem),
            viewers=viewers,
            pictures=stems,
        )


def _pictures(folder: Path) -> dict[str, Path]:
    """Stem -> picture, numbers in their order."""
    if not folder.is_dir():
        return {}
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES]
    found.sort(key=lambda p: (not p.stem.isdigit(), int(p.stem) if p.stem.isdigit() else 0, p.stem))
    return {p.stem: p for p in found}


def _set_sizes(folder: Path, task: str, stems: list[str]) -> dict[str, int]:
    path = folder / TRIALS
    if path.is_file():
        return _read_table(path, stems)
    experiment = experiment_of(task)
    if experiment is None:
        return {}
    blocks = len(experiment.set_sizes)
    if len(stems) % blocks:
        raise InputError(
            f"holds {len(stems)} pictures, which are not {blocks} equal blocks of set sizes "
            f"{', '.join(map(str, experiment.set_sizes))}",
            path=folder / SCENES,
            remedy=f"add {TRIALS} with the columns trial and set_size",
        )
    length = len(stems) // blocks
    return {stem: experiment.set_sizes[n // length] for n, stem in enumerate(stems)}


def _read_table(path: Path, stems: list[str]) -> dict[str, int]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is not a csv table ({error})", path=path) from None
    sizes = {}
    for number, row in enumerate(rows, start=2):
        text = row.get("set_size") or ""
        if not row.get("trial") or not text.isdigit() or int(text) < 1:
            raise InputError(
                "needs the columns trial and set_size, a number above 0",
                path=path,
                place=f"row {number}",
                remedy="correct the row",
            )
        sizes[str(row["trial"])] = int(text)
    missing = [stem for stem in stems if stem not in sizes]
    if missing:
        raise InputError(f"has no row for the trial {missing[0]}", path=path, remedy="add the row")
    return sizes


def _first(trials: list[TrialFile], most: int | None) -> list[TrialFile]:
    if most is None:
        return trials
    counts: dict[int | None, int] = {}
    kept = []
    for trial in trials:
        counts[trial.set_size] = counts.get(trial.set_size, 0) + 1
        if counts[trial.set_size] <= most:
            kept.append(trial)
    return kept


def read_trial(file: TrialFile, *, background: int | None = None) -> Trial:
    """Read one trial, with the rules of its task.

    Args:
        file: Where it lies.
        background: Grey around the picture where the task does not say; None: the commonest grey
            at the border of the picture.

    Raises:
        InputError: A file that cannot be read, or files that do not fit together.
    """
    image, target = read_picture(file.scene), read_picture(file.target)
    truth = None if file.truth is None else read_picture(file.truth).max(axis=2) > 127
    cells = None if file.cells is None else read_cells(file.cells)
    experiment, natural = experiment_of(file.task), natural_set(file.task)
    if natural is not None:
        image, target = resized(image, natural.size), resized(target, (natural.target,) * 2)
        truth = None if truth is None else resized(truth, natural.size)
    if experiment is not None and cells is None:
        raise InputError(
            f"there is no {CELLS} beside or above the task {file.task}",
            path=file.scene,
            remedy="add the cells, or rename the folder",
        )
    _check_sizes(file, image, truth, cells)
    if experiment is not None:
        rules = experiment.rules
    elif natural is not None:
        rules = natural.rules
    else:
        grey = border_grey(image) if background is None else background
        count = 37 if cells is None else len(cells) + 1
        rules = SearchConfig(max_fixations=count, background=grey)
    scene = Scene(name=str(file.scene), image=image, target=target, truth=truth, cells=cells)
    viewers: tuple[Scanpath, ...] = ()
    if file.viewers is not None:
        viewers = viewers_of(file.viewers, file.scene, size=scene.size, others=file.pictures)
    return Trial(
        name=file.name,
        task=file.task,
        scene=scene,
        rules=rules,
        set_size=file.set_size,
        path=file.scene,
        viewers=viewers,
    )


def natural_set(task: str) -> NaturalSet | None:
    """The natural set that a task's folder is named after."""
    names = [part.lower() for part in Path(task).parts]
    return next((found for name, found in NATURAL.items() if name in names), None)


def _check_sizes(
    file: TrialFile, image: np.ndarray, truth: np.ndarray | None, cells: np.ndarray | None
) -> None:
    """Name the file at fault, which a scene does not know."""
    for path, mask in ((file.truth, truth), (file.cells, cells)):
        if mask is not None and mask.shape[-2:] != image.shape[:2]:
            raise InputError(
                f"is for {mask.shape[-2]} x {mask.shape[-1]} pixels, the picture {file.scene.name} "
                f"has {image.shape[0]} x {image.shape[1]}",
                path=path,
                remedy="give a mask of the picture's size",
            )
    if truth is not None and not truth.any():
        raise InputError(
            "is black: there is no target", path=file.truth, remedy="paint its place white"
        )


def read_cells(path: Path) -> Bool[np.ndarray, "m h w"]:
    """Candidate cells.

    Raises:
        InputError: Not such an array.
    """
    if not path.is_file():
        raise InputError("no such file", path=path, remedy="check the path")
    return _read_cells(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read_cells(path: Path, changed: int) -> Bool[np.ndarray, "m h w"]:
    """All trials of an experiment have the same cells; `changed` is when the file was written."""
    array = read_numbers(path, ("cells", "height", "width"))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("holds NaN or infinity", path=path, remedy="use 0 and 255")
    cells = array > 0
    if not cells.any(axis=(1, 2)).all():
        raise InputError("has a cell without pixels", path=path, remedy="remove the empty cell")
    return np.asarray(cells)


def border_grey(image: UInt8[np.ndarray, "h w 3"]) -> int:
    """The commonest grey along the border of a picture."""
    grey = image.mean(axis=2).round().astype(np.int64)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return int(np.bincount(border, minlength=256).argmax())


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture, or a mask, of another height and width."""
    if image.shape[:2] == size:
        return image
    kind = Image.Resampling.NEAREST if image.dtype == bool else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize(size[::-1], kind))


@dataclass(frozen=True)
class Trials:
    """Trials, each read when it is asked for."""

    files: Sequence[TrialFile]
    background: int | None = None

    @property
    def names(self) -> list[str]:
        """Of the trials."""
        return [file.name for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Trial:
        return read_trial(self.files[index], background=self.background)


def write_stimuli(
    root: Path,
    *,
    seed: int,
    trials: int | None = None,
    experiments: Sequence[Experiment] = EXPERIMENTS,
    legacy: bool = False,
) -> list[Path]:
    """Make the displays of experiments in the official folders, as PNG.

    Args:
        root: The data set.
        seed: Of places; the same seed writes the same bytes.
        trials: Per set size. None: as many as in the paper.
        experiments: Which.
        legacy: Mark targets as the paper's code does, see `make_displays`.

    Returns:
        The task folders.
    """
    folders = []
    for experiment in experiments:
        for task in experiment.tasks:
            folders.append(root / task.name)
            displays = make_displays(experiment, task, seed=seed, trials=trials, legacy=legacy)
            _write_task(folders[-1], displays)
            cells = root / Path(task.name).parts[0] / CELLS
            np.save(cells, experiment.cells.astype(np.uint8) * np.uint8(255))
    return folders


def _write_task(folder: Path, displays: Sequence[Display]) -> None:
    for part in (SCENES, TARGETS, TRUTHS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, display in enumerate(displays, start=1):
        pictures = {
            SCENES: display.image,
            TARGETS: display.target,
            TRUTHS: display.truth.astype(np.uint8) * np.uint8(255),
        }
        for part, picture in pictures.items():
            Image.fromarray(picture).save(folder / part / f"{number}.png")
        rows.append(f"{number},{display.set_size},{display.target_cell}")
    table = "\n".join(["trial,set_size,target_cell", *rows]) + "\n"
    (folder / TRIALS).write_text(table, encoding="utf-8")
