"""The recipe of eccNET: visual search by an eccentric retina (arXiv 2106.02953)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.errors import InputError
from heed_gaze.eccnet.layouts import Trial, write_stimuli
from heed_gaze.eccnet.network import EccNet
from heed_gaze.eccnet.pictures import (
    Listing,
    Picture,
    Pictures,
    cut_and_flip,
    list_pictures,
    picture_root,
    write_sample_pictures,
)
from heed_gaze.eccnet.sample import write_sample_array
from heed_gaze.eccnet.search import (
    ChanceSearcher,
    EccNetSearcher,
    PixelMatchSearcher,
    Searcher,
    search,
)
from heed_gaze.eccnet.weights import load_weights
from heed_gaze_cli import eccnet_bench
from heed_gaze_cli.eccnet_pictures import draw_retina, draw_steps, write_film, write_search
from heed_gaze_cli.eccnet_scoring import (
    picture_row,
    report_pictures,
    report_searches,
    search_row,
)
from heed_gaze_cli.eccnet_settings import (
    LAYOUT,
    Case,
    EccNetSettings,
    PicturePrediction,
    Prediction,
    RuledTrials,
    SearchPrediction,
    classification,
    ivsn,
    last_layer,
    no_eccentricity,
    scenes_in,
    scenes_of,
    small,
    vgg16,
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

logger = logging.getLogger(__name__)

SAMPLE_TRIALS = 1
VALIDATION_TRIALS = 2
"""Searched, one saccade each, to see that a network that is not trained works."""
KEPT_STEPS = 4
"""Every so many pixels of a map are kept by `explain`."""


Batch = tuple[Tensor, Tensor]
"""Pictures (b, s, s, 3) and labels of a step."""


@dataclass(frozen=True)
class Nothing:
    """What a network that is used as it is learns from."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Picture:
        return Picture(name="nothing", pixels=np.zeros((1, 1, 3), dtype=np.uint8), label=0)


@dataclass(frozen=True)
class First:
    """The first trials of many."""

    trials: RuledTrials
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.trials))

    def __getitem__(self, index: int) -> Trial:
        trial = self.trials[index]
        return replace(trial, rules=replace(trial.rules, max_fixations=2))


