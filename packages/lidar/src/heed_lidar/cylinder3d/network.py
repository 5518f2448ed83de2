"""Cylinder3D (Zhu et al., CVPR 2021, arXiv 2011.10033): cylindrical voxels, asymmetric kernels.

    point net    9 features -> 256, maximum over the points of a voxel -> 16
    stem         16 -> w, sparse voxels from here on
    down 0..3    residual body i -> o, then a strided convolution:  w -> 2w -> 4w -> 8w -> 16w
    up 0..3      CAB 3x3x3, inverse convolution, + skip, then a body:  16w -> 16w -> 8w -> 4w -> 2w
    context      u -> [g * u; u], g a sum of three gates (dimension decomposition)
    head         3x3x3, 4w -> classes

Spatial axes are (rho, phi, z). CAB(k) is a submanifold convolution without bias, LeakyReLU(0.01),
then batch normalisation: the activation comes before the norm. A point has the class of its voxel.

`CylindricalNetwork` is the skeleton; what differs between networks is the body of a level. CurbNet
puts multi-scale channel attention there.

Differs from the published code, which is the paper's earlier version and is followed otherwise (it
has no point-wise refinement): every kernel has its own neighbours, as the paper means it (see
`legacy`); a point is never given the class that is ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from jaxtyping import Float, Int32, Int64, Integer
from torch import Tensor, nn

from heed_core.sparse import (
    CAB,
    SparseConv3d,
    SparseInverseConv3d,
    SparseTensor,
    SubMConv3d,
    scatter_reduce_rows,
    unique_voxels,
)
from heed_core.sparse.blocks import norm_rows
from heed_lidar.cylinder3d.legacy import share_neighbours
from heed_lidar.cylindrical import POINT_FEATURES, CylindricalGrid
from heed_lidar.losses import IGNORE

Kernel = tuple[int, int, int]
ACROSS: Kernel = (1, 3, 3)
"""Spans phi and z."""
ALONG: Kernel = (3, 1, 3)
"""Spans rho and z."""
CUBE: Kernel = (3, 3, 3)
Preset = Literal["base", "small", "tiny"]
POINTS_AT_ONCE = 2**14
"""Whose features are in memory together where nothing is learnt."""
STRIDES: tuple[Kernel, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))


@dataclass(frozen=True, kw_only=True)
class Level:
    """What the body of a level is made for."""

    channels_in: int
    """Of the encoder's body; of the voxels below, in the decoder."""
    channels_out: int
    """Of the result, and of the input of a decoder's body."""
    height: int
    """Cells along z."""


Body = Callable[[Level], nn.Module]


