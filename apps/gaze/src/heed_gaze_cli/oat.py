"""The recipe of OAT: scanpaths over the objects of a shelf (arXiv 2407.13335)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_core.arrays import load_array
from heed_core.errors import InputError
from heed_core.sites import observe
from heed_gaze.metrics.behaviour import BEHAVIOUR, behaviours, delta
from heed_gaze.metrics.sequences import sequence_score
from heed_gaze.oat.decoding import (
    decode_beam,
    decode_greedy,
    decode_samples,
    next_probabilities,
)
from heed_gaze.oat.files import read_shelves
from heed_gaze.oat.losses import scanpath_loss
from heed_gaze.oat.network import NO_TARGET, Memory, Oat, OatConfig
from heed_gaze.oat.pictures import (
    Sample,
    TrialBatch,
    check_table_rows,
    make_batch,
    make_scenes,
    pad_paths,
    read_layout_picture,
)
from heed_gaze.oat.sample import SampleOptions, write_sample
from heed_gaze.oat.splits import split_trials
from heed_gaze.oat.weights import load_official
from heed_gaze.scanpaths import write_scanpaths
from heed_gaze_cli import oat_bench
from heed_gaze_cli.oat_cases import (
    Scene,
    SceneSet,
    TrainingTrials,
    given_scenes,
    labelled_scenes,
    read_split,
)
from heed_gaze_cli.oat_pictures import draw_path, draw_steps
from heed_gaze_cli.oat_scoring import OatPrediction, make_report, score_scene
from heed_gaze_cli.oat_settings import LAYOUT, OatSettings, paper, small
from heed_runtime import distributed
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
from heed_runtime.report import save_figure

VALIDATED_TOGETHER = 16
"""Scenes whose paths are decoded in one batch."""

logger = logging.getLogger(__name__)

VALIDATION_DRAWS = 8
"""Paths per scene that validation draws in free viewing."""


class OatModule(L.LightningModule):
    """Loss, optimiser, validation and decoding of OAT."""

    def __init__(self, model: Oat, settings: OatSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self._waiting: list[Scene] = []
        self._validated: list[tuple[float, ...]] = []

    def training_step(self, batch: TrialBatch, _: int) -> Tensor:
        """The cross-entropy of all steps, summed over groups of layouts."""
        loss = self._loss(batch)
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, sync_dist=True,
            batch_size=len(batch.target),
        )  # fmt: skip
        return loss

    def validation_step(self, cases: list[Scene], _: int) -> None:
        """Collect scenes, and decode them together."""
        self._waiting += cases
        if len(self._waiting) >= VALIDATED_TOGETHER:
            self._validate()

    def on_validation_epoch_end(self) -> None:
        """Log loss, sequence score and delta over all trials of all processes.

        The weights are chosen by delta, as in the paper; where nothing is searched, by the loss:
        there paths differ so much that their mean behaviour says little of what is looked at.
        """
        if self._waiting:
            self._validate()
        found = [row for part in distributed.gather(self._validated) for row in part]
        self._validated = []
        if not found:
            return
        rows = np.array(found)
        trials = rows[:, 0]
        means = (rows[:, 1:] * trials[:, None]).sum(axis=0) / trials.sum()
        loss, alike, searched, *behaviour = means.tolist()
        mine, theirs = np.array(behaviour).reshape(2, len(BEHAVIOUR))
        difference, _ = delta(mine, theirs)
        self.log("val/loss", loss)
        self.log("val/ss", alike, prog_bar=True)
        self.log("val/delta", difference, prog_bar=True)
        self.log("val/criterion", difference if searched else loss)

    def predict_step(self, cases: list[Scene], _: int) -> list[OatPrediction]:
        """Scanpaths of scenes; of labelled ones all that their scores need."""
        return [self._predict(scene) for scene in cases]

    def configure_optimizers(self) -> Any:
        """Adam."""
        rate = self.settings.training.learning_rate
        return torch.optim.Adam(self.model.parameters(), lr=rate)

    @property
    def max_len(self) -> int:
        """Most objects of a decoded path."""
        return self.settings.data.max_len or 2 * self.settings.model.table_rows

    def memory(self, scenes: Sequence[Scene]) -> Memory:
        """What the encoder makes of scenes."""
        pixels = self.settings.data.legacy_pixels
        made = make_scenes([(scene.layout, scene.crops) for scene in scenes], pixels)
        target = torch.tensor([scene.target for scene in scenes], device=self.device)
        index = torch.arange(len(scenes), device=self.device)
        return self.model.read(made.to(self.device), index, target)

    def probabilities(self, memory: Memory, paths: Sequence[np.ndarray]) -> list[Tensor]:
        """The probability of each viewer's next step, stopping included; of one scene's memory."""
        objects = memory.objects
        table = pad_paths(paths, objects).to(self.device)
        rows = torch.zeros(len(paths), dtype=torch.long, device=self.device)
        logits = self.model.follow(memory.rows(rows), table)
        stop = torch.tensor([objects], device=self.device)
        return [
            next_probabilities(
                row[: len(path) + 1], torch.cat([torch.from_numpy(path).to(self.device), stop])
            )
            for row, path in zip(logits, paths, strict=True)
        ]

    def _loss(self, batch: TrialBatch) -> Tensor:
        logits = self.model.score(batch.scenes, batch.scene, batch.target, batch.scanpath)
        return scanpath_loss(logits, batch.wanted, batch.group)

    def _validate(self) -> None:
        """Decode the waiting scenes, and compare the paths with those of their viewers."""
        scenes, self._waiting = self._waiting, []
        memory = self.memory(scenes)
        decoded = self._validation_paths(scenes, memory)
        for number, (scene, paths) in enumerate(zip(scenes, decoded, strict=True)):
            viewers = scene.paths
            alone = memory.rows(torch.tensor([number], device=self.device))
            chances = torch.cat(self.probabilities(alone, viewers))
            alike = [sequence_score([path] * len(viewers), viewers).mean() for path in paths]
            human = behaviours(viewers, [scene.target] * len(viewers)).mean(axis=0)
            mine = behaviours(paths, [scene.target] * len(paths)).mean(axis=0)
            loss = float(-chances.clamp(min=1e-12).log().mean())
            searched = scene.target != NO_TARGET
            values = (len(viewers), loss, float(np.mean(alike)), searched, *mine, *human)
            self._validated.append(tuple(float(value) for value in values))

    def _validation_paths(self, scenes: Sequence[Scene], memory: Memory) -> list[list[np.ndarray]]:
        """The greedy path of each scene, as in the paper; in free viewing drawn ones.

        There the likeliest next object is the one that is looked at, so that a greedy path stays.
        """
        found = [[path] for path in decode_greedy(self.model, memory, max_len=self.max_len)]
        free = [number for number, scene in enumerate(scenes) if scene.target == NO_TARGET]
        if free:
            drawn = decode_samples(
                self.model, memory.rows(torch.tensor(free, device=self.device)),
                max_len=self.max_len, samples=VALIDATION_DRAWS, seed=self.settings.trainer.seed,
            )  # fmt: skip
            for number, paths in zip(free, drawn, strict=True):
                found[number] = paths
        return [[np.array(path.objects) for path in paths] for paths in found]

    def _predict(self, scene: Scene) -> OatPrediction:
        data = self.settings.data
        memory = self.memory([scene])
        decoded = self.decode(memory)
        prediction = OatPrediction(
            name=scene.name,
            scene=scene,
            paths=tuple(path.objects for path in decoded),
            log_probabilities=tuple(path.log_probability for path in decoded),
            stopped=tuple(path.stopped for path in decoded),
        )
        if not scene.viewers:
            return prediction
        greedy = decode_greedy(self.model, memory, max_len=self.max_len)[0]
        drawn = decode_samples(
            self.model, memory, max_len=self.max_len, samples=data.samples,
            temperature=data.temperature, seed=self.settings.trainer.seed,
        )[0]  # fmt: skip
        chances = self.probabilities(memory, scene.paths)
        return replace(
            prediction,
            greedy=greedy.objects,
            samples=tuple(path.objects for path in drawn),
            similarities=tuple(float(row.mean()) for row in chances),
        )

    def decode(self, memory: Memory) -> list[Any]:
        """The paths that the settings ask for, of one scene."""
        data, most = self.settings.data, self.max_len
        if data.decode == "greedy":
            return decode_greedy(self.model, memory, max_len=most)
        if data.decode == "beam":
            return decode_beam(self.model, memory, max_len=most, width=data.beam_width)[0]
        return decode_samples(
            self.model, memory, max_len=most, samples=data.samples,
            temperature=data.temperature, seed=self.settings.trainer.seed,
        )[0]  # fmt: skip


class OatRecipe(Recipe[OatSettings, Scene, OatPrediction]):
    """Predict the objects that a viewer fixates, until the target is found."""

    card: ClassVar[Card] = Card(
        name="oat",
        title="OAT: object-level attention transformer for gaze scanpaths",
        task="scanpaths over the objects of a shelf or picture, with or without a target",
        reads=(
            "shelves.json (layouts and trials)",
            "STI Amazon, OAT spreadsheets",
            "OSIE, COCO-Search18, FixaTons, scanpath CSV",
        ),
        writes="csv of objects and positions, pictures of scanpaths",
        paper="Fang et al., ECCV 2024, arXiv 2407.13335",
        layout=LAYOUT,
        verified="equal to the official network, its stages, gradients and greedy paths on fixed "
        "weights; exact parameter counts of all published variants",
        trained="on its sample of made shelves; for one epoch on 112 photographs of OSIE",
        reproduced="none: the paper's recordings were not at hand",
    )
    settings: ClassVar[type[OatSettings]] = OatSettings
    presets: ClassVar[Mapping[str, Callable[[], OatSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/criterion", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.grid",
        "data.target",
        "data.outside",
        "data.split",
        "data.decode",
        "data.samples",
        "data.temperature",
        "data.beam_width",
        "data.max_len",
        "data.baselines",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """Made shelves, and viewers who read, are guided by colour, or begin at the centre."""
        write_sample(out, SampleOptions(), seed=seed)

    def check(self, settings: OatSettings, root: Path) -> Check:
        """Read every trial and every picture."""
        shelves = read_shelves(root, replace(settings.data.reading, on_error="skip"))
        problems = list(shelves.skipped)
        for layout in shelves.layouts.values():
            try:
                read_layout_picture(layout)
            except InputError as error:
                problems.append(str(error))
        for trial in shelves.trials:
            try:
                check_table_rows(trial, shelves.layout_of(trial), settings.model.table_rows)
            except InputError as error:
                problems.append(str(error))
                break
        counts: list[Row] = []
        for name, trials in split_trials(shelves, settings.data.split).items():
            lengths = [len(trial.objects) for trial in trials]
            counts.append(
                {
                    "split": name,
                    "trials": len(trials),
                    "layouts": len({trial.layout for trial in trials}),
                    "viewers": len({trial.subject for trial in trials}),
                    "targets": len({trial.wanted for trial in trials}),
                    "mean length": round(float(np.mean(lengths)), 2) if lengths else None,
                    "longest": max(lengths, default=None),
                }
            )
        return Check(counts=counts, problems=problems, warnings=shelves.notes)

    def plan(self, settings: OatSettings, root: Path) -> OatSettings:
        """Take the longest path from the training trials."""
        shelves, parts = read_split(root, settings.data, "train")
        for trial in (trial for trials in parts.values() for trial in trials):
            check_table_rows(trial, shelves.layout_of(trial), settings.model.table_rows)
        if settings.data.max_len is not None:
            return settings
        longest = max(len(trial.objects) for trial in parts["train"])
        return replace(settings, data=replace(settings.data, max_len=longest))

    def train_data(self, settings: OatSettings, root: Path) -> TrainingTrials:
        """The training trials; of several groups of layouts one of each."""
        shelves, parts = read_split(root, settings.data, "train")
        return TrainingTrials(
            parts["train"],
            shelves,
            crops=settings.data.cropping(settings.model.crop),
            table_rows=settings.model.table_rows,
        )

    def collate(self, samples: list[tuple[Sample, ...]]) -> TrialBatch:
        """Join trials to a batch, each layout once."""
        return make_batch([one for sample in samples for one in sample])

    def cases(self, settings: OatSettings, root: Path, split: str) -> SceneSet:
        """The scenes of a split with all their viewers."""
        return labelled_scenes(
            root,
            settings.data,
            split,
            crop=settings.model.crop,
            table_rows=settings.model.table_rows,
        )

    def inputs(self, settings: OatSettings, paths: Sequence[Path]) -> SceneSet:
        """The scenes in files, folders and pictures."""
        scenes = given_scenes(
            paths,
            settings.data,
            crop=settings.model.crop,
            table_rows=settings.model.table_rows,
        )
        if settings.data.decode == "greedy" and any(
            group[0].target == NO_TARGET for group in scenes.groups
        ):
            logger.warning(
                "without a target the likeliest next object is often the one that is looked at: "
                "greedy paths stay; draw paths with --data.decode sample, or give --data.target"
            )
        return scenes

    def model(self, settings: OatSettings) -> Oat:
        """The network."""
        return Oat(settings.model)

    def start(self, settings: OatSettings, root: Path, model: nn.Module) -> None:
        """Take over the official weights that the settings name."""
        assert isinstance(model, Oat)
        training = settings.training
        if training.weights is not None:
            table = None
            if training.position_table is not None:
                table = read_table(training.position_table)
            load_official(model, training.weights, table=table)

    def module(self, settings: OatSettings, model: nn.Module) -> OatModule:
        """The network with its loss."""
        assert isinstance(model, Oat)
        return OatModule(model, settings)

    def write_prediction(
        self, settings: OatSettings, prediction: OatPrediction, out: Path
    ) -> list[Path]:
        """The paths as csv (objects and the centres of their boxes), and a picture."""
        scene, data = prediction.scene, settings.data
        name = "oat" if data.decode == "greedy" else f"oat-{data.decode}"
        single = len(prediction.paths) == 1
        paths = [
            scene.layout.scanpath(
                objects,
                subject=name if single else f"{name}-{number}",
                target=scene.target,
            )
            for number, objects in enumerate(prediction.paths, start=1)
        ]
        table = write_scanpaths(out / f"{prediction.name}.csv", paths)
        figure = draw_path(
            scene.layout,
            read_layout_picture(scene.layout),
            prediction.paths,
            target=scene.target,
            title=f"{prediction.name}: {data.decode}",
        )
        return [table, save_figure(figure, out / f"{prediction.name}.png")]

    def score(self, settings: OatSettings, prediction: OatPrediction) -> list[Row]:
        """A row per searcher: OAT, the viewers among each other, those without a network."""
        data = settings.data
        most = data.max_len or 2 * settings.model.table_rows
        return score_scene(prediction, samples=data.samples, max_len=most)

    def report(self, settings: OatSettings, rows: Sequence[Row]) -> Report:
        """The table of OAT with its ceiling and its floors."""
        return make_report(rows)

    def explain(self, settings: OatSettings, module: L.LightningModule, case: Scene) -> Explanation:
        """The attention of every step over the objects, of the choice and of the decoder."""
        assert isinstance(module, OatModule)
        model, count = module.model, len(case.layout)
        memory = module.memory([case])
        path = module.decode(memory)[0].objects
        ids = torch.tensor([path], dtype=torch.long, device=module.device)
        with torch.no_grad(), observe(model, "decoder.*.context_attention.attend") as record:
            logits = model.follow(memory, ids)
        choice = logits[0].float().softmax(dim=-1).cpu().numpy()
        looked = torch.stack([weights[0] for weights in record.values()]).float().cpu().numpy()
        picture = read_layout_picture(case.layout)
        common = {"path": path, "target": case.target}
        mean = looked.mean(axis=(0, 1))
        return Explanation(
            name=case.name,
            arrays={
                "objects": np.array(path),
                "centres_px": case.layout.centres_px[list(path)],
                "boxes": case.layout.boxes,
                "choice": choice[:, :count],
                "stop": choice[:, count],
                "decoder_attention": looked,
            },
            figures={
                "scanpath": draw_path(
                    case.layout, picture, [path], target=case.target, title=case.name
                ),
                "choice": draw_steps(
                    case.layout, picture, choice[:, :count], choice[:, count],
                    title=f"{case.name}: probability of the next object (%)", **common,
                ),
                "decoder": draw_steps(
                    case.layout, picture, mean[:, :count], choice[:, count],
                    title=f"{case.name}: attention of the decoder (%)", **common,
                ),
            },
        )  # fmt: skip

    def exportable(self, settings: OatSettings, model: nn.Module) -> Exportable:
        """Crops, cells, target and path so far to the logits of every step."""
        assert isinstance(model, Oat)
        config = settings.model
        auto = torch.export.Dim.AUTO
        batches, objects, steps = ({0: auto}, {0: auto, 1: auto}, {0: auto, 1: auto})
        fixed = config.objects
        sizes = ((2, fixed or 22, 5), (3, fixed or 15, 3))
        return Exportable(
            model=model.eval(),
            examples=[_example(config, *size) for size in sizes],
            dynamic_shapes=(objects, objects, batches, steps),
            input_names=("crops", "cells", "target", "scanpath"),
            output_names=("logits",),
        )

    def contenders(self, settings: OatSettings) -> list[Contender]:
        """Drawing paths together and one by one; the network beside torch's layers."""
        return oat_bench.contenders(settings.model)

    def stages(self, settings: OatSettings) -> Mapping[str, Callable[[], object]]:
        """From a picture to scanpaths."""
        return oat_bench.stages(settings.model)


def read_table(path: Path) -> Tensor:
    """A position table; nothing of a file is executed.

    Raises:
        InputError: It is no table of numbers.
    """
    table = load_array(path)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.floating):
        raise InputError(f"must be rows x channels of numbers, got {table.shape}", path=path)
    if not np.isfinite(table).all():
        raise InputError("holds NaN or infinity", path=path, remedy="get the file again")
    return torch.from_numpy(table).float()


def _example(config: OatConfig, batch: int, objects: int, steps: int) -> tuple[Tensor, ...]:
    columns = 5
    index = torch.arange(objects)
    cells = torch.stack([index // columns, index % columns], dim=-1)
    return (
        torch.rand(batch, objects, 3, *config.crop),
        cells.expand(batch, -1, -1).contiguous(),
        torch.randint(objects, (batch,)),
        torch.randint(objects, (batch, steps)),
    )


RECIPE = OatRecipe()
