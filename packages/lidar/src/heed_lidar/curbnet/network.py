"""CurbNet (Zhao et al., arXiv 2403.16794, IEEE T-ITS 2025): curbs in single LiDAR scans.

The network is Cylinder3D (`heed_lidar.cylinder3d`) with multi-scale channel attention (MSCA,
`heed_core.attention.multi_scale_column`) as the body of every level of encoder and decoder:

    down i -> o    MSCA(i, o), then the strided convolution
    up   i -> o    CAB 3x3x3, inverse convolution, + skip, then MSCA(o, o)

Point net, stem, strides, context and head are Cylinder3D's. MSCA sees neighbours at several scales,
as points thin out with the range, and whole columns of a (rho, phi) cell, as the height step of a
curb is small.

Attention sites: `down.K.body.attention.probe` and `up.K.body.attention.probe`, one softmax over
channels per occupied column; they can be observed, not steered.

Differs from the released code, which has five levels and no column attention (`released`): this is
the paper's text and figures. Where they are silent the choices stand in MSCA's docstring.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from heed_core.attention.column import AttentionNorm
from heed_core.attention.multi_scale_column import MSCA, ScaleMode
from heed_lidar.cylinder3d.network import CylindricalNetwork, Level, Preset, check_sizes
from heed_lidar.cylindrical import CylindricalGrid


@dataclass(frozen=True, kw_only=True)
class CurbNetConfig:
    """All that is needed to rebuild the network."""

    classes: int = 5
    """Classes to tell apart, the ignored class 0 included."""
    width: int = 32
    """Channels of the finest voxels; doubled at each of the four coarser levels."""
    grid: CylindricalGrid = field(default_factory=CylindricalGrid)
    """The cells around the sensor."""
    point_features: int = 256
    """Channels of a point before the maximum over its voxel."""
    voxel_features: int = 16
    """Channels of a voxel that the stem is given."""
    scales: tuple[int, ...] = (1, 3, 5)
    """Receptive fields of the attention blocks, rising."""
    scale_mode: ScaleMode = "dilation"
    """A scale is the dilation of a convolution on all voxels, or the stride of one and its inverse,
    the paper's words taken literally."""
    attn_norm: AttentionNorm = "unit_mean"
    """The channel weights of a column have mean 1 (unit_mean) or sum to 1 (softmax)."""
    reduction: int = 4
    """Factor of the bottleneck that the channel weights pass."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, naming the setting."""
        check_sizes(self.classes, self.width, self.point_features, self.voxel_features)
        if not self.scales or min(self.scales) < 1 or sorted(set(self.scales)) != [*self.scales]:
            raise ValueError(f"scales must be rising numbers from 1 on, got {self.scales}")
        if self.reduction < 1 or 2 * self.width % self.reduction:
            raise ValueError(
                f"reduction must divide twice the width, {2 * self.width}, got {self.reduction}"
            )


PRESETS: Mapping[Preset, CurbNetConfig] = {
    "base": CurbNetConfig(),
    "small": CurbNetConfig(width=16),
    "tiny": CurbNetConfig(width=8, grid=CylindricalGrid(shape=(240, 180, 16))),
}
"""The paper's network, one with half of its channels, and one that a laptop can train."""


class CurbNet(CylindricalNetwork):
    """Cylinder3D with multi-scale channel attention at every level.

    Example:
        >>> import torch
        >>> grid = CylindricalGrid(shape=(48, 36, 16))
        >>> network = CurbNet(CurbNetConfig(width=8, grid=grid))
        >>> index = torch.tensor([[0, 4, 5, 6], [0, 4, 5, 6], [0, 20, 9, 3]])
        >>> network.eval()(torch.randn(3, 9), index).point_logits.shape
        torch.Size([3, 5])
    """

    def __init__(self, config: CurbNetConfig) -> None:
        def body(channels_in: int, level: Level) -> nn.Module:
            return MSCA(
                channels_in,
                level.channels_out,
                column=level.height,
                scales=config.scales,
                reduction=config.reduction,
                scale_mode=config.scale_mode,
                attn_norm=config.attn_norm,
            )

        super().__init__(
            classes=config.classes,
            width=config.width,
            grid=config.grid,
            point_features=config.point_features,
            voxel_features=config.voxel_features,
            down_body=lambda level: body(level.channels_in, level),
            up_body=lambda level: body(level.channels_out, level),
        )
        self.config = config