class EccNetModule(L.LightningModule):
    """Classification while it trains, search when it is used.

    A network without a classifier learns nothing: its optimiser has one parameter that stays.
    """

    def __init__(self, settings: EccNetSettings, model: EccNet) -> None:
        super().__init__()
        self.settings, self.model = settings, model
        self.still = nn.Parameter(torch.zeros(()))
        self._searcher: Searcher | None = None
        if settings.training.freeze_convolutions:
            model.blocks.requires_grad_(False)

    @property
    def learns(self) -> bool:
        """Whether there is a classifier to train."""
        return self.model.classifier is not None

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """The cross-entropy of a batch; nothing for a network that is used as it is."""
        pixels, labels = batch
        count = len(labels)
        if not self.learns:
            return 0.0 * self.still
        loss = F.cross_entropy(self._scores(pixels), labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=count)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget features of weights that have changed."""
        self._searcher = None

    def validation_step(self, cases: list[Case], _: int) -> None:
        """Accuracy; without a classifier the share of targets found by the first saccade."""
        for case in cases:
            if isinstance(case, Picture):
                scores = self._scores(torch.from_numpy(case.pixels)[None])
                label = torch.tensor([case.label], device=scores.device)
                loss = F.cross_entropy(scores, label)
                self.log("val/loss", loss, on_epoch=True, sync_dist=True, batch_size=1)
                right = float(int(scores.argmax()) == case.label)
            else:
                right = float(self._search(case).search.found_at is not None)
            self.log("val/score", right, on_epoch=True, sync_dist=True, batch_size=1)

    def predict_step(self, cases: list[Case], _: int) -> list[Prediction]:
        """Searches of scenes, classes of pictures."""
        return [
            self._classify(case) if isinstance(case, Picture) else self._search(case)
            for case in cases
        ]

    def configure_optimizers(self) -> Any:
        """AdamW over what learns."""
        training = self.settings.training
        if not self.learns:
            return torch.optim.SGD([self.still], lr=0.0)
        moving = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            moving, lr=training.learning_rate, weight_decay=training.weight_decay
        )

    def _scores(self, pixels: Tensor) -> Float[Tensor, "b k"]:
        scores: Tensor = self.model(pixels.to(self.device).permute(0, 3, 1, 2).float())
        return scores

    def _classify(self, picture: Picture) -> PicturePrediction:
        scores = self._scores(torch.from_numpy(picture.pixels)[None])[0]
        return PicturePrediction(
            name=picture.name,
            label=picture.label,
            probabilities=tuple(scores.float().softmax(0).tolist()),
        )

    def _search(self, trial: Trial) -> SearchPrediction:
        if self._searcher is None:
            data = self.settings.data
            makers: dict[str, Callable[[], Searcher]] = {
                "eccnet": lambda: EccNetSearcher(self.model, reuse_surround=data.reuse_surround),
                "chance": lambda: ChanceSearcher(self.settings.trainer.seed),
                "pixel-match": PixelMatchSearcher,
            }
            self._searcher = makers[data.searcher]()
        found = search(trial.scene, self._searcher, trial.rules, keep_steps=True)
        return SearchPrediction(name=trial.name, trial=trial, search=found)


class EccNetRecipe(Recipe[EccNetSettings, Case, Prediction]):
    """Train or take over a network, and let it search."""

    card: ClassVar[Card] = Card(
        name="eccnet",
        title="eccNET: visual search with an eccentricity-dependent retina",
        task="where the eye goes to find a target; asymmetries of visual search",
        reads=(
            "search sets in the official folders",
            "single pictures",
            "ImageFolder",
            "MNIST idx",
        ),
        writes="csv of fixations, pictures and animations of searches",
        paper="Gupta et al., NeurIPS 2021, arXiv 2106.02953",
        layout=LAYOUT,
        verified="equal to the official pools with gradients, features, maps and a whole search on "
        "fixed weights, and to the official scorer; exact parameter counts",
        trained="a small variant on its sample",
        reproduced="the scorer gives the paper's indices from its released results; the searches "
        "themselves not: ImageNet weights were not at hand",
        notice="without --training.weights the features are those of a random or small network: "
        "asymmetries are then not the paper's",
    )
    settings: ClassVar[type[EccNetSettings]] = EccNetSettings
    presets: ClassVar[Mapping[str, Callable[[], EccNetSettings]]] = {
        "small": small,
        "vgg16": vgg16,
        "no-eccentricity": no_eccentricity,
        "last-layer": last_layer,
        "ivsn": ivsn,
        "classification": classification,
    }
    monitor: ClassVar[tuple[str, Literal["max", "min"]]] = ("val/score", "max")
    changeable: ClassVar[tuple[str, ...]] = (
        "data.on_error",
        "data.tasks",
        "data.most_trials",
        "data.searcher",
        "data.target",
        "data.truth",
        "data.cells",
        "data.background",
        "data.max_fixations",
        "data.inhibition",
        "data.gif",
        "data.reuse_surround",
    )

    def sample(self, out: Path, *, seed: int) -> None:
        """Items as pictures to classify, a few trials of the experiments, an array with viewers."""
        write_sample_pictures(out / "images", seed=seed)
        write_stimuli(out, seed=seed, trials=SAMPLE_TRIALS)
        write_sample_array(out, seed=seed)

    def check(self, settings: EccNetSettings, root: Path) -> Check:
        """Read every scene and every picture."""
        counts: list[Row] = []
        problems: list[str] = []
        data = replace(settings.data, tasks=(), most_trials=None)
        try:
            scenes = scenes_of(data, root)
        except InputError as error:
            if picture_root(root) is None:
                return Check(counts=[], problems=[str(error)])
        else:
            _check_scenes(scenes, counts, problems)
        if picture_root(root) is not None:
            _check_pictures(root, settings, counts, problems)
        return Check(counts=counts, problems=problems)

    def plan(self, settings: EccNetSettings, root: Path) -> EccNetSettings:
        """Take the classes from the pictures."""
        if not settings.model.classes:
            return settings
        names = list_pictures(root, "train").classes
        return replace(
            settings,
            model=replace(settings.model, classes=len(names)),
            data=replace(settings.data, class_names=names),
        )

    def train_data(self, settings: EccNetSettings, root: Path) -> Pictures | Nothing:
        """The training pictures as the variant sees them."""
        if not settings.model.classes:
            return Nothing()
        return _pictures(settings, list_pictures(root, "train"), for_training=True)

    def augment(
        self, settings: EccNetSettings
    ) -> Callable[[Picture, np.random.Generator], Picture] | None:
        """A random cut, mirrored."""
        if not settings.model.classes:
            return None
        return cut_and_flip(settings.model.picture, flip=settings.data.flip)

    def collate(self, samples: list[Picture]) -> Batch:
        """Stack the pictures."""
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        return pixels, torch.tensor([sample.label for sample in samples])

    def cases(
        self, settings: EccNetSettings, root: Path, split: str
    ) -> Pictures | RuledTrials | First:
        """Scenes to search for the test, where there are some; else pictures to classify."""
        if split == "test" or not settings.model.classes:
            if picture_root(root) is None or not settings.model.classes:
                scenes = scenes_of(settings.data, root)
                return First(scenes, VALIDATION_TRIALS) if split == "val" else scenes
            try:
                return scenes_of(settings.data, root)
            except InputError:
                logger.info("%s holds no search task: its pictures are classified", root)
        return _pictures(settings, list_pictures(root, split))

    def inputs(self, settings: EccNetSettings, paths: Sequence[Path]) -> RuledTrials:
        """Scenes to search."""
        return scenes_in(settings.data, paths)

    def model(self, settings: EccNetSettings) -> EccNet:
        """The network."""
        return EccNet(settings.model)

    def start(self, settings: EccNetSettings, root: Path, model: nn.Module) -> None:
        """Take over the weights that the settings name."""
        assert isinstance(model, EccNet)
        if settings.training.weights is not None:
            load_weights(model, settings.training.weights)
        elif not settings.model.classes:
            logger.warning(
                "no --training.weights: the features are those of a random network, which nothing "
                "trains; give VGG16's weights, or train with --preset small"
            )

    def module(self, settings: EccNetSettings, model: nn.Module) -> EccNetModule:
        """The network with its loss and its search."""
        assert isinstance(model, EccNet)
        return EccNetModule(settings, model)

    def write_prediction(
        self, settings: EccNetSettings, prediction: Prediction, out: Path
    ) -> list[Path]:
        """Fixations, picture and animation of a search."""
        assert isinstance(prediction, SearchPrediction)
        return write_search(prediction, out, gif=settings.data.gif)

    def score(self, settings: EccNetSettings, prediction: Prediction) -> list[Row]:
        """When the target was found, or the class."""
        if isinstance(prediction, SearchPrediction):
            return [search_row(prediction)]
        return [picture_row(prediction, settings.data.class_names)]

    def report(self, settings: EccNetSettings, rows: Sequence[Row]) -> Report:
        """The paper's table, or accuracies."""
        if "label" in rows[0]:
            return report_pictures(rows, settings.data.class_names)
        return report_searches(rows)

    def explain(
        self, settings: EccNetSettings, module: L.LightningModule, case: Case
    ) -> Explanation:
        """Attention, rings and path at each fixation, also as a film; the retina."""
        assert isinstance(module, EccNetModule)
        assert isinstance(case, Trial)
        prediction = module.predict_step([case], 0)[0]
        assert isinstance(prediction, SearchPrediction)
        steps = prediction.search.steps
        height, width = case.scene.size
        maps = np.zeros((0, height, width)) if not steps else np.stack([s.values for s in steps])
        retina = settings.model.retina
        figures = {"retina": draw_retina(prediction, retina)}
        films = {}
        if steps:
            figures["steps"] = draw_steps(prediction, retina)
            if settings.data.gif:
                films["steps.gif"] = partial(write_film, prediction)
        found = prediction.search.found_at
        return Explanation(
            name=case.name,
            arrays={
                "attention_every_4th_pixel": maps[:, ::KEPT_STEPS, ::KEPT_STEPS].astype(np.float32),
                "fixations_row_col": prediction.search.fixations,
                "found_at": np.array(-1 if found is None else found),
            },
            figures=figures,
            files=films,
        )

    def exportable(self, settings: EccNetSettings, model: nn.Module) -> Exportable:
        """Pictures of one size to features of the used layers, and class scores."""
        assert isinstance(model, EccNet)
        side = settings.model.picture
        outputs = [f"features{layer}" for layer in settings.model.layers]
        if model.classifier is not None:
            outputs.append("scores")
        return Exportable(
            model=FeaturesAndScores(model).eval(),
            examples=[(255 * torch.rand(count, 3, side, side),) for count in (2, 1, 3)],
            dynamic_shapes=({0: torch.export.Dim.AUTO},),
            input_names=("picture",),
            output_names=outputs,
        )

    def contenders(self, settings: EccNetSettings) -> list[Contender]:
        """One fixation, and the ring pools, beside the official way."""
        return eccnet_bench.contenders(settings.model)

    def stages(self, settings: EccNetSettings) -> Mapping[str, Callable[[], object]]:
        """From a scene to the next fixation, and a whole trial."""
        from heed_runtime.engine import device_of

        return eccnet_bench.stages(settings.model, device_of(settings.trainer))


