"""The networks of CurbNet's released code, to count and to load its checkpoints.

They are not what the paper describes (`network` is): a fifth level, and blocks of three groups of
asymmetric kernels without column attention. With x the input, k one of 1x3x3, 3x1x3, 3x3x1, and
CAB a convolution, LeakyReLU and batch norm:

| block | | result |
| --- | --- | --- |
| 508, 510 | down, up | (4 X_2 + 6 X_3) * conv1x1x1(x) |
| 520 | down, up | X_1 + 2 X_2 + X_3 + conv1x1x1(CAB_1x3x3(x)) |

Down: X_g = sum over k of CAB_gk(x). Up: X_1 = sum of its branches a_i = CAB_1k(x);
X_2 = sum of b_1 = CAB(X_1), b_2 = CAB(a_2), b_3 = CAB(a_3); X_3 = BN(X_2) + BN(b_2) + BN(b_3).

What that means is kept, as numbers and names are: group 1 of a 508 encoder block and all
convolutions of group 3 of a decoder block never train; the three groups, made for three strides,
see equally far, since a submanifold convolution has no stride. Every kernel has its own neighbours
here.

| variant | blocks | parameters, w = 32, 5 classes |
| --- | --- | --- |
| 508 | the 508 block at the two deepest levels, Cylinder3D's above | 290,208,423 |
| 510 | the 508 block at all levels | 294,605,095 |
| 520 | the 520 block at all levels | 317,300,775 |

The decoder block of 520 has a convolution for the channels below, and is given those of the skip:
the whole network can be counted and filled, and raises a `ValueError` when it runs.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from heed_core.sparse import SparseTensor, SubMConv3d
from heed_core.sparse.blocks import activate_norm_, norm_rows
from heed_lidar.cylinder3d.network import (
    ACROSS,
    ALONG,
    STRIDES,
    CylindricalNetwork,
    Kernel,
    Level,
    check_sizes,
    decoder_body,
    encoder_body,
)
from heed_lidar.cylindrical import CylindricalGrid

Variant = Literal["508", "510", "520"]
FLAT: Kernel = (3, 3, 1)
FIVE_STRIDES: tuple[Kernel, ...] = (*STRIDES, (2, 2, 1))
DEEPEST_OF_508 = 2

PLAIN = (ACROSS, ALONG, FLAT)
CROSSED = (FLAT, ALONG, ACROSS)
GROUPS: tuple[tuple[str, tuple[Kernel, ...]], ...] = (("", PLAIN), ("b", CROSSED), ("c", CROSSED))
"""Suffix of the names of each group, and the kernels in the order of its norms 1, 2, 3."""


@dataclass(frozen=True, kw_only=True)
class ReleasedConfig:
    """All that is needed to rebuild the network."""

    variant: Variant = "510"
    """Which of the released files; 510 is the one that the checkpoint's name points to."""
    classes: int = 5
    """Classes to tell apart, the ignored class 0 included."""
    width: int = 32
    """Channels of the finest voxels; doubled at each of the five coarser levels."""
    grid: CylindricalGrid = field(default_factory=CylindricalGrid)
    """The cells around the sensor."""

    def __post_init__(self) -> None:
        """Refuse what was not released, naming the setting."""
        if self.variant not in get_args(Variant):
            allowed = ", ".join(get_args(Variant))
            raise ValueError(f"variant must be one of {allowed}, got {self.variant!r}")
        check_sizes(self.classes, self.width, 1, 1)