def check_sizes(classes: int, width: int, point_features: int, voxel_features: int) -> None:
    """Refuse sizes that no network has.

    Raises:
        ValueError: It names the setting.
    """
    if classes < 2:
        raise ValueError(f"classes counts the ignored class too: at least 2, got {classes}")
    for name, value in (
        ("width", width),
        ("point_features", point_features),
        ("voxel_features", voxel_features),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Cylinder3dConfig:
    """All that is needed to rebuild the network."""

    classes: int = 20
    """Classes to tell apart, the ignored class 0 included."""
    width: int = 32
    """Channels of the finest voxels; doubled at each of the four coarser levels."""
    grid: CylindricalGrid = field(default_factory=CylindricalGrid)
    """The cells around the sensor."""
    point_features: int = 256
    """Channels of a point before the maximum over its voxel."""
    voxel_features: int = 16
    """Channels of a voxel that the stem is given."""
    legacy_rulebooks: bool = False
    """Compute what published spconv 1.x checkpoints were trained with: convolutions of a block
    share the neighbours of its first kernel, whatever their own kernel is."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, naming the setting."""
        check_sizes(self.classes, self.width, self.point_features, self.voxel_features)


PRESETS: Mapping[Preset, Cylinder3dConfig] = {
    "base": Cylinder3dConfig(),
    "small": Cylinder3dConfig(width=16),
    "tiny": Cylinder3dConfig(width=8, grid=CylindricalGrid(shape=(240, 180, 16))),
}
"""The paper's network, one with half of its channels, and one that a laptop can train."""


@dataclass(frozen=True, kw_only=True)
class VoxelLogits:
    """What a network says of the occupied voxels, and which voxel each point is in."""

    logits: Float[Tensor, "v c"]
    """Scores of every class, the ignored class included."""
    coords: Int32[Tensor, "v 4"]
    """Scan, rho, phi and z of each voxel, rows in lexicographic order."""
    voxel_of_point: Int64[Tensor, " p"]
    """Row of each point's voxel."""

    @property
    def masked(self) -> Float[Tensor, "v c"]:
        """The logits with the ignored class at -inf: nothing is predicted to be ignored."""
        ignored = torch.arange(self.logits.shape[1], device=self.logits.device) == IGNORE
        return self.logits.masked_fill(ignored, -torch.inf)

    @property
    def point_logits(self) -> Float[Tensor, "p c"]:
        """The masked logits of each point's voxel."""
        return self.masked[self.voxel_of_point]

    @property
    def point_classes(self) -> Int64[Tensor, " p"]:
        """The likeliest class of each point, never the ignored one."""
        return self.masked.argmax(dim=1)[self.voxel_of_point]


class PointNet(nn.Module):
    """Features of points, and of voxels by the maximum over their points.

    Args:
        dim: Channels of a point.
        voxel_dim: Channels of a voxel.
    """

    def __init__(self, dim: int, voxel_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(POINT_FEATURES)
        self.layers = nn.Sequential(
            _point_layer(POINT_FEATURES, 64),
            _point_layer(64, 128),
            _point_layer(128, 256),
            nn.Linear(256, dim),
        )
        self.compress = nn.Linear(dim, voxel_dim)

    def forward(
        self,
        points: Float[Tensor, "p 9"],
        voxel_of_point: Int64[Tensor, " p"],
        num_voxels: int,
    ) -> Float[Tensor, "v c"]:
        """The features of each voxel."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            features = self.layers(self.norm(points))
            strongest = scatter_reduce_rows(features, voxel_of_point, num_voxels, "max")
        else:
            strongest = self._strongest_by_parts(points, voxel_of_point, num_voxels)
        return torch.relu_(self.compress(strongest))

    def _strongest_by_parts(
        self, points: Float[Tensor, "p 9"], voxel_of_point: Int64[Tensor, " p"], num_voxels: int
    ) -> Float[Tensor, "v c"]:
        """The maximum over the points of each voxel, without the features of all points at once."""
        strongest = points.new_full((num_voxels, self.compress.in_features), -torch.inf)
        parts = (torch.split(x, POINTS_AT_ONCE) for x in (points, voxel_of_point))
        for some, voxels in zip(*parts, strict=True):
            features = self.layers(self.norm(some)).to(strongest.dtype)
            strongest.scatter_reduce_(0, voxels[:, None].expand_as(features), features, "amax")
        return strongest


def _point_layer(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels_in, channels_out),
        nn.BatchNorm1d(channels_out),
        nn.ReLU(inplace=True),
    )


class AsymmetricBody(nn.Module):
    """Two branches of two asymmetric kernels in either order, summed.

    Args:
        channels_in: Channels of the voxels.
        channels_out: Channels of the result.
        kernels: Those of the first branch; the second branch takes them in turn.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, kernels: tuple[Kernel, Kernel]
    ) -> None:
        super().__init__()
        one, other = kernels
        self.first = nn.Sequential(
            CAB(channels_in, channels_out, one), CAB(channels_out, channels_out, other)
        )
        self.second = nn.Sequential(
            CAB(channels_in, channels_out, other), CAB(channels_out, channels_out, one)
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """The sum of both branches."""
        first: SparseTensor = self.first(x)
        second: SparseTensor = self.second(x)
        return first + second


class Down(nn.Module):
    """A level's body, and the strided convolution to the next level.

    Args:
        body: i -> o channels.
        channels: o.
        stride: Along rho, phi and z.
    """

    def __init__(self, body: nn.Module, channels: int, stride: Kernel) -> None:
        super().__init__()
        self.body = body
        self.pool = SparseConv3d(channels, channels, CUBE, stride=stride, padding=1)

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
        """The body's result, which the decoder gets, and its pooled form."""
        skip: SparseTensor = self.body(x)
        return skip, self.pool(skip)


class Up(nn.Module):
    """Back to the voxels of a finer level.

    Args:
        level: The finer level, with the channels of the coarse voxels and of the skip.
        of: The convolution that made the coarse voxels.
        body: Refines the sum, o -> o channels.
    """

    def __init__(self, level: Level, *, of: SparseConv3d, body: nn.Module) -> None:
        super().__init__()
        self.mix = CAB(level.channels_in, level.channels_out, CUBE)
        self.unpool = SparseInverseConv3d(level.channels_out, level.channels_out, of=of)
        self.body = body

    def forward(self, coarse: SparseTensor, skip: SparseTensor) -> SparseTensor:
        """The refined sum of what comes from below and the skip."""
        fine: SparseTensor = self.unpool(self.mix(coarse))
        refined: SparseTensor = self.body(fine + skip)
        return refined


class DimensionContext(nn.Module):
    """Dimension-decomposition context modelling: [g * u; u], g = sum of three gates.

    A gate is sigmoid(BN(conv(u))) with a kernel along one axis; here the norm comes first.

    Args:
        channels: Of u; the result has twice as many.
    """

    KERNELS: tuple[Kernel, ...] = ((3, 1, 1), (1, 3, 1), (1, 1, 3))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(SubMConv3d(channels, channels, k) for k in self.KERNELS)
        self.norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in self.KERNELS)

    def forward(self, u: SparseTensor) -> SparseTensor:
        """The gated features beside the features."""
        gate = torch.stack(
            [
                torch.sigmoid(norm_rows(cast(nn.BatchNorm1d, norm), conv(u).features))
                for conv, norm in zip(self.convs, self.norms, strict=True)
            ]
        ).sum(dim=0)
        return u.with_features(torch.cat([gate * u.features, u.features], dim=1))


class CylindricalNetwork(nn.Module):
    """Point net, sparse U-net and head; the bodies of the levels are the subclass's.

    Sub-modules: `points`, `stem`, `down.K`, `up.K`, `context`, `head`. `up.0` is the deepest.

    Args:
        classes: Classes, the ignored class 0 included.
        width: Channels of the finest voxels.
        grid: The cells.
        point_features: Channels of a point.
        voxel_features: Channels of a voxel before the stem.
        down_body: Makes the body of an encoder level.
        up_body: Makes the body of a decoder level.
        strides: One per level, the finest first.
    """

    def __init__(
        self,
        *,
        classes: int,
        width: int,
        grid: CylindricalGrid,
        point_features: int,
        voxel_features: int,
        down_body: Body,
        up_body: Body,
        strides: Sequence[Kernel] = STRIDES,
    ) -> None:
        super().__init__()
        self.grid = grid
        channels = [width * 2**level for level in range(len(strides) + 1)]
        heights = [shape[2] for shape in level_shapes(grid.shape, strides)]
        self.points = PointNet(point_features, voxel_features)
        self.stem = AsymmetricBody(voxel_features, width, kernels=(ACROSS, ALONG))
        down, up = [], []
        for number, stride in enumerate(strides):
            level = Level(
                channels_in=channels[number],
                channels_out=channels[number + 1],
                height=heights[number],
            )
            down.append(Down(down_body(level), level.channels_out, stride))
        below = channels[-1]
        for number in reversed(range(len(strides))):
            level = Level(
                channels_in=below, channels_out=channels[number + 1], height=heights[number]
            )
            up.append(Up(level, of=down[number].pool, body=up_body(level)))
            below = level.channels_out
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.context = DimensionContext(2 * width)
        self.head = SubMConv3d(4 * width, classes, CUBE, bias=True)

    def forward(
        self,
        points: Float[Tensor, "p 9"],
        index: Integer[Tensor, "p 4"],
        *,
        batch_size: int | None = None,
    ) -> VoxelLogits:
        """Classify the occupied voxels.

        Args:
            points: Features of `voxelise`, of all scans of the batch.
            index: Scan, rho, phi and z of each point's voxel.
            batch_size: Scans in the batch; the largest number in `index` + 1 if not given.

        Raises:
            ValueError: An index lies outside the grid, or the shapes disagree.
        """
        self._check(points, index)
        if batch_size is None:
            batch_size = int(index[:, 0].max()) + 1 if len(index) else 1
        coords, voxel_of_point, _ = unique_voxels(index, self.grid.shape)
        features = self.points(points, voxel_of_point, coords.shape[0])
        voxels = SparseTensor(
            features, coords, self.grid.shape, batch_size, circular=self.grid.circular
        )
        return VoxelLogits(
            logits=self.segment(voxels).features,
            coords=voxels.coords,
            voxel_of_point=voxel_of_point,
        )

    def segment(self, voxels: SparseTensor) -> SparseTensor:
        """The logits of voxels whose features are known."""
        x: SparseTensor = self.stem(voxels)
        skips = []
        for down in self.down:
            skip, x = down(x)
            skips.append(skip)
        for up in self.up:
            x = up(x, skips.pop())
        logits: SparseTensor = self.head(self.context(x))
        return logits

    def _check(self, points: Tensor, index: Tensor) -> None:
        if points.ndim != 2 or points.shape[1] != POINT_FEATURES:
            raise ValueError(f"points must be (p, {POINT_FEATURES}), got {tuple(points.shape)}")
        if tuple(index.shape) != (points.shape[0], 4):
            raise ValueError(f"index must be ({points.shape[0]}, 4), got {tuple(index.shape)}")


def level_shapes(shape: Sequence[int], strides: Sequence[Kernel]) -> list[tuple[int, ...]]:
    """Cells per axis of every level, the finest first: a kernel of 3, padding of 1."""
    shapes = [tuple(shape)]
    for stride in strides:
        shapes.append(tuple((n - 1) // s + 1 for n, s in zip(shapes[-1], stride, strict=True)))
    return shapes


class Cylinder3d(CylindricalNetwork):
    """The network of the paper's released code, with the kernels that it means.

    Example:
        >>> from heed_lidar.cylindrical import CylindricalGrid
        >>> grid = CylindricalGrid(shape=(48, 36, 16))
        >>> network = Cylinder3d(Cylinder3dConfig(width=8, grid=grid))
        >>> index = torch.tensor([[0, 4, 5, 6], [0, 4, 5, 6], [0, 20, 9, 3]])
        >>> network.eval()(torch.randn(3, 9), index).point_logits.shape
        torch.Size([3, 20])
    """

    def __init__(self, config: Cylinder3dConfig) -> None:
        super().__init__(
            classes=config.classes,
            width=config.width,
            grid=config.grid,
            point_features=config.point_features,
            voxel_features=config.voxel_features,
            down_body=encoder_body,
            up_body=decoder_body,
        )
        self.config = config
        if config.legacy_rulebooks:
            bodies = [level.get_submodule("body") for level in (*self.down, *self.up)]
            for block in (self.stem, *bodies, self.context):
                share_neighbours(block)


def encoder_body(level: Level) -> nn.Module:
    """Cylinder3D's residual body of an encoder level."""
    return AsymmetricBody(level.channels_in, level.channels_out, kernels=(ALONG, ACROSS))


def decoder_body(level: Level) -> nn.Module:
    """Cylinder3D's refining body of a decoder level."""
    channels = level.channels_out
    return nn.Sequential(*(CAB(channels, channels, kernel) for kernel in (ACROSS, ALONG, CUBE)))
