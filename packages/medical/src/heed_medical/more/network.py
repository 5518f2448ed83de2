"""MoRE: three towers whose projections meet in one space (arXiv 2410.16239).

Each modality has a tower and a projector; embeddings are compared by cosine. Any two modalities
make a model: one that the data do not have is left out.

Differs from the released code: the temperature is learned (there it is no parameter of the
optimiser and stays 0.02), and padding does not count in the mean over a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.blocks import EncoderBlock
from heed_medical.more.text import Text, TextConfig, TextTower
from heed_medical.more.towers import EcgStem, ImageStem, Tower, TowerConfig

MODALITIES = ("xray", "ecg", "text")
LEADS = 12


@dataclass(frozen=True, kw_only=True)
class MoreConfig:
    """All that is needed to rebuild the network; the defaults are the paper's."""

    modalities: tuple[str, ...] = MODALITIES
    """Of "xray", "ecg", "text"; settled by the data."""
    tower: TowerConfig = field(default_factory=TowerConfig)
    """The transformers of X-rays and ECGs."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of an X-ray."""
    patch: int = 16
    """Side of a patch of an X-ray."""
    ecg_samples: int = 1000
    """Samples of an ECG at 100 Hz."""
    stem_width: int = 256
    """Channels between the two convolutions of the ECG's stem."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    projection: int = 128
    """Channels of the common space."""
    temperature: float = 0.02
    """Of the contrastive loss, at the start."""

    def __post_init__(self) -> None:
        unknown = set(self.modalities) - set(MODALITIES)
        if unknown or len(set(self.modalities)) < 2:
            raise ValueError(
                f"modalities must be two of {', '.join(MODALITIES)} at least, got {self.modalities}"
            )
        if self.patch < 1 or any(
            side < self.patch or side % self.patch for side in self.image_size
        ):
            raise ValueError(
                f"image_size must be multiples of patch={self.patch}, got {self.image_size}"
            )
        if EcgStem.tokens(self.ecg_samples) < 1:
            raise ValueError(f"ecg_samples must be at least 25, got {self.ecg_samples}")
        for name in ("stem_width", "projection"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.005 <= self.temperature <= 0.5:
            raise ValueError(f"temperature must be in [0.005, 0.5], got {self.temperature}")


class Projector(nn.Module):
    """Two linear layers without bias, each with batch normalisation."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden, bias=False)
        self.expand_norm = nn.BatchNorm1d(hidden)
        self.contract = nn.Linear(hidden, out, bias=False)
        self.contract_norm = nn.BatchNorm1d(out)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
        """Into the common space; in training a batch needs two rows at least."""
        hidden = torch.relu(self.expand_norm(self.expand(x)))
        return cast(Tensor, self.contract_norm(self.contract(hidden)))


