"""Transformer brain encoder (arXiv 2505.17329), and the encoders that it is compared with.

A frozen network's tokens F become one vector t_r per region r by learned queries (keys F + position
code, values F); one linear map per hemisphere, shared by its regions, gives the responses,

    y_v = sum_r M[r, v] (w_v . t_r + b_v)

so that only its own regions' queries speak for a vertex. Never computed: the responses of all
vertices from all regions. Each region's tokens meet the rows of its own vertices alone, in pairs
sorted by region; regions that do not overlap cost one product per vertex.

| kind | what t_r is |
| --- | --- |
| transformer | what the query of region r found, by its attention |
| factorised | mean of F with a learned map per region: a fixed receptive field |
| pooled | mean of F; of a class token, that token |
| saliency | mean of F with the given map of each image |
| conv | none: convolution to 11 x 11 x 256, then a dense layer (the official "linear") |

Differs from the official module: its dead weights (an unused 1 x 1 convolution, self-attention of
one layer, a norm) are absent; predictions of regions that overlap are averaged unless
`overlap="sum"`; the official code's second transformer is not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed_core.attention.query_readout import CrossAttentionReadout, factorised_pool
from heed_core.positions import masked_sine_grid, sine_grid
from heed_core.sites import Probe
from heed_neuro.brain_encoder.regions import Regions, overlap_weights, places

Kind = Literal["transformer", "factorised", "pooled", "saliency", "conv"]
Readout = Literal["rois_all", "hemis", "streams", "voxels"]
CONV_WIDTH = 256
"""Channels of the official convolution, with kernel and step 3."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The vertices of one hemisphere (or of one array of neurons), by region."""

    name: str
    vertices: int
    regions: tuple[str, ...] = ("all",)
    sizes: tuple[int, ...] = ()
    """Vertices of each region; empty: all vertices in the first."""
    overlap: int = 1
    """The most regions that a vertex is in."""

    @classmethod
    def of(cls, name: str, regions: Regions) -> Group:
        """The sizes of a group's regions."""
        return cls(
            name=name,
            vertices=regions.vertices,
            regions=regions.names,
            sizes=regions.sizes,
            overlap=regions.overlap,
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Vertices of each region."""
        return self.sizes or (self.vertices, *[0] * (len(self.regions) - 1))

    def __post_init__(self) -> None:
        if self.vertices < 1 or not self.regions or len(self.counts) != len(self.regions):
            raise ValueError(
                f"group {self.name!r} must have vertices, and a size for each of its regions"
            )


PAPER_GROUPS = tuple(
    Group(name=name, vertices=vertices, regions=tuple(f"{name}{r}" for r in range(25)))
    for name, vertices in (("lh", 19004), ("rh", 20544))
)
"""The sizes of subject 1 of the Natural Scenes Dataset."""


@dataclass(frozen=True, kw_only=True)
class BrainEncoderConfig:
    """All that is needed to rebuild the network."""

    kind: Kind = "transformer"
    readout: Readout = "rois_all"
    """What has a query: every region, every hemisphere, every stream, every vertex."""
    overlap: Literal["mean", "sum"] = "mean"
    """What a vertex in several regions is given: the mean of their predictions, or the sum."""
    channels: int = 768
    """Of a token, as the frozen network makes it."""
    grid: tuple[int, int] = (31, 31)
    """Rows and columns of tokens; (1, 1) for a class token."""
    dim: int = 768
    """Of a query; tokens with other channels are projected to it."""
    heads: int = 16
    ffn: int = 1024
    dropout: float = 0.1
    value_pos: bool = False
    """Whether values carry the position code too: a different model, for comparison."""
    groups: tuple[Group, ...] = PAPER_GROUPS
    """Taken from the data."""

    def __post_init__(self) -> None:
        if self.kind == "transformer" and (self.dim % 4 or self.dim % self.heads):
            raise ValueError(
                f"dim must be a multiple of 4 and of heads={self.heads}, got {self.dim}"
            )
        if min(self.grid) < 1 or self.channels < 1 or not self.groups:
            raise ValueError("grid and channels must be at least 1, and there must be a group")
        if self.readout == "voxels" and self.kind not in ("transformer", "factorised"):
            raise ValueError(f"readout='voxels' has no effect with kind={self.kind!r}")

    @property
    def queries(self) -> tuple[int, ...]:
        """Queries of each group."""
        if self.readout == "voxels":
            return tuple(group.vertices for group in self.groups)
        return tuple(len(group.regions) for group in self.groups)

    @property
    def width(self) -> int:
        """Channels of what the linear read-out reads."""
        return self.dim if self.kind == "transformer" else self.channels


class RegionReadout(nn.Module):
    """One linear map for all regions of a group; a vertex is read from its own regions alone.

    Args:
        group: Its vertices and regions.
        width: Channels of a region's vector.
        overlap: As in `BrainEncoderConfig`.
    """

    vertex: Tensor
    """The vertex of each pair of region and vertex, sorted by region."""
    place: Tensor
    """(k, vertices): the pairs of each vertex; past the last pair where it has fewer than k."""
    weight: Tensor

    def __init__(self, group: Group, width: int, overlap: str) -> None:
        super().__init__()
        self.group, self.overlap = group, overlap
        self.linear = nn.Linear(width, group.vertices)
        pairs = sum(group.counts)
        self.register_buffer("vertex", torch.arange(pairs) % group.vertices)
        place = torch.arange(group.vertices).repeat(group.overlap, 1)
        place[1:] = pairs
        self.register_buffer("place", place)
        self.register_buffer("weight", torch.ones(group.vertices))

    def settle(self, regions: Regions) -> None:
        """Take the masks of a brain.

        Raises:
            ValueError: They are not of the sizes and the overlap that this was built for.
        """
        found = Group.of(self.group.name, regions)
        if (found.counts, found.overlap) != (self.group.counts, self.group.overlap):
            raise ValueError("the regions are of other sizes or overlap than those of this group")
        vertex, place = places(regions)
        self.vertex.copy_(torch.from_numpy(vertex))
        self.place.copy_(torch.from_numpy(place))
        self.weight.copy_(torch.from_numpy(overlap_weights(regions, self.overlap)))

    def forward(self, tokens: Float[Tensor, "b r c"]) -> Float[Tensor, "b v"]:
        """Responses from one vector per region."""
        rows, shifts = self.linear.weight[self.vertex], self.linear.bias[self.vertex]
        counts = list(self.group.counts)
        parts = zip(torch.split(rows, counts), torch.split(shifts, counts), strict=True)
        found = [
            F.linear(tokens[:, region], part, shift)
            for region, (part, shift) in enumerate(parts)
            if counts[region]
        ]
        pairs = F.pad(torch.cat(found, dim=1), (0, 1))  # (b, pairs + 1): the last one is no pair
        total = pairs[:, self.place[0]]
        for rank in range(1, self.group.overlap):
            total = total + pairs[:, self.place[rank]]
        return total * self.weight


class VertexReadout(nn.Module):
    """Each vertex is read from its own vector: the diagonal of one linear map."""

    def __init__(self, group: Group, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, group.vertices)

    def forward(self, tokens: Float[Tensor, "b v c"]) -> Float[Tensor, "b v"]:
        """Responses from one vector per vertex."""
        return torch.einsum("bvc,vc->bv", tokens, self.linear.weight) + self.linear.bias


class ConvEncoder(nn.Module):
    """Convolution to fewer tokens and channels, then a dense layer: the official "linear"."""

    def __init__(self, config: BrainEncoderConfig) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(config.channels, CONV_WIDTH, 3, stride=3, padding=1)
        places = [(size - 1) // 3 + 1 for size in config.grid]
        width = CONV_WIDTH * places[0] * places[1]
        self.dense = nn.ModuleList(nn.Linear(width, group.vertices) for group in config.groups)

    def forward(self, features: Float[Tensor, "b h w c"]) -> tuple[Tensor, ...]:
        """Responses of each group."""
        reduced = self.reduce(features.movedim(-1, 1)).flatten(1)
        return tuple(cast(Tensor, layer(reduced)) for layer in self.dense)


class FactorisedMaps(nn.Module):
    """A learned map over tokens per query, the same for all images; a softmax of its logits.

    Its site `probe` states the maps, (b, 1, queries, tokens).
    """

    def __init__(self, queries: int, tokens: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(queries, tokens))
        nn.init.normal_(self.logits, std=0.02)
        self.probe = Probe()

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b q c"]:
        """The mean of the tokens with each map."""
        maps = self.logits.softmax(dim=-1)
        self.probe(lambda: maps.expand(len(tokens), 1, -1, -1))
        return factorised_pool(tokens, maps)


class BrainEncoder(nn.Module):
    """From the tokens of a frozen network to the responses of every vertex.

    Args:
        config: Sizes, and which encoder.

    Example:
        >>> groups = (Group(name="lh", vertices=9), Group(name="rh", vertices=8))
        >>> config = BrainEncoderConfig(channels=12, dim=16, heads=2, grid=(3, 4), groups=groups)
        >>> [y.shape[1] for y in BrainEncoder(config)(torch.randn(1, 3, 4, 12))]
        [9, 8]
    """

    def __init__(self, config: BrainEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = ConvEncoder(config) if config.kind == "conv" else None
        if self.conv is not None:
            return
        transformer = config.kind == "transformer"
        projected = transformer and config.channels != config.dim
        self.project = nn.Linear(config.channels, config.dim) if projected else nn.Identity()
        queries = sum(config.queries)
        if transformer:
            self.decoder = CrossAttentionReadout(
                queries,
                config.dim,
                heads=config.heads,
                ffn=config.ffn,
                value_pos=config.value_pos,
                dropout=config.dropout,
            )
        elif config.kind == "factorised":
            self.maps = FactorisedMaps(queries, config.grid[0] * config.grid[1])
        vertex = config.readout == "voxels"
        self.readouts = nn.ModuleList(
            VertexReadout(group, config.width)
            if vertex
            else RegionReadout(group, config.width, config.overlap)
            for group in config.groups
        )

    def settle(self, regions: Sequence[Regions]) -> None:
        """Take the masks of a brain, one per group."""
        if self.conv is not None or self.config.readout == "voxels":
            return
        for readout, own in zip(self.readouts, regions, strict=True):
            cast(RegionReadout, readout).settle(own)

    def forward(
        self,
        features: Float[Tensor, "b h w c"],
        saliency: Float[Tensor, "b h w"] | None = None,
        real: Bool[Tensor, "b h w"] | None = None,
    ) -> tuple[Float[Tensor, "b ..."], ...]:
        """Responses of the vertices of each group.

        Args:
            features: Tokens of a frozen network.
            saliency: Of each token, for `kind="saliency"`; need not sum to 1.
            real: True = token of the picture, False = of its padding; transformer only.
        """
        wanted = (*self.config.grid, self.config.channels)
        if tuple(features.shape[1:]) != wanted:
            raise ValueError(f"features must be (batch, {wanted}), got {tuple(features.shape)}")
        if self.conv is not None:
            return cast(tuple[Tensor, ...], self.conv(features))
        tokens = self.region_tokens(features, saliency, real)
        found, start = [], 0
        for readout, queries in zip(self.readouts, self.config.queries, strict=True):
            found.append(cast(Tensor, readout(tokens[:, start : start + queries])))
            start += queries
        return tuple(found)

    def region_tokens(
        self,
        features: Float[Tensor, "b h w c"],
        saliency: Float[Tensor, "b h w"] | None = None,
        real: Bool[Tensor, "b h w"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """One vector per query, those of the first group first."""
        kind, queries = self.config.kind, sum(self.config.queries)
        tokens = cast(Tensor, self.project(features)).flatten(1, 2)
        if kind == "transformer":
            padding = None if real is None else real.flatten(1)
            code = self._positions(features, real).flatten(-3, -2)
            return cast(Tensor, self.decoder(tokens, positions=code, padding_mask=padding))
        if kind == "factorised":
            return cast(Tensor, self.maps(tokens))
        if kind == "pooled":
            return tokens.mean(1, keepdim=True).expand(-1, queries, -1)
        if saliency is None:
            raise ValueError("kind='saliency' needs the saliency of each image")
        weights = saliency.flatten(1).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return torch.einsum("bn,bnc->bc", weights, tokens)[:, None].expand(-1, queries, -1)

    def _positions(self, features: Tensor, real: Tensor | None) -> Tensor:
        dim = self.config.dim
        if real is not None:
            return masked_sine_grid(real, dim).to(features.dtype)
        shape = (features.shape[1], features.shape[2])
        return sine_grid(shape, dim, normalise=True, device=features.device).to(features.dtype)

    def l2_penalty(self) -> Float[Tensor, ""]:
        """Sum of the norms of all parameters: the official regulariser of `kind="conv"`."""
        return torch.stack([parameter.norm() for parameter in self.parameters()]).sum()


def encoding_loss(
    predicted: Sequence[Float[Tensor, "b _"]], measured: Sequence[Float[Tensor, "b _"]]
) -> Float[Tensor, ""]:
    """Sum over groups of the mean squared error over batch and vertices.

    Vertices without a measurement (NaN) do not count.
    """
    total = predicted[0].new_zeros(())
    for found, wanted in zip(predicted, measured, strict=True):
        there = torch.isfinite(wanted)
        error = torch.where(there, found - wanted, torch.zeros_like(found)).square()
        total = total + error.sum() / there.sum().clamp(min=1)
    return total


def count_live(config: BrainEncoderConfig) -> int:
    """Parameters of the network, counted without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in BrainEncoder(config).parameters())
