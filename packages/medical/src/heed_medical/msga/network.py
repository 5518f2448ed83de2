"""MSGA (Sinha & Dolz, arXiv 1906.02849, IEEE JBHI 2020): multi-scale self-guided attention.

A residual backbone gives four scales. Each is brought to width C and to the grid of the finest
(a quarter of the image's sides): D_s. All four are fused to one map M. Then two guided steps,
each with its own weights:

    X_s = [D_s, M]                                       step 1
    A_s = conv1( (position(X_s) + channel(X_s)) * conv3(autoencoder(X_s)) )
    X'_s = [D_s, A_s * M]                                step 2, gives B_s in the same way

One autoencoder per step serves all scales. Every D_s and every B_s is read out by a 1 x 1
convolution; inference uses the mean over the B_s alone, training uses all (see `losses`).

Attention sites: `pyramid.{first,second}.{position,channel}.{scale}.attention.attend`, where scale 1
is the finest. A position site weighs the (H/4)*(W/4) pixels of the grid in row-major order
(`Msga.grid`), a channel site weighs the C channels.

Differs from the official code: its layers that forward never uses are left out; any image size is
accepted (see `Msga`). Against the paper: the coefficients of the loss stand in `losses`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from jaxtyping import Float
from torch import Tensor, nn

from heed_core.attention.channel import ChannelGramAttention
from heed_core.attention.position import PositionAttention

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "resnext101_32x8d"]
AttentionKind = Literal["both", "position", "channel", "none"]
STRIDE = 8  # the autoencoder halves the quarter-size grid, which must therefore be even
SMALLEST_SIDE = 16  # below it the autoencoder's second pooling has nothing left to pool


@dataclass(frozen=True, kw_only=True)
class MsgaConfig:
    """All that is needed to rebuild the network."""

    in_channels: int = 1
    """Channels of an image: 1 for grey slices, 3 for colour, or one per modality."""
    classes: int = 5
    """Classes to tell apart, the background (class 0) included."""
    backbone: BackboneName = "resnext101_32x8d"
    """The residual network that makes the scales; the paper's is resnext101_32x8d."""
    width: int = 64
    """Channels of every map after the backbone, a multiple of 8."""
    attention: AttentionKind = "both"
    """Which attention guides a step. "position" and "channel" leave the other branch out. "none"
    leaves out both branches and the autoencoder: a step is then its two convolutions alone."""
    scales: tuple[int, ...] = (1, 2, 3, 4)
    """Which scales are used, 1 (finest) to 4 (coarsest). The backbone ends at the last of them."""
    zoom: int | None = None
    """Enlarge images by this factor first, for slices whose structures are thinner than the 4 x 4
    pixels of the network's finest grid. None: 1, or what a recipe finds for the data."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, naming the setting."""
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {self.in_channels}")
        if self.classes < 2:
            raise ValueError(f"classes counts the background too: at least 2, got {self.classes}")
        if self.backbone not in get_args(BackboneName):
            allowed = ", ".join(get_args(BackboneName))
            raise ValueError(f"backbone must be one of {allowed}, got {self.backbone!r}")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width must be a positive multiple of 8, got {self.width}")
        if self.attention not in get_args(AttentionKind):
            allowed = ", ".join(get_args(AttentionKind))
            raise ValueError(f"attention must be one of {allowed}, got {self.attention!r}")
        if not self.scales or tuple(sorted(set(self.scales) & {1, 2, 3, 4})) != tuple(self.scales):
            raise ValueError(
                f"scales must be rising numbers out of 1, 2, 3, 4, got {tuple(self.scales)}"
            )
        if self.zoom is not None and self.zoom < 1:
            raise ValueError(f"zoom must be at least 1, got {self.zoom}")


@dataclass(frozen=True, kw_only=True)
class MsgaOutput:
    """What the losses need; the tuples hold one tensor per used scale, the finest first."""

    logits_first: tuple[Float[Tensor, "b k h w"], ...]
    """Read-outs of the lateral maps D_s, at the image's size."""
    logits_refined: tuple[Float[Tensor, "b k h w"], ...]
    """Read-outs of the refined maps B_s, at the image's size."""
    codes_first: tuple[Float[Tensor, "b z hz wz"], ...]
    """The autoencoder's codes of step 1; empty where there is no autoencoder."""
    codes_refined: tuple[Float[Tensor, "b z hz wz"], ...]
    """The autoencoder's codes of step 2."""
    ae_inputs: tuple[Float[Tensor, "b c2 hg wg"], ...]
    """What the autoencoders were given: step 1 at every scale, then step 2."""
    ae_outputs: tuple[Float[Tensor, "b c2 hg wg"], ...]
    """What they made of it, in the same order."""

    @property
    def logits(self) -> Float[Tensor, "b k h w"]:
        """The prediction: the mean of the refined read-outs."""
        return torch.stack(self.logits_refined).mean(0)


