"""The recipe of MoRE: contrastive pre-training on X-rays, ECGs and reports (arXiv 2410.16239)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_medical.more import MODALITIES, More, MoreConfig, gather_rows, pair_losses, small_config
from heed_medical.more.attribution import ecg_map, maps_text, text_map, xray_map
from heed_medical.more.batches import Augmentation, StudyBatch, join, rows_to_encode
from heed_medical.more.checking import check_studies
from heed_medical.more.prediction import (
    Asked,
    Neighbour,
    StudyPrediction,
    ask,
    retrieval_rows,
    score_row,
    write_prediction,
    zero_shot_rows,
)
from heed_medical.more.prompts import with_prompt_file
from heed_medical.more.retrieval import EmbeddingIndex
from heed_medical.more.sample import write_sample
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import (
    GREY_MEAN,
    GREY_STD,
    Study,
    StudySet,
    find_inputs,
    find_studies,
    list_studies,
    plan_studies,
    subject_names,
    subjects_in_several_splits,
)
from heed_medical.more.text import folder_config
from heed_medical.more.weights import load_official
from heed_medical_cli.leaks import warn_of_leaks
from heed_medical_cli.more_parts import (
    Embedder,
    Embedders,
    ToldStudies,
    TowerTraining,
    adam_with_restarts,
    bench_inputs,
    bench_tower,
    embedding_stages,
    exportable,
    is_installed,
    skipped_inputs,
    skipped_rows,
    timm_tower,
)
from heed_medical_cli.more_pictures import Relevance, draw_recall, draw_relevance
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
    Table,
)
from heed_runtime.settings import TrainerSettings

logger = logging.getLogger(__name__)

VALIDATION_BATCH = 512
"""Studies among which the loss of the validation is computed."""

LAYOUT = """\
manifest  manifest.csv or .jsonl, a study per row; every column may be empty:
          xray_path, ecg_path, xray_report, ecg_report, subject_id, split (train val test),
          findings (CheXpert names, 1 0 -1); also file, text, patient for X-rays with notes
