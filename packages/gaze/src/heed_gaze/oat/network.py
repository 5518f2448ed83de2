"""OAT: Object-level Attention Transformer for scanpaths over the objects of a shelf.

Fang, Yu, Zhang, van der Lans and Shi, "OAT: Object-Level Attention Transformer for Gaze Scanpath
Prediction" (ECCV 2024, arXiv 2407.13335). An encoder sees every object of a layout and the target;
a decoder, step by step, the objects that were fixated; a pointer head chooses the next object, or
STOP, which is the attention paid to the target's token.

Ids of a layout with N objects: objects 0 ... N - 1 in reading order, STOP = N, PAD = N + 1, BOS =
N + 2 (an input only).

Differs from the paper's code: two layers without any effect are left out; crops that no object has
are ones everywhere; objects that are not there (layouts of several sizes in one batch) are masked
as keys and have the logit -inf; every crop is encoded once, not once per token. Without a target
(free viewing) the target's token has no crop and no place: it stands for stopping alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from heed_core.attention.multi_head import MultiHeadAttention
from heed_core.attention.pointer import PointerHead
from heed_core.blocks import BlockConfig, Decoder, Encoder
from heed_core.positions import SinePositions, axis_width, gaussian_gram_codes
from heed_gaze.oat.crops import CropEncoder, Pyramid, flat_width
from heed_gaze.oat.places import AXES, UNKNOWN, GridPlaces, PlaceCode

NO_TARGET = -1
STOP, PAD, BOS = 0, 1, 2
"""Ids of what is no object, counted from the number of objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OatConfig:
    """All that is needed to rebuild the network."""

    dim: int = 512
    """Channels of a token: half of them from the crop, half from its place."""
    heads: int = 4
    hidden: int = 512
    """Channels inside the feed-forward layers."""
    encoder_depth: int = 4
    decoder_depth: int = 4
    dropout: float = 0.1
    crop: tuple[int, int] = (150, 93)
    """Height and width of a crop, pixels."""
    spp: Pyramid = 0
    """Levels of spatial pyramid pooling, for crops of any size; 0: none."""
    places: PlaceCode = "gaussian"
    """Code of rows and columns: the paper's table, or one of two ablations."""
    table_rows: int = 14
    """Indices in the table: at least max(rows + 1, columns, 2) of every layout."""
    sigma: float = 2.0
    """Cells over which the similarity of codes falls."""
    table_fit: Literal["exact", "adam"] = "exact"
    """The table by factorisation, or by the paper's optimisation of 10,000 steps, which makes the
    best of too few channels."""
    table_seed: int = 0
    target_pos: Literal["true", "none"] = "true"
    """Whether the encoder is told where the target is, as in the paper; a searcher is not."""
    choice: Literal["pointer", "linear"] = "pointer"
    """Object attention, or the ablation: a linear layer for layouts of one size."""
    pointer_heads: int = 2
    pointer_dim: int | None = None
    """Channels of a head of the pointer; None: `dim`."""
    pointer_scale_dim: int | None = None
    """Products are divided by its square root; None: `dim`."""
    objects: int | None = None
    """Objects of every layout; for `choice="linear"` alone."""

    def __post_init__(self) -> None:
        if self.dim % 2 or self.dim < 2 or self.dim % self.heads:
            raise ValueError(f"dim must be even and a multiple of heads={self.heads}: {self.dim}")
        for name in ("hidden", "encoder_depth", "decoder_depth", "pointer_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pointer_dim", "pointer_scale_dim", "objects"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.table_rows < 2 or self.sigma <= 0:
            raise ValueError(
                f"table_rows must be at least 2 and sigma above 0: {self.table_rows, self.sigma}"
            )
        if (self.choice == "linear") != (self.objects is not None):
            raise ValueError("objects belongs to choice='linear', and that needs it")
        flat_width(self.crop, self.spp)
        if self.places == "gaussian" and self.table_fit == "exact":
            width = axis_width(self.dim - self.dim // 2, AXES)
            gaussian_gram_codes(self.table_rows, width, sigma=self.sigma)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Layouts whose objects the network sees; padded to the same number of objects."""

    crops: tuple[Float[Tensor, "_ 3 _ _"], ...]
    """Of each layout, its objects' pictures; the layouts may differ in number and size."""
    cells: Int64[Tensor, "s n 2"]
    """Row and column of each object."""
    shape: Int64[Tensor, "s 2"]
    """Rows and columns of each grid."""
    present: Bool[Tensor, "s n"]
    """True = an object, False = padding."""

    def to(self, device: torch.device | str) -> Scenes:
        """The scenes on another device."""
        return Scenes(
            crops=tuple(crop.to(device) for crop in self.crops),
            cells=self.cells.to(device),
            shape=self.shape.to(device),
            present=self.present.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the encoder made of trials: all that the decoder needs."""

    tokens: Float[Tensor, "b m c"]
    """Of the objects, and of the target at the end (m = N + 1)."""
    there: Bool[Tensor, "b m"]
    table: Float[Tensor, "b ids c"]
    """The decoder's token of every id (N + 3)."""
    keys: Float[Tensor, "b h m d"] | None
    """Of the pointer head."""

    @property
    def objects(self) -> int:
        """N, the objects of the largest layout."""
        return self.tokens.shape[1] - 1

    def rows(self, index: Int64[Tensor, " r"]) -> Memory:
        """The memories of some trials, in any order and number."""
        keys = None if self.keys is None else self.keys[index]
        return replace(
            self,
            tokens=self.tokens[index],
            there=self.there[index],
            table=self.table[index],
            keys=keys,
        )


class Oat(nn.Module):
    """Logits of the next fixated object, of stopping, and of padding.

    Args:
        config: Of the network.

    Example:
        >>> config = OatConfig(dim=96, hidden=16, encoder_depth=1, decoder_depth=1)
        >>> cells = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]])
        >>> Oat(config)(
        ...     torch.rand(1, 4, 3, 150, 93), cells, torch.tensor([2]), torch.tensor([[0, 2]])
        ... ).shape
        torch.Size([1, 3, 6])
    """

    def __init__(self, config: OatConfig) -> None:
        super().__init__()
        self.config = config
        half = config.dim // 2
        self.crop_encoder = CropEncoder(half, crop=config.crop, spp=config.spp)
        self.places = GridPlaces(
            config.dim - half,
            code=config.places,
            rows=config.table_rows,
            sigma=config.sigma,
            fit=config.table_fit,
            seed=config.table_seed,
        )
        block = BlockConfig(
            dim=config.dim,
            heads=config.heads,
            hidden=config.hidden,
            activation="relu",
            norm_first=False,
            dropout=config.dropout,
            attention_dropout=config.dropout,
        )
        self.encoder = Encoder(block, depth=config.encoder_depth)
        self.steps = SinePositions(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = Decoder(replace(block, causal=True), depth=config.decoder_depth)
        self.pointer = _pointer(config) if config.choice == "pointer" else None
        self.classify = (
            None if config.objects is None else nn.Linear(config.dim, config.objects + 2)
        )
        self._init_weights()

    def forward(
        self,
        crops: Float[Tensor, "b n 3 h w"],
        cells: Int64[Tensor, "b n 2"],
        target: Int64[Tensor, " b"],
        scanpath: Int64[Tensor, "b t"],
        shape: Int64[Tensor, "b 2"] | None = None,
        present: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b steps ids"]:
        """Logits of the first object and of what follows each given one, teacher forced.

        Args:
            crops: Pictures of the objects, 0 to 1.
            cells: Row and column of each.
            target: Index of the object that is looked for; -1: none.
            scanpath: Fixated objects; STOP and PAD ids after the end of shorter ones.
            shape: Rows and columns of the grids; by default as far as `cells` reach.
            present: True = an object, False = padding.

        Returns:
            (b, t + 1, N + 2).
        """
        batch, count = crops.shape[:2]
        if shape is None:
            shape = cells.amax(dim=1) + 1
        if present is None:
            present = torch.ones(batch, count, dtype=torch.bool, device=crops.device)
        features = self.crop_encoder(crops.flatten(0, 1)).view(batch, count, -1)
        filler = self._filler(crops[0, 0])
        memory = self.remember(features, filler, cells, shape, present, target)
        return self.follow(memory, scanpath)

    def score(
        self,
        scenes: Scenes,
        scene: Int64[Tensor, " b"],
        target: Int64[Tensor, " b"],
        scanpath: Int64[Tensor, "b t"],
    ) -> Float[Tensor, "b steps ids"]:
        """As `forward`, for trials that share layouts: each layout is encoded once.

        Args:
            scenes: The layouts.
            scene: Which of them each trial saw.
            target: As in `forward`.
            scanpath: As in `forward`.
        """
        return self.follow(self.read(scenes, scene, target), scanpath)

    def read(
        self, scenes: Scenes, scene: Int64[Tensor, " b"], target: Int64[Tensor, " b"]
    ) -> Memory:
        """What the encoder makes of trials; arguments as of `score`."""
        features = self.features(scenes.crops, scenes.present.shape[1])[scene]
        filler = self._filler(scenes.crops[0][0])
        return self.remember(
            features,
            filler,
            scenes.cells[scene],
            scenes.shape[scene],
            scenes.present[scene],
            target,
        )

    def features(
        self, crops: Sequence[Float[Tensor, "_ 3 _ _"]], most: int
    ) -> Float[Tensor, "s {most} e"]:
        """Vectors of the crops of several layouts, padded to `most` objects."""
        sizes = [crop.shape[-2:] for crop in crops]
        found: list[Tensor | None] = [None] * len(crops)
        for size in set(sizes):
            chosen = [index for index, own in enumerate(sizes) if own == size]
            joined = self.crop_encoder(torch.cat([crops[index] for index in chosen]))
            parts = joined.split([len(crops[index]) for index in chosen])
            for index, part in zip(chosen, parts, strict=True):
                found[index] = F.pad(part, (0, 0, 0, most - len(part)))
        return torch.stack([part for part in found if part is not None])

    def remember(
        self,
        features: Float[Tensor, "b n e"],
        filler: Float[Tensor, " e"],
        cells: Int64[Tensor, "b n 2"],
        shape: Int64[Tensor, "b 2"],
        present: Bool[Tensor, "b n"],
        target: Int64[Tensor, " b"],
        target_features: Float[Tensor, "b e"] | None = None,
    ) -> Memory:
        """Encode objects whose crops are vectors already.

        Args:
            features: Of the objects.
            filler: Of the crop of ones, which stands for what is no object.
            cells: As in `forward`.
            shape: As in `forward`.
            present: As in `forward`.
            target: As in `forward`.
            target_features: Of a target that is shown in another picture than on the layout.
        """
        batch = features.shape[0]
        searched = target != NO_TARGET
        index = target.clamp(min=0)
        rows = torch.arange(batch, device=target.device)
        if target_features is None:
            target_features = torch.where(searched[:, None], features[rows, index], filler)
        objects = torch.cat([features, self.places(_flagged(cells, 0))], dim=-1)
        place = cells[rows, index].masked_fill(~searched[:, None], UNKNOWN)
        seen = self._token(target_features, place)
        known = place if self.config.target_pos == "true" else torch.full_like(place, UNKNOWN)
        wanted = self._token(target_features, known)
        tokens = torch.cat([objects, wanted[:, None]], dim=1)
        there = F.pad(present, (0, 1), value=True)
        tokens = self.encoder(tokens, padding_mask=there)
        fixated = objects.clone()
        fixated[rows, index] = torch.where(searched[:, None], seen, fixated[rows, index])
        return Memory(
            tokens=tokens,
            there=there,
            table=torch.cat([fixated, self._others(filler, shape, present.sum(dim=1))], dim=1),
            keys=None if self.pointer is None else self.pointer.project(tokens),
        )

    def follow(self, memory: Memory, scanpath: Int64[Tensor, "b t"]) -> Float[Tensor, "b t1 ids"]:
        """Logits of every step of scanpaths, teacher forced."""
        begin = torch.full_like(memory.there[:, :1], memory.objects + BOS, dtype=torch.long)
        ids = torch.cat([begin, scanpath], dim=1)
        tokens = memory.table.gather(1, ids[..., None].expand(-1, -1, memory.table.shape[2]))
        decoded = self.decoder(
            self.dropout(self.steps(tokens)),
            memory.tokens,
            padding_mask=ids != memory.objects + PAD,
            context_padding_mask=memory.there,
        )
        return self.choose(memory, decoded)

    def choose(self, memory: Memory, decoded: Float[Tensor, "b t c"]) -> Float[Tensor, "b t ids"]:
        """Logits of the objects, STOP and PAD from the decoder's tokens."""
        if self.pointer is not None:
            return cast(Tensor, self.pointer(decoded, keys=memory.keys, memory_mask=memory.there))
        assert self.classify is not None
        if memory.objects != self.config.objects:
            raise ValueError(
                f"choice='linear' serves layouts of {self.config.objects} objects, got "
                f"{memory.objects}"
            )
        absent = ~F.pad(memory.there, (0, 1), value=True)
        return cast(Tensor, self.classify(decoded)).masked_fill(absent[:, None], -torch.inf)

    def _token(self, features: Tensor, place: Tensor) -> Tensor:
        """The token of the target, at a place (b, 2)."""
        return torch.cat([features, self.places(_flagged(place, 1))], dim=-1)

    def _others(self, filler: Tensor, shape: Tensor, count: Tensor) -> Tensor:
        """The tokens of STOP, PAD and BOS, (b, 3, c).

        STOP and PAD stand where the next objects would be, BOS in the middle of the grid.
        """
        stop, columns = count, shape[:, 1]
        after = [torch.stack([k // columns, k % columns], dim=-1) for k in (stop, stop + 1)]
        places = torch.stack([*after, shape // 2], dim=1)
        codes = self.places(_flagged(places, 0))
        return torch.cat([filler.expand(*codes.shape[:2], -1), codes], dim=-1)

    def _filler(self, like: Tensor) -> Tensor:
        return cast(Tensor, self.crop_encoder(torch.ones_like(like)[None]))[0]

    def _init_weights(self) -> None:
        """Glorot's uniform weights, as the paper's code draws them for its stacked layers."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith("places."):
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MultiHeadAttention):
                for layer in (module.query, module.key, module.value):
                    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(0.5))
                for layer in (module.query, module.key, module.value, module.out):
                    nn.init.zeros_(layer.bias)
            elif isinstance(module, PointerHead):
                for layer in (module.query, module.key):
                    for head in layer.weight.data.view(module.heads, module.head_dim, -1):
                        nn.init.xavier_uniform_(head)


def _pointer(config: OatConfig) -> PointerHead:
    scale_dim = config.dim if config.pointer_scale_dim is None else config.pointer_scale_dim
    return PointerHead(
        config.dim,
        heads=config.pointer_heads,
        extra_slots=1,
        head_dim=config.pointer_dim,
        scale=scale_dim**-0.5,
    )


def _flagged(cells: Tensor, flag: int) -> Tensor:
    return F.pad(cells, (0, 1), value=flag)
