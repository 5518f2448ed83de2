"""What the recipes of MoRE share: minimisation, and parts for `export` and `bench`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from heed_medical.ecg.reading import read_ecg
from heed_medical.ecg.signals import prepare_ecg
from heed_medical.ecg.writing import write_record
from heed_medical.more import More, MoreConfig
from heed_medical.more.batches import Augmentation
from heed_medical.more.gaps import lacking, padded
from heed_medical.more.network import xray_tower
from heed_medical.more.settings import MoreData
from heed_medical.more.studies import StudySet, broken_inputs, broken_rows, prepare_xray
from heed_medical.pictures.reading import read_grey
from heed_runtime.recipe import Exportable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TowerTraining:
    """The minimisation of the loss; the defaults are those of the pre-training."""

    learning_rate: float = 3e-5
    """Of AdamW, at the start; falls to a tenth on half a cosine and starts again."""
    weight_decay: float = 0.1
    restart_epochs: int = 10
    """Epochs of one half cosine."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Of training studies."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.restart_epochs < 1:
            raise ValueError(f"restart_epochs must be at least 1, got {self.restart_epochs}")


def adam_with_restarts(model: nn.Module, training: TowerTraining) -> Any:
    """AdamW on what is trained, half cosines that start again."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        adam, T_0=training.restart_epochs, eta_min=training.learning_rate / 10
    )
    return {"optimizer": adam, "lr_scheduler": {"scheduler": cosine, "interval": "epoch"}}


class Embedder(nn.Module):
    """What is exported of one modality: X-rays or ECGs in, their embeddings out."""

    def __init__(self, model: More, name: str) -> None:
        super().__init__()
        self.tower = getattr(model, name)
        self.projector = model.projectors[name]

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors."""
        return nn.functional.normalize(self.projector(self.tower(x)), dim=1)


class Embedders(nn.Module):
    """What is exported of two modalities."""

    def __init__(self, model: More) -> None:
        super().__init__()
        self.xray, self.ecg = Embedder(model, "xray"), Embedder(model, "ecg")

    def forward(self, xray: Tensor, ecg: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of both."""
        return self.xray(xray), self.ecg(ecg)


def input_shapes(config: MoreConfig, names: Sequence[str]) -> list[tuple[int, ...]]:
    """The shapes of one X-ray and one ECG."""
    shapes = {"xray": (3, *config.image_size), "ecg": (12, config.ecg_samples)}
    return [shapes[name] for name in names]


def exportable(
    network: nn.Module, config: MoreConfig, names: Sequence[str], outputs: Sequence[str]
) -> Exportable:
    """A network with any number of X-rays, ECGs or both as its inputs by place."""
    shapes = input_shapes(config, names)
    return Exportable(
        model=network.eval(),
        examples=[tuple(torch.randn(b, *shape) for shape in shapes) for b in (2, 3)],
        dynamic_shapes=({0: torch.export.Dim.AUTO},) * len(names),
        input_names=names,
        output_names=outputs,
    )


def bench_inputs(shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Random numbers, always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(shape, generator=generator) for shape in shapes)


def bench_tower(config: MoreConfig) -> nn.Module:
    """The X-ray tower."""
    return xray_tower(config)


def timm_tower(config: MoreConfig) -> nn.Module:
    """The vision transformer of timm with the same sizes."""
    from timm.models.vision_transformer import VisionTransformer

    tower = config.tower
    network: nn.Module = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=tower.dim,
        depth=tower.depth,
        num_heads=tower.heads,
        mlp_ratio=tower.hidden / tower.dim,
        qkv_bias=False,
        num_classes=0,
    )
    return network


def embedding_stages(model: More, data: MoreData) -> dict[str, Callable[[], object]]:
    """From a png of 1024 x 1024 pixels and a record of 500 Hz to embeddings of both."""
    folder = TemporaryDirectory()
    picture, record = Path(folder.name) / "xray.png", Path(folder.name) / "record"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (1024, 1024), dtype=np.uint8)).save(picture)
    header = write_record(record, rng.normal(size=(12, 5000)), rate_hz=500)
    grey, ecg, config = read_grey(picture), read_ecg(header), model.config
    inputs = bench_inputs([(1, *shape) for shape in input_shapes(config, ("xray", "ecg"))])

    def embed() -> object:
        with torch.inference_mode():
            return model.embed_xray(inputs[0]), model.embed_ecg(inputs[1])

    return {
        "read X-ray": lambda: folder and read_grey(picture),  # the folder must live
        "prepare X-ray": lambda: prepare_xray(grey, config.image_size, equalise=data.equalise),
        "read ECG": lambda: read_ecg(header),
        "prepare ECG": lambda: prepare_ecg(ecg, samples=config.ecg_samples, part=data.ecg_part),
        "network": embed,
    }


def skipped_rows(data: MoreData, root: Path) -> tuple[str, ...]:
    """What is left out of a data set, a line each; nothing where it stops instead."""
    return broken_rows(root, data) if data.on_error == "skip" else ()


def skipped_inputs(data: MoreData, paths: Sequence[Path]) -> tuple[str, ...]:
    """What is left out of inputs, a line each; nothing where it stops instead."""
    return broken_inputs(paths, data) if data.on_error == "skip" else ()


@dataclass
class ToldStudies(StudySet):
    """Studies that log what they lack, a line per kind, when they are first counted.

    A pass over them counts them once, in the main process; a data set that is only made to see
    whether it can be made says nothing.
    """

    place: str = ""
    """Where they are from, for messages."""
    whole: int = 0
    """Of how many these are the ones that have `needed`."""
    needed: str = ""
    """What the others do not have."""
    may_lack: Sequence[str] = ()
    """The modalities whose lack is told."""
    _told: bool = field(default=False, repr=False)

    def __len__(self) -> int:
        if not self._told:
            self._told = True
            self._tell()
        return len(self.files)

    def _tell(self) -> None:
        if lost := self.whole - len(self.files):
            logger.warning(
                "%s: %d of %d studies are left out, which do not have %s",
                *(self.place, lost, self.whole, self.needed),
            )
        for line in lacking(self.files, self.may_lack):
            logger.info("%s: %s", self.place, line)
        for line in padded(self.files, self.config.ecg_samples):
            logger.warning("%s: %s", self.place, line)


def is_installed(name: str) -> bool:
    """Whether a library is there."""
    import importlib.util

    return importlib.util.find_spec(name) is not None