PTB-XL    ptbxl_database.csv, scp_statements.csv, records100/ (folds 1-8 train, 9 val, 10 test)
X-ray     png, jpg, DICOM
ECG       WFDB (.hea and .dat), any rate, leads by name: PTB-XL, MIMIC-IV-ECG"""


@dataclass(frozen=True, kw_only=True)
class MoreTraining(TowerTraining):
    """The loss and its minimisation; the defaults are the paper's."""

    xray_ecg_weight: float = 0.0
    """Of the loss between X-ray and ECG, which the paper leaves out."""
    learn_temperature: bool = True
    """Whether the temperature is learned; the released code keeps it."""
    same_is_negative: bool = False
    """Whether studies of the same subject or with the same report are wrong answers for each other,
    as in the released code."""
    one_per_subject: bool = True
    """Whether a batch holds one study of a subject at most; not so in the released code."""
    weights: Path | None = None
    """A checkpoint of the released code to start from."""
    text_folder: Path | None = None
    """A folder of transformers with an encoder (RoBERTa, BERT, ...) and its tokenizer to start the
    text tower from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.xray_ecg_weight < 0:
            raise ValueError(f"xray_ecg_weight must not be negative, got {self.xray_ecg_weight}")


@dataclass(frozen=True, kw_only=True)
class MoreSettings:
    """All settings of MoRE."""

    model: MoreConfig = field(default_factory=small_config)
    data: MoreData = field(default_factory=MoreData)
    training: MoreTraining = field(default_factory=MoreTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        if self.trainer.batch < 2:
            raise ValueError(f"trainer.batch must be at least 2, got {self.trainer.batch}")


def small() -> MoreSettings:
    """For a laptop: small towers, a random text tower over bytes, no augmentation.

    On the sample these are 300 steps; after 200 X-rays find their ECGs less well, and so they do
    with augmented tones. A few validation studies choose the weights badly: a running average is
    less at their mercy.
    Contrast is not made even: in a small picture the tiles are as small as what is looked for.
    """
    return MoreSettings(
        data=MoreData(equalise=False),
        training=MoreTraining(
            learning_rate=1e-3,
            weight_decay=0.01,
            restart_epochs=30,
            augmentation=Augmentation(crop=0.0, tone=0.0, blur=0.0, ecg=False),
        ),
        trainer=TrainerSettings(max_epochs=30, batch=16, average=0.98),
    )


def paper() -> MoreSettings:
    """The published sizes and recipe; give the text tower with --training.text-folder."""
    return MoreSettings(
        model=MoreConfig(),
        trainer=TrainerSettings(
            max_epochs=100, batch=100, accumulate=4, patience=10, precision="16-mixed"
        ),
    )


class MoreModule(L.LightningModule):
    """Contrastive loss, optimiser and validation of MoRE."""

    def __init__(self, model: More, settings: MoreSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        if not settings.training.learn_temperature:
            model.log_temperature.requires_grad_(False)
        self._validated: list[tuple[Study, dict[str, np.ndarray]]] = []
        self._prompts: dict[str, dict[str, Asked]] | None = None
        self._index: EmbeddingIndex | None = None

    def training_step(self, batch: StudyBatch, _: int) -> Tensor:
        """The loss of a batch over all processes."""
        embeddings = {name: gather_rows(self._embed_batch(batch, name)) for name in self._names}
        valid = {name: gather_rows(batch.valid[name].long()).bool() for name in self._names}
        groups = gather_rows(batch.groups.T.contiguous()).T
        losses = self._losses(embeddings, valid, groups)
        values = {f"train/loss_{name}": loss for name, loss in losses.items()}
        values["train/temperature"] = self.model.temperature
        count = len(batch.text)
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        total = self._total(losses)
        self.log(
            "train/loss", total, on_step=False, on_epoch=True, sync_dist=True, batch_size=count
        )
        return total

    def validation_step(self, cases: list[Study], _: int) -> None:
        """Collect the embeddings of studies."""
        for case in cases:
            light = replace(case, xray=None, ecg=None)
            self._validated.append((light, self._embed(case)))

    def on_validation_epoch_end(self) -> None:
        """Log loss and recall over the studies of all processes; the loss selects the weights."""
        parts = distributed.gather(self._validated)
        found = sorted((item for part in parts for item in part), key=lambda item: item[0].name)
        self._validated = []
        if not found:
            return
        chunks = [found[i : i + VALIDATION_BATCH] for i in range(0, len(found), VALIDATION_BATCH)]
        losses = [self._validation_loss(chunk) for chunk in chunks]
        self.log("val/loss", float(np.average(losses, weights=[len(c) for c in chunks])))
        rows = [score_row(_unlabelled(case, vectors)) for case, vectors in found]
        for row in retrieval_rows(rows, ()):
            if row["from"] != "ecg" and (row["from"] == "text" or row["to"] == "ecg"):
                value = float(row["recall@1"] or 0.0)
                self.log(f"val/{row['from']}_to_{row['to']}_recall@1", value)

    def predict_step(self, cases: list[Study], _: int) -> list[StudyPrediction]:
        """Embeddings, cosines with the prompts of findings, neighbours in the index."""
        return [self._predict(case) for case in cases]

    def configure_optimizers(self) -> Any:
        """AdamW, half cosines that start again."""
        return adam_with_restarts(self.model, self.settings.training)

    @property
    def _names(self) -> list[str]:
        return [name for name in MODALITIES if name in self.model.config.modalities]

    def _embed_batch(self, batch: StudyBatch, name: str) -> Tensor:
        """Embeddings of the rows that have the modality; 0 for the others."""
        valid = batch.valid[name]
        rows = rows_to_encode(valid)
        if name == "text":
            found = self.model.embed_text([batch.text[i] for i in rows.tolist()])
        elif name == "xray":
            height, width = self.model.config.image_size
            xray = batch.xray
            if xray is None:
                xray = torch.zeros(len(valid), 3, height, width, device=valid.device)
            found = self.model.embed_xray(xray[rows])
        else:
            ecg = batch.ecg
            if ecg is None:
                shape = (len(valid), 12, self.model.config.ecg_samples)
                ecg = torch.zeros(shape, device=valid.device)
            found = self.model.embed_ecg(ecg[rows])
        empty = torch.zeros(len(valid), found.shape[1], device=found.device)
        return empty.index_copy(0, rows, found.float())

    def _losses(
        self, embeddings: Mapping[str, Tensor], valid: Mapping[str, Tensor], groups: Tensor
    ) -> dict[str, Tensor]:
        training = self.settings.training
        found = pair_losses(
            embeddings,
            valid,
            self.model.temperature,
            groups=None if training.same_is_negative else groups,
            xray_ecg=training.xray_ecg_weight > 0,
        )
        return {f"{one}_{other}": loss for (one, other), loss in found.items()}

    def _total(self, losses: Mapping[str, Tensor]) -> Tensor:
        weight = self.settings.training.xray_ecg_weight if "text" in self._names else 1.0
        parts = [loss * (weight if name == "xray_ecg" else 1.0) for name, loss in losses.items()]
        return torch.stack(parts).sum()

    def _validation_loss(self, chunk: Sequence[tuple[Study, dict[str, np.ndarray]]]) -> float:
        zero = np.zeros(self.model.config.projection, dtype=np.float32)
        embeddings, valid = {}, {}
        for name in self._names:
            rows = [vectors.get(name) for _, vectors in chunk]
            stacked = np.stack([zero if row is None else row for row in rows])
            embeddings[name] = torch.from_numpy(stacked).to(self.device)
            valid[name] = torch.tensor([row is not None for row in rows], device=self.device)
        groups = join([case for case, _ in chunk]).groups.to(self.device)
        return float(self._total(self._losses(embeddings, valid, groups)))

    def _embed(self, case: Study) -> dict[str, np.ndarray]:
        batch = join([case]).to(self.device)
        found = {}
        if case.xray is not None and batch.xray is not None:
            found["xray"] = self.model.embed_xray(batch.xray)
        if case.ecg is not None and batch.ecg is not None:
            found["ecg"] = self.model.embed_ecg(batch.ecg)
        if case.text is not None:
            found["text"] = self.model.embed_text([case.text])
        return {name: rows[0].detach().float().cpu().numpy() for name, rows in found.items()}

    def prompts(self) -> dict[str, dict[str, Asked]]:
        """Modality -> finding -> what it is asked with; empty without a text tower."""
        if self._prompts is None:
            self._prompts = {}
            data = self.settings.data
            for name in ("xray", "ecg"):
                if "text" in self._names and name in self._names:
                    asked = {
                        finding: ask(self.model, data, finding, name) for finding in data.labels
                    }
                    self._prompts[name] = asked
        return self._prompts

    def _predict(self, case: Study) -> StudyPrediction:
        vectors = self._embed(case)
        findings = {}
        for name, asked in self.prompts().items():
            if name in vectors:
                findings[name] = {f: one.score(vectors[name]) for f, one in asked.items()}
        prediction = _unlabelled(case, vectors)
        return replace(prediction, findings=findings, neighbours=self._neighbours(vectors))

    def _neighbours(self, vectors: Mapping[str, Float32[np.ndarray, " p"]]) -> list[Neighbour]:
        data = self.settings.data
        if data.index is None:
            return []
        if self._index is None:
            self._index = EmbeddingIndex.load(data.index)
            self._index.refuse_other(self.model, data.index)
        found = []
        for query, vector in vectors.items():
            for modality, names in self._index.names.items():
                cosines, rows = self._index.search(vector[None], modality, data.neighbours)
                found += [
                    Neighbour(query=query, modality=modality, name=names[row], cosine=float(cosine))
                    for cosine, row in zip(cosines[0], rows[0], strict=True)
                ]
        return found


class MoreRecipe(Recipe[MoreSettings, Study, StudyPrediction]):
    """Learn a common space of X-rays, ECGs and reports."""

    card: ClassVar[Card] = Card(
        name="more",
        title="MoRE: contrastive pre-training on X-rays, ECGs and reports",
        task="common embeddings, retrieval and zero-shot classification",
        reads=("csv and jsonl manifests", "PTB-XL", "WFDB ECGs", "png, jpg and DICOM X-rays"),
        writes="npz of embeddings, json of findings and neighbours",
        paper="Thapa et al., 2024, arXiv 2410.16239",
        layout=LAYOUT,
        verified="towers, projectors, losses, gradients and ECG preparation equal to the released "
        "code on fixed weights; exact parameter counts; the text tower by its counts only",
        trained="its sample, preset small: precision@1 by finding 1.0 from report to X-ray and to "
        "ECG, 0.91 from X-ray to ECG (chance 0.125); 353 ECGs of PTB-XL: linear probe 0.76 macro "
        "AUC on 66",
        reproduced="none: MIMIC-CXR and MIMIC-IV-ECG are not public",
        notice="research use only: not a medical device",
    )
    settings: ClassVar[type[MoreSettings]] = MoreSettings
    presets: ClassVar[Mapping[str, Callable[[], MoreSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/loss", "min")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.manifest",
        "data.root",
        "data.ptbxl_rate",
        "data.labels",
        "data.prompts",
        "data.denials",
        "data.contrast",
        "data.prompt_file",
        "data.uncertain",
        "data.blank",
        "data.missing_leads",
        "data.ecg_part",
        "data.relevance",
        "data.index",
        "data.neighbours",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """Made-up studies of eight findings."""
        write_sample(out, seed=seed)

    def check(self, settings: MoreSettings, root: Path) -> Check:
        """Read every X-ray and ECG."""
        found = check_studies(settings.data, root, samples=settings.model.ecg_samples)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: MoreSettings, root: Path) -> MoreSettings:
        """Take modalities and findings from the data, the text tower's sizes from its folder."""
        data = plan_studies(settings.data, root)
        warn_of_leaks(root, subjects_in_several_splits(list_studies(root, data).studies))
        model = replace(settings.model, modalities=data.modalities)
        if settings.training.text_folder is not None:
            text = folder_config(settings.training.text_folder, model.text)
            model = replace(model, text=text)
        return replace(settings, model=model, data=data)

    def train_data(self, settings: MoreSettings, root: Path) -> StudySet:
        """The training studies."""
        wanted = set(settings.model.modalities)
        found = find_studies(root, settings.data, "train")
        files = [file for file in found if len(wanted & set(file.modalities)) > 1]
        apart = subject_names(files) if settings.training.one_per_subject else []
        if len(set(apart)) == 1:
            raise InputError(
                "has training studies of one subject alone, and a batch holds one of a subject",
                path=root,
                remedy="--training.no-one-per-subject",
            )
        return ToldStudies(
            files,
            settings.data,
            settings.model,
            apart=apart,
            skipped=skipped_rows(settings.data, root),
            place=f"{root}, train",
            whole=len(found),
            needed="two modalities",
            may_lack=settings.model.modalities,
        )

    def augment(
        self, settings: MoreSettings
    ) -> Callable[[Study, np.random.Generator], Study] | None:
        """Crops, tones and blurs of X-rays, warps of ECGs."""
        return settings.training.augmentation

    def collate(self, samples: list[Study]) -> StudyBatch:
        """Put studies together."""
        return join(samples)

    def cases(self, settings: MoreSettings, root: Path, split: str) -> StudySet:
        """Studies with their findings."""
        files = find_studies(root, settings.data, split)
        skipped = skipped_rows(settings.data, root)
        return ToldStudies(
            files,
            settings.data,
            settings.model,
            skipped=skipped,
            place=f"{root}, {split}",
            whole=len(files),
            may_lack=settings.model.modalities,
        )

    def inputs(self, settings: MoreSettings, paths: Sequence[Path]) -> StudySet:
        """Studies of manifests, pictures, records and texts."""
        data = replace(settings.data, labels=(), cache_mb=0)
        files, skipped = find_inputs(paths, data), skipped_inputs(data, paths)
        return ToldStudies(
            files,
            data,
            settings.model,
            skipped=skipped,
            place="inputs",
            whole=len(files),
            may_lack=settings.model.modalities,
        )

    def model(self, settings: MoreSettings) -> More:
        """The network."""
        return More(settings.model)

    def start(self, settings: MoreSettings, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, More)
        if settings.training.text_folder is not None and "text" in model.config.modalities:
            model.text.load_folder(settings.training.text_folder)
        if settings.training.weights is not None:
            load_official(model, settings.training.weights)

    def module(self, settings: MoreSettings, model: nn.Module) -> MoreModule:
        """The network with its loss."""
        assert isinstance(model, More)
        return MoreModule(model, replace(settings, data=with_prompt_file(settings.data)))

    def write_prediction(
        self, settings: MoreSettings, prediction: StudyPrediction, out: Path
    ) -> list[Path]:
        """Embeddings as npz, findings and neighbours as json."""
        return write_prediction(prediction, out)

    def score(self, settings: MoreSettings, prediction: StudyPrediction) -> list[Row]:
        """Findings, cosines and embeddings."""
        return [score_row(prediction)]

    def report(self, settings: MoreSettings, rows: Sequence[Row]) -> Report:
        """Retrieval between all modalities, and zero-shot classification."""
        findings = settings.data.labels
        retrieval = retrieval_rows(rows, findings)
        zero_shot = zero_shot_rows(rows, findings)
        metrics: dict[str, float] = {}
        for row in retrieval:
            for key in (k for k in row if "@" in k or k == "median rank"):
                name = f"{row['from']}_to_{row['to']}_{key.replace(' ', '_')}"
                metrics[name] = float(cast(float, row[key]))
        for modality in ("xray", "ecg"):
            for score in ("auroc", "auprc"):
                values = [float(r[score] or 0) for r in zero_shot if r["modality"] == modality]
                known = [value for value in values if np.isfinite(value)]
                if known:
                    metrics[f"{modality}_zero_shot_{score}"] = float(np.mean(known))
        tables = [Table(title="retrieval", rows=retrieval)]
        if zero_shot:
            tables.append(Table(title="zero-shot", rows=zero_shot))
        return Report(metrics=metrics, tables=tables, plots={"recall": draw_recall(retrieval)})

    def explain(
        self, settings: MoreSettings, module: L.LightningModule, case: Study
    ) -> Explanation:
        """Relevance of patches, of time and of words for the nearness of the modalities."""
        assert isinstance(module, MoreModule)
        vectors = {
            name: torch.from_numpy(vector).to(module.device)
            for name, vector in module._embed(case).items()
        }
        batch = join([case]).to(module.device)
        model, kind = module.model, settings.data.relevance
        arrays: dict[str, np.ndarray] = {}
        found = Relevance()
        if case.xray is not None and batch.xray is not None:
            target = _target(module, vectors, "xray")
            arrays["xray"] = xray_map(model, batch.xray, target, relevance=kind)
            found = replace(found, xray=(case.xray * GREY_STD + GREY_MEAN, arrays["xray"]))
        if case.ecg is not None and batch.ecg is not None:
            target = _target(module, vectors, "ecg")
            arrays["ecg"], arrays["ecg_leads"] = ecg_map(model, batch.ecg, target, relevance=kind)
            found = replace(found, ecg=(case.ecg, arrays["ecg"]))
        if case.text is not None and not maps_text(model):
            logger.warning("the text tower shows no attention, so that words have no relevance")
        elif case.text is not None:
            target = _target(module, vectors, "text")
            words, arrays["text"] = text_map(model, case.text, target, relevance=kind)
            arrays["words"] = np.array(words)
            found = replace(found, text=(words, arrays["text"]))
        figures = {"relevance": draw_relevance(found)}
        return Explanation(name=case.name, arrays=arrays, figures=figures)

    def exportable(self, settings: MoreSettings, model: nn.Module) -> Exportable:
        """X-rays and ECGs to their embeddings; the text tower stays."""
        assert isinstance(model, More)
        names = [name for name in ("xray", "ecg") if name in settings.model.modalities]
        network = Embedders(model) if len(names) > 1 else Embedder(model, names[0])
        outputs = [f"{name}_embedding" for name in names]
        return exportable(network, settings.model, names, outputs)

    def contenders(self, settings: MoreSettings) -> list[Contender]:
        """The X-ray tower, and timm's vision transformer of the same size."""
        model, batch = settings.model, settings.trainer.batch
        inputs = partial(bench_inputs, [(batch, 3, *model.image_size)])
        return [
            Contender(
                name="MoRE X-ray tower",
                build=partial(bench_tower, model),
                inputs=inputs,
                loss=torch.Tensor.mean,
                items=batch,
            ),
            Contender(
                name="timm VisionTransformer",
                build=partial(timm_tower, model),
                inputs=inputs,
                loss=torch.Tensor.mean,
                missing=None if is_installed("timm") else "timm is not installed",
                items=batch,
            ),
        ]

    def stages(self, settings: MoreSettings) -> Mapping[str, Callable[[], object]]:
        """From the files of an X-ray and an ECG to their embeddings."""
        whole = replace(settings.model, modalities=("xray", "ecg"))
        return embedding_stages(self.model(replace(settings, model=whole)).eval(), settings.data)


def _unlabelled(case: Study, vectors: Mapping[str, np.ndarray]) -> StudyPrediction:
    """Embeddings with the labels and items of a study, before findings and neighbours."""
    file = case.file
    items = {"xray": str(file.xray or ""), "ecg": str(file.ecg or "")}
    if case.text is not None:
        items["text"] = "\n".join(case.text)
    return StudyPrediction(
        name=case.name,
        embeddings=vectors,
        findings={},
        items=items,
        labels=file.labels,
        subject=file.subject,
    )


def _target(module: MoreModule, vectors: Mapping[str, Tensor], name: str) -> Tensor:
    """What a modality is compared with: the report, the other modalities, the nearest prompt."""
    others = [vector for other, vector in vectors.items() if other != name]
    if name != "text" and "text" in vectors:
        return vectors["text"]
    if others:
        return nn.functional.normalize(torch.stack(others).sum(dim=0), dim=0)
    asked = module.prompts().get(name)
    if asked:
        rows = torch.from_numpy(np.concatenate([one.prompts for one in asked.values()]))
        rows = rows.to(vectors[name].device)
        return rows[(rows @ vectors[name]).argmax()]
    return vectors[name]


RECIPE = MoreRecipe()