class FeaturesAndScores(nn.Module):
    """What is exported: features of the used layers, and class scores where there are some."""

    def __init__(self, model: EccNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, ...]:
        """Pictures are RGB, 0 to 255."""
        features = tuple(self.model.features(picture))
        return features if self.model.classifier is None else (*features, self.model(picture))


def _pictures(
    settings: EccNetSettings, listing: Listing, *, for_training: bool = False
) -> Pictures:
    names = settings.data.class_names
    if names and listing.classes != names:
        raise InputError(
            f"the data have the classes {', '.join(listing.classes[:8])}, the network "
            f"{', '.join(names[:8])}",
            remedy="give data with the classes of the training",
        )
    return Pictures(
        listing.places,
        settings.model.picture,
        variant=settings.data.variant,
        for_training=for_training,
    )


def _check_scenes(scenes: RuledTrials, counts: list[Row], problems: list[str]) -> None:
    found: dict[str, int] = {}
    paths: dict[str, int] = {}
    for index in range(len(scenes)):
        try:
            trial = scenes[index]
            found[trial.task] = found.get(trial.task, 0) + 1
            paths[trial.task] = paths.get(trial.task, 0) + len(trial.viewers)
        except InputError as error:
            problems.append(str(error))
    counts += [
        {"task": name, "trials or pictures": count, "scanpaths of viewers": paths[name]}
        for name, count in found.items()
    ]


def _check_pictures(
    root: Path, settings: EccNetSettings, counts: list[Row], problems: list[str]
) -> None:
    for split in ("train", "val"):
        try:
            listing = list_pictures(root, split)
        except InputError as error:
            problems.append(str(error))
            continue
        pictures = Pictures(listing.places, settings.model.picture)
        for index in range(len(pictures)):
            try:
                pictures[index]
            except InputError as error:
                problems.append(str(error))
        classes = len(listing.classes)
        name = f"pictures of {classes} classes, {split}"
        counts.append({"task": name, "trials or pictures": len(pictures)})


RECIPE = EccNetRecipe()
