"""The example recipe: which class does the marked token of a set have?

A case is a csv file with a token per row. One token is marked; its value decides the class, and the
tokens are in no order, so that the network has to attend to it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from heed_core import Attend, observe
from heed_core.errors import InputError
from heed_runtime.recipe import (
    Card,
    Check,
    Contender,
    Explanation,
    Exportable,
    Recipe,
    Report,
    Row,
    Table,
)
from heed_runtime.report import new_figure, style
from heed_runtime.settings import TrainerSettings

CLASSES, CHANNELS = 2, 4


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """All that is needed to rebuild the network."""

    width: int = 16
    """Channels of a token inside the network."""
    heads: int = 2
    dropout: float = 0.1
    norm: Literal["layer", "batch"] = "layer"
    """Over the channels of a token, or over all tokens of a batch."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How files become samples."""

    tokens: int = 8
    """Rows of a file."""
    noise: float = 0.05
    """Standard deviation of the noise that augments a training sample."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Loss and optimiser."""

    lr: float = 1e-2
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam turns rounding errors of a gradient that is nil (a key's bias) into whole steps."""
    schedule: Literal["none", "cosine", "plateau"] = "cosine"
    """How the learning rate falls."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The four groups."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(max_epochs=8, batch=8, device="cpu")
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file."""

    name: str
    tokens: np.ndarray
    label: int | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The class probabilities of one file, and its label where there is one."""

    name: str
    probabilities: tuple[float, ...]
    label: int | None


class TokenClassifier(nn.Module):
    """One attention block between two linear layers; classifies the mean token."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width, self.heads = settings.width, settings.heads
        self.embed = nn.Linear(CHANNELS, width)
        self.norm = nn.LayerNorm(width) if settings.norm == "layer" else nn.BatchNorm1d(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attend = Attend(dropout=settings.dropout)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b k"]:
        """Class scores."""
        x = self.embed(tokens)
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(x)
        else:
            y = self.norm(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = self.attend(q, k, v).transpose(1, 2).flatten(2)  # (b, n, width)
        scores: Tensor = self.head((x + self.dropout(attended)).mean(dim=1))
        return scores


class TokenModule(L.LightningModule):
    """Cross-entropy, Adam, accuracy."""

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        super().__init__()
        self.settings, self.model = settings, model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        tokens, labels = batch
        loss = F.cross_entropy(self.model(tokens), labels)
        self.log(
            "train/loss", loss, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(labels)
        )
        return loss

    def validation_step(self, cases: list[Case], batch_idx: int) -> None:
        """Log the metrics of a list of cases."""
        scores, labels = self._scores(cases), torch.tensor([case.label for case in cases])
        labels = labels.to(self.device)
        log = partial(self.log, sync_dist=True, batch_size=len(cases))
        log("val/loss", F.cross_entropy(scores, labels))
        log("val/accuracy", (scores.argmax(1) == labels).float().mean())

    def predict_step(self, cases: list[Case], batch_idx: int) -> list[Prediction]:
        """A prediction for each case."""
        probabilities = self._scores(cases).float().softmax(1).tolist()
        return [
            Prediction(name=case.name, probabilities=tuple(row), label=case.label)
            for case, row in zip(cases, probabilities, strict=True)
        ]

    def configure_optimizers(self) -> Any:
        """The optimiser and the schedule of the settings."""
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[self.settings.training.optimizer]
        optimizer = kind(self.parameters(), lr=self.settings.training.lr)
        if self.settings.training.schedule == "none":
            return optimizer
        if self.settings.training.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            scheduler = {"scheduler": plateau, "monitor": "val/loss"}
            return {"optimizer": optimizer, "lr_scheduler": scheduler}
        epochs = self.settings.trainer.max_epochs
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        return {"optimizer": optimizer, "lr_scheduler": cosine}

    def _scores(self, cases: list[Case]) -> Tensor:
        tokens = np.stack([case.tokens for case in cases])
        scores: Tensor = self.model(torch.from_numpy(tokens).to(self.device))
        return scores


@dataclass(frozen=True)
class Files:
    """The cases in some files; each is read when it is asked for."""

    entries: Sequence[tuple[str, Path, int | None]]
    tokens: int

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Case:
        name, path, label = self.entries[index]
        return Case(name=name, tokens=read_tokens(path, count=self.tokens), label=label)


@dataclass(frozen=True)
class Samples:
    """The training samples: tokens and label of each file."""

    files: Files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        case = self.files[index]
        assert case.label is not None
        return case.tokens, case.label


def read_tokens(path: Path, *, count: int) -> np.ndarray:
    """Read a file: a row per token, a column per channel; float32 (n, c).

    Raises:
        InputError: Not numbers, or another number of rows or columns.
    """
    try:
        tokens = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
    except (ValueError, OSError) as error:
        problem = f"is not a table of numbers: {error}".partition("\n")[0]
        raise InputError(problem, path=path, remedy="correct the file") from None
    if tokens.shape != (count, CHANNELS):
        raise InputError(
            f"has {tokens.shape[0]} rows of {tokens.shape[1]} columns, not {count} of {CHANNELS}",
            path=path,
            remedy="correct the file or --data.tokens",
        )
    return tokens


class TokenRecipe(Recipe[Settings, Case, Prediction]):
    """How the example is trained and used."""

    card = Card(
        name="tokens",
        title="Attention over marked tokens",
        task="classification of token sets",
        reads=("csv files with labels.csv",),
        writes="a csv of class probabilities per file",
        paper="none: an example",
        layout="DATA/labels.csv   file,split,label\nDATA/<file>.csv  a row per token",
        verified="by the tests of the program",
        trained="on its sample",
        reproduced="none: an example",
        notice="an example, not for any use",
    )
    settings = Settings
    presets: ClassVar[Mapping[str, Callable[[], Settings]]] = {
        "small": Settings,
        "batch-norm": lambda: Settings(model=ModelSettings(norm="batch", dropout=0.0)),
    }
    monitor = ("val/accuracy", "max")

    def sample(self, out: Path, *, seed: int) -> None:
        """Write 24 + 7 + 6 files and their labels."""
        rng = np.random.default_rng(seed)
        rows = []
        for split, count in (("train", 24), ("val", 7), ("test", 6)):
            (out / split).mkdir()
            for index in range(count):
                label = int(rng.integers(CLASSES))
                tokens = rng.normal(size=(8, CHANNELS)) * 0.3
                tokens[:, 1] = rng.choice([-1.0, 1.0], size=8)
                marked = rng.integers(8)
                tokens[marked, 0], tokens[marked, 1] = 2.0, 2.0 * label - 1.0
                name = f"{split}/{index:03d}.csv"
                np.savetxt(out / name, tokens, delimiter=",", fmt="%.5f")
                rows.append({"file": name, "split": split, "label": label})
        with (out / "labels.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "split", "label"])
            writer.writeheader()
            writer.writerows(rows)

    def check(self, settings: Settings, root: Path) -> Check:
        """Read every file."""
        counts: list[Row] = []
        problems = []
        for split in ("train", "val", "test"):
            files = self.cases(settings, root, split)
            for index in range(len(files)):
                try:
                    files[index]
                except InputError as error:
                    problems.append(str(error))
            counts.append({"split": split, "files": len(files)})
        return Check(counts=counts, problems=problems)

    def train_data(self, settings: Settings, root: Path) -> Samples:
        """The training files."""
        return Samples(self.cases(settings, root, "train"))

    def augment(
        self, settings: Settings
    ) -> Callable[[tuple[np.ndarray, int], np.random.Generator], tuple[np.ndarray, int]]:
        """Another order of the tokens, and noise."""
        return partial(_augment, noise=settings.data.noise)

    def cases(self, settings: Settings, root: Path, split: str) -> Files:
        """The files that labels.csv gives to a split."""
        table = root / "labels.csv"
        if not table.is_file():
            raise InputError("no such file", path=table, remedy="see the layout in info")
        with table.open(newline="") as file:
            reader = csv.DictReader(file)
            for column in ("file", "split", "label"):
                if column not in (reader.fieldnames or ()):
                    raise InputError(f"has no column {column!r}", path=table, remedy="add it")
            entries = [
                (str(Path(row["file"]).with_suffix("")), root / row["file"], int(row["label"]))
                for row in reader
                if row["split"] == split
            ]
        if not entries:
            raise InputError(f"no file of the split {split!r}", path=table)
        return Files(entries, settings.data.tokens)

    def inputs(self, settings: Settings, paths: Sequence[Path]) -> Files:
        """The csv files given, and those in the folders given."""
        entries: list[tuple[str, Path, int | None]] = []
        for path in paths:
            if not path.is_dir():
                entries.append((path.stem, path, None))
                continue
            found = sorted(p for p in path.rglob("*.csv") if p.name != "labels.csv")
            if not found:
                raise InputError("holds no csv file", path=path)
            entries += [(str(p.relative_to(path).with_suffix("")), p, None) for p in found]
        return Files(entries, settings.data.tokens)

    def model(self, settings: Settings) -> TokenClassifier:
        """The classifier."""
        return TokenClassifier(settings.model)

    def module(self, settings: Settings, model: nn.Module) -> TokenModule:
        """The classifier with its loss."""
        return TokenModule(settings, model)

    def write_prediction(self, settings: Settings, prediction: Prediction, out: Path) -> list[Path]:
        """Write `<name>.csv`: class, probability."""
        path = out / f"{prediction.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{k},{value:.5f}" for k, value in enumerate(prediction.probabilities)]
        path.write_text("\n".join(["class,probability", *lines]) + "\n")
        return [path]

    def score(self, settings: Settings, prediction: Prediction) -> list[Row]:
        """Whether the most probable class is the label."""
        best = int(np.argmax(prediction.probabilities))
        correct = int(best == prediction.label)
        return [{"case": prediction.name, "label": prediction.label, "correct": correct}]

    def report(self, settings: Settings, rows: Sequence[Row]) -> Report:
        """The accuracy, in all and per class."""
        hits: dict[int, list[int]] = {}
        for row in rows:
            hits.setdefault(int(row["label"] or 0), []).append(int(row["correct"] or 0))
        means = {label: float(np.mean(found)) for label, found in sorted(hits.items())}
        accuracy = float(np.mean([hit for found in hits.values() for hit in found]))
        table: list[Row] = [{"class": k, "accuracy": mean} for k, mean in means.items()]
        with style():
            figure = new_figure()
            figure.add_subplot().bar([str(k) for k in means], list(means.values()))
        return Report(
            metrics={"accuracy": accuracy},
            tables=[Table(title="accuracy per class", rows=table)],
            plots={"accuracy": figure},
        )

    def explain(self, settings: Settings, module: L.LightningModule, case: Case) -> Explanation:
        """The attention that each token receives."""
        assert isinstance(module, TokenModule)
        with observe(module.model) as record:
            module.predict_step([case], 0)
        weights = record["attend"][0].mean(dim=0).detach().float().cpu().numpy()  # (n, n)
        return Explanation(
            name=case.name,
            arrays={"attention": weights},
            figures={"attention": _draw(weights)},
            files={"attention.csv": partial(np.savetxt, X=weights, delimiter=",", fmt="%.5f")},
        )

    def exportable(self, settings: Settings, model: nn.Module) -> Exportable:
        """The classifier for any number of files and tokens."""
        auto = torch.export.Dim.AUTO
        sizes = ((2, 8), (3, 11))
        return Exportable(
            model=model.eval(),
            examples=[(torch.randn(b, n, CHANNELS),) for b, n in sizes],
            dynamic_shapes=({0: auto, 1: auto},),
            input_names=("tokens",),
            output_names=("scores",),
        )

    def contenders(self, settings: Settings) -> list[Contender]:
        """Ours, and torch's encoder layer of the same width."""
        peer = partial(_peer, settings.model)
        inputs = partial(_bench_inputs, settings)
        items = settings.trainer.batch
        return [
            Contender(
                name="heed tokens",
                build=partial(TokenClassifier, settings.model),
                inputs=inputs,
                loss=torch.Tensor.mean,
                items=items,
            ),
            Contender(
                name="torch encoder", build=peer, inputs=inputs, loss=torch.Tensor.mean, items=items
            ),
            Contender(
                name="absent",
                build=peer,
                inputs=inputs,
                loss=torch.Tensor.mean,
                missing="not installed",
            ),
        ]


def _augment(
    sample: tuple[np.ndarray, int], rng: np.random.Generator, *, noise: float
) -> tuple[np.ndarray, int]:
    tokens, label = sample
    noisy = rng.permutation(tokens) + rng.normal(size=tokens.shape) * noise
    return noisy.astype(np.float32), label


def _bench_inputs(settings: Settings) -> tuple[Tensor, ...]:
    return (torch.randn(settings.trainer.batch, settings.data.tokens, CHANNELS),)


def _peer(settings: ModelSettings) -> nn.Module:
    layer = nn.TransformerEncoderLayer(settings.width, settings.heads, settings.width)
    return nn.Sequential(nn.Linear(CHANNELS, settings.width), layer)


def _draw(weights: np.ndarray) -> Figure:
    with style():
        figure = new_figure(width_in=4.0)
        axes = figure.add_subplot()
        axes.bar(range(len(weights)), weights.mean(axis=0))
        axes.set(xlabel="token", ylabel="mean attention received")
    return figure
