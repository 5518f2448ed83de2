"""The recipe of attention as Pavlovian conditioning (arXiv 2508.08289).

What is trained are layers of attention that recall; what is predicted are learning curves of users'
experiments under the rules of learning and in the trained layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from heed_core import observe
from heed_core.errors import InputError
from heed_neuro.conditioning.capacity import capacity_rows
from heed_neuro.conditioning.conditioner import Conditioner
from heed_neuro.conditioning.designs import Design, find_designs, read_design, write_design
from heed_neuro.conditioning.experiments import Experiment, conditioner_of, run_experiment
from heed_neuro.conditioning.phenomena import EMERGES, EXTRAS, PHENOMENA, Phenomenon
from heed_neuro.conditioning.probe import (
    Episode,
    ProbeConfig,
    RecallProbe,
    RecallTask,
    design_strengths,
    draw_episode,
    in_tokens,
    probe_vectors,
    recall_error,
    schedule_tokens,
    stack_episodes,
)
from heed_neuro.conditioning.rules import RULES, Rule
from heed_neuro_cli.conditioning_bench import delta_contenders
from heed_neuro_cli.conditioning_pictures import (
    draw_associations,
    draw_attention,
    draw_capacity,
    draw_curves,
    draw_effects,
)
from heed_runtime.files import write_csv
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
from heed_runtime.report import save_figure
from heed_runtime.settings import TrainerSettings

HELD_OUT = 1_000_000_000
"""Seeds of the episodes of validation begin here."""

LAYER = "layer "
"""Before the kind of a trained layer, to tell it from the rule of that name."""

LAYOUT = """\
FOLDER/*.yaml   an experiment each; sub-folders too; the same for every split
  title: Blocking
  groups:
    blocking: 20 A+ | 20 AB+ | B?
    control: 20 AB+ | B?
  expected: [{rule: delta, group: blocking, cue: B, value: 0.06}]     (not needed)

20 A+   20 trials: cue A, then the US       A-     no US        A:0.5  half a US      A?   a test
A>3+    the US 3 steps after the cue        B>A    cue A follows cue B
a , b   one after the other                 a / b  alternating  shuffled a, b        | next phase"""


@dataclass(frozen=True, kw_only=True)
class ConditioningData:
    """How animals learn that go through the experiments."""

    rules: tuple[Rule, ...] = RULES
    """Rules of learning; an experiment may name its own."""
    eta: float = 0.1
    """Rate of learning, above 0 and at most 1."""
    decay: float = 0.95
    """What is left after a step, with the rules trace and gated-delta."""
    cues: str = "orthonormal"
    """Vectors of cues: orthonormal, random, or overlap:RHO."""
    d_k: int = 8
    """Channels of the cues."""
    seed: int = 0
    """Of random cues and of shuffled phases."""
    capacity_widths: tuple[int, ...] = (64, 256)
    """Widths d_k at which `evaluate` simulates the capacity."""
    capacity_repeats: int = 20
    """Draws per width and load."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with a file that cannot be read."""

    def __post_init__(self) -> None:
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules must be different rules, at least one, got {self.rules}")
        if not self.capacity_widths or min(*self.capacity_widths, self.capacity_repeats) < 1:
            raise ValueError("capacity_widths and capacity_repeats must be at least 1")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        _ = self.conditioners  # refuses what no rule can use

    @property
    def conditioners(self) -> list[Conditioner]:
        """One per rule."""
        options = {name: getattr(self, name) for name in ("eta", "cues", "d_k", "seed")}
        return [conditioner_of(rule, decay=self.decay, **options) for rule in self.rules]


@dataclass(frozen=True, kw_only=True)
class ConditioningTraining:
    """What the layers learn to recall, and how."""

    task: RecallTask = field(default_factory=RecallTask)
    episodes: int = 1024
    """Sequences of an epoch."""
    validation_episodes: int = 64
    """Sequences of a validation."""
    learning_rate: float = 1e-2
    """Of Adam, at the start; falls to 0 on half a cosine."""

    def __post_init__(self) -> None:
        if min(self.episodes, self.validation_episodes) < 1:
            raise ValueError("episodes and validation_episodes must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class ConditioningSettings:
    """All settings of attention as conditioning."""

    model: ProbeConfig = field(default_factory=ProbeConfig)
    data: ConditioningData = field(default_factory=ConditioningData)
    training: ConditioningTraining = field(default_factory=ConditioningTraining)
    trainer: TrainerSettings = field(
        default_factory=lambda: TrainerSettings(max_epochs=6, batch=32, device="cpu")
    )


def large() -> ConditioningSettings:
    """Wider layers, four times the pairs, trained longer."""
    return ConditioningSettings(
        model=ProbeConfig(d_k=64, d_v=16, head_dim=64),
        training=ConditioningTraining(task=RecallTask(pairs=48), episodes=4096),
        trainer=TrainerSettings(max_epochs=30, batch=32, device="auto"),
    )


@dataclass(frozen=True)
class Episodes:
    """Sequences of recall, drawn when they are asked for."""

    settings: ConditioningSettings
    count: int
    first_seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Episode:
        model = self.settings.model
        seed = self.first_seed + index
        return draw_episode(self.settings.training.task, model.d_k, model.d_v, seed=seed)


@dataclass(frozen=True)
class Designs:
    """Experiments in files; each is read when it is asked for."""

    entries: Sequence[tuple[str, Path]]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """In order."""
        return [name for name, _ in self.entries]

    def __getitem__(self, index: int) -> Design:
        name, path = self.entries[index]
        return replace(read_design(path), name=name)


@dataclass(frozen=True, kw_only=True)
class ConditioningPrediction:
    """What animals and trained layers have learnt in one experiment."""

    name: str
    experiment: Experiment
    layers: Sequence[Mapping[str, Any]]
    """Rows of strengths in the trained layers."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Strengths at the end, of rules and layers."""
        return [*self.experiment.strengths(), *map(dict, self.layers)]


class ConditioningModule(L.LightningModule):
    """Layers that learn to recall."""

    def __init__(self, model: RecallProbe, settings: ConditioningSettings) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Episode, _: int) -> Tensor:
        """The sum of the layers' errors: they share no parameters, so each learns by itself."""
        losses = self._losses(batch)
        values = {f"train/{kind}": value for kind, value in losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        values["train/recall_error"] = loss / len(losses)
        self.log_dict(
            values, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch.keys)
        )
        return loss

    def validation_step(self, cases: list[Design], _: int) -> None:
        """Experiments select no weights: only recall does, see `on_validation_epoch_end`."""

    def on_validation_epoch_end(self) -> None:
        """Log the error of recall on held-out sequences."""
        count = self.settings.training.validation_episodes
        episodes = Episodes(self.settings, count, HELD_OUT)
        batch = stack_episodes([episodes[index] for index in range(count)]).to(self.device)
        losses = self._losses(batch)
        self.log_dict({f"val/{k}": x for k, x in losses.items()}, sync_dist=True)
        mean = torch.stack(list(losses.values())).mean()
        self.log("val/recall_error", mean, prog_bar=True, sync_dist=True)

    def predict_step(self, cases: list[Design], _: int) -> list[ConditioningPrediction]:
        """Run whole experiments."""
        return [self._predict(design) for design in cases]

    def configure_optimizers(self) -> Any:
        """Adam, half a cosine per step."""
        adam = torch.optim.Adam(self.model.parameters(), lr=self.settings.training.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=max(steps, 1))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _losses(self, batch: Episode) -> dict[str, Tensor]:
        answers = self.model(batch.keys, batch.told)
        found: dict[str, Tensor] = {}
        for kind, answer in zip(self.model.config.kinds, answers, strict=True):
            found[kind] = recall_error(answer, batch)
        return found

    def _predict(self, design: Design) -> ConditioningPrediction:
        experiment = run_experiment(design, self.settings.data.conditioners)
        layers: list[dict[str, Any]] = []
        if design.layers == 1:
            found = design_strengths(self.model, design, layer_cues(self.settings, design))
            layers = [
                {
                    "group": group,
                    "cue": cue,
                    "rule": f"{LAYER}{kind}",
                    "strength": float(values[-1, index]),
                    "expected": None,
                    "difference": None,
                }
                for kind in self.model.config.kinds
                for group, by_kind in found.items()
                for values in (by_kind[kind],)
                for index, cue in enumerate(design.all_cues)
            ]
        return ConditioningPrediction(name=design.name, experiment=experiment, layers=layers)


def layer_cues(settings: ConditioningSettings, design: Design) -> Conditioner:
    """Whose cue vectors the layers are shown: those of the experiment, in the layers' width."""
    data = settings.data
    plain = Conditioner(cues=data.cues, seed=data.seed, d_k=settings.model.d_k)
    return replace(plain, cues=str(design.conditioner.get("cues", data.cues)))


class ConditioningRecipe(Recipe[ConditioningSettings, Design, ConditioningPrediction]):
    """Condition animals and layers of attention."""

    card: ClassVar[Card] = Card(
        name="conditioning",
        title="Attention as Pavlovian conditioning",
        task="learning curves of conditioning under rules that are attentions; what trained layers "
        "make of the same schedules",
        reads=("schedules in YAML", "schedules typed on the command line (simulate)"),
        writes="csv of learning curves and strengths, png",
        paper="Qiao, arXiv 2508.08289",
        layout=LAYOUT,
        verified="equal to independent float64 recurrences, trial by trial and with gradients",
        trained="recall of 12 pairs by layers of five kinds, in a minute on a CPU",
        reproduced="closed forms of all phenomena within 1e-4; capacity within 0.01",
    )
    settings: ClassVar[type[ConditioningSettings]] = ConditioningSettings
    presets: ClassVar[Mapping[str, Callable[[], ConditioningSettings]]] = {
        "small": ConditioningSettings,
        "large": large,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/recall_error", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.rules",
        "data.eta",
        "data.decay",
        "data.cues",
        "data.d_k",
        "data.seed",
        "data.capacity_widths",
        "data.capacity_repeats",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """A file for each phenomenon, with what theory expects; the seed changes nothing."""
        designs = [*(item.design for item in PHENOMENA.values()), *EXTRAS]
        for number, design in enumerate(designs, start=1):
            write_design(design, out / f"{number:02d}-{design.name}.yaml")

    def check(self, settings: ConditioningSettings, root: Path) -> Check:
        """Read and run every experiment."""
        counts: list[Row] = []
        problems = []
        for name, path in find_designs([root]):
            try:
                design = read_design(path)
                run_experiment(design, settings.data.conditioners)
            except InputError as error:
                problems.append(str(error))
                continue
            schedules = design.schedules.values()
            counts.append(
                {
                    "experiment": name,
                    "groups": len(design.groups),
                    "cues": " ".join(design.all_cues),
                    "trials": sum(map(len, schedules)),
                    "layers": design.layers,
                    "expected": len(design.expected),
                }
            )
        return Check(counts=counts, problems=problems)

    def train_data(self, settings: ConditioningSettings, root: Path) -> Episodes:
        """Sequences of recall: drawn, not read; experiments are what the layers are tested on."""
        return Episodes(settings, settings.training.episodes, settings.trainer.seed * 1_000_003)

    def collate(self, samples: list[Episode]) -> Episode:
        """A batch."""
        return stack_episodes(samples)

    def cases(self, settings: ConditioningSettings, root: Path, split: str) -> Designs:
        """The experiments, the same for every split: nothing is trained on them."""
        return Designs(find_designs([root]))

    def inputs(self, settings: ConditioningSettings, paths: Sequence[Path]) -> Designs:
        """The experiments in files and folders."""
        return Designs(find_designs(paths))

    def model(self, settings: ConditioningSettings) -> RecallProbe:
        """The layers."""
        return RecallProbe(settings.model)

    def module(self, settings: ConditioningSettings, model: nn.Module) -> ConditioningModule:
        """The layers with their loss."""
        assert isinstance(model, RecallProbe)
        return ConditioningModule(model, settings)

    def write_prediction(
        self, settings: ConditioningSettings, prediction: ConditioningPrediction, out: Path
    ) -> list[Path]:
        """Learning curves and strengths as csv, curves as a picture."""
        stem = out / prediction.name
        stem.parent.mkdir(parents=True, exist_ok=True)
        return write_experiment(prediction.experiment, prediction.rows, stem)

    def score(
        self, settings: ConditioningSettings, prediction: ConditioningPrediction
    ) -> list[Row]:
        """Strengths beside what is expected."""
        return [{"case": prediction.name, **row} for row in prediction.rows]

    def report(self, settings: ConditioningSettings, rows: Sequence[Row]) -> Report:
        """The tables of phenomena and of capacity, ours beside theory."""
        data = settings.data
        capacity = capacity_rows(
            data.capacity_widths, repeats=data.capacity_repeats, seed=data.seed
        )
        judged = [row for row in rows if row["expected"] is not None]
        learners = [*data.rules, *(f"{LAYER}{kind}" for kind in settings.model.kinds)]
        effects = effect_table(rows, learners)
        metrics = {
            "capacity_cosine_error": _worst(capacity, "cosine", "cosine theory"),
            "capacity_bit_error_error": _worst(capacity, "bit error", "bit error theory"),
            **emergence(effects, learners),
        }
        if judged:
            metrics = {"theory_error": _worst(judged, "strength", "expected"), **metrics}
        tables = [
            Table(title="strengths beside theory", rows=judged),
            Table(title="effects", rows=effects),
            Table(title="capacity", rows=capacity),
        ]
        plots = {"capacity": draw_capacity(capacity)}
        if effects:
            plots["effects"] = draw_effects(effects, learners)
        return Report(
            metrics=metrics, tables=[table for table in tables if table.rows], plots=plots
        )

    def explain(
        self, settings: ConditioningSettings, module: L.LightningModule, case: Design
    ) -> Explanation:
        """Associations after each trial, and the attention of the layers to stored trials."""
        assert isinstance(module, ConditioningModule)
        experiment = run_experiment(case, settings.data.conditioners)
        arrays = {
            f"associations {rule} {group}": simulation.associations.detach().numpy()
            for rule, groups in experiment.found.items()
            for group, simulation in groups.items()
        }
        figures: dict[str, Any] = {"associations": draw_associations(experiment)}
        if case.layers == 1 and (weights := attention_to_trials(module.model, settings, case)):
            arrays |= {
                f"attention {kind} {group}": values
                for group, kinds in weights.items()
                for kind, values in kinds.items()
            }
            figures["attention"] = draw_attention(weights, case.title)
        return Explanation(name=case.name, arrays=arrays, figures=figures)

    def exportable(self, settings: ConditioningSettings, model: nn.Module) -> Exportable:
        """The layers: keys and values in, the answers of each kind out."""
        assert isinstance(model, RecallProbe)
        auto, config = torch.export.Dim.AUTO, settings.model
        sizes = ((2, 40), (3, 70))
        kinds = [kind.replace("-", "_") for kind in config.kinds]
        solves = any(kind in ("delta", "gated-delta") for kind in config.kinds)
        refused = {"onnx": "ONNX solves no triangular system, as the delta layers do"}
        return Exportable(
            model=model.eval(),
            examples=[
                (torch.randn(b, n, config.d_k), torch.randn(b, n, config.d_v)) for b, n in sizes
            ],
            dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}),
            input_names=("keys", "values"),
            output_names=tuple(f"answers_{kind}" for kind in kinds),
            refused=refused if solves else {},  # type: ignore[arg-type]
        )

    def contenders(self, settings: ConditioningSettings) -> list[Contender]:
        """The delta rule in its forms, and who else computes it."""
        return delta_contenders()

    def stages(self, settings: ConditioningSettings) -> Mapping[str, Callable[[], object]]:
        """From a schedule to curves."""
        design = PHENOMENA["blocking"].design
        conditioner = Conditioner()
        experiment = run_experiment(design, [conditioner])
        return {
            "read the schedules": lambda: design.schedules,
            "learn": partial(run_experiment, design, [conditioner]),
            "tables": lambda: (experiment.curves, experiment.strengths()),
        }


def write_experiment(
    experiment: Experiment, strengths: Sequence[Mapping[str, Any]], stem: Path
) -> list[Path]:
    """Write `<stem>_curves.csv`, `<stem>_strengths.csv` and `<stem>.png`."""
    curves: pd.DataFrame = experiment.curves
    files = [
        write_csv(stem.with_name(f"{stem.name}_curves.csv"), curves.to_dict("records")),
        write_csv(stem.with_name(f"{stem.name}_strengths.csv"), strengths),
    ]
    return [*files, save_figure(draw_curves(experiment), stem.with_name(f"{stem.name}.png"))]


def phenomenon_of(name: str) -> Phenomenon | None:
    """The phenomenon that an experiment of the sample shows; None for a user's own."""
    return PHENOMENA.get(name.rpartition("/")[2].partition("-")[2])


def effect_table(rows: Sequence[Row], learners: Sequence[str]) -> list[dict[str, Any]]:
    """The effect of each phenomenon in each rule and layer, from rows of strengths."""
    found: dict[str, dict[tuple[str, str, str], float]] = {}
    for row in rows:
        strengths = found.setdefault(str(row["case"]), {})
        place = (str(row["rule"]), str(row["group"]), str(row["cue"]))
        strengths[place] = float(row["strength"] or 0.0)
    table = []
    for name, strengths in found.items():
        item = phenomenon_of(name)
        if item is None or item.shown is None or item.control is None:
            continue
        line: dict[str, Any] = {"phenomenon": item.name}
        for learner in learners:
            there = (learner, *item.shown) in strengths and (learner, *item.control) in strengths
            sensible = in_tokens(item) or not learner.startswith(LAYER)
            line[learner] = (
                item.effect_of(partial(_strength, strengths, learner))
                if there and sensible
                else None
            )
        table.append(line)
    return table


def _strength(
    strengths: Mapping[tuple[str, str, str], float], learner: str, group: str, cue: str
) -> float:
    return strengths[learner, group, cue]


def emergence(effects: Sequence[Mapping[str, Any]], learners: Sequence[str]) -> dict[str, float]:
    """Of each learner, the share of the defined effects that it shows."""
    shares = {}
    for learner in learners:
        values = [row[learner] for row in effects if row.get(learner) is not None]
        if values:
            shown = [value >= EMERGES for value in values]
            shares[f"shown_{learner.replace(' ', '_')}"] = float(np.mean(shown))
    return shares


def _worst(rows: Sequence[Mapping[str, Any]], ours: str, theory: str) -> float:
    return max(abs(float(row[ours]) - float(row[theory])) for row in rows)


@torch.no_grad()
def attention_to_trials(
    model: RecallProbe, settings: ConditioningSettings, design: Design
) -> dict[str, dict[str, np.ndarray]]:
    """Group -> kind of layer -> what each trial reads of each trial before it."""
    conditioner = layer_cues(settings, design)
    vectors = probe_vectors(model.config, conditioner, design.all_cues)
    device = next(model.parameters()).device
    weights: dict[str, dict[str, np.ndarray]] = {}
    for group, schedule in design.schedules.items():
        tokens = schedule_tokens(
            schedule, design.all_cues, vectors, model.config.d_v, seed=conditioner.seed
        )
        if not len(tokens.keys):
            continue
        with observe(model) as record:
            model(tokens.keys[None].to(device), tokens.values[None].to(device))
        weights[group] = {
            kind: record[f"layers.{kind}.{'attend' if kind == 'softmax' else 'probe'}"][0, 0]
            .float()
            .cpu()
            .numpy()
            for kind in model.config.kinds
        }
    return weights


RECIPE = ConditioningRecipe()