def conv_block(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    """Convolution, batch normalisation, PReLU with one slope; the size stays."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2),
        nn.BatchNorm2d(channels_out),
        nn.PReLU(),
    )


def resize(maps: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c hs ws"]:
    """Bilinear resizing by pixel areas (corners not aligned)."""
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=False)


class Backbone(nn.Module):
    """The first stages of a torchvision ResNet, under torchvision's parameter names.

    Args:
        name: The torchvision model.
        in_channels: Channels of the image; the first convolution is made for them.
        num_stages: How many of the four stages to build.
    """

    def __init__(self, name: BackboneName, *, in_channels: int, num_stages: int = 4) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None)
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.maxpool = net.bn1, net.relu, net.maxpool
        self.stage_names = tuple(f"layer{index + 1}" for index in range(num_stages))
        for stage in self.stage_names:
            self.add_module(stage, net.get_submodule(stage))
        expansion = int(net.layer1[0].expansion)
        self.channels = tuple(64 * 2**index * expansion for index in range(num_stages))

    def forward(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The stages' outputs, at 1/4, 1/8, 1/16 and 1/32 of the image's sides."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        stages = []
        for name in self.stage_names:
            maps = self.get_submodule(name)(maps)
            stages.append(maps)
        return stages


class SemanticAutoencoder(nn.Module):
    """Squeeze the guided input X_s into a code and rebuild it; the code guides across scales.

    Args:
        dim: Channels of the input; the code has four times as many at a quarter of its sides.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.enc1 = self._level(dim, 2 * dim, nn.MaxPool2d(2))
        self.enc2 = self._level(2 * dim, 4 * dim, nn.MaxPool2d(2))
        self.dec2 = self._level(4 * dim, 2 * dim, nn.ConvTranspose2d(2 * dim, 2 * dim, 2, stride=2))
        self.dec1 = self._level(2 * dim, dim, nn.ConvTranspose2d(dim, dim, 2, stride=2))

    @staticmethod
    def _level(channels_in: int, channels_out: int, last: nn.Module) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            last,
        )

    def forward(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c4 hz wz"], Float[Tensor, "b c h w"]]:
        """The code and the reconstruction; h and w must be even."""
        half = self.enc1(x)
        code = self.enc2(half)
        rebuilt = resize(self.dec2(code), half.shape[-2:])
        return code, self.dec1(rebuilt)


class AttentionBranch(nn.Module):
    """Bring X_s to width C, attend, and mix once more.

    Args:
        width: C; the input has 2 C channels.
        attention: A self-attention over a feature map of C channels.
    """

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.before = conv_block(2 * width, width, 3)
        self.attention = attention
        self.after = conv_block(width, width, 3)

    def forward(self, x: Float[Tensor, "b c2 h w"]) -> Float[Tensor, "b c h w"]:
        """The attended map."""
        attended: Tensor = self.after(self.attention(self.before(x)))
        return attended


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """One guided step at every used scale."""

    maps: list[Tensor]
    codes: list[Tensor]
    rebuilt: list[Tensor]


class GuidedStep(nn.Module):
    """One guided step: X_s to A_s (or X'_s to B_s) at every scale.

    Args:
        width: C.
        scales: The scales in use; each has its own branches and convolutions.
        attention: Which branches exist (see `MsgaConfig`).
    """

    def __init__(
        self, width: int, *, scales: Sequence[int] = (1, 2, 3, 4), attention: AttentionKind = "both"
    ) -> None:
        super().__init__()
        self.names = tuple(str(scale) for scale in scales)
        self.position = nn.ModuleDict()
        self.channel = nn.ModuleDict()
        for name in self.names:
            if attention in ("both", "position"):
                self.position[name] = AttentionBranch(width, PositionAttention(width))
            if attention in ("both", "channel"):
                self.channel[name] = AttentionBranch(width, ChannelGramAttention())
        self.autoencoder = None if attention == "none" else SemanticAutoencoder(2 * width)
        self.semantic = nn.ModuleDict(
            {name: nn.Conv2d(2 * width, width, 3, padding=1) for name in self.names}
        )
        self.project = nn.ModuleDict({name: nn.Conv2d(width, width, 1) for name in self.names})

    def forward(self, inputs: Sequence[Float[Tensor, "b c2 h w"]]) -> StepOutput:
        """The maps of every scale, with the autoencoder's codes and reconstructions."""
        maps, codes, rebuilt = [], [], []
        for name, x in zip(self.names, inputs, strict=True):
            if self.autoencoder is None:
                guided = self.semantic[name](x)
            else:
                code, reconstruction = self.autoencoder(x)
                codes.append(code)
                rebuilt.append(reconstruction)
                guided = self._attend(name, x) * self.semantic[name](reconstruction)
            maps.append(self.project[name](guided))
        return StepOutput(maps=maps, codes=codes, rebuilt=rebuilt)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        branches = [kind[name] for kind in (self.position, self.channel) if name in kind]
        attended: Tensor = branches[0](x)
        for branch in branches[1:]:
            attended = attended + branch(x)
        return attended


class GuidedPyramid(nn.Module):
    """All that follows the backbone: from the stages' maps to logits.

    Args:
        stage_channels: Channels of the backbone's stages, the finest first, up to the last used.
        width: C, the channels of every map in here.
        classes: Classes, the background included.
        scales: The scales in use.
        attention: Which attention guides the steps (see `MsgaConfig`).
    """

    def __init__(
        self,
        stage_channels: Sequence[int],
        *,
        width: int = 64,
        classes: int = 5,
        scales: Sequence[int] = (1, 2, 3, 4),
        attention: AttentionKind = "both",
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        names = [str(scale) for scale in scales]
        self.lateral = nn.ModuleDict(
            {str(scale): conv_block(stage_channels[scale - 1], width, 1) for scale in scales}
        )
        self.predict_first = nn.ModuleDict({name: nn.Conv2d(width, classes, 1) for name in names})
        self.fuse = nn.Sequential(
            conv_block(len(names) * width, width, 3),
            conv_block(width, width, 3),
            conv_block(width, width, 1),
        )
        self.first = GuidedStep(width, scales=scales, attention=attention)
        self.second = GuidedStep(width, scales=scales, attention=attention)
        self.predict_refined = nn.ModuleDict({name: nn.Conv2d(width, classes, 1) for name in names})

    def forward(
        self, stages: Sequence[Float[Tensor, "b _ _ _"]], size: tuple[int, int]
    ) -> Float[Tensor, "b k h w"] | MsgaOutput:
        """`logits` in evaluation, `outputs` in training.

        Args:
            stages: The backbone's maps, the finest first; the finest has even sides.
            size: (H, W) of the image.
        """
        return self.outputs(stages, size) if self.training else self.logits(stages, size)

    def logits(
        self, stages: Sequence[Float[Tensor, "b _ _ _"]], size: tuple[int, int]
    ) -> Float[Tensor, "b k h w"]:
        """The mean of the refined read-outs, at the image's size."""
        laterals = self._laterals(stages)
        _, _, second = self._steps(laterals)
        refined = self._read(self.predict_refined, second.maps)
        # resizing is linear: one resize of the mean is the mean of the four resized
        return resize(torch.stack(refined).mean(0), size)

    def outputs(
        self, stages: Sequence[Float[Tensor, "b _ _ _"]], size: tuple[int, int]
    ) -> MsgaOutput:
        """Everything that the losses need, whatever the mode."""
        laterals = self._laterals(stages)
        inputs, first, second = self._steps(laterals)
        first_logits = self._read(self.predict_first, laterals)
        refined_logits = self._read(self.predict_refined, second.maps)
        return MsgaOutput(
            logits_first=tuple(resize(maps, size) for maps in first_logits),
            logits_refined=tuple(resize(maps, size) for maps in refined_logits),
            codes_first=tuple(first.codes),
            codes_refined=tuple(second.codes),
            ae_inputs=tuple(inputs) if first.codes else (),
            ae_outputs=(*first.rebuilt, *second.rebuilt),
        )

    def _laterals(self, stages: Sequence[Tensor]) -> list[Tensor]:
        grid = stages[0].shape[-2:]
        laterals = []
        for scale in self.scales:
            maps = self.lateral[str(scale)](stages[scale - 1])
            laterals.append(maps if scale == 1 else resize(maps, grid))
        return laterals

    def _steps(self, laterals: list[Tensor]) -> tuple[list[Tensor], StepOutput, StepOutput]:
        fused = self.fuse(torch.cat(laterals[::-1], dim=1))
        inputs = [torch.cat([maps, fused], dim=1) for maps in laterals]
        first = self.first(inputs)
        refined = [
            torch.cat([maps, weights * fused], dim=1)
            for maps, weights in zip(laterals, first.maps, strict=True)
        ]
        return [*inputs, *refined], first, self.second(refined)

    def _read(self, heads: nn.ModuleDict, maps: Sequence[Tensor]) -> list[Tensor]:
        return [heads[str(scale)](x) for scale, x in zip(self.scales, maps, strict=True)]


class Msga(nn.Module):
    """The whole network: an image to logits (evaluation) or to `MsgaOutput` (training).

    An image whose sides are no multiples of 8, or shorter than 16, is extended on both sides by
    its mirror image, and the logits are cropped back.

    Args:
        config: The settings.

    Example:
        >>> import torch
        >>> model = Msga(MsgaConfig(backbone="resnet18", width=8, classes=3)).eval()
        >>> model(torch.zeros(2, 1, 50, 37)).shape
        torch.Size([2, 3, 50, 37])
    """

    def __init__(self, config: MsgaConfig) -> None:
        super().__init__()
        self.config = config
        self.zoom = config.zoom or 1
        self.backbone = Backbone(
            config.backbone, in_channels=config.in_channels, num_stages=config.scales[-1]
        )
        self.pyramid = GuidedPyramid(
            self.backbone.channels,
            width=config.width,
            classes=config.classes,
            scales=config.scales,
            attention=config.attention,
        )
        self.apply(_init_weights)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"] | MsgaOutput:
        """`logits` in evaluation, `outputs` in training.

        Args:
            image: Intensities in [0, 1].

        Raises:
            ValueError: The image has another number of axes or channels.
        """
        return self.outputs(image) if self.training else self.logits(image)

    def logits(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        """The prediction: the mean of the refined read-outs, in the image's own frame."""
        padded = self._extend(image)
        maps = self.pyramid.logits(self.backbone(padded), (padded.shape[-2], padded.shape[-1]))
        return self._cut(maps, image)

    def outputs(self, image: Float[Tensor, "b c h w"]) -> MsgaOutput:
        """Everything that the losses need, whatever the mode."""
        padded = self._extend(image)
        whole = self.pyramid.outputs(self.backbone(padded), (padded.shape[-2], padded.shape[-1]))
        return replace(
            whole,
            logits_first=tuple(self._cut(maps, image) for maps in whole.logits_first),
            logits_refined=tuple(self._cut(maps, image) for maps in whole.logits_refined),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the pixels that a position site weighs, for an image of this size.

        One of them covers 4 x 4 pixels of the image as it is enlarged and extended (see `margins`).
        """
        (top, bottom), (left, right) = self.margins(height, width)
        height, width = self.zoom * height, self.zoom * width
        return (top + height + bottom) // 4, (left + width + right) // 4

    def margins(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Pixels by which the enlarged image is extended: ((top, bottom), (left, right))."""
        return _margin(self.zoom * height), _margin(self.zoom * width)

    def _extend(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c hp wp"]:
        if image.ndim != 4 or image.shape[1] != self.config.in_channels:
            raise ValueError(
                f"image must be (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(image.shape)}"
            )
        height, width = image.shape[-2], image.shape[-1]
        rows, columns = self.margins(height, width)
        if self.zoom > 1:
            image = resize(image, (self.zoom * height, self.zoom * width))
        return _mirror(_mirror(image, -2, *rows), -1, *columns)

    def _cut(
        self, maps: Float[Tensor, "b k hp wp"], image: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b k h w"]:
        # gathered, not sliced: an exported program would guard on the strides of a slice
        for axis, (before, _) in zip((-2, -1), self.margins(*image.shape[-2:]), strict=True):
            side = self.zoom * image.shape[axis]
            places = torch.arange(before, before + side, device=maps.device)
            maps = maps.index_select(axis, places)
        return maps if self.zoom == 1 else resize(maps, image.shape[-2:])


def _margin(side: int) -> tuple[int, int]:
    # No branch on the side: a program exported for one size must serve every other. The factor is
    # put in last, so that torch can divide symbolic sides by it: to export takes half the time.
    strides: int = torch.sym_max(  # type: ignore[no-untyped-call]
        (side + STRIDE - 1) // STRIDE, SMALLEST_SIDE // STRIDE
    )
    target = STRIDE * strides
    before = (target - side) // 2
    return before, target - side - before


def _mirror(image: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Extend an axis by reflection about its border pixels, as often as it takes."""
    side = image.shape[axis]
    places = torch.arange(-before, side + after, device=image.device)
    turn = side - 1
    period = torch.sym_max(2 * turn, 1)  # type: ignore[no-untyped-call]
    # by a tensor: ONNX has no remainder by a symbolic number
    divisor = torch.scalar_tensor(period, dtype=places.dtype, device=places.device)
    phase = torch.remainder(places, divisor)
    return image.index_select(axis, turn - (phase - turn).abs())


def _init_weights(module: nn.Module) -> None:
    """The released recipe: training from scratch, the backbone included."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
