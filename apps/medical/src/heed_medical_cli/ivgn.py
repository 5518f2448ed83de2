"""The recipe of IVGN: intensive vision-guided network for reports (arXiv 2402.03754)."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from heed_core import observe
from heed_medical.ivgn import Ivgn, IvgnConfig, load_backbone, report_loss
from heed_medical.pictures.reading import read_grey, resize_grey
from heed_medical.reports.checking import check_reports, patients_in_several_splits
from heed_medical.reports.data import (
    ReportBatch,
    ReportCase,
    cut_case,
    plan_reports,
    to_batch,
    to_images,
)
from heed_medical.reports.efficacy import FINDINGS, clinical_efficacy, match_findings
from heed_medical.reports.layouts import find_inputs, list_studies, studies_of
from heed_medical.reports.meteor import meteor_by_program, meteor_es
from heed_medical.reports.metrics import bleu, cider, rouge_l
from heed_medical.reports.phantoms import write_studies
from heed_medical.reports.settings import ReportData
from heed_medical.reports.words import Vocabulary
from heed_medical_cli.ivgn_studies import ToldReports, distinct
from heed_medical_cli.leaks import warn_of_leaks
from heed_medical_cli.pretrained import BackboneWeights, weights_file
from heed_medical_cli.report_pictures import draw_scores, draw_words
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

LAYOUT = """\
r2gen   annotation.json ({train,val,test}: id, report, image_path)  images/ID/{0,1}.png
table   any csv or jsonl: file, text (or report); optionally id, split, patient
openi   ecgen-radiology/N.xml  NLMCXR_png/*.png
kaggle  indiana_reports.csv  indiana_projections.csv  images/images_normalized/*.png
mimic   mimic-cxr-2.0.0-split.csv(.gz)  files/pNN/pN/{sN.txt, sN/ID.jpg}

png, jpg, tif, bmp and DICOM. Raw Indiana reports are split by the last digit of their number
(0 test, 1 val), others without a split are drawn by patient."""
IMAGE_ATTENTION = "decoder.layers.*.image_attention.attend"


@dataclass(frozen=True, kw_only=True)
class IvgnTraining:
    """The minimisation of the loss."""

    learning_rate: float = 1e-4
    """Of Adam (with amsgrad), at the start."""
    extractor_learning_rate: float = 5e-5
    """Of the extractor of pictures."""
    weight_decay: float = 5e-5
    step: int = 50
    """Epochs after which learning rates fall; 1 for MIMIC-CXR."""
    gamma: float = 0.1
    """By which factor; 0.8 for MIMIC-CXR."""
    augment: bool = True
    """Whether a random square of each training picture is seen."""
    flip: float = 0.0
    """Probability of mirroring; 0.5 in R2Gen, though reports tell left from right."""
    validation_beam: int = 1
    """Beams of the reports that validation scores."""
    backbone_weights: BackboneWeights = None
    """Weights of the torchvision ResNet to start the extractor from: a file, or imagenet for
    torchvision's own, which are downloaded unless the folder of torch.hub has them."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "extractor_learning_rate", "gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("step", "validation_beam"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip must be within 0..1, got {self.flip}")
        if self.flip and not self.augment:
            raise ValueError("flip has no effect without augment")


@dataclass(frozen=True, kw_only=True)
class IvgnSettings:
    """All settings of IVGN."""

    model: IvgnConfig = field(default_factory=IvgnConfig)
    data: ReportData = field(default_factory=ReportData)
    training: IvgnTraining = field(default_factory=IvgnTraining)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)

    def __post_init__(self) -> None:
        words = len(self.data.vocabulary)
        if words and words != self.model.words:
            raise ValueError(
                f"data.vocabulary has {words} words, the model {self.model.words}: they are of "
                "different trainings"
            )


def small() -> IvgnSettings:
    """A network and schedule for a laptop: three convolutions on 32 pixels, one block of 96."""
    return IvgnSettings(
        model=IvgnConfig(
            backbone="conv",
            dim=96,
            heads=4,
            hidden=192,
            depth=1,
            dropout=0.0,
            patch_dropout=0.0,
            patch_positions="sine",
        ),
        data=ReportData(resize=34, size=32, most_words=40),
        training=IvgnTraining(
            learning_rate=4e-3, extractor_learning_rate=4e-3, weight_decay=0.0, step=24
        ),
        trainer=TrainerSettings(max_epochs=30, batch=16, validate_every=5),
    )


def paper() -> IvgnSettings:
    """IU X-Ray: ResNet-101 at 224, 60 words, 100 epochs in batches of 16 (schedule of R2Gen)."""
    return IvgnSettings(
        training=IvgnTraining(validation_beam=3),
        trainer=TrainerSettings(
            max_epochs=100, batch=16, patience=50, seed=9223, clip=0.1,
            extra={"gradient_clip_algorithm": "value"},
        ),
    )  # fmt: skip


def mimic() -> IvgnSettings:
    """MIMIC-CXR: one view, words that occur 10 times, 100 words, 30 epochs (schedule of R2Gen)."""
    settings = paper()
    return replace(
        settings,
        data=ReportData(views=1, dialect="mimic", threshold=10, most_words=100),
        training=replace(settings.training, step=1, gamma=0.8),
        trainer=replace(settings.trainer, max_epochs=30, seed=456789),
    )


@dataclass(frozen=True, kw_only=True)
class IvgnPrediction:
    """The report that was written of one study."""

    name: str
    words: tuple[str, ...]
    reliance: tuple[float, ...]
    """How much each word relied on the pictures."""
    log_probability: float
    """Of the whole report, its end included, less penalties for repetition."""
    references: tuple[str, str] | None
    """Of protocol r2gen and of protocol full; None: there is none."""

    @property
    def report(self) -> str:
        """The words in a row."""
        return " ".join(self.words)


class IvgnModule(L.LightningModule):
    """Loss, optimiser and validation of IVGN."""

    def __init__(self, model: Ivgn, settings: IvgnSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.vocabulary = Vocabulary(settings.data.vocabulary)
        self._written: list[tuple[str, str]] = []

    def training_step(self, batch: ReportBatch, _: int) -> Tensor:
        """The loss of a batch of reports."""
        loss = self._loss(batch)
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, sync_dist=True,
            batch_size=len(batch["tokens"]),
        )  # fmt: skip
        return loss

    def validation_step(self, cases: list[ReportCase], _: int) -> None:
        """The loss; reports are written and kept."""
        batch = self._batch(cases)
        self.log("val/loss", self._loss(batch), batch_size=len(cases), sync_dist=True)
        written = self._write(cases, beam=self.settings.training.validation_beam)
        self._written += [(p.references[0], p.report) for p in written if p.references]

    def on_validation_epoch_end(self) -> None:
        """The scores of all validation reports."""
        pairs = [pair for part in distributed.gather(self._written) for pair in part]
        self._written = []
        if not pairs:
            return
        references, found = [[reference] for reference, _ in pairs], [text for _, text in pairs]
        self.log("val/bleu_4", float(bleu(references, found).corpus[3]), rank_zero_only=False)
        self.log("val/rouge_l", rouge_l(references, found).corpus, rank_zero_only=False)
        self.log("val/different_reports", float(len(set(found))), rank_zero_only=False)

    def predict_step(self, cases: list[ReportCase], _: int) -> list[IvgnPrediction]:
        """Reports of some studies."""
        return self._write(cases, beam=self.settings.data.beam)

    def configure_optimizers(self) -> Any:
        """Adam with amsgrad, a rate of its own for the extractor, falling by steps."""
        training = self.settings.training
        slow = list(self.model.extractor.parameters())
        own = {id(parameter) for parameter in slow}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in own]
        adam = torch.optim.Adam(
            [
                {"params": rest, "lr": training.learning_rate},
                {"params": slow, "lr": training.extractor_learning_rate},
            ],
            weight_decay=training.weight_decay,
            amsgrad=True,
        )
        falling = torch.optim.lr_scheduler.StepLR(adam, training.step, training.gamma)
        return {"optimizer": adam, "lr_scheduler": falling}

    def words_of(self, case: ReportCase) -> tuple[IvgnPrediction, dict[str, np.ndarray]]:
        """The report of one study, and what each word and the encoder looked at."""
        prediction = self._write([case], beam=self.settings.data.beam)[0]
        images, views = (x.to(self.device) for x in to_images([case]))
        numbers = self.vocabulary.encode(prediction.report, most=self.settings.data.most_words)
        inputs = torch.tensor([numbers[: len(prediction.words)]], device=self.device)
        model = self.model
        with torch.no_grad():
            memory = model.encode(images, views)
            arrays = {"reliance": np.array(prediction.reliance, dtype=np.float32)}
            arrays["words"] = np.array(prediction.words, dtype=np.str_)
            if inputs.shape[1]:
                with observe(model, IMAGE_ATTENTION) as record:
                    model.decode(inputs, memory)
                weights = [record[name][0] for name in record]
                stacked = torch.stack(weights).unflatten(-1, (images.shape[1], *memory.grid))  # type: ignore[no-untyped-call]
                arrays["attention"] = stacked.float().cpu().numpy()
            if model.gia is not None:
                maps = model.gia.views(model.extractor(images[0]))
                arrays["gia_space"] = maps.space[:, 0].float().cpu().numpy()
                arrays["gia_depth"] = maps.depth[:, :, 0, 0].float().cpu().numpy()
                arrays["gia_pixel"] = maps.pixel.mean(1).float().cpu().numpy()
        return prediction, arrays

    def _loss(self, batch: ReportBatch) -> Tensor:
        tokens = batch["tokens"]
        chances = self.model(batch["images"], tokens[:, :-1], batch["views"])
        return report_loss(chances, tokens[:, 1:], batch["lengths"] - 1)

    def _batch(self, cases: list[ReportCase]) -> ReportBatch:
        batch = to_batch(cases)
        return {
            "images": batch["images"].to(self.device),
            "views": batch["views"].to(self.device),
            "tokens": batch["tokens"].to(self.device),
            "lengths": batch["lengths"].to(self.device),
        }

    @torch.no_grad()
    def _write(self, cases: list[ReportCase], *, beam: int) -> list[IvgnPrediction]:
        images, views = (x.to(self.device) for x in to_images(cases))
        memory = self.model.encode(images, views)
        data = self.settings.data
        tokens, scores = self.model.write(
            memory, beam=beam, most=data.most_words, trigram_penalty=data.trigram_penalty
        )
        inputs = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        reliance = self.model.decode(inputs, memory).reliance.float().tolist()
        found = []
        for case, numbers, score, shares in zip(
            cases, tokens.tolist(), scores.tolist(), reliance, strict=True
        ):
            words = tuple(self.vocabulary.word_list(numbers))
            references = None
            if case.report is not None:
                references = (self.vocabulary.decode(case.numbers[1:]), case.report)
            found.append(
                IvgnPrediction(
                    name=case.name,
                    words=words,
                    reliance=tuple(shares[: len(words)]),
                    log_probability=score,
                    references=references,
                )
            )
        return found


class IvgnRecipe(Recipe[IvgnSettings, ReportCase, IvgnPrediction]):
    """Write the reports of chest X-rays."""

    card: ClassVar[Card] = Card(
        name="ivgn",
        title="IVGN-style report generation (reconstructed)",
        task="report generation from chest X-rays",
        reads=("R2Gen annotation json", "Open-i XML", "Kaggle csv", "MIMIC-CXR-JPG", "csv, jsonl"),
        writes="json, txt or csv of the report, with the visual reliance of each word",
        paper="Zheng et al., Physics in Medicine and Biology 2023, arXiv 2402.03754",
        layout=LAYOUT,
        verified="reconstructed: the paper's formulas were not at hand; words, loss and scores are "
        "R2Gen's, equal to its code",
        trained="its sample: BLEU-4 0.92, with the pictures hidden 0.53; preset small",
        reproduced="none: no code or weights were released, IU X-Ray's pictures are not at hand",
        notice="research use only: not a medical device; IVGN is a reconstruction",
    )
    settings: ClassVar[type[IvgnSettings]] = IvgnSettings
    presets: ClassVar[Mapping[str, Callable[[], IvgnSettings]]] = {
        "small": small,
        "paper": paper,
        "mimic": mimic,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/bleu_4", "max")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error", "data.layout", "data.annotation", "data.images", "data.sections",
        "data.lone", "data.pictures", "data.beam", "data.trigram_penalty", "data.protocol",
        "data.write", "data.truth_findings", "data.found_findings", "data.meteor_jar",
    )  # fmt: skip

    def sample(self, out: Path, *, seed: int) -> None:
        """Chests in two views with shadow, heart and fluid, in the layout of R2Gen."""
        write_studies(out, seed=seed)

    def check(self, settings: IvgnSettings, root: Path) -> Check:
        """Read every picture and report."""
        found = check_reports(settings.data, root)
        return Check(counts=found.counts, problems=found.problems, warnings=found.warnings)

    def plan(self, settings: IvgnSettings, root: Path) -> IvgnSettings:
        """Take the layout and the vocabulary from the data."""
        data = plan_reports(settings.data, root)
        warn_of_leaks(root, patients_in_several_splits(list_studies(root, data).studies))
        model = replace(settings.model, words=len(data.vocabulary))
        return replace(settings, model=model, data=data)

    def train_data(self, settings: IvgnSettings, root: Path) -> ToldReports:
        """The training studies."""
        return self._studies(settings, root, "train", training=settings.training.augment)

    def augment(
        self, settings: IvgnSettings
    ) -> Callable[[ReportCase, np.random.Generator], ReportCase] | None:
        """Cut a random square out of each picture."""
        if not settings.training.augment:
            return None
        return partial(cut_case, size=settings.data.size, flip=settings.training.flip)

    def collate(self, samples: list[ReportCase]) -> ReportBatch:
        """Pictures and words of all samples."""
        return to_batch(samples)

    def cases(self, settings: IvgnSettings, root: Path, split: str) -> ToldReports:
        """The studies of a split, with their reports.

        Labels for clinical efficacy that cannot be used are told here, before reports are written.
        """
        data = settings.data
        if data.truth_findings is not None and data.found_findings is not None:
            match_findings(data.truth_findings, data.found_findings)
        return self._studies(settings, root, split)

    def inputs(self, settings: IvgnSettings, paths: Sequence[Path]) -> ToldReports:
        """Pictures, and folders of the pictures of studies."""
        studies = distinct(find_inputs(paths, views=settings.data.views))
        return ToldReports(studies, settings.data, place="inputs")

    def model(self, settings: IvgnSettings) -> Ivgn:
        """The network, random at first."""
        return Ivgn(settings.model)

    def start(self, settings: IvgnSettings, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, Ivgn)
        if (named := settings.training.backbone_weights) is not None:
            load_backbone(model, weights_file(named, settings.model.backbone))

    def module(self, settings: IvgnSettings, model: nn.Module) -> IvgnModule:
        """The network with its loss."""
        assert isinstance(model, Ivgn)
        return IvgnModule(model, settings)

    def write_prediction(
        self, settings: IvgnSettings, prediction: IvgnPrediction, out: Path
    ) -> list[Path]:
        """Write `<name>.json`, `<name>.txt` or `<name>.csv`."""
        paths = []
        for suffix in settings.data.write:
            path = out / f"{prediction.name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[suffix](prediction, path)
            paths.append(path)
        return paths

    def score(self, settings: IvgnSettings, prediction: IvgnPrediction) -> list[Row]:
        """Reference and report, and their scores as a pair."""
        assert prediction.references is not None
        reference = prediction.references[settings.data.protocol == "full"]
        pair = [[reference]], [prediction.report]
        looked = settings.data.pictures == "needed"
        reliance = {"visual_reliance": float(np.mean(prediction.reliance or [0.0]))}
        return [
            {
                "case": prediction.name,
                "bleu_4": float(bleu(*pair).pairs[0, 3]),
                "rouge_l": rouge_l(*pair).corpus,
                "meteor_es": meteor_es(*pair).corpus,
                "words": len(prediction.words),
                "log_probability": prediction.log_probability,
                **(reliance if looked else {}),
                "reference": reference,
                "report": prediction.report,
            }
        ]

    def report(self, settings: IvgnSettings, rows: Sequence[Row]) -> Report:
        """The scores of the corpus, and of clinical findings where they are given."""
        references, found = [str(r["reference"]) for r in rows], [str(r["report"]) for r in rows]
        pair = [[reference] for reference in references], found
        metrics = {f"bleu_{n}": float(x) for n, x in enumerate(bleu(*pair).corpus, start=1)}
        metrics |= {
            "rouge_l": rouge_l(*pair).corpus,
            "cider": cider(*pair).corpus,
            "meteor_es": meteor_es(*pair).corpus,
            "different_reports": float(len(set(found))),
        }
        data = settings.data
        if data.pictures == "needed":
            shares = [float(r["visual_reliance"] or 0) for r in rows]
            metrics["visual_reliance"] = float(np.mean(shares))
        if data.meteor_jar is not None:
            metrics["meteor"] = meteor_by_program(references, found, data.meteor_jar)
        scores: list[Row] = [
            {"score": name, "value": value, "protocol": data.protocol}
            for name, value in metrics.items()
        ]
        tables = [Table(title="scores", rows=scores), _frequent(found)]
        if data.truth_findings is not None and data.found_findings is not None:
            more, table = _efficacy(data.truth_findings, data.found_findings)
            metrics |= more
            tables.append(table)
        return Report(metrics=metrics, tables=tables, plots={"scores": draw_scores(rows)})

    def explain(
        self, settings: IvgnSettings, module: L.LightningModule, case: ReportCase
    ) -> Explanation:
        """What each word looked at, over the pictures, and how much it relied on them."""
        assert isinstance(module, IvgnModule)
        prediction, arrays = module.words_of(case)
        views, side = len(case.pictures), settings.data.size
        attention = arrays.get("attention", np.zeros((1, 1, 0, views, side, side), np.float32))
        mean = attention.mean((0, 1))  # over blocks and heads: (n, v, p, q)
        figure = draw_words(case.pictures, prediction.words, mean, arrays["reliance"])
        return Explanation(name=case.name, arrays=arrays, figures={"words": figure})

    def exportable(self, settings: IvgnSettings, model: nn.Module) -> Exportable:
        """Pictures and the words before to log-probabilities of the words after."""
        data = settings.data
        auto = torch.export.Dim.AUTO
        sizes = ((2, 5), (3, 8))
        return Exportable(
            model=model.eval(),
            examples=[
                (
                    torch.randn(batch, data.views, 3, data.size, data.size),
                    torch.randint(1, settings.model.words + 1, (batch, length)),
                )
                for batch, length in sizes
            ],
            dynamic_shapes=({0: auto}, {0: auto, 1: auto}),
            input_names=("images", "tokens"),
            output_names=("log_probabilities",),
        )

    def contenders(self, settings: IvgnSettings) -> list[Contender]:
        """IVGN beside itself without its views and without its gates: the base of R2Gen."""
        count = min(settings.trainer.batch, 4)
        inputs = partial(_bench_inputs, settings, count)

        def contender(name: str, **changes: bool) -> Contender:
            config = replace(settings.model, **changes)  # type: ignore[arg-type]
            return Contender(
                name=name, build=partial(Ivgn, config), inputs=inputs, loss=_bench_loss, items=count
            )

        return [
            contender(f"IVGN ({settings.model.backbone})"),
            contender("without GIA", gia=False),
            contender("without gates", gate=False),
            contender("Transformer (base of R2Gen)", gia=False, gate=False),
        ]

    def stages(self, settings: IvgnSettings) -> Mapping[str, Callable[[], object]]:
        """From a png of 1024 x 1024 pixels to a report, written with and without a cache."""
        folder = TemporaryDirectory()
        path = Path(folder.name) / "picture.png"
        noise = np.random.default_rng(0).integers(0, 255, (1024, 1024), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        grey, data = read_grey(path), settings.data
        model = self.model(settings).eval()
        images = _bench_inputs(settings, 1)[0]
        with torch.inference_mode():
            memory = model.encode(images)

        def read() -> object:
            return folder and read_grey(path)  # the folder lives as long as this function

        def encode() -> object:
            with torch.inference_mode():
                return model.encode(images)

        def write(use_cache: bool) -> object:
            return model.write(memory, beam=data.beam, most=data.most_words, use_cache=use_cache)

        return {
            "read": read,
            "resize": lambda: resize_grey(grey, (data.size, data.size)),
            "encode": encode,
            "write with cache": partial(write, True),
            "write without cache": partial(write, False),
        }

    def _studies(
        self, settings: IvgnSettings, root: Path, split: str, *, training: bool = False
    ) -> ToldReports:
        data = settings.data
        skipped = list_studies(root, data).problems if data.on_error == "skip" else ()
        found = studies_of(root, data, split)
        place = f"{root}, {split}"
        return ToldReports(found, data, place=place, training=training, skipped=skipped)


def _write_json(prediction: IvgnPrediction, path: Path) -> None:
    content = {
        "case": prediction.name,
        "report": prediction.report,
        "log_probability": prediction.log_probability,
        "words": list(prediction.words),
        "visual_reliance": [round(share, 6) for share in prediction.reliance],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_txt(prediction: IvgnPrediction, path: Path) -> None:
    path.write_text(prediction.report + "\n", encoding="utf-8")


def _write_csv(prediction: IvgnPrediction, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "word", "visual_reliance"])
        for place, (word, share) in enumerate(
            zip(prediction.words, prediction.reliance, strict=True), start=1
        ):
            writer.writerow([place, word, f"{share:.6f}"])


_WRITERS = {"json": _write_json, "txt": _write_txt, "csv": _write_csv}


def _frequent(found: Sequence[str]) -> Table:
    """The reports that were written most often: a model that does not see has one."""
    rows: list[Row] = [
        {"times": times, "report": text} for text, times in Counter(found).most_common(5)
    ]
    return Table(title="most frequent reports", rows=rows)


def _efficacy(truth: Path, found: Path) -> tuple[dict[str, float], Table]:
    scores = clinical_efficacy(*match_findings(truth, found))
    names = ("precision", "recall", "f1")
    metrics = {
        f"ce_{name}_{kind}": value
        for kind, values in (("macro", scores.macro), ("micro", scores.micro))
        for name, value in zip(names, values, strict=True)
    }
    rows: list[Row] = [
        {"finding": finding, **dict(zip((*names, "auroc"), map(float, values), strict=True))}
        for finding, values in zip(FINDINGS, scores.findings, strict=True)
    ]
    return metrics, Table(title="clinical efficacy", rows=rows)


def _bench_inputs(settings: IvgnSettings, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    data = settings.data
    images = torch.randn((count, data.views, 3, data.size, data.size), generator=generator)
    size = (count, data.most_words - 1)
    return images, torch.randint(1, settings.model.words + 1, size, generator=generator)


def _bench_loss(log_probabilities: Tensor) -> Tensor:
    return -log_probabilities[..., 1].mean()


RECIPE = IvgnRecipe()
