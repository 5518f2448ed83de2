"""The recipe of in-context linear regression by multi-head softmax attention (arXiv 2503.12734).

A data set is the description of a task, `task.yaml`: sequences are drawn afresh at each training
step, and from fixed seeds for validation and evaluation. csv and npz files in its folder are
sequences of the user's own, for `predict` and `explain`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_core.sites import observe
from heed_neuro.icl.files import (
    TASK,
    NamedSequences,
    read_sequences,
    read_task,
    write_sequences_csv,
    write_task,
)
from heed_neuro.icl.regressor import InContextRegressor, set_signs
from heed_neuro.icl.risks import at_length
from heed_neuro.icl.tasks import LinearTask, draw
from heed_neuro_cli.icl_bench import HeadLoop, Projections
from heed_neuro_cli.icl_module import (
    Chunk,
    ChunkErrors,
    Experiment,
    FilePredictions,
    IclModule,
    check_sizes,
)
from heed_neuro_cli.icl_pictures import draw_attention, draw_circuits
from heed_neuro_cli.icl_reporting import rows_of_chunk, summarise
from heed_neuro_cli.icl_settings import (
    IclSettings,
    multi_task,
    non_isotropic,
    one_head,
    paper,
    settle,
    task_of,
)
from heed_runtime.recipe import (
    Card,
    Check,
    Contender,
    Explanation,
    Exportable,
    Recipe,
    Report,
    Row,
)

CHUNK = 4000
SPLITS = {"train": 11, "val": 12, "test": 13}
"""Split -> the seed of its fixed sequences."""
SUFFIXES = (".csv", ".npz")

LAYOUT = """\
DATA/task.yaml   dim, length, noise_variance, rho or covariance, supports, scaling
DATA/*.csv       sequences of your own: x1 ... xd, y (or y1 ... yn), sequence; empty y = query
DATA/*.npz       x (b, l, d), y (b, l) or (b, l, n), query (b, d) or (b, q, d), answer
Training draws fresh sequences of the task at each step: no file is read for it."""


@dataclass(frozen=True)
class Fresh:
    """As many places of sequences as an epoch has; the module draws them."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


@dataclass(frozen=True)
class Files:
    """A user's files; each is read when it is asked for."""

    entries: Sequence[tuple[str, Path]]
    settings: IclSettings

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> NamedSequences:
        name, path = self.entries[index]
        found = read_sequences(path, name=name)
        for group in found.groups:
            check_sizes(group, self.settings, str(path))
        return found


class IclRecipe(Recipe[IclSettings, Any, Any]):
    """How in-context linear regression is trained and used."""

    card: ClassVar[Card] = Card(
        name="icl",
        title="In-context linear regression by multi-head attention",
        task="regression within a sequence; theory of what heads learn",
        reads=("task.yaml", "csv or npz of sequences"),
        writes="csv of predictions beside GD and ridge",
        paper="He, Pan, Chen, Yang, In-Context Linear Regression Demystified, ICML 2025, "
        "arXiv 2503.12734",
        layout=LAYOUT,
        verified="outputs, gradients, circuits, theory and flow equal to stored official numbers",
        trained="5,000 steps (`train icl --trainer.max-epochs 20`, 2026-11-28): error 0.247 at "
        "L = 40, debiased GD 0.245; omega +-0.21, mu +-2.16",
        reproduced="risks of GD, debiased GD, one and two heads and ridge at 5 lengths (4e5 "
        "sequences) within 0.004",
    )
    settings: ClassVar[type[IclSettings]] = IclSettings
    presets: ClassVar[Mapping[str, Callable[[], IclSettings]]] = {
        "small": IclSettings,
        "paper": paper,
        "one-head": one_head,
        "non-isotropic": non_isotropic,
        "multi-task": multi_task,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/mse", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.length",
        "data.noise_variance",
        "data.rho",
        "data.test_sequences",
        "data.lengths",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """The paper's task, and two files of sequences from it."""
        task, generator = LinearTask(), torch.Generator().manual_seed(seed)
        write_task(task, out / TASK)
        write_sequences_csv(draw(task, 3, generator=generator), out / "three.csv")
        many = draw(task, 5, generator=generator)
        assert many.answer is not None
        np.savez(
            out / "five.npz",
            x=many.x.numpy(),
            y=many.y[..., 0].numpy(),
            query=many.query[:, 0].numpy(),
            answer=many.answer[:, 0, 0].numpy(),
        )

    def check(self, settings: IclSettings, root: Path) -> Check:
        """The task, and every file of sequences."""
        problems: list[str] = []
        counts: list[Row] = []
        try:
            task = read_task(root / TASK)
            counts.append({"file": TASK, "sequences": None, "noise": task.noise})
        except InputError as error:
            problems.append(str(error))
        for path in _files(root):
            try:
                found = read_sequences(path)
                for group in found.groups:
                    check_sizes(group, settle(settings, root), str(path))
                counts.append({"file": str(path.relative_to(root)), "sequences": len(found.labels)})
            except InputError as error:
                problems.append(str(error))
        return Check(counts=counts, problems=list(dict.fromkeys(problems)))

    def plan(self, settings: IclSettings, root: Path) -> IclSettings:
        """Take the task from its description and the settings."""
        return settle(settings, root)

    def train_data(self, settings: IclSettings, root: Path) -> Fresh:
        """Places for fresh sequences."""
        read_task(root / TASK)
        return Fresh(settings.data.epoch_sequences)

    def cases(self, settings: IclSettings, root: Path, split: str) -> list[Chunk]:
        """Fixed sequences: of the task's length to validate, of every length to test."""
        if split not in SPLITS:
            raise InputError(f"no split {split!r}", remedy=f"one of {', '.join(SPLITS)}")
        task, data = task_of(settings, root), settings.data
        if split == "val":
            return _chunks(task, data.val_sequences, SPLITS[split])
        lengths = sorted({*data.lengths, task.length})
        found = [
            chunk
            for length in lengths
            for chunk in _chunks(at_length(task, length), data.test_sequences, SPLITS[split])
        ]
        return [_as_first(chunk, number == 0) for number, chunk in enumerate(found)]

    def inputs(self, settings: IclSettings, paths: Sequence[Path]) -> Files:
        """The csv and npz files given, and those in the folders given."""
        entries: list[tuple[str, Path]] = []
        for path in paths:
            if not path.is_dir():
                entries.append((path.stem, path))
                continue
            found = _files(path)
            if not found:
                raise InputError("holds no csv or npz file", path=path)
            entries += [(str(p.relative_to(path).with_suffix("")), p) for p in found]
        return Files(entries, settings)

    def model(self, settings: IclSettings) -> Experiment:
        """The network as torch initialises it, with nothing recorded."""
        return Experiment(settings.model)

    def start(self, settings: IclSettings, root: Path, model: nn.Module) -> None:
        """Turn heads to the signs that the settings want."""
        assert isinstance(model, Experiment)
        set_signs(model.regressor, settings.training.signs)

    def module(self, settings: IclSettings, model: nn.Module) -> IclModule:
        """The network with its loss."""
        assert isinstance(model, Experiment)
        return IclModule(settings, model)

    def write_prediction(
        self, settings: IclSettings, prediction: FilePredictions, out: Path
    ) -> list[Path]:
        """Write `<name>.csv`: a row per query and output, a column per predictor."""
        path = out / f"{prediction.name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            names = list(prediction.found[0])
            known = any(answer is not None for answer in prediction.answers)
            head = ["sequence", "query", "output", *names, *(["answer"] if known else [])]
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            for label, found, answer in zip(
                prediction.labels, prediction.found, prediction.answers, strict=True
            ):
                for q, n in np.ndindex(found["model"].shape):
                    values = [f"{found[name][q, n]:.6g}" for name in names]
                    told = [] if answer is None else [f"{answer[q, n]:.6g}"]
                    writer.writerow([label, q, n + 1, *values, *told])
        return [path]

    def score(self, settings: IclSettings, prediction: ChunkErrors) -> list[Row]:
        """Sums of the errors of all predictors."""
        return rows_of_chunk(prediction)

    def report(self, settings: IclSettings, rows: Sequence[Row]) -> Report:
        """Risks by length beside GD and ridge, and the pattern of the circuits."""
        return summarise(rows, task_of(settings), trained=settings.model.fixed_length)

    def explain(
        self, settings: IclSettings, module: L.LightningModule, case: NamedSequences
    ) -> Explanation:
        """The circuits, and the weights of the heads over the context of the first sequence."""
        assert isinstance(module, IclModule)
        model, group = module.model, case.groups[0].to(module.device)
        with torch.no_grad(), observe(model) as record:
            model(group.context_tokens(), group.query_tokens())
        weights = next(iter(record.values()))[0, :, 0].float().cpu().numpy()  # (h, l)
        x, query = group.x[0].cpu().numpy(), group.query[0, 0].cpu().numpy()
        y, pattern = group.y[0, :, 0].cpu().numpy(), model.pattern()
        return Explanation(
            name=case.name,
            arrays={
                "attention": weights,
                "kq": pattern.kq,
                "ov": pattern.ov,
                "omega": pattern.omega,
                "mu": pattern.mu,
            },
            figures={
                "attention": draw_attention(weights, x @ query, y),
                "circuits": draw_circuits(pattern),
            },
        )

    def exportable(self, settings: IclSettings, model: nn.Module) -> Exportable:
        """The network for any number of sequences, examples and queries."""
        assert isinstance(model, Experiment)
        width, auto = settings.model.width, torch.export.Dim.AUTO
        return Exportable(
            model=model.regressor.eval(),
            examples=[
                (torch.randn(b, n, width), torch.randn(b, q, width))
                for b, n, q in ((2, 40, 3), (3, 11, 2))
            ],
            dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}),
            input_names=("context", "query"),
            output_names=("prediction",),
        )

    def contenders(self, settings: IclSettings) -> list[Contender]:
        """Ours, and the same network with keys and values of every token."""
        config, task = settings.model, task_of(settings)
        inputs = partial(_bench_inputs, task, settings.trainer.batch)
        builds: dict[str, Callable[[], nn.Module]] = {
            "heed, absorbed heads": partial(InContextRegressor, config),
            "plain module: projections of all tokens": partial(Projections, config),
            "plain module: a loop over heads": partial(HeadLoop, config),
        }
        return [
            Contender(
                name=name,
                build=build,
                inputs=inputs,
                loss=lambda found: found.square().mean(),
                items=settings.trainer.batch,
            )
            for name, build in builds.items()
        ]


def _chunks(task: LinearTask, count: int, seed: int) -> list[Chunk]:
    return [
        Chunk(
            name=f"L{task.length}-{number}",
            task=task,
            count=min(CHUNK, count - start),
            seed=seed + 100 * task.length + 100_000 * number,
            first=number == 0,
        )
        for number, start in enumerate(range(0, count, CHUNK))
    ]


def _as_first(chunk: Chunk, first: bool) -> Chunk:
    return replace(chunk, first=first)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES)


def _bench_inputs(task: LinearTask, batch: int) -> tuple[Tensor, ...]:
    sequences = draw(task, batch, generator=torch.Generator().manual_seed(0))
    return sequences.context_tokens(), sequences.query_tokens()


RECIPE = IclRecipe()
