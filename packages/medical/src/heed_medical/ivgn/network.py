"""IVGN: write the report of chest X-rays.

Zheng, Li, Wang, Yu, Wang, Chen, Xiao, Lu, "Intensive Vision-guided Network for Radiology Report
Generation", Physics in Medicine and Biology 2023 (arXiv 2402.03754). A RECONSTRUCTION: the parts
and what they are for are the paper's, the formulas of `gia.py` and `vkgd.py` are ours. What lies
around them (extractor, encoder, words, training) is that of R2Gen (arXiv 2010.16056), whose layer
norm is replaced by the usual one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed_core.blocks import BlockConfig, Encoder
from heed_core.cache import StackCache
from heed_core.impl import Impl
from heed_core.positions import SinePositions
from heed_medical.ivgn.decoding import Decoded, beam_search
from heed_medical.ivgn.gia import GlobalIntensiveAttention
from heed_medical.ivgn.vkgd import GATE_START, GuidedDecoder

Backbone = Literal["resnet101", "resnet50", "resnet18", "conv"]
CONV_WIDTHS = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class IvgnConfig:
    """All that is needed to rebuild the network."""

    words: int = 760
    """Words of the vocabulary; settled by the training reports."""
    backbone: Backbone = "resnet101"
    """Extractor of every picture; conv is a small one of three strided layers."""
    gia: bool = True
    """Whether the three views (depth, space, pixel) attend to the feature maps."""
    gate: bool = True
    """Whether each word weighs the image against the words before."""
    reduction: int = 16
    """Of the channels inside GIA's pixel view."""
    dim: int = 512
    """Channels of a token."""
    heads: int = 8
    hidden: int = 512
    """Channels inside the feed-forward layers."""
    depth: int = 3
    """Blocks of the encoder, and of the decoder."""
    dropout: float = 0.1
    """Of residuals, attention weights, feed-forward layers and embeddings."""
    patch_dropout: float = 0.5
    """Of the projected patches."""
    patch_positions: Literal["none", "sine"] = "none"
    """Whether patches are told their view, row and column; a deep extractor leaves traces of the
    place by itself, conv does not."""
    impl: Impl = "auto"
    """Back-end of attention."""

    def __post_init__(self) -> None:
        for name in ("words", "dim", "heads", "hidden", "depth", "reduction"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim={self.dim}, got {self.heads}")
        for name in ("dropout", "patch_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0, below 1, got {getattr(self, name)}")


class Memory(NamedTuple):
    """What the decoder sees of the images."""

    tokens: Float[Tensor, "b m c"]
    """View by view, row by row."""
    mask: Bool[Tensor, "b m"] | None
    """True = of a view that is there; None: all are."""
    grid: tuple[int, int]
    """Rows and columns of tokens in a view."""


class Words(NamedTuple):
    """What the decoder says."""

    log_probabilities: Float[Tensor, "b n w"]
    """Of the next word, from 0 (end) on."""
    reliance: Float[Tensor, "b n"]
    """How much each relied on the image rather than on the words before, within (0, 1)."""


class Ivgn(nn.Module):
    """From pictures of a patient, in one or more views, to the words of the report."""

    def __init__(self, config: IvgnConfig) -> None:
        super().__init__()
        self.config = config
        self.extractor, channels = build_extractor(config.backbone)
        self.gia = (
            GlobalIntensiveAttention(channels, reduction=config.reduction) if config.gia else None
        )
        self.project = nn.Sequential(
            nn.Linear(channels, config.dim), nn.ReLU(), nn.Dropout(config.patch_dropout)
        )
        block = BlockConfig(
            dim=config.dim,
            heads=config.heads,
            hidden=config.hidden,
            activation="relu",
            dropout=config.dropout,
            attention_dropout=config.dropout,
            impl=config.impl,
        )
        self.encoder = Encoder(block, depth=config.depth)
        self.embed = nn.Embedding(config.words + 1, config.dim)
        self.positions = SinePositions(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = GuidedDecoder(block, depth=config.depth, gate=config.gate)
        self.logits = nn.Linear(config.dim, config.words + 1)
        self._init_weights()

    def _init_weights(self) -> None:
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embed.weight, std=self.config.dim**-0.5)
        for layer in self.decoder.layers:
            if isinstance(gate := layer.gate, nn.Linear):
                nn.init.constant_(gate.bias, GATE_START)

    def forward(
        self,
        images: Float[Tensor, "b v 3 h w"],
        tokens: Int64[Tensor, "b n"],
        views: Bool[Tensor, "b v"] | None = None,
    ) -> Float[Tensor, "b n words"]:
        """Log-probabilities of the word after each word (teacher forcing).

        Args:
            images: Pictures with ImageNet's mean and deviation removed.
            tokens: Reports from their first 0 on, without the word to be predicted last.
            views: True = this view is there. None: all are.
        """
        return self.decode(tokens, self.encode(images, views)).log_probabilities

    def features(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c p q"]:
        """Feature maps of pictures, attended to by GIA."""
        maps: Tensor = self.extractor(images)
        return maps if self.gia is None else cast(Tensor, self.gia(maps))

    def encode(
        self,
        images: Float[Tensor, "b v 3 h w"],
        views: Bool[Tensor, "b v"] | None = None,
    ) -> Memory:
        """The tokens of the images; arguments as of the call."""
        if images.dim() != 5 or images.shape[2] != 3:
            raise ValueError(
                f"images must be (batch, views, 3, height, width), got {tuple(images.shape)}"
            )
        maps = self._features_of_views(images.flatten(0, 1), views)
        rows, columns = maps.shape[2:]
        patches = maps.flatten(2).transpose(1, 2)  # (b v, p q, c)
        patches = self.project(patches)
        if self.config.patch_positions == "sine":
            grid = patches.reshape(*images.shape[:2], rows, columns, -1)
            patches = self.positions(grid)
        patches = patches.reshape(images.shape[0], -1, patches.shape[-1])  # (b, v p q, c)
        mask = None if views is None else views.repeat_interleave(rows * columns, dim=1)
        tokens = self.encoder(patches, padding_mask=mask)
        return Memory(tokens, mask, (rows, columns))

    def _features_of_views(
        self, images: Float[Tensor, "n 3 h w"], views: Bool[Tensor, "b v"] | None
    ) -> Float[Tensor, "n c p q"]:
        """Feature maps; 0 of views that are not there, so that batch norms never see these."""
        if views is None:
            return self.features(images)
        there = views.flatten()
        rows = there.nonzero()[:, 0]
        if len(rows) == len(images):
            return self.features(images)
        found = self.features(images[rows if len(rows) else slice(0, 1)])
        maps = found.new_zeros(len(images), *found.shape[1:])
        return maps.index_copy(0, rows, found[: len(rows)])

    def decode(
        self,
        tokens: Int64[Tensor, "b n"],
        memory: Memory,
        *,
        cache: StackCache | None = None,
    ) -> Words:
        """The words after some words.

        Args:
            tokens: From the first 0 on; with a cache, those that it does not hold yet.
            memory: Of `encode`.
            cache: Of `decoder.new_cache`.
        """
        done = 0 if cache is None else cache.length
        x = self.embed(tokens) * math.sqrt(self.config.dim)
        x = self.dropout(self.positions(x, offset=done))
        seen = None if done else memory.tokens
        x, reliance = self.decoder(x, seen, image_mask=memory.mask, cache=cache)
        return Words(self.logits(x).log_softmax(-1), reliance)

    @torch.no_grad()
    def generate(
        self,
        images: Float[Tensor, "b v 3 h w"],
        views: Bool[Tensor, "b v"] | None = None,
        *,
        beam: int = 3,
        most: int = 60,
        trigram_penalty: float = 0.0,
        use_cache: bool = True,
    ) -> Decoded:
        """Write reports by beam search.

        Args:
            images: As of the call.
            views: As of the call.
            beam: Beams; 1 is greedy.
            most: Words at most, the end included.
            trigram_penalty: Of a word that repeats what followed the same two words, as of
                `beam_search`.
            use_cache: False computes all words anew at every step: the same, slower.
        """
        memory = self.encode(images, views)
        return self.write(
            memory, beam=beam, most=most, trigram_penalty=trigram_penalty, use_cache=use_cache
        )

    @torch.no_grad()
    def write(
        self,
        memory: Memory,
        *,
        beam: int = 3,
        most: int = 60,
        trigram_penalty: float = 0.0,
        use_cache: bool = True,
    ) -> Decoded:
        """As `generate`, from images that are encoded already."""
        batch = len(memory.tokens)
        mask = None if memory.mask is None else memory.mask.repeat_interleave(beam, dim=0)
        rows = Memory(memory.tokens.repeat_interleave(beam, dim=0), mask, memory.grid)
        step = _CachedStep(self, rows, most) if use_cache else _WholeStep(self, rows)
        return beam_search(
            step,
            batch=batch,
            beam=beam,
            most=most,
            trigram_penalty=trigram_penalty,
            device=memory.tokens.device,
        )


class _CachedStep:
    """One more word of every row, with a cache."""

    def __init__(self, model: Ivgn, memory: Memory, most: int) -> None:
        self.model, self.memory = model, memory
        rows = len(memory.tokens)
        self.cache = model.decoder.new_cache(rows, most, dtype=memory.tokens.dtype)

    def __call__(self, last: Tensor, parents: Tensor) -> Tensor:
        for layer in self.cache.layers:  # the rows of a sample share its images: those stay
            layer.own.reorder(parents)
        words = self.model.decode(last[:, None], self.memory, cache=self.cache)
        return words.log_probabilities[:, -1]


class _WholeStep:
    """One more word of every row, computed from its first word on."""

    def __init__(self, model: Ivgn, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.tokens = torch.zeros(len(memory.tokens), 0, dtype=torch.long)

    def __call__(self, last: Tensor, parents: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens.to(last.device)[parents], last[:, None]], dim=1)
        return self.model.decode(self.tokens, self.memory).log_probabilities[:, -1]


def build_extractor(backbone: Backbone) -> tuple[nn.Module, int]:
    """A network from pictures to feature maps, without pretrained weights, and its channels."""
    if backbone == "conv":
        layers: list[nn.Module] = []
        inputs = 3
        for width in CONV_WIDTHS:
            layers += [
                nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            inputs = width
        return nn.Sequential(*layers), CONV_WIDTHS[-1]
    from torchvision import models  # type: ignore[import-untyped]

    network = models.get_model(backbone, weights=None)
    parts = OrderedDict((n, m) for n, m in network.named_children() if n not in ("avgpool", "fc"))
    return nn.Sequential(parts), int(network.fc.in_features)
