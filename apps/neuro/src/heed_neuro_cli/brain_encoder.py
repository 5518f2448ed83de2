"""The recipe of the transformer brain encoder (arXiv 2505.17329)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import lightning as L
import numpy as np
import torch
from torch import nn

from heed_core.errors import InputError
from heed_neuro.brain_encoder.backbones import read_image
from heed_neuro.brain_encoder.made_data import write_made_subject
from heed_neuro.brain_encoder.network import BrainEncoder
from heed_neuro.brain_encoder.official import load_official
from heed_neuro.brain_encoder.subject import LAYOUT, check_gaps, read_subject
from heed_neuro_cli.brain_cases import (
    Batch,
    GivenImages,
    ImageSet,
    OneSplit,
    Sample,
    TrainingImages,
    collate,
)
from heed_neuro_cli.brain_module import BrainModule, BrainPrediction
from heed_neuro_cli.brain_scoring import report_rows, score_rows
from heed_neuro_cli.brain_settings import BrainSettings, paper, planned, regions_of, small
from heed_runtime.files import atomic_write, write_csv
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


class BrainEncoderRecipe(Recipe[BrainSettings, ImageSet, BrainPrediction]):
    """Predict the responses of cortex to images."""

    card: ClassVar[Card] = Card(
        name="brain-encoder",
        title="Transformer brain encoder: cortical regions query a frozen network's tokens",
        task="responses of every vertex (voxel, neuron) to images",
        reads=("Algonauts 2023 (NSD)", "images with responses.npy"),
        writes="npy of predicted responses per hemisphere",
        paper="Adeli et al., NeurIPS 2025, arXiv 2505.17329",
        layout=LAYOUT,
        verified="equal to the official encoder on fixed weights; 34,392,444 live parameters",
        trained="its sample of routing, 40 epochs: r 0.98 on test pictures; factorised 0.39",
        reproduced="none: the Natural Scenes Dataset was not at hand",
    )
    settings: ClassVar[type[BrainSettings]] = BrainSettings
    presets: ClassVar[Mapping[str, Callable[[], BrainSettings]]] = {"small": small, "paper": paper}
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/r", "max")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.cache",
        "data.backbone.weights",
        "data.saliency",
        "data.gaps",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """Write made images and responses that need looking: the routing task."""
        write_made_subject(out, seed=seed)

    def check(self, settings: BrainSettings, root: Path) -> Check:
        """Read every image and every response."""
        subject = read_subject(root)
        problems, warnings = [], []
        counts: list[Row] = []
        if settings.data.gaps == "stop":
            try:
                check_gaps(subject)
            except InputError as error:
                problems.append(str(error))
        for split, images in subject.images.items():
            sizes = set()
            for path in images:
                try:
                    sizes.add(read_image(path).size)
                except InputError as error:
                    problems.append(str(error))
            if len(sizes) > 1:
                problems.append(f"{images[0].parent}: images of {len(sizes)} sizes; use one")
            own = subject.responses.get(split, {})
            row: dict[str, str | int | float | None] = {"split": split, "images": len(images)}
            for group in subject.groups:
                row[f"vertices {group}"] = own[group].vertices if group in own else 0
                if group in own:
                    constant = int((own[group].rows(slice(None)).std(axis=0) == 0).sum())
                    if constant:
                        warnings.append(
                            f"{own[group].path}: {constant} vertices are constant; r is undefined"
                        )
            counts.append(row)
        if "test" not in subject.responses:
            warnings.append(f"{root}: no measured test responses; evaluate with --split val")
        elif not subject.ceilings:
            warnings.append(f"{root}: no noise ceiling; evaluate gives raw r only")
        return Check(counts=counts, problems=problems, warnings=warnings)

    def plan(self, settings: BrainSettings, root: Path) -> BrainSettings:
        """Take vertices, regions and token map from the data."""
        return planned(settings, root)

    def train_data(self, settings: BrainSettings, root: Path) -> TrainingImages:
        """The training images."""
        return TrainingImages.of(settings, root)

    def collate(self, samples: list[Sample]) -> Batch:
        """Stack samples."""
        return collate(samples)

    def cases(self, settings: BrainSettings, root: Path, split: str) -> OneSplit:
        """All images of a split, as one case."""
        return OneSplit(settings, root, split)

    def inputs(self, settings: BrainSettings, paths: Sequence[Path]) -> GivenImages:
        """A file is a set of one image, a folder one of all its images."""
        return GivenImages(settings, paths)

    def model(self, settings: BrainSettings) -> BrainEncoder:
        """The encoder."""
        return BrainEncoder(settings.model)

    def start(self, settings: BrainSettings, root: Path, model: nn.Module) -> None:
        """Take the regions of the data, and official weights where these are named."""
        assert isinstance(model, BrainEncoder)
        model.settle(regions_of(settings, read_subject(root)))
        if settings.training.weights is not None:
            load_official(model, settings.training.weights)

    def module(self, settings: BrainSettings, model: nn.Module) -> BrainModule:
        """The encoder with its loss."""
        assert isinstance(model, BrainEncoder)
        return BrainModule(model, settings)

    def write_prediction(
        self, settings: BrainSettings, prediction: BrainPrediction, out: Path
    ) -> list[Path]:
        """Write `<name>/<group>_pred.npy` (images, vertices), and which image is which row."""
        folder = out / prediction.name
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for group, values in prediction.predicted.items():
            path = folder / f"{group}_pred.npy"
            with atomic_write(path) as temporary, temporary.open("wb") as file:
                np.save(file, values.astype(np.float32))
            files.append(path)
        rows: list[Row] = [{"row": k, "image": p.name} for k, p in enumerate(prediction.images)]
        files.append(write_csv(folder / "images.csv", rows))
        if left := prediction.case.skipped:
            lost: list[Row] = [{"image": path.name, "problem": left[path]} for path in left]
            files.append(write_csv(folder / "skipped.csv", lost))
        return files

    def score(self, settings: BrainSettings, prediction: BrainPrediction) -> list[Row]:
        """Correlation and accuracy of every region and vertex."""
        case = prediction.case
        return score_rows(
            prediction.name,
            prediction.predicted,
            case.measured,
            case.regions,
            case.ceilings,
            case.surface,
            seed=settings.trainer.seed,
        )

    def report(self, settings: BrainSettings, rows: Sequence[Row]) -> Report:
        """Means and medians over vertices, per region, cluster and hemisphere."""
        return report_rows(rows)

    def explain(
        self, settings: BrainSettings, module: L.LightningModule, case: ImageSet
    ) -> Explanation:
        """Where each region's query looked, and how alike the queries are."""
        from heed_neuro_cli.brain_explaining import explain_images

        assert isinstance(module, BrainModule)
        return explain_images(module.model, case, module.device)

    def exportable(self, settings: BrainSettings, model: nn.Module) -> Exportable:
        """Tokens of any number of images to the responses of each group."""
        assert isinstance(model, BrainEncoder)
        config = settings.model
        auto = torch.export.Dim.AUTO
        names = [group.name for group in config.groups]
        salient = config.kind == "saliency"
        examples: list[tuple[torch.Tensor, ...]] = []
        for images in (2, 3):
            features = torch.randn(images, *config.grid, config.channels)
            extra = (torch.rand(images, *config.grid),) if salient else ()
            examples.append((features, *extra))
        return Exportable(
            model=model.eval(),
            examples=examples,
            dynamic_shapes=({0: auto}, {0: auto})[: 2 if salient else 1],
            input_names=("features", "saliency")[: 2 if salient else 1],
            output_names=names,
        )

    def contenders(self, settings: BrainSettings) -> list[Contender]:
        """The read-out beside its masked form and torch's layer; ridge beside himalaya."""
        from heed_neuro_cli.brain_bench import contenders

        return contenders()


RECIPE = BrainEncoderRecipe()
