"""The settings of eccNET, its presets, and what it takes in and gives out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from heed_core.errors import InputError
from heed_gaze.eccnet.layouts import Trial, TrialFile, Trials, find_trials, read_trial
from heed_gaze.eccnet.network import EccNetConfig
from heed_gaze.eccnet.pictures import Picture, Variant
from heed_gaze.eccnet.retina import RetinaConfig
from heed_gaze.eccnet.search import Search
from heed_runtime.settings import TrainerSettings

LAYOUT = """\
search:    TASK/stimuli/<i>.png, TASK/target/<i>.png, TASK/gt/<i>.png (white = target)
           gt_mask.npy in or above TASK: candidate cells (m, h, w); absent: search everywhere
           TASK/trials.csv: trial, set_size
           TASK/viewers.csv (.json, .mat, folder): people's scanpaths, to be compared with
           curvature/, lightning_dir/, intersection/, categorization/ are the six experiments,
           waldo/, naturaldesign/, objectarray/ the natural sets
pictures:  [images/]train/CLASS/*.png, val/CLASS/*.png [, test/CLASS/*.png]
           or *-images-idx3-ubyte[.gz] with *-labels-idx1-ubyte[.gz] (MNIST)"""


@dataclass(frozen=True, kw_only=True)
class EccNetData:
    """What is classified in training, what is searched afterwards, and by which rules."""

    variant: Variant = "none"
    """How the pictures of the training are seen: turned by 90 degrees, through a fisheye, behind a
    grid."""
    flip: bool = True
    """Mirror half of the training pictures."""
    class_names: tuple[str, ...] = ()
    """Of the pictures; taken from the data."""
    tasks: tuple[str, ...] = ()
    """Search only tasks whose name holds one of these words. None given: all."""
    most_trials: int | None = None
    """Search the first so many trials of each set size of a task. None: all."""
    searcher: Literal["eccnet", "chance", "pixel-match"] = "eccnet"
    """What looks: the network, or a baseline that needs none."""
    target: Path | None = None
    """What to look for in pictures that are given as files."""
    truth: Path | None = None
    """White where the target is, for pictures given as files. None: nothing is ever found."""
    cells: Path | None = None
    """Candidate cells (npy) of pictures given as files. None: search everywhere."""
    background: int | None = None
    """Grey around pictures of unknown sets. None: the commonest grey at their border."""
    max_fixations: int | None = None
    """With the initial one. None: by the rules of the task."""
    inhibition: int | None = None
    """Side in pixels of what is tested and inhibited at a fixation. None: by the rules."""
    gif: bool = True
    """`predict` and `explain` also write an animation of each search."""
    reuse_surround: bool = True
    """Compute features only where the picture is; the same numbers, faster."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file that cannot be read."""

    def __post_init__(self) -> None:
        for name in ("most_trials", "max_fixations", "inhibition"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.background is not None and not 0 <= self.background <= 255:
            raise ValueError(f"background must be 0 to 255, got {self.background}")


@dataclass(frozen=True, kw_only=True)
class EccNetTraining:
    """The classification that a variant learns; defaults are the paper's."""

    weights: Path | None = None
    """VGG16's weights to start from: torchvision's .pth or .safetensors, Keras's .h5."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    weight_decay: float = 1e-5
    freeze_convolutions: bool = False
    """Train the classifier alone."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or self.weight_decay < 0:
            raise ValueError(
                "learning_rate must be above 0 and weight_decay not negative, got "
                f"{self.learning_rate} and {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class EccNetSettings:
    """All settings of eccNET."""

    model: EccNetConfig = field(default_factory=EccNetConfig)
    data: EccNetData = field(default_factory=EccNetData)
    training: EccNetTraining = field(default_factory=EccNetTraining)
    trainer: TrainerSettings = field(default_factory=lambda: TrainerSettings(max_epochs=1, batch=1))

    def __post_init__(self) -> None:
        if self.training.freeze_convolutions and not self.model.classes:
            raise ValueError("freeze_convolutions has no effect without a classifier (classes=0)")


def small() -> EccNetSettings:
    """A narrow network that learns to classify in a minute on two cores."""
    return EccNetSettings(
        model=EccNetConfig(
            widths=(8, 16, 24, 32, 32), classes=6, hidden=64, dropout=0.0, picture=48
        ),
        training=EccNetTraining(learning_rate=2e-3),
        trainer=TrainerSettings(max_epochs=24, batch=16),
    )


def vgg16() -> EccNetSettings:
    """The paper's eccNET: VGG16's weights (--training.weights) as they are; nothing is trained."""
    return EccNetSettings()


def no_eccentricity() -> EccNetSettings:
    """The ablation without eccentricity: windows of 2 everywhere."""
    return EccNetSettings(model=EccNetConfig(retina=RetinaConfig(eccentricity=False)))


def ivsn() -> EccNetSettings:
    """IVSN: VGG16 with its maximum pools, the last layer alone."""
    retina = RetinaConfig(eccentricity=False, pooling="max")
    return EccNetSettings(model=EccNetConfig(retina=retina, layers=(5,)))


def last_layer() -> EccNetSettings:
    """The ablation "18->17": eccNET with the last layer alone."""
    return EccNetSettings(model=EccNetConfig(layers=(5,)))


def classification() -> EccNetSettings:
    """Training of the full network on ImageNet, Places or a variant of them, as in the paper."""
    return EccNetSettings(
        model=EccNetConfig(classes=1000), trainer=TrainerSettings(max_epochs=60, batch=150)
    )


@dataclass(frozen=True, kw_only=True)
class SearchPrediction:
    """A scene with the search of it."""

    name: str
    trial: Trial
    search: Search


@dataclass(frozen=True, kw_only=True)
class PicturePrediction:
    """A picture with the probabilities of its classes."""

    name: str
    label: int
    probabilities: tuple[float, ...]


Case = Trial | Picture
Prediction = SearchPrediction | PicturePrediction


@dataclass(frozen=True)
class RuledTrials:
    """Trials with the rules that the settings change."""

    trials: Trials
    data: EccNetData

    @property
    def names(self) -> list[str]:
        """Of the trials."""
        return self.trials.names

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: int) -> Trial:
        trial = read_trial(self.trials.files[index], background=self.data.background)
        changes = {
            name: value
            for name in ("max_fixations", "inhibition")
            if (value := getattr(self.data, name)) is not None
        }
        return replace(trial, rules=replace(trial.rules, **changes))


def scenes_of(data: EccNetData, root: Path) -> RuledTrials:
    """The trials at or below a folder.

    Raises:
        InputError: There are none.
    """
    found = find_trials(root, tasks=data.tasks, most=data.most_trials)
    if not found:
        wanted = f" whose name holds {' or '.join(data.tasks)}" if data.tasks else ""
        raise InputError(
            f"holds no search task{wanted}: no folder with stimuli/ and target/",
            path=root,
            remedy="make some with: heed-gaze stimuli --out DIR",
        )
    return RuledTrials(Trials(found, data.background), data)


def scenes_in(data: EccNetData, paths: Sequence[Path]) -> RuledTrials:
    """The trials in folders, and pictures that are given as files."""
    files: list[TrialFile] = []
    for path in paths:
        if path.is_dir():
            files += scenes_of(data, path).trials.files
            continue
        if data.target is None:
            raise InputError(
                "what should be looked for in it is not known",
                path=path,
                remedy="add --data.target PICTURE, or give a folder with stimuli/ and target/",
            )
        files.append(
            TrialFile(
                name=path.stem,
                task="",
                scene=path,
                target=data.target,
                truth=data.truth,
                cells=data.cells,
                set_size=None,
            )
        )
    return RuledTrials(Trials(files, data.background), data)
