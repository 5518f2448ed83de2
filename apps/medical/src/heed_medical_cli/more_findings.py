"""The recipe of a fine-tuned MoRE: findings from an X-ray, an ECG or both (arXiv 2410.16239).

A finding is present or absent: the paper's grades of edema (0 to 3) are out of scope. "Severe
edema" against the rest can be a finding of its own, in a column that --data.labels names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_medical.more import More, MoreClassifier, MoreConfig, TowerConfig, small_config
from heed_medical.more.attribution import finding_maps
from heed_medical.more.batches import Augmentation, join
from heed_medical.more.checking import check_studies
from heed_medical.more.sample import write_sample
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import (
    GREY_MEAN,
    GREY_STD,
    Study,
    StudyFile,
    StudySet,
    find_inputs,
    find_studies,
    list_studies,
    subjects_in_several_splits,
)
from heed_medical_cli.findings_recipe import FindingBatch, FindingsModule, FindingsRecipe
from heed_medical_cli.findings_report import named
from heed_medical_cli.leaks import warn_of_leaks
from heed_medical_cli.more import LAYOUT, MoreSettings
from heed_medical_cli.more import RECIPE as PRETRAINING
from heed_medical_cli.more_parts import (
    ToldStudies,
    TowerTraining,
    adam_with_restarts,
    bench_inputs,
    exportable,
    input_shapes,
    skipped_inputs,
    skipped_rows,
)
from heed_medical_cli.more_pictures import Relevance, draw_relevance
from heed_runtime.recipe import Card, Check, Contender, Explanation, Exportable
from heed_runtime.run import load_weights
from heed_runtime.settings import TrainerSettings, load_settings

Input = Literal["xray", "ecg"]


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """All that is needed to rebuild the network."""

    more: MoreConfig = field(default_factory=MoreConfig)
    """The towers; those of the pre-trained run where one is given, apart from the keys that are
    dropped."""
    inputs: tuple[Input, ...] = ("xray", "ecg")
    """What is seen: xray, ecg or both."""
    findings: int = 2
    """Taken from the data."""
    dropout: float | None = None
    """Before the last layer. None: as in the paper, 0.2 where both modalities are seen, 0.1 where
    one is."""
    ecg_drop: float = 0.3
    """Probability of hiding the ECGs of a batch in training, where both are seen."""

    def __post_init__(self) -> None:
        if not self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise ValueError(f"inputs must be xray, ecg or both, got {self.inputs}")
        if self.findings < 1:
            raise ValueError(f"findings must be at least 1, got {self.findings}")
        for name in ("dropout", "ecg_drop"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0, below 1, got {value}")

    @property
    def head_dropout(self) -> float:
        """The dropout before the last layer."""
        if self.dropout is not None:
            return self.dropout
        return 0.2 if len(self.inputs) > 1 else 0.1


@dataclass(frozen=True, kw_only=True)
class TuningTraining(TowerTraining):
    """The loss and its minimisation; the defaults are the paper's."""

    start_from: Path | None = None
    """A run of `train more` whose towers and projectors are taken over. None: random ones."""
    trained_blocks: int | None = 3
    """Of how many last blocks query, key and value are trained, besides projectors and head; 0:
    the towers rest; None: everything is trained."""
    certain_only: bool = False
    """Whether studies with an uncertain finding (-1) are left out of all splits, as in the released
    code; without it only the finding is, or what data.uncertain says."""
    weight_decay: float = 0.02
    restart_epochs: int = 5
    """Epochs of one half cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_blocks is not None and self.trained_blocks < 0:
            raise ValueError(f"trained_blocks must not be negative, got {self.trained_blocks}")


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """All settings."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: MoreData = field(default_factory=MoreData)
    training: TuningTraining = field(default_factory=TuningTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if self.trainer.batch < 2:
            raise ValueError(f"trainer.batch must be at least 2, got {self.trainer.batch}")
        if self.training.certain_only and self.data.uncertain != "leave-out":
            raise ValueError(
                f"data.uncertain has no effect with training.certain_only, got "
                f"{self.data.uncertain!r}"
            )


def small() -> TuningSettings:
    """For a laptop: the small towers; everything is trained, as there may be nothing to start from.

    Give --training.start-from RUN to begin with what `train more` has learnt.
    """
    return TuningSettings(
        model=ClassifierConfig(more=small_config()),
        data=MoreData(equalise=False),
        training=TuningTraining(
            learning_rate=1e-3,
            trained_blocks=None,
            restart_epochs=15,
            augmentation=Augmentation(crop=0.0, tone=0.0, blur=0.0, ecg=False),
        ),
        trainer=TrainerSettings(max_epochs=15, batch=16),
    )


def paper() -> TuningSettings:
    """The published sizes and recipe; give the pre-trained run with --training.start-from."""
    return TuningSettings(
        model=ClassifierConfig(more=MoreConfig(tower=TowerConfig(key_drop=0.2))),
        training=TuningTraining(certain_only=True),
        trainer=TrainerSettings(max_epochs=20, batch=64, patience=3),
    )


class TuningModule(FindingsModule[Study]):
    """Loss, optimiser and validation; the mean area of the validation selects the weights."""

    without_area = 0.5

    def __init__(self, model: MoreClassifier, settings: TuningSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        if settings.training.trained_blocks is not None:
            model.train_only_last(settings.training.trained_blocks)

    def on_train_epoch_start(self) -> None:
        """Where towers rest, so do the running means of their stems."""
        if self.settings.training.trained_blocks is not None:
            for name in self.model.inputs:
                getattr(self.model, name).stem.eval()

    def batch_logits(self, batch: FindingBatch) -> Tensor:
        """The scores of a batch of studies."""
        logits: Tensor = self.model(**{name: batch[name] for name in self.model.inputs})
        return logits

    def case_logits(self, cases: Sequence[Study]) -> Tensor:
        """The scores of studies."""
        logits: Tensor = self.model(**self.inputs_of(cases))
        return logits

    def labels_of(self, case: Study) -> tuple[float, ...] | None:
        """What is known of a study."""
        return named(case.file.labels, self.settings.data.labels) if case.file.labels else None

    def patient_of(self, case: Study) -> str:
        """Whose study it is."""
        return case.file.subject

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, half cosines that start again."""
        return adam_with_restarts(self.model, self.settings.training)

    def inputs_of(self, cases: Sequence[Study]) -> dict[str, Tensor]:
        """What the network sees of some studies."""
        batch = join(cases).to(self.device)
        return {name: getattr(batch, name) for name in self.model.inputs}


class MoreFindingsRecipe(FindingsRecipe[TuningSettings, Study]):
    """Tell which findings a study has."""

    card: ClassVar[Card] = Card(
        name="more-findings",
        title="MoRE fine-tuned: findings from an X-ray, an ECG or both",
        task="multi-label classification of X-rays and ECGs",
        reads=("csv and jsonl manifests", "PTB-XL", "WFDB ECGs", "png, jpg and DICOM X-rays"),
        writes="json of the probability of each finding",
        paper="Thapa et al., 2024, arXiv 2410.16239",
        layout=LAYOUT,
        verified="the towers and projectors of more; exact parameter count of the published head",
        trained="52 studies of its sample, 6 epochs: macro AUC 0.992 from a run of more, 0.73 from "
        "random towers",
        reproduced="none: MIMIC-CXR and MIMIC-IV-ECG are not public",
        notice="research use only: not a medical device",
    )
    settings: ClassVar[type[TuningSettings]] = TuningSettings
    presets: ClassVar[Mapping[str, Callable[[], TuningSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/macro_auc", "max")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error", "data.manifest", "data.root", "data.ptbxl_rate", "data.uncertain",
        "data.blank", "data.missing_leads", "data.ecg_part", "data.relevance",
    )  # fmt: skip

    def sample(self, out: Path, *, seed: int) -> None:
        """Made-up studies of eight findings."""
        write_sample(out, seed=seed)

    def check(self, settings: TuningSettings, root: Path) -> Check:
        """Read every X-ray and ECG."""
        found = check_studies(settings.data, root, samples=settings.model.more.ecg_samples)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: TuningSettings, root: Path) -> TuningSettings:
        """Take the towers from the pre-trained run, inputs and findings from the data."""
        model, data = settings.model, settings.data
        if settings.training.start_from is not None:
            before = pretrained(settings.training.start_from)
            own = model.more.tower
            dropping = {"key_drop": own.key_drop, "schedule": own.schedule}
            tower = replace(before.model.tower, **dropping)  # type: ignore[arg-type]
            model = replace(model, more=replace(before.model, tower=tower))
            data = replace(data, equalise=before.data.equalise, ecg_part=before.data.ecg_part)
        warn_of_leaks(root, subjects_in_several_splits(list_studies(root, data).studies))
        train = find_studies(root, data, "train")
        there = {name for study in train for name in study.modalities}
        inputs = tuple(name for name in model.inputs if name in there)
        if not inputs:
            raise InputError(f"has no training study with {' or '.join(model.inputs)}", path=root)
        labels = data.labels or tuple(train[0].labels)
        seen = [study for study in train if set(inputs) <= set(study.modalities)]
        if settings.training.certain_only:
            seen = _certain(seen, labels)
        for name in labels:
            if len({study.labels.get(name) for study in seen} & {0, 1}) < 2:
                raise InputError(
                    f"has no training study with and without {name} that has "
                    f"{' and '.join(inputs)}",
                    path=root,
                    remedy="name the findings to learn with --data.labels",
                )
        if not labels:
            raise InputError(
                "names no finding", path=root, remedy="name its columns with --data.labels"
            )
        model = replace(model, inputs=inputs, findings=len(labels))
        return replace(settings, model=model, data=replace(data, labels=labels))

    def train_data(self, settings: TuningSettings, root: Path) -> StudySet:
        """The training studies that have all inputs."""
        return self.cases(settings, root, "train")

    def augment(
        self, settings: TuningSettings
    ) -> Callable[[Study, np.random.Generator], Study] | None:
        """Crops, tones and blurs of X-rays, warps of ECGs."""
        return settings.training.augmentation

    def collate(self, samples: list[Study]) -> FindingBatch:
        """Put studies together."""
        batch = join(samples)
        seen = {"xray": batch.xray, "ecg": batch.ecg}
        names = tuple(samples[0].file.labels)
        found = {name: tensor for name, tensor in seen.items() if tensor is not None}
        return found | {"findings": _labels(samples, names)}

    def cases(self, settings: TuningSettings, root: Path, split: str) -> StudySet:
        """The studies of a split that have all inputs."""
        files = find_studies(root, settings.data, split)
        if settings.training.certain_only:
            files = _certain(files, settings.data.labels)
            if not files:
                raise InputError(
                    f"has no study of the split {split!r} without an uncertain finding", path=root
                )
        skipped = skipped_rows(settings.data, root)
        return _studies(settings, files, root, skipped, f"{root}, {split}")

    def inputs(self, settings: TuningSettings, paths: Sequence[Path]) -> StudySet:
        """Studies of manifests, pictures and records that have all inputs."""
        data = replace(settings.data, labels=(), cache_mb=0)
        files = [replace(file, labels={}) for file in find_inputs(paths, data)]
        return _studies(settings, files, paths[0], skipped_inputs(data, paths), "inputs")

    def model(self, settings: TuningSettings) -> MoreClassifier:
        """The network."""
        config = settings.model
        return MoreClassifier(
            config.more,
            classes=config.findings,
            inputs=config.inputs,
            dropout=config.head_dropout,
            ecg_drop=config.ecg_drop,
        )

    def start(self, settings: TuningSettings, root: Path, model: nn.Module) -> None:
        """Take over the towers and projectors of the pre-trained run."""
        assert isinstance(model, MoreClassifier)
        folder = settings.training.start_from
        if folder is None:
            return
        before = More(pretrained(folder).model)
        load_weights(before, folder / "model" / "model.safetensors")
        try:
            model.start_from(before)
        except ValueError as error:
            raise InputError(str(error), path=folder) from None

    def module(self, settings: TuningSettings, model: nn.Module) -> TuningModule:
        """The network with its loss."""
        assert isinstance(model, MoreClassifier)
        return TuningModule(model, settings)

    def findings(self, settings: TuningSettings) -> tuple[str, ...]:
        """Their names."""
        return settings.data.labels

    def explain(
        self, settings: TuningSettings, module: L.LightningModule, case: Study
    ) -> Explanation:
        """Relevance of patches and of time for the most probable finding."""
        assert isinstance(module, TuningModule)
        prediction = module.predict_step([case], 0)[0]
        target = int(np.argmax(prediction.probabilities))
        inputs, kind = module.inputs_of([case]), settings.data.relevance
        arrays = finding_maps(module.model, inputs, target, relevance=kind)
        found = Relevance()
        if "xray" in arrays and case.xray is not None:
            found = replace(found, xray=(case.xray * GREY_STD + GREY_MEAN, arrays["xray"]))
        if "ecg" in arrays and case.ecg is not None:
            found = replace(found, ecg=(case.ecg, arrays["ecg"]))
        arrays |= {
            "probabilities": np.array(prediction.probabilities),
            "findings": np.array(settings.data.labels),
            "explained": np.array(settings.data.labels[target]),
        }
        figures = {"relevance": draw_relevance(found)}
        return Explanation(name=case.name, arrays=arrays, figures=figures)

    def exportable(self, settings: TuningSettings, model: nn.Module) -> Exportable:
        """X-rays and ECGs to the scores of findings."""
        assert isinstance(model, MoreClassifier)
        return exportable(by_place(model), settings.model.more, model.inputs, ("logits",))

    def contenders(self, settings: TuningSettings) -> list[Contender]:
        """The classifier; `bench more` compares its towers."""
        config = settings.model.more
        count = min(settings.trainer.batch, 8)
        sizes = [(count, *shape) for shape in input_shapes(config, settings.model.inputs)]
        return [
            Contender(
                name=f"MoRE classifier ({' + '.join(settings.model.inputs)})",
                build=partial(_built, settings),
                inputs=partial(bench_inputs, sizes),
                loss=torch.Tensor.mean,
                items=count,
            )
        ]


class OfOne(nn.Module):
    """The classifier of one modality, with its input by place."""

    def __init__(self, model: MoreClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, first: Tensor) -> Tensor:
        """Scores of the findings."""
        logits: Tensor = self.model(**{self.model.inputs[0]: first})
        return logits


class OfTwo(OfOne):
    """The classifier of both modalities, with its inputs by place."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        """Scores of the findings."""
        logits: Tensor = self.model(**dict(zip(self.model.inputs, (first, second), strict=True)))
        return logits


def by_place(model: MoreClassifier) -> nn.Module:
    """The classifier with its inputs by place instead of by name."""
    return OfOne(model) if len(model.inputs) == 1 else OfTwo(model)


def pretrained(folder: Path) -> MoreSettings:
    """The settings of a run of `train more`.

    Raises:
        InputError: The folder is no run, or one of another system.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(
            "is no run of more: it has no config.yaml",
            path=folder,
            remedy="give the folder that `train more` wrote",
        )
    settings: MoreSettings = load_settings(PRETRAINING, file=path)
    return settings


def _studies(
    settings: TuningSettings,
    files: Sequence[StudyFile],
    root: Path,
    skipped: Sequence[str],
    place: str,
) -> ToldStudies:
    """Those of the studies that have all inputs; texts are not looked at."""
    wanted = settings.model.inputs
    kept = [file for file in files if set(wanted) <= set(file.modalities)]
    if not kept:
        raise InputError(f"has no study with {' and '.join(wanted)}", path=root)
    hidden: dict[str, Any] = {name: None for name in ("xray", "ecg") if name not in wanted}
    kept = [replace(file, report=("", ""), **hidden) for file in kept]
    return ToldStudies(
        kept,
        settings.data,
        settings.model.more,
        skipped=skipped,
        place=place,
        whole=len(files),
        needed=" and ".join(wanted),
    )


def _certain(files: Sequence[StudyFile], findings: Sequence[str]) -> list[StudyFile]:
    """The studies of which none of the findings is uncertain."""
    return [file for file in files if not set(findings) & set(file.uncertain)]


def _labels(cases: Sequence[Study], names: Sequence[str]) -> Tensor:
    return torch.tensor([named(case.file.labels, names) for case in cases])


def _built(settings: TuningSettings) -> nn.Module:
    return by_place(RECIPE.model(settings))


RECIPE = MoreFindingsRecipe()
