"""A recipe: how one system is trained and used by an app.

It is the only place where a domain meets the program. The runtime builds loaders, trains,
resumes, shards over processes, writes files and draws progress; the recipe says what the data are,
what the model and its loss are, and how one result is written, scored and drawn. The runtime knows
nothing else of any domain.

The way of a datum: a file on disk -> `inputs`, `cases` or `train_data` (data sets of the package)
-> batch -> `module` (a LightningModule around the package's model) -> `write_prediction`, `score`
or `explain`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import lightning as L
    import numpy as np
    from jaxtyping import UInt8
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from heed_runtime.settings import TrainerSettings

Row = Mapping[str, str | int | float | None]
"""One line of a table: column -> value; None is an empty field."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a system is, for `list`, `info` and the tables of the READMEs."""

    name: str
    """The name on the command line."""
    title: str
    task: str
    reads: tuple[str, ...]
    """The data layouts that it reads, a few words each."""
    writes: str
    """What `predict` writes."""
    paper: str
    """Authors, title, place, arXiv number."""
    layout: str
    """The layouts on disk, drawn as a tree; `info` prints it."""
    verified: str
    """How the architecture was verified."""
    trained: str
    """What it was trained on here, in a few words, or "not trained here"."""
    reproduced: str
    """The number of the paper that was reproduced, or "none: ..." with the reason."""
    notice: str = ""
    """A caution that train, evaluate, predict and explain print once."""


class SystemSettings(Protocol):
    """The four groups of settings that every system has, each a frozen dataclass."""

    @property
    def model(self) -> Any:
        """All that is needed to rebuild the network."""

    @property
    def data(self) -> Any:
        """How files become samples. Has `on_error: Literal["stop", "skip"]`."""

    @property
    def training(self) -> Any:
        """Loss weights, optimiser, augmentation."""

    @property
    def trainer(self) -> TrainerSettings:
        """The engine's settings, the same for every system."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `check` found in a data set."""

    counts: Sequence[Row]
    """A table of what is there: cases per split, labels, sizes."""
    problems: Sequence[str] = ()
    """What makes a case unusable, a line each (file: what is wrong; what to do)."""
    warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of results: shown on the terminal, written as csv and JSON."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `evaluate` shows and writes."""

    metrics: Mapping[str, float]
    """The headline numbers, flat; NaN or infinity are written as null."""
    tables: Sequence[Table] = ()
    plots: Mapping[str, Figure] = field(default_factory=dict)
    """File stem -> figure."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Where the model looked on one case."""

    name: str
    arrays: Mapping[str, np.ndarray]
    """Written together as `<name>.npz`."""
    figures: Mapping[str, Figure | UInt8[np.ndarray, "height width 3"]]
    """File stem suffix -> figure or picture, written as `<name>_<suffix>.png`."""
    files: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    """Suffix with its ending -> what writes a format of the domain as `<name>_<suffix>`."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """What `export` turns into a program that runs without heed."""

    model: nn.Module
    """In eval mode; positional tensors in, one tensor or a tuple of tensors out."""
    examples: Sequence[tuple[Tensor, ...]]
    """Fresh inputs of at least two sizes: the first is traced, all are checked."""
    dynamic_shapes: tuple[Mapping[int, Any], ...]
    """Per input: axis -> `torch.export.Dim` (or `Dim.AUTO`)."""
    input_names: Sequence[str]
    output_names: Sequence[str]
    refused: Mapping[Literal["export", "onnx"], str] = field(default_factory=dict)
    """Format -> why the model cannot be written in it, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One line of a benchmark: ours, or a peer at the same input."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[[Any], Tensor]
    """Of the model's train-mode output: a scalar to run backward from."""
    missing: str | None = None
    """Why it cannot run here (a peer that is not installed)."""
    items: int = 1
    """Images (bags, scans) in one input, for items per second."""


SettingsT = TypeVar("SettingsT", bound=SystemSettings)
CaseT = TypeVar("CaseT", bound="Named")
PredictionT = TypeVar("PredictionT", bound="Named")


class Named(Protocol):
    """A case or a prediction: its name becomes its file names."""

    @property
    def name(self) -> str:
        """Unique within one call; may hold `/` for sub-folders."""