class _Grouped(nn.Module):
    """Nine convolutions and norms under their official names."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        for suffix, kernels in GROUPS:
            for number, kernel in enumerate(kernels, start=1):
                name = "x".join(map(str, kernel))
                conv = SubMConv3d(channels_in, channels_out, kernel)
                self.add_module(f"conv{name}{suffix}", conv)
                self.add_module(f"bn{number}{suffix}", nn.BatchNorm1d(channels_out))

    def norm(self, name: str) -> nn.BatchNorm1d:
        """The norm of that name."""
        norm = self.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm1d)
        return norm

    def branch(self, group: int, number: int, x: SparseTensor) -> SparseTensor:
        """One convolution of a group, its activation and its norm."""
        suffix, kernels = GROUPS[group - 1]
        name = "x".join(map(str, kernels[number - 1]))
        y: SparseTensor = self.get_submodule(f"conv{name}{suffix}")(x)
        return y.with_features(activate_norm_(self.norm(f"bn{number}{suffix}"), y.features))

    def encoder_groups(self, x: SparseTensor) -> tuple[Tensor, Tensor, Tensor]:
        """X_1, X_2, X_3 of an encoder block."""
        first, second, third = (
            sum(
                (self.branch(group, n, x).features for n in (2, 3)),
                self.branch(group, 1, x).features,
            )
            for group in (1, 2, 3)
        )
        return first, second, third

    def decoder_groups(self, x: SparseTensor) -> tuple[Tensor, Tensor, Tensor]:
        """X_1, X_2, X_3 of a decoder block; the convolutions of group 3 are not used."""
        a_1, a_2, a_3 = (self.branch(1, number, x) for number in (1, 2, 3))
        first = a_1 + a_2 + a_3
        b_1, b_2, b_3 = (
            self.branch(2, number, y) for number, y in ((1, first), (2, a_2), (3, a_3))
        )
        second = b_1 + b_2 + b_3
        third = (
            norm_rows(self.norm("bn1c"), second.features)
            + norm_rows(self.norm("bn2c"), b_2.features)
            + norm_rows(self.norm("bn3c"), b_3.features)
        )
        return first.features, second.features, third


class Block508(_Grouped):
    """The body of 508 and 510: the groups, multiplied by a linear map of the input.

    Args:
        level: Its channels.
        decoder: Whether it is a decoder's.
    """

    def __init__(self, level: Level, *, decoder: bool) -> None:
        channels_in = level.channels_out if decoder else level.channels_in
        super().__init__(channels_in, level.channels_out)
        self.conv1x1 = SubMConv3d(channels_in, level.channels_out, 1)
        self.decoder = decoder

    def forward(self, x: SparseTensor) -> SparseTensor:
        """On the sites of `x`."""
        _, second, third = self.decoder_groups(x) if self.decoder else self.encoder_groups(x)
        gate: SparseTensor = self.conv1x1(x)
        return gate.with_features((4 * second + 6 * third) * gate.features)


class Block520(_Grouped):
    """The body of 520: the groups, and a linear map of one more convolution.

    Args:
        level: Its channels.
        decoder: Whether it is a decoder's.
    """

    def __init__(self, level: Level, *, decoder: bool) -> None:
        o = level.channels_out
        super().__init__(o if decoder else level.channels_in, o)
        self.conv_z1 = SubMConv3d(level.channels_in, o, ACROSS)
        self.bn4 = nn.BatchNorm1d(o)
        self.linear = "conv1x1" if decoder else "conv1x1b"
        self.add_module(self.linear, SubMConv3d(o, o, 1))
        self.decoder = decoder

    def forward(self, x: SparseTensor) -> SparseTensor:
        """On the sites of `x`."""
        groups = self.decoder_groups(x) if self.decoder else self.encoder_groups(x)
        first, second, third = groups
        z: SparseTensor = self.conv_z1(x)
        normed = activate_norm_(self.bn4, z.features)
        mapped: SparseTensor = self.get_submodule(self.linear)(z.with_features(normed))
        return mapped.with_features(first + 2 * second + third + mapped.features)


class ReleasedCurbNet(CylindricalNetwork):
    """A network of the released code, under names that `load_official` knows.

    The released files also hold a variant without these blocks, of 256,869,415 parameters, which is
    not here: its size is that of five levels of Cylinder3D and, at each level of o channels, five
    norms and 24 o^2 weights more, and its deepest decoder is dead; that does not tell how its
    layers are connected.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     network = ReleasedCurbNet(ReleasedConfig())
        >>> sum(p.numel() for p in network.parameters())
        294605095
    """

    def __init__(self, config: ReleasedConfig) -> None:
        block = Block520 if config.variant == "520" else Block508
        plain_levels = len(FIVE_STRIDES) - DEEPEST_OF_508 if config.variant == "508" else 0
        plain_until = config.width * 2**plain_levels  # channels

        def down(level: Level) -> nn.Module:
            if level.channels_out <= plain_until:
                return encoder_body(level)
            return block(level, decoder=False)

        def up(level: Level) -> nn.Module:
            if level.channels_out <= plain_until:
                return decoder_body(level)
            return block(level, decoder=True)

        super().__init__(
            classes=config.classes,
            width=config.width,
            grid=config.grid,
            point_features=256,
            voxel_features=16,
            down_body=down,
            up_body=up,
            strides=FIVE_STRIDES,
        )
        self.config = config