class More(nn.Module):
    """The towers and projectors of the modalities.

    Example:
        >>> from heed_medical.more import More, small_config
        >>> model = More(small_config()).eval()
        >>> model.embed_xray(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 64])
    """

    def __init__(self, config: MoreConfig) -> None:
        super().__init__()
        self.config = config
        widths = {}
        if "xray" in config.modalities:
            self.xray = xray_tower(config)
            widths["xray"] = config.tower.dim
        if "ecg" in config.modalities:
            self.ecg = ecg_tower(config)
            widths["ecg"] = config.tower.dim
        if "text" in config.modalities:
            self.text = TextTower(config.text)
            widths["text"] = config.text.dim
        self.projectors = nn.ModuleDict(
            {
                name: Projector(width, config.tower.dim, config.projection)
                for name, width in widths.items()
            }
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """Divides cosines in the loss; kept within 0.005 to 0.5."""
        return self.log_temperature.exp().clamp(0.005, 0.5)

    def forward(
        self, xray: Float[Tensor, "b 3 h w"], ecg: Float[Tensor, "b 12 t"]
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "b p"]]:
        """The embeddings of X-rays and of ECGs."""
        return self.embed_xray(xray), self.embed_ecg(ecg)

    def embed_xray(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b p"]:
        """Unit vectors of X-rays as of `prepare_xray`."""
        return F.normalize(self.projectors["xray"](self.xray(x)), dim=1)

    def embed_ecg(self, x: Float[Tensor, "b 12 t"]) -> Float[Tensor, "b p"]:
        """Unit vectors of ECGs as of `heed_medical.ecg.signals.prepare_ecg`."""
        return F.normalize(self.projectors["ecg"](self.ecg(x)), dim=1)

    def embed_text(self, texts: Sequence[Text], *, prompt: bool = False) -> Float[Tensor, "b p"]:
        """Unit vectors of reports, or of prompts, which have fewer tokens."""
        tokens = self.text.tokens(texts, prompt=prompt)
        return F.normalize(self.projectors["text"](self.text(*tokens)), dim=1)


class MoreClassifier(nn.Module):
    """Findings from an X-ray, an ECG or both: towers, projectors and one linear layer.

    Args:
        config: Of the towers; the text tower is not needed.
        classes: How many findings; each is present or not.
        inputs: Which of "xray" and "ecg" are seen.
        dropout: Before the linear layer.
        ecg_drop: Probability of hiding the ECGs of a batch in training, so that the X-ray alone is
            learnt too.
    """

    def __init__(
        self,
        config: MoreConfig,
        *,
        classes: int,
        inputs: Sequence[str] = ("xray", "ecg"),
        dropout: float = 0.2,
        ecg_drop: float = 0.3,
    ) -> None:
        super().__init__()
        if not inputs or set(inputs) - {"xray", "ecg"} or classes < 1:
            raise ValueError(f"inputs must be of xray, ecg, classes above 0, got {inputs, classes}")
        self.config, self.inputs, self.ecg_drop = config, tuple(inputs), ecg_drop
        if "xray" in inputs:
            self.xray = xray_tower(config)
        if "ecg" in inputs:
            self.ecg = ecg_tower(config)
        width = config.tower.dim
        self.projectors = nn.ModuleDict(
            {name: Projector(width, width, config.projection) for name in inputs}
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(len(inputs) * config.projection, classes)

    def forward(self, **inputs: Float[Tensor, "b ..."]) -> Float[Tensor, "b k"]:
        """Scores before the sigmoid."""
        parts = []
        for name in self.inputs:
            tower = cast(Tower, getattr(self, name))
            part = self.projectors[name](tower(inputs[name]))
            if name == "ecg" and self.training and len(self.inputs) > 1:
                part = part * (torch.rand((), device=part.device) >= self.ecg_drop)
            parts.append(part)
        return cast(Tensor, self.head(self.dropout(torch.cat(parts, dim=1))))

    def start_from(self, model: More) -> None:
        """Take towers and projectors over from a pre-trained model; the head stays.

        Raises:
            ValueError: It has no such tower, or one of another size.
        """
        own = self.state_dict()
        found = model.state_dict()
        for name, tensor in own.items():
            head = name.startswith("head.")
            if not head and (name not in found or found[name].shape != tensor.shape):
                raise ValueError(f"the pre-trained model has no {name} of this size")
        self.load_state_dict({name: found.get(name, own[name]) for name in own})

    def train_only_last(self, blocks: int = 3) -> None:
        """Freeze all but the last blocks' query, key and value, the projectors and the head.

        With 0 blocks the towers are frozen: a probe.
        """
        for name in self.inputs:
            tower = cast(Tower, getattr(self, name)).requires_grad_(False)
            for block in list(tower.blocks)[len(tower.blocks) - blocks :]:
                attention = cast(EncoderBlock, block).attention
                for layer in (attention.query, attention.key, attention.value):
                    layer.requires_grad_(True)


def xray_tower(config: MoreConfig) -> Tower:
    """The tower of X-rays."""
    height, width = config.image_size
    tokens = (height // config.patch) * (width // config.patch)
    return Tower(config.tower, ImageStem(config.tower.dim, patch=config.patch), tokens=tokens)


def ecg_tower(config: MoreConfig) -> Tower:
    """The tower of ECGs."""
    stem = EcgStem(config.tower.dim, width=config.stem_width, leads=LEADS)
    return Tower(config.tower, stem, tokens=EcgStem.tokens(config.ecg_samples))


def small_config() -> MoreConfig:
    """A network for a laptop: small towers, a random text tower over bytes."""
    return MoreConfig(
        tower=TowerConfig(dim=64, depth=4, heads=4, hidden=128, key_drop=0.0),
        image_size=(64, 64),
        ecg_samples=500,
        stem_width=32,
        text=TextConfig(
            vocabulary=BYTES, dim=64, depth=2, heads=4, hidden=128, max_tokens=160, positions=162,
            lora_rank=0,
        ),
        projection=64,
        temperature=0.1,
    )  # fmt: skip


BYTES = 260
"""Vocabulary of the text tower over bytes."""