class SizedData(Protocol):
    """A map-style data set, as `torch.utils.data.Dataset` with a length.

    A data set that reads its files when it is made may have an attribute `skipped`: a line for each
    one that it left out because the user chose `on_error="skip"`. One of small cases may have
    `read_ahead`: how many to read while one is predicted. One that knows the names of its cases
    before it reads them may have `names`, in order: then `predict --resume` reads none twice. One
    of training samples may have `apart`, a name for each: no batch holds two of the same name.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Recipe(ABC, Generic[SettingsT, CaseT, PredictionT]):
    """How one system is trained and used. Sub-class it once per system, in the app.

    A *case* is one unit of a user's data (a volume, a slide, a scan, a trial). Cases are loaded one
    at a time and lazily, so that thousands of them need the memory of one.
    """

    card: ClassVar[Card]
    settings: ClassVar[type[Any]]
    """The frozen dataclass with the groups model, data, training, trainer."""
    presets: ClassVar[Mapping[str, Callable[[], Any]]]
    """Name -> settings; the first is the default of `train`."""
    monitor: ClassVar[tuple[str, Literal["max", "min"]]]
    """The metric logged by the module's validation that selects the best weights."""
    changeable: ClassVar[tuple[str, ...]] = ("data.on_error",)
    """What `evaluate`, `predict` and `explain` may set otherwise than the training: dotted names of
    settings of the group `data`; the name of a nested group stands for all in it."""

    @abstractmethod
    def sample(self, out: Path, *, seed: int) -> None:
        """Write a small data set in the system's real layout into the empty folder `out`."""

    @abstractmethod
    def check(self, settings: SettingsT, root: Path) -> Check:
        """Read the whole data set and report everything that is broken, not only the first."""

    def plan(self, settings: SettingsT, root: Path) -> SettingsT:
        """Settle what depends on the data (classes, channels); the run keeps the result."""
        return settings

    @abstractmethod
    def train_data(self, settings: SettingsT, root: Path) -> SizedData:
        """The training samples, not augmented."""

    def augment(self, settings: SettingsT) -> Callable[[Any, np.random.Generator], Any] | None:
        """A pure function of a training sample and a generator, or None.

        The runtime seeds the generator from (seed, epoch, index), so that a sample's augmentation
        does not depend on workers, processes or on where training was resumed.
        """
        return None

    def collate(self, samples: list[Any]) -> Any:
        """Make a batch of training samples."""
        from torch.utils.data import default_collate

        return default_collate(samples)

    @abstractmethod
    def cases(self, settings: SettingsT, root: Path, split: str) -> SizedData:
        """The labelled cases of a split: "train", "val" or "test".

        Raises:
            InputError: There are none.
        """

    @abstractmethod
    def inputs(self, settings: SettingsT, paths: Sequence[Path]) -> SizedData:
        """The cases in files and folders given to `predict` and `explain`, without labels."""

    @abstractmethod
    def model(self, settings: SettingsT) -> nn.Module:
        """The network, freshly initialised from the settings alone."""

    def start(self, settings: SettingsT, root: Path, model: nn.Module) -> None:
        """Load what a new training starts from, such as pretrained weights in a user's file.

        Called once per run, before its first step: a trained model is rebuilt without these files
        and without the training's data in `root`.
        """
        return

    @abstractmethod
    def module(self, settings: SettingsT, model: nn.Module) -> L.LightningModule:
        """Loss, optimiser and validation metrics around `model`, its attribute of that name.

        Its `training_step` takes a batch of `collate`; its `validation_step` and `predict_step`
        take a list of cases, and `predict_step` returns the list of their predictions. Cases come
        as they were loaded: the module moves what it needs to its `device`. Where several processes
        work, each has its part: log with `sync_dist=True` and `batch_size=`, and let the loss be a
        mean over samples.
        """

    @abstractmethod
    def write_prediction(
        self, settings: SettingsT, prediction: PredictionT, out: Path
    ) -> list[Path]:
        """Write one prediction into the folder `out`; the files' paths come back."""

    @abstractmethod
    def score(self, settings: SettingsT, prediction: PredictionT) -> list[Row]:
        """Compare the prediction of a labelled case with its label: rows of the table of cases."""

    @abstractmethod
    def report(self, settings: SettingsT, rows: Sequence[Row]) -> Report:
        """Sum the rows of all cases up, as the paper does."""

    @abstractmethod
    def explain(self, settings: SettingsT, module: L.LightningModule, case: CaseT) -> Explanation:
        """Where the model looked on this case."""

    @abstractmethod
    def exportable(self, settings: SettingsT, model: nn.Module) -> Exportable:
        """The model with example inputs, for `export`; `info` counts operations on it.

        Raises:
            UsageError: The system has nothing to export; says why.
        """

    @abstractmethod
    def contenders(self, settings: SettingsT) -> list[Contender]:
        """Ours first, then the peers at the same input, for `bench`."""

    def stages(self, settings: SettingsT) -> Mapping[str, Callable[[], object]]:
        """The steps from a file's content to a result, in order: `bench` shows each one's share.

        Each does its own step alone, on inputs that were made before. None: no such table.
        """
        return {}
